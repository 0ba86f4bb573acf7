"""What protects a position at the exchange, and what has to change so that it does. Pure.

The wanted exits follow from the position and the plan; the plan is compared with the orders at
rest. Stops: new first, then old, so that two stand only while one replaces the other; one whose
outcome is unknown is replaced too, once it cannot arrive any more. Take-profits: old first, so that
there is never more than one.
"""

from decimal import Decimal

import msgspec

from bot.books import LAG_NS, SymbolBook
from bot.orders import CLOSED, IN_FLIGHT, Order, OrderType, Side

WOULD_TRIGGER_NOW = -2021  # "Order would immediately trigger": the stop's price is passed already


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


def as_held(book: SymbolBook) -> SymbolBook:
    """Return the book with no larger a position than the exchange holds, while the two are known to differ.

    What a person closed or opened there is not ours to protect or to close. It is the same book otherwise:
    a reduce-only order for what is not there does no harm, a position without its stop does.
    """
    if book.apart_ns < LAG_NS or book.held_qty == book.position_qty:
        return book
    return msgspec.structs.replace(book, position_qty=book.held_qty)


def wanted_exits(book: SymbolBook) -> tuple[Exit, ...]:
    """Return the exits the plan asks for at the position as it stands."""
    if book.position_qty == 0:
        return ()
    side: Side = "sell" if book.position_qty > 0 else "buy"
    qty = abs(book.position_qty)
    prices: list[tuple[OrderType, Decimal | None]] = [
        ("stop", book.stop_loss), ("take_profit", book.take_profit)]
    return tuple(Exit(kind, side, qty, price) for kind, price in prices if price is not None)


def next_steps(book: SymbolBook, *, is_fenced: bool = False, booked_qty: Decimal = Decimal(0)) -> Steps:
    """Return what brings the exits at rest to the wanted ones; nothing is placed beside one in flight.

    is_fenced: a stop of unknown outcome cannot arrive any more; reduce-only, another may stand beside it.
    booked_qty: what rests may be as large, where less is held: no answer that lags takes it away.
    """
    wanted = wanted_exits(book)
    place, cancel = [], []
    for kind in ("stop", "take_profit"):
        exits = [o for o in book.orders.values()  # a triggered one rests no more: it fills, or never will
                 if o.request.type == kind and o.state not in CLOSED and not o.triggered_id]
        resting = [o for o in exits if o.state not in IN_FLIGHT]
        want = next((e for e in wanted if e.type == kind), None)
        keep = next((o for o in reversed(resting) if want is not None and _fits(o, want, booked_qty)), None)
        if want is not None and keep is None:
            if kind == "stop":  # the old one, the largest, stays until the new one rests
                keep = max((o for o in resting if o.request.side == want.side), key=_leaves_qty, default=None)
                exits = [o for o in exits if o.is_in_flight and not (is_fenced and o.state == "UNKNOWN")]
            if not exits:
                place.append(want)
        cancel += [o.id for o in resting if o is not keep]
    return Steps(tuple(place), tuple(cancel))


def is_protected(book: SymbolBook) -> bool:
    """Return whether the position needs no stop, or all of it is covered by what rests at the exchange."""
    want = next((e for e in wanted_exits(book) if e.type == "stop"), None)
    if want is None:
        return True
    # One that is being canceled may be gone already.
    resting = [o for o in book.orders.values() if o.request.type == "stop" and o.request.side == want.side
               and o.state in ("ACCEPTED", "PARTIALLY_FILLED") and not o.triggered_id]
    return sum(map(_leaves_qty, resting), Decimal(0)) >= want.qty


def is_stop_passed(book: SymbolBook) -> bool:
    """Return whether the exchange refused the wanted stop because the price is beyond it already."""
    want = next((e for e in wanted_exits(book) if e.type == "stop"), None)
    tries = [o for o in book.orders.values() if o.request.type == "stop" and o.signal == book.exits_signal]
    return (want is not None and bool(tries) and not any(_fits(o, want) for o in tries)
            and (tries[-1].state, tries[-1].code) == ("REJECTED", WOULD_TRIGGER_NOW)
            and tries[-1].request.trigger_price == want.trigger_price)


def late_excess(book: SymbolBook) -> Decimal:
    """Return what a fill that came after all left beyond the target in force, unsigned."""
    if "late_fill" not in book.locks or book.target_qty is None:
        return Decimal(0)
    is_same_side = (book.position_qty > 0) == (book.target_qty > 0)
    return max(Decimal(0), abs(book.position_qty) - (abs(book.target_qty) if is_same_side else 0))


def refusals(book: SymbolBook, wanted: Exit) -> list[Order]:
    """Return the newest tries at this exit that came to nothing, one after the other, the newest last."""
    failed: list[Order] = []
    for order in reversed([o for o in book.orders.values() if o.request.type == wanted.type]):
        is_same = (order.request.qty, order.request.trigger_price) == (wanted.qty, wanted.trigger_price)
        if (order.signal != book.exits_signal or order.state not in CLOSED or order.filled_qty
                or (order.state == "CANCELED" and not is_same)):
            break
        failed.insert(0, order)
    return failed


def _fits(order: Order, want: Exit, booked_qty: Decimal = Decimal(0)) -> bool:
    return (order.state in ("ACCEPTED", "PARTIALLY_FILLED") and not order.triggered_id
            and (order.request.side, order.request.trigger_price) == (want.side, want.trigger_price)
            and want.qty <= _leaves_qty(order) <= max(want.qty, booked_qty))


def _leaves_qty(order: Order) -> Decimal:
    return order.request.qty - max(order.filled_qty, order.executed_qty)
