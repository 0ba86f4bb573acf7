"""A second executor for the same account, with a copy of the journal somewhere else: found, and halted."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from tests.appliance import Appliance, Signaler
from tests.harness import wait_until


@pytest.fixture
def first(tmp_path: Path) -> Iterator[Appliance]:
    (folder := tmp_path / "first").mkdir()
    with Appliance(folder, executor={"reconcile_s": 2}, paper={"latency_ms": 0}) as appliance:
        appliance.start("paper", "gateway", "executor")
        appliance.wait_running()
        yield appliance


def _reach(appliance: Appliance, signaler: Signaler, qty: str) -> None:
    signaler.position()
    mark = float(appliance._http("GET", "/fapi/v1/premiumIndex?symbol=BTCUSDT", None)["markPrice"])
    stop = {"stop_loss": f"{mark * 0.95:.0f}"} if float(qty) else {}
    outcome = signaler.outcome(signaler.send(signaler.signal(qty, mark=mark, **stop)).seq)
    assert outcome.outcome == "done", outcome.reason


def _copy(first: Appliance, folder: Path) -> Appliance:
    """Return another host's appliance: its own folder and bus, a copy of the journal, the same account."""
    folder.mkdir()
    urls = {key: getattr(first.config.exchange, key) for key in ("rest_url", "ws_url", "sapi_url")}
    second = Appliance(folder, executor={"reconcile_s": 2}, exchange=urls,
                       paper=msgspec.to_builtins(first.config.paper))
    second.config.state_path.mkdir()
    path = second.config.path(second.config.journal.path)
    with (closing(sqlite3.connect(first.config.path(first.config.journal.path))) as old,
          closing(sqlite3.connect(path)) as new):
        old.backup(new)
    return second


def _halted_for(appliance: Appliance, word: str) -> bool:
    return any(word in halt["why"] for halt in appliance.status()["halted"])


def test_executor_with_an_older_copy_of_the_journal_halts_before_it_sends(
    first: Appliance, tmp_path: Path
) -> None:
    signaler = Signaler(first)
    signaler.position()
    _reach(first, signaler, "0.010")
    with _copy(first, tmp_path / "second") as second:
        _reach(first, signaler, "0.020")
        wait_until(lambda: [s["quantity"] for s in first.open_stops()] == ["0.020"])
        second.start("gateway", "executor")
        wait_until(lambda: _halted_for(second, "has our prefix and is not in the journal"), 30)
        epoch = second.journal().books().epoch
        sent = [o["clientOrderId"] for o in first.exchange_orders()] + [
            s["clientAlgoId"] for s in first.open_stops()
        ]
        assert len(sent) == 3 and not any(epoch in name for name in sent)
        assert first.status()["state"] == "RUNNING" and not first.status()["locked_symbols"]
    signaler.close()


def test_executor_with_a_fresh_copy_of_the_journal_halts_as_soon_as_the_other_acts(first: Appliance,
                                                                                   tmp_path: Path) -> None:
    signaler = Signaler(first)
    signaler.position()
    with _copy(first, tmp_path / "second") as second:
        second.start("gateway", "executor")
        second.wait_running()
        _reach(first, signaler, "0.010")
        wait_until(lambda: _halted_for(second, "a second instance trades this account"), 10)
        assert first.status()["state"] == "RUNNING" and first.exchange_position() == first.our_position()
    signaler.close()
