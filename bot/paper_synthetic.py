"""The synthetic market: a pure function of seed, symbol and market time, lively enough to watch.

Price walks between planted levels in legs of 20 to 70 s and turns at each with a little overshoot;
now and then it breaks through and trades between the next two levels. Market time is cut into
blocks of 300 s. A block's legs, quotes and trades come from generators seeded by its index alone,
so a restart goes on where the clock is: only the (level, direction) at each block's beginning is
folded from the first block on, a few microseconds each. The past before the start is made the same.
"""

import hashlib
import heapq
import math
import struct
from bisect import bisect_left
from collections.abc import Iterator
from decimal import Decimal
from functools import lru_cache
from itertools import pairwise
from operator import attrgetter, itemgetter

from bot.config import PaperConfig
from bot.paper_feed import GRID_MS, Bar, Event, Feed, Trade, bar_of, fold
from bot.paper_model import Contract

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
FIRST_TRADE_ID = 1_000_000_000
BLOCKS_KEPT = 8
WARM_MS = 60_000  # and up to a minute more is played before a start, so that it has recent trades
CONTRACTS = {  # tick, step, price of the middle level
    "BTCUSDT": ("0.10", "0.001", 60_000), "ETHUSDT": ("0.01", "0.001", 3_000)}
OTHER = ("0.0001", "1", 10)


class Block:
    """Five minutes of one symbol: best bids, in ticks, at the grid's steps, 0 in a gap; and the trades."""

    def __init__(self, plan: "Plan", index: int) -> None:
        self._draws = lambda kind, count: plan.draws(f"{kind}/{index}", count)
        self._gap = (BLOCK_MS, BLOCK_MS)
        self._breaks: list[int] = []  # when a level breaks
        times, prices = self._knots(plan, index)
        self.path = self._walk(times, prices)
        self.bids = [0 if self._gap[0] <= step * GRID_MS < self._gap[1] else int(mid)
                     for step, mid in enumerate(self.path)]
        self.trades = self._trades(plan, index)

    def _knots(self, plan: "Plan", index: int) -> tuple[list[float], list[float]]:
        levels = plan.legs(index)
        draws = self._draws("knots", 2 * LEGS + 3)
        weights = [LEG_SPREAD[0] + LEG_SPREAD[1] * draw for draw in draws[:LEGS]]
        chance, which, pause = draws[2 * LEGS:]
        gap_leg = 1 + int(which * (LEGS - 2)) if chance < GAP else 0  # never the first nor the last
        times, prices = [0.0], [plan.turn(index, 0)]
        for leg, weight in enumerate(weights):
            begun, length = times[-1], BLOCK_MS * weight / sum(weights)
            price, target = prices[-1], plan.turn(index, leg + 1)
            onward = levels[leg + 1] - levels[leg]
            is_break = leg > 0 and onward == levels[leg] - levels[leg - 1]
            if is_break and leg != gap_leg and draws[LEGS + leg] < FEINT:
                times += (begun + FEINT_MS, begun + 2 * FEINT_MS)
                prices += (price * (1 - onward * FEINT_BACK), price)
            if is_break:
                self._breaks.append(int(times[-1]))
            if leg and leg == gap_leg:
                start = int(begun + 0.4 * length) // GRID_MS * GRID_MS
                self._gap = (start, start + (40 + int(20 * pause)) * GRID_MS)
                times += self._gap
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

    def _trades(self, plan: "Plan", index: int) -> list[Trade]:
        bursts = [*self._breaks, *(int(BLOCK_MS * u) for u in self._draws("bursts", BURSTS))][:BURSTS]
        pause, draws = self._gap[1] - self._gap[0], self._draws("trades", 3 * TRADES)
        marks = [(int((BLOCK_MS - pause) * draw), -1) for draw in draws[BURSTS * BURST_TRADES:TRADES]]
        marks += [(min(BLOCK_MS - pause - 1, bursts[i // BURST_TRADES] + int(BURST_MS * draw)),
                   i % BURST_TRADES) for i, draw in enumerate(draws[:BURSTS * BURST_TRADES])]
        made, tick, lot = [], plan.contract.tick, plan.contract.step
        for number, (offset, run) in enumerate(sorted(marks)):
            offset += pause if offset >= self._gap[0] else 0
            step = offset // GRID_MS
            is_sale = draws[TRADES + number] < 0.5
            if run >= 0:  # a burst runs with the market, and eats a tick now and then
                is_sale = self.path[min(step + 10, STEPS - 1)] < self.bids[step]
            away = max(0, run) // 8
            price = self.bids[step] - away if is_sale else self.bids[step] + 1 + away
            lots = 1 + int(plan.trade_lots * draws[2 * TRADES + number]**6)
            made.append(Trade(FIRST_TRADE_ID + index * TRADES + number, plan.begin_ms(index) + offset,
                              price * tick, lots * lot, is_sale))
        return made


class Plan:
    """What one synthetic symbol does, for ever. Its prices are in ticks."""

    def __init__(self, symbol: str, seed: int, start_ms: int) -> None:
        tick, step, middle = CONTRACTS.get(symbol, OTHER)
        self.contract = Contract(symbol, Decimal(tick), Decimal(step))
        self._seed = f"{seed}/{symbol}"
        self._starts = [(0, 1)]  # level and direction at each block's beginning
        lead = LEAD_S[0] + int(LEAD_S[1] * self.draws("lead", 1)[0])
        self._origin_ms = (start_ms // 1_000 + lead) * 1_000 - PAST_BLOCKS * BLOCK_MS
        self.planted = self._plant(int(middle / self.contract.tick))
        self.trade_lots = TRADE_NOTIONAL / middle / float(step)
        self.block = lru_cache(BLOCKS_KEPT)(lambda index: Block(self, index))
        self.feed = Feed(self.contract, start_ms, self.traded, middle)

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
        levels = [middle]
        for draw in self.draws("levels", LEVELS):
            levels.append(round(levels[-1] * (1 + SPACING[0] + SPACING[1] * draw)))
        for draw in self.draws("levels below", LEVELS):
            levels.insert(0, round(levels[0] * (1 - SPACING[0] - SPACING[1] * draw)))
        return levels

    def begin_ms(self, index: int) -> int:
        return self._origin_ms + index * BLOCK_MS

    def index_at(self, at_ms: int) -> int:
        return (at_ms - self._origin_ms) // BLOCK_MS

    def traded(self, from_ms: int, to_ms: int) -> Bar | None:
        """Return the bar of the trades between two times."""
        blocks = map(self.block, range(self.index_at(from_ms), self.index_at(to_ms) + 1))
        return fold(bar_of(block.trades[bisect_left(block.trades, from_ms, key=_time_ms):
                                        bisect_left(block.trades, to_ms, key=_time_ms)]) for block in blocks)

    def events(self, from_ms: int) -> Iterator[tuple[int, Feed, Event]]:
        """Yield (when, feed, event) for ever: a quote at each step, and the trades."""
        index, symbol, tick = self.index_at(from_ms), self.contract.symbol, self.contract.tick
        while True:
            block, begin_ms = self.block(index), self.begin_ms(index)
            quotes: list[tuple[int, Feed, Event]] = [(begin_ms + step * GRID_MS, self.feed, {
                "e": "bookTicker", "b": bid * tick, "B": 0, "a": (bid + 1) * tick, "A": 0})
                for step, bid in enumerate(block.bids) if bid]
            trades: Iterator[tuple[int, Feed, Event]] = ((t.time_ms, self.feed, {
                "e": "trade", "E": t.time_ms, "T": t.time_ms, "s": symbol, "t": t.trade_id,
                "p": t.price, "q": t.qty, "X": "MARKET", "m": t.is_buyer_maker})
                for t in block.trades)
            yield from (row for row in heapq.merge(quotes, trades, key=_when) if row[0] >= from_ms)
            index += 1


class Synthetic:
    """All synthetic symbols as a source of events."""

    def __init__(self, paper: PaperConfig, start_ms: int) -> None:
        names = [symbol.split(":")[0].replace("/", "") for symbol in paper.symbols]
        self.plans = {name: Plan(name, paper.seed, start_ms) for name in names}
        self.feeds = {name: plan.feed for name, plan in self.plans.items()}

    def first_ms(self, now_ms: int) -> int:
        """Return from where the events are to be played to stand at a time."""
        return now_ms // 60_000 * 60_000 - WARM_MS

    def events(self, from_ms: int) -> Iterator[tuple[int, Feed, Event]]:
        """Yield all symbols' events by time."""
        return heapq.merge(*(plan.events(from_ms) for plan in self.plans.values()), key=_when)


_time_ms, _when = attrgetter("time_ms"), itemgetter(0)
