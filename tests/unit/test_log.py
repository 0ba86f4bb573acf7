"""One JSON object a line, with names from the list."""

import io
import json

import pytest

from bot.log import BURST, EVENTS, MONEY, Log


class StillClock:
    def wall_ns(self) -> int:
        return 42

    def mono_ns(self) -> int:
        return 0


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


class StepClock(StillClock):
    now_ns = 0

    def mono_ns(self) -> int:
        return self.now_ns


def test_log_with_a_loop_writes_a_burst_and_then_one_a_second_and_says_what_is_missing():
    stream, clock = io.StringIO(), StepClock()
    log = Log("gateway", clock, stream=stream)
    for _ in range(10_000):
        log.warning("query_failed")
    log.warning("stream_down")
    assert [line["event"] for line in lines(stream)] == ["query_failed"] * BURST + ["stream_down"]
    assert log.suppressed == {"query_failed": 10_000 - BURST}
    clock.now_ns += 1_000_000_000
    log.warning("query_failed")
    log.warning("query_failed")
    assert len(lines(stream)) == BURST + 2
    assert lines(stream)[-1]["suppressed"] == 10_000 - BURST


def test_log_with_money_leaves_nothing_out():
    stream = io.StringIO()
    log = Log("executor", StillClock(), stream=stream)
    for number in range(BURST * 3):
        log.info("fill", number=number)
    assert len(lines(stream)) == BURST * 3
    assert set(EVENTS) >= MONEY


def test_log_with_a_secret_in_any_field_blots_it_out():
    stream = io.StringIO()
    log = Log("executor", StillClock(), stream=stream)
    log.hide("S" * 64, "key-" * 16, "ab")
    log.error("crashed", error="signed with " + "S" * 64, traceback=["abc", {"deep": "key-" * 16}])
    text = stream.getvalue()
    assert "S" * 64 not in text and "key-" * 16 not in text
    assert lines(stream)[0]["error"] == "signed with ***" and "abc" in text
