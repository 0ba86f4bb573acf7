"""TradingState: what may pass just now, for all and for each symbol, and why."""

from decimal import Decimal

from bot.books import Books
from bot.clock import Clock
from bot.config import Config
from bot.exchange import Exchange
from bot.halt import HaltFiles
from bot.limits import Prices
from bot.model import Tick
from bot.reconciler import Reconciler


class TradingState:
    """Derives RUNNING, REDUCING, HALTED, RECONCILING, LOCKED from what is known; remembers prices only."""

    def __init__(self, config: Config, clock: Clock, *, exchange: Exchange, halts: HaltFiles, books: Books,
                 reconciler: Reconciler) -> None:
        self._config, self._clock, self._exchange = config, clock, exchange
        self._halts, self._books, self._reconciler = halts, books, reconciler
        self._prices: dict[str, Prices] = {}
        self._gateway_ns = 0  # monotonic time of the last sign of life on the ticks channel

    def hear_gateway(self) -> None:
        """Take a sign of life on the ticks channel."""
        self._gateway_ns = self._clock.mono_ns()

    def prices(self, symbol: str) -> Prices:
        """Return the newest prices seen."""
        return self._prices.get(symbol, Prices())

    def see_price(self, tick: Tick) -> None:
        """Take a mark or a quote in."""
        old = self.prices(tick.symbol)
        if tick.kind == "mark":
            self._prices[tick.symbol] = Prices(
                mark=Decimal(repr(tick.price)), mark_ns=tick.exchange_ns, bid=old.bid, ask=old.ask,
                quote_ns=old.quote_ns)
        elif tick.kind == "quote" and tick.bid is not None and tick.ask is not None:
            self._prices[tick.symbol] = Prices(
                mark=old.mark, mark_ns=old.mark_ns, bid=Decimal(repr(tick.bid)), ask=Decimal(repr(tick.ask)),
                quote_ns=tick.exchange_ns)

    def of_all(self) -> tuple[str, str]:
        """Return the state of the whole, and why."""
        halt = next((h for h in self._halts.list() if h.scope == "all"), None)
        if halt is not None:
            return "HALTED", f"{halt.who}: {halt.why}"
        if not self._reconciler.is_ready:
            return "RECONCILING", "the books are not compared with the exchange yet"
        if self._clock.mono_ns() - self._gateway_ns > self._config.bus.silence_ms * 1_000_000:
            return "REDUCING", "the gateway is silent"
        trouble = self._reconciler.contract.trouble or self._exchange.refusal("rest")
        if trouble:
            return "REDUCING", trouble
        stale = [s for s in self._reconciler.traded if not self._is_fresh(s)]
        if len(stale) == len(self._reconciler.traded):
            return "REDUCING", "no symbol has a fresh mark price"
        return "RUNNING", ""

    def of_symbol(self, symbol: str) -> tuple[str, str]:
        """Return the state that counts for one symbol, and why."""
        halt = self._halts.covering(strategy=self._config.owner_of(symbol) or "", symbol=symbol)
        if halt is not None:
            return "HALTED", f"{halt.who}: {halt.why}"
        state, why = self.of_all()
        locks = self._books.book(symbol).locks
        unknown = self._books.book(symbol).unknown()
        if state == "RUNNING" and (locks or unknown):
            causes = [f"{cause}: {text}" for cause, text in locks.items()]
            return "LOCKED", "; ".join(causes + [f"order {o.id} is unknown" for o in unknown])
        if state == "RUNNING" and not self._is_fresh(symbol):
            return "REDUCING", "stale_mark: its mark price makes no progress"
        return state, why

    def _is_fresh(self, symbol: str) -> bool:
        now_ns = self._clock.wall_ns() + self._exchange.clock_offset_ns
        age_ns = now_ns - self.prices(symbol).mark_ns
        return age_ns <= self._config.limits.tick_age_ms_max * 1_000_000
