"""The whole appliance under supervisord: kill -9 of each process in turn while it trades."""

import os
import signal
import subprocess
import sys
import time
from decimal import Decimal
from pathlib import Path

from tests.appliance import BTC, Appliance
from tests.harness import ROOT, wait_until

# A strategy that always has something to do: in and out again, each some seconds, with a stop.
RESTLESS = '''
from decimal import Decimal
from bot.model import Target

class Restless:
    def __init__(self, settings, instruments):
        self.since = 0
        self.qty = Decimal(0)

    def on_tick(self, tick):
        if tick.kind != "quote" or tick.exchange_ns - self.since < 2_000_000_000:
            return None
        self.since = tick.exchange_ns
        self.qty = Decimal("0.010") if self.qty == 0 else Decimal(0)
        stop = Decimal(round(tick.price * 0.97)) if self.qty else None
        return Target(tick.symbol, self.qty, stop_loss=stop, reason="restless")
'''


def _pids(appliance: Appliance) -> dict[str, int]:
    return {p["name"]: p["pid"] for p in appliance.status()["processes"] if p["state"] == "UP"}


def _settled(appliance: Appliance) -> bool:
    status = appliance.status()
    return status["state"] == "RUNNING" and status["unknown_orders"] == 0


def test_appliance_with_each_process_killed_in_turn_comes_back_by_itself(tmp_path: Path) -> None:
    (tmp_path / "restless.py").write_text(RESTLESS)
    appliance = Appliance(tmp_path, paper={"latency_ms": 1}, executor={"reconcile_s": 2, "absent_after_s": 5},
                          strategy={"levels": {"class": "restless:Restless", "signals_per_s_max": 5}})
    env = os.environ | {"PYTHONPATH": str(tmp_path)}
    with open(tmp_path / "run.log", "wb") as log:
        command = [sys.executable, "-m", "bot.run", "--config", str(appliance.path), "--root", str(tmp_path)]
        run = subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=log)
    try:
        wait_until(lambda: appliance.status()["counters"]["fills"] >= 1, 60)
        names = ["gateway", "strategy-levels", "executor", "paper"]
        for name in names:
            before, fills = _pids(appliance)[name], appliance.journal().books().fills
            os.kill(before, signal.SIGKILL)
            began = time.monotonic()
            wait_until(lambda n=name, b=before: _pids(appliance).get(n, b) != b, 30)
            wait_until(lambda f=fills: _settled(appliance) and appliance.journal().books().fills > f, 40)
            print(f"{name}: trading again {time.monotonic() - began:.1f} s after kill -9")
        assert not appliance.status()["halted"]
        assert not appliance.status()["locked_symbols"]
    finally:
        run.send_signal(signal.SIGINT)
        ended = time.monotonic()
        assert run.wait(15) == 0
        assert time.monotonic() - ended < 10
    _books_agree_with_a_restarted_exchange(appliance)


def _books_agree_with_a_restarted_exchange(appliance: Appliance) -> None:
    with appliance:
        appliance.start("paper")
        wait_until(lambda: _answers(appliance), 15)
        books = appliance.journal().books()
        orders = appliance.exchange_orders()
        names = [o["clientOrderId"] for o in orders]
        assert len(names) == len(set(names))
        for name in names:
            assert appliance.journal().find("intent", name) is not None
        executed = sum(Decimal(t["qty"]) * (1 if t["side"] == "BUY" else -1)
                       for t in appliance.ask("GET", "/fapi/v1/userTrades", symbol="BTCUSDT", limit=1000))
        # A signal in the very last moment may have left after the executor was asked to stop.
        assert executed == appliance.exchange_position()
        if not any(not o.is_settled for o in books.book(BTC).orders.values() if not o.request.is_conditional):
            assert books.book(BTC).position_qty == executed


def _answers(appliance: Appliance) -> bool:
    try:
        return bool(appliance.ask("GET", "/fapi/v1/time"))
    except OSError:
        return False
