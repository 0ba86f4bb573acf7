"""A night in a drill: an appliance that runs under `make run`, its monitoring beside it, and a terminal.

Lines of the runbook are typed as they stand on the page, by a shell.
"""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any

from bot.backup import new_key
from tests.appliance import BTC
from tests.faults import FaultyRun
from tests.harness import ROOT, wait_until
from tests.monitoring import Monitoring, metrics_config

SCALE = 0.05  # of each `for` outside the group "money"
WINDOW = "30s"  # what "within 10 minutes" is here: so long an alert about something that happened once stays
QTY = Decimal("0.010")

# Wants what the file `mode` beside it says.
STEERED = '''
import os
from decimal import Decimal
from bot.model import Target

class Steered:
    def __init__(self, settings, instruments):
        self.since, self.qty = 0, Decimal(0)

    def on_tick(self, tick):
        with open(os.path.join(os.path.dirname(__file__), "mode")) as file:
            mode = file.read()
        if tick.kind != "quote":
            return None
        if mode == "wrong":  # a stop above a long
            return Target(tick.symbol, Decimal("0.010"), stop_loss=Decimal(round(tick.price * 2)))
        if tick.exchange_ns - self.since < 1_000_000_000:
            return None
        self.since = tick.exchange_ns
        is_in = mode == "hold" or (mode == "restless" and self.qty == 0)
        self.qty = Decimal("0.010") if is_in else Decimal(0)
        stop = Decimal(round(tick.price * 0.8)) if self.qty else None
        return Target(tick.symbol, self.qty, stop_loss=stop, reason=mode)
'''
TABLES: dict[str, Any] = {
    # A machine that others use may pause a process for longer than what FaultyRun bears.
    "health": {"stuck_ms": 30_000, "restarts_max": 20, "memory_mb_max": 500, "disk_free_mb_min": 4_000},
    "guard": {"cancel_after_s": 140},
    "executor": {"reconcile_s": 2, "clock_check_s": 2, "recover_s": 1}, "gateway": {"clock_check_s": 2},
    "paper": {"latency_ms": 1}, "backup": {"recipient": new_key()[1]},
}


class Night:
    """Use as a context manager. The strategy wants what `mode` says: hold, flat, restless or wrong."""

    def __init__(self, folder: Path, tables: dict[str, Any]) -> None:
        (folder / "steered.py").write_text(STEERED)
        self._mode = folder / "mode"
        self.mode("flat")
        made = metrics_config()
        made["strategy"]["levels"] |= {"class": "steered:Steered", "signals_per_s_max": 5}
        for name, table in [*TABLES.items(), *tables.items()]:
            made[name] = made.get(name, {}) | table
        self.run = FaultyRun(folder, **made)
        self.appliance = self.run.appliance
        self.monitoring = Monitoring(folder, self.appliance, SCALE)
        for name, changes in (("alerts.yml", {r"\[10m\]|\[1h\]": f"[{WINDOW}]", r"\[5m\]": "[1m]",
                                              r"slow_10m > 2\.5": "slow_10m > 0.5"}),
                              ("recording.yml", {r"\[10m\]": f"[{WINDOW}]"}),
                              ("alertmanager.yml", {"group_wait: 30s": "group_wait: 1s",
                                                    "group_interval: 1m": "group_interval: 5s",
                                                    "repeat_interval: 5m": "repeat_interval: 10s"})):
            path = self.monitoring.path / name
            text = path.read_text(encoding="utf-8")
            for before, after in changes.items():
                text = re.sub(before, after, text)
            path.write_text(text, encoding="utf-8")
        self.said = ""
        self._shell(folder / "bin")

    def __enter__(self) -> "Night":
        self.run.__enter__()
        try:
            self.monitoring.__enter__()
            wait_until(self.run.lift_limits, 30)
            self.wait_running(60)
            assert self.type("botctl backup make") == 0, self.said
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.monitoring.__exit__()
        self.run.__exit__()

    def mode(self, word: str) -> None:
        """Tell the strategy what to want from now on."""
        self._mode.with_suffix(".part").write_text(word)
        self._mode.with_suffix(".part").replace(self._mode)

    def wait_running(self, timeout: float = 40) -> None:
        """Wait until all is well."""
        wait_until(self.run.is_settled, timeout, 0.1)

    def hold(self) -> None:
        """Have a position with its stop at rest."""
        self.mode("hold")
        wait_until(lambda: self.run.is_settled() and self.appliance.exchange_position() == QTY
                   and len(self.appliance.open_stops()) == 1, 40, 0.2)

    def flat(self) -> None:
        """Have no position."""
        self.mode("flat")
        wait_until(lambda: self.run.is_settled() and self.appliance.exchange_position() == 0, 40, 0.2)

    def type(self, line: str, program: str = "executor") -> int:
        """Type one line of the page; return its exit code. What it said is in `said`."""
        words = {"SYMBOL": BTC, "NAME": "levels", "PROGRAM": program, "TEXT": "drill"}
        line = re.sub(r"\b(SYMBOL|NAME|PROGRAM|TEXT)\b", lambda word: words[word[1]], line)
        done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=180, cwd=ROOT,
                              env=self.env)
        self.said = done.stdout + done.stderr
        return done.returncode

    @contextmanager
    def answers(self, match: str, status: int = 200, code: int = 0, text: str = "", **more: Any) -> Iterator:
        """Let the exchange answer requests of a kind with this code, until the block ends."""
        said = {"match": match, "do": "answer", "status": status, "times": 10**6,
                "body": f'{{"code":{code},"msg":"{text}"}}'}
        self.control("/paper/faults", said | more)
        try:
            yield
        finally:
            self.appliance.control("DELETE", "/paper/faults")

    def control(self, path: str, body: dict[str, Any]) -> None:
        """Use the paper exchange's control endpoint."""
        self.appliance.control("POST", path, body)

    def fires(self, alert: str) -> bool:
        """Return whether Prometheus holds the alert to be true."""
        return bool(self.monitoring.query(f'ALERTS{{alertname="{alert}",alertstate="firing"}}'))

    def assert_balanced(self) -> None:
        """Fail unless books and exchange agree, and every order of ours was meant and sent once."""
        wait_until(lambda: self.appliance.our_position() == self.appliance.exchange_position(), 30, 0.2)
        names = [order["clientOrderId"] for order in self.appliance.exchange_orders()]
        assert len(names) == len(set(names))
        assert not self.run.status()["locked_symbols"] and not self.run.status()["unknown_orders"]
        stops = len(self.appliance.open_stops())
        assert stops == (1 if self.appliance.exchange_position() else 0) or wait_until(
            lambda: len(self.appliance.open_stops()) == (self.appliance.exchange_position() != 0), 20, 0.2)

    def _shell(self, folder: Path) -> None:
        # As ansible/ puts them on a host.
        folder.mkdir()
        socket = self.appliance.config.path("run/supervisor.sock")
        for name, module, words in (
                ("botctl", "bot.botctl", f'"$@" --config {self.appliance.path}'),
                ("supervisorctl", "supervisor.supervisorctl", f'-s unix://{socket} "$@"')):
            (folder / name).write_text(f"#!/bin/sh\nexec {sys.executable} -m {module} {words}\n")
            (folder / name).chmod(0o755)
        self.env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}


def seconds_since(began: float) -> float:
    """Return the seconds since a time.time()."""
    return time.time() - began
