"""The market of the paper exchange: a recording, real or synthetic, played now and for ever, or raw.

Time is an argument (`now_ms`, the exchange's clock); nothing here reads a clock or opens a socket.
"""

import gzip
import heapq
import math
import re
import zipfile
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import count, islice
from operator import itemgetter
from pathlib import Path
from typing import IO

import msgspec

from bot.config import PaperConfig
from bot.errors import ConfigError
from bot.paper_feed import GRID_MS, MINUTES_MAX, Bar, Event, Feed, Frame, add, fold
from bot.paper_model import Contract
from bot.paper_synthetic import Synthetic

HEAD_LINES = 20_000  # symbols, increments and a REST depth answer are found in these
HISTORY_MS = 500 * 60_000  # of past before the start
CATCH_UP_MS = 600_000  # a longer pause of the process is passed over, as a restart is
WARM_MS = 15_000  # before a start the clock's steps are gone through for so long: marks are means of 10 s,
WARM_TRADES_MS = 60_000  # and of a synthetic market this and up to a minute more is played
ENVELOPE = b'{"stream":"', b'","data":'  # before a recorded frame's stream and JSON
# Which fields of an event are ids, and of which series; which are prices and quantities.
IDS = {"trade": {"t": "t"}, "aggTrade": {"a": "a", "f": "f", "l": "f"}, "bookTicker": {"u": "u"},
       "depthUpdate": {"u": "u", "U": "u", "pu": "u"}, "book": {"u": "u"}}
NUMBERS = {"trade": "pq", "aggTrade": "pq", "bookTicker": "bBaA"}  # price, quantity, and again


class Recording:
    """A file of frames, and what its head tells. Raises ConfigError.

    Lines of `<local time> <raw frame with envelope>` (nanoseconds, or seconds and a colon), among them a REST
    depth answer; or the exchange's public aggTrades CSV, whose name begins with the symbol. Also .gz, .zip.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._book: Event | None = None  # at the beginning of a loop
        self._firsts: dict[str, dict[str, Event]] = {}  # symbol -> kind -> its first event
        self._numbers: dict[str, tuple[set[str], set[str]]] = {}  # symbol -> prices, quantities
        self._first_line = 0  # where a loop begins: the first diff that continues the REST answer
        try:
            self._read_head()
        except (OSError, EOFError, ValueError, KeyError, msgspec.MsgspecError, zipfile.BadZipFile) as error:
            raise ConfigError(f"[paper] recording must be readable, was {path}: {error!r}") from error
        if not self._numbers:
            raise ConfigError(f"[paper] recording must hold trades or quotes, was {path} without any")

    def feeds(self) -> dict[str, Feed]:
        return {symbol: Feed(Contract(symbol, _increment(prices), _increment(qtys, 1)), self._firsts[symbol])
                for symbol, (prices, qtys) in self._numbers.items()}

    def lines(self) -> Iterator[tuple[int, bytes, bytes]]:
        """Yield (local time in ns, stream, JSON); a CSV row is an aggTrade, a REST answer has no stream."""
        symbol = self.path.name.split("-")[0]
        with _open(self.path) as file:
            for line in file:
                stamp, _, raw = line.rstrip(b"\r\n").partition(b" ")
                if raw.startswith(b"{"):
                    stream, _, data = raw.removeprefix(ENVELOPE[0]).partition(ENVELOPE[1])
                    ns = int(float(stamp[:-1]) * 1e9) if stamp.endswith(b":") else int(stamp)
                    yield (ns, stream, data[:-1]) if data else (ns, b"", raw)
                elif stamp[:1].isdigit():
                    a, p, q, f, last, at, maker = stamp.decode().split(",")
                    yield int(at) * 1_000_000, symbol.lower().encode() + b"@aggTrade", msgspec.json.encode(
                        {"e": "aggTrade", "E": int(at), "a": int(a), "s": symbol, "p": p, "q": q, "f": int(f),
                         "l": int(last), "T": int(at), "m": maker.lower() == "true"})

    def events(self) -> Iterator[tuple[int, Event]]:
        """Yield (when, event) of one loop: at its E, and in the order of the file."""
        at_ms = 0
        if self._book:
            yield self._book["E"], {**self._book, "u": self._book["pu"]}
        for _, stream, raw in islice(self.lines(), self._first_line, None):
            if stream and (event := msgspec.json.decode(raw))["s"] in self._numbers:
                at_ms = max(at_ms, event["E"])
                yield at_ms, event

    def _read_head(self) -> None:
        diffs, rest = [], None
        for number, (_, stream, raw) in enumerate(islice(self.lines(), HEAD_LINES)):
            event = msgspec.json.decode(raw)
            if not stream:
                rest = rest or event
                continue
            firsts = self._firsts.setdefault(event["s"], {})
            firsts.setdefault(event["e"], event)
            if keys := NUMBERS.get(event["e"]):
                prices, qtys = self._numbers.setdefault(event["s"], (set(), set()))
                prices.update(event[key] for key in keys[::2])
                qtys.update(event[key] for key in keys[1::2])
            elif event["e"] == "depthUpdate":
                diffs.append((number, event["u"], {key: event[key] for key in ("s", "E", "pu")}))
        continuing = [(number, diff) for number, u, diff in diffs if rest and u >= rest["lastUpdateId"]]
        if rest and continuing and len(self._firsts) == 1:  # a REST answer does not name its symbol
            self._first_line, diff = continuing[0]
            self._book = firsts["book"] = {"e": "book", "u": rest["lastUpdateId"], "b": rest["bids"],
                                           "a": rest["asks"], **diff}


class Market:
    """Where prices come from, by symbol in `feeds`: a loop, played. All is as of the last advance().

    Times move by one constant per loop, ids by constants that make them go on over the seam, where a depth
    frame and a bookTicker lead from the last book to the first. The past before the start are loops too.
    booked: per symbol the highest trade id in the ledger, so that after a restart no id meets twice.
    """

    is_tradable = True  # False: raw playback, orders are refused

    def __init__(self, sources: Sequence[Recording | Synthetic], start_ms: int,
                 booked: Mapping[str, int]) -> None:
        self.sources, self._booked = sources, booked
        self.feeds = {symbol: feed for source in sources for symbol, feed in source.feeds().items()}
        if strange := [name for name in self.feeds if not name.endswith("USDT")]:
            raise ConfigError(f"[paper] recording must be of USDT contracts for `rebased`, was {strange}")
        self._now_ms = -1 << 62
        self._pending: deque[Frame] = deque()
        self._ids: dict[tuple[str, str], tuple[int, int]] = {}  # lowest and highest of a symbol's series
        self._seconds: dict[tuple[str, int], Bar | None] = {}  # of a loop
        self._start_ms = -(-start_ms // 1_000) * 1_000
        self._learn()

    def advance(self, now_ms: int, frames_max: int = 1 << 62) -> list[Frame]:
        """Return what is due up to now_ms, in order; frames_max leaves the rest for the next call."""
        if now_ms - self._now_ms > CATCH_UP_MS:
            self._begin(now_ms)
        self._now_ms = max(now_ms, self._now_ms)
        self._pending.extend(self._play(self._now_ms))
        return [self._pending.popleft() for _ in range(min(frames_max, len(self._pending)))]

    def next_due_ms(self) -> int | None:
        """Return when advance() has something again; None: never (not started, or ended)."""
        return self._pending[0].time_ms if self._pending else min(self._next[0], self._grid_ms)

    def start(self, now_ms: int) -> None:
        """Begin raw playback, at the first subscription; nothing elsewhere and when begun."""

    def _begin(self, now_ms: int) -> None:
        from_ms = now_ms // 60_000 * 60_000 - WARM_TRADES_MS
        if isinstance(self.sources[0], Recording):  # its book is followed from the loop's beginning
            from_ms = max(0, now_ms - self._start_ms) // self._length_ms * self._length_ms + self._start_ms
        self._events = self._looped(from_ms)
        self._next = next(self._events)
        self._grid_ms = max(from_ms, now_ms - WARM_MS) // GRID_MS * GRID_MS + GRID_MS
        for feed in self.feeds.values():
            feed.minutes = self._past(feed.contract.symbol, from_ms)
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

    def _learn(self) -> None:
        # A loop's ids and bars; when it begins, before the earliest T, and how long it is.
        first_ms = at_ms = lag_ms = 0
        for at_ms, event in self._once():
            symbol, feed = event["s"], self.feeds[event["s"]]
            for key, series in IDS.get(event["e"], {}).items():
                low, high = self._ids.get((symbol, series), (event[key], event[key]))
                self._ids[symbol, series] = min(low, event[key]), max(high, event[key])
            if trade := feed.trade_of(event):
                add(self._seconds, (symbol, trade.time_ms // 1_000), trade)
            first_ms, lag_ms = first_ms or at_ms, max(lag_ms, at_ms - event.get("T", at_ms))
        self._origin_ms = (first_ms - lag_ms) // 1_000 * 1_000
        self._length_ms = (at_ms - self._origin_ms) // 1_000 * 1_000 + 1_000
        for feed in self.feeds.values():
            feed.pending, feed.lag_ms = self._pending, lag_ms

    def _once(self) -> Iterator[tuple[int, Event]]:
        return heapq.merge(*(source.events() for source in self.sources), key=itemgetter(0))

    def _looped(self, from_ms: int) -> Iterator[tuple[int, Event]]:
        # (when, event) from a time on, loop after loop.
        for loop in count((from_ms - self._start_ms) // self._length_ms):
            shift_ms = self._start_ms + loop * self._length_ms - self._origin_ms
            for at_ms, event in self._once():
                if (due_ms := at_ms + shift_ms) < from_ms:
                    continue
                moved = {**event, **{key: event[key] + shift_ms for key in "ET" if key in event}}
                for key, series in IDS.get(event["e"], {}).items():
                    low, high = self._ids[event["s"], series]
                    moved[key] += loop * (high - low + 1)
                yield due_ms, moved

    def _past(self, symbol: str, until_ms: int) -> dict[int, Bar | None]:
        # What was traded in each minute before: a loop follows the other.
        first, start, length, until = (
            ms // 1_000 for ms in (self._origin_ms, self._start_ms, self._length_ms, until_ms))
        from_ms = max(self._start_ms - HISTORY_MS, until_ms - MINUTES_MAX * 60_000)
        return {minute: fold(self._seconds.get((symbol, first + (second - start) % length))
                             for second in range(minute * 60, min(minute * 60 + 60, until)))
                for minute in range(from_ms // 60_000, until_ms // 60_000 + 1)}


class RawMarket(Market):
    """A recording's bytes, once, from the first subscription on. speed 0: as fast as it goes."""

    is_tradable = False

    def __init__(self, recording: Recording, speed: float) -> None:
        if ".csv" in recording.path.suffixes or recording.path.suffix == ".zip":
            raise ConfigError(f"[paper] recording must hold frames for `raw`, was {recording.path}")
        self.feeds, self._frames = recording.feeds(), self._dated(recording, speed or math.inf)
        self._begun_ms = 0
        self._due: Frame | None = None

    def start(self, now_ms: int) -> None:
        if not self._begun_ms:
            self._begun_ms = now_ms
            self._due = next(self._frames, None)

    def advance(self, now_ms: int, frames_max: int = 1 << 62) -> list[Frame]:
        frames: list[Frame] = []
        while self._due and self._due.time_ms <= now_ms and len(frames) < frames_max:
            frames.append(self._due)
            self._due = next(self._frames, None)
        for feed in self.feeds.values():
            feed.now_ms = now_ms
        return frames

    def next_due_ms(self) -> int | None:
        return self._due.time_ms if self._due else None

    def _dated(self, recording: Recording, speed: float) -> Iterator[Frame]:
        first_ns = 0
        for ns, stream, raw in recording.lines():
            if stream:
                first_ns = first_ns or ns
                due_ms = self._begun_ms + math.ceil((ns - first_ns) / 1e6 / speed)
                yield Frame(canonical_stream(stream.decode()), raw, due_ms)


def canonical_stream(name: str) -> str:
    """Return the Frame.stream that serves a subscription: one speed of depth and of mark price."""
    symbol, _, kind = name.partition("@")
    if name.startswith("!"):
        return symbol + ("@arr" if kind else "")
    kind = re.sub(r"^(depth(5|10|20)?)(@(0|250|500)ms)?$", r"\1@100ms", kind)
    return f"{symbol.lower()}@{re.sub('^markPrice(@3s)?$', 'markPrice@1s', kind)}"


def build_market(paper: PaperConfig, start_ms: int, trade_ids: Mapping[str, int] = {}) -> Market:
    """Return the configured market, which began at start_ms and goes on from it. Raises ConfigError."""
    if paper.market == "synthetic":
        names = [symbol.split(":")[0].replace("/", "") for symbol in paper.symbols]
        return Market([Synthetic(name, paper.seed) for name in names], start_ms, trade_ids)
    recording = Recording(Path(paper.recording))
    if paper.playback == "raw":
        return RawMarket(recording, float(paper.speed))
    return Market([recording], start_ms, trade_ids)


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
