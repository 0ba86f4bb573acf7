"""The paper exchange without its sockets: ledger, market and store as one; all times are its own clock's.

What a command did is on disk before the command returns, and only then told to the listeners.
"""

from collections.abc import Callable
from decimal import Decimal

from bot.clock import Clock
from bot.config import PaperConfig
from bot.paper_ledger import Ledger
from bot.paper_market import Frame, Market
from bot.paper_model import Algo, Event, Order, Refused, Rules
from bot.paper_store import Store

LISTEN_KEY_MS = 3_600_000  # a listen key lives 60 minutes, and again from each keepalive


class Engine:
    """One exchange."""

    def __init__(self, config: PaperConfig, market: Market, store: Store, clock: Clock) -> None:
        self.config, self.market, self.store, self.clock = config, market, store, clock
        self.offset_ms = 0  # a fault: the exchange's clock is off by this much
        self.listener: Callable[[list[Event]], None] = lambda events: None
        self.listen_keys: dict[str, tuple[str, int]] = store.kept("listen_keys", dict[str, tuple[str, int]], {})
        rules = {info["symbol"]: Rules.of(info) for info in market.symbols()}
        self.ledger = Ledger(rules, taker_fee=config.taker_fee, maker_fee=config.maker_fee, take=market.consume)
        store.load(self.ledger)
        self._see_prices()
        for name, account in config.accounts.items():
            if name not in self.ledger.accounts:
                self.ledger.deposit(name, account.balance, self.now_ms())
        self.commit()

    def now_ms(self) -> int:
        """Return the exchange's time."""
        return self.clock.wall_ns() // 1_000_000 + self.offset_ms

    def step(self, frames_max: int) -> list[Frame]:
        """Let the market go on to now; return its frames after resting orders have met it."""
        now_ms = self.now_ms()
        frames = self.market.advance(now_ms, frames_max)
        if frames and self.market.is_tradable:
            self._see_prices()
            for symbol in {row.symbol for row in (*self.ledger.orders.values(), *self.ledger.algos.values())}:
                self._react(symbol, now_ms)
        return frames

    def place(self, order: Order) -> Order:
        """Take an order. Raises Refused."""
        self._check_tradable()
        order.time_ms = order.update_ms = self.now_ms()
        book = self.market.book(order.symbol)
        self.ledger.place(order, book.bids, book.asks)
        self.commit()
        return order

    def place_algo(self, algo: Algo) -> Algo:
        """Take a conditional order. Raises Refused."""
        self._check_tradable()
        algo.time_ms = algo.update_ms = self.now_ms()
        price = (self.market.mark_price if algo.working_type == "MARK_PRICE" else self.market.last_price)
        self.ledger.place_algo(algo, price(algo.symbol))
        self.commit()
        return algo

    def cancel(self, row: Order | Algo) -> None:
        """Cancel what is open."""
        if isinstance(row, Order):
            self.ledger.cancel(row, self.now_ms())
        else:
            self.ledger.cancel_algo(row, self.now_ms())
        self.commit()

    def set_leverage(self, account: str, symbol: str, leverage: int) -> None:
        self.ledger.set_leverage(account, symbol, leverage, self.now_ms())
        self.commit()

    def set_hedged(self, account: str, is_hedged: bool) -> None:
        """Switch the position mode; trading in hedge mode is refused."""
        self.ledger.accounts[account].is_hedged = is_hedged
        self.store.keep(f"account/{account}", self.ledger.accounts[account])

    def listen_key(self, account: str) -> str:
        """Return the account's live listen key, extended, or a new one."""
        key, until_ms = self.listen_keys.get(account, ("", 0))
        if until_ms < self.now_ms():
            key = self.clock.token(64)
        self.listen_keys[account] = (key, self.now_ms() + LISTEN_KEY_MS)
        self.store.keep("listen_keys", self.listen_keys)
        return key

    def drop_listen_key(self, account: str) -> None:
        self.listen_keys.pop(account, None)
        self.store.keep("listen_keys", self.listen_keys)

    def account_of(self, listen_key: str) -> str | None:
        """Return whose live listen key it is."""
        return next((name for name, (key, until_ms) in self.listen_keys.items()
                     if key == listen_key and until_ms >= self.now_ms()), None)

    def commit(self) -> None:
        """Write what happened to disk, and then tell."""
        events = self.ledger.events()
        if events:
            self.store.save(self.ledger, events)
            self.listener(events)

    def _check_tradable(self) -> None:
        if not self.market.is_tradable:
            raise Refused(-4108, "Symbol is on delivering or delivered or settling or closed or pre-trading.")
        self._see_prices()

    def _see_prices(self) -> None:
        for symbol in self.ledger.rules:
            self.ledger.marks[symbol] = Decimal(self.market.mark_price(symbol))

    def _react(self, symbol: str, now_ms: int) -> None:
        book = self.market.book(symbol)
        self.ledger.match(symbol, book.bids, book.asks, now_ms)
        for algo in self.ledger.due_algos(symbol, self.market.last_price(symbol),
                                          self.market.mark_price(symbol)):
            book = self.market.book(symbol)
            if algo.status == "NEW":  # the one before may have ended it
                self.ledger.trigger(algo, book.bids, book.asks, now_ms)
        self.commit()
