"""The files for Prometheus: rules that parse, each alert with its reason."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "ops" / "prometheus"

needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None,
                                    reason="promtool is missing: Debian's package prometheus has it")


def alerts() -> dict[str, str]:
    """Return each alert's text with the comment above it, by name."""
    text = (RULES / "alerts.yml").read_text(encoding="utf-8")
    blocks = re.findall(r"((?:^ +#.*\n)+)( +- alert: (\w+)\n(?: {8}.*\n)+)", text, re.MULTILINE)
    return {name: comment + block for comment, block, name in blocks}


def test_alerts_with_their_thresholds_have_a_reason_and_say_what_to_do():
    text = (RULES / "alerts.yml").read_text(encoding="utf-8")
    assert list(alerts()) == re.findall(r"- alert: (\w+)", text), "an alert without a comment above it"
    for name, block in alerts().items():
        assert re.search(r"# Threshold: .{20,}", block), f"{name}: no reason for its threshold"
        assert re.search(r"severity: (critical|warning|none)\n", block), name
        for key in ("summary", "summary_zh_TW", "impact", "command"):
            assert re.search(rf"^ +{key}: \S.+$", block, re.MULTILINE), f"{name}: no {key}"
        assert re.search(r'summary_zh_TW: ".*[\u4e00-\u9fff]{2}', block), f"{name}: no Chinese"
        assert f"runbook_url: RUNBOOK.md#{name.lower()}\n" in block, name


@needs_promtool
def test_rules_with_promtool_are_right():
    done = subprocess.run(["promtool", "check", "rules", RULES / "alerts.yml", RULES / "recording.yml"],
                          capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr
