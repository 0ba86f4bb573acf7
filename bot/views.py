"""What botctl shows: state, health, orders, signals, positions, and the story behind each."""

import argparse
import asyncio
import select
import shutil
import sys
import termios
import tty
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from bot.clock import Clock
from bot.config import Config
from bot.config_file import parse
from bot.doctor import examine
from bot.errors import EXIT_NO, EXIT_OK, ConfigError, JournalError, UsageError
from bot.explain import clock_text, find_story, tell
from bot.journal import JournalReader
from bot.model import visible
from bot.page import fit, status_lines, table_lines
from bot.programs import find_config
from bot.report import chart_html, day_json, day_lines, summarize
from bot.status import findings, gather, order_rows, position_row, process_rows, read_beats, signal_rows


def show_status(args: argparse.Namespace, config: Config) -> int:
    """Print the state of everything, or follow it."""
    if args.watch and args.json:
        raise UsageError("status --watch is for people; for scripts call status --json again and again")
    if args.watch:
        return _follow(config, args.config or find_config())
    status = gather(config, Clock())
    if args.json:
        return print_json(status, status["state"] != "DOWN")
    lines = status_lines(status)
    stopped = [f["subject"] for f in status["findings"] if f["text"].startswith("STOPPED: ")]  # process_down
    missing = [f"{p['name']} {p['state']}" for p in status["processes"]
               if p["state"] != "UP" and p["name"] not in stopped]
    if missing:
        lines.insert(1, f"NOT UP {', '.join(missing)}: see the logs in {config.path('log')}")
    if stopped:
        halt = ", or for a halt that could not be written: then halt first" * ("executor" in stopped)
        lines.insert(1, f"STOPPED by hand{halt}. To start: {Path(sys.executable).with_name('supervisorctl')} "
                        f"-s unix://{config.path('run/supervisor.sock')} start {' '.join(stopped)}")
    show("\n".join(lines))
    return EXIT_OK if status["state"] != "DOWN" else EXIT_NO


def _follow(config: Config, path: Path) -> int:
    # Plain ANSI, redrawn each second; q, Ctrl-C or the end of the terminal ends it.
    keys = sys.stdin if sys.stdin.isatty() else None
    before = termios.tcgetattr(keys) if keys else []
    try:
        if keys:
            tty.setcbreak(keys)
        print("\x1b[2J", end="")
        while True:
            columns, rows = shutil.get_terminal_size()
            with suppress(ConfigError):  # what is edited just now; the last one that was whole
                config = parse(path)
            now = clock_text(Clock().wall_ns())[:19]
            last = f"{now} UTC  q ends this view, not tradehost"
            print(fit(status_lines(gather(config, Clock())), columns, rows, last), end="", flush=True)
            if select.select([keys] if keys else [], [], [], 1.0)[0] and sys.stdin.read(1) in ("q", ""):
                return EXIT_OK
    except KeyboardInterrupt:
        return EXIT_OK
    finally:
        if keys:
            termios.tcsetattr(keys, termios.TCSADRAIN, before)
        print()


def show_health(args: argparse.Namespace, config: Config) -> int:
    """Print what is wrong, and what each process uses."""
    beats = read_beats(config)
    processes = process_rows(config, beats, Clock())
    found, health = findings(beats, processes), beats.get("health", {})
    used = [{"name": name, **row} for name, row in health.get("processes", {}).items()]
    if args.json:
        return print_json({"is_healthy": not found, "findings": found, "processes": used,
                      "host": health.get("host", {}), "kills": health.get("kills", {})}, not found)
    show("\n".join([*table_lines(found, ("rule", "subject", "age_s", "text"), "nothing is wrong"), "",
                    *table_lines(used, ("name", "rss_bytes", "growth_bytes_per_s", "cpu_pct", "descriptors",
                                        "threads"), "health does not run")]))
    return EXIT_NO if found else EXIT_OK


def show_doctor(args: argparse.Namespace, config: Config) -> int:
    """Examine everything around the processes, and print what was found."""
    checks = [msgspec.to_builtins(check) for check in asyncio.run(
        examine(config, Clock(), args.config or find_config(), is_candidate=args.candidate))]
    is_good = all(check["verdict"] != "bad" for check in checks)
    return _tell_rows(args, checks, ("verdict", "name", "text"), is_good=is_good)


def verify_journal(args: argparse.Namespace, config: Config) -> int:
    """Fold the whole journal anew, from its first event, and print what its chain ends with."""
    try:
        books, seq, last_hash = open_reader(config).verified()
    except JournalError as error:
        if not args.json:
            raise
        return print_json({"is_whole": False, "error": str(error)}, is_yes=False)
    told = {"is_whole": True, "events": seq, "hash": last_hash, "epoch": books.epoch,
            "signals": books.signals, "orders": books.orders, "fills": books.fills}
    if args.json:
        return print_json(told, is_yes=True)
    show(f"whole: {seq} events, {books.signals} signals, {books.orders} orders, {books.fills} fills\n"
         f"the chain ends with {last_hash}")
    return EXIT_OK


def list_orders(args: argparse.Namespace, config: Config) -> int:
    """Print the open orders, or all that the books keep, the newest first."""
    rows = order_rows(open_reader(config).books(), is_all=args.all)[:args.count]
    return _tell_rows(args, rows, ("time", "client_order_id", "symbol", "leg", "side", "qty", "filled_qty",
                                   "trigger_price", "state", "text"),
                      "no open order (--all shows the closed ones too)")


def list_signals(args: argparse.Namespace, config: Config) -> int:
    """Print the signals with their outcomes, the newest first."""
    rows = signal_rows(open_reader(config), args.count)
    return _tell_rows(args, rows, ("time", "signal", "symbol", "target_qty", "outcome", "filled_qty", "why"),
                      "no signal among the newest events")


def list_positions(args: argparse.Namespace, config: Config) -> int:
    """Print the positions with their exits."""
    books, now_ns = open_reader(config).books(), Clock().wall_ns()
    rows = [position_row(book, config, now_ns) for book in books.symbols.values()]
    return _tell_rows(args, rows, ("symbol", "strategy", "qty", "entry_price", "stop", "take_profit",
                                   "version", "realized_pnl", "fees"), "no position yet")


def tell_story(args: argparse.Namespace, config: Config) -> int:
    """Print the story of a signal, order or fill."""
    story = find_story(open_reader(config), args.id)
    if args.json:
        return print_json([{"seq": e.seq, "ts_ns": e.ts_ns, "event": e.event} for e in story], bool(story))
    if not story:
        show(f"the journal knows no signal, order or fill {args.id}; botctl signals and botctl orders --all "
             "list the names", is_trouble=True)
        return EXIT_NO
    for entry in story:
        show(tell(entry))
    return EXIT_OK


def show_report(args: argparse.Namespace, config: Config) -> int:
    """Print the day, and write its chart."""
    to_ns = Clock().wall_ns()
    day = summarize(open_reader(config).since(to_ns - args.since), to_ns - args.since, to_ns)
    if args.chart:
        args.chart.write_text(chart_html(day, config.mode), encoding="utf-8")
    if args.json:
        return print_json(day_json(day), True)
    show("\n".join([*day_lines(day), *([f"charts: {args.chart}"] if args.chart else [])]))
    return EXIT_OK


def open_reader(config: Config) -> JournalReader:
    """Return a reader of the journal."""
    return JournalReader(config.path(config.journal.path))


def print_json(value: Any, is_yes: bool) -> int:
    """Print a value as JSON; return the exit code of yes or no."""
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())
    return EXIT_OK if is_yes else EXIT_NO


def show(text: str, *, is_trouble: bool = False) -> None:
    """Print text for people, who shall not be fooled by what strategies and exchanges put into it."""
    lines = "\n".join(map(visible, text.split("\n")))
    print(lines, file=sys.stderr if is_trouble else sys.stdout, flush=True)


def say(args: argparse.Namespace, text: str) -> None:
    """Print how far it is: for scripts on stderr, beside the JSON."""
    show(text, is_trouble=args.json)


def _tell_rows(args: argparse.Namespace, rows: list[dict[str, Any]], columns: tuple[str, ...],
               empty: str = "none", *, is_good: bool = True) -> int:
    if args.json:
        return print_json(rows, is_good)
    show("\n".join(table_lines(rows, columns, empty)))
    return EXIT_OK if is_good else EXIT_NO
