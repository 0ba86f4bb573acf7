"""A throwaway host over SSH, and the playbooks that are run on it."""

import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.harness import wait_until

ROOT = Path(__file__).resolve().parents[1]
BIN = ROOT / "build" / "ansible" / "bin"
BACKUPS = ROOT / "build" / "backup"  # in place of ansible/backup, where an operator's own key may be
INVENTORY = os.environ.get("TRADEHOST_INVENTORY", "")
PYTHON = "/opt/bot/current/.venv/bin/python"
# Two strategies: one has to be refused what is the other's.
STRATEGIES = {name: {"class": "bot.support_resistance:SupportResistanceStrategy", "symbols": [symbol],
                     "settings": {"notional": 1_000}}
              for name, symbol in (("sr", "BTC/USDT:USDT"), ("other", "ETH/USDT:USDT"))}

# A position that is never flat, bought and sold again every second, behind a stop that is always there.
FLIPPER = '''
"""Holds a position, and makes it larger and smaller each second."""

from decimal import Decimal

from bot.model import Target


class Flipper:
    def __init__(self, settings, instruments):
        self.turns = 0

    def on_tick(self, tick):
        if tick.kind != "mark":
            return None
        self.turns += 1
        stop = Decimal(int(tick.price * 0.97) // 100 * 100)
        return Target(tick.symbol, Decimal("0.004") if self.turns % 2 else Decimal("0.006"), stop_loss=stop)
'''
FLIPPER_VARS = {
    "bot_limits": {"order_notional_max": 5_000, "position_notional_max": 10_000,
                   "exposure_notional_max": 15_000, "day_loss_max": 1_000, "price_collar_pct": 2,
                   "orders_per_minute_max": 600, "repeats_per_minute_max": 600},
    "bot_strategies": {"sr": {"class": "bot.flipper:Flipper", "symbols": ["BTC/USDT:USDT"]}}}


class Host:
    """A host of the inventory by its place in it, over SSH."""

    def __init__(self, place: int = 0) -> None:
        self.vars: dict[str, Any] = {"bot_strategies": STRATEGIES, "backup_folder": str(BACKUPS)}
        assert INVENTORY, "make test-host INVENTORY=FILE"
        done = subprocess.run([BIN / "ansible-inventory", "-i", INVENTORY, "--list"], capture_output=True,
                              text=True, check=True)
        self.name, fields = list(json.loads(done.stdout)["_meta"]["hostvars"].items())[place]
        key = fields.get("ansible_ssh_private_key_file")
        self._ssh = ["ssh", *(["-i", key] if key else []), "-o", "BatchMode=yes", "-o", "ConnectTimeout=5",
                     *shlex.split(fields.get("ansible_ssh_common_args", "")),
                     f"{fields.get('ansible_user', 'root')}@{fields.get('ansible_host', self.name)}"]

    def play(self, playbook: str, *words: str, is_good: bool = True,
             limit: str = "") -> tuple[dict[str, int], str]:
        """Run a playbook; return its recap (ok, changed, failed, ...) and its output.

        is_good: whether it must succeed, or must fail. limit: the hosts it may touch, this one by default.
        """
        done = subprocess.run(
            [BIN / "ansible-playbook", "-i", INVENTORY, "-l", limit or self.name, playbook, *words,
             "-e", f"@{self._write_vars()}"],
            cwd=ROOT / "ansible", capture_output=True, text=True, timeout=1_200,
            env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "ANSIBLE_NOCOLOR": "1"})
        assert (done.returncode == 0) == is_good, done.stdout[-6000:] + done.stderr[-1000:]
        recap = re.search(rf"^{re.escape(self.name)}\s+: (.+)$", done.stdout, re.M)
        return {key: int(count) for key, count in re.findall(r"(\w+)=(\d+)", recap[1] if recap else "")}, \
            done.stdout

    def _write_vars(self) -> Path:
        path = ROOT / "build" / "host_vars.json"
        path.touch(mode=0o600)
        path.write_text(json.dumps(self.vars))  # keys never stand in a command line
        return path

    def do(self, command: str, *, user: str = "root", text: str = "") -> subprocess.CompletedProcess:
        """Run a shell command there, as a user, with text on its standard input."""
        there = f"sudo -u {user} sh -c {shlex.quote(command)}"
        return subprocess.run([*self._ssh, there], capture_output=True, text=True, timeout=60, input=text)

    def pids(self) -> dict[str, int]:
        """Return the process id of each program."""
        return {row["name"]: row["pid"] for row in self.status()["processes"]}

    def status(self) -> dict:
        done = self.do("botctl status --json")
        return json.loads(done.stdout) if done.stdout.startswith("{") else {"state": "UNREACHABLE"}

    def wait_running(self, timeout: float = 60) -> dict:
        wait_until(lambda: self.status()["state"] == "RUNNING", timeout)
        return self.status()


class Source:
    """A checkout of its own, for releases that are not this one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        subprocess.run(["git", "clone", "-q", ROOT, folder], check=True)
        self.good: list[str] = []

    def commit(self, **texts: str | Callable[[str], str]) -> str:
        """Commit changed modules of bot/ by name, as texts or as functions of what they were."""
        for name, text in texts.items():
            path = self.folder / "bot" / f"{name}.py"
            path.write_text(text if isinstance(text, str) else text(path.read_text()))
        self._git("add", "-A")
        self._git("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qm", "a release", "--allow-empty")
        return self._git("rev-parse", "--short=12", "HEAD").strip()

    def reset(self) -> None:
        """Go back to the newest good commit."""
        self._git("reset", "-q", "--hard", self.good[-1])

    def _git(self, *words: str) -> str:
        return subprocess.run(["git", "-C", self.folder, *words], check=True, capture_output=True,
                              text=True).stdout
