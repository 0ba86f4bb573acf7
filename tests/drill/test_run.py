"""`make run` with real processes: it trades, shows it, bears what dies, and leaves nothing behind."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from bot.clock import Clock
from bot.commands import CommandFiles
from bot.config_file import load, parse
from bot.errors import EXIT_CONFIG, EXIT_SOFTWARE, ConfigError
from bot.programs import find_config
from bot.run import check_start, make_paper_keys
from tests.harness import ROOT, free_port, wait_until, write_config

FILL_S = 60  # what was promised, from the end of the install
END_S = 10


def command(config: Path) -> list[str]:
    return [sys.executable, "-m", "bot.run", "--config", str(config), "--root", str(config.parent)]


class Run:
    """`python -m bot.run` as a person started it; the output goes to a file beside the config."""

    def __init__(self, config: Path) -> None:
        self.config, self._out = config, config.with_suffix(".out")
        with open(self._out, "wb") as out:
            self.process = subprocess.Popen(command(config), stdout=out, stderr=subprocess.STDOUT, cwd=ROOT)
        self.ours: set[psutil.Process] = set()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_: object) -> None:
        self.remember()
        for process in [*self.ours, self.process]:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                pass
        self.process.wait()

    @property
    def text(self) -> str:
        return self._out.read_text()

    def remember(self) -> None:
        """Note all processes below, to be looked for when they should be gone."""
        try:
            self.ours |= set(psutil.Process(self.process.pid).children(recursive=True))
        except psutil.NoSuchProcess:
            pass

    def status(self) -> dict:
        command = [sys.executable, "-m", "bot.botctl", "status", "--json", "--config", str(self.config)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=30)
        return json.loads(done.stdout or "{}")

    def pid_of(self, name: str) -> int:
        return int(re.findall(rf"process +{name} .*pid (\d+)$", self.text, re.MULTILINE)[-1])

    def wait_running(self) -> None:
        """Wait until each of the four programs is RUNNING."""
        names = ("paper", "gateway", "executor", "strategy-")
        wait_until(lambda: all(re.search(rf"{n}.*RUNNING, pid", self.text) for n in names), 30)
        self.remember()

    def end(self, number: int = signal.SIGINT) -> int:
        """Ask it to end as Ctrl-C does; return its exit code. Fails when that takes too long."""
        self.remember()
        self.process.send_signal(number)
        return self.process.wait(END_S)

    def assert_nothing_left(self) -> None:
        assert [p for p in self.ours if p.is_running() and p.status() != psutil.STATUS_ZOMBIE] == []
        for port in re.findall(r"127\.0\.0\.1:(\d+)", self.config.read_text()):
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("127.0.0.1", int(port)))


def example_config(tmp_path: Path) -> Path:
    """Return the example as it is, but on free ports and with a state_dir of its own."""
    text = (ROOT / "ops" / "bot.example.toml").read_text().replace("5560", str(free_port()))
    text = text.replace('state_dir = "var"', f'state_dir = "{tmp_path}/var"')
    text += "".join(f'\n[bus.{name}]\nendpoint = "tcp://127.0.0.1:{free_port()}"\n'
                    for name in ("ticks", "signals", "reports"))
    path = tmp_path / "bot.toml"
    path.write_text(text)
    return path


def run_once(path: Path) -> subprocess.CompletedProcess:
    return subprocess.run(command(path), capture_output=True, text=True, cwd=ROOT, timeout=30)


def test_run_with_the_example_trades_within_a_minute_ends_cleanly_and_goes_on(tmp_path):
    path = example_config(tmp_path)
    with Run(path) as run:
        fill = r"fill +(BUY|SELL) [\d.]+ BTC/USDT:USDT at [\d.]+, fee"
        wait_until(lambda: re.search(fill, run.text), FILL_S)
        run.wait_running()
        assert "mode PAPER" in run.text and str(path) in run.text
        status = wait_until(lambda: (s := run.status())["counters"]["fills"] and s)
        assert (status["mode"], status["state"]) == ("PAPER", "RUNNING")
        assert status["counters"]["ticks"] > 0 and status["counters"]["ticks_lost"] == 0
        wait_until(lambda: re.search(r"status +BTC/USDT:USDT [\d,.]+ \| [\d,]+ ticks \| sr", run.text), 15)
        assert run.end() == 0
        assert "Positions and protective stops stay at the exchange" in run.text.splitlines()[-1]
        run.assert_nothing_left()
    fills = status["counters"]["fills"]
    for key in ("paper.key", "paper.secret"):
        assert (tmp_path / "var" / "keys" / key).stat().st_mode & 0o777 == 0o600
    with Run(path) as run:
        run.wait_running()
        status = wait_until(lambda: (s := run.status())["state"] == "RUNNING" and s, 20)
        assert status["counters"]["fills"] >= fills, "the journal goes on where it stopped"
        assert status["locked_symbols"] == {} and status["unknown_orders"] == 0
        assert run.end(signal.SIGTERM) == 0
        run.assert_nothing_left()


def test_run_with_programs_killed_shows_each_and_has_it_back(tmp_path):
    with Run(write_config(tmp_path)) as run:
        run.wait_running()
        for name in ("paper", "gateway", "executor", "strategy-levels"):
            pid = run.pid_of(name)
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda n=name, p=pid: re.search(rf"process +{n} .*: pid {p} ended", run.text), 10)
            back = rf"process +{name} .*-> RUNNING"
            wait_until(lambda b=back: re.search(b, run.text.split("ended")[-1]), 20)
        assert run.end() == 0
        run.assert_nothing_left()


def test_run_with_programs_that_hang_ends_in_time(tmp_path):
    with Run(write_config(tmp_path)) as run:
        run.wait_running()
        for name in ("paper", "gateway", "executor", "strategy-levels"):
            os.kill(run.pid_of(name), signal.SIGSTOP)
        assert run.end() == 0
        run.assert_nothing_left()


def test_run_killed_itself_takes_everything_with_it(tmp_path):
    with Run(write_config(tmp_path)) as run:
        run.wait_running()
        run.process.kill()
        wait_until(lambda: not any(p.is_running() for p in run.ours), 20)
        run.process.wait()
        run.assert_nothing_left()


def test_run_with_supervisord_killed_says_so_and_ends_the_rest(tmp_path):
    with Run(write_config(tmp_path)) as run:
        run.wait_running()
        next(p for p in run.ours if "supervisor.supervisord" in p.cmdline()).kill()
        assert run.process.wait(15) == EXIT_SOFTWARE
        assert "supervisord ended by itself, code -9" in run.text
        run.assert_nothing_left()


@pytest.mark.parametrize("module", ["bot", "bot.errors", "bot.bus", "bot.probe"])
def test_run_with_ctrl_c_while_it_imports_ends_without_a_traceback(tmp_path, module):
    program, *args = command(example_config(tmp_path))
    with subprocess.Popen([program, "-X", "importtime", *args], stderr=subprocess.PIPE, text=True,
                          cwd=ROOT) as run:
        assert any(line.split("|")[-1].strip() == module for line in run.stderr)  # it is imported
        run.send_signal(signal.SIGINT)
        rest = run.stderr.read()
    assert run.returncode in (0, -signal.SIGINT) and "Traceback" not in rest


def test_run_shows_what_a_command_came_to_that_waited_for_the_executor(tmp_path):
    path = example_config(tmp_path)
    config = parse(path)
    CommandFiles(config.path("commands")).put("reconcile", who="op", why="a look", clock=Clock())
    with Run(path) as run:
        wait_until(lambda: re.search(r"command +reconcile by op: books and exchange agree", run.text), 40)
        assert run.end() == 0


def test_run_with_a_taken_port_is_one_error_and_starts_nothing(tmp_path):
    path = write_config(tmp_path)
    endpoint = load(path).bus.ticks.endpoint
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(endpoint.rpartition(":")[2])))
        taken.listen()
        done = run_once(path)
    assert done.returncode == EXIT_CONFIG and done.stdout == ""
    assert re.fullmatch(r"config error: bus\.ticks\.endpoint: 127\.0\.0\.1:\d+ cannot be bound: Address "
                        r"already in use; end what uses it, or choose another port\n", done.stderr)
    assert not (tmp_path / "var" / "log").exists()


def test_run_twice_in_one_state_dir_is_one_error(tmp_path):
    path = write_config(tmp_path)
    with Run(path) as run:
        run.wait_running()
        assert find_config(root=tmp_path) == path, "botctl without --config finds it"
        done = run_once(path)
        assert done.returncode == EXIT_CONFIG
        assert re.fullmatch(r"config error: run is already running in .*\n", done.stderr)
        assert run.end() == 0


def test_run_with_a_strategy_class_that_is_not_there_shows_it_and_lives(tmp_path):
    path = write_config(tmp_path, strategy={"levels": {"class": "nowhere:Nothing"}})
    with Run(path) as run:
        shown = r"process +strategy-levels .*(BACKOFF|EXITED).*see .*/strategy-levels\.log"
        wait_until(lambda: re.search(shown, run.text), 20)
        log = tmp_path / "var" / "log" / "strategy-levels.log"
        assert "config error: strategy.levels.class" in log.read_text()
        assert run.end() == 0


def test_paper_keys_with_files_missing_are_made_once_and_below_state_dir_only(tmp_path):
    account = {"api_key_file": "keys/k", "api_secret_file": "../escape"}
    path = write_config(tmp_path, exchange={"api_key_file": "keys/k", "api_secret_file": "/nowhere/s"},
                        paper={"accounts": {"main": account}})
    config = parse(path)
    make_paper_keys(config, Clock())
    key = tmp_path / "var" / "keys" / "k"
    first = key.read_text()
    assert len(first) == 64 and key.stat().st_mode & 0o777 == 0o600
    assert key.parent.stat().st_mode & 0o777 == 0o700
    make_paper_keys(config, Clock())
    assert key.read_text() == first, "the paper exchange remembers the account by its key"
    assert not (tmp_path / "escape").exists()


def test_paper_keys_with_a_live_mode_are_never_made(tmp_path):
    path = write_config(tmp_path, mode="live", paper=None, exchange={
        "rest_url": "https://x.example", "ws_url": "wss://x.example", "api_key_file": "keys/k"})
    make_paper_keys(parse(path), Clock())
    assert not (tmp_path / "var").exists()


@pytest.mark.parametrize(("state_dir", "rule"), [
    ("a folder", "no path with a space"), ("d" * 100, "unix socket")])
def test_start_with_a_state_dir_supervisord_cannot_take_is_refused(tmp_path, state_dir, rule):
    path = write_config(tmp_path, state_dir=str(tmp_path / state_dir))
    with pytest.raises(ConfigError, match=rule):
        check_start(load(path), path)


def test_run_with_output_closed_still_ends_everything(tmp_path):
    path = write_config(tmp_path)
    process = subprocess.Popen(command(path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                               cwd=ROOT)
    for line in process.stdout:
        if "-> RUNNING" in line:
            break
    ours = psutil.Process(process.pid).children(recursive=True)
    process.stdout.close()  # as `make run | head` does
    try:
        process.wait(30)
        deadline = time.monotonic() + END_S
        while any(p.is_running() for p in ours) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not [p for p in ours if p.is_running()]
    finally:
        for left in psutil.process_iter():
            if left in ours:
                left.kill()
        if process.poll() is None:
            process.kill()
