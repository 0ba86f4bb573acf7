"""What doctor sees of files, ports and processes; the exchange is a drill's."""

import asyncio
import os
import socket

import msgspec
import pytest

from bot.clock import Clock
from bot.config_file import load
from bot.doctor import examine
from tests.harness import free_port, write_config


def checks_of(path, **how):
    found = asyncio.run(examine(load(path), Clock(), path, **how))
    assert len({check.name for check in found}) == len(found), "one question, one line"
    return {check.name: check for check in found}


def beat_of(path, name, pid):
    config = load(path)
    folder = config.path("run")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_bytes(msgspec.json.encode({
        "name": name, "pid": pid, "ended": False, "run": 1, "mono_ns": 1, "version": "", "crash_starts": [],
        "descriptors": 1, "descriptors_max": 9,
        "config": config.fingerprint(), "shared_config": config.fingerprint(is_shared=True)}))


def test_doctor_without_an_exchange_says_what_it_could_not_ask(tmp_path):
    checks = checks_of(write_config(tmp_path))
    assert checks["exchange"].verdict == "bad"
    for name in ("clock", "symbols", "account", "positions", "key rights"):
        assert checks[name].verdict == "unknown" and "exchange" in checks[name].text


def test_doctor_names_a_switch_of_releases_that_did_not_come_to_its_end(tmp_path, monkeypatch):
    venv = tmp_path / "releases" / "one" / ".venv"
    venv.mkdir(parents=True)
    (tmp_path / "current").symlink_to(venv.parent)
    monkeypatch.setattr("sys.prefix", str(tmp_path / "current" / ".venv"))
    assert "switch" not in checks_of(write_config(tmp_path))
    (tmp_path / "switch.pending").touch()
    found = checks_of(write_config(tmp_path))["switch"]
    assert found.verdict == "bad" and str(tmp_path / "switch.pending") in found.text
    assert "switch" not in checks_of(write_config(tmp_path), is_candidate=True), "the next one ends it first"


@pytest.mark.parametrize(("name", "mode"), [
    ("var", 0o777), ("var/run", 0o757), ("var/halt", 0o757), ("var/guard", 0o757), ("var/commands", 0o757),
    ("var/supervisor.d", 0o757), ("var/run/supervisor.sock", 0o776), ("var/journal.db", 0o666),
    ("bot.toml", 0o666), ("ticks", 0o751)])
def test_doctor_names_what_others_may_write_or_reach(name, mode, tmp_path):
    path = write_config(tmp_path, bus={"ticks": {"endpoint": f"ipc://{tmp_path}/ticks/socket"}})
    path.chmod(0o644)
    for folder in ("var/run", "var/halt", "var/guard", "var/commands", "var/supervisor.d", "ticks"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True, mode=0o750)
    for file in ("var/run/supervisor.sock", "var/journal.db"):
        (tmp_path / file).touch(0o600)
    modes = {k: c.verdict for k, c in checks_of(path).items() if k.startswith("mode of ")}
    assert len(modes) == 10 and set(modes.values()) == {"good"}
    (tmp_path / name).chmod(mode)
    found = checks_of(path)
    assert [k for k in modes if found[k].verdict == "bad"] == [f"mode of {tmp_path / name}"]
    assert "chmod o" in found[f"mode of {tmp_path / name}"].text


def test_doctor_asks_sockets_of_the_bus_the_page_and_the_paper_exchange(tmp_path):
    (tmp_path / "ticks").mkdir(mode=0o750)
    page = free_port()
    path = write_config(tmp_path, health={"page_port": page}, bus={
        "ticks": {"endpoint": f"ipc://{tmp_path}/ticks/socket"},
        "signals": {"endpoint": f"ipc://{tmp_path}/{{strategy}}/socket"}})
    names = ("bus.ticks", "bus.signals of levels", "bus.reports", "status page", "paper.bind")
    assert {n: checks_of(path)[n].verdict for n in names} == dict.fromkeys(names, "good")
    for process in ("gateway", "health", "paper"):
        beat_of(path, process, os.getpid())
    found = checks_of(path)
    assert {found[n].verdict for n in ("bus.ticks", "status page", "paper.bind")} == {"bad"}, found
    with socket.socket(socket.AF_UNIX) as ticks, socket.create_server(("127.0.0.1", page)):
        ticks.bind(str(tmp_path / "ticks" / "socket"))
        ticks.listen()
        found = checks_of(path)
    assert found["bus.ticks"].verdict == found["status page"].verdict == "good"


def test_doctor_with_another_process_on_a_port_of_ours_is_not_fooled(tmp_path):
    path = write_config(tmp_path, metrics={"base_port": 6_000 + os.getpid() % 3_000})
    port = load(path).metrics_port("guard")
    with socket.create_server(("127.0.0.1", port)):
        beat_of(path, "guard", os.getppid())
        other = checks_of(path)["metrics of guard"]
        assert other.verdict == "bad" and "ss -ltnp" in other.text and str(os.getppid()) in other.text
        beat_of(path, "guard", os.getpid())
        assert checks_of(path)["metrics of guard"].verdict == "good"
