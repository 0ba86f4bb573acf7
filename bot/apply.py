"""`botctl config apply`: strategies come, change and go while all else runs on.

The file is checked first; then the sections are written, executor, gateway and health read the file
again (SIGHUP), and supervisord starts, restarts or ends exactly the strategies that changed.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from bot.books import Books
from bot.config import Config
from bot.config_file import load
from bot.errors import RefusedError
from bot.programs import write_sections
from bot.status import read_beats

REREADERS = ("executor", "gateway", "health")
UPDATE_S = 60  # supervisord ends one program after the other, each within its stopwaitsecs


def apply(path: Path, new_path: Path, books: Books, *, heir: str = "") -> dict[str, Any]:
    """Put new_path in force as path; return what came, changed and went.

    heir: the strategy that may take over what one that goes holds. Raises ConfigError for a wrong file,
    RefusedError when something is held and not inherited, or when supervisord does not do its part.
    """
    new = load(new_path)
    beats = read_beats(new)
    executor = beats.get("executor", {"ended": True})
    if executor["ended"]:
        raise RefusedError("the executor does not run in this state_dir: start with make run CONFIG=FILE")
    for held in leaving(new, books, heir).values():
        raise RefusedError(
            f"{held}: it is not removed, and its symbol gets no other owner. Nothing was changed: "
            f"wait until it is flat, close it with --flatten, or name its heir with --adopt "
            f"(strategy.{heir or 'NAME'}.symbols must list it)"
        )
    folder = new.path("supervisor.d")
    before = _sections(folder)
    if new_path.resolve() != path.resolve():
        part = path.with_suffix(".part")
        part.write_bytes(new_path.read_bytes())
        os.replace(part, path)
    write_sections(new)
    after = _sections(folder)
    # Through supervisord, which may signal what runs as another user.
    for name in REREADERS:
        if name in beats and not beats[name]["ended"]:
            _supervisorctl(new, "signal", "HUP", name)
    _supervisorctl(new, "update")
    return {"added": sorted(after.keys() - before.keys()), "removed": sorted(before.keys() - after.keys()),
            "changed": sorted(n for n in after.keys() & before.keys() if after[n] != before[n])}


def leaving(new: Config, books: Books, heir: str = "") -> dict[str, str]:
    """Return the strategies that hold something in a symbol that leaves them, and what, in words."""
    owners = read_beats(new).get("executor", {}).get("owners", {})
    found = {}
    for symbol, owner in owners.items():
        book = books.book(symbol)
        if new.owner_of(symbol) not in (owner, heir or owner) and (book.position_qty or book.live_orders()):
            found[owner] = (f"strategy.{owner} holds {book.position_qty:f} {symbol} and "
                            f"{len(book.live_orders())} orders")
    return found


def _sections(folder: Path) -> dict[str, str]:
    return {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.conf")}


def _supervisorctl(config: Config, *words: str) -> None:
    command = [sys.executable, "-m", "supervisor.supervisorctl", "-s",
               f"unix://{config.path('run/supervisor.sock')}", *words]
    verb = " ".join(words)
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=UPDATE_S)
    except subprocess.TimeoutExpired:
        raise RefusedError(f"supervisord did not answer within {UPDATE_S} s; the file is in force, the "
                           f"programs are not: run supervisorctl {verb}") from None
    if done.returncode:
        raise RefusedError(f"supervisorctl {verb}: {(done.stdout + done.stderr).strip()[:300]}")
