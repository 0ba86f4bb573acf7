"""`botctl config check` and `config apply`: strategies come, change and go while all else runs on.

The file is checked first; then the sections are written, executor, gateway and health read the file
again (SIGHUP), and supervisord starts, restarts or ends exactly the strategies that changed.
"""

import argparse
import asyncio
import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bot.books import Books
from bot.bus import signal_endpoint
from bot.clock import Clock
from bot.commands import ANSWER_TURNS, CommandFiles
from bot.config import Config
from bot.config_file import load, parse
from bot.errors import EXIT_OK, ConfigError, RefusedError
from bot.exchange import TRADABLE
from bot.halt import HaltFiles, user
from bot.limits import waits_for_restart
from bot.programs import find_config, write_sections
from bot.status import read_beats, stale
from bot.user_class import load_class
from bot.views import open_reader, print_json, say, show

REREADERS = ("executor", "gateway", "health")
APPLY_WHY, FLATTEN_WHY = "config apply", "config apply --flatten"
UPDATE_S = 60  # supervisord ends one program after the other, each within its stopwaitsecs


def check_config(args: argparse.Namespace) -> int:
    """Check a file as each process does at its start, and more: classes, the exchange."""
    path = args.file or args.config or find_config()
    config = load(path)
    if config.exchange.id not in TRADABLE:
        raise ConfigError(f'exchange.id: must be one of {", ".join(TRADABLE)}; was "{config.exchange.id}"')
    for name in config.strategy:
        try:
            load_class(config, name)
        except ConfigError as error:  # its process may have another Python path
            show(f"note: {error}", is_trouble=True)
    for lack in _lacking(config):
        show(f"note: on this host {lack}", is_trouble=True)
    if args.json:
        return print_json({"file": str(path), "is_valid": True, "fingerprint": config.fingerprint()}, True)
    show(f"{path}: good; mode {config.mode}, {len(config.strategy)} strategies on "
         f"{', '.join(config.symbols())}, fingerprint {config.fingerprint()}")
    return EXIT_OK


def apply_config(args: argparse.Namespace) -> int:
    """Put a file in force, and print what came, changed and went."""
    path = args.config or find_config()
    config = load(args.file or path)
    _check_possible(path, args.file or path, config)  # before anything is closed
    closed = _flatten_leaving(args, config) if args.flatten else []
    done = apply(path, args.file or path, open_reader(config).books, heir=args.adopt or "")
    halts = HaltFiles(config.path("halt"))
    for halt in halts.list():  # that kept it flat until it was gone; what lives on stays as others halted it
        if halt.scope in closed and (halt.why == FLATTEN_WHY
                                     or halt.scope.partition(":")[2] not in config.strategy):
            halts.clear(halt.scope, clock=Clock())
    if args.json:
        return print_json(done, True)
    waiting, restart = done.pop("waiting"), done.pop("restart")
    show("; ".join(f"{word}: {', '.join(names)}" for word, names in done.items() if names)
         or "no program changed; executor, gateway and health have read the file again")
    if restart:
        show(f"not in force yet: {', '.join(waiting) or 'what differs beside [strategy]'}; it waits for: "
             f"supervisorctl restart {' '.join(restart)}")
    return EXIT_OK


def _flatten_leaving(args: argparse.Namespace, config: Config) -> list[str]:
    # Halt and close each strategy that goes; return the halts. Their exits follow within seconds.
    halts: list[str] = []
    reader = open_reader(config)
    for _ in range(ANSWER_TURNS):
        left = leaving(config, reader.books())
        for name in left.keys() - {scope.partition(":")[2] for scope in halts}:
            say(args, f"{left[name]}: closing")
            halts.append(f"strategy:{name}")
            _close_leaving(config, name)
        if not left:
            return halts
        asyncio.run(Clock().sleep(0.1))
    raise RefusedError(
        f"{'; '.join(left.values())} still; halted, not removed: botctl resume --strategy NAME")


def _close_leaving(config: Config, name: str) -> None:
    who, why = user(), FLATTEN_WHY
    HaltFiles(config.path("halt")).set(f"strategy:{name}", who=who, why=why, clock=Clock())
    answered = asyncio.run(CommandFiles(config.path("commands")).ask(
        "flatten", strategy=name, who=who, why=why, clock=Clock()))
    if answered is None or not answered.is_done:
        raise RefusedError(
            f"{name} is not flat: {answered.text if answered else 'no answer from the executor'}; "
            f"halted, not removed. Undo: botctl resume --strategy {name}")


def apply(path: Path, new_path: Path, books: Callable[[], Books], *, heir: str = "") -> dict[str, Any]:
    """Put new_path in force as path; return what came, changed and went, and what waits for whose restart.

    books: reads them. heir: the strategy that may take over what one that goes holds. Raises ConfigError
    for a wrong file, RefusedError when something is held and not inherited, or when supervisord does not
    do its part.
    """
    new = load(new_path)
    _check_possible(path, new_path, new)
    beats, folder = read_beats(new), new.path("supervisor.d")
    before, waiting = _sections(folder), _waiting(path, new)
    with _halted_leavers(new, beats):
        for held in leaving(new, books(), heir).values():
            raise RefusedError(
                f"{held}: it is not removed, and its symbol gets no other owner. Nothing was changed: "
                f"wait until it is flat, close it with --flatten, or name its heir with --adopt "
                f"(strategy.{heir or 'NAME'}.symbols must list it)")
        if new_path.resolve() != path.resolve():
            part = path.with_suffix(".part")
            part.write_bytes(new_path.read_bytes())
            shutil.copymode(path, part)
            os.replace(part, path)
        write_sections(new)
        after = _sections(folder)
        # Through supervisord, which may signal what runs as another user.
        for name in REREADERS:
            if name in beats and not beats[name]["ended"]:
                _supervisorctl(new, "signal", "HUP", name)
        asyncio.run(_wait_for_owners(new))
    _supervisorctl(new, "update")
    done = {"added": sorted(after.keys() - before.keys()), "removed": sorted(before.keys() - after.keys()),
            "changed": sorted(n for n in after.keys() & before.keys() if after[n] != before[n])}
    return done | {"waiting": waiting, "restart": asyncio.run(_left_behind(new, done["changed"]))}


def _check_possible(path: Path, new_path: Path, new: Config) -> None:
    # Nothing may be closed or written for a file that cannot be put in force afterwards.
    if read_beats(new).get("executor", {"ended": True})["ended"]:
        raise RefusedError("the executor does not run in this state_dir: start with make run CONFIG=FILE")
    for lack in _lacking(new):
        raise RefusedError(f"nothing was changed: {lack}")
    sections = new.path("supervisor.d")
    written = [sections, *sections.glob("*.conf"), new.path("metrics"),
               *([path.parent] if new_path.resolve() != path.resolve() else [])]
    for place in written:
        if not os.access(next(p for p in (place, *place.parents) if p.exists()), os.W_OK):
            raise RefusedError(
                f"{place}: you may not write there; nothing was changed. On a host: sudo botctl config apply "
                "FILE, and the same in the inventory, or the next deploy takes it back")


def _lacking(config: Config) -> list[str]:
    # What strategies need before they can start; on a host users and folders are the inventory's.
    found = []
    for name in config.strategy:
        user, endpoint = config.users.strategy.format(strategy=name), signal_endpoint(config.bus, name)
        folders = [Path(endpoint.removeprefix("ipc://")).parent] * endpoint.startswith("ipc://")
        lacks = [f"user {user}"] * (bool(user) and not _is_user(user))
        lacks += [f"folder {f}" for f in (*folders, *([config.run_path(f"strategy-{name}")] * bool(user)))
                  if not os.path.isdir(f)]
        if lacks:
            found.append(f"strategy.{name} lacks {', '.join(lacks)}: " + (
                "a new strategy is added to bot_strategies in the inventory and pushed with ansible-playbook "
                "site.yml, which makes them" if user else f"mkdir -m 0700 {folders[0]}"))
    return found


def _is_user(name: str) -> bool:
    try:
        return bool(pwd.getpwnam(name))
    except KeyError:
        return False


def _waiting(path: Path, new: Config) -> list[str]:
    try:
        return waits_for_restart(parse(path), new)
    except ConfigError:  # edited in place before, and wrong: what it was is not known
        return []


async def _left_behind(new: Config, changed: list[str]) -> list[str]:
    # The executor may only just be reading it; who else is behind by now stays so. What changed starts anew.
    for _ in range(ANSWER_TURNS // 4 + 1):
        found = [name for name in stale(new, read_beats(new)) if name not in changed]
        if found != ["executor"]:
            break
        await Clock().sleep(0.1)
    return found


@contextmanager
def _halted_leavers(new: Config, beats: dict[str, dict[str, Any]]) -> Iterator[None]:
    # What was sent before is in the books that are read now; nothing more is until the new owner is known.
    halts, owners = HaltFiles(new.path("halt")), beats["executor"].get("owners", {})
    scopes = {f"symbol:{symbol}" for symbol, owner in owners.items() if new.owner_of(symbol) != owner}
    scopes -= {halt.scope for halt in halts.list()}
    try:
        for scope in sorted(scopes):
            halts.set(scope, who=user(), why=APPLY_WHY, clock=Clock())
        yield
    finally:
        for halt in halts.list():
            if halt.scope in scopes and halt.why == APPLY_WHY:
                halts.clear(halt.scope, clock=Clock())


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


async def _wait_for_owners(new: Config) -> None:
    # A strategy that started before the executor knows it would be denied its first signal.
    wanted = {symbol: name for name, table in new.strategy.items() for symbol in table.symbols}
    for _ in range(ANSWER_TURNS):
        if read_beats(new).get("executor", {}).get("owners") == wanted:
            return
        await Clock().sleep(0.1)
    raise RefusedError("the executor has not read the file again; it is in force, and no program was started "
                       "or ended: see botctl status, then botctl config apply")


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
