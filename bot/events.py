"""What the journal remembers: immutable events, from which all state is folded. Pure.

Every event has a `key` (its identity; some kinds may stand in the journal only once) and a `story`
(the signal it stems from, or the symbol), so that `botctl explain` finds all of it.
"""

from decimal import Decimal
from typing import Literal

import msgspec

from bot.config import SETTLE
from bot.model import Outcome, TradingSignal, signal_id
from bot.orders import Leg, OrderRequest, Side

# Who or what moved the position. All but "signal" raise the position version: what a stop took
# out does not come back on an older signal. "restored": the intent was lost with the journal's tail.
FillCause = Literal["signal", "stop", "take_profit", "liquidation", "adl", "operator", "close", "restored"]
NOT_OWNER = "not_owner"  # the rule that denies a signal whose symbol, or strategy, may be made up
CREDITED_NS = 120_000_000_000  # funding is stamped 08:00:00 and credited up to 15 s later (hummingbot #3346)


class Event(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind"):
    """Base of all events."""

    @property
    def key(self) -> str:
        """Return the identity; events of a kind in ONCE never share one."""
        return ""

    @property
    def story(self) -> str:
        """Return what this belongs to: a signal id where there is one, else a symbol or ""."""
        return ""


class Started(Event, frozen=True, kw_only=True, tag="started"):
    """An executor start: a new epoch fences all earlier ones."""

    epoch: str
    version: str
    config: str


class SignalReceived(Event, frozen=True, kw_only=True, tag="signal"):
    """A signal is ours from here on and will get exactly one outcome."""

    signal: TradingSignal
    received_ns: int

    @property
    def key(self) -> str:
        return signal_id(self.signal.strategy, self.signal.run, self.signal.seq)

    @property
    def story(self) -> str:
        return self.key


class SignalClosed(Event, frozen=True, kw_only=True, tag="outcome"):
    """The one outcome of a signal. reason: of a denied one it begins with the rule (limits.Denial)."""

    signal: str
    symbol: str
    outcome: Outcome
    reason: str
    filled_qty: Decimal

    @property
    def rule(self) -> str:
        return self.reason.partition(":")[0] if self.outcome == "denied" else ""

    @property
    def key(self) -> str:
        return self.signal

    @property
    def story(self) -> str:
        return self.signal


class OrderIntended(Event, frozen=True, kw_only=True, tag="intent"):
    """An order will be sent, once. Durable before its first byte leaves.

    checks: every limit looked at, with its value, as text for explain.
    """

    request: OrderRequest
    epoch: str
    strategy: str
    signal: str
    leg: Leg
    position_qty: Decimal
    checks: dict[str, str]
    intended_ns: int

    @property
    def key(self) -> str:
        return self.request.client_order_id

    @property
    def story(self) -> str:
        return self.signal


class OrderChanged(Event, frozen=True, kw_only=True, tag="order"):
    """An event of the order table, with what the exchange said."""

    client_order_id: str
    signal: str
    event: str
    exchange_order_id: str = ""
    triggered_id: str = ""
    executed_qty: Decimal = Decimal(0)
    raw_status: str = ""
    code: int = 0
    text: str = ""

    @property
    def key(self) -> str:
        return self.client_order_id

    @property
    def story(self) -> str:
        return self.signal


class OrderAnswered(Event, frozen=True, kw_only=True, tag="answered"):
    """What left for an order, without its signature, and what came back. Changes nothing; OrderChanged does.

    is_sent: a byte may have left. status: 0 when no complete answer came; error says how far it got.
    Times: clock.wall_ns.
    """

    client_order_id: str
    signal: str
    is_sent: bool
    sent: str
    sent_ns: int
    status: int
    body: str
    error: str
    received_ns: int

    @property
    def key(self) -> str:
        return self.client_order_id

    @property
    def story(self) -> str:
        return self.signal


class FillBooked(Event, frozen=True, kw_only=True, tag="fill"):
    """One execution at the exchange, booked once by (symbol, trade id)."""

    symbol: str
    trade_id: str
    client_order_id: str
    exchange_order_id: str
    signal: str
    cause: FillCause
    side: Side
    qty: Decimal
    price: Decimal
    fee: Decimal
    fee_currency: str
    realized_pnl: Decimal
    exchange_ns: int

    @property
    def key(self) -> str:
        return f"{self.symbol}#{self.trade_id}"

    @property
    def settle_fee(self) -> Decimal:
        """Return the fee in the settlement currency, as the balance is; 0 in another."""
        return self.fee if self.fee_currency == SETTLE else Decimal(0)

    @property
    def story(self) -> str:
        return self.signal or self.symbol


class ExitsSet(Event, frozen=True, kw_only=True, tag="exits"):
    """Where the position in a symbol shall be protected; None: no such exit."""

    symbol: str
    signal: str
    stop_loss: Decimal | None
    take_profit: Decimal | None

    @property
    def story(self) -> str:
        return self.signal


class Unprotected(Event, frozen=True, kw_only=True, tag="unprotected"):
    """A position lacks its stop since then, by the host's clock; 0: no more. A restart counts on from it."""

    symbol: str
    since_ns: int

    @property
    def story(self) -> str:
        return self.symbol


class SymbolLocked(Event, frozen=True, kw_only=True, tag="locked"):
    """No new risk in this symbol until the cause is gone. evidence: what was seen, for a person."""

    symbol: str
    cause: str
    evidence: str

    @property
    def story(self) -> str:
        return self.symbol


class SymbolUnlocked(Event, frozen=True, kw_only=True, tag="unlocked"):
    """One cause of a lock is gone."""

    symbol: str
    cause: str
    evidence: str

    @property
    def story(self) -> str:
        return self.symbol


class Halted(Event, frozen=True, kw_only=True, tag="halted"):
    """A halt was seen or set; the HALT file is what holds, this is its record."""

    scope: str
    who: str
    why: str


class Resumed(Event, frozen=True, kw_only=True, tag="resumed"):
    """The HALT file of a scope was gone."""

    scope: str


class Reconciled(Event, frozen=True, kw_only=True, tag="reconciled"):
    """Books and exchange were compared. positions: as the exchange says, signed contracts.

    cursors: by symbol, the trade id up to which all trades were read from the exchange's own list.
    transfers: what was paid in, less what was taken out, since the day of the books began.
    exchange_ns: when the balance was told, by the exchange's clock; 0 in older journals.
    income: by the exchange's type, what its list has beside trades since the balance was explained last.
    income_ns: time of the newest of it. unexplained: what moved the balance since then and is neither in that
    nor a fill of ours.
    """

    trigger: str
    differences: tuple[str, ...]
    positions: dict[str, Decimal]
    wallet_balance: Decimal
    cursors: dict[str, int] = {}
    unrealized_pnl: Decimal = Decimal(0)
    transfers: Decimal = Decimal(0)
    exchange_ns: int = 0
    income: dict[str, Decimal] = {}
    income_ns: int = 0
    unexplained: Decimal = Decimal(0)

    @property
    def is_explained(self) -> bool:
        """Return whether each move of the balance is known, and no payment of it is a new one."""
        return not self.unexplained and self.income_ns <= self.exchange_ns - CREDITED_NS


class Commanded(Event, frozen=True, kw_only=True, tag="commanded"):
    """An operator's command was taken up; once more after a restart before its answer."""

    id: str
    verb: str
    symbol: str
    who: str
    why: str
    strategy: str = ""

    @property
    def story(self) -> str:
        return self.symbol


class Adopted(Event, frozen=True, kw_only=True, tag="adopted"):
    """An operator took over what the exchange says: a signed quantity that no fill of ours explains.

    entry_price: the exchange's, of the whole position. causes: of the locks that end with it. cursor: the
    trade id up to which all trades are in it, or booked.
    """

    symbol: str
    qty: Decimal
    entry_price: Decimal | None
    who: str
    why: str
    causes: tuple[str, ...]
    cursor: int = 0

    @property
    def story(self) -> str:
        return self.symbol


class Restored(Event, frozen=True, kw_only=True, tag="restored"):
    """The journal up to here comes from a backup; what followed it is lost, and only the exchange knows it.

    lacks_since_ns: time of the last event that was saved. restored_ns: until now; both by a host's clock.
    backup "": there was none, the journal begins here, and nothing is taken in from before.
    """

    backup: str
    lacks_since_ns: int
    restored_ns: int
    who: str


JournalEvent = (Started | SignalReceived | SignalClosed | OrderIntended | OrderChanged | FillBooked
                | ExitsSet | SymbolLocked | SymbolUnlocked | Halted | Resumed | Reconciled | Commanded
                | Adopted | OrderAnswered | Unprotected | Restored)

# Kinds whose key may stand in the journal only once; the journal itself refuses a second one.
ONCE = ("signal", "outcome", "intent", "fill")
