"""The market of the paper exchange: a recording, real or synthetic, played now and for ever, or raw.

Time is an argument (`now_ms`, the exchange's clock); nothing here reads a clock or opens a socket.
"""

import gzip
import hashlib
import heapq
import math
import re
import struct
import zipfile
from collections import defaultdict, deque
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from itertools import count, islice, pairwise
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import msgspec

from bot.config import PaperConfig
from bot.errors import ConfigError
from bot.paper_feed import GRID_MS, MINUTES_MAX, Bar, Event, Feed, Frame, add, fold
from bot.paper_model import Contract, table

HEAD_LINES = 20_000  # symbols, increments and a REST depth answer are found in these
CATCH_UP_MS = 600_000  # a longer pause of the process is passed over, as a restart is
WARM_MS = 30_000  # so much of the past is played before a start: marks are means of 10 s
SHAPE = SimpleNamespace(**table("synthetic", dict[str, Any]))  # a synthetic half hour's numbers
LOOP_MS: int = SHAPE.loop_ms
STEPS = LOOP_MS // GRID_MS
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
        self._kinds = defaultdict[str, set[str]](set)  # of a symbol's events
        self._numbers: dict[str, tuple[Decimal, set[str], set[str]]] = {}  # first price, all, quantities
        self._first_line = 0  # where a loop begins: the first diff that continues the REST answer
        try:
            self._read_head()
        except (OSError, EOFError, ValueError, KeyError, msgspec.MsgspecError, zipfile.BadZipFile) as error:
            raise ConfigError(f"[paper] recording must be readable, was {path}: {error!r}") from error
        if not self._numbers:
            raise ConfigError(f"[paper] recording must hold trades or quotes, was {path} without any")

    def feeds(self) -> dict[str, Feed]:
        return {symbol: Feed(Contract(symbol, _increment(prices), _increment(qtys, 1)), self._kinds[symbol],
                             price, self._book)
                for symbol, (price, prices, qtys) in self._numbers.items()}

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
            self._kinds[event["s"]].add(event["e"])
            if keys := NUMBERS.get(event["e"]):
                _, prices, qtys = self._numbers.setdefault(
                    event["s"], (Decimal(event[keys[0]]), set(), set()))
                prices.update(event[key] for key in keys[::2])
                qtys.update(event[key] for key in keys[1::2])
            elif event["e"] == "depthUpdate":
                diffs.append((number, event["u"], {key: event[key] for key in ("s", "E", "pu")}))
        continuing = [(number, diff) for number, u, diff in diffs if rest and u >= rest["lastUpdateId"]]
        if rest and continuing and len(self._kinds) == 1:  # a REST answer does not name its symbol
            self._first_line, diff = continuing[0]
            self._book = {**diff, "e": "book", "u": rest["lastUpdateId"], "b": rest["bids"],
                          "a": rest["asks"]}


class Synthetic:
    """A recording that never was: one symbol's half hour made of a seed, lively enough to watch.

    Price walks between planted levels in legs of 20 to 70 s and turns at each with a little overshoot; now
    and then it breaks through and trades between the next two levels. It ends where it begins, so it can be
    looped. In ticks: path and bids at the grid's steps (bid 0: a gap), and the trades.
    """

    def __init__(self, name: str, seed: int) -> None:
        contracts = table("synthetic_contracts", dict[str, tuple[str, str, int]])
        tick, step, self.middle = contracts.get(name, contracts["other"])
        self.contract, self._seed = Contract(name, Decimal(tick), Decimal(step)), f"{seed}/{name}"
        self.planted = self._plant(int(self.middle / self.contract.tick))
        lead = int(self._draws("lead", 1, *SHAPE.lead_s)[0]) * 1_000 // GRID_MS
        knots = self._knots()
        walked = self._walk(knots)  # made from the first touch on, and turned so that it begins before
        self.path, self.bids = zip(*walked[-lead:], *walked[:-lead], strict=True)
        self.trades = self._trades([at + lead * GRID_MS for at, _, is_break in knots if is_break])

    def _draws(self, name: str, count: int, least: float = 0.0, more: float = 1.0) -> list[float]:
        # Seeded numbers from the least on, the same for ever and on every machine.
        raw = hashlib.shake_256(f"{self._seed}/{name}".encode()).digest(4 * count)
        return [least + more * (n / 2**32) for n in struct.unpack(f"<{count}I", raw)]

    def _plant(self, middle: int) -> list[int]:
        levels = [middle]
        for up, down in zip(*(self._draws(name, SHAPE.levels, *SHAPE.spacing)
                              for name in ("levels", "levels below")), strict=True):
            levels = [round(levels[0] * (1 - down)), *levels, round(levels[-1] * (1 + up))]
        return levels

    def _legs(self) -> list[int]:
        # The levels between the legs, from 0 out and the same way back.
        walked, direction, is_running = [0], 1, False
        for leg, draw in enumerate(self._draws("legs", SHAPE.legs // 2)):
            chance = SHAPE.break_again if is_running else SHAPE.break_once
            if walked[-1] * direction > 0:  # outward is harder than back, and impossible at the end
                chance *= 1 - abs(walked[-1]) / SHAPE.levels
            is_running = leg >= SHAPE.calm_legs and draw < chance
            direction = direction if is_running else -direction
            walked.append(walked[-1] + direction)
        return walked + walked[-2::-1]

    def _knots(self) -> list[tuple[float, float, bool]]:
        # Where the legs meet: when, at which price, whether a level breaks there.
        levels, beyond = self._legs(), self._draws("turns", SHAPE.legs, *SHAPE.overshoot)
        weights = self._draws("weights", SHAPE.legs, *SHAPE.leg_spread)
        weights[-1] = sum(SHAPE.leg_spread)  # the one that the loop begins within, away from its level
        knots, begun = list[tuple[float, float, bool]](), 0.0
        for leg, weight in enumerate(weights):
            before, at, after = levels[leg - 1 if leg else -2], levels[leg], levels[leg + 1]
            price = float(self.planted[at + SHAPE.levels])
            if before == after:
                price *= 1 - (after - at) * beyond[leg]
            knots.append((begun, price, before != after))
            begun += LOOP_MS * weight / sum(weights)
        return [*knots, (begun, knots[0][1], False)]

    def _walk(self, knots: list[tuple[float, float, bool]]) -> list[tuple[float, int]]:
        # The path, and the bid of each step.
        noise = [sum(waves) for waves in zip(*(self._wave(*wave) for wave in SHAPE.waves), strict=True)]
        walked = list[tuple[float, int]]()
        for leg, ((begun, price, _), (end, target, _)) in enumerate(pairwise(knots)):
            gap_ms = SHAPE.gap_ms if leg in SHAPE.gap_legs else 0
            for step in range(len(walked), min(STEPS, math.ceil(end / GRID_MS))):
                at = step * GRID_MS
                calm = min(1.0, (at - begun) / SHAPE.calm_ms, (end - at) / SHAPE.calm_ms)
                share = (at - begun) / (end - begun)
                here = (price + share * (target - price)) * (1 + noise[step] * calm)
                is_gap = abs(at + GRID_MS / 2 - (begun + end) / 2) <= (gap_ms - GRID_MS) / 2
                walked.append((here, 0 if is_gap else int(here)))
        return walked

    def _wave(self, length_ms: int, size: float) -> list[float]:
        steps = length_ms // GRID_MS
        draws = self._draws(f"wave/{length_ms}", STEPS // steps + 1, -size, 2 * size)
        return [a + (b - a) * i / steps for a, b in pairwise(draws) for i in range(steps)]

    def _trades(self, breaks: list[float]) -> list[tuple[int, int, int, bool]]:
        # When, at which price, how many lots, whether the taker sold; by time.
        bursts = [*breaks, *self._draws("bursts", SHAPE.bursts, 0, LOOP_MS)][:SHAPE.bursts]
        marks = [(at, -1) for at in self._draws("trades", SHAPE.trades, 0, LOOP_MS)]
        for number, burst in enumerate(bursts):
            later = self._draws(f"burst/{number}", SHAPE.burst_trades, 0, SHAPE.burst_ms)
            marks += [((burst + ms) % LOOP_MS, run) for run, ms in enumerate(later)]
        largest = SHAPE.trade_notional / self.middle / float(self.contract.step)
        sides, sizes, made = self._draws("sides", len(marks)), self._draws("sizes", len(marks)), []
        for (at, run), side, size in zip(sorted(marks), sides, sizes, strict=True):
            step = int(at // GRID_MS)
            if bid := self.bids[step]:
                is_sale, away = side < 0.5, max(0, run) // 8
                if run >= 0:  # a burst runs with the market, and eats a tick now and then
                    is_sale = self.path[min(step + 10, STEPS - 1)] < bid
                price = bid - away if is_sale else bid + 1 + away
                made.append((int(at), price, 1 + int(largest * size**6), is_sale))
        return made

    def feeds(self) -> dict[str, Feed]:
        return {self.contract.symbol: Feed(self.contract, {"trade", "bookTicker"}, Decimal(self.middle))}

    def events(self) -> Iterator[tuple[int, Event]]:
        """Yield (when, event): a quote at each step, and the trades."""
        name, tick, lot = self.contract.symbol, self.contract.tick, self.contract.step
        quotes = ((step * GRID_MS, {"e": "bookTicker", "s": name, "u": 0, "b": bid * tick, "B": 0,
                                    "a": (bid + 1) * tick, "A": 0})
                  for step, bid in enumerate(self.bids) if bid)
        trades = ((at, {"e": "trade", "E": at, "T": at, "s": name, "t": SHAPE.first_trade_id + number,
                        "p": price * tick, "q": lots * lot, "X": "MARKET", "m": is_sale})
                  for number, (at, price, lots, is_sale) in enumerate(self.trades))
        return heapq.merge(quotes, trades, key=itemgetter(0))


class Market:
    """Where prices come from, by symbol in `feeds`: a loop, played. All is as of the last advance().

    Times move by one constant per loop, ids by constants that make them go on over the seam, where a depth
    frame and a bookTicker lead from the last book to the first. The past before the start are loops too.
    booked: per symbol the highest trade id in the ledger, so that after a restart no id meets twice.
    """

    is_tradable = True  # False: raw playback, orders are refused
    begun_ms = 0  # when somebody subscribed first: raw playback begins then

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

    def _begin(self, now_ms: int) -> None:
        from_ms = (now_ms - WARM_MS) // 1_000 * 1_000
        if isinstance(self.sources[0], Recording):  # its book is followed from the loop's beginning
            from_ms = max(0, now_ms - self._start_ms) // self._length_ms * self._length_ms + self._start_ms
        self._events = self._looped(from_ms)
        self._next = next(self._events)
        self._grid_ms = max(from_ms, now_ms - WARM_MS) // GRID_MS * GRID_MS + GRID_MS
        for feed in self.feeds.values():
            feed.minutes, feed.pending = self._past(feed.contract.symbol, from_ms), self._pending
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
        # A loop's ids and bars; when it begins, at the earliest T, and how long it is.
        first_ms, at_ms = 1 << 62, 0
        for at_ms, event in self._once():
            for key, series in IDS.get(event["e"], {}).items():
                low, high = self._ids.get((event["s"], series), (event[key], event[key]))
                self._ids[event["s"], series] = min(low, event[key]), max(high, event[key])
            if trade := self.feeds[event["s"]].trade_of(event):
                add(self._seconds, (event["s"], trade.time_ms // 1_000), trade)
            first_ms = min(first_ms, event.get("T", at_ms))
        self._origin_ms = first_ms // 1_000 * 1_000
        self._length_ms = (at_ms - self._origin_ms) // 1_000 * 1_000 + 1_000

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
        return {minute: fold(self._seconds.get((symbol, first + (second - start) % length))
                             for second in range(minute * 60, min(minute * 60 + 60, until)))
                for minute in range(until // 60 - MINUTES_MAX + 1, until // 60 + 1)}


class RawMarket(Market):
    """A recording's bytes, once, from the first subscription on. speed 0: as fast as it goes."""

    is_tradable = False

    def __init__(self, recording: Recording, speed: float) -> None:
        if ".csv" in recording.path.suffixes or recording.path.suffix == ".zip":
            raise ConfigError(f"[paper] recording must hold frames for `raw`, was {recording.path}")
        self.feeds, self._frames = recording.feeds(), self._dated(recording, speed or math.inf)
        self._due: Frame | None = None

    def advance(self, now_ms: int, frames_max: int = 1 << 62) -> list[Frame]:
        frames: list[Frame] = []
        if self.begun_ms:
            self._due = self._due or next(self._frames, None)
        while self._due and self._due.time_ms <= now_ms and len(frames) < frames_max:
            frames.append(self._due)
            self._due = next(self._frames, None)
        for feed in self.feeds.values():
            feed.now_ms = now_ms
        return frames

    def _dated(self, recording: Recording, speed: float) -> Iterator[Frame]:
        first_ns = 0
        for ns, stream, raw in recording.lines():
            if stream:
                first_ns = first_ns or ns
                due_ms = self.begun_ms + math.ceil((ns - first_ns) / 1e6 / speed)
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
