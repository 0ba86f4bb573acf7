"""Public clients that we did not write, unmodified but for the base URL, in an environment of their own.

`make clients` makes it (ops/requirements-clients.lock): Binance's official SDK, whose answers are pydantic
models; typed-binance, which validates REST answers, stream events and the websocket order API by types of
its own; Binance's older connector, and python-binance.
"""

import json
import subprocess

import pytest

from tests.harness import API_KEY, API_SECRET, ROOT, stop_process, write_config
from tests.paper import Paper

PYTHON = ROOT / "build" / "clients" / "bin" / "python"
# What the official SDK's models do not know, because the recorded answers have it and the documentation
# has not: nothing else may be unknown to it.
UNDOCUMENTED = {"futuresType", "cumQuote", "avgPrice", "cumQty", "time", "actualOrderId", "actualPrice",
                "actualQty", "tpTriggerPrice", "tpPrice", "slTriggerPrice", "slPrice", "tpOrderType"}


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    if not PYTHON.exists():
        pytest.skip(f"no environment of public clients in {PYTHON.parent.parent}: make clients")
    server = Paper(write_config(tmp_path_factory.mktemp("paper"), paper={"latency_ms": 0}))
    server.call("GET", "/fapi/v1/ticker/24hr", timeout=60)  # clients are not patient: the past is made now
    yield server
    assert stop_process(server.process) == 0


@pytest.mark.parametrize("script", ["official", "typed", "community"])
def test_public_client_with_only_its_url_changed_understands_every_answer(paper, script):
    paper.control("limits", {"weight_1m": 1_000_000})
    command = [PYTHON, ROOT / "tests" / "clients" / f"{script}.py", f"http://{paper.host}"]
    done = subprocess.run([*command, API_KEY, API_SECRET], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2_000:]
    answers = json.loads(done.stdout)
    assert [row for row in answers if row[1]] == []
    assert {name for row in answers for name in row[2]} <= UNDOCUMENTED
    assert len(answers) >= 50
