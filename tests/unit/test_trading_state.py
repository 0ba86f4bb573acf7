"""What may pass just now: each cause gives its state, the gravest first, and ends by itself where it may."""

from types import SimpleNamespace

import pytest

from bot.config import BusConfig
from bot.events import SymbolLocked
from bot.halt import HaltFiles
from bot.model import Tick
from bot.trading_state import TradingState
from tests.factory import BTC, ETH, MS, SECOND, HandClock, changed, folded, intended, limits, received, signal

SILENCE_MS = BusConfig().silence_ms


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
        self.reconciler = SimpleNamespace(is_ready=True, contract=self.contract, traded=(BTC, ETH))
        config = SimpleNamespace(bus=BusConfig(), limits=limits(), owner_of=lambda symbol: "levels")
        self.it = TradingState(config, self.clock, exchange=self, halts=self.halts, books=folded(*events),
                               reconciler=self.reconciler)
        self.feed()

    def refusal(self, action):
        return self.refused

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
    bench.feed()
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
    bench.clock_offset_ns = 10 * SECOND
    assert bench.it.of_symbol(BTC)[0] == "REDUCING"
    bench.it.see_price(tick(bench.clock, exchange_ns=bench.clock.wall + 10 * SECOND - 100 * MS))
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
