"""The strategy runner's logic under a virtual clock, with the executor and the gateway played by hand."""

import io
import json
from decimal import Decimal

import msgspec
import pytest

from bot.config_file import load
from bot.errors import ConfigError
from bot.log import Log
from bot.model import (
    Ack,
    Candle,
    Heartbeat,
    Instrument,
    PositionReport,
    SignalOutcome,
    Snapshot,
    Target,
    Tick,
)
from bot.outbox import Outbox
from bot.runner import StrategyRunner
from bot.wire import HEARTBEAT_TOPIC, decode_signal, encode, report_topic, snapshot_topic, tick_topic
from tests.harness import write_config
from tests.unit.test_outbox import FaultyFile

BTC, ETH = "BTC/USDT:USDT", "ETH/USDT:USDT"
MS = 1_000_000
GATEWAY_RUN, EXECUTOR_RUN = 11, 22


class VirtualClock:
    def __init__(self):
        self.now_ns = 10**15

    def mono_ns(self):
        return self.now_ns

    def wall_ns(self):
        return 10**18 + self.now_ns


class Scripted:
    """A strategy that says what the test put into `says`, and remembers what it was told."""

    def __init__(self, settings, instruments):
        if settings.get("broken"):
            raise settings["broken"]
        self.settings, self.instruments = settings, instruments
        self.said, self.told, self.says = [], [], None

    def on_tick(self, tick):
        self.told.append(tick)
        return self.says

    def on_report(self, report):
        self.told.append(report)


class WithHistory(Scripted):
    history = {"1m": 3}

    def on_history(self, symbol, candles):
        self.told.append((symbol, candles))


def instrument(symbol=BTC, **changes):
    fields = {"symbol": symbol, "exchange_symbol": "X", "status": "TRADING",
              "price_increment": Decimal("0.10"), "qty_increment": Decimal("0.001"),
              "qty_min": Decimal("0.001"), "qty_max": Decimal(100), "notional_min": Decimal(100),
              "contract_size": Decimal(1), "settle": "USDT"}
    return Instrument(**{**fields, **changes})


class World:
    """A runner and everything around it. Methods play the other processes."""

    def __init__(self, config, strategy_class=Scripted, file=None, run=1):
        self.clock, self.stream = VirtualClock(), io.StringIO()
        self.file = file or FaultyFile()
        self.sent, self.is_listening = [], True
        self.outbox = Outbox(self.file)
        self.runner = StrategyRunner(
            "levels", config, strategy_class, run=run, clock=self.clock, outbox=self.outbox, send=self.take,
            log=Log("strategy-levels", self.clock, "DEBUG", self.stream))
        self.seqs = dict.fromkeys((BTC, ETH), 0)

    def take(self, raw):
        if self.is_listening:
            self.sent.append(decode_signal(raw))
        return self.is_listening

    @property
    def strategy(self):
        return self.runner._strategy

    def signals(self):
        """Return what was sent since the last look."""
        sent, self.sent = self.sent, []
        return sent

    def logged(self, event):
        lines = [json.loads(line) for line in self.stream.getvalue().splitlines()]
        return [line for line in lines if line["event"] == event]

    def snapshot(self, symbol=BTC, timeframe="", count=0, candles=(), **changes):
        self.ticks(snapshot_topic(symbol, timeframe, count), Snapshot(
            instrument=instrument(symbol, **changes), timeframe=timeframe, candles=candles, time_ns=0,
            run=GATEWAY_RUN))

    def ticks(self, topic, message):
        self.runner.on_tick_messages([(topic, encode(message))])

    def tick(self, price=60_000.0, symbol=BTC, skip=0, **changes):
        self.seqs[symbol] += 1 + skip
        fields = {"symbol": symbol, "kind": "trade", "price": price, "size": 1.0, "bid": None,
                  "bid_size": None, "ask": None, "ask_size": None, "side": "buy",
                  "exchange_ns": self.clock.wall_ns(), "receive_ns": self.clock.wall_ns(),
                  "run": GATEWAY_RUN, "seq": self.seqs[symbol]}
        tick = Tick(**{**fields, **changes})
        self.ticks(tick_topic(symbol), tick)
        return tick

    def gateway_beat(self, **changes):
        self.ticks(HEARTBEAT_TOPIC, Heartbeat(publisher="gateway", run=GATEWAY_RUN, time_ns=0,
                                              **{"last_seq": {}, **changes}))

    def report(self, message):
        self.runner.on_report_messages([(report_topic("levels"), encode(message))])

    def executor_beat(self, run=EXECUTOR_RUN):
        self.report(Heartbeat(publisher="executor", run=run, time_ns=0, last_seq={}))

    def position(self, qty="0", version=1, symbol=BTC, run=EXECUTOR_RUN, **changes):
        self.report(PositionReport(**{
            "strategy": "levels", "symbol": symbol, "position_qty": Decimal(qty), "entry_price": None,
            "position_version": version, "open_orders": 0, "unknown_orders": 0, "state": "RUNNING",
            "time_ns": 0, "executor_run": run, **changes}))

    def ack(self, signal):
        self.report(Ack(strategy="levels", run=signal.run, seq=signal.seq))

    def outcome(self, signal, outcome):
        self.report(SignalOutcome(
            strategy="levels", run=signal.run, seq=signal.seq, symbol=signal.symbol, outcome=outcome,
            reason="because", filled_qty=Decimal(0), time_ns=0))

    def wants(self, qty="0.01", **changes):
        """Let the strategy say a Target on a Tick; return what went out."""
        self.strategy.says = qty if isinstance(qty, Target) else Target(BTC, Decimal(qty), **changes)
        self.tick()
        self.strategy.says = None
        return self.signals()

    def wait(self, ms, *, is_gateway_alive=True, is_executor_alive=True):
        """Let time pass in steps of 50 ms, with heartbeats; return what went out."""
        for _ in range(ms // 50):
            self.clock.now_ns += 50 * MS
            if is_gateway_alive:
                self.gateway_beat()
            if is_executor_alive:
                self.executor_beat()
            self.runner.cycle(self.clock.now_ns)
        return self.signals()

    def ready(self):
        self.snapshot()
        self.position()
        self.tick()
        return self


@pytest.fixture
def config(tmp_path):
    def make(**table):
        settings = {"notional": None, **table.pop("settings", {})}
        return load(write_config(tmp_path, strategy={"levels": {"settings": settings, **table}}))
    return make


@pytest.fixture
def world(config):
    return World(config()).ready()


def only(signals):
    assert len(signals) == 1
    return signals[0]


# Warm-up

def test_runner_with_topics_asks_for_everything_it_needs(config):
    runner = World(config(listen=[ETH]), WithHistory).runner
    assert set(runner.tick_topics()) == {
        HEARTBEAT_TOPIC, tick_topic(BTC), tick_topic(ETH), snapshot_topic(BTC), snapshot_topic(ETH),
        snapshot_topic(BTC, "1m", 3), snapshot_topic(ETH, "1m", 3)}


def test_runner_with_missing_snapshots_gives_no_tick_to_the_class(config):
    world = World(config(listen=[ETH]), WithHistory)
    candles = (Candle(0, 1.0, 2.0, 0.5, 1.5, 9.0),)
    world.tick()
    assert world.runner.status()["waiting_for"] == [BTC, ETH, f"history of {BTC}", f"history of {ETH}"]
    assert "waiting for the gateway's snapshots" in world.runner.cycle(world.clock.now_ns)
    world.snapshot(BTC)
    world.snapshot(BTC, "5m", 3, candles)  # another strategy's answer: the topic is a longer one of ours
    world.snapshot(BTC, "1m", 3, candles)
    world.position("0.5", symbol=BTC)
    world.snapshot(ETH)
    world.tick()
    assert world.strategy is None
    world.snapshot(ETH, "1m", 3)
    tick = world.tick(symbol=ETH)
    assert world.strategy.told[:2] == [(BTC, candles), (ETH, ())], "history first"
    assert isinstance(world.strategy.told[2], PositionReport), "then what is known of positions"
    assert world.strategy.told[3:] == [tick], "and only then Ticks"
    assert set(world.strategy.instruments) == {BTC, ETH}
    assert world.runner.status()["warm"] is True
    assert world.runner.cycle(world.clock.now_ns) == ""


def test_runner_with_later_snapshot_keeps_the_instrument_current(world):
    world.snapshot(qty_increment=Decimal("0.1"))
    assert world.strategy.instruments[BTC].qty_increment == Decimal("0.1")
    assert only(world.wants("0.29")).target_qty == Decimal("0.2")


@pytest.mark.parametrize("changes", [
    {"qty_increment": Decimal(0)}, {"price_increment": Decimal("NaN")}, {"qty_increment": Decimal("-0.1")}])
def test_runner_with_senseless_instrument_drops_it(config, changes):
    world = World(config())
    world.snapshot(**changes)
    assert world.strategy is None
    assert world.runner.dropped.counts == {"malformed": 1}


def test_runner_with_settings_hands_them_over_with_exact_decimals(config):
    world = World(config(settings={"pct": Decimal("0.10"), "deep": {"n": 3}}))
    world.snapshot()
    assert world.strategy.settings == {"pct": Decimal("0.10"), "deep": {"n": 3}}
    assert isinstance(world.strategy.settings["pct"], Decimal)


@pytest.mark.parametrize("error", [ValueError("no"), TypeError("no"), msgspec.ValidationError("no")])
def test_runner_with_settings_the_class_refuses_is_a_config_error(config, error):
    world = World(config())
    world.runner.table.settings["broken"] = error
    with pytest.raises(ConfigError, match=r"strategy\.levels\.settings: .*: no"):
        world.snapshot()


# Ticks

def test_runner_with_ticks_hands_over_each_once_in_order(world):
    first = [world.tick(60_000.0 + n) for n in range(5)]
    world.ticks(tick_topic(BTC), first[2])
    assert world.strategy.told[-5:] == first
    assert world.runner.status()["ticks_repeated"] == 1


def test_runner_with_lost_ticks_counts_them_exactly(config):
    world = World(config(listen=[ETH])).ready()
    world.snapshot(ETH)
    world.tick(skip=3)
    world.tick(symbol=ETH, skip=1)
    world.gateway_beat(last_seq={BTC: world.seqs[BTC] + 7, ETH: world.seqs[ETH], "X/Y:Z": 100})
    status = world.runner.status()
    assert (status["ticks"], status["ticks_lost"]) == (3, 3 + 7), "joined ETH at its first Tick"


@pytest.mark.parametrize(("message", "reason"), [
    (b"", "malformed"), (b"\xc1garbage", "malformed"), (b"\x93\xa4tick\x63\x01", "version"),
    (b"\x93" * 100_000, "malformed"), (b"\x91\xa4tick", "malformed")])
def test_runner_with_hostile_bytes_counts_and_goes_on(world, message, reason):
    told = len(world.strategy.told)
    world.runner.on_tick_messages([(b"t/", message)] * 3)
    world.runner.on_report_messages([(b"r/", message)] * 2)
    assert world.runner.dropped.counts == {reason: 5}
    line = only(world.logged("message_dropped"))
    assert (line["reason"], line["count"]) == (reason, 1), "one line now; the rest waits 10 s"
    world.clock.now_ns += 10_000 * MS
    world.runner.on_tick_messages([(b"t/", message)])
    assert world.logged("message_dropped")[1]["count"] == 5
    world.tick()
    assert len(world.strategy.told) == told + 1


@pytest.mark.parametrize("price", [float("nan"), float("inf"), 0.0, -1.0])
def test_runner_with_senseless_price_drops_the_tick(world, price):
    told = len(world.strategy.told)
    world.tick(price)
    assert len(world.strategy.told) == told
    assert world.runner.dropped.counts == {"malformed": 1}


def test_runner_with_ticks_and_reports_of_others_drops_them(world):
    world.tick(symbol=ETH)
    world.position(strategy="other")
    world.position(symbol=ETH)
    assert world.runner.dropped.counts == {"foreign": 3}
    assert all(getattr(told, "symbol", BTC) == BTC for told in world.strategy.told)


def test_runner_with_exception_in_user_code_lets_it_through(world):
    world.strategy.on_tick = lambda tick: 1 / 0
    with pytest.raises(ZeroDivisionError):
        world.tick()
    world.strategy.on_report = lambda report: 1 / 0
    with pytest.raises(ZeroDivisionError):
        world.position()


# A Target becomes a signal

def test_runner_with_target_sends_the_whole_story(world):
    world.position(version=9)
    signal = only(world.wants("0.0109", stop_loss=Decimal("59000.05"), take_profit=Decimal(61_000),
                              reason="up"))
    tick = world.strategy.told[-1]
    assert (signal.strategy, signal.run, signal.seq, signal.symbol) == ("levels", 1, 1, BTC)
    assert (signal.target_qty, signal.stop_loss, signal.take_profit) == (
        Decimal("0.010"), Decimal("59000.0"), Decimal(61_000))
    assert (signal.position_version, signal.reason) == (9, "up")
    assert (signal.tick_run, signal.tick_seq, signal.tick_price) == (tick.run, tick.seq, tick.price)
    assert (signal.tick_exchange_ns, signal.tick_receive_ns) == (tick.exchange_ns, tick.receive_ns)
    assert signal.created_ns == world.clock.wall_ns()
    assert signal.expires_ns == world.clock.wall_ns() + 5_000 * MS
    assert "59000.05" in only(world.logged("target_rounded"))["wish"]
    assert only(world.wants("0.02")).seq == 2


def test_runner_with_target_decided_on_another_symbols_tick_names_its_own_tick(config):
    world = World(config(listen=[ETH])).ready()
    world.snapshot(ETH)
    world.strategy.says = Target(BTC, Decimal(1))
    world.tick(3_000.0, symbol=ETH)
    assert only(world.signals()).tick_price == 60_000.0


@pytest.mark.parametrize(("wish", "reason"), [
    (Target(ETH, Decimal(1)), "foreign_symbol"), (Target(BTC, Decimal("NaN")), "not_finite"),
    (Target(BTC, Decimal(1), stop_loss=Decimal(60_001)), "wrong_side"),
    (Target(BTC, Decimal("0.0004")), "qty_too_small"), (Target(BTC, 1.0), "not_finite")])
def test_runner_with_invalid_target_refuses_counts_and_logs(world, wish, reason):
    assert world.wants(wish) == world.wants(wish) == world.wait(1_000) == []
    assert world.runner.refused.counts == {reason: 2}
    assert only(world.logged("target_refused"))["reason"] == reason
    assert world.file.data == b""


def test_runner_with_unchanged_target_says_it_once(world):
    target = Target(BTC, Decimal(1), stop_loss=Decimal(59_000))
    signal = only(world.wants(target))
    world.ack(signal)
    for _ in range(3):
        assert world.wants(target) == []
        assert world.wants("1.0001", stop_loss=Decimal("59000.04")) == [], "equal on the grid"
    assert only(world.wants("1", stop_loss=Decimal(59_001))).seq == 2, "a moved stop is another target"


@pytest.mark.parametrize("outcome", ["done", "superseded"])
def test_runner_with_target_that_was_done_does_not_repeat_it(world, outcome):
    signal = only(world.wants("1"))
    world.ack(signal)
    world.outcome(signal, outcome)
    world.wait(60_000)
    assert world.wants("1") == []
    assert [told.outcome for told in world.strategy.told if isinstance(told, SignalOutcome)] == [outcome]


@pytest.mark.parametrize("outcome", ["denied", "expired", "rejected", "absent"])
def test_runner_with_target_that_failed_repeats_it_after_a_doubling_wait(world, outcome):
    waits, signal = [], only(world.wants("1"))
    for _ in range(7):
        world.ack(signal)
        world.outcome(signal, outcome)
        began_ns, again = world.clock.now_ns, []
        while not again:
            again = world.wants("1") + world.wait(50)
        signal = only(again)
        waits.append(round((world.clock.now_ns - began_ns) / 1e9))
    assert waits == [1, 2, 4, 8, 16, 30, 30]
    assert signal.seq == 8


def test_runner_with_an_outcome_told_ten_times_waits_as_after_one(world):
    signal, = world.wants()
    world.ack(signal)
    for _ in range(10):
        world.outcome(signal, "denied")
    world.wants()
    assert only(world.wait(1_100)).seq == signal.seq + 1


def test_runner_with_target_that_a_stop_took_out_does_not_bring_it_back(world):
    signal = only(world.wants("1"))
    world.ack(signal)
    world.outcome(signal, "denied")
    world.position("0", version=2)
    world.wait(5_000)
    assert world.wants("1") == []
    assert only(world.wants("0")).position_version == 2
    assert only(world.wants("1")).position_version == 2, "after another target it is a new wish"


# Holding back

def test_runner_without_position_report_holds_the_newest_target(config):
    world = World(config())
    world.snapshot()
    world.executor_beat()
    assert world.wants("1") == world.wants("2") == []
    assert only(world.logged("target_held"))["waits_for"] == "the executor's first position report"
    assert world.runner.status()["held"] == {BTC: "the executor's first position report"}
    decided_ns = world.clock.wall_ns()
    world.wait(1_000)
    world.position(version=5)
    signal = only(world.wait(50))
    assert (signal.target_qty, signal.position_version, signal.created_ns) == (Decimal(2), 5, decided_ns)
    assert world.runner.status()["held"] == {}


def test_runner_with_a_silent_executor_holds_and_goes_on_when_it_is_back(world):
    world.wait(3_050, is_executor_alive=False)
    assert world.wants("1") == []
    assert world.runner.status()["held"] == {BTC: "the executor, which is silent"}
    assert world.wait(1_000, is_executor_alive=False) == []
    assert only(world.wait(50)).target_qty == 1


def test_runner_with_a_silent_gateway_holds_and_goes_on_when_it_is_back(config):
    world = World(config(signal_ttl_ms=10_000)).ready()
    limits = msgspec.structs.replace(world.runner.config.limits, signal_age_ms_max=10_000)
    world.runner.config = msgspec.structs.replace(world.runner.config, limits=limits)
    world.gateway_beat(stale=(BTC,))
    world.wants("1")
    assert world.wait(3_050, is_gateway_alive=False) == []
    assert world.runner.status()["held"] == {BTC: "the gateway, which is silent"}
    assert only(world.wait(50)).target_qty == 1


def test_runner_with_stale_symbol_holds_until_the_gateway_takes_it_back(world):
    world.gateway_beat(stale=(BTC,))
    assert world.wants("1") == []
    assert world.runner.status()["held"] == {BTC: "fresh data of the symbol"}
    world.gateway_beat(stale=(ETH,))
    assert only(world.wait(50))


def test_runner_with_target_held_too_long_drops_and_counts_it(world):
    world.gateway_beat(stale=(BTC,))
    world.wants("1")
    for _ in range(42):  # 2,000 ms: limits.signal_age_ms_max, below signal_ttl_ms
        world.clock.now_ns += 50 * MS
        world.executor_beat()
        world.runner.cycle(world.clock.now_ns)
    world.gateway_beat()
    assert world.wait(200) == []
    assert world.runner.refused.counts == {"held_too_long": 1}
    assert "fresh data" in only(world.logged("target_refused"))["text"]


def test_runner_with_position_moved_while_held_drops_the_target(world):
    world.gateway_beat(stale=(BTC,))
    world.wants("1")
    world.position(version=2)
    assert world.wait(100) == []
    assert world.runner.refused.counts == {"position_changed": 1}


def test_runner_with_another_executor_waits_for_its_positions(world):
    world.executor_beat(run=EXECUTOR_RUN + 1)
    assert world.wants("1") == []
    world.position(version=4, run=EXECUTOR_RUN + 1)
    world.runner.cycle(world.clock.now_ns)
    assert only(world.signals()).position_version == 4


def test_runner_with_an_outcome_that_was_lost_asks_for_it_with_the_same_signal(world):
    signal, = world.wants()
    world.ack(signal)
    assert world.wait(1_950) == []
    assert world.wait(4_100) == [signal] * 3
    world.outcome(signal, "absent")
    assert world.wait(3_000) == [] and world.wants()[0].seq == signal.seq + 1


def test_runner_with_looping_strategy_keeps_the_rate_and_sends_the_newest(world):
    sent = []
    for qty in range(1, 101):  # 5 s, 20 different targets a second
        world.clock.now_ns += 50 * MS
        world.executor_beat()
        sent += world.wants(str(qty))
        world.runner.cycle(world.clock.now_ns)
        sent += world.signals()
        for signal in sent:
            world.ack(signal)
    assert 13 <= len(sent) <= 14, "a burst of 4 and then 2 a second"
    assert sent[-1].target_qty >= 90, "the newest, not the next in a queue"
    assert {s.target_qty for s in world.wait(1_000)} == {Decimal(100)}


def test_runner_with_wish_taken_back_while_waiting_sends_nothing(world):
    for qty in ("1", "2", "3", "4"):
        world.ack(only(world.wants(qty)))
    assert world.wants("5") == []
    assert world.wants("4") == [], "what is in force already"
    assert world.wait(1_900) == []


# The outbox

def test_runner_with_unacknowledged_signals_sends_them_again_in_order(world):
    first, second = only(world.wants("1")), only(world.wants("2"))
    assert world.wait(450) == []
    assert world.wait(50) == [first, second]
    world.ack(first)
    assert world.wait(1_000) == [second]
    assert world.wait(10_000)[-1] == second, "also when it has expired: it needs an outcome"
    world.ack(second)
    world.outcome(second, "done")
    assert world.wait(2_000) == []
    status = world.runner.status()
    assert (status["signals"], status["acked"], status["outbox"]) == (2, 2, 0)


def test_runner_with_a_slow_executor_sends_ever_less_often_and_to_a_new_one_at_once(world):
    signal = only(world.wants("1"))
    times = []
    for tenth in range(600):
        times += [tenth / 10 for _ in world.wait(100)]
    gaps = [round(b - a) for a, b in zip(times, times[1:], strict=False)]
    assert gaps[:4] == [1, 2, 4, 8] and set(gaps[4:]) == {10}
    world.executor_beat(run=EXECUTOR_RUN + 1)
    assert world.wait(50) == [signal], "the one before may have died with it unread"


def test_runner_with_nobody_pulling_keeps_the_order(world):
    world.is_listening = False
    world.wants("1")
    world.is_listening = True
    assert [s.seq for s in world.wants("2")] == [1, 2]


def test_runner_with_a_pull_that_comes_between_two_signals_does_not_let_the_newer_overtake(world):
    world.is_listening = False
    world.wants("1")
    take, refusals = world.runner._send, iter([False])
    world.runner._send = lambda raw: next(refusals, True) and take(raw)
    world.is_listening = True
    assert world.wants("2") == []
    assert [s.seq for s in world.wait(50)] == [1, 2]


def test_runner_after_a_restart_sends_the_earlier_runs_signals_unchanged(config):
    world = World(config()).ready()
    signals = [only(world.wants("1")), only(world.wants("2"))]
    world.ack(signals[0])
    again = World(config(), file=FaultyFile(world.file.data), run=2)
    assert again.wait(50) == [signals[1]], "before it is warm, too"
    again.ready()
    assert only(again.wants("3")).run == 2
    again.ack(signals[1])
    assert [s.run for s in again.wait(500)] == [2]


def test_runner_after_a_restart_does_not_bring_back_what_a_stop_took_out(config):
    world = World(config()).ready()
    world.ack(only(world.wants("1")))
    moved = World(config(), file=FaultyFile(world.file.data), run=2).ready()
    moved.position("0", version=2)
    assert moved.wants("1") == []
    same = World(config(), file=FaultyFile(world.file.data), run=2).ready()
    assert only(same.wants("1")), "the outcome was not heard, and nothing moved"


def test_runner_with_full_outbox_refuses_more(config):
    world = World(config(outbox_max=2)).ready()
    world.wants("1")
    kept = only(world.wants("2"))
    assert world.wants("3") == []
    assert world.runner.refused.counts == {"outbox_full": 1}
    world.ack(kept)
    assert only(world.wants("3")).target_qty == 3


def test_runner_with_full_disk_sends_nothing_and_lives(world):
    world.file.room = 10
    assert world.wants("1") == world.wait(1_000) == []
    assert only(world.logged("outbox_failed"))["reason"] == "append"
    world.file.room = 10**9
    assert only(world.wants("1")).target_qty == 1


def test_runner_with_failing_sync_goes_on_and_logs(world):
    world.file.fail = {"sync", "replace"}
    signal = only(world.wants("1"))
    world.wait(200)
    assert only(world.logged("outbox_failed"))["reason"] == "sync"
    world.file.fail = {"append"}
    world.ack(signal)
    assert [line["reason"] for line in world.logged("outbox_failed")] == ["sync", "acknowledge"]
    assert world.wait(1_000) == []


def test_runner_with_signal_nobody_could_read_refuses_it(world):
    world.strategy.says = Target(BTC, Decimal(1))
    world.tick(exchange_ns=2**64 - 1)
    assert world.wait(1_000) == []
    assert world.runner.refused.counts == {"malformed": 1}
    assert world.file.data == b""


def test_runner_with_torn_outbox_says_what_it_cut(config):
    world = World(config(), file=FaultyFile(b"OBX1\x00\x00"))
    assert only(world.logged("outbox_cut"))["cut_bytes"] == 6


def test_runner_with_cycle_says_what_it_did(world):
    only(world.wants("1"))
    world.clock.now_ns += 500 * MS
    assert world.runner.cycle(world.clock.now_ns) == "sent 1 of 1 unacknowledged signals again"
    assert world.runner.cycle(world.clock.now_ns) == ""


def test_runner_with_status_shows_positions(world):
    world.position("-0.5", version=3)
    assert world.runner.status()["positions"] == {BTC: {"qty": "-0.5", "version": 3, "state": "RUNNING"}}
