"""The synthetic market: half an hour made of a seed, a recording that never was, lively enough to watch.

Price walks between planted levels in legs of 20 to 70 s and turns at each with a little overshoot; now and
then it breaks through and trades between the next two levels. It ends where it begins, so it can be looped.
"""

import hashlib
import heapq
import math
import struct
from collections.abc import Callable, Iterator
from decimal import Decimal
from functools import partial
from itertools import pairwise
from operator import itemgetter

from bot.paper_feed import GRID_MS, Bar, Event, Feed
from bot.paper_model import Contract, table

LOOP_MS = 1_800_000
STEPS = LOOP_MS // GRID_MS
LEGS = 42  # 43 s each on average, so some level is touched every 20 to 70 s; even: the way back is as long
LEG_SPREAD = (0.6, 0.8)  # of a leg's weight: least, and how much chance adds
LEAD_S = (24, 6)  # the first touch comes 24 to 29 s after the start: a strategy that is warm after 10 s
# sees the price enter the level's band, and its first entry falls within the first half minute or so
CALM_LEGS = 7  # no break within 5 min of the start: its two levels were touched before, and hold at first
LEVELS = 6  # on each side of the middle one: the price stays within about 2.5 % for ever
SPACING = (0.0030, 0.0015)  # from level to level: 0.30 to 0.45 %, four to six times the room a trade needs
OVERSHOOT = (-0.0001, 0.0004)  # of a turn beyond its level: -0.01 to +0.03 %
WAVES = ((4_000, 0.0002), (500, 0.00006))  # micro noise: how long, how much of the price
CALM_MS = 8_000  # near a turn the noise fades, so that the turn is the extreme
BREAK, BREAK_AGAIN = 0.20, 0.40  # chance of a touch to break through, and of the next to follow: a trend
GAP_LEGS = (14, 9)  # one leg in so many, and which: 5 s without trades and quotes, 30 % of it jumped
GAP_MS = 5_000
TRADES = 18_000  # 10/s
BURSTS, BURST_TRADES, BURST_MS = 36, 40, 100  # of those: 36 times 40 trades within 100 ms
TRADE_NOTIONAL = 100_000  # of the largest public trade, USDT; the sixth power makes most small
FIRST_TRADE_ID = 1_000_000_000


class Symbol:
    """One symbol's half hour, in ticks: path and bids at the grid's steps (bid 0: a gap), and the trades."""

    def __init__(self, name: str, seed: int) -> None:
        contracts = table("synthetic_contracts", dict[str, tuple[str, str, int]])
        tick, step, self.middle = contracts.get(name, contracts["other"])
        self.contract = Contract(name, Decimal(tick), Decimal(step))
        self._seed = f"{seed}/{name}"
        self.planted = self._plant(int(self.middle / self.contract.tick))
        self.gaps: list[tuple[float, float]] = []
        self.breaks: list[float] = []
        lead_ms = (LEAD_S[0] + int(LEAD_S[1] * self._draws("lead", 1)[0])) * 1_000
        path, lead = self._walk(*self._knots()), lead_ms // GRID_MS  # made from the first touch on, and
        self.path = path[-lead:] + path[:-lead]  # turned so that it begins before
        is_gap = {step % STEPS for begin, end in self.gaps
                  for step in range(math.ceil((begin + lead_ms) / GRID_MS), int((end + lead_ms) / GRID_MS))}
        self.bids = [0 if step in is_gap else int(price) for step, price in enumerate(self.path)]
        self.trades = self._trades([at + lead_ms for at in self.breaks])

    def _draws(self, name: str, count: int) -> list[float]:
        # Seeded numbers in [0, 1), the same for ever and on every machine.
        raw = hashlib.shake_256(f"{self._seed}/{name}".encode()).digest(4 * count)
        return [n / 2**32 for n in struct.unpack(f"<{count}I", raw)]

    def _plant(self, middle: int) -> list[int]:
        levels = [middle]
        for up, down in zip(self._draws("levels", LEVELS), self._draws("levels below", LEVELS), strict=True):
            levels.append(round(levels[-1] * (1 + SPACING[0] + SPACING[1] * up)))
            levels.insert(0, round(levels[0] * (1 - SPACING[0] - SPACING[1] * down)))
        return levels

    def _legs(self) -> list[int]:
        # The levels between the legs, from 0 out and the same way back.
        walked, direction, is_running = [0], 1, False
        for leg, draw in enumerate(self._draws("legs", LEGS // 2)):
            chance = BREAK_AGAIN if is_running else BREAK
            if walked[-1] * direction > 0:  # outward is harder than back, and impossible at the end
                chance *= 1 - abs(walked[-1]) / LEVELS
            is_running = leg >= CALM_LEGS and draw < chance
            direction = direction if is_running else -direction
            walked.append(walked[-1] + direction)
        return walked + walked[-2::-1]

    def _knots(self) -> tuple[list[float], list[float]]:
        levels, beyond = self._legs(), self._draws("turns", LEGS)
        weights = [LEG_SPREAD[0] + LEG_SPREAD[1] * draw for draw in self._draws("weights", LEGS)]
        weights[-1] = sum(LEG_SPREAD)  # the one that the loop begins within, away from its level
        times, prices = [0.0], list[float]()
        for leg, weight in enumerate(weights):
            before, at, after = levels[leg - 1 if leg else -2], levels[leg], levels[leg + 1]
            price = float(self.planted[at + LEVELS])
            if before == after:
                price *= 1 - (after - at) * (OVERSHOOT[0] + OVERSHOOT[1] * beyond[leg])
            else:
                self.breaks.append(times[-1])
            prices.append(price)
            times.append(times[-1] + LOOP_MS * weight / sum(weights))
        return times, [*prices, prices[0]]

    def _walk(self, times: list[float], prices: list[float]) -> list[float]:
        noise = [sum(waves) for waves in zip(*(self._wave(*wave) for wave in WAVES), strict=True)]
        path: list[float] = []
        for leg, ((begun, price), (end, target)) in enumerate(pairwise(zip(times, prices, strict=True))):
            if leg % GAP_LEGS[0] == GAP_LEGS[1]:
                self.gaps.append(((begun + end - GAP_MS) / 2, (begun + end + GAP_MS) / 2))
            for step in range(len(path), min(STEPS, math.ceil(end / GRID_MS))):
                at = step * GRID_MS
                calm = min(1.0, (at - begun) / CALM_MS, (end - at) / CALM_MS)
                share = (at - begun) / (end - begun)
                path.append((price + share * (target - price)) * (1 + noise[step] * calm))
        return path

    def _wave(self, length_ms: int, size: float) -> list[float]:
        count = length_ms // GRID_MS
        draws = [size * (2 * draw - 1) for draw in self._draws(f"wave/{length_ms}", STEPS // count + 1)]
        return [a + (b - a) * i / count for a, b in pairwise(draws) for i in range(count)]

    def _trades(self, breaks: list[float]) -> list[tuple[int, int, int, bool]]:
        # When, at which price, how many lots, whether the taker sold; by time.
        bursts = [*breaks, *(LOOP_MS * draw for draw in self._draws("bursts", BURSTS))][:BURSTS]
        draws, made = self._draws("trades", 3 * TRADES), []
        marks = [(LOOP_MS * draw, -1) for draw in draws[BURSTS * BURST_TRADES:TRADES]]
        marks += [((bursts[i // BURST_TRADES] + BURST_MS * draw) % LOOP_MS, i % BURST_TRADES)
                  for i, draw in enumerate(draws[:BURSTS * BURST_TRADES])]
        largest = TRADE_NOTIONAL / self.middle / float(self.contract.step)
        for number, (at, run) in enumerate(sorted(marks)):
            step = int(at // GRID_MS)
            if bid := self.bids[step]:
                is_sale, away = draws[TRADES + number] < 0.5, max(0, run) // 8
                if run >= 0:  # a burst runs with the market, and eats a tick now and then
                    is_sale = self.path[min(step + 10, STEPS - 1)] < bid
                made.append((int(at), bid - away if is_sale else bid + 1 + away,
                             1 + int(largest * draws[2 * TRADES + number]**6), is_sale))
        return made

    def events(self) -> Iterator[tuple[int, Event]]:
        """Yield (when, event): a quote at each step, and the trades."""
        name, tick, lot = self.contract.symbol, self.contract.tick, self.contract.step
        quotes = ((step * GRID_MS, {"e": "bookTicker", "s": name, "b": bid * tick, "B": 0,
                                    "a": (bid + 1) * tick, "A": 0, "u": 0, "E": step * GRID_MS})
                  for step, bid in enumerate(self.bids) if bid)
        trades = ((at, {"e": "trade", "E": at, "T": at, "s": name, "t": FIRST_TRADE_ID + number,
                        "p": price * tick, "q": lots * lot, "X": "MARKET", "m": is_sale})
                  for number, (at, price, lots, is_sale) in enumerate(self.trades))
        return heapq.merge(quotes, trades, key=itemgetter(0))


class Synthetic:
    """All synthetic symbols, with the methods of a Recording."""

    rest = None

    def __init__(self, symbols: tuple[str, ...], seed: int) -> None:
        names = [symbol.split(":")[0].replace("/", "") for symbol in symbols]
        self.symbols = {name: Symbol(name, seed) for name in names}

    def feeds(self, start_ms: int, plan: Callable[[str, int, int], Bar | None]) -> dict[str, Feed]:
        return {name: Feed(symbol.contract, start_ms, partial(plan, name), symbol.middle)
                for name, symbol in self.symbols.items()}

    def events(self) -> Iterator[tuple[int, Event]]:
        return heapq.merge(*(symbol.events() for symbol in self.symbols.values()), key=itemgetter(0))
