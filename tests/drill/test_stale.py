"""Stale means no: yesterday's signals come again, and the feed stands still while all else lives."""

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest

from bot.model import TradingSignal, signal_id
from bot.wire import encode
from tests.appliance import BTC, Signaler
from tests.harness import wait_until
from tests.sweep import CONFIG, Lane

DAY_NS = 86_400_000_000_000
TIMES = ("created_ns", "expires_ns", "tick_exchange_ns", "tick_receive_ns")


@pytest.fixture
def lane(tmp_path: Path) -> Iterator[Lane]:
    limits = CONFIG["limits"] | {"tick_age_ms_max": 1_500}
    with Lane(tmp_path / "lane", limits=limits) as lane:
        lane.start("paper", "gateway", "executor")
        lane.wait_running()
        yield lane


@pytest.fixture
def signaler(lane: Lane) -> Iterator[Signaler]:
    played = Signaler(lane)
    played.position()
    yield played
    played.close()


def exits(mark: float) -> dict[str, str]:
    return {"stop_loss": f"{mark * 0.9:.0f}"}


def trade(lane: Lane, signaler: Signaler) -> list[TradingSignal]:
    """Go in and out a few times; return the signals as they were recorded."""
    recorded = []
    for qty in ("0.010", "0.020", "0", "0.010", "0"):
        mark = lane._mark()
        signal = signaler.send(signaler.signal(qty, mark=mark, **(exits(mark) if float(qty) else {})))
        assert signaler.outcome(signal.seq).outcome == "done"
        recorded.append(signal)
    wait_until(lambda: lane.open_stops() == [])
    return recorded


def outcomes_of(lane: Lane, signals: list[TradingSignal]) -> list[tuple[str, str]]:
    """Return outcome and reason of each, once all have one."""
    names = [signal_id(s.strategy, s.run, s.seq) for s in signals]

    def ended() -> dict[str, tuple[str, str]] | None:
        with closing(sqlite3.connect(lane.config.path(lane.config.journal.path))) as db:
            rows = dict(db.execute("SELECT key, body FROM events WHERE kind = 'outcome'"))
        read = {name: msgspec.json.decode(rows[name]) for name in names if name in rows}
        return {n: (r["outcome"], r["reason"]) for n, r in read.items()} if len(read) == len(names) else None
    told = wait_until(ended, 20)
    return [told[name] for name in names]


def shifted(signal: TradingSignal, by_ns: int, *fields: str, run: int) -> TradingSignal:
    changes: dict[str, Any] = {field: getattr(signal, field) + by_ns for field in fields}
    return msgspec.structs.replace(signal, run=run, **changes)


def test_signals_of_yesterday_that_come_again_lead_to_no_order(lane: Lane, signaler: Signaler,
                                                               tmp_path: Path) -> None:
    recorded = trade(lane, signaler)
    orders = len(lane.exchange_orders())
    for signal in recorded:  # the same bytes to the same executor: known, never acted on again
        signaler.push.send(encode(signal))
    assert trade(lane, signaler)
    assert len(lane.exchange_orders()) == 2 * orders
    with closing(lane.journal()) as journal:
        assert journal.counts()["signal"] == journal.counts()["outcome"] == 2 * len(recorded)
    with Lane(tmp_path / "another") as fresh:
        replay(fresh, recorded)


def replay(lane: Lane, recorded: list[TradingSignal]) -> None:
    """Play what was recorded a day ago to an executor that has seen nothing yet."""
    lane.start("paper", "gateway", "executor")
    lane.wait_running()
    player = Signaler(lane)
    player.position()
    # As they were; with a long life; and made anew by a player that kept yesterday's Ticks.
    kinds = {"time to live": TIMES, "signal_age": ("created_ns", "tick_exchange_ns", "tick_receive_ns"),
             "stale_tick": ("tick_exchange_ns", "tick_receive_ns")}
    for number, (why, fields) in enumerate(kinds.items(), 1):
        for old in recorded:
            today = shifted(old, time.time_ns() - old.created_ns, *TIMES, run=number)
            signal = player.send(shifted(today, -DAY_NS, *fields, run=number))
            (outcome, reason), = outcomes_of(lane, [signal])
            assert outcome == ("expired" if number == 1 else "denied") and why in reason, reason
    assert lane.exchange_orders() == []
    assert lane.exchange_position() == 0 == lane.our_position()
    player.close()


def test_feed_that_stands_still_lets_no_order_out_until_it_moves(lane: Lane, signaler: Signaler) -> None:
    assert trade(lane, signaler)
    orders, began = len(lane.exchange_orders()), time.monotonic()
    denied: list[str] = []
    while time.monotonic() - began < 6:
        for stream in ("trade", "bookTicker", "markPrice@1s"):  # also of the connections made meanwhile
            lane.control("POST", "/paper/stream", {"match": f"btcusdt@{stream}", "do": "freeze",
                                                   "duration_ms": 1_500})
        if time.monotonic() - began > 3:  # the newest mark is older than tick_age_ms_max now
            mark = lane._mark()  # the signal itself claims to be decided on fresh prices
            signal = signaler.send(signaler.signal("0.010", mark=mark, **exits(mark)))
            (outcome, reason), = outcomes_of(lane, [signal])
            assert outcome == "denied", reason
            denied.append(reason)
        time.sleep(0.2)
    assert len(denied) >= 3 and len(lane.exchange_orders()) == orders
    gateway = next(p for p in lane.status()["processes"] if p["name"] == "gateway")
    assert gateway["state"] == "UP" and "gateway" not in denied[-1]  # it lived, and beat, all the while
    wait_until(lambda: lane.status()["state"] == "RUNNING" and lane.status()["stale"] == [], 15)
    signaler.position()
    assert trade(lane, signaler)
    assert BTC not in lane.status()["locked_symbols"]
