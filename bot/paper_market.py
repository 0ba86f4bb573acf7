"""The market of the paper exchange: a source's events played at their time, whatever makes the prices.

Time is an argument (`now_ms`, the exchange's clock); nothing here reads a clock or opens a socket.
"""

import math
from collections import deque
from collections.abc import Iterator, Mapping
from pathlib import Path

from bot.config import PaperConfig
from bot.errors import ConfigError
from bot.paper_feed import GRID_MS, Frame
from bot.paper_playback import Rebased, Recording
from bot.paper_synthetic import Synthetic

CATCH_UP_MS = 600_000  # a longer pause of the process is passed over, as a restart is
WARM_MS = 15_000  # before a start the clock's steps are gone through for so long: marks are means of 10 s
STREAM = b'{"stream":"', b'","data":', b"}"  # around a recorded frame's name and payload


class Market:
    """Where prices come from, by symbol in `feeds`. Everything is as of the last advance().

    booked: per symbol the highest trade id in the ledger, so that after a restart no id meets twice.
    """

    is_tradable = True  # False: raw playback, orders are refused

    def __init__(self, source: Synthetic | Rebased, booked: Mapping[str, int]) -> None:
        self.feeds, self._source, self._booked = source.feeds, source, booked
        self._now_ms: int | None = None
        self._pending: deque[Frame] = deque()
        for feed in self.feeds.values():
            feed.pending = self._pending

    def advance(self, now_ms: int, frames_max: int = 1 << 62) -> list[Frame]:
        """Return what is due up to now_ms, in order; frames_max leaves the rest for the next call."""
        if self._now_ms is None or now_ms - self._now_ms > CATCH_UP_MS:
            self._begin(now_ms)
        self._now_ms = max(now_ms, self._now_ms or 0)
        self._pending.extend(self._play(self._now_ms))
        return [self._pending.popleft() for _ in range(min(frames_max, len(self._pending)))]

    def next_due_ms(self) -> int | None:
        """Return when advance() has something again; None: never (not started, or ended)."""
        return self._pending[0].time_ms if self._pending else min(self._next[0], self._grid_ms)

    def start(self, now_ms: int) -> None:
        """Begin raw playback, at the first subscription; nothing elsewhere and when begun."""

    def _begin(self, now_ms: int) -> None:
        from_ms = self._source.first_ms(now_ms)
        self._events = self._source.events(from_ms)
        self._next = next(self._events)
        self._grid_ms = max(from_ms, now_ms - WARM_MS) // GRID_MS * GRID_MS + GRID_MS
        for feed in self.feeds.values():
            feed.begin(from_ms)
        for _ in self._play(now_ms):
            pass  # nobody hears of what was before
        for symbol, feed in self.feeds.items():
            feed.last_id = max(feed.last_id, self._booked.get(symbol, 0))

    def _play(self, now_ms: int) -> Iterator[Frame]:
        while (due_ms := min(self._next[0], self._grid_ms)) <= now_ms:
            if self._next[0] == due_ms:
                _, feed, event = self._next
                feed.now_ms = due_ms
                yield from feed.play(event)
                self._next = next(self._events)
            else:
                self._grid_ms += GRID_MS
                for feed in self.feeds.values():
                    feed.now_ms = due_ms
                    yield from feed.tick()
        for feed in self.feeds.values():
            feed.now_ms = now_ms


class RawMarket(Market):
    """A recording's bytes, once, from the first subscription on. speed 0: as fast as it goes."""

    is_tradable = False

    def __init__(self, recording: Recording, speed: float) -> None:
        if ".csv" in recording.path.suffixes or recording.path.suffix == ".zip":
            raise ConfigError(f"[paper] recording must hold frames for `raw`, was {recording.path}")
        self.feeds = recording.feeds(1 << 60, lambda *_: None)  # no past: no candles
        for feed in self.feeds.values():
            if recording.rest:
                feed.play({**recording.rest, "e": "book", "u": recording.rest["lastUpdateId"]})
        self._speed, self._now_ms = speed, 0
        self._start_ms: int | None = None
        self._lines = (line for line in recording.lines() if line[1].startswith(STREAM[0]))
        self._line = next(self._lines, None)
        self._first_ns = self._line[0] if self._line else 0

    def start(self, now_ms: int) -> None:
        self._start_ms = self._start_ms or now_ms
        for feed in self.feeds.values():
            feed.now_ms = now_ms

    def advance(self, now_ms: int, frames_max: int = 1 << 62) -> list[Frame]:
        frames: list[Frame] = []
        self._now_ms = now_ms
        while self._line and (due_ms := self.next_due_ms()) and due_ms <= now_ms and len(frames) < frames_max:
            stream, _, payload = self._line[1].removeprefix(STREAM[0]).partition(STREAM[1])
            frames.append(Frame(canonical_stream(stream.decode()), payload.removesuffix(STREAM[2]), due_ms))
            self._line = next(self._lines, None)
        return frames

    def next_due_ms(self) -> int | None:
        if self._start_ms is None or self._line is None:
            return None
        if not self._speed:
            return max(self._now_ms or 0, self._start_ms)
        return self._start_ms + math.ceil((self._line[0] - self._first_ns) / 1e6 / self._speed)


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

    start_ms: when this market began, kept by the server over restarts: the market goes on from it. The
    first advance() may be any time later: what lies between is passed over. trade_ids: Market's
    `booked`. A recording is named by an absolute path. Raises ConfigError.
    """
    if paper.market == "synthetic":
        return Market(Synthetic(paper, start_ms), trade_ids or {})
    recording = Recording(Path(paper.recording))
    if paper.playback == "raw":
        return RawMarket(recording, float(paper.speed))
    return Market(Rebased(recording, start_ms), trade_ids or {})
