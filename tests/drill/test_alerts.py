"""Alerts end to end on one running appliance: silence while all is well, the message when it is not."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bot.alert import UNPROTECTED_S_MAX
from bot.clock import Clock
from bot.halt import HaltFiles
from tests.appliance import BTC, Appliance, Signaler
from tests.drill.test_executor import _enter, _is_up
from tests.drill.test_rebased import REBASED, RECORDING, SETTINGS
from tests.harness import ROOT, wait_until
from tests.monitoring import Monitoring, Receiver, metrics_config, needs_monitoring
from tests.schemas import decoded

ALL = ("paper", "gateway", "executor", "strategy-levels", "health", "guard")
# A beat, a scrape, an evaluation: 1 s each at most; then the way to the receiver.
MONEY_S = 5.0
# health looks each second at beats of each second.
DIRECT_S = 3.0
TRIES = 3  # a busy machine may hold up one of them
# Healthy trading on each market, with a restart of the strategy each minute: half of what make test, or
# make drill, gives to both.
WELL_S, DRILL_S = 90, 1_800
MARKETS = ["synthetic", pytest.param("recorded", marks=pytest.mark.skipif(
    not RECORDING.exists(), reason=f"the recording {RECORDING} is absent (TRADEHOST_DATA)"))]
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


@contextmanager
def staged(path: Path, paper: dict[str, Any], strategy: dict[str, Any]) -> Iterator[Stage]:
    # A small account, so that a position has a price of liquidation.
    config = metrics_config() | {"paper": {"accounts": {"main": {"balance": 600}}, **paper},
                                 "executor": {"reconcile_s": 5, "canary_s": 1}}
    config["strategy"]["levels"] |= strategy
    config["health"]["stuck_ms"] = 40_000  # nobody here starts again what a busy machine held up
    config["guard"] = {"cancel_after_s": 180}
    with Appliance(path, **config) as appliance:
        appliance.start("paper")
        wait_until(lambda: _is_up(appliance), 60)  # a recording is read first
        appliance.start(*ALL[1:])
        appliance.wait_running()
        with Monitoring(path, appliance) as monitoring:  # what a busy machine takes to start is no alert
            stage = Stage(path, appliance, monitoring)
            yield stage
            stage.direct.close()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    with staged(tmp_path_factory.mktemp("alerts"), {}, {}) as made:
        yield made


@pytest.fixture
def market(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    if request.param == "synthetic":
        yield request.getfixturevalue("stage")
        return
    with staged(tmp_path, REBASED, {"settings": SETTINGS}) as made:
        yield made


def _well(stage: Stage, seconds: float) -> None:
    monitoring, began = stage.monitoring, time.time()
    monitoring.wait_scraped(*ALL)
    restarts = 0
    while (left_s := seconds - (time.time() - began)) > 0:
        stage.appliance.stop("strategy-levels")
        stage.appliance.start("strategy-levels")
        restarts += 1
        time.sleep(min(60.0, left_s))
        told = [a.name for a in monitoring.receiver.alerts if a.name != "Watchdog"]
        firing = monitoring.query('ALERTS{alertname!="Watchdog",alertstate="firing"}')
        assert not told and not firing and not stage.direct.alerts, (told, firing, stage.direct.bodies)
    counters = stage.appliance.status()["counters"]
    print(f"{time.time() - began:.0f} s with {restarts} restarts of the strategy, {counters['ticks']} Ticks, "
          f"{counters['ticks_lost']} lost, {counters['fills']} fills: no alert")
    assert monitoring.receiver.last("Watchdog", "firing"), "the path works, and had nothing to tell"


@pytest.mark.parametrize("market", MARKETS, indirect=True)
def test_healthy_trading_with_restarts_of_the_strategy_raises_no_alert(market: Stage) -> None:
    _well(market, WELL_S)


@pytest.mark.drill
@pytest.mark.parametrize("market", MARKETS, indirect=True)
def test_half_an_hour_of_healthy_trading_raises_no_alert(market: Stage) -> None:
    _well(market, DRILL_S)


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
    for _ in range(TRIES):
        began = time.time()
        stage.halts.set("all", who="a test", why="to be told", clock=Clock())
        told_s, direct_s = stage.told_at("TradingHalted", began)
        alert = stage.monitoring.receiver.last("TradingHalted", "firing")
        stage.halts.clear("all", clock=Clock())
        resumed = time.time()
        over = stage.monitoring.wait_resolved("TradingHalted", since=resumed)
        wait_until(lambda resumed=resumed: stage.direct.last("TradingHalted", "resolved", resumed), 10)
        print(f"HALTED: told after {told_s:.1f} s, by health itself after {direct_s:.1f} s; "
              f"over {over.at - resumed:.1f} s after the resume")
        if told_s <= MONEY_S and direct_s <= DIRECT_S:
            break
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
    stage.halts.clear("all", clock=Clock())
    stage.monitoring.wait_resolved("TradingHalted", since=began)
    stage.botctl("alert", "unsilence", exit_code=1)


def test_position_without_its_stop_is_told_in_time_by_both_ways(stage: Stage) -> None:
    if "strategy-levels" in stage.appliance.processes:
        stage.appliance.stop("strategy-levels")
    played = Signaler(stage.appliance)
    try:
        stage.appliance.wait_running()
        played.position()
        if not stage.appliance.our_position():
            _enter(stage.appliance, played)
        stops = wait_until(stage.appliance.open_stops, 20)
        stage.appliance.control("POST", "/paper/faults", {"match": "POST /fapi/v1/algoOrder", "do": "answer",
                                                          "status": 400, "body": REFUSED, "times": 10**5})
        began = time.time()
        for order in stops:
            stage.appliance.ask("DELETE", "/fapi/v1/algoOrder", algoId=order["algoId"])
        wait_until(lambda: _unprotected_s(stage.appliance) > 0, 15)
        naked_s = time.time() - began
        told_s, direct_s = stage.told_at("PositionUnprotected", began)
        print(f"{BTC} without its stop, known after {naked_s:.1f} s: told {told_s:.1f} s after the "
              f"cancel, by health itself {direct_s:.1f} s")
        assert told_s <= naked_s + UNPROTECTED_S_MAX + MONEY_S
        assert direct_s <= naked_s + UNPROTECTED_S_MAX + DIRECT_S
    finally:
        stage.appliance.control("DELETE", "/paper/faults", None)
        played.close()


def _unprotected_s(appliance: Appliance) -> float:
    return appliance.beats()["executor"]["symbols"].get(BTC, {}).get("unprotected_s", 0.0)
