"""The schemas of botctl --json, a verb each: a field that is missing, new or of another type fails."""

from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import msgspec

Number = int | float


class Strict(msgspec.Struct, forbid_unknown_fields=True):
    """No field but those that are named."""


class Error(Strict):
    """What any verb prints that does not do it."""

    error: str


class Halt(Strict):
    scope: str
    who: str
    why: str
    since_ns: int


class HaltAnswer(Strict):
    scope: str
    who: str
    why: str
    time_ns: int


class Resumed(Strict):
    scope: str
    was: HaltAnswer | None


class Process(Strict):
    name: str
    pid: int | None
    state: str
    uptime_s: Number | None
    heartbeat_age_ms: int | None
    memory_mb: int | None
    cpu_pct: Number | None


class Counters(Strict):
    ticks: int
    ticks_lost: int
    signals: int
    orders: int
    fills: int


class Position(Strict):
    symbol: str
    strategy: str | None
    qty: Decimal
    entry_price: Decimal | None
    stop_loss: Decimal | None
    stop: str | None
    take_profit: Decimal | None
    version: int
    realized_pnl: Decimal
    fees: Decimal
    stops_resting: list[str]
    stops_at: list[Decimal]
    unprotected_s: Number | None


class Finding(Strict):
    rule: str
    subject: str
    text: str
    age_s: int


class BackupTold(Strict):
    is_good: bool
    text: str
    newest: str
    age_s: int | None
    kept: int
    bytes: int
    is_old: bool


class Status(Strict):
    mode: str
    state: str
    state_reason: str
    halted: list[Halt]
    processes: list[Process]
    counters: Counters
    outcomes: dict[str, int]
    positions: list[Position]
    open_orders: int
    unknown_orders: int
    locked_symbols: dict[str, dict[str, str]]
    backup: BackupTold | None
    prices: dict[str, dict[str, Number | None]]
    stale: list[str]
    findings: list[Finding]
    wallet_balance: Decimal | None
    journal_error: str
    config: str


class Used(Strict):
    name: str
    rss_bytes: int
    growth_bytes_per_s: Number
    cpu_s: Number
    cpu_pct: Number
    descriptors: int
    threads: int


class Health(Strict):
    is_healthy: bool
    findings: list[Finding]
    processes: list[Used]
    host: dict[str, int]
    kills: dict[str, int]


class Check(Strict):
    name: str
    verdict: str
    text: str


class OrderRow(Strict):
    client_order_id: str
    time: str
    strategy: str
    symbol: str
    leg: str
    side: str
    qty: Decimal
    filled_qty: Decimal
    trigger_price: Decimal | None
    state: str
    code: int | None
    text: str


class SignalRow(Strict):
    signal: str
    time: str
    symbol: str
    target_qty: Decimal
    stop_loss: Decimal | None
    take_profit: Decimal | None
    outcome: str
    filled_qty: Decimal | None
    why: str
    decided_because: str


class StoryRow(Strict):
    seq: int
    ts_ns: int
    event: dict[str, Any]


class Checked(Strict):
    file: str
    is_valid: bool
    fingerprint: str


class CommandAnswer(Strict):
    is_done: bool | None
    text: str


class Applied(Strict):
    added: list[str]
    removed: list[str]
    changed: list[str]
    waiting: list[str]
    restart: list[str]


class Verified(Strict):
    is_whole: bool
    events: int
    hash: str
    epoch: str
    signals: int
    orders: int
    fills: int


class PnlRow(Strict):
    of: str
    net: Decimal
    fills: int | None = None
    volume: Decimal | None = None
    realized_pnl: Decimal | None = None
    fees: Decimal | None = None
    slippage: Decimal | None = None
    slippage_bp: Decimal | None = None


class LatencyRow(Strict):
    latency: str
    count: int
    median_ms: float
    p95_ms: float
    max_ms: float


class Day(Strict):
    from_ns: int
    to_ns: int
    pnl: list[PnlRow]
    latencies: list[LatencyRow]
    outcomes: dict[str, int]
    incidents: list[str]
    wallet_balance: Decimal | None


class Manifest(Strict):
    name: str
    made_ns: int
    events: int
    hash: str
    bytes: int
    sha256: str
    version: str


class BackupMade(Strict):
    ran_ns: int
    error: str
    damaged: list[str]
    newest: Manifest | None
    kept: int
    bytes: int


class BackupRow(Strict):
    name: str
    state: str
    made: str = ""
    events: int = 0
    bytes: int = 0


class KeyMade(Strict):
    recipient: str
    file: str = ""
    private: str = ""


class Restored(Strict):
    restored: dict[str, Any]
    halted: list[str]


class AlertWay(Strict):
    way: str
    is_taken: bool
    text: str


class Silenced(Strict):
    id: str
    until: str


class Unsilenced(Strict):
    ended: list[str]


SCHEMAS: dict[str, Any] = {
    "status": Status, "health": Health, "doctor": list[Check], "config check": Checked,
    "config apply": Applied, "journal verify": Verified, "backup make": BackupMade,
    "backup list": list[BackupRow], "backup key": KeyMade, "restore": Restored, "halt": HaltAnswer,
    "cancel": CommandAnswer, "flatten": CommandAnswer, "resume": Resumed, "reconcile": CommandAnswer,
    "adopt": CommandAnswer, "orders": list[OrderRow], "signals": list[SignalRow],
    "positions": list[Position], "alert test": list[AlertWay], "alert silence": Silenced,
    "alert unsilence": Unsilenced, "report": Day, "explain": list[StoryRow]}


def verb_of(words: Sequence[str]) -> str:
    """Return the verb that a command line begins with."""
    return next(verb for verb in (" ".join(words[:2]), words[0]) if verb in SCHEMAS)


def decoded(words: Sequence[str], text: str) -> Any:
    """Return what a botctl command printed with --json, in its verb's schema."""
    return msgspec.json.decode(text, type=SCHEMAS[verb_of(words)], strict=False)
