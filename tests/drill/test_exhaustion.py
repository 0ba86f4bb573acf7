"""What runs out while a position is open: the stop stays, nothing wrong is sent, all goes on by itself."""

import os
import resource
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

from bot.backup import new_key
from tests.faults import FaultyRun, table
from tests.harness import ROOT, free_port, wait_until
from tests.runbook import FENCE, commands, section

# In at once, and then for good: what is open is there when things run out. Told to, it prints without end.
HOLDER = '''
import os
from decimal import Decimal
from bot.model import Target

class Holder:
    def __init__(self, settings, instruments):
        pass

    def on_history(self, symbol, candles):
        pass

    def on_tick(self, tick):
        if tick.kind != "quote":
            return None
        if os.path.exists(os.path.join(os.path.dirname(__file__), "flood")):
            print("x" * 2_000_000, flush=True)
        stop_loss = Decimal(round(tick.price * 0.9))
        return Target(tick.symbol, Decimal("0.010"), stop_loss=stop_loss, reason="hold")
'''
TABLES = {
    "strategy": {"levels": {"class": "holder:Holder", "signals_per_s_max": 1}},
    "health": {"stuck_ms": 6_000, "restarts_max": 4, "restart_window_s": 40, "disk_free_mb_min": 20},
    "executor": {"reconcile_s": 2, "absent_after_s": 5, "recover_s": 1},
}
LEFT_S_MAX = 8.0  # a beat is missed after 3 s, a hung process after stuck_ms; on a shared machine
BACK_S_MAX = 40.0


@contextmanager
def full_disk(run: FaultyRun) -> Iterator[None]:
    ballast = run.appliance.config.state_path / "ballast"
    filling = threading.Event()
    filling.set()

    def fill() -> None:  # and again whatever is given back meanwhile
        with open(ballast, "wb", buffering=0) as file:
            while filling.is_set():
                try:
                    file.write(bytes(4_096))
                except OSError:
                    time.sleep(0.01)
    writer = threading.Thread(target=fill)
    writer.start()
    try:
        yield
    finally:
        filling.clear()
        writer.join()
        ballast.unlink()


@contextmanager
def no_descriptors(run: FaultyRun) -> Iterator[None]:
    pid = run.pid("executor")
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    used = len(os.listdir(f"/proc/{pid}/fd"))
    resource.prlimit(pid, resource.RLIMIT_NOFILE, (used, before[1]))
    run.appliance.control("POST", "/paper/stream", {"match": "user:main", "do": "close"})
    try:
        yield
    finally:
        if run.pid("executor") == pid:
            resource.prlimit(pid, resource.RLIMIT_NOFILE, before)


@contextmanager
def no_memory(run: FaultyRun) -> Iterator[None]:
    pid = run.pid("executor")
    with open(f"/proc/{pid}/statm", encoding="ascii") as file:
        pages = int(file.read().split()[0])
    resource.prlimit(pid, resource.RLIMIT_AS, (pages * resource.getpagesize() + 100_000, -1))
    run.appliance.control("POST", "/paper/stream", {"match": "user:main", "do": "close"})
    try:
        yield
    finally:
        if run.pid("executor") == pid:
            resource.prlimit(pid, resource.RLIMIT_AS, (-1, -1))


@contextmanager
def disk_errors(run: FaultyRun) -> Iterator[None]:
    # Writes behind the file's present end fail: to SQLite an I/O error, as EIO would be.
    pid = run.pid("executor")
    size = run.appliance.config.path("journal.db-wal").stat().st_size
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (size + 1, -1))
    yield


@contextmanager
def sync_fails(run: FaultyRun) -> Iterator[None]:
    # EIO of fsync itself, of the very executor that runs: what it wrote may be on the disk, or not.
    pid = run.pid("executor")
    os.kill(pid, signal.SIGRTMIN)
    yield
    assert run.pid("executor") != pid, "who cannot sync ends, and the next looks at what is on the disk"


@contextmanager
def no_names(run: FaultyRun) -> Iterator[None]:
    # DNS is lost: what is connected stays so, and nothing that breaks is connected again.
    (run.folder / "no-names").touch()
    for stream in ("user:main", "btcusdt@markPrice@1s"):
        assert run.appliance.control("POST", "/paper/stream", {"match": stream, "do": "close"})
    try:
        yield
    finally:
        (run.folder / "no-names").unlink()


@contextmanager
def log_flood(run: FaultyRun) -> Iterator[None]:
    (run.folder / "flood").touch()
    try:
        yield
    finally:
        (run.folder / "flood").unlink()
    logs = sum(path.stat().st_size for path in run.appliance.config.path("log").glob("strategy-levels.log*"))
    assert 20_000_000 < logs < 140_000_000, f"logs take {logs} bytes"


@contextmanager
def starved(run: FaultyRun) -> Iterator[None]:
    # One part in ten of a processor, as a host with noisy neighbours gives it.
    pid, on = run.pid("executor"), threading.Event()
    on.set()

    def pulse() -> None:
        while on.is_set():
            os.kill(pid, signal.SIGSTOP)
            time.sleep(0.9)
            os.kill(pid, signal.SIGCONT)
            time.sleep(0.1)
    puller = threading.Thread(target=pulse)
    puller.start()
    try:
        yield
    finally:
        on.clear()
        puller.join()


@contextmanager
def clock_step(run: FaultyRun) -> Iterator[None]:
    # What the host's clock and the exchange's differ by is all that anybody can see.
    run.appliance.control("POST", "/paper/clock", {"offset_ms": 5_000})
    try:
        yield
    finally:
        run.appliance.control("POST", "/paper/clock", {"offset_ms": 0})


@contextmanager
def no_network(run: FaultyRun) -> Iterator[None]:
    # The exchange's host is there and says nothing: connections hang, as with lost packets.
    pid = run.pid("paper")
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


ROWS: list[tuple[Callable[[FaultyRun], object], float]] = [
    (full_disk, 12), (disk_errors, 8), (sync_fails, 10), (no_names, 12), (no_descriptors, 8), (no_memory, 8),
    (log_flood, 10), (starved, 12), (clock_step, 8), (no_network, 5)]
BORNE = (starved, log_flood, no_memory)  # may pass without a change of the state


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")
def test_exhaustion_of_the_disk_leaves_the_stop_and_goes_on_by_itself(tmp_path: Path) -> None:
    hold(tmp_path, ROWS[:1])


@pytest.mark.drill
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small disk")
@pytest.mark.parametrize("part", ["disk", "sync", "rest"])
def test_exhaustion_of_each_kind_leaves_the_stop_and_goes_on_by_itself(tmp_path: Path, part: str) -> None:
    of_part = {"disk": ROWS[:2], "sync": ROWS[2:4], "rest": ROWS[4:]}
    hold(tmp_path, of_part[part])


def hold(tmp_path: Path, rows: list[tuple[Callable[[FaultyRun], object], float]]) -> None:
    """Let one thing after the other run out, on an appliance that holds a position; print the table."""
    (tmp_path / "holder.py").write_text(HOLDER)
    disk = tmp_path / "var"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=300m", "tmpfs", str(disk)], check=True)
    try:
        port = free_port()  # an exchange has a name, and a disk of its own
        paper = {"latency_ms": 1, "state": str(tmp_path / "paper.db"), "bind": f"127.0.0.1:{port}"}
        urls = {"rest_url": f"http://localhost:{port}", "ws_url": f"ws://localhost:{port}",
                "sapi_url": f"http://localhost:{port}"}
        with FaultyRun(tmp_path, paper=paper, exchange=urls, **TABLES) as run:
            wait_held(run)
            said = [exhaust(run, fault, lasts_s) for fault, lasts_s in rows]
        print(table(said))
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def is_held(run: FaultyRun) -> bool:
    return run.is_settled() and len(run.appliance.open_stops()) == 1


def wait_held(run: FaultyRun) -> None:
    wait_until(run.lift_limits, 30)
    wait_until(lambda: is_held(run), 60, 0.2)


def exhaust(run: FaultyRun, fault: Callable, lasts_s: float) -> tuple[str, str, str]:
    """Let something run out for a while with a position open; return what was seen, in words."""
    wait_until(lambda: is_held(run), 60)
    before = run.appliance.exchange_orders()
    states, began, left_s = [], time.monotonic(), None
    with fault(run):
        while time.monotonic() - began < lasts_s:
            state = run.status()["state"]
            if state != "RUNNING" and left_s is None:
                left_s = time.monotonic() - began
            states += [state] if states[-1:] != [state] else []
            time.sleep(0.2)
    ended = time.monotonic()
    wait_until(lambda: is_held(run), BACK_S_MAX)
    back_s = time.monotonic() - ended
    name = fault.__name__
    assert not run.status()["halted"], (name, run.status()["halted"])
    assert run.appliance.exchange_position() == Decimal("0.010") == run.appliance.our_position(), name
    assert [o["clientOrderId"] for o in run.appliance.exchange_orders()] == [
        o["clientOrderId"] for o in before], f"{name}: nothing was to be sent"
    assert fault in BORNE or left_s is not None, f"{name}: the state said RUNNING all the time"
    assert left_s is None or left_s <= LEFT_S_MAX, f"{name}: the state said RUNNING for {left_s:.1f} s"
    left = "RUNNING all along" if left_s is None else f"{' '.join(states)}, after {left_s:.1f} s"
    return name, "executor", f"{left}; RUNNING again {back_s:.1f} s after it ended; the stop stayed"


def journal_breaks(run: FaultyRun) -> None:
    """Damage every page of both files below the executor that has them open."""
    for name in ("journal.db", "journal.db-wal"):
        path = run.appliance.config.path(name)
        raw = bytearray(path.read_bytes())
        for at in range(100, len(raw), 500):
            raw[at] ^= 0xFF
        with open(path, "r+b") as file:
            file.write(raw)


def journal_is_removed(run: FaultyRun) -> None:
    """Somebody makes room on the disk, beside the executor that has the file open."""
    for end in ("", "-wal", "-shm"):
        run.appliance.config.path(f"journal.db{end}").unlink()


def typed(run: FaultyRun, line: str, **words: str) -> str:
    """Type a line of the page as its reader beside `make run` does; return what it said."""
    for name, word in words.items():
        line = line.replace(name, word)
    if "systemctl" in line:  # "Ctrl-C for the stop, make run for the start, and no sudo"
        (run.start if line.endswith("start bot") else run.end)()
        return ""
    command = line.removeprefix("sudo -u bot-trade ")
    assert command.startswith("botctl "), line
    script = f"botctl() {{ {sys.executable} -m bot.botctl \"$@\" --config {run.appliance.path}; }}; {command}"
    for _ in range(3):  # 3: the executor is only just starting, and takes it up when it runs
        done = subprocess.run(["bash", "-c", script], capture_output=True, text=True, timeout=180, cwd=ROOT)
        if done.returncode != 3:
            break
    assert done.returncode == 0, (line, done.stdout + done.stderr)
    return done.stdout


@pytest.mark.drill
@pytest.mark.parametrize(("fault", "way"), [(journal_breaks, 0), (journal_is_removed, 1)],
                         ids=["with_a_backup", "without"])
def test_journal_that_breaks_under_the_executor_halts_and_the_page_mends_it(tmp_path, fault, way):
    (tmp_path / "holder.py").write_text(HOLDER)
    private, recipient = new_key()
    (tmp_path / "backup.key").write_text(private)
    block = FENCE.findall(section("Restore on the same host").text)[way]
    with FaultyRun(tmp_path, backup={"recipient": recipient}, **TABLES) as run:
        wait_held(run)
        typed(run, "botctl backup make")
        backup = str(max(run.appliance.config.path("backup").glob("*.age")))
        wait_until(lambda: is_held(run), 20)
        orders, pid = run.appliance.exchange_orders(), run.pid("executor")
        fault(run)
        began = time.monotonic()
        wait_until(lambda: run.status()["state"] != "RUNNING", 30, 0.1)
        left_s = time.monotonic() - began
        assert left_s <= LEFT_S_MAX, f"it went on for {left_s:.1f} s"
        halt = wait_until(lambda: run.status()["halted"], 30, 0.1)[0]
        halted_s = time.monotonic() - began
        assert halt["who"] == "executor" and "damaged" in halt["why"], halt
        wait_until(lambda: run.pid("executor") is None, 10)
        assert run.status()["journal_error"], "botctl status says so, and tells all the rest"
        assert run.appliance.exchange_orders() == orders
        assert run.appliance.exchange_position() == Decimal("0.010"), "held, behind its stop"
        stop, = run.appliance.open_stops()
        began = time.monotonic()
        for line in commands(f"```\n{block}```\n"):
            typed(run, line, FILE=backup, KEY=str(tmp_path / "backup.key"))
        wait_until(lambda: is_held(run) and run.appliance.exchange_position(), BACK_S_MAX, 0.2)
        back_s = time.monotonic() - began
        if way == 0:
            assert run.appliance.exchange_orders() == orders, "nothing was closed and bought again"
        assert run.appliance.exchange_position() == Decimal("0.010") == run.appliance.our_position()
        assert run.pid("executor") != pid and not run.status()["halted"]
        typed(run, "botctl journal verify")
        name = fault.__name__.replace("_", " ")
        print(f"\n{name}: DOWN after {left_s:.1f} s, HALTED after {halted_s:.1f} s, the stop "
              f"{stop['triggerPrice']} stayed; all typed and RUNNING again after {back_s:.1f} s")
