"""Processes and supervisord as they are seen from outside."""

import os
import socket
import subprocess
import sys
import threading
from types import SimpleNamespace

import psutil

from bot import probe
from bot.probe import Supervisor, descendants, kill
from tests.harness import wait_until

SLEEP = [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"]
FAMILY = [sys.executable, "-c", "import subprocess, sys, time; "
          "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)']); "
          "print(p.pid, flush=True); time.sleep(60)"]


def test_descendants_with_a_grandchild_are_all_found_and_killed():
    child = subprocess.Popen(FAMILY, stdout=subprocess.PIPE, text=True)
    grandchild = int(child.stdout.readline())
    ours = [p for p in descendants() if p.pid in (child.pid, grandchild)]
    assert {p.pid for p in ours} == {child.pid, grandchild}
    assert kill(ours, 5) == []
    child.wait()
    assert not {p.pid for p in descendants()} & {child.pid, grandchild}
    child.stdout.close()


def test_descendants_with_a_child_that_ended_leave_it_out():
    child = subprocess.Popen(["true"])
    wait_until(lambda: child.pid not in {p.pid for p in descendants()})  # a zombie is no process
    assert os.path.exists(f"/proc/{child.pid}")
    child.wait()


def test_kill_with_a_process_already_gone_is_content():
    child = subprocess.Popen(SLEEP, stdout=subprocess.PIPE)
    child.stdout.readline()
    ours = [p for p in descendants() if p.pid == child.pid]
    child.kill()
    child.wait()
    assert kill(ours, 1) == []
    child.stdout.close()


def test_supervisor_with_no_socket_has_no_programs(tmp_path):
    assert Supervisor(tmp_path / "supervisor.sock").programs() == []


def test_supervisor_with_a_peer_that_hangs_or_babbles_has_no_programs(tmp_path):
    path = tmp_path / "supervisor.sock"
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    server.listen()
    assert Supervisor(path).programs() == [], "it hangs: given up after a second"

    def babble() -> None:
        while True:
            try:
                peer, _ = server.accept()
            except OSError:
                return
            try:
                peer.recv(1_000)
                peer.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: text/xml\r\nContent-Length: 5\r\n\r\n<<<<<")
            except OSError:
                pass  # the one that gave up after a second
            peer.close()

    threading.Thread(target=babble, daemon=True).start()
    assert Supervisor(path).programs() == []
    server.shutdown(socket.SHUT_RDWR)
    server.close()


def program(name, pid):
    return {"name": name, "statename": "RUNNING", "pid": pid, "spawnerr": "", "description": "", "start": 1}


def test_kill_with_another_users_process_asks_supervisord_unless_another_runs_by_now(tmp_path, monkeypatch):
    def deny(pid, _name):
        raise psutil.AccessDenied(pid)

    supervisor, asked = Supervisor(tmp_path / "none.sock"), []
    monkeypatch.setattr(probe, "kill_pid", deny)
    assert not supervisor.kill("executor", 7), "supervisord does not answer either"
    monkeypatch.setattr(supervisor, "_proxy", SimpleNamespace(supervisor=SimpleNamespace(
        getAllProcessInfo=lambda: [program("guard", 8), program("executor", 7)],
        signalProcess=lambda *words: asked.append(words) or True)))
    assert not supervisor.kill("executor", 6), "it was started again since somebody looked"
    assert not supervisor.kill("executor", 8) and not supervisor.kill("gateway", 7) and asked == []
    assert supervisor.kill("executor", 7) and asked == [("executor", "KILL")]


SUPERVISORD = """
[unix_http_server]
file={folder}/supervisor.sock
[supervisord]
nodaemon=true
pidfile={folder}/supervisord.pid
logfile=/dev/null
logfile_maxbytes=0
[rpcinterface:supervisor]
supervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface
[program:executor]
command={python} -c "import time; time.sleep(60)"
startsecs=0
autorestart=true
stdout_logfile=NONE
stderr_logfile=NONE
"""


def test_supervisor_that_stops_a_program_does_not_start_it_again(tmp_path):
    (tmp_path / "s.conf").write_text(SUPERVISORD.format(folder=tmp_path, python=sys.executable))
    process = subprocess.Popen([sys.executable, "-m", "supervisor.supervisord", "-c", tmp_path / "s.conf"],
                               stdout=subprocess.DEVNULL)
    supervisor = Supervisor(tmp_path / "supervisor.sock")
    try:
        wait_until(lambda: [p.state for p in supervisor.programs()] == ["RUNNING"])
        assert not supervisor.stop("gateway"), "it knows none"
        assert supervisor.stop("executor")
        wait_until(lambda: [(p.state, p.pid) for p in supervisor.programs()] == [("STOPPED", 0)])
        assert not supervisor.stop("executor"), "it does not run"
    finally:
        process.terminate()
        process.wait(10)
    assert not supervisor.stop("executor")


def test_kill_with_a_number_that_is_another_programs_by_now_kills_nobody(tmp_path):
    supervisor = Supervisor(tmp_path / "none.sock")
    child = subprocess.Popen([*SLEEP, "bot.strategy", "--name", "levels"], stdout=subprocess.PIPE)
    child.stdout.readline()
    for name in ("executor", "strategy-other", "strateg"):
        assert not supervisor.kill(name, child.pid) and child.poll() is None
    assert supervisor.kill("strategy-levels", child.pid) and child.wait(5) < 0
    assert not supervisor.kill("strategy-levels", child.pid), "it is gone"
    child.stdout.close()
