"""A strategy that holds something does not go."""

from argparse import Namespace

import msgspec
import pytest

from bot import apply as module
from bot.apply import apply
from bot.books import Books
from bot.clock import Clock
from bot.commands import Answered
from bot.config_file import load
from bot.errors import ConfigError, RefusedError
from bot.halt import HaltFiles
from bot.status import stale
from tests.harness import write_config

ETH = {"class": "a.b:C", "symbols": ["ETH/USDT:USDT"]}


def beat_of(tmp_path, **fields):
    folder = tmp_path / "var" / "run"
    folder.mkdir(parents=True, exist_ok=True)
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
        apply(path, new, held, heir=heir)
    assert path.read_text() == "as it was" and not (tmp_path / "var" / "supervisor.d").exists()


def test_apply_with_an_heir_who_gets_the_symbol_goes_on(tmp_path):
    beat_of(tmp_path)
    path = write_config(tmp_path, strategy={"other": ETH})
    with pytest.raises(RefusedError, match="supervisorctl signal HUP"):  # none runs here: behind the check
        apply(path, path, held, heir="other")


def test_apply_with_a_wrong_file_is_refused_and_changes_nothing(tmp_path):
    path = write_config(tmp_path)
    new = tmp_path / "new.toml"
    new.write_text("mode = 7")
    before = path.read_text()
    with pytest.raises(ConfigError, match="mode"):
        apply(path, new, Books)
    assert path.read_text() == before


def test_apply_with_nothing_running_says_how_to_start(tmp_path):
    path = write_config(tmp_path)
    with pytest.raises(RefusedError, match="make run"):
        apply(path, path, Books)
    beat_of(tmp_path, ended=True)
    with pytest.raises(RefusedError, match="make run"):
        apply(path, path, Books)


@pytest.mark.parametrize("owners", [{"ETH/USDT:USDT": "eth"}, {"BTC/USDT:USDT": "levels"}])
def test_apply_starts_nothing_before_the_executor_knows_whose_each_symbol_is(tmp_path, monkeypatch, owners):
    said = []
    monkeypatch.setattr(module, "_supervisorctl", lambda config, *words: said.append(words))
    monkeypatch.setattr(module, "ANSWER_TURNS", 2)
    beat_of(tmp_path, owners=owners)
    path = write_config(tmp_path)
    if owners == {"BTC/USDT:USDT": "levels"}:
        config = load(path)
        beat_of(tmp_path, owners=owners, config=config.fingerprint(),
                shared_config=config.fingerprint(is_shared=True))
        assert apply(path, path, Books)["added"] == ["paper", "strategy-levels"]
        assert said == [("signal", "HUP", "executor"), ("update",)]
    else:
        with pytest.raises(RefusedError, match="has not read the file again"):
            apply(path, path, Books)
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
    monkeypatch.setattr(module, "apply", lambda *_, **__: {"removed": [], "waiting": [], "restart": []})
    module.apply_config(Namespace(config=path, file=None, flatten=True, adopt=None, json=False))
    assert not books.symbols and [h.scope for h in halts.list()] == ["strategy:levels"] * stays


def flattening(path, new=None):
    module.apply_config(Namespace(config=path, file=new, flatten=True, adopt=None, json=False))


def given(tmp_path, monkeypatch, **tables):
    """Return the running file; whoever closes anything fails."""
    path = write_config(tmp_path, **tables)
    beat_of(tmp_path, owners={"ETH/USDT:USDT": "levels"})
    monkeypatch.setattr(module, "open_reader", lambda _: Namespace(books=held))
    monkeypatch.setattr(module.CommandFiles, "ask", lambda *_, **__: pytest.fail("something is closed"))
    return path


@pytest.mark.parametrize("place", ["", "var/supervisor.d", "var/metrics"])
def test_apply_with_flatten_that_may_not_write_closes_nothing(place, tmp_path, monkeypatch):
    path = given(tmp_path, monkeypatch)
    (tmp_path / place).mkdir(parents=True, exist_ok=True)
    new = tmp_path / "new.toml"
    new.write_text(path.read_text())
    monkeypatch.setattr(module.os, "access", lambda where, _: where != tmp_path / place)
    with pytest.raises(RefusedError, match=f"{tmp_path / place}: you may not write .*sudo botctl"):
        flattening(path, new)
    assert not HaltFiles(tmp_path / "var" / "halt").list()


def test_apply_on_a_host_refuses_a_strategy_without_its_user_and_folders(tmp_path, monkeypatch):
    users = {"feed": "bot-feed", "trade": "bot-trade", "strategy": "bot-s-{strategy}"}
    path = given(tmp_path, monkeypatch, users=users, bus={
        "signals": {"endpoint": f"ipc://{tmp_path}/signals/{{strategy}}/socket"}})
    with pytest.raises(RefusedError, match=f"lacks user bot-s-levels, folder {tmp_path}/signals/levels, "
                       "folder .*bot_strategies in the inventory.*site.yml"):
        flattening(path)
    module.check_config(Namespace(file=path, config=None, json=False))


def test_apply_halts_what_leaves_its_owner_while_it_looks_and_ends_its_own_halt_alone(tmp_path, monkeypatch):
    path = given(tmp_path, monkeypatch, strategy={"other": ETH})
    halts, seen = HaltFiles(tmp_path / "var" / "halt"), []
    halts.set("all", who="anna", why="stays", clock=Clock())

    def books():
        seen.extend(halt.scope for halt in halts.list())
        return held()
    with pytest.raises(RefusedError, match="Nothing was changed"):
        apply(path, path, books)
    assert seen == ["all", "symbol:ETH/USDT:USDT"] and [h.scope for h in halts.list()] == ["all"]
    halts.set("symbol:ETH/USDT:USDT", who="anna", why="odd", clock=Clock())
    with pytest.raises(RefusedError, match="Nothing was changed"):
        apply(path, path, books)
    assert [h.why for h in halts.list()] == ["stays", "odd"]


def test_apply_says_what_waits_for_whose_restart(tmp_path, monkeypatch, capsys):
    path = given(tmp_path, monkeypatch)
    old = load(path)
    beat_of(tmp_path, owners={"BTC/USDT:USDT": "levels"}, config=old.fingerprint(),
            shared_config=old.fingerprint(is_shared=True))
    monkeypatch.setattr(module, "_supervisorctl", lambda *_: None)
    monkeypatch.setattr(module, "ANSWER_TURNS", 2)
    new = tmp_path / "new.toml"
    text = path.read_text()
    new.write_text(text.replace("recover_s = 1", "recover_s = 2").replace("day_loss_max = 9000",
                                                                          "day_loss_max = 9001"))
    path.chmod(0o640)
    told = apply(path, new, Books)
    assert path.stat().st_mode & 0o777 == 0o640  # on a host others read it, whatever root's umask is
    assert (told["waiting"], told["restart"]) == (["executor", "limits that became looser"], ["executor"])
    path.write_text(text)
    module.apply_config(Namespace(config=path, file=new, flatten=False, adopt=None, json=False))
    said = "not in force yet: executor, limits that became looser; it waits for: supervisorctl restart exec"
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(("name", "change", "is_old"), [
    ("executor", ("notional = 1000", "notional = 2000"), True),
    ("guard", ("notional = 1000", "notional = 2000"), False),
    ("gateway", ("day_loss_max = 9000", "day_loss_max = 8000"), False),
    ("guard", ("recover_s = 1", "recover_s = 2"), True)])
def test_stale_is_who_lacks_what_concerns_it(name, change, is_old, tmp_path):
    path = write_config(tmp_path)
    old = load(path)
    beat = {"ended": False, "config": old.fingerprint(), "shared_config": old.fingerprint(is_shared=True)}
    assert stale(old, {name: beat}) == []
    path.write_text(path.read_text().replace(*change))
    assert stale(load(path), {name: beat}) == [name] * is_old
