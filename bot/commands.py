"""The operator's commands to the executor and its answers, as files below state_dir/commands.

A command stays until it was answered, through restarts; one that waited too long is answered with no. What
cannot be read is set aside as *.damaged.
"""

import asyncio
import re
from pathlib import Path
from typing import Literal

import msgspec

from bot.clock import Clock
from bot.halt import write_synced
from bot.log import Log

ANSWERS_KEPT = 50  # whoever asked reads and removes its own at once; the rest is of those who gave up
BYTES_MAX = 10_000
WAIT_S_MAX = 600  # a restart, a reboot; older, it was wanted of another state than that of now
ANSWER_TURNS = 200  # of 0.1 s: a reconciliation takes one, with a slow exchange a few

Verb = Literal["reconcile", "adopt", "cancel", "flatten"]


class Command(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What an operator wants: who, why, since when. strategy, symbol: "" for all, or where none is needed."""

    id: str
    verb: Verb
    strategy: str = ""
    symbol: str = ""
    who: str
    why: str
    time_ns: int

    def is_late(self, now_ns: int) -> bool:
        """Return whether it waited too long, or comes from a clock that went wrong."""
        return abs(now_ns - self.time_ns) > WAIT_S_MAX * 1e9


class Answered(msgspec.Struct, frozen=True):
    """What became of a command. what: itself, in words."""

    is_done: bool
    text: str
    what: str = ""


LATE = Answered(False, f"nothing was done: the command had waited longer than {WAIT_S_MAX} s; type it again")


class CommandFiles:
    """Commands that wait, oldest first, and their answers."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._done = folder, folder / "done"

    def put(self, verb: Verb, *, strategy: str = "", symbol: str = "", who: str, why: str,
            clock: Clock) -> Command:
        """Leave a command for the executor, synced to disk."""
        now_ns = clock.wall_ns()
        command = Command(id=f"{now_ns}-{clock.token(4)}", verb=verb, strategy=strategy, symbol=symbol,
                          who=who, why=why, time_ns=now_ns)
        write_synced(self._folder / f"{command.id}.json", msgspec.json.encode(command))
        return command

    def waiting(self) -> tuple[list[Command], list[str]]:
        """Return the commands, and what is wrong with the files that were set aside just now."""
        commands, damaged = [], []
        for path in sorted(self._folder.glob("*.json")):
            try:
                if path.stat().st_size > BYTES_MAX:
                    raise ValueError(f"longer than {BYTES_MAX} bytes")
                command = msgspec.json.decode(path.read_bytes(), type=Command)
                if command.id != path.stem or not re.fullmatch(r"[\w-]{1,60}", command.id):
                    raise ValueError("its id is not its name")
                commands.append(command)
            except FileNotFoundError:
                continue  # withdrawn in this very moment
            except (OSError, ValueError) as error:  # msgspec's and the decoder's errors are ValueErrors
                path.rename(path.with_suffix(".damaged"))
                damaged.append(f"{path.name[:80]}: {error}")
        return commands, damaged

    def withdraw(self, command: Command) -> bool:
        """Take a command back; return whether it was still there."""
        try:
            (self._folder / f"{command.id}.json").unlink()
        except FileNotFoundError:
            return False
        return True

    def answer(self, command: Command, answered: Answered, log: Log) -> None:
        """Answer the command and remove it: what was done is not done again, also where the disk is full."""
        what = f"{command.verb} {command.strategy or command.symbol}".strip() + f" by {command.who}"
        try:
            write_synced(self._done / f"{command.id}.json", msgspec.json.encode(
                msgspec.structs.replace(answered, what=what)))
        except OSError as error:
            log.error("command_unanswered", verb=command.verb, error=str(error))
        self.withdraw(command)
        for old in sorted(self._done.glob("*.json"))[:-ANSWERS_KEPT]:
            old.unlink(missing_ok=True)

    async def ask(self, verb: Verb, *, clock: Clock, **what: str) -> Answered | None:
        """Leave a command and wait for its answer; None: none came, and it stays. Ctrl-C takes it back."""
        command = self.put(verb, clock=clock, **what)
        try:
            for _ in range(ANSWER_TURNS):
                if (answered := self.take_answer(command)) is not None:
                    return answered
                await clock.sleep(0.1)
        except asyncio.CancelledError:
            self.withdraw(command)
            raise
        return None

    def take_answer(self, command: Command) -> Answered | None:
        """Return the answer, once; None while there is none."""
        answered = self._read(command.id)
        if answered is not None:
            (self._done / f"{command.id}.json").unlink()
        return answered

    def untaken(self) -> dict[str, Answered]:
        """Return the answers that nobody has come for yet, by the command's id, oldest first."""
        names = (path.stem for path in sorted(self._done.glob("*.json")))
        return {name: answered for name in names if (answered := self._read(name)) is not None}

    def _read(self, name: str) -> Answered | None:
        try:
            return msgspec.json.decode((self._done / f"{name}.json").read_bytes(), type=Answered)
        except (FileNotFoundError, msgspec.MsgspecError):
            return None
