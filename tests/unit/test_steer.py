"""What botctl does when its halt cannot be written: the executor is ended, and stays ended where it can."""

import json
from types import SimpleNamespace

import pytest

from bot import steer
from bot.errors import RefusedError
from bot.probe import ProgramInfo
from tests.harness import write_config

PID = 77


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A full disk, an executor, and a supervisord that does what a test says."""
    def refuse(*_args):
        raise OSError("no space left")

    it = SimpleNamespace(stops=True, pids=[PID, PID, 0], kills=True, done=[])
    (tmp_path / "var" / "run").mkdir(parents=True)
    (tmp_path / "var" / "run" / "executor.json").write_text(json.dumps({"pid": PID}))
    it.args = SimpleNamespace(config=write_config(tmp_path), strategy=None, symbol=None, reason="odd fills",
                              json=False, verb="halt")
    it.stop = lambda name: it.done.append(("stop", name)) or it.stops
    it.kill = lambda name, pid: it.done.append(("kill", name, pid)) or it.kills
    it.programs = lambda: [ProgramInfo("executor", "", it.pids.pop(0), "")]
    monkeypatch.setattr("bot.halt.write_synced", refuse)
    monkeypatch.setattr(steer, "Supervisor", lambda path: it)
    monkeypatch.setattr(steer, "STOP_TURNS", 3)
    return it


def refused(world) -> str:
    with pytest.raises(RefusedError) as raised:  # botctl's main says it, as JSON too
        steer.halt(world.args)
    return str(raised.value)


def test_halt_that_cannot_be_written_has_supervisord_stop_the_executor(world):
    said = refused(world)
    assert world.done == [("stop", "executor")] and "no space left" in said
    assert "the executor was stopped; it is not started again" in said


def test_halt_that_cannot_be_written_with_an_executor_that_does_not_stop_kills_it(world):
    world.pids = [PID] * 3
    said = refused(world)
    assert world.done == [("stop", "executor"), ("kill", "executor", PID)]
    assert "the executor (pid 77) was killed; it is not started again" in said


def test_halt_that_cannot_be_written_without_supervisord_kills_the_executor_and_says_so(world):
    world.stops = False
    said = refused(world)
    assert world.done == [("stop", "executor"), ("kill", "executor", PID)]
    assert "killed; supervisord may start it again" in said


def test_halt_that_cannot_be_written_with_an_executor_nobody_can_end_says_so(world):
    world.stops = world.kills = False
    said = refused(world)
    assert "stop tradehost now" in said
