"""The runbook: whatever it says to type is there and parses, its links lead somewhere, its drills exist."""

import contextlib
import io
import re
import shlex

import pytest
from supervisor.supervisorctl import DefaultControllerPlugin

from bot import botctl, web
from bot.config_file import parse
from bot.programs import names
from tests.drill.test_runbook import DRILLS, PLANNED
from tests.harness import ROOT, SLACK
from tests.runbook import RUNBOOK, anchor, commands, inline_commands, sections

TEXT = RUNBOOK.read_text(encoding="utf-8")
SECTIONS = sections()
COMMANDS = sorted({*commands(TEXT), *inline_commands(TEXT)})
# In its commands a word in capitals stands for what the reader knows.
PLACEHOLDERS = {"SYMBOL": "BTC/USDT:USDT", "NAME": "sr", "PROGRAM": "executor", "VERB": "status", "N": "1",
                "FILE": "ops/bot.example.toml", "ID": "sr/1/1", "TEXT": "words", "SPAN": "24h"}
# Of Debian, or of the shell: what a host has, whatever we install on it.
OF_THE_HOST = {"alias", "apt-get", "cd", "cp", "date", "df", "du", "export", "free", "git", "grep",
               "journalctl", "ls", "nft", "ps", "scp", "ss", "ssh", "systemctl", "tail", "timedatectl",
               "chronyc", "sqlite3",
               "ansible-vault", "bot-switch"}  # of ansible/: installed with it, and by it
# Not of ours, and named all the same: systemd's own and Debian's.
FOREIGN_UNITS = {"chrony", "ssh", "prometheus", "prometheus-alertmanager", "nftables", "systemd-timesyncd"}


def pieces(line: str) -> list[list[str]]:
    """Return the single commands of a shell line as words, without sudo."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;<>")
    lexer.whitespace_split = True
    found: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set("|&;<>"):
            found.append([])
        else:
            found[-1].append(PLACEHOLDERS.get(word, word.replace("-NAME", "-sr").replace("NAME", "sr")))
    return [words[3 if words[1] == "-u" else 1:] if words[0] == "sudo" else words for words in found if words]


def check_botctl(words: list[str]) -> None:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            botctl._parser().parse_args(words)
    except SystemExit as ended:
        assert ended.code == 0, said.getvalue().splitlines()[-1]


def check_supervisorctl(words: list[str]) -> None:
    if words[0] == "-s":
        words = words[2:]
    assert hasattr(DefaultControllerPlugin, f"do_{words[0]}"), f"supervisorctl has no verb {words[0]}"
    programs = {*names(parse(ROOT / "ops" / "bot.example.toml")), "all"}
    named = [word for word in words[1:] if not word.startswith("-")]
    if words[0] == "signal":
        named = named[1:]
    if words[0] == "tail":
        named = [word for word in named if word not in ("stdout", "stderr")]
    assert set(named) <= programs, f"there is no program {set(named) - programs}"


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([\w/.-]+):(?!=)", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = [word for word in words if "=" not in word]
    assert set(named) <= set(targets), f"there is no target {named}"


def check_playbook(words: list[str]) -> None:
    for word in words:
        if word.endswith(".yml"):
            assert (ROOT / "ansible" / word.rpartition("/")[2]).exists(), f"there is no playbook {word}"


def check_systemctl(words: list[str]) -> None:
    ours = {path.name for path in (ROOT / "systemd").iterdir()}
    for word in words[1:] if "-u" not in words else [words[words.index("-u") + 1]]:
        if not word.startswith("-"):
            known = {word, f"{word}.service"} & (ours | FOREIGN_UNITS)
            assert known, f"there is no unit {word} in systemd/"


CHECKS = {"botctl": check_botctl, "supervisorctl": check_supervisorctl, "make": check_make,
          "ansible-playbook": check_playbook, "systemctl": check_systemctl, "journalctl": check_systemctl}


def check(line: str) -> None:
    """Fail when a line of the runbook cannot be typed."""
    for words in pieces(line):
        name = words[0].rpartition("/")[2]
        if name in CHECKS:
            CHECKS[name](words[1:])
        else:
            assert name in OF_THE_HOST | {"Ctrl-C"}, f"{name} is no command of a host; {line}"


@pytest.mark.parametrize("line", COMMANDS)
def test_command_of_the_runbook_can_be_typed(line):
    check(line)


@pytest.mark.parametrize("line", [
    "botctl flaten", "botctl adopt", "botctl halt --why x", "supervisorctl bounce executor",
    "supervisorctl restart broker", "make ruin", "ansible-playbook sight.yml", "systemctl restart bott",
    "frobnicate", "sudo botctl doktor", "df -h; botctl statsu"])
def test_command_that_cannot_be_typed_is_found(line):
    with pytest.raises(AssertionError):
        check(line)


def test_runbook_with_its_commands_has_the_emergency_lines_first():
    assert SECTIONS[0].name.startswith("Emergency")
    assert [line.split()[1] for line in commands(SECTIONS[0].text)] == ["halt", "status", "flatten"]
    for verb in ("halt", "status", "flatten"):  # and once more for who reads Chinese
        assert re.search(rf"[\u4e00-\u9fff].*`botctl {verb}\b", SECTIONS[0].text), verb
    assert len(TEXT.split("## How to type")[0].splitlines()) < 30, "they are no longer on the first screen"


def test_runbook_with_its_links_leads_somewhere():
    anchors = [anchor(section.name) for section in SECTIONS]
    assert len(anchors) == len(set(anchors)), "two sections of one name"
    for link in re.findall(r"\]\(([^)]+)\)", TEXT):
        path, _, place = link.partition("#")
        if path:
            assert path.startswith("https://") or (ROOT / path).exists(), link
        else:
            assert place in anchors, link
    assert {web._anchor(section.name) for section in SECTIONS} == set(anchors)


def test_index_of_the_runbook_names_each_section():
    index = next(section for section in SECTIONS if section.name == "Index")
    named = re.findall(r"^[|-] \[[^]]+\]\(#([^)]+)\)", index.text, re.MULTILINE)
    own = ("Emergency", "Index", "How to", "States")
    others = [anchor(s.name) for s in SECTIONS if not s.name.startswith(own)]
    assert named == others, "in the order of the page, each once"


def test_sections_of_the_runbook_name_drills_that_exist():
    for section in SECTIONS:
        for path in section.drills():
            assert (ROOT / path).exists(), f"{section.name}: {path}"
        if commands(section.text) and section.name != "How to type":
            assert section.drills() or section is SECTIONS[0], f"{section.name} has no drill"


ALERTS = dict(re.findall(r"- alert: (\w+).*?severity: (\w+)",
                         (ROOT / "ops" / "prometheus" / "alerts.yml").read_text(encoding="utf-8"), re.DOTALL))


def test_alerts_with_the_runbook_have_a_section_each_and_no_section_is_left_over():
    there = [section.name for section in SECTIONS if section.part("Diagnosis")]
    assert sorted(there) == sorted(ALERTS)


@pytest.mark.parametrize("alert", ALERTS)
def test_section_on_an_alert_has_the_whole_form(alert):
    section = next(section for section in SECTIONS if section.name == alert)
    parts = re.findall(r"^### (\w+)", section.text, re.MULTILINE)
    assert parts == ["Meaning", "Impact", "Diagnosis", "Mitigation"]
    severity, summary = section.text.strip().splitlines()[:2]
    assert severity.split()[0].strip(",:").lower() == ALERTS[alert] or ALERTS[alert] == "none", severity
    assert re.match(r"\*\*[^*]*[\u4e00-\u9fff][^*]*。\*\*", summary), "its summary in Chinese"
    assert section.part("Diagnosis").startswith("\n```\n"), "the first line of the diagnosis is a command"
    for label in ("Verify", "Undo"):
        assert re.search(rf"^{label}: .", section.part("Mitigation"), re.MULTILINE), f"no {label}: line"
    row, = re.findall(rf"^\| \[{alert}\]\(#{anchor(alert)}\) \| (\w+) \| .+ \| `(.+)` \|$",
                      next(s.text for s in SECTIONS if s.name == "Index"), re.MULTILINE)
    assert row == (ALERTS[alert], commands(section.part("Diagnosis"))[0])


def test_first_command_of_an_alert_is_that_of_its_section():
    text = (ROOT / "ops" / "prometheus" / "alerts.yml").read_text(encoding="utf-8")
    told = re.findall(r"- alert: (\w+).*?^ +command: (.+?)$", text, re.DOTALL | re.MULTILINE)
    assert len(told) == len(ALERTS)
    for alert, command in told:
        section = next(section for section in SECTIONS if section.name == alert)
        assert commands(section.part("Diagnosis"))[0] == command, alert


def test_alerts_with_the_runbook_have_a_drill_each():
    assert {*DRILLS, "Watchdog"} == set(ALERTS), "tests/drill/test_runbook.py drills each alert"


def test_table_of_drills_with_each_alert_has_a_row_and_its_times_are_what_was_promised():
    text = (ROOT / "docs" / "drills.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| [\w ,]+ \| ([\d.]+) \| .+ \| (\d+) \|$", text, re.MULTILINE)
    assert [name for name, *_ in rows] == [*DRILLS, "Watchdog"], "make drill writes it"
    for name, told_s, _ in rows:
        if name in DRILLS:
            assert float(told_s) <= DRILLS[name].within_s * SLACK, name


def test_drills_with_the_lines_they_type_leave_none_of_the_runbook_untried():
    typed, said = set(), set()
    for section in SECTIONS:
        looks = {*commands(section.part("Diagnosis")), *section.typed_after("Verify")}
        said |= looks | {*section.steps()}
        if section.name in ALERTS:
            steps = DRILLS[section.name].steps if section.name in DRILLS else len(section.steps())
            typed |= looks | {*section.steps()[:steps]}
            typed |= {line for line in section.typed_after("Undo") if line.startswith("botctl resume")}
    assert said - typed == set()


# Their lines want a terminal, a host, another configuration or a backup: the drills they name do the same.
NOT_TYPED = {"How to type", "Start", "Stop", "On a host", "Deploy", "Roll back", "Rotate the keys", "Back up",
             "Restore on a new host", "Restore on the same host", "supervisorctl",
             "Add, change or remove a strategy"}


def test_sections_with_other_commands_are_typed_from_the_page_or_named_here():
    others = {section.name for section in SECTIONS if commands(section.text)} - set(ALERTS)
    assert others == {*PLANNED, *NOT_TYPED, SECTIONS[0].name, "What no tool can mend"}
