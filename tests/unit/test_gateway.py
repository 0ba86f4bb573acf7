"""bot/gateway.py with fake edges and a virtual clock: connections, freshness, heartbeats, Snapshots."""

import asyncio
import heapq
import io
import json
from decimal import Decimal
from itertools import pairwise
from types import SimpleNamespace

import msgspec
import pytest

from bot.budget import Budget
from bot.config import Config, ExchangeConfig, GatewayConfig, LimitsConfig, StrategyConfig
from bot.errors import ConfigError, ExchangeError
from bot.exchange import Exchange
from bot.gateway import ASKED_MAX, TickProducer
from bot.log import Log
from bot.model import Candle, Heartbeat, Instrument, Snapshot, Tick
from bot.stream import StreamClosed
from bot.wire import HEARTBEAT_TOPIC, decode_tick, snapshot_topic, tick_topic

BTC, ETH = "BTC/USDT:USDT", "ETH/USDT:USDT"
S = 1_000_000_000
WALL0 = 1_800_000_000 * S
OFFSET = 1_250_000_000  # the exchange's clock is ahead, as in the recording
RUN = 42


class VirtualClock:
    """Time passes when the test says so; whoever sleeps is woken in order."""

    def __init__(self):
        self.now_ns, self._sleepers, self._count = 0, [], 0

    def mono_ns(self):
        return self.now_ns

    def wall_ns(self):
        return WALL0 + self.now_ns

    def jitter(self):
        return 1.0

    async def sleep(self, seconds):
        future = asyncio.get_running_loop().create_future()
        self._count += 1
        heapq.heappush(self._sleepers, (self.now_ns + round(seconds * S), self._count, future))
        await future

    async def pass_time(self, seconds):
        until_ns = self.now_ns + round(seconds * S)
        await settle()
        while self._sleepers and self._sleepers[0][0] <= until_ns:
            self.now_ns, _, future = heapq.heappop(self._sleepers)
            if not future.done():
                future.set_result(None)
            await settle()
        self.now_ns = until_ns


async def settle():
    for _ in range(20):
        await asyncio.sleep(0)


class FakeStream:
    def __init__(self):
        self._frames = asyncio.Queue()
        self.is_closed = False

    def put(self, *frames):
        for raw in frames:
            self._frames.put_nowait(raw)

    def end(self, why="connection lost"):
        self._frames.put_nowait(StreamClosed(why))

    def __aiter__(self):
        return self

    async def __anext__(self):
        raw = await self._frames.get()
        if isinstance(raw, StreamClosed):
            raise raw
        return raw

    async def close(self):
        self.is_closed = True
        self.end("closed by us")


class FakeExchange:
    def __init__(self, clock, listed):
        self._clock, self._listed = clock, listed
        self.instruments, self.is_down, self.loads = {}, False, 0
        self.candle_calls, self.measured, self.candle_error = [], 0, None
        self.ahead_ns, self.budget = OFFSET, Budget()
        self._config = SimpleNamespace(id="binanceusdm")

    unlisted = Exchange.unlisted

    async def refresh(self, symbols):
        if self.is_down:
            raise ExchangeError("no connection")
        status = dict.fromkeys(symbols, "SETTLING")
        self.instruments = {symbol: msgspec.structs.replace(row, status=status.get(symbol, ""))
                            for symbol, row in self.instruments.items()}

    async def load(self):
        self.loads += 1
        if self.is_down:
            raise ExchangeError("no connection")
        one = Decimal(1)
        self.instruments = {symbol: Instrument(
            symbol=symbol, exchange_symbol=symbol.split(":")[0].replace("/", ""), status="TRADING",
            price_increment=one, qty_increment=one, qty_min=one, qty_max=one, notional_min=one,
            contract_size=one, settle="USDT") for symbol in self._listed}

    async def measure_clock(self):
        self.measured += 1
        if self.is_down:
            raise ExchangeError("no connection")

    @property
    def clock_offset_ns(self):
        return self.ahead_ns

    def server_ns(self):
        return self._clock.wall_ns() + self.ahead_ns

    async def candles(self, symbol, timeframe, count):
        self.candle_calls.append((symbol, timeframe, count))
        await self._clock.sleep(0.05)
        if self.candle_error == symbol:
            raise ExchangeError("no connection")
        minute_ns = self.server_ns() // (60 * S) * 60 * S
        return [Candle(minute_ns - back * 60 * S, 1.0, 2.0, 0.5, 1.5, float(back))
                for back in range(count, 0, -1)]

    def market_url(self, section, streams):
        return f"ws://{'marks' if section == 'market' else 'prices'}/{'/'.join(streams)}"


class World:
    """A producer among fakes. opened: (seconds, "prices" or "marks") of each attempt to connect."""

    def __init__(self, traded=(BTC,), listed=(BTC, ETH), beat_s=1, **gateway):
        self.config = Config(
            mode="paper", gateway=GatewayConfig(**gateway),
            exchange=ExchangeConfig(rest_url="http://x", ws_url="ws://x", api_key_file="k",
                                    api_secret_file="s"),
            limits=LimitsConfig(order_notional_max=Decimal(1), position_notional_max=Decimal(1),
                                exposure_notional_max=Decimal(1), day_loss_max=Decimal(1),
                                price_collar_pct=Decimal(1), orders_per_minute_max=1),
            strategy={"levels": StrategyConfig(class_path="a:B", symbols=tuple(traded))})
        self.clock, self.text, self.beat_s = VirtualClock(), io.StringIO(), beat_s
        self.exchange = FakeExchange(self.clock, listed)
        self.published, self.opened, self.streams, self.tasks = [], [], {}, []
        self.is_refusing = False
        self.producer = TickProducer(
            self.config, self.clock, Log("gateway", self.clock, stream=self.text), run_id=RUN,
            exchange=self.exchange, open_stream=self._open, spawn=self._spawn,
            publish=lambda topic, raw: self.published.append((topic, decode_tick(raw))))

    async def _open(self, url, *, connect_timeout_ms, frame_bytes_max):
        name = url.split("/")[2]
        self.opened.append((self.clock.now_ns / S, name))
        if self.is_refusing:
            raise StreamClosed("cannot connect")
        self.streams[name] = FakeStream()
        return self.streams[name]

    def _spawn(self, work):
        self.tasks.append(asyncio.get_running_loop().create_task(work))
        return self.tasks[-1]

    async def start(self):
        self._spawn(self._each(self.beat_s, self.producer.beat))
        self._spawn(self._each(self.config.gateway.snapshot_s, self.producer.repeat))
        self._spawn(self._each(self.config.gateway.clock_check_s, self.producer.measure_clock))
        self._spawn(self.producer.produce())
        await self.run_for(0)

    async def _each(self, seconds, action):
        while True:
            if (result := action()) is not None:
                await result
            await self.clock.sleep(seconds)

    async def run_for(self, seconds):
        await self.clock.pass_time(seconds)
        for task in self.tasks:
            if task.done() and task.exception():
                raise task.exception()

    async def run_with(self, seconds, *, marks=True, trades=True, symbol="BTCUSDT"):
        """Let seconds pass, each with a mark and a trade."""
        for _ in range(seconds):
            await self.run_for(1)
            at_ms = self.exchange.server_ns() // 1_000_000
            if trades:
                self.streams["prices"].put(trade(at_ms, at_ms, symbol))
            if marks:
                self.streams["marks"].put(mark(at_ms, symbol))
            await self.run_for(0)

    def told(self, kind, topic=None):
        return [m for t, m in self.published if isinstance(m, kind) and topic in (None, t)]

    def log(self, event):
        return [line for line in map(json.loads, self.text.getvalue().splitlines()) if line["event"] == event]

    def opened_at(self, name):
        return [at for at, which in self.opened if which == name]


def play(story, *arguments, **options):
    async def main():
        world = World(*arguments, **options)
        try:
            await story(world)
        finally:
            for task in world.tasks:
                task.cancel()
            await asyncio.gather(*world.tasks, return_exceptions=True)
        return world
    return asyncio.run(main())


def trade(trade_id, at_ms, symbol="BTCUSDT"):
    return _frame({"e": "trade", "s": symbol, "E": at_ms, "T": at_ms, "t": trade_id, "p": "60000.5",
                   "q": "0.1", "X": "MARKET", "m": False})


def mark(at_ms, symbol="BTCUSDT"):
    return _frame({"e": "markPriceUpdate", "s": symbol, "E": at_ms, "p": "60001", "T": at_ms + 1})


def _frame(data):
    return json.dumps({"stream": "x", "data": data}).encode()


def test_frames_of_all_connections_become_numbered_ticks_at_once():
    async def story(world):
        await world.start()
        world.streams["prices"].put(trade(1, 1_000), trade(2, 1_001), trade(1, 1_000, "ETHUSDT"))
        world.streams["marks"].put(mark(1_500))
        await settle()  # no time passes
        ticks = world.told(Tick)
        assert sorted((t.symbol, t.seq) for t in ticks) == [(BTC, 1), (BTC, 2), (BTC, 3), (ETH, 1)]
        assert {t.run for t in ticks} == {RUN} and {t.receive_ns for t in ticks} == {world.clock.wall_ns()}
        assert all(topic == tick_topic(m.symbol) for topic, m in world.published if isinstance(m, Tick))
        assert world.clock.now_ns == 0

    play(story, traded=(BTC, ETH))


def test_connections_with_two_symbols_carry_trades_quotes_and_marks_of_both():
    async def story(world):
        urls = []
        inner = world.exchange.market_url
        world.exchange.market_url = lambda *what: urls.append(what) or inner(*what)
        await world.start()
        assert urls == [
            ("public", ["btcusdt@trade", "btcusdt@bookTicker", "ethusdt@trade", "ethusdt@bookTicker"]),
            ("market", ["btcusdt@markPrice@1s", "ethusdt@markPrice@1s"])]
        assert [name for _, name in world.opened] == ["prices", "marks"]

    play(story, traded=(BTC, ETH))


def test_connection_with_an_exchange_that_refuses_backs_off_to_the_limit():
    async def story(world):
        world.is_refusing = True
        await world.start()
        await world.run_for(60)
        at = world.opened_at("prices")
        assert [round(b - a, 3) for a, b in pairwise(at)] == [0.25, 0.5, 1, 2, 4, 8, 15, 15]
        world.is_refusing = False
        await world.run_for(15)
        assert world.producer.status()["streams"] == {"prices-0": "up", "marks-1": "up"}
        assert world.producer.reconnects == len(world.log("stream_down")) > 0

    play(story)


def test_connection_lost_again_and_again_backs_off_and_a_healthy_minute_begins_anew():
    async def story(world):
        await world.start()
        waits = []
        for healthy_s in (1, 1, 1, 61, 1):
            await world.run_with(healthy_s)
            lost_at = world.clock.now_ns / S
            world.streams["prices"].end()
            await world.run_for(3)
            waits.append(round(world.opened_at("prices")[-1] - lost_at, 3))
        assert waits == [0.25, 0.5, 1, 0.25, 0.5]

    play(story)


def test_connection_renewed_repeats_no_trade():
    async def story(world):
        await world.start()
        world.streams["prices"].put(trade(1, 1_000), trade(2, 1_001))
        await settle()
        world.streams["prices"].end()
        await world.run_for(1)
        world.streams["prices"].put(trade(2, 1_001), trade(4, 1_002))
        await settle()
        assert [(t.exchange_ns // 1_000_000, t.seq) for t in world.told(Tick)] == [
            (1_000, 1), (1_001, 2), (1_002, 3)]
        status = world.producer.status()
        assert status["dropped"] == {"repeated": 1} and status["symbols"][BTC]["missed_trades"] == 1

    play(story)


def test_connection_of_marks_with_silence_is_ended_and_opened_again():
    async def story(world):
        await world.start()
        await world.run_with(10)
        silent = world.streams["marks"]
        await world.run_with(7, marks=False)
        assert silent.is_closed and world.streams["marks"] is not silent
        assert len(world.opened_at("prices")) == 1
        assert "silent" in world.log("stream_down")[0]["why"]

    play(story)


def test_connection_of_prices_with_a_pause_of_the_market_is_left_in_peace_for_half_a_minute():
    async def story(world):
        await world.start()
        await world.run_with(29, trades=False)
        assert len(world.opened_at("prices")) == 1
        await world.run_with(4, trades=False)
        assert len(world.opened_at("prices")) == 2

    play(story)


def test_connection_of_a_day_is_renewed_before_the_exchange_ends_it():
    async def story(world):
        await world.start()
        await world.run_for(22 * 3_600)
        assert len(world.opened) == 2
        await world.run_for(1.5 * 3_600)
        assert len(world.opened) == 4
        assert "24 h" in world.log("stream_down")[0]["why"]

    play(story, beat_s=600, snapshot_s=86_400, clock_check_s=86_400, stale_ms=86_400_000)


def test_heartbeat_with_symbols_tells_last_seq_offset_and_who_is_stale():
    async def story(world):
        await world.start()
        await world.run_with(8)
        await world.run_for(1)
        beat = world.told(Heartbeat, HEARTBEAT_TOPIC)[-1]
        assert beat == Heartbeat(publisher="gateway", run=RUN, time_ns=world.clock.wall_ns(),
                                 last_seq={BTC: 16, ETH: 0}, clock_offset_ns=OFFSET, stale=(ETH,))
        assert len(world.told(Heartbeat)) == 10

    play(story, traded=(BTC, ETH))


def test_symbol_without_marks_is_stale_and_one_without_trades_is_quiet():
    async def story(world):
        await world.start()
        await world.run_with(8)
        assert (world.producer.status()["stale"], world.producer.status()["quiet"]) == ((), ())
        await world.run_with(8, trades=False)
        assert (world.producer.status()["stale"], world.producer.status()["quiet"]) == ((), (BTC,))
        await world.run_with(8, marks=False)
        assert (world.producer.status()["stale"], world.producer.status()["quiet"]) == ((BTC,), ())
        assert world.told(Heartbeat)[-1].stale == (BTC,)
        await world.run_with(2)
        assert [(line["condition"], line["level"]) for line in world.log("feed_condition")] == [
            ("fresh", "INFO"), ("quiet", "INFO"), ("fresh", "INFO"), ("stale", "WARNING"), ("fresh", "INFO")]

    play(story)


def test_status_with_prices_tells_them_with_ages_by_the_exchanges_clock():
    async def story(world):
        await world.start()
        at_ms = world.exchange.server_ns() // 1_000_000
        world.streams["prices"].put(trade(1, at_ms - 70))
        world.streams["marks"].put(mark(at_ms - 300))
        await world.run_for(1)
        status = world.producer.status()
        assert status["symbols"][BTC] == {"ticks": 2, "trade": 1, "quote": 0, "mark": 1,
                                          "missed_trades": 0, "condition": "fresh",
                                          "age_ms": {"trade": 1_070, "quote": None, "mark": 1_300}}
        assert status["prices"][BTC] == {"last": 60000.5, "bid": None, "ask": None, "mark": 60001.0}
        assert status["clock_offset_ms"] == 1_250

    play(story)


def test_start_with_an_unreachable_exchange_beats_stale_and_goes_on_when_it_is_there():
    async def story(world):
        world.exchange.is_down = True
        await world.start()
        await world.run_for(20)
        beats = world.told(Heartbeat)
        assert len(beats) == 21
        assert all(b.stale == (BTC,) and b.clock_offset_ns is None and b.last_seq == {BTC: 0} for b in beats)
        assert 5 <= world.exchange.loads <= 8 and not world.opened
        assert world.producer.status()["clock_offset_ms"] is None
        world.exchange.is_down = False
        await world.run_for(15)
        await world.run_with(8)
        assert world.told(Heartbeat)[-1].stale == ()

    play(story)


def test_start_with_no_symbol_that_the_exchange_lists_is_a_config_error():
    async def story(world):
        with pytest.raises(ConfigError, match=r"at least one must be listed .* was XRP/USDT:USDT"):
            await world.start()
        assert not world.opened

    play(story, traded=("XRP/USDT:USDT",))


def test_start_with_one_symbol_that_is_not_listed_any_more_feeds_the_others():
    async def story(world):
        await world.start()
        world.streams["prices"].put(trade(1, 1_000))
        await world.run_for(3)
        assert [tick.symbol for tick in world.told(Tick)] == [BTC]
        assert "XRP/USDT:USDT" in world.told(Heartbeat)[-1].stale

    play(story, traded=(BTC, "XRP/USDT:USDT"))


def test_frames_that_are_broken_are_counted_and_logged_once_a_beat():
    async def story(world):
        await world.start()
        world.streams["prices"].put(*[b"{"] * 500, trade(1, 1_000), *[b'{"result":null}'] * 500)
        await world.run_for(5)
        assert world.producer.status()["dropped"] == {"malformed": 500, "other": 500}
        [line] = world.log("message_dropped")
        assert (line["reason"], line["count"]) == ("malformed", 500)
        assert len(world.told(Tick)) == 1

    play(story)


def test_clock_with_an_exchange_that_does_not_answer_is_logged_and_measured_again():
    async def story(world):
        await world.start()
        world.exchange.is_down = True
        await world.run_for(31)
        assert world.exchange.measured == 1 and len(world.log("query_failed")) == 1
        world.exchange.is_down, world.exchange.ahead_ns = False, 2 * OFFSET
        await world.run_for(30)
        assert world.exchange.measured == 2 and world.told(Heartbeat)[-1].clock_offset_ns == 2 * OFFSET

    play(story, stale_ms=86_400_000)


def test_subscription_to_an_instrument_is_answered_at_once():
    async def story(world):
        await world.start()
        world.published.clear()
        world.producer.snapshots.subscribed([b"t/" + BTC.encode(), snapshot_topic(BTC), b"h/", b"", b"s/"])
        [(topic, snapshot)] = world.published
        assert topic == snapshot_topic(BTC)
        assert snapshot == Snapshot(instrument=world.exchange.instruments[BTC], timeframe="", candles=(),
                                    time_ns=world.clock.wall_ns(), run=RUN)
        assert world.producer.snapshots.refused == 0 and not world.exchange.candle_calls

    play(story)


def test_instruments_read_again_are_published_and_a_failure_changes_nothing():
    async def story(world):
        await world.producer.refresh()  # nothing loaded yet
        await world.start()
        world.published.clear()
        await world.producer.refresh()
        assert [s.instrument.status for s in world.told(Snapshot, snapshot_topic(BTC))] == ["SETTLING"]
        world.exchange.is_down = True
        await world.producer.refresh()
        assert len(world.told(Snapshot, snapshot_topic(BTC))) == 1 and "query_failed" in world.text.getvalue()

    play(story)


def test_subscription_to_a_history_gets_its_candles_and_many_askers_cost_one_request():
    async def story(world):
        await world.start()
        for _ in range(20):
            world.producer.snapshots.subscribed([snapshot_topic(BTC, "1m", 500)] * 20)
            await world.run_for(0.01)
        world.producer.snapshots.subscribed([snapshot_topic(BTC, "1m", 100)])
        await world.run_for(1)
        assert world.exchange.candle_calls == [(BTC, "1m", 500)]
        told = world.told(Snapshot, snapshot_topic(BTC, "1m", 500))
        assert 1 < len(told) <= 20 and all(s.candles == told[0].candles for s in told)
        assert [c.volume for c in told[0].candles] == list(range(500, 0, -1))
        [short] = world.told(Snapshot, snapshot_topic(BTC, "1m", 100))
        assert short.candles == told[0].candles[-100:] and short.timeframe == "1m"

    play(story)


def test_subscription_after_a_candle_closed_gets_fresh_ones():
    async def story(world):
        await world.start()
        world.producer.snapshots.subscribed([snapshot_topic(BTC, "1m", 10)])
        await world.run_for(1)
        closes_s = 60 - world.exchange.server_ns() // S % 60
        await world.run_for(closes_s + 1)
        world.producer.snapshots.subscribed([snapshot_topic(BTC, "1m", 10)])
        await world.run_for(1)
        first, *_, last = world.told(Snapshot, snapshot_topic(BTC, "1m", 10))
        assert last.candles[:-1] == tuple(
            Candle(c.start_ns, c.open, c.high, c.low, c.close, c.volume + 1) for c in first.candles[1:])
        assert len(world.exchange.candle_calls) == 2

    play(story)


def test_subscriptions_before_the_exchange_is_there_are_answered_later():
    async def story(world):
        world.exchange.is_down = True
        await world.start()
        world.producer.snapshots.subscribed([snapshot_topic(BTC), snapshot_topic(BTC, "5m", 3)])
        await world.run_for(2)
        assert not world.told(Snapshot) and not world.exchange.candle_calls
        world.exchange.is_down = False
        await world.run_for(5)
        assert len(world.told(Snapshot, snapshot_topic(BTC))) == 1
        assert len(world.told(Snapshot, snapshot_topic(BTC, "5m", 3))) == 1

    play(story)


def test_snapshots_with_a_timer_come_again():
    async def story(world):
        await world.start()
        world.producer.snapshots.subscribed([snapshot_topic(BTC, "1m", 3)])
        await world.run_for(95)
        assert len(world.told(Snapshot, snapshot_topic(BTC))) == 4
        assert len(world.told(Snapshot, snapshot_topic(BTC, "1m", 3))) == 4

    play(story)


@pytest.mark.parametrize("topic", [
    b"s/XRP/USDT:USDT/", b"s/BTC/USDT:USDT/2m/10/", b"s/BTC/USDT:USDT/1m/0/", b"s/BTC/USDT:USDT/1m/1501/",
    b"s/BTC/USDT:USDT/1m/9999999999/", b"s/BTC/USDT:USDT/1m/-5/", b"s/BTC/USDT:USDT/1m/", b"s/BTC/USDT:USDT",
    b"s/BTC/USDT:USDT/1m/10", b"s/\xff\xfe/x/", b"s/" + b"x" * 100_000, b"s/BTC/USDT:USDT/1m/\xd9\xa3/"])
def test_subscription_to_what_does_not_exist_is_counted_logged_and_ignored(topic):
    async def story(world):
        await world.start()
        world.published.clear()
        world.producer.snapshots.subscribed([topic])
        await world.run_for(2)
        assert world.producer.status()["subscriptions_refused"] == 1
        [line] = world.log("history_refused")
        assert line["count"] == 1 and len(line["topic"]) < 500
        assert not world.told(Snapshot) and not world.exchange.candle_calls

    play(story)


def test_subscriptions_in_a_flood_cost_few_requests_and_few_lines():
    async def story(world):
        await world.start()
        flood = [snapshot_topic(BTC, frame, count) for count in range(1, 1_501) for frame in ("1m", "5m")]
        for _ in range(5):
            world.producer.snapshots.subscribed(flood)
            await world.run_for(1)
        assert len(world.exchange.candle_calls) == 4, "two for each timeframe"
        assert world.producer.snapshots.refused == 5 * (len(flood) - ASKED_MAX)
        assert len(world.log("history_refused")) <= 6
        assert {len(s.candles) for s in world.told(Snapshot) if s.timeframe} == set(range(1, 51))

    play(story)


def test_history_that_cannot_be_fetched_is_tried_with_back_off_and_does_not_hold_up_others():
    async def story(world):
        await world.start()
        world.exchange.candle_error = BTC
        world.producer.snapshots.subscribed([snapshot_topic(BTC, "1m", 5), snapshot_topic(ETH, "1m", 5)])
        await world.run_for(10)
        assert len(world.told(Snapshot, snapshot_topic(ETH, "1m", 5))) == 1
        assert 3 <= len(world.log("history_failed")) <= 8
        world.exchange.candle_error = None
        await world.run_for(15)
        assert len(world.told(Snapshot, snapshot_topic(BTC, "1m", 5))) == 1

    play(story, traded=(BTC, ETH), snapshot_s=86_400)
