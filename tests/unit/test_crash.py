"""Crash points: the table and the code say the same, they are off by themselves, and never in live."""

import os
import re
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from bot.crash import POINTS
from tests.harness import ROOT, write_config

PASS = "import sys; from bot.crash import point; [point(n) for n in sys.argv[1:]]; print('alive', flush=True)"


def passing(plan: Path, *names: str) -> subprocess.Popen:
    return subprocess.Popen([sys.executable, "-c", PASS, *names], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                            env=os.environ | {"TRADEHOST_CRASH": str(plan)})


def test_points_with_the_code_are_each_passed_in_one_place():
    passed = Counter(name for path in (ROOT / "bot").glob("*.py") if path.name != "crash.py"
                     for name in re.findall(r'\bpoint\("([^"]+)"\)', path.read_text()))
    assert passed == Counter(POINTS)


def test_point_with_a_plan_kills_at_its_pass_and_once(tmp_path):
    plan = tmp_path / "plan"
    plan.write_text("keeper.committed 3 kill")
    with passing(plan, "keeper.committed", "keeper.reported", "keeper.committed") as twice:
        assert twice.communicate()[0] == "alive\n"
    assert plan.read_text() == "keeper.committed 1 kill"
    with passing(plan, "keeper.committed") as third:
        assert third.wait() == -signal.SIGKILL
    assert not plan.exists()
    with passing(plan, "keeper.committed") as fourth:
        assert fourth.communicate()[0] == "alive\n"


def test_point_with_a_stop_freezes_until_continued(tmp_path):
    (tmp_path / "plan").write_text("keeper.committed 1 stop")
    with passing(tmp_path / "plan", "keeper.committed") as process:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        process.send_signal(signal.SIGCONT)
        assert process.communicate()[0] == "alive\n"


@pytest.mark.parametrize("module", ["executor", "gateway"])
def test_process_with_a_crash_plan_in_mode_live_is_refused(tmp_path, module):
    path = write_config(tmp_path, mode="live", paper=None,
                        exchange={"rest_url": "https://fapi.example.com", "ws_url": "wss://fapi.example.com",
                                  "sapi_url": "https://api.example.com"})
    ended = subprocess.run([sys.executable, "-m", f"bot.{module}", "--config", str(path)], cwd=ROOT,
                           capture_output=True, text=True, timeout=20,
                           env=os.environ | {"TRADEHOST_CRASH": str(tmp_path / "plan")})
    assert ended.returncode == 78
    assert "TRADEHOST_CRASH" in ended.stderr
