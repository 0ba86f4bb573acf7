"""The paper exchange without its sockets: ledger, market and store as one; all times are its own clock's.

What a command did is on disk before the command returns, and only then told to the listener.
"""

from collections.abc import Callable
from decimal import Decimal
from typing import Any

from bot.clock import Clock
from bot.config import PaperConfig
from bot.crash import point
from bot.paper_feed import FUNDING_MS, FUNDING_RATE, Feed, Frame
from bot.paper_ledger import Ledger
from bot.paper_market import Market
from bot.paper_model import Event, Limits, Order, Refused, Rules
from bot.paper_store import Store

LISTEN_KEY_MS = 3_600_000  # a listen key lives 60 minutes, and again from each keepalive


class Engine:
    """One exchange."""

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
        self.ledger = Ledger(self._rules(), taker_fee=config.taker_fee, maker_fee=config.maker_fee,
                             take=market.consume)
        store.load(self.ledger)
        market.advance(self.now_ms())
        self.see_prices()
        for name, account in config.accounts.items():
            if name not in self.ledger.accounts:
                self.ledger.deposit(name, account.balance, self.now_ms())
        self.commit()

    def now_ms(self) -> int:
        """Return the exchange's time."""
        return self.clock.wall_ns() // 1_000_000 + self.offset_ms

    def seen_ms(self) -> int:
        """Return up to when orders and fills show in queries."""
        return self.now_ms() - self.lag_ms

    def see_prices(self) -> None:
        """Let the ledger know the marks of now."""
        self.ledger.marks = {symbol: feed.mark() for symbol, feed in self.market.feeds.items()}

    def feed(self, symbol: str) -> Feed:
        return self.market.feeds[symbol]

    def listings(self) -> list[dict[str, Any]]:
        """Return the entries of exchangeInfo's `symbols`, with what changed since."""
        made = []
        for feed in self.market.feeds.values():
            info = feed.contract.listing()
            change = dict(self.changes.get(info["symbol"], {}))
            filters = change.pop("filters", {})
            made.append({**info, **change, "filters": [
                {**row, **filters.get(row["filterType"], {})} for row in info["filters"]]})
        return made

    def change_symbol(self, symbol: str, status: str, filters: dict[str, dict[str, str]]) -> None:
        """Change a listing. One that settles or closes ends its orders and positions, at the mark.

        Raises KeyError, ValueError, ArithmeticError for filters that are none, changing nothing.
        """
        before, self.changes = self.changes, {**self.changes, symbol: {"status": status, "filters": filters}}
        try:
            rules = self._rules()
            if min(rules[symbol].price_step, rules[symbol].qty_step) <= 0:
                raise ValueError("tickSize and stepSize must be greater than 0")
        except (KeyError, ValueError, ArithmeticError):
            self.changes = before
            raise
        self.ledger.rules = rules
        self.store.keep("changes", self.changes)
        self.see_prices()
        if status in ("SETTLING", "CLOSE"):
            for name in self.ledger.accounts:
                self.cancel_all(name, symbol)
                if symbol in self.ledger.held(name):
                    self.force("settlement", name, symbol)
        self.commit()

    def force(self, kind: str, name: str, symbol: str, qty: Decimal | None = None) -> None:
        """Close a position, or so much of it, by force: liquidation (into the book), adl, settlement."""
        self.see_prices()
        held, book = self.ledger.position(name, symbol).qty, self.feed(symbol).book()
        if kind == "liquidation":
            self.ledger.liquidate(name, symbol, book.bids if held > 0 else book.asks, self.now_ms())
        else:
            self.ledger.force(kind, name, symbol, abs(held) if qty is None else qty, [], self.now_ms())
        self.commit()

    def cancel_all(self, name: str, symbol: str | None, kinds: tuple[str, ...] = ("order", "algo")) -> None:
        """Cancel what is open, of one symbol or of all."""
        for kind in kinds:
            for order in self.ledger.mine(name, kind, symbol):
                self.ledger.cancel(order, self.now_ms())
        self.commit()

    def count_down(self, name: str, symbol: str, time_ms: int) -> None:
        """Cancel all plain orders of a symbol after so long; 0: never."""
        self.countdowns[f"{name} {symbol}"] = self.now_ms() + time_ms
        if not time_ms:
            del self.countdowns[f"{name} {symbol}"]
        self.store.keep("countdowns", self.countdowns)

    def fund(self, name: str, rate: Decimal) -> None:
        """Settle the funding of all positions of an account at a rate."""
        for symbol in self.ledger.held(name):
            self.ledger.fund(name, symbol, rate, self.now_ms())
        self.commit()

    def step(self, frames_max: int) -> list[Frame]:
        """Let the market go on to now; return its frames after open orders have met it."""
        now_ms = self.now_ms()
        frames = self.market.advance(now_ms, frames_max)
        if frames and self.market.is_tradable:
            for symbol in {order.symbol for order in self.ledger.open.values()}:
                self._react(symbol, now_ms)
        for key in [key for key, due_ms in self.countdowns.items() if due_ms <= now_ms]:
            name, symbol = key.split()
            self.cancel_all(name, symbol, ("order",))
            self.count_down(name, symbol, 0)
        if now_ms // 1_000 != self._second and self.market.is_tradable:
            self._second = now_ms // 1_000
            self.see_prices()
            for name in self.ledger.accounts:
                self._care(name, now_ms)
        return frames

    def place(self, order: Order) -> Order:
        """Take an order of either kind. Raises Refused."""
        if not self.market.is_tradable:
            raise Refused(-4108)
        self.see_prices()
        order.time_ms = order.update_ms = self.now_ms()
        feed = self.feed(order.symbol)
        if order.kind == "algo":
            self.ledger.place_algo(order, feed.mark() if order.working_type == "MARK_PRICE" else feed.last())
        else:
            book = feed.book()
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
        feed, ledger = self.feed(symbol), self.ledger
        self.see_prices()
        if any(order.kind == "order" and order.symbol == symbol for order in ledger.open.values()):
            book = feed.book()
            ledger.match(symbol, book.bids, book.asks, now_ms)
        for algo in ledger.due(symbol, feed.last(), feed.mark()):
            if algo.id in ledger.open:  # the one before may have ended it
                book = feed.book()
                ledger.trigger(algo, book.bids, book.asks, now_ms)
        self.commit()

    def _care(self, name: str, now_ms: int) -> None:
        # Funding by market time, and liquidation: first the orders go, then the largest position.
        account, settled_ms = self.ledger.accounts[name], now_ms // FUNDING_MS * FUNDING_MS
        if account.funded_ms < settled_ms:
            is_first, account.funded_ms = not account.funded_ms, settled_ms
            if not is_first:
                self.fund(name, FUNDING_RATE)
        if self.ledger.is_due_for_liquidation(name):
            self.cancel_all(name, None)
        while self.ledger.is_due_for_liquidation(name):
            held = self.ledger.held(name)
            self.force("liquidation", name, max(held, key=lambda symbol: abs(held[symbol])))

    def _rules(self) -> dict[str, Rules]:
        return {info["symbol"]: Rules.of(info) for info in self.listings()}
