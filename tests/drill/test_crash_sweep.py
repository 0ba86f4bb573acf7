"""Every step of a signal and an order, killed and frozen, while the exchange does its worst: real processes.

Short: each crash point killed, every second one frozen, the exchange's faults dealt over them. Long: each
with every fault, several seeds (TRADEHOST_SWEEP_SEEDS, default 1 2 3), in TRADEHOST_SWEEP_LANES
lanes, everything that waits TRADEHOST_SWEEP_SLOW times as long.
"""

import os
import random
import signal
import threading
import time
from decimal import Decimal
from pathlib import Path

import pytest

from bot.clock import Clock
from bot.crash import POINTS
from bot.halt import HaltFiles
from tests.appliance import BTC
from tests.harness import wait_until
from tests.sweep import FAULTS, Case, Lane, random_case

LANE_CASES_MAX = 150  # then a fresh account: the exchange lists at most 1,000 orders at once
# Each lane is its own exchange, account and five processes, which mostly wait; fewer on a machine at work.
LANES = int(os.environ.get("TRADEHOST_SWEEP_LANES", "3"))


def play(folder: Path, cases: list[Case], lanes: int = LANES) -> tuple[int, int, int]:
    """Play the cases in several lanes side by side; return how many fired, did not, and the events."""
    waiting, totals, failures = list(reversed(cases)), [0, 0, 0], []
    lock = threading.Lock()

    def live(number: int) -> None:
        turn, case = 0, None
        while waiting and not failures:
            turn += 1
            with lock:  # msgspec 0.22 may crash when two threads meet a type for the first time
                made = Lane(folder / f"lane-{number}-{turn}")
            with made as lane:
                try:
                    lane.begin()
                    for _ in range(LANE_CASES_MAX):
                        with lock:
                            case = waiting.pop() if waiting and not failures else None
                            if case is not None and len(waiting) % 100 == 0:
                                print(f"crash sweep: {len(waiting)} cases left", flush=True)
                        if case is None:
                            break
                        lane.run(case)
                    events = lane.verify()
                    with lock:
                        totals[:] = [a + b for a, b in zip(totals, (lane.fired, lane.unfired, events),
                                                           strict=True)]
                except BaseException as error:
                    print(f"crash sweep: lane-{number}-{turn} failed at {case}: {error!r}", flush=True)
                    failures.append(error)

    threads = [threading.Thread(target=live, args=(number,)) for number in range(lanes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        raise failures[0]
    return totals[0], totals[1], totals[2]


def report(cases: list[Case], result: tuple[int, int, int], began: float) -> None:
    fired, unfired, events = result
    exits = sum(case.of_exit for case in cases)
    print(f"crash sweep: {len(cases)} cases ({len(POINTS)} points, {len(FAULTS)} answers, {exits} of "
          f"them to a stop or its cancel), {fired} crashes, "
          f"{unfired} not reached, {events} journal events, {time.monotonic() - began:.0f} s")


def test_crash_sweep_with_each_point_killed_and_frozen_keeps_every_promise(tmp_path: Path) -> None:
    chance, began = random.Random(5), time.monotonic()
    steps = [(point, "kill") for point in POINTS] + [(point, "stop") for point in POINTS[::2]]
    faults = list(FAULTS) * 2
    chance.shuffle(faults)
    cases = [random_case(point, action, faults.pop(), chance) for point, action in steps]
    fired, unfired, events = play(tmp_path, cases, min(LANES, 2))  # other tests run beside it
    report(cases, (fired, unfired, events), began)
    assert fired >= 0.8 * len(cases)


def test_halt_set_when_an_order_is_about_to_leave_keeps_it_back(tmp_path: Path) -> None:
    with Lane(tmp_path / "lane") as lane:
        lane.begin()
        lane.plan.write_text("sender.built 1 stop")
        lane.wish("0.010 30000")
        wait_until(lambda: not lane.plan.exists())
        HaltFiles(lane.config.state_path / "halt").set("all", who="test", why="too late?", clock=Clock())
        lane.signal("executor", signal.SIGCONT)
        wait_until(lambda: lane.books().orders == 1 and not lane.books().book(BTC).working())
        order, = lane.books().book(BTC).orders.values()
        assert (order.state, "too late?" in order.text) == ("ABSENT", True)
        assert lane.exchange_orders() == []


def test_executor_killed_while_its_order_is_on_the_way_knows_it_again(tmp_path: Path) -> None:
    with Lane(tmp_path / "lane") as lane:
        lane.begin()
        for qty in (Decimal("0.010"), Decimal(0)):
            lane.control("POST", "/paper/faults", {"match": "POST /fapi/v1/order", "do": "delay",
                                                   "delay_ms": 200})
            lane.wish(f"{qty} 30000" if qty else "0")
            wait_until(lambda: lane.control("GET", "/paper/faults") == [], step=0.002)
            lane.signal("executor", signal.SIGKILL)  # before the exchange has said a word
            lane._reach(qty, Decimal(30_000))
            lane.check()


@pytest.mark.drill
@pytest.mark.parametrize("seed", [int(s) for s in os.environ.get("TRADEHOST_SWEEP_SEEDS", "1 2 3").split()])
def test_crash_sweep_with_each_point_and_each_answer_keeps_every_promise(tmp_path: Path, seed: int) -> None:
    chance, began = random.Random(seed), time.monotonic()
    cases = [random_case(point, action, fault, chance) for fault in FAULTS for point in POINTS
             for action in ("kill", "stop")]
    chance.shuffle(cases)
    fired, unfired, events = play(tmp_path, cases)
    report(cases, (fired, unfired, events), began)
    assert fired >= 0.8 * len(cases)
