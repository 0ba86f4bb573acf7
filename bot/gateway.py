"""The gateway: market data in, numbered Ticks out; a frame is published before anything else is done.

Reads: the exchange's market streams, its candles and clock. Writes: the ticks channel.
State: none on disk; holds no key. Run: python -m bot.gateway --config FILE
"""

import re
import sys
from asyncio import Event, Task
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, get_args

from bot.bus import ZmqPublisher
from bot.clock import Clock
from bot.config import Config, Timeframe
from bot.connection import pool
from bot.daemon import Daemon, run
from bot.errors import ExchangeError
from bot.exchange import Exchange, library
from bot.feed import CONNECTIONS, EXPECTED, FrameDecoder, SymbolFeed, stream_names
from bot.log import Log
from bot.model import Candle, Heartbeat, Snapshot
from bot.status import read_usage
from bot.stream import Stream, StreamClosed, open_stream
from bot.wire import HEARTBEAT_TOPIC, encode, snapshot_topic, tick_topic

FRAME_BYTES_MAX = 65_536  # the frames we read have 200 bytes; the longest of all streams, depth, 60 kB
SYMBOLS_PER_LINE = 100  # the exchange allows 200 streams a connection, and a symbol has two prices
AGE_NS_MAX = 23 * 3_600 * 1_000_000_000  # the exchange ends a connection after 24 h: not in mid-trade
HEALTHY_NS = 60_000_000_000  # a connection that lived this long is no part of a series of failures
# Trades and quotes may pause in a quiet market, marks may not: without marks silence needs longer.
PRICE_SILENCE_NS = 30_000_000_000
ASKED_MAX = 100  # different histories; each takes up to 10 of the 2,400 weight allowed a minute
TIMEFRAME_NS = {name: int(name[:-1]) * {"m": 60, "h": 3_600, "d": 86_400}[name[-1]] * 1_000_000_000
                for name in get_args(Timeframe)}

Wanted = tuple[str, str, int]  # symbol, timeframe ("" for the instrument alone), count


class Line:
    """One connection to market streams, and its successors. why: we ended it, for this."""

    def __init__(self, name: str, url: str, silence_ns: int) -> None:
        self.name, self.url, self.silence_ns = name, url, silence_ns
        self.stream: Stream | None = None
        self.opened_ns = self.heard_ns = 0  # monotonic
        self.why = ""
        self.tried = Event()


class Snapshots:
    """Instruments and candles for whoever subscribes to their topic, and again every snapshot_s.

    However many ask, however often: two requests per symbol, timeframe and candle at most.
    """

    def __init__(self, config: Config, clock: Clock, log: Log, *, run_id: int, exchange: Exchange,
                 publish: Callable[[bytes, bytes], None]) -> None:
        self._config, self._clock, self._log, self._run = config.gateway, clock, log, run_id
        self._exchange, self._publish = exchange, publish
        self.symbols = config.symbols()
        self._asked: dict[Wanted, None] = {}
        self._pending: dict[Wanted, None] = {}
        self._is_pending = Event()
        # Candles, how many were asked of the exchange, and when the next one closes (exchange clock).
        self._cache: dict[tuple[str, str], tuple[list[Candle], int, int]] = {}
        self.fetches = self.refused = 0
        self.refused_topic = b""

    def subscribed(self, topics: list[bytes]) -> None:
        """Answer subscriptions; what cannot be served is counted and ignored."""
        for topic in dict.fromkeys(topics):
            if not topic.startswith(b"s/") or topic == b"s/":
                continue
            wanted = self._parse(topic)
            if wanted is None or (len(self._asked) >= ASKED_MAX and wanted not in self._asked):
                self.refused += 1
                self.refused_topic = topic[:100]
            else:
                self._ask(wanted)

    def repeat(self) -> None:
        """Publish all instruments, and again the histories that were asked for."""
        for symbol in self.symbols:
            self._tell((symbol, "", 0), [])
        for wanted in self._asked:
            self._ask(wanted)

    async def serve(self) -> None:
        """Fetch and publish what is asked for, one after another, for ever."""
        wait_ms = self._config.reconnect_ms_min
        while True:
            await self._is_pending.wait()
            while self._pending:
                wanted = next(iter(self._pending))
                del self._pending[wanted]
                try:
                    self._tell(wanted, await self._candles(*wanted))
                    wait_ms = self._config.reconnect_ms_min
                except ExchangeError as error:
                    self._log.warning("history_failed", symbol=wanted[0], timeframe=wanted[1],
                                      count=wanted[2], error=str(error), wait_ms=wait_ms)
                    self._pending[wanted] = None  # behind the others
                    await self._clock.sleep(wait_ms * self._clock.jitter() / 1_000)
                    wait_ms = min(wait_ms * 2, self._config.reconnect_ms_max)
            self._is_pending.clear()

    def _parse(self, topic: bytes) -> Wanted | None:
        match = re.fullmatch(r"s/([^/]+/[^/]+)/(?:(\w+)/([0-9]{1,6})/)?", topic.decode("ascii", "replace"))
        if not match or match[1] not in self.symbols:
            return None
        if match[2] is None:
            return match[1], "", 0
        count = int(match[3])
        is_known = match[2] in TIMEFRAME_NS and 1 <= count <= self._config.history_count_max
        return (match[1], match[2], count) if is_known else None

    def _ask(self, wanted: Wanted) -> None:
        if not wanted[1]:
            self._tell(wanted, [])
            return
        self._asked[wanted] = self._pending[wanted] = None
        self._is_pending.set()

    def _tell(self, wanted: Wanted, candles: list[Candle]) -> None:
        symbol, timeframe, count = wanted
        if symbol in self._exchange.instruments:  # else not loaded yet: repeat() follows the loading
            self._publish(snapshot_topic(*wanted), encode(Snapshot(
                instrument=self._exchange.instruments[symbol], timeframe=timeframe, run=self._run,
                candles=tuple(candles[-count:]), time_ns=self._clock.wall_ns())))

    async def _candles(self, symbol: str, timeframe: str, count: int) -> list[Candle]:
        candles, fetched, until_ns = self._cache.get((symbol, timeframe), ([], 0, 0))
        is_current = self._exchange.server_ns() < until_ns
        if not is_current or count > fetched:
            # A second, longer wish within one candle takes all there is, so that there is no third.
            fetched = self._config.history_count_max if is_current else max(count, fetched)
            self.fetches += 1
            candles = await self._exchange.candles(symbol, timeframe, fetched)
            closes_ns = candles[-1].start_ns + 2 * TIMEFRAME_NS[timeframe] if candles else 0
            until_ns = max(closes_ns, self._exchange.server_ns() + 1_000_000_000)
            self._cache[symbol, timeframe] = candles, fetched, until_ns
        return candles


class TickProducer:
    """Every frame becomes a numbered Tick and is out; data that makes no progress is told as stale."""

    def __init__(self, config: Config, clock: Clock, log: Log, *, run_id: int, exchange: Exchange,
                 open_stream: Callable[..., Awaitable[Stream]], publish: Callable[[bytes, bytes], None],
                 spawn: Callable[[Coroutine[Any, Any, None]], Task]) -> None:
        self._config, self._clock, self._log, self._run = config, clock, log, run_id
        self._exchange, self._open_stream, self._publish, self._spawn = exchange, open_stream, publish, spawn
        self._stale_ns = config.gateway.stale_ms * 1_000_000
        self._topics = {symbol: tick_topic(symbol) for symbol in config.symbols()}
        self.feeds = {symbol: SymbolFeed(symbol, clock.mono_ns()) for symbol in config.symbols()}
        self._conditions: dict[str, str] = dict.fromkeys(self.feeds, "stale")
        self._named: dict[str, SymbolFeed] = {}  # by the exchange's symbol
        self._decoder = FrameDecoder(self._named, run_id)
        self._lines: list[Line] = []
        self._logged: dict[str, int] = {}
        self._is_loaded, self.reconnects = False, 0
        self.snapshots = Snapshots(config, clock, log, run_id=run_id, exchange=exchange, publish=publish)

    async def produce(self) -> None:
        """Load the instruments, however long it takes, and follow the streams. Raises ConfigError."""
        await self._load()
        self.repeat()
        self._spawn(self.snapshots.serve())
        await self._feed(tuple(self.feeds))

    def reread(self) -> None:
        """Feed the symbols that came into the config; those that left are fed until the next start."""
        new = tuple(symbol for symbol in self._config.symbols() if symbol not in self.feeds)
        listed = tuple(s for s in new if s in self._exchange.instruments or not self._is_loaded)
        if listed != new:
            self._log.error("config_refused", error=f"not listed by {self._config.exchange.id}: "
                            f"{', '.join(sorted(set(new) - set(listed)))}")
        for symbol in listed:
            self._topics[symbol] = tick_topic(symbol)
            self.feeds[symbol] = SymbolFeed(symbol, self._clock.mono_ns())
            self._conditions[symbol] = "stale"
        self.snapshots.symbols = tuple(self.feeds)
        if self._is_loaded and listed:
            self.repeat()
            self._spawn(self._feed(listed))

    async def _feed(self, symbols: tuple[str, ...]) -> None:
        feeds = {self._exchange.instruments[symbol].exchange_symbol: self.feeds[symbol] for symbol in symbols
                 if symbol in self._exchange.instruments}
        self._named.update(feeds)
        for start in range(0, len(feeds), SYMBOLS_PER_LINE):
            part = list(feeds)[start:start + SYMBOLS_PER_LINE]
            for name, section, streams in CONNECTIONS:
                url = self._exchange.market_url(section, stream_names(part, streams))
                await self._connect(name, url, max(
                    PRICE_SILENCE_NS if name == "prices" else 0, self._stale_ns))

    async def measure_clock(self) -> None:
        """Measure the exchange's clock again; ages and the heartbeat's offset go by it."""
        if self._is_loaded:
            try:
                await self._exchange.measure_clock()
            except ExchangeError as error:
                self._log.warning("query_failed", client_order_id="", error=str(error))

    async def refresh(self) -> None:
        """Read the symbols' rules and status again, and publish them."""
        if self._is_loaded:
            try:
                await self._exchange.refresh(self._config.symbols())
                self.repeat()
            except ExchangeError as error:
                self._log.warning("query_failed", client_order_id="", error=str(error))

    def repeat(self) -> None:
        """Publish the Snapshots again, for late joiners."""
        if self._is_loaded:
            self.snapshots.repeat()

    def beat(self) -> None:
        """Publish a heartbeat; end connections that are silent or old; log what changed."""
        now_ns = self._clock.mono_ns()
        for symbol, feed in self.feeds.items():
            old, new = self._conditions[symbol], feed.condition(now_ns, self._stale_ns)
            if new != old:
                self._conditions[symbol] = new
                write = self._log.warning if new == "stale" else self._log.info
                write("feed_condition", symbol=symbol, condition=new)
        self._publish(HEARTBEAT_TOPIC, encode(Heartbeat(
            publisher="gateway", run=self._run, time_ns=self._clock.wall_ns(),
            last_seq={symbol: feed.seq for symbol, feed in self.feeds.items()}, stale=self._in("stale"),
            clock_offset_ns=self._exchange.clock_offset_ns if self._is_loaded else None)))
        for line in self._lines:
            self._end_if_due(line, now_ns)
        self._log_drops()

    def status(self) -> dict[str, Any]:
        """Return what `botctl status` shows of the gateway."""
        now_ns = self._exchange.server_ns()
        return {
            "symbols": {symbol: {"ticks": feed.seq, **feed.ticks, "missed_trades": feed.missed_trades,
                                 "condition": self._conditions[symbol], "age_ms": {
                kind: (now_ns - at_ns) // 1_000_000 if at_ns else None for kind, at_ns in (
                    ("trade", feed.trade_ns), ("quote", feed.quote_ns), ("mark", feed.mark_ns))}}
                for symbol, feed in self.feeds.items()},
            "prices": {symbol: {"last": feed.last, "bid": feed.quote and feed.quote[0],
                                "ask": feed.quote and feed.quote[2], "mark": feed.mark}
                       for symbol, feed in self.feeds.items()},
            "stale": self._in("stale"), "quiet": self._in("quiet"),
            "streams": {line.name: "up" if line.stream else "down" for line in self._lines},
            "reconnects": self.reconnects, "dropped": dict(self._decoder.dropped),
            "histories_fetched": self.snapshots.fetches, "subscriptions_refused": self.snapshots.refused,
            "rate": self._exchange.budget.usage,
            "clock_offset_ms": self._exchange.clock_offset_ns // 1_000_000 if self._is_loaded else None}

    def _in(self, condition: str) -> tuple[str, ...]:
        return tuple(symbol for symbol, found in self._conditions.items() if found == condition)

    async def _load(self) -> None:
        wait_ms = self._config.gateway.reconnect_ms_min
        while not self._is_loaded:
            try:
                await self._exchange.load()
                self._is_loaded = True
            except ExchangeError as error:
                self._log.warning("exchange_unreachable", error=str(error), wait_ms=wait_ms)
                await self._clock.sleep(wait_ms * self._clock.jitter() / 1_000)
                wait_ms = min(wait_ms * 2, self._config.gateway.reconnect_ms_max)
        for symbol in self._exchange.unlisted(tuple(self.feeds)):
            self._log.error("symbol_unlisted", symbol=symbol)  # the others go on

    async def _connect(self, name: str, url: str, silence_ns: int) -> None:
        line = Line(f"{name}-{len(self._lines)}", url, silence_ns)
        self._lines.append(line)
        self._spawn(self._follow(line))
        await line.tried.wait()  # one after another: the exchange counts attempts

    async def _follow(self, line: Line) -> None:
        wait_ms = self._config.gateway.reconnect_ms_min
        while True:
            line.why, lived_ns = "", 0
            try:
                line.stream = stream = await self._open_stream(
                    line.url, connect_timeout_ms=self._config.exchange.connect_timeout_ms,
                    frame_bytes_max=FRAME_BYTES_MAX)
                line.opened_ns = line.heard_ns = self._clock.mono_ns()
                line.tried.set()
                self._log.info("stream_up", stream=line.name)
                await self._read(line, stream)
            except StreamClosed as closed:
                why = line.why or str(closed)
            finally:
                line.tried.set()
                if line.stream is not None:
                    lived_ns = self._clock.mono_ns() - line.opened_ns
                    stream, line.stream = line.stream, None
                    await stream.close()
            if line.why or lived_ns > HEALTHY_NS:
                wait_ms = self._config.gateway.reconnect_ms_min
            self.reconnects += 1
            self._log.warning("stream_down", stream=line.name, why=why, wait_ms=wait_ms)
            await self._clock.sleep(wait_ms * self._clock.jitter() / 1_000)
            wait_ms = min(wait_ms * 2, self._config.gateway.reconnect_ms_max)

    async def _read(self, line: Line, stream: Stream) -> None:
        # The hot path: thousands of frames a second, and nothing before the Tick is out.
        clock, decode, publish, topics = self._clock, self._decoder.decode, self._publish, self._topics
        async for raw in stream:
            line.heard_ns = mono_ns = clock.mono_ns()
            tick = decode(raw, clock.wall_ns(), mono_ns)
            if tick is not None:
                publish(topics[tick.symbol], encode(tick))

    def _end_if_due(self, line: Line, now_ns: int) -> None:
        if line.stream is None or line.why:
            return
        if now_ns - line.heard_ns > line.silence_ns:
            line.why = f"silent for {(now_ns - line.heard_ns) // 1_000_000} ms although connected"
        elif now_ns - line.opened_ns > AGE_NS_MAX:
            line.why = "renewed before the exchange ends it at 24 h"
        if line.why:
            self._spawn(line.stream.close())

    def _log_drops(self) -> None:
        # One line a beat for each reason, whatever the flood.
        for reason, count in self._decoder.dropped.items():
            if count != self._logged.get(reason, 0) and reason not in EXPECTED:
                self._log.warning("message_dropped", reason=reason, count=count,
                                  sample=repr(self._decoder.samples[reason]))
        if self.snapshots.refused != self._logged.get("subscription", 0):
            self._log.warning("history_refused", count=self.snapshots.refused,
                              topic=repr(self.snapshots.refused_topic))
        self._logged = {**self._decoder.dropped, "subscription": self.snapshots.refused}


async def main(daemon: Daemon) -> None:
    """Turn the exchange's market data into numbered Ticks."""
    config, clock, bus = daemon.config, daemon.clock, daemon.config.bus
    queries = pool(config.exchange, clock)
    exchange = Exchange(config.exchange, clock, orders=queries, queries=queries, keys=None)
    publisher = ZmqPublisher(bus.ticks, bus)
    producer = TickProducer(config, clock, daemon.log, run_id=daemon.run, exchange=exchange,
                            open_stream=open_stream, publish=publisher.send, spawn=daemon.spawn)
    daemon.status, daemon.reread = producer.status, producer.reread
    publisher.watch(producer.snapshots.subscribed)
    daemon.every(bus.heartbeat_ms / 1_000, producer.beat)
    daemon.every(config.gateway.snapshot_s, producer.repeat)
    daemon.every(config.gateway.clock_check_s, producer.measure_clock)
    daemon.every(config.exchange.instruments_s, producer.refresh)
    daemon.every(bus.heartbeat_ms / 1_000, lambda: exchange.hear_usage(read_usage(config, "executor")))
    daemon.spawn(producer.produce())
    await daemon.stopping.wait()
    producer.beat()  # a loss at the very end shows
    publisher.close()


if __name__ == "__main__":
    library()
    sys.exit(run("gateway", main))
