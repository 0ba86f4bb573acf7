"""Limits on a running appliance: the day's loss halts for good, a red canary lets nothing open."""

import signal
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from bot.halt import HaltFiles
from tests.appliance import Appliance, Signaler
from tests.drill.test_executor import _enter, _is_up
from tests.harness import wait_until

QTY = "0.010"
REFUSED = '{"code":-4120,"msg":"Order type not supported for this endpoint. Use the Algo Order API."}'


@pytest.fixture
def appliance(tmp_path: Path):
    with Appliance(tmp_path, executor={"reconcile_s": 2, "canary_s": 1, "recover_s": 1},
                   limits={"day_loss_max": 15}, paper={"latency_ms": 0}) as appliance:
        appliance.start("paper")
        wait_until(lambda: _is_up(appliance))
        yield appliance


def _start(appliance: Appliance) -> Signaler:
    appliance.start("gateway", "executor")
    appliance.wait_running()
    played = Signaler(appliance)
    played.position()
    return played


def _halt(appliance: Appliance):
    return next(iter(HaltFiles(appliance.config.path("halt")).list()), None)


def test_day_loss_of_an_open_position_halts_and_neither_restart_nor_resume_forgets_it(appliance) -> None:
    played = _start(appliance)
    try:
        assert played.outcome(_enter(appliance, played, QTY)).outcome == "done"
        wait_until(lambda: len(appliance.open_stops()) == 2)
        appliance.control("POST", "/paper/mark", {"symbol": "BTCUSDT", "offset_pct": -4})
        halt = wait_until(lambda: _halt(appliance), 10)
        assert (halt.scope, halt.who) == ("all", "executor")
        assert halt.why.startswith("day_loss: limit 15, was")
        assert appliance.exchange_position() == Decimal(QTY), "it is held, behind its stop"
        assert len(appliance.open_stops()) == 2
        appliance.kill("executor")
        subprocess.run([sys.executable, "-m", "bot.botctl", "resume", "--config", str(appliance.path)],
                       check=True, capture_output=True, timeout=20)
        assert _halt(appliance) is None
        appliance.start("executor")
        halt = wait_until(lambda: _halt(appliance), 20)
        assert halt.why.startswith("day_loss: limit 15")
    finally:
        played.close()


def test_canary_red_lets_nothing_open_and_all_is_well_again_by_itself(appliance) -> None:
    appliance.control("POST", "/paper/faults", {"match": "POST /fapi/v1/algoOrder", "do": "answer",
                                                "status": 400, "body": REFUSED, "times": 10**5})
    appliance.start("gateway", "executor")
    wait_until(lambda: "-4120" in appliance.status()["state_reason"], 20)
    played = Signaler(appliance)
    try:
        played.position()
        outcome = played.outcome(_enter(appliance, played, QTY))
        assert outcome.outcome == "denied" and "the exchange refuses stops" in outcome.reason
        assert not appliance.exchange_orders(), "the first trade is not made without a stop path"
        appliance.control("DELETE", "/paper/faults", None)
        appliance.wait_running(30)
        played.position()
        assert played.outcome(_enter(appliance, played, QTY)).outcome == "done"
        wait_until(lambda: len(appliance.open_stops()) == 2)
    finally:
        played.close()


def test_limits_made_tighter_count_at_once_and_looser_ones_after_a_restart(appliance) -> None:
    played = _start(appliance)
    try:
        text = appliance.path.read_text()
        assert "order_notional_max = 20000\n" in text
        appliance.path.write_text(text.replace("order_notional_max = 20000\n", "order_notional_max = 100\n"))
        appliance.processes["executor"].send_signal(signal.SIGHUP)
        log = appliance.path.parent / "bot.executor.log"
        wait_until(lambda: "config_reread" in log.read_text(), 10)
        outcome = played.outcome(_enter(appliance, played, QTY))
        assert outcome.outcome == "denied" and "order_notional: limit 100" in outcome.reason
        appliance.path.write_text(text)
        appliance.processes["executor"].send_signal(signal.SIGHUP)
        wait_until(lambda: "limits that became looser" in log.read_text(), 10)
        outcome = played.outcome(_enter(appliance, played, QTY))
        assert outcome.outcome == "denied" and "order_notional: limit 100" in outcome.reason
        appliance.stop("executor")
        appliance.start("executor")
        appliance.wait_running()
        played.position()
        assert played.outcome(_enter(appliance, played, QTY)).outcome == "done"
    finally:
        played.close()


def test_burst_in_two_symbols_and_the_unknown_share_what_is_left_of_the_exposure(tmp_path: Path) -> None:
    tables: dict = {name: {"class": "bot.support_resistance:SupportResistanceStrategy",
                           "symbols": [f"{name.upper()}/USDT:USDT"]} for name in ("btc", "eth")}
    with Appliance(tmp_path, strategy={**tables, "levels": None},
                   limits={f"{what}_notional_max": 1_000 for what in ("order", "position", "exposure")},
                   executor={"reconcile_s": 2, "absent_after_s": 60}, exchange={"request_timeout_ms": 1_500},
                   paper={"latency_ms": 0, "symbols": [t["symbols"][0] for t in tables.values()]}) as running:
        running.start("paper", "gateway", "executor")
        running.wait_running()
        played = {name: Signaler(running, name) for name in tables}
        try:
            # Each for 600 of 1,000, at once, and the exchange answers neither.
            running.control("POST", "/paper/faults", {"match": "POST /fapi/v1/order", "do": "lose_answer",
                                                      "times": 10})
            signals = {}
            for name, signaler in played.items():
                signaler.position()
                mark = _mark_of(running, f"{name.upper()}USDT")
                qty = round(600 / mark, 3 if name == "btc" else 2)
                signals[name] = signaler.signal(str(qty), mark=mark, symbol=f"{name.upper()}/USDT:USDT")
            for name, signaler in played.items():
                signaler.send(signals[name])
            ended = {name: s.outcome(signals[name].seq, 40) for name, s in played.items()}
            assert sorted(o.outcome for o in ended.values()) == ["denied", "done"], ended
            denied = next(o for o in ended.values() if o.outcome == "denied")
            assert denied.reason.startswith("exposure_notional: limit 1000, would be 1"), denied.reason
            orders = [o for name in tables for o in running.exchange_orders(f"{name.upper()}USDT")]
            assert len(orders) == 1
        finally:
            for signaler in played.values():
                signaler.close()


def _mark_of(appliance: Appliance, symbol: str) -> float:
    return float(appliance._http("GET", f"/fapi/v1/premiumIndex?symbol={symbol}", None)["markPrice"])
