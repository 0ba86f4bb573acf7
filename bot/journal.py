"""The executor's memory: append-only events in a hash chain, SQLite in WAL with full syncs.

One writer, under a file lock. What was committed survives a power cut; what was not was never
acted on. A start folds from the newest checkpoint; damage to it or behind it is an error, never
skipped. Edge to sqlite3.
"""

import fcntl
import hashlib
import os
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import msgspec

from bot.books import Books
from bot.clock import Clock
from bot.config import Config
from bot.errors import ConfigError, IllegalTransition, InvariantError, JournalError
from bot.events import ONCE, JournalEvent

SCHEMA_VERSION = 1  # readable by this release and the one before
BUSY_MS = 2_000  # readers never hold a write lock; this covers a checkpoint of the WAL
CHECKPOINTS_KEPT = 3
# Beside the journal: the last event that was committed. SQLite ends a write-ahead log at its first frame
# that is not whole, and says nothing (sqlite.org/fileformat2.html#walformat): a lost tail shows here.
TIP, TIP_BYTES = "-tip", 64
LOOK_EVENTS = 200  # of the newest, verified while the executor runs: some ms
NEWEST_EVENTS = 100_000  # among which the newest of a kind are looked for, each second by an open page
TOLD_EVENTS = 20_000  # folded between two words of it: half a second

_SCHEMA = f"""
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS events (
    seq INTEGER PRIMARY KEY, ts_ns INTEGER NOT NULL, kind TEXT NOT NULL, key TEXT NOT NULL,
    story TEXT NOT NULL, body BLOB NOT NULL, hash BLOB NOT NULL);
CREATE UNIQUE INDEX IF NOT EXISTS once ON events (kind, key) WHERE kind IN {ONCE};
CREATE INDEX IF NOT EXISTS stories ON events (story) WHERE story != '';
CREATE TABLE IF NOT EXISTS checkpoints (
    seq INTEGER PRIMARY KEY, hash BLOB NOT NULL, books BLOB NOT NULL);
"""
_GENESIS = b"tradehost journal"
_decoder = msgspec.json.Decoder(JournalEvent)


class Entry(msgspec.Struct, frozen=True):
    """One event as it stands in the journal."""

    seq: int
    ts_ns: int
    event: JournalEvent


class Journal:
    """The one writer. Open it, then `load`; `append` buffers, `commit` makes durable."""

    def __init__(self, path: Path, clock: Clock, *, identity: dict[str, str],
                 checkpoint_events: int) -> None:
        """Take the lock and open.

        Raises ConfigError: locked, no place for a file, or of another account; JournalError: damaged.
        """
        self._path, self._clock = path, clock
        self._checkpoint_events = checkpoint_events
        self._lock = take_lock(path)
        self._seq, self._hash, self._checkpoint_seq = 0, _GENESIS, 0
        self._committed = 0, _GENESIS
        self._epoch = ""
        self._failed = "it was not loaded"  # or what went wrong when writing; nothing is written after it
        try:
            with _damage(path):
                self._db = _connect(path, "rwc")
                for pragma in ("journal_mode=WAL", "synchronous=FULL", "wal_autocheckpoint=1000"):
                    self._db.execute(f"PRAGMA {pragma}")
                self._db.executescript(_SCHEMA)
                self._stamp({"schema": str(SCHEMA_VERSION), **identity})
                self._tip = os.open(path.with_name(path.name + TIP), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC,
                                    0o644)
        except (ConfigError, JournalError):
            os.close(self._lock)
            raise

    def load(self, tell: Callable[[int], None] = lambda seq: None) -> Books:
        """Return the books, folded from the newest checkpoint. Raises JournalError on damage.

        tell: hears now and then which event is folded: all of them, behind the checkpoint of another release.
        """
        with _damage("journal"):
            self._checkpoint_seq, books, self._seq, self._hash = _fold(self._db, tell=tell)
        _check_tip(os.pread(self._tip, TIP_BYTES, 0), self._seq)
        self._committed, self._failed = (self._seq, self._hash), ""
        return books

    def begin_epoch(self, epoch: str) -> None:
        """Fence every earlier executor: its next intent is refused."""
        with self._writing(f"epoch {epoch}"):
            self._db.execute("INSERT OR REPLACE INTO meta VALUES ('epoch', ?)", (epoch,))
            self._db.commit()
        self._epoch = epoch

    def append(self, event: JournalEvent) -> None:
        """Add to the open transaction. Raises JournalError; then nothing of it will be committed.

        Refused are: a second of a kind in ONCE, an intent of an epoch that is over, and what could not
        be read back.
        """
        kind = str(event.__struct_config__.tag)
        body, ts_ns = msgspec.json.encode(event), self._clock.wall_ns()
        row = (self._seq + 1, ts_ns, kind, event.key, event.story, body)
        row_hash = _chain(self._hash, *row)
        with self._writing(f"{kind} {event.key[:100]}"):
            _decoder.decode(body)
            if not self._db.in_transaction:
                self._db.execute("BEGIN IMMEDIATE")  # so that no epoch begins between check and commit
            if kind == "intent":
                self._check_epoch()
            self._db.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?, ?, ?)", (*row, row_hash))
        self._seq += 1
        self._hash = row_hash

    def commit(self) -> None:
        """Return when everything appended is on the disk. Raises JournalError; then nothing is."""
        with self._writing("commit"):
            self._db.commit()
            # Not synced: after a power cut it may be older than the journal, and never newer.
            os.pwrite(self._tip, b"%d %d\n" % (self._seq, self._seq), 0)
        self._committed = self._seq, self._hash

    def look(self) -> None:
        """Read the newest events as whoever starts next will find them; nothing is written to what broke.

        SQLite's own cache hides from us what becomes of the file below. Raises JournalError.
        """
        with self._writing("look"), _damage("journal"), closing(_connect(self._path, "ro")) as db:
            seq = max(0, self._committed[0] - LOOK_EVENTS)
            row = db.execute("SELECT hash FROM events WHERE seq = ?", (seq,)).fetchone()
            found = seq, row[0] if row is not None and _is_bytes(*row) else _GENESIS
            for seq, _, row_hash in _verified(db, *found):
                found = seq, row_hash
            if found != self._committed:
                raise JournalError(f"the journal ends at event {found[0]}, and {self._committed[0]} were "
                                   "committed: it is damaged; restore a backup and reconcile")

    def checkpoint(self, books: Books) -> bool:
        """Write the folded books when enough events have come since the last time."""
        if self._seq - self._checkpoint_seq < self._checkpoint_events:
            return False
        raw = books.encode()
        with self._writing("checkpoint"):
            self._db.execute("INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?)",
                             (self._seq, _seal(self._hash, raw), raw))
            self._db.execute("DELETE FROM checkpoints WHERE seq NOT IN "
                             "(SELECT seq FROM checkpoints ORDER BY seq DESC LIMIT ?)", (CHECKPOINTS_KEPT,))
            self._db.commit()
        self._checkpoint_seq = self._seq
        return True

    def has(self, kind: str, key: str) -> bool:
        """Return whether an event of a kind in ONCE is there, committed or not."""
        return self.find(kind, key) is not None

    def find(self, kind: str, key: str) -> JournalEvent | None:
        """Return the event of a kind in ONCE with this key."""
        with _damage("journal"):
            return _find(self._db, kind, key)

    def close(self) -> None:
        """Commit what was appended, unless writing failed; close, and let go of the lock."""
        try:
            if not self._failed:
                self.commit()
        finally:
            self._db.close()
            os.close(self._tip)
            os.close(self._lock)

    @contextmanager
    def _writing(self, what: str) -> Iterator[None]:
        # After a failed write or sync nobody knows what is on the disk: whoever starts next looks.
        if self._failed:
            raise JournalError(f"journal: {what} was not written, because before: {self._failed}")
        try:
            yield
        except (OSError, UnicodeError, sqlite3.Error, msgspec.MsgspecError, JournalError) as error:
            self._failed = str(error)
            with suppress(sqlite3.Error):
                self._db.rollback()
            hint = "; is the disk full?" if isinstance(error, sqlite3.OperationalError) else ""
            raise JournalError(f"journal: {what} was refused: {error}{hint}") from None

    def _check_epoch(self) -> None:
        row = self._db.execute("SELECT value FROM meta WHERE name = 'epoch'").fetchone()
        if not self._epoch or row != (self._epoch,):
            raise JournalError(f"this executor's epoch {self._epoch or '(none)'} is over: the journal is "
                               f"in epoch {row[0] if row else '(none)'}; a second executor was started")

    def _stamp(self, identity: dict[str, str]) -> None:
        # A journal belongs to one exchange, URL and account for life.
        for name, value in identity.items():
            row = self._db.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
            if row is None:
                self._db.execute("INSERT INTO meta VALUES (?, ?)", (name, value))
            elif row[0] != value:
                raise ConfigError(f"journal.path: this journal belongs to {name} {row[0]}, the config says "
                                  f"{value}; give the other account a journal of its own")
        self._db.commit()


class JournalReader:
    """Reads a journal beside its writer, for botctl. Sees what was committed."""

    def __init__(self, path: Path) -> None:
        """Open read-only. Raises JournalError when there is no journal yet."""
        if not path.is_file():
            raise JournalError(f"{path}: there is no journal yet; has the executor been started?")
        self._tip = path.with_name(path.name + TIP)
        with _damage(path):
            # Closed in order it has no -wal, and who may not make one reads the file as it stands.
            has_wal = path.with_name(f"{path.name}-wal").exists()
            is_still = not has_wal and not os.access(path.parent, os.W_OK)
            self._db = _connect(path, "ro&immutable=1" if is_still else "ro")
            made = self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'checkpoints'").fetchone()
        if made is None:  # the writer makes this table last
            raise JournalError(f"{path}: the journal is only just being made; ask again")

    def books(self) -> Books:
        """Return the books folded up to now. Raises JournalError on damage."""
        tip = self._tip.read_bytes() if self._tip.exists() else b""  # before the rest: it grows meanwhile
        with _damage("journal"):
            _, books, seq, _ = _fold(self._db)
        _check_tip(tip, seq)
        return books

    def verify(self) -> Books:
        """Return the books folded from the first event on. Raises JournalError on damage anywhere."""
        return self.verified()[0]

    def verified(self) -> tuple[Books, int, str]:
        """Return them with the last event's number and hash, which stands for the whole chain."""
        tip = self._tip.read_bytes() if self._tip.exists() else b""
        with _damage("journal"):
            self._db.execute("BEGIN")  # both folds see the same moment of a journal that grows
            _, books, seq, row_hash = _fold(self._db, from_checkpoint=False)
            if _fold(self._db)[1].encode() != books.encode():
                raise JournalError("the checkpoint and the events before it say different things: the "
                                   "journal is damaged; restore a backup and reconcile")
            self._db.rollback()
        _check_tip(tip, seq)
        return books, seq, row_hash.hex()

    def copy_to(self, path: Path) -> None:
        """Copy the journal as it is now into a new file, while its writer writes on (sqlite.org/backup.html).

        All at once: a copy in steps begins anew with each commit of another process.
        """
        with _damage(path), closing(_connect(path, "rwc")) as copy:
            self._db.backup(copy)
            copy.execute("PRAGMA journal_mode=DELETE")  # one file, without a -wal beside it

    def last_ns(self) -> int:
        """Return the time of the last event, 0 when there is none."""
        newest = self._entries("seq > 0 ORDER BY seq DESC LIMIT 1")
        return newest[0].ts_ns if newest else 0

    def find(self, kind: str, key: str) -> JournalEvent | None:
        """Return the event of a kind in ONCE with this key."""
        with _damage("journal"):
            return _find(self._db, kind, key)

    def story(self, story: str) -> list[Entry]:
        """Return all events of a story, in the sequence they happened."""
        return self._entries("story != '' AND story = ? ORDER BY seq", story)  # as the index has it

    def order_story(self, order: str, symbol: str) -> list[Entry]:
        """Return all events of an order that no signal stands behind; its fills are kept with its symbol."""
        return self._entries(
            "kind IN ('intent', 'order', 'answered') AND key = ? OR kind = 'fill' AND story = ? "
            "AND json_extract(CAST(body AS TEXT), '$.client_order_id') = ? ORDER BY seq",
            order, symbol, order)

    def newest(self, kind: str, count: int) -> list[Entry]:
        """Return the newest events of a kind, the newest first, of the last NEWEST_EVENTS events."""
        return self._entries("kind = ? AND seq > (SELECT max(seq) FROM events) - ? ORDER BY seq DESC LIMIT ?",
                             kind, NEWEST_EVENTS, count)

    def since(self, ts_ns: int) -> Iterator[Entry]:
        """Yield all events from a time on, in the sequence they happened."""
        with _damage("journal"):
            rows = self._db.execute("SELECT seq, ts_ns, body FROM events WHERE ts_ns >= ? ORDER BY seq",
                                    (ts_ns,))
            for seq, at_ns, body in rows:
                yield Entry(seq, at_ns, _decoder.decode(body))

    def counts(self) -> dict[str, int]:
        """Return how many events there are of each kind."""
        with _damage("journal"):
            return dict(self._db.execute("SELECT kind, count(*) FROM events GROUP BY kind"))

    def stranger_to(self, config: Config) -> str:
        """Return what of the journal's identity is not the configuration's, in words; "" when it is."""
        with _damage("journal"):
            stamped = dict(self._db.execute("SELECT name, value FROM meta"))
        return "; ".join(f"it belongs to {name} {stamped[name]}, the config says {value}"
                         for name, value in config.identity().items() if stamped.get(name, value) != value)

    def close(self) -> None:
        self._db.close()

    def _entries(self, where: str, *values: str | int) -> list[Entry]:
        with _damage("journal"):
            rows = self._db.execute(f"SELECT seq, ts_ns, body FROM events WHERE {where}", values)
            return [Entry(seq, ts_ns, _decoder.decode(body)) for seq, ts_ns, body in rows]


def take_lock(path: Path) -> int:
    """Return a handle on the lock beside the journal; whoever holds it is the one executor.

    Raises ConfigError when another process holds it, or no file can be there.
    """
    lock = path.with_suffix(".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise ConfigError(f"journal.path: {lock} cannot be opened: {error.strerror}") from None
    if path.is_dir():
        raise ConfigError(f"journal.path: must be a file, was the directory {path}")
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise ConfigError(f"journal.path: {lock} is held by another executor; only one may run") from None
    os.truncate(handle, 0)
    os.write(handle, f"{os.getpid()}\n".encode())  # guard finds here whom to end
    return handle


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    return sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=BUSY_MS / 1_000)


@contextmanager
def _damage(what: Path | str) -> Iterator[None]:
    try:
        yield
    except (OSError, UnicodeError, sqlite3.Error, msgspec.MsgspecError, IllegalTransition,
            InvariantError) as error:  # sqlite3's own messages quote what is damaged, which may be no text
        raise JournalError(f"{what}: cannot be read: {error}; if it is damaged, restore a backup") from None


def _find(db: sqlite3.Connection, kind: str, key: str) -> JournalEvent | None:
    if kind not in ONCE:
        raise ValueError(f"only {ONCE} are found by key; was {kind}")
    # SQLite uses a partial index only when its condition stands in the query word for word.
    row = db.execute(f"SELECT body FROM events WHERE kind IN {ONCE} AND kind = ? AND key = ?",
                     (kind, key)).fetchone()
    return _decoder.decode(row[0]) if row else None


def _fold(db: sqlite3.Connection, *, from_checkpoint: bool = True,
          tell: Callable[[int], None] = lambda seq: None) -> tuple[int, Books, int, bytes]:
    # The checkpoint's sequence number, the books, and the last event's number and hash.
    start, books, row_hash = 0, Books(), _GENESIS
    row = db.execute("SELECT seq, hash, books FROM checkpoints ORDER BY seq DESC LIMIT 1").fetchone()
    if row is not None and from_checkpoint:
        start, sealed, raw = row
        at = db.execute("SELECT hash FROM events WHERE seq = ?", (start,)).fetchone()
        if at is None or not _is_bytes(at[0], raw) or _seal(at[0], raw) != sealed:
            raise JournalError(f"checkpoint {start} does not belong to these events: the journal is damaged; "
                               "restore a backup and reconcile")
        told = Books.decode(raw)
        if told is not None:
            books, row_hash = told, at[0]
        else:  # from the first event on, until the next checkpoint
            start = 0
    seq = start
    for entry_seq, event, entry_hash in _verified(db, seq, row_hash):
        books.apply(event)
        seq, row_hash = entry_seq, entry_hash
        if seq % TOLD_EVENTS == 0:
            tell(seq)
    return start, books, seq, row_hash


def _verified(db: sqlite3.Connection, seq: int, row_hash: bytes) -> Iterator[tuple[int, JournalEvent, bytes]]:
    # Two parts, as for an OR with this order SQLite reads the whole table.
    columns = "SELECT seq, ts_ns, kind, key, story, body, hash FROM events WHERE seq"
    for row in db.execute(f"{columns} < 1 UNION ALL {columns} > ? ORDER BY seq", (seq,)):
        if row[0] != seq + 1 or not _is_bytes(row[5]) or _chain(row_hash, *row[:6]) != row[6]:
            raise JournalError(f"event {row[0]} breaks the hash chain after {seq}: the journal is damaged; "
                               "restore a backup and reconcile")
        seq, row_hash = row[0], row[6]
        yield seq, _decoder.decode(row[5]), row_hash


def _check_tip(tip: bytes, seq: int) -> None:
    # Written twice over, so that a damaged one is not taken at its word.
    said, _, again = tip.partition(b" ")
    if said.isdigit() and again == said + b"\n" and int(said) > seq:
        raise JournalError(f"the journal ends at event {seq}, and {int(said)} were committed: it is damaged; "
                           "restore a backup and reconcile")


def _is_bytes(*values: object) -> bool:
    return all(isinstance(value, bytes) for value in values)


def _chain(previous: bytes, seq: int, ts_ns: int, kind: str, key: str, story: str, body: bytes) -> bytes:
    head = f"{seq}\0{ts_ns}\0{kind}\0{key}\0{story}\0".encode()
    return hashlib.sha256(previous + head + body).digest()


def _seal(row_hash: bytes, books: bytes) -> bytes:
    return hashlib.sha256(row_hash + books).digest()
