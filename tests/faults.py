"""Faults put into processes from outside: a sitecustomize on PYTHONPATH, steered by files and signals.

Nothing in bot/ knows of it. A process is addressed by its program's name, as supervisord knows it.
"""

import http.client
import inspect
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from bot.clock import Clock
from bot.halt import HaltFiles
from tests.appliance import Appliance
from tests.harness import ROOT, wait_until


def fail_sync(*_: object) -> None:
    """Let every fsync of this process fail with EIO from now on, by a seccomp filter of the kernel's."""
    import ctypes
    import platform
    import struct

    fsync, fdatasync, seccomp = {"x86_64": (74, 75, 317), "aarch64": (82, 83, 277)}[platform.machine()]
    load, equal, answer = 0x20, 0x15, 0x06  # BPF: the call's number; is it this one; what becomes of it
    steps = [(load, 0, 0, 0), (equal, 1, 0, fsync), (equal, 0, 1, fdatasync), (answer, 0, 0, 0x0005_0005),
             (answer, 0, 0, 0x7FFF_0000)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = ctypes.create_string_buffer(struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code)))
    libc = ctypes.CDLL(None)
    assert libc.prctl(38, 1, 0, 0, 0) == 0 and libc.syscall(seccomp, 1, 1, program) == 0  # in every thread


# SIGUSR1: a loop without end where the process works. SIGUSR2: memory without need. SIGRTMIN: syncs fail.
# The file crash-NAME: dies 3 s after each start. The file import-NAME: a library is missing. The file
# no-names: no host's name is resolved.
SITE = inspect.getsource(fail_sync) + '''
import os, signal, socket, sys, threading
words = sys.orig_argv
module = next((w[4:] for w in words if w.startswith("bot.")), "")
name = f"strategy-{words[words.index('--name') + 1]}" if module == "strategy" else module
here = os.path.dirname(os.path.abspath(__file__))
if module and module != "run":
    hold = []
    def busy(*_):
        while True:
            pass
    signal.signal(signal.SIGUSR1, busy)
    signal.signal(signal.SIGUSR2, lambda *_: hold.append(b"x" * 600_000_000))
    signal.signal(signal.SIGRTMIN, fail_sync)
    resolve = socket.getaddrinfo
    def getaddrinfo(host, *rest, **more):
        if os.path.exists(f"{here}/no-names") and str(host or "").strip("0123456789.:"):
            raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
        return resolve(host, *rest, **more)
    socket.getaddrinfo = getaddrinfo
    if os.path.exists(f"{here}/import-{name}"):
        sys.modules["msgspec"] = None
    if os.path.exists(f"{here}/crash-{name}"):
        timer = threading.Timer(3, os.kill, (os.getpid(), signal.SIGSEGV))
        timer.daemon = True
        timer.start()
'''

# In and out again, each two seconds, with a stop.
RESTLESS = '''
from decimal import Decimal
from bot.model import Target

class Restless:
    def __init__(self, settings, instruments):
        self.since = 0
        self.size, self.qty = Decimal(settings.get("qty", "0.010")), Decimal(0)

    def on_tick(self, tick):
        if tick.kind != "quote" or tick.exchange_ns - self.since < 2_000_000_000:
            return None
        self.since = tick.exchange_ns
        self.qty = self.size if self.qty == 0 else Decimal(0)
        stop = Decimal(round(tick.price * 0.97)) if self.qty else None
        return Target(tick.symbol, self.qty, stop_loss=stop, reason="restless")
'''


class FaultyRun:
    """`make run` of an appliance that trades all the time. Use as a context manager."""

    def __init__(self, tmp_path: Path, **overrides: Any) -> None:
        self.folder = tmp_path
        (tmp_path / "sitecustomize.py").write_text(SITE)
        (tmp_path / "restless.py").write_text(RESTLESS)
        tables = {"paper": {"latency_ms": 1}, "executor": {"reconcile_s": 2, "absent_after_s": 5},
                  "health": {"stuck_ms": 6_000, "restarts_max": 4, "restart_window_s": 40,
                             "memory_mb_max": 500},
                  "strategy": {"levels": {"class": "restless:Restless", "signals_per_s_max": 5}}}
        self.appliance = Appliance(tmp_path, **(tables | overrides))
        self.halts = HaltFiles(self.appliance.config.path("halt"))

    def __enter__(self) -> "FaultyRun":
        self.start()
        return self

    def start(self) -> None:
        """Start it, also again after it ended."""
        with open(self.folder / "run.log", "ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "bot.run", "--config", str(self.appliance.path), "--root",
                 str(self.folder)], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(self.folder)},
                stdout=log, stderr=log)

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """End it as Ctrl-C does."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        try:
            self.process.wait(15)
        finally:
            self.process.kill()

    def status(self) -> dict[str, Any]:
        return self.appliance.status()

    def pid(self, name: str) -> int | None:
        """Return the pid of a process that is UP."""
        return next((p["pid"] for p in self.status()["processes"]
                     if p["name"] == name and p["state"] == "UP"), None)

    def fills(self) -> int:
        return self.appliance.journal().books().fills

    def is_settled(self) -> bool:
        status = self.status()
        return status["state"] == "RUNNING" and not status["unknown_orders"] and not status["locked_symbols"]

    def wait_trading(self, timeout: float = 60) -> None:
        """Wait until all is well and one more fill came."""
        wait_until(self.lift_limits, 30)
        fills = self.fills() if self.appliance.config.path("journal.db").exists() else 0
        wait_until(lambda: self.is_settled() and self.fills() > fills, timeout, 0.2)

    def lift_limits(self) -> bool:
        """Let the exchange bear all that a test asks, and a comparison each two seconds; False: not up."""
        try:
            self.appliance.control("POST", "/paper/limits", {"weight_1m": 1_000_000})
        except (OSError, http.client.HTTPException):
            return False
        return True

    def send(self, name: str, number: int) -> tuple[float, float]:
        """Send a signal; return the seconds until another process is UP, and until trading goes on."""
        pid = wait_until(lambda: self.pid(name), 30)
        began = time.monotonic()
        os.kill(pid, number)
        wait_until(lambda: self.pid(name) not in (None, pid), 40, 0.1)
        back_s = time.monotonic() - began
        self.wait_trading()
        return back_s, time.monotonic() - began

    def loop(self, name: str, fault: str) -> float:
        """Let it crash again and again; return the seconds until that is halted. Then mend and resume."""
        scope = name.replace("-", ":", 1) if name.startswith("strategy-") else "all"
        pid = wait_until(lambda: self.pid(name), 30)
        mark = self.folder / f"{fault}-{name}"
        mark.touch()
        began = time.monotonic()
        os.kill(pid, signal.SIGKILL)
        try:
            wait_until(lambda: [h for h in self.halts.list() if h.scope == scope], 60, 0.1)
        finally:
            mark.unlink()
        halted_s = time.monotonic() - began
        assert "crashed" in self.halts.list()[0].why and self.halts.list()[0].who == "health"
        wait_until(lambda: self.pid(name), 40)
        self.halts.clear(scope, clock=Clock())
        self.wait_trading()
        return halted_s


def table(rows: list[tuple[str, ...]]) -> str:
    """Return rows of (fault, process, what happened, ...) as people read them."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n" + "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
