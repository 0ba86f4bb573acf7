"""The dead-man's switch against a slow exchange and a host that slept."""

import asyncio
from types import SimpleNamespace

import pytest

from bot import guard
from bot.commands import WAIT_S_MAX, CommandFiles
from bot.errors import ExchangeError
from bot.guard import Guard
from bot.log import Log
from tests.factory import SECOND, HandClock

CANCEL_S, FLATTEN_S, SECRET = 60, 120, "secret-of-live"


class Bench:
    """A guard whose exchange takes its time; the executor last beat at `beat_ns`."""

    def __init__(self, monkeypatch, tmp_path, sweep_s):
        self.clock, self.sweep_s, self.sweeps, self.flattened_at = HandClock(), sweep_s, [], None
        self.began, self.beat_ns, self.instruments = self.clock.mono, self.clock.mono, {"BTC": 1}
        monkeypatch.setattr(guard, "open_exchange", lambda config, clock, hide: hide(SECRET) or self)
        monkeypatch.setattr(guard, "Flattener", lambda *args: self)
        self.crash_starts, self.is_away = [], False
        monkeypatch.setattr(guard, "read_beats", lambda config: {"executor": {
            "mono_ns": self.beat_ns, "crash_starts": self.crash_starts[-50:]}})
        config = SimpleNamespace(
            state_path=tmp_path, guard=SimpleNamespace(cancel_after_s=CANCEL_S, flatten_after_s=FLATTEN_S),
            health=SimpleNamespace(restarts_max=5, restart_window_s=300))
        self.it = Guard(SimpleNamespace(config=config, clock=self.clock, log=Log("guard", self.clock)))

    @property
    def now_s(self):
        return (self.clock.mono - self.began) / SECOND

    async def cancel_entries(self):
        self.sweeps.append(self.now_s)
        if self.is_away:
            raise ExchangeError(f"no answer to {SECRET}")
        self.clock.step(self.sweep_s)
        return []

    async def flatten(self, who, why):
        self.flattened_at = self.now_s
        self.it._said.append("flat")
        return True

    def live(self, for_s):
        end = self.clock.mono + for_s * SECOND
        while self.clock.mono < end:
            asyncio.run(self.it.watch_executor())
            self.clock.step(1)

    def crash(self, each_s, for_s):
        """Live with an executor that beats at once, each second, and starts anew after each_s."""
        for second in range(for_s):
            self.beat_ns = self.clock.mono
            self.crash_starts += [self.clock.mono] if second % each_s == 0 else []
            self.live(1)


@pytest.mark.parametrize(("age_s", "is_flat"), [(0, True), (WAIT_S_MAX, True), (WAIT_S_MAX + 1, False)])
def test_flatten_that_was_asked_for_long_ago_is_not_done_any_more(monkeypatch, tmp_path, age_s, is_flat):
    bench = Bench(monkeypatch, tmp_path, 0)
    files = CommandFiles(tmp_path / "guard")
    command = files.put("flatten", who="ann", why="get me out", clock=bench.clock)
    bench.clock.step(age_s)
    asyncio.run(bench.it.work())
    answered = files.take_answer(command)
    assert answered.is_done == is_flat == (bench.flattened_at is not None)
    assert is_flat or "type it again" in answered.text


@pytest.mark.parametrize("sweep_s", [0, 1, 4.5, 9])
def test_dead_man_with_a_slow_exchange_keeps_both_deadlines(monkeypatch, tmp_path, sweep_s):
    bench = Bench(monkeypatch, tmp_path, sweep_s)
    bench.live(FLATTEN_S + 30)
    assert CANCEL_S < bench.sweeps[0] <= CANCEL_S + 2
    assert FLATTEN_S < bench.flattened_at <= FLATTEN_S + sweep_s + 2


def test_dead_man_whose_exchange_does_not_answer_is_told_all_the_same(monkeypatch, tmp_path, capsys):
    bench = Bench(monkeypatch, tmp_path, 0)
    bench.is_away = True
    bench.live(CANCEL_S + 3)
    assert len(bench.sweeps) == 1 and bench.it.fired == 1
    bench.live(15)
    assert len(bench.sweeps) == 2 and bench.it.fired == 1, "once per silence"
    said = capsys.readouterr().out
    assert "dead_man_failed" in said and SECRET not in said


def test_dead_man_after_the_host_slept_waits_for_the_executor_to_wake_too(monkeypatch, tmp_path):
    bench = Bench(monkeypatch, tmp_path, 0)
    bench.live(5)
    bench.clock.step(3_600)
    bench.live(CANCEL_S - 1)
    assert not bench.sweeps and bench.flattened_at is None
    bench.live(3)
    assert bench.sweeps


def test_dead_man_with_a_beat_of_the_boot_before_keeps_its_deadline(monkeypatch, tmp_path):
    bench = Bench(monkeypatch, tmp_path, 0)
    bench.beat_ns += 30 * 86_400 * SECOND  # the clock of intervals began anew, the file stayed
    bench.live(CANCEL_S + 3)
    assert bench.sweeps


@pytest.mark.parametrize("each_s", [3, 20, 45])
def test_dead_man_with_an_executor_that_crashes_again_and_again_keeps_both_deadlines(
        monkeypatch, tmp_path, each_s):
    bench = Bench(monkeypatch, tmp_path, 0)
    bench.crash(each_s, 600)
    loop_s = 5 * each_s  # the crash that is one too many
    assert CANCEL_S < bench.sweeps[0] <= loop_s + CANCEL_S + 2
    assert FLATTEN_S < bench.flattened_at <= loop_s + FLATTEN_S + 2


def test_dead_man_with_as_many_restarts_as_health_bears_waits(monkeypatch, tmp_path):
    bench = Bench(monkeypatch, tmp_path, 0)
    bench.crash(3, 15)
    bench.crash(1_000, 280)
    bench.crash(61, 1_000)
    assert not bench.sweeps and bench.flattened_at is None


def test_dead_man_with_an_executor_that_crashes_no_longer_has_it_back(monkeypatch, tmp_path):
    bench = Bench(monkeypatch, tmp_path, 0)
    bench.crash(3, 55)
    bench.crash(1_000, 400)
    assert bench.sweeps[-1] < 55 + 60 + 2 and bench.flattened_at is None
