"""The market of the paper exchange: a recording, real or synthetic, played now and for ever, or raw.

Time is an argument (`now_ms`, the exchange's clock); nothing here reads a clock or opens a socket.
"""

import gzip
import math
import re
import zipfile
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO

import msgspec

from bot.config import PaperConfig
from bot.errors import ConfigError
from bot.paper_feed import GRID_MS, Bar, Event, Feed, Frame, Trade, bar_of, fold
from bot.paper_model import Contract
from bot.paper_synthetic import Synthetic

HEAD_LINES = 20_000  # symbols, increments and a REST depth answer are found in these
CATCH_UP_MS = 600_000  # a longer pause of the process is passed over, as a restart is
WARM_MS = 15_000  # before a start the clock's steps are gone through for so long: marks are means of 10 s,
WARM_TRADES_MS = 60_000  # and of a synthetic market this and up to a minute more is played
STREAM = b'{"stream":"', b'","data":', b"}"  # around a recorded frame's name and payload
# Which fields of an event are ids, and of which series; where its prices and quantities are.
IDS = {"trade": {"t": "t"}, "aggTrade": {"a": "a", "f": "f", "l": "f"}, "bookTicker": {"u": "u"},
       "depthUpdate": {"u": "u", "U": "u", "pu": "u"}, "book": {"u": "u"}}
NUMBERS = {"trade": ("p", "q"), "aggTrade": ("p", "q"), "bookTicker": ("ba", "BA")}


class Recording:
    """A file of frames, and what its head tells. Raises ConfigError.

    Lines of `<local time> <raw frame with envelope>` (nanoseconds, or seconds and a colon), among them a REST
    depth answer; or the exchange's public aggTrades CSV, whose name begins with the symbol. Also .gz, .zip.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rest: Event | None = None  # the book at the beginning of a loop
        self._firsts: dict[str, dict[str, Event]] = {}  # symbol -> kind -> its first event
        self._numbers: dict[str, tuple[set[str], set[str]]] = {}  # symbol -> prices, quantities
        self._first_line = 0  # where a loop begins: the first diff that continues the REST answer
        try:
            self._read_head()
        except (OSError, EOFError, ValueError, KeyError, msgspec.MsgspecError, zipfile.BadZipFile) as error:
            raise ConfigError(f"[paper] recording must be readable, was {path}: {error!r}") from error
        if not self._numbers:
            raise ConfigError(f"[paper] recording must hold trades or quotes, was {path} without any")

    def feeds(self, start_ms: int, plan: Callable[[str, int, int], Bar | None]) -> dict[str, Feed]:
        """Return a feed for each symbol, at its first quote."""
        made = {}
        for symbol, (prices, qtys) in self._numbers.items():
            kinds, contract = self._firsts[symbol], Contract(symbol, _increment(prices), _increment(qtys, 1))
            made[symbol] = Feed(contract, start_ms, partial(plan, symbol), max(map(float, prices)), kinds)
            made[symbol].see_quote(kinds.get("bookTicker") or kinds[made[symbol].main])
        return made

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Yield (local time in ns, frame with its envelope); a CSV row becomes an aggTrade frame."""
        symbol = self.path.name.split("-")[0]
        with _open(self.path) as file:
            for line in file:
                stamp, _, raw = line.rstrip(b"\r\n").partition(b" ")
                if raw.startswith(b"{"):
                    yield int(float(stamp[:-1]) * 1e9) if stamp.endswith(b":") else int(stamp), raw
                elif stamp[:1].isdigit():
                    a, p, q, f, last, at, maker = stamp.decode().split(",")
                    event = {"e": "aggTrade", "E": int(at), "a": int(a), "s": symbol, "p": p, "q": q,
                             "f": int(f), "l": int(last), "T": int(at), "m": maker.lower() == "true"}
                    yield int(at) * 1_000_000, msgspec.json.encode(
                        {"stream": f"{symbol.lower()}@aggTrade", "data": event})

    def events(self) -> Iterator[tuple[int, Event]]:
        """Yield (local time in ms, event) of one loop."""
        for ns, raw in islice(self.lines(), self._first_line, None):
            event = msgspec.json.decode(raw).get("data")
            if event and event["s"] in self._numbers:
                yield ns // 1_000_000, event

    def _read_head(self) -> None:
        diffs, rest = [], None
        for number, (_, raw) in enumerate(islice(self.lines(), HEAD_LINES)):
            envelope = msgspec.json.decode(raw)
            if (event := envelope.get("data")) is None:
                rest = rest or envelope
                continue
            self._firsts.setdefault(event["s"], {}).setdefault(event["e"], event)
            if event["e"] in NUMBERS:
                numbers = self._numbers.setdefault(event["s"], (set(), set()))
                for keys, seen in zip(NUMBERS[event["e"]], numbers, strict=True):
                    seen.update(event[key] for key in keys)
            elif event["e"] == "depthUpdate":
                diffs.append((event["u"], number))
        continuing = [number for u, number in diffs if rest and u >= rest["lastUpdateId"]]
        if continuing and len(self._firsts) == 1:  # a REST answer does not name its symbol
            self.rest, self._first_line = rest, continuing[0]


class Market:
    """Where prices come from, by symbol in `feeds`: a loop, played. All is as of the last advance().

    Times move by one constant per loop, ids by constants that make them go on over the seam, where a depth
    frame and a bookTicker lead from the last book to the first. The past before the start are loops too.
    booked: per symbol the highest trade id in the ledger, so that after a restart no id meets twice.
    """

    is_tradable = True  # False: raw playback, orders are refused

    def __init__(self, source: Recording | Synthetic, start_ms: int, booked: Mapping[str, int]) -> None:
        self.source, self._booked = source, booked
        self.feeds = source.feeds(start_ms, self._traded)
        if strange := [name for name in self.feeds if not name.endswith("USDT")]:
            raise ConfigError(f"[paper] recording must be of USDT contracts for `rebased`, was {strange}")
        self._now_ms: int | None = None
        self._pending: deque[Frame] = deque()
        self._ids: dict[tuple[str, str], tuple[int, int]] = {}  # lowest and highest of a symbol's series
        self._seconds: dict[tuple[str, int], Bar | None] = {}
        first_ms, last_ms, early_ms, late_ms = self._learn()
        self._late_ms = late_ms  # published so much after the local time, nothing precedes its own E
        self._origin_ms = (first_ms + early_ms) // 1_000 * 1_000
        self._start_ms = -(-start_ms // 1_000) * 1_000
        self._length_ms = (last_ms + late_ms - self._origin_ms) // 1_000 * 1_000 + 1_000
        self._books: list[Event] = []
        for symbol, feed in self.feeds.items():
            feed.pending, feed.lag_ms = self._pending, late_ms - early_ms
            if source.rest:  # u: the pu of the first diff
                self._books = [{**source.rest, "e": "book", "s": symbol, "u": self._ids[symbol, "u"][0]}]
                feed.play(self._books[0])

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
        from_ms = now_ms // 60_000 * 60_000 - WARM_TRADES_MS
        if isinstance(self.source, Recording):  # its book is followed from the loop's beginning
            from_ms = max(0, now_ms - self._start_ms) // self._length_ms * self._length_ms + self._start_ms
        self._events = self._looped(from_ms)
        self._next = next(self._events)
        self._grid_ms = max(from_ms, now_ms - WARM_MS) // GRID_MS * GRID_MS + GRID_MS
        for feed in self.feeds.values():
            feed.live_ms = from_ms  # what was traded before is in the plan
            feed.minutes.clear()
        for _ in self._play(now_ms):
            pass  # nobody hears of what was before
        for symbol, feed in self.feeds.items():
            feed.last_id = max(feed.last_id, self._booked.get(symbol, 0))

    def _play(self, now_ms: int) -> Iterator[Frame]:
        while (due_ms := min(self._next[0], self._grid_ms)) <= now_ms:
            if self._next[0] == due_ms:
                feed = self.feeds[self._next[1]["s"]]
                feed.now_ms = due_ms
                yield from feed.play(self._next[1])
                self._next = next(self._events)
            else:
                self._grid_ms += GRID_MS
                for feed in self.feeds.values():
                    feed.now_ms = due_ms
                    yield from feed.tick()
        for feed in self.feeds.values():
            feed.now_ms = now_ms

    def _learn(self) -> tuple[int, int, int, int]:
        # Ids and bars of a loop; its first and last local time, and the least and most of T and E against it.
        trades = defaultdict[tuple[str, int], list[Trade]](list)
        first_ms = last_ms = 0
        early_ms, late_ms = 1 << 62, -1 << 62
        for local_ms, event in self.source.events():
            symbol, feed = event["s"], self.feeds[event["s"]]
            for key, series in IDS.get(event["e"], {}).items():
                low, high = self._ids.get((symbol, series), (event[key], event[key]))
                self._ids[symbol, series] = min(low, event[key]), max(high, event[key])
            if feed.is_price(event):
                trades[symbol, event["T"] // 1_000].append(feed.trade_of(event))
            early_ms = min(early_ms, event["T" if "T" in event else "E"] - local_ms)
            late_ms = max(late_ms, event["E"] - local_ms)
            first_ms, last_ms = first_ms or local_ms, local_ms
        self._seconds = {key: bar_of(rows) for key, rows in trades.items()}
        return first_ms, last_ms, early_ms, late_ms

    def _looped(self, from_ms: int) -> Iterator[tuple[int, Event]]:
        # (when, event) from a time on, loop after loop.
        loop = (from_ms - self._start_ms) // self._length_ms
        while True:
            shift_ms = self._start_ms + loop * self._length_ms - self._origin_ms
            for event in self._books:
                yield self._origin_ms + shift_ms, self._moved(event, loop, shift_ms)
            for local_ms, event in self.source.events():
                if (due_ms := local_ms + self._late_ms + shift_ms) >= from_ms:
                    yield due_ms, self._moved(event, loop, shift_ms)
            loop += 1

    def _moved(self, event: Event, loop: int, shift_ms: int) -> Event:
        moved = {**event, **{key: event[key] + shift_ms for key in "ET" if key in event}}
        for key, series in IDS.get(event["e"], {}).items():
            low, high = self._ids[event["s"], series]
            moved[key] += loop * (high - low + 1)
        return moved

    def _traded(self, symbol: str, from_ms: int, to_ms: int) -> Bar | None:
        first, start, length = (ms // 1_000 for ms in (self._origin_ms, self._start_ms, self._length_ms))
        return fold(self._seconds.get((symbol, first + (second - start) % length))
                    for second in range(from_ms // 1_000, to_ms // 1_000))


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
        self._begun_ms: int | None = None
        self._lines = (line for line in recording.lines() if line[1].startswith(STREAM[0]))
        self._line = next(self._lines, None)
        self._first_ns = self._line[0] if self._line else 0

    def start(self, now_ms: int) -> None:
        self._begun_ms = self._begun_ms or now_ms
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
        if self._begun_ms is None or self._line is None:
            return None
        if not self._speed:
            return max(self._now_ms or 0, self._begun_ms)
        return self._begun_ms + math.ceil((self._line[0] - self._first_ns) / 1e6 / self._speed)


def canonical_stream(name: str) -> str:
    """Return the Frame.stream that serves a subscription: one speed of depth and of mark price."""
    symbol, _, kind = name.partition("@")
    if name.startswith("!"):
        return symbol + ("@arr" if kind else "")
    kind = re.sub(r"^(depth(5|10|20)?)(@(0|250|500)ms)?$", r"\1@100ms", kind)
    return f"{symbol.lower()}@{re.sub('^markPrice(@3s)?$', 'markPrice@1s', kind)}"


def build_market(paper: PaperConfig, start_ms: int, trade_ids: Mapping[str, int] | None = None) -> Market:
    """Return the configured market, which began at start_ms and goes on from it. Raises ConfigError."""
    if paper.market == "synthetic":
        return Market(Synthetic(paper.symbols, paper.seed), start_ms, trade_ids or {})
    recording = Recording(Path(paper.recording))
    if paper.playback == "raw":
        return RawMarket(recording, float(paper.speed))
    return Market(recording, start_ms, trade_ids or {})


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".zip":
        archive = zipfile.ZipFile(path)
        return archive.open(archive.namelist()[0])
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _increment(numbers: set[str], most: int = 0) -> Decimal:
    # What divides them all, or the last place of the longest.
    places = max(len(number.partition(".")[2]) for number in numbers)
    units = math.gcd(*(int(Decimal(number).scaleb(places)) for number in numbers))
    return Decimal(min(units, most) if most else units).scaleb(-places)
