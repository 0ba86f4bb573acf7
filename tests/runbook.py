"""RUNBOOK.md as data: sections, the commands in them, the links. Drills run what stands on the page."""

import re
from pathlib import Path
from typing import NamedTuple

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

    def steps(self) -> list[str]:
        """Return the command lines of the mitigation, from the least to the most drastic."""
        return commands(self.part("Mitigation"))

    def typed_after(self, label: str) -> list[str]:
        """Return the commands within the line that begins with `label:`, for example Verify."""
        found = re.search(rf"^{label}: (.*?)(?=^\w+: |\Z)", self.part("Mitigation"), re.M | re.S)
        return inline_commands(found[1]) if found else []

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
