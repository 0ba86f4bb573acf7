"""The paper exchange without its sockets: ledger, market and store as one; all times are its own clock's."""

from collections.abc import Callable
from typing import Any

from bot.clock import Clock
from bot.config import PaperConfig
from bot.crash import point
from bot.paper_feed import Feed, Frame
from bot.paper_ledger import Ledger
from bot.paper_market import Market
from bot.paper_model import Event, Filters, Limits, Order, Refused
from bot.paper_store import Store

LISTEN_KEY_MS = 3_600_000  # a listen key lives 60 minutes, and again from each keepalive


class Engine:
    """One exchange. Whoever commands the ledger calls wake() before and commit() after."""

    def __init__(self, config: PaperConfig, market: Market, store: Store, clock: Clock) -> None:
        self.config, self.market, self.store, self.clock = config, market, store, clock
        self.offset_ms = 0  # a fault: the exchange's clock is off by this much
        self.limits = Limits()
        self.lag_ms = 0  # a fault: queries do not see what is younger, for the request that is served
        self._second = 0  # margins and funding are looked at once a second, when the mark moves
        self.listener: Callable[[list[Event]], None] = lambda events: None
        self.listen_keys = store.kept("listen_keys", dict[str, tuple[str, int]], {})
        # (account, symbol) as one text -> when all its orders are canceled, unless the client extends it
        self.countdowns = store.kept("countdowns", dict[str, int], {})
        self.changes = store.kept("changes", dict[str, dict[str, Any]], {})  # of listings, since
        self.ledger = Ledger(market.feeds, taker_fee=config.taker_fee, maker_fee=config.maker_fee)
        store.load(self.ledger)
        for symbol, change in self.changes.items():
            if symbol in market.feeds:
                self.ledger.contracts[symbol] = self.feed(symbol).contract.changed(**change)
        market.advance(self.wake())
        for name, account in config.accounts.items():
            if name not in self.ledger.accounts:
                self.ledger.deposit(name, account.balance)
        self.commit()

    def now_ms(self) -> int:
        """Return the exchange's time."""
        return self.clock.wall_ns() // 1_000_000 + self.offset_ms

    def seen_ms(self) -> int:
        """Return up to when orders and fills show in queries."""
        return self.now_ms() - self.lag_ms

    def feed(self, symbol: str) -> Feed:
        return self.market.feeds[symbol]

    def wake(self) -> int:
        """Tell the ledger what time it is; return it."""
        self.ledger.now_ms = self.now_ms()
        return self.ledger.now_ms

    def commit(self) -> None:
        """Write what happened to disk, and only then tell."""
        if events := self.ledger.events():
            point("paper.before_commit")
            self.store.save(self.ledger, events)
            point("paper.committed")
            self.listener(events)
            point("paper.told")

    def step(self, frames_max: int) -> list[Frame]:
        """Let the market go on to now; return its frames after open orders have met it."""
        now_ms, ledger = self.wake(), self.ledger
        frames = self.market.advance(now_ms, frames_max)
        if frames and self.market.is_tradable:
            for symbol in {order.symbol for order in ledger.open.values()}:
                ledger.meet(symbol)
        for key in [key for key, due_ms in self.countdowns.items() if due_ms <= now_ms]:
            name, symbol = key.split()
            ledger.cancel_all(name, symbol, ("order",))
            self.count_down(name, symbol, 0)
        if now_ms // 1_000 != self._second and self.market.is_tradable:
            self._second = now_ms // 1_000
            for name in ledger.accounts:
                ledger.care(name)
        self.commit()
        return frames

    def place(self, order: Order) -> Order:
        """Take an order of either kind. Raises Refused."""
        if not self.market.is_tradable:
            raise Refused(-4108)
        return self.ledger.place(order)

    def change_symbol(self, symbol: str, status: str, filters: Filters) -> None:
        """Change a listing. One that settles or closes ends its orders and positions, at the mark.

        Raises KeyError, ValueError, ArithmeticError for filters that are none, changing nothing.
        """
        self.ledger.contracts[symbol] = self.feed(symbol).contract.changed(status, filters)
        self.changes[symbol] = {"status": status, "filters": filters}
        self.store.keep("changes", self.changes)
        if status in ("SETTLING", "CLOSE"):
            for name in self.ledger.accounts:
                self.ledger.cancel_all(name, symbol)
                if symbol in self.ledger.held(name):
                    self.ledger.force("settlement", name, symbol)

    def count_down(self, name: str, symbol: str, time_ms: int) -> None:
        """Cancel all plain orders of a symbol after so long; 0: never."""
        self.countdowns[f"{name} {symbol}"] = self.now_ms() + time_ms
        if not time_ms:
            del self.countdowns[f"{name} {symbol}"]
        self.store.keep("countdowns", self.countdowns)

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
