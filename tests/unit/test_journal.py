"""The journal on real files: chain, once, lock, epochs, checkpoints, full disks and kill -9."""

import os
import shutil
import signal as signals
import sqlite3
import subprocess
import sys
import textwrap
import threading
from contextlib import suppress

import pytest

from bot import journal as journal_module
from bot.errors import ConfigError, JournalError
from bot.events import ExitsSet, SignalClosed, Started
from bot.journal import CHECKPOINTS_KEPT, LOOK_EVENTS, Journal, JournalReader
from tests.factory import BTC, NOW, D, HandClock, changed, filled, folded, intended, received, signal
from tests.harness import ROOT, wait_until

IDENTITY = {"exchange": "binanceusdm", "url": "http://x", "account": "main"}


def opened(path, *, checkpoint_events=1_000, load=True, **changes):
    journal = Journal(
        path, HandClock(), identity={**IDENTITY, **changes}, checkpoint_events=checkpoint_events
    )
    if load:
        journal.load()
        journal.begin_epoch("e1")
    return journal


def history(count=3):
    """Return events that fit one another, of most kinds."""
    events = [Started(epoch="e1", version="1", config="c")]
    for seq in range(1, count + 1):
        name = f"levels/7/{seq}"
        events += [
            received(signal(seq=seq, reason="näh, é 0xff \0 '\"")),
            intended(f"o{seq}", signal=name),
            changed(f"o{seq}", "accept"),
            filled(f"o{seq}", trade=str(seq)),
            ExitsSet(symbol=BTC, signal=name, stop_loss=D(90), take_profit=None),
            SignalClosed(signal=name, symbol=BTC, outcome="done", reason="", filled_qty=D(1)),
        ]
    return events


def written(path, events, *, checkpoint_events=1_000):
    """Write events to a journal and close it; return what they fold to."""
    journal, books = opened(path, checkpoint_events=checkpoint_events), folded()
    for event in events:
        books.apply(event)
        journal.append(event)
        journal.commit()
        journal.checkpoint(books)
    journal.close()
    return books


@pytest.fixture
def path(tmp_path):
    return tmp_path / "journal.db"


def sql(path, text, values=()):
    db = sqlite3.connect(path)
    db.execute("PRAGMA synchronous=OFF")
    rows = db.execute(text, values).fetchall()
    db.commit()
    db.close()
    return rows


def load_again(path):
    journal = opened(path, load=False)
    try:
        return journal.load()
    finally:
        journal.close()


def test_journal_with_events_gives_the_same_books_again_and_again(path):
    books = written(path, history())
    assert load_again(path).encode() == load_again(path).encode() == books.encode()
    reader = JournalReader(path)
    assert reader.books().encode() == reader.verify().encode() == books.encode()
    assert reader.counts() == {
        "started": 1,
        "signal": 3,
        "intent": 3,
        "order": 3,
        "fill": 3,
        "exits": 3,
        "outcome": 3,
    }
    reader.close()


def test_journal_that_is_new_is_empty(path):
    assert load_again(path).encode() == folded().encode()


@pytest.mark.parametrize(
    ("event", "kind", "key"),
    [
        (received(signal()), "signal", "levels/7/1"),
        (intended("o1"), "intent", "o1"),
        (filled("o1"), "fill", f"{BTC}#1"),
        (
            SignalClosed(signal="a/1/1", symbol=BTC, outcome="done", reason="", filled_qty=D(0)),
            "outcome",
            "a/1/1",
        ),
    ],
)
@pytest.mark.parametrize("commits", [0, 1])
def test_event_of_a_kind_that_stands_once_is_refused_a_second_time(path, event, kind, key, commits):
    journal = opened(path)
    assert not journal.has(kind, key)
    journal.append(event)
    if commits:
        journal.commit()
    assert journal.has(kind, key) and journal.find(kind, key) == event  # committed or not
    with pytest.raises(JournalError, match=f"{kind} {key} was refused: UNIQUE"):
        journal.append(event)
    journal.close()
    assert sql(path, "SELECT count(*) FROM events") == [(commits,)]


def test_event_of_another_kind_stands_as_often_as_it_happens(path):
    journal = opened(path)
    for _ in range(3):
        journal.append(changed("o1", "lose"))
    journal.commit()
    journal.close()


def test_find_and_story_in_a_long_journal_look_at_a_few_rows(path):
    written(path, history(400))
    reader, steps = JournalReader(path), []
    reader._db.set_progress_handler(lambda: steps.append(1), 100)  # of SQLite's virtual machine
    assert reader.find("signal", "levels/7/399") is not None
    assert reader.find("signal", "levels/7/9999") is None
    assert reader.story("levels/7/399")
    assert len(steps) < 5
    reader.close()


def test_newest_of_a_rare_kind_in_a_long_journal_reads_so_far_back_and_no_farther(path, monkeypatch):
    monkeypatch.setattr(journal_module, "NEWEST_EVENTS", 100, raising=False)
    written(path, history(400))
    reader, steps = JournalReader(path), []
    reader._db.set_progress_handler(lambda: steps.append(1), 100)
    assert reader.newest("started", 5) == [], "the very first event"
    assert len(steps) < 10
    assert len(reader.newest("signal", 5)) == 5 and len(reader.newest("signal", 999)) < 100
    reader.close()


def test_find_with_a_kind_that_is_not_unique_is_a_mistake_of_ours(path):
    journal = opened(path)
    for kind in ("order", "", "signal' OR 1=1 --"):
        with pytest.raises(ValueError, match="only"):
            journal.find(kind, "x")
    journal.close()


HOSTILE = [
    "'; DROP TABLE events; --",
    '"',
    "a' OR '1'='1",
    "%_",
    "nul\0nul",
    "\0",
    "",
    "ü" * 2_000,
    "\u202e",
    "🂡",
    "?1",
]


def test_journal_with_hostile_strings_keeps_them_as_they_are(path):
    events = [received(signal(strategy=name, seq=n, reason=name)) for n, name in enumerate(HOSTILE)]
    events += [filled("", symbol=name, trade=str(n)) for n, name in enumerate(HOSTILE)]
    books = written(path, events)
    assert load_again(path).encode() == books.encode()
    reader = JournalReader(path)
    for n, name in enumerate(HOSTILE):
        assert reader.find("signal", f"{name}/7/{n}").signal.reason == name
        assert [e.event.symbol for e in reader.story(name)] == ([name] if name else [])
        assert reader.find("fill", f"{name}#{n}").symbol == name
        assert reader.find("signal", f"{name}/7/{n + 1}") is None
    assert reader.newest("' OR '1'='1", 5) == []
    reader.close()


def test_event_that_could_not_be_read_back_is_refused(path):
    journal = opened(path)
    journal.append(received(signal(seq=1)))
    with pytest.raises(JournalError, match=r"signal levels/7/2 was refused.*null"):
        journal.append(received(signal(seq=2, tick_price=float("nan"))))  # JSON would say null
    journal.close()
    assert load_again(path).encode() == folded().encode()  # the transaction went with it


COLUMNS = ["seq", "ts_ns", "kind", "key", "story", "body", "hash"]


@pytest.mark.parametrize("column", COLUMNS)
def test_journal_with_one_byte_changed_in_any_row_is_damaged(path, tmp_path, column):
    written(path, history(2))
    rows = sql(path, "SELECT count(*) FROM events")[0][0]
    sql(path, "DROP INDEX once")  # so that a changed key can be written at all
    found = 0
    for seq in range(1, rows + 1):
        copy = tmp_path / f"{column}{seq}.db"
        shutil.copy(path, copy)
        value = sql(copy, f"SELECT {column} FROM events WHERE seq = ?", (seq,))[0][0]
        if isinstance(value, int):
            changes = [value + 1_000, value ^ 64 if column == "ts_ns" else -value]
        elif isinstance(value, str):
            changes = (
                [value[:n] + chr(ord(value[n]) ^ 1) + value[n + 1 :] for n in (0, -1 % len(value))]
                if value
                else ["x"]
            )
        else:
            changes = [
                value[:n] + bytes([value[n] ^ 1]) + value[n + 1 :]
                for n in (0, len(value) // 2, len(value) - 1)
            ]
        for change in changes:
            sql(copy, f"UPDATE events SET {column} = ? WHERE seq = ?", (change, seq))
            with pytest.raises(JournalError, match=r"damaged|cannot be read|refused"):
                load_again(copy)
            sql(
                copy,
                f"UPDATE events SET {column} = ? WHERE seq = ?",
                (value, change if column == "seq" else seq),
            )
            found += 1
        load_again(copy)  # mended again: it was this byte
    assert found >= rows


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("body", "CAST(body AS TEXT)"),
        ("hash", "CAST(hash AS TEXT)"),
        ("body", "NULL || x'ff'"),
        ("kind", "CAST(x'ff' AS TEXT)"),
        ("hash", "zeroblob(32)"),
        ("key", "key || char(0)"),
        ("body", "x'7b7d'"),
    ],
)
def test_journal_with_a_column_of_another_type_or_text_is_damaged(path, column, value):
    written(path, history(1))
    db = sqlite3.connect(path)
    db.execute("PRAGMA ignore_check_constraints=ON")
    try:
        db.execute(f"UPDATE events SET {column} = {value} WHERE seq = 3")
    except sqlite3.IntegrityError:
        db.execute(f"UPDATE events SET {column} = x'00' WHERE seq = 3")
    db.commit()
    db.close()
    with pytest.raises(JournalError):
        load_again(path)


@pytest.mark.parametrize(
    "change",
    [
        "DELETE FROM events WHERE seq = 1",
        "DELETE FROM events WHERE seq = 4",
        "UPDATE events SET seq = 99 WHERE seq = 3",
        "INSERT INTO events SELECT seq + 1, ts_ns, 'order', key, '', body, hash FROM events WHERE seq = 7",
    ],
)
def test_journal_with_rows_lost_moved_or_added_is_damaged(path, change):
    written(path, history(1))
    sql(path, change)
    with pytest.raises(JournalError, match="hash chain"):
        load_again(path)


@pytest.mark.parametrize(
    "change",
    [
        "books = CAST(replace(CAST(books AS TEXT), '\"fills\":', '\"fillz\":') AS BLOB)",
        'books = CAST(replace(CAST(books AS TEXT), \'"position_qty":"\', \'"position_qty":"9\') AS BLOB)',
        "books = CAST(books AS TEXT)",
        "books = x'7b7d'",
        "books = x''",
        "hash = zeroblob(32)",
        "seq = seq - 1",
        "seq = seq + 1000",
    ],
)
def test_checkpoint_with_anything_changed_is_damaged(path, change):
    written(path, history(3), checkpoint_events=7)
    assert sql(path, "SELECT count(*) FROM checkpoints") == [(2,)]
    sql(path, f"UPDATE checkpoints SET {change} WHERE seq = (SELECT max(seq) FROM checkpoints)")
    with pytest.raises(JournalError, match=r"checkpoint \d+ does not belong"):
        load_again(path)


def test_checkpoint_with_events_behind_it_folds_as_the_whole(path):
    books = written(path, history(6), checkpoint_events=5)
    reader = JournalReader(path)
    assert reader.books().encode() == reader.verify().encode() == books.encode()
    reader.close()
    seqs = [row[0] for row in sql(path, "SELECT seq FROM checkpoints ORDER BY seq")]
    assert (
        seqs == [25, 30, 35] and len(seqs) == CHECKPOINTS_KEPT
    )  # older ones are pruned, all events are kept
    assert sql(path, "SELECT count(*) FROM events") == [(37,)]


def test_reader_that_may_not_write_reads_a_journal_closed_in_order_and_leaves_no_file(path, monkeypatch):
    books, before = written(path, history(6)), set(path.parent.iterdir())
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may anything
    reader = JournalReader(path)
    assert reader.books().encode() == books.encode() and set(path.parent.iterdir()) == before
    reader.close()


def test_checkpoint_of_a_release_with_other_fields_is_passed_over(path):
    older = folded(*history(3))
    older.layout, older.fills = 0, 99
    journal = opened(path, checkpoint_events=1)
    for event in history(3):
        journal.append(event)
    assert journal.checkpoint(older)
    journal.close()
    books = folded(*history(3))
    assert JournalReader(path).verify().encode() == books.encode()
    journal = opened(path, checkpoint_events=1, load=False)
    assert journal.load().encode() == books.encode()
    assert journal.checkpoint(books), "the next one is due at once"
    journal.close()


def test_journal_behind_the_checkpoint_of_another_release_is_told_of_while_it_is_read_once(path, monkeypatch):
    monkeypatch.setattr("bot.journal.TOLD_EVENTS", 10)
    older, told = folded(*history(6)), []
    older.layout -= 1
    journal = opened(path, checkpoint_events=30)
    for event in history(6):
        journal.append(event)
    assert journal.checkpoint(older)
    journal.close()
    journal = opened(path, checkpoint_events=30, load=False)
    books = journal.load(told.append)
    assert told == [10, 20, 30] and books.encode() == folded(*history(6)).encode()
    journal.append(received(signal(seq=7)))  # as the start does, at once
    books.apply(received(signal(seq=7)))
    journal.commit()
    assert journal.checkpoint(books)
    journal.close()
    journal = opened(path, checkpoint_events=30, load=False)
    assert journal.load(told.append).encode() == books.encode() and told == [10, 20, 30]
    journal.close()


def test_checkpoint_with_restarts_in_between_is_still_written_in_time(path):
    for seq in (1, 3, 5):  # three short runs together reach the number
        journal = opened(path, checkpoint_events=5, load=False)
        books = journal.load()
        for event in (received(signal(seq=seq)), received(signal(seq=seq + 1))):
            journal.append(event)
            books.apply(event)
        journal.commit()
        assert journal.checkpoint(books) is (seq == 5)
        journal.close()
    assert sql(path, "SELECT seq FROM checkpoints") == [(6,)]


def test_damage_before_the_checkpoint_is_found_by_the_full_fold_alone(path):
    books = written(path, history(3), checkpoint_events=7)
    sql(path, "UPDATE events SET ts_ns = ts_ns + 1 WHERE seq = 2")
    assert load_again(path).encode() == books.encode()
    with pytest.raises(JournalError, match="event 2 breaks"):
        JournalReader(path).verify()


@pytest.mark.parametrize(
    "garbage", [b"x" * 5_000, b"SQLite format 3\0" + b"\xff" * 5_000, os.urandom(20_000)]
)
def test_file_of_garbage_is_damaged_and_lets_go_of_the_lock(path, garbage):
    path.write_bytes(garbage)
    for _ in range(2):
        with pytest.raises(JournalError, match="damaged"):
            load_again(path)
    with pytest.raises(JournalError):
        JournalReader(path).books()
    assert path.read_bytes() == garbage  # evidence is kept


def test_file_cut_short_is_damaged_wherever_it_is_cut(path, tmp_path):
    whole = written(path, history(40)).encode()
    raw, cut = path.read_bytes(), tmp_path / "cut.db"
    assert not path.with_name("journal.db-wal").exists()
    damaged = 0
    for size in range(100, len(raw), max(1, len(raw) // 24) + 7):
        cut.write_bytes(raw[:size])
        try:
            assert load_again(cut).encode() == whole
        except JournalError:
            damaged += 1
    assert damaged >= 20


def test_file_with_bytes_flipped_anywhere_never_gives_other_books(path, tmp_path):
    whole = written(path, history(20)).encode()
    raw, bent = path.read_bytes(), tmp_path / "bent.db"
    for at in range(0, len(raw), len(raw) // 60):
        bent.write_bytes(raw[:at] + bytes([raw[at] ^ 0x41]) + raw[at + 1 :])
        try:
            assert load_again(bent).encode() == whole  # a byte nobody reads
        except (JournalError, ConfigError):
            pass


def left_by_a_crash(path, folder):
    """Return what a killed writer leaves behind, all of its three files, and the books it had."""
    journal, books = opened(path), folded()
    for event in history(6):
        books.apply(event)
        journal.append(event)
        journal.commit()
    files = {end: path.with_name(f"journal.db{end}").read_bytes() for end in ("", "-wal", "-tip")}
    journal.close()

    def left(**changed_files):
        for old in folder.glob("left.db*"):
            old.unlink()
        for end, raw in (files | changed_files).items():
            if raw is not None:
                (folder / f"left.db{end}").write_bytes(raw)
        return folder / "left.db"
    return left, files, books.encode()


def test_file_with_committed_events_damaged_in_the_write_ahead_log_is_damaged(path, tmp_path):
    # SQLite reads the log up to the first frame that is not whole, and says nothing of the rest.
    left, files, whole = left_by_a_crash(path, tmp_path)
    assert load_again(left()).encode() == whole
    refused, log = 0, files["-wal"]
    for at in range(0, len(log), len(log) // 30):
        for raw in (log[:at] + bytes([log[at] ^ 0x41]) + log[at + 1 :], log[:at] or None):
            try:
                assert load_again(left(**{"-wal": raw})).encode() == whole
            except (JournalError, ConfigError):
                refused += 1
    assert refused > 50
    with pytest.raises(JournalError, match="damaged"):
        JournalReader(left(**{"-wal": log[: len(log) // 2]})).verify()


def spoil(path):
    raw = bytearray(path.read_bytes())
    for at in range(100, len(raw), 500):
        raw[at] ^= 0xFF
    with open(path, "r+b") as file:
        file.write(raw)


def test_file_with_any_byte_of_its_first_page_flipped_is_whole_or_damaged_and_nothing_else(path):
    # Its schema is text there; sqlite3 quotes it in errors, and fails at that where it is none any more.
    whole, raw = written(path, history(2)).encode(), path.read_bytes()
    refused = 0
    for at in range(0, 4_096, 3):
        path.write_bytes(raw[:at] + bytes([raw[at] ^ 0xFF]) + raw[at + 1 :])
        try:
            assert load_again(path).encode() == whole
        except (JournalError, ConfigError):
            refused += 1
        with suppress(JournalError):
            assert JournalReader(path).books().encode() == whole, at
    assert refused > 100


def flip_the_newest(path):
    sql(path, "UPDATE events SET body = X'7B7D' WHERE seq = (SELECT max(seq) FROM events)")


def flip_one_before(path):
    sql(path, "UPDATE events SET ts_ns = ts_ns + 1 WHERE seq = (SELECT max(seq) - 150 FROM events)")


def forget_the_newest(path):
    sql(path, "DELETE FROM events WHERE seq = (SELECT max(seq) FROM events)")


@pytest.mark.parametrize("damage", [
    lambda path: [spoil(path), spoil(path.with_name("journal.db-wal"))],
    lambda path: spoil(path.with_name("journal.db-wal")),
    lambda path: path.unlink(), lambda path: path.write_bytes(b""), flip_the_newest, flip_one_before,
    forget_the_newest], ids=range(7))
def test_journal_that_breaks_under_its_writer_is_noticed_and_takes_nothing_more(path, damage):
    journal, events = opened(path), history(40)
    journal.look()
    for event in events:
        journal.append(event)
    journal.look()  # what is not committed is not looked for
    journal.commit()
    journal.look()
    damage(path)
    with pytest.raises(JournalError, match="damaged"):
        journal.look()
    with pytest.raises(JournalError, match="damaged"):
        journal.append(Started(epoch="e1", version="1", config="c"))
    with suppress(JournalError, sqlite3.Error):
        journal.close()


def test_journal_that_grows_for_long_is_looked_at_without_a_word(path):
    journal = opened(path, checkpoint_events=50)
    books = folded()
    for event in history(100):
        books.apply(event)
        journal.append(event)
        journal.commit()
        journal.checkpoint(books)
        journal.look()
    journal.close()


def test_look_at_a_long_journal_reads_its_newest_events_alone(path, monkeypatch):
    connect, steps, took = journal_module._connect, [], []

    def counted(*args):
        db = connect(*args)
        db.set_progress_handler(lambda: steps.append(1), 100)  # of SQLite's virtual machine
        return db

    journal, events = opened(path), history(1_500)
    monkeypatch.setattr(journal_module, "_connect", counted)
    for part in (events[:LOOK_EVENTS * 2], events[LOOK_EVENTS * 2:]):
        for event in part:
            journal.append(event)
        journal.commit()
        steps.clear()
        journal.look()
        took.append(len(steps))
    journal.close()
    assert 0 < took[1] <= took[0] + 5, took


@pytest.mark.parametrize("tip", [None, b"", b"x", b"7 8\n", b"\xff" * 40])
def test_file_with_a_tip_that_says_nothing_is_read_without(path, tmp_path, tip):
    left, _, whole = left_by_a_crash(path, tmp_path)
    assert load_again(left(**{"-tip": tip})).encode() == whole


@pytest.mark.parametrize(
    "change", [{"account": "other"}, {"url": "http://y"}, {"exchange": "okx"}, {"schema": "2"}]
)
def test_journal_of_another_account_is_refused_and_lets_go_of_the_lock(path, change):
    written(path, history(1))
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"journal\.path: this journal belongs to"):
            opened(path, **change)
    load_again(path)


def test_second_writer_is_refused_while_the_first_lives(path):
    first = opened(path)
    with pytest.raises(ConfigError, match=r"journal\.lock is held by another executor"):
        opened(path)
    assert int(path.with_suffix(".lock").read_text()) == os.getpid()
    first.close()
    opened(path).close()


@pytest.mark.parametrize("make", ["directory", "parent_file", "lock_directory"])
def test_path_that_can_hold_no_file_is_a_config_error(tmp_path, make):
    path = tmp_path / "sub" / "journal.db"
    if make == "directory":
        path.mkdir(parents=True)
    elif make == "parent_file":
        (tmp_path / "sub").write_text("")
    else:
        path.with_suffix(".lock").mkdir(parents=True)
    with pytest.raises(ConfigError, match=r"journal\.path"):
        opened(path)


@pytest.mark.parametrize("name", ["a?mode=ro", "a#b", "%41", "sp ace", "ü"])
def test_path_with_characters_of_an_address_is_a_plain_file(tmp_path, name):
    path = tmp_path / name / f"{name}.db"
    written(path, history(1))
    assert path.stat().st_size > 0
    assert JournalReader(path).counts()["signal"] == 1


def test_reader_without_a_journal_says_so(path):
    with pytest.raises(JournalError, match="no journal yet"):
        JournalReader(path)


def test_epoch_of_another_executor_fences_the_next_intent(path):
    journal = opened(path)
    journal.append(received(signal()))
    journal.append(intended("o1"))
    journal.commit()
    sql(
        path, "INSERT OR REPLACE INTO meta VALUES ('epoch', 'e2')"
    )  # a second one began, whatever the lock says
    with pytest.raises(JournalError, match=r"epoch e1 is over.*in epoch e2"):
        journal.append(intended("o2"))
    with pytest.raises(JournalError, match="was not written"):
        journal.commit()
    journal.close()
    assert sql(path, "SELECT key FROM events") == [("levels/7/1",), ("o1",)]


def test_intent_before_an_epoch_began_is_refused(path):
    journal = opened(path, load=False)
    journal.load()
    with pytest.raises(JournalError, match=r"\(none\)"):
        journal.append(intended("o1"))
    journal.close()


def test_epoch_of_another_executor_waits_for_the_commit_of_an_intent(path):
    journal = opened(path)
    journal.append(intended("o1"))
    other = sqlite3.connect(path, timeout=0.05)
    with pytest.raises(sqlite3.OperationalError, match="locked"):
        other.execute("INSERT OR REPLACE INTO meta VALUES ('epoch', 'e2')")
    journal.commit()
    other.execute("INSERT OR REPLACE INTO meta VALUES ('epoch', 'e2')")
    other.commit()
    other.close()
    journal.close()


def test_journal_with_full_disk_commits_nothing_of_the_batch_and_writes_no_more(path):
    journal = opened(path)
    journal.append(received(signal(seq=1)))
    journal.commit()
    pages = journal._db.execute("PRAGMA page_count").fetchone()[0]
    journal._db.execute(f"PRAGMA max_page_count={pages + 2}")
    with pytest.raises(JournalError, match="full"):
        for seq in range(2, 200):
            journal.append(received(signal(seq=seq, reason="x" * 500)))
    for again in (
        lambda: journal.append(changed("o1", "lose")),
        journal.commit,
        lambda: journal.begin_epoch("e2"),
    ):
        with pytest.raises(JournalError, match="was not written, because before"):
            again()
    journal.close()
    assert [s.id for s in load_again(path).book(BTC).signals] == ["levels/7/1"]


def run_writer(path, body, *, wait=True):
    """Run Python with an open journal and `history` at hand, in a process of its own."""
    code = textwrap.dedent(f"""
        import os, resource, signal as signals, sys, time
        from pathlib import Path
        from bot.errors import JournalError
        from tests.factory import *
        from tests.unit.test_journal import history, opened
        path = Path({str(path)!r})
        """) + textwrap.dedent(body)
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if wait:
        out, _ = process.communicate(timeout=30)
        return process.returncode, out
    return process


def test_writer_with_file_size_limit_reached_says_so_and_the_chain_holds(path):
    # The kernel refuses the write itself, as on a full disk: in an append, or in a commit.
    code, out = run_writer(
        path,
        """
        signals.signal(signals.SIGXFSZ, signals.SIG_IGN)
        journal = opened(path)
        journal.append(received(signal(seq=1)))
        journal.commit()
        resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
        done = 1
        try:
            for seq in range(2, 5_000):
                journal.append(received(signal(seq=seq, reason="x" * 900)))
                journal.commit()
                done = seq
        except JournalError as error:
            print(done, error)
        try:
            journal.append(received(signal(seq=9_999)))
        except JournalError:
            journal.close()
            print("closed")
        """,
    )
    done, said = out.splitlines()[0].split(" ", 1)
    assert code == 0 and out.splitlines()[1] == "closed" and "is the disk full?" in said
    books = load_again(path)
    assert 1 < int(done) < 4_999
    assert [s.signal.seq for s in books.book(BTC).signals] == list(range(1, int(done) + 1))


@pytest.mark.parametrize(
    ("moment", "events"),
    [
        ("journal.append(a)", 0),
        ("journal.append(a); journal.commit()", 1),
        ("journal.append(a); journal.commit(); journal.append(b)", 1),
        ("journal.append(a); journal.commit(); journal.append(b); journal.commit()", 2),
        ("journal.append(a); journal.append(b); journal.commit()", 2),
    ],
)
def test_writer_with_kill_9_keeps_what_was_committed_and_nothing_else(path, moment, events):
    code, _ = run_writer(
        path,
        f"""
        journal = opened(path)
        a, b = received(signal(seq=1)), received(signal(seq=2))
        {moment}
        os.kill(os.getpid(), signals.SIGKILL)
        """,
    )
    assert code == -signals.SIGKILL
    assert path.with_name("journal.db-wal").exists()  # nothing was tidied up
    journal = opened(path, load=False)  # the lock went with the process
    books = journal.load()
    assert [s.signal.seq for s in books.book(BTC).signals] == list(range(1, events + 1))
    journal.begin_epoch("e2")
    journal.append(received(signal(seq=3)))
    journal.commit()
    journal.close()
    assert JournalReader(path).verify().signals == events + 1


def test_writer_with_kill_9_at_any_time_loses_at_most_what_it_had_not_told(path):
    for life in range(4):
        process = run_writer(
            path,
            f"""
            journal = opened(path, checkpoint_events=25, load=False)
            books = journal.load()
            journal.begin_epoch("life{life}")
            for seq in range(books.signals + 1, 10_000):
                for event in (received(signal(seq=seq)), intended(f"o{{seq}}", signal=f"levels/7/{{seq}}"),
                              changed(f"o{{seq}}", "reject")):
                    books.apply(event)
                    journal.append(event)
                journal.commit()
                journal.checkpoint(books)
                print(seq, flush=True)
            """,
            wait=False,
        )
        told = [process.stdout.readline() for _ in range(30 + 11 * life)]
        process.kill()
        told += process.stdout.readlines()
        process.wait()
        whole = [int(line) for line in told if line.endswith("\n")]
        books = load_again(path)
        assert whole[-1] <= books.signals <= whole[-1] + 1
        assert books.signals == len(books.book(BTC).signals) == books.orders
        reader = JournalReader(path)
        assert reader.verify().encode() == books.encode()
        reader.close()


def test_reader_beside_a_writer_sees_what_was_committed_and_never_half(path):
    journal, done = opened(path, checkpoint_events=20), threading.Event()
    books, faults, seen = folded(), [], []
    journal.append(received(signal(seq=1)))
    journal.commit()
    books.apply(received(signal(seq=1)))

    def read():
        reader = JournalReader(path)
        while not done.is_set():
            view = reader.books()
            if view.orders != max(0, view.signals - 1):
                faults.append((view.orders, view.signals))
            seen.append(view.signals)
        reader.close()

    thread = threading.Thread(target=read)
    thread.start()
    for seq in range(2, 150):
        for event in (
            received(signal(seq=seq)),
            intended(f"o{seq}", signal=f"levels/7/{seq}"),
            changed(f"o{seq}", "reject"),
        ):
            books.apply(event)
            journal.append(event)
        journal.commit()
        journal.checkpoint(books)
    wait_until(lambda: seen and seen[-1] == 149)
    done.set()
    thread.join()
    journal.close()
    assert not faults and seen == sorted(seen)


def test_reader_with_uncommitted_events_does_not_see_them(path):
    journal, reader = opened(path), JournalReader(path)
    journal.append(received(signal()))
    assert reader.books().signals == 0 and reader.find("signal", "levels/7/1") is None
    journal.commit()
    assert reader.books().signals == 1 and reader.find("signal", "levels/7/1") is not None
    with pytest.raises(sqlite3.OperationalError, match="readonly"):
        reader._db.execute("DELETE FROM events")
    reader.close()
    journal.close()


def test_reader_with_stories_and_newest_tells_them_in_sequence(path):
    written(path, history(3))
    reader = JournalReader(path)
    assert [type(e.event).__name__ for e in reader.story("levels/7/2")] == [
        "SignalReceived",
        "OrderIntended",
        "ExitsSet",
        "SignalClosed",
    ]
    assert [e.seq for e in reader.newest("signal", 2)] == [14, 8]
    assert all(e.ts_ns == NOW for e in reader.newest("signal", 9))
    assert len(reader.newest("signal", 9)) == 3
    reader.close()


def test_journal_with_its_settings_syncs_fully_and_writes_ahead(path):
    journal = opened(path)
    assert journal._db.execute("PRAGMA synchronous").fetchone() == (2,)
    assert journal._db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    journal.close()


def test_close_with_appended_events_commits_them(path):
    journal = opened(path)
    journal.append(received(signal()))
    journal.close()
    assert load_again(path).signals == 1
