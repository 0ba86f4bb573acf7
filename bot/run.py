"""`make run`: everything in the foreground. Starts supervisord, shows trading, ends all of it on Ctrl-C."""

import argparse
import asyncio
import ctypes
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

from bot import __version__
from bot.bus import ZmqSubscriber
from bot.clock import Clock
from bot.commands import CommandFiles
from bot.config import Config
from bot.config_file import load, parse
from bot.daemon import PR_SET_PDEATHSIG, take_lock
from bot.errors import EXIT_CONFIG, EXIT_OK, EXIT_SOFTWARE, ConfigError, WireError
from bot.probe import ProgramInfo, Supervisor, descendants, kill
from bot.programs import ROOT, note_config, write_sections
from bot.screen import Screen, event_line
from bot.wire import HEARTBEAT_TOPIC, decode_report, decode_tick, tick_topic

PR_SET_CHILD_SUBREAPER = 36  # prctl(2): orphans below us become our children, so none escapes the end
STATUS_S = 10
POLL_S = 1.0
END_S = 8.0  # then by force; with KILL_S everything has ended within the 10 s that were promised
KILL_S = 1.0
SECRET_LENGTH = 64  # as the real exchange's
# sun_path holds 108 bytes, and supervisord binds "supervisor.sock.PID" before it renames.
SOCKET_PATH_MAX = 96
SUPERVISORD_CONF = Path(__file__).resolve().parent.parent / "ops" / "supervisord.conf"
GOODBYE = ("stopped. Positions and protective stops stay at the exchange; nothing here watches them now. "
           "To be flat: botctl flatten, which works without the rest too (RUNBOOK.md, Flatten).")


class Foreground:
    """One run: supervisord below us, its programs below it, and the screen."""

    def __init__(self, config: Config, config_path: Path, clock: Clock) -> None:
        self._config, self._config_path, self._clock = config, config_path, clock
        self._screen = Screen(config.symbols(), silence_ns=config.bus.silence_ms * 1_000_000)
        self._supervisor = Supervisor(config.path("run/supervisor.sock"))
        self._programs: dict[str, ProgramInfo] = {}
        self._stopping = asyncio.Event()
        self._commands = CommandFiles(config.path("commands"))
        self._answers = self._commands.untaken()

    async def live(self) -> int:
        """Run until Ctrl-C, SIGTERM or the end of supervisord; return the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._stopping.set)
        supervisord = _start_supervisord(self._config, self._config_path)
        bus = self._config.bus
        topics = [*map(tick_topic, self._config.symbols()), HEARTBEAT_TOPIC]
        ticks = ZmqSubscriber(bus.ticks, bus, topics)
        reports = ZmqSubscriber(bus.reports, bus, [b"r/"])
        ticks.watch(self._on_ticks)
        reports.watch(self._on_reports)
        watch = [loop.create_task(work) for work in (self._watch(supervisord), self._show_status())]
        try:
            await asyncio.wait([loop.create_task(self._stopping.wait()), *watch],
                               return_when=asyncio.FIRST_COMPLETED)
            died = supervisord.poll()
        finally:
            await self._end(supervisord)
            ticks.close()
            reports.close()
        for task in watch:
            if task.done():
                task.result()  # a mistake of ours is told, now that nothing runs any more
        if died is not None:
            self._say(f"supervisord ended by itself, code {died}; see {self._config.path('log')}")
        self._say(GOODBYE)
        return EXIT_OK if died is None else EXIT_SOFTWARE

    def _say(self, line: str) -> None:
        try:
            print(line, flush=True)
        except BrokenPipeError:  # nobody looks any more (`make run | head`): nothing runs unseen
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            self._stopping.set()

    def _on_ticks(self, batch: list[tuple[bytes, bytes]]) -> None:
        for _, raw in batch:
            try:
                self._screen.saw_tick(decode_tick(raw))
            except WireError:
                continue  # those who act on Ticks count and log it

    def _on_reports(self, batch: list[tuple[bytes, bytes]]) -> None:
        for _, raw in batch:
            try:
                line = self._screen.line_of(decode_report(raw), self._clock.wall_ns())
            except WireError:
                continue
            if line is not None:
                self._say(line)

    async def _show_status(self) -> None:
        while True:
            await self._clock.sleep(STATUS_S)
            self._say(self._screen.status_line(self._clock.wall_ns()))

    async def _watch(self, supervisord: subprocess.Popen) -> None:
        while supervisord.poll() is None:
            for program in await asyncio.to_thread(self._supervisor.programs):
                before = self._programs.get(program.name)
                self._programs[program.name] = program
                if before is None or (before.state, before.pid) != (program.state, program.pid):
                    self._tell(program, before)
            answers = self._commands.untaken()  # typed while the executor was away: whoever did has gone
            for told in (answers[name] for name in answers if name not in self._answers):
                self._say(event_line(self._clock.wall_ns(), f"{told.what}: {told.text}", "command"))
            self._answers = answers
            await self._clock.sleep(POLL_S)

    def _tell(self, program: ProgramInfo, before: ProgramInfo | None) -> None:
        text = f"{program.name} {before.state + ' -> ' if before else ''}{program.state}"
        if before is not None and before.pid and before.pid != program.pid:
            text += f": pid {before.pid} ended"
        if program.pid:
            text += f", pid {program.pid}"
        if program.state in ("BACKOFF", "FATAL", "EXITED"):
            text += f" ({program.description}; see {self._config.path('log')}/{program.name}.log)"
        self._say(event_line(self._clock.wall_ns(), text))

    async def _end(self, supervisord: subprocess.Popen) -> None:
        deadline = self._clock.mono_ns() + int(END_S * 1e9)
        if supervisord.poll() is None:
            supervisord.terminate()
        while descendants() and self._clock.mono_ns() < deadline:
            # supervisord looks at its children once a second, or when somebody asks it something.
            await asyncio.to_thread(self._supervisor.programs)
            await self._clock.sleep(0.1)
            supervisord.poll()
        left = kill(descendants(), KILL_S)
        if left:
            self._say(f"still there: {', '.join(str(p.pid) for p in left)}")


def make_paper_keys(config: Config, clock: Clock) -> None:
    """Make the paper exchange's key files where they are missing: random, 0600, below state_dir only."""
    if config.mode != "paper":
        return
    for table in (config.exchange, *(config.paper.accounts.values() if config.paper else ())):
        for path in (config.path(table.api_key_file), config.path(table.api_secret_file)):
            if path.resolve().is_relative_to(config.state_path) and not path.exists():
                try:
                    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
                    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                except OSError as error:
                    where = f"state_dir: {path.parent}"
                    raise ConfigError(f"{where} cannot be written: {error.strerror}") from None
                with open(handle, "w", encoding="ascii") as file:
                    file.write(clock.token(SECRET_LENGTH))


def check_start(config: Config, config_path: Path) -> None:
    """Check what only a start can: free ports, and paths that supervisord can take. Raises ConfigError."""
    for path in (config.state_path, config_path.resolve(), Path(sys.executable)):
        if any(character.isspace() for character in str(path)):
            raise ConfigError(f"supervisord takes no path with a space; was {path}")
    socket_path = str(config.path("run/supervisor.sock"))
    if len(socket_path.encode()) > SOCKET_PATH_MAX:
        raise ConfigError(f"state_dir: a unix socket's path has at most {SOCKET_PATH_MAX} bytes; "
                          f"was {socket_path}")
    wanted = {f"bus.{name}.endpoint": getattr(config.bus, name).endpoint
              for name in ("ticks", "signals", "reports")}
    if config.paper is not None and config.mode == "paper":
        wanted["paper.bind"] = f"tcp://{config.paper.bind}"
    for key, endpoint in wanted.items():
        url = urlsplit(endpoint)
        if url.scheme == "tcp":
            _check_port(key, url.hostname or "", url.port or 0)


def _check_port(key: str, host: str, port: int) -> None:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ConfigError(f"{key}: {host}:{port} cannot be bound: {error.strerror}; "
                              "end what uses it, or choose another port") from None


def _start_supervisord(config: Config, config_path: Path) -> subprocess.Popen:
    parent, libc = os.getpid(), ctypes.CDLL(None)
    libc.prctl(PR_SET_CHILD_SUBREAPER, 1)

    def die_with_parent() -> None:
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died in between
            os._exit(EXIT_SOFTWARE)

    environment = {**os.environ, "BOT_STATE_DIR": str(config.state_path), "BOT_PYTHON": sys.executable,
                   "BOT_CONFIG": str(config_path.resolve()), "BOT_SOCKET_MODE": "0700"}
    # A session of its own: Ctrl-C reaches us alone, and we end the rest in order. What it says is in its log,
    # which has a limit. What it cannot log it prints on stderr, and ends when it cannot: on a full disk, or
    # when we are gone, that must not fail.
    return subprocess.Popen(
        [sys.executable, "-m", "supervisor.supervisord", "-n", "-c", str(SUPERVISORD_CONF)],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment,
        start_new_session=True, preexec_fn=die_with_parent)  # noqa: PLW1509 - no thread was started yet


def main(argv: list[str] | None = None) -> int:
    """Run everything in the foreground until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m bot.run", description=main.__doc__)
    parser.add_argument("--config", required=True, type=Path, metavar="FILE")
    parser.add_argument("--prepare", action="store_true",
                        help="write what supervisord needs, and start nothing: for a service manager")
    parser.add_argument("--root", default=ROOT, type=Path, metavar="DIR",
                        help="whose var/run tells botctl what runs; default: the checkout")
    args = parser.parse_args(argv)
    clock = Clock()
    try:
        make_paper_keys(parse(args.config), clock)
        config = load(args.config)
        lock = take_lock(config, "run")
        check_start(config, args.config)
        for folder in ("log", "run"):
            config.path(folder).mkdir(mode=0o750, parents=True, exist_ok=True)
        write_sections(config)
        note_config(args.config, config.state_path, args.root)
    except ConfigError as error:
        print(f"config error: {error}", file=sys.stderr)
        return EXIT_CONFIG
    if args.prepare:
        return EXIT_OK
    botctl = Path(sys.executable).with_name("botctl")
    port = config.health.page_port
    page = f"http://127.0.0.1:{port}  or  " if port else ""
    print(f"tradehost {__version__}  mode {config.mode.upper()}  at {config.exchange.rest_url}",
          f"config    {args.config.resolve()}", f"logs      {config.path('log')}",
          f"look      {page}{botctl} status", f"halt      {botctl} halt",
          "end       Ctrl-C; positions and stops stay at the exchange\n", sep="\n", flush=True)
    code = asyncio.run(Foreground(config, args.config, clock).live())
    os.close(lock)
    return code


if __name__ == "__main__":
    sys.exit(main())
