"""The runbook as somebody reads it at night.

For each alert: its fault is put into a running appliance with its monitoring, the alert arrives, what the
section says is read from the page and typed, and all is well again. What has to end outside of this host (the
exchange answers again, there is room on the disk) ends with the fault's block. Long `for` of what is not
money are scaled; ops/prometheus/alerts_test.yml proves the shipped ones.
"""

import json
import os
import re
import resource
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, NamedTuple

import pytest
import zmq

from bot.backup import STATUS
from tests.appliance import BTC, Signaler
from tests.drill.test_exhaustion import clock_step, starved
from tests.drill.test_flatten import mark
from tests.harness import ROOT, SLACK, wait_until
from tests.monitoring import needs_monitoring
from tests.night import QTY, Night, seconds_since
from tests.runbook import commands, section

PAGE = ROOT / "docs" / "drills.md"
pytestmark = [needs_monitoring,
              pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")]
Fault = Callable[[Night], AbstractContextManager[float | None]]  # yields when it happened, or now
STREAMS = ("trade", "bookTicker", "markPrice@1s")
REFUSED = {"status": 400, "code": -4120, "text": "Order type not supported for this endpoint."}


@contextmanager
def stops_are_refused_at_an_entry(it: Night) -> Iterator[float]:
    it.flat()
    with it.answers("POST /fapi/v1/algoOrder", **REFUSED):
        it.mode("hold")
        wait_until(lambda: it.appliance.exchange_position() != 0, 30)
        began = time.time()
        wait_until(lambda: it.type("botctl status") == 0 and f"UNPROTECTED {BTC}" in it.said, 5, 0.1)
        assert "(NOT AT THE EXCHANGE)" in it.said
        yield began


@contextmanager
def somebody_halts(it: Night) -> Iterator[float]:
    began = time.time()
    it.type("botctl halt --reason drill")
    yield began


@contextmanager
def mark_moved(it: Night, pct: float) -> Iterator[None]:
    it.control("/paper/mark", {"symbol": "BTCUSDT", "offset_pct": pct})
    try:
        yield
    finally:
        it.control("/paper/mark", {"symbol": "BTCUSDT", "offset_pct": 0})


def most_of_a_days_loss(it: Night) -> AbstractContextManager[None]:
    return mark_moved(it, -2.1)  # of 600 USDT held, against a day_loss_max of 15


def a_whole_days_loss(it: Night) -> AbstractContextManager[None]:
    return mark_moved(it, -4)


@contextmanager
def margin_is_short(it: Night) -> Iterator[None]:
    it.hold()
    yield


@contextmanager
def an_order_is_lost_on_its_way(it: Night) -> Iterator[None]:
    it.flat()
    it.control("/paper/faults", {"match": "POST /fapi/v1/order", "do": "lose_request"})
    it.mode("hold")
    wait_until(lambda: it.run.status()["unknown_orders"], 20)
    yield


@contextmanager
def somebody_trades_by_hand(it: Night) -> Iterator[None]:
    it.control("/paper/trade", {"account": "main", "symbol": "BTCUSDT", "side": "BUY", "qty": "0.005"})
    yield


@contextmanager
def somebody_halts_a_symbol(it: Night) -> Iterator[float]:
    began = time.time()
    it.type("botctl halt --symbol SYMBOL --reason drill")
    yield began


@contextmanager
def stops_are_refused_at_a_start(it: Night) -> Iterator[None]:
    with it.answers("POST /fapi/v1/algoOrder", **REFUSED):
        it.type("supervisorctl restart executor")
        yield


@contextmanager
def executor_is_stopped(it: Night) -> Iterator[None]:
    it.type("supervisorctl stop executor")
    yield


@contextmanager
def executor_is_stopped_for_long(it: Night) -> Iterator[None]:
    it.type("supervisorctl stop executor")
    wait_until(lambda: it.appliance.beats()["guard"]["dead_man_fired"], 90, 0.2)
    yield


@contextmanager
def somebody_flattens(it: Night) -> Iterator[float]:
    began = time.time()
    command = ["bash", "-c", "botctl flatten --reason drill"]
    flattening = subprocess.Popen(command, env=it.env, stdout=subprocess.DEVNULL, cwd=ROOT)
    wait_until(lambda: it.appliance.beats()["guard"]["flattens"], 20)
    yield began
    assert flattening.wait(120) == 0
    wait_until(lambda: it.run.pid("executor"), 40)


@contextmanager
def exchange_answers_no_question(it: Night) -> Iterator[None]:
    with it.answers("GET /fapi/v1/openOrders", 503, -1008, "Server is currently overloaded"):
        it.control("/paper/stream", {"match": "user:main", "do": "close"})
        yield


def clock_is_far_off(it: Night) -> AbstractContextManager[None]:
    return clock_step(it.run)


@contextmanager
def clock_is_a_little_off(it: Night) -> Iterator[None]:
    it.control("/paper/clock", {"offset_ms": 350})
    try:
        yield
    finally:
        it.control("/paper/clock", {"offset_ms": 0})


@contextmanager
def again_and_again(what: Callable[[], object], every_s: float) -> Iterator[None]:
    ends = threading.Event()

    def loop() -> None:
        while not ends.is_set():
            what()
            ends.wait(every_s)
    thread = threading.Thread(target=loop)
    thread.start()
    try:
        yield
    finally:
        ends.set()
        thread.join()


def feed_stands_still(it: Night) -> AbstractContextManager[None]:
    def freeze() -> None:  # also the connections made meanwhile, before a mark comes through
        for stream in STREAMS:
            it.control("/paper/stream", {"match": f"btcusdt@{stream}", "do": "freeze", "duration_ms": 5_000})
    return again_and_again(freeze, 0.1)


def streams_break(it: Night) -> AbstractContextManager[None]:
    def close() -> None:
        for stream in STREAMS:
            it.control("/paper/stream", {"match": f"btcusdt@{stream}", "do": "close"})
    return again_and_again(close, 3)


@contextmanager
def gateway_stumbles(it: Night) -> Iterator[None]:
    # What it has not read meanwhile comes all at once, more than the queue holds.
    pid = it.run.pid("gateway")

    def stumble() -> None:
        os.kill(pid, signal.SIGSTOP)
        time.sleep(2)
        os.kill(pid, signal.SIGCONT)
    with again_and_again(stumble, 1):
        yield


@contextmanager
def executor_is_starved(it: Night) -> Iterator[None]:
    it.mode("restless")
    with starved(it.run):
        yield


@contextmanager
def orders_are_answered_late(it: Night) -> Iterator[None]:
    it.mode("restless")
    it.control("/paper/faults", {"match": "POST /fapi/v1/order", "do": "delay_answer", "delay_ms": 1_500,
                                 "times": 10**6})
    try:
        yield
    finally:
        it.appliance.control("DELETE", "/paper/faults")


def requests_are_nearly_used_up(it: Night) -> AbstractContextManager[None]:
    # Night lifts the limit to a million, for what a drill asks; the executor may know it before or after.
    return it.answers("GET /fapi/v1/openOrders", body="[]", headers={"X-MBX-USED-WEIGHT-1M": "950000"})


@contextmanager
def executor_hangs(it: Night) -> Iterator[None]:
    it.mode("restless")
    pid = it.run.pid("executor")
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


@contextmanager
def orders_are_rejected(it: Night) -> Iterator[None]:
    it.flat()
    with it.answers("POST /fapi/v1/order", 400, -2019, "Margin is insufficient."):
        it.mode("restless")
        yield


@contextmanager
def signals_are_off_the_grid(it: Night) -> Iterator[None]:
    it.flat()
    played = Signaler(it.appliance)
    try:
        played.position()
        with again_and_again(lambda: played.send(played.signal("0.0105", mark=mark(it.appliance))), 0.2):
            yield
    finally:
        played.close()


@contextmanager
def stop_is_on_the_wrong_side(it: Night) -> Iterator[None]:
    it.flat()
    it.mode("wrong")
    yield
    it.mode("flat")


@contextmanager
def junk_on_the_bus(it: Night) -> Iterator[None]:
    with zmq.Context() as context, context.socket(zmq.PUSH) as push:
        push.connect(it.appliance.config.bus.signals.endpoint)
        push.send(b"junk")
        yield


@contextmanager
def gateway_is_stopped(it: Night) -> Iterator[None]:
    it.type("supervisorctl stop gateway")
    yield


@contextmanager
def strategy_is_killed_three_times(it: Night) -> Iterator[None]:
    for _ in range(3):
        pid = wait_until(lambda: it.run.pid("strategy-levels"), 40)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda pid=pid: it.run.pid("strategy-levels") not in (None, pid), 40)
    yield


@contextmanager
def strategy_swells(it: Night) -> Iterator[None]:
    os.kill(it.run.pid("strategy-levels"), signal.SIGUSR2)
    yield


@contextmanager
def descriptors_run_out(it: Night) -> Iterator[None]:
    pid = it.run.pid("gateway")
    used, (_, hard) = len(os.listdir(f"/proc/{pid}/fd")), resource.prlimit(pid, resource.RLIMIT_NOFILE)
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used + 1, hard))
    yield


@contextmanager
def disk_is_short(it: Night) -> Iterator[None]:
    ballast = it.appliance.config.state_path / "ballast"
    with open(ballast, "wb") as file:
        os.posix_fallocate(file.fileno(), 0, 400_000_000)
    yield
    ballast.unlink()


@contextmanager
def disk_fills(it: Night) -> Iterator[None]:
    ballast = it.appliance.config.state_path / "ballast"
    with open(ballast, "wb") as file, again_and_again(
            lambda: os.posix_fallocate(file.fileno(), 0, file.seek(1_000_000, os.SEEK_CUR)), 1):
        yield
    ballast.unlink()


@contextmanager
def receiver_is_away(it: Night) -> Iterator[float]:
    began = time.time()
    it.monitoring.receiver.status = 500
    try:
        it.type("botctl halt --symbol SYMBOL --reason drill")  # something to be told
        wait_until(lambda: it.fires("AlertsUndelivered"), 60, 0.5)
    finally:
        it.monitoring.receiver.status = 200
    it.type("botctl resume --symbol SYMBOL")
    yield began


@contextmanager
def backup_is_of_yesterday(it: Night) -> Iterator[None]:
    path = it.appliance.config.path("backup") / STATUS
    status = json.loads(path.read_bytes())
    status["newest"]["made_ns"] -= 30 * 3_600 * 10**9
    path.write_text(json.dumps(status))
    yield


@contextmanager
def backup_rots(it: Night) -> Iterator[None]:
    path = max(it.appliance.config.path("backup").glob("*.age"))
    raw = bytearray(path.read_bytes())
    raw[-20] ^= 0xFF
    path.write_bytes(raw)
    it.type("botctl backup make")  # the night's run looks at all that are kept
    yield
    path.unlink()  # set aside, as the page says
    path.with_suffix(".json").unlink()


class Drill(NamedTuple):
    """fault: put in, and ended where there is nothing to type; steps: lines of the mitigation to type.

    within_s: from the fault to the message, on a machine of its own, with the rules' `for` as scaled.
    is_first: the fault goes on until the steps were typed. muted_by: another alert stands for this one in
    messages.
    """

    fault: Fault
    within_s: float
    steps: int = 1
    program: str = "executor"
    is_first: bool = False
    muted_by: str = ""
    group: str = "usual"


GROUPS: dict[str, dict[str, Any]] = {
    "usual": {},
    "loss": {"limits": {"day_loss_max": 15}},
    "poor": {"paper": {"latency_ms": 1, "accounts": {"main": {"balance": 55}}}},
    "narrow": {"bus": {"ticks": {"hwm": 16}}},
}
DRILLS = {
    "PositionUnprotected": Drill(stops_are_refused_at_an_entry, 7, is_first=True),
    "TradingHalted": Drill(somebody_halts, 5),
    "OrderUnknown": Drill(an_order_is_lost_on_its_way, 15),
    "SymbolLocked": Drill(somebody_trades_by_hand, 7),
    "SymbolHalted": Drill(somebody_halts_a_symbol, 7),
    "StopsRefused": Drill(stops_are_refused_at_a_start, 45, steps=0),
    "ExecutorDown": Drill(executor_is_stopped, 20),
    "DeadManFired": Drill(executor_is_stopped_for_long, 5, muted_by="ExecutorDown"),
    "Flattened": Drill(somebody_flattens, 5, steps=2),
    "NotReconciled": Drill(exchange_answers_no_question, 70),
    "BooksDiffer": Drill(somebody_trades_by_hand, 55, muted_by="SymbolLocked"),
    "TradingReduced": Drill(clock_is_far_off, 20),
    "FeedStale": Drill(feed_stands_still, 20),
    "FeedReconnecting": Drill(streams_break, 40, program="gateway"),
    "TickToOrderSlow": Drill(executor_is_starved, 60, program="strategy-levels"),
    "ExchangeSlow": Drill(orders_are_answered_late, 60),
    "ExchangeLimitNear": Drill(requests_are_nearly_used_up, 20),
    "ClockOffset": Drill(clock_is_a_little_off, 20),
    "SignalsUnacknowledged": Drill(executor_hangs, 20, steps=2),
    "OrdersRejected": Drill(orders_are_rejected, 40),
    "SignalsDenied": Drill(signals_are_off_the_grid, 40),
    "TargetsRefused": Drill(stop_is_on_the_wrong_side, 40),
    "MessagesDropped": Drill(junk_on_the_bus, 15),
    "ProcessDown": Drill(gateway_is_stopped, 15, program="gateway"),
    "ProcessCrashing": Drill(strategy_is_killed_three_times, 15, program="strategy-levels"),
    "ProcessKilled": Drill(strategy_swells, 20, program="strategy-levels"),
    "ProcessOverloaded": Drill(descriptors_run_out, 30, program="gateway"),
    "HostShort": Drill(disk_is_short, 30, steps=0),
    "DiskFilling": Drill(disk_fills, 120),
    "BackupOld": Drill(backup_is_of_yesterday, 40),
    "BackupBad": Drill(backup_rots, 40),
    "AlertsUndelivered": Drill(receiver_is_away, 90),
    "DayLossNear": Drill(most_of_a_days_loss, 10, steps=2, group="loss"),
    "DayLossLimit": Drill(a_whole_days_loss, 10, group="loss", is_first=True),
    "LiquidationNear": Drill(margin_is_short, 10, steps=3, group="poor"),
    "TicksLost": Drill(gateway_stumbles, 30, program="strategy-levels", group="narrow"),
}
# Of the other sections, those whose lines need no host, no second configuration and no backup.
PLANNED = ("Halt and resume", "Flatten", "Cancel", "Look", "Silence alerts")


class Nights:
    """One appliance for all drills of a group, one after the other; each leaves it as it was."""

    def __init__(self, factory: pytest.TempPathFactory) -> None:
        self._factory, self._group, self._night = factory, "", None

    def get(self, group: str) -> Night:
        if group != self._group:
            self.end()
            folder = self._factory.mktemp(group)
            (folder / "var").mkdir()  # a disk of its own, that can be filled
            subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4g,mode=0755", "tmpfs", folder / "var"],
                           check=True)
            self._group, self._night = group, Night(folder, GROUPS[group])
            self._night.__enter__()
        return self._night

    def end(self) -> None:
        if self._night is not None:
            self._night.__exit__()
            subprocess.run(["umount", "-l", self._night.appliance.config.state_path], check=True)
        self._group, self._night = "", None


@pytest.fixture(scope="module")
def all_nights(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Nights]:
    nights = Nights(tmp_path_factory)
    yield nights
    nights.end()


@pytest.fixture
def nights(all_nights: Nights, request: pytest.FixtureRequest) -> Iterator[Nights]:
    failed = request.session.testsfailed
    yield all_nights
    if request.session.testsfailed > failed:
        all_nights.end()  # what a drill left that failed is not the next one's


def type_all(it: Night, lines: list[str], drill: Drill, codes: tuple[int, ...]) -> None:
    for line in lines:
        if not line.startswith(("botctl", "supervisorctl", "timeout")):
            it.type(line)  # the host's own: there or not, it says what it says
            continue
        # Refused just now, while an order is on its way: the page says "again".
        try:
            wait_until(lambda line=line: it.type(line, drill.program) in codes, 10, 1)
        except AssertionError:
            raise AssertionError(f"{line}: {it.said}") from None
        assert "Traceback" not in it.said, it.said


def play(it: Night, alert: str, drill: Drill) -> str:
    """Go through one night; return its line of the table."""
    page = section(alert)
    (it.flat if drill.group == "poor" else it.hold)()
    wait_until(lambda: not it.fires(alert), 60, 0.5)
    with drill.fault(it) as at:
        began = at or time.time()
        if drill.muted_by:
            wait_until(lambda: it.fires(alert), drill.within_s)
        else:
            it.monitoring.wait_alert(alert, drill.within_s, since=began - 1)
        detected_s = seconds_since(began)
        type_all(it, commands(page.part("Diagnosis")), drill, (0, 1, 3))  # 3: supervisorctl, not all run
        if drill.is_first:
            type_all(it, page.steps()[:drill.steps], drill, (0,))
    if not drill.is_first:
        type_all(it, page.steps()[:drill.steps], drill, (0,))
    it.mode("hold")
    for line in page.typed_after("Undo"):
        if line.startswith("botctl resume"):
            it.type(line)  # 1: it was not halted
    if not drill.muted_by:
        it.monitoring.wait_resolved(alert, 120, since=began)
    wait_until(lambda: not it.fires(alert), 60, 0.2)
    it.wait_running(60)
    recovered_s = seconds_since(began) - detected_s
    type_all(it, page.typed_after("Verify"), drill, (0,))
    assert "NOT AT THE EXCHANGE" not in it.said and "UNPROTECTED" not in it.said, it.said
    assert not it.run.status()["halted"]
    (it.flat if drill.group == "poor" else it.hold)()
    it.assert_balanced()
    assert detected_s <= drill.within_s * SLACK, f"{alert} came after {detected_s:.0f} s"
    typed = ", ".join(f"`{line}`" for line in page.steps()[:drill.steps]) or "nothing: it ends by itself"
    fault = drill.fault.__name__.replace("_", " ")
    return f"| {alert} | {fault} | {detected_s:.1f} | {typed} | {recovered_s:.0f} |"


def keep(alert: str, row: str) -> None:
    """Write the row into docs/drills.md, in the place it has in the table."""
    head = PAGE.read_text(encoding="utf-8").split("\n|")[0]
    rows = dict(re.findall(r"^(?=\| (\w+) )(.+)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE))
    rows[alert] = row
    lines = [rows[name] for name in ("Alert", *DRILLS, "Watchdog") if name in rows]
    lines.insert(1, "| --- | --- | --- | --- | --- |")
    PAGE.write_text(head + "\n" + "\n".join(lines) + "\n", encoding="utf-8")


@pytest.mark.drill
@pytest.mark.parametrize("alert", DRILLS)
def test_alert_with_its_fault_arrives_and_the_section_mends_it(nights, alert):
    row = play(nights.get(DRILLS[alert].group), alert, DRILLS[alert])
    print("\n" + row)
    if os.environ.get("TRADEHOST_KEEP_DRILLS"):
        keep(alert, row)


@pytest.mark.drill
def test_watchdog_that_stays_away_comes_again_with_what_sends_it(nights):
    it, page = nights.get("usual"), section("Watchdog")
    every_s = 15  # 10 here, and a group's interval
    it.monitoring.wait_alert("Watchdog", 60)
    it.monitoring.stop("prometheus-alertmanager")
    began = time.time()
    time.sleep(every_s)
    assert not it.monitoring.receiver.last("Watchdog", "firing", began + 1), "nothing told for it"
    for line in [*commands(page.part("Diagnosis")), *page.steps()]:
        it.type(line)
    mended = time.time()
    it.monitoring.start_alertmanager()
    it.monitoring.wait_alert("Watchdog", 60, since=mended)
    row = (f"| Watchdog | the Alertmanager ends, and nothing comes | {every_s} | `{page.steps()[0]}` "
           f"| {seconds_since(mended):.0f} |")
    print("\n" + row)
    if os.environ.get("TRADEHOST_KEEP_DRILLS"):
        keep("Watchdog", row)


@pytest.mark.drill
def test_emergency_lines_of_the_page_halt_look_and_flatten(nights):
    it = nights.get("usual")
    it.hold()
    halt, look, flatten = section("Emergency / 緊急處理").commands()
    assert it.type(halt) == 0 and it.run.status()["state"] == "HALTED"
    assert it.appliance.exchange_position() == QTY, "a halt closes nothing"
    assert it.type(look) == 0 and "HALTED" in it.said and "0.01" in it.said
    assert it.type(flatten) == 0 and "flat" in it.said
    assert it.appliance.exchange_position() == 0 and not it.appliance.open_stops()
    wait_until(lambda: it.run.pid("executor") and it.appliance.our_position() == 0, 40)
    time.sleep(3)
    assert it.run.status()["state"] == "HALTED" and it.appliance.exchange_position() == 0
    it.assert_balanced()
    it.type("botctl resume")
    it.hold()


@pytest.mark.drill
@pytest.mark.parametrize("name", PLANNED)
def test_section_on_planned_work_with_its_lines_typed_does_it(nights, name):
    it = nights.get("usual")
    it.hold()
    signal = it.appliance.journal().newest("signal", 1)[0].event.key
    for line in section(name).commands():
        if "--watch" in line:
            line = f"timeout --preserve-status --signal=INT 5 {line}"
        codes = (0, 1) if line == "botctl alert unsilence" else (0,)  # 1: nothing is silenced any more
        type_all(it, [line.replace(" ID", f" {signal}")], DRILLS["SymbolHalted"], codes)
    for scope in ("--strategy NAME", "--symbol SYMBOL", ""):
        it.type(f"botctl resume {scope}")
    it.hold()
    it.assert_balanced()


@pytest.mark.drill
def test_section_on_what_no_tool_can_mend_closes_in_the_app_and_adopts(nights):
    it, page = nights.get("usual"), section("What no tool can mend")
    it.hold()
    with it.answers("* /fapi/*", 401, -2015, "Invalid API-key, IP, or permissions for action"):
        assert [it.type(line) for line in page.commands()[:2]] == [0, 0] and "0.01" in it.said
        it.control("/paper/trade", {  # the button in the exchange's app
            "account": "main", "symbol": "BTCUSDT", "side": "SELL", "qty": str(QTY), "reduce_only": True})
    wait_until(lambda: it.run.status()["locked_symbols"], 30)
    for line in page.commands()[2:]:
        codes = (0, 1) if "reconcile" in line else (0,)  # it says no: that is what differs
        type_all(it, [line.replace("BTC/USDT:USDT", BTC)], DRILLS["SymbolLocked"], codes)
    it.hold()
    it.assert_balanced()
