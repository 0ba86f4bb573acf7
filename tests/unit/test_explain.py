"""The story in words: every kind of event can be told."""

import msgspec
import pytest

from bot import events
from bot.events import OrderAnswered, SymbolLocked, Unprotected
from bot.explain import _TELL, find_story, tell
from bot.journal import Entry, Journal, JournalReader
from bot.model import SignalOutcome
from bot.page import fit, table_lines
from bot.screen import Screen
from bot.views import show
from tests.factory import BTC, NOW, D, HandClock, changed, filled, intended, received, signal


def test_tell_with_each_kind_of_event_has_words_for_it():
    kinds = {kind.__struct_config__.tag for kind in events.Event.__subclasses__()}
    assert set(_TELL) == kinds


def test_tell_of_a_position_without_its_stop_says_since_when():
    lacks, again = (tell(Entry(1, 0, Unprotected(symbol="B", since_ns=ns))) for ns in (60_000_000_000, 0))
    assert lacks.endswith("B lacks its stop since 1970-01-01 00:01:00.000000")
    assert again.endswith("B no longer lacks its stop")


@pytest.fixture
def reader(tmp_path):
    """Return a reader of a journal: a signal, then an operator's close, a manual trade and a lock."""
    told = [
        received(signal(seq=1)), intended("a", signal="levels/7/1"),
        msgspec.structs.replace(changed("a", "accept"), signal="levels/7/1"),
        filled("a", trade="1", signal="levels/7/1"),
        intended("b", side="sell", leg="close", signal=""), changed("b", "accept"),
        OrderAnswered(client_order_id="b", signal="", is_sent=True, sent="POST", sent_ns=1, status=200,
                      body="{}", error="", received_ns=2),
        filled("b", "0.4", "sell", trade="2", cause="close"),
        filled("b", "0.6", "sell", trade="3", cause="close"),
        filled("", trade="4", cause="operator"), filled("", trade="5", cause="operator"),
        SymbolLocked(symbol=BTC, cause="foreign", evidence="a trade of others")]
    path = tmp_path / "journal.db"
    journal = Journal(path, HandClock(), identity={}, checkpoint_events=1_000)
    journal.load()
    journal.begin_epoch("e")
    for event in told:
        journal.append(event)
    journal.close()
    return JournalReader(path)


@pytest.mark.parametrize(("name", "kinds", "keys"), [
    ("levels/7/1", "signal intent order fill", {"levels/7/1", "a", f"{BTC}#1"}),
    ("a", "signal intent order fill", {"levels/7/1", "a", f"{BTC}#1"}),
    (f"{BTC}#1", "signal intent order fill", {"levels/7/1", "a", f"{BTC}#1"}),
    ("b", "intent order answered fill fill", {"b", f"{BTC}#2", f"{BTC}#3"}),
    (f"{BTC}#3", "intent order answered fill fill", {"b", f"{BTC}#2", f"{BTC}#3"}),
    (f"{BTC}#4", "fill", {f"{BTC}#4"}), ("nothing", "", set())],
    ids=["signal", "its order", "its fill", "order without a signal", "its fill", "fill of no order", "none"])
def test_story_is_of_the_signal_or_of_the_order_alone(reader, name, kinds, keys):
    story = find_story(reader, name)
    assert [str(entry.event.__struct_config__.tag) for entry in story] == kinds.split()
    assert {entry.event.key for entry in story} == keys
    assert all(tell(entry) for entry in story) and sorted(e.seq for e in story) == [e.seq for e in story]


FORGED = "up\x1b[2J\x9b\u202e\r\n2026-01-01 00:00:00.000000  resumed (all)"
SHOWN = r"up\x1b[2J\x9b\u202e\r\n2026-01-01 00:00:00.000000  resumed (all)"


def test_words_of_a_strategy_or_the_exchange_cannot_steer_a_terminal_nor_pass_for_a_line(capsys):
    told = tell(Entry(1, 0, received(signal(reason=FORGED))))
    assert SHOWN in told and told.count("\n") == 2
    assert table_lines([{"text": FORGED}], ("text",)) == ["text", SHOWN]
    assert fit(["a\x1b[31m"], 80, 24, "").count("\x1b[31m") == 0
    show("two\nlines \x1b[2J")
    assert capsys.readouterr().out == "two\nlines \\x1b[2J\n"
    outcome = SignalOutcome(strategy="sr", run=1, seq=1, symbol=BTC, outcome="denied", reason=FORGED,
                            filled_qty=D(0), time_ns=NOW)
    assert str(Screen((BTC,), silence_ns=1).line_of(outcome, NOW)).endswith(SHOWN)
