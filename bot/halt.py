"""The HALT files: who halted what, when and why. Read immediately before every send.

One file per scope below state_dir/halt: "all", "strategy-NAME", "symbol-BTC_USDT_USDT".
A file that cannot be read halts too: in doubt nothing is sent.
"""

import getpass
import os
import stat
from collections.abc import Iterator
from pathlib import Path

import msgspec

from bot.clock import Clock


class Halt(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One halt: scope, who, why, since when."""

    scope: str
    who: str
    why: str
    time_ns: int


class HaltFiles:
    """The halts in force, kept as files so that they survive restart and reboot."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def set(self, scope: str, *, who: str, why: str, clock: Clock) -> Halt:
        """Halt the scope, synced to disk.

        A halt already in force keeps its reason and time. Whoever else halts is named with it, so that nobody
        (bot-switch, of a crash loop that is over) ends it as the first one's alone.
        """
        before = next((h for h in self.list() if h.scope == scope), None)
        if before is None:
            halt = Halt(scope, who, why, clock.wall_ns())
        elif who in before.who.split(", "):
            return before
        else:
            halt = Halt(scope, f"{before.who}, {who}", f"{before.why}; {who}: {why}", before.time_ns)
        try:
            write_synced(self._folder / _file_name(scope), msgspec.json.encode(halt))
        except OSError:
            if before is None:
                raise
            return before
        return halt

    def clear(self, scope: str, *, clock: Clock) -> Halt | None:
        """End the halt of the scope; return what it was, None when there was none.

        Files that cannot be read halt all; ending that halt sets them aside as *.damaged.
        """
        halt = next((h for h in self.list() if h.scope == scope), None)
        if halt is not None:
            self._note_end(scope, clock.mono_ns())  # first: or health halts again for what it was halted for
            (self._folder / _file_name(scope)).unlink(missing_ok=True)
            for path, read in self._read():
                if scope == "all" and read.scope == "all":
                    path.rename(path.with_suffix(".damaged"))
            _sync_folder(self._folder)
        return halt

    def ended_ns(self, scope: str) -> int:
        """Return when the last halt of the scope was ended, monotonic: of any boot; 0 when there was none."""
        try:
            return os.stat(self._mark(scope)).st_mtime_ns
        except OSError:
            return 0

    def _note_end(self, scope: str, mono_ns: int) -> None:
        # A file's time needs no block of a full disk, and who may not read the file may see it.
        try:
            self._mark(scope).unlink(missing_ok=True)  # another user's could not be changed
            self._mark(scope).touch()
            os.utime(self._mark(scope), ns=(mono_ns, mono_ns))
        except OSError:
            pass  # the halt ends all the same; health may halt once more

    def _mark(self, scope: str) -> Path:
        return (self._folder / _file_name(scope)).with_suffix(".ended")

    def list(self) -> list[Halt]:
        """Return all halts in force, the oldest first."""
        return sorted((halt for _, halt in self._read()), key=lambda h: h.time_ns)

    def covering(self, *, strategy: str, symbol: str) -> Halt | None:
        """Return the halt that covers an order of this strategy and symbol, if any."""
        scopes = ("all", f"strategy:{strategy}", f"symbol:{symbol}")
        return next((h for h in self.list() if h.scope in scopes), None)

    def _read(self) -> Iterator[tuple[Path, Halt]]:
        # Neither glob nor exists: a folder that cannot be reached must not read as "no halt".
        try:
            names = sorted(os.listdir(self._folder))
        except FileNotFoundError:
            names = []
        for path in (self._folder / name for name in names if name.endswith(".json")):
            try:
                yield path, msgspec.json.decode(path.read_bytes(), type=Halt)
            except FileNotFoundError:
                continue  # resumed in this very moment
            except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
                yield path, Halt("all", "tradehost", f"unreadable halt file {path}: {error}", 0)


def user() -> str:
    """Return who types: by number where the host has no name for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return f"uid {os.getuid()}"


def write_synced(path: Path, raw: bytes) -> None:
    """Write a file whole or not at all, on the disk when this returns."""
    folder = path.parent
    if not folder.exists():
        folder.mkdir(parents=True, exist_ok=True)
        # Whoever comes first, root or an operator: all who may write above may write here.
        folder.chmod(stat.S_IMODE(folder.parent.stat().st_mode))
    part = path.with_suffix(".part")
    part.unlink(missing_ok=True)  # a torn one of somebody else could not be opened
    with open(part, "wb") as file:
        file.write(raw)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)
    _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _file_name(scope: str) -> str:
    # "symbol:BTC/USDT:USDT" -> "symbol-BTC_USDT_USDT.json"
    return scope.replace(":", "-", 1).replace("/", "_").replace(":", "_") + ".json"
