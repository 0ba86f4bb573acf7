"""One symbol's public data: frames, candles, depth, accounts' fills, made of what the market tells.

It tells events in the words of the exchange's streams (`trade` or `aggTrade`, `bookTicker`, `depthUpdate`).
Without recorded depth there is a synthetic book around its quotes, or around its trades.
"""

from collections import deque
from collections.abc import Callable, Iterable, Sequence
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
KLINE_MS = 500  # the exchange sends a changed candle at most every 250 ms
HEAL_MS = 3_000  # depth that an account took is back, linearly, after this
FUNDING_MS = 8 * 3_600_000
FUNDING_RATE = Decimal("0.00010000")  # the exchange's interest component, 0.01 % per 8 h
MINUTES_MAX = 1_500  # candles reach back this far: the exchange's limit of one request
HISTORY_MS = 500 * 60_000  # of past before the start
TRADES_KEPT = 2_000  # the exchange hands out 1,000; a burst fits twice
LADDER_LEVELS = 50  # of a synthetic book, per side; 1.00 apart near 60,000, so about 0.08 % deep
LEVEL_NOTIONAL = 150_000  # of its thickest level, USDT; the fourth power makes 1.5 million a side
QTY_MS = 3_000  # a resting quantity of a synthetic book is drawn anew this often
INTERVALS = table("intervals", dict[str, int])  # minutes

TICKER = table("letters", dict[str, dict[str, str]])["ticker"]  # the 24 h ticker's fields in frames
TICKERS = {"ticker": ("24hrTicker", tuple(TICKER)), "miniTicker": ("24hrMiniTicker", tuple("cohlvq"))}
PARTS = {f"depth{count}@100ms": count for count in (5, 10, 20)}  # of the book, from the best on
STREAMS = {"bookTicker": "bookTicker", "depthUpdate": "depth@100ms"}  # of a recorded book
# Kinds of frames that are made when somebody subscribed.
ON_DEMAND = {*TICKERS, *PARTS, *(f"kline_{name}" for name in INTERVALS)}


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

    kinds: of events the market tells. plan: the bar of the market's own trades between two whole seconds
    before live_ms, since when the events are told. lag_ms: a trade may be published so much late.
    """

    def __init__(self, contract: Contract, start_ms: int, plan: Callable[[int, int], Bar | None],
                 price: float, kinds: Iterable[str] = ("trade", "bookTicker")) -> None:
        self.contract, self.kinds = contract, set(kinds)
        self.main = "trade" if "trade" in self.kinds else "aggTrade"  # what prices are made of
        self.now_ms = self.live_ms = start_ms
        self.history_ms = (start_ms - HISTORY_MS) // 60_000 * 60_000
        self.lag_ms = 0
        self.mark_factor = Decimal(1)  # moved by POST /paper/mark
        self.trades: deque[Trade] = deque(maxlen=TRADES_KEPT)
        self.pending: deque[Frame] = deque()  # what accounts' trades send: the market's own queue
        self.wanted = {"kline_1m"}  # of ON_DEMAND
        self.last_id = 0  # of public trades
        self.inserted = 0  # trades of accounts so far: later ids move up by it
        self.update_id = 0  # of the book
        self.depth: tuple[Depth, Depth] | None = None  # recorded; None: a synthetic book
        self.quote, self.quote_ms = [(ZERO, ZERO), (ZERO, ZERO)], start_ms  # quantity 0: unknown
        self._mids: deque[Decimal] = deque(maxlen=10)  # of the last whole seconds
        self.minutes: dict[int, Bar | None] = {}  # of what was traded since live_ms
        self._plan = lru_cache(2 * MINUTES_MAX)(plan)
        self._level_steps = LEVEL_NOTIONAL / price / float(contract.step)
        self._level = lru_cache(1_024)(self._drawn)
        self._taken: dict[tuple[int, Decimal], tuple[Decimal, int]] = {}  # (side, price) -> quantity, when
        self._shown: Sequence[Depth] = ({}, {})

    # Events

    def play(self, event: Event) -> list[Frame]:
        """Let an event of the market happen; return what it sends. "book" is the depth as a whole."""
        kind = event["e"]
        self.see_quote(event)
        if kind == "book":
            before, before_id = self.depth or ({}, {}), self.update_id
            self.depth, self.update_id = ({}, {}), event["u"]
            self._change(event["bids"], event["asks"])
            return self._depth_frames(before_id, before, self.depth) if before_id != self.update_id else []
        if kind == "depthUpdate" and self.depth:
            self._change(event["b"], event["a"])
            self.update_id = event["u"]
        if kind in ("trade", "aggTrade"):
            return self._trade(event)
        return [self._frame(STREAMS[kind], event)] if self.depth and kind in STREAMS else []

    def see_quote(self, event: Event) -> None:
        """Take the best bid and ask from a quote or, of a market that tells none, a trade."""
        if event["e"] == "bookTicker":
            bid, bid_qty, ask, ask_qty = (Decimal(event[key]) for key in "bBaA")
            self.quote, self.quote_ms = [(bid, bid_qty), (ask, ask_qty)], self.now_ms
        elif self.is_price(event) and "bookTicker" not in self.kinds:
            bid = Decimal(event["p"]) - (0 if event["m"] else self.contract.tick)
            self.quote, self.quote_ms = [(bid, ZERO), (bid + self.contract.tick, ZERO)], self.now_ms

    def is_price(self, event: Event) -> bool:
        """Say whether an event is a trade of the market, not one of the insurance fund or ADL."""
        return bool(event["e"] == self.main and event.get("X", "MARKET") == "MARKET")

    def trade_of(self, event: Event) -> Trade:
        return Trade(event[self.main[0]], event["T"], Decimal(event["p"]), Decimal(event["q"]), event["m"])

    def consume(self, side: Side, fills: Levels) -> list[int]:
        """Take (price, qty) out of the book for an account, for seconds; return the trade ids."""
        first_id, number = self.last_id + 1, int(side == "BUY")
        self._taken = {key: value for key, value in self._taken.items() if self._gone(*key)}
        for price, qty in fills:
            self._taken[number, price] = (qty + self._gone(number, price), self.now_ms)
            self.last_id += 1
            self.inserted += 1
            self.pending += self._record(Trade(self.last_id, self.now_ms, price, qty, side == "SELL"))
        return [*range(first_id, self.last_id + 1)]

    def _trade(self, event: Event) -> list[Frame]:
        kind = event["e"]
        if kind == self.main:  # ids go on behind the last, whatever a restart and accounts did to them
            self.inserted = max(self.inserted, self.last_id + 1 - event[kind[0]])
            self.last_id = event[kind[0]] + self.inserted
        moved = {**event, **{key: event[key] + self.inserted for key in "tafl" if key in event}}
        frame = self._frame(kind, moved)
        if not self.is_price(event):
            return [frame]
        pair = dict(zip(("trade", "aggTrade"), self._record(self.trade_of(moved)), strict=True))
        return [frame if name == kind else made for name, made in pair.items()
                if name == kind or name not in self.kinds]

    def _record(self, t: Trade) -> list[Frame]:
        # The frames: the trade, and itself as an aggregate.
        minute = t.time_ms // 60_000
        self.trades.append(t)
        self.minutes[minute] = fold([self.minutes.get(minute), bar_of([t])])
        if len(self.minutes) > 2 * MINUTES_MAX:
            del self.minutes[min(self.minutes)]
        price, qty = self.contract.level(t.price, t.qty)
        return [self._made("trade", "trade", T=t.time_ms, t=t.trade_id, p=price, q=qty, X="MARKET",
                           m=t.is_buyer_maker),
                self._made("aggTrade", "aggTrade", a=t.trade_id, p=price, q=qty, f=t.trade_id, l=t.trade_id,
                           T=t.time_ms, m=t.is_buyer_maker)]

    def _change(self, bids: list[list[str]], asks: list[list[str]]) -> None:
        for side, changes in zip(self.depth or (), (bids, asks), strict=True):
            for price, qty in changes:
                side[Decimal(price)] = Decimal(qty)
                if not side[Decimal(price)]:
                    del side[Decimal(price)]

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
        bids, asks, update_id = self.book(limit)
        return ([self.contract.level(*pair) for pair in bids], [self.contract.level(*pair) for pair in asks],
                update_id)

    def _mean(self, seconds: int) -> Decimal:
        mids = list(self._mids)[-seconds:] or [(self.quote[0][0] + self.quote[1][0]) / 2]
        return sum(mids, ZERO) / len(mids)

    def _gone(self, side: int, price: Decimal) -> Decimal:
        if (side, price) not in self._taken:
            return ZERO
        qty, at_ms = self._taken[side, price]
        return max(ZERO, qty * (HEAL_MS - self.now_ms + at_ms) / HEAL_MS).quantize(self.contract.step)

    def _sides(self) -> list[Levels]:
        if self.depth:
            return [sorted(self.depth[0].items(), reverse=True), sorted(self.depth[1].items())]
        bid, ask = (int(price / self.contract.tick) for price, _ in self.quote)
        stride = max(1, round(bid / 60_000))  # in ticks: 1.00 near 60,000
        below = range((bid - 1) // stride * stride, 0, -stride)[:LADDER_LEVELS]
        above = range(ask // stride * stride + stride, 2 * ask, stride)[:LADDER_LEVELS]
        sides = [[self._level(number, (self.quote_ms + number * 97) // QTY_MS) for number in numbers]
                 for numbers in ((bid, *below), (ask, *above))]
        for side, (best, qty) in zip(sides, self.quote, strict=True):
            side[0] = (best, qty or side[0][1])
        return sides

    def _drawn(self, number: int, era: int) -> tuple[Decimal, Decimal]:
        # A synthetic level: its quantity is of price (in ticks) and time alone, by multiplicative hashing.
        share = (number * 2_654_435_761 + era * 40_503) % 1_024 / 1_024
        return number * self.contract.tick, (1 + int(self._level_steps * share**4)) * self.contract.step

    # Candles

    def klines(self, interval: str, limit: int, start_ms: int | None = None,
               end_ms: int | None = None) -> list[list[Any]]:
        """Return kline rows, oldest first, the running candle last. Raises KeyError: unknown interval."""
        length = INTERVALS[interval] * 60_000
        earliest = max(self.history_ms, self.now_ms - MINUTES_MAX * 60_000) // length * length
        last = min(self.now_ms, self.now_ms if end_ms is None else end_ms) // length * length
        first = last - (limit - 1) * length if start_ms is None else -(-start_ms // length) * length
        first = max(earliest, first)
        last = min(last, first + (limit - 1) * length)
        return [self.row(at, at + length - 1) for at in range(first, last + 1, length)]

    def row(self, open_ms: int, close_ms: int) -> list[Any]:
        """Return the kline row over whole minutes; without trades it is flat."""
        bars = map(self._minute, range(open_ms // 60_000, close_ms // 60_000 + 1))
        *prices, volume, spent, count, bought, paid = fold(bars) or (*[self.last()] * 4, *[ZERO] * 5)
        qty = self.contract.qty
        return [open_ms, *map(self.contract.price, prices), qty(volume), close_ms, f"{spent:f}", int(count),
                qty(bought), f"{paid:f}", "0"]

    def ticker(self) -> dict[str, Any]:
        """Return the last 24 hours, as far as there is a past: `GET /fapi/v1/ticker/24hr`."""
        open_ms, first, high, low, last, volume, _, spent, count, *_ = self.row(
            max(self.history_ms, self.now_ms // 60_000 * 60_000 - 1_439 * 60_000), self.now_ms)
        change, amount, newest = Decimal(last) - Decimal(first), Decimal(volume), self.recent(1)
        return {"symbol": self.contract.symbol, "priceChange": f"{change:f}", "lastPrice": last,
                "priceChangePercent": f"{change / Decimal(first) * 100:.3f}", "openPrice": first,
                "weightedAvgPrice": f"{Decimal(spent) / amount if amount else Decimal(last):.2f}",
                "highPrice": high, "lowPrice": low, "volume": volume, "quoteVolume": spent, "count": count,
                "lastQty": newest[0]["qty"] if newest else "0", "openTime": open_ms, "closeTime": self.now_ms,
                "firstId": self.last_id - count, "lastId": self.last_id}

    def recent(self, limit: int) -> list[dict[str, Any]]:
        """Return the newest public trades as `GET /fapi/v1/trades` does, oldest first."""
        c = self.contract
        return [{"id": t.trade_id, "price": c.price(t.price), "qty": c.qty(t.qty), "time": t.time_ms,
                 "quoteQty": f"{t.price * t.qty:f}", "isBuyerMaker": t.is_buyer_maker, "isRPITrade": False}
                for t in list(self.trades)[-limit:]]

    def _minute(self, minute: int) -> Bar | None:
        open_ms, planned = minute * 60_000, None
        if self.history_ms <= open_ms < self.live_ms:
            planned = self._plan(open_ms, min(open_ms + 60_000, self.live_ms))
        return fold([planned, self.minutes.get(minute)])

    # Frames

    def _made(self, kind: str, event: str, **fields: Any) -> Frame:
        return self._frame(kind, {"e": event, "E": self.now_ms, "s": self.contract.symbol, **fields})

    def _frame(self, kind: str, event: Event) -> Frame:
        return Frame(f"{self.contract.symbol.lower()}@{kind}", msgspec.json.encode(event), self.now_ms)

    def _depth_frames(self, before_id: int, old: Sequence[Depth], new: Sequence[Depth]) -> list[Frame]:
        # What leads from one state of the book to another: the best if it changed, and the depth.
        level = self.contract.level
        best = [[(p, book[p]) for p, book in zip((max(bids), min(asks)), (bids, asks), strict=True)]
                for bids, asks in (old, new) if bids and asks]
        sides = [[level(p, after.get(p, ZERO)) for p in sorted(before.keys() | after.keys())
                  if before.get(p) != after.get(p)] for before, after in zip(old, new, strict=True)]
        frames = [self._made("depth@100ms", "depthUpdate", T=self.now_ms, U=before_id + 1, u=self.update_id,
                             pu=before_id, b=sides[0], a=sides[1])]
        if best[0] != best[-1] or len(best) == 1:
            (bid, bid_qty), (ask, ask_qty) = (level(*pair) for pair in best[-1])
            frames.insert(0, self._made("bookTicker", "bookTicker", u=self.update_id, b=bid, B=bid_qty, a=ask,
                                        A=ask_qty, T=self.now_ms))
        return frames

    def tick(self) -> list[Frame]:
        """Return what a step of the grid makes due: mark, tickers, candles, and the synthetic book's diff."""
        frames = []
        if self.now_ms % 1_000 == 0:
            self._mids.append((self.quote[0][0] + self.quote[1][0]) / 2)
            mark, index = str(self.mark()), str(self.index())
            frames.append(self._made("markPrice@1s", "markPriceUpdate", p=mark, ap=mark, P=index, i=index,
                                     r=str(FUNDING_RATE), T=self.funding_ms()))
            row = self.ticker() if self.wanted & TICKERS.keys() else {}
            for kind in sorted(self.wanted & TICKERS.keys()):
                event, letters = TICKERS[kind]
                frames.append(self._made(kind, event, **{letter: row[TICKER[letter]] for letter in letters}))
        if self.now_ms % KLINE_MS == 0 and self.trades:
            frames += [self._kline_frame(kind) for kind in sorted(self.wanted) if kind.startswith("kline_")]
        for kind in sorted(self.wanted & PARTS.keys()):
            b, a, id_ = self.shown(PARTS[kind])
            frames.append(self._made(kind, "depthUpdate", T=self.now_ms, U=id_, u=id_, pu=id_ - 1, b=b, a=a))
        if not self.depth:
            old, self._shown = self._shown, [dict(side) for side in self.book()[:2]]
            if old != self._shown:
                before_id, self.update_id = self.update_id, self.now_ms // GRID_MS * UPDATES
                frames += self._depth_frames(before_id, old, self._shown)
        return frames

    def _kline_frame(self, kind: str) -> Frame:
        interval = kind.removeprefix("kline_")
        length = INTERVALS[interval] * 60_000
        now, before = ((self.now_ms - self.lag_ms - back) // length for back in (0, KLINE_MS))
        row = self.row(before * length, (before + 1) * length - 1)
        last_id = next((t.trade_id for t in reversed(self.trades) if t.time_ms <= row[6]), self.last_id)
        return self._made(kind, "kline", k={
            **dict(zip("tohlcvTqnVQB", row, strict=True)), "s": self.contract.symbol, "i": interval,
            "f": last_id - row[8] + 1, "L": last_id, "x": now != before})


def bar_of(trades: Iterable[Trade]) -> Bar | None:
    """Return the bar of trades in order; None of none."""
    return fold((t.price, t.price, t.price, t.price, t.qty, t.price * t.qty, 1,
                 ZERO if t.is_buyer_maker else t.qty, ZERO if t.is_buyer_maker else t.price * t.qty)
                for t in trades)


def fold(bars: Iterable[Bar | None]) -> Bar | None:
    """Return one bar over several in order; None over none."""
    o, h, l, c, *sums = list(zip(*filter(None, bars), strict=True)) or [()] * 9  # noqa: E741
    return (o[0], max(h), min(l), c[-1], *map(sum, sums)) if o else None  # type: ignore[return-value]
