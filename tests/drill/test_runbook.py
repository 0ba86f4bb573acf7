"""The runbook as somebody reads it at night: its commands are read from the page and typed, as they stand."""

import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from tests.faults import FaultyRun
from tests.harness import wait_until
from tests.runbook import STEERED, Shell, section

# A machine that others use may pause a process for longer than FaultyRun bears.
TABLES = {"strategy": {"levels": {"class": "steered:Steered", "signals_per_s_max": 5}},
          "health": {"stuck_ms": 30_000}}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[FaultyRun]:
    (tmp_path / "steered.py").write_text(STEERED)
    with FaultyRun(tmp_path, **TABLES) as run:
        run.wait_trading()
        (tmp_path / "mode").write_text("hold")
        wait_until(lambda: run.is_settled() and len(run.appliance.open_stops()) == 1, 30)
        yield run


def assert_balanced(run: FaultyRun) -> None:
    """Books and exchange agree, every order of the account is ours and was sent once."""
    wait_until(lambda: run.appliance.our_position() == run.appliance.exchange_position(), 30)
    names = [order["clientOrderId"] for order in run.appliance.exchange_orders()]
    assert len(names) == len(set(names))


@pytest.mark.drill
def test_emergency_lines_of_the_page_halt_look_and_flatten(run):
    halt, look, flatten = section("Emergency / 緊急處理").commands()
    shell = Shell(run)
    assert shell.types(halt) == 0 and run.status()["state"] == "HALTED"
    assert run.appliance.exchange_position() == Decimal("0.010"), "a halt closes nothing"
    assert shell.types(look) == 0 and "HALTED" in shell.said and "0.01" in shell.said
    assert shell.types(flatten) == 0 and "flat" in shell.said
    assert run.appliance.exchange_position() == 0 and not run.appliance.open_stops()
    wait_until(lambda: run.pid("executor") and run.appliance.our_position() == 0, 40)
    time.sleep(3)
    assert run.status()["state"] == "HALTED" and run.appliance.exchange_position() == 0
    assert_balanced(run)


@pytest.mark.drill
def test_section_on_what_no_tool_can_mend_closes_in_the_app_and_adopts(run):
    page, shell = section("What no tool can mend"), Shell(run)
    before, after = page.commands()[:2], page.commands()[2:]
    refused = {"match": "* /fapi/*", "do": "answer", "status": 401, "times": 10**6,
               "body": '{"code":-2015,"msg":"Invalid API-key, IP, or permissions for action"}'}
    run.appliance.control("POST", "/paper/faults", refused)
    assert [shell.types(line) for line in before] == [0, 0] and "0.01" in shell.said
    run.appliance.control("POST", "/paper/trade", {  # the button in the exchange's app
        "account": "main", "symbol": "BTCUSDT", "side": "SELL", "qty": "0.010", "reduce_only": True})
    run.appliance.control("DELETE", "/paper/faults")
    wait_until(lambda: run.status()["locked_symbols"], 30)
    for line in after:
        done = shell.types(line)
        assert done == 0 or "reconcile" in line, shell.said  # it says no: that is what differs
    (run.folder / "mode").write_text("restless")
    run.wait_trading()
    assert_balanced(run)
