"""Beats as others read them: a strategy writes its own, and may write anything."""

import os

import msgspec
import pytest

from bot.clock import Clock
from bot.config_file import load
from bot.events import Unprotected
from bot.status import BEAT_BYTES_MAX, gather, position_row, read_beats
from tests.factory import BTC, NOW, SECOND, changed, holding, intended
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


def test_status_while_guard_closes_everything_says_so_and_that_the_rest_is_older(config):
    guard = {**GOOD, "name": "guard", "flattening": True}
    config.run_path("guard").mkdir(parents=True, exist_ok=True)
    (config.run_path("guard") / "guard.json").write_bytes(msgspec.json.encode(guard))
    assert "guard closes everything just now" in gather(config, Clock())["state_reason"]
    (config.run_path("guard") / "guard.json").write_bytes(msgspec.json.encode(guard | {"flattening": False}))
    assert "guard" not in gather(config, Clock())["state_reason"]


def test_beat_that_is_a_pipe_or_a_link_holds_nobody_up(config, tmp_path):
    path = config.run_path(NAME) / f"{NAME}.json"
    os.mkfifo(path)
    assert read_beats(config) == {}
    path.unlink()
    (tmp_path / "elsewhere").write_bytes(msgspec.json.encode(GOOD))
    path.symlink_to(tmp_path / "elsewhere")
    assert read_beats(config) == {}


def stop_at(price: str, qty: str = "1", *, is_answered: bool = True, name: str = "x"):
    made = intended(name, qty, "sell", leg="stop", trigger=price)
    return [made, changed(name, "accept")] if is_answered else [made]


@pytest.mark.parametrize(("events", "text", "is_protected"), [
    ([], "90 (NOT AT THE EXCHANGE)", False),
    (stop_at("90", is_answered=False), "90 (NOT AT THE EXCHANGE)", False),
    (stop_at("90.0"), "90", True),
    (stop_at("88.50"), "90 (88.5 rests)", True),  # on its way to the new one
    (stop_at("90", "0.4"), "90 (NOT FOR ALL OF IT)", False),
    ([*stop_at("90", name="x"), *stop_at("88", name="y")], "90", True),
])
def test_stop_is_shown_as_it_rests_at_the_exchange_not_as_planned(config, events, text, is_protected):
    book = holding("1", *events, Unprotected(symbol=BTC, since_ns=NOW), stop="90.0").book(BTC)
    row = position_row(book, config, NOW + 3 * SECOND)
    assert (row["stop"], row["unprotected_s"]) == (text, None if is_protected else 3.0)
    assert row["stops_at"] == [o.request.trigger_price for o in book.orders.values() if o.state == "ACCEPTED"]


def test_stop_without_a_plan_is_none_and_one_that_was_left_behind_is_told(config):
    assert position_row(holding("1").book(BTC), config, NOW)["stop"] is None
    assert position_row(holding("0", stop="90").book(BTC), config, NOW)["stop"] is None
    left = position_row(holding("1", *stop_at("90")).book(BTC), config, NOW)
    assert (left["stop"], left["unprotected_s"]) == ("none planned (90 rests)", None)
