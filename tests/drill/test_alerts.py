"""Alerts end to end: an event on a running appliance, and the message that a person gets."""

import time
from pathlib import Path

from bot.clock import Clock
from bot.halt import HaltFiles
from tests.appliance import Appliance
from tests.drill.test_executor import _is_up
from tests.harness import wait_until
from tests.monitoring import Monitoring, metrics_config, needs_monitoring

# A beat, a scrape, an evaluation: 1 s each at most; then the way to the receiver.
MONEY_S = 5.0


@needs_monitoring
def test_halt_on_a_running_appliance_is_told_in_time_and_is_over_after_the_resume(tmp_path: Path) -> None:
    with Appliance(tmp_path, **metrics_config()) as appliance, Monitoring(tmp_path, appliance) as monitoring:
        appliance.start("paper")
        wait_until(lambda: _is_up(appliance))
        appliance.start("gateway", "executor")
        appliance.wait_running()
        monitoring.wait_scraped("paper", "gateway", "executor")
        halts, began = HaltFiles(appliance.config.path("halt")), time.time()
        halts.set("all", who="a test", why="to be told", clock=Clock())
        alert = monitoring.wait_alert("TradingHalted")
        took_s = alert.at - began
        halts.clear("all")
        resumed = time.time()
        over = monitoring.wait_resolved("TradingHalted")
        print(f"HALTED: told after {took_s:.1f} s, over {over.at - resumed:.1f} s after the resume")
        assert took_s <= MONEY_S
        assert alert.labels == {"alertname": "TradingHalted", "severity": "critical", "mode": "PAPER",
                                "process": "executor", "state": "HALTED", "job": "tradehost",
                                "instance": alert.labels["instance"]}
        assert alert.annotations["summary"].startswith("PAPER: trading is HALTED")
        assert alert.annotations["command"] == "botctl status"
        assert alert.annotations["runbook_url"] == "RUNBOOK.md#tradinghalted"
