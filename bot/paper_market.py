"""The market of the paper exchange: what the server asks of it, whatever makes the prices.

Time is an argument (`now_ms`, the exchange's clock); nothing here reads a clock or opens a socket.
Prices and quantities are Decimal at this boundary. Symbols are the exchange's ("BTCUSDT").
"""

from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal, Protocol

import msgspec

from bot.config import PaperConfig

Side = Literal["BUY", "SELL"]


class Frame(msgspec.Struct, frozen=True):
    """One market-stream message.

    stream: the canonical name (see canonical_stream), "btcusdt@trade"; match subscriptions by
    canonical_stream(subscription) == frame.stream. raw: the payload's JSON; with is_enveloped it is
    the recorded bytes, envelope {"stream","data"} included, and must be sent as it is.
    time_ms: when it is due.
    """

    symbol: str
    stream: str
    raw: bytes
    time_ms: int
    is_enveloped: bool = False


class Book(msgspec.Struct, frozen=True):
    """Order book, best first. last_update_id continues in the next depth frame: U <= it <= u."""

    bids: list[tuple[Decimal, Decimal]]
    asks: list[tuple[Decimal, Decimal]]
    last_update_id: int


class Market(Protocol):
    """Where prices come from. Everything is as of the last advance()."""

    is_tradable: bool  # False: raw playback, orders are refused

    def start(self, now_ms: int) -> None:
        """Begin raw playback, at the first subscription; a no-op elsewhere and when begun."""

    def advance(self, now_ms: int, frames_max: int | None = None) -> list[Frame]:
        """Return what is due up to now_ms, in order; frames_max leaves the rest for the next call."""

    def next_due_ms(self) -> int | None:
        """Return when advance() has something again; None: never (not started, or ended)."""

    def symbols(self) -> list[dict[str, Any]]:
        """Return the entries of exchangeInfo's `symbols`."""

    def book(self, symbol: str, limit: int = 1_000) -> Book: ...

    def last_price(self, symbol: str) -> Decimal: ...

    def mark_price(self, symbol: str) -> Decimal: ...

    def index_price(self, symbol: str) -> Decimal: ...

    def funding(self, symbol: str) -> tuple[Decimal, int]:
        """Return the rate of the running interval and when it is settled, in ms."""

    def klines(self, symbol: str, interval: str, limit: int, start_ms: int | None = None,
               end_ms: int | None = None) -> list[list[Any]]:
        """Return kline rows as the exchange does, oldest first, the running candle last."""

    def day(self, symbol: str) -> list[Any]:
        """Return the last 24 hours as one kline row, for the 24h ticker."""

    def recent_trades(self, symbol: str, limit: int) -> list[dict[str, Any]]:
        """Return the newest public trades as `GET /fapi/v1/trades` does, oldest first."""

    def consume(self, symbol: str, side: Side, fills: list[tuple[Decimal, Decimal]]) -> list[int]:
        """Take (price, qty) out of the book for an account whose order was the taker.

        side: of the taker. Returns the public trade id of each fill. The depth is gone at once and
        comes back within seconds; the trade frames are due immediately.
        """

    def levels(self, symbol: str) -> list[Decimal]:
        """Return the planted support and resistance levels, ascending; none for a recording."""


def canonical_stream(name: str) -> str:
    """Return the Frame.stream that serves a subscription: one speed of depth and of mark price."""
    symbol, _, kind = name.partition("@")
    if kind in ("depth", "depth@0ms", "depth@250ms", "depth@500ms"):
        kind = "depth@100ms"
    elif kind in ("markPrice", "markPrice@3s"):
        kind = "markPrice@1s"
    return f"{symbol.lower()}@{kind}"


def build_market(paper: PaperConfig, start_ms: int, trade_ids: Mapping[str, int] | None = None) -> Market:
    """Return the configured market.

    start_ms: when this market began, kept by the server over restarts: the market goes on from it.
    trade_ids: per symbol the highest public trade id booked in the ledger, so that after a restart
    no id meets twice. The first advance() may be any time later: what lies between is passed over.
    A recording is named by an absolute path. Candles are made at the first klines() of a symbol and
    kept: 500 take about a second.
    """
    if paper.market == "synthetic":
        from bot.paper_synthetic import SyntheticMarket  # built on the nouns above, as all markets

        return SyntheticMarket(paper, start_ms, trade_ids or {})
    from bot.paper_playback import RawMarket, RebasedMarket

    if paper.playback == "raw":
        return RawMarket(Path(paper.recording), float(paper.speed))
    return RebasedMarket(Path(paper.recording), start_ms, trade_ids or {})
