"""One lane of the crash sweep: an appliance under a supervisor, a wish, a crash, a fault, and what must hold.

A case arms one crash point and one fault of the exchange, lets the strategy enter with a stop and
leave again, and then compares everything that can be compared: the exchange's orders, trades,
position and stops, the journal's intents, outcomes, position and hash chain.
"""

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

from bot.orders import CANARY_PREFIX
from tests.appliance import BTC, Appliance
from tests.harness import ROOT, wait_until

OWNER = {"runner": "strategy-levels", "executor": "executor", "sender": "executor", "keeper": "executor",
         "reconciler": "executor", "paper": "paper"}
# Everything that waits is short: the rules are the same, the cases are many. A machine with other work needs
# all of it so many times as long.
SLOW = int(os.environ.get("TRADEHOST_SWEEP_SLOW", "1"))
CONFIG: dict[str, Any] = {
    "executor": {"reconcile_s": SLOW, "absent_after_s": SLOW, "resolve_ms": 50, "fence_margin_ms": 200,
                 "snapshot_ms": 100, "clock_check_s": 5, "unprotected_s_max": 60},
    "exchange": {"recv_window_ms": 500 * SLOW, "request_timeout_ms": 500 * SLOW,
                 "connect_timeout_ms": 500 * SLOW},
    "bus": {"heartbeat_ms": 100, "silence_ms": 500 * SLOW},
    "gateway": {"reconnect_ms_min": 50, "reconnect_ms_max": 200, "stale_ms": 2_000 * SLOW,
                "clock_check_s": 5},
    "limits": {"orders_per_minute_max": 1_200, "signal_age_ms_max": 1_000 * SLOW,
               "tick_age_ms_max": 3_000 * SLOW},
    "journal": {"checkpoint_events": 200},
    "paper": {"latency_ms": 0},
}
SETTLE_S_MAX = 120  # of a case, of which it needs a few; a machine at work answers late again and again
EXIT_SHARE = 0.4  # of the cases where it can be: about a quarter of all
FENCE_S = 0.5 * SLOW + 0.2  # recv_window_ms + fence_margin_ms


def _answer(status: int, body: str, *, is_executed: bool, **headers: str) -> dict[str, Any]:
    return {"do": "answer", "status": status, "body": body, "is_executed": is_executed, "headers": headers}


def _error(status: int, code: int, text: str, *, is_executed: bool, **headers: str) -> dict[str, Any]:
    return _answer(status, json.dumps({"code": code, "msg": text}), is_executed=is_executed, **headers)


# What may happen to an order at the exchange; the rows of exchange-facts 1.2. Where the exchange says
# itself that it does not know and did not execute, only an operator may go on: that is no case here.
FAULTS: dict[str, dict[str, Any]] = {
    "none": {},
    "lose_answer": {"do": "lose_answer"},
    "lose_request": {"do": "lose_request"},
    "truncate": {"do": "truncate"},
    "delay": {"do": "delay", "delay_ms": 300},
    "delay_past_fence": {"do": "delay", "delay_ms": 900 * SLOW},
    "delay_answer": {"do": "delay_answer", "delay_ms": 300},
    "delay_answer_past_fence": {"do": "delay_answer", "delay_ms": 900 * SLOW},
    "duplicate": {"do": "duplicate"},  # of an entry it is an overfill, and halts: no case here
    "200_empty": _answer(200, "", is_executed=True),
    "200_empty_not": _answer(200, "", is_executed=False),
    "200_of_another": _answer(200, '{"orderId":7,"clientOrderId":"another"}', is_executed=True),
    "400_margin": _error(400, -2019, "Margin is insufficient.", is_executed=False),
    "400_clock": _error(400, -1021, "Timestamp is outside of the recvWindow.", is_executed=False),
    "400_duplicate": _error(400, -4116, "ClientOrderId is duplicated.", is_executed=True),
    "400_1006": _error(400, -1006, "Unexpected response.", is_executed=True),
    "400_1006_not": _error(400, -1006, "Unexpected response.", is_executed=False),
    "408_1007": _error(408, -1007, "Timeout waiting for response from backend server.", is_executed=True),
    "429": _error(429, -1003, "Too many requests.", is_executed=False, **{"Retry-After": "1"}),
    "400_1015": _error(400, -1015, "Too many new orders.", is_executed=False, **{"Retry-After": "1"}),
    "500_1000": _error(500, -1000, "Unknown error.", is_executed=True),
    "500_1000_not": _error(500, -1000, "An unknown error.", is_executed=False),
    "502": _answer(502, "<html>bad gateway</html>", is_executed=True),
    "502_not": _answer(502, "<html>bad gateway</html>", is_executed=False),
    "503": _error(503, -1000, "Unknown error, please check your request or try again later.",
                  is_executed=True),
    "503_unavailable": _answer(503, "Service Unavailable.", is_executed=False),
    "503_1008": _error(503, -1008, "Request throttled by system-level protection.", is_executed=False),
    "504": _answer(504, "", is_executed=True),
    "504_not": _answer(504, "", is_executed=False),
}


class Case(NamedTuple):
    """A crash point, at its how manieth pass, kill or stop (and for how long), and the order's fault.

    of_exit: the fault is of the stop, or of its cancel when the position is closed.
    """

    point: str
    passes: int
    action: str
    stop_s: float
    fault: str
    of_exit: bool = False

    def __str__(self) -> str:
        how = f"stop {self.stop_s} s" if self.action == "stop" else "kill"
        return f"{self.point} at pass {self.passes}, {how}, {self.fault}{' of the exit' * self.of_exit}"


class Lane(Appliance):
    """One account on one paper exchange, with all processes under the supervisor.

    is_limited: the exchange counts requests; with a comparison each second they would be too many.
    """

    def __init__(self, folder: Path, *, is_limited: bool = False, **overrides: Any) -> None:
        folder.mkdir()
        self.wish_file, self.plan = folder / "wish", folder / "plan"
        self.wish_file.write_text("")
        tables = {name: dict(table) for name, table in CONFIG.items()}
        tables["strategy"] = overrides.pop("strategy", None) or {"levels": {
            "class": "tests.wishes:WishStrategy", "settings": {"wish": str(self.wish_file)},
            "signal_ttl_ms": 1_500 * SLOW, "resend_ms": 100, "signals_per_s_max": 100}}
        super().__init__(folder, **{**tables, **overrides})
        self.nursery: subprocess.Popen | None = None
        self._instead = () if is_limited else ("paper=tests.unlimited",)
        self.fired = self.unfired = 0
        self._turn, self._is_thawed = 0, False

    def __enter__(self) -> "Lane":
        with open(self.path.parent / "nursery.log", "ab") as log:
            self.nursery = subprocess.Popen(
                [sys.executable, "-m", "tests.nursery", str(self.path), *self._instead], cwd=ROOT,
                stdin=subprocess.PIPE, stdout=log, stderr=log,
                env=os.environ | {"TRADEHOST_CRASH": str(self.plan)})
        return self

    def __exit__(self, *_: object) -> None:
        assert self.nursery is not None and self.nursery.stdin is not None
        self.nursery.stdin.close()
        self.nursery.wait(20)

    def start(self, *names: str) -> None:
        self.tell(*(f"start {name}" for name in names))

    def tell(self, *commands: str) -> None:
        """Command the supervisor."""
        assert self.nursery is not None and self.nursery.stdin is not None
        self.nursery.stdin.write("".join(f"{c}\n" for c in commands).encode())
        self.nursery.stdin.flush()

    def pid(self, name: str) -> int:
        """Return the pid of a process that is running."""
        def find() -> int:
            try:
                return json.loads((self.path.parent / "pids.json").read_text()).get(name, 0)
            except OSError:
                return 0
        return wait_until(find)

    def signal(self, name: str, number: int) -> None:
        """Send a signal to a process; it may just have died."""
        try:
            os.kill(self.pid(name), number)
        except ProcessLookupError:
            pass

    def begin(self) -> None:
        """Start everything and wait until it trades."""
        self.start("paper", "gateway", "executor", "strategy-levels")
        self.wait_running()

    def wish(self, text: str) -> None:
        part = self.wish_file.with_suffix(".part")
        part.write_text(text)
        os.replace(part, self.wish_file)

    def run(self, case: Case) -> None:
        """Play one case; raises AssertionError, naming the case, for whatever does not hold."""
        self._turn += 1
        qty = Decimal("0.010") if self._turn % 2 else Decimal("-0.010")
        stop = Decimal(round(self._mark() * (0.9 if qty > 0 else 1.1))) + self._turn % 7
        is_at_close = "cancel" in case.point or self._turn % 3 == 0 or (
            case.fault == "duplicate" and not case.of_exit)
        if case.of_exit and case.point.startswith("sender.answer"):
            is_at_close = False  # only there the stop is the second that it sends
        try:
            if is_at_close:
                self._reach(qty, stop)
            match = "POST /fapi/v1/order"
            if case.of_exit:
                match = f"{'DELETE' if is_at_close else 'POST'} /fapi/v1/algoOrder"
            self._arm(case, match)
            self._reach(Decimal(0) if is_at_close else qty, stop, case)
            self._disarm(case)
            if not is_at_close:
                self._reach(Decimal(0), stop)
        except AssertionError as error:
            raise AssertionError(f"{case}{' (closing)' if is_at_close else ''}: {error}; "
                                 f"{self.path.parent}; {self.status()}") from error
        self.check()

    def _arm(self, case: Case, match: str) -> None:
        self._control("DELETE", "/paper/faults")
        if fault := FAULTS[case.fault]:
            self._control("POST", "/paper/faults", {"match": match, **fault})
        self._is_thawed = False
        part = self.plan.with_suffix(".part")
        part.write_text(f"{case.point} {case.passes} {case.action}")
        os.replace(part, self.plan)
        if case.point == "executor.epoch_begun":
            self.signal("executor", signal.SIGKILL)

    def _disarm(self, case: Case) -> None:
        # What happens on a timer may come a little later.
        deadline = time.monotonic() + (1.5 if case.point == "reconciler.compared" else 0)
        while self.plan.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        if self.plan.exists():
            self.plan.unlink(missing_ok=True)
            self.unfired += 1
        else:
            self.fired += 1
            if case.action == "stop" and not self._is_thawed:  # all was settled before it froze
                wait_until(lambda: self._is_frozen(case))
                self._thaw(case)

    def _reach(self, qty: Decimal, stop: Decimal, case: Case | None = None) -> None:
        # The strategy wants it; nobody helps. A process that was frozen goes on after its time.
        self.wish(f"{qty} {stop}" if qty else "0")
        deadline, thaw = time.monotonic() + SETTLE_S_MAX, 0.0
        told = ""
        while told != "settled":
            if case is not None and self._is_frozen(case):
                thaw = thaw or time.monotonic() + case.stop_s
                if time.monotonic() > thaw:
                    self._thaw(case)
                    thaw = 0.0
            told = "frozen" if thaw else self._state(qty)
            assert time.monotonic() < deadline, f"{qty} was not reached: {told}"
            if told != "settled":
                time.sleep(0.03)

    def _is_frozen(self, case: Case) -> bool:
        if case.action != "stop" or self.plan.exists():
            return False
        try:
            stat = Path(f"/proc/{self.pid(OWNER[case.point.partition('.')[0]])}/stat").read_text()
        except FileNotFoundError:
            return False
        return stat.rpartition(")")[2].split()[0] == "T"

    def _thaw(self, case: Case) -> None:
        self._is_thawed = True
        self.signal(OWNER[case.point.partition(".")[0]], signal.SIGCONT)

    def _state(self, qty: Decimal) -> str:
        try:
            held, stops = self.exchange_position(), self.open_stops()
        except OSError as error:
            return f"the exchange is away: {error}"
        book = self.books().book(BTC)
        if held != qty or book.position_qty != qty or book.signals or book.working():
            return f"exchange {held}, journal {book.position_qty}, signals {book.signals}, {book.working()}"
        wanted = [abs(qty)] if qty else []
        if [Decimal(s["quantity"]) for s in stops] != wanted:
            return f"stops {stops}"
        return "settled" if not book.locks else f"locked {book.locks}"

    def books(self):
        with closing(self.journal()) as journal:
            return journal.books()

    def check(self) -> None:
        """Assert what holds after every case."""
        orders = self.exchange_orders()
        algos = [algo for algo in self.ask("GET", "/fapi/v1/allAlgoOrders", symbol="BTCUSDT", limit=1000)
                 if not algo["clientAlgoId"].startswith(CANARY_PREFIX)]  # which is no intent
        trades = self.ask("GET", "/fapi/v1/userTrades", symbol="BTCUSDT", limit=1000)
        names = [o["clientOrderId"] for o in orders] + [o["clientAlgoId"] for o in algos]
        assert len(names) == len(set(names)), "an intent became two orders"
        made = {o["clientOrderId"]: o["time"] for o in orders} | {
            o["clientAlgoId"]: o["createTime"] for o in algos}
        with closing(sqlite3.connect(self.config.path(self.config.journal.path))) as db:
            intents = dict(db.execute("SELECT key, ts_ns FROM events WHERE kind = 'intent'"))
            signals, outcomes = ({k for k, in db.execute("SELECT key FROM events WHERE kind = ?", (kind,))}
                                 for kind in ("signal", "outcome"))
            count, = db.execute("SELECT count(*) FROM events WHERE kind = 'outcome'").fetchone()
        for name, time_ms in made.items():
            assert name in intents, f"the exchange has {name}, which was never intended"
            assert intents[name] // 1_000_000 <= time_ms, f"{name} was at the exchange before the journal"
        assert signals == outcomes and count == len(outcomes), "each signal has exactly one outcome"
        executed = sum(Decimal(t["qty"]) * (1 if t["side"] == "BUY" else -1) for t in trades)
        if len(trades) < 1_000:
            assert executed == self.exchange_position() == self.our_position()
        status = self.status()
        assert not status["halted"] and not status["locked_symbols"], status
        # A stop that was lost has another beside it; what became of it is known by the end at the latest.
        assert not [o for o in self.books().book(BTC).unknown() if not o.request.is_conditional], status

    def verify(self) -> int:
        """Assert that nothing is left unacknowledged and the journal is whole; return its events."""
        wait_until(lambda: self._beat("strategy-levels").get("outbox") == 0)
        wait_until(lambda: not self.books().book(BTC).unknown(), 30)
        return self.verify_chain()

    def verify_chain(self) -> int:
        """Assert that the hash chain is whole and folds to the same books; return the events."""
        self.signal("executor", signal.SIGSTOP)  # so that both looks are at the same journal
        try:
            with closing(self.journal()) as journal:
                assert journal.verify().encode() == journal.books().encode()
                return sum(journal.counts().values())
        finally:
            self.signal("executor", signal.SIGCONT)

    def _beat(self, name: str) -> dict[str, Any]:
        return json.loads((self.config.run_path(name) / f"{name}.json").read_text())

    def _control(self, method: str, path: str, body: Any = None) -> None:
        wait_until(lambda: self._is_done(method, path, body), 20)

    def _is_done(self, method: str, path: str, body: Any) -> bool:
        try:
            self.control(method, path, body)
            return True
        except (OSError, ValueError):
            return False

    def _mark(self) -> float:
        def ask() -> float:
            try:
                return float(self._http("GET", "/fapi/v1/premiumIndex?symbol=BTCUSDT", None)["markPrice"])
            except OSError:
                return 0.0
        return wait_until(ask, 20)


def random_case(point: str, action: str, fault: str, chance: random.Random) -> Case:
    """Return the case with a pass and a length of stop drawn from what matters there."""
    often = point.partition(".")[0] in ("keeper", "paper") or "cycle" in point
    # Frozen past the fence, the order is not executed: then only an operator may go on after these.
    stops = (0.2,) if fault in ("408_1007", "503") else (0.2, FENCE_S + 0.3)
    passes = chance.randint(1, 6) if often else 1
    # An executor that starts again begins with a canary, which would take the fault of a stop still to come.
    is_kept = point != "executor.epoch_begun" and (
        action == "stop" or OWNER[point.partition(".")[0]] != "executor")
    is_stops = point in ("sender.answered", "sender.answer_recorded")
    of_exit = (is_kept or is_stops) and chance.random() < EXIT_SHARE
    return Case(point, 2 if of_exit and is_stops else passes, action, chance.choice(stops), fault, of_exit)
