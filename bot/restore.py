"""`botctl backup` and `botctl restore`: a backup is made, listed, and put in the journal's place, halted.

Where there is none an empty journal is put there: what it knows nothing of halts and locks until it is gone.
What a restored journal lacks the executor's next start takes in from the exchange (bot/recorder.py):
fills of our orders, exits at rest. What the exchange cannot tell (a halt, an adoption, what the operator
knew) a person has to: trading stays halted until `botctl resume`.
"""

import argparse
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from bot.backup import UNREADABLE, WORK, Backups, new_key, read_key, unseal
from bot.clock import Clock
from bot.config import Config
from bot.errors import EXIT_NO, EXIT_OK, RefusedError, UsageError
from bot.events import Restored
from bot.explain import clock_text
from bot.halt import HaltFiles, user
from bot.journal import TIP, Journal, take_lock
from bot.page import table_lines
from bot.views import print_json, show


def make_backup(args: argparse.Namespace, config: Config) -> int:
    """Make a backup, restore and fold it, look at all that are kept; print how it went."""
    status = Backups(config, Clock()).run()
    if args.json:
        return print_json(status, status.is_good)
    if status.error:
        show(f"no backup was made: {status.error}", is_trouble=True)
    elif status.newest:
        show(f"{status.newest.name}: {status.newest.events} events, restored and folded; "
             f"{status.kept} kept, {status.bytes // 1_000:,} kB")
    for name in status.damaged:
        show(f"{name} is damaged or gone: the disk, or somebody, changed it", is_trouble=True)
    return EXIT_OK if status.is_good else EXIT_NO


def list_backups(args: argparse.Namespace, config: Config) -> int:
    """List the backups, the newest first, each as its bytes say now."""
    backups = Backups(config, Clock())
    damaged = backups.damaged()
    rows = [{"name": m.name, "made": clock_text(m.made_ns)[:19], "events": m.events, "bytes": m.bytes,
             "state": "damaged" if m.name in damaged else "whole"} for m in backups.manifests()]
    rows += [{"name": name, "state": "damaged"} for name in sorted(damaged - {row["name"] for row in rows})]
    if args.json:
        return print_json(rows, not damaged)
    show("\n".join(table_lines(rows, ("name", "made", "events", "bytes", "state"), "no backup yet")))
    return EXIT_NO if damaged else EXIT_OK


def make_key(args: argparse.Namespace) -> int:
    """Write a new private key, and print the public half for backup.recipient."""
    private, public = new_key()
    if str(args.file) == "-":
        return print_json({"private": private, "recipient": public}, is_yes=True)
    try:
        handle = os.open(args.file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        raise RefusedError(f"{args.file}: {error.strerror}; nothing was written") from None
    with open(handle, "w", encoding="utf-8") as file:
        file.write(f"# tradehost backups; public half: {public}\n{private}\n")
    if args.json:
        return print_json({"file": args.file, "recipient": public}, is_yes=True)
    show(f'recipient = "{public}"\n{args.file}: keep it, and a copy, off this host: no backup can be read '
         "without it")
    return EXIT_OK


def restore_backup(args: argparse.Namespace, config: Config) -> int:
    """Put a backup, or an empty journal, in the journal's place, and print what is to be done next."""
    if not args.empty == (args.file is None) == (args.key is None):
        raise UsageError("restore: needs FILE and --key KEY, or --empty alone")
    try:
        text = "" if args.empty else (
            sys.stdin.read() if str(args.key) == "-" else args.key.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RefusedError(f"{args.key}: cannot be read: {error}") from None
    event, halts = restore(config, Clock(), args.file, text, who=user(), is_replacing=args.replace)
    if args.json:
        return print_json({"restored": event, "halted": halts}, is_yes=True)
    if args.empty:
        show("the journal is empty now, and the day's loss begins anew. Whatever is held or rests must go: "
             "botctl flatten. Start tradehost, look: botctl reconcile; and botctl resume")
        return EXIT_OK
    show(f"restored {event.backup}; it lacks what happened since {clock_text(event.lacks_since_ns)[:19]}\n"
         f"halted: {', '.join(halts)}. Start tradehost; it takes in from the exchange what is lacking. Then "
         "look: botctl reconcile, positions, orders; and botctl resume")
    return EXIT_OK


def restore(config: Config, clock: Clock, sealed: Path | None, key: str, *, who: str,
            is_replacing: bool = False) -> tuple[Restored, list[str]]:
    """Do it; return its mark in the chain, and the scopes that are halted now. sealed None: an empty one.

    Raises RefusedError, JournalError (damaged) and ConfigError (an executor runs, or another account's
    journal); then the journal is as it was.
    """
    path, identity = config.path(config.journal.path), None if sealed is None else read_key(key)
    lock = take_lock(path)
    try:
        if path.exists() and not is_replacing:
            raise RefusedError(f"{path} is there; with --replace it is set aside, never removed")
        with TemporaryDirectory(dir=path.parent, prefix=WORK) as folder:
            staged = Path(folder, "journal.db")
            event = Restored(backup="", lacks_since_ns=0, restored_ns=0, who=who)
            why = "an empty journal was begun"
            if sealed is not None and identity is not None:
                try:
                    lacks_since_ns, events, _ = unseal(sealed, identity, staged)
                except UNREADABLE as error:
                    raise RefusedError(f"{sealed}: cannot be read: {error}; is it whole, and is the key the "
                                       "one it was made for?") from None
                event = Restored(backup=sealed.name, lacks_since_ns=lacks_since_ns,
                                 restored_ns=clock.wall_ns(), who=who)
                why = f"restored from {sealed.name}, event {events} was its last"
            journal = Journal(staged, clock, identity=config.identity(),
                              checkpoint_events=config.journal.checkpoint_events)
            books = journal.load()
            journal.append(event)
            journal.close()
            halts = {**books.halts, "all": "; ".join(filter(None, (why, books.halts.get("all"))))}
            for scope, why in halts.items():
                HaltFiles(config.path("halt")).set(scope, who=who, why=why, clock=clock)
            _set_aside(path, clock.wall_ns())
            os.replace(staged, path)
        return event, sorted(halts)
    finally:
        os.close(lock)


def _set_aside(path: Path, now_ns: int) -> None:
    # With all that is beside it: a new journal would be read together with an old one's.
    for old in (path, *(path.with_name(f"{path.name}{end}") for end in ("-wal", "-shm", TIP))):
        if old.exists():
            old.rename(old.with_name(old.name.replace(path.name, f"{path.name}.replaced-{now_ns}", 1)))
