"""Recordings as a market: `raw` sends the bytes as recorded, `rebased` makes them now and for ever.

A file is read as a stream, .gz and .zip too: lines of `<local time> <raw frame with envelope>`
(nanoseconds, or seconds and a colon), a REST depth answer among them being the book; or the
exchange's public aggTrades CSV, whose symbol is the first word of the file's name.

Rebased: times move by one constant per loop, a whole number of seconds; the ids t, a, f, l, U, u, pu
by constants that make them go on over the seam, where a depth frame and a bookTicker lead from the
last book to the first. Order and pace are the recorded ones. Candles and mark prices are made here,
from trades and quotes: a recorded candle would no longer begin with a minute. The past before the
start is the recording mirrored, backwards from its beginning and then forwards again: continuous, and
turning where the recording turns. Trades with an X other than MARKET (insurance fund, ADL; none in our
data) are sent as they are and make no price. Without a REST answer (CSV, cryptofeed) the book is a
synthetic one around quotes or trades. What accounts take from a recorded book is missing in book()
for seconds, but not in the recorded frames.
"""

import gzip
import math
import zipfile
from collections import deque
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import IO, Any

import msgspec

from bot.errors import ConfigError
from bot.paper_feed import GRID_MS, Bar, Contract, Depth, Feed, Frame, Levels, Trade, bar_of, fold, grid_id
from bot.paper_market import Market, canonical_stream

HEAD_LINES = 20_000  # symbols, increments and a REST depth answer are found in these
LEVEL_NOTIONAL = 100_000  # of the thickest level of a synthetic book, USDT
RAW_FRAMES_MAX = 1_000  # handed out at once at speed 0
STREAM = b'{"stream":"'  # how a recorded frame begins
# Which fields of a recorded event are ids, and of which series; where its prices and quantities are.
IDS = {"trade": {"t": "t"}, "aggTrade": {"a": "a", "f": "f", "l": "f"}, "bookTicker": {"u": "u"},
       "depthUpdate": {"u": "u", "U": "u", "pu": "u"}}
NUMBERS = {"trade": ("p", "q"), "aggTrade": ("p", "q"), "bookTicker": ("ba", "BA")}

Event = dict[str, Any]


class Recording:
    """A file of frames, and what its head tells. Raises ConfigError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.kinds: dict[str, set[str]] = {}  # by symbol
        self.rest: Event | None = None  # the book at the beginning of a loop
        self.contracts: dict[str, Contract] = {}
        self._first_line = 0  # where a loop begins: the first diff that continues the REST answer
        try:
            self._read_head()
        except (OSError, EOFError, ValueError, KeyError, msgspec.MsgspecError, zipfile.BadZipFile) as error:
            raise ConfigError(f"[paper] recording must be readable, was {path}: {error!r}") from error
        if not self.contracts:
            raise ConfigError(f"[paper] recording must hold trades or quotes, was {path} without any")

    def _read_head(self) -> None:
        found: dict[str, tuple[set[str], set[str]]] = {}
        diffs, rest = [], None
        for number, (_, raw) in enumerate(islice(self.lines(), HEAD_LINES)):
            envelope = msgspec.json.decode(raw)
            if "stream" not in envelope:
                rest = rest or envelope
                continue
            event = envelope["data"]
            self.kinds.setdefault(event["s"], set()).add(event["e"])
            numbers = found.setdefault(event["s"], (set(), set()))
            for keys, seen in zip(NUMBERS.get(event["e"], ("", "")), numbers, strict=True):
                seen.update(event[key] for key in keys)
            if event["e"] == "depthUpdate":
                diffs.append((event["u"], number))
        self.contracts = {symbol: _contract(symbol, *seen) for symbol, seen in found.items() if seen[0]}
        continuing = [number for u, number in diffs if rest and u >= rest["lastUpdateId"]]
        if continuing and len(self.kinds) == 1:  # a REST answer does not name its symbol
            self.rest, self._first_line = rest, continuing[0]

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
            if event and event["s"] in self.contracts:
                yield ns // 1_000_000, event


class _RecordedFeed(Feed):
    # One recorded symbol. first_s, length_s: the recording's seconds; start_s: when the first loop begins.

    def __init__(self, contract: Contract, recording: Recording, start_ms: int, booked_id: int) -> None:
        super().__init__(contract, start_ms)
        self.first_s = self.length_s = self.start_s = 0
        self._kinds = recording.kinds[contract.symbol]
        self._main = "trade" if "trade" in self._kinds else "aggTrade"
        self._rest = recording.rest
        self._booked_id = booked_id
        self._loop = self._shift_ms = self._natural_id = self._update_id = 0
        self._ids: dict[str, tuple[int, int]] = {}  # lowest and highest of each series
        self._seconds: dict[int, Bar | None] = {}
        self._second: list[Trade] = []
        self._quote = self._first_quote = ((0, 0), (0, 0))  # best bid and ask, with quantities
        self._mids: deque[float] = deque(maxlen=10)  # of the last seconds
        self._depth: tuple[Depth, Depth] = ({}, {})  # a quantity may be 0

    # The scan

    def learn(self, event: Event) -> None:
        for key, series in IDS.get(event["e"], {}).items():
            low, high = self._ids.get(series, (event[key], event[key]))
            self._ids[series] = (min(low, event[key]), max(high, event[key]))
        if self._is_price(event):
            trade = self._trade(event)
            if self._second and self._second[0].time_ms // 1_000 != trade.time_ms // 1_000:
                self.learned()
            self._second.append(trade)
        self._take_quote(event)
        if not self._first_quote[0][0]:
            self._first_quote = self._quote

    def learned(self) -> None:
        if self._second:
            second = self._second[0].time_ms // 1_000
            self._seconds[second] = fold([self._seconds.get(second), bar_of(self._second)])
            self._second = []
        most = LEVEL_NOTIONAL / max(1e-9, float(self.money(self._first_quote[0][0])))
        self.quantities = [1 + self.contract.qty_units(most * n / 1_024) for n in range(1_024)]

    # Playing

    def enter(self, loop: int, shift_ms: int) -> None:
        self._loop, self._shift_ms, self._quote = loop, shift_ms, self._first_quote
        self._natural_id = self._ids.get(self._main[0], (1, 1))[0] + self._moved_by(self._main[0])
        if self._rest is not None:
            self._depth = ({}, {})
            self._change(self._rest["bids"], self._rest["asks"])
            self._update_id = self._ids.get("u", (0, 0))[0] + self._moved_by("u")  # pu of the first diff

    def entered(self, now_ms: int) -> None:
        self.now_ms = now_ms
        self.inserted = max(self.inserted, self._booked_id + 1 - self._natural_id)
        if self._rest is None:
            self._update_id = grid_id(now_ms) - 1
            self.show(0, 0)

    def wrap(self, loop: int, shift_ms: int) -> list[Frame]:
        before = [{price: qty for price, qty in side.items() if qty} for side in self._depth]
        previous_id = self._update_id
        self.enter(loop, shift_ms)
        if self._rest is None:
            return []
        return self.depth_frames(previous_id, self._update_id, before, self._depth)

    def play(self, event: Event) -> list[Frame]:
        frame = self._moved(event)
        self._take_quote(event)
        if self._is_price(event):
            self._natural_id = event[self._main[0]] + self._moved_by(self._main[0]) + 1
            trade = self._trade(event)._replace(trade_id=self.next_trade_id() - 1,
                                                time_ms=event["T"] + self._shift_ms)
            self.trades.append(trade)
            made = self.trade_frames(trade)
            if self._main == "aggTrade":
                return [made[0], frame]
            return [frame] if "aggTrade" in self._kinds else [frame, made[1]]
        if self._rest is not None and event["e"] == "depthUpdate":
            self._change(event["b"], event["a"])
            self._update_id = event["u"] + self._moved_by("u")
        is_sent = event["e"] in ("trade", "aggTrade") or (self._rest is not None and event["e"] in IDS)
        return [frame] if is_sent else []

    def tick(self) -> list[Frame]:
        if self.now_ms % 1_000 == 0:
            self._mids.append((self._quote[0][0] + self._quote[1][0]) / 2)
        frames = self.clock_frames()
        if self._rest is None:
            made = self.show(self._update_id, grid_id(self.now_ms))
            self._update_id = grid_id(self.now_ms) if made else self._update_id
            frames += made
        return frames

    def _moved_by(self, series: str) -> int:
        low, high = self._ids.get(series, (0, 0))
        return self._loop * (high - low + 1)

    def _moved(self, event: Event) -> Frame:
        moved = {**event, **{key: event[key] + self._shift_ms for key in "ET" if key in event}}
        for key, series in IDS.get(event["e"], {}).items():
            moved[key] += self._moved_by(series) + (0 if series == "u" else self.inserted)
        kind = "depth@100ms" if event["e"] == "depthUpdate" else event["e"]
        symbol = self.contract.symbol
        return Frame(symbol, f"{symbol.lower()}@{kind}", msgspec.json.encode(moved), self.now_ms)

    def _change(self, bids: list[list[str]], asks: list[list[str]]) -> None:
        for side, changes in zip(self._depth, (bids, asks), strict=True):
            for price, qty in changes:
                side[self.contract.price_units(price)] = self.contract.qty_units(qty)

    def _is_price(self, event: Event) -> bool:
        return event["e"] == self._main and event.get("X", "MARKET") == "MARKET"

    def _trade(self, event: Event) -> Trade:
        return Trade(event[self._main[0]], event["T"], self.contract.price_units(event["p"]),
                     self.contract.qty_units(event["q"]), event["m"])

    def _take_quote(self, event: Event) -> None:
        price, qty, tick = self.contract.price_units, self.contract.qty_units, self.contract.tick
        if event["e"] == "bookTicker":
            self._quote = ((price(event["b"]), qty(event["B"])), (price(event["a"]), qty(event["A"])))
        elif self._is_price(event) and "bookTicker" not in self._kinds:
            bid = price(event["p"]) - (0 if event["m"] else tick)
            self._quote = ((bid, 0), (bid + tick, 0))

    # What Feed asks

    def traded(self, from_ms: int, to_ms: int) -> Bar | None:
        return fold(map(self._bar, range(from_ms // 1_000, to_ms // 1_000)))

    def _bar(self, second: int) -> Bar | None:
        since = second - self.start_s
        if since >= 0:
            return self._seconds.get(self.first_s + since % self.length_s)
        back = (-since - 1) % (2 * self.length_s)
        if back >= self.length_s:
            return self._seconds.get(self.first_s + 2 * self.length_s - 1 - back)
        bar = self._seconds.get(self.first_s + back)
        return bar and (bar[3], bar[1], bar[2], bar[0], *bar[4:])

    def mean_path(self, seconds: int) -> float:
        mids = list(self._mids)[-seconds:] or [(self._quote[0][0] + self._quote[1][0]) / 2]
        return sum(mids) / len(mids)

    def sides(self) -> tuple[Levels, Levels]:
        if self._rest is not None:
            return sorted(self._depth[0].items(), reverse=True), sorted(self._depth[1].items())
        (bid, bid_qty), (ask, ask_qty) = self._quote
        bids, asks = self.ladder(bid, ask, self.now_ms // GRID_MS * GRID_MS)
        return [(bid, bid_qty or bids[0][1]), *bids[1:]], [(ask, ask_qty or asks[0][1]), *asks[1:]]

    def update_id(self) -> int:
        return self._update_id

    def next_trade_id(self) -> int:
        return self._natural_id + self.inserted


class RebasedMarket(Market):
    """A recording that happens now, and again, and again."""

    def __init__(self, path: Path, start_ms: int, trade_ids: Mapping[str, int]) -> None:
        self._recording = recording = Recording(path)
        if strange := [name for name in recording.contracts if not name.endswith("USDT")]:
            raise ConfigError(f"[paper] recording must be of USDT contracts for `rebased`, was {strange}")
        self._made = {name: _RecordedFeed(contract, recording, start_ms, trade_ids.get(name, 0))
                      for name, contract in recording.contracts.items()}
        super().__init__(self._made)
        first_ms = last_ms = 0
        early_ms, late_ms = 1 << 62, -1 << 62  # of T and E against the local clock
        for local_ms, event in recording.events():
            self._made[event["s"]].learn(event)
            early_ms = min(early_ms, event["T" if "T" in event else "E"] - local_ms)
            late_ms = max(late_ms, event["E"] - local_ms)
            first_ms, last_ms = first_ms or local_ms, local_ms
        self._late_ms = late_ms  # published so much after the local time, nothing precedes its own E
        self._origin_ms = (first_ms + early_ms) // 1_000 * 1_000
        self._start_ms = -(-start_ms // 1_000) * 1_000
        self._length_ms = (last_ms + late_ms - self._origin_ms) // 1_000 * 1_000 + 1_000
        for feed in self._made.values():
            feed.learned()
            feed.lag_ms = late_ms - early_ms
            feed.first_s, feed.start_s = self._origin_ms // 1_000, self._start_ms // 1_000
            feed.length_s = self._length_ms // 1_000
            feed.enter(0, 0)

    def begin(self, now_ms: int) -> None:
        self._open(max(0, now_ms - self._start_ms) // self._length_ms)
        for feed in self._made.values():
            feed.enter(self._loop, self._shift_ms)
        self._grid_ms = now_ms // GRID_MS * GRID_MS + GRID_MS
        while self._line is not None and self._line_ms() <= now_ms:
            self._play()
        for feed in self._made.values():
            feed.entered(now_ms)

    def due_ms(self) -> int:
        return min(self._grid_ms, self._line_ms())

    def pop(self) -> list[Frame]:
        at_ms = self.due_ms()
        is_clock = at_ms == self._grid_ms
        if is_clock:
            self._grid_ms += GRID_MS
        elif self._line is not None:
            return self._play()
        else:
            self._open(self._loop + 1)
        frames = []
        for feed in self._made.values():
            feed.now_ms = at_ms
            frames += feed.tick() if is_clock else feed.wrap(self._loop, self._shift_ms)
        return frames

    def _open(self, loop: int) -> None:
        self._loop = loop
        self._shift_ms = self._start_ms + loop * self._length_ms - self._origin_ms
        self._lines = self._recording.events()
        self._line = next(self._lines, None)

    def _line_ms(self) -> int:
        if self._line is None:
            return self._start_ms + (self._loop + 1) * self._length_ms
        return self._line[0] + self._late_ms + self._shift_ms

    def _play(self) -> list[Frame]:
        assert self._line is not None
        feed, event = self._made[self._line[1]["s"]], self._line[1]
        feed.now_ms = self._line_ms()
        self._line = next(self._lines, None)
        return feed.play(event)


class RawMarket(Market):
    """The bytes as recorded, once, from the first subscription on. speed 0: as fast as it goes."""

    is_tradable = False

    def __init__(self, path: Path, speed: float) -> None:
        if ".csv" in path.suffixes or path.suffix == ".zip":
            raise ConfigError(f"[paper] recording must hold frames for `raw`, was {path}")
        recording = Recording(path)
        made = {name: _RecordedFeed(contract, recording, 1 << 60, 0)  # no past: no candles
                for name, contract in recording.contracts.items()}
        super().__init__(made)
        for _, event in islice(recording.events(), HEAD_LINES):
            made[event["s"]].learn(event)
        for feed in made.values():
            feed.learned()
            feed.enter(0, 0)
        self._speed = speed
        self._lines = (line for line in recording.lines() if line[1].startswith(STREAM))
        self._line = next(self._lines, None)
        self._first_ns = self._line[0] if self._line else 0
        self._start_ms: int | None = None

    def start(self, now_ms: int) -> None:
        self._start_ms = self._start_ms or now_ms
        for feed in self.feeds.values():
            feed.now_ms = now_ms

    def advance(self, now_ms: int, frames_max: int | None = None) -> list[Frame]:
        frames: list[Frame] = []
        self._now_ms = now_ms
        if frames_max is None and not self._speed:
            frames_max = RAW_FRAMES_MAX
        while self._line and len(frames) != frames_max:
            due_ms = self.next_due_ms()
            if due_ms is None or due_ms > now_ms:
                break
            raw = self._line[1]
            stream = raw[len(STREAM):raw.index(b'"', len(STREAM))].decode()
            frames.append(Frame(stream.split("@")[0].upper(), canonical_stream(stream), raw, due_ms, True))
            self._line = next(self._lines, None)
        return frames

    def next_due_ms(self) -> int | None:
        if self._start_ms is None or self._line is None:
            return None
        if not self._speed:
            return max(self._now_ms or 0, self._start_ms)
        return self._start_ms + math.ceil((self._line[0] - self._first_ns) / 1e6 / self._speed)


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".zip":
        archive = zipfile.ZipFile(path)
        return archive.open(archive.namelist()[0])
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _contract(symbol: str, prices: set[str], qtys: set[str]) -> Contract:
    places = [max(len(number.partition(".")[2]) for number in numbers) for numbers in (prices, qtys)]
    tick = math.gcd(*(round(float(price) * 10**places[0]) for price in prices))
    return Contract(symbol=symbol, price_decimals=places[0], qty_decimals=places[1], tick=tick)
