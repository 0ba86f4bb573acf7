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
            [BIN / "ansible-playbook", "-i", INVENTORY, "-l", self.name, playbook, *words],
            cwd=ROOT / "ansible",
            capture_output=True,
            text=True,
            timeout=900,
            env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "ANSIBLE_NOCOLOR": "1"},
        )
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
        recap = re.search(rf"^{re.escape(self.name)}\s+: (.+)$", done.stdout, re.M)[1]
        return {key: int(count) for key, count in re.findall(r"(\w+)=(\d+)", recap)}, done.stdout

    def do(self, command: str, *, user: str = "root") -> subprocess.CompletedProcess:
        """Run a shell command there, as a user."""
        there = f"sudo -u {user} sh -c {shlex.quote(command)}"
        return subprocess.run([*self._ssh, there], capture_output=True, text=True, timeout=60)

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
