"""Keeps positions protected: places, moves and cancels exits, and closes what cannot be protected."""

from collections.abc import Callable

from bot.bookkeeper import Bookkeeper
from bot.books import Order, SymbolBook
from bot.clock import Clock
from bot.config import ExecutorConfig
from bot.limits import MAY_PASS
from bot.log import Log
from bot.orders import Side
from bot.protection import Exit, is_protected, next_steps

RETRY_WAIT_NS = 1_000_000_000  # between two tries to place an exit, or to close, that was refused
WOULD_TRIGGER_NOW = -2021  # "Order would immediately trigger": the stop's price is passed already


class Protector:
    """Measures the seconds without protection and acts on them. `intend` records an order to send."""

    def __init__(self, config: ExecutorConfig, clock: Clock, log: Log, *, keeper: Bookkeeper,
                 intend: Callable[..., Order]) -> None:
        self._config, self._clock, self._log = config, clock, log
        self._keeper, self._intend = keeper, intend
        self._unprotected_ns: dict[str, int] = {}  # symbol -> monotonic time since when

    def act(self, symbol: str, state: str, *, is_read: bool) -> tuple[list[Order], list[Order]]:
        """Record what protection needs now; return the orders to send and those to cancel.

        is_read: the exchange has told this symbol's position since our start; until then
        RECONCILING lets nothing pass.
        """
        book = self._keeper.books.book(symbol)
        if "protect" not in MAY_PASS[state] and not (state == "RECONCILING" and is_read):
            return [], []
        if is_protected(book):
            self._unprotected_ns.pop(symbol, None)
        else:
            self._unprotected_ns.setdefault(symbol, self._clock.mono_ns())
        if book.working():
            return [], []  # its fills decide how much there is to protect
        if self._must_close(book):
            return [self._close(book)], []
        steps = next_steps(book)
        placed = [self._place(exit_, book) for exit_ in steps.place if not self._refused_lately(book, exit_)]
        cancels = [book.orders[name] for name in steps.cancel]
        for order in cancels:
            self._keeper.change(order, "request_cancel")
        return placed, cancels

    def unprotected_s(self, symbol: str) -> float:
        """Return for how long the symbol's position has lacked the stop it should have."""
        since_ns = self._unprotected_ns.get(symbol)
        return 0.0 if since_ns is None else (self._clock.mono_ns() - since_ns) / 1e9

    def _must_close(self, book: SymbolBook) -> bool:
        if is_protected(book):
            return False
        closes = [o for o in book.orders.values() if o.leg == "close"]
        if closes and self._clock.wall_ns() - closes[-1].intended_ns < RETRY_WAIT_NS:
            return False
        stops = [o for o in book.orders.values() if o.request.type == "stop"]
        is_passed = bool(stops) and stops[-1].state == "REJECTED" and stops[-1].code == WOULD_TRIGGER_NOW
        return is_passed or self.unprotected_s(book.symbol) > self._config.unprotected_s_max

    def _close(self, book: SymbolBook) -> Order:
        unprotected_s = self.unprotected_s(book.symbol)
        self._log.error("position_unprotected", symbol=book.symbol, position_qty=book.position_qty,
                        unprotected_s=unprotected_s)
        side: Side = "sell" if book.position_qty > 0 else "buy"
        return self._intend(book.symbol, "close", side, abs(book.position_qty), reduce_only=True,
                            signal=book.exits_signal, checks={"unprotected_s": f"{unprotected_s:.1f}"})

    def _place(self, exit_: Exit, book: SymbolBook) -> Order:
        return self._intend(book.symbol, exit_.type, exit_.side, exit_.qty, reduce_only=True,
                            signal=book.exits_signal, trigger_price=exit_.trigger_price,
                            checks={"position_qty": str(book.position_qty)})

    def _refused_lately(self, book: SymbolBook, exit_: Exit) -> bool:
        tried = [o for o in book.orders.values()
                 if o.request.type == exit_.type and o.state in ("REJECTED", "ABSENT")]
        return bool(tried) and self._clock.wall_ns() - tried[-1].intended_ns < RETRY_WAIT_NS
