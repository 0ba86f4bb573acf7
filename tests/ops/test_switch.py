"""bot-switch: what counts as running, what is put in place, and what comes back. Real files, no systemd."""

import fcntl
import json
import os
import signal
import subprocess
import time
from argparse import Namespace
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "ansible" / "roles" / "bot" / "files" / "bot-switch"
UP = [{"name": name, "state": "UP", "pid": 1} for name in ("gateway", "executor")]
RUNNING = {"state": "RUNNING", "state_reason": "", "processes": UP, "halted": [], "positions": []}
HALT = {"scope": "all", "who": "anna", "why": "lunch", "since_ns": 1}


@pytest.fixture
def switch(tmp_path, monkeypatch):
    """Return the script as a module, its paths below tmp_path, and a service that obeys `states`."""
    spec = spec_from_loader("bot_switch", SourceFileLoader("bot_switch", str(SCRIPT)))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, folder in (("OPT", "opt"), ("ETC", "etc"), ("STATE", "var"), ("UNITS", "units")):
        monkeypatch.setattr(module, name, tmp_path / folder)
        (tmp_path / folder).mkdir()
    for name, path in (("CURRENT", "opt/current"), ("NEXT", "etc/next"), ("BEFORE", "etc/before"),
                       ("HISTORY", "opt/switches.jsonl"), ("PENDING", "opt/switch.pending")):
        monkeypatch.setattr(module, name, tmp_path / path)
    (tmp_path / "etc" / "bot.toml").write_text("config 0")
    module.said, module.did, module.states = [], [], {}
    monkeypatch.setattr(module, "_say", module.said.append)
    monkeypatch.setattr(module, "_systemctl", lambda *words: module.did.append(" ".join(words)))
    monkeypatch.setattr(module, "_botctl", lambda *words: module.did.append(" ".join(words)))
    monkeypatch.setattr(module, "status", lambda: module.states.get(_current(module), module.DOWN))
    monkeypatch.setattr(module, "POLL_S", 0.01)
    handlers = {number: signal.getsignal(number) for number in (
        signal.SIGHUP, signal.SIGPIPE, signal.SIGINT, signal.SIGTERM)}
    yield module
    for number, handler in handlers.items():
        signal.signal(number, handler)


def _current(switch) -> str:
    return switch.CURRENT.resolve().name if switch.CURRENT.is_symlink() else ""


def _release(switch, name: str, *, status: dict = RUNNING, units: dict[str, str] | None = None) -> Path:
    path = switch.OPT / "releases" / name
    (path / "systemd").mkdir(parents=True)
    (path / ".complete").write_text(name)
    for unit, text in (units or {"bot.service": name}).items():
        (path / "systemd" / unit).write_text(text)
    switch.states[name] = status
    return path


def _stage(switch, text: str, key: str = "", *, release: str) -> None:
    (switch.NEXT / "keys").mkdir(parents=True, exist_ok=True)
    (switch.ETC / "keys").mkdir(exist_ok=True)
    (switch.NEXT / "bot.toml").write_text(text)
    (switch.NEXT / "release").write_text(release)
    if key:
        (switch.NEXT / "keys" / "api.key").write_text(key)


def _go(switch, monkeypatch, release: Path, **changes) -> int:
    args = Namespace(**{"release": release, "bound_s": 0.2, "settle_s": 0, "keep": 3, "silence": "",
                        "unsilence": "", "stopped": False, "force": False, **changes})
    monkeypatch.setattr(switch, "_parse", lambda: args)
    return switch.main()


def _history(switch) -> list[str]:
    return [json.loads(line)["result"] for line in switch.HISTORY.read_text().splitlines()]


def test_release_that_runs_is_current_with_its_config_key_and_units(switch, monkeypatch):
    one = _release(switch, "one", units={"bot.service": "1", "old.timer": "1"})
    _stage(switch, "config 1", "key 1", release="one")
    assert _go(switch, monkeypatch, one) == 0
    two = _release(switch, "two", units={"bot.service": "2"})
    _stage(switch, "config 2", "key 2", release="two")
    assert _go(switch, monkeypatch, two) == 0 and _current(switch) == "two"
    assert (switch.ETC / "bot.toml").read_text() == "config 2"
    assert (switch.ETC / "keys" / "api.key").read_text() == "key 2"
    assert [(path.name, path.read_text()) for path in switch.UNITS.iterdir()] == [("bot.service", "2")]
    assert (one / "bot.toml").read_text() == "config 1", "for a roll-back by hand to a release that wants it"
    assert not switch.BEFORE.exists(), "no old key lies about"
    assert "disable --now old.timer" in switch.did
    assert switch.did[-4:] == ["daemon-reload", "start bot", "try-reload-or-restart prometheus",
                               "try-reload-or-restart prometheus-alertmanager"], "its rules go with it"


@pytest.mark.parametrize("broken", [
    {**RUNNING, "state": "REDUCING", "state_reason": "the gateway is silent"},
    {**RUNNING, "processes": [*UP, {"name": "guard", "state": "DOWN", "pid": None}]},
    {**RUNNING, "halted": [{**HALT, "scope": "strategy:sr", "who": "health"}]},
    {**RUNNING, "state": "HALTED", "halted": [{**HALT, "who": "anna, executor"}]},
], ids=["reducing", "a process down", "a strategy halted", "halted"])
def test_release_that_does_not_run_as_before_is_rolled_back_with_config_key_and_units(
        switch, monkeypatch, broken):
    one = _release(switch, "one")
    _stage(switch, "config 1", "key 1", release="one")
    assert _go(switch, monkeypatch, one) == 0
    two = _release(switch, "two", status=broken, units={"bot.service": "2", "new.timer": "2"})
    _stage(switch, "config 2", "key 2", release="two")
    assert _go(switch, monkeypatch, two) == 4 and _current(switch) == "one"
    assert (switch.ETC / "bot.toml").read_text() == "config 1"
    assert (switch.ETC / "keys" / "api.key").read_text() == "key 1"
    assert [(path.name, path.read_text()) for path in switch.UNITS.iterdir()] == [("bot.service", "one")]
    assert _history(switch) == ["switched", "rolled back"]
    assert two.stat().st_mtime == 0, "a roll-back by hand never comes to it"


def test_roll_back_brings_back_no_key_that_an_earlier_switch_left_behind(switch, monkeypatch):
    one = _release(switch, "one")
    _stage(switch, "config 1", "key 1", release="one")
    assert _go(switch, monkeypatch, one) == 0
    (switch.BEFORE / "keys").mkdir(parents=True)  # by one that a power cut ended, or that started nothing
    (switch.BEFORE / "keys" / "api.key").write_text("key 0, revoked")
    bad = _release(switch, "bad", status={**RUNNING, "state": "HALTED", "state_reason": "it is bad"})
    _stage(switch, "config 2", release="bad")
    assert _go(switch, monkeypatch, bad) == 4
    assert (switch.ETC / "keys" / "api.key").read_text() == "key 1"


def test_loop_halt_of_a_release_that_is_gone_ends_with_it_and_any_other_halt_stays(switch, monkeypatch):
    assert _go(switch, monkeypatch, _release(switch, "one")) == 0
    halts = [{**HALT, "who": "health", "since_ns": 2**62}, {**HALT, "scope": "symbol:X", "since_ns": 2**62},
             {**HALT, "scope": "strategy:sr", "who": "health", "since_ns": 1},
             {**HALT, "scope": "symbol:Y", "who": "health, anna", "since_ns": 2**62}]
    two = _release(switch, "two", status={**RUNNING, "state": "HALTED", "halted": halts})
    switch.states["one"] = {**RUNNING, "halted": halts}
    monkeypatch.setattr(switch, "compare", lambda now, before: now["state"] == "HALTED" and "halted")
    assert _go(switch, monkeypatch, two) == 4
    assert [did for did in switch.did if "resume" in did] == ["resume"]


def test_switch_under_an_operators_halt_keeps_to_it(switch, monkeypatch):
    halted = {**RUNNING, "state": "HALTED", "halted": [HALT]}
    assert _go(switch, monkeypatch, _release(switch, "one")) == 0
    switch.states["one"] = halted
    assert _go(switch, monkeypatch, _release(switch, "two", status=halted)) == 0


def test_halt_of_a_person_while_a_release_is_watched_is_not_its_failure(switch, monkeypatch):
    assert _go(switch, monkeypatch, _release(switch, "one")) == 0
    halted = {**RUNNING, "state": "HALTED", "halted": [HALT, {**HALT, "scope": "symbol:X"}]}
    assert _go(switch, monkeypatch, _release(switch, "two", status=halted)) == 0 and _current(switch) == "two"


def test_release_that_is_halted_by_a_program_is_rolled_back_at_once(switch, monkeypatch):
    assert _go(switch, monkeypatch, _release(switch, "one")) == 0
    halted = {**RUNNING, "state": "HALTED", "halted": [{**HALT, "who": "health"}]}
    two = _release(switch, "two", status=halted)
    monkeypatch.setattr(switch, "_new_beat", lambda *_given: {"state": "RUNNING"})
    began = time.monotonic()
    assert _go(switch, monkeypatch, two, bound_s=30) == 4 and time.monotonic() - began < 15


def test_what_was_staged_for_another_release_is_not_put_in_place(switch, monkeypatch):
    _stage(switch, "config 9", "key 9, untried", release="nine")
    (switch.ETC / "keys" / "api.key").write_text("key 0")
    assert _go(switch, monkeypatch, _release(switch, "one")) == 0
    assert (switch.ETC / "bot.toml").read_text() == "config 0" and not switch.NEXT.exists()
    assert (switch.ETC / "keys" / "api.key").read_text() == "key 0" and "staged for nine" in switch.said[0]


def test_switch_beside_another_one_touches_nothing(switch, monkeypatch):
    one = _release(switch, "one")
    with open(switch.OPT / "switch.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert _go(switch, monkeypatch, one) == 2 and not switch.CURRENT.exists() and not switch.did
    assert _go(switch, monkeypatch, one) == 0


def test_switch_that_is_asked_to_end_is_rolled_back(switch, monkeypatch):
    assert _go(switch, monkeypatch, _release(switch, "one")) == 0
    two, place = _release(switch, "two", status=switch.DOWN), switch.place

    def placed(*args, **flags):
        began_s = place(*args, **flags)
        if not flags.get("restore"):
            os.kill(os.getpid(), signal.SIGTERM)
        return began_s

    monkeypatch.setattr(switch, "place", placed)
    monkeypatch.setattr(switch, "_new_beat", lambda *_given: {"state": "RUNNING"})
    began = time.monotonic()
    assert _go(switch, monkeypatch, two, bound_s=30, settle_s=1) == 4 and time.monotonic() - began < 15
    assert _current(switch) == "one" and not switch.PENDING.exists()


@pytest.mark.parametrize(("status", "result"), [(RUNNING, "switched"), ({}, "rolled back")])
def test_switch_that_a_power_cut_ended_is_ended_by_the_next_one_first(switch, monkeypatch, status, result):
    one = _release(switch, "one")
    _stage(switch, "config 1", "key 1", release="one")
    assert _go(switch, monkeypatch, one) == 0
    two = _release(switch, "two", status=status or switch.DOWN)
    _stage(switch, "config 2", "key 2", release="two")
    with monkeypatch.context() as cut:
        def cuts(*_args):
            raise KeyboardInterrupt

        cut.setattr(switch, "watch", cuts)
        with pytest.raises(KeyboardInterrupt):
            _go(switch, cut, two)
    assert switch.PENDING.exists() and _current(switch) == "two"
    _stage(switch, "config 3", release="three")
    assert _go(switch, monkeypatch, _release(switch, "three")) == 0 and _current(switch) == "three"
    assert _history(switch) == ["switched", "broke", result, "switched"] and not switch.PENDING.exists()
    assert (switch.ETC / "keys" / "api.key").read_text() == ("key 2" if status else "key 1")
    assert (switch.ETC / "bot.toml").read_text() == "config 3"


@pytest.mark.parametrize(("status", "result", "code"), [(RUNNING, "switched", 0), ({}, "rolled back", 4)])
def test_switch_that_a_power_cut_ended_is_ended_by_the_next_start_of_the_service(
        switch, monkeypatch, status, result, code):
    one = _release(switch, "one")
    assert _go(switch, monkeypatch, one) == 0
    assert _go(switch, monkeypatch, None) == 0 and _history(switch) == ["switched"], "none was cut"
    two = _release(switch, "two", status=status or switch.DOWN)
    with monkeypatch.context() as cut:
        cut.setattr(switch, "watch", lambda *_args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _go(switch, cut, two)
    with open(switch.OPT / "switch.lock", "w") as lock:  # the switch goes on, and starts the service itself
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert _go(switch, monkeypatch, None) == 0 and switch.PENDING.exists()
    assert _go(switch, monkeypatch, None) == code and not switch.PENDING.exists()
    assert _history(switch) == ["switched", "broke", result]
    assert _current(switch) == ("two" if status else "one")


def test_executor_after_a_boot_is_seen_by_what_it_beats_since_whatever_its_number(switch, monkeypatch):
    one = _release(switch, "one", status={**RUNNING, "processes": [
        {"name": "executor", "state": "UP", "pid": os.getpid()}]})
    assert _go(switch, monkeypatch, one) == 0
    with monkeypatch.context() as cut:
        cut.setattr(switch, "watch", lambda *_args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _go(switch, cut, one)
    path = switch.STATE / "run" / "executor.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"pid": os.getpid(), "ended": False, "state": "RUNNING"}))  # of before the cut
    beats = iter([0, 0, time.time() + 9, 0])
    monkeypatch.setattr(switch, "POLL_S", 0.1)
    monkeypatch.setattr(switch.time, "sleep", lambda _s: os.utime(path, (0, next(beats))))
    assert _go(switch, monkeypatch, None, bound_s=30) == 0


@pytest.mark.parametrize("name", ["bot.toml", "keys/api.key"])
def test_service_is_at_no_moment_of_a_switch_without_a_configuration_or_a_key(switch, monkeypatch, name):
    _stage(switch, "config 1", "key 1", release="one")
    assert _go(switch, monkeypatch, _release(switch, "one")) == 0
    _stage(switch, "config 2", "key 2", release="two")
    replace = os.replace

    def replaced(source, target):
        assert target != switch.ETC / name or target.exists()
        replace(source, target)

    monkeypatch.setattr(switch.os, "replace", replaced)
    assert _go(switch, monkeypatch, _release(switch, "two", status=switch.DOWN)) == 4
    assert (switch.ETC / name).read_text() in ("config 1", "key 1")


def test_switch_that_a_power_cut_ended_before_the_release_was_in_place_is_taken_back(switch, monkeypatch):
    one = _release(switch, "one")
    _stage(switch, "config 1", release="one")
    assert _go(switch, monkeypatch, one) == 0
    two = _release(switch, "two")
    _stage(switch, "config 2", release="two")
    with monkeypatch.context() as cut:
        cut.setattr(switch, "_units", lambda _release: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            _go(switch, cut, two)
    assert (switch.ETC / "bot.toml").read_text() == "config 2" and _current(switch) == "one"
    assert _go(switch, monkeypatch, one) == 0 and (switch.ETC / "bot.toml").read_text() == "config 1"
    assert _history(switch) == ["switched", "broke", "rolled back", "switched"]


def test_roll_back_that_a_power_cut_ended_goes_on_whatever_the_release_does_now(switch, monkeypatch):
    one = _release(switch, "one")
    assert _go(switch, monkeypatch, one) == 0
    two = _release(switch, "two", status=switch.DOWN)
    _stage(switch, "config 2", release="two")
    with monkeypatch.context() as cut:
        place = switch.place
        cut.setattr(switch, "place", lambda *args, **flags: (
            1 / 0 if "restore" in flags else place(*args, **flags)))
        with pytest.raises(ZeroDivisionError):
            _go(switch, cut, two)
    switch.states["two"] = RUNNING
    assert _go(switch, monkeypatch, one) == 0 and (switch.ETC / "bot.toml").read_text() == "config 0"
    assert _history(switch) == ["switched", "broke", "rolled back", "switched"]


def test_switch_that_breaks_says_so_in_the_history(switch, monkeypatch):
    def broken(*_args, **_flags):
        raise OSError("no space left")

    monkeypatch.setattr(switch, "place", broken)
    with pytest.raises(OSError):
        _go(switch, monkeypatch, _release(switch, "one"))
    assert _history(switch) == ["broke"]


def test_botctl_that_hangs_or_is_not_there_ends_no_switch(switch, monkeypatch):
    def hangs(command, **_given):
        raise subprocess.TimeoutExpired(command, 30)

    monkeypatch.undo()  # the script's own botctl and status
    assert switch.status() == switch.DOWN
    with monkeypatch.context() as refuses:  # as for a configuration that the release does not take
        refuses.setattr(switch, "_botctl", lambda *_words: '{"error": "mode: 1 is no mode"}')
        assert "mode: 1 is no mode" in switch.compare(switch.status(), RUNNING)
    monkeypatch.setattr(switch.subprocess, "run", hangs)
    assert switch._botctl("resume") == "" and switch.status() == switch.DOWN
    switch._run("botctl alert unsilence")


def test_switch_while_nothing_can_be_told_from_the_state_touches_nothing(switch, monkeypatch, capsys):
    assert _go(switch, monkeypatch, _release(switch, "one")) == 0
    switch.states["one"] = {**RUNNING, "state": "REDUCING", "state_reason": "a ban"}
    did = list(switch.did)
    assert _go(switch, monkeypatch, _release(switch, "two")) == 2 and _current(switch) == "one"
    assert switch.did == did and "a ban" in capsys.readouterr().err


def test_first_release_that_does_not_run_has_nothing_to_go_back_to_and_says_so(switch, monkeypatch):
    assert _go(switch, monkeypatch, _release(switch, "one", status=switch.DOWN)) == 3
    assert _history(switch) == ["failed"] and "does not run" in switch.said[0]


def test_releases_kept_are_those_used_last_and_never_the_current_one_goes(switch, monkeypatch):
    for name in ("one", "two", "three"):
        assert _go(switch, monkeypatch, _release(switch, name)) == 0
    _release(switch, "failed", status=switch.DOWN)
    assert _go(switch, monkeypatch, switch.OPT / "releases" / "failed") == 4
    (switch.OPT / "releases" / "half").mkdir()  # by a deploy that was cut
    assert _go(switch, monkeypatch, switch.OPT / "releases" / "one") == 0
    assert {path.name for path in (switch.OPT / "releases").iterdir()} == {"one", "two", "three"}


def test_release_that_reads_the_whole_journal_first_has_its_time_when_that_is_done(switch, monkeypatch):
    assert _go(switch, monkeypatch, _release(switch, "one")) == 0
    two, began = _release(switch, "two", status=switch.DOWN), time.monotonic()

    def beat(*_given):
        if time.monotonic() - began < 1:
            return {"state": "RECONCILING", "mono_ns": time.monotonic_ns(),
                    "state_reason": "the journal is read: event 20000"}
        switch.states["two"] = RUNNING
        return {"state": "RUNNING", "mono_ns": time.monotonic_ns()}

    monkeypatch.setattr(switch, "_new_beat", beat)
    assert _go(switch, monkeypatch, two, bound_s=0.5) == 0 and _current(switch) == "two"
    assert time.monotonic() - began > 1


def test_release_that_hangs_while_it_reads_the_journal_is_rolled_back(switch, monkeypatch):
    assert _go(switch, monkeypatch, _release(switch, "one")) == 0
    two, began_ns = _release(switch, "two", status=switch.DOWN), time.monotonic_ns()
    monkeypatch.setattr(switch, "_new_beat", lambda *_given: {
        "state": "RECONCILING", "mono_ns": began_ns, "state_reason": "the journal is read: event 20000"})
    assert _go(switch, monkeypatch, two, bound_s=0.5) == 4 and _current(switch) == "one"
