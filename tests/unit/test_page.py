"""What botctl prints for people."""

from decimal import Decimal

from bot.page import fit, status_lines, table_lines

STATUS = {
    "mode": "PAPER", "state": "HALTED", "state_reason": "health: a loop",
    "halted": [{"scope": "all", "who": "health", "why": "a loop", "since_ns": 1_700_000_000_000_000_000}],
    "processes": [{"name": "executor", "pid": 7, "state": "UP", "uptime_s": 1.5, "heartbeat_age_ms": 3,
                   "memory_mb": None, "cpu_pct": None}],
    "counters": {"ticks": 5}, "positions": [
        {"symbol": "ETH", "stop": "90 (NOT AT THE EXCHANGE)", "unprotected_s": 3.2},
        {"symbol": "BTC", "stop": "90", "unprotected_s": None}],
    "open_orders": 1, "unknown_orders": 0, "journal_error": "torn",
    "locked_symbols": {"BTC/USDT:USDT": {"books_differ": "0.1 against 0"}},
    "findings": [{"rule": "cpu_busy", "subject": "gateway", "text": "99 %", "age_s": 4}], "backup": None,
}


def test_table_with_rows_aligns_them_and_shows_what_is_not_there():
    rows = [{"a": 1, "b": Decimal("1.500")}, {"a": "long", "b": None}]
    assert table_lines(rows, ("a", "b")) == ["a     b", "1     1.5", "long  -"]
    assert table_lines([], ("a",), "nothing") == ["nothing"]


def test_status_page_with_troubles_begins_with_them():
    lines = status_lines(STATUS)
    assert lines[:6] == [
        "PAPER  HALTED  health: a loop", "HALTED all by health since 2023-11-14 22:13:20: a loop",
        "LOCKED BTC/USDT:USDT books_differ: 0.1 against 0",
        "UNPROTECTED ETH for 3 s: stop 90 (NOT AT THE EXCHANGE)", "journal: torn",
        "cpu_busy gateway: 99 % (for 4 s)"]
    assert lines[-1] == "ticks 5  open_orders 1  unknown_orders 0" and "stop_loss" not in str(lines)


def test_fit_with_more_than_the_screen_holds_cuts_it_and_says_so():
    screen = fit(["x" * 200] * 50, 80, 24, "the end")
    lines = screen.replace("\x1b[K", "").replace("\x1b[H", "").replace("\x1b[J", "").split("\r\n")
    assert len(lines) == 24 and max(map(len, lines)) == 79
    assert lines[-2:] == ["... 28 more lines", "the end"]
