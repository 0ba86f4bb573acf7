"""botctl: the operator's hands. Tables for people, --json for scripts.

Exit codes: 0 done; 1 the answer is no (not running, not found, nothing to resume, refused); 2 wrong
usage; 3 no answer yet, the command stays for ten minutes; 78 the configuration is wrong.
"""

import argparse
import errno
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from bot import __version__, alertmanager, apply, restore, steer, views
from bot.config_file import parse
from bot.errors import EXIT_CONFIG, EXIT_NO, EXIT_OK, EXIT_USAGE, ConfigError, TradehostError, UsageError
from bot.programs import find_config


def _count(text: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,6}", text):
        raise argparse.ArgumentTypeError(f"a count is 1 or more; was {text!r}")
    return int(text)


def _name(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("give a signal, order or fill; botctl signals lists some")
    return text


def _reason(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)  # others will see it on their terminals


def _span_ns(text: str) -> int:
    units = {"m": 60, "h": 3_600, "d": 86_400}
    if not re.fullmatch(r"[1-9][0-9]{0,4}[mhd]", text):
        raise argparse.ArgumentTypeError(f"a span is a number and m, h or d, like 24h; was {text!r}")
    return int(text[:-1]) * units[text[-1]] * 1_000_000_000


class Option(NamedTuple):
    """An argument of a verb, as argparse takes it. group: of several with one group, one may be given."""

    name: str
    how: dict[str, Any]
    group: str = ""


def option(name: str, group: str = "", **how: Any) -> Option:
    """Return an Option; how: the keywords of argparse's add_argument."""
    return Option(name, how, group)


class Verb(NamedTuple):
    """A verb. name: "config check" is check below config; run: its function; example: what follows the name.

    reads_config: run is given the configuration that runs; without, it finds its own.
    """

    name: str
    run: Callable[..., int]
    text: str
    example: str = ""
    options: tuple[Option, ...] = ()
    reads_config: bool = True


REASON = option("--reason", type=_reason, default="by hand", metavar="TEXT", help="why; it is kept and shown")
SCOPE = (option("--strategy", "scope", metavar="NAME", help="only this strategy"),
         option("--symbol", "scope", metavar="SYMBOL", help="only this symbol"))
COUNT = option("--count", type=_count, default=50, metavar="N", help="at most so many (50)")
VERBS = (
    Verb("status", views.show_status, "show the state of everything", "--watch", (
        option("--watch", action="store_true", help="redraw each second; q or Ctrl-C ends it"),)),
    Verb("health", views.show_health, "show what is wrong, and what each process uses", "--json"),
    Verb("doctor", views.show_doctor, "examine host, files, ports, journal, exchange and account",
         "--json", (option("--candidate", action="store_true",
                           help="of a release or file that is to run next: what runs now may differ"),)),
    Verb("config check", apply.check_config, "check a configuration file; exit 78 when it is wrong",
         "ops/bot.example.toml", (
             option("file", type=Path, nargs="?", metavar="FILE", help="default: the one that runs"),),
         reads_config=False),
    Verb("config apply", apply.apply_config,
         "put a file in force: strategies come, change and go, nothing else restarts", "my.toml", (
             option("file", type=Path, nargs="?", metavar="FILE",
                    help="replaces the running one; default: that one, as it is now"),
             option("--flatten", "held", action="store_true",
                    help="halt and close what a strategy that goes holds, first"),
             option("--adopt", "held", metavar="NAME",
                    help="let this strategy take over what one that goes holds")), reads_config=False),
    Verb("journal verify", views.verify_journal,
         "fold the journal from its first event on; exit 1 when it is damaged", "--json"),
    Verb("backup make", restore.make_backup,
         "make an encrypted backup, restore and fold it, and look at all that are kept"),
    Verb("backup list", restore.list_backups, "list the backups, each as its bytes say now"),
    Verb("backup key", restore.make_key, "make the key pair that backups are encrypted to", "backup.key", (
        option("file", type=Path, metavar="FILE", help="for the private half; -: print both as JSON"),),
         reads_config=False),
    Verb("restore", restore.restore_backup,
         "put a backup, or an empty one, in the journal's place, halted; the executor must be stopped",
         "journal-20260101T002000Z-5000.age --key backup.key", (
             option("file", type=Path, nargs="?", metavar="FILE", help="the backup"),
             option("--key", type=Path, metavar="KEY", help="file with the private key; -: standard input"),
             option("--empty", action="store_true",
                    help="there is no backup: begin an empty journal; flatten first"),
             option("--replace", action="store_true", help="set aside the journal that is there"))),
    Verb("halt", steer.halt, "let no entry and no reducing order leave; stops stay",
         "--symbol BTC/USDT:USDT", (*SCOPE, REASON), reads_config=False),
    Verb("cancel", steer.command, "cancel our open orders that are not exits; stops stay",
         "--symbol BTC/USDT:USDT", (*SCOPE, REASON)),
    Verb("flatten", steer.flatten, "halt, cancel and close: everything, even with the rest broken",
         "--symbol BTC/USDT:USDT", (*SCOPE, REASON), reads_config=False),
    Verb("resume", steer.resume, "end a halt, and say why it was set", "--symbol BTC/USDT:USDT", SCOPE),
    Verb("reconcile", steer.command, "compare the books with the exchange now", "", (REASON,)),
    Verb("adopt", steer.command, "make the books what the exchange says of one symbol, and unlock it",
         'BTC/USDT:USDT --reason "my own trade"', (option("symbol", metavar="SYMBOL"), REASON)),
    Verb("orders", views.list_orders, "list open orders, the newest first", "--all --count 20", (
        option("--all", action="store_true", help="closed ones too, as far as the books keep them"), COUNT)),
    Verb("signals", views.list_signals, "list the newest signals (of 100,000 events)", "--count 20",
         (COUNT,)),
    Verb("positions", views.list_positions, "list positions with their exits"),
    Verb("alert test", alertmanager.test, "send an alert the whole way, and say who took it"),
    Verb("alert silence", alertmanager.silence,
         "keep alerts from people for a while; not what health tells itself",
         '--for 15m --reason "a deploy"', (
             option("--for", dest="span", type=_span_ns, default="15m", metavar="SPAN",
                    help="15m, 2h, 1d (15m)"),
             option("--alert", metavar="NAME", help="only this one (all but the Watchdog)"), REASON)),
    Verb("alert unsilence", alertmanager.unsilence, "end the silences that botctl began",
         '--reason "a deploy"', (
             option("--reason", type=_reason, metavar="TEXT", help="only those of this reason (all)"),)),
    Verb("report", views.show_report, "tell the day: money, slippage, latency, outcomes, incidents",
         "--since 24h --chart day.html", (
             option("--since", type=_span_ns, default="24h", metavar="SPAN", help="30m, 24h, 7d (24h)"),
             option("--chart", type=Path, metavar="FILE", help="write an HTML file with the charts"))),
    Verb("explain", views.tell_story, "tell the story of a signal, order or fill", "sr/1763848800/17", (
        option("id", type=_name, metavar="ID",
               help="a signal (strategy/run/seq), client order id, fill (SYMBOL#TRADE), or SYMBOL: its "
                    "locks, adoptions, and what no signal stands behind"),)),
)
EXIT_CODES = ("exit codes: 0 done, 1 the answer is no, 2 wrong usage, 3 no answer yet (the command stays), "
              "78 the configuration is wrong")
HELP = {errno.EACCES: "try sudo, or as a user who may", errno.EPERM: "try sudo, or as a user who may",
        errno.ENOSPC: "free disk space", errno.ENOENT: "make the folder"}
# Words that stand for several verbs.
GROUPS = {"config": "check a configuration file, or put it in force",
          "backup": "make backups of the journal, and look at them",
          "journal": "prove that the journal is whole",
          "alert": "try the way to a person, or close it for planned work"}


def main(argv: list[str] | None = None) -> int:
    """Run one botctl command; return its exit code."""
    args, unknown = _parser().parse_known_args(argv)
    if unknown:  # argparse would show the usage of botctl, not of the verb
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    code = EXIT_NO
    try:
        if args.reads_config:
            return args.run(args, parse(args.config or find_config()))
        return args.run(args)
    except BrokenPipeError:
        sys.stderr.close()  # the reader (head, less) has seen enough
        return EXIT_OK
    except KeyboardInterrupt:
        text = ("interrupted: a command that nobody had taken up was taken back, one that was goes on. Look: "
                "botctl status")
    except OSError as error:
        text = (f"{error.filename or 'this host'}: {error.strerror or error}; "
                f"{HELP.get(error.errno or 0, 'mend it')}, then type it again")
    except TradehostError as error:
        text = str(error)
        code = {ConfigError: EXIT_CONFIG, UsageError: EXIT_USAGE}.get(type(error), EXIT_NO)
    views.show(f"{'config error' if code == EXIT_CONFIG else 'botctl'}: {text}", is_trouble=True)
    if args.json:
        views.print_json({"error": text}, is_yes=False)
    return code


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        if "--json" in sys.argv:
            views.print_json({"error": message}, is_yes=False)
        super().error(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="botctl", description="Look at tradehost and steer it.", epilog=EXIT_CODES)
    parser.add_argument("--version", action="version", version=f"tradehost {__version__}")
    places: dict[str, Any] = {"": parser.add_subparsers(dest="verb", required=True, metavar="VERB")}
    for verb in VERBS:
        group, _, word = verb.name.rpartition(" ")
        if group not in places:
            words = "|".join(v.name.split()[-1] for v in VERBS if v.name.startswith(f"{group} "))
            added = _add(places[""], group, GROUPS[group], f"{verb.name} {verb.example}")
            places[group] = added.add_subparsers(dest="what", required=True, metavar=words)
        _add_options(_add(places[group], word, verb.text, f"{verb.name} {verb.example}"), verb)
    return parser


def _add(place: Any, word: str, text: str, example: str) -> argparse.ArgumentParser:
    return place.add_parser(word, help=text, description=text[0].upper() + text[1:] + ".",
                            epilog=f"{EXIT_CODES}. example: botctl {example}".rstrip())


def _add_options(parser: argparse.ArgumentParser, verb: Verb) -> None:
    parser.set_defaults(run=verb.run, reads_config=verb.reads_config, parser=parser)
    groups: dict[str, Any] = {"": parser}
    for name, how, group in verb.options:
        if group not in groups:
            groups[group] = parser.add_mutually_exclusive_group()
        groups[group].add_argument(name, **how)
    parser.add_argument("--config", type=Path, metavar="FILE", help="default: the one that runs")
    parser.add_argument("--json", action="store_true", help="print JSON for scripts")


if __name__ == "__main__":
    raise SystemExit(main())
