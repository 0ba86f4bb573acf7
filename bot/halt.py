"""The HALT files: who halted what, when and why. Read immediately before every send.

One file per scope below state_dir/halt: "all", "strategy-NAME", "symbol-BTC_USDT_USDT".
A file that cannot be read halts too: in doubt nothing is sent.
"""

import os
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
        """Halt the scope, synced to disk. A halt already in force keeps its first reason."""
        for halt in self.list():
            if halt.scope == scope:
                return halt
        halt = Halt(scope, who, why, clock.wall_ns())
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / _file_name(scope)
        part = path.with_suffix(".part")
        with open(part, "wb") as file:
            file.write(msgspec.json.encode(halt))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        self._sync_folder()
        return halt

    def clear(self, scope: str) -> Halt | None:
        """End the halt of the scope; return what it was, None when there was none."""
        halt = next((h for h in self.list() if h.scope == scope), None)
        if halt is not None:
            (self._folder / _file_name(scope)).unlink()
            self._sync_folder()
        return halt

    def list(self) -> list[Halt]:
        """Return all halts in force, the oldest first."""
        if not self._folder.is_dir():
            return []
        halts = []
        for path in sorted(self._folder.glob("*.json")):
            try:
                halts.append(msgspec.json.decode(path.read_bytes(), type=Halt))
            except FileNotFoundError:
                continue  # resumed in this very moment
            except (OSError, msgspec.MsgspecError) as error:
                halts.append(Halt("all", "tradehost", f"unreadable halt file {path}: {error}", 0))
        return sorted(halts, key=lambda h: h.time_ns)

    def covering(self, *, strategy: str, symbol: str) -> Halt | None:
        """Return the halt that covers an order of this strategy and symbol, if any."""
        scopes = ("all", f"strategy:{strategy}", f"symbol:{symbol}")
        return next((h for h in self.list() if h.scope in scopes), None)

    def _sync_folder(self) -> None:
        handle = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _file_name(scope: str) -> str:
    # "symbol:BTC/USDT:USDT" -> "symbol-BTC_USDT_USDT.json"
    return scope.replace(":", "-", 1).replace("/", "_").replace(":", "_") + ".json"
