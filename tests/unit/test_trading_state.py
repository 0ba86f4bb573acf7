"""What may pass just now: each cause gives its state, the gravest first, and ends by itself where it may."""

from types import SimpleNamespace

import pytest

from bot import __version__
from bot.config import BusConfig, GuardConfig, HealthConfig
from bot.events import Reconciled, SymbolLocked
from bot.halt import HaltFiles
from bot.model import Tick
from bot.rows import ExchangePosition
from bot.trading_state import LISTED_NS, TradingState
from tests.factory import (
    BTC,
    ETH,
    MS,
    NOW,
    SECOND,
    D,
    HandClock,
    changed,
    filled,
    folded,
    instrument,
    intended,
    limits,
    received,
    signal,
)

SILENCE_MS, RECOVER_S = BusConfig().silence_ms, 5


def tick(clock, symbol=BTC, kind="mark", **changes):
    fields = {
        "symbol": symbol,
        "kind": kind,
        "price": 100.0,
        "size": None,
        "bid": None,
        "bid_size": None,
        "ask": None,
        "ask_size": None,
        "side": None,
        "exchange_ns": clock.wall,
        "receive_ns": clock.wall,
        "run": 1,
        "seq": 1,
    }
    return Tick(**(fields | changes))


class Bench:
    """A TradingState in which all is well until a test spoils something; this is the exchange, too."""

    def __init__(self, path, *events):
        self.clock, self.refused, self.clock_offset_ns = HandClock(), "", 0
        self.halts = HaltFiles(path / "halt")
        self.contract = SimpleNamespace(trouble="")
        self.canary, self.asked = ("", True), []
        self.instruments = {BTC: instrument()}
        self.reconciler = SimpleNamespace(
            is_ready=True, contract=self.contract, traded=(BTC, ETH), read={BTC, ETH}, told={},
            last_mono_ns=0, request=self.asked.append,
        )
        config = SimpleNamespace(
            bus=BusConfig(),
            limits=limits(),
            owner_of=lambda symbol: "levels",
            health=HealthConfig(),
            guard=GuardConfig(),
            executor=SimpleNamespace(recover_s=RECOVER_S),
            fingerprint=lambda is_shared: "alike",
        )
        self.books = folded(*events)
        self.it = TradingState(config, self.clock, exchange=self, halts=self.halts, books=self.books,
                               reconciler=self.reconciler, canary=lambda: self.canary)
        self.feed()

    def refusal(self, action):
        return self.refused

    def recover(self):
        """Let the time to recover pass, with the books compared and prices coming."""
        self.clock.step(RECOVER_S)
        self.reconciler.last_mono_ns = self.clock.mono
        self.feed()

    def feed(self, *symbols):
        self.it.hear_gateway()
        for symbol in symbols or (BTC, ETH):
            self.it.see_price(tick(self.clock, symbol))


@pytest.fixture
def bench(tmp_path):
    return Bench(tmp_path)


def test_state_with_all_well_is_running(bench):
    assert bench.it.of_all() == bench.it.of_symbol(BTC) == ("RUNNING", "")


def test_state_with_a_silent_gateway_is_reducing_until_it_is_heard(bench):
    bench.clock.step(SILENCE_MS / 1_000)
    assert bench.it.of_all()[0] == "RUNNING"
    bench.clock.step(0.001)
    assert bench.it.of_all() == ("REDUCING", "the gateway is silent")
    bench.recover()
    assert bench.it.of_all()[0] == "RUNNING"


@pytest.mark.parametrize(("spoil", "state", "why"), [
    (lambda b: b.halts.set("all", who="op", why="odd", clock=b.clock), "HALTED", "op: odd"),
    (lambda b: setattr(b.reconciler, "is_ready", False), "RECONCILING", "not compared"),
    (lambda b: setattr(b.contract, "trouble", "hedge mode"), "REDUCING", "hedge mode"),
    (lambda b: setattr(b, "refused", "banned"), "REDUCING", "banned"),
])
def test_state_with_one_cause_for_all_says_it_for_each_symbol(bench, spoil, state, why):
    spoil(bench)
    for told in (bench.it.of_all(), bench.it.of_symbol(BTC)):
        assert told[0] == state and why in told[1]


def test_state_with_several_causes_is_the_gravest(bench):
    bench.clock.step(3_600)
    bench.reconciler.is_ready = False
    assert bench.it.of_all()[0] == "RECONCILING"
    bench.halts.set("all", who="op", why="odd", clock=bench.clock)
    assert bench.it.of_all()[0] == "HALTED"


def test_state_with_one_stale_mark_reduces_that_symbol_alone(bench):
    bench.clock.step(3.001)
    bench.feed(ETH)
    assert bench.it.of_all() == ("RUNNING", "")
    assert bench.it.of_symbol(BTC) == ("REDUCING", "stale_mark: its mark price makes no progress")
    assert bench.it.of_symbol(ETH)[0] == "RUNNING"
    bench.clock.step(3.001)
    bench.it.hear_gateway()
    assert bench.it.of_all() == ("REDUCING", "no symbol has a fresh mark price")


def test_state_with_a_quote_alone_is_not_fresh(bench):
    bench.clock.step(3.001)
    bench.it.hear_gateway()
    bench.it.see_price(tick(bench.clock, BTC, "quote", price=None, bid=99.0, ask=101.0))
    assert bench.it.of_symbol(BTC)[0] == "REDUCING"
    assert (bench.it.prices(BTC).mark, bench.it.prices(BTC).bid) == (100, 99)


def test_freshness_with_this_hosts_clock_off_goes_by_the_exchanges(bench):
    bench.clock_offset_ns = 400 * MS
    bench.clock.step(2.8)
    bench.it.see_price(tick(bench.clock, ETH))
    assert bench.it.of_symbol(BTC) == ("REDUCING", "stale_mark: its mark price makes no progress")
    bench.it.see_price(tick(bench.clock, exchange_ns=bench.clock.wall + 300 * MS))
    assert bench.it.of_symbol(BTC)[0] == "RUNNING"


def test_state_of_a_locked_symbol_leaves_the_others(tmp_path):
    bench = Bench(tmp_path, SymbolLocked(symbol=BTC, cause="books_differ", evidence="1 and 2"))
    assert bench.it.of_symbol(BTC) == ("LOCKED", "books_differ: 1 and 2")
    assert bench.it.of_symbol(ETH)[0] == bench.it.of_all()[0] == "RUNNING"


def test_state_of_a_symbol_with_an_unknown_order_is_locked(tmp_path):
    bench = Bench(tmp_path, received(signal()), intended("o1"), changed("o1", "lose"))
    assert bench.it.of_symbol(BTC) == ("LOCKED", "order o1 is unknown")


@pytest.mark.parametrize("scope", ["strategy:levels", f"symbol:{BTC}"])
def test_halt_of_a_strategy_or_symbol_halts_what_it_names(bench, scope):
    bench.halts.set(scope, who="op", why="odd", clock=bench.clock)
    assert bench.it.of_symbol(BTC) == ("HALTED", "op: odd") and bench.it.of_all()[0] == "RUNNING"


def beat(clock, age_s=0, **changes):
    alike = {"version": __version__, "shared_config": "alike", "mono_ns": clock.mono - int(age_s * SECOND)}
    return {"ended": False, **alike, **changes}


def finding(rule, clock, age_s=0):
    return {"health": beat(clock, age_s, findings=[{"rule": rule, "text": "1 MB, limit 2"}])}


TROUBLES = [
    ("silence", lambda b: b.clock.step(4), lambda b: b.feed(), "the gateway is silent"),
    ("clock", lambda b: setattr(b, "clock_offset_ns", -501 * MS), lambda b: setattr(b, "clock_offset_ns", 0),
     "clock_offset: -501 ms"),
    ("ban", lambda b: setattr(b, "refused", "banned"), lambda b: setattr(b, "refused", ""), "banned"),
    ("canary", lambda b: setattr(b, "canary", ("-4120 refused", True)),
     lambda b: setattr(b, "canary", ("", True)), "-4120 refused"),
    *((rule, lambda b, r=rule: b.it.hear_beats(finding(r, b.clock)), lambda b: b.it.hear_beats({}),
       f"{rule}: 1 MB") for rule in ("disk_low", "host_memory_low", "clock_offset")),
]


@pytest.mark.parametrize(("spoil", "mend", "why"), [row[1:] for row in TROUBLES],
                         ids=[row[0] for row in TROUBLES])
def test_state_after_a_trouble_recovers_by_itself_after_some_healthy_seconds_and_a_comparison(
        bench, spoil, mend, why):
    assert bench.it.of_all()[0] == "RUNNING"
    spoil(bench)
    state, told = bench.it.of_all()
    assert state == "REDUCING" and told.startswith(why)
    mend(bench)
    bench.feed()
    state, told = bench.it.of_all()
    assert state == "REDUCING" and told.startswith(f"recovering from: {why}"), "not at once"
    bench.clock.step(RECOVER_S - 0.001)
    bench.feed()
    bench.reconciler.last_mono_ns = bench.clock.mono
    assert bench.it.of_all()[0] == "REDUCING", "not before its seconds are over"
    bench.clock.step(0.001)
    assert bench.it.of_all()[0] == "RUNNING"


def test_state_after_a_trouble_asks_for_a_comparison_and_waits_for_it(bench):
    bench.it.of_all()
    bench.refused = "banned"
    bench.it.of_all()
    bench.refused = ""
    bench.clock.step(60)
    bench.feed()
    assert bench.it.of_all()[0] == "REDUCING" and bench.asked == ["recovered"]
    bench.reconciler.last_mono_ns = bench.clock.mono
    assert bench.it.of_all()[0] == "RUNNING"


def test_state_with_a_trouble_at_the_start_has_nothing_to_recover_from(bench):
    bench.refused = "banned"
    assert bench.it.of_all()[0] == "REDUCING"
    bench.refused = ""
    assert bench.it.of_all()[0] == "RUNNING"


def test_state_before_the_canary_has_flown_is_reconciling(bench):
    bench.canary = ("", False)
    assert bench.it.of_all() == ("RECONCILING", "it is not proven yet that the exchange takes a stop")
    bench.refused = "banned"
    assert bench.it.of_all()[0] == "REDUCING", "what reduces must not wait for it"


@pytest.mark.parametrize("beats", [
    finding("disk_low", HandClock(), age_s=11), finding("cpu_busy", HandClock()), {},
    {"health": {}, "guard": beat(HandClock())},
    {"health": beat(HandClock(), age_s=70), "guard": beat(HandClock(), age_s=60)},
    {"health": beat(HandClock(), findings=[{"text": "no rule"}])},
    {"gateway": beat(HandClock()), "guard": beat(HandClock(), age_s=11, version="0.0.1"),
     "health": beat(HandClock(), ended=True, version="0.0.1")},
    {"strategy-levels": beat(HandClock(), version="whatever it likes to say"), "paper": {"version": ""}},
])
def test_state_with_old_beats_or_ones_that_say_nothing_bad_is_running(bench, beats):
    bench.it.hear_beats(beats)
    assert bench.it.of_all()[0] == "RUNNING"


@pytest.mark.parametrize("name", ["gateway", "guard", "health"])
@pytest.mark.parametrize("other", [{"version": "0.0.1"}, {"shared_config": "other"}, {"shared_config": None}])
def test_state_with_a_process_of_another_version_or_config_lets_nothing_open(bench, name, other):
    bench.it.of_all()
    bench.it.hear_beats({name: beat(bench.clock, **other)})
    state, why = bench.it.of_all()
    assert state == "REDUCING" and why.startswith(f"start_gate: {name} runs")
    bench.it.hear_beats({name: beat(bench.clock)})
    bench.recover()
    assert bench.it.of_all()[0] == "RUNNING"


@pytest.mark.parametrize("age_s", [61, -1])  # the future: of the boot before
def test_state_that_nobody_watches_lets_nothing_open(bench, age_s):
    bench.it.of_all()
    bench.it.hear_beats({name: beat(bench.clock, age_s, ended=True) for name in ("health", "guard")})
    state, why = bench.it.of_all()
    assert state == "REDUCING" and why.startswith("unwatched: neither health nor guard for 60 s")
    bench.it.hear_beats({"health": beat(bench.clock), "guard": beat(bench.clock, age_s)})
    bench.recover()
    assert bench.it.of_all()[0] == "RUNNING"


@pytest.mark.parametrize(("is_supervised", "state"), [(True, "REDUCING"), (False, "RUNNING")])
def test_state_whose_watchers_never_came_lets_nothing_open_where_they_belong(bench, is_supervised, state):
    if is_supervised:
        bench.it.expect_watchers()
    for step_s, wanted in ((0, "RUNNING"), (60, "RUNNING"), (0.001, state)):
        bench.clock.step(step_s)
        bench.feed()
        bench.it.hear_beats({"gateway": beat(bench.clock)})
        assert bench.it.of_all()[0] == wanted
    bench.it.hear_beats({"guard": beat(bench.clock)})
    bench.recover()
    assert bench.it.of_all()[0] == "RUNNING", "one of the two is enough"


@pytest.mark.parametrize(("price", "state"), [
    (103.0, "RUNNING"), (103.1, "REDUCING"), (97.0, "RUNNING"), (96.9, "REDUCING"), (0.0, "REDUCING"),
    (float("nan"), "RUNNING"), (1e300, "REDUCING"), (-1.0, "REDUCING")])
def test_state_of_a_symbol_whose_mark_jumped_is_reducing_for_a_while(bench, price, state):
    bench.it.see_price(tick(bench.clock, price=price))
    assert bench.it.of_symbol(BTC)[0] == state and bench.it.of_symbol(ETH)[0] == "RUNNING"
    bench.clock.step(RECOVER_S)
    bench.it.hear_gateway()
    bench.it.see_price(tick(bench.clock, ETH))
    bench.it.see_price(tick(bench.clock, price=price))
    assert bench.it.of_symbol(BTC)[0] == "RUNNING"


def test_exposure_of_a_symbol_is_what_lies_beside_its_own_book(tmp_path):
    bench = Bench(
        tmp_path, received(signal(symbol=ETH)), intended("o1", "10", symbol=ETH), changed("o1", "lose"))
    bench.books.wallet_balance = D(1_000)
    bench.reconciler.told[ETH] = there(ETH, qty=10, liquidation=80)
    own, here = bench.it.exposure(ETH), bench.it.exposure(BTC)
    assert (own.others_notional, here.others_notional) == (0, 1_000)
    assert (own.liquidation_distance_pct, here.liquidation_distance_pct) == (20, None)
    assert here.equity == 1_000 and here.open_orders == here.entries_last_minute == 1


def test_state_of_a_symbol_that_came_anew_is_reconciling_until_it_was_compared(bench):
    bench.reconciler.read.discard(BTC)
    assert bench.it.of_symbol(BTC) == ("RECONCILING", "its books are not compared with the exchange yet")
    assert bench.it.of_symbol(ETH)[0] == bench.it.of_all()[0] == "RUNNING"


def there(symbol=BTC, qty=0, mark=100, liquidation=None):
    return ExchangePosition(symbol=symbol, qty=D(qty), entry_price=D(100), mark_price=D(mark),
                            liquidation_price=liquidation and D(liquidation))


def test_exposure_counts_what_the_exchange_holds_beyond_the_books(bench):
    bench.reconciler.told = {BTC: there(qty=-30, mark=90), "XYZ/USDT:USDT": there("XYZ/USDT:USDT", 5)}
    assert bench.it.exposure(ETH).others_notional == 30 * 100 + 5 * 100, "the newest mark, else the told one"


def test_day_pnl_is_not_known_before_the_books_are_compared_nor_from_a_price_that_just_jumped(tmp_path):
    held = filled("", "10", fee=D(0))
    bench = Bench(tmp_path, Reconciled(trigger="t", differences=(), positions={}, wallet_balance=D(1_000),
                                       exchange_ns=NOW - SECOND), held)
    assert bench.it.day_pnl() == 0
    bench.reconciler.is_ready = False
    assert bench.it.day_pnl() is None, "the first marks of a run may come before its fills"
    bench.reconciler.is_ready = True
    bench.it.see_price(tick(bench.clock, price=50.0))
    assert bench.it.day_pnl() is None
    bench.clock.step(RECOVER_S)
    bench.it.see_price(tick(bench.clock, price=50.0))
    assert bench.it.day_pnl() == -500, "and it was true"


@pytest.mark.parametrize(("price", "wallet", "halts"), [
    (98.0, 520, True), (98.0, 520.01, False), (98.0, 519.99, True), (98.001, 520, False), (97.999, 520, True),
    (0.1, 1_000, True), (100.0, 500, True), (100.0, 500.01, False), (103.0, 1, True), (100.0, 2_000, False)])
def test_day_loss_at_the_limit_halts_and_one_step_less_does_not(tmp_path, price, wallet, halts):
    # 10 held at 100, a day begun with 1,000, and a limit of 500: what is realized and what is not add up.
    compared = [Reconciled(trigger="t", differences=(), positions={}, wallet_balance=D(str(balance)),
                           exchange_ns=at_ns) for balance, at_ns in ((1_000, NOW - SECOND), (wallet, NOW))]
    bench = Bench(tmp_path, compared[0], filled("", "10", fee=D(0)), compared[1])
    bench.it.see_price(tick(bench.clock, price=price))
    bench.clock.step(RECOVER_S)
    bench.it.see_price(tick(bench.clock, price=price))
    assert bench.it.day_loss() == "", "one comparison is not enough"
    bench.feed(ETH)
    assert ("day_loss" in bench.it.of_all()[1]) == halts, "but nothing opens until the next"
    bench.clock.step(LISTED_NS / SECOND)
    assert bench.it.day_loss() == "" and ("day loss" in bench.asked) == halts
    bench.reconciler.last_mono_ns = bench.clock.mono
    for _ in range(2):
        loss = bench.it.day_loss()
        assert loss.startswith("day_loss: limit 500, was ") == bool(loss) == halts, loss


def test_day_loss_of_marks_and_fills_halts_at_once(tmp_path):
    bench = Bench(tmp_path, Reconciled(trigger="t", differences=(), positions={}, wallet_balance=D(1_000),
                                       exchange_ns=NOW - SECOND), filled("", "1000", fee=D(0)))
    assert bench.it.day_loss() == ""
    bench.it.see_price(tick(bench.clock, price=99.5))
    assert bench.it.day_loss().startswith("day_loss: limit 500, was 500.00")
    bench.reconciler.last_mono_ns = bench.clock.mono
    assert bench.it.day_loss(), "the next comparison does not doubt it anew"


def test_day_loss_by_a_withdrawal_that_is_listed_late_does_not_halt(tmp_path):
    def compared(wallet, transfers, at_ns):
        return Reconciled(trigger="t", differences=(), positions={}, wallet_balance=D(wallet),
                          transfers=D(transfers), exchange_ns=at_ns)
    bench = Bench(tmp_path, compared(1_000, 0, NOW - SECOND))
    assert bench.it.day_loss() == ""
    bench.books.apply(compared(300, 0, NOW))
    bench.reconciler.last_mono_ns = bench.clock.mono
    assert bench.it.day_loss() == "" and "day_loss" in bench.it.of_all()[1]
    bench.clock.step(LISTED_NS / SECOND)
    bench.books.apply(compared(300, -700, NOW + 6 * SECOND))
    bench.reconciler.last_mono_ns = bench.clock.mono
    assert bench.it.day_loss() == ""
    bench.recover()
    assert bench.it.of_all()[0] == "RUNNING"


def test_beat_tells_of_a_symbol_and_of_money_what_alerts_look_at(tmp_path):
    bench = Bench(tmp_path, Reconciled(trigger="t", differences=(), positions={}, wallet_balance=D(1_000),
                                       exchange_ns=NOW - SECOND), filled("", "10", fee=D(0)),
                  received(signal(symbol=ETH)), intended("o1", "10", symbol=ETH), changed("o1", "lose"))
    bench.reconciler.told = {BTC: there(qty=10, liquidation=80)}
    assert bench.it.told_of(BTC) == {"state": "RUNNING", "position_qty": 10, "liquidation_distance_pct": 20,
                                     "unknown_orders": 0, "locks": 0}
    assert bench.it.told_of(ETH) == {"state": "LOCKED", "position_qty": 0, "liquidation_distance_pct": None,
                                     "unknown_orders": 1, "locks": 0}
    bench.it.see_price(tick(bench.clock, price=98.0))
    most = limits().day_loss_max
    assert bench.it.money() == {"wallet_balance": 1_000, "equity": 980, "day_pnl": -20,
                                "day_loss_ratio": round(20 / most, 4)}


def test_day_pnl_without_a_mark_goes_by_what_the_exchange_told(tmp_path):
    bench = Bench(tmp_path, Reconciled(trigger="t", differences=(), positions={}, wallet_balance=D(1_000),
                                       unrealized_pnl=D(600), exchange_ns=NOW - SECOND),
                  filled("", "10", price="100", fee=D(0), exchange_ns=NOW - 2 * SECOND))
    bench.it._prices.clear()
    bench.reconciler.told = {BTC: there(qty=10, mark=160)}
    assert bench.it.day_pnl() == 0
