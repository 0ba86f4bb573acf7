"""Ten strategies want something else at every quote: the exchange's limits hold, closes stay quick."""

import json
import re
import signal
import sqlite3
import time
from contextlib import closing
from pathlib import Path
from statistics import quantiles

import msgspec

from tests.appliance import Appliance, Signaler
from tests.harness import wait_until
from tests.sweep import Lane

NAMES = ("BTC", "ETH", "SOL", "XRP", "DOGE", "ADA", "LINK", "LTC", "TRX", "DOT")
SYMBOLS = {name.lower(): f"{name}/USDT:USDT" for name in NAMES}
FLOOD_S = 15
# From the signal to the end of its fills; a machine of its own needs a tenth. Entries may wait, not these.
CLOSE_S_MAX = 10.0


def test_flood_of_ten_strategies_meets_no_limit_and_keeps_closes_quick(tmp_path: Path) -> None:
    tables: dict = {name: {"class": "tests.wishes:Restless", "symbols": [symbol], "signals_per_s_max": 20,
                           "settings": {"notional": 600}} for name, symbol in SYMBOLS.items()}
    tables["levels"] = None  # the harness's own
    with Lane(tmp_path / "lane", is_limited=True, strategy=tables, executor={}, exchange={}, bus={},
              limits={"orders_per_minute_max": 1_200},
              paper={"symbols": list(SYMBOLS.values()), "latency_ms": 1}) as lane:
        lane.start("paper", "gateway", "executor")
        lane.wait_running()
        lane.start(*(f"strategy-{name}" for name in SYMBOLS))
        wait_until(lambda: lane.books().fills, 30)
        time.sleep(FLOOD_S)
        for name in SYMBOLS:
            lane.tell(f"forget strategy-{name}")
            lane.signal(f"strategy-{name}", signal.SIGTERM)
        log = [json.loads(line) for line in (lane.path.parent / "bot.executor.log").read_text().splitlines()
               if line.startswith("{")]
        limited = [line for line in log
                   if line.get("status") in (418, 429) or re.search(r"\b(418|429) -", str(line.get("error")))]
        opened, closed, cancels = latencies(lane)
        books = lane.books()
        print(f"flood: {books.signals} signals, {books.orders} orders, {books.fills} fills in {FLOOD_S} s; "
              f"{len(limited)} answers 429 or 418; seconds at p50, p99: entries {shown(opened)}, "
              f"closes {shown(closed)}, cancels {shown(cancels)}; outcomes {books.outcomes}")
        assert not limited, limited[0]
        assert len(closed) >= 5
        assert quantiles(closed, n=100)[98] < CLOSE_S_MAX
        assert not cancels or quantiles(cancels, n=100)[98] < CLOSE_S_MAX
        assert not lane.status()["halted"] and lane.status()["counters"]["ticks_lost"] == 0


def test_close_leaves_at_once_while_entries_get_no_answer(tmp_path: Path) -> None:
    tables: dict = {name: {"class": "tests.wishes:Restless", "symbols": [f"{name.upper()}/USDT:USDT"],
                           "settings": {"notional": 600}} for name in ("btc", "eth", "sol")}
    symbols = [table["symbols"][0] for table in tables.values()]
    with Appliance(tmp_path, strategy={**tables, "levels": None},
                   paper={"symbols": symbols, "latency_ms": 0}) as running:
        running.start("paper", "gateway", "executor")
        running.wait_running()
        signalers = [Signaler(running, name) for name in tables]

        def want(number: int, qty: str) -> int:
            signalers[number].position()
            name = symbols[number].split("/", maxsplit=1)[0]
            mark = float(running._http("GET", f"/fapi/v1/premiumIndex?symbol={name}USDT", None)["markPrice"])
            return signalers[number].send(
                signalers[number].signal(qty, mark=mark, symbol=symbols[number])).seq

        assert signalers[0].outcome(want(0, "0.010")).outcome == "done"
        running.control("POST", "/paper/faults", {
            "match": "POST /fapi/v1/order", "do": "hang", "times": 2})
        for number, qty in ((1, "0.1"), (2, "1")):
            want(number, qty)
        wait_until(lambda: running.control("GET", "/paper/faults") == [])
        began = time.monotonic()
        assert signalers[0].outcome(want(0, "0")).outcome == "done"
        took_s = time.monotonic() - began
        print(f"close beside two entries without an answer: {took_s:.2f} s")
        assert running.status()["unknown_orders"] == 0, "they were still waited for"
        assert took_s < running.config.exchange.request_timeout_ms / 1_000
        for signaler in signalers:
            signaler.close()


def latencies(lane: Lane) -> tuple[list[float], list[float], list[float]]:
    """Return the seconds from signal to outcome of entries and of closes done, and of cancels."""
    received: dict[str, tuple[int, bool]] = {}
    asked: dict[str, int] = {}
    opened, closed, cancels = [], [], []
    with closing(sqlite3.connect(lane.config.path(lane.config.journal.path))) as db:
        rows = db.execute("SELECT kind, key, ts_ns, body FROM events "
                          "WHERE kind IN ('signal', 'outcome', 'order') ORDER BY seq").fetchall()
    for kind, key, ts_ns, raw in rows:
        body = msgspec.json.decode(raw)
        if kind == "signal":
            received[key] = (ts_ns, body["signal"][6] == "0")
        elif kind == "outcome" and body["outcome"] == "done" and body["filled_qty"] != "0":
            since_ns, is_close = received[key]
            (closed if is_close else opened).append((ts_ns - since_ns) / 1e9)
        elif kind == "order" and body["event"] == "request_cancel":
            asked[body["client_order_id"]] = ts_ns
        elif kind == "order" and body["event"] == "cancel" and body["client_order_id"] in asked:
            cancels.append((ts_ns - asked[body["client_order_id"]]) / 1e9)
    return opened, closed, cancels


def shown(seconds: list[float]) -> str:
    if len(seconds) < 2:
        return f"({len(seconds)})"
    cuts = quantiles(seconds, n=100)
    return f"{cuts[49]:.3f}, {cuts[98]:.3f} ({len(seconds)})"
