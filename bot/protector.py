"""Keeps positions protected: places, moves and cancels exits, and closes what cannot be protected."""

from collections.abc import Callable
from decimal import Decimal

from bot.bookkeeper import Bookkeeper
from bot.books import SymbolBook
from bot.clock import Clock
from bot.config import ExecutorConfig
from bot.events import Unprotected
from bot.limits import MAY_PASS
from bot.log import Log
from bot.orders import Order, Side
from bot.protection import Exit, as_held, is_protected, is_stop_passed, late_excess, next_steps, refusals

RETRY_WAIT_NS = 1_000_000_000  # before an exit or a close that came to nothing is tried again; doubles
CANCEL_WAIT_NS = 1_000_000_000  # before a cancel whose answer was lost or no is sent again
DOUBLINGS_MAX = 6  # 64 s
# Fills of a market order, or of a stop that was triggered, come in milliseconds; past this what is booked
# is protected, whatever becomes of them: reduce-only, the two take no more than there is.
SETTLE_S_MAX = 2.0
MOVES_MAX, MOVES_SPAN_NS = 5, 5_000_000_000  # of an exit that protects already; 300 orders fit in 10 s


class Protector:
    """Measures the seconds without protection and acts on them. `intend` records an order to send."""

    def __init__(self, config: ExecutorConfig, clock: Clock, log: Log, *, keeper: Bookkeeper,
                 intend: Callable[..., Order], fence_ns: int) -> None:
        self._config, self._clock, self._log = config, clock, log
        self._keeper, self._intend, self._fence_ns = keeper, intend, fence_ns
        self._unprotected_ns = {  # symbol -> monotonic time since when; what the last run left lacks it still
            symbol: clock.mono_ns() - max(0, clock.wall_ns() - book.unprotected_ns)
            for symbol, book in keeper.books.symbols.items() if book.unprotected_ns}
        self._settles_ns: dict[str, int] = {}  # symbol -> since when fills are a moment away
        self._canceled_ns: dict[str, dict[str, int]] = {}  # symbol -> order -> when its cancel was last sent

    def act(self, symbol: str, state: str, *, is_read: bool) -> tuple[list[Order], list[Order]]:
        """Record what protection needs now; return the orders to send and those to cancel.

        is_read: the exchange has told this symbol's position since our start; until then
        RECONCILING lets nothing pass, nor does a restored journal, halted or not: its position is an old one.
        """
        booked = self._keeper.books.book(symbol)
        book = as_held(booked)
        if "protect" not in MAY_PASS[state] and not (state == "RECONCILING" and is_read):
            return [], []
        if self._keeper.books.restored_ns and not is_read:
            return [], []
        self._count(book)
        settles = any(o.triggered_id if o.request.is_conditional else o.state != "UNKNOWN"
                      for o in book.live_orders())
        now_ns = self._clock.mono_ns()
        since_ns = self._settles_ns.setdefault(symbol, now_ns) if settles else self._settles_ns.pop(symbol, 0)
        if settles and now_ns - since_ns <= SETTLE_S_MAX * 1e9 and self.unprotected_s(symbol) <= SETTLE_S_MAX:
            return [], []  # its fills, a moment away, decide how much there is to protect
        must_close = self._must_close(book)
        excess = Decimal(0) if must_close else late_excess(book)
        if (excess or must_close) and self._may_close(book, is_excess=bool(excess)):
            return [self._close(book, excess or abs(book.position_qty), is_excess=bool(excess))], []
        steps = next_steps(book, is_fenced=self._is_fenced(book), booked_qty=abs(booked.position_qty))
        placed = [self._place(exit_, book) for exit_ in steps.place
                  if not self._waits(refusals(book, exit_)) and not self._moved_lately(book, exit_)]
        gone = steps.cancel if book.position_qty or not booked.position_qty else ()  # an answer may lag
        return placed, self._cancel(book, gone)

    def _count(self, book: SymbolBook) -> None:
        # In the journal too: an executor that dies again and again must not begin anew each time.
        symbol = book.symbol
        if is_protected(book):
            self._unprotected_ns.pop(symbol, None)
            if book.unprotected_ns:
                self._keeper.record(Unprotected(symbol=symbol, since_ns=0))
        elif symbol not in self._unprotected_ns:
            self._unprotected_ns[symbol] = self._clock.mono_ns()
            self._keeper.record(Unprotected(symbol=symbol, since_ns=self._clock.wall_ns()))

    def unprotected_s(self, symbol: str) -> float:
        """Return for how long the symbol's position has lacked the stop it should have."""
        since_ns = self._unprotected_ns.get(symbol)
        return 0.0 if since_ns is None else (self._clock.mono_ns() - since_ns) / 1e9

    def _must_close(self, book: SymbolBook) -> bool:
        return is_stop_passed(book) or not (
            is_protected(book) or self.unprotected_s(book.symbol) <= self._config.unprotected_s_max)

    def _may_close(self, book: SymbolBook, *, is_excess: bool) -> bool:
        # A close whose outcome is unknown is tried again too: reduce-only, it cannot turn the position over.
        # One of an excess could take more than that, together with whatever else may still reduce.
        if is_excess and any(o.leg != "open" for o in book.working()):
            return False
        closes = [o for o in book.orders.values() if o.leg == "close" and o.signal == book.exits_signal]
        fruitless = next((n for n, o in enumerate(reversed(closes)) if o.filled_qty), len(closes))
        return not self._waits(closes[len(closes) - fruitless:])

    def _waits(self, tries: list[Order]) -> bool:
        if not tries:
            return False
        refused = sum(o.state != "ABSENT" for o in tries)  # one that never left says nothing of the next
        wait_ns = RETRY_WAIT_NS << min(max(refused - 1, 0), DOUBLINGS_MAX)
        return 0 <= self._clock.wall_ns() - tries[-1].intended_ns < wait_ns  # a clock may step back

    def _is_fenced(self, book: SymbolBook) -> bool:
        # Whether another stop may stand beside those nobody knows the end of: fence by fence, then doubling.
        lost = [o for o in book.unknown() if o.request.type == "stop"]
        wait_ns = self._fence_ns << min(max(len(lost) - 2, 0), DOUBLINGS_MAX)
        return not any(o.may_arrive(self._clock.wall_ns(), wait_ns) for o in lost)

    def _moved_lately(self, book: SymbolBook, exit_: Exit) -> bool:
        # A strategy that trails its stop with every Tick must not use up the exchange's order rate.
        now_ns = self._clock.wall_ns()
        lately = sum(0 <= now_ns - o.intended_ns < MOVES_SPAN_NS for o in book.orders.values()
                     if o.request.type == exit_.type)
        return is_protected(book) and lately >= MOVES_MAX

    def _cancel(self, book: SymbolBook, names: tuple[str, ...]) -> list[Order]:
        now_ns, sent_ns = self._clock.mono_ns(), self._canceled_ns.get(book.symbol, {})
        due = [n for n in names if n not in sent_ns or now_ns - sent_ns[n] >= CANCEL_WAIT_NS]
        self._canceled_ns[book.symbol] = {n: now_ns if n in due else sent_ns[n] for n in names}
        for name in due:
            self._keeper.change(book.orders[name], "request_cancel")
        return [book.orders[name] for name in due]

    def _close(self, book: SymbolBook, qty: Decimal, *, is_excess: bool) -> Order:
        unprotected_s = self.unprotected_s(book.symbol)
        late = book.locks.get("late_fill") if is_excess else None
        self._log.error("late_fill_closed" if late else "position_unprotected", symbol=book.symbol, qty=qty,
                        position_qty=book.position_qty, unprotected_s=unprotected_s, late_fill=late)
        side: Side = "sell" if book.position_qty > 0 else "buy"
        return self._intend(book.symbol, "close", side, qty, reduce_only=True, signal=book.exits_signal,
                            checks={"unprotected_s": f"{unprotected_s:.1f}"})

    def _place(self, exit_: Exit, book: SymbolBook) -> Order:
        return self._intend(book.symbol, exit_.type, exit_.side, exit_.qty, reduce_only=True,
                            signal=book.exits_signal, trigger_price=exit_.trigger_price,
                            checks={"position_qty": str(book.position_qty)})
