"""The synthetic market: a pure function of seed, symbol and market time, lively enough to watch.

Price walks between planted levels in legs of 20 to 70 s and turns at each with a little overshoot;
now and then it breaks through and trades between the next two levels. Market time is cut into
blocks of 300 s. A block's legs, quotes and trades come from generators seeded by its index alone,
so a restart goes on where the clock is: only the (level, direction) at each block's beginning is
folded from the first block on, a few microseconds each. The past before the start is made the same.
"""

import hashlib
import math
import struct
from bisect import bisect_left
from collections.abc import Mapping
from decimal import Decimal
from itertools import pairwise

from bot.config import PaperConfig
from bot.paper_feed import GRID_MS, Bar, Contract, Feed, Frame, Levels, Trade, bar_of, grid_id
from bot.paper_market import Market

BLOCK_MS = 300_000
STEPS = BLOCK_MS // GRID_MS
LEGS = 7  # per block: 43 s each on average, so some level is touched every 20 to 70 s
LEG_SPREAD = (0.6, 0.8)  # of a leg's weight: least, and how much chance adds
PAST_BLOCKS = 102  # 500 one-minute candles before the start, and the edges
LEAD_S = (24, 6)  # the first touch comes 24 to 29 s after the start: a strategy that is warm after 10 s
# sees the price enter the level's band, and its first entry falls within the first half minute or so
CALM_BLOCKS = range(PAST_BLOCKS - 4, PAST_BLOCKS + 1)  # no break from 20 min before the start to 5 after:
# the two levels of the start are in the history several times, and the first touches hold
LEVELS = 6  # on each side of the middle one: the price stays within about 2.5 % for ever
SPACING = (0.0030, 0.0015)  # from level to level: 0.30 to 0.45 %, four to six times the room a trade needs
OVERSHOOT = (-0.0001, 0.0004)  # of a turn beyond its level: -0.01 to +0.03 %
SLOW_MS, SLOW = 4_000, 0.0002  # micro noise: a wave of 4 s and 0.02 % ...
FAST_MS, FAST = 500, 0.00006  # ... and one of 0.5 s and 0.006 %
CALM_MS = 8_000  # near a turn the noise fades, so that the turn is the extreme
BREAK, BREAK_AGAIN = 0.10, 0.40  # chance of a touch to break through, and of the next to follow: a trend
FEINT, FEINT_MS, FEINT_BACK = 0.7, 6_000, 0.001  # chance of a break to turn back first, by 0.1 % within 6 s:
# what looked like a touch that holds, so that stop-losses have work too
GAP = 0.5  # chance of a block to hold a gap: 4 to 6 s without trades and quotes, 30 % of a leg jumped
TRADES = 3_000  # per block and symbol: 10/s
BURSTS, BURST_TRADES, BURST_MS = 6, 40, 100  # of those: six times 40 trades within 100 ms
TRADE_NOTIONAL = 100_000  # of the largest public trade, USDT; the sixth power makes most small
DEPTH_NOTIONAL = 150_000  # of the thickest level; about 1.5 million USDT a side
FIRST_TRADE_ID = 1_000_000_000
BLOCKS_KEPT = 8
TRADES_BEFORE = 1_000  # of the past, so that a start has recent trades
CONTRACTS = {  # price decimals, quantity decimals, tick in units, price of the middle level
    "BTCUSDT": (2, 3, 10, 60_000),  # tick 0.10, step 0.001
    "ETHUSDT": (2, 3, 1, 3_000),  # tick 0.01, step 0.001
}
OTHER = (4, 0, 1, 10)  # tick 0.0001, step 1


class _Block:
    # Five minutes of one symbol: the path and the best bid at each step of the grid, and the trades.

    def __init__(self, feed: "SyntheticFeed", index: int) -> None:
        self._draws = lambda kind, count: feed.draws(f"{kind}/{index}", count)
        self.gap = (BLOCK_MS, BLOCK_MS)
        self.breaks: list[int] = []  # when a level breaks
        times, prices = self._knots(feed, index)
        self.path = self._walk(times, prices)
        frozen = self.path[min(self.gap[0] // GRID_MS, STEPS - 1)]
        tick = feed.contract.tick
        self.bids = [int((frozen if self.gap[0] <= step * GRID_MS < self.gap[1] else mid) / tick) * tick
                     for step, mid in enumerate(self.path)]
        self.trades: list[Trade] = []
        self._fill(feed, index)

    def _knots(self, feed: "SyntheticFeed", index: int) -> tuple[list[float], list[float]]:
        levels = feed.legs(index)
        draws = self._draws("knots", 2 * LEGS + 3)
        weights = [LEG_SPREAD[0] + LEG_SPREAD[1] * draw for draw in draws[:LEGS]]
        chance, which, pause = draws[2 * LEGS:]
        gap_leg = 1 + int(which * (LEGS - 2)) if chance < GAP else 0  # never the first nor the last
        times, prices = [0.0], [feed.turn(index, 0)]
        for leg, weight in enumerate(weights):
            begun, length = times[-1], BLOCK_MS * weight / sum(weights)
            price, target = prices[-1], feed.turn(index, leg + 1)
            onward = levels[leg + 1] - levels[leg]
            is_break = leg > 0 and onward == levels[leg] - levels[leg - 1]
            if is_break and leg != gap_leg and draws[LEGS + leg] < FEINT:
                times += (begun + FEINT_MS, begun + 2 * FEINT_MS)
                prices += (price * (1 - onward * FEINT_BACK), price)
            if is_break:
                self.breaks.append(int(times[-1]))
            if leg and leg == gap_leg:
                start = int(begun + 0.4 * length) // GRID_MS * GRID_MS
                self.gap = (start, start + (40 + int(20 * pause)) * GRID_MS)
                times += self.gap
                prices += (price + 0.35 * (target - price), price + 0.65 * (target - price))
            times.append(begun + length)
            prices.append(target)
        times[-1] = BLOCK_MS
        return times, prices

    def _walk(self, times: list[float], prices: list[float]) -> list[float]:
        noise = [SLOW * slow + FAST * fast for slow, fast in zip(self._wave("slow", SLOW_MS),
                                                                 self._wave("fast", FAST_MS), strict=True)]
        path: list[float] = []
        for (begun, price), (end, target) in pairwise(zip(times, prices, strict=True)):
            slope = (target - price) / (end - begun)
            for step in range(len(path), math.ceil(end / GRID_MS)):
                at = step * GRID_MS
                calm = min(1.0, (at - begun) / CALM_MS, (end - at) / CALM_MS)
                path.append((price + slope * (at - begun)) * (1 + noise[step] * calm))
        return path

    def _wave(self, kind: str, length_ms: int) -> list[float]:
        count = length_ms // GRID_MS
        draws = [2 * draw - 1 for draw in self._draws(kind, STEPS // count + 1)]
        return [a + (b - a) * i / count for a, b in pairwise(draws) for i in range(count)]

    def _fill(self, feed: "SyntheticFeed", index: int) -> None:
        when = [int(BLOCK_MS * u) for u in self._draws("bursts", BURSTS)]
        when[:len(self.breaks)] = self.breaks[:BURSTS]
        pause = self.gap[1] - self.gap[0]
        span = BLOCK_MS - pause
        draws = self._draws("trades", 3 * TRADES)
        marks = [(int(span * draw), -1) for draw in draws[BURSTS * BURST_TRADES:TRADES]]
        marks += [(min(span - 1, when[i // BURST_TRADES] + int(BURST_MS * draw)), i % BURST_TRADES)
                  for i, draw in enumerate(draws[:BURSTS * BURST_TRADES])]
        base_ms, trade_id = feed.origin_ms + index * BLOCK_MS, FIRST_TRADE_ID + index * TRADES
        tick, size = feed.contract.tick, feed.trade_units
        sides, shares = draws[TRADES:2 * TRADES], draws[2 * TRADES:]
        for (offset, run), side, share in zip(sorted(marks), sides, shares, strict=True):
            if offset >= self.gap[0]:
                offset += pause
            step = offset // GRID_MS
            bid = self.bids[step]
            is_sale = side < 0.5
            if run >= 0:  # a burst runs with the market, and eats a tick now and then
                is_sale = self.path[min(step + 10, STEPS - 1)] < bid
            price = (bid if is_sale else bid + tick) + (-tick if is_sale else tick) * (max(0, run) // 8)
            self.trades.append(Trade(trade_id, base_ms + offset, price, 1 + int(size * share**6), is_sale))
            trade_id += 1


class SyntheticFeed(Feed):
    """One synthetic symbol."""

    def __init__(self, symbol: str, seed: int, start_ms: int, trade_id: int) -> None:
        price_decimals, qty_decimals, tick, middle = CONTRACTS.get(symbol, OTHER)
        super().__init__(Contract(symbol=symbol, price_decimals=price_decimals, qty_decimals=qty_decimals,
                                  tick=tick), start_ms)
        self._seed = f"{seed}/{symbol}"
        self._booked_id = trade_id
        self._blocks: dict[int, _Block] = {}
        self._starts = [(0, 1)]  # level and direction at each block's beginning
        lead = LEAD_S[0] + int(LEAD_S[1] * self.draws("lead", 1)[0])
        self.origin_ms = (start_ms // 1_000 + lead) * 1_000 - PAST_BLOCKS * BLOCK_MS
        self.planted = self._plant(middle * 10**price_decimals)
        unit = 10 ** qty_decimals / middle
        self.trade_units = TRADE_NOTIONAL * unit
        self.quantities = [1 + int(DEPTH_NOTIONAL * unit * u**4) for u in self.draws("depth", 1_024)]
        self._due_ms = self._next = -1  # of the grid, and which trade: not begun

    # Generation

    def draws(self, name: str, count: int) -> list[float]:
        """Return seeded numbers in [0, 1), the same for ever and on every machine."""
        raw = hashlib.shake_256(f"{self._seed}/{name}".encode()).digest(4 * count)
        return [n / 2**32 for n in struct.unpack(f"<{count}I", raw)]

    def legs(self, index: int) -> list[int]:
        """Return the levels between the legs of a block, from its beginning to its end."""
        while len(self._starts) <= index:
            walked = self._legs(len(self._starts) - 1)
            self._starts.append((walked[-1], walked[-1] - walked[-2]))
        return self._legs(index)

    def _legs(self, index: int) -> list[int]:
        level, direction = self._starts[index]
        walked, is_running = [level], False
        for leg, draw in enumerate(self.draws(f"legs/{index}", LEGS)):
            # The first leg turns back, so that a block may begin anywhere.
            chance = BREAK_AGAIN if is_running else BREAK
            if level * direction > 0:  # outward is harder than back, and impossible at the end
                chance *= 1 - abs(level) / LEVELS
            is_running = leg > 0 and draw < chance and index not in CALM_BLOCKS
            direction = direction if is_running else -direction
            level += direction
            walked.append(level)
        return walked

    def turn(self, index: int, leg: int) -> float:
        """Return the price between two legs: at a level, and beyond it where the price turns back."""
        if leg == LEGS:
            return self.turn(index + 1, 0)
        walked = self.legs(index)
        level = self.planted[walked[leg] + LEVELS]
        after = walked[leg + 1] - walked[leg]
        if leg and walked[leg] - walked[leg - 1] == after:
            return level
        beyond = OVERSHOOT[0] + OVERSHOOT[1] * self.draws(f"turn/{index}", LEGS)[leg]
        return level * (1 - after * beyond)

    def _plant(self, middle: int) -> list[int]:
        levels, tick = [middle], self.contract.tick
        for draw in self.draws("levels", LEVELS):
            levels.append(round(levels[-1] * (1 + SPACING[0] + SPACING[1] * draw) / tick) * tick)
        for draw in self.draws("levels below", LEVELS):
            levels.insert(0, round(levels[0] * (1 - SPACING[0] - SPACING[1] * draw) / tick) * tick)
        return levels

    def _block(self, at_ms: int) -> tuple[_Block, int]:
        index, offset = divmod(at_ms - self.origin_ms, BLOCK_MS)
        return self._block_of(index), offset // GRID_MS

    def _block_of(self, index: int) -> _Block:
        block = self._blocks.get(index)
        if block is None:
            block = self._blocks[index] = _Block(self, index)
            if len(self._blocks) > BLOCKS_KEPT:
                del self._blocks[next(iter(self._blocks))]
        return block

    def _number_at(self, at_ms: int) -> int:
        index = (at_ms - self.origin_ms) // BLOCK_MS
        return index * TRADES + bisect_left(self._block_of(index).trades, at_ms, key=_time_ms)

    def _trade(self, number: int) -> Trade:
        index, i = divmod(number, TRADES)
        trade = self._block_of(index).trades[i]
        return trade._replace(trade_id=trade.trade_id + self.inserted) if self.inserted else trade

    # What Feed asks

    def traded(self, from_ms: int, to_ms: int) -> Bar | None:
        number, end = self._number_at(from_ms), self._number_at(to_ms)
        trades: list[Trade] = []
        while number < end:
            index, first = divmod(number, TRADES)
            trades += self._block_of(index).trades[first:first + end - number]
            number += min(end - number, TRADES - first)
        return bar_of(trades)

    def mean_path(self, seconds: int) -> float:
        at_ms = self.now_ms // 1_000 * 1_000
        steps = [self._block(at_ms - 1_000 * back) for back in range(seconds)]
        return sum(block.path[step] for block, step in steps) / seconds

    def sides(self) -> tuple[Levels, Levels]:
        shown_ms = self._shown_at(self.now_ms)
        block, step = self._block(shown_ms)
        return self.ladder(block.bids[step], block.bids[step] + self.contract.tick, shown_ms)

    def update_id(self) -> int:
        # Inside the next depth frame, as on a busy exchange.
        return grid_id(self._shown_at(self.now_ms)) + 1

    def next_trade_id(self) -> int:
        return FIRST_TRADE_ID + self._next + self.inserted

    def _shown_at(self, at_ms: int) -> int:
        # When the quotes shown at that time were made: they stand still in a gap.
        index, offset = divmod(at_ms - self.origin_ms, BLOCK_MS)
        gap = self._block_of(index).gap
        if gap[0] <= offset < gap[1]:
            offset = gap[0]
        return self.origin_ms + index * BLOCK_MS + offset // GRID_MS * GRID_MS

    # Events

    def begin(self, now_ms: int) -> None:
        """Start, or go on after a pause, at a time."""
        self._due_ms = self.origin_ms - (self.origin_ms - now_ms) // GRID_MS * GRID_MS
        self._next = self._number_at(self._due_ms)
        self.inserted = max(self.inserted, self._booked_id + 1 - FIRST_TRADE_ID - self._next)
        self.trades.extend(self._trade(n) for n in range(self._next - TRADES_BEFORE, self._next))
        self.now_ms = self._due_ms - GRID_MS
        self.show(0, 0)
        self.now_ms = now_ms

    def due_ms(self) -> int:
        """Return when pop() has something."""
        return min(self._due_ms, self._trade(self._next).time_ms)

    def pop(self) -> list[Frame]:
        """Return what the next event sends, and go behind it."""
        self.now_ms = self.due_ms()
        if self.now_ms < self._due_ms:
            trade = self._trade(self._next)
            self._next += 1
            self.trades.append(trade)
            return self.trade_frames(trade)
        self._due_ms += GRID_MS
        frames = self.clock_frames()
        before, after = (grid_id(self._shown_at(self.now_ms - back)) for back in (GRID_MS, 0))
        if after > before:
            frames += self.show(before, after)
        return frames


class SyntheticMarket(Market):
    """All synthetic symbols, their events merged by time."""

    def __init__(self, paper: PaperConfig, start_ms: int, trade_ids: Mapping[str, int]) -> None:
        names = [symbol.split(":")[0].replace("/", "") for symbol in paper.symbols]
        self._made = {name: SyntheticFeed(name, paper.seed, start_ms, trade_ids.get(name, 0))
                      for name in names}
        super().__init__(self._made)

    def begin(self, now_ms: int) -> None:
        for feed in self._made.values():
            feed.begin(now_ms)

    def due_ms(self) -> int:
        return min(feed.due_ms() for feed in self._made.values())

    def pop(self) -> list[Frame]:
        return min(self._made.values(), key=SyntheticFeed.due_ms).pop()

    def levels(self, symbol: str) -> list[Decimal]:
        return [self._made[symbol].money(level) for level in self._made[symbol].planted]


def _time_ms(trade: Trade) -> int:
    return trade.time_ms
