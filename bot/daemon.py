"""What every process does the same way: arguments, config, log, lock, beat, stop, crash.

A process is `async def main(daemon)`; it ends when `daemon.stopping` is set. A task that fails
ends the process (exit 70): supervisord starts it again, from what is on disk.
"""

import argparse
import asyncio
import ctypes
import fcntl
import os
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec

from bot import __version__
from bot.clock import Clock
from bot.config import Config, StrategyConfig
from bot.config_file import load
from bot.crash import PLAN
from bot.errors import EXIT_CONFIG, EXIT_SOFTWARE, ConfigError
from bot.limits import tightened, waits_for_restart
from bot.log import Log
from bot.metrics import serve

CRASHES_KEPT = 50  # more than health.restarts_per_day_max may be
PR_SET_PDEATHSIG = 1  # prctl(2): be told when the parent dies, also by SIGKILL

DISK_FREE_BYTES_MIN = 16_000_000  # a checkpoint and the write-ahead log take at most about half of it
DISK_LOOK_S = 1.0


class Daemon:
    """A running process: what it was given, and how it ends."""

    def __init__(self, name: str, config: Config, clock: Clock, log: Log,
                 args: argparse.Namespace) -> None:
        self.name, self.config, self.clock, self.log, self.args = name, config, clock, log, args
        self.run = clock.wall_ns()  # names this run in everything it publishes
        self.stopping = asyncio.Event()
        self.status: Callable[[], dict[str, Any]] = dict  # the process puts its own in place
        self.reread: Callable[[], None] = lambda: None  # strategies came, changed or went
        self.beat: dict[str, Any] = {}  # the last one, as metrics tell it
        self._crash_starts, self._is_ended = _crash_starts(config, name, clock), False
        self._tasks: asyncio.TaskGroup | None = None

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task:
        """Run work beside the process; when it fails, the process ends."""
        assert self._tasks is not None
        return self._tasks.create_task(work)

    def every(self, seconds: float, action: Callable[[], Awaitable[None] | None]) -> asyncio.Task:
        """Call action now and then each `seconds`; late turns are skipped, not made up for."""
        async def repeat() -> None:
            while not self.stopping.is_set():
                result = action()
                if result is not None:
                    await result
                await self.clock.sleep(seconds)
        return self.spawn(repeat())

    async def wait_for_disk(self) -> None:
        """Wait until there is room to write below state_dir; the beat says so. A stop ends it."""
        while (free := shutil.disk_usage(self.config.state_path).free) < DISK_FREE_BYTES_MIN:
            if self.stopping.is_set():
                return
            text = f"the disk is full: {free} bytes are free, {DISK_FREE_BYTES_MIN} are needed"
            self.tell("REDUCING", text)
            self.log.error("disk_full", text=text)
            await self.clock.sleep(DISK_LOOK_S)

    def tell(self, state: str, why: str) -> None:
        """Beat at once, with a state and nothing else: for who cannot let the loop run."""
        told = {"state": state, "state_reason": why}
        self.status = told.copy
        self._beat()

    def stop(self, why: str) -> None:
        """Ask the process to end."""
        if not self.stopping.is_set():
            self.log.info("stopping", why=why)
            self.stopping.set()

    async def live(self, main: Callable[["Daemon"], Coroutine[Any, Any, None]]) -> None:
        """Run main until it ends, beating once per heartbeat_ms, and end all tasks with it."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self.stop, signal.Signals(number).name)
        loop.add_signal_handler(signal.SIGHUP, self._reread)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})  # bot/__init__.py
        broken: asyncio.Future[None] = loop.create_future()
        loop.set_exception_handler(lambda loop, context: _callback_failed(loop, context, broken))
        self._beat()  # also one that fails in its first moment leaves its mark
        metrics_port = self.config.metrics_port(self.name)
        if metrics_port and not serve(metrics_port, lambda: (self.beat, self.clock.mono_ns())):
            self.log.warning("metrics_unavailable", port=metrics_port)
        async with asyncio.TaskGroup() as self._tasks:
            beats = self.every(self.config.bus.heartbeat_ms / 1_000, self._beat)
            self.spawn(_until_broken(broken))
            await main(self)
            self.stopping.set()
            beats.cancel()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
        self._is_ended = True
        self._beat()

    def _reread(self) -> None:
        # SIGHUP. Strategies come and go in a running process; all else waits for its next start.
        strategies = dict(self.config.strategy)
        try:
            new = load(self.args.config)
            self._take_strategies(new.strategy)
            self.reread()
        except Exception as error:  # whatever it is: it ends nobody who trades, and nothing changes by halves
            self._take_strategies(strategies)
            self.log.error("config_refused", error=str(error))
            return
        waiting = waits_for_restart(self.config, new)
        msgspec.structs.force_setattr(self.config, "limits", tightened(self.config.limits, new.limits))
        self.log.info("config_reread", strategies=sorted(new.strategy), waits_for_restart=waiting)

    def _take_strategies(self, strategies: dict[str, StrategyConfig]) -> None:
        # In place: whoever was given the config, or this table of it, sees the change.
        self.config.strategy.clear()
        self.config.strategy.update(strategies)

    def _beat(self) -> None:
        # A file, renamed into place: botctl, health and guard read it, whoever they are.
        if os.getppid() != _parent:
            self.stop("the parent process died")
        self.beat = {"name": self.name, "pid": os.getpid(), "version": __version__, "run": self.run,
                     "mono_ns": self.clock.mono_ns(), "wall_ns": self.clock.wall_ns(),
                     "config": self.config.fingerprint(),
                     "shared_config": self.config.fingerprint(is_shared=True), "ended": self._is_ended,
                     "crash_starts": self._crash_starts, "suppressed": self.log.suppressed,
                     "descriptors": len(os.listdir("/proc/self/fd")),  # a process tells them to its user only
                     "descriptors_max": resource.getrlimit(resource.RLIMIT_NOFILE)[0], **self.status()}
        path, raw = self.config.run_path(self.name) / f"{self.name}.json", msgspec.json.encode(self.beat)
        part = path.with_suffix(".part")
        try:
            part.write_bytes(raw)
            os.replace(part, path)
        except OSError as error:  # a full disk: the last beat's own block is still there
            self.log.warning("beat_unwritten", error=str(error))
            _overwrite(path, raw)


def _overwrite(path: Path, raw: bytes) -> None:
    try:
        with open(path, "r+b", buffering=0) as file:
            file.write(raw.ljust(path.stat().st_size))
    except OSError:
        pass  # silent then, which is true, and others act on it


def _crash_starts(config: Config, name: str, clock: Clock) -> list[int]:
    # When this process started because the one before had not ended well: monotonic, the newest last.
    try:
        before = msgspec.json.decode((config.run_path(name) / f"{name}.json").read_bytes())
        starts, has_ended = [int(ns) for ns in before["crash_starts"]], before["ended"]
    except (OSError, msgspec.MsgspecError, KeyError, TypeError, ValueError):
        return []
    now_ns = clock.mono_ns()
    starts = [ns for ns in starts if ns <= now_ns]  # of this boot
    return starts if has_ended else [*starts, now_ns][-CRASHES_KEPT:]


async def _until_broken(broken: asyncio.Future[None]) -> None:
    await broken


def _callback_failed(loop: asyncio.AbstractEventLoop, context: dict[str, Any],
                     broken: asyncio.Future[None]) -> None:
    # asyncio only logs what a callback (a socket's handler) raises; here it ends the process.
    if "handle" in context and not broken.done():
        broken.set_exception(context["exception"])
    else:
        loop.default_exception_handler(context)


def _find_parent() -> int:
    # supervisord may have died while this process imported: then its parent is the one that takes orphans.
    pid = os.getppid()
    try:
        is_orphan = b"supervisord" not in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # hidden from other users: a service manager ends what supervisord has left
        is_orphan = False
    return 0 if is_orphan and "SUPERVISOR_ENABLED" in os.environ else pid


_parent = _find_parent()


def run(name: str, main: Callable[[Daemon], Coroutine[Any, Any, None]], argv: list[str] | None = None,
        *, add_arguments: Callable[[argparse.ArgumentParser], None] | None = None,
        process_name: Callable[[argparse.Namespace], str] | None = None) -> int:
    """Run a process from its command line; return its exit code (0, 70 broken, 78 config)."""
    parser = argparse.ArgumentParser(prog=f"python -m bot.{name}", description=main.__doc__)
    parser.add_argument("--config", required=True, type=Path, metavar="FILE",
                        help="the TOML file, for example ops/bot.example.toml")
    if add_arguments:
        add_arguments(parser)
    args = parser.parse_args(argv)
    name = process_name(args) if process_name else name
    clock = Clock()
    try:
        config = load(args.config)
        if PLAN and config.mode == "live":
            raise ConfigError("TRADEHOST_CRASH: crash points are for tests; unset it in mode live")
        lock = take_lock(config, name)
    except ConfigError as error:
        print(f"config error: {error}", file=sys.stderr)
        return EXIT_CONFIG
    # No SIGKILL: an order on its way is answered, the journal closes. A busy loop does not hear it:
    # systemd ends all that its service leaves, make run what is below it; its lock keeps a second one away.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core would hold the keys
    log = Log(name, clock, config.log.level)
    log.info("started", version=__version__, config=config.fingerprint(), mode=config.mode, pid=os.getpid())
    try:
        asyncio.run(_live(name, main, config, clock, log, args))
    except BaseExceptionGroup as group:
        return _crashed(log, group.exceptions[0])
    except Exception as error:  # the last resort: say why, and let supervisord start a fresh one
        return _crashed(log, error)
    log.info("stopped")
    os.close(lock)
    return 0


async def _live(name, main, config, clock, log, args) -> None:
    await Daemon(name, config, clock, log, args).live(main)


def _crashed(log: Log, error: BaseException) -> int:
    if isinstance(error, ConfigError):
        print(f"config error: {error}", file=sys.stderr)
        return EXIT_CONFIG
    log.error("crashed", error=f"{type(error).__name__}: {error}",
              traceback="".join(traceback.format_exception(error)))
    return EXIT_SOFTWARE


def take_lock(config: Config, name: str) -> int:
    """Take the process's file lock, for its life: a bind is no mutex. Raises ConfigError when it is held."""
    folder = config.run_path(name)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"state_dir: {folder} cannot be written: {error.strerror}") from None
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise ConfigError(f"{name} is already running in {config.state_path}; stop it, or give this "
                          "one another state_dir") from None
    return handle
