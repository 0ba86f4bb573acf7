"""What each supervisorctl verb does to orders and positions: RUNBOOK.md's table, line by line."""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from decimal import Decimal

import psutil
import pytest

from bot.errors import EXIT_SOFTWARE
from tests.appliance import BTC
from tests.faults import FaultyRun
from tests.harness import ROOT, wait_until

SEED = 20_251_312  # plays each of SYSTEMD
SEQUENCES = 10
VERBS = ("restart executor", "restart gateway", "restart strategy-levels", "restart health", "stop executor",
         "stop gateway", "stop strategy-levels", "update", "reread", "signal HUP executor",
         "signal HUP gateway", "signal KILL executor", "stop all", "restart all", "reload")
# What a service manager does, and what happens to it: who gets which signal. What ended is started again, as
# `systemctl start` or its Restart= does; under `make run` that is a person.
SYSTEMD = {"systemctl restart": ("supervisord", signal.SIGTERM),
           "systemctl reload": ("supervisord", signal.SIGHUP),
           "supervisord killed": ("supervisord", signal.SIGKILL),
           "Ctrl-C": ("run", signal.SIGINT), "make run killed": ("run", signal.SIGKILL)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyRun]:
    # One appliance for all, each test leaves it trading. Kills are no crash loop here: sequences kill.
    with FaultyRun(tmp_path_factory.mktemp("ctl"),
                   health={"restarts_max": 1_000, "restarts_per_day_max": 49}) as run:
        run.wait_trading()
        yield run


def ctl(run: FaultyRun, words: str) -> str:
    """Run supervisorctl as an operator does."""
    socket = run.appliance.config.path("run/supervisor.sock")
    done = subprocess.run([sys.executable, "-m", "supervisor.supervisorctl", "-s", f"unix://{socket}",
                           *words.split()], capture_output=True, text=True, timeout=90, cwd=ROOT)
    return done.stdout + done.stderr


def processes(run: FaultyRun) -> dict[int, str]:
    """Return every process on this machine that is a program of this appliance, whoever's child it is."""
    found = {}
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
        if str(run.appliance.path) in words and module.startswith("bot.") and module != "bot.run":
            found[process.pid] = module.removeprefix("bot.")
    return found


def executors(run: FaultyRun) -> list[int]:
    return [pid for pid, name in processes(run).items() if name == "executor"]


def supervisord(run: FaultyRun) -> int:
    return int((run.folder / "var" / "run" / "supervisord.pid").read_text())


def assert_one_truth(run: FaultyRun) -> None:
    """Books and exchange agree, no order is doubled or nobody's, no position without stop, one executor."""
    def agree() -> bool:
        if not run.is_settled():
            return False
        book = run.appliance.journal().books().book(BTC)
        stops = len(run.appliance.open_stops())
        return book.position_qty == run.appliance.exchange_position() and stops == (book.position_qty != 0)
    wait_until(agree, 40, 0.1)
    orders = run.appliance.exchange_orders()
    names = [o["clientOrderId"] for o in orders]
    assert len(names) == len(set(names))
    plain = [run.appliance.journal().find("intent", name) for name in names]
    assert all(plain), "an order that the journal does not know"
    trades = run.appliance.ask("GET", "/fapi/v1/userTrades", symbol="BTCUSDT", limit=1000)
    executed = sum(Decimal(t["qty"]) * (1 if t["side"] == "BUY" else -1) for t in trades)
    assert len(trades) == 1_000 or executed == run.appliance.exchange_position()
    ours = processes(run)
    assert len(set(ours.values())) == len(ours), f"twice: {ours}"
    assert set(ours) <= {p.pid for p in psutil.Process(run.process.pid).children(recursive=True)}, "orphans"
    assert not run.status()["halted"]


def start_all(run: FaultyRun) -> None:
    ctl(run, "start all")
    run.wait_trading()
    assert len(executors(run)) == 1
    assert_one_truth(run)


def test_supervisorctl_restart_of_one_leaves_the_others_and_the_position(run):
    for name in ("executor", "gateway", "strategy-levels"):
        before = {n: run.pid(n) for n in ("executor", "gateway", "strategy-levels", "health", "guard")}
        said = ctl(run, f"restart {name}")
        assert f"{name}: stopped" in said and f"{name}: started" in said
        run.wait_trading()
        after = {n: run.pid(n) for n in before}
        assert {n for n in before if before[n] != after[n]} == {name}
    assert_one_truth(run)


def test_supervisorctl_stop_of_the_executor_keeps_position_and_stop_at_the_exchange(run):
    wait_until(lambda: run.appliance.open_stops(), 20)
    ctl(run, "stop executor")
    assert executors(run) == [] and run.status()["state"] == "DOWN"
    held, orders, stops = (run.appliance.exchange_position(), len(run.appliance.exchange_orders()),
                           len(run.appliance.open_stops()))
    time.sleep(3)
    assert (held, orders, stops) == (run.appliance.exchange_position(), len(run.appliance.exchange_orders()),
                                     len(run.appliance.open_stops()))
    assert stops == (held != 0) or stops == 1
    start_all(run)


def test_botctl_halt_that_cannot_be_written_stops_the_executor_for_good(run):
    block = run.folder / "var" / "halt" / "all.part"
    block.mkdir(parents=True)  # nothing can be written under this name
    done = subprocess.run([sys.executable, "-m", "bot.botctl", "halt", "--reason", "test",
                           "--config", str(run.appliance.path)], capture_output=True, text=True, cwd=ROOT,
                          timeout=60)
    block.rmdir()
    assert done.returncode == 1 and "the executor was stopped; it is not started again" in done.stderr, done
    assert executors(run) == [] and run.appliance.beats()["executor"]["ended"]
    time.sleep(3)
    assert executors(run) == [] and not run.status()["halted"]
    start_all(run)


def test_supervisorctl_stop_of_the_executor_waits_for_the_answer_to_an_order(run):
    def sent() -> list[str]:
        orders = run.appliance.journal().books().book(BTC).orders
        return [o.id for o in orders.values() if o.is_in_flight and not o.request.is_conditional]
    wait_until(lambda: not run.appliance.exchange_position() and run.is_settled(), 60, 0.02)  # next: an entry
    run.appliance.control("POST", "/paper/faults", {
        "match": "POST /fapi/v1/order", "do": "delay", "delay_ms": 2_000})
    name, = wait_until(sent, 20)
    wait_until(lambda: run.appliance.control("GET", "/paper/faults") == [])
    assert name not in [o["clientOrderId"] for o in run.appliance.exchange_orders()], "too slow"
    ctl(run, "stop executor")
    assert executors(run) == [] and run.appliance.beats()["executor"]["ended"]
    assert run.appliance.journal().books().book(BTC).orders[name].state == "FILLED"
    assert len(run.appliance.open_stops()) == (run.appliance.exchange_position() != 0)
    start_all(run)


def test_supervisorctl_start_of_the_executor_opens_nothing_until_the_books_are_compared(run):
    ctl(run, "stop executor")
    run.appliance.control("POST", "/paper/faults", {
        "match": "GET /fapi/v1/openOrders", "do": "lose_request", "times": 1_000})
    names = {o["clientOrderId"] for o in run.appliance.exchange_orders()}
    ctl(run, "start executor")
    wait_until(lambda: run.status()["state"] == "RECONCILING", 20)
    time.sleep(5)  # the strategy's next two or three signals wait
    assert run.status()["state"] == "RECONCILING"
    assert names == {o["clientOrderId"] for o in run.appliance.exchange_orders()}
    run.appliance.control("DELETE", "/paper/faults")
    start_all(run)


def test_supervisorctl_stop_of_gateway_or_strategy_opens_nothing_new(run):
    ctl(run, "stop gateway")
    wait_until(lambda: run.status()["state"] == "REDUCING", 3)
    assert_nothing_moves(run, "REDUCING")
    ctl(run, "start gateway")
    run.wait_trading()
    ctl(run, "stop strategy-levels")
    assert_nothing_moves(run, "RUNNING")
    start_all(run)


def at_exchange(run: FaultyRun) -> tuple:
    """Return position, number of orders and the stops at rest, as the exchange has them."""
    it = run.appliance
    return (it.exchange_position(), len(it.exchange_orders()),
            [stop["clientAlgoId"] for stop in it.open_stops()])


def assert_nothing_moves(run: FaultyRun, state: str) -> None:
    """Assert that position, orders and stops stay for some seconds, once what was on its way has ended."""
    wait_until(lambda: at_exchange(run)[0] == 0 or at_exchange(run)[2], 10)
    time.sleep(1)
    before = at_exchange(run)
    time.sleep(4)
    assert run.status()["state"] == state and at_exchange(run) == before
    assert bool(before[2]) == (before[0] != 0), "a position has its stop, and a stop its position"


def test_supervisorctl_update_reread_and_hup_restart_nothing(run):
    def pids() -> dict[str, int]:
        return {p["name"]: p["pid"] for p in run.status()["processes"]}
    before = pids()
    for words in ("reread", "update", "signal HUP executor", "signal HUP gateway", "signal HUP health"):
        ctl(run, words)
    time.sleep(2)
    assert pids() == before
    log = (run.folder / "var" / "log" / "executor.log").read_text()
    assert '"event": "config_reread"' in log
    run.wait_trading()
    assert_one_truth(run)


def test_supervisorctl_stop_all_and_reload_come_back_whole(run):
    # All but the exchange, which goes on without us, and is asked meanwhile.
    wait_until(lambda: run.appliance.open_stops(), 20)
    ctl(run, "stop " + " ".join(p["name"] for p in run.status()["processes"] if p["name"] != "paper"))
    assert executors(run) == [] and run.status()["state"] == "DOWN"
    assert_nothing_moves(run, "DOWN")
    before = at_exchange(run)
    ctl(run, "stop all")
    assert {p["state"] for p in run.status()["processes"]} == {"DOWN"}
    ctl(run, "start paper")
    wait_until(lambda: at_exchange(run) == before, 20, 0.5)
    start_all(run)
    before = run.pid("executor")
    play(run, "reload")  # supervisord ends all programs in order, reads its files again, starts all
    assert run.pid("executor") != before
    run.wait_trading()
    assert_one_truth(run)
    play(run, "systemctl reload")  # the same by signal
    run.wait_trading()
    assert_one_truth(run)


def play(run: FaultyRun, words: str) -> None:
    """Do one verb; where all end, wait until supervisord and an executor are there again."""
    before = starts(run)
    if words in SYSTEMD:
        who, number = SYSTEMD[words]
        os.kill(run.process.pid if who == "run" else supervisord(run), number)
    else:
        ctl(run, words)
    if words in SYSTEMD or words == "reload":
        wait_until(lambda: is_back(run, before), 60, 0.2)


def starts(run: FaultyRun) -> int:
    log = run.folder / "var" / "log" / "supervisord.log"
    return log.read_text().count("supervisord started with pid")


def is_back(run: FaultyRun, before: int) -> bool:
    if run.process.poll() is not None:
        run.start()  # at once, as somebody in a hurry does: refused while the programs of the last one end
    assert len(executors(run)) <= 1
    return starts(run) > before and run.pid("executor") is not None


@pytest.mark.parametrize("count", [1, pytest.param(SEQUENCES, marks=pytest.mark.drill)])
def test_supervisorctl_at_random_leaves_one_truth(run, count):
    dice, played = random.Random(SEED), set()
    for number in range(count):
        sequence = [dice.choice(list(SYSTEMD) if dice.random() < 0.3 else VERBS)
                    for _ in range(dice.randint(2, 4))]
        print(f"{number}: {', '.join(sequence)}")
        for words in sequence:
            play(run, words)
            time.sleep(dice.uniform(0, 2))
            assert len(executors(run)) <= 1
        start_all(run)
        played |= set(sequence)
    assert count < SEQUENCES or played >= {"reload", *SYSTEMD}, "the seed leaves one out"


def test_supervisorctl_shutdown_ends_the_run_and_the_next_one_goes_on(run):
    ctl(run, "shutdown")
    assert run.process.wait(30) == EXIT_SOFTWARE, "make run says that supervisord ended"
    assert executors(run) == []
    beats = run.appliance.beats()
    assert "strategy-levels" in beats and all(beat["ended"] for beat in beats.values())
    with run:
        run.wait_trading()
        assert_one_truth(run)
