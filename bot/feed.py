"""Market frames of Binance USD-M to Ticks: typed decoding, sequence numbers, each trade once, freshness.

What is no price is counted and dropped: malformed, crossed, zero, liquidation prints, repetitions.
"""

from collections import Counter
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from bot.model import Tick, TickKind

# Two connections: the exchange serves trades and quotes in one class of data, marks in another.
CONNECTIONS = (("prices", "public", ("trade", "bookTicker")), ("marks", "market", ("markPrice@1s",)))
EXPECTED = {"other", "unchanged", "repeated"}  # dropped, and nothing is wrong: answers, overlaps

PRICE_MAX = 1e15  # beyond any price or quantity, and far from the end of a float
# A reconnect repeats seconds. What is older than this comes from an exchange whose clock was set back.
STEP_BACK_NS = 60_000_000_000

Quote = tuple[float, float, float, float]  # bid, its size, ask, its size
NO_QUOTE = (None, None, None, None)
Condition = Literal["fresh", "quiet", "stale"]
_Id = Annotated[int, Meta(ge=0, lt=1 << 62)]
_Ms = Annotated[int, Meta(gt=0, lt=1 << 43)]  # in nanoseconds it still fits 64 bits (year 2248)


class _Trade(msgspec.Struct, tag_field="e", tag="trade", gc=False):
    s: str
    T: _Ms
    t: _Id
    p: float
    q: float
    m: bool  # the buyer was the maker: the taker sold
    X: str = "MARKET"  # INSURANCE_FUND, ADL and NA are transfers at a price nobody could trade at


class _Quote(msgspec.Struct, tag_field="e", tag="bookTicker", gc=False):
    s: str
    T: _Ms
    u: _Id
    b: float
    B: float
    a: float
    A: float


class _Mark(msgspec.Struct, tag_field="e", tag="markPriceUpdate", gc=False):
    s: str
    E: _Ms  # T is the next funding here
    p: float


class _Enveloped(msgspec.Struct, gc=False):
    data: _Trade | _Quote | _Mark


class _Other(msgspec.Struct):  # no Tick, and not broken
    data: "_Other | None" = None
    e: str = ""
    result: msgspec.Raw = msgspec.Raw()
    error: msgspec.Raw = msgspec.Raw()


# Not strict: the exchange writes numbers as strings, which are read as floats without a detour.
_decode_enveloped = msgspec.json.Decoder(_Enveloped, strict=False).decode
_decode_bare = msgspec.json.Decoder(_Trade | _Quote | _Mark, strict=False).decode
_decode_other = msgspec.json.Decoder(_Other).decode
_ERRORS = (ValueError, RecursionError)  # msgspec's own are ValueErrors


class SymbolFeed:
    """One symbol: seq, the last of each kind with its exchange time, and when it came (monotonic)."""

    def __init__(self, symbol: str, started_mono_ns: int) -> None:
        self.symbol = symbol
        self.seq = 0
        self.ticks = {"trade": 0, "quote": 0, "mark": 0}
        self.last: float | None = None  # trade
        self.mark: float | None = None
        self.quote: Quote | None = None
        self.trade_ns = self.quote_ns = self.mark_ns = 0
        self.price_mono_ns = started_mono_ns  # of a trade or quote
        self.mark_mono_ns: int | None = None
        self.trade_id = self.update_id = 0
        self.missed_trades = 0  # holes in the exchange's trade ids, as after a reconnect

    def condition(self, mono_ns: int, stale_ns: int) -> Condition:
        """Return how the data stands. stale: the mark's exchange time made no progress, whatever else
        arrives (it does each second in any market). quiet: marks come, and nobody trades or quotes.
        """
        if self.mark_mono_ns is None or mono_ns - self.mark_mono_ns > stale_ns:
            return "stale"
        return "quiet" if mono_ns - self.price_mono_ns > stale_ns else "fresh"


class FrameDecoder:
    """Turn frames into numbered Ticks. dropped: count by reason; samples: the last frame of each.

    feeds: by the exchange's symbol. run: of the publisher.
    """

    def __init__(self, feeds: dict[str, SymbolFeed], run: int) -> None:
        self.dropped: Counter[str] = Counter()
        self.samples: dict[str, bytes] = {}
        self._feeds, self._run = feeds, run
        self._receive_ns = self._mono_ns = 0

    def decode(self, raw: bytes, receive_ns: int, mono_ns: int) -> Tick | None:
        """Return the Tick a frame is, or None: not a Tick, or dropped and counted. Never raises."""
        self._receive_ns, self._mono_ns = receive_ns, mono_ns
        try:
            frame = _decode_enveloped(raw).data if raw[:9] == b'{"stream"' else _decode_bare(raw)
        except _ERRORS:
            frame = _second_look(raw)
        tick = self._tick_of(frame)
        if not isinstance(tick, str):
            return tick
        self.dropped[tick] += 1
        self.samples[tick] = raw[:200]
        return None

    # Each of these returns the Tick, or the reason why there is none.

    def _tick_of(self, frame: _Trade | _Quote | _Mark | _Other | None) -> Tick | str:
        if frame is None or isinstance(frame, _Other):
            return "other" if frame else "malformed"
        feed = self._feeds.get(frame.s)
        if feed is None:
            return "unknown_symbol"
        if isinstance(frame, _Quote):
            return self._quote(frame, feed)
        return self._trade(frame, feed) if isinstance(frame, _Trade) else self._mark(frame, feed)

    def _trade(self, frame: _Trade, feed: SymbolFeed) -> Tick | str:
        exchange_ns = frame.T * 1_000_000
        if _is_repeated(frame.t, feed.trade_id, exchange_ns, feed.trade_ns):
            return "repeated"
        is_market = frame.X == "MARKET"
        if is_market and not (0 < frame.p < PRICE_MAX and 0 < frame.q < PRICE_MAX):
            return "bad_price"
        if 0 < feed.trade_id < frame.t - 1:
            feed.missed_trades += frame.t - 1 - feed.trade_id
        feed.trade_id, feed.trade_ns, feed.price_mono_ns = frame.t, exchange_ns, self._mono_ns
        if not is_market:
            return "off_market"
        feed.last = frame.p
        return self._tick(feed, "trade", frame.p, exchange_ns, frame.q, "sell" if frame.m else "buy")

    def _quote(self, frame: _Quote, feed: SymbolFeed) -> Tick | str:
        exchange_ns = frame.T * 1_000_000
        if _is_repeated(frame.u, feed.update_id, exchange_ns, feed.quote_ns):
            return "repeated"
        bid, bid_size, ask, ask_size = quote = (frame.b, frame.B, frame.a, frame.A)
        if not (0 < bid < PRICE_MAX and 0 < ask < PRICE_MAX and 0 <= bid_size < PRICE_MAX > ask_size >= 0):
            return "bad_price"
        if bid > ask:
            return "crossed"
        feed.update_id, feed.quote_ns, feed.price_mono_ns = frame.u, exchange_ns, self._mono_ns
        if quote == feed.quote:
            return "unchanged"
        feed.quote = quote
        return self._tick(feed, "quote", (bid + ask) / 2, exchange_ns, 0.0, None, quote)

    def _mark(self, frame: _Mark, feed: SymbolFeed) -> Tick | str:
        exchange_ns = frame.E * 1_000_000
        if _is_repeated(exchange_ns, feed.mark_ns, exchange_ns, feed.mark_ns):
            return "repeated"
        if not 0 < frame.p < PRICE_MAX:
            return "bad_price"
        feed.mark_ns, feed.mark_mono_ns, feed.mark = exchange_ns, self._mono_ns, frame.p
        return self._tick(feed, "mark", frame.p, exchange_ns)

    def _tick(self, feed: SymbolFeed, kind: TickKind, price: float, exchange_ns: int, size: float = 0.0,
              side: Literal["buy", "sell"] | None = None, quote: Quote | tuple[None, ...] = NO_QUOTE) -> Tick:
        feed.ticks[kind] += 1
        feed.seq += 1
        return Tick(symbol=feed.symbol, kind=kind, price=price, size=size, bid=quote[0], bid_size=quote[1],
                    ask=quote[2], ask_size=quote[3], side=side, exchange_ns=exchange_ns,
                    receive_ns=self._receive_ns, run=self._run, seq=feed.seq)


def _second_look(raw: bytes) -> _Trade | _Quote | _Mark | _Other | None:
    # The exchange's own spelling failed: blanks or another field order, another kind, or broken (None).
    try:
        seen = _decode_other(raw)
        kind = seen.data.e if seen.data else seen.e
        if kind in ("trade", "bookTicker", "markPriceUpdate"):
            return _decode_enveloped(raw).data if seen.data else None
        if kind or seen.data or seen.result or seen.error:
            return seen
    except _ERRORS:
        pass
    return None


def _is_repeated(id_: int, last_id: int, exchange_ns: int, last_ns: int) -> bool:
    return id_ <= last_id and -STEP_BACK_NS < exchange_ns - last_ns <= 0


def stream_names(exchange_symbols: list[str], streams: tuple[str, ...]) -> list[str]:
    """Return the names to subscribe to, symbol by symbol."""
    return [f"{symbol.lower()}@{stream}" for symbol in exchange_symbols for stream in streams]
