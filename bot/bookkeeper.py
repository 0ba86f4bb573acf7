"""Writes the journal and keeps the books in step with it; tells the strategies what changed.

Every change is an event: applied to the books (which refuse what is illegal), appended to the
journal, and reported only after the commit that made it durable.
"""

from collections.abc import Callable
from decimal import Decimal

from bot import events
from bot.books import Books
from bot.clock import Clock
from bot.crash import point
from bot.errors import IllegalTransition, InvariantError
from bot.journal import Journal
from bot.model import Ack, FillReport, OrderReport, Outcome, Report, SignalOutcome, TradingSignal, signal_id
from bot.orders import TABLE, ExchangeFill, Leg, Order, OrderRequest, OrderStatus

CAUSE_OF_LEG: dict[str, events.FillCause] = {
    "open": "signal", "reduce": "signal", "stop": "stop", "take_profit": "take_profit",
    "close": "close", "flatten": "operator"}


class Bookkeeper:
    """The one who writes."""

    def __init__(self, journal: Journal, books: Books, clock: Clock,
                 publish: Callable[[Report], None], halt: Callable[[str, str], None]) -> None:
        self.journal, self.books = journal, books
        self._clock, self._publish, self._halt = clock, publish, halt
        self._reports: list[Report] = []
        self._is_dirty = False
        self.touched: set[str] = set()  # symbols changed since the executor last looked

    def record(self, event: events.JournalEvent, symbol: str = "") -> None:
        """Apply and append. What the books refuse halts trading, and then ends the process."""
        try:
            self.books.apply(event)
        except (InvariantError, IllegalTransition) as error:
            self._halt("executor", str(error))
            raise
        self._is_dirty = True
        self.journal.append(event)
        if symbol:
            self.touched.add(symbol)
        report = self._report(event)
        if report is not None:
            self._reports.append(report)

    def commit(self) -> None:
        """Make all recorded events durable, then report them."""
        if self._is_dirty:
            point("keeper.before_commit")
            self.journal.commit()
            point("keeper.committed")
            self._is_dirty = False
            self.journal.checkpoint(self.books)
        reports, self._reports = self._reports, []
        for report in reports:
            self._publish(report)
        if reports:
            point("keeper.reported")

    def acknowledge_again(self, signal: TradingSignal) -> bool:
        """Return whether the signal is known; then it is acknowledged once more, with its outcome."""
        name = signal_id(signal.strategy, signal.run, signal.seq)
        if not self.journal.has("signal", name):
            return False
        self._reports.append(Ack(strategy=signal.strategy, run=signal.run, seq=signal.seq))
        # The outcome may have been lost with the acknowledgement: tell it again.
        known = self.journal.find("outcome", name)
        if known is not None:
            self._reports.append(self._outcome(known))
        return True

    def receive(self, signal: TradingSignal) -> None:
        """Take in a signal that is not known yet; the commit acknowledges it."""
        self.record(events.SignalReceived(signal=signal, received_ns=self._clock.wall_ns()), signal.symbol)

    def close_signal(self, name: str, symbol: str, outcome: Outcome, reason: str,
                     filled_qty: Decimal) -> None:
        """Give a signal its one outcome."""
        self.record(events.SignalClosed(signal=name, symbol=symbol, outcome=outcome, reason=reason,
                                 filled_qty=filled_qty), symbol)

    def intend(self, request: OrderRequest, *, strategy: str, signal: str, leg: Leg,
               checks: dict[str, str]) -> Order:
        """Record that an order will be sent; commit before sending it."""
        book = self.books.book(request.symbol)
        self.record(events.OrderIntended(
            request=request, epoch=self.books.epoch, strategy=strategy, signal=signal, leg=leg,
            position_qty=book.position_qty, checks=checks, intended_ns=self._clock.wall_ns()), request.symbol)
        return self.books.symbols[request.symbol].orders[request.client_order_id]

    def change(self, order: Order, event: str, *, status: OrderStatus | None = None, code: int = 0,
               text: str = "") -> bool:
        """Record an order event unless it changes nothing or its state does not know it any more.

        Return whether it was recorded. A report that comes late (NEW behind CANCELED) is no event, nor is
        one of an order that the books have forgotten while it was asked for: it was settled.
        """
        if event not in TABLE[order.state] or order.id not in self.books.book(order.request.symbol).orders:
            return False
        change = events.OrderChanged(
            client_order_id=order.id, signal=order.signal, event=event, code=code, text=text,
            exchange_order_id=status.exchange_order_id if status else "",
            triggered_id=status.triggered_id if status else "",
            executed_qty=status.executed_qty if status else Decimal(0),
            raw_status=status.raw_status if status else "")
        is_news = (TABLE[order.state][event] != order.state or code
                   or change.executed_qty > order.executed_qty
                   or change.exchange_order_id not in ("", order.exchange_order_id)
                   or change.triggered_id not in ("", order.triggered_id))
        if is_news:
            self.record(change, order.request.symbol)
        return bool(is_news)

    def report_status(self, order: Order, status: OrderStatus) -> bool:
        """Derive the event from what the exchange says of an order; return whether it was news."""
        if status.event is None:
            return False
        # Fills are booked one by one; their cumulative word only says that the order exists.
        event = "accept" if status.event in ("fill", "complete") else status.event
        return self.change(order, event, status=status)

    def book_fill(self, fill: ExchangeFill, order: Order | None, cause: events.FillCause) -> bool:
        """Book an execution once; return whether it was new."""
        client_order_id = order.id if order else fill.client_order_id
        event = events.FillBooked(
            symbol=fill.symbol, trade_id=fill.trade_id, client_order_id=client_order_id,
            exchange_order_id=fill.exchange_order_id, signal=order.signal if order else "", cause=cause,
            side=fill.side, qty=fill.qty, price=fill.price, fee=fill.fee, fee_currency=fill.fee_currency,
            realized_pnl=fill.realized_pnl, exchange_ns=fill.exchange_ns)
        if self.journal.has("fill", event.key):
            return False
        self.record(event, fill.symbol)
        return True

    def lock(self, symbol: str, cause: str, evidence: str) -> bool:
        """Lock the symbol for a cause; return whether it was not locked for it before."""
        if cause in self.books.book(symbol).locks:
            return False
        self.record(events.SymbolLocked(symbol=symbol, cause=cause, evidence=evidence), symbol)
        return True

    def unlock(self, symbol: str, cause: str, evidence: str) -> bool:
        """Take one cause of a lock away; return whether it was there."""
        if cause not in self.books.book(symbol).locks:
            return False
        self.record(events.SymbolUnlocked(symbol=symbol, cause=cause, evidence=evidence), symbol)
        return True

    def _report(self, event: events.JournalEvent) -> Report | None:
        if isinstance(event, events.SignalReceived):
            return Ack(strategy=event.signal.strategy, run=event.signal.run, seq=event.signal.seq)
        if isinstance(event, events.SignalClosed):
            return self._outcome(event)
        if isinstance(event, events.OrderIntended):
            return self._order(self.books.symbols[event.request.symbol].orders[event.key])
        if isinstance(event, events.OrderChanged):
            return next((self._order(b.orders[event.key]) for b in self.books.symbols.values()
                         if event.key in b.orders), None)
        if isinstance(event, events.FillBooked):
            order = self.books.find_order(event.symbol, client_order_id=event.client_order_id)
            return FillReport(
                strategy=order.strategy if order else "", symbol=event.symbol,
                client_order_id=event.client_order_id, trade_id=event.trade_id, side=event.side,
                qty=event.qty, price=event.price, fee=event.fee, fee_currency=event.fee_currency,
                exchange_ns=event.exchange_ns)
        return None

    def _outcome(self, event) -> SignalOutcome:
        strategy, run, seq = event.signal.rsplit("/", 2)  # a stranger's name may hold anything
        return SignalOutcome(strategy=strategy, run=int(run), seq=int(seq), symbol=event.symbol,
                             outcome=event.outcome, reason=event.reason, filled_qty=event.filled_qty,
                             time_ns=self._clock.wall_ns())

    def _order(self, order: Order) -> OrderReport:
        request = order.request
        return OrderReport(
            strategy=order.strategy, symbol=request.symbol, client_order_id=order.id, leg=order.leg,
            side=request.side, qty=request.qty, filled_qty=order.filled_qty,
            trigger_price=request.trigger_price, state=order.state, reason=order.text,
            time_ns=self._clock.wall_ns())
