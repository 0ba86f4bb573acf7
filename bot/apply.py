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


def apply(path: Path, new_path: Path, books: Books, *, way_out: str = "") -> dict[str, Any]:
    """Put new_path in force as path; return what came, changed and went.

    way_out: --flatten or --adopt, where it was given. Raises ConfigError for a wrong file, RefusedError
    when a strategy that goes still holds something, or when supervisord does not do its part.
    """
    new = load(new_path)
    beats = read_beats(new)
    executor = beats.get("executor", {"ended": True})
    if executor["ended"]:
        raise RefusedError("the executor does not run in this state_dir: start with make run CONFIG=FILE")
    _check_held(new, executor["owners"], books, way_out)
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


def _check_held(new: Config, owners: dict[str, str], books: Books, way_out: str) -> None:
    for symbol, owner in owners.items():
        book = books.book(symbol)
        if new.owner_of(symbol) == owner or not (book.position_qty or book.live_orders()):
            continue
        held = f"strategy.{owner} holds {book.position_qty:f} {symbol} and {len(book.live_orders())} orders"
        if way_out:
            raise RefusedError(f"{held}; {way_out} does not exist in this version. Nothing was changed: wait "
                               "until the strategy is flat, and apply then")
        raise RefusedError(f"{held}: it is not removed, and {symbol} gets no other owner. Nothing was "
                           "changed: wait until the strategy is flat, and apply then")


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
