"""What protects a position at the exchange, and what has to change so that it does. Pure.

The wanted exits follow from the position and the plan; the plan is compared with the orders at
rest. New first, then old: two stops stand only while one replaces the other.
"""

from decimal import Decimal

import msgspec

from bot.books import Order, SymbolBook
from bot.orders import CLOSED, IN_FLIGHT, OrderType, Side


class Exit(msgspec.Struct, frozen=True):
    """An exit order that should rest at the exchange. qty: unsigned contracts."""

    type: OrderType
    side: Side
    qty: Decimal
    trigger_price: Decimal


class Steps(msgspec.Struct, frozen=True):
    """What to do now: exits to place, orders to cancel."""

    place: tuple[Exit, ...]
    cancel: tuple[str, ...]


def wanted_exits(book: SymbolBook) -> tuple[Exit, ...]:
    """Return the exits the plan asks for at the position as it stands."""
    if book.position_qty == 0:
        return ()
    side: Side = "sell" if book.position_qty > 0 else "buy"
    prices: list[tuple[OrderType, Decimal | None]] = [("stop", book.stop_loss), ("take_profit", book.take_profit)]
    return tuple(Exit(kind, side, abs(book.position_qty), price) for kind, price in prices if price is not None)


def next_steps(book: SymbolBook) -> Steps:
    """Return what brings the exits at rest to the wanted ones; nothing while an exit is in flight."""
    wanted = wanted_exits(book)
    exits = [o for o in book.orders.values() if o.request.is_conditional and o.state not in CLOSED]
    place, cancel = [], []
    for kind in ("stop", "take_profit"):
        of_kind = [o for o in exits if o.request.type == kind]
        want = next((e for e in wanted if e.type == kind), None)
        if any(o.state in IN_FLIGHT for o in of_kind):
            continue  # its outcome decides what comes next
        fitting = [o for o in of_kind if want is not None and _fits(o, want)]
        if want is not None and not fitting:
            place.append(want)
            continue  # the old one stays until the new one rests
        cancel += [o.id for o in of_kind if o not in fitting[:1] and o.state != "PENDING_CANCEL"
                   and not o.triggered_id]
    return Steps(tuple(place), tuple(cancel))


def is_protected(book: SymbolBook) -> bool:
    """Return whether the position needs no stop, or one of full size rests at the exchange."""
    want = next((e for e in wanted_exits(book) if e.type == "stop"), None)
    if want is None:
        return True
    resting = [o for o in book.orders.values()
               if o.request.type == "stop" and o.state not in CLOSED | IN_FLIGHT and o.request.side == want.side]
    return sum((o.request.qty - o.filled_qty for o in resting), Decimal(0)) >= want.qty


def _fits(order: Order, want: Exit) -> bool:
    request = order.request
    return (order.state in ("ACCEPTED", "PARTIALLY_FILLED") and request.side == want.side
            and request.qty == want.qty and request.trigger_price == want.trigger_price)
