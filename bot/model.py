"""The nouns: what travels over the sockets and what a strategy sees. docs/wire.md is made of this.

Every message is an immutable msgspec struct, encoded as a msgpack array [name, version, fields...].
Money is Decimal (a string on the wire); market data may be float. Times are integers in
nanoseconds since the epoch: `exchange_ns` by the exchange's clock, all others by this host's.
A symbol is ccxt's unified name, for example "BTC/USDT:USDT"; quantities are signed contracts,
positive long.
"""

from decimal import Decimal
from typing import Literal

import msgspec

VERSION = 1  # of every message; another version is counted and dropped

TickKind = Literal["trade", "quote", "mark"]
Outcome = Literal["done", "denied", "expired", "superseded", "rejected", "absent"]
State = Literal["RECONCILING", "RUNNING", "REDUCING", "HALTED"]


class Message(msgspec.Struct, frozen=True, array_like=True, kw_only=True):
    """Base of all messages."""

    version: Literal[1] = 1


class Tick(Message, frozen=True, array_like=True, kw_only=True, tag="tick"):
    """One trade, a changed best bid/ask, or a mark price.

    price: of the trade, the middle of the quote, or the mark. size: of the trade, else 0.
    bid, ask and their sizes: of a quote, else None. side: of a trade's taker, else None.
    seq counts up by one per (run, symbol) over all kinds: a gap is a loss.
    """

    symbol: str
    kind: TickKind
    price: float
    size: float
    bid: float | None
    bid_size: float | None
    ask: float | None
    ask_size: float | None
    side: Literal["buy", "sell"] | None
    exchange_ns: int
    receive_ns: int
    run: int
    seq: int


class Heartbeat(Message, frozen=True, array_like=True, kw_only=True, tag="heartbeat"):
    """A publisher lives. last_seq per symbol shows a loss at the end of a run too.

    clock_offset_ns: exchange clock minus this host's, as the publisher measured it.
    stale: symbols whose data makes no progress although the publisher is alive.
    """

    publisher: str
    run: int
    time_ns: int
    last_seq: dict[str, int]
    clock_offset_ns: int | None = None
    stale: tuple[str, ...] = ()


class Instrument(Message, frozen=True, array_like=True, kw_only=True, tag="instrument"):
    """A contract's rules. Quantities in contracts, prices and notionals in the settlement currency."""

    symbol: str
    exchange_symbol: str
    status: str  # the exchange's own word; "TRADING" is the only one that may be opened in
    price_increment: Decimal
    qty_increment: Decimal
    qty_min: Decimal
    qty_max: Decimal  # of one market order
    notional_min: Decimal
    contract_size: Decimal
    settle: str


class Candle(msgspec.Struct, frozen=True, array_like=True):
    """One candle: start time (exchange clock), prices, volume in contracts."""

    start_ns: int
    open: float
    high: float
    low: float
    close: float
    volume: float


class Snapshot(Message, frozen=True, array_like=True, kw_only=True, tag="snapshot"):
    """What a strategy may not fetch itself: a symbol's instrument and, where asked for, candles.

    timeframe "" and no candles: the instrument alone. Candles are closed ones, oldest first.
    """

    instrument: Instrument
    timeframe: str
    candles: tuple[Candle, ...]
    time_ns: int
    run: int


class Target(msgspec.Struct, frozen=True):
    """What a strategy wants: where its position should be, and its exits.

    qty: signed contracts, a Decimal. stop_loss, take_profit: prices. reason: in words, for explain.
    """

    symbol: str
    qty: Decimal
    stop_loss: Decimal | None = None
    take_profit: Decimal | None = None
    reason: str = ""


class TradingSignal(Message, frozen=True, array_like=True, kw_only=True, tag="signal"):
    """Where a strategy's position in one symbol should be; identified by (strategy, run, seq).

    position_version: of the position it was decided on; an older one than the executor's is denied.
    tick_*: the Tick it was decided on.
    """

    strategy: str
    run: int
    seq: int
    symbol: str
    target_qty: Decimal
    stop_loss: Decimal | None
    take_profit: Decimal | None
    created_ns: int
    expires_ns: int
    position_version: int
    tick_run: int
    tick_seq: int
    tick_price: float
    tick_exchange_ns: int
    tick_receive_ns: int
    reason: str


class Ack(Message, frozen=True, array_like=True, kw_only=True, tag="ack"):
    """The signal is in the executor's journal, synced: it need not be sent again."""

    strategy: str
    run: int
    seq: int


class SignalOutcome(Message, frozen=True, array_like=True, kw_only=True, tag="outcome"):
    """The one outcome of a signal. filled_qty: signed contracts its orders filled."""

    strategy: str
    run: int
    seq: int
    symbol: str
    outcome: Outcome
    reason: str
    filled_qty: Decimal
    time_ns: int


class OrderReport(Message, frozen=True, array_like=True, kw_only=True, tag="order"):
    """An order's state changed."""

    strategy: str
    symbol: str
    client_order_id: str
    leg: str
    side: Literal["buy", "sell"]
    qty: Decimal
    filled_qty: Decimal
    trigger_price: Decimal | None
    state: str
    reason: str
    time_ns: int


class FillReport(Message, frozen=True, array_like=True, kw_only=True, tag="fill"):
    """An execution of ours was booked. fee in fee_currency, paid is positive."""

    strategy: str
    symbol: str
    client_order_id: str
    trade_id: str
    side: Literal["buy", "sell"]
    qty: Decimal
    price: Decimal
    fee: Decimal
    fee_currency: str
    exchange_ns: int


class PositionReport(Message, frozen=True, array_like=True, kw_only=True, tag="position"):
    """The snapshot of one symbol of a strategy, each second and after each change.

    position_qty: signed contracts. state: of the executor, or "LOCKED" for this symbol alone.
    """

    strategy: str
    symbol: str
    position_qty: Decimal
    entry_price: Decimal | None
    position_version: int
    open_orders: int
    unknown_orders: int
    state: str
    time_ns: int
    executor_run: int


Report = Ack | SignalOutcome | OrderReport | FillReport | PositionReport
TickMessage = Tick | Heartbeat | Snapshot
ReportMessage = Report | Heartbeat


def visible(text: str) -> str:
    """Return text as one line that cannot steer a terminal: what is not printable is escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def signal_id(strategy: str, run: int, seq: int) -> str:
    """Return the name of a signal as people and the journal write it."""
    return f"{strategy}/{run}/{seq}"
