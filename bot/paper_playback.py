"""Recordings as a market: `raw` sends the bytes as recorded, `rebased` makes them now and for ever.

A file is read as a stream, .gz and .zip too: lines of `<local time> <raw frame with envelope>`
(nanoseconds, or seconds and a colon), a REST depth answer among them being the book; or the
exchange's public aggTrades CSV, whose symbol is the first word of the file's name.

Rebased: times move by one constant per loop, a whole number of seconds; the ids t, a, f, l, U, u, pu
by constants that make them go on over the seam, where a depth frame and a bookTicker lead from the
last book to the first. Order and pace are the recorded ones. Candles and mark prices are made here,
from trades and quotes: a recorded candle would no longer begin with a minute. The past before the
start are loops too. Trades with an X other than MARKET (insurance fund, ADL; none in our data) are sent
as they are and make no price. Without a REST answer (CSV, cryptofeed) the book is a
synthetic one around quotes or trades. What accounts take from a recorded book is missing in book()
for seconds, but not in the recorded frames.
"""

import gzip
import math
import zipfile
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO

import msgspec

from bot.errors import ConfigError
from bot.paper_feed import Bar, Event, Feed, bar_of, fold
from bot.paper_model import Contract

HEAD_LINES = 20_000  # symbols, increments and a REST depth answer are found in these
# Which fields of an event are ids, and of which series; where its prices and quantities are.
IDS = {"trade": {"t": "t"}, "aggTrade": {"a": "a", "f": "f", "l": "f"}, "bookTicker": {"u": "u"},
       "depthUpdate": {"u": "u", "U": "u", "pu": "u"}, "book": {"u": "u"}}
NUMBERS = {"trade": ("p", "q"), "aggTrade": ("p", "q"), "bookTicker": ("ba", "BA")}


class Recording:
    """A file of frames, and what its head tells. Raises ConfigError."""

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


class Rebased:
    """A recording as a source of events: it happens now, and again, and again."""

    def __init__(self, recording: Recording, start_ms: int) -> None:
        self._recording, self.feeds = recording, recording.feeds(start_ms, self._traded)
        if strange := [name for name in self.feeds if not name.endswith("USDT")]:
            raise ConfigError(f"[paper] recording must be of USDT contracts for `rebased`, was {strange}")
        self._ids: dict[tuple[str, str], tuple[int, int]] = {}  # lowest and highest of a symbol's series
        self._seconds: dict[tuple[str, int], Bar | None] = {}
        first_ms = last_ms = 0
        early_ms, late_ms = 1 << 62, -1 << 62  # of T and E against the local clock
        for local_ms, event in recording.events():
            self._learn(event)
            early_ms = min(early_ms, event["T" if "T" in event else "E"] - local_ms)
            late_ms = max(late_ms, event["E"] - local_ms)
            first_ms, last_ms = first_ms or local_ms, local_ms
        self._late_ms = late_ms  # published so much after the local time, nothing precedes its own E
        self._origin_ms = (first_ms + early_ms) // 1_000 * 1_000
        self._start_ms = -(-start_ms // 1_000) * 1_000
        self._length_ms = (last_ms + late_ms - self._origin_ms) // 1_000 * 1_000 + 1_000
        self._books: list[Event] = []
        for symbol, feed in self.feeds.items():
            feed.lag_ms = late_ms - early_ms
            if recording.rest:  # u: the pu of the first diff
                self._books = [{**recording.rest, "e": "book", "s": symbol, "u": self._ids[symbol, "u"][0]}]
                feed.play(self._books[0])

    def first_ms(self, now_ms: int) -> int:
        """Return from where the events are to be played to stand at a time."""
        return self._start_ms + max(0, now_ms - self._start_ms) // self._length_ms * self._length_ms

    def events(self, from_ms: int) -> Iterator[tuple[int, Feed, Event]]:
        """Yield (when, feed, event), loop after loop."""
        loop = (from_ms - self._start_ms) // self._length_ms
        while True:
            shift_ms = self._start_ms + loop * self._length_ms - self._origin_ms
            for event in self._books:
                yield self._origin_ms + shift_ms, self.feeds[event["s"]], self._moved(event, loop, shift_ms)
            for local_ms, event in self._recording.events():
                yield (local_ms + self._late_ms + shift_ms, self.feeds[event["s"]],
                       self._moved(event, loop, shift_ms))
            loop += 1

    def _learn(self, event: Event) -> None:
        symbol, feed = event["s"], self.feeds[event["s"]]
        for key, series in IDS.get(event["e"], {}).items():
            low, high = self._ids.get((symbol, series), (event[key], event[key]))
            self._ids[symbol, series] = min(low, event[key]), max(high, event[key])
        if feed.is_price(event):
            second = event["T"] // 1_000
            self._seconds[symbol, second] = fold([self._seconds.get((symbol, second)),
                                                  bar_of([feed.trade_of(event)])])

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
