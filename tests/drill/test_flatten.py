"""Flatten and the dead-man's switch, with everything else broken: real processes, the exchange's own truth.

Short: four rows of the matrix. Long: all of them, and the deadlines.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path

import pytest

from bot.flatten import HOLDER
from bot.halt import HaltFiles
from bot.journal import take_lock
from bot.orders import GUARD_PREFIX, PREFIX
from tests.appliance import BTC, Appliance, Signaler
from tests.harness import wait_until

FLAT_S_MAX = 60  # on a shared machine; each row prints what it took
QTY = Decimal("0.030")


def botctl(appliance: Appliance, *words: str, timeout: float = 90) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "bot.botctl", *words, "--config", str(appliance.path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def mark(appliance: Appliance) -> float:
    return float(appliance._http("GET", "/fapi/v1/premiumIndex?symbol=BTCUSDT", None)["markPrice"])


@contextmanager
def holding(folder: Path, **overrides) -> Iterator[tuple[Appliance, Signaler]]:
    """An appliance that holds a position with both exits at rest, and an order of ours that opens more."""
    tables = {"executor": {"reconcile_s": 2, "absent_after_s": 5},
              "exchange": {"request_timeout_ms": 1_500, "recv_window_ms": 2_000},
              "paper": {"latency_ms": 0}}
    with Appliance(folder, **(tables | overrides)) as appliance:
        appliance.start("paper", "gateway", "executor", "guard")
        appliance.wait_running(60)
        signaler = Signaler(appliance)
        try:
            signaler.position()
            at = mark(appliance)
            sent = signaler.send(signaler.signal(str(QTY), mark=at, stop_loss=f"{at * 0.9:.0f}",
                                                 take_profit=f"{at * 1.1:.0f}"))
            assert signaler.outcome(sent.seq, 40).outcome == "done"
            wait_until(lambda: len(appliance.open_stops()) == 2, 20)
            yield appliance, signaler
        finally:
            signaler.close()


def rest_an_entry(appliance: Appliance) -> str:
    """Leave an order that opens, as a send of ours that nobody remembers would; return its name."""
    name = f"{GUARD_PREFIX}drill{time.time_ns()}"
    row = appliance.ask(
        "POST",
        "/fapi/v1/order",
        symbol="BTCUSDT",
        side="BUY",
        type="LIMIT",
        quantity="0.010",
        price=f"{mark(appliance) * 0.8:.1f}",
        timeInForce="GTC",
        newClientOrderId=name,
    )
    assert row["status"] == "NEW", row
    return name


def is_flat(appliance: Appliance) -> bool:
    return (appliance.exchange_position() == 0 and not appliance.open_stops()
            and not appliance.ask("GET", "/fapi/v1/openOrders"))


# What is broken before the flatten. Each is given the appliance and the signaler.


def strategy_loops(appliance: Appliance, signaler: Signaler) -> None:
    def loop() -> None:
        end = time.monotonic() + 8
        while time.monotonic() < end:
            signaler.send(signaler.signal("0.050", mark=60_000.0))
            time.sleep(0.01)
    threading.Thread(target=loop, daemon=True).start()


def gateway_dies(appliance: Appliance, _: Signaler) -> None:
    appliance.kill("gateway")


def executor_hangs(appliance: Appliance, signaler: Signaler) -> None:
    # With signals unread: whoever thaws it would have it send them.
    appliance.processes["executor"].send_signal(signal.SIGSTOP)
    for _ in range(20):
        signaler.send(signaler.signal("0.050", mark=mark(appliance)))


def executor_hangs_and_thaws(appliance: Appliance, signaler: Signaler) -> None:
    executor_hangs(appliance, signaler)
    process, halts = appliance.processes["executor"], HaltFiles(appliance.config.path("halt"))

    def thaw() -> None:  # at the flatten's first step, with the signals unread
        wait_until(halts.list, 30, 0.001)
        process.send_signal(signal.SIGCONT)
    threading.Thread(target=thaw, daemon=True).start()


def executor_dies(appliance: Appliance, _: Signaler) -> None:
    appliance.kill("executor")


def journal_breaks(appliance: Appliance, _: Signaler) -> None:
    appliance.kill("executor")
    for end in ("", "-wal"):  # what counts may still be in the log
        path = appliance.config.path(appliance.config.journal.path + end)
        raw = bytearray(path.read_bytes())
        for at in range(100, len(raw), 500):
            raw[at] ^= 0xFF
        path.write_bytes(raw)


def bus_is_down(appliance: Appliance, _: Signaler) -> None:
    appliance.kill("gateway")
    appliance.kill("executor")


def clock_is_off(appliance: Appliance, _: Signaler) -> None:
    appliance.clock_offset_ms = 240_000
    appliance.control("POST", "/paper/clock", {"offset_ms": appliance.clock_offset_ms})


def private_stream_is_down(appliance: Appliance, _: Signaler) -> None:
    appliance.control("POST", "/paper/stream", {"match": "user:main", "do": "half_open"})
    appliance.control(
        "POST", "/paper/faults", {"match": "POST /fapi/v1/listenKey", "do": "hang", "times": 100}
    )


def exchange_is_busy(appliance: Appliance, _: Signaler) -> None:
    # Two of three requests, orders among them, of which every second is executed all the same.
    for number in range(1, 200):
        appliance.control(
            "POST",
            "/paper/faults",
            {
                "match": "* /fapi/*",
                "do": "answer",
                "skip": number,
                "times": 2,
                "status": 503,
                "body": '{"code": -1008, "msg": "Server is currently overloaded"}',
                "is_executed": number % 2 == 0,
            },
        )


def guard_dies(appliance: Appliance, _: Signaler) -> None:
    appliance.kill("guard")


def guard_hangs(appliance: Appliance, _: Signaler) -> None:
    appliance.processes["guard"].send_signal(signal.SIGSTOP)


def all_but_the_exchange_dies(appliance: Appliance, _: Signaler) -> None:
    for name in ("gateway", "executor", "guard"):
        appliance.kill(name)


SHORT = (executor_hangs, exchange_is_busy, guard_hangs, all_but_the_exchange_dies)
LONG = (strategy_loops, gateway_dies, executor_hangs_and_thaws, executor_dies, journal_breaks, bus_is_down,
        clock_is_off, private_stream_is_down, guard_dies)


def flattens(appliance: Appliance, signaler: Signaler, row: Callable) -> None:
    """Break, flatten, look at the exchange, mend, and see that the books agree and nothing was sent since."""
    entry = rest_an_entry(appliance)
    before = {name: p.pid for name, p in appliance.processes.items()}
    sent = [o["clientOrderId"] for o in appliance.exchange_orders() if o["clientOrderId"].startswith(PREFIX)]
    executor = appliance.processes["executor"]
    row(appliance, signaler)
    began = time.monotonic()
    done = botctl(appliance, "flatten", "--reason", row.__name__)
    took_s = time.monotonic() - began
    print(f"flatten with {row.__name__.replace('_', ' ')}: {took_s:.1f} s")
    assert done.returncode == 0, done.stdout + done.stderr
    appliance.control("DELETE", "/paper/faults")
    assert is_flat(appliance), done.stdout
    assert took_s < FLAT_S_MAX
    assert not os.path.exists(f"/proc/{before['executor']}") or "executor" not in appliance.processes or (
        appliance.processes["executor"].poll() is not None), "the executor was ended"
    orders = appliance.exchange_orders()
    assert next(o for o in orders if o["clientOrderId"] == entry)["status"] == "CANCELED"
    assert HaltFiles(appliance.config.path("halt")).list()[0].why == f"flatten: {row.__name__}"
    if row in (executor_hangs, executor_hangs_and_thaws):
        assert executor.wait(1) == -signal.SIGKILL, "whoever thaws it thaws nobody"
        executor.send_signal(signal.SIGCONT)
        assert [o["clientOrderId"] for o in orders if o["clientOrderId"].startswith(PREFIX)] == sent
    if row is journal_breaks:
        return
    for name in ("gateway", "executor"):  # supervisord would
        if name not in appliance.processes or appliance.processes[name].poll() is not None:
            appliance.processes.pop(name, None)
            appliance.start(name)
    wait_until(lambda: appliance.journal().books().book(BTC).position_qty == 0, 40)
    wait_until(lambda: appliance.status()["state"] == "HALTED"
               and not appliance.journal().books().book(BTC).live_orders(), 40)
    time.sleep(1)
    ours = [o for o in appliance.exchange_orders() if o["clientOrderId"].startswith(PREFIX)]
    assert len(ours) == len([o for o in orders if o["clientOrderId"].startswith(PREFIX)])
    assert is_flat(appliance)
    book = appliance.journal().books().book(BTC)
    assert not book.locks, book.locks


@pytest.mark.parametrize("row", SHORT, ids=lambda row: row.__name__)
def test_flatten_with_the_worst_broken_is_flat(tmp_path, row):
    with holding(tmp_path) as (appliance, signaler):
        flattens(appliance, signaler, row)


@pytest.mark.drill
@pytest.mark.parametrize("row", LONG, ids=lambda row: row.__name__)
def test_flatten_with_each_thing_broken_is_flat(tmp_path, row):
    with holding(tmp_path) as (appliance, signaler):
        flattens(appliance, signaler, row)


@pytest.mark.drill
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")
def test_flatten_with_a_full_disk_is_flat(tmp_path):
    disk = tmp_path / "var"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(disk)], check=True)
    try:
        with holding(tmp_path) as (appliance, _):
            def disk_is_full(*_: object) -> None:
                with open(disk / "ballast", "wb", buffering=0) as file:
                    try:
                        while True:
                            file.write(bytes(4_096))
                    except OSError:
                        pass
            rest_an_entry(appliance)
            disk_is_full()
            began = time.monotonic()
            done = botctl(appliance, "flatten", "--reason", "disk")
            print(f"flatten with disk is full: {time.monotonic() - began:.1f} s")
            assert done.returncode == 0, done.stdout + done.stderr
            assert is_flat(appliance), done.stdout
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_flatten_of_one_symbol_goes_through_the_executor_and_stays_halted(tmp_path):
    with holding(tmp_path) as (appliance, signaler):
        pid = appliance.processes["executor"].pid
        done = botctl(appliance, "flatten", "--symbol", BTC, "--reason", "one symbol")
        assert done.returncode == 0 and "flat" in done.stdout, done.stdout + done.stderr
        assert appliance.exchange_position() == 0
        wait_until(lambda: not appliance.open_stops(), 10)
        assert appliance.processes["executor"].pid == pid and appliance.processes["executor"].poll() is None
        sent = signaler.send(signaler.signal("0.010", mark=mark(appliance)))
        assert signaler.outcome(sent.seq).outcome == "denied"
        book = appliance.journal().books().book(BTC)
        assert (book.position_qty, book.version > 0, book.locks) == (0, True, {})
        assert botctl(appliance, "resume", "--symbol", BTC).returncode == 0
        appliance.kill("executor")
        refused = botctl(appliance, "flatten", "--strategy", "levels")
        assert refused.returncode == 1 and "botctl flatten closes everything" in refused.stderr


@pytest.mark.drill
def test_executor_that_starts_beside_a_flatten_waits_until_it_is_over(tmp_path):
    with Appliance(tmp_path, paper={"latency_ms": 0}) as appliance:
        path = appliance.config.path(appliance.config.journal.path)
        lock = take_lock(path)
        os.pwrite(lock, f"{os.getpid()} {HOLDER}\n".encode(), 0)
        appliance.start("paper", "gateway", "executor")
        wait_until(lambda: "executor" in appliance.beats(), 20)
        time.sleep(3)
        assert appliance.processes["executor"].poll() is None and not path.exists()
        os.close(lock)
        appliance.wait_running(40)


def test_cancel_with_exits_at_rest_leaves_them(tmp_path):
    with holding(tmp_path) as (appliance, _):
        done = botctl(appliance, "cancel", "--json")
        assert done.returncode == 0 and '"is_done": true' in done.stdout
        assert len(appliance.open_stops()) == 2 and appliance.exchange_position() == QTY


GUARD = {"cancel_after_s": 24, "flatten_after_s": 0}
HASTY = {"stuck_ms": 1_000, "page_port": 0}


@pytest.mark.drill
@pytest.mark.parametrize("loss", ["hung", "hung with the gateway dead", "dead"])
def test_dead_man_with_the_executor_gone_cancels_entries_and_stops_stay(tmp_path, loss):
    with holding(tmp_path, guard=GUARD, health=HASTY) as (appliance, _):
        entry = rest_an_entry(appliance)
        if "gateway" in loss:
            appliance.kill("gateway")
        appliance.processes["executor"].send_signal(signal.SIGSTOP if "hung" in loss else signal.SIGKILL)
        began = time.monotonic()
        wait_until(lambda: not appliance.ask("GET", "/fapi/v1/openOrders"), 60)
        print(f"dead-man's switch, executor {loss}: entries gone after {time.monotonic() - began:.1f} s")
        assert time.monotonic() - began >= GUARD["cancel_after_s"] - 2
        assert (
            next(o for o in appliance.exchange_orders() if o["clientOrderId"] == entry)["status"]
            == "CANCELED"
        )
        assert len(appliance.open_stops()) == 2 and appliance.exchange_position() == QTY
        assert HaltFiles(appliance.config.path("halt")).list() == []


@pytest.mark.drill
def test_dead_man_with_a_second_deadline_flattens_then(tmp_path):
    with holding(tmp_path, guard=GUARD | {"flatten_after_s": 28}, health=HASTY) as (appliance, _):
        rest_an_entry(appliance)
        appliance.processes["executor"].send_signal(signal.SIGSTOP)
        began = time.monotonic()
        wait_until(lambda: is_flat(appliance), 90)
        print(f"dead-man's switch, second deadline: flat after {time.monotonic() - began:.1f} s")
        assert time.monotonic() - began >= 26
        assert HaltFiles(appliance.config.path("halt")).list()[0].who == "guard"


@pytest.mark.drill
def test_dead_man_with_restarts_and_a_lost_exchange_waits(tmp_path):
    with holding(tmp_path, guard=GUARD, health=HASTY) as (appliance, _):
        entry = rest_an_entry(appliance)
        for _ in range(3):  # each shorter than the deadline, together longer
            appliance.kill("executor")
            time.sleep(8)
            appliance.start("executor")
            appliance.wait_running(60)
        assert [o["clientOrderId"] for o in appliance.ask("GET", "/fapi/v1/openOrders")] == [entry]
        appliance.kill("executor")
        appliance.processes["paper"].send_signal(signal.SIGSTOP)  # the network is gone, and comes back
        time.sleep(25)
        appliance.processes["paper"].send_signal(signal.SIGCONT)
        wait_until(lambda: not appliance.ask("GET", "/fapi/v1/openOrders"), 40)
        assert len(appliance.open_stops()) == 2
