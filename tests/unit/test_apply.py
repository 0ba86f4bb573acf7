"""A strategy that holds something does not go."""

from argparse import Namespace

import msgspec
import pytest

from bot import apply as module
from bot.apply import apply
from bot.books import Books
from bot.clock import Clock
from bot.commands import Answered
from bot.errors import ConfigError, RefusedError
from bot.halt import HaltFiles
from tests.harness import write_config

ETH = {"class": "a.b:C", "symbols": ["ETH/USDT:USDT"]}


def beat_of(tmp_path, **fields):
    folder = tmp_path / "var" / "run"
    folder.mkdir(parents=True)
    beat = {"name": "executor", "pid": 1, "ended": False, "run": 1, "mono_ns": 1, "version": "", "config": "",
            "crash_starts": [], "descriptors": 1, "descriptors_max": 9,
            "owners": {"ETH/USDT:USDT": "eth"}} | fields
    (folder / "executor.json").write_bytes(msgspec.json.encode(beat))


def held() -> Books:
    books = Books()
    book = books.book("ETH/USDT:USDT")
    book.position_qty += 1
    books.symbols["ETH/USDT:USDT"] = book
    return books


@pytest.mark.parametrize(("change", "heir", "said"), [
    ({"eth": None}, "", "strategy.eth holds 1 ETH/USDT:USDT and 0 orders: it is not removed"),
    ({"eth": None}, "levels", "strategy.levels.symbols must list it"),
    ({"eth": None, "other": ETH}, "", "its symbol gets no other owner"),
    ({"eth": None, "other": ETH}, "levels", "its symbol gets no other owner")])
def test_apply_with_a_position_left_behind_is_refused_and_changes_nothing(tmp_path, change, heir, said):
    beat_of(tmp_path)
    path = write_config(tmp_path, strategy={k: v for k, v in change.items() if v})
    new = tmp_path / "new.toml"
    new.write_text(path.read_text())
    path.write_text("as it was")
    with pytest.raises(RefusedError, match=said):
        apply(path, new, held(), heir=heir)
    assert path.read_text() == "as it was" and not (tmp_path / "var" / "supervisor.d").exists()


def test_apply_with_an_heir_who_gets_the_symbol_goes_on(tmp_path):
    beat_of(tmp_path)
    path = write_config(tmp_path, strategy={"other": ETH})
    with pytest.raises(RefusedError, match="supervisorctl signal HUP"):  # none runs here: behind the check
        apply(path, path, held(), heir="other")


def test_apply_with_a_wrong_file_is_refused_and_changes_nothing(tmp_path):
    path = write_config(tmp_path)
    new = tmp_path / "new.toml"
    new.write_text("mode = 7")
    before = path.read_text()
    with pytest.raises(ConfigError, match="mode"):
        apply(path, new, Books())
    assert path.read_text() == before


def test_apply_with_nothing_running_says_how_to_start(tmp_path):
    path = write_config(tmp_path)
    with pytest.raises(RefusedError, match="make run"):
        apply(path, path, Books())
    beat_of(tmp_path, ended=True)
    with pytest.raises(RefusedError, match="make run"):
        apply(path, path, Books())


@pytest.mark.parametrize("owners", [{"ETH/USDT:USDT": "eth"}, {"BTC/USDT:USDT": "levels"}])
def test_apply_starts_nothing_before_the_executor_knows_whose_each_symbol_is(tmp_path, monkeypatch, owners):
    said = []
    monkeypatch.setattr(module, "_supervisorctl", lambda config, *words: said.append(words))
    monkeypatch.setattr(module, "ANSWER_TURNS", 2)
    beat_of(tmp_path, owners=owners)
    path = write_config(tmp_path)
    if owners == {"BTC/USDT:USDT": "levels"}:
        assert apply(path, path, Books())["added"] == ["paper", "strategy-levels"]
        assert said == [("signal", "HUP", "executor"), ("update",)]
    else:
        with pytest.raises(RefusedError, match="has not read the file again"):
            apply(path, path, Books())
        assert said == [("signal", "HUP", "executor")]


@pytest.mark.parametrize(("by", "why", "stays"), [
    ("anna", "its stops are odd", True), ("", "", False)], ids=["halted before", "halted for it"])
def test_apply_that_flattened_a_strategy_resumes_it_unless_a_person_had_halted_it(
        tmp_path, monkeypatch, by, why, stays):
    beat_of(tmp_path, owners={"ETH/USDT:USDT": "levels"})
    path = write_config(tmp_path, strategy={"other": ETH})  # levels lives on with BTC
    halts, books = HaltFiles(tmp_path / "var" / "halt"), held()
    if by:
        halts.set("strategy:levels", who=by, why=why, clock=Clock())

    async def close(*_, **__):
        books.symbols.clear()
        return Answered(True, "flat")
    monkeypatch.setattr(module.CommandFiles, "ask", close)
    monkeypatch.setattr(module, "open_reader", lambda _: Namespace(books=lambda: books))
    monkeypatch.setattr(module, "apply", lambda *_, **__: {"removed": []})
    module.apply_config(Namespace(config=path, file=None, flatten=True, adopt=None, json=False))
    assert not books.symbols and [h.scope for h in halts.list()] == ["strategy:levels"] * stays
