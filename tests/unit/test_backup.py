"""Backups: what is proven, what is noticed, what stays, and what a restore refuses."""

import subprocess
from contextlib import closing

import pytest

from bot import botctl
from bot.backup import UNREADABLE, Backups, new_key, read_key, told, unseal
from bot.config_file import load
from bot.errors import ConfigError, RefusedError
from bot.events import Halted, Started
from bot.halt import HaltFiles
from bot.journal import Journal, JournalReader, take_lock
from bot.restore import restore
from tests.factory import NOW, SECOND, HandClock
from tests.harness import write_config

PRIVATE, RECIPIENT = new_key()


class Host:
    """A host with a journal of its own; time goes by hand."""

    def __init__(self, path, **backup):
        path.mkdir()
        self.config = load(write_config(
            path, backup={"recipient": RECIPIENT, **backup},
            exchange={"rest_url": "http://127.0.0.1:1", "ws_url": "ws://127.0.0.1:1", "sapi_url": ""}))
        self.clock, self.path = HandClock(), self.config.path(self.config.journal.path)
        self.folder = self.config.path("backup")

    def write(self, *events):
        journal = Journal(self.path, self.clock, identity=self.config.identity(), checkpoint_events=3)
        books = journal.load()
        for event in events:
            books.apply(event)
            journal.append(event)
        journal.commit()
        journal.checkpoint(books)
        journal.close()

    def backup(self):
        self.clock.step(60)
        self.write(Started(epoch="e", version="1", config="c"))
        return Backups(self.config, self.clock).run()

    def sealed(self):
        return sorted(self.folder.glob("*.age"))

    def told(self):
        return told(self.config, self.clock)


@pytest.fixture
def host(tmp_path):
    made = Host(tmp_path / "old")
    made.write(*[Started(epoch=f"e{n}", version="1", config="c") for n in range(5)])
    return made


@pytest.fixture
def other(tmp_path):
    return Host(tmp_path / "new")


def test_backup_with_its_key_alone_gives_the_whole_chain_back(host, tmp_path):
    status = host.backup()
    assert status.is_good and status.newest.events == 6
    sealed, = host.sealed()
    with closing(JournalReader(host.path)) as reader:
        _, events, last_hash = reader.verified()
    assert unseal(sealed, read_key(PRIVATE), tmp_path / "back.db") == (host.clock.wall, events, last_hash)
    assert b"SQLite" not in sealed.read_bytes()
    with pytest.raises(UNREADABLE):
        unseal(sealed, read_key(new_key()[0]), tmp_path / "not.db")
    assert not list(host.folder.glob(".work-*")), "no copy in the clear stays"


@pytest.mark.parametrize("where", [0, 200, -1])
def test_backup_with_one_byte_changed_is_damaged_until_it_is_removed(host, where):
    host.backup()
    sealed, = host.sealed()
    raw = bytearray(sealed.read_bytes())
    raw[where] ^= 1
    sealed.write_bytes(raw)
    for _ in range(2):  # each night anew, and the next one is made all the same
        status = host.backup()
        assert status.damaged == [sealed.stem] and not status.error and status.newest.name != sealed.stem
    assert not host.told()["is_good"] and sealed.stem in host.told()["text"]


@pytest.mark.parametrize("suffix", [".age", ".json"])
def test_backup_with_a_half_gone_is_damaged(host, suffix):
    host.backup()
    sealed, = host.sealed()
    sealed.with_suffix(suffix).unlink()
    assert host.backup().damaged == [sealed.stem]


def test_backup_of_a_damaged_journal_fails_and_removes_nothing(tmp_path):
    host = Host(tmp_path / "old", kept=2)
    host.write(*[Started(epoch=f"e{n}", version="1", config="c") for n in range(5)])
    for _ in range(2):
        host.backup()
    kept = host.sealed()
    raw = host.path.read_bytes()
    at = raw.index(b'"epoch":"e3"')
    host.path.write_bytes(raw[:at + 9] + b"x" + raw[at + 10:])
    host.clock.step(60)
    status = Backups(host.config, host.clock).run()
    assert "hash chain" in status.error and host.sealed() == kept
    assert not host.told()["is_good"] and host.told()["newest"] == kept[-1].stem


def test_backups_with_more_than_are_kept_lose_the_oldest_whole_ones(tmp_path):
    host = Host(tmp_path / "old", kept=3)
    host.write(Started(epoch="e", version="1", config="c"))
    names = []
    for night in range(5):
        names.append(host.backup().newest.name)
        if night == 2:  # a damaged one takes nobody's place
            host.sealed()[-1].write_bytes(b"")
    assert [p.stem for p in host.sealed()] == [names[1], names[2], *names[3:]]
    assert {p.stem for p in host.folder.glob("journal-*.json")} == {p.stem for p in host.sealed()}


def test_backups_with_their_size_bounded_keep_the_newest_always(tmp_path, monkeypatch):
    monkeypatch.setattr("bot.backup.MB", 1)  # a bound of some bytes
    host = Host(tmp_path / "old", size_mb_max=1)
    for _ in range(3):
        status = host.backup()
        assert status.is_good and [p.stem for p in host.sealed()] == [status.newest.name]


def test_backups_that_are_old_or_were_never_made_are_told(host):
    assert host.told()["is_old"] and not host.told()["is_good"]
    host.backup()
    host.clock.step(26 * 3_600)
    assert host.told() | {"is_old": False, "is_good": True, "age_s": 26 * 3_600} == host.told()
    host.clock.step(1)
    assert host.told()["is_old"]
    (host.folder / "status.json").write_bytes(b"{")
    assert host.told()["is_old"] and not host.told()["is_good"]


def test_backup_without_room_for_it_leaves_the_room_to_trading(host, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1_000_000_000}))
    status = host.backup()
    assert "MB free" in status.error and not host.sealed()


def test_second_backup_at_once_and_leftovers_of_a_killed_one(host):
    host.backup()
    left = host.folder / ".work-killed"
    left.mkdir()
    (left / "copy.db").write_bytes(b"x")
    with Backups(host.config, host.clock)._locked(), pytest.raises(RefusedError, match="another"):
        Backups(host.config, host.clock).run()
    assert host.backup().is_good and not left.exists()


def test_restore_puts_the_journal_there_halted_and_marked(host, other):
    host.write(Halted(scope="strategy:levels", who="ann", why="lunch"))
    host.backup()
    lacks_since_ns = host.clock.wall
    other.clock.wall = NOW + 10_000 * SECOND
    _, halts = restore(other.config, other.clock, host.sealed()[0], PRIVATE, who="ann")
    assert halts == ["all", "strategy:levels"]
    assert {h.scope for h in HaltFiles(other.config.path("halt")).list()} == {"all", "strategy:levels"}
    with closing(JournalReader(other.path)) as reader:
        books, events, _ = reader.verified()
    assert events == 8 and (books.lacks_since_ns, books.restored_ns) == (lacks_since_ns, other.clock.wall)
    assert not list(other.path.parent.glob(".work-*"))


def test_restore_over_a_journal_sets_it_aside_with_all_its_files(host, other):
    host.backup()
    other.write(Started(epoch="mine", version="1", config="c"))
    other.path.with_name("journal.db-wal").write_bytes(b"of the old one")
    with pytest.raises(RefusedError, match="--replace"):
        restore(other.config, other.clock, host.sealed()[0], PRIVATE, who="ann")
    restore(other.config, other.clock, host.sealed()[0], PRIVATE, who="ann", is_replacing=True)
    aside = sorted(p.name.partition(".replaced-")[2].lstrip("0123456789") for p in
                   other.path.parent.glob("journal.db.replaced-*"))
    assert aside == ["", "-tip", "-wal"]
    with closing(JournalReader(other.path)) as reader:
        assert reader.verified()[1] == 7


def test_restore_without_a_backup_begins_an_empty_journal_halted_and_marked(other):
    other.write(Started(epoch="mine", version="1", config="c"))
    other.path.write_bytes(b"damaged")
    with pytest.raises(RefusedError, match="--replace"):
        restore(other.config, other.clock, None, "", who="ann")
    event, halts = restore(other.config, other.clock, None, "", who="ann", is_replacing=True)
    assert halts == ["all"] and "empty" in HaltFiles(other.config.path("halt")).list()[0].why
    with closing(JournalReader(other.path)) as reader:
        assert reader.newest("restored", 1)[0].event == event
        books, events, _ = reader.verified()
    # Nothing is taken in from before: an order of ours that rests is a second instance's, and halts.
    assert (events, books.lacks_since_ns, books.restored_ns, books.symbols) == (1, 0, 0, {})
    assert [p.read_bytes() for p in other.path.parent.glob("journal.db.replaced-*")
            if not p.name.endswith("-tip")] == [b"damaged"]


@pytest.mark.parametrize("words", [[], ["x"], ["--key", "k"], ["--empty", "x"], ["--empty", "--key", "k"],
                                   ["--empty", "x", "--key", "k"]])
def test_restore_with_half_of_what_it_needs_is_wrong_usage(host, tmp_path, words, capsys):
    assert botctl.main(["restore", *words, "--config", str(tmp_path / "old" / "bot.toml")]) == 2
    assert "FILE and --key KEY, or --empty" in capsys.readouterr().err


def test_restore_with_anything_wrong_changes_nothing(host, other, tmp_path):
    host.backup()
    sealed, = host.sealed()
    cut = tmp_path / "cut.age"
    cut.write_bytes(sealed.read_bytes()[:-10])
    for file, key in ((cut, PRIVATE), (sealed, new_key()[0]), (tmp_path / "none", PRIVATE), (sealed, "x")):
        with pytest.raises(RefusedError):
            restore(other.config, other.clock, file, key, who="ann")
    lock = take_lock(other.path)
    with pytest.raises(ConfigError, match="another executor"), closing(open(lock)):
        restore(other.config, other.clock, sealed, PRIVATE, who="ann")
    assert not other.path.exists() and not HaltFiles(other.config.path("halt")).list()


def test_restore_of_another_accounts_backup_is_refused(host, tmp_path):
    host.backup()
    (tmp_path / "foreign").mkdir()
    foreign = load(write_config(tmp_path / "foreign"))
    with pytest.raises(ConfigError, match="belongs to url"):
        restore(foreign, host.clock, host.sealed()[0], PRIVATE, who="ann")
    assert not foreign.path(foreign.journal.path).exists()


def test_backup_is_read_by_the_age_command_line_too(host, tmp_path):
    # The format is public: with this software gone, Debian's own `age` opens it.
    host.backup()
    (tmp_path / "key").write_text(PRIVATE)
    try:
        done = subprocess.run(["age", "-d", "-i", tmp_path / "key", host.sealed()[0]], capture_output=True)
    except FileNotFoundError:
        pytest.skip("the Debian package age is not installed")
    assert done.returncode == 0 and done.stdout[:2] == b"\x1f\x8b"


def test_key_with_anything_else_in_its_file_is_refused():
    assert read_key(f"# created by age-keygen\n{PRIVATE}\n")
    for text in ("", RECIPIENT, "AGE-SECRET-KEY-1"):
        with pytest.raises(RefusedError, match="AGE-SECRET-KEY-"):
            read_key(text)


def test_backup_without_a_recipient_says_how_to_get_one(tmp_path):
    host = Host(tmp_path / "old", recipient="")
    assert host.told() is None
    with pytest.raises(RefusedError, match="botctl backup key"):
        Backups(host.config, host.clock).run()


