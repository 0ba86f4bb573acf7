"""Commands and answers as files: kept until answered or too late; what cannot be read is set aside."""

import asyncio
import io
from types import SimpleNamespace

import pytest

from bot import botctl, commands
from bot.commands import ANSWERS_KEPT, WAIT_S_MAX, Answered, CommandFiles
from bot.desk import Desk
from bot.errors import EXIT_PENDING
from bot.log import Log
from tests.factory import BTC, HandClock
from tests.harness import write_config


def put(files, clock, verb="adopt"):
    clock.step(1)
    return files.put(verb, symbol=BTC, who="ann", why="my own trade", clock=clock)


def test_commands_wait_until_answered_oldest_first(tmp_path):
    clock, files = HandClock(), CommandFiles(tmp_path / "commands")
    assert files.waiting() == ([], [])
    first, second = put(files, clock), put(files, clock, "reconcile")
    again = CommandFiles(tmp_path / "commands")  # after a restart
    assert again.waiting() == ([first, second], [])
    assert files.take_answer(first) is None
    again.answer(first, Answered(True, "adopted"), Log("executor", clock))
    assert again.waiting() == ([second], [])
    told = Answered(True, "adopted", f"adopt {BTC} by ann")
    assert files.untaken() == {first.id: told} and files.take_answer(first) == told
    assert files.take_answer(first) is None and files.untaken() == {}
    (tmp_path / "commands" / "done" / "x.json").write_bytes(b"{")
    assert files.untaken() == {}


@pytest.mark.parametrize(("age_s", "is_done"), [
    (WAIT_S_MAX, True), (WAIT_S_MAX + 1, False), (-WAIT_S_MAX - 1, False)])  # the latter: of a wrong clock
def test_command_that_waited_too_long_is_answered_with_no_and_not_done(tmp_path, age_s, is_done):
    clock, files, done = HandClock(), CommandFiles(tmp_path), []

    async def reconcile(why):
        done.append(why)
        return ()
    keeper = SimpleNamespace(record=done.append, commit=lambda: None, books=SimpleNamespace(symbols={}))
    desk = Desk(None, clock, Log("executor", clock), files=files, exchange=SimpleNamespace(instruments={}),
                keeper=keeper, reconciler=SimpleNamespace(reconcile=reconcile), dropped=None, close=None,
                cancel=None)
    command = put(files, clock, "reconcile")
    clock.step(age_s)
    asyncio.run(desk.work())
    answered = files.take_answer(command)
    assert answered.is_done == is_done == bool(done) and files.waiting() == ([], [])
    assert is_done or "type it again" in answered.text


def test_commands_that_cannot_be_read_are_set_aside(tmp_path):
    clock, files = HandClock(), CommandFiles(tmp_path)
    good = put(files, clock)
    raw = (tmp_path / f"{good.id}.json").read_bytes()
    bad = {"a": b"", "b": b"{", "c": b"\xff", "d": raw, "e": raw.replace(b"adopt", b"sell"),
           "f": raw.replace(b'"who"', b'"how"'), "g": b" " * 10_001 + raw, "h": raw.replace(b"1", b"2", 3)}
    for name, content in bad.items():
        (tmp_path / f"{name}.json").write_bytes(content)
    (tmp_path / "i.part").write_bytes(raw)  # of a writer that was killed
    waiting, damaged = files.waiting()
    assert waiting == [good]
    assert [text[0] for text in damaged] == list(bad)
    assert files.waiting() == ([good], [])
    assert len(list(tmp_path.glob("*.damaged"))) == len(bad)


def test_answers_that_nobody_takes_are_bounded(tmp_path):
    clock, files = HandClock(), CommandFiles(tmp_path)
    asked = [put(files, clock) for _ in range(ANSWERS_KEPT + 3)]
    for command in asked:
        files.answer(command, Answered(False, "no"), Log("executor", clock))
    assert files.take_answer(asked[2]) is None
    assert files.take_answer(asked[3]).text == "no"


def test_answer_that_cannot_be_written_is_told_and_the_command_not_done_again(tmp_path):
    files, out = CommandFiles(tmp_path), io.StringIO()
    command = put(files, clock := HandClock())
    (tmp_path / "done").write_text("a file where a folder belongs")  # or a full disk
    files.answer(command, Answered(True, "done"), Log("executor", clock, stream=out))
    assert files.waiting() == ([], []) and "command_unanswered" in out.getvalue()


def test_botctl_without_an_executor_says_that_the_command_waits(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(commands, "ANSWER_TURNS", 1)
    config = write_config(tmp_path)
    assert botctl.main(["adopt", BTC, "--config", str(config), "--reason", "mine"]) == EXIT_PENDING
    assert "the command stays for 10 minutes" in capsys.readouterr().err
    [command] = CommandFiles(tmp_path / "var" / "commands").waiting()[0]
    assert (command.verb, command.symbol, command.why) == ("adopt", BTC, "mine")


def test_botctl_hands_the_answer_on_with_its_exit_code(tmp_path, monkeypatch, capsys):
    config, files = write_config(tmp_path), CommandFiles(tmp_path / "var" / "commands")
    for is_done, code in ((True, 0), (False, 1)):
        answer = Answered(is_done, f"so it is {is_done}")
        monkeypatch.setattr(CommandFiles, "take_answer", lambda self, command, answer=answer: answer)
        assert botctl.main(["reconcile", "--config", str(config)]) == code
        assert "".join(capsys.readouterr()) == f"so it is {is_done}\n"
    assert len(files.waiting()[0]) == 2
