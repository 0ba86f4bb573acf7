"""The story in words: every kind of event can be told."""

from bot import events
from bot.events import Unprotected
from bot.explain import _TELL, tell
from bot.journal import Entry


def test_tell_with_each_kind_of_event_has_words_for_it():
    kinds = {kind.__struct_config__.tag for kind in events.Event.__subclasses__()}
    assert set(_TELL) == kinds


def test_tell_of_a_position_without_its_stop_says_since_when():
    lacks, again = (tell(Entry(1, 0, Unprotected(symbol="B", since_ns=ns))) for ns in (60_000_000_000, 0))
    assert lacks.endswith("B lacks its stop since 1970-01-01 00:01:00.000000")
    assert again.endswith("B no longer lacks its stop")
