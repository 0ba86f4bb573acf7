"""What health and guard find, kill and halt for, second by second."""

import io
import json
from collections import Counter

import pytest

from bot.config_file import load
from bot.halt import HaltFiles
from bot.log import Log
from bot.probe import ProgramInfo, Vitals
from bot.watch import MB, RULES, Watch
from tests.factory import HandClock
from tests.harness import write_config

NAMES = ("executor", "strategy-levels", "paper")
S = 1_000_000_000


class World:
    """Processes that do what a test says, and a Watch that looks at them."""

    def __init__(self, tmp_path):
        self.config = load(write_config(tmp_path, health={
            "restarts_max": 2, "restart_window_s": 60, "restarts_per_day_max": 4}))
        self.clock, self.out, self.killed = HandClock(), io.StringIO(), Counter()
        self.halts = HaltFiles(tmp_path / "halt")
        self.used = {100 + n: Vitals(50 * MB, 0.0, 3) for n in range(len(NAMES))}
        self.pids = {name: 100 + n for n, name in enumerate(NAMES)}
        self.silent, self.crashes, self.programs = set(), {}, {}
        self.last_beat, self.descriptors, self.runs = {}, 10, {}
        self.begin()
        self.clock.step(60)

    def begin(self):
        """Start health (again)."""
        self.watch = Watch(self.config, self.clock, Log("health", self.clock, stream=self.out),
                           halts=self.halts, vitals=lambda pid: self.used.get(pid), kill=self._kill)

    def _kill(self, name, pid):
        assert self.pids[name] == pid or self.programs[name].pid == pid
        self.killed[pid] += 1
        return True

    def pass_seconds(self, seconds):
        for _ in range(seconds):
            self.clock.step(1)
            for name in NAMES:
                if name not in self.silent:
                    self.last_beat[name] = {"pid": self.pids[name], "mono_ns": self.clock.mono,
                                            "run": self.runs.get(name, 0),
                                            "crash_starts": self.crashes.get(name, []),
                                            "descriptors": self.descriptors if name == "executor" else 9,
                                            "descriptors_max": 1_000}
            self.watch.look(NAMES, self.last_beat, self.programs)
            self.watch.tell()

    def rules(self):
        return {(f["rule"], f["subject"]) for f in self.watch.status()["findings"]}

    def events(self):
        return [line["event"] for line in map(json.loads, self.out.getvalue().splitlines())]


@pytest.fixture
def world(tmp_path):
    return World(tmp_path)


def test_watch_with_all_well_finds_nothing(world):
    world.pass_seconds(60)
    assert world.rules() == set() and not world.killed and world.events() == []
    assert world.watch.status()["finding_counts"] == {rule: {"": 0} for rule in RULES}


def test_watch_with_a_silent_process_kills_it_after_stuck_ms_and_not_before(world):
    world.pass_seconds(5)
    world.silent.add("executor")
    world.pass_seconds(10)
    assert not world.killed
    world.pass_seconds(1)
    assert world.killed == {100: 1}
    assert ("process_stuck", "executor") in world.rules() and "killed" in world.events()


def test_watch_with_a_process_that_never_beats_counts_from_when_it_was_seen(world):
    world.silent.add("executor")
    world.programs["executor"] = ProgramInfo("executor", "RUNNING", 100, "", 1)
    world.pass_seconds(31)  # three times stuck_ms: a start on a busy host
    assert not world.killed
    world.pass_seconds(1)
    assert world.killed[100] == 1


def test_watch_counts_what_it_finds_by_rule_and_process(world):
    world.descriptors = 900
    world.pass_seconds(1)
    assert world.watch.status()["finding_counts"]["descriptors_high"] == {"": 0, "executor": 1}


def test_watch_with_a_killed_process_gives_its_successor_the_whole_time(world):
    world.silent.add("executor")
    world.pass_seconds(12)
    world.programs["executor"] = ProgramInfo("executor", "STARTING", 200, "", 1)
    world.used[200] = world.used.pop(100)
    world.pass_seconds(29)
    assert world.killed[200] == 0


def test_watch_that_slept_itself_kills_nobody(world):
    world.pass_seconds(3)
    world.silent.update(NAMES)
    world.clock.step(60)
    world.pass_seconds(9)
    assert not world.killed


def test_watch_with_a_memory_hog_kills_it(world):
    world.used[101] = Vitals(1_001 * MB, 0.0, 3)
    world.pass_seconds(1)
    assert world.killed == {101: 1} and ("memory_high", "strategy-levels") in world.rules()


def test_watch_with_memory_that_grows_tells_of_it_after_half_an_hour(world):
    for minute in range(31):
        assert not world.rules()
        world.used[100] = Vitals((100 + 2 * minute) * MB, 0.0, 3)
        world.pass_seconds(60)
    assert world.rules() == {("memory_growing", "executor")} and not world.killed
    assert 30_000 < world.watch.vitals["executor"]["growth_bytes_per_s"] < 37_000


def test_watch_with_a_busy_process_tells_of_it_and_of_its_end(world):
    for second in range(45):
        world.used[100] = Vitals(50 * MB, 0.95 * second, 3)
        world.pass_seconds(1)
    assert world.rules() == {("cpu_busy", "executor")}
    world.pass_seconds(45)
    assert world.rules() == set() and world.events() == ["finding", "finding_ended"]


def test_watch_with_descriptors_running_out_tells_of_it(world):
    world.descriptors = 801
    world.pass_seconds(1)
    assert world.rules() == {("descriptors_high", "executor")}


def test_watch_with_no_process_says_down_and_what_supervisord_says(world):
    world.programs["executor"] = ProgramInfo("executor", "FATAL", 0, "Exited too quickly", 1)
    world.pass_seconds(1)
    finding = world.watch.status()["findings"][0]
    assert finding["rule"] == "process_down" and finding["text"] == "FATAL: Exited too quickly"


@pytest.mark.parametrize(("name", "scope"), [
    ("executor", "all"), ("strategy-levels", "strategy:levels"), ("paper", None)])
def test_watch_with_a_slow_crash_loop_halts_its_scope(world, name, scope):
    world.crashes[name] = [world.clock.mono - 5 * S, world.clock.mono - 3 * S]
    world.pass_seconds(1)
    assert not world.halts.list() and not world.rules()
    world.crashes[name].append(world.clock.mono)
    world.pass_seconds(1)
    assert [h.scope for h in world.halts.list()] == ([scope] if scope else [])
    assert ("process_restarting", name) in world.rules()


def test_watch_with_a_loop_that_was_resumed_halts_again_only_for_new_crashes(world):
    world.crashes["executor"] = [world.clock.mono - n * S for n in range(3)]
    world.pass_seconds(1)
    assert world.halts.clear("all", clock=world.clock).who == "health"
    world.pass_seconds(10)
    assert not world.halts.list()
    world.crashes["executor"] += [world.clock.mono + n * S for n in range(3)]
    world.pass_seconds(3)
    assert len(world.halts.list()) == 1


def test_watch_that_starts_anew_does_not_halt_again_for_what_was_resumed(world):
    world.crashes["executor"] = [world.clock.mono - n * S for n in range(3)]
    world.pass_seconds(1)
    world.halts.clear("all", clock=world.clock)
    world.begin()
    world.pass_seconds(5)
    assert not world.halts.list() and ("process_restarting", "executor") in world.rules()
    world.crashes["executor"] += [world.clock.mono + n * S for n in range(3)]
    world.pass_seconds(3)
    assert len(world.halts.list()) == 1


@pytest.mark.parametrize("name", ["executor", "strategy-levels"])
def test_watch_that_crashes_with_all_others_halts_the_loop_all_the_same(world, name):
    world.crashes[name] = []
    for crash in range(4):  # supervisord is ended again and again: health starts anew each time too
        world.crashes[name].append(world.clock.mono)
        world.begin()
        world.pass_seconds(10)
        assert bool(world.halts.list()) == (crash > 1)
    assert world.events().count("halted") == 1


def test_watch_with_a_resume_of_a_boot_before_does_not_forgive_for_it(world):
    world.clock.mono += 1_000 * S
    world.halts.set("all", who="health", why="a loop", clock=world.clock)
    world.halts.clear("all", clock=world.clock)
    world.clock.mono -= 900 * S
    world.crashes["executor"] = [world.clock.mono - n * S for n in range(3)]
    world.pass_seconds(1)
    assert len(world.halts.list()) == 1


def test_watch_whose_halt_cannot_be_written_tells_of_it_and_tries_again(world, monkeypatch):
    def refuse(*_args, **_named):
        raise OSError("no space left")

    world.crashes["executor"] = [world.clock.mono - n * S for n in range(3)]
    with monkeypatch.context() as full:
        full.setattr("bot.halt.write_synced", refuse)
        world.pass_seconds(2)
        assert "no space left" in world.watch.status()["findings"][0]["text"]
        assert "halt_failed" in world.events() and not world.halts.list()
    world.pass_seconds(1)
    assert [h.scope for h in world.halts.list()] == ["all"] and world.events().count("halted") == 1


def test_watch_with_crashes_older_than_the_window_forgets_them(world):
    world.crashes["executor"] = [world.clock.mono - n * S for n in range(2)]
    world.pass_seconds(61)
    world.crashes["executor"].append(world.clock.mono)
    world.pass_seconds(1)
    assert not world.halts.list() and not world.rules()


def test_watch_with_starts_that_end_without_a_beat_after_startsecs_counts_them(world):
    world.silent.add("executor")  # a hang in an import: supervisord says RUNNING, and health kills it
    for number in range(3):
        world.programs["executor"] = ProgramInfo("executor", "RUNNING", 200 + number, "", 10 * number + 1)
        world.used[200 + number] = Vitals(50 * MB, 0.0, 3)
        world.pass_seconds(10)
        assert not world.halts.list()
    world.programs["executor"] = ProgramInfo("executor", "EXITED", 0, "", 21)
    world.pass_seconds(1)
    assert "executor crashed 3 times within 60 s" in world.halts.list()[0].why


def test_watch_with_restarts_by_the_operator_counts_none(world):
    for number in range(4):
        world.programs["executor"] = ProgramInfo("executor", "RUNNING", 200 + number, "", 1_000 + 5 * number)
        world.pids["executor"], world.runs["executor"] = 200 + number, (1_001 + 5 * number) * S
        world.used[200 + number] = Vitals(50 * MB, 0.0, 3)
        world.pass_seconds(5)
    assert not world.halts.list() and world.rules() == set()


def test_watch_with_a_loop_too_slow_for_the_window_halts_by_the_day(world):
    world.crashes["executor"] = []
    for _ in range(4):  # one each 100 s, where the window is 60 s
        world.crashes["executor"].append(world.clock.mono)
        world.pass_seconds(100)
        assert not world.halts.list() and not world.rules()
    world.crashes["executor"].append(world.clock.mono)
    world.pass_seconds(1)
    assert "crashed 5 times within 86400 s, limit 4" in world.halts.list()[0].why
    assert world.halts.clear("all", clock=world.clock)
    assert world.rules() == {("process_restarting", "executor")}
    world.pass_seconds(61)
    assert not world.halts.list() and not world.rules(), "what was mended is told no longer"


def test_watch_with_starts_that_fail_before_a_beat_counts_supervisords_tries(world):
    world.silent.add("executor")
    for spawn in range(3):
        world.programs["executor"] = ProgramInfo("executor", "BACKOFF", 0, "Exited too quickly", spawn + 1)
        world.pass_seconds(4)
    assert [h.scope for h in world.halts.list()] == ["all"]
    assert "executor crashed 3 times within 60 s" in world.halts.list()[0].why
