"""Backups of the journal: taken while the executor writes, encrypted, proven by restoring. Edge to pyrage.

A backup is journal-TIME-EVENTS.age: SQLite's own copy, gzipped, for the holder of the private key that
belongs to `[backup] recipient`; the manifest beside it (.json) says what was proven. This host holds no
key that reads it: when it is made another key is made too, the file on the disk is decrypted with that
and folded from its first event, and the key is forgotten. From then on a digest tells that it is still
that very file. `age -d -i KEY FILE | gunzip` reads it without us.
"""

import fcntl
import gzip
import hashlib
import os
import shutil
import time
import zlib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import msgspec
import pyrage
from pyrage import x25519

from bot import __version__
from bot.clock import Clock
from bot.config import Config
from bot.errors import JournalError, RefusedError
from bot.halt import write_synced
from bot.journal import JournalReader

STATUS, LOCK, WORK = "status.json", "lock", ".work-"
COPIES = 3  # of the journal at once while one is made: the copy, packed, sealed, and folded
HOUR_NS, MB = 3_600_000_000_000, 1_000_000
UNREADABLE = (pyrage.DecryptError, EOFError, zlib.error, OSError)  # gzip's own error is an OSError
_PRIVATE = "AGE-SECRET-KEY-"


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """What was proven of a backup when it was made. hash: of the last event, stands for the whole chain."""

    name: str
    made_ns: int
    events: int
    hash: str
    bytes: int
    sha256: str
    version: str = __version__


class BackupStatus(msgspec.Struct, frozen=True, kw_only=True):
    """How the last run went. error: why none was made; damaged: kept ones that are not what they were."""

    ran_ns: int
    error: str = ""
    damaged: list[str] = []
    newest: Manifest | None = None  # good
    kept: int = 0
    bytes: int = 0

    @property
    def is_good(self) -> bool:
        return not self.error and not self.damaged


class Backups:
    """The backups of one host. `run` each night."""

    def __init__(self, config: Config, clock: Clock) -> None:
        self._config, self._clock = config, clock
        self._folder = config.path(config.backup.folder)

    def run(self) -> BackupStatus:
        """Make one, restore and fold it, look at all that are kept, remove the oldest, write the status.

        Raises RefusedError where it cannot even begin.
        """
        if not self._config.backup.recipient:
            raise RefusedError("backup.recipient is empty: botctl backup key FILE makes a key pair, and its "
                               "public half belongs there")
        with self._locked():
            error = ""
            try:
                self._make()
            except (JournalError, RefusedError, pyrage.RecipientError, *UNREADABLE) as failed:
                error = str(failed)
            damaged = self.damaged()
            if not error:
                self._prune(damaged)
            good = [m for m in self.manifests() if m.name not in damaged]
            status = BackupStatus(ran_ns=self._clock.wall_ns(), error=error, damaged=sorted(damaged),
                                  newest=good[0] if good else None, kept=len(good),
                                  bytes=sum(m.bytes for m in good))
            write_synced(self._folder / STATUS, msgspec.json.encode(status))
            return status

    def manifests(self) -> list[Manifest]:
        """Return the manifests, the newest first; one that cannot be read counts as damaged."""
        return sorted(filter(None, map(_read_manifest, self._folder.glob("journal-*.json"))),
                      key=lambda m: m.name, reverse=True)

    def damaged(self) -> set[str]:
        """Return the names of backups that are gone, or not byte for byte what was proven."""
        known = {m.name: m for m in self.manifests()}
        names = known.keys() | {p.stem for p in self._folder.glob("journal-*.*") if p.suffix != ".part"}
        return {n for n in names if n not in known or _digest(self._folder / f"{n}.age") != known[n].sha256}

    def _make(self) -> None:
        path = self._config.path(self._config.journal.path)
        with closing(JournalReader(path)) as reader, TemporaryDirectory(
                dir=self._folder, prefix=WORK) as folder:
            need = COPIES * path.stat().st_size + self._config.health.disk_free_mb_min * MB
            if (free := shutil.disk_usage(self._folder).free) < need:
                raise RefusedError(f"{self._folder}: a backup of this journal needs {need // MB:,} MB free, "
                                   f"health.disk_free_mb_min of them for trading; was {free // MB:,}")
            copy, sealed = Path(folder, "copy.db"), Path(folder, "sealed.age")
            once = x25519.Identity.generate()
            reader.copy_to(copy)
            _seal(copy, sealed, [x25519.Recipient.from_str(self._config.backup.recipient), once.to_public()])
            copy.unlink()
            _, events, last_hash = unseal(sealed, once, Path(folder, "back.db"))
            made_ns = self._clock.wall_ns()
            name = f"journal-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime(made_ns // 10**9))}-{events}"
            manifest = Manifest(name=name, made_ns=made_ns, events=events, hash=last_hash,
                                bytes=sealed.stat().st_size, sha256=_digest(sealed))
            sealed.chmod(0o640)
            write_synced(self._folder / f"{name}.json", msgspec.json.encode(manifest))
            os.replace(sealed, self._folder / f"{name}.age")

    def _prune(self, damaged: set[str]) -> None:
        rules, total, kept = self._config.backup, 0, 0
        for path in sorted(self._folder.glob("journal-*.age"), reverse=True):
            total += path.stat().st_size
            kept += path.stem not in damaged
            if kept > rules.kept or (kept > 1 and total > rules.size_mb_max * MB):
                path.unlink()
                path.with_suffix(".json").unlink(missing_ok=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            handle = os.open(self._folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise RefusedError(f"{self._folder}: {error.strerror}; on a host type: sudo systemctl start "
                               "bot-backup") from None
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for left in self._folder.glob(f"{WORK}*"):  # by one that was killed
                shutil.rmtree(left)
            yield
        except BlockingIOError:
            raise RefusedError("another backup is being made; see botctl backup list") from None
        finally:
            os.close(handle)


def told(config: Config, clock: Clock) -> dict[str, Any] | None:
    """Return how the backups are, for status, beat and metrics; None where none are wanted."""
    if not config.backup.recipient:
        return None
    try:
        status = msgspec.json.decode((config.path(config.backup.folder) / STATUS).read_bytes(),
                                     type=BackupStatus)
    except FileNotFoundError:
        status = BackupStatus(ran_ns=0, error="none was made yet")
    except (OSError, msgspec.MsgspecError) as error:
        status = BackupStatus(ran_ns=0, error=f"how the last one went cannot be read: {error}")
    newest = status.newest
    text = "; ".join(filter(None, (status.error, ", ".join(status.damaged) + " is damaged"
                                   if status.damaged else "")))
    return {"is_good": status.is_good, "text": text, "newest": newest.name if newest else "",
            "age_s": (clock.wall_ns() - newest.made_ns) // 10**9 if newest else None, "kept": status.kept,
            "bytes": status.bytes, "is_old": newest is None or clock.wall_ns() - newest.made_ns
            > config.backup.age_h_max * HOUR_NS}


def new_key() -> tuple[str, str]:
    """Return a new key pair: the private half, and the public one for `[backup] recipient`."""
    identity = x25519.Identity.generate()
    return str(identity), str(identity.to_public())


def read_key(text: str) -> x25519.Identity:
    """Return the private key that a file of ours, or of age-keygen, holds. Raises RefusedError."""
    lines = [line.strip() for line in text.splitlines() if line.strip().startswith(_PRIVATE)]
    try:
        return x25519.Identity.from_str(lines[0])
    except (IndexError, pyrage.IdentityError):
        raise RefusedError(f"the key must be a line that begins with {_PRIVATE}") from None


def unseal(sealed: Path, identity: x25519.Identity, journal: Path) -> tuple[int, int, str]:
    """Decrypt a backup into a new file and fold it from its first event on.

    Return the last event's time, number and hash. Raises JournalError when it is damaged, one of
    UNREADABLE when it cannot be decrypted or unpacked.
    """
    packed = journal.with_suffix(".gz")
    pyrage.decrypt_file(str(sealed), str(packed), [identity])
    with gzip.open(packed, "rb") as source, open(journal, "wb") as target:
        shutil.copyfileobj(source, target)
    packed.unlink()
    with closing(JournalReader(journal)) as reader:
        _, events, last_hash = reader.verified()
        return reader.last_ns(), events, last_hash


def _seal(journal: Path, sealed: Path, recipients: list[x25519.Recipient]) -> None:
    packed = journal.with_suffix(".gz")
    with open(journal, "rb") as source, gzip.open(packed, "wb", compresslevel=1) as target:
        shutil.copyfileobj(source, target)
    pyrage.encrypt_file(str(packed), str(sealed), recipients)
    packed.unlink()
    with open(sealed, "rb") as file:
        os.fsync(file.fileno())


def _digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return str(error)  # equal to no digest


def _read_manifest(path: Path) -> Manifest | None:
    try:
        manifest = msgspec.json.decode(path.read_bytes(), type=Manifest)
    except (OSError, msgspec.MsgspecError):
        return None
    return manifest if manifest.name == path.stem else None
