"""What all symbols together hold, may come to hold, and have won or lost. Pure; the unknown counts in full.

The money is the exchange's word of the last comparison, carried on with our own fills and marks since.
"""

from collections.abc import Callable, Iterable, Mapping
from decimal import Decimal

import msgspec

from bot.books import Books, SymbolBook
from bot.model import Instrument
from bot.orders import Order
from bot.rows import ExchangePosition

ZERO = Decimal(0)
CENT = Decimal("0.01")  # the exchange rounds each fill and each payment to 8 decimals
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


def gross_notional(books: Iterable[SymbolBook], told: Mapping[str, ExchangePosition], mark_of: MarkOf,
                   instruments: Mapping[str, Instrument]) -> Decimal:
    """Return the size of the worst positions together; the exchange's word counts where it is larger.

    told: positions as the exchange said last, those of others among them. Without a mark their price counts.
    """
    by_symbol, total = {book.symbol: book for book in books}, ZERO
    for symbol in by_symbol.keys() | told.keys():
        book, there = by_symbol.get(symbol, SymbolBook(symbol=symbol)), told.get(symbol)
        price = price_of(symbol, told, mark_of) or book.entry_price or ZERO
        qty = max(worst_qty(book), abs(there.qty) if there else ZERO)
        total += qty * _size(symbol, instruments) * price
    return total


def equity(books: Books, told: Mapping[str, ExchangePosition], mark_of: MarkOf,
           instruments: Mapping[str, Instrument]) -> Decimal | None:
    """Return what the account is worth now, in the settlement currency; None before the first comparison."""
    if books.wallet_balance is None:
        return None
    total = books.wallet_balance + sum((pnl for _, pnl in books.since_wallet), ZERO)
    for symbol, book in books.symbols.items():
        price = price_of(symbol, told, mark_of)
        if book.held_qty and book.entry_price is not None and price is not None:
            total += book.held_qty * _size(symbol, instruments) * (price - book.entry_price)
    return total


def unexplained(books: Books, wallet_balance: Decimal, income: Mapping[str, Decimal]) -> Decimal:
    """Return what moved the balance and is neither a fill of ours nor income, a cent at least; else 0."""
    balance, since_ns = books.explained
    rest = wallet_balance - balance - books.earned - sum(income.values(), ZERO)
    return rest if since_ns and abs(rest) >= CENT else ZERO


def transfers(books: Books, income: Mapping[str, Decimal]) -> Decimal:
    """Return what was paid in, less what was taken out, since the day of the books began."""
    before = books.day.transfers if books.day else ZERO
    return before + income.get("TRANSFER", ZERO) - books.income.get("TRANSFER", ZERO)


def price_of(symbol: str, told: Mapping[str, ExchangePosition], mark_of: MarkOf) -> Decimal | None:
    """Return the newest mark, the one of the last comparison where no Tick came yet, or None."""
    there = told.get(symbol)
    for price in (mark_of(symbol), there.mark_price if there else None):
        if price is not None and price.is_finite() and price > 0:
            return price
    return None


def _size(symbol: str, instruments: Mapping[str, Instrument]) -> Decimal:
    return instruments[symbol].contract_size if symbol in instruments else Decimal(1)


def day_pnl(books: Books, worth: Decimal | None) -> Decimal | None:
    """Return what the UTC day has brought, transfers left out; None before it is known."""
    if books.day is None or worth is None:
        return None
    return worth - books.day.equity - books.day.transfers


def entries_since(books: Iterable[SymbolBook], from_ns: int, now_ns: int) -> list[Order]:
    """Return the entries intended between from_ns and now_ns."""
    return [o for book in books for o in book.orders.values()
            if o.leg == "open" and from_ns < o.intended_ns <= now_ns]


def distance_pct(mark: Decimal | None, told: ExchangePosition | None) -> Decimal | None:
    """Return how far the mark is from liquidation, in percent of it; None where nothing is to lose.

    Below zero: the mark is beyond that price already, and the exchange has not acted yet.
    """
    if mark is None or not (mark.is_finite() and mark > 0) or told is None:
        return None
    if not told.qty or told.liquidation_price is None:
        return None
    away = mark - told.liquidation_price
    return (away if told.qty > 0 else -away) / mark * 100
