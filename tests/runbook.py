"""RUNBOOK.md as data: sections, the commands in them, the links. Drills run what stands on the page."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from tests.appliance import BTC
from tests.faults import FaultyRun
from tests.harness import ROOT

RUNBOOK = ROOT / "RUNBOOK.md"
FENCE = re.compile(r"^```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
TYPED = ("botctl ", "supervisorctl ", "make ", "systemctl ", "sudo ", "ansible-playbook ")


class Section(NamedTuple):
    """A `##` section: its heading, its text, and below each `###` heading a text of its own."""

    name: str
    text: str

    def part(self, name: str) -> str:
        """Return the text below a `### name` heading, up to the next one; empty when there is none."""
        found = re.search(rf"^### {re.escape(name)}\n(.*?)(?=^### |^Drill: |\Z)", self.text, re.M | re.S)
        return found[1] if found else ""

    def commands(self) -> list[str]:
        """Return the command lines of its code blocks."""
        return commands(self.text)

    def drills(self) -> list[str]:
        """Return the paths that its line `Drill: ...` names."""
        found = re.search(r"\bDrill: (.*?)(?:\n\n|\Z)", self.text, re.DOTALL)
        return re.findall(r"`(tests/[\w/.]+?\.py)`", found[1]) if found else []


def sections(path: Path = RUNBOOK) -> list[Section]:
    """Return the `##` sections in their order."""
    parts = re.split(r"^## (.+)\n", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [Section(name, text) for name, text in zip(parts[1::2], parts[2::2], strict=True)]


def section(name: str) -> Section:
    """Return the section of that name."""
    return next(found for found in sections() if found.name == name)


def commands(text: str) -> list[str]:
    """Return the command lines of the code blocks, without comments."""
    lines = [line for block in FENCE.findall(text) for line in block.splitlines()]
    return [line for line in (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines) if line]


def inline_commands(text: str) -> list[str]:
    """Return the commands that stand within a sentence or a table."""
    found = re.findall(r"`([^`\n]+)`", FENCE.sub("", text))
    return [words for words in found if words.startswith(TYPED)]


def anchor(heading: str) -> str:
    """Return the anchor a heading has on GitHub, and on the status page."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


# Does what the file `mode` beside it says: holds a position with a stop, or goes in and out all the time.
STEERED = '''
import os
from decimal import Decimal
from bot.model import Target

class Steered:
    def __init__(self, settings, instruments):
        self.since, self.qty = 0, Decimal(0)

    def on_tick(self, tick):
        if tick.kind != "quote" or tick.exchange_ns - self.since < 1_000_000_000:
            return None
        self.since = tick.exchange_ns
        try:
            with open(os.path.join(os.path.dirname(__file__), "mode")) as file:
                mode = file.read()
        except FileNotFoundError:
            mode = "restless"
        is_in = mode == "hold" or (mode == "restless" and self.qty == 0)
        self.qty = Decimal("0.010") if is_in else Decimal(0)
        stop = Decimal(round(tick.price * 0.9)) if self.qty else None
        return Target(tick.symbol, self.qty, stop_loss=stop, reason=mode)
'''


class Shell:
    """A terminal beside a running appliance, where lines of the page are typed as they stand."""

    def __init__(self, run: FaultyRun, program: str = "executor") -> None:
        folder = run.folder / "bin"  # as ansible puts them on a host
        folder.mkdir(exist_ok=True)
        for name, module, words in (
                ("botctl", "bot.botctl", f'"$@" --config {run.appliance.path}'),
                ("supervisorctl", "supervisor.supervisorctl",
                 f'-s unix://{run.appliance.config.path("run/supervisor.sock")} "$@"')):
            (folder / name).write_text(f"#!/bin/sh\nexec {sys.executable} -m {module} {words}\n")
            (folder / name).chmod(0o755)
        self._env = os.environ | {"PATH": f"{folder}:{os.environ['PATH']}"}
        self._words = {"SYMBOL": BTC, "NAME": "levels", "PROGRAM": program, "TEXT": "drill"}
        self.said = ""

    def types(self, line: str) -> int:
        """Run one line; return its exit code. What it said is in `said`."""
        line = re.sub(r"\b(SYMBOL|NAME|PROGRAM|TEXT)\b", lambda word: self._words[word[1]], line)
        done = subprocess.run(["bash", "-c", line.replace("BTC/USDT:USDT", BTC)], capture_output=True,
                              text=True, timeout=180, cwd=ROOT, env=self._env)
        self.said = done.stdout + done.stderr
        return done.returncode
