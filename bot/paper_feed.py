"""One symbol's public data, the same for every market: frames, candles, depth, what accounts took.

Prices and quantities are integers here, in units of the last printed decimal (a price of 60000.10
with two decimals is 6000010): exact, fast, and printed without rounding. The subclasses say where
trades and quotes come from; time arrives as `now_ms`.
"""

import json
from collections import deque
from collections.abc import Iterable, Mapping
from decimal import Decimal
from typing import Any, NamedTuple

import msgspec

from bot.paper_market import Book, Frame, Side

GRID_MS = 100  # the exchange's fastest throttled depth stream
KLINE_MS = 500  # the exchange sends a changed candle at most every 250 ms
CATCH_UP_MS = 600_000  # a longer pause of the process is passed over like a restart
OWN_MS = 180_000  # by then a minute's candle is complete and kept
HEAL_MS = 3_000  # depth that an account took is back, linearly, after this
FUNDING_MS = 8 * 3_600_000
FUNDING_RATE = Decimal("0.00010000")  # the exchange's interest component, 0.01 % per 8 h
MINUTES_MAX = 1_500  # candles reach back this far: the exchange's limit of one request
TRADES_KEPT = 2_000  # the exchange hands out at most 1,000; a burst fits twice
NOTIONAL_MIN = {"BTCUSDT": "100", "ETHUSDT": "20"}  # the exchange's own; elsewhere 5
LADDER_LEVELS = 50  # per side and one currency unit apart near 60,000: about 0.08 % deep
QTY_MS = 3_000  # a resting quantity of the ladder is drawn anew this often
INTERVALS = {"1m": 1, "3m": 3, "5m": 5, "15m": 15, "30m": 30, "1h": 60, "2h": 120, "4h": 240,
             "6h": 360, "8h": 480, "12h": 720, "1d": 1440}  # minutes

Bar = tuple[int, int, int, int, int, int, int, int, int]
# open, high, low, close, volume, quote volume, count, taker buys: volume, quote volume
Depth = dict[int, int]  # price -> quantity


class Trade(NamedTuple):
    trade_id: int
    time_ms: int
    price: int
    qty: int
    is_buyer_maker: bool


class Contract(msgspec.Struct, frozen=True, kw_only=True):
    """A listed contract. tick: price increment in units of the last decimal."""

    symbol: str
    price_decimals: int
    qty_decimals: int
    tick: int

    def price(self, units: float) -> str:
        return f"{units / 10**self.price_decimals:.{self.price_decimals}f}"

    def qty(self, units: int) -> str:
        return f"{units / 10**self.qty_decimals:.{self.qty_decimals}f}"

    def price_units(self, price: str | Decimal) -> int:
        return round(float(price) * 10**self.price_decimals)

    def qty_units(self, qty: str | Decimal) -> int:
        return round(float(qty) * 10**self.qty_decimals)

    def listing(self, onboard_ms: int) -> dict[str, Any]:
        """Return the entry of exchangeInfo. Shape: GET /fapi/v1/exchangeInfo."""
        base, step = self.symbol.removesuffix("USDT"), self.qty(1)
        lot = {"minQty": step, "stepSize": step}
        filters: list[dict[str, Any]] = [
            {"filterType": "PRICE_FILTER", "minPrice": self.price(self.tick), "maxPrice": "10000000",
             "tickSize": self.price(self.tick)},
            {"filterType": "LOT_SIZE", "maxQty": "1000000" if self.qty_decimals < 3 else "10000", **lot},
            {"filterType": "MARKET_LOT_SIZE", "maxQty": "100000" if self.qty_decimals < 3 else "2000", **lot},
            {"filterType": "MAX_NUM_ORDERS", "limit": 200},
            {"filterType": "MAX_NUM_ALGO_ORDERS", "limit": 10},
            {"filterType": "MIN_NOTIONAL", "notional": NOTIONAL_MIN.get(self.symbol, "5")},
            {"filterType": "PERCENT_PRICE", "multiplierUp": "1.0500", "multiplierDown": "0.9500",
             "multiplierDecimal": "4"},
            {"filterType": "POSITION_RISK_CONTROL", "positionControlSide": "NONE"}]
        return {
            "symbol": self.symbol, "pair": self.symbol, "contractType": "PERPETUAL",
            "deliveryDate": 4133404800000, "onboardDate": onboard_ms, "status": "TRADING",
            "maintMarginPercent": "2.5000", "requiredMarginPercent": "5.0000", "baseAsset": base,
            "quoteAsset": "USDT", "marginAsset": "USDT", "pricePrecision": self.price_decimals,
            "quantityPrecision": self.qty_decimals, "baseAssetPrecision": 8, "quotePrecision": 8,
            "underlyingType": "COIN", "underlyingSubType": ["PoW" if base == "BTC" else "Layer-1"],
            "triggerProtect": "0.0500", "liquidationFee": "0.012500", "marketTakeBound": "0.05",
            "maxMoveOrderLimit": 10000, "filters": filters,
            "orderTypes": ["LIMIT", "MARKET", "STOP", "STOP_MARKET", "TAKE_PROFIT",
                           "TAKE_PROFIT_MARKET", "TRAILING_STOP_MARKET"],
            "timeInForce": ["GTC", "IOC", "FOK", "GTX", "GTD"], "permissionSets": ["GRID", "COPY"]}


class Feed:
    """One symbol. `now_ms` moves before each event; queries are as of then.

    lag_ms: a trade may be published this much later than the time it bears.
    """

    def __init__(self, contract: Contract, history_ms: int, lag_ms: int = 0) -> None:
        self.contract = contract
        self.history_ms = history_ms // 60_000 * 60_000
        self.lag_ms = lag_ms
        self.now_ms = history_ms
        self.trades: deque[Trade] = deque(maxlen=TRADES_KEPT)
        self.inserted = 0  # trades of accounts so far: later ids move up by it
        self._own: list[Trade] = []  # what accounts traded, of the last minutes
        self._minutes: dict[int, Bar] = {}
        self._taken: dict[tuple[bool, int], tuple[int, int]] = {}

    # What a subclass says

    def traded(self, from_ms: int, to_ms: int) -> Bar | None:
        """Return the market's own bar over whole seconds that are over."""
        raise NotImplementedError

    def sides(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Return bids and asks, best first, before what accounts took."""
        raise NotImplementedError

    def path(self, at_ms: int) -> float:
        """Return the middle price that mark and index follow."""
        raise NotImplementedError

    def update_id(self) -> int:
        """Return the id of the book as it stands."""
        raise NotImplementedError

    def next_trade_id(self) -> int:
        """Return the id the next public trade will bear."""
        raise NotImplementedError

    # Prices

    def mark(self) -> float:
        """Return the mark: the mean path of five seconds, so that no single print moves it far."""
        return self._mean_path(5)

    def index(self) -> float:
        """Return the index: the mean path of ten seconds, a little under the contract."""
        return self._mean_path(10) * (1 - 2e-5)

    def last(self) -> float:
        return self.trades[-1].price if self.trades else round(self.path(self.now_ms))

    def _mean_path(self, seconds: int) -> float:
        at_ms = self.now_ms // 1_000 * 1_000
        return sum(self.path(at_ms - 1_000 * back) for back in range(seconds)) / seconds

    def money(self, units: float) -> Decimal:
        return Decimal(self.contract.price(units))

    # Depth

    def left(self) -> list[list[tuple[int, int]]]:
        """Return bids and asks, best first, without what accounts took."""
        made = []
        for is_bid, side in zip((True, False), self.sides(), strict=True):
            if self._taken:
                side = [(price, qty - _unhealed(self._taken.get((is_bid, price), (0, 0)), self.now_ms))
                        for price, qty in side]
            made.append([level for level in side if level[1] > 0])
        return made

    def book(self, limit: int) -> Book:
        price_decimals, qty_decimals = -self.contract.price_decimals, -self.contract.qty_decimals
        bids, asks = ([(Decimal(price).scaleb(price_decimals), Decimal(qty).scaleb(qty_decimals))
                       for price, qty in side[:limit]] for side in self.left())
        return Book(bids, asks, self.update_id())

    def consume(self, side: Side, fills: list[tuple[Decimal, Decimal]]) -> list[Trade]:
        made = []
        self._taken = {key: value for key, value in self._taken.items() if _unhealed(value, self.now_ms)}
        self._own = [t for t in self._own if t.time_ms > self.now_ms - OWN_MS]
        for fill_price, fill_qty in fills:
            price, qty = self.contract.price_units(fill_price), self.contract.qty_units(fill_qty)
            trade = Trade(self.next_trade_id(), self.now_ms, price, qty, side == "SELL")
            key = (side == "SELL", price)
            self._taken[key] = (qty + _unhealed(self._taken.get(key, (0, 0)), self.now_ms), self.now_ms)
            self.inserted += 1
            self.trades.append(trade)
            self._own.append(trade)
            made.append(trade)
        return made

    # Candles

    def klines(self, interval: str, limit: int, start_ms: int | None, end_ms: int | None) -> list[list[Any]]:
        """Return kline rows. Raises KeyError for an unknown interval."""
        length = INTERVALS[interval] * 60_000
        earliest = max(self.history_ms, self.now_ms - MINUTES_MAX * 60_000) // length * length
        last = min(self.now_ms, self.now_ms if end_ms is None else end_ms) // length * length
        if start_ms is None:
            first = max(earliest, last - (limit - 1) * length)
        else:
            first = max(earliest, -(-start_ms // length) * length)
            last = min(last, first + (limit - 1) * length)
        rows, close = [], round(self.last())
        for open_ms in range(first, last + 1, length):
            bar = self._span(open_ms, length) or (close, close, close, close, 0, 0, 0, 0, 0)
            close = bar[3]
            rows.append(self._row(bar, open_ms, open_ms + length - 1))
        return rows

    def day(self) -> list[Any]:
        """Return the last 24 hours, as far as there is a past, as one kline row."""
        last = self.now_ms // 60_000 * 60_000
        first = max(self.history_ms, last - 1_439 * 60_000)
        bar = self._span(first, last + 60_000 - first)
        close = round(self.last())
        return self._row(bar or (close, close, close, close, 0, 0, 0, 0, 0), first, self.now_ms)

    def _row(self, bar: Bar, open_ms: int, close_ms: int) -> list[Any]:
        price, qty = self.contract.price, self.contract.qty
        return [open_ms, price(bar[0]), price(bar[1]), price(bar[2]), price(bar[3]), qty(bar[4]), close_ms,
                self._quote(bar[5]), bar[6], qty(bar[7]), self._quote(bar[8]), "0"]

    def trade_row(self, t: Trade) -> dict[str, Any]:
        return {"id": t.trade_id, "price": self.contract.price(t.price), "qty": self.contract.qty(t.qty),
                "quoteQty": self._quote(t.price * t.qty), "time": t.time_ms,
                "isBuyerMaker": t.is_buyer_maker, "isRPITrade": False}

    def _quote(self, units: int) -> str:
        decimals = self.contract.price_decimals + self.contract.qty_decimals
        return f"{units / 10**decimals:.{decimals}f}"

    def _span(self, open_ms: int, length: int) -> Bar | None:
        return fold(map(self._minute, range(open_ms // 60_000, (open_ms + length) // 60_000)))

    def _minute(self, minute: int) -> Bar | None:
        if minute in self._minutes:
            return self._minutes[minute]
        open_ms, close_ms = minute * 60_000, minute * 60_000 + 60_000
        if not self.history_ms <= open_ms <= self.now_ms:
            return None
        # Seconds that are over come from the market's plan, the running one from what was published.
        over_ms = max(open_ms, min(close_ms, (self.now_ms - self.lag_ms) // 1_000 * 1_000))
        own = [t for t in self._own if open_ms <= t.time_ms < over_ms]
        parts = [self.traded(open_ms, over_ms), bar_of(own)]
        if over_ms < close_ms:
            return fold([*parts, bar_of([t for t in self.trades if over_ms <= t.time_ms < close_ms])])
        bar = fold(parts)
        if bar is not None:
            self._minutes[minute] = bar
            if len(self._minutes) > 2 * MINUTES_MAX:
                del self._minutes[min(self._minutes)]
        return bar

    # Frames

    def frame(self, kind: str, payload: str) -> Frame:
        symbol = self.contract.symbol
        return Frame(symbol, f"{symbol.lower()}@{kind}", payload.encode(), self.now_ms)

    def trade_frames(self, trade: Trade) -> list[Frame]:
        return [self.trade_frame(trade), self.agg_frame(trade)]

    def trade_frame(self, t: Trade) -> Frame:
        return self.frame("trade", (
            f'{{"e":"trade","E":{self.now_ms},"T":{t.time_ms},"s":"{self.contract.symbol}","t":{t.trade_id},'
            f'"p":"{self.contract.price(t.price)}","q":"{self.contract.qty(t.qty)}","X":"MARKET",'
            f'"m":{"true" if t.is_buyer_maker else "false"}}}'))

    def agg_frame(self, t: Trade) -> Frame:
        return self.frame("aggTrade", (
            f'{{"e":"aggTrade","E":{self.now_ms},"a":{t.trade_id},"s":"{self.contract.symbol}",'
            f'"p":"{self.contract.price(t.price)}","q":"{self.contract.qty(t.qty)}","f":{t.trade_id},'
            f'"l":{t.trade_id},"T":{t.time_ms},"m":{"true" if t.is_buyer_maker else "false"}}}'))

    def ticker_frame(self, update_id: int, bid: tuple[int, int], ask: tuple[int, int]) -> Frame:
        price, qty = self.contract.price, self.contract.qty
        return self.frame("bookTicker", (
            f'{{"e":"bookTicker","u":{update_id},"s":"{self.contract.symbol}","b":"{price(bid[0])}",'
            f'"B":"{qty(bid[1])}","a":"{price(ask[0])}","A":"{qty(ask[1])}","T":{self.now_ms},'
            f'"E":{self.now_ms}}}'))

    def depth_frame(self, previous_id: int, update_id: int, before: tuple[Depth, Depth],
                    after: tuple[Depth, Depth]) -> Frame:
        """Return the frame that leads from one state of the book (bids, asks) to another."""
        sides = []
        for old, new in zip(before, after, strict=True):
            changed = {price: new.get(price, 0) for price in old.keys() | new.keys()
                       if old.get(price) != new.get(price)}
            sides.append(",".join(f'["{self.contract.price(p)}","{self.contract.qty(changed[p])}"]'
                                  for p in sorted(changed)))
        return self.frame("depth@100ms", (
            f'{{"e":"depthUpdate","E":{self.now_ms},"T":{self.now_ms},"s":"{self.contract.symbol}",'
            f'"U":{previous_id + 1},"u":{update_id},"pu":{previous_id},"b":[{sides[0]}],"a":[{sides[1]}]}}'))

    def clock_frames(self) -> list[Frame]:
        """Return what the clock alone makes due: mark price each second, candles when they changed."""
        frames = []
        if self.now_ms % 1_000 == 0:
            index = self.contract.price(self.index())
            frames.append(self.frame("markPrice@1s", (
                f'{{"e":"markPriceUpdate","E":{self.now_ms},"s":"{self.contract.symbol}",'
                f'"p":"{self.contract.price(self.mark())}","ap":"{self.contract.price(self.mark())}",'
                f'"P":"{index}","i":"{index}","r":"{FUNDING_RATE}","T":{self.funding_ms()}}}')))
        if self.now_ms % KLINE_MS == 0:
            minute, previous = ((self.now_ms - self.lag_ms - back) // 60_000 for back in (0, KLINE_MS))
            closed = minute != previous
            bar = self._minute(previous)
            if bar is not None:
                row = self._row(bar, previous * 60_000, previous * 60_000 + 59_999)
                frames.append(self._kline_frame(row, closed))
        return frames

    def funding_ms(self) -> int:
        return (self.now_ms // FUNDING_MS + 1) * FUNDING_MS

    def _kline_frame(self, row: list[Any], is_closed: bool) -> Frame:
        last_id = self.trades[-1].trade_id if self.trades else 0
        kline = {"t": row[0], "T": row[6], "s": self.contract.symbol, "i": "1m", "f": last_id - row[8] + 1,
                 "L": last_id, "o": row[1], "c": row[4], "h": row[2], "l": row[3], "v": row[5], "n": row[8],
                 "x": is_closed, "q": row[7], "V": row[9], "Q": row[10], "B": "0"}
        return self.frame("kline_1m", json.dumps(
            {"e": "kline", "E": self.now_ms, "s": self.contract.symbol, "k": kline}, separators=(",", ":")))


class FeedMarket:
    """What all markets do alike: keep the order of frames, and answer for each symbol.

    The subclasses begin() at the first advance, run() what is due into `pending`, and know due_ms().
    """

    is_tradable = True

    def __init__(self, feeds: Mapping[str, Feed]) -> None:
        self._feeds = feeds
        self._now_ms: int | None = None
        self.pending: deque[Frame] = deque()

    def begin(self, now_ms: int) -> None:
        raise NotImplementedError

    def run(self, now_ms: int) -> None:
        raise NotImplementedError

    def due_ms(self) -> int | None:
        raise NotImplementedError

    def start(self, now_ms: int) -> None:
        del now_ms

    def advance(self, now_ms: int, frames_max: int | None = None) -> list[Frame]:
        if self._now_ms is None or now_ms - self._now_ms > CATCH_UP_MS:
            self.begin(now_ms)
        self._now_ms = max(now_ms, self._now_ms or 0)
        self.run(self._now_ms)
        for feed in self._feeds.values():
            feed.now_ms = self._now_ms
        count = len(self.pending) if frames_max is None else min(frames_max, len(self.pending))
        return [self.pending.popleft() for _ in range(count)]

    def next_due_ms(self) -> int | None:
        return self.pending[0].time_ms if self.pending else self.due_ms()

    def symbols(self) -> list[dict[str, Any]]:
        return [feed.contract.listing(feed.history_ms) for feed in self._feeds.values()]

    def book(self, symbol: str, limit: int = 1_000) -> Book:
        return self._feeds[symbol].book(limit)

    def last_price(self, symbol: str) -> Decimal:
        return self._feeds[symbol].money(self._feeds[symbol].last())

    def mark_price(self, symbol: str) -> Decimal:
        return self._feeds[symbol].money(self._feeds[symbol].mark())

    def index_price(self, symbol: str) -> Decimal:
        return self._feeds[symbol].money(self._feeds[symbol].index())

    def funding(self, symbol: str) -> tuple[Decimal, int]:
        return FUNDING_RATE, self._feeds[symbol].funding_ms()

    def klines(self, symbol: str, interval: str, limit: int, start_ms: int | None = None,
               end_ms: int | None = None) -> list[list[Any]]:
        return self._feeds[symbol].klines(interval, limit, start_ms, end_ms)

    def day(self, symbol: str) -> list[Any]:
        return self._feeds[symbol].day()

    def recent_trades(self, symbol: str, limit: int) -> list[dict[str, Any]]:
        feed = self._feeds[symbol]
        return [feed.trade_row(trade) for trade in list(feed.trades)[-limit:]]

    def consume(self, symbol: str, side: Side, fills: list[tuple[Decimal, Decimal]]) -> list[int]:
        feed = self._feeds[symbol]
        trades = feed.consume(side, fills)
        for trade in trades:
            self.pending.extend(feed.trade_frames(trade))
        return [trade.trade_id for trade in trades]

    def levels(self, symbol: str) -> list[Decimal]:
        del symbol
        return []


class Ladder:
    """A synthetic book around a quote; its quantities depend on seed, price and time alone."""

    def __init__(self, quantities: list[int], tick: int, price: int) -> None:
        self._quantities = quantities
        self._tick = tick
        self._stride = max(1, round(price / tick / 60_000)) * tick  # 1.00 for BTC near 60,000

    def sides(self, bid: int, ask: int, at_ms: int) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Return bids and asks, best first."""
        stride = self._stride
        below = [bid, *range((bid - 1) // stride * stride, 0, -stride)[:LADDER_LEVELS]]
        above = [ask, *range(ask // stride * stride + stride, 2 * ask, stride)[:LADDER_LEVELS]]
        return [(p, self._qty(p, at_ms)) for p in below], [(p, self._qty(p, at_ms)) for p in above]

    def _qty(self, price: int, at_ms: int) -> int:
        index = price // self._tick
        era = (at_ms + index * 97) // QTY_MS
        return self._quantities[(index * 2_654_435_761 + era * 40_503) % len(self._quantities)]


def bar_of(trades: list[Trade]) -> Bar | None:
    """Return the bar of trades in order; None of none."""
    if not trades:
        return None
    prices = [t.price for t in trades]
    buys = [t for t in trades if not t.is_buyer_maker]
    return (prices[0], max(prices), min(prices), prices[-1], sum(t.qty for t in trades),
            sum(t.price * t.qty for t in trades), len(trades),
            sum(t.qty for t in buys), sum(t.price * t.qty for t in buys))


def fold(bars: Iterable[Bar | None]) -> Bar | None:
    """Return one bar over several in order; None over none."""
    columns = list(zip(*filter(None, bars), strict=True))
    if not columns:
        return None
    o, h, l, c, *sums = columns  # noqa: E741
    return (o[0], max(h), min(l), c[-1], *map(sum, sums))  # type: ignore[return-value]


def _unhealed(taken: tuple[int, int], now_ms: int) -> int:
    qty, at_ms = taken
    return max(0, qty * (HEAL_MS - (now_ms - at_ms)) // HEAL_MS)
