"""The synthetic market: half an hour made of a seed, a recording that never was, lively enough to watch.

Price walks between planted levels in legs of 20 to 70 s and turns at each with a little overshoot; now and
then it breaks through and trades between the next two levels. It ends where it begins, so it can be looped.
"""

import hashlib
import heapq
import math
import struct
from collections.abc import Iterator
from decimal import Decimal
from itertools import pairwise
from operator import itemgetter
from types import SimpleNamespace
from typing import Any

from bot.paper_feed import GRID_MS, Event, Feed
from bot.paper_model import Contract, table

SHAPE = SimpleNamespace(**table("synthetic", dict[str, Any]))  # its numbers, each with its reason
LOOP_MS: int = SHAPE.loop_ms
STEPS = LOOP_MS // GRID_MS


class Synthetic:
    """One symbol's half hour, in ticks: path and bids at the grid's steps (bid 0: a gap), and the trades."""

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
        count = length_ms // GRID_MS
        draws = self._draws(f"wave/{length_ms}", STEPS // count + 1, -size, 2 * size)
        return [a + (b - a) * i / count for a, b in pairwise(draws) for i in range(count)]

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
        firsts = {"trade": {}, "bookTicker": next(self.events())[1]}
        return {self.contract.symbol: Feed(self.contract, firsts)}

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
