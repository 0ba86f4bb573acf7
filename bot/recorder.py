"""Records what the exchange tells of orders and fills: whose it is; what is nobody's locks its symbol."""

from collections.abc import Callable
from typing import Literal

import msgspec

from bot.bookkeeper import CAUSE_OF_LEG, Bookkeeper
from bot.crash import point
from bot.events import ExitsSet, FillCause, OrderIntended
from bot.log import Log
from bot.orders import CANARY_PREFIX, GUARD_PREFIX, PREFIX, ExchangeFill, Order, OrderRequest, OrderStatus

NOT_OF_THE_BOOKS = (GUARD_PREFIX, CANARY_PREFIX)  # ours, and no intent of the journal's
# Client order ids the exchange itself makes (exchange-facts 1.1) -> cause of the lock, cause of the fill.
EXCHANGE_MADE: dict[str, tuple[str, FillCause]] = {
    "autoclose-": ("liquidation", "liquidation"), "adl_autoclose": ("adl", "adl"),
    "settlement_autoclose-": ("settlement", "operator"), "delivery_autoclose-": ("settlement", "operator")}


class Recorder:
    """Books by order, intent or prefix, and locks what is odd. halt takes who and why."""

    def __init__(self, log: Log, *, keeper: Bookkeeper, halt: Callable[[str, str], None],
                 is_traded: Callable[[str], bool]) -> None:
        self._log, self._keeper, self._books = log, keeper, keeper.books
        self._halt, self._is_traded = halt, is_traded

    def lock(self, symbol: str, cause: str, evidence: str) -> None:
        """Lock the symbol for a cause, once."""
        if self._keeper.lock(symbol, cause, evidence):
            self._log.warning("symbol_locked", symbol=symbol, cause=cause, evidence=evidence)

    def unlock(self, symbol: str, cause: str, evidence: str) -> None:
        """Take one cause of a lock away, where it is."""
        if self._keeper.unlock(symbol, cause, evidence):
            self._log.info("symbol_unlocked", symbol=symbol, cause=cause, evidence=evidence)

    def find(self, status: OrderStatus) -> Order | None:
        """Return the order of the books that the status is of, None when it is of none."""
        number = "" if status.is_conditional else status.exchange_order_id
        return self._books.find_order(status.symbol, client_order_id=status.client_order_id,
                                      exchange_order_id=number)

    def learn(self, order: Order, status: OrderStatus) -> None:
        """Take in what an order of ours has become."""
        is_late = order.state == "ABSENT" and status.event in ("accept", "fill", "complete")
        if self._keeper.report_status(order, status) and is_late and not order.request.is_conditional:
            self.lock(status.symbol, "late_fill", f"{order.id} was ABSENT and is {status.raw_status}")

    def book(self, fill: ExchangeFill, name: str) -> bool:
        """Book an execution as whose it is; return whether it was new. name: of its order, "" unknown."""
        order = self._books.find_order(fill.symbol, client_order_id=name,
                                       exchange_order_id=fill.exchange_order_id)
        if order is not None:
            before = order.state
            new = self._keeper.book_fill(fill, order, CAUSE_OF_LEG[order.leg])
            if new and before in ("ABSENT", "REJECTED"):
                self.lock(fill.symbol, "late_fill", f"{order.id} was {before} and filled {fill.qty}")
            foreign = self._books.book(fill.symbol).locks.get("foreign_fill", "")
            if foreign.startswith(f"trade {fill.trade_id}:"):
                self._keeper.unlock(fill.symbol, "foreign_fill", f"it was of {order.id}, listed late")
            if new and order.filled_qty > order.request.qty:
                evidence = f"{order.id} was filled {order.filled_qty} of {order.request.qty}"
                self.lock(fill.symbol, "overfill", evidence)
                self._halt("executor", f"the exchange filled more than was ordered: {evidence}")
        else:
            new = self._book_without_order(fill, name)
        if new:
            point("reconciler.fill_recorded")
            self._log.info("fill", client_order_id=order.id if order else name, symbol=fill.symbol,
                           side=fill.side, qty=fill.qty, price=fill.price, fee=fill.fee,
                           trade_id=fill.trade_id)
        return new

    def _book_without_order(self, fill: ExchangeFill, name: str) -> bool:
        made = next((causes for prefix, causes in EXCHANGE_MADE.items() if name.startswith(prefix)), None)
        intent = self._keeper.journal.find("intent", name) if name else None
        fill = msgspec.structs.replace(fill, client_order_id=name)
        if isinstance(intent, OrderIntended):  # the books have forgotten it: it was settled long ago
            new = self._keeper.book_fill(fill, None, CAUSE_OF_LEG[intent.leg])
            if new:
                self.lock(fill.symbol, "late_fill", f"{name} was settled long ago and filled {fill.qty}")
            return new
        if name.startswith(NOT_OF_THE_BOOKS):
            return self._keeper.book_fill(fill, None, "operator")
        if made is not None:
            self.lock(fill.symbol, made[0], f"the exchange closed {fill.qty} at {fill.price} ({name})")
            return self._keeper.book_fill(fill, None, made[1])
        if name.startswith(PREFIX):
            if fill.exchange_ns <= self._books.restored_ns:
                return self._keeper.book_fill(fill, None, "restored")
            self.unknown_of_ours(name)
        elif (self._is_traded(fill.symbol)
              and int(fill.trade_id) > self._books.book(fill.symbol).last_trade_id):
            # Not ours: never booked by guess. The position will differ; the operator adopts it.
            self.lock(fill.symbol, "foreign_fill", f"trade {fill.trade_id}: {fill.side} {fill.qty} at "
                       f"{fill.price} by order {name or fill.exchange_order_id}")
        return False

    def take_back(self, status: OrderStatus) -> bool:
        """Take in an exit at rest whose intent a restored journal lacks; return whether it is one.

        Anything else of ours that the journal does not know is a second instance's.
        """
        if not (status.update_ns <= self._books.restored_ns and status.is_conditional and status.reduce_only
                and status.trigger_price is not None and status.event == "accept"):
            return False
        type_: Literal["stop", "take_profit"] = (
            "take_profit" if status.type.startswith("TAKE_PROFIT") else "stop")
        order = self._keeper.intend(
            OrderRequest(client_order_id=status.client_order_id, symbol=status.symbol, side=status.side,
                         qty=status.qty, type=type_, trigger_price=status.trigger_price, reduce_only=True),
            strategy="", signal=self._books.book(status.symbol).exits_signal, leg=type_,
            checks={"restored": "it rests at the exchange and its intent was lost"})
        return self._keeper.report_status(order, status)

    def take_plan(self, symbol: str) -> None:
        """Make the exits that rest at the exchange the plan: the one in a restored journal may be old."""
        book = self._books.book(symbol)
        side = "sell" if book.position_qty > 0 else "buy"
        rests = {o.request.type: o.request.trigger_price for o in book.orders.values()
                 if o.rests and o.request.side == side and book.position_qty}
        plan = rests.get("stop", book.stop_loss), rests.get("take_profit")
        if plan != (book.stop_loss, book.take_profit):
            self._keeper.record(ExitsSet(symbol=symbol, signal=book.exits_signal, stop_loss=plan[0],
                                         take_profit=plan[1]), symbol)

    def unknown_of_ours(self, name: str) -> None:
        """Halt for an order of ours, unless the journal knows it and the books have only forgotten it."""
        if self._keeper.journal.has("intent", name):
            return
        self._halt("executor", f"order {name} has our prefix and is not in the journal: the journal lost "
                   "its tail, or a second instance trades this account")
