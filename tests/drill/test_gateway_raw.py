"""Gateway and paper exchange as processes: every recorded frame once, exact counts of loss, restarts.

A subscriber of ours stands where a strategy would; what it hears is held against an independent
reading of the recording, and its LossCounter against what the gateway says it published.
"""

import asyncio
import gzip
import json
import time
from collections import defaultdict
from urllib.request import Request, urlopen

import msgspec
import pytest

from bot.bus import ZmqSubscriber
from bot.config_file import load
from bot.model import Heartbeat, Tick
from bot.wire import HEARTBEAT_TOPIC, LossCounter, decode_tick, tick_topic
from tests.harness import data_path, start_process, stop_process, write_config

SYMBOL = "BTC/USDT:USDT"
RECORDING = data_path("hftbacktest/usdm-btcusdt-20240808.gz")
TRADES, QUOTES = 21_313, 66_089
needs_recording = pytest.mark.skipif(
    not RECORDING.is_file(), reason=f"recorded data is absent: {RECORDING} (TRADEHOST_DATA)")


class Subscriber:
    """What a strategy's socket hears. counter is what is tested, seqs by run is the truth beside it."""

    def __init__(self, config):
        bus = load(config).bus
        self.counter, self.ticks, self.beats = LossCounter(), [], []
        self.seqs = defaultdict(list)
        self._socket = ZmqSubscriber(bus.ticks, bus, [HEARTBEAT_TOPIC, tick_topic(SYMBOL)])

    def listen(self):
        self._socket.watch(self._take)

    def close(self):
        self._socket.close()

    def _take(self, batch):
        for _, raw in batch:
            message = decode_tick(raw)
            if isinstance(message, Tick):
                self.counter.saw_tick(message)
                self.ticks.append(message)
                self.seqs[message.run].append(message.seq)
            elif isinstance(message, Heartbeat):
                self.counter.saw_heartbeat(message, frozenset([SYMBOL]))
                self.beats.append(message)

    @property
    def said(self):
        """Return how many Ticks the current run says it published."""
        return self.beats[-1].last_seq[SYMBOL] if self.beats else 0


class Stage:
    """A configuration, its processes, and a subscriber that is there before the first Tick."""

    def __init__(self, tmp_path, **overrides):
        self.config = write_config(tmp_path, **overrides)
        self.processes = {}
        self.subscriber = Subscriber(self.config)

    def start(self, name):
        self.processes[name] = start_process(f"bot.{name}", self.config)

    def kill(self, name):
        self.processes[name].kill()
        self.processes[name].wait()

    def status(self):
        return msgspec.json.decode((load(self.config).state_path / "run" / "gateway.json").read_bytes())

    def log(self):
        lines = (self.config.parent / "bot.gateway.log").read_text().splitlines()
        return [json.loads(line)["event"] for line in lines if line.startswith("{")]

    async def until(self, predicate, timeout=30):
        deadline = time.monotonic() + timeout
        while not predicate():
            assert time.monotonic() < deadline, f"not true within {timeout} s"
            assert all(p.poll() in (None, -9) for p in self.processes.values()), "a process ended"
            await asyncio.sleep(0.02)

    def end(self):
        self.subscriber.close()
        for process in self.processes.values():
            stop_process(process)


def perform(tmp_path, story, **overrides):
    async def main():
        stage = Stage(tmp_path, **overrides)
        try:
            await story(stage)
        finally:
            stage.end()
    asyncio.run(main())


def raw_playback(speed):
    return {"market": "recording", "recording": str(RECORDING), "playback": "raw", "speed": speed,
            "symbols": [SYMBOL]}


def recorded(seconds=float("inf")):
    """Return what the first seconds of the recording hold, read with the standard library alone."""
    expected, first_ns = [], None
    with gzip.open(RECORDING, "rt") as file:
        for line in file:
            stamp, raw = line.split(" ", 1)
            first_ns = first_ns or int(stamp)
            if int(stamp) - first_ns > seconds * 1e9:
                break
            data = json.loads(raw).get("data", {})
            if data.get("e") == "trade":
                expected.append(("trade", float(data["p"]), float(data["q"]), None, None, None, None,
                                 "sell" if data["m"] else "buy", data["T"] * 1_000_000))
            elif data.get("e") == "bookTicker":
                bid, bid_size, ask, ask_size = (float(data[key]) for key in "bBaA")
                expected.append(("quote", (bid + ask) / 2, 0.0, bid, bid_size, ask, ask_size, None,
                                 data["T"] * 1_000_000))
    return expected


def told(ticks):
    return [(t.kind, t.price, t.size, t.bid, t.bid_size, t.ask, t.ask_size, t.side, t.exchange_ns)
            for t in ticks]


async def _curtain(stage):
    # The gateway is up and the subscriber joined before the exchange exists: nothing can be missed.
    stage.start("gateway")
    stage.subscriber.listen()
    await stage.until(lambda: stage.subscriber.beats)
    stage.start("paper")


@needs_recording
def test_gateway_with_the_recording_as_fast_as_it_goes_publishes_each_frame_once(tmp_path):
    expected = recorded()
    assert sum(row[0] == "trade" for row in expected) == TRADES and len(expected) == TRADES + QUOTES

    async def story(stage):
        await _curtain(stage)
        await stage.until(lambda: stage.subscriber.ticks)
        began = time.monotonic()
        await stage.until(lambda: len(stage.subscriber.ticks) >= len(expected), 60)
        took = time.monotonic() - began
        beats = len(stage.subscriber.beats)
        await stage.until(lambda: len(stage.subscriber.beats) > beats + 1)  # nothing comes after the last
        ticks, counter = stage.subscriber.ticks, stage.subscriber.counter
        assert told(ticks) == expected
        assert [t.seq for t in ticks] == list(range(1, len(expected) + 1))
        assert (counter.received, counter.lost, counter.repeated) == (len(expected), 0, 0)
        status = stage.status()
        assert status["symbols"][SYMBOL]["trade"] == TRADES and status["symbols"][SYMBOL]["quote"] == QUOTES
        assert not status["dropped"] and not any(s["missed_trades"] for s in status["symbols"].values())
        print(f"raw, as fast as it goes: {TRADES} trades and {QUOTES} quotes in {took:.1f} s, "
              f"{len(expected) / took:,.0f} Ticks/s through exchange, gateway and subscriber, 0 lost")

    perform(tmp_path, story, paper=raw_playback(0))


@needs_recording
@pytest.mark.parametrize("seconds", [20, pytest.param(345, marks=pytest.mark.drill)])
def test_gateway_with_the_recording_at_its_own_pace_publishes_each_frame_once(tmp_path, seconds):
    expected = recorded(seconds)

    async def story(stage):
        await _curtain(stage)
        await stage.until(lambda: stage.subscriber.ticks)
        began = time.monotonic()
        await stage.until(lambda: len(stage.subscriber.ticks) >= len(expected), seconds + 15)
        took = time.monotonic() - began
        assert told(stage.subscriber.ticks[:len(expected)]) == expected
        assert stage.subscriber.counter.lost == stage.subscriber.counter.repeated == 0
        assert abs(took - seconds) < 3
        print(f"raw at 1x: {len(expected)} Ticks in {took:.1f} s, each once, in order, 0 lost")

    perform(tmp_path, story, paper=raw_playback(1))


@needs_recording
def test_loss_of_a_slow_subscriber_equals_the_truth(tmp_path):
    # ipc: unix sockets buffer little, so that 100 messages are what lies between the two. The
    # subscriber does not read at all while the recording is played, and later in pieces.
    async def story(stage):
        await _curtain(stage)
        socket = stage.subscriber._socket
        await stage.until(lambda: stage.subscriber.ticks)
        take = stage.subscriber._take

        def slowly(batch):
            take(batch)
            time.sleep(0.05)  # blocks this loop: a slow on_tick
        socket._handler = slowly
        await stage.until(lambda: stage.subscriber.said == TRADES + QUOTES, 120)
        counter, [seqs] = stage.subscriber.counter, stage.subscriber.seqs.values()
        published = stage.status()["symbols"][SYMBOL]["ticks"]
        assert published == TRADES + QUOTES
        assert len(seqs) == len(set(seqs)) == counter.received and seqs == sorted(seqs)
        assert counter.lost == published - len(seqs) > 0
        print(f"slow subscriber, HWM 100: {published} published, {counter.received} received, "
              f"{counter.lost} lost and counted")

    endpoint = f"ipc://{tmp_path}/ticks"
    perform(tmp_path, story, paper=raw_playback(0), bus={"ticks": {"endpoint": endpoint, "hwm": 100}})


def test_gateway_killed_and_started_again_is_counted_right(tmp_path):
    async def story(stage):
        await _curtain(stage)
        for _ in range(3):
            heard = len(stage.subscriber.ticks)
            await stage.until(lambda heard=heard: len(stage.subscriber.ticks) > heard + 20)
            stage.kill("gateway")
            stage.start("gateway")
        heard, beats = len(stage.subscriber.ticks), len(stage.subscriber.beats)
        await stage.until(lambda: len(stage.subscriber.ticks) > heard + 20
                          and len(stage.subscriber.beats) > beats + 1)
        counter, runs = stage.subscriber.counter, list(stage.subscriber.seqs.items())
        assert len(runs) == 4 and [run for run, _ in runs] == sorted(run for run, _ in runs)
        # Each run counts from its first Tick, which is number 1 whether it was heard or not.
        truth = sum(max(seqs[-1], stage.subscriber.said if run == runs[-1][0] else 0) - len(seqs)
                    for run, seqs in runs)
        assert counter.lost == truth
        assert counter.received == sum(len(seqs) for _, seqs in runs) and counter.repeated == 0
        print(f"3 kills of the gateway: {counter.received} received in 4 runs, {counter.lost} lost, counted")

    perform(tmp_path, story)


def test_gateway_with_its_exchange_killed_and_back_goes_on_by_itself(tmp_path):
    async def story(stage):
        await _curtain(stage)
        await stage.until(lambda: len(stage.subscriber.ticks) > 20)
        await stage.until(lambda: stage.subscriber.beats[-1].stale == ())
        stage.kill("paper")
        await stage.until(lambda: stage.subscriber.beats[-1].stale == (SYMBOL,))
        heard = len(stage.subscriber.ticks)
        stage.start("paper")
        await stage.until(lambda: len(stage.subscriber.ticks) > heard + 20
                          and stage.subscriber.beats[-1].stale == ())
        [seqs] = stage.subscriber.seqs.values()
        assert seqs == list(range(1, len(seqs) + 1)) and stage.subscriber.counter.lost == 0
        trades = [t.exchange_ns for t in stage.subscriber.ticks if t.kind == "trade"]
        assert trades == sorted(trades)
        status = stage.status()
        assert status["reconnects"] >= 2 and status["streams"] == {"prices-0": "up", "marks-1": "up"}
        assert {"stream_down", "stream_up", "feed_condition"} <= set(stage.log())
        print(f"exchange killed and back: {status['reconnects']} reconnects, {len(seqs)} Ticks, 0 lost")

    perform(tmp_path, story, gateway={"stale_ms": 2_000})


def test_gateway_with_marks_frozen_on_a_living_connection_is_stale_and_connects_anew(tmp_path):
    async def story(stage):
        await _curtain(stage)
        await stage.until(lambda: stage.subscriber.beats[-1].stale == () and stage.subscriber.ticks)
        bind = load(stage.config).paper.bind
        fault = {"match": "btcusdt@markPrice@1s", "do": "freeze", "duration_ms": 60_000}
        request = Request(f"http://{bind}/paper/stream", json.dumps(fault).encode(), method="POST")
        answer = await asyncio.to_thread(lambda: json.load(urlopen(request, timeout=5)))
        assert answer == {"connections": 1}
        await stage.until(lambda: stage.subscriber.beats[-1].stale == (SYMBOL,))
        assert any(t.kind == "trade" for t in stage.subscriber.ticks[-10:]), "trades went on"
        await stage.until(lambda: stage.subscriber.beats[-1].stale == ())
        assert stage.status()["reconnects"] == 1 and stage.subscriber.counter.lost == 0
        print("marks frozen: stale, connected anew, fresh")

    perform(tmp_path, story, gateway={"stale_ms": 2_000})


def test_gateway_with_no_symbol_that_the_exchange_lists_ends_with_78(tmp_path):
    async def story(stage):
        stage.start("paper")
        (elsewhere := tmp_path / "gateway").mkdir()
        urls = load(stage.config).exchange
        gateway = start_process("bot.gateway", write_config(
            elsewhere, mode="testnet", paper=None, strategy={"levels": {"symbols": ["DOGE/USDT:USDT"]}},
            exchange={"rest_url": urls.rest_url, "ws_url": urls.ws_url}))
        try:
            assert await asyncio.to_thread(gateway.wait, 20) == 78
        finally:
            stop_process(gateway)
        said = (elsewhere / "bot.gateway.log").read_text()
        assert "symbols: at least one must be listed by binanceusdm; was DOGE/USDT:USDT" in said
        assert "Traceback" not in said

    perform(tmp_path, story)
