"""The canary: proves, at the start and then on a timer, that the exchange still takes a stop.

An exchange that changes its rules refuses every stop from one minute to the next (-4120 on 2025-12-09,
freqtrade #12610). One reduce-only stop far from the price is placed and canceled; its ids carry a prefix
of their own, and one left behind by a crash is swept with the next. "No position to reduce" is green.
"""

from collections.abc import Callable
from decimal import ROUND_FLOOR, Decimal

from bot.books import Books
from bot.clock import Clock
from bot.errors import ExchangeError
from bot.exchange import Exchange
from bot.log import Log
from bot.model import Instrument
from bot.orders import CANARY_PREFIX, OrderRequest, Side
from bot.outcome import classify

AWAY = Decimal("0.2")  # of the mark: 20 % (DESIGN 5)
NOTHING_TO_REDUCE = -2022  # "ReduceOnly Order is rejected"
AGAIN_S = 10  # while it is not green
TRIES_MAX = 3  # without a word from the exchange; then that is the trouble


class Canary:
    """Flies when it is due. trouble: "" while stops are proven to be taken; mark_of: of a symbol, now."""

    def __init__(self, clock: Clock, log: Log, *, period_s: int, exchange: Exchange, books: Books,
                 symbols: Callable[[], tuple[str, ...]], mark_of: Callable[[str], Decimal | None]) -> None:
        self._clock, self._log, self._period_s = clock, log, period_s
        self._exchange, self._books, self._symbols, self._mark_of = exchange, books, symbols, mark_of
        self._due_ns = self._made = self._silent = 0
        self._run = clock.token(4)
        self.trouble, self.has_answered = "", False

    async def work(self) -> None:
        """Fly once, if it is due and anything can be said of a symbol's price."""
        symbols = [s for s in self._symbols() if s in self._exchange.instruments and self._mark_of(s)]
        if self._clock.mono_ns() < self._due_ns or not symbols or self._exchange.refusal("entry"):
            return
        self._made += 1
        symbol = symbols[self._made % len(symbols)]  # in turn: one symbol's rules may differ
        try:
            trouble = await self._fly(symbol)
        except ExchangeError as error:
            trouble = self._no_word(f"{symbol}: {error}")
        if trouble != self.trouble:
            self._log.warning("canary", symbol=symbol, is_green=not trouble, text=trouble)
        self.trouble = trouble
        wait_s = AGAIN_S if trouble or not self.has_answered else self._period_s
        self._due_ns = self._clock.mono_ns() + wait_s * 1_000_000_000

    async def _fly(self, symbol: str) -> str:
        await self._sweep(symbol)
        request = self._request(symbol)
        answer = await self._exchange.submit(self._exchange.build(request))
        outcome = classify(answer, request.client_order_id)
        if outcome.kind == "accepted":
            await self._exchange.cancel(symbol, request.client_order_id, is_conditional=True)
        elif outcome.kind != "rejected":
            return self._no_word(f"{symbol}: {outcome.text or outcome.kind}")
        self._silent, self.has_answered = 0, True
        if outcome.kind == "accepted" or outcome.code == NOTHING_TO_REDUCE:
            return ""
        return f"the exchange refuses stops: {symbol}: {outcome.code} {outcome.text}"

    async def _sweep(self, symbol: str) -> None:
        for status in await self._exchange.open_orders(symbol):
            if status.client_order_id.startswith(CANARY_PREFIX):
                await self._exchange.cancel(symbol, status.client_order_id, is_conditional=True)

    def _no_word(self, text: str) -> str:
        # A lost answer says nothing of stops; many of them say that nobody knows.
        self._silent += 1
        if self._silent < TRIES_MAX:
            return self.trouble
        self.has_answered = True
        return f"stops are not proven: {text}"

    def _request(self, symbol: str) -> OrderRequest:
        instrument, mark = self._exchange.instruments[symbol], self._mark_of(symbol) or Decimal(0)
        side: Side = "buy" if self._books.book(symbol).position_qty < 0 else "sell"
        price = _floor(mark * (1 + AWAY if side == "buy" else 1 - AWAY), instrument.price_increment)
        return OrderRequest(
            client_order_id=f"{CANARY_PREFIX}{self._run}{self._made}", symbol=symbol, side=side, type="stop",
            qty=_smallest_qty(instrument, price), trigger_price=price, reduce_only=True)


def _smallest_qty(instrument: Instrument, price: Decimal) -> Decimal:
    least = instrument.notional_min / (price * instrument.contract_size)
    return max(instrument.qty_min, _floor(least, instrument.qty_increment) + instrument.qty_increment)


def _floor(number: Decimal, increment: Decimal) -> Decimal:
    return (number / increment).to_integral_value(ROUND_FLOOR) * increment
