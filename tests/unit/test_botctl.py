"""botctl's table of verbs: each has help with an example that can be typed, and a schema for scripts."""

import errno
import os
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from bot import botctl, steer
from bot.botctl import GROUPS, VERBS
from bot.clock import Clock
from bot.commands import Answered, CommandFiles
from bot.config_file import load
from bot.halt import HaltFiles
from tests.harness import ROOT, wait_until, write_config
from tests.schemas import SCHEMAS, Error

each_verb = pytest.mark.parametrize("verb", VERBS, ids=lambda verb: verb.name)


def test_verbs_with_json_have_a_schema_each():
    assert {verb.name for verb in VERBS} == set(SCHEMAS)


def said(capsys, code: int, *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        botctl.main(list(words))
    assert ended.value.code == code
    return "".join(capsys.readouterr())


@each_verb
def test_help_of_a_verb_shows_an_example_that_can_be_typed(verb, capsys):
    text = said(capsys, 0, *verb.name.split(), "--help")
    example = f"botctl {verb.name} {verb.example}".rstrip()
    assert "exit codes: 0 done, 1 the answer is no" in " ".join(text.split())
    assert f"example: {example}" in " ".join(text.split()) and "--json" in text and "--config" in text
    assert verb.text[:20].lower() in text.lower()
    assert botctl._parser().parse_args(shlex.split(example)[1:]).run is verb.run


@each_verb
def test_wrong_usage_of_a_verb_shows_what_is_right(verb, capsys):
    words = shlex.split(f"{verb.name} {verb.example}")
    text = said(capsys, 2, *words, "--nonsense")
    assert text.startswith(f"usage: botctl {verb.name} [-h]") and "--nonsense" in text


@pytest.mark.parametrize("word", sorted({verb.name.split()[0] for verb in VERBS}))
def test_help_lists_each_word_and_says_what_exit_codes_mean(word, capsys):
    text = said(capsys, 0, "--help")
    assert f"\n    {word}" in text and "exit codes: 0 done" in text
    if word in GROUPS:
        assert f"example: botctl {word} " in said(capsys, 0, word, "--help")
        assert "the following arguments are required: " in said(capsys, 2, word)


@pytest.mark.parametrize(("words", "right"), [
    ("stauts", "choose from"), ("", "VERB"), ("explain", "ID"), ("adopt", "SYMBOL"),
    ("config chekc", "choose from"),
    ("halt --strategy a --symbol b", "not allowed with"), ("orders --count 0", "a count is 1 or more"),
    ("report --since yesterday", "like 24h"), ("explain ''", "botctl signals lists some")])
def test_wrong_usage_says_what_is_right(words, right, capsys):
    assert right in said(capsys, 2, *shlex.split(words))


@pytest.mark.parametrize("words", ["reconcile", "cancel", "adopt BTC/USDT:USDT", "resume", "halt",
                                   "flatten --symbol BTC/USDT:USDT"])
def test_verb_with_a_folder_it_cannot_use_says_which(words, tmp_path, capsys, monkeypatch):
    path = write_config(tmp_path)
    (tmp_path / "var").mkdir()
    for name in ("commands", "halt"):
        (tmp_path / "var" / name).write_text("a file where a folder belongs")
    monkeypatch.setattr(steer, "_is_up", lambda *_: True)
    assert botctl.main([*words.split(), "--config", str(path)]) == 1
    said = capsys.readouterr().err
    assert str(tmp_path / "var") in said and "Not a directory" in said


@pytest.mark.parametrize(("number", "hint"), [(errno.EACCES, "sudo"), (errno.ENOSPC, "free disk space")])
def test_verb_that_may_not_or_cannot_write_says_it_in_one_line(number, hint, tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise OSError(number, "no", "/there")
    monkeypatch.setattr("bot.commands.write_synced", refuse)
    words = ["reconcile", "--json", "--config", str(write_config(tmp_path))]
    assert botctl.main(words) == 1
    out, err = capsys.readouterr()
    assert err.startswith("botctl: /there: no; ") and hint in err and err.count("\n") == 1
    assert msgspec.json.decode(out, type=Error).error == err.strip().removeprefix("botctl: ")


@pytest.mark.parametrize("words", ["halt", "cancel", "flatten", "reconcile", "adopt BTC/USDT:USDT",
                                   "alert silence", "alert unsilence"])
def test_reason_loses_what_would_steer_a_terminal_as_it_is_typed(words):
    args = botctl._parser().parse_args([*words.split(), "--reason", "a\x1b[2J\nb"])
    assert args.reason == "a [2J b"


@pytest.mark.parametrize(("words", "code"), [
    ("orders", 1), ("explain x", 1), ("flatten --strategy levels", 1), ("config check /nowhere", 78),
    ("status --watch", 2)])
def test_no_with_json_is_json_too(words, code, tmp_path, capsys):
    assert botctl.main([*words.split(), "--json", "--config", str(write_config(tmp_path))]) == code
    out, err = capsys.readouterr()
    assert msgspec.json.decode(out, type=Error).error in err


def test_help_of_explain_names_everything_that_has_a_story(capsys):
    text = " ".join(said(capsys, 0, "explain", "--help").split())
    assert "client order id, fill (SYMBOL#TRADE), or SYMBOL: its locks, adoptions" in text


@pytest.mark.parametrize("name", ["strategy-levels", "executor"])
def test_status_with_a_program_that_was_stopped_by_hand_says_how_to_start_it(tmp_path, capsys, name):
    path = write_config(tmp_path)
    config, clock = load(path), Clock()
    beat = {"name": "health", "pid": os.getpid(), "run": clock.wall_ns(), "mono_ns": clock.mono_ns(),
            "version": "1", "config": "c", "ended": False, "crash_starts": [], "descriptors": 9,
            "descriptors_max": 99, "findings": [
                {"rule": "process_down", "subject": name, "text": "STOPPED: Nov 30", "age_s": 5},
                {"rule": "process_down", "subject": "gateway", "text": "FATAL: too quickly", "age_s": 5}]}
    config.run_path("health").mkdir(parents=True)
    (config.run_path("health") / "health.json").write_bytes(msgspec.json.encode(beat))
    assert botctl.main(["status", "--config", str(path)]) == 1
    _, stopped, missing, *_ = capsys.readouterr().out.splitlines()
    assert stopped.startswith("STOPPED by hand") and stopped.endswith(f"supervisor.sock start {name}")
    assert ("for a halt that could not be written: then halt first" in stopped) == (name == "executor")
    assert "gateway DOWN" in missing and name not in missing and "see the logs in" in missing


@pytest.mark.parametrize("words", ["stauts", "orders --count 0", "halt --nonsense", "config chekc"])
def test_wrong_usage_with_json_is_json_too(words, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["botctl", *words.split(), "--json"])
    with pytest.raises(SystemExit) as ended:
        botctl.main()
    out, err = capsys.readouterr()
    assert ended.value.code == 2 and msgspec.json.decode(out, type=Error).error in err


def test_halt_of_somebody_without_a_name_is_set(tmp_path, capsys, monkeypatch):
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.getuid", lambda: 54_321)  # of a container, a directory service that is away
    assert botctl.main(["halt", "--config", str(write_config(tmp_path))]) == 0
    assert [h.who for h in HaltFiles(tmp_path / "var" / "halt").list()] == ["uid 54321"]


def test_resume_of_what_is_not_halted_says_what_is(tmp_path, capsys):
    path = write_config(tmp_path)
    HaltFiles(tmp_path / "var" / "halt").set("symbol:X/USDT:USDT", who="op", why="x", clock=Clock())
    assert botctl.main(["resume", "--config", str(path)]) == 1
    assert "all was not halted; halted: symbol:X/USDT:USDT" in "".join(capsys.readouterr())


@pytest.mark.parametrize(("scope", "words"), [
    ("strategy:gone", "--strategy gone"), ("symbol:GONE/USDT:USDT", "--symbol GONE/USDT:USDT")])
def test_resume_of_what_left_the_configuration_ends_its_halt(scope, words, tmp_path, capsys):
    path, halts = write_config(tmp_path), HaltFiles(tmp_path / "var" / "halt")
    assert botctl.main(["resume", *words.split(), "--config", str(path)]) == 2, "nobody halted it"
    halts.set(scope, who="health", why="a loop", clock=Clock())
    assert botctl.main(["halt", *words.split(), "--config", str(path)]) == 2, "nor is it halted"
    assert botctl.main(["resume", *words.split(), "--config", str(path)]) == 0
    assert halts.list() == [] and "a loop" in capsys.readouterr().out


@pytest.mark.parametrize(("verb", "folder"), [("reconcile", "commands"), ("flatten", "guard")])
def test_verb_that_is_interrupted_takes_its_command_back_and_says_so(verb, folder, tmp_path):
    words = [sys.executable, "-m", "bot.botctl", verb, "--json"]
    beat = {"pid": os.getpid(), "run": 1, "mono_ns": Clock().mono_ns(), "version": "1", "config": "c",
            "ended": False, "crash_starts": [], "descriptors": 1, "descriptors_max": 9}
    (tmp_path / "var" / "run").mkdir(parents=True)
    (tmp_path / "var" / "run" / "guard.json").write_bytes(msgspec.json.encode(beat))  # it lives, for 3 s
    with subprocess.Popen([*words, "--config", write_config(tmp_path)], stdout=subprocess.PIPE,
                          stderr=subprocess.PIPE, text=True, cwd=ROOT) as asking:
        files = CommandFiles(tmp_path / "var" / folder)
        wait_until(lambda: files.waiting()[0], 20)
        asking.send_signal(signal.SIGINT)
        out, err = asking.communicate(timeout=20)
    assert asking.returncode == 1 and files.waiting() == ([], [])
    assert err.count("\n") == 1 and "was taken back" in err, err
    assert msgspec.json.decode(out, type=Error).error in err


def test_status_watch_follows_the_file_and_bears_one_that_is_being_edited(tmp_path, monkeypatch):
    path, seen = write_config(tmp_path), []
    texts = ["rubbish = ", path.read_text().replace("base_port = 0", "base_port = 9777"), None]

    def gather(config, clock):
        seen.append(config.metrics.base_port)
        if (text := texts.pop(0)) is None:
            raise KeyboardInterrupt
        path.write_text(text)
        return status
    status = {"mode": "PAPER", "state": "DOWN", "state_reason": "", "halted": [], "locked_symbols": {},
              "journal_error": "", "findings": [], "counters": {}, "open_orders": 0, "unknown_orders": 0,
              "processes": [], "positions": [], "backup": None}
    monkeypatch.setattr("bot.views.gather", gather)
    monkeypatch.setattr("bot.views.select.select", lambda *_: ([], [], []))
    assert botctl.main(["status", "--watch", "--config", str(path)]) == 0
    assert seen == [0, 0, 9_777]


def test_journal_verify_with_json_says_that_it_is_not_whole(tmp_path, capsys):
    assert botctl.main(["journal", "verify", "--json", "--config", str(write_config(tmp_path))]) == 1
    told = msgspec.json.decode(capsys.readouterr().out)
    assert told["is_whole"] is False and "there is no journal yet" in told["error"]


def test_halt_and_flatten_of_everything_work_with_a_broken_configuration(tmp_path, capsys, monkeypatch):
    path = write_config(tmp_path)
    path.write_text(path.read_text() + "\nrubbish = ")
    state_path = tmp_path / "var"
    monkeypatch.setenv("BOT_CONFIG", str(path))
    monkeypatch.setenv("BOT_STATE_DIR", str(state_path))
    assert botctl.main(["halt", "--reason", "now"]) == 0
    assert "HALTED all" in capsys.readouterr().out
    assert [h.scope for h in HaltFiles(state_path / "halt").list()] == ["all"]

    def guard():  # which runs with the configuration that it was started with
        files = CommandFiles(state_path / "guard")
        command, = wait_until(lambda: files.waiting()[0])
        assert (command.verb, command.why) == ("flatten", "out")
        files.answer(command, Answered(True, "flat"), None)
    with ThreadPoolExecutor(1) as pool:
        answering = pool.submit(guard)
        assert botctl.main(["flatten", "--reason", "out"]) == 0
        answering.result()
    out, err = capsys.readouterr()
    assert "flat" in out and "configuration is broken" in err
    assert botctl.main(["flatten", "--symbol", "BTC/USDT:USDT"]) == 78
