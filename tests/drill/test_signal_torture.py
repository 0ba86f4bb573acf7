"""Signals through kill -9 of the executor and of strategies: as many outcomes as signals, each once.

Short: 10,000 signals through 20 kills. Long: a million through 100 (TRADEHOST_SIGNALS).
"""

import os
import random
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path

import pytest

from tests.harness import wait_until
from tests.sweep import Lane

STRATEGIES = {"one": "BTC/USDT:USDT", "two": "ETH/USDT:USDT"}


def torture(folder: Path, signals: int, kills: int, timeout_s: float) -> None:
    ledgers = {name: folder / f"{name}.ledger" for name in STRATEGIES}
    tables: dict = {name: {"class": "tests.hammer:Restless", "symbols": [symbol],
                     "signal_ttl_ms": 2_000, "resend_ms": 300, "signals_per_s_max": 100_000,
                     "settings": {"ledger": str(ledgers[name]), "signals": signals // len(STRATEGIES)}}
              for name, symbol in STRATEGIES.items()}
    tables["levels"] = None  # the harness's own
    chance, count = random.Random(kills), Counter(ledgers)
    # No order is made: the exchange may take its time, it shares the machine with the hammers.
    with Lane(folder / "lane", strategy=tables, exchange={}, executor={"snapshot_ms": 100}) as lane:
        names = [f"tests.hammer-{name}" for name in STRATEGIES]
        lane.start("paper", "gateway", "executor", *names)
        lane.wait_running()
        began, deadline = time.monotonic(), time.monotonic() + timeout_s
        victims = ["executor"] * (kills // 2) + [names[n % len(names)] for n in range(kills - kills // 2)]
        chance.shuffle(victims)
        for number, victim in enumerate(victims, 1):  # spread over the whole, at any moment
            share = signals * number / (kills + 1)
            wait_until(lambda share=share: count() >= share, deadline - time.monotonic())
            time.sleep(chance.random() * 0.1)
            lane.signal(victim, signal.SIGKILL)
        wait_until(lambda: count() >= signals, deadline - time.monotonic(), 0.2)
        wait_until(lambda: all(lane._beat(f"strategy-{name}").get("outbox") == 0 for name in STRATEGIES), 30)
        took_s = time.monotonic() - began
        wait_until(lambda: not any(book.signals for book in lane.books().symbols.values()), 10)
        check(lane, ledgers, kills)
        print(f"signal torture: {count()} signals through {kills} kill -9 in {took_s:.0f} s, "
              f"{count() / took_s:.0f}/s; outcomes {lane.books().outcomes}")


class Counter:
    """Counts the lines of the ledgers; each look reads what is new."""

    def __init__(self, ledgers: dict[str, Path]) -> None:
        self._read = dict.fromkeys(ledgers.values(), 0)
        self._total = 0

    def __call__(self) -> int:
        for path, offset in self._read.items():
            if path.exists():
                with open(path, "rb") as file:
                    file.seek(offset)
                    new = file.read()
                self._read[path] += len(new)
                self._total += new.count(b"\n")
        return self._total


def check(lane: Lane, ledgers: dict[str, Path], kills: int) -> None:
    sent = [line for path in ledgers.values() for line in path.read_text().split()]
    with closing(sqlite3.connect(lane.config.path(lane.config.journal.path))) as db:
        journaled, closed = ([key for key, in db.execute("SELECT key FROM events WHERE kind = ?", (kind,))]
                             for kind in ("signal", "outcome"))
        intents, = db.execute("SELECT count(*) FROM events WHERE kind = 'intent'").fetchone()
    assert len(set(sent)) == len(sent)
    assert len(set(journaled)) == len(journaled) and len(set(closed)) == len(closed)
    assert set(journaled) == set(closed), "each signal has one outcome"
    assert not set(sent) - set(journaled), "a signal was lost"
    # Killed between the outbox and the ledger, it sent one that the ledger does not know.
    assert len(journaled) - len(sent) <= kills
    assert intents == 0
    assert lane.verify_chain() >= 2 * len(sent)
    assert not lane.status()["halted"]


def test_signals_with_twenty_kills_are_each_journaled_and_ended_once(tmp_path: Path) -> None:
    torture(tmp_path, signals=10_000, kills=20, timeout_s=240)  # a machine of its own: 15 s


@pytest.mark.drill
def test_signals_with_a_hundred_kills_are_each_journaled_and_ended_once(tmp_path: Path) -> None:
    torture(tmp_path, signals=int(os.environ.get("TRADEHOST_SIGNALS", "1000000")), kills=100, timeout_s=5_400)
