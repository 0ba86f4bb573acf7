"""The user's class: found anywhere on the Python path, and refused with a clear text."""

import sys
from textwrap import dedent

import pytest

from bot.config_file import load
from bot.errors import ConfigError
from bot.user_class import history_of, load_class
from tests.harness import write_config


@pytest.fixture
def config_for(tmp_path, monkeypatch):
    def write(source, class_path="mine.deep:Mine"):
        package = tmp_path / "mine"
        package.mkdir()
        (package / "__init__.py").write_text("")
        (package / "deep.py").write_text(dedent(source))
        monkeypatch.syspath_prepend(tmp_path)
        for name in ("mine", "mine.deep"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        return load(write_config(tmp_path, strategy={"levels": {"class": class_path}}))
    return write


def test_class_with_a_package_of_its_own_is_found(config_for):
    config = config_for("class Mine:\n    def on_tick(self, tick): return None")
    found = load_class(config, "levels")
    assert (found.__module__, found.__name__) == ("mine.deep", "Mine")
    assert history_of(found, config, "levels") is None


@pytest.mark.parametrize(("source", "class_path", "text"), [
    ("", "absent.module:Mine", "absent.module cannot be imported: ModuleNotFoundError.*PYTHONPATH"),
    ("", "mine.deep:Mine", "Mine in .*deep.py is missing"),
    ("Mine = 5", "mine.deep:Mine", r"Mine in .*deep.py is 5"),
    ("class Mine: pass", "mine.deep:Mine", r"must name a class with a method on_tick\(tick\)"),
    ("class Mine: on_tick = 5", "mine.deep:Mine", "on_tick"),
    ("class Mine(: pass", "mine.deep:Mine", "cannot be imported: SyntaxError"),
    ("import absent_library", "mine.deep:Mine", "cannot be imported: .*absent_library"),
    ("x = undefined_name", "mine.deep:Mine", "cannot be imported: NameError"),
])
def test_class_that_cannot_be_loaded_is_a_config_error(config_for, source, class_path, text):
    with pytest.raises(ConfigError, match=rf"strategy\.levels\.class: .*{text}"):
        load_class(config_for(source, class_path), "levels")


def test_class_of_a_strategy_not_in_the_file_is_a_config_error(config_for):
    with pytest.raises(ConfigError, match=r"strategy\.other: is not in the file; it has levels"):
        load_class(config_for(""), "other")


class Declares:
    def __init__(self, history):
        self.history, self.__name__ = history, "Mine"

    def on_history(self, symbol, candles): ...


@pytest.mark.parametrize("history", [
    {"1m": 0}, {"1m": 1_501}, {"7m": 5}, {"1m": "5"}, {"1m": 5, "5m": 5}, ["1m"], "1m", {5: 5}])
def test_history_with_a_wrong_declaration_is_a_config_error(config_for, history):
    with pytest.raises(ConfigError, match=r"strategy\.levels\.class: Mine\.history: "):
        history_of(Declares(history), config_for(""), "levels")


def test_history_without_a_method_to_take_it_is_a_config_error(config_for):
    mine = type("Mine", (), {"history": {"1m": 5}})
    with pytest.raises(ConfigError, match=r"needs a method on_history"):
        history_of(mine, config_for(""), "levels")


def test_history_with_a_right_declaration_is_returned(config_for):
    config = config_for("")
    assert history_of(Declares({"5m": 1_500}), config, "levels") == ("5m", 1_500)
    assert history_of(Declares({}), config, "levels") is None
