"""One symbol's public data: frames, candles, depth, accounts' fills, made of what the market tells.

It tells events in the words of the exchange's streams (`trade` or `aggTrade`, `bookTicker`, `depthUpdate`).
Without recorded depth there is a synthetic book around its quotes, or around its trades.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec

from bot.paper_model import ZERO, Contract, Levels, Side, table

Event = dict[str, Any]  # the JSON of a stream's frame
Depth = dict[Decimal, Decimal]  # price -> quantity
Bar = tuple[Decimal, Decimal, Decimal, Decimal, Decimal, Decimal, int, Decimal, Decimal]
# open, high, low, close, volume, quote volume, count, taker buys: volume and quote volume

GRID_MS = 100  # the exchange's fastest throttled depth stream
UPDATES = 5  # update ids per step of the grid
KLINE_MS = 500  # a changed candle is sent this often (the exchange: 250 ms), and closed so much later
HEAL_MS = 3_000  # depth that an account took is back, linearly, after this
FUNDING_MS = 8 * 3_600_000
FUNDING_RATE = Decimal("0.00010000")  # the exchange's interest component, 0.01 % per 8 h
MINUTES_MAX = 1_500  # of candles, before the start too: the exchange's limit of one request
TRADES_KEPT = 2_000  # the exchange hands out 1,000; a burst fits twice
LADDER_LEVELS = 50  # of a synthetic book, per side; 1.00 apart near 60,000, so about 0.08 % deep
LEVEL_NOTIONAL = 150_000  # of its thickest level, USDT; the fourth power makes 1.5 million a side
QTY_STRIDES = 16  # a resting quantity of a synthetic book is drawn anew when the price has moved so far
INTERVALS = table("intervals", dict[str, int])  # minutes

TICKER = table("letters", dict[str, dict[str, str]])["ticker"]  # the 24 h ticker's fields in frames
TICKERS = {"ticker": ("24hrTicker", tuple(TICKER)), "miniTicker": ("24hrMiniTicker", tuple("cohlvq"))}
PARTS = {f"depth{count}@100ms": count for count in (5, 10, 20)}  # of the book, from the best on
CANDLES = {f"kline_{name}": name for name in INTERVALS}
STREAMS = {"bookTicker": "bookTicker", "depthUpdate": "depth@100ms"}  # of a recorded book
# Kinds of frames that are made when somebody subscribed.
ON_DEMAND = {*TICKERS, *PARTS, *CANDLES}


class Frame(NamedTuple):
    """One market-stream message: canonical stream ("btcusdt@trade"), its JSON, when it is due."""

    stream: str
    raw: bytes
    time_ms: int


class Book(NamedTuple):
    """Order book, best first. The next depth frame continues it: U <= last_update_id <= u, or equal to pu."""

    bids: Levels
    asks: Levels
    last_update_id: int


class Trade(NamedTuple):
    trade_id: int
    time_ms: int
    price: Decimal
    qty: Decimal
    is_buyer_maker: bool


class Feed:
    """One symbol. `now_ms` moves before each event; queries are as of then.

    kinds: of events that the market tells. price: about the first. book: the first event of a recorded one.
    minutes: its candles, from the earliest on; the past is put there by the market.
    """

    def __init__(self, contract: Contract, kinds: set[str], price: Decimal,
                 book: Event | None = None) -> None:
        self.contract, self.kinds, self.has_book = contract, kinds, bool(book)
        self.main = "trade" if "trade" in self.kinds else "aggTrade"  # what prices are made of
        self.now_ms = 0
        self.mark_factor = Decimal(1)  # moved by POST /paper/mark
        self.trades: deque[Trade] = deque(maxlen=TRADES_KEPT)
        self.pending: deque[Frame] = deque()  # what accounts' trades send: the market's own queue
        self.wanted = {"kline_1m"}  # of ON_DEMAND
        self.last_id = 0  # of public trades
        self.inserted = 0  # trades of accounts so far: later ids move up by it
        self.depth: Sequence[Depth] = ({}, {})  # as recorded; of a synthetic book what was shown last
        self.update_id = 0  # of the depth
        self.minutes: dict[int, Bar | None] = {}
        self._mids: deque[Decimal] = deque(maxlen=10)  # of the last whole seconds
        self._level = lru_cache(1_024)(self._drawn)
        self._taken: dict[tuple[int, Decimal], tuple[Decimal, int]] = {}  # (side, price) -> quantity, when
        self.quote = [(price, ZERO), (price + contract.tick, ZERO)]  # bid and ask; quantity 0: unknown
        if book:
            self.play(book)

    # Events

    def play(self, event: Event) -> list[Frame]:
        """Let an event of the market happen; return what it sends. "book" is the depth as a whole."""
        kind = event["e"]
        if kind in ("trade", "aggTrade"):
            return self._trade(event)
        if kind == "bookTicker":
            bid, bid_qty, ask, ask_qty = (Decimal(event[key]) for key in "bBaA")
            self.quote = [(bid, bid_qty), (ask, ask_qty)]
        if kind == "book":
            whole = [{Decimal(price): Decimal(qty) for price, qty in event[side]} for side in "ba"]
            return [*self._turn(whole, event["u"])]
        if kind not in STREAMS or not self.has_book:
            return []
        if kind == "depthUpdate":
            self.update_id = event["u"]
            for depth, changes in zip(self.depth, (event["b"], event["a"]), strict=True):
                for price, qty in changes:
                    depth[Decimal(price)] = Decimal(qty)
                    if not depth[Decimal(price)]:
                        del depth[Decimal(price)]
        return [self._frame(STREAMS[kind], event)]

    def trade_of(self, event: Event) -> Trade | None:
        """Return the trade that an event is; None: no event of prices, or of the insurance fund or ADL."""
        if event["e"] != self.main or event.get("X", "MARKET") != "MARKET":
            return None
        return Trade(event[self.main[0]], event["T"], Decimal(event["p"]), Decimal(event["q"]), event["m"])

    def consume(self, side: Side, fills: Levels, maker_price: Decimal = ZERO) -> list[int]:
        """Take (price, qty) out of the book for an account, for seconds; return the trade ids."""
        first_id, number = self.last_id + 1, int(side == "BUY")
        is_buyer_maker = (side == "BUY") == (maker_price > 0)
        self._taken = {key: value for key, value in self._taken.items() if self._gone(*key)}
        for price, qty in fills:
            self._taken[number, price] = (qty + self._gone(number, price), self.now_ms)
            self.last_id += 1
            self.inserted += 1
            trade = Trade(self.last_id, self.now_ms, maker_price or price, qty, is_buyer_maker)
            self.pending += self._record(trade).values()
        return [*range(first_id, self.last_id + 1)]

    def _trade(self, event: Event) -> list[Frame]:
        kind = event["e"]
        if kind == self.main:  # ids go on behind the last, whatever a restart and accounts did to them
            self.inserted = max(self.inserted, self.last_id + 1 - event[kind[0]])
            self.last_id = event[kind[0]] + self.inserted
        moved = {**event, **{key: event[key] + self.inserted for key in "tafl" if key in event}}
        trade = self.trade_of(moved)
        if trade and "bookTicker" not in self.kinds:
            bid = trade.price if trade.is_buyer_maker else trade.price - self.contract.tick
            self.quote = [(bid, ZERO), (bid + self.contract.tick, ZERO)]
        frames = self._record(trade) if trade else {}
        frames[kind] = self._frame(kind, moved)
        return [frame for name, frame in frames.items() if name == kind or name not in self.kinds]

    def _record(self, t: Trade) -> dict[str, Frame]:
        # The frames: the trade, and itself as an aggregate.
        self.trades.append(t)
        add(self.minutes, t.time_ms // 60_000, t)
        if len(self.minutes) > MINUTES_MAX:
            del self.minutes[next(iter(self.minutes))]
        id_, (price, qty) = t.trade_id, self.contract.level(t.price, t.qty)
        told: Event = {"p": price, "q": qty, "T": t.time_ms, "m": t.is_buyer_maker}
        return {"trade": self._made("trade", t=id_, X="MARKET", **told),
                "aggTrade": self._made("aggTrade", a=id_, f=id_, l=id_, **told)}

    # Prices and depth

    def mark(self) -> Decimal:
        """Return the mark: the mean of five seconds."""
        return (self._mean(5) * self.mark_factor).quantize(self.contract.tick)

    def index(self) -> Decimal:
        """Return the index: the mean of ten seconds, and a little under the contract."""
        return (self._mean(10) * Decimal("0.99998")).quantize(self.contract.tick)

    def last(self) -> Decimal:
        return self.trades[-1].price if self.trades else self._mean(1).quantize(self.contract.tick)

    def funding_ms(self) -> int:
        return (self.now_ms // FUNDING_MS + 1) * FUNDING_MS

    def book(self, limit: int = 1_000) -> Book:
        """Return the book without what accounts took."""
        sides = self._sides()
        if self._taken:
            sides = [[(price, left) for price, qty in side if (left := qty - self._gone(number, price)) > 0]
                     for number, side in enumerate(sides)]
        return Book(sides[0][:limit], sides[1][:limit], self.update_id)

    def shown(self, limit: int) -> tuple[list[list[str]], list[list[str]], int]:
        bids, asks = ([self.contract.level(*pair) for pair in side] for side in self.book(limit)[:2])
        return bids, asks, self.update_id

    def _mean(self, seconds: int) -> Decimal:
        mids = list(self._mids)[-seconds:] or [(self.quote[0][0] + self.quote[1][0]) / 2]
        return sum(mids, ZERO) / len(mids)

    def _gone(self, side: int, price: Decimal) -> Decimal:
        if (side, price) not in self._taken:
            return ZERO
        qty, at_ms = self._taken[side, price]
        return max(ZERO, qty * (HEAL_MS - self.now_ms + at_ms) / HEAL_MS).quantize(self.contract.step)

    def _sides(self) -> list[Levels]:
        if self.has_book:
            return [sorted(self.depth[0].items(), reverse=True), sorted(self.depth[1].items())]
        bid, ask = (int(price / self.contract.tick) for price, _ in self.quote)
        stride = max(1, round(bid / 60_000))  # in ticks: 1.00 near 60,000
        below = range((bid - 1) // stride * stride, 0, -stride)[:LADDER_LEVELS]
        above = range(ask // stride * stride + stride, 2 * ask, stride)[:LADDER_LEVELS]
        sides = [[self._level(number, (bid // stride + number * 7) // QTY_STRIDES) for number in numbers]
                 for numbers in ((bid, *below), (ask, *above))]
        for side, (best, qty) in zip(sides, self.quote, strict=True):
            side[0] = (best, qty or side[0][1])
        return sides

    def _drawn(self, number: int, era: int) -> tuple[Decimal, Decimal]:
        # A synthetic level: its quantity is of price (in ticks) and time alone, by multiplicative hashing.
        share = (number * 2_654_435_761 + era * 40_503) % 1_024 / 1_024
        price, step = number * self.contract.tick, self.contract.step
        return price, (1 + int(LEVEL_NOTIONAL / float(price * step) * share**4)) * step

    # Candles

    def klines(self, interval: str, limit: int, start_ms: int | None = None,
               end_ms: int | None = None) -> list[list[Any]]:
        """Return kline rows, oldest first, the running candle last. Raises KeyError: unknown interval."""
        length = INTERVALS[interval] * 60_000
        last = min(self.now_ms, self.now_ms if end_ms is None else end_ms) // length * length
        first = last - (limit - 1) * length if start_ms is None else -(-start_ms // length) * length
        times = range(max(first, self._earliest_ms() // length * length), last + 1, length)[:limit]
        return [self.row(at, at + length - 1) for at in times]

    def row(self, open_ms: int, close_ms: int) -> list[Any]:
        """Return the kline row over whole minutes; without trades it is flat."""
        from_ms, until_ms = max(open_ms, self._earliest_ms()), min(close_ms, self.now_ms)
        bars = map(self.minutes.get, range(from_ms // 60_000, until_ms // 60_000 + 1))
        *prices, volume, spent, count, bought, paid = fold(bars) or (*[self.last()] * 4, *[ZERO] * 5)
        qty = self.contract.qty
        return [open_ms, *map(self.contract.price, prices), qty(volume), close_ms, f"{spent:f}", int(count),
                qty(bought), f"{paid:f}", "0"]

    def ticker(self) -> dict[str, Any]:
        """Return the last 24 hours, as far as there is a past: `GET /fapi/v1/ticker/24hr`."""
        from_ms = max(self._earliest_ms(), (self.now_ms // 60_000 - 1_439) * 60_000)
        candle = zip("OohlcvCqn", self.row(from_ms, self.now_ms), strict=False)  # their letters of a ticker
        row = {TICKER[letter]: value for letter, value in candle}
        first, last, volume, spent = (
            Decimal(row[key]) for key in ("openPrice", "lastPrice", "volume", "quoteVolume"))
        return {**row, "symbol": self.contract.symbol, "priceChange": f"{last - first:f}",
                "priceChangePercent": f"{(last - first) / first * 100:.3f}",
                "weightedAvgPrice": f"{spent / volume if volume else last:.2f}",
                "lastQty": self.contract.qty(self.trades[-1].qty) if self.trades else "0",
                "firstId": max(0, self.last_id - row["count"]), "lastId": self.last_id}

    def listed(self, trades: Iterable[Trade]) -> list[dict[str, Any]]:
        """Return public trades as `GET /fapi/v1/trades` does."""
        c = self.contract
        return [{"id": t.trade_id, "price": c.price(t.price), "qty": c.qty(t.qty), "time": t.time_ms,
                 "quoteQty": f"{t.price * t.qty:f}", "isBuyerMaker": t.is_buyer_maker, "isRPITrade": False}
                for t in trades]

    def _earliest_ms(self) -> int:
        return next(iter(self.minutes), self.now_ms // 60_000 + 1) * 60_000  # in raw playback there is none

    # Frames

    def _made(self, kind: str, event: str = "", **fields: Any) -> Frame:
        return self._frame(kind, {"e": event or kind, "E": self.now_ms, "s": self.contract.symbol, **fields})

    def _frame(self, kind: str, event: Event) -> Frame:
        return Frame(f"{self.contract.symbol.lower()}@{kind}", msgspec.json.encode(event), self.now_ms)

    def _turn(self, depth: Sequence[Depth], update_id: int) -> Iterator[Frame]:
        # What leads from the depth so far to another: its best, and the diff.
        if depth == self.depth:
            return
        level, now_ms = self.contract.level, self.now_ms
        sides = [[level(p, after.get(p, ZERO)) for p in sorted(before.keys() | after.keys())
                  if before.get(p) != after.get(p)] for before, after in zip(self.depth, depth, strict=True)]
        before_id, self.depth, self.update_id = self.update_id, depth, update_id
        bids, asks = depth
        if bids and asks:
            (b, B), (a, A) = (level(p, side[p]) for p, side in ((max(bids), bids), (min(asks), asks)))
            yield self._made("bookTicker", u=update_id, b=b, B=B, a=a, A=A, T=now_ms)
        yield self._made("depth@100ms", "depthUpdate", T=now_ms, U=before_id + 1, u=update_id, pu=before_id,
                         b=sides[0], a=sides[1])

    def tick(self) -> Iterator[Frame]:
        """Yield what a step of the grid makes due: mark, tickers, candles, and the synthetic book's diff."""
        if is_second := self.now_ms % 1_000 == 0:
            self._mids.append((self.quote[0][0] + self.quote[1][0]) / 2)
            mark, index = str(self.mark()), str(self.index())
            yield self._made("markPrice@1s", "markPriceUpdate", p=mark, ap=mark, P=index, i=index,
                             r=str(FUNDING_RATE), T=self.funding_ms())
        for kind in sorted(self.wanted):
            if kind in PARTS:
                b, a, id_ = self.shown(PARTS[kind])
                yield self._made(kind, "depthUpdate", T=self.now_ms, U=id_, u=id_, pu=id_ - 1, b=b, a=a)
            elif kind in TICKERS and is_second:
                row, (event, letters) = self.ticker(), TICKERS[kind]
                yield self._made(kind, event, **{letter: row[TICKER[letter]] for letter in letters})
            elif kind in CANDLES and self.now_ms % KLINE_MS == 0 and self.trades:
                yield self._made(kind, "kline", k=self._candle(CANDLES[kind]))
        if not self.has_book:
            bids, asks, _ = self.book()
            yield from self._turn((dict(bids), dict(asks)), self.now_ms // GRID_MS * UPDATES)

    def _candle(self, interval: str) -> Event:
        length, told_ms = INTERVALS[interval] * 60_000, self.now_ms - KLINE_MS  # no later trade
        open_ms = (told_ms - KLINE_MS) // length * length
        row = self.row(open_ms, open_ms + length - 1)
        last_id = next((t.trade_id for t in reversed(self.trades) if t.time_ms <= row[6]), self.last_id)
        return {**dict(zip("tohlcvTqnVQB", row, strict=True)), "s": self.contract.symbol, "i": interval,
                "f": last_id - row[8] + 1, "L": last_id, "x": told_ms >= open_ms + length}


def add(bars: dict[Any, Bar | None], key: Any, t: Trade) -> None:
    """Add a trade to the bar that has this key."""
    taken = (ZERO, ZERO) if t.is_buyer_maker else (t.qty, t.price * t.qty)
    bars[key] = fold([bars.get(key), (t.price, t.price, t.price, t.price, t.qty, t.price * t.qty, 1, *taken)])


def fold(bars: Iterable[Bar | None]) -> Bar | None:
    """Return one bar over several in order; None over none."""
    o, h, l, c, *sums = list(zip(*filter(None, bars), strict=True)) or [()] * 9  # noqa: E741
    return (o[0], max(h), min(l), c[-1], *map(sum, sums)) if o else None  # type: ignore[return-value]
