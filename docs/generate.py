"""Make config.md, wire.md, metrics.md, logs.md and the order table in architecture.md from the code.

`python docs/generate.py` writes them; with `--check` it exits 1 when one is out of date.
"""

import inspect
import re
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import msgspec
from msgspec.inspect import (
    AnyType,
    CustomType,
    DecimalType,
    DictType,
    Field,
    IntType,
    LiteralType,
    Metadata,
    NoneType,
    StructType,
    UnionType,
    VarTupleType,
    type_info,
)

from bot import model, orders, wire
from bot.bus import HARD_LIMIT_FACTOR
from bot.config import BusConfig, Config
from bot.config_file import LIMITS_LEAST, LIMITS_MOST
from bot.log import BURST, EVENTS, MONEY, PER_S
from bot.metrics import LATENCY_S, TABLE
from bot.watch import RULES as FINDINGS

DOCS = Path(__file__).resolve().parent
MADE = "<!-- made by docs/generate.py -->"
END = "<!-- end of what docs/generate.py made -->"

BTC = "BTC/USDT:USDT"
RUN = 1_760_000_000_000_000_000
NS = 1_760_000_001_500_000_000
CLIENT_ORDER_ID = "th0k3v9x1c0001o"
INSTRUMENT = model.Instrument(
    symbol=BTC, exchange_symbol="BTCUSDT", status="TRADING", price_increment=Decimal("0.10"),
    qty_increment=Decimal("0.001"), qty_min=Decimal("0.001"), qty_max=Decimal("120"),
    notional_min=Decimal("100"), contract_size=Decimal("1"), settle="USDT")
EXAMPLES: dict[str, list[model.Message]] = {
    "ticks": [
        model.Tick(symbol=BTC, kind="trade", price=61000.1, size=0.25, bid=None, bid_size=None, ask=None,
                   ask_size=None, side="buy", exchange_ns=NS, receive_ns=NS + 2_000_000, run=RUN, seq=7),
        model.Heartbeat(publisher="gateway", run=RUN, time_ns=NS, last_seq={BTC: 7},
                        clock_offset_ns=-1_200_000, stale=()),
        model.Snapshot(instrument=INSTRUMENT, timeframe="1m", time_ns=NS, run=RUN, candles=(
            model.Candle(NS - 60_000_000_000, 60990.0, 61010.5, 60985.2, 61000.1, 12.5),)),
        INSTRUMENT,
    ],
    "signals": [
        model.TradingSignal(
            strategy="sr", run=RUN, seq=3, symbol=BTC, target_qty=Decimal("0.016"),
            stop_loss=Decimal("60900.0"), take_profit=Decimal("61300.0"), created_ns=NS,
            expires_ns=NS + 5_000_000_000, position_version=4, tick_run=RUN, tick_seq=7,
            tick_price=61000.1, tick_exchange_ns=NS, tick_receive_ns=NS + 2_000_000,
            reason="support 60990 held"),
    ],
    "reports": [
        model.Ack(strategy="sr", run=RUN, seq=3),
        model.SignalOutcome(strategy="sr", run=RUN, seq=3, symbol=BTC, outcome="done", reason="",
                            filled_qty=Decimal("0.016"), time_ns=NS),
        model.OrderReport(strategy="sr", symbol=BTC, client_order_id=CLIENT_ORDER_ID, leg="open", side="buy",
                          qty=Decimal("0.016"), filled_qty=Decimal("0.016"), trigger_price=None,
                          state="FILLED", reason="", time_ns=NS),
        model.FillReport(strategy="sr", symbol=BTC, client_order_id=CLIENT_ORDER_ID, trade_id="812345",
                         side="buy", qty=Decimal("0.016"), price=Decimal("61000.2"),
                         fee=Decimal("0.48800160"), fee_currency="USDT", exchange_ns=NS),
        model.PositionReport(strategy="sr", symbol=BTC, position_qty=Decimal("0.016"),
                             entry_price=Decimal("61000.2"), position_version=5, open_orders=2,
                             unknown_orders=0, state="RUNNING", time_ns=NS, executor_run=RUN),
    ],
}


def config_page() -> str:
    """Return docs/config.md."""
    info = type_info(Config)
    assert isinstance(info, StructType)
    parts = [f"{MADE}\n# Configuration\n\n{_paragraph(inspect.getmodule(Config))}\n\n"
             "One TOML file, checked as a whole by `botctl config check FILE` and by each process at its "
             "start (exit 78): an unknown key, a wrong type or a broken rule is one line with the key's "
             "path, the rule and the value. Numbers with a point are read as exact decimals. "
             "`ops/bot.example.toml` is a complete example.\n"]
    parts += _config_table("", info, "", None)
    return "\n".join(parts) + RULES


RULES = """
## Rules between keys

- A symbol belongs to exactly one strategy; any strategy may `listen` to any symbol.
- Every endpoint is loopback or ipc, and no two are equal; an ipc socket's folder is closed to others.
- `mode = "paper"` has exchange URLs on loopback; `mode = "live"` has encrypted ones beyond it, and no
  `[paper]`.
- Key files are files of mode 0400 or 0600.
- `zmtp_timeout_ms` and `silence_ms` are at least twice their heartbeat; `stale_ms` is at least 2,000.
- `reconnect_ms_max` is at least `reconnect_ms_min`; `absent_after_s` is at least
  `recv_window_ms` + `fence_margin_ms`.
- `signal_ttl_ms` is at least twice `resend_ms`, and at least `signal_age_ms_max`.
- No two processes have the same metrics port, and none that of a channel.
- `position_notional_max` is at least `order_notional_max`; every limit is greater than 0.
"""


def _config_table(path: str, info: StructType, text: str, instance: Any) -> list[str]:
    rows, below = [], []
    for field in info.fields:
        kind, why = _unwrapped(field)
        name = f"{path}.{field.encode_name}".lstrip(".")
        default = getattr(instance, field.name) if instance is not None else _default_of(field)
        inner = _table_in(kind)
        if isinstance(kind, DictType) and isinstance(kind.value_type, StructType):
            below += _config_table(f"{name}.NAME", kind.value_type, "", None)
        elif inner is not None:
            # A table that has a default shows that one's values: bus.ticks differs from bus.signals.
            shown = default if isinstance(default, msgspec.Struct) and path else None
            below += _config_table(name, inner, why, shown)
        else:
            most = LIMITS_MOST.get(field.encode_name)
            range_ = f"{LIMITS_LEAST} to {most:,}" if most else _limits(kind)
            rows.append([f"`{field.encode_name}`", _type(kind), _default(default), range_, why])
    heading = f"## `[{path}]`\n" if path else "## Top level\n"
    intro = "\n\n".join(filter(None, [_doc(info.cls), text]))
    return [heading, intro + "\n", _table(["Key", "Type", "Default", "Limits", "What and why"], rows), *below]


def wire_page() -> str:
    """Return docs/wire.md."""
    parts = [f"{MADE}\n# On the wire\n\nA strategy in another language is legitimate: this page is all it "
             "needs. ZeroMQ carries MessagePack; nothing else is understood.\n", _channels(), TOPICS, FORM]
    for channel, messages in EXAMPLES.items():
        parts.append(f"\n## Messages on {channel}\n")
        for message in messages:
            parts.append(_message(message))
            if isinstance(message, model.Instrument):
                parts.append(f"\n### candle, inside a snapshot\n\n{_doc(model.Candle)}\n\n"
                             f"An array of its {len(model.Candle.__struct_fields__)} fields, without name "
                             f"and version.\n\n{_fields(model.Candle)}")
    return "\n".join(parts) + PROTOCOL.format(
        version=model.VERSION, digits=wire.DIGITS_MAX, bytes_max=wire.MESSAGE_BYTES_MAX,
        hard=HARD_LIMIT_FACTOR)


def _channels() -> str:
    bus = BusConfig()
    rows = [["ticks", "gateway binds PUB", "strategies, executor connect SUB", "topic, message"],
            ["signals", "executor binds PULL", "strategies connect PUSH", "message"],
            ["reports", "executor binds PUB", "strategies connect SUB", "topic, message"]]
    for row in rows:
        channel = getattr(bus, row[0])
        row.insert(1, f"`{channel.endpoint}`")
        row += [f"{channel.hwm:,}", str(channel.linger_ms)]
    return "\n## Channels\n\n" + _table(
        ["Channel", "Default endpoint", "Binds", "Connects", "Frames", "HWM", "LINGER ms"], rows)


TOPICS = f"""
## Topics

A topic is the first frame of two, and what a SUB subscribes to. Each ends in a slash, so that the prefix
`A/B/` does not match `A/BC/`.

| Topic | Carries |
|---|---|
| `{wire.tick_topic("SYMBOL").decode()}` | `tick` of one symbol |
| `{wire.HEARTBEAT_TOPIC.decode()}` | `heartbeat` of the publisher, on ticks and on reports |
| `{wire.snapshot_topic("SYMBOL").decode()}` | `snapshot` of one symbol: its instrument alone |
| `{wire.snapshot_topic("SYMBOL", "TIMEFRAME", 500).decode()}` | `snapshot` with the last 500 closed candles |
| `{wire.report_topic("STRATEGY").decode()}` | every report to one strategy |

Subscribing is asking: the gateway hears each subscription to an `s/` topic and answers it at once, on that
topic, and again on a timer. TIMEFRAME is one of 1m 3m 5m 15m 30m 1h 2h 4h 1d.
"""

FORM = """
## Form of a message

A MessagePack array: `[name, version, field, field, ...]`, the fields in the order given here. Fields may be
added at the end within a version; a receiver ignores what it does not know. `decimal` is a string such as
"0.016", `ns` are integers in nanoseconds since 1970 UTC; a field with a default may be left out together with
all that follow it.
"""

PROTOCOL = """
## Acknowledge and re-send

1. Pick a `run` that no earlier run of this strategy had (the start time in ns), and count `seq` from 1.
2. Subscribe to your reports before the first signal. Send nothing before the first `position` of the symbol:
   a signal carries the `position_version` it was decided on, and an older one than the executor's is denied
   (`stale_position`).
3. PUSH the signal, with IMMEDIATE set so that nothing queues for a peer that is not there. A successful PUSH
   is no delivery: what a PULL had not read is lost when it dies.
4. Keep the signal, also over your own restart, and PUSH the same bytes again after `resend_ms`, then after
   twice as long each time (up to 10 s), and at once when its reports name a new `executor_run`, until:
   its `ack` (it is in the executor's journal, synced), or its `outcome` arrives. An expired signal is sent
   again too: its outcome is then `expired`, and it is accounted for.
5. The executor deduplicates by (strategy, run, seq) and acknowledges each copy. Every signal it acknowledged
   gets exactly one `outcome`: done, denied (our limits), expired, superseded, rejected (the exchange) or
   absent.
6. The newest signal of a symbol wins; one that waits behind an order on its way can be superseded.

## Loss

`seq` counts up by one per (run, symbol) over all kinds of Tick: a gap is a loss, and a heartbeat's `last_seq`
shows a loss at the end too. A new `run` begins at 1. PUB drops silently for a subscriber whose queue is full.

## Limits

Version {version}. A message of another version, malformed, or larger than {bytes_max:,}
bytes is counted, logged and dropped; one of {hard} times that size ends its sender's connection. Both
sides ping (ZMTP heartbeats), so a peer that is gone is noticed within `zmtp_timeout_ms`. A signal's numbers
are finite, its decimals have at most {digits} digits before and behind the point, its integers 63 bits and a
sign.
"""


def _message(message: model.Message) -> str:
    raw = wire.encode(message)
    name = message.__struct_config__.tag
    where = ", inside a snapshot" if isinstance(message, model.Instrument) else ""
    return (f"\n### {name}{where}\n\n{_doc(type(message))}\n\n{_fields(type(message))}\n"
            f"Example: `{_shown(message)}`\n\n```\n{_hex(raw)}\n```\n")


def _fields(cls: type) -> str:
    info = type_info(cls)
    assert isinstance(info, StructType)
    first = 1 if info.tag is not None else 0  # of an array with a name, that is number 0
    rows = []
    for number, field in enumerate(info.fields, first):
        kind, _ = _unwrapped(field)
        rows.append([str(number), f"`{field.name}`", _type(kind, field.name),
                     "" if field.required else _default(_default_of(field))])
    return _table(["#", "Field", "Type", "Default"], rows)


def _shown(message: model.Message) -> str:
    return msgspec.json.encode(message).decode()


def _hex(raw: bytes) -> str:
    text = raw.hex(" ")
    return "\n".join(text[start:start + 96].strip() for start in range(0, len(text), 96))


def order_table() -> str:
    """Return the order table of bot/orders.py as Markdown."""
    events = list(dict.fromkeys(event for row in orders.TABLE.values() for event in row))
    rows = []
    for state, row in orders.TABLE.items():
        group = "in flight" if state in orders.IN_FLIGHT else "open" if state in orders.OPEN else "closed"
        rows.append([state, group, *("same" if row.get(e) == state else row.get(e, "") for e in events)])
    return _table(["State", "Group", *events], rows)


def metrics_page() -> str:
    """Return docs/metrics.md."""
    rows = [[f"`{m.name}`", "gauge" if m.kind == "stateset" else m.kind,
             ", ".join(f"`{label}`" for label in ("process", *m.labels)), m.text] for m in TABLE]
    return (f"{MADE}\n# Metrics\n\nEach process serves its own at `http://127.0.0.1:PORT/metrics`, made of "
            "its last beat: `[metrics] base_port` is the gateway's, then come executor, guard, health and "
            "paper; a strategy's is `metrics_port`, or made of its name (`botctl doctor` shows all). Labels "
            "are bounded by the config or by lists in the code. What is not known yet is missing.\n\n"
            + _table(["Metric", "Kind", "Labels", "What"], rows)
            + f"\nBuckets of the histograms, in seconds: {', '.join(map(str, LATENCY_S))}.\n")


def logs_page() -> str:
    """Return docs/logs.md."""
    rows = [[f"`{name}`", "no" if name in MONEY else "yes", text] for name, text in EVENTS.items()]
    return (f"{MADE}\n# Logs\n\nOne JSON object a line on stdout; supervisord keeps them, rotated, below "
            "`state_dir/log`. Each has `ts_ns`, `level`, `process`, `event`, and fields of its own; the "
            "first of anything about an order is `client_order_id`. Keys and secrets are blotted out.\n\n"
            f"A loop cannot fill the disk: an event that is limited may come {BURST} times at once, then "
            f"{PER_S:g} time a second; the next line says in `suppressed` how many were left out. What moves "
            "or proves money is never limited.\n\n" + _table(["Event", "Limited", "What it tells"], rows)
            + "\n## What health finds\n\n`finding` and `finding_ended` name one of these rules.\n\n"
            + _table(["Rule", "What"], [[f"`{name}`", text] for name, text in FINDINGS.items()]))


def _unwrapped(field: Field) -> tuple[Any, str]:
    kind, why = field.type, ""
    while isinstance(kind, Metadata):
        why = why or (kind.extra_json_schema or {}).get("description", "")
        kind = kind.type
    return kind, why


def _default_of(field: Field) -> Any:
    return field.default if field.default_factory is msgspec.NODEFAULT else field.default_factory()


def _table_in(kind: Any) -> StructType | None:
    if isinstance(kind, UnionType):
        return next((t for t in kind.types if isinstance(t, StructType) and _is_config(t)), None)
    return kind if isinstance(kind, StructType) and _is_config(kind) else None


def _is_config(kind: StructType) -> bool:
    return kind.cls.__module__ == Config.__module__


def _type(kind: Any, name: str = "") -> str:
    while isinstance(kind, Metadata):
        kind = kind.type
    match kind:
        case LiteralType():
            return ", ".join(f"`{value}`" for value in kind.values)
        case UnionType():
            nil_last = sorted(kind.types, key=lambda t: isinstance(t, NoneType))
            return " or ".join(_type(t, name) for t in nil_last)
        case VarTupleType():
            return f"list of {_type(kind.item_type)}"
        case DictType():
            return "table" if isinstance(kind.value_type, AnyType) else f"table of {_type(kind.value_type)}"
        case StructType():
            return f"[{kind.tag or kind.cls.__name__.lower()}]"
        case IntType() if name.endswith("_ns"):
            return "ns"
        case DecimalType() | CustomType():
            return "decimal"
    return {"StrType": "text", "IntType": "integer", "FloatType": "float", "BoolType": "true, false",
            "NoneType": "nil"}.get(type(kind).__name__, type(kind).__name__)


def _limits(kind: Any) -> str:
    while isinstance(kind, Metadata):
        kind = kind.type
    least, most = getattr(kind, "ge", None), getattr(kind, "le", None)
    if least is not None or most is not None:
        return f"{least:,} to {most:,}" if most is not None else f"at least {least:,}"
    if isinstance(kind, DecimalType):
        return "0 or more"
    if getattr(kind, "pattern", None):
        return f"`{kind.pattern}`"
    return "not empty" if getattr(kind, "min_length", None) else ""


def _default(value: Any) -> str:
    if value is msgspec.NODEFAULT:
        return "must be given"
    if isinstance(value, (tuple, list, dict)):
        return ", ".join(f"`{item}`" for item in value) or "none"
    if isinstance(value, int):
        return f"{value:,}"
    return f'`"{value}"`' if isinstance(value, str) else "nil" if value is None else f"{value}"


def _doc(cls: type) -> str:
    return inspect.cleandoc(cls.__doc__ or "")


def _paragraph(module: Any) -> str:
    return inspect.cleandoc(module.__doc__).split("\n\n")[1].replace("\n", " ")


def _table(header: list[str], rows: list[list[str]]) -> str:
    if not rows:
        return ""
    lines = [[cell.replace("|", "\\|") for cell in line] for line in (header, ["---"] * len(header), *rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def pages() -> dict[Path, str]:
    """Return what each generated file should hold."""
    architecture = DOCS / "architecture.md"
    text = architecture.read_text(encoding="utf-8")
    before, rest = text.split(MADE)
    after = rest.split(END)[1]
    made = {DOCS / "config.md": config_page(), DOCS / "wire.md": wire_page(),
            DOCS / "metrics.md": metrics_page(), DOCS / "logs.md": logs_page(),
            architecture: f"{before}{MADE}\n\n{order_table()}\n{END}{after}"}
    return {path: re.sub(r"\n{3,}", "\n\n", text) for path, text in made.items()}


def main() -> int:
    """Write the pages, or with --check say which are out of date."""
    stale = [path for path, text in pages().items()
             if not path.exists() or path.read_text(encoding="utf-8") != text]
    if "--check" in sys.argv[1:]:
        for path in stale:
            print(f"{path.name} is out of date: run make docs", file=sys.stderr)
        return 1 if stale else 0
    for path in stale:
        path.write_text(pages()[path], encoding="utf-8")
        print(f"wrote {path.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
