"""botctl: the operator's hands. Tables for people, --json for scripts.

Exit codes: 0 done; 1 the answer is no (not running, not found, nothing to resume, refused); 2 wrong
usage; 3 no answer yet, the command stays and will be taken up; 78 the configuration is wrong.
"""

import argparse
import asyncio
import getpass
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from bot import __version__
from bot.apply import apply, leaving
from bot.clock import Clock
from bot.commands import Answered, Command, CommandFiles
from bot.config import Config
from bot.config_file import load, parse
from bot.doctor import examine
from bot.errors import EXIT_CONFIG, EXIT_OK, ConfigError, JournalError, RefusedError
from bot.exchange import TRADABLE
from bot.explain import clock_text
from bot.flatten import flatten_here
from bot.halt import HaltFiles
from bot.journal import JournalReader
from bot.page import table_lines
from bot.probe import Supervisor
from bot.programs import find_config, find_state_path
from bot.status import gather, process_rows, read_beats
from bot.user_class import load_class
from bot.views import (
    EXIT_NO,
    list_orders,
    list_positions,
    list_signals,
    open_reader,
    print_json,
    show_health,
    show_report,
    show_status,
    tell_story,
    verify_journal,
)

EXIT_PENDING = 3
PICKED_UP_S = 5.0  # guard looks four times a second; who does not take a flatten up by then is stuck
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


def _doctor(args: argparse.Namespace, config: Config) -> int:
    checks = [msgspec.to_builtins(check) for check in asyncio.run(examine(config, Clock()))]
    is_good = all(check["verdict"] != "bad" for check in checks)
    if args.json:
        return print_json(checks, is_good)
    print("\n".join(table_lines(checks, ("verdict", "name", "text"))))
    return EXIT_OK if is_good else EXIT_NO


def _config_apply(args: argparse.Namespace) -> int:
    path = args.config or find_config()
    config = load(args.file or path)
    reader = open_reader(config)
    closed = _flatten_leaving(args, config, reader) if args.flatten else []
    done = apply(path, args.file or path, reader.books(), heir=args.adopt or "")
    for scope in closed:  # the halt that kept it flat until it was gone
        HaltFiles(config.path("halt")).clear(scope)
    if args.json:
        return print_json(done, True)
    print("; ".join(f"{word}: {', '.join(names)}" for word, names in done.items() if names)
          or "no program changed; executor, gateway and health have read the file again")
    return EXIT_OK


def _flatten_leaving(args: argparse.Namespace, config: Config, reader: JournalReader) -> list[str]:
    # Halt and close each strategy that goes; return the halts. Their exits follow within seconds.
    halts: list[str] = []
    for _ in range(ANSWER_TURNS):
        left = leaving(config, reader.books())
        for name in left.keys() - {scope.partition(":")[2] for scope in halts}:
            _say(args, f"{left[name]}: closing")
            halts.append(f"strategy:{name}")
            _close_leaving(config, name)
        if not left:
            return halts
        asyncio.run(Clock().sleep(0.1))
    raise RefusedError(
        f"{'; '.join(left.values())} still; halted, not removed: botctl resume --strategy NAME"
    )


def _close_leaving(config: Config, name: str) -> None:
    who, why = getpass.getuser(), "config apply --flatten"
    HaltFiles(config.path("halt")).set(f"strategy:{name}", who=who, why=why, clock=Clock())
    files = CommandFiles(config.state_path / "commands")
    answered = asyncio.run(
        _answer(files, files.put("flatten", strategy=name, who=who, why=why, clock=Clock()))
    )
    if answered is None or not answered.is_done:
        raise RefusedError(
            f"{name} is not flat: {answered.text if answered else 'no answer from the executor'}; "
            f"halted, not removed. Undo: botctl resume --strategy {name}"
        )


def _config_check(args: argparse.Namespace) -> int:
    config = load(args.file)
    if config.exchange.id not in TRADABLE:
        raise ConfigError(f'exchange.id: must be one of {", ".join(TRADABLE)}; was "{config.exchange.id}"')
    for name in config.strategy:
        try:
            load_class(config, name)
        except ConfigError as error:  # its process may have another Python path
            print(f"note: {error}", file=sys.stderr)
    if args.json:
        return print_json({"file": str(args.file), "is_valid": True, "fingerprint": config.fingerprint()},
                          True)
    print(f"{args.file}: good; mode {config.mode}, {len(config.strategy)} strategies on "
            f"{', '.join(config.symbols())}, fingerprint {config.fingerprint()}")
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
        is_killed, error = Supervisor(state_path / "run" / "supervisor.sock").kill("executor", pid), ""
    except (OSError, KeyError, msgspec.MsgspecError) as unread:
        is_killed, error = False, str(unread)
    if not is_killed:
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
        return print_json(halt, True)
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
        return print_json({"scope": scope, "was": halt}, halt is not None)
    if halt is None:
        print(f"{scope} was not halted", file=sys.stderr)
        return EXIT_NO
    print(f"RESUMED {scope}; it had been halted by {halt.who} since {clock_text(halt.time_ns)}: {halt.why}")
    return EXIT_OK


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,6}", text):
        raise argparse.ArgumentTypeError(f"a count is 1 or more; was {text!r}")
    return int(text)


def _name(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("give a signal, order or fill; botctl signals lists some")
    return text


def _span_ns(text: str) -> int:
    units = {"m": 60, "h": 3_600, "d": 86_400}
    if not re.fullmatch(r"[1-9][0-9]{0,4}[mhd]", text):
        raise argparse.ArgumentTypeError(f"a span is a number and m, h or d, like 24h; was {text!r}")
    return int(text[:-1]) * units[text[-1]] * 1_000_000_000


def _usage(text: str) -> NoReturn:
    print(f"botctl: {text}", file=sys.stderr)
    raise SystemExit(2)


def _scope(args: argparse.Namespace, config: Config) -> str:
    if getattr(args, "strategy", None) is not None:
        if args.strategy not in config.strategy:
            _usage(f"there is no strategy {args.strategy}; there are {', '.join(config.strategy)}")
        return f"strategy:{args.strategy}"
    if getattr(args, "symbol", None) is not None and args.verb != "adopt":
        known = {*config.symbols(), *(row["symbol"] for row in gather(config, Clock())["positions"])}
        if args.symbol not in known:
            _usage(f"there is no symbol {args.symbol}; there are {', '.join(sorted(known))}")
        return f"symbol:{args.symbol}"
    return "all"


def _command(args: argparse.Namespace, config: Config) -> int:
    kind, _, name = _scope(args, config).partition(":")
    files = CommandFiles(config.state_path / "commands")
    command = files.put(args.verb, strategy=name if kind == "strategy" else "",
                        symbol=name if kind == "symbol" else getattr(args, "symbol", None) or "",
                        who=getpass.getuser(), why=args.reason, clock=Clock())
    return _tell_answer(args, asyncio.run(_answer(files, command)), "the executor")


def _tell_answer(args: argparse.Namespace, answered: Answered | None, who: str) -> int:
    text = (answered.text if answered is not None else
            f"{args.verb}: no answer from {who}; the command stays and is taken up when it runs")
    if args.json:
        print_json({"is_done": answered.is_done if answered else None, "text": text}, True)
    else:
        print(text, file=sys.stdout if answered and answered.is_done else sys.stderr)
    return EXIT_PENDING if answered is None else EXIT_OK if answered.is_done else EXIT_NO


def _flatten(args: argparse.Namespace, config: Config) -> int:
    scope = _scope(args, config)
    if scope != "all":  # through the executor, and what it flattened stays halted
        if not _is_up(config, "executor"):
            raise RefusedError(
                f"the executor does not run, and flattening {scope} goes through it; botctl halt "
                f"--{scope.replace(':', ' ', 1)} holds it, botctl flatten closes everything"
            )
        HaltFiles(config.path("halt")).set(scope, who=getpass.getuser(), why=f"flatten: {args.reason}",
                                           clock=Clock())
        return _command(args, config)
    answered = asyncio.run(_flatten_by_guard(args, config)) if _is_up(config, "guard") else None
    if answered is None:
        _say(args, "guard does not answer: flattening from here, do not end this")
        asyncio.run(flatten_here(config, lambda text: _say(args, text), who=getpass.getuser(),
                                 why=args.reason))
        answered = Answered(True, "flat: the exchange says no position and no order; trading stays halted")
    return _tell_answer(args, answered, "guard")


async def _flatten_by_guard(args: argparse.Namespace, config: Config) -> Answered | None:
    # None: guard did not take it up, and will not.
    files, clock, shown = CommandFiles(config.state_path / "guard"), Clock(), 0
    try:
        command = files.put("flatten", who=getpass.getuser(), why=args.reason, clock=clock)
    except OSError:
        return None
    since_ns, is_taken = clock.mono_ns(), False
    while (answered := files.take_answer(command)) is None:
        beat = read_beats(config).get("guard", {})
        is_taken = is_taken or bool(beat.get("flattening"))
        is_silent = clock.mono_ns() - max(beat.get("mono_ns", 0), since_ns) > PICKED_UP_S * 1e9
        if is_silent or (not is_taken and clock.mono_ns() - since_ns > PICKED_UP_S * 1e9):
            files.withdraw(command)
            return files.take_answer(command)
        said = beat.get("said", []) if is_taken else []
        for text in said[shown:]:
            _say(args, text)
        shown = max(shown, len(said))
        await clock.sleep(0.2)
    return answered


def _say(args: argparse.Namespace, text: str) -> None:
    print(text, file=sys.stderr if args.json else sys.stdout, flush=True)


def _is_up(config: Config, name: str) -> bool:
    rows = process_rows(config, read_beats(config), Clock())
    return any(row["name"] == name and row["state"] == "UP" for row in rows)


async def _answer(files: CommandFiles, command: Command) -> Answered | None:
    for _ in range(ANSWER_TURNS):
        answered = files.take_answer(command)
        if answered is not None:
            return answered
        await Clock().sleep(0.1)
    return None


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

    status = verb("status", show_status, "show the state of everything", "status --watch")
    status.add_argument("--watch", action="store_true", help="redraw each second; q or Ctrl-C ends it")
    verb("health", show_health, "show what is wrong, and what each process uses", "health --json")
    verb("doctor", _doctor, "examine host, files, ports, journal, exchange and account", "doctor")
    _add_config(verbs, shared)
    _add_journal(verbs, shared)
    for name, run, text in (
            ("halt", _halt, "let no entry and no reducing order leave; stops stay"),
            ("cancel", _command, "cancel our open orders that are not exits; stops stay"),
            ("flatten", _flatten, "halt, cancel and close: everything, even with the rest broken"),
            ("resume", _resume, "end a halt, and say why it was set")):
        added = verb(name, run, text, f"{name} --symbol BTC/USDT:USDT")
        scope = added.add_mutually_exclusive_group()
        scope.add_argument("--strategy", metavar="NAME", help="only this strategy")
        scope.add_argument("--symbol", metavar="SYMBOL", help="only this symbol")
        if name != "resume":
            added.add_argument(
                "--reason", default="by hand", metavar="TEXT", help="why; it is kept and shown"
            )
    added = verb("reconcile", _command, "compare the books with the exchange now", "reconcile")
    added.add_argument("--reason", default="by hand", metavar="TEXT", help="why; it is kept")
    added = verb("adopt", _command, "make the books what the exchange says of one symbol, and unlock it",
                 'adopt BTC/USDT:USDT --reason "my own trade"')
    added.add_argument("symbol", metavar="SYMBOL")
    added.add_argument("--reason", default="by hand", metavar="TEXT", help="why; it is kept")
    orders = verb("orders", list_orders, "list open orders, the newest first", "orders --all --count 20")
    orders.add_argument("--all", action="store_true", help="closed ones too, as far as the books keep them")
    signals = verb(
        "signals", list_signals, "list signals with their outcomes, the newest first", "signals --count 20"
    )
    for added in (orders, signals):
        added.add_argument("--count", type=_count, default=50, metavar="N", help="at most so many (50)")
    verb("positions", list_positions, "list positions with their exits", "positions")
    report = verb("report", show_report, "tell the day: money, slippage, latency, outcomes, incidents",
                  "report --since 24h --chart day.html")
    report.add_argument("--since", type=_span_ns, default="24h", metavar="SPAN", help="30m, 24h, 7d (24h)")
    report.add_argument("--chart", type=Path, metavar="FILE", help="write an HTML file with the charts")
    explain = verb(
        "explain", tell_story, "tell the story of a signal, order or fill", "explain sr/1763848800/17"
    )
    explain.add_argument(
        "id", type=_name, metavar="ID", help="a signal (strategy/run/seq), client order id, or SYMBOL#TRADE"
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
    ways.add_argument(
        "--flatten", action="store_true", help="halt and close what a strategy that goes holds, first"
    )
    ways.add_argument("--adopt", metavar="NAME", help="let this strategy take over what one that goes holds")
    check = checks.add_parser("check", help="check a configuration file; exit 78 when it is wrong",
                              epilog="example: botctl config check ops/bot.example.toml")
    check.set_defaults(run=_config_check)
    check.add_argument("file", type=Path, metavar="FILE")
    check.add_argument("--json", action="store_true", help="print JSON for scripts")


def _add_journal(verbs: Any, shared: argparse.ArgumentParser) -> None:
    journal = verbs.add_parser("journal", help="prove that the journal is whole",
                               description="Prove that the journal is whole: every event and its hash.",
                               epilog="example: botctl journal verify")
    verify = journal.add_subparsers(dest="what", required=True, metavar="verify").add_parser(
        "verify", parents=[shared], help="fold it from its first event on; exit 1 when it is damaged",
        epilog="example: botctl journal verify --json")
    verify.set_defaults(run=verify_journal)


if __name__ == "__main__":
    raise SystemExit(main())
