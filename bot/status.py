"""What the appliance is doing, gathered from beats, halt files and the journal. Reads only."""

import os
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from bot import backup
from bot.books import Books, SymbolBook
from bot.budget import Usage
from bot.clock import Clock
from bot.config import Config
from bot.errors import JournalError
from bot.events import SignalClosed, SignalReceived
from bot.explain import clock_text
from bot.halt import HaltFiles
from bot.journal import JournalReader
from bot.page import stop_text
from bot.programs import names
from bot.protection import as_held, is_protected

BEAT_BYTES_MAX = 1_000_000  # the longest, health's with a hundred findings, has some 30,000
COUNTERS = ("ticks", "ticks_lost", "signals", "orders", "fills")


def read_beats(config: Config) -> dict[str, dict[str, Any]]:
    """Return the last beat of each process, by name; one that cannot be read is left out."""
    beats = {}
    for name in names(config):
        try:
            # A strategy may put anything there: a pipe that never ends, a gigabyte, a text for a number.
            path = config.run_path(name) / f"{name}.json"
            handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW)
            with open(handle, "rb") as file:
                raw = file.read(BEAT_BYTES_MAX)
            msgspec.json.decode(raw, type=_Relied)
            beats[name] = msgspec.json.decode(raw)
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
            continue
    return beats


def stale(config: Config, beats: dict[str, dict[str, Any]]) -> list[str]:
    """Return the processes that run with an older configuration, as far as it is theirs.

    Others' strategies are not, nor are limits but for the executor; a strategy whose table changes restarts.
    """
    shared, whole = config.fingerprint(is_shared=True), config.fingerprint()
    return [name for name, beat in beats.items() if not beat["ended"] and (
        beat.get("shared_config") != shared or (name == "executor" and beat["config"] != whole))]


class _Relied(msgspec.Struct):
    # What others compute with.
    pid: Annotated[int, Meta(ge=1, le=4_194_304)]
    run: Annotated[int, Meta(ge=0, le=2**63 - 1)]  # msgspec bounds nothing by itself: 10**330 is an int
    mono_ns: Annotated[int, Meta(ge=0, le=2**63 - 1)]
    version: str
    config: str
    ended: bool
    crash_starts: list[int]
    descriptors: int
    descriptors_max: Annotated[int, Meta(ge=1)]
    levels: dict[str, list[float]] = {}


def read_usage(config: Config, name: str) -> Usage:
    """Return what another process's last beat says of the request limits."""
    try:
        return msgspec.json.decode((config.run_path(name) / f"{name}.json").read_bytes(), type=_Beat).rate
    except (OSError, msgspec.MsgspecError):
        return Usage()


class _Beat(msgspec.Struct):
    rate: Usage = Usage()


def process_rows(config: Config, beats: dict[str, dict[str, Any]], clock: Clock) -> list[dict[str, Any]]:
    """Return name, pid, state, uptime and heartbeat age of each process.

    state: UP, SILENT (it exists and does not beat: stuck, or stopped in the debugger), DOWN.
    """
    rows = []
    for name in names(config):
        beat = beats.get(name)
        if beat is None or not _exists(beat["pid"]):
            rows.append(
                {"name": name, "pid": None, "state": "DOWN", "uptime_s": None, "heartbeat_age_ms": None,
                 "memory_mb": None, "cpu_pct": None})
            continue
        age_ms = (clock.mono_ns() - beat["mono_ns"]) // 1_000_000
        state = "UP" if 0 <= age_ms <= config.bus.silence_ms else "SILENT"
        used = beats.get("health", {}).get("processes", {}).get(name, {})
        rows.append({"name": name, "pid": beat["pid"], "state": state, "heartbeat_age_ms": age_ms,
                     "uptime_s": round((clock.wall_ns() - beat["run"]) / 1e9, 1),
                     "memory_mb": used.get("rss_bytes", 0) // 1_000_000 or None,
                     "cpu_pct": used.get("cpu_pct")})
    return rows


def gather(config: Config, clock: Clock) -> dict[str, Any]:
    """Return everything `botctl status` shows."""
    beats = read_beats(config)
    processes = process_rows(config, beats, clock)
    executor = beats.get("executor", {})
    is_up = any(p["name"] == "executor" and p["state"] == "UP" for p in processes)
    books, journal_error = _books(config)
    halts = HaltFiles(config.state_path / "halt").list()
    found = next(p["state"] for p in processes if p["name"] == "executor")
    does = "is stuck: its pid lives and does not beat" if found == "SILENT" else "does not run"
    state, why = "DOWN", f"the executor {does}; positions and stops stay at the exchange"
    if is_up:
        state, why = executor.get("state", "RECONCILING"), executor.get("state_reason", "")
    halt = next((h for h in halts if h.scope == "all"), None)
    if halt is not None and state != "DOWN":  # the file is the halt; the executor's beat may lag a second
        state, why = "HALTED", f"{halt.who}: {halt.why}"
    if beats.get("guard", {}).get("flattening"):
        why += "; guard closes everything just now: positions and orders shown are those of before"
    symbols = [b for b in books.symbols.values()
               if config.owner_of(b.symbol) or b.position_qty or b.live_orders()]
    return {
        "mode": config.mode.upper(), "state": state, "state_reason": why,
        "halted": [{"scope": h.scope, "who": h.who, "why": h.why, "since_ns": h.time_ns} for h in halts],
        "processes": processes,
        "counters": {name: executor.get("counters", {}).get(name, 0) for name in COUNTERS},
        "outcomes": books.outcomes,
        "positions": [position_row(book, config, clock.wall_ns()) for book in symbols],
        "open_orders": sum(len(b.live_orders()) for b in symbols),
        "unknown_orders": sum(len(b.unknown()) for b in symbols),
        "locked_symbols": {b.symbol: b.locks for b in symbols if b.locks},
        "backup": backup.told(config, clock),
        "prices": beats.get("gateway", {}).get("prices", {}),
        "stale": beats.get("gateway", {}).get("stale", []),
        "findings": findings(beats, processes),
        "wallet_balance": books.wallet_balance,
        "journal_error": journal_error,
        "config": config.fingerprint()}


def findings(beats: dict[str, dict[str, Any]], processes: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what health and guard find wrong just now; that one of them is silent comes first."""
    found = []
    for name in ("health", "guard"):
        state = next((p["state"] for p in processes if p["name"] == name), "DOWN")
        if state == "UP":
            found += beats[name].get("findings", [])
        else:
            text = f"{name} is {state}: what it finds is not known"
            found.insert(0, {"rule": "process_down", "subject": name, "text": text, "age_s": 0})
    return found


def position_row(book: SymbolBook, config: Config, now_ns: int) -> dict[str, Any]:
    """Return one symbol's position with its exits: stop_loss as planned, stop as it rests, in words.

    unprotected_s: since when it lacks the stop it should have; None when it does not.
    """
    stops = [o for o in book.orders.values()
             if o.request.type == "stop" and o.state in ("ACCEPTED", "PARTIALLY_FILLED")]
    plan, at = book.stop_loss if book.position_qty else None, [o.request.trigger_price for o in stops]
    lacks, since_ns = not is_protected(as_held(book)), book.unprotected_ns or now_ns
    return {
        "symbol": book.symbol, "strategy": config.owner_of(book.symbol), "qty": book.position_qty,
        "entry_price": book.entry_price, "stop_loss": plan, "stop": stop_text(plan, at, lacks=lacks),
        "take_profit": book.take_profit if book.position_qty else None, "version": book.version,
        "realized_pnl": book.realized_pnl, "fees": book.fees,
        "stops_resting": [o.id for o in stops], "stops_at": at,
        "unprotected_s": max(0, now_ns - since_ns) / 1e9 if lacks else None}


def order_rows(books: Books, *, is_all: bool = False) -> list[dict[str, Any]]:
    """Return the open orders, or all that the books keep, the newest first."""
    orders = [order for book in books.symbols.values()
              for order in (book.orders.values() if is_all else book.live_orders())]
    return [{"client_order_id": order.id, "time": clock_text(order.intended_ns), "strategy": order.strategy,
             "symbol": order.request.symbol, "leg": order.leg, "side": order.request.side,
             "qty": order.request.qty, "filled_qty": order.filled_qty,
             "trigger_price": order.request.trigger_price, "state": order.state, "code": order.code or None,
             "text": order.text}
            for order in sorted(orders, key=lambda order: order.intended_ns, reverse=True)]


def signal_rows(reader: JournalReader, count: int) -> list[dict[str, Any]]:
    """Return the newest signals with their outcomes, the newest first."""
    rows = []
    for entry in reader.newest("signal", count):
        assert isinstance(entry.event, SignalReceived)
        signal, closed = entry.event.signal, reader.find("outcome", entry.event.key)
        assert closed is None or isinstance(closed, SignalClosed)
        rows.append({
            "signal": entry.event.key, "time": clock_text(entry.ts_ns), "symbol": signal.symbol,
            "target_qty": signal.target_qty, "stop_loss": signal.stop_loss, "take_profit": signal.take_profit,
            "outcome": closed.outcome if closed else "open",
            "filled_qty": closed.filled_qty if closed else None,
            "why": closed.reason if closed else "", "decided_because": signal.reason})
    return rows


def _books(config: Config) -> tuple[Books, str]:
    # Status must tell of everything else also when the journal cannot be read.
    try:
        reader = JournalReader(config.path(config.journal.path))
        try:
            return reader.books(), ""
        finally:
            reader.close()
    except JournalError as error:
        return Books(), str(error)


def _exists(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
