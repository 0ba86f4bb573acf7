"""What the kernel and supervisord say about our processes. Edge to psutil and to supervisord's socket."""

import errno
import http.client
import os
import signal
import socket
import xmlrpc.client
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from xml.parsers.expat import ExpatError

import msgspec
import psutil

PORT_WAIT_S = 0.5  # a loopback port answers at once or never
ANSWER_S = 1.0  # a healthy supervisord answers within milliseconds; one that hangs is no news


class ProgramInfo(msgspec.Struct, frozen=True):
    """A program as supervisord sees it. state: its words (RUNNING, BACKOFF, FATAL, ...); pid 0: none."""

    name: str
    state: str
    pid: int
    description: str
    start: int = 0  # of the last spawn, seconds since 1970


class Vitals(msgspec.Struct, frozen=True):
    """What a living process uses, as far as the kernel tells it to other users too."""

    rss_bytes: int
    cpu_s: float
    threads: int


class Supervisor:
    """supervisord, asked over its unix socket."""

    def __init__(self, socket_path: Path) -> None:
        self._proxy = xmlrpc.client.ServerProxy("http://localhost/RPC2",
                                                transport=_UnixTransport(socket_path))

    def programs(self) -> list[ProgramInfo]:
        """Return all programs; none when supervisord does not answer."""
        return [ProgramInfo(p["name"], p["statename"], p["pid"], p["spawnerr"] or p["description"],
                            p["start"]) for p in self._ask("getAllProcessInfo") or ()]

    def stop(self, name: str) -> bool:
        """Have a program end, by force after its stopwaitsecs, and stay ended; False when that failed."""
        return bool(self._ask("stopProcess", name, False))

    def kill(self, name: str, pid: int) -> bool:
        """SIGKILL a program; another user's through supervisord. False when it is gone, or another by now."""
        try:
            return kill_pid(pid, name)
        except psutil.AccessDenied:
            # supervisord kills by name: what it has started anew since somebody looked is not meant.
            if not any(program.name == name and program.pid == pid for program in self.programs()):
                return False
            return bool(self._ask("signalProcess", name, "KILL"))

    def _ask(self, method: str, *words: Any) -> Any:
        try:
            return getattr(self._proxy.supervisor, method)(*words)
        except (OSError, http.client.HTTPException, xmlrpc.client.Error, ExpatError):
            return None


class _UnixTransport(xmlrpc.client.Transport):
    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = str(path)

    def make_connection(self, host) -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection("localhost", timeout=ANSWER_S)
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.sock.settimeout(ANSWER_S)
        connection.sock.connect(self._path)
        return connection


def vitals(pid: int) -> Vitals | None:
    """Return what one of our processes uses; None when there is none with this pid."""
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            times = process.cpu_times()
            if process.status() == psutil.STATUS_ZOMBIE:
                return None
            return Vitals(process.memory_info().rss, times.user + times.system, process.num_threads())
    except psutil.Error:
        return None


def host(folder: Path) -> dict[str, int]:
    """Return what the host has left, in bytes; the disk is the one that holds the folder."""
    return {"disk_free_bytes": psutil.disk_usage(str(folder)).free,
            "memory_available_bytes": psutil.virtual_memory().available}


def answers(endpoint: str) -> bool | None:
    """Return whether somebody listens at tcp://HOST:PORT or ipc:///PATH; None when we may not ask."""
    url = urlsplit(endpoint)
    with socket.socket(socket.AF_UNIX if url.scheme == "ipc" else socket.AF_INET) as asking:
        asking.settimeout(PORT_WAIT_S)
        error = asking.connect_ex(url.path if url.scheme == "ipc" else (url.hostname, url.port))
    return None if error in (errno.EACCES, errno.EPERM) else error == 0


def listens(pid: int, endpoint: str) -> bool | None:
    """Return whether it is this process that does; None when the kernel does not tell us."""
    url = urlsplit(endpoint)
    try:
        sockets = psutil.Process(pid).net_connections("all")
    except psutil.AccessDenied:
        return None
    except psutil.NoSuchProcess:
        return False
    return any(s.laddr and (s.laddr == url.path if isinstance(s.laddr, str) else
                            s.laddr.port == url.port and s.status == psutil.CONN_LISTEN) for s in sockets)


def feed_watchdog() -> None:
    """Tell systemd that somebody watches, where it asked to be told (sd_notify(3), WatchdogSec=)."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if address:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as notify:
            try:
                notify.sendto(b"WATCHDOG=1", address.replace("@", "\0", 1))
            except OSError:
                pass  # it will be missed, which is what it is for


def kill_pid(pid: int, name: str) -> bool:
    """SIGKILL one of our programs; False when it is gone, or its number is another's by now."""
    try:
        process = psutil.Process(pid)
        if not _is_program(process, name):
            return False
        process.send_signal(signal.SIGKILL)
    except psutil.NoSuchProcess:
        return False
    return True


def is_program(pid: int, name: str) -> bool:
    """Return whether this process is the program of ours with that name, as far as we may see."""
    try:
        return _is_program(psutil.Process(pid), name)
    except psutil.Error:
        return False


def _is_program(process: psutil.Process, name: str) -> bool:
    words, (module, _, strategy) = process.cmdline(), name.partition("-")
    return f"bot.{module}" in words and (not strategy or strategy in words)


def descendants() -> list[psutil.Process]:
    """Return every living process below this one."""
    return [p for p in psutil.Process().children(recursive=True) if _is_alive(p)]


def kill(processes: list[psutil.Process], timeout_s: float) -> list[psutil.Process]:
    """Kill the processes by force; return those that are still there after timeout_s."""
    for process in processes:
        try:
            process.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess:
            continue
    return psutil.wait_procs(processes, timeout_s)[1]


def _is_alive(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
