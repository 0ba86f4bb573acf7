"""guard: flattens everything when told to, acts when the executor is gone, and watches health in turn.

Reads: beats, commands below state_dir/guard, supervisord, the exchange on a connection of its own.
Writes: its own beat, HALT files, orders that only reduce. Needs no journal and no bus.
Run: python -m bot.guard --config FILE
"""

import asyncio
import sys
from collections import deque
from typing import Any

from bot.commands import LATE, Answered, Command, CommandFiles
from bot.daemon import Daemon, run
from bot.errors import ExchangeError
from bot.exchange import library
from bot.flatten import Flattener, open_exchange
from bot.halt import HaltFiles
from bot.probe import Supervisor
from bot.status import read_beats, read_usage
from bot.watch import PAUSE_NS, Watch

LOOK_S, TAKE_S = 1.0, 0.25
SAID_MAX = 50  # of a flatten's last words in the beat
AGAIN_NS = 10_000_000_000  # while the executor stays away its entries are looked for so often
SECOND_NS = 1_000_000_000


class Guard:
    """The dead-man's switch, and the hand that flattens."""

    def __init__(self, daemon: Daemon) -> None:
        self._config, self._clock, self._log = daemon.config, daemon.clock, daemon.log
        self._exchange = open_exchange(daemon.config, daemon.clock, daemon.log.hide)
        self._flattener = Flattener(daemon.config, daemon.clock, self._exchange, self._say)
        self._files = CommandFiles(daemon.config.state_path / "guard")
        self._busy = asyncio.Lock()
        self._said: deque[str] = deque(maxlen=SAID_MAX)
        self._since_ns = self._looked_ns = daemon.clock.mono_ns()  # from when on a silence counts
        self._swept_ns = 0
        self._is_flat_due = True  # once per silence
        self.flattens = self.fired = 0

    def status(self) -> dict[str, Any]:
        """Return what the beat tells of it."""
        return {"flattening": self._busy.locked(), "said": list(self._said), "flattens": self.flattens,
                "dead_man_fired": self.fired, "rate": self._exchange.budget.usage}

    async def work(self) -> None:
        """Work off what was asked for."""
        commands, damaged = self._files.waiting()
        for text in damaged:
            self._log.warning("message_dropped", channel="commands", reason="command", text=text)
        for command in commands:
            answered = LATE if command.is_late(self._clock.wall_ns()) else await self._do(command)
            self._log.warning("commanded", verb=command.verb, symbol="", who=command.who, why=command.why,
                              is_done=answered.is_done, answer=answered.text)
            self._files.answer(command, answered, self._log)

    async def watch_executor(self) -> None:
        """Cancel entries when the executor is silent, or in a loop, for cancel_after_s; then flatten."""
        beat = read_beats(self._config).get("executor", {"mono_ns": 0})
        beat_ns = 0 if self._is_looping(beat) else beat["mono_ns"]
        now_ns = self._clock.mono_ns()
        if now_ns - self._looked_ns > PAUSE_NS:
            self._since_ns = now_ns  # we slept, and perhaps all did: nobody is silent for that
        try:
            if self._since_ns < beat_ns <= now_ns:  # one still to come is of the boot before
                self._since_ns, self._swept_ns, self._is_flat_due = beat_ns, 0, True
            await self._act(now_ns)
        finally:
            self._looked_ns = self._clock.mono_ns()  # what we do ourselves may take long, and is no sleep

    def _is_looping(self, beat: dict[str, Any]) -> bool:
        # Each start beats at once: in what health calls a loop only who outlives its pace has come back.
        rules, beat_ns = self._config.health, beat["mono_ns"]
        window_ns = rules.restart_window_s * SECOND_NS
        starts = [ns for ns in beat.get("crash_starts", ()) if ns > beat_ns - window_ns]
        return len(starts) > rules.restarts_max and beat_ns - starts[-1] < window_ns // rules.restarts_max

    async def _act(self, now_ns: int) -> None:
        rules = self._config.guard
        silent_s = (now_ns - self._since_ns) / SECOND_NS
        if self._busy.locked() or silent_s <= rules.cancel_after_s:
            return
        if rules.flatten_after_s and silent_s > rules.flatten_after_s and self._is_flat_due:
            self._is_flat_due = False
            self.fired += 1
            await self._flatten("guard", f"the executor is silent, or crashes again and again, "
                                         f"for {silent_s:.0f} s, limit {rules.flatten_after_s}")
        elif now_ns - self._swept_ns > AGAIN_NS:
            await self._cancel_entries(silent_s)

    async def _cancel_entries(self, silent_s: float) -> None:
        is_first, self._swept_ns = not self._swept_ns, self._clock.mono_ns()
        self.fired += is_first  # an exchange that does not answer makes it no better
        try:
            if not self._exchange.instruments:
                await self._exchange.load()
            canceled = await self._flattener.cancel_entries()
        except ExchangeError as error:
            self._log.error("dead_man_failed", error=str(error))
            return
        if is_first or canceled:
            self._log.error("dead_man", silent_s=round(silent_s), canceled=canceled)

    async def _flatten(self, who: str, why: str) -> bool:
        async with self._busy:
            self._said.clear()
            self.flattens += 1
            return await self._flattener.flatten(who, why)

    async def _do(self, command: Command) -> Answered:
        if command.verb != "flatten" or command.symbol or command.strategy:
            return Answered(False, f"guard flattens everything, no more: {command.verb} is the executor's")
        is_flat = await self._flatten(command.who, command.why)
        return Answered(is_flat, self._said[-1])

    def _say(self, text: str) -> None:
        self._said.append(text)
        self._log.warning("flattening", text=text)

    def hear_usage(self) -> None:
        """Take in what the others know of the exchange's request limits."""
        for name in ("executor", "gateway"):
            self._exchange.hear_usage(read_usage(self._config, name))


async def main(daemon: Daemon) -> None:
    """Flatten when told to, act when the executor is gone, keep health alive."""
    config = daemon.config
    supervisor = Supervisor(config.path("run/supervisor.sock"))
    watch = Watch(config, daemon.clock, daemon.log, halts=HaltFiles(config.path("halt")),
                  kill=supervisor.kill)
    guard = Guard(daemon)
    daemon.status = lambda: {**watch.status(), **guard.status()}

    async def look() -> None:
        programs = {p.name: p for p in await asyncio.to_thread(supervisor.programs)}
        watch.look(("health",), read_beats(config), programs)
        watch.tell()
        guard.hear_usage()

    daemon.every(LOOK_S, look)
    daemon.every(LOOK_S, guard.watch_executor)
    daemon.every(TAKE_S, guard.work)
    await daemon.stopping.wait()


if __name__ == "__main__":
    library()
    sys.exit(run("guard", main))
