"""botctl: the operator's hands. Tables for people, --json for scripts.

Exit codes: 0 done; 1 the answer is no (not running, not found, nothing to resume, refused); 2 wrong
usage; 3 no answer yet, the command stays and will be taken up; 78 the configuration is wrong.
"""

import argparse
import asyncio
import getpass
import os
import select
import shutil
import signal
import sys
import termios
import tty
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from bot import __version__
from bot.apply import apply
from bot.clock import Clock
from bot.commands import Answered, Command, CommandFiles
from bot.config import Config
from bot.config_file import load, parse
from bot.doctor import examine
from bot.errors import EXIT_CONFIG, EXIT_OK, ConfigError, JournalError, RefusedError
from bot.events import SignalClosed, SignalReceived
from bot.explain import clock_text, find_story, tell
from bot.halt import HaltFiles
from bot.journal import JournalReader
from bot.page import fit, status_lines, table_lines
from bot.programs import find_config, find_state_path
from bot.status import findings, gather, position_row, process_rows, read_beats

EXIT_NO, EXIT_PENDING = 1, 3
ANSWER_TURNS = 200  # of 0.1 s: a reconciliation takes one, with a slow exchange a few


def main(argv: list[str] | None = None) -> int:
    """Run one botctl command; return its exit code."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.verb == "status" and args.json and args.watch:
        parser.error("status --watch is for people; for scripts call status --json again and again")
    try:
        if args.verb == "config":
            return args.run(args)
        try:
            config = parse(args.config or find_config())
        except ConfigError as error:
            if args.verb == "halt" and args.config is None and args.strategy is None and args.symbol is None:
                return _halt_all(args, find_state_path(), str(error))
            raise
        return args.run(args, config)
    except ConfigError as error:
        print(f"config error: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except (JournalError, RefusedError) as error:
        print(f"botctl: {error}", file=sys.stderr)
        return EXIT_NO
    except BrokenPipeError:
        sys.stderr.close()  # the reader (head, less) has seen enough
        return EXIT_OK


def _status(args: argparse.Namespace, config: Config) -> int:
    if args.watch:
        return _follow(config)
    status = gather(config, Clock())
    if args.json:
        return _json(status, status["state"] != "DOWN")
    lines = status_lines(status)
    missing = [f"{p['name']} {p['state']}" for p in status["processes"] if p["state"] != "UP"]
    if missing:
        lines.insert(1, f"NOT UP {', '.join(missing)}: see the logs in {config.path('log')}")
    print("\n".join(lines))
    return EXIT_OK if status["state"] != "DOWN" else EXIT_NO


def _follow(config: Config) -> int:
    # Plain ANSI, redrawn each second; q, Ctrl-C or the end of the terminal ends it.
    keys = sys.stdin if sys.stdin.isatty() else None
    before = termios.tcgetattr(keys) if keys else []
    try:
        if keys:
            tty.setcbreak(keys)
        print("\x1b[2J", end="")
        while True:
            columns, rows = shutil.get_terminal_size()
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


def _health(args: argparse.Namespace, config: Config) -> int:
    beats = read_beats(config)
    processes = process_rows(config, beats, Clock())
    found, health = findings(beats, processes), beats.get("health", {})
    used = [{"name": name, **row} for name, row in health.get("processes", {}).items()]
    if args.json:
        return _json({"is_healthy": not found, "findings": found, "processes": used,
                      "host": health.get("host", {}), "kills": health.get("kills", {})}, not found)
    print("\n".join([*table_lines(found, ("rule", "subject", "age_s", "text"), "nothing is wrong"), "",
                     *table_lines(used, ("name", "rss_bytes", "growth_bytes_per_s", "cpu_pct", "descriptors",
                                         "threads"), "health does not run")]))
    return EXIT_NO if found else EXIT_OK


def _doctor(args: argparse.Namespace, config: Config) -> int:
    checks = [msgspec.to_builtins(check) for check in asyncio.run(examine(config, Clock()))]
    is_good = all(check["verdict"] != "bad" for check in checks)
    if args.json:
        return _json(checks, is_good)
    print("\n".join(table_lines(checks, ("verdict", "name", "text"))))
    return EXIT_OK if is_good else EXIT_NO


def _config_apply(args: argparse.Namespace) -> int:
    path = args.config or find_config()
    config = load(args.file or path)
    way_out = "--flatten" if args.flatten else f"--adopt {args.adopt}" if args.adopt else ""
    done = apply(path, args.file or path, _reader(config).books(), way_out=way_out)
    if args.json:
        return _json(done, True)
    print("; ".join(f"{word}: {', '.join(names)}" for word, names in done.items() if names)
          or "no program changed; executor, gateway and health have read the file again")
    return EXIT_OK


def _config_check(args: argparse.Namespace) -> int:
    config = load(args.file)
    text = (f"{args.file}: good; mode {config.mode}, {len(config.strategy)} strategies on "
            f"{', '.join(config.symbols())}, fingerprint {config.fingerprint()}")
    if args.json:
        return _json({"file": str(args.file), "is_valid": True, "fingerprint": config.fingerprint()}, True)
    print(text)
    return EXIT_OK


def _halt_all(args: argparse.Namespace, state_path: Path, trouble: str) -> int:
    # The emergency verb works with a configuration that is being edited, broken or gone.
    print(f"botctl: halting {state_path} although its configuration is broken: {trouble}", file=sys.stderr)
    return _set_halt(args, state_path, "all")


def _halt(args: argparse.Namespace, config: Config) -> int:
    return _set_halt(args, config.state_path, _scope(args, config))


def _stop_executor(state_path: Path, trouble: OSError) -> int:
    # A halt that cannot be written is kept by ending the executor: no order leaves a dead process.
    print(f"botctl: the halt cannot be written: {trouble}", file=sys.stderr)
    try:
        pid = msgspec.json.decode((state_path / "run" / "executor.json").read_bytes())["pid"]
        os.kill(pid, signal.SIGKILL)
    except (OSError, KeyError, msgspec.MsgspecError) as error:
        print(f"botctl: and the executor cannot be ended: {error}; stop tradehost now", file=sys.stderr)
        return EXIT_NO
    print(f"botctl: the executor, pid {pid}, was killed; supervisord starts it again unless you stop it: "
          "end tradehost, free disk space, then start and halt", file=sys.stderr)
    return EXIT_NO


def _set_halt(args: argparse.Namespace, state_path: Path, scope: str) -> int:
    why = "".join(c if c.isprintable() else " " for c in args.reason)  # it is shown on terminals
    try:
        halt = HaltFiles(state_path / "halt").set(scope, who=getpass.getuser(), why=why, clock=Clock())
    except OSError as error:
        return _stop_executor(state_path, error)
    if args.json:
        return _json(halt, True)
    was = "" if halt.why == why else " (it was halted before; that reason stays)"
    print(f"HALTED {scope} by {halt.who}: {halt.why}{was}")
    print(
        "No entry and no reducing order leaves any more; stops stay at the exchange. To go on: botctl resume"
        + ("" if scope == "all" else f" --{scope.split(':')[0]} {scope.split(':', 1)[1]}")
    )
    return EXIT_OK


def _resume(args: argparse.Namespace, config: Config) -> int:
    scope = _scope(args, config)
    halt = HaltFiles(config.state_path / "halt").clear(scope)
    if args.json:
        return _json({"scope": scope, "was": halt}, halt is not None)
    if halt is None:
        print(f"{scope} was not halted", file=sys.stderr)
        return EXIT_NO
    print(f"RESUMED {scope}; it had been halted by {halt.who} since {clock_text(halt.time_ns)}: {halt.why}")
    return EXIT_OK


def _usage(text: str) -> NoReturn:
    print(f"botctl: {text}", file=sys.stderr)
    raise SystemExit(2)


def _scope(args: argparse.Namespace, config: Config) -> str:
    if args.strategy is not None:
        if args.strategy not in config.strategy:
            _usage(f"there is no strategy {args.strategy}; there are {', '.join(config.strategy)}")
        return f"strategy:{args.strategy}"
    if args.symbol is not None:
        known = {*config.symbols(), *(row["symbol"] for row in gather(config, Clock())["positions"])}
        if args.symbol not in known:
            _usage(f"there is no symbol {args.symbol}; there are {', '.join(sorted(known))}")
        return f"symbol:{args.symbol}"
    return "all"


def _command(args: argparse.Namespace, config: Config) -> int:
    files = CommandFiles(config.state_path / "commands")
    command = files.put(args.verb, symbol=getattr(args, "symbol", ""), who=getpass.getuser(), why=args.reason,
                        clock=Clock())
    answered = asyncio.run(_answer(files, command))
    if answered is None:
        text = f"{args.verb}: no answer from the executor; the command stays and is taken up when it runs"
    else:
        text = answered.text
    if args.json:
        _json({"is_done": answered.is_done if answered else None, "text": text}, True)
    else:
        print(text, file=sys.stdout if answered and answered.is_done else sys.stderr)
    return EXIT_PENDING if answered is None else EXIT_OK if answered.is_done else EXIT_NO


async def _answer(files: CommandFiles, command: Command) -> Answered | None:
    for _ in range(ANSWER_TURNS):
        answered = files.take_answer(command)
        if answered is not None:
            return answered
        await Clock().sleep(0.1)
    return None


def _orders(args: argparse.Namespace, config: Config) -> int:
    reader = _reader(config)
    rows: list[dict[str, Any]] = []
    for book in reader.books().symbols.values():
        for order in book.orders.values() if args.all else book.live_orders():
            request = order.request
            rows.append(
                {
                    "client_order_id": order.id,
                    "time": clock_text(order.intended_ns),
                    "strategy": order.strategy,
                    "symbol": request.symbol,
                    "leg": order.leg,
                    "side": request.side,
                    "qty": request.qty,
                    "filled_qty": order.filled_qty,
                    "trigger_price": request.trigger_price,
                    "state": order.state,
                    "code": order.code or None,
                    "text": order.text,
                }
            )
    rows.sort(key=lambda row: row["time"], reverse=True)
    if args.json:
        return _json(rows[: args.count], True)
    _table(
        rows[: args.count],
        (
            "time",
            "client_order_id",
            "symbol",
            "leg",
            "side",
            "qty",
            "filled_qty",
            "trigger_price",
            "state",
            "text",
        ),
        "no open order (--all shows the closed ones too)",
    )
    return EXIT_OK


def _signals(args: argparse.Namespace, config: Config) -> int:
    reader = _reader(config)
    rows = []
    for entry in reader.newest("signal", args.count):
        assert isinstance(entry.event, SignalReceived)
        signal, closed = entry.event.signal, reader.find("outcome", entry.event.key)
        assert closed is None or isinstance(closed, SignalClosed)
        rows.append({
            "signal": entry.event.key, "time": clock_text(entry.ts_ns), "symbol": signal.symbol,
            "target_qty": signal.target_qty, "stop_loss": signal.stop_loss, "take_profit": signal.take_profit,
            "outcome": closed.outcome if closed else "open",
            "filled_qty": closed.filled_qty if closed else None,
            "why": closed.reason if closed else "", "decided_because": signal.reason})
    if args.json:
        return _json(rows, True)
    _table(rows, ("time", "signal", "symbol", "target_qty", "outcome", "filled_qty", "why"),
           "no signal was received yet")
    return EXIT_OK


def _positions(args: argparse.Namespace, config: Config) -> int:
    rows = [position_row(book, config) for book in _reader(config).books().symbols.values()]
    if args.json:
        return _json(rows, True)
    _table(rows, ("symbol", "strategy", "qty", "entry_price", "stop_loss", "take_profit", "version",
                  "realized_pnl", "fees"), "no position yet")
    return EXIT_OK


def _explain(args: argparse.Namespace, config: Config) -> int:
    story = find_story(_reader(config), args.id)
    if args.json:
        return _json([{"seq": e.seq, "ts_ns": e.ts_ns, "event": e.event} for e in story], bool(story))
    if not story:
        print(f"the journal knows no signal, order or fill {args.id}; botctl signals and botctl orders --all "
              "list the names", file=sys.stderr)
        return EXIT_NO
    for entry in story:
        print(tell(entry))
    return EXIT_OK


def _reader(config: Config) -> JournalReader:
    return JournalReader(config.path(config.journal.path))


def _json(value: Any, is_yes: bool) -> int:
    print(msgspec.json.format(msgspec.json.encode(value), indent=2).decode())
    return EXIT_OK if is_yes else EXIT_NO


def _table(rows: list[dict[str, Any]], columns: tuple[str, ...], empty: str = "none") -> None:
    print("\n".join(table_lines(rows, columns, empty)))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="botctl", description="Look at tradehost and steer it.",
        epilog="exit codes: 0 done, 1 the answer is no, 2 wrong usage, 3 no answer yet (the command stays), "
               "78 the configuration is wrong")
    parser.add_argument("--version", action="version", version=f"tradehost {__version__}")
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--config", type=Path, metavar="FILE", help="default: the one that runs")
    shared.add_argument("--json", action="store_true", help="print JSON for scripts")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Any, text: str, example: str) -> argparse.ArgumentParser:
        added = verbs.add_parser(
            name,
            parents=[shared],
            help=text,
            description=text[0].upper() + text[1:] + ".",
            epilog=f"example: botctl {example}",
        )
        added.set_defaults(run=run)
        return added

    status = verb("status", _status, "show the state of everything", "status --watch")
    status.add_argument("--watch", action="store_true", help="redraw each second; q or Ctrl-C ends it")
    verb("health", _health, "show what is wrong, and what each process uses", "health --json")
    verb("doctor", _doctor, "examine host, files, ports, journal, exchange and account", "doctor")
    _add_config(verbs, shared)
    for name, run, text in (("halt", _halt, "let no entry and no reducing order leave; stops stay"),
                            ("resume", _resume, "end a halt, and say why it was set")):
        added = verb(name, run, text, f"{name} --symbol BTC/USDT:USDT")
        scope = added.add_mutually_exclusive_group()
        scope.add_argument("--strategy", metavar="NAME", help="only this strategy")
        scope.add_argument("--symbol", metavar="SYMBOL", help="only this symbol")
        if name == "halt":
            added.add_argument(
                "--reason", default="by hand", metavar="TEXT", help="why; it is kept and shown"
            )
    added = verb("reconcile", _command, "compare the books with the exchange now", "reconcile")
    added.add_argument("--reason", default="by hand", metavar="TEXT", help="why; it is kept")
    added = verb("adopt", _command, "make the books what the exchange says of one symbol, and unlock it",
                 'adopt BTC/USDT:USDT --reason "my own trade"')
    added.add_argument("symbol", metavar="SYMBOL")
    added.add_argument("--reason", default="by hand", metavar="TEXT", help="why; it is kept")
    orders = verb("orders", _orders, "list open orders, the newest first", "orders --all --count 20")
    orders.add_argument("--all", action="store_true", help="closed ones too, as far as the books keep them")
    signals = verb(
        "signals", _signals, "list signals with their outcomes, the newest first", "signals --count 20"
    )
    for added in (orders, signals):
        added.add_argument("--count", type=int, default=50, metavar="N", help="at most so many (50)")
    verb("positions", _positions, "list positions with their exits", "positions")
    explain = verb(
        "explain", _explain, "tell the story of a signal, order or fill", "explain sr/1763848800/17"
    )
    explain.add_argument(
        "id", metavar="ID", help="a signal (strategy/run/seq), client order id, or SYMBOL#TRADE"
    )
    return parser


def _add_config(verbs: Any, shared: argparse.ArgumentParser) -> None:
    config = verbs.add_parser("config", help="check a configuration file, or put it in force",
                              description="Check a configuration file, or put it in force.",
                              epilog="example: botctl config check ops/bot.example.toml")
    checks = config.add_subparsers(dest="what", required=True, metavar="check|apply")
    added = checks.add_parser(
        "apply", parents=[shared], help="let strategies come, change and go; nothing else restarts",
        description="Check the file and put it in force: strategies come, change and go, nothing restarts.",
        epilog="example: botctl config apply my.toml")
    added.set_defaults(run=_config_apply)
    added.add_argument("file", type=Path, nargs="?", metavar="FILE",
                       help="replaces the running one; default: that one, as it is now")
    ways = added.add_mutually_exclusive_group()
    ways.add_argument("--flatten", action="store_true", help="close what a removed strategy holds (not yet)")
    ways.add_argument("--adopt", metavar="NAME", help="give what it holds to this strategy (not yet)")
    check = checks.add_parser("check", help="check a configuration file; exit 78 when it is wrong",
                              epilog="example: botctl config check ops/bot.example.toml")
    check.set_defaults(run=_config_check)
    check.add_argument("file", type=Path, metavar="FILE")
    check.add_argument("--json", action="store_true", help="print JSON for scripts")


if __name__ == "__main__":
    raise SystemExit(main())
