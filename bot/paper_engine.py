"""The paper exchange without its sockets: ledger, market and memory as one; all times are its own clock's."""

import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from bot.clock import Clock
from bot.config import PaperConfig
from bot.crash import point
from bot.errors import ConfigError
from bot.paper_feed import Feed, Frame
from bot.paper_ledger import Ledger
from bot.paper_market import Market
from bot.paper_model import OPEN, Account, Event, Fill, Income, Limits, Order, OrderEvent, Refused

LISTEN_KEY_MS = 3_600_000  # a listen key lives 60 minutes, and again from each keepalive
# Rows are documents: the struct as JSON beside the columns it is looked up by.
SCHEMA = """
PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;
CREATE TABLE IF NOT EXISTS row (
  kind TEXT, account TEXT, symbol TEXT, id INTEGER, name TEXT, ref INTEGER, is_open INTEGER,
  time_ms INTEGER, body BLOB, PRIMARY KEY (kind, account, id, symbol)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS row_time ON row (kind, account, time_ms, id);
CREATE INDEX IF NOT EXISTS row_name ON row (kind, account, name);
CREATE INDEX IF NOT EXISTS row_ref ON row (kind, account, ref);
CREATE INDEX IF NOT EXISTS row_open ON row (id) WHERE is_open = 1;
CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, body BLOB);
"""
TYPES = {"order": Order, "algo": Order, "fill": Fill, "income": Income}  # kinds of rows
T = TypeVar("T")


class Store:
    """An exchange does not forget: what happened is in this file, synced, before anybody hears of it."""

    def __init__(self, path: Path | str) -> None:
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.executescript(SCHEMA)
        except sqlite3.Error as error:
            raise ConfigError(f"paper.state: {path} cannot be used: {error}") from None
        self.close = self._db.close

    def load(self, ledger: Ledger) -> None:
        """Fill a fresh ledger with what was."""
        ledger.accounts = self.kept("accounts", dict[str, Account], {})
        for body, in self._db.execute("SELECT body FROM row WHERE is_open = 1 ORDER BY id"):
            order = msgspec.json.decode(body, type=Order)
            ledger.open[order.id] = order
        for kind, last in self._db.execute(
                "SELECT kind, max(id) FROM row WHERE kind != 'fill' GROUP BY kind"):
            ledger.last_ids[kind] = max(ledger.last_ids[kind], last)
        for name in ledger.accounts:
            ledger.check(name)

    def save(self, ledger: Ledger, events: list[Event]) -> None:
        """Write what happened, all or nothing, synced when this returns."""
        self._db.execute("BEGIN IMMEDIATE")
        for event in events:
            if isinstance(event, OrderEvent):
                order = event.order
                self._put(order.kind, order, name=order.client_id, is_open=order.status in OPEN)
                if event.fill:
                    self._put("fill", event.fill, ref=order.id)
            elif isinstance(event, Income):
                self._put("income", event, name=event.reason)
        self.keep("accounts", ledger.accounts)
        self._db.execute("COMMIT")

    def keep(self, name: str, value: Any) -> None:
        self._db.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (name, msgspec.json.encode(value)))

    def kept(self, name: str, type_: type[T], default: T) -> T:
        found = self._db.execute("SELECT body FROM state WHERE name = ?", (name,)).fetchone()
        return msgspec.json.decode(found[0], type=type_) if found else default

    def find(self, kind: str, account: str, tests: dict[str, Any], limit: int) -> list[Any]:
        """Return rows that pass the tests ("column op" -> value), from a lower bound on or the newest."""
        given = {test: value for test, value in tests.items() if value is not None}
        where = "".join(f" AND {test} ?" for test in given)
        order = "" if ">=" in where else "DESC"
        rows = self._db.execute(
            f"SELECT body FROM row WHERE kind = ? AND account = ?{where} "
            f"ORDER BY time_ms {order}, id {order} LIMIT ?", (kind, account, *given.values(), limit))
        found = [msgspec.json.decode(body, type=TYPES[kind]) for body, in rows]
        return found[::-1] if order else found

    def trade_ids(self) -> dict[str, int]:
        return dict(self._db.execute("SELECT symbol, max(id) FROM row WHERE kind = 'fill' GROUP BY symbol"))

    def _put(self, kind: str, row: Order | Fill | Income, *, name: str = "", ref: int = 0,
             is_open: bool = False) -> None:
        self._db.execute("INSERT OR REPLACE INTO row VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                         (kind, row.account, row.symbol, row.id, name, ref, is_open, row.time_ms,
                          msgspec.json.encode(row)))


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
        return self.clock.wall_ns() // 1_000_000 + self.offset_ms

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

    def change_symbol(self, symbol: str, status: str, filters: dict[str, dict[str, str]]) -> None:
        """Change a listing. One that settles or closes ends its orders and positions, at the mark."""
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
