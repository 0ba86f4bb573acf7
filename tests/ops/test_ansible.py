"""The playbooks' form: argument specs are the defaults, lint is clean, units and programs fit together."""

import hashlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import get_type_hints

import pytest

from bot.config import Config
from bot.programs import SECTION

ROOT = Path(__file__).resolve().parents[2]
BIN = ROOT / "build" / "ansible" / "bin"
ROLES = sorted(path.name for path in (ROOT / "ansible" / "roles").iterdir())
PLAYBOOKS = sorted(path.name for path in (ROOT / "ansible").glob("*.yml") if path.name != "preflight.yml")

needs_ansible = pytest.mark.skipif(not (BIN / "ansible-lint").exists(),
                                   reason="ansible is missing: make build/ansible installs it")


def yaml(path: Path):
    """Read YAML with the library that Ansible brings."""
    code = "import json, sys, yaml; json.dump(yaml.safe_load(open(sys.argv[1])), sys.stdout)"
    done = subprocess.run([BIN / "python", "-c", code, path], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@needs_ansible
@pytest.mark.parametrize("role", ROLES)
def test_role_with_its_argument_specs_has_them_as_defaults(role):
    folder = ROOT / "ansible" / "roles" / role
    options = yaml(folder / "meta" / "argument_specs.yml")["argument_specs"]["main"]["options"]
    defaults = yaml(folder / "defaults" / "main.yml")
    assert {name: o["default"] for name, o in options.items() if "default" in o} == defaults
    secrets = {name for name in options if re.search("key|secret", name)}
    assert all(options[name].get("no_log") and "default" not in options[name] for name in secrets)
    assert all(option["description"] for option in options.values())


@needs_ansible
def test_switch_that_is_given_as_text_is_read_as_one():
    """`-e monitoring_enabled=false`, and each word of an INI inventory, is a text: and a text is true."""
    folder = ROOT / "ansible" / "roles"
    switches = {name for role in ROLES for name, option in yaml(
        folder / role / "meta" / "argument_specs.yml")["argument_specs"]["main"]["options"].items()
        if option["type"] == "bool"}
    assert {"monitoring_enabled", "host_ssh_password", "bot_start"} <= switches
    for path in (*folder.rglob("tasks/*.yml"), *folder.rglob("templates/*"), *folder.rglob("defaults/*.yml")):
        for use in re.findall(rf"(?<![\w'])(?:{'|'.join(switches)})\b(?!:).*", path.read_text()):
            assert re.match(r"\w+( \| default\(\w+\))? \| bool\b", use), f"{path.name}: {use}"


@needs_ansible
@pytest.mark.drill  # half a minute of a processor: .ci/run asks for it beside make test
def test_playbooks_with_the_production_profile_are_lint_free():
    done = subprocess.run([BIN / "ansible-lint", "--offline", "--nocolor", "--profile", "production", "."],
                          cwd=ROOT / "ansible", capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"})
    assert done.returncode == 0, done.stdout + done.stderr


@needs_ansible
@pytest.mark.parametrize("play", PLAYBOOKS)
def test_playbook_with_the_example_inventory_parses(play):
    done = subprocess.run([BIN / "ansible-playbook", "-i", "inventory.example.ini", "--syntax-check", play],
                          cwd=ROOT / "ansible", capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_ansible
def test_vault_beside_the_variables_hides_none_of_them(tmp_path):
    """A file all.yml is passed over, in silence, once there is a folder all/ for the vault."""
    shutil.copytree(ROOT / "ansible" / "group_vars", tmp_path / "group_vars")
    (tmp_path / "group_vars" / "all").mkdir(exist_ok=True)
    (tmp_path / "group_vars" / "all" / "vault.yml").write_text("bot_api_key: k\n")
    done = subprocess.run([BIN / "ansible-inventory", "-i", "host,", "--playbook-dir", tmp_path, "--list"],
                          capture_output=True, text=True, check=True)
    known = json.loads(done.stdout)["_meta"]["hostvars"]["host"]
    assert {"bot_api_key", "bot_mode", "bot_limits", "bot_strategies"} <= set(known)


def _restore(tmp_path, *, journal: str = "", is_cut: bool = False, **given) -> str:
    """Play restore.yml onto a host that answers once, with its journals; return what it said: a no."""
    kept = tmp_path / "lost"
    kept.mkdir()
    (kept / "journal-1.age").write_text("sealed")
    (tmp_path / "backup.key").write_text("private")
    if digest := given.pop("digest", ""):
        (kept / "api.key.sha256").write_text(hashlib.sha256(digest.encode()).hexdigest() + "\n")
    ssh = tmp_path / "ssh"
    asked = f'"{tmp_path}/$(echo "$*" | grep -o "127.0.0.[12]" | head -n 1)"'
    ssh.write_text(f"#!/bin/sh\n[ -e {asked} ] && exit 255\ntouch {asked}; echo '{journal}'\n")
    ssh.chmod(0o700)
    nobody, once = "ansible_port=1 ansible_ssh_retries=0", f"ansible_ssh_executable={ssh}"
    (tmp_path / "hosts.ini").write_text(f"lost ansible_host=127.0.0.1 {nobody} {once if is_cut else ''}\n"
                                        f"found ansible_host=127.0.0.2 {nobody} {once}\n")
    done = subprocess.run(
        [BIN / "ansible-playbook", "-i", tmp_path / "hosts.ini", "restore.yml", "-e", json.dumps({
            "restore_old": "lost", "restore_on": "found", "backup_folder": str(tmp_path), "bot_mode": "live",
            **given})], cwd=ROOT / "ansible", capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    return " ".join(done.stdout.split())


MADE = "PLAY [Preflight, before anything is touched]"  # the new host is made then


@needs_ansible
@pytest.mark.parametrize(("given", "refusal"), [
    ({"restore_old_is_gone": "false", "bot_api_key": "new", "digest": "old"},
     "cannot be reached, and may trade"),
    ({"restore_old_is_gone": "true", "bot_api_key": "old", "digest": "old"},
     "is the one that lost traded with"),
    ({"restore_old_is_gone": "true", "bot_api_key": "new", "digest": "old"}, MADE),
    ({"restore_old_is_gone": "true", "bot_api_key": "new"}, "which key lost traded with is not known here"),
    ({"restore_old_is_gone": "true", "bot_api_key": "new", "restore_key_is_another": "true"}, MADE)])
def test_restore_of_a_host_that_cannot_be_reached_wants_another_key(tmp_path, given, refusal):
    told = _restore(tmp_path, **given)
    assert refusal in told and (MADE in told) == (refusal == MADE), told


@needs_ansible
def test_restore_onto_a_host_with_a_journal_is_refused_before_any_is_fenced(tmp_path):
    told = _restore(tmp_path, journal="/var/lib/bot/journal/live.db")
    assert "found has a journal (/var/lib/bot/journal/live.db)" in told and "PLAY [Fence]" not in told, told


@needs_ansible
def test_restore_where_the_line_to_the_old_host_dies_while_it_is_fenced_ends(tmp_path):
    told = _restore(tmp_path, is_cut=True, restore_old_is_gone="true", bot_api_key="new", digest="old")
    assert "PLAY [Fence]" in told and "TASK [Halt it, if it still can be]" in told and MADE not in told, told


@needs_ansible
@pytest.mark.parametrize(("given", "is_good"), [
    ({"bot_mode": "live"}, False), ({"bot_mode": "testnet"}, True), ({"bot_tell_nobody": "true"}, True),
    ({"monitoring_direct_url": "x"}, True), ({"monitoring_webhook_url": "x"}, True),
    ({"monitoring_webhook_url": "x", "monitoring_enabled": "false"}, False)])
def test_live_mode_with_nobody_who_is_told_is_refused(tmp_path, given, is_good):
    look = {"include_role": {"name": "bot", "tasks_from": "preflight", "rolespec_validate": False}}
    (tmp_path / "play.yml").write_text(json.dumps([{
        "hosts": "all", "gather_facts": False, "connection": "local", "tasks": [look]}]))
    url = {"rest_url": "https://x", "ws_url": "wss://x"}
    done = subprocess.run(
        [BIN / "ansible-playbook", "-i", "host,", tmp_path / "play.yml", "-e", json.dumps({
            "bot_mode": "live", "bot_limits": {"x": 1}, "bot_strategies": {"sr": {}}, "bot_exchange": url,
            "bot_api_key": "k", "bot_api_secret": "s", "release_source": str(tmp_path),
            "ansible_python_interpreter": str(BIN / "python"), **given})],
        cwd=ROOT / "ansible", capture_output=True, text=True, timeout=60,
        env={**os.environ, "ANSIBLE_ROLES_PATH": str(ROOT / "ansible" / "roles")})
    assert (done.returncode == 0) == is_good, done.stdout + done.stderr
    assert is_good or "alerts reach nobody" in done.stdout + done.stderr


@needs_ansible
def test_fence_is_noted_behind_proof_alone_and_only_its_first_contact_may_fail():
    (play,) = yaml(ROOT / "ansible" / "fence.yml")
    assert "ignore_unreachable" not in play
    assert [("raw" in str(task), task.get("ignore_unreachable")) for task in play["tasks"]
            if "ignore_unreachable" in task] == [(True, True)]
    *_, proof, note = play["tasks"]
    said = str(proof["ansible.builtin.assert"]["that"])
    assert "fence_is_done" in str(note) and all(
        task["register"] in said for task in play["tasks"] if task["name"].startswith("See that"))


@needs_ansible
@pytest.mark.parametrize("line", [
    "python -P -m bot.botctl flatten --all", "/x/.venv/bin/python /x/.venv/bin/botctl flatten --config c",
    "python -m bot.executor --config c", "python -m bot.guard", "python3 /usr/local/sbin/bot-switch /opt/x"])
def test_fence_sees_each_process_that_could_send(line):
    (play,) = yaml(ROOT / "ansible" / "fence.yml")
    look = next(str(task["ansible.builtin.command"]) for task in play["tasks"] if "pgrep" in str(task))
    pattern = look.split('"')[1]
    assert re.search(pattern, line) and not re.search(pattern, look)


def test_rules_and_words_of_alerts_are_those_of_the_release_that_runs():
    tasks = (ROOT / "ansible" / "roles" / "monitoring" / "tasks" / "watch.yml").read_text()
    linked = re.search(r"src: /opt/bot/current/ops/\{\{ item \}\}\n(?:.*\n)*?  loop:\n((?:    - .*\n)+)",
                       tasks)[1]
    names = re.findall(r"- (\S+)", linked)
    assert {"prometheus/alerts.yml", "prometheus/recording.yml", "alertmanager/tradehost.tmpl"} == set(names)
    assert all((ROOT / "ops" / name).exists() for name in names)


def test_units_with_their_programs_name_what_the_release_has():
    unit = (ROOT / "systemd" / "bot.service").read_text()
    conf = (ROOT / "ops" / "supervisord.conf").read_text()
    for name in set(re.findall(r"%\(ENV_(BOT_\w+)\)s", conf)):
        assert f"{name}=" in unit, f"supervisord.conf wants {name}"
    assert "ops/supervisord.conf" in unit and "bot.run" in unit and "--prepare" in unit
    # One after the other, each strategy and paper a group of its own; it looks for their ends once a second.
    most = get_type_hints(Config, include_extras=True)["strategy"].__metadata__[0].max_length
    made = int(re.search(r"^stopwaitsecs=(\d+)", SECTION, re.M)[1])
    waits = [int(s) for s in re.findall(r"^stopwaitsecs=(\d+)", conf, re.M)] + [made] * (most + 1)
    worst_s, stop_s = sum(waits) + len(waits), int(re.search(r"^TimeoutStopSec=(\d+)", unit, re.M)[1])
    assert stop_s > worst_s, "supervisord would be killed while its programs still end in their order"
    for text in (conf, unit):
        assert f"{worst_s} s at worst, with {most} strategies" in re.sub(r"\n[#;] ", " ", text)
