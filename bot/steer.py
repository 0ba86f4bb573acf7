"""What botctl does to trading: halt, resume, cancel, flatten, reconcile, adopt."""

import argparse
import asyncio
from pathlib import Path
from typing import NoReturn

import msgspec

from bot.clock import Clock
from bot.commands import WAIT_S_MAX, Answered, CommandFiles
from bot.config import Config
from bot.config_file import parse
from bot.errors import EXIT_NO, EXIT_OK, EXIT_PENDING, ConfigError, RefusedError, UsageError
from bot.explain import clock_text
from bot.flatten import flatten_here
from bot.halt import HaltFiles, user
from bot.probe import Supervisor
from bot.programs import find_config, find_state_path
from bot.status import gather, process_rows, read_beats
from bot.views import print_json, say, show

PICKED_UP_S = 5.0  # guard looks four times a second; who does not take a flatten up by then is stuck
STOP_TURNS, STOP_TURN_S = 100, 0.1  # supervisord kills it after 8 s, its stopwaitsecs


def halt(args: argparse.Namespace) -> int:
    """Write the halt; everything is halted also while the configuration is being edited, broken or gone."""
    config, state_path = _find(args)
    return _set_halt(args, state_path, _scope(args, config) if config else "all")


def _find(args: argparse.Namespace) -> tuple[Config | None, Path]:
    # What is meant for everything needs the folder alone; what runs has read its configuration long ago.
    try:
        config = parse(args.config or find_config())
        return config, config.state_path
    except ConfigError as error:
        if args.config or args.strategy is not None or args.symbol is not None:
            raise
        state_path = find_state_path()
        show(f"botctl: {args.verb} in {state_path} although its configuration is broken: {error}",
             is_trouble=True)
        return None, state_path


def _set_halt(args: argparse.Namespace, state_path: Path, scope: str) -> int:
    halts = HaltFiles(state_path / "halt")
    try:
        halt = halts.set(scope, who=user(), why=args.reason, clock=Clock())
    except OSError as error:
        _stop_executor(state_path, error)
    if args.json:
        return print_json(halt, True)
    was = "" if halt.why == args.reason else " (it was halted before; that reason stays)"
    show(f"HALTED {scope} by {halt.who}: {halt.why}{was}")
    show(
        "No entry and no reducing order leaves any more; stops stay at the exchange. To go on: botctl resume"
        + ("" if scope == "all" else f" --{scope.split(':')[0]} {scope.split(':', 1)[1]}"))
    return EXIT_OK


def _stop_executor(state_path: Path, trouble: OSError) -> NoReturn:
    # A halt that cannot be written is kept by ending the executor: no order leaves a dead process.
    supervisor, did, error = Supervisor(state_path / "run" / "supervisor.sock"), "", ""
    is_told = supervisor.stop("executor")
    for _ in range(STOP_TURNS if is_told else 0):
        if any(program.name == "executor" and not program.pid for program in supervisor.programs()):
            did = "was stopped"
            break
        asyncio.run(Clock().sleep(STOP_TURN_S))
    try:
        pid = msgspec.json.decode((state_path / "run" / "executor.json").read_bytes())["pid"]
        did = did or (f"(pid {pid}) was killed" if supervisor.kill("executor", pid) else "")
    except (OSError, KeyError, msgspec.MsgspecError) as unread:
        error = str(unread)
    after = "it is not started again" if is_told else "supervisord may start it again: end tradehost"
    raise RefusedError(f"the halt cannot be written: {trouble}; the executor " + (
        f"{did}; {after}. Free disk space, halt, then: supervisorctl start executor" if did else
        f"cannot be ended: {error}; stop tradehost now"))


def resume(args: argparse.Namespace, config: Config) -> int:
    """End a halt, and say why it was set."""
    scope = _scope(args, config)
    halt = HaltFiles(config.state_path / "halt").clear(scope, clock=Clock())
    if args.json:
        return print_json({"scope": scope, "was": halt}, halt is not None)
    if halt is None:
        halted = ", ".join(h.scope for h in HaltFiles(config.state_path / "halt").list())
        show(f"{scope} was not halted; halted: {halted or 'nothing'}", is_trouble=True)
        return EXIT_NO
    show(f"RESUMED {scope}; it had been halted by {halt.who} since {clock_text(halt.time_ns)}: {halt.why}")
    return EXIT_OK


def command(args: argparse.Namespace, config: Config) -> int:
    """Leave a command for the executor, and print its answer."""
    kind, _, name = _scope(args, config).partition(":")
    answered = asyncio.run(CommandFiles(config.path("commands")).ask(
        args.verb, strategy=name if kind == "strategy" else "",
        symbol=name if kind == "symbol" else getattr(args, "symbol", None) or "",
        who=user(), why=args.reason, clock=Clock()))
    return _tell_answer(args, answered, "the executor")


def flatten(args: argparse.Namespace) -> int:
    """Close one strategy or symbol through the executor, everything through guard or from here.

    With a broken configuration through guard alone, which runs with the one that it was started with.
    """
    config, state_path = _find(args)
    if config is None:
        asked = CommandFiles(state_path / "guard").ask("flatten", who=user(), why=args.reason, clock=Clock())
        return _tell_answer(args, asyncio.run(asked), "guard")
    scope = _scope(args, config)
    if scope != "all":  # what it flattened stays halted
        if not _is_up(config, "executor"):
            raise RefusedError(
                f"the executor does not run, and flattening {scope} goes through it; botctl halt "
                f"--{scope.replace(':', ' ', 1)} holds it, botctl flatten closes everything")
        HaltFiles(config.path("halt")).set(scope, who=user(), why=f"flatten: {args.reason}", clock=Clock())
        return command(args, config)
    answered = asyncio.run(_flatten_by_guard(args, config)) if _is_up(config, "guard") else None
    if answered is None:
        say(args, "guard does not answer: flattening from here, do not end this")
        is_flat = asyncio.run(flatten_here(config, lambda text: say(args, text), who=user(), why=args.reason))
        answered = Answered(is_flat, "flat: the exchange says no position and no order; trading stays halted"
                            if is_flat else "all is flat but what is to be closed in the exchange's app; "
                                            "trading stays halted")
    return _tell_answer(args, answered, "guard")


async def _flatten_by_guard(args: argparse.Namespace, config: Config) -> Answered | None:
    # None: guard did not take it up, and will not.
    files, clock, shown = CommandFiles(config.state_path / "guard"), Clock(), 0
    try:
        command = files.put("flatten", who=user(), why=args.reason, clock=clock)
    except OSError:
        return None
    since_ns, is_taken = clock.mono_ns(), False
    try:
        while (answered := files.take_answer(command)) is None:
            beat = read_beats(config).get("guard", {})
            is_taken = is_taken or bool(beat.get("flattening"))
            is_silent = clock.mono_ns() - max(beat.get("mono_ns", 0), since_ns) > PICKED_UP_S * 1e9
            if is_silent or (not is_taken and clock.mono_ns() - since_ns > PICKED_UP_S * 1e9):
                files.withdraw(command)
                return files.take_answer(command)
            said = beat.get("said", []) if is_taken else []
            for text in said[shown:]:
                say(args, text)
            shown = max(shown, len(said))
            await clock.sleep(0.2)
    except asyncio.CancelledError:  # Ctrl-C: what guard has not taken up it shall not find later
        files.withdraw(command)
        raise
    return answered


def _scope(args: argparse.Namespace, config: Config) -> str:
    # adopt has a symbol too, which the executor checks: it may be one that only the exchange knows.
    # resume ends every halt there is, also of what left the configuration.
    halted = [h.scope for h in HaltFiles(config.path("halt")).list()] if args.verb == "resume" else []
    if getattr(args, "strategy", None) is not None:
        if args.strategy not in config.strategy and f"strategy:{args.strategy}" not in halted:
            raise UsageError(f"there is no strategy {args.strategy}; there are {', '.join(config.strategy)}")
        return f"strategy:{args.strategy}"
    if getattr(args, "symbol", None) is not None and args.verb != "adopt":
        known = {*config.symbols(), *(row["symbol"] for row in gather(config, Clock())["positions"])}
        if args.symbol not in known and f"symbol:{args.symbol}" not in halted:
            raise UsageError(f"there is no symbol {args.symbol}; there are {', '.join(sorted(known))}")
        return f"symbol:{args.symbol}"
    return "all"


def _tell_answer(args: argparse.Namespace, answered: Answered | None, who: str) -> int:
    text = (answered.text if answered is not None else
            f"{args.verb}: no answer from {who}; the command stays for {WAIT_S_MAX // 60} minutes, and is "
            "taken up when it runs")
    if args.json:
        print_json({"is_done": answered.is_done if answered else None, "text": text}, True)
    else:
        show(text, is_trouble=not (answered and answered.is_done))
    return EXIT_PENDING if answered is None else EXIT_OK if answered.is_done else EXIT_NO


def _is_up(config: Config, name: str) -> bool:
    rows = process_rows(config, read_beats(config), Clock())
    return any(row["name"] == name and row["state"] == "UP" for row in rows)
