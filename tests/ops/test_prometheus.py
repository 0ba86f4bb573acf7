"""The files for Prometheus: rules that parse, each alert with its reason."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bot.metrics import TABLE

ROOT = Path(__file__).resolve().parents[2]
RULES = ROOT / "ops" / "prometheus"
UNIT_TESTS = ("money_test.yml", "alerts_test.yml")

DASHBOARDS = sorted((ROOT / "ops" / "grafana" / "dashboards").glob("*.json"))
ALERTMANAGER = ROOT / "ops" / "alertmanager" / "alertmanager.yml"
BIN = ROOT / "build" / "ansible" / "bin"

needs_amtool = pytest.mark.skipif(shutil.which("amtool") is None,
                                  reason="amtool is missing: Debian's prometheus-alertmanager has it")
needs_ansible = pytest.mark.skipif(not (BIN / "ansible-playbook").exists(),
                                   reason="ansible is missing: make build/ansible installs it")
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None,
                                    reason="promtool is missing: Debian's package prometheus has it")


def alerts() -> dict[str, str]:
    """Return each alert's text with the comment above it, by name."""
    text = (RULES / "alerts.yml").read_text(encoding="utf-8")
    blocks = re.findall(r"((?:^ +#.*\n)+)( +- alert: (\w+)\n(?: {8}.*\n)+)", text, re.MULTILINE)
    return {name: comment + block for comment, block, name in blocks}


def test_alerts_with_their_thresholds_have_a_reason_and_say_what_to_do():
    text = (RULES / "alerts.yml").read_text(encoding="utf-8")
    assert list(alerts()) == re.findall(r"- alert: (\w+)", text), "an alert without a comment above it"
    for name, block in alerts().items():
        assert re.search(r"# Threshold: .{20,}", block), f"{name}: no reason for its threshold"
        assert re.search(r"severity: (critical|warning|none)\n", block), name
        for key in ("summary", "summary_zh_TW", "impact", "command"):
            assert re.search(rf"^ +{key}: \S.+$", block, re.MULTILINE), f"{name}: no {key}"
        assert re.search(r'summary_zh_TW: ".*[\u4e00-\u9fff]{2}', block), f"{name}: no Chinese"
        assert f"runbook_url: RUNBOOK.md#{name.lower()}\n" in block, name


def told_metrics() -> set[str]:
    """Return every series name that the code can tell, as docs/metrics.md lists them."""
    names = {m.name for m in TABLE}
    return names | {f"{m.name}_{part}" for m in TABLE if m.kind == "histogram" for part in
                    ("bucket", "count", "sum")}


def test_rules_and_dashboards_with_their_metrics_ask_for_what_the_code_tells():
    recorded = set(re.findall(r"record: (\S+)", (RULES / "recording.yml").read_text()))
    documented = re.findall(r"^\| `(bot_\w+)` ", (ROOT / "docs" / "metrics.md").read_text(), re.MULTILINE)
    assert documented == [m.name for m in TABLE]
    for path in (RULES / "alerts.yml", RULES / "recording.yml", *DASHBOARDS):
        text = re.sub(r"^ *#.*|record: .*", "", path.read_text(), flags=re.MULTILINE)
        asked = set(re.findall(r"\bbot_\w+|\bbot:[\w:]+", text))
        assert asked and asked <= told_metrics() | recorded, f"{path}: {asked - told_metrics() - recorded}"


# To look at by hand, or told better by what a rule or a panel asks: none of them says that money is at risk.
UNWATCHED = {"bot_build_info", "bot_log_lines_suppressed_total", "bot_ticks_received_total",
             "bot_signals_total", "bot_signals_acknowledged_total", "bot_signals_denied_total",
             "bot_process_open_fds", "bot_process_memory_growth_bytes_per_second", "bot_process_threads",
             "bot_process_kills_total", "bot_backup_age_seconds", "bot_backup_kept", "bot_backup_size_bytes"}


def test_metrics_but_those_to_look_at_are_asked_for_by_a_rule_or_a_panel():
    texts = "".join(p.read_text() for p in (RULES / "alerts.yml", RULES / "recording.yml", *DASHBOARDS))
    asked = set(re.findall(r"\bbot_\w+", texts))
    assert {m.name for m in TABLE if not {m.name, f"{m.name}_bucket"} & asked} == UNWATCHED


def test_alerts_with_their_unit_tests_have_one_that_fires_and_one_that_is_silent():
    checks = "".join((RULES / name).read_text() for name in UNIT_TESTS)
    for name in alerts():
        expected = re.findall(rf'"{name}",alertstate="firing"}}\)\', exp_samples: (.+)}}$', checks, re.M)
        assert any("value: 1" in samples for samples in expected), f"{name}: nothing shows that it fires"
        assert name == "Watchdog" or "[]" in expected, f"{name}: nothing shows that it can be silent"


@needs_promtool
def test_rules_with_promtool_are_right():
    done = subprocess.run(["promtool", "check", "config", "prometheus.yml"], cwd=RULES, capture_output=True,
                          text=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr


def _check_alertmanager(path: Path) -> str:
    done = subprocess.run(["amtool", "check-config", path], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_amtool
def test_alertmanager_with_its_routes_is_right_and_sends_money_at_once():
    assert "1 templates" in _check_alertmanager(ALERTMANAGER)
    for labels, receiver in ((("severity=critical", "alertname=TradingHalted"), "people"),
                             (("severity=none", "alertname=Watchdog"), "watchdog")):
        done = subprocess.run(["amtool", "config", "routes", "test", f"--config.file={ALERTMANAGER}",
                               f"--verify.receivers={receiver}", *labels], capture_output=True, text=True,
                              timeout=30)
        assert done.returncode == 0, done.stdout + done.stderr
    critical = ALERTMANAGER.read_text().split("severity = critical")[1].split("inhibit_rules")[0]
    assert "group_wait: 0s" in critical
    names = set(re.findall(r"alertname (?:=~ \"|= )([\w|]+)", ALERTMANAGER.read_text()))
    assert {name for pattern in names for name in pattern.split("|")} <= alerts().keys()


@needs_amtool
@needs_ansible
@pytest.mark.parametrize("given", [{}, {
    "monitoring_webhook_url": "https://hooks.example/x", "monitoring_telegram_bot_token": "1:x",
    "monitoring_telegram_chat_id": "-5", "monitoring_watchdog_url": "https://watch.example/x"}])
def test_receivers_that_the_role_writes_are_taken_by_alertmanager(tmp_path, given):
    """Text or number: a vault may hold either."""
    role = ROOT / "ansible" / "roles" / "monitoring"
    task = (role / "tasks" / "watch.yml").read_text().split("- name: Say who is told")[1]
    content = re.search(r"    content: >\n((?:      .*\n)+)", task)[1]
    path, play = tmp_path / "alertmanager.yml", tmp_path / "play.yml"
    play.write_text("- hosts: localhost\n  connection: local\n  gather_facts: false\n"
                    f"  vars_files: [{role}/defaults/main.yml, {role}/vars/main.yml]\n"
                    "  tasks:\n  - ansible.builtin.copy:\n"
                    f"      dest: {path}\n      content: >\n{re.sub('^', '  ', content, flags=re.M)}\n")
    (tmp_path / "tradehost.tmpl").write_bytes((ALERTMANAGER.parent / "tradehost.tmpl").read_bytes())
    done = subprocess.run(
        [BIN / "ansible-playbook", "-i", "localhost,", play, "-e", json.dumps(
            {"release_source": str(ROOT), "ansible_python_interpreter": sys.executable, **given})],
        capture_output=True, text=True, timeout=120, env={**os.environ, "ANSIBLE_NOCOLOR": "1"})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 receivers" in _check_alertmanager(path)
    assert all(str(value) in path.read_text() for value in given.values())


@needs_promtool
def test_alerts_fire_in_time_and_only_then():
    done = subprocess.run(["promtool", "test", "rules", *UNIT_TESTS], cwd=RULES, capture_output=True,
                          text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
@pytest.mark.drill
@pytest.mark.parametrize("name", [name for name in alerts() if name != "Watchdog"])
def test_alert_with_another_threshold_or_span_fails_its_unit_test(name, tmp_path):
    """Nobody loosens an alert unnoticed: each number of it is held by a test."""
    text = (RULES / "alerts.yml").read_text()
    interval = re.findall(r"interval: (\w+)", text[:text.index(f"- alert: {name}\n")])[-1]
    rule = re.search(rf" +- alert: {name}\n(?: {{8}}.*\n)+", text)[0]
    blocks = [block for file in UNIT_TESTS for block in
              re.split(r"(?m)^(?=  - name: )", (RULES / file).read_text())[1:] if f"- name: {name}\n" in
              re.sub(" +#.*", "", block)]
    shutil.copy(RULES / "recording.yml", tmp_path)
    step = "1s" if interval == "1s" else "5s"
    (tmp_path / "test.yml").write_text("rule_files: [rules.yml, recording.yml]\n"
                                       f"evaluation_interval: {step}\ntests:\n{''.join(blocks)}")

    def passes(changed: str) -> bool:
        (tmp_path / "rules.yml").write_text(f"groups:\n  - name: one\n    interval: {interval}\n    rules:\n"
                                            f"{changed}")
        return not subprocess.run(["promtool", "test", "rules", "test.yml"], cwd=tmp_path, timeout=120,
                                  capture_output=True).returncode

    assert passes(rule)
    for number in re.finditer(r"(== |> |< |>= )(\d[\d.e]*(?: \* 3600)?)(?= < 1$| and | or |$)", rule, re.M):
        others = [f"({number[2]}) * 2", f"({number[2]}) / 2"]
        if number[2] in ("0", "1"):
            others = ["3"] if number[1] == "== " else ["1e3", "-1"]
        for other in others:
            changed = rule[:number.start()] + number[1] + other + rule[number.end():]
            assert not passes(changed), f"{number[0]} -> {other}"
    span = re.search(r"for: (\d+)(\w)", rule)
    if span:
        for factor in (0.5, 2):
            seconds = int(span[1]) * {"s": 1, "m": 60}[span[2]] * factor
            assert not passes(rule.replace(span[0], f"for: {seconds:.0f}s")), f"{span[0]} times {factor}"
