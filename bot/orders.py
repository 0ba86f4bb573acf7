"""An order's life: the nouns, the state table, client order ids. Pure.

The table is the law: an event that is not in a state's row raises and changes nothing. What the
exchange says in a poll or on a stream is a report (`OrderStatus`), never an event; events are
derived from the difference. Fills are booked one by one, never inferred from a cumulative quantity.
"""

import hashlib
from decimal import Decimal
from typing import Literal

import msgspec

from bot.errors import IllegalTransition

OrderState = Literal["INTENDED", "UNKNOWN", "ACCEPTED", "PARTIALLY_FILLED", "PENDING_CANCEL",
                     "FILLED", "CANCELED", "EXPIRED", "REJECTED", "ABSENT"]
OrderEvent = Literal["lose", "not_sent", "accept", "reject", "absent", "fill", "complete",
                     "request_cancel", "cancel", "refuse_cancel", "expire"]
Side = Literal["buy", "sell"]
OrderType = Literal["market", "stop", "take_profit"]  # the last two rest, conditional, at the exchange
Leg = Literal["open", "reduce", "stop", "take_profit", "close", "flatten"]

# INTENDED: durable, and until its answer is read it may or may not have left.
# UNKNOWN: no definite answer. Only the exchange's evidence leads out of it.
# Late fills are legal in every closed state but FILLED: there one more is an overfill. A late
# "accept" changes no closed state but ABSENT; it carries the word that more was executed.
TABLE: dict[str, dict[str, str]] = {
    "INTENDED": {"lose": "UNKNOWN", "not_sent": "ABSENT", "accept": "ACCEPTED", "reject": "REJECTED",
                 "fill": "PARTIALLY_FILLED", "complete": "FILLED", "cancel": "CANCELED",
                 "expire": "EXPIRED"},
    "UNKNOWN": {"lose": "UNKNOWN", "accept": "ACCEPTED", "reject": "REJECTED", "absent": "ABSENT",
                "fill": "PARTIALLY_FILLED", "complete": "FILLED", "cancel": "CANCELED",
                "expire": "EXPIRED"},
    "ACCEPTED": {"lose": "ACCEPTED", "accept": "ACCEPTED", "reject": "REJECTED",
                 "fill": "PARTIALLY_FILLED", "complete": "FILLED",
                 "request_cancel": "PENDING_CANCEL", "cancel": "CANCELED", "expire": "EXPIRED"},
    "PARTIALLY_FILLED": {"lose": "PARTIALLY_FILLED", "accept": "PARTIALLY_FILLED",
                         "fill": "PARTIALLY_FILLED", "complete": "FILLED",
                         "request_cancel": "PENDING_CANCEL", "cancel": "CANCELED",
                         "expire": "EXPIRED"},
    "PENDING_CANCEL": {"accept": "PENDING_CANCEL", "fill": "PENDING_CANCEL", "complete": "FILLED",
                       "request_cancel": "PENDING_CANCEL", "refuse_cancel": "ACCEPTED",
                       "cancel": "CANCELED", "expire": "EXPIRED", "reject": "REJECTED"},
    "FILLED": {"refuse_cancel": "FILLED", "accept": "FILLED"},
    "CANCELED": {"accept": "CANCELED", "fill": "CANCELED", "complete": "FILLED",
                 "refuse_cancel": "CANCELED", "cancel": "CANCELED"},
    "EXPIRED": {"accept": "EXPIRED", "fill": "EXPIRED", "complete": "FILLED",
                "refuse_cancel": "EXPIRED", "expire": "EXPIRED"},
    "REJECTED": {"accept": "REJECTED", "reject": "REJECTED", "fill": "REJECTED", "complete": "FILLED"},
    "ABSENT": {"accept": "ACCEPTED", "fill": "PARTIALLY_FILLED", "complete": "FILLED",
               "cancel": "CANCELED", "expire": "EXPIRED", "reject": "REJECTED"},
}

IN_FLIGHT = frozenset({"INTENDED", "UNKNOWN"})
OPEN = frozenset({"ACCEPTED", "PARTIALLY_FILLED", "PENDING_CANCEL"})
CLOSED = frozenset({"FILLED", "CANCELED", "EXPIRED", "REJECTED", "ABSENT"})

# Prefixes of our client order ids. Letters and digits only, first a letter, at most 32: the
# charset every exchange of exchange-facts 1.4 accepts; none starts like an exchange's own ids
# ("autoclose-", "adl_", "settlement_", "delivery_").
PREFIX = "th"
GUARD_PREFIX = "tg"
CANARY_PREFIX = "tc"
OUR_PREFIXES = (PREFIX, GUARD_PREFIX, CANARY_PREFIX)
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyz"
_LEG_LETTER = {"open": "o", "reduce": "r", "stop": "s", "take_profit": "t", "close": "c", "flatten": "f"}


class OrderRequest(msgspec.Struct, frozen=True, kw_only=True):
    """An order to send. qty is unsigned contracts; trigger_price is for stop and take_profit."""

    client_order_id: str
    symbol: str
    side: Side
    qty: Decimal
    type: OrderType = "market"
    trigger_price: Decimal | None = None
    reduce_only: bool = False

    @property
    def is_conditional(self) -> bool:
        return self.type != "market"


class Order(msgspec.Struct, kw_only=True):
    """An order of ours and all that is known of it. Quantities are unsigned contracts."""

    request: OrderRequest
    strategy: str
    signal: str
    leg: str
    intended_ns: int
    state: str = "INTENDED"
    filled_qty: Decimal = Decimal(0)  # booked fills
    executed_qty: Decimal = Decimal(0)  # the exchange's cumulative word
    exchange_order_id: str = ""
    triggered_id: str = ""
    code: int = 0
    text: str = ""

    @property
    def id(self) -> str:
        return self.request.client_order_id

    @property
    def is_in_flight(self) -> bool:
        return self.state in IN_FLIGHT

    @property
    def is_settled(self) -> bool:
        """Nothing more is expected: closed, and every fill the exchange spoke of is booked."""
        return self.state in CLOSED and self.filled_qty >= self.executed_qty

    @property
    def rests(self) -> bool:
        """A conditional order at rest, not triggered: asked for by the reconciliation only."""
        return (self.request.is_conditional and self.state == "ACCEPTED" and not self.triggered_id
                and self.executed_qty <= self.filled_qty)

    @property
    def signed_leaves_qty(self) -> Decimal:
        """Return what may still be filled, positive for a buy, the unknown at full size."""
        leaves = Decimal(0) if self.is_settled else self.request.qty - self.filled_qty
        return leaves if self.request.side == "buy" else -leaves

    def may_arrive(self, now_ns: int, fence_ns: int) -> bool:
        """Return whether the exchange might take it still, as far as this host's clock tells: it may step.

        Enough before another that only reduces, and a restart does not begin it anew. For absence the
        exchange's clock and the signed timestamp count (Reconciler).
        """
        return 0 <= now_ns - self.intended_ns <= fence_ns


class OrderStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What the exchange says of an order, in a poll or on the private stream.

    event: the table's event its status stands for, None for a status nobody here knows (kept in
    raw_status). executed_qty is the exchange's cumulative word, a hint that fills are to be fetched.
    triggered_id: client order id or exchange order id of the order a conditional one turned into.
    """

    symbol: str
    client_order_id: str
    exchange_order_id: str
    side: Side
    qty: Decimal
    executed_qty: Decimal
    raw_status: str
    event: OrderEvent | None
    is_conditional: bool
    reduce_only: bool
    trigger_price: Decimal | None
    update_ns: int
    triggered_id: str = ""
    type: str = ""


class ExchangeFill(msgspec.Struct, frozen=True, kw_only=True):
    """One execution as the exchange tells it; (symbol, trade_id) is its identity.

    client_order_id is "" where the exchange does not say it (REST trades name exchange_order_id only).
    """

    symbol: str
    trade_id: str
    exchange_order_id: str
    client_order_id: str
    side: Side
    qty: Decimal
    price: Decimal
    fee: Decimal
    fee_currency: str
    realized_pnl: Decimal
    is_maker: bool
    exchange_ns: int


def next_state(state: str, event: str) -> str:
    """Return the state after the event. Raises IllegalTransition, and then nothing changed."""
    try:
        return TABLE[state][event]
    except KeyError:
        raise IllegalTransition(f"an order in state {state} cannot {event}; legal are "
                                f"{', '.join(TABLE.get(state, {})) or 'none'}") from None


def new_epoch(wall_ns: int, token: str) -> str:
    """Return the name of an executor start: clock and chance, never a counter that a copy shares."""
    return _base36(wall_ns // 1_000_000).rjust(8, "0") + token.lower()


def client_order_id(epoch: str, *, strategy: str, run: int, seq: int, leg: Leg, attempt: int) -> str:
    """Return the id of one intent, made once and stored; at most 32 letters and digits.

    attempt tells apart the intents of one leg (a reduce in parts, a stop that is resized).
    """
    origin = hashlib.sha256(f"{strategy}/{run}/{seq}".encode()).hexdigest()[:10]
    return f"{PREFIX}{epoch}{origin}{_LEG_LETTER[leg]}{_base36(attempt)}"


def is_ours(client_order_id: str) -> bool:
    """Return whether the id has a prefix of ours."""
    return client_order_id.startswith(OUR_PREFIXES)


def _base36(number: int) -> str:
    digits = ""
    while True:
        number, digit = divmod(number, 36)
        digits = _DIGITS[digit] + digits
        if number == 0:
            return digits
