"""What all symbols together hold, may come to hold, and have won or lost. Pure; the unknown counts in full.

The money is the exchange's word of the last comparison, carried on with our own fills and marks since.
"""

from collections.abc import Callable, Iterable
from decimal import Decimal

import msgspec

from bot.books import Books, Order, SymbolBook
from bot.model import Instrument

ZERO = Decimal(0)
MarkOf = Callable[[str], Decimal | None]


class Exposure(msgspec.Struct, frozen=True, kw_only=True):
    """What an entry in one symbol has to look at beside its own book.

    others_notional: of all other symbols, at their worst. equity None: the exchange has not told it.
    liquidation_distance_pct: of the symbol's position, None where there is none to lose.
    """

    others_notional: Decimal = ZERO
    equity: Decimal | None = None
    open_orders: int = 0
    entries_last_minute: int = 0
    liquidation_distance_pct: Decimal | None = None


def worst_qty(book: SymbolBook) -> Decimal:
    """Return the largest position, unsigned, that may come of all that is not settled."""
    leaves = [o.signed_leaves_qty for o in book.working()]
    bought = sum((qty for qty in leaves if qty > 0), book.position_qty)
    sold = sum((qty for qty in leaves if qty < 0), book.position_qty)
    return max(abs(book.position_qty), abs(bought), abs(sold))


def gross_notional(books: Iterable[SymbolBook], mark_of: MarkOf,
                   instruments: dict[str, Instrument]) -> Decimal:
    """Return the size of the worst positions together. Without a mark the entry price counts."""
    total = ZERO
    for book in books:
        qty, instrument = worst_qty(book), instruments.get(book.symbol)
        mark = mark_of(book.symbol)
        price = mark if _is_price(mark) else book.entry_price
        total += qty * (instrument.contract_size if instrument else 1) * (price or ZERO)
    return total


def equity(books: Books, mark_of: MarkOf, instruments: dict[str, Instrument]) -> Decimal | None:
    """Return what the account is worth now, in the settlement currency; None before the first comparison."""
    if books.wallet_balance is None:
        return None
    total = books.wallet_balance + books.booked_pnl - books.reconciled_pnl
    for book in books.symbols.values():
        mark, instrument = mark_of(book.symbol), instruments.get(book.symbol)
        if book.position_qty and book.entry_price is not None and mark is not None and _is_price(mark):
            size = instrument.contract_size if instrument else Decimal(1)
            total += book.position_qty * size * (mark - book.entry_price)
    return total


def day_pnl(books: Books, worth: Decimal | None) -> Decimal | None:
    """Return what the UTC day has brought, transfers left out; None before it is known."""
    if books.day is None or worth is None:
        return None
    return worth - books.day.equity - books.day.transfers


def entries_since(books: Iterable[SymbolBook], from_ns: int, now_ns: int) -> list[Order]:
    """Return the entries intended between from_ns and now_ns."""
    return [o for book in books for o in book.orders.values()
            if o.leg == "open" and from_ns < o.intended_ns <= now_ns]


def distance_pct(mark: Decimal | None, liquidation_price: Decimal | None) -> Decimal | None:
    """Return how far the mark is from liquidation, in percent of it; None where nothing is to lose."""
    if mark is None or not _is_price(mark) or liquidation_price is None:
        return None
    return abs(mark - liquidation_price) / mark * 100


def _is_price(price: Decimal | None) -> bool:
    return price is not None and price.is_finite() and price > 0
