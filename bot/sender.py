"""Sends intended orders and cancels, each once, and records what the answers prove."""

from collections.abc import Callable

from bot.bookkeeper import Bookkeeper
from bot.crash import point
from bot.errors import ExchangeError, InvariantError
from bot.events import OrderAnswered
from bot.exchange import Exchange
from bot.halt import HaltFiles
from bot.log import Log
from bot.metrics import Histogram
from bot.orders import Order
from bot.outcome import KEY_REFUSED, NOTHING_TO_REDUCE, RULES_REFUSED, classify, classify_cancel
from bot.reconciler import Reconciler
from bot.signed_request import SignedRequest

CLOCK_OFF = -1021  # "Timestamp for this request is outside of the recvWindow"
BODY_BYTES_KEPT = 1_000  # of an answer in the journal; an order's full answer has 600
HALTABLE_LEGS = ("open", "reduce")  # what a halt keeps from leaving; protection goes on


class OrderSender:
    """The last step before the exchange. `wake` runs the executor's cycle."""

    def __init__(self, log: Log, *, exchange: Exchange, keeper: Bookkeeper, halts: HaltFiles,
                 reconciler: Reconciler, wake: Callable[[], None], halt: Callable[[str, str], None]) -> None:
        self._log, self._exchange, self._keeper, self._halts = log, exchange, keeper, halts
        self._reconciler, self._wake, self._halt = reconciler, wake, halt
        self.tick_to_order, self.round_trip = Histogram(), Histogram()

    async def send_market_order(self, order: Order) -> None:
        """Send an intended order, once, and record what its answer proves."""
        try:
            signals = self._keeper.books.book(order.request.symbol).signals
            tick_ns = next((s.signal.tick_receive_ns for s in signals if s.id == order.signal), 0)
            signed = self._build(order)
            self._reconciler.fences[order.id] = signed.fence_ns
            point("sender.built")
            answer = await self._exchange.submit(signed, may_send=lambda: self._refusal(order))
            point("sender.answered")
            outcome = classify(answer, order.id)
            self._keeper.record(OrderAnswered(
                client_order_id=order.id, signal=order.signal, is_sent=answer.is_sent,
                sent=signed.sent_text, sent_ns=answer.sent_ns, status=answer.status,
                body=answer.body[:BODY_BYTES_KEPT].decode(errors="replace"),
                error=answer.error, received_ns=answer.received_ns))
            if outcome.kind != "not_sent":
                self.round_trip.observe((answer.received_ns - answer.sent_ns) / 1e9)
                if tick_ns:
                    self.tick_to_order.observe((answer.sent_ns - tick_ns) / 1e9)
            self._log.info("order_answered", client_order_id=order.id, outcome=outcome.kind,
                           status=answer.status, code=outcome.code, text=outcome.text,
                           round_trip_us=(answer.received_ns - answer.sent_ns) // 1_000)
            if outcome.kind == "accepted":
                status = self._exchange.answered_order(answer)
                if status is None or not self._keeper.report_status(order, status):
                    self._keeper.change(order, "accept")
            elif outcome.kind == "not_sent":
                self._keeper.change(order, "not_sent", text=outcome.text)
            elif outcome.kind in ("rejected", "not_executed"):
                self._keeper.change(order, "reject", code=outcome.code, text=outcome.text)
                if outcome.code == CLOCK_OFF:
                    await self._exchange.measure_clock()
                if outcome.code == NOTHING_TO_REDUCE:  # is what we book not there?
                    self._reconciler.request("nothing to reduce")
                if outcome.code in RULES_REFUSED:
                    self._reconciler.contract.doubt()
                elif outcome.code in KEY_REFUSED:
                    self._halt("executor", f"the exchange refuses our key or signature: {outcome.text}")
            else:
                # needs_operator: the exchange itself does not know; the code keeps ABSENT from being found.
                code = -1007 if outcome.needs_operator else outcome.code
                self._keeper.change(order, "lose", code=code, text=outcome.text)
        except ExchangeError as error:  # it could not be built: nothing left
            self._keeper.change(order, "not_sent", text=str(error))
        finally:
            self._reconciler.sending.discard(order.id)
        point("sender.answer_recorded")
        self._wake()

    SendMarketOrder = send_market_order  # the name it had in the first sketch of the system

    async def cancel(self, order: Order) -> None:
        """Send a cancel, once; what it leaves open is asked for by the reconciler."""
        request = order.request
        point("sender.cancel_first_byte")
        try:
            answer = await self._exchange.cancel(request.symbol, order.id,
                                                 is_conditional=request.is_conditional)
            point("sender.cancel_answered")
            outcome = classify_cancel(answer, order.id)
            self._log.info("cancel_answered", client_order_id=order.id, outcome=outcome.kind,
                           code=outcome.code)
            if outcome.kind == "canceled":
                self._keeper.change(order, "cancel")
            elif outcome.kind in ("rejected", "not_executed", "not_sent"):
                self._keeper.change(order, "refuse_cancel", code=outcome.code, text=outcome.text)
        except ExchangeError as error:  # it could not be built: nothing left
            self._keeper.change(order, "refuse_cancel", text=str(error))
        finally:
            self._reconciler.sending.discard(order.id)
        self._wake()  # "gone" and "unknown" say nothing of its end: it is asked for

    def _build(self, order: Order) -> SignedRequest:
        try:
            return self._exchange.build(order.request)
        except InvariantError as error:  # the symbol's rules changed, most likely: nothing left
            self._reconciler.contract.doubt()
            raise ExchangeError(str(error)) from None

    def _refusal(self, order: Order) -> str:
        # Asked immediately before the first byte: "" lets it leave.
        if order.leg in HALTABLE_LEGS:
            halt = self._halts.covering(strategy=order.strategy, symbol=order.request.symbol)
            if halt is not None:
                return f"halted by {halt.who}: {halt.why}"
        point("sender.first_byte")
        return ""
