"""The market of the paper exchange: what the server asks of it, whatever makes the prices.

Time is an argument (`now_ms`, the exchange's clock); nothing here reads a clock or opens a socket.
"""

from collections import deque
from collections.abc import Mapping
from decimal import Decimal
from pathlib import Path
from typing import Any

from bot.config import PaperConfig
from bot.paper_feed import Feed, Frame, Side

CATCH_UP_MS = 600_000  # a longer pause of the process is passed over, as a restart is


class Market:
    """Where prices come from, by symbol in `feeds`. Everything is as of the last advance()."""

    is_tradable = True  # False: raw playback, orders are refused

    def __init__(self, feeds: Mapping[str, Feed]) -> None:
        self.feeds = feeds
        self._now_ms: int | None = None
        self.pending: deque[Frame] = deque()

    def begin(self, now_ms: int) -> None:
        """Stand where the market is at a time: at the first advance, and after a long pause."""
        raise NotImplementedError

    def due_ms(self) -> int:
        """Return when pop() has something."""
        raise NotImplementedError

    def pop(self) -> list[Frame]:
        """Go over the next event and return what it sends."""
        raise NotImplementedError

    def start(self, now_ms: int) -> None:
        """Begin raw playback, at the first subscription; nothing elsewhere and when begun."""

    def advance(self, now_ms: int, frames_max: int | None = None) -> list[Frame]:
        """Return what is due up to now_ms, in order; frames_max leaves the rest for the next call."""
        if self._now_ms is None or now_ms - self._now_ms > CATCH_UP_MS:
            self.begin(now_ms)
        self._now_ms = max(now_ms, self._now_ms or 0)
        while self.due_ms() <= self._now_ms:
            self.pending.extend(self.pop())
        for feed in self.feeds.values():
            feed.now_ms = self._now_ms
        count = len(self.pending) if frames_max is None else min(frames_max, len(self.pending))
        return [self.pending.popleft() for _ in range(count)]

    def next_due_ms(self) -> int | None:
        """Return when advance() has something again; None: never (not started, or ended)."""
        return self.pending[0].time_ms if self.pending else self.due_ms()

    def symbols(self) -> list[dict[str, Any]]:
        """Return the entries of exchangeInfo's `symbols`."""
        return [feed.contract.listing() for feed in self.feeds.values()]

    def consume(self, symbol: str, side: Side, fills: list[tuple[Decimal, Decimal]]) -> list[int]:
        """Take (price, qty) out of the book for an account whose order was the taker.

        side: of the taker. Returns the public trade id of each fill. The depth is gone at once and
        comes back within seconds; the trade frames are due immediately.
        """
        trades = self.feeds[symbol].consume(side, fills)
        for trade in trades:
            self.pending.extend(self.feeds[symbol].trade_frames(trade))
        return [trade.trade_id for trade in trades]

    def levels(self, symbol: str) -> list[Decimal]:
        """Return the planted support and resistance levels, ascending; none for a recording."""
        del symbol
        return []


def canonical_stream(name: str) -> str:
    """Return the Frame.stream that serves a subscription: one speed of depth and of mark price."""
    symbol, _, kind = name.partition("@")
    if name.startswith("!"):
        return symbol + ("@arr" if kind else "")
    if kind.startswith(("depth5", "depth10", "depth20")):
        return f"{symbol.lower()}@{kind.split('@')[0]}@100ms"
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
    A recording is named by an absolute path. Raises ConfigError.
    """
    if paper.market == "synthetic":
        from bot.paper_synthetic import SyntheticMarket  # built on the classes above, as all markets

        return SyntheticMarket(paper, start_ms, trade_ids or {})
    from bot.paper_playback import RawMarket, RebasedMarket

    if paper.playback == "raw":
        return RawMarket(Path(paper.recording), float(paper.speed))
    return RebasedMarket(Path(paper.recording), start_ms, trade_ids or {})
