"""A push to a fresh Debian 12 host, and what it bears: make test-host INVENTORY=FILE.

The first host of the inventory is taken over, rebooted and traded on (paper): use a throwaway one. Wants
nothing on it but SSH, a user with sudo, and package registries. The tests run in their order.
"""

import json
import os
import re
import shlex
import time

import pytest

from tests.harness import wait_until
from tests.host import PYTHON, ROOT, Host

OPERATOR = "nightwatch"
CUT_S = 120
MEMORY_MB = int(os.environ.get("TRADEHOST_MEMORY_MB", "0"))  # what the host has, where it may be used up
UNITS = sorted(path.name for path in (ROOT / "systemd").glob("*.service"))

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
    "read the journal": lambda: open(f"{STATE}/journal/paper.db", "rb"),
    "write the journal": lambda: open(f"{STATE}/journal/paper.db", "r+b"),
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
long = pytest.mark.long


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


@pytest.mark.parametrize("unit", UNITS)
def test_units_with_their_sandbox_expose_little(host, unit):
    most = 3.0 if unit == "bot.service" else 2.0
    text = host.do(f"systemd-analyze security --no-pager {unit}").stdout
    exposure = float(re.search(r"Overall exposure level for .*: ([\d.]+)", text)[1])
    print(f"exposure of {unit}: {exposure}")
    assert exposure <= most


def test_health_is_looked_at_from_outside_of_supervisord(host):
    assert "active" in host.do("systemctl is-active bot-health.timer").stdout
    assert host.do("systemctl start bot-health").returncode == 0, host.do("journalctl -u bot-health").stdout
    assert "nothing is wrong" in host.do("journalctl -u bot-health --output cat").stdout


def test_host_is_in_utc_and_upgrades_never_restart_trading(host):
    assert host.do("readlink -f /etc/localtime").stdout.strip().endswith("UTC")
    assert host.do("date +%Z").stdout.strip() == "UTC"
    assert "Automatic-Reboot \"false\"" in host.do("apt-config dump | grep Automatic-Reboot").stdout
    assert "bot" in host.do("cat /etc/needrestart/conf.d/bot.conf").stdout
    wants = host.do("systemctl show bot -p Requires -p BindsTo -p PartOf -p Requisite").stdout
    assert not re.search("nftables|chrony|ssh|network-online", wants), "an upgrade of them would restart it"
    for unit in ("chrony", "nftables", "unattended-upgrades", "bot", "bot-health.timer"):
        assert host.do(f"systemctl is-enabled {unit}").stdout.strip() == "enabled", unit


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
    assert host.do("echo >> /var/lib/bot/journal/paper.db", user="bot-feed").returncode != 0


def test_strategy_in_its_sandbox_does_not_speak_to_systemd_in_the_name_of_the_service(host):
    """systemd takes from each process of bot.service that all is well, that it stops, who is the main one."""
    code = """
import os, socket
for path in ("/run/systemd/notify", "/run/bot/notify", "/proc/1/root/run/systemd/notify"):
    try:
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM).sendto(b"X=1", path)
        print("DONE")
    except OSError as error:
        print(type(error).__name__)
"""
    pid = host.pids()["strategy-sr"]
    inside = f"nsenter --mount --target {pid} setpriv --reuid {{0}} --regid $(id -g {{0}}) --init-groups " \
             f"{PYTHON} -"
    done = host.do(inside.format("bot-s-sr"), text=code)
    assert done.stdout.split() == ["PermissionError"] * 3, done.stdout + done.stderr
    assert "DONE" in host.do(inside.format("bot-feed"), text=code).stdout, "health may"
    asked = "systemctl show -p WatchdogTimestampMonotonic --value bot"
    heard = host.do(asked).stdout
    wait_until(lambda: host.do(asked).stdout != heard, 10)


@long
@pytest.mark.parametrize("name", ["executor", "strategy-sr", "health"])
def test_process_of_another_user_that_hangs_is_killed_and_started_again(host, name):
    pid = host.pids()[name]
    assert host.do(f"kill -STOP {pid}").returncode == 0
    wait_until(lambda: host.pids()[name] not in (None, pid), 40)
    status = host.wait_running()
    assert not status["locked_symbols"] and not status["halted"]


@pytest.mark.parametrize("number", ["KILL", pytest.param("STOP", marks=long)])
def test_supervisord_that_is_killed_or_hangs_comes_back_trading(host, number):
    before = host.do("systemctl show -p MainPID --value bot").stdout.strip()
    began = time.monotonic()
    assert host.do(f"kill -{number} {before}").returncode == 0
    # One that hangs: WatchdogSec, then TimeoutAbortSec, for it does not hear that it shall end.
    wait_until(lambda: host.do("systemctl show -p MainPID --value bot").stdout.strip() not in ("0", before),
               30 if number == "KILL" else 120)
    host.wait_running()
    _assert_trades_again(
        host, f"kill -{number} of supervisord: RUNNING after {time.monotonic() - began:.0f} s")


@pytest.mark.parametrize(("how", "command"), [
    ("reboot", "systemctl reboot"),
    # At once, with nothing told to end: no service is stopped and nothing unmounted.
    pytest.param("power cut", "systemctl reboot --force --force", marks=long)])
def test_host_that_goes_down_comes_back_trading(host, how, command):
    before = host.do("systemctl show -p InvocationID --value bot").stdout.strip()
    began = time.monotonic()
    assert host.do(f"systemd-run --on-active=1s {command}").returncode == 0  # a connection would hang
    wait_until(lambda: host.do("systemctl show -p InvocationID --value bot").stdout.strip()
               not in ("", before), 120)
    host.wait_running(120)
    _assert_trades_again(host, f"{how}: RUNNING after {time.monotonic() - began:.0f} s")


@long
@pytest.mark.parametrize(("change", "result"), [
    ("s/^/ /", "switched"), ("s/^ *mode = .*/mode = 1/", "rolled back")])
def test_switch_that_a_power_cut_ends_is_brought_to_its_end_by_the_boot(host, change, result):
    config = host.do("cat /etc/bot/bot.toml").stdout
    wait_until(lambda: any(float(p["qty"]) for p in host.status()["positions"]), 120)
    assert host.do("install -d /etc/bot/next; basename $(readlink /opt/bot/current) > /etc/bot/next/release; "
                   f"sed '{change}' /etc/bot/bot.toml > /etc/bot/next/bot.toml").returncode == 0
    assert host.do("systemd-run bot-switch $(readlink /opt/bot/current) --settle-s 300").returncode == 0
    wait_until(lambda: host.do("test -e /etc/bot/before/bot.toml && systemctl show -p ActiveState --value bot"
                               ).stdout.strip() in ("active", "activating"), 60)
    assert "switch.pending" in host.do("botctl doctor").stdout or result == "rolled back"
    asked = "systemctl show -p UserspaceTimestampMonotonic"
    booted = host.do(asked).stdout
    host.do("systemd-run --on-active=1s systemctl reboot --force --force")
    wait_until(lambda: host.do(asked).stdout not in ("", booted), 60)
    began = time.monotonic()
    wait_until(lambda: host.do("test ! -e /opt/bot/switch.pending").returncode == 0, 240)
    ended = json.loads(host.do("tail -n 1 /opt/bot/switches.jsonl").stdout)
    assert ended["is_cut"] and ended["result"] == result, ended
    assert result == "rolled back" or ended["gap_s"] < 100, "the executor's number is often that of before"
    assert (host.do("cat /etc/bot/bot.toml").stdout == config) == (result == "rolled back")
    _assert_trades_again(host, f"power cut in a switch: {result} {time.monotonic() - began:.0f} s after it")


@long
def test_host_without_the_network_to_the_exchange_trades_again_by_itself(host):
    """Every packet to and from the exchange is lost, in silence, as with a cable cut behind a switch."""
    table = "table inet cut { chain out { type filter hook output priority -10; tcp dport 5560 drop; " \
            "tcp sport 5560 drop; }; }"
    assert host.do(f"nft '{table}'").returncode == 0
    try:
        wait_until(lambda: host.status()["state"] == "REDUCING", 30)
        time.sleep(CUT_S)  # the private stream is given up meanwhile: RECONCILING
        assert host.status()["state"] in ("REDUCING", "RECONCILING")
    finally:
        began = time.monotonic()
        assert host.do("nft delete table inet cut").returncode == 0
    host.wait_running(120)
    _assert_trades_again(host, f"cut for {CUT_S} s: RUNNING {time.monotonic() - began:.0f} s after it")


@long
def test_host_with_a_full_disk_trades_again_once_there_is_room(host):
    free = "df --output=avail -B1 /var/lib/bot | tail -n 1"
    host.do(f"fallocate -l $({free}) /var/lib/bot/full")  # takes what it gets, and then complains
    try:
        assert int(host.do(free).stdout) < 16_000_000
        wait_until(lambda: host.status()["state"] in ("REDUCING", "DOWN"), 30)
        time.sleep(10)
        assert host.status()["state"] in ("REDUCING", "DOWN", "RECONCILING")
    finally:
        began = time.monotonic()
        assert host.do("rm /var/lib/bot/full").returncode == 0
    host.wait_running(120)
    _assert_trades_again(host, f"disk full: RUNNING {time.monotonic() - began:.0f} s after there was room")
    assert "whole" in host.do("botctl journal verify").stdout


@long
@pytest.mark.skipif(not MEMORY_MB, reason="TRADEHOST_MEMORY_MB, the memory of the host, is not given")
def test_host_with_a_memory_hog_trades_again_by_itself(host):
    """Something of somebody else's takes and touches all the memory, until the kernel ends it."""
    hog = f"held = [bytearray(b'x') * 10_000_000 for _ in range({MEMORY_MB // 8})]"
    done = host.do(f"systemd-run --wait --collect -p OOMScoreAdjust=500 /usr/bin/python3 -c "
                   f"{shlex.quote(hog)}")
    assert done.returncode != 0, "it got all that it asked for"
    began = time.monotonic()
    host.wait_running(120)
    _assert_trades_again(host, f"memory hog: RUNNING {time.monotonic() - began:.0f} s after it")


def _assert_trades_again(host: Host, told: str) -> None:
    status = host.wait_running()
    print(told)
    assert not status["locked_symbols"] and not status["halted"] and not status["unknown_orders"]
    assert host.do("pgrep -fc '^/opt/bot/.*-m bot.executor'").stdout.strip() == "1"
    done = host.do("botctl reconcile")
    assert done.returncode == 0 and "agree" in done.stdout, done.stdout + done.stderr


@long
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
