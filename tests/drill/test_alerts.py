"""Alerts end to end on one running appliance: silence while all is well, the message when it is not."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bot.clock import Clock
from bot.halt import HaltFiles
from tests.appliance import BTC, Appliance, Signaler
from tests.drill.test_executor import _enter, _is_up
from tests.harness import ROOT, wait_until
from tests.monitoring import Monitoring, Receiver, metrics_config, needs_monitoring
from tests.schemas import decoded

ALL = ("paper", "gateway", "executor", "strategy-levels", "health", "guard")
# A beat, a scrape, an evaluation: 1 s each at most; then the way to the receiver.
MONEY_S = 5.0
# health looks each second at beats of each second.
DIRECT_S = 3.0
# make drill: 30 min, with a restart each 60 s; CI: a minute with one.
WELL_S = float(os.environ.get("TRADEHOST_WELL_S", "60"))
REFUSED = '{"code":-4120,"msg":"Order type not supported for this endpoint. Use the Algo Order API."}'

pytestmark = needs_monitoring


class Stage:
    """The appliance, its monitoring, and the receiver of what health tells directly."""

    def __init__(self, path: Path, appliance: Appliance, monitoring: Monitoring) -> None:
        self.appliance, self.monitoring, self.direct = appliance, monitoring, Receiver()
        url_file = appliance.config.path("alert.url")
        url_file.write_text(self.direct.url)
        url_file.chmod(0o600)
        self.halts = HaltFiles(appliance.config.path("halt"))

    def botctl(self, *words: str, exit_code: int = 0) -> Any:
        """Run botctl; return its JSON."""
        done = subprocess.run([sys.executable, "-m", "bot.botctl", *words, "--json", "--config",
                               str(self.appliance.path)], capture_output=True, text=True, timeout=60)
        assert done.returncode == exit_code, done.stdout + done.stderr
        decoded(words, done.stdout)
        return json.loads(done.stdout)

    def told_at(self, name: str, since: float) -> tuple[float, float]:
        """Return after how many seconds Alertmanager and health had told it."""
        alert = self.monitoring.wait_alert(name, since=since)
        direct = wait_until(lambda: self.direct.last(name, "firing", since), 10)
        return alert.at - since, direct.at - since


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    path = tmp_path_factory.mktemp("alerts")
    # A small account, so that a position has a price of liquidation.
    config = metrics_config() | {"paper": {"accounts": {"main": {"balance": 600}}},
                                 "executor": {"reconcile_s": 5, "canary_s": 1}}
    config["health"]["stuck_ms"] = 40_000  # nobody here starts again what a busy machine held up
    config["guard"] = {"cancel_after_s": 180}
    with Appliance(path, **config) as appliance:
        appliance.start("paper")
        wait_until(lambda: _is_up(appliance))
        appliance.start(*ALL[1:])
        appliance.wait_running()
        with Monitoring(path, appliance) as monitoring:  # what a busy machine takes to start is no alert
            stage = Stage(path, appliance, monitoring)
            yield stage
            stage.direct.close()


def _well(stage: Stage, seconds: float) -> None:
    monitoring, began = stage.monitoring, time.time()
    monitoring.wait_scraped(*ALL)
    restarts = 0
    while time.time() - began < seconds:
        stage.appliance.stop("strategy-levels")
        stage.appliance.start("strategy-levels")
        restarts += 1
        time.sleep(min(60.0, seconds - 5))
        told = [a.name for a in monitoring.receiver.alerts if a.name != "Watchdog"]
        firing = monitoring.query('ALERTS{alertname!="Watchdog",alertstate="firing"}')
        assert not told and not firing and not stage.direct.alerts, (told, firing, stage.direct.bodies)
    counters = stage.appliance.status()["counters"]
    print(f"{time.time() - began:.0f} s with {restarts} restarts of the strategy, {counters['fills']} fills: "
          "no alert")
    assert monitoring.receiver.last("Watchdog", "firing"), "the path works, and had nothing to tell"


def test_healthy_trading_with_restarts_of_the_strategy_raises_no_alert(stage: Stage) -> None:
    _well(stage, WELL_S)


@pytest.mark.drill
def test_half_an_hour_of_healthy_trading_raises_no_alert(stage: Stage) -> None:
    _well(stage, 1_800)


def test_panels_of_the_dashboards_have_data(stage: Stage, tmp_path: Path) -> None:
    stage.monitoring.start_node_exporter()
    wait_until(lambda: stage.appliance.status()["counters"]["fills"], 120, step=0.5)
    asked: dict[str, str] = {}
    for page in sorted((ROOT / "ops" / "grafana" / "dashboards").glob("*.json")):
        dashboard = json.loads(page.read_text())
        assert dashboard["uid"] == page.stem
        for panel in dashboard["panels"]:
            assert panel["datasource"]["uid"] == "tradehost"
            asked |= {target["expr"]: f"{page.name}: {panel['title']}" for target in panel["targets"]}
    assert len(asked) > 40
    missing = dict(asked)

    def have_data() -> bool:
        for promql in list(missing):
            if any(row["value"] == row["value"] for row in stage.monitoring.query(promql)):  # no NaN
                del missing[promql]
        return not missing
    try:
        wait_until(have_data, 30, step=1)
    except AssertionError:
        raise AssertionError(f"no data: {missing}") from None
    print(f"{len(asked)} expressions of the dashboards have data")


def test_halt_is_told_in_time_by_both_ways_and_is_over_after_the_resume(stage: Stage) -> None:
    began = time.time()
    stage.halts.set("all", who="a test", why="to be told", clock=Clock())
    told_s, direct_s = stage.told_at("TradingHalted", began)
    alert = stage.monitoring.receiver.last("TradingHalted", "firing")
    stage.halts.clear("all")
    resumed = time.time()
    over = stage.monitoring.wait_resolved("TradingHalted", since=resumed)
    wait_until(lambda: stage.direct.last("TradingHalted", "resolved", resumed), 10)
    print(f"HALTED: told after {told_s:.1f} s, by health itself after {direct_s:.1f} s; "
          f"over {over.at - resumed:.1f} s after the resume")
    assert told_s <= MONEY_S and direct_s <= DIRECT_S
    assert alert.labels == {"alertname": "TradingHalted", "severity": "critical", "mode": "PAPER",
                            "process": "executor", "state": "HALTED", "job": "tradehost",
                            "instance": alert.labels["instance"]}
    assert alert.annotations["summary"].startswith("PAPER: trading is HALTED")
    assert alert.annotations["command"] == "botctl status"
    assert alert.annotations["runbook_url"] == "RUNBOOK.md#tradinghalted"
    said = stage.direct.last("TradingHalted", "firing").annotations["summary"]
    assert said.startswith("PAPER: HALTED by a test: to be told")


def test_botctl_tests_the_path_and_says_who_took_it(stage: Stage) -> None:
    began = time.time()
    rows = stage.botctl("alert", "test")
    assert [(row["way"], row["is_taken"]) for row in rows] == [("webhook", True), ("health", True)], rows
    assert stage.monitoring.receiver.last("AlertTest", "firing", began)
    assert stage.direct.last("AlertTest", "firing", began)
    stage.monitoring.receiver.status = 500
    try:
        rows = stage.botctl("alert", "test", exit_code=1)
        assert not rows[0]["is_taken"], rows
    finally:
        stage.monitoring.receiver.status = 200


def test_silence_keeps_alerts_from_people_and_health_tells_all_the_same(stage: Stage) -> None:
    stage.botctl("alert", "silence", "--for", "5m", "--reason", "a deploy")
    began = time.time()
    stage.halts.set("all", who="a test", why="in the window", clock=Clock())
    wait_until(lambda: any(a["alertname"] == "TradingHalted" for a in stage.monitoring.firing()), 10)
    wait_until(lambda: stage.direct.last("TradingHalted", "firing", began), 10)
    time.sleep(3)
    assert not stage.monitoring.receiver.last("TradingHalted", "firing", began), "told in the window"
    # A switch ends its own, and leaves the operator's.
    stage.botctl("alert", "silence", "--reason", "switch")
    assert len(stage.botctl("alert", "unsilence", "--reason", "switch")["ended"]) == 1
    assert len(stage.botctl("alert", "unsilence")["ended"]) == 1
    stage.monitoring.wait_alert("TradingHalted", 30, since=began)
    stage.halts.clear("all")
    stage.monitoring.wait_resolved("TradingHalted", since=began)
    stage.botctl("alert", "unsilence", exit_code=1)


@pytest.mark.drill
def test_position_without_its_stop_is_told_in_time_by_both_ways(stage: Stage) -> None:
    if "strategy-levels" in stage.appliance.processes:
        stage.appliance.stop("strategy-levels")
    played = Signaler(stage.appliance)
    try:
        stage.appliance.wait_running()
        stage.appliance.control("POST", "/paper/faults", {"match": "POST /fapi/v1/algoOrder", "do": "answer",
                                                          "status": 400, "body": REFUSED, "times": 10**5})
        played.position()
        if not stage.appliance.our_position():
            stage.appliance.control("DELETE", "/paper/faults", None)
            _enter(stage.appliance, played)
            wait_until(lambda: stage.appliance.open_stops(), 10)
        began = time.time()
        for order in stage.appliance.open_stops():
            stage.appliance.ask("DELETE", "/fapi/v1/algoOrder", algoId=order["algoId"])
        naked = wait_until(lambda: _unprotected_s(stage.appliance) > 0, 15) and time.time()
        told_s, direct_s = stage.told_at("PositionUnprotected", began)
        print(f"{BTC} without its stop, known {naked - began:.1f} s after the cancel: told {told_s:.1f} s "
              f"after the cancel, by health itself {direct_s:.1f} s")
    finally:
        stage.appliance.control("DELETE", "/paper/faults", None)
        played.close()


def _unprotected_s(appliance: Appliance) -> float:
    return appliance.beats()["executor"]["symbols"].get(BTC, {}).get("unprotected_s", 0.0)
