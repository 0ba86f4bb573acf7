"""The paper exchange without its sockets: ledger, market and store as one; all times are its own clock's.

What a command did is on disk before the command returns, and only then told to the listener.
"""

from collections.abc import Callable

from bot.clock import Clock
from bot.config import PaperConfig
from bot.crash import point
from bot.paper_ledger import Ledger
from bot.paper_market import Frame, Market
from bot.paper_model import Event, Order, Refused, Rules
from bot.paper_store import Store

LISTEN_KEY_MS = 3_600_000  # a listen key lives 60 minutes, and again from each keepalive


class Engine:
    """One exchange."""

    def __init__(self, config: PaperConfig, market: Market, store: Store, clock: Clock) -> None:
        self.config, self.market, self.store, self.clock = config, market, store, clock
        self.offset_ms = 0  # a fault: the exchange's clock is off by this much
        self.listener: Callable[[list[Event]], None] = lambda events: None
        self.listen_keys = store.kept("listen_keys", dict[str, tuple[str, int]], {})
        rules = {info["symbol"]: Rules.of(info) for info in market.symbols()}
        self.ledger = Ledger(rules, taker_fee=config.taker_fee, maker_fee=config.maker_fee,
                             take=market.consume)
        store.load(self.ledger)
        self.see_prices()
        for name, account in config.accounts.items():
            if name not in self.ledger.accounts:
                self.ledger.deposit(name, account.balance, self.now_ms())
        self.commit()

    def now_ms(self) -> int:
        """Return the exchange's time."""
        return self.clock.wall_ns() // 1_000_000 + self.offset_ms

    def see_prices(self) -> None:
        """Let the ledger know the marks of now."""
        self.ledger.marks = {symbol: self.market.mark_price(symbol) for symbol in self.ledger.rules}

    def step(self, frames_max: int) -> list[Frame]:
        """Let the market go on to now; return its frames after open orders have met it."""
        now_ms = self.now_ms()
        frames = self.market.advance(now_ms, frames_max)
        if frames and self.market.is_tradable:
            for symbol in {order.symbol for order in self.ledger.open.values()}:
                self._react(symbol, now_ms)
        return frames

    def place(self, order: Order) -> Order:
        """Take an order of either kind. Raises Refused."""
        if not self.market.is_tradable:
            raise Refused(-4108, "Symbol is on delivering or delivered or settling or closed or pre-trading.")
        self.see_prices()
        order.time_ms = order.update_ms = self.now_ms()
        if order.kind == "algo":
            is_mark = order.working_type == "MARK_PRICE"
            self.ledger.place_algo(order, (self.market.mark_price if is_mark else self.market.last_price)(
                order.symbol))
        else:
            book = self.market.book(order.symbol)
            self.ledger.place(order, book.bids, book.asks)
        self.commit()
        return order

    def cancel(self, order: Order) -> None:
        """Cancel what is open."""
        self.ledger.cancel(order, self.now_ms())
        self.commit()

    def listen_key(self, account: str) -> str:
        """Return the account's live listen key, extended, or a new one."""
        key, until_ms = self.listen_keys.get(account, ("", 0))
        key = self.clock.token(64) if until_ms < self.now_ms() else key
        self.listen_keys[account] = (key, self.now_ms() + LISTEN_KEY_MS)
        self.store.keep("listen_keys", self.listen_keys)
        return key

    def drop_listen_key(self, account: str) -> None:
        self.listen_keys.pop(account, None)
        self.store.keep("listen_keys", self.listen_keys)

    def account_of(self, listen_key: str) -> str:
        """Return whose live listen key it is, or nobody's ""."""
        return next((name for name, (key, until_ms) in self.listen_keys.items()
                     if key == listen_key and until_ms >= self.now_ms()), "")

    def commit(self) -> None:
        """Write what happened to disk, and then tell."""
        if events := self.ledger.events():
            point("paper.before_commit")
            self.store.save(self.ledger, events)
            point("paper.committed")
            self.listener(events)
            point("paper.told")

    def _react(self, symbol: str, now_ms: int) -> None:
        market, ledger = self.market, self.ledger
        self.see_prices()
        if any(order.kind == "order" and order.symbol == symbol for order in ledger.open.values()):
            book = market.book(symbol)
            ledger.match(symbol, book.bids, book.asks, now_ms)
        for algo in ledger.due(symbol, market.last_price(symbol), market.mark_price(symbol)):
            if algo.id in ledger.open:  # the one before may have ended it
                book = market.book(symbol)
                ledger.trigger(algo, book.bids, book.asks, now_ms)
        self.commit()
