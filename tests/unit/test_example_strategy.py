"""The documented example: short, loaded like a user's own, decides, and its docstring's TOML is valid."""

import re
import tomllib
from decimal import Decimal

import pytest

from bot.config_file import load
from bot.errors import ConfigError
from bot.user_class import load_class
from tests.harness import ROOT, write_config
from tests.unit.test_runner import World, only

EXAMPLE = ROOT / "docs" / "example_strategy.py"


@pytest.fixture
def table():
    toml = re.search(r"(    \[strategy\.rise\].*?)\"\"\"", EXAMPLE.read_text(), re.DOTALL).group(1)
    return tomllib.loads(toml, parse_float=Decimal)["strategy"]["rise"]


@pytest.fixture
def world(tmp_path, monkeypatch, table):
    monkeypatch.syspath_prepend(EXAMPLE.parent)
    table["settings"] = {"notional": None, **table["settings"]}  # not the default's
    config = load(write_config(tmp_path, strategy={"levels": table}))
    return World(config, load_class(config, "levels"))


def test_example_with_its_lines_is_read_at_a_glance():
    assert len(EXAMPLE.read_text().splitlines()) < 40


def test_example_with_a_fast_rise_buys_once_and_leaves_after_a_while(world):
    world.ready()
    for n in range(20):
        world.clock.now_ns += 10**9
        world.executor_beat()
        world.tick(60_000.0 + 2 * n)  # 0.03 % in 10 s: too slow
    assert world.signals() == []
    world.tick(60_060.0)
    signal = only(world.signals())
    assert (signal.target_qty, signal.stop_loss, signal.take_profit) == (
        Decimal("0.010"), Decimal("59939.8"), Decimal("60180.2")), "on the grid, away from the price"
    assert re.fullmatch(r"rose 0\.0\d\d %", signal.reason)
    world.ack(signal)
    world.outcome(signal, "done")
    world.tick(60_100.0)
    assert world.wait(59_000) == []
    world.clock.now_ns += 2 * 10**9
    world.gateway_beat()
    world.executor_beat()
    world.tick(60_100.0)
    assert only(world.signals()).target_qty == 0


@pytest.mark.parametrize("change", [
    {"qty": Decimal(0)}, {"hold_s": "long"}, {"extra": 1}, {"window_s": None}])
def test_example_with_wrong_settings_is_a_config_error(world, change):
    assert set(world.runner.table.settings) == {"qty", "rise_pct", "window_s", "hold_s"}
    world.runner.table.settings.update(change)
    with pytest.raises(ConfigError, match=r"strategy\.levels\.settings: example_strategy:FastRise refuses"):
        world.snapshot()
