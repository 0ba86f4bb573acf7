"""The books: positions, orders and open signals, folded from journal events. Pure.

`apply` is the only way to change them; it raises before it changes anything. Folding the same
events twice gives equal bytes.
"""

from collections.abc import Callable
from decimal import Decimal
from typing import Any

import msgspec

from bot import events
from bot.errors import InvariantError
from bot.model import TradingSignal, signal_id
from bot.orders import Order, next_state

ZERO = Decimal(0)
SETTLED_ORDERS_KEPT = 50  # per symbol, for late fills; older ones are found in the journal
SETTLED_KEPT_NS = 60_000_000_000  # and all of the last minute, in which the order rate is counted
CLOCK_SLACK_NS = 1_000_000_000  # a signal made later than this after now comes from a wrong clock
LAG_NS = 5_000_000_000  # a position's answer may lag; what comparisons so far apart say alike does not
DAY_NS = 86_400_000_000_000  # a UTC day
LAYOUT = 5  # of what is folded; one more with each field, and each way to fold: other checkpoints say less
FLATTENED = "flattened"  # a lock: its target is zero, whatever an order of before may fill yet
NAMES_KEPT = 8  # strategies remembered per symbol: the owner, former ones, and strangers


class OpenSignal(msgspec.Struct, kw_only=True):
    """A signal without an outcome yet, the orders it led to and what they filled (signed)."""

    signal: TradingSignal
    orders: list[str] = []
    filled_qty: Decimal = ZERO

    @property
    def id(self) -> str:
        return signal_id(self.signal.strategy, self.signal.run, self.signal.seq)

    @property
    def age_name(self) -> tuple[int, int, int]:
        """Return what `is_newer` compares."""
        return self.signal.created_ns, self.signal.run, self.signal.seq


def is_newer(one: tuple[int, int, int], other: tuple[int, int, int]) -> bool:
    """Return whether one age_name is newer: within a run the numbers say so, whatever the clock did."""
    return one[2] > other[2] if one[1] == other[1] else one > other


class SymbolBook(msgspec.Struct, kw_only=True):
    """One symbol: position (signed contracts), exits, orders, open signals, locks by cause."""

    symbol: str
    position_qty: Decimal = ZERO
    entry_price: Decimal | None = None
    version: int = 0
    realized_pnl: Decimal = ZERO
    fees: Decimal = ZERO
    stop_loss: Decimal | None = None
    take_profit: Decimal | None = None
    exits_signal: str = ""
    unprotected_ns: int = 0  # since when the position lacks its stop, host's clock; 0: it does not
    signals: list[OpenSignal] = []
    orders: dict[str, Order] = {}
    intents: int = 0  # made so far in this symbol; names the next attempt
    locks: dict[str, str] = {}
    last_trade_id: int = 0  # all trades up to it were read from the exchange's own list
    newest: dict[str, tuple[int, int, int]] = {}  # strategy -> created_ns, run, seq of its newest signal
    target_qty: Decimal | None = None  # in force: of what acted, or was there already, last
    apart_qty: Decimal = ZERO  # what the exchange held beyond position_qty when books_differ was seen last
    apart_ns: int = 0  # for how long the comparisons have said the same of it

    @property
    def held_qty(self) -> Decimal:
        """Return the position, no larger than the exchange's where the last comparison saw them differ."""
        ours, there = self.position_qty, self.position_qty + self.apart_qty
        if "books_differ" not in self.locks:
            return ours
        return min(ours, there, key=abs) if ours * there > 0 else ZERO

    def live_orders(self) -> list[Order]:
        """Return the orders from which something is still expected."""
        return [o for o in self.orders.values() if not o.is_settled]

    def working(self) -> list[Order]:
        """Return the unsettled orders that move the position now, conditional ones left out."""
        return [o for o in self.live_orders() if not o.request.is_conditional]

    def unknown(self) -> list[Order]:
        """Return the orders whose outcome nobody knows."""
        return [o for o in self.orders.values() if o.state == "UNKNOWN"]


class DayBook(msgspec.Struct, kw_only=True):
    """One UTC day of the account, by the exchange's clock. equity: at since_ns, when we began to count."""

    number: int  # days since 1970
    since_ns: int
    equity: Decimal
    transfers: Decimal = ZERO  # since then


class _Layout(msgspec.Struct):
    layout: int = 0


class Books(msgspec.Struct, kw_only=True):
    """All symbols, and what was counted.

    wallet_ns: when the exchange told wallet_balance, by its clock; since_wallet: what our fills since then
    realized, less fees, by their time. equity: wallet and unrealized, as the last comparison saw them.
    explained: the balance whose every move is known, and until when, by its clock; earned: what the fills
    booked since then brought; income, income_ns: the rest by its type, and the newest's time.
    """

    layout: int = LAYOUT
    epoch: str = ""
    symbols: dict[str, SymbolBook] = {}
    halts: dict[str, str] = {}
    signals: int = 0
    orders: int = 0
    fills: int = 0
    outcomes: dict[str, int] = {}
    wallet_balance: Decimal | None = None
    equity: Decimal | None = None
    wallet_ns: int = 0
    since_wallet: list[tuple[int, Decimal]] = []
    explained: tuple[Decimal, int] = (ZERO, 0)
    earned: Decimal = ZERO
    income: dict[str, Decimal] = {}
    income_ns: int = 0
    day: DayBook | None = None
    reconciled: int = 0
    lacks_since_ns: int = 0  # a restored journal lacks what happened from then on ...
    restored_ns: int = 0  # ... until then; both 0 once a comparison has brought it in

    def book(self, symbol: str) -> SymbolBook:
        """Return the symbol's book, an empty one when nothing happened in it yet."""
        found = self.symbols.get(symbol)
        return found if found is not None else SymbolBook(symbol=symbol)

    def find_order(self, symbol: str, *, client_order_id: str = "",
                   exchange_order_id: str = "") -> Order | None:
        """Return our order by its name, or by the exchange's number of what executes.

        That is never a conditional order's own number, which counts in a row of its own.
        """
        orders = self.book(symbol).orders
        if client_order_id in orders:
            return orders[client_order_id]
        if exchange_order_id:
            return next((o for o in orders.values() if exchange_order_id == (
                o.triggered_id if o.request.is_conditional else o.exchange_order_id)), None)
        return None

    def compare_in_s(self, every_s: float) -> float:
        """Return when to compare again: soon while a difference may come of an answer that lags."""
        is_new = any("books_differ" in b.locks and b.apart_ns < LAG_NS for b in self.symbols.values())
        return min(every_s, LAG_NS / 1e9) if is_new else every_s

    def apply(self, event: events.JournalEvent) -> None:
        """Fold one event in. Raises IllegalTransition or InvariantError, and then nothing changed."""
        _APPLY[type(event)](self, event)

    def encode(self) -> bytes:
        return msgspec.json.encode(self)

    @staticmethod
    def decode(raw: bytes) -> "Books | None":
        """Return what `encode` gave, None when it was of another release with other fields."""
        is_ours = msgspec.json.decode(raw, type=_Layout).layout == LAYOUT
        return msgspec.json.decode(raw, type=Books) if is_ours else None

    def _own(self, symbol: str) -> SymbolBook:
        return self.symbols.setdefault(symbol, SymbolBook(symbol=symbol))


def _started(books: Books, event: events.Started) -> None:
    books.epoch = event.epoch


def _signal_received(books: Books, event: events.SignalReceived) -> None:
    signal = event.signal
    opened = OpenSignal(signal=signal)
    if any(s.signal.seq == signal.seq and s.id == opened.id for s in books.book(signal.symbol).signals):
        raise InvariantError(f"signal {opened.id} was received twice")
    book = books._own(signal.symbol)
    book.signals.append(opened)
    books.signals += 1
    if signal.created_ns > event.received_ns + CLOCK_SLACK_NS:
        return  # from the future: it will be denied, and must not outrank what comes after it
    # By strategy: a stranger's signal, which will be denied, must not outrank the owner's.
    if is_newer(opened.age_name, book.newest.get(signal.strategy, (0, 0, 0))):
        book.newest[signal.strategy] = opened.age_name
    if len(book.newest) > NAMES_KEPT:
        del book.newest[min(book.newest, key=lambda name: book.newest[name])]


def _signal_closed(books: Books, event: events.SignalClosed) -> None:
    book = books.book(event.symbol)
    at = next((at for at, signal in enumerate(book.signals) if signal.id == event.signal), None)
    if at is None:
        raise InvariantError(f"signal {event.signal} got a second outcome {event.outcome}: it is not open")
    if event.outcome == "done" and not book.signals[at].orders:
        book.target_qty = book.signals[at].signal.target_qty
    del book.signals[at]
    is_empty = msgspec.structs.replace(book, newest={}) == SymbolBook(symbol=event.symbol)
    if event.rule == events.NOT_OWNER and is_empty:
        del books.symbols[event.symbol]  # perhaps somebody made it up: the books do not grow with each
    books.outcomes[event.outcome] = books.outcomes.get(event.outcome, 0) + 1


def _order_intended(books: Books, event: events.OrderIntended) -> None:
    book, request, name = books.book(event.request.symbol), event.request, event.request.client_order_id
    if name in book.orders:
        raise InvariantError(f"order {name} was intended twice")
    if not (request.qty.is_finite() and request.qty > 0):
        raise InvariantError(f"order {name} must have a positive quantity, was {request.qty}")
    if event.leg in ("open", "reduce"):
        signal = next((s for s in book.signals if s.id == event.signal), None)
        if signal is None:
            raise InvariantError(f"order {name} is for signal {event.signal}, which is not open")
        if any(o.state != "UNKNOWN" or event.leg == "open" for o in book.working()):
            raise InvariantError(f"order {name} would be the second to move {request.symbol}")
        signal.orders.append(name)
        book.target_qty = signal.signal.target_qty
    book = books._own(request.symbol)
    if event.leg == "flatten":
        book.target_qty = ZERO
    _forget_settled(book, event.intended_ns)
    book.orders[name] = Order(request=request, strategy=event.strategy, signal=event.signal, leg=event.leg,
                              intended_ns=event.intended_ns)
    book.intents += 1
    books.orders += 1


def _forget_settled(book: SymbolBook, now_ns: int) -> None:
    needed = {name for signal in book.signals for name in signal.orders}
    settled = [o.id for o in book.orders.values()
               if o.is_settled and o.id not in needed and o.intended_ns < now_ns - SETTLED_KEPT_NS]
    for old in settled[: max(0, len(settled) - SETTLED_ORDERS_KEPT)]:
        del book.orders[old]


def _order_changed(books: Books, event: events.OrderChanged) -> None:
    order = next((b.orders[event.client_order_id] for b in books.symbols.values()
                  if event.client_order_id in b.orders), None)
    if order is None:
        raise InvariantError(f"order {event.client_order_id} is not in the books")
    if not (event.executed_qty.is_finite() and event.executed_qty >= 0):
        raise InvariantError(f"order {order.id} cannot have executed {event.executed_qty}")
    order.state = next_state(order.state, event.event)
    order.executed_qty = max(order.executed_qty, event.executed_qty)
    order.exchange_order_id = event.exchange_order_id or order.exchange_order_id
    order.triggered_id = event.triggered_id or order.triggered_id
    order.code = event.code or order.code
    order.text = event.text or order.text


def _fill_booked(books: Books, event: events.FillBooked) -> None:
    book = books.book(event.symbol)
    if not (event.qty.is_finite() and event.qty > 0 and event.price.is_finite() and event.price > 0
            and event.fee.is_finite() and event.realized_pnl.is_finite()):
        raise InvariantError(f"fill {event.key} has numbers that no fill can have: {event.qty} at "
                             f"{event.price}, fee {event.fee}, realized {event.realized_pnl}")
    signed_qty = event.qty if event.side == "buy" else -event.qty
    entry_price, position_qty = _entry_price(book, signed_qty, event.price), book.position_qty + signed_qty
    realized_pnl, fees = book.realized_pnl + event.realized_pnl, book.fees + event.settle_fee
    order = book.orders.get(event.client_order_id)
    if order is not None:
        _fill_order(order, book, event, signed_qty)
    book = books._own(event.symbol)
    if event.cause == "restored" and book.position_qty * position_qty <= 0:
        _forget_exits(book)
    book.position_qty, book.entry_price = position_qty, entry_price
    book.realized_pnl, book.fees = realized_pnl, fees
    if event.cause != "signal":
        book.version += 1
        _want_no_more(book)
    if book.apart_qty * signed_qty > 0 and event.exchange_ns <= books.wallet_ns:
        book.apart_qty -= min(book.apart_qty, signed_qty, key=abs)  # the comparison saw it, we did not
    earned = event.realized_pnl - event.settle_fee
    books.earned += earned
    if books.wallet_ns and event.exchange_ns > books.wallet_ns:
        books.since_wallet.append((event.exchange_ns, earned))
    books.fills += 1


def _fill_order(order: Order, book: SymbolBook, event: events.FillBooked, signed_qty: Decimal) -> None:
    filled = order.filled_qty + event.qty
    if event.side != order.request.side:
        raise InvariantError(f"order {order.id} is a {order.request.side}, fill {event.key} a {event.side}")
    # More than was ordered: what the exchange did is booked all the same; who books it locks and halts.
    is_overfill = filled > order.request.qty
    order.state = "FILLED" if is_overfill else next_state(
        order.state, "complete" if filled == order.request.qty else "fill")
    order.filled_qty = filled
    order.executed_qty = max(order.executed_qty, filled)
    for signal in book.signals:
        if order.id in signal.orders:
            signal.filled_qty += signed_qty


def _entry_price(book: SymbolBook, signed_qty: Decimal, price: Decimal) -> Decimal | None:
    held, total = book.position_qty, book.position_qty + signed_qty
    if total == 0:
        return None
    if held == 0 or (held > 0) != (total > 0) or book.entry_price is None:
        return price  # opened, or turned over: what is left was bought at this price
    if abs(total) < abs(held):
        return book.entry_price
    return (book.entry_price * held + price * signed_qty) / total


def _want_no_more(book: SymbolBook) -> None:
    # What an exit, the exchange or a person took out is not wanted back.
    if book.target_qty is not None:
        is_same_side = (book.target_qty > 0) == (book.position_qty > 0)
        book.target_qty = min(book.target_qty, book.position_qty, key=abs) if is_same_side else ZERO


def _forget_exits(book: SymbolBook) -> None:
    # They were planned for another position.
    book.stop_loss = book.take_profit = None
    book.exits_signal = ""


def _exits_set(books: Books, event: events.ExitsSet) -> None:
    book = books._own(event.symbol)
    book.stop_loss, book.take_profit = event.stop_loss, event.take_profit
    book.exits_signal = event.signal


def _unprotected(books: Books, event: events.Unprotected) -> None:
    books._own(event.symbol).unprotected_ns = event.since_ns


def _locked(books: Books, event: events.SymbolLocked) -> None:
    book = books._own(event.symbol)
    book.locks[event.cause] = event.evidence
    if event.cause == FLATTENED:
        book.target_qty = ZERO


def _unlocked(books: Books, event: events.SymbolUnlocked) -> None:
    books._own(event.symbol).locks.pop(event.cause, None)


def _halted(books: Books, event: events.Halted) -> None:
    books.halts[event.scope] = f"{event.who}: {event.why}"


def _resumed(books: Books, event: events.Resumed) -> None:
    books.halts.pop(event.scope, None)


def _reconciled(books: Books, event: events.Reconciled) -> None:
    if event.exchange_ns:
        _turn_day(books, event)
    span_ns = event.exchange_ns - books.wallet_ns
    books.wallet_balance, books.wallet_ns = event.wallet_balance, event.exchange_ns
    books.since_wallet = [(ns, pnl) for ns, pnl in books.since_wallet if ns > event.exchange_ns]
    books.equity = event.wallet_balance + event.unrealized_pnl
    books.income, books.income_ns = event.income, event.income_ns
    if event.is_explained:  # what is stamped before and not credited yet is asked for again
        since_ns = books.explained[1] and max(books.explained[1], event.exchange_ns - events.CREDITED_NS)
        books.explained, books.earned = (event.wallet_balance, since_ns or event.exchange_ns), ZERO
        books.income = {}
    books.reconciled += 1
    books.lacks_since_ns = books.restored_ns = 0
    for book in books.symbols.values():
        there = event.positions.get(book.symbol, ZERO) if "books_differ" in book.locks else book.position_qty
        apart_qty = there - book.position_qty
        book.apart_ns = book.apart_ns + span_ns if apart_qty and apart_qty == book.apart_qty else 0
        book.apart_qty = apart_qty
    for symbol, cursor in event.cursors.items():
        book = books._own(symbol)
        book.last_trade_id = max(book.last_trade_id, cursor)


def _turn_day(books: Books, event: events.Reconciled) -> None:
    # What happened between the last comparison of a day and the first of the next counts for the next;
    # after more than a day nobody can tell whose loss it was.
    number, day = event.exchange_ns // DAY_NS, books.day
    if day is not None and number <= day.number:
        day.transfers = event.transfers
        return
    equity = event.wallet_balance + event.unrealized_pnl
    if day is not None and books.equity is not None and number == day.number + 1:
        equity = books.equity + event.transfers - day.transfers
    books.day = DayBook(number=number, since_ns=event.exchange_ns, equity=equity)


def _told(books: Books, event: events.Commanded | events.OrderAnswered) -> None:
    pass  # for the record; what it leads to are events of their own


def _restored(books: Books, event: events.Restored) -> None:
    books.lacks_since_ns, books.restored_ns = event.lacks_since_ns, event.restored_ns
    for book in books.symbols.values():
        book.version += 1  # whatever was decided before was decided on another truth
        book.target_qty = None  # likewise: nothing is closed for exceeding it


def _adopted(books: Books, event: events.Adopted) -> None:
    book = books.book(event.symbol)
    if not event.qty.is_finite() or book.working():
        raise InvariantError(f"{event.symbol}: {event.qty} cannot be adopted; orders at work: "
                             f"{', '.join(o.id for o in book.working()) or 'none'}")
    book, after = books._own(event.symbol), book.position_qty + event.qty
    if book.position_qty * after <= 0:
        _forget_exits(book)
    book.position_qty, book.entry_price = after, event.entry_price if after else None
    book.version += 1
    if event.qty:
        _want_no_more(book)
    book.last_trade_id = max(book.last_trade_id, event.cursor)
    for cause in event.causes:
        book.locks.pop(cause, None)


_APPLY: dict[type, Callable[[Books, Any], None]] = {
    events.Started: _started, events.SignalReceived: _signal_received, events.SignalClosed: _signal_closed,
    events.OrderIntended: _order_intended, events.OrderChanged: _order_changed,
    events.FillBooked: _fill_booked, events.ExitsSet: _exits_set, events.SymbolLocked: _locked,
    events.SymbolUnlocked: _unlocked, events.Halted: _halted, events.Resumed: _resumed,
    events.Reconciled: _reconciled, events.Commanded: _told, events.Adopted: _adopted,
    events.OrderAnswered: _told, events.Unprotected: _unprotected, events.Restored: _restored,
}
