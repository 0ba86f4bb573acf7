"""SupportResistanceStrategy: buy what turned up at a support, sell what turned down at a resistance.

Levels come from closed one-minute candles: swing highs and lows (the extreme of `swing_candles` on
each side), gathered where they lie within `tolerance_pct` of each other. A price that enters a level's
tolerance band from outside touches it; when it then moves back by `confirm_pct` from the extreme
of the touch, still inside the band, the strategy enters. A price that leaves the band on the far side
breaks the level: it counts again after the price has turned there once more. History shows no path
inside its minutes, so only Ticks break levels. All time is the exchange's, taken from the Ticks.
"""

from collections import deque
from collections.abc import Iterable
from decimal import ROUND_DOWN, ROUND_HALF_EVEN, Decimal
from statistics import median
from typing import Annotated

import msgspec
from msgspec import Meta

from bot.model import Candle, Instrument, PositionReport, Target, Tick

MINUTE_NS = 60_000_000_000
LONG, SHORT = 1, -1
Percent = Annotated[float, Meta(gt=0, le=20)]


class Settings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`[strategy.NAME.settings]`. Percentages are of the price; exactly one of qty and notional is given."""

    qty: Decimal | None = None  # contracts of an entry
    notional: Decimal | None = None  # of an entry, in the settlement currency
    window: Annotated[int, Meta(ge=10, le=500)] = 500  # closed candles that levels are made of
    candles_min: Annotated[int, Meta(ge=5, le=500)] = 100  # no entry with fewer
    swing_candles: Annotated[int, Meta(ge=1, le=50)] = 2  # on each side of a swing high or low
    touches_min: Annotated[int, Meta(ge=1, le=100)] = 3  # swings that make a level
    tolerance_pct: Percent = 0.10  # half the width of a level's band
    confirm_pct: Percent = 0.04  # move away from the extreme of the touch, before an entry
    stop_pct: Percent = 0.15  # the stop-loss lies this far beyond the level
    take_profit_pct: Percent = 0.50  # from the entry; nearer when the opposite level is nearer
    reward_min: Annotated[float, Meta(gt=0, le=100)] = 1.0  # least take-profit, in stop distances
    cooldown_s: Annotated[int, Meta(ge=0, le=86_400)] = 30  # after an entry or exit, per symbol


class Level(msgspec.Struct, frozen=True):
    """A price that turned the market `touches` times, last in the candle that began at turned_ns."""

    price: float
    touches: int
    turned_ns: int


class LevelBook:
    """One symbol's closed candles and the levels they make, the lowest first."""

    def __init__(self, settings: Settings) -> None:
        self.levels: list[Level] = []
        self.candles: deque[Candle] = deque(maxlen=settings.window)
        self._settings = settings
        self._pivots: deque[tuple[float, int]] = deque()  # (price, start of its candle)
        self._broken: deque[tuple[float, int]] = deque()  # (price, when)
        self._running: Candle | None = None

    def add_history(self, candles: Iterable[Candle]) -> None:
        """Take closed candles, oldest first."""
        for candle in candles:
            self._close(candle)
        self._find_levels()

    def add_tick(self, tick: Tick) -> None:
        """Build the running candle from trades; a Tick of a later minute, of any kind, closes it."""
        running, minute_ns = self._running, tick.exchange_ns // MINUTE_NS * MINUTE_NS
        if running is not None and minute_ns > running.start_ns:
            self._close(running)
            self._find_levels()
            running = self._running = None
        price, last_ns = tick.price, self.candles[-1].start_ns if self.candles else -1
        if tick.kind == "trade" and minute_ns > last_ns:  # a closed minute takes no late trades
            old = running or Candle(minute_ns, price, price, price, price, 0.0)
            self._running = Candle(old.start_ns, old.open, max(old.high, price), min(old.low, price), price,
                                   old.volume + tick.size)

    def drop(self, price: float, time_ns: int) -> None:
        """Forget the broken level at this price until the market turns there again."""
        self._broken.append((price, time_ns))
        self.levels = [level for level in self.levels if abs(level.price - price) > self.width(price)]

    def width(self, price: float) -> float:
        return price * self._settings.tolerance_pct / 100

    def _close(self, candle: Candle) -> None:
        if self.candles and candle.start_ns <= self.candles[-1].start_ns:
            return
        self.candles.append(candle)
        count = self._settings.swing_candles
        if len(self.candles) <= 2 * count:
            return
        middle = self.candles[-1 - count]
        newer = [self.candles[-1 - i] for i in range(count)]
        older = [self.candles[-2 - count - i] for i in range(count)]
        # Of equal extremes the first is the swing.
        if all(c.high <= middle.high for c in newer) and all(c.high < middle.high for c in older):
            self._pivots.append((middle.high, middle.start_ns))
        if all(c.low >= middle.low for c in newer) and all(c.low > middle.low for c in older):
            self._pivots.append((middle.low, middle.start_ns))

    def _find_levels(self) -> None:
        oldest_ns = self.candles[0].start_ns if self.candles else 0
        for seen in (self._pivots, self._broken):
            while seen and seen[0][1] < oldest_ns:
                seen.popleft()
        self.levels = []
        cluster: list[tuple[float, int]] = []
        for pivot in [*sorted(self._pivots), (float("inf"), 0)]:
            if cluster:
                mean = sum(price for price, _ in cluster) / len(cluster)
                if pivot[0] > mean + self.width(mean):
                    self._add_level(cluster)
                    cluster = []
            cluster.append(pivot)

    def _add_level(self, cluster: list[tuple[float, int]]) -> None:
        level = Level(median(price for price, _ in cluster), len(cluster), max(ns for _, ns in cluster))
        is_broken = any(abs(price - level.price) <= self.width(price) and ns >= level.turned_ns
                        for price, ns in self._broken)
        if level.touches >= self._settings.touches_min and not is_broken:
            self.levels.append(level)


class _Touch(msgspec.Struct):
    level: Level
    side: int  # LONG: a support, entered from above
    extreme: float


class _Market:
    # What is known of one symbol. position_qty None: not reported yet.
    def __init__(self, settings: Settings) -> None:
        self.book = LevelBook(settings)
        self.price: float | None = None  # of the trade before
        self.touch: _Touch | None = None
        self.position_qty: Decimal | None = None
        self.is_flat_due = False
        self.time_ns = self.cool_until_ns = 0


class SupportResistanceStrategy:
    """Trades every symbol whose position is reported to it, one position each."""

    history = {"1m": 500}  # noqa: RUF012 - the runner reads it from the class

    def __init__(self, settings: dict, instruments: dict[str, Instrument]) -> None:
        self._settings = msgspec.convert(settings, Settings)
        self._instruments = instruments
        _check(self._settings, instruments)
        self._markets = {symbol: _Market(self._settings) for symbol in instruments}

    def on_history(self, symbol: str, candles: Iterable[Candle]) -> None:
        """Warm up from closed one-minute candles."""
        self._markets[symbol].book.add_history(candles)

    def on_report(self, report: object) -> None:
        """Learn the position; when it is closed, by whatever, the cool-down begins."""
        if isinstance(report, PositionReport) and report.symbol in self._markets:
            market = self._markets[report.symbol]
            if market.position_qty and not report.position_qty:
                market.cool_until_ns = market.time_ns + self._settings.cooldown_s * 1_000_000_000
                market.is_flat_due = True
            market.position_qty = report.position_qty

    def on_tick(self, tick: Tick) -> Target | None:
        """Return an entry when a touch is confirmed, and a flat target once after each exit.

        The flat target makes the next entry a new wish even when its numbers equal the last one's.
        """
        market = self._markets[tick.symbol]
        market.time_ns = max(market.time_ns, tick.exchange_ns)
        market.book.add_tick(tick)
        if market.is_flat_due:
            market.is_flat_due = False
            return Target(tick.symbol, Decimal(0), reason="the position was closed")
        touch = self._confirmed(market, tick) if tick.kind == "trade" else None
        return self._entry(market, touch, tick) if touch is not None else None

    def levels(self) -> dict[str, list[float]]:
        """Return the prices that the status page draws."""
        return {symbol: [level.price for level in market.book.levels]
                for symbol, market in self._markets.items()}

    def _confirmed(self, market: _Market, tick: Tick) -> _Touch | None:
        before, market.price = market.price, tick.price
        touch = market.touch
        if touch is None:
            if before is not None:
                self._find_touch(market, before, tick.price)
            return None
        width, side = market.book.width(touch.level.price), touch.side
        touch.extreme = side * min(side * touch.extreme, side * tick.price)
        ahead = (tick.price - touch.level.price) * side
        is_confirmed = (tick.price - touch.extreme) * side >= touch.extreme * self._settings.confirm_pct / 100
        if ahead < -width:
            market.book.drop(touch.level.price, market.time_ns)
        elif ahead <= width and not is_confirmed:
            return None
        market.touch = None
        return touch if abs(ahead) <= width else None

    def _find_touch(self, market: _Market, before: float, price: float) -> None:
        for level in market.book.levels:
            width, was, now = market.book.width(level.price), before - level.price, price - level.price
            if abs(was) > width >= abs(now):
                market.touch = _Touch(level, LONG if was > 0 else SHORT, price)
            elif was * now < 0 and min(abs(was), abs(now)) > width:  # jumped across
                market.book.drop(level.price, market.time_ns)

    def _entry(self, market: _Market, touch: _Touch, tick: Tick) -> Target | None:
        settings, side, level = self._settings, touch.side, touch.level
        is_warm = len(market.book.candles) >= settings.candles_min
        if not is_warm or market.position_qty != 0 or market.time_ns < market.cool_until_ns:
            return None
        market.cool_until_ns = market.time_ns + settings.cooldown_s * 1_000_000_000
        stop = level.price * (1 - side * settings.stop_pct / 100)
        width = market.book.width(tick.price)
        ahead = [(other.price - tick.price) * side for other in market.book.levels]
        # Half a band before the opposite level, so that a turn just short of it fills too.
        room = min((distance - width / 2 for distance in ahead if distance > width), default=float("inf"))
        reward = max(min(room, tick.price * settings.take_profit_pct / 100),
                     settings.reward_min * (tick.price - stop) * side)
        instrument, name = self._instruments[tick.symbol], "support" if side == LONG else "resistance"
        stop_loss, take_profit = (_on_grid(Decimal(repr(price)), instrument.price_increment)
                                  for price in (stop, tick.price + side * reward))
        return Target(tick.symbol, side * self._qty(instrument, tick.price), stop_loss, take_profit,
                      reason=f"turned at {touch.extreme} near {name} {level.price:.8g} ({level.touches} "
                             f"touches), confirmed at {tick.price}")

    def _qty(self, instrument: Instrument, price: float) -> Decimal:
        if self._settings.qty is not None:
            return self._settings.qty
        assert self._settings.notional is not None
        exact = self._settings.notional / instrument.contract_size / Decimal(repr(price))
        # What is too small goes out as it is: the runner refuses it and says so.
        return _on_grid(exact, instrument.qty_increment, ROUND_DOWN) or exact


def _on_grid(value: Decimal, increment: Decimal, rounding: str = ROUND_HALF_EVEN) -> Decimal:
    return (value / increment).to_integral_value(rounding) * increment


def _check(settings: Settings, instruments: dict[str, Instrument]) -> None:
    sizes = [size for size in (settings.qty, settings.notional) if size is not None]
    if len(sizes) != 1 or not sizes[0] > 0:
        raise ValueError(f"exactly one of qty and notional must be given, above 0; was qty {settings.qty}, "
                         f"notional {settings.notional}")
    if settings.candles_min > settings.window:
        raise ValueError(f"candles_min must be at most window {settings.window}; was {settings.candles_min}")
    if settings.confirm_pct > settings.tolerance_pct:
        raise ValueError(f"confirm_pct must be at most tolerance_pct {settings.tolerance_pct}: an entry lies "
                         f"inside the band; was {settings.confirm_pct}")
    if settings.stop_pct <= settings.tolerance_pct:
        raise ValueError(f"stop_pct must be above tolerance_pct {settings.tolerance_pct}: a stop inside the "
                         f"band would fire while the level holds; was {settings.stop_pct}")
    for instrument in instruments.values():
        least, increment = instrument.qty_min, instrument.qty_increment
        if settings.qty is not None and (settings.qty < least or settings.qty % increment):
            raise ValueError(f"qty must be at least {least} and a multiple of {increment} for "
                             f"{instrument.symbol}; was {settings.qty}")
        if settings.notional is not None and settings.notional < instrument.notional_min:
            raise ValueError(f"notional must be at least {instrument.notional_min} for {instrument.symbol}; "
                             f"was {settings.notional}")
