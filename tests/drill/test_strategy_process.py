"""The strategy process with real sockets: the test plays gateway and executor, and kills it."""

import random
import time
from decimal import Decimal
from pathlib import Path
from textwrap import dedent

import msgspec
import pytest
import zmq

from bot.config_file import load
from bot.model import (
    Ack,
    Candle,
    Heartbeat,
    Instrument,
    PositionReport,
    SignalOutcome,
    Snapshot,
    Tick,
    TradingSignal,
)
from bot.wire import HEARTBEAT_TOPIC, decode_signal, encode, report_topic, snapshot_topic, tick_topic
from tests.harness import start_process, stop_process, wait_until, write_config

BTC = "BTC/USDT:USDT"
PRICE = 60_000.0
USER_CODE = """
    from decimal import Decimal
    from bot.model import Target

    class Mine:
        history = {"1m": 2}

        def __init__(self, settings, instruments):
            self.qty = Decimal(settings["qty"])
            if self.qty <= 0:
                raise ValueError(f"qty must be above 0; was {self.qty}")
            self.candles = ()

        def on_history(self, symbol, candles):
            self.candles = candles

        def on_tick(self, tick):
            if tick.price == 666:
                raise RuntimeError("the user's mistake")
            wanted = {60_001: self.qty, 60_002: 2 * self.qty}.get(tick.price)
            return wanted and Target(tick.symbol, wanted, reason=f"{len(self.candles)} candles")
"""


class Stage:
    """One strategy process, and the sockets of the two processes it talks to."""

    def __init__(self, tmp_path: Path, monkeypatch, settings=None, class_path="mine:Mine"):
        (tmp_path / "mine.py").write_text(dedent(USER_CODE))
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        self.path = write_config(tmp_path, strategy={"levels": {
            "class": class_path, "settings": {"notional": None, **(settings or {"qty": Decimal("0.010")})}}})
        self.config, self.log = load(self.path), tmp_path / "bot.strategy.log"
        self.context = zmq.Context()
        self.ticks = self._bound(zmq.XPUB, self.config.bus.ticks)
        self.ticks.setsockopt(zmq.XPUB_VERBOSE, 1)
        self.reports = self._bound(zmq.PUB, self.config.bus.reports)
        self.signals = None
        self.pull()
        self.seq, self.run, self.asked, self.process = 0, 1, set(), None

    def _bound(self, kind, channel):
        socket = self.context.socket(kind)
        socket.linger = 0
        socket.bind(channel.endpoint)
        return socket

    def pull(self):
        self.signals = self._bound(zmq.PULL, self.config.bus.signals)

    def start(self, name="levels"):
        self.process = start_process("bot.strategy", self.path, "--name", name)

    def kill(self):
        self.process.kill()
        self.process.wait()

    def close(self):
        if self.process is not None:
            stop_process(self.process)
        self.context.destroy(linger=0)

    def say(self, topic: bytes, message) -> None:
        self.ticks.send_multipart([topic, encode(message)])

    def beat(self) -> None:
        """Play what both partners repeat: heartbeats, the position, and what is subscribed to."""
        while self.ticks.poll(0):
            self.asked.add(self.ticks.recv())
        instrument = Instrument(
            symbol=BTC, exchange_symbol="BTCUSDT", status="TRADING", price_increment=Decimal("0.10"),
            qty_increment=Decimal("0.001"), qty_min=Decimal("0.001"), qty_max=Decimal(100),
            notional_min=Decimal(100), contract_size=Decimal(1), settle="USDT")
        candles = tuple(Candle(n * 60 * 10**9, 1.0, 1.0, 1.0, 1.0, 1.0) for n in range(2))
        for timeframe, count in (("", 0), ("1m", 2)):
            if b"\1" + snapshot_topic(BTC, timeframe, count) in self.asked:
                self.say(snapshot_topic(BTC, timeframe, count), Snapshot(
                    instrument=instrument, timeframe=timeframe, candles=candles[:count], time_ns=0,
                    run=self.run))
        self.say(HEARTBEAT_TOPIC, Heartbeat(publisher="gateway", run=self.run, time_ns=0,
                                            last_seq={BTC: self.seq} if self.seq else {}))
        self.report(Heartbeat(publisher="executor", run=5, time_ns=0, last_seq={}), HEARTBEAT_TOPIC)
        self.report(PositionReport(
            strategy="levels", symbol=BTC, position_qty=Decimal(0), entry_price=None, position_version=4,
            open_orders=0, unknown_orders=0, state="RUNNING", time_ns=0, executor_run=5))

    def report(self, message, topic=report_topic("levels")) -> None:
        self.reports.send_multipart([topic, encode(message)])

    def tick(self, price=PRICE) -> None:
        self.seq += 1
        now_ns = time.time_ns()
        self.say(tick_topic(BTC), Tick(
            symbol=BTC, kind="trade", price=price, size=1.0, bid=None, bid_size=None, ask=None, ask_size=None,
            side="buy", exchange_ns=now_ns, receive_ns=now_ns, run=self.run, seq=self.seq))

    def status(self) -> dict:
        """Return the beat file of the running process; empty when there is none of it yet."""
        path = self.config.run_path("strategy-levels") / "strategy-levels.json"
        beat = msgspec.json.decode(path.read_bytes()) if path.exists() else {}
        return beat if self.process and beat.get("pid") == self.process.pid else {}

    def wait(self, predicate, timeout=10):
        """Wait with both partners alive."""
        def beaten():
            self.beat()
            return predicate()
        return wait_until(beaten, timeout=timeout, step=0.05)

    def warm(self) -> None:
        self.wait(lambda: self.status().get("warm") and self.status()["positions"])

    def received(self) -> list[TradingSignal]:
        found = []
        while self.signals.poll(0):
            found.append(decode_signal(self.signals.recv()))
        return found

    def next_signals(self) -> list[TradingSignal]:
        return self.wait(self.received)

    def ack(self, signal: TradingSignal) -> None:
        self.report(Ack(strategy="levels", run=signal.run, seq=signal.seq))


@pytest.fixture
def stage(tmp_path, monkeypatch):
    made = Stage(tmp_path, monkeypatch)
    yield made
    made.close()


def test_strategy_process_killed_between_write_and_ack_sends_the_signal_until_acknowledged(stage):
    stage.start()
    stage.warm()
    stage.tick()
    stage.tick(60_001.0)
    signal = stage.next_signals()[0]
    assert (signal.target_qty, signal.position_version, signal.seq) == (Decimal("0.010"), 4, 1)
    assert (signal.reason, signal.tick_seq) == ("2 candles", 2)
    assert set(stage.next_signals()) == {signal}, "again, unchanged: nobody acknowledged it"

    stage.kill()
    stage.received()
    stage.start()
    assert set(stage.next_signals()) == {signal}, "the outbox survived kill -9"
    stage.warm()
    stage.tick(60_002.0)
    newer = stage.wait(lambda: [s for s in stage.received() if s.seq == 1 and s.run > signal.run])[0]
    assert newer.target_qty == Decimal("0.020")
    stage.ack(signal)
    stage.ack(newer)
    stage.report(SignalOutcome(
        strategy="levels", run=newer.run, seq=1, symbol=BTC, outcome="done", reason="",
        filled_qty=newer.target_qty, time_ns=0))
    stage.wait(lambda: stage.status().get("outbox") == 0)
    stage.received()
    deadline = time.monotonic() + 1.2  # two resend_ms
    stage.wait(lambda: time.monotonic() > deadline)
    assert stage.received() == []
    assert stop_process(stage.process) == 0


def test_strategy_process_killed_before_anybody_pulled_has_lost_nothing(stage):
    stage.signals.close(linger=0)
    stage.start()
    stage.warm()
    stage.tick(60_001.0)
    stage.wait(lambda: stage.status().get("outbox") == 1)
    stage.kill()
    stage.pull()
    stage.start()
    assert stage.next_signals()[0].target_qty == Decimal("0.010")


def test_strategy_process_with_hostile_bytes_on_both_sockets_lives_and_counts(stage):
    stage.start()
    stage.warm()
    stage.tick()
    chance, sent = random.Random(1), 0
    beat = encode(Heartbeat(publisher="x", run=1, time_ns=0, last_seq={}))
    old = beat.replace(b"heartbeat\x01", b"heartbeat\x00")
    for n in range(300):
        raw = b"\xc1" + chance.randbytes(chance.randrange(200))  # 0xc1 begins no msgpack
        for socket, topic in ((stage.ticks, tick_topic(BTC)), (stage.reports, report_topic("levels"))):
            socket.send_multipart([topic, raw if n else old])
            sent += 1
    stage.ticks.send_multipart([tick_topic(BTC), b"1", b"2"])  # three parts
    stage.reports.send_multipart([report_topic("levels"), bytes(300_000)])  # above MESSAGE_BYTES_MAX
    expected = {"malformed": sent - 2 + 1, "version": 2, "oversized": 1}
    stage.wait(lambda: stage.status().get("dropped") == expected)
    stage.ticks.send_multipart([tick_topic(BTC), bytes(5_000_000)])  # libzmq closes this connection
    before = stage.status()["ticks"]
    stage.wait(lambda: stage.tick() or stage.status()["ticks"] > before)
    signal = stage.wait(lambda: stage.tick(60_001.0) or stage.received())[0]
    assert signal.target_qty == Decimal("0.010")
    lines = [line for line in stage.log.read_text().splitlines() if "message_dropped" in line]
    assert 3 <= len(lines) <= 8, "one line per reason and 10 s"
    assert stage.process.poll() is None


def test_strategy_process_with_lost_ticks_counts_them(stage):
    stage.start()
    stage.warm()
    stage.tick()
    stage.seq += 5
    stage.tick()
    stage.seq += 2
    stage.wait(lambda: stage.status().get("ticks_lost") == 7)
    assert stage.status()["ticks"] == 2


def test_strategy_process_with_error_in_user_code_ends_with_70_and_a_traceback(stage):
    stage.start()
    stage.warm()
    stage.tick(666.0)
    assert stage.process.wait(10) == 70
    crash = msgspec.json.decode(stage.log.read_text().splitlines()[-1])
    assert crash["event"] == "crashed"
    assert "RuntimeError: the user's mistake" in crash["traceback"]
    assert "mine.py" in crash["traceback"]


def test_strategy_process_with_settings_the_class_refuses_ends_with_78(tmp_path, monkeypatch):
    stage = Stage(tmp_path, monkeypatch, settings={"qty": 0})
    stage.start()
    stage.wait(lambda: stage.process.poll() is not None)
    assert stage.process.returncode == 78
    assert ("strategy.levels.settings: mine:Mine refuses them: qty must be above 0; was 0"
            in stage.log.read_text())
    stage.close()


@pytest.mark.parametrize(("class_path", "name", "text"), [
    ("nowhere.at.all:Mine", "levels", "strategy.levels.class: nowhere.at.all cannot be imported"),
    ("mine:Absent", "levels", "strategy.levels.class: must name a class"),
    ("mine:Mine", "other", "strategy.other: is not in the file"),
])
def test_strategy_process_without_its_class_ends_with_78(tmp_path, monkeypatch, class_path, name, text):
    stage = Stage(tmp_path, monkeypatch, class_path=class_path)
    stage.start(name)
    assert stage.process.wait(10) == 78
    assert f"config error: {text}" in stage.log.read_text()
    assert not list(stage.config.state_path.glob("strategy/*/*.outbox")), "nothing was started"
    stage.close()
