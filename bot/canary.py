"""The canary: proves, at the start and then on a timer, that the exchange still takes a stop.

An exchange that changes its rules refuses every stop from one minute to the next (-4120 on 2025-12-09,
freqtrade #12610). One reduce-only stop far from the price is placed and canceled; its ids carry a prefix
of their own, and one left behind by a crash is swept with the next. "No position to reduce" is green.
"""

from collections.abc import Callable
from decimal import ROUND_FLOOR, Decimal

from bot.books import Books
from bot.clock import Clock
from bot.errors import ExchangeError, InvariantError
from bot.exchange import Exchange
from bot.log import Log
from bot.model import Instrument
from bot.orders import CANARY_PREFIX, OrderRequest, Side
from bot.outcome import NOTHING_TO_REDUCE, classify

AWAY = Decimal("0.2")  # of the mark: 20 % (DESIGN 5)
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
        self._troubles: dict[str, str] = {}  # by symbol: only its own flight ends it
        self.has_answered = False

    @property
    def trouble(self) -> str:
        """Return why stops are not proven to be taken, "" while they are."""
        return "; ".join(self._troubles.values())

    async def work(self) -> None:
        """Fly once, if it is due and anything can be said of a symbol's price."""
        symbols = [s for s in self._symbols() if s in self._exchange.instruments and self._price(s) > 0]
        if self._clock.mono_ns() < self._due_ns or not symbols or self._exchange.refusal("entry"):
            return
        self._made += 1
        # In turn, as one symbol's rules may differ; a red one until it is green.
        red = [s for s in symbols if s in self._troubles] or symbols
        symbol, before = red[self._made % len(red)], self.trouble
        self._troubles = {s: text for s, text in self._troubles.items() if s in symbols}
        try:
            trouble = await self._fly(symbol)
        except (ExchangeError, InvariantError) as error:
            trouble = self._no_word(symbol, str(error))
        if trouble:
            self._troubles[symbol] = trouble
        else:
            self._troubles.pop(symbol, None)
        if self.trouble != before:
            self._log.warning("canary", symbol=symbol, is_green=not self.trouble, text=self.trouble)
        wait_s = AGAIN_S if self.trouble or self._silent or not self.has_answered else self._period_s
        self._due_ns = self._clock.mono_ns() + wait_s * 1_000_000_000

    async def _fly(self, symbol: str) -> str:
        await self._sweep(symbol)
        request = self._request(symbol)
        answer = await self._exchange.submit(self._exchange.build(request))
        outcome = classify(answer, request.client_order_id)
        if outcome.kind == "accepted":
            await self._cancel(symbol, request.client_order_id)
        elif outcome.kind != "rejected":
            return self._no_word(symbol, outcome.text or outcome.kind)
        self._silent, self.has_answered = 0, True
        if outcome.kind == "accepted" or outcome.code == NOTHING_TO_REDUCE:
            return ""
        return f"the exchange refuses stops: {symbol}: {outcome.code} {outcome.text}"

    async def _sweep(self, symbol: str) -> None:
        for status in await self._exchange.open_orders(symbol):
            if status.client_order_id.startswith(CANARY_PREFIX):
                await self._cancel(symbol, status.client_order_id)

    async def _cancel(self, symbol: str, name: str) -> None:
        for _ in range(TRIES_MAX):  # one that is lost leaves it there until the symbol's turn comes again
            if 0 < (await self._exchange.cancel(symbol, name, is_conditional=True)).status < 500:
                return

    def _no_word(self, symbol: str, text: str) -> str:
        # A lost answer says nothing of stops; many of them say that nobody knows.
        self._silent += 1
        if self._silent < TRIES_MAX:
            return self._troubles.get(symbol, "")
        self.has_answered = True
        return f"stops are not proven: {symbol}: {text}"

    def _request(self, symbol: str) -> OrderRequest:
        instrument, price = self._exchange.instruments[symbol], self._price(symbol)
        return OrderRequest(
            client_order_id=f"{CANARY_PREFIX}{self._run}{self._made}", symbol=symbol, type="stop",
            side=self._side(symbol), qty=_smallest_qty(instrument, price), trigger_price=price,
            reduce_only=True)

    def _side(self, symbol: str) -> Side:
        return "buy" if self._books.book(symbol).position_qty < 0 else "sell"

    def _price(self, symbol: str) -> Decimal:
        # On the far side of the mark; 0 where there is none to speak of.
        mark = self._mark_of(symbol)
        if mark is None or not mark.is_finite():
            return Decimal(0)
        away = 1 + AWAY if self._side(symbol) == "buy" else 1 - AWAY
        return _floor(mark * away, self._exchange.instruments[symbol].price_increment)


def _smallest_qty(instrument: Instrument, price: Decimal) -> Decimal:
    least = instrument.notional_min / (price * instrument.contract_size)
    return max(instrument.qty_min, _floor(least, instrument.qty_increment) + instrument.qty_increment)


def _floor(number: Decimal, increment: Decimal) -> Decimal:
    return (number / increment).to_integral_value(ROUND_FLOOR) * increment
