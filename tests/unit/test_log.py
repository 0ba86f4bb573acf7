"""One JSON object a line, with names from the list."""

import io
import json

import pytest

from bot.log import EVENTS, Log


class StillClock:
    def wall_ns(self) -> int:
        return 42


def lines(stream: io.StringIO) -> list[dict]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_log_with_an_event_writes_one_json_line():
    stream = io.StringIO()
    Log("gateway", StillClock(), stream=stream).info("started", pid=7, symbols=("A", "B"))
    assert lines(stream) == [{"event": "started", "ts_ns": 42, "level": "INFO", "process": "gateway",
                              "pid": 7, "symbols": ["A", "B"]}]


def test_log_with_line_breaks_and_odd_values_stays_one_line():
    stream = io.StringIO()
    Log("gateway", StillClock(), stream=stream).error("crashed", traceback="a\nb", error=ValueError("x"))
    assert lines(stream)[0]["traceback"] == "a\nb" and lines(stream)[0]["error"] == "x"


def test_log_with_an_unlisted_event_raises():
    with pytest.raises(KeyError, match="not listed in"):
        Log("gateway", StillClock(), stream=io.StringIO()).info("something_new")


def test_log_with_a_level_leaves_out_what_is_below():
    stream = io.StringIO()
    log = Log("gateway", StillClock(), "WARNING", stream)
    log.debug("started")
    log.info("started")
    log.warning("started")
    log.error("crashed")
    assert [line["level"] for line in lines(stream)] == ["WARNING", "ERROR"]


def test_log_with_two_processes_in_one_interpreter_keeps_them_apart():
    one, two = io.StringIO(), io.StringIO()
    Log("gateway", StillClock(), stream=one).info("started")
    Log("gateway", StillClock(), stream=two).info("stopped")
    assert len(lines(one)) == len(lines(two)) == 1


def test_events_with_their_texts_are_names_and_say_something():
    for name, text in EVENTS.items():
        assert name == name.lower() and name.isidentifier() and text
