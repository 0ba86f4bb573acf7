"""Beats as others read them: a strategy writes its own, and may write anything."""

import os

import msgspec
import pytest

from bot.config_file import load
from bot.status import BEAT_BYTES_MAX, read_beats
from tests.harness import write_config

NAME = "strategy-levels"
GOOD = {"name": NAME, "pid": 7, "run": 1, "mono_ns": 1, "version": "1", "config": "c", "ended": False,
        "crash_starts": [], "descriptors": 9, "descriptors_max": 99, "levels": {"BTC/USDT:USDT": [1.5]}}


@pytest.fixture
def config(tmp_path):
    config = load(write_config(tmp_path))
    config.run_path(NAME).mkdir(parents=True)
    return config


def test_beat_with_all_that_is_relied_on_is_read_whole(config):
    (config.run_path(NAME) / f"{NAME}.json").write_bytes(msgspec.json.encode(GOOD | {"more": 1}))
    assert read_beats(config) == {NAME: GOOD | {"more": 1}}


@pytest.mark.parametrize("change", [
    {"pid": "7"}, {"pid": -1}, {"pid": 1 << 40}, {"mono_ns": None}, {"levels": [1]}, {"levels": {"x": "y"}},
    {"crash_starts": 3}, {"descriptors_max": 0}, {"run": 1 << 63}, {"mono_ns": -1},
    {"long": "x" * BEAT_BYTES_MAX}], ids=str)
def test_beat_of_a_hostile_strategy_is_as_if_there_were_none(config, change):
    (config.run_path(NAME) / f"{NAME}.json").write_bytes(msgspec.json.encode(GOOD | change))
    assert read_beats(config) == {}


def test_beat_with_a_number_that_nothing_can_compute_with_is_as_if_there_were_none(config):
    raw = msgspec.json.encode(GOOD).replace(b'"run":1', b'"run":1' + b"0" * 330)
    (config.run_path(NAME) / f"{NAME}.json").write_bytes(raw)
    assert read_beats(config) == {}


def test_beat_that_is_a_pipe_or_a_link_holds_nobody_up(config, tmp_path):
    path = config.run_path(NAME) / f"{NAME}.json"
    os.mkfifo(path)
    assert read_beats(config) == {}
    path.unlink()
    (tmp_path / "elsewhere").write_bytes(msgspec.json.encode(GOOD))
    path.symlink_to(tmp_path / "elsewhere")
    assert read_beats(config) == {}
