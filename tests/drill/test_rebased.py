"""A recorded market as if it were now: SupportResistanceStrategy trades on it, and the books agree."""

from pathlib import Path

import pytest

from tests.appliance import Appliance
from tests.harness import data_path, wait_until

RECORDING = data_path("hftbacktest/usdm-btcusdt-20240808.gz")
# Tight bands: the recording's six minutes move by 0.2 %.
SETTINGS = {"notional": 1_000, "touches_min": 2, "tolerance_pct": 0.05, "confirm_pct": 0.01,
            "stop_pct": 0.1, "take_profit_pct": 0.05, "cooldown_s": 2}
REBASED = {"market": "recording", "recording": str(RECORDING), "playback": "rebased",
           "symbols": ["BTC/USDT:USDT"]}


@pytest.mark.skipif(not RECORDING.exists(), reason=f"the recording {RECORDING} is absent (TRADEHOST_DATA)")
def test_strategy_on_a_rebased_recording_trades(tmp_path: Path) -> None:
    with Appliance(tmp_path, paper=REBASED, strategy={"levels": {"settings": SETTINGS}}) as appliance:
        appliance.start("paper", "gateway", "executor", "strategy-levels")
        appliance.wait_running(60)
        wait_until(lambda: appliance.status()["counters"]["fills"] >= 1, 120)
        wait_until(lambda: appliance.exchange_position() == appliance.our_position())
        assert appliance.status()["counters"]["ticks_lost"] == 0
