"""A push to a fresh Debian 12 host, and what it bears: make test-host INVENTORY=FILE.

The first host of the inventory is taken over, rebooted and traded on (paper): use a throwaway one. Wants
nothing on it but SSH, a user with sudo, and package registries. The tests run in their order.
"""

import json
import os
import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest

from tests.harness import wait_until

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / "build" / "ansible" / "bin"
INVENTORY = os.environ.get("TRADEHOST_INVENTORY", "")
OPERATOR = "nightwatch"
PYTHON = "/opt/bot/current/.venv/bin/python"
# Two strategies: one has to be refused what is the other's.
STRATEGIES = {name: {"class": "bot.support_resistance:SupportResistanceStrategy", "symbols": [symbol],
                     "settings": {"notional": 1_000}}
              for name, symbol in (("sr", "BTC/USDT:USDT"), ("other", "ETH/USDT:USDT"))}

# What a hostile strategy would try, as its user and without its sandbox. Prints what each try came to.
TRIES = """
import json, os, socket, sys, time
import zmq
from bot.model import TradingSignal
from bot.wire import encode
pids, strategy = json.loads(sys.argv[1]), sys.argv[2]

def signal():
    now_ns = time.time_ns()
    return encode(TradingSignal(
        strategy="other", run=now_ns, seq=1, symbol="ETH/USDT:USDT", target_qty=1, stop_loss=None,
        take_profit=None, created_ns=now_ns, expires_ns=now_ns + 10**10, position_version=0, tick_run=1,
        tick_seq=1, tick_price=1.0, tick_exchange_ns=now_ns, tick_receive_ns=now_ns, reason="impostor"))

def push(name):
    socket.socket(socket.AF_UNIX).connect(f"/var/lib/bot/bus/signals/{name}/socket")
    pusher = zmq.Context.instance().socket(zmq.PUSH)
    pusher.connect(f"ipc:///var/lib/bot/bus/signals/{name}/socket")
    pusher.send(signal())
    time.sleep(1)

STATE = "/var/lib/bot"
TRIES = {
    "read the key": lambda: open("/etc/bot/keys/api.key").read(),
    "list the keys": lambda: os.listdir("/etc/bot/keys"),
    "connect to the exchange": lambda: socket.create_connection(("127.0.0.1", 5560), 3),
    "connect to the world": lambda: socket.create_connection(("203.0.113.1", 443), 3),
    "ask a name server": lambda: socket.socket(type=socket.SOCK_DGRAM).sendto(b"x", ("203.0.113.1", 53)),
    "read the journal": lambda: open(f"{STATE}/journal/journal.db", "rb"),
    "write the journal": lambda: open(f"{STATE}/journal/journal.db", "r+b"),
    "replace the journal": lambda: os.rename(f"{STATE}/journal", f"{STATE}/old"),
    "write the exchange's ledger": lambda: open(f"{STATE}/paper/paper.db", "r+b"),
    "kill the executor": lambda: os.kill(pids["executor"], 9),
    "kill another strategy": lambda: os.kill(pids["strategy-other"], 9),
    "send as another strategy, at its socket": lambda: push("other"),
    "take another strategy's socket": lambda: os.unlink(f"{STATE}/bus/signals/other/socket"),
    "take its own socket": lambda: os.unlink(f"{STATE}/bus/signals/{strategy}/socket"),
    "publish ticks": lambda: os.unlink(f"{STATE}/bus/ticks/socket"),
    "publish reports": lambda: os.unlink(f"{STATE}/bus/reports/socket"),
    "write another strategy's outbox": lambda: open(f"{STATE}/strategy/other/other.outbox", "ab"),
    "resume": lambda: os.listdir(f"{STATE}/halt"),
    "command": lambda: open(f"{STATE}/commands/x.json", "w"),
    "steer supervisord": lambda: socket.socket(socket.AF_UNIX).connect(f"{STATE}/run/supervisor.sock"),
    "change the configuration": lambda: open("/etc/bot/bot.toml", "a"),
    "change a release": lambda: open("/opt/bot/current/bot/executor.py", "a"),
}
for what, do in TRIES.items():
    try:
        do()
        print(what, "DONE", sep=": ")
    except OSError as error:
        print(what, type(error).__name__, sep=": ")
push(strategy)
print("sent as another strategy, at its own socket: SENT")
"""

pytestmark = pytest.mark.host


class Host:
    """The first host of the inventory, over SSH."""

    def __init__(self) -> None:
        assert INVENTORY, "make test-host INVENTORY=FILE"
        done = subprocess.run([BIN / "ansible-inventory", "-i", INVENTORY, "--list"], capture_output=True,
                              text=True, check=True)
        self.name, fields = next(iter(json.loads(done.stdout)["_meta"]["hostvars"].items()))
        key = fields.get("ansible_ssh_private_key_file")
        self._ssh = ["ssh", *(["-i", key] if key else []), "-o", "BatchMode=yes", "-o", "ConnectTimeout=5",
                     *shlex.split(fields.get("ansible_ssh_common_args", "")),
                     f"{fields.get('ansible_user', 'root')}@{fields.get('ansible_host', self.name)}"]

    def play(self, playbook: str, *words: str) -> tuple[dict[str, int], str]:
        """Run a playbook; return its recap (ok, changed, failed, ...) and its output."""
        done = subprocess.run(
            [BIN / "ansible-playbook", "-i", INVENTORY, "-l", self.name, playbook, *words,
             "-e", json.dumps({"bot_strategies": STRATEGIES})],
            cwd=ROOT / "ansible",
            capture_output=True,
            text=True,
            timeout=900,
            env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "ANSIBLE_NOCOLOR": "1"},
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
        recap = re.search(rf"^{re.escape(self.name)}\s+: (.+)$", done.stdout, re.M)[1]
        return {key: int(count) for key, count in re.findall(r"(\w+)=(\d+)", recap)}, done.stdout

    def do(self, command: str, *, user: str = "root", text: str = "") -> subprocess.CompletedProcess:
        """Run a shell command there, as a user, with text on its standard input."""
        there = f"sudo -u {user} sh -c {shlex.quote(command)}"
        return subprocess.run([*self._ssh, there], capture_output=True, text=True, timeout=60, input=text)

    def pids(self) -> dict[str, int]:
        """Return the process id of each program."""
        return {row["name"]: row["pid"] for row in self.status()["processes"]}

    def status(self) -> dict:
        done = self.do("botctl status --json")
        return json.loads(done.stdout) if done.stdout.startswith("{") else {"state": "UNREACHABLE"}

    def wait_running(self, timeout: float = 60) -> dict:
        wait_until(lambda: self.status()["state"] == "RUNNING", timeout)
        return self.status()


@pytest.fixture(scope="module")
def host() -> Host:
    return Host()


def test_host_that_is_fresh_bears_check_mode(host):
    recap, _ = host.play("site.yml", "--check", "--diff")
    assert recap["failed"] == 0 and host.do("test -e /opt/bot").returncode != 0


def test_host_that_is_fresh_trades_after_one_command(host):
    began = time.monotonic()
    host.play("site.yml")
    print(f"bare host to RUNNING: {time.monotonic() - began:.0f} s")
    wait_until(lambda: host.status()["counters"]["fills"], 120)
    print(f"bare host to the first fill: {time.monotonic() - began:.0f} s")
    status = host.wait_running()
    assert status["mode"] == "PAPER" and all(p["state"] == "UP" for p in status["processes"])


def test_host_that_is_done_does_not_change_again(host):
    recap, text = host.play("site.yml")
    assert recap["changed"] == 0, [line for line in text.splitlines() if line.startswith("changed")]


@pytest.mark.parametrize(("unit", "most"), [("bot.service", 3.0), ("bot-flatten.service", 2.0)])
def test_units_with_their_sandbox_expose_little(host, unit, most):
    text = host.do(f"systemd-analyze security --no-pager {unit}").stdout
    exposure = float(re.search(r"Overall exposure level for .*: ([\d.]+)", text)[1])
    print(f"exposure of {unit}: {exposure}")
    assert exposure <= most


def test_operator_without_root_looks_halts_and_resumes_and_reads_no_key(host):
    assert host.do(f"useradd -m {OPERATOR} && usermod -aG bot {OPERATOR}").returncode == 0
    assert host.do("botctl status", user=OPERATOR).stdout.startswith("PAPER  RUNNING")
    assert "RUNNING" in host.do("supervisorctl status executor", user=OPERATOR).stdout
    assert host.do("botctl halt --reason lunch", user=OPERATOR).returncode == 0
    wait_until(lambda: host.status()["state"] == "HALTED", 10)
    assert "lunch" in host.do("botctl resume", user=OPERATOR).stdout
    assert host.do("cat /etc/bot/keys/api.secret", user=OPERATOR).returncode != 0
    assert host.do("echo x >> /etc/bot/bot.toml", user=OPERATOR).returncode != 0
    host.wait_running()


def test_strategy_with_hostile_code_is_refused_everything_but_the_bus(host):
    before = host.pids()
    tries = f"{PYTHON} - {shlex.quote(json.dumps(before))} sr"
    done = host.do(tries, user="bot-s-sr", text=TRIES)
    print(done.stdout)
    lines = done.stdout.splitlines()
    assert len(lines) == 23 and "DONE" not in done.stdout, done.stdout + done.stderr
    assert lines[-1].endswith("SENT"), "its own socket is open, and who it says it is does not count"
    dropped = json.loads(host.do("cat /var/lib/bot/run/executor.json").stdout)["dropped"]
    assert dropped["impostor"] == 1, dropped
    assert "impostor" not in host.do("botctl signals --json").stdout and host.pids() == before
    # The tries were real: who may, does.
    connect = f"{PYTHON} -c \"import socket; socket.create_connection(('127.0.0.1', 5560), 3)\""
    assert host.do(connect, user="bot-feed").returncode == 0
    assert host.do("cat /etc/bot/keys/api.key", user="bot-trade").stdout
    assert host.do("cat /etc/bot/keys/api.key", user="bot-feed").returncode != 0
    assert host.do("echo >> /var/lib/bot/journal/journal.db", user="bot-feed").returncode != 0


@pytest.mark.parametrize("name", ["executor", "strategy-sr", "health"])
def test_process_of_another_user_that_hangs_is_killed_and_started_again(host, name):
    pid = host.pids()[name]
    assert host.do(f"kill -STOP {pid}").returncode == 0
    wait_until(lambda: host.pids()[name] not in (None, pid), 40)
    status = host.wait_running()
    assert not status["locked_symbols"] and not status["halted"]


def test_supervisord_that_is_killed_comes_back_trading(host):
    before = host.do("systemctl show -p MainPID --value bot").stdout.strip()
    began = time.monotonic()
    assert host.do(f"kill -9 {before}").returncode == 0
    wait_until(
        lambda: host.do("systemctl show -p MainPID --value bot").stdout.strip() not in ("0", before), 30
    )
    status = host.wait_running()
    print(f"kill -9 of supervisord: RUNNING after {time.monotonic() - began:.0f} s")
    assert not status["locked_symbols"] and not status["halted"]
    assert host.do("pgrep -fc '^/opt/bot/.*-m bot.executor'").stdout.strip() == "1"


def test_host_that_reboots_comes_back_trading(host):
    before = host.do("systemctl show -p InvocationID --value bot").stdout.strip()
    began = time.monotonic()
    host.do("systemctl reboot")
    wait_until(lambda: host.do("systemctl show -p InvocationID --value bot").stdout.strip()
               not in ("", before), 120)
    status = host.wait_running(120)
    print(f"reboot: RUNNING after {time.monotonic() - began:.0f} s")
    assert not status["locked_symbols"] and not status["halted"]


def test_playbooks_that_halt_and_flatten_do(host):
    host.play("halt.yml", "-e", "why=drill")
    assert [h["why"] for h in host.status()["halted"]] == ["drill"]
    assert host.do("botctl resume").returncode == 0
    wait_until(lambda: any(float(p["qty"]) for p in host.status()["positions"]), 120)
    _, text = host.play("flatten.yml")
    assert "flat" in text
    wait_until(lambda: host.status()["state"] == "HALTED"
               and not any(float(p["qty"]) for p in host.status()["positions"]), 60)
    assert host.do("botctl resume").returncode == 0
    host.wait_running()


def test_journal_after_all_of_it_agrees_with_the_exchange(host):
    done = host.do("botctl reconcile")
    assert done.returncode == 0 and "agree" in done.stdout, done.stdout + done.stderr
