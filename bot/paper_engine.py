"""The paper exchange without its sockets: ledger, market and memory as one; all times are its own clock's."""

import sqlite3
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any, TypeVar

import msgspec
from msgspec.structs import asdict

from bot import paper_model as model
from bot.clock import Clock
from bot.config import PaperConfig
from bot.crash import point
from bot.errors import ConfigError
from bot.paper_feed import Frame
from bot.paper_ledger import Ledger
from bot.paper_market import Market
from bot.paper_model import OPEN, Event, Fill, Income, Order, OrderEvent, Refused, Side, refuse_if

PATIENCE = 10  # requests answered 429 in one minute before the address is banned, for this long:
BAN_MS = 120_000
LISTEN_KEY_MS = 3_600_000  # a listen key lives 60 minutes, and again from each keepalive
TYPES = {"order": Order, "algo": Order, "fill": Fill, "income": Income}  # kinds of rows
T = TypeVar("T")


class Store:
    """An exchange does not forget: what happened is in this file, synced, before anybody hears of it."""

    def __init__(self, path: Path | str) -> None:
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.executescript(Path(__file__).with_name("paper.sql").read_text(encoding="utf-8"))
        except sqlite3.Error as error:
            raise ConfigError(f"paper.state: {path} cannot be used: {error}") from None
        self.close = self._db.close

    def load(self, ledger: Ledger) -> None:
        ledger.accounts = self.kept("accounts", dict[str, model.Account], {})
        for body, in self._db.execute("SELECT body FROM row WHERE is_open = 1 ORDER BY id"):
            order = msgspec.json.decode(body, type=Order)
            ledger.open[order.id] = order
        for kind, last in self._db.execute(
                "SELECT kind, max(id) FROM row WHERE kind != 'fill' GROUP BY kind"):
            ledger.last_ids[kind] = max(ledger.last_ids[kind], last)
        for name in ledger.accounts:
            ledger.check(name)

    def save(self, ledger: Ledger, events: list[Event], kept: dict[str, Any]) -> None:
        """Write what happened and is kept, all or nothing, synced when this returns."""
        self._db.execute("BEGIN IMMEDIATE")
        for event in events:
            if isinstance(event, OrderEvent):
                order = event.order
                self._put(order.kind, order, name=order.client_id, is_open=order.status in OPEN)
                if event.fill:
                    self._put("fill", event.fill, ref=order.id)
            elif isinstance(event, Income):
                self._put("income", event, name=event.reason)
        for name, value in {"accounts": ledger.accounts, **kept}.items():
            self.keep(name, value)
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
        order, by = "" if ">=" in where else "DESC", "id" if "id >=" in given else "time_ms"
        rows = self._db.execute(
            f"SELECT body FROM row WHERE kind = ? AND account = ?{where} ORDER BY {by} {order}, id {order} "
            "LIMIT ?", (kind, account, *given.values(), limit))
        found = [msgspec.json.decode(body, type=TYPES[kind]) for body, in rows]
        return found[::-1] if order else found

    def trade_ids(self) -> dict[str, int]:
        return dict(self._db.execute("SELECT symbol, max(id) FROM row WHERE kind = 'fill' GROUP BY symbol"))

    def _put(self, kind: str, row: Order | Fill | Income, *, name: str = "", ref: int = 0,
             is_open: bool = False) -> None:
        self._db.execute("INSERT OR REPLACE INTO row VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                         (kind, row.account, row.symbol, row.id, name, ref, is_open, row.time_ms,
                          msgspec.json.encode(row)))


class Limits(msgspec.Struct, forbid_unknown_fields=True):
    """What the limiter allows (POST /paper/limits), and until when it bans every address."""

    weight_1m: int = 2_400
    orders_10s: int = 300
    orders_1m: int = 1_200
    banned_until_ms: int = 0

    def listing(self) -> list[model.Json]:
        return [model.worded(name, asdict(self)) for name in ("weight_1m", "orders_1m", "orders_10s")]


class Limiter:
    """Weights by address and orders by account; what is used goes to the headers. Raises Refused."""

    def __init__(self, now_ms: Callable[[], int]) -> None:
        self.now_ms, self.limits = now_ms, Limits()
        self._used: dict[str, tuple[int, int]] = {}  # counter -> (its window, used)
        self._banned: dict[str, int] = {}  # address -> until when

    def weigh(self, address: str, weight: int, headers: dict[str, str]) -> None:
        now_ms, most = self.now_ms(), self.limits.weight_1m
        until_ms = max(self._banned.get(address, 0), self.limits.banned_until_ms)
        if now_ms >= until_ms:
            if self._count(address, 60, weight, headers, "X-MBX-USED-WEIGHT-1M") <= most:
                return
            headers["Retry-After"] = str(60 - now_ms // 1_000 % 60)
            refuse_if((self._count(f"{address} 429", 60, 1, {}) <= PATIENCE, -1003, address, most))
            until_ms = self._banned[address] = now_ms + BAN_MS
        headers["Retry-After"] = str((until_ms - now_ms) // 1_000 + 1)
        raise Refused(-1003, status=418, text=model.TEXTS[418].format(address, until_ms))

    def count_orders(self, account: str, count: int, headers: dict[str, str]) -> None:
        limits, now_s = self.limits, self.now_ms() // 1_000
        for name, length_s, number, most, words in (("10S", 10, count, limits.orders_10s, "TEN_SECONDS"),
                                                    ("1M", 60, 1, limits.orders_1m, "MINUTE")):
            header = f"X-MBX-ORDER-COUNT-{name}"
            if self._count(f"{account} {header}", length_s, number, headers, header) > most:
                headers["Retry-After"] = str(length_s - now_s % length_s)
                raise Refused(-1015, most, words)

    def _count(self, name: str, window_s: int, weight: int, headers: dict[str, str], header: str = "") -> int:
        window, (then, used) = self.now_ms() // 1_000 // window_s, self._used.get(name, (0, 0))
        self._used[name] = (window, weight + (used if window == then else 0))
        if header:
            headers[header] = str(self._used[name][1])
        return self._used[name][1]


class Engine:
    """One exchange. Whoever commands the ledger calls wake() before and commit() after."""

    def __init__(self, config: PaperConfig, market: Market, store: Store, clock: Clock) -> None:
        self.config, self.market, self.store, self.clock = config, market, store, clock
        self.offset_ms = 0  # a fault: the exchange's clock is off by this much
        self.feeds, self.limiter = market.feeds, Limiter(self.now_ms)
        self._second = 0  # margins and funding are looked at once a second, when the mark moves
        self._untold, self.to_keep = list[Event](), dict[str, Any]()  # what the next commit writes
        self.listener: Callable[[list[Event]], None] = lambda events: None
        self.listen_keys = store.kept("listen_keys", dict[str, tuple[str, int]], {})
        # (account, symbol) as one text -> when all its orders are canceled, unless the client extends it
        self.countdowns = store.kept("countdowns", dict[str, int], {})
        self.changes = store.kept("changes", dict[str, dict[str, Any]], {})  # of listings, since
        self.ledger = Ledger(self.feeds, taker_fee=config.taker_fee, maker_fee=config.maker_fee)
        store.load(self.ledger)
        used = {order.symbol for order in self.ledger.open.values()} | {
            symbol for a in self.ledger.accounts.values() for symbol, p in a.positions.items() if p.qty}
        if used - self.feeds.keys():
            raise ConfigError("paper.symbols: must name all in which paper.state has a position or order; "
                              f"was without {', '.join(used - self.feeds.keys())}")
        for symbol, change in self.changes.items():
            if symbol in self.feeds:
                self.ledger.contracts[symbol] = self.feeds[symbol].contract.changed(**change)
        market.advance(self.wake())
        for name, account in config.accounts.items():
            if name not in self.ledger.accounts:
                self.ledger.deposit(name, account.balance)
        self.commit()

    def now_ms(self) -> int:
        return self.clock.wall_ns() // 1_000_000 + self.offset_ms

    def wake(self) -> int:
        """Tell the ledger what time it is; return it."""
        self.ledger.now_ms = self.now_ms()
        return self.ledger.now_ms

    def commit(self) -> None:
        """Write what happened to disk, and only then tell. Raises InvariantError, sqlite3.Error.

        What is wrong is not written; it, or what could not be, ends the next step, so the process, and the
        disk's books are those it begins with again.
        """
        for name in self.ledger.accounts:
            self.ledger.check(name)
        self._untold += self.ledger.events()
        if self._untold or self.to_keep:
            point("paper.before_commit")
            self.store.save(self.ledger, self._untold, self.to_keep)
            point("paper.committed")
            events, self._untold, self.to_keep = self._untold, [], {}
            self.listener(events)
            point("paper.told")

    def step(self, frames_max: int) -> list[Frame]:
        """Let the market go on to now; return its frames after open orders have met it."""
        now_ms, ledger = self.wake(), self.ledger
        frames = self.market.advance(now_ms, frames_max)
        if now_ms // 1_000 != self._second and self.market.is_tradable:
            self._second = now_ms // 1_000
            for name in ledger.accounts:
                ledger.care(name)
        if frames and self.market.is_tradable:
            for symbol in {order.symbol for order in ledger.open.values()}:
                ledger.meet(symbol)
        for key in [key for key, due_ms in self.countdowns.items() if due_ms <= now_ms]:
            name, symbol = key.rsplit(" ", 1)
            ledger.cancel_all(name, symbol, ("order",))
            self.count_down(name, symbol, 0)
        self.commit()
        return frames

    def place(self, order: Order) -> Order:
        if not self.market.is_tradable:
            raise Refused(-4108)
        return self.ledger.place(order)

    def trade(self, name: str, symbol: str, side: Side, qty: Decimal, reduce_only: bool) -> Order:
        """Let a person trade by hand, at the market."""
        return self.place(Order(account=name, symbol=symbol, client_id=f"web_{self.clock.token(20)}",
                                side=side, type="MARKET", qty=qty, reduce_only=reduce_only))

    def change_symbol(self, symbol: str, status: str, filters: dict[str, dict[str, str]]) -> None:
        """Change a listing. One that settles or closes ends its orders and positions, at the mark."""
        self.ledger.contracts[symbol] = self.feeds[symbol].contract.changed(status, filters)
        if status in ("SETTLING", "CLOSE"):
            for name in self.ledger.accounts:
                self.ledger.cancel_all(name, symbol)
                if symbol in self.ledger.held(name):
                    self.ledger.force("settlement", name, symbol)
        self.changes[symbol] = {"status": status, "filters": filters}
        self.to_keep["changes"] = self.changes

    def count_down(self, name: str, symbol: str, time_ms: int) -> None:
        """Cancel all plain orders of a symbol after so long; 0: never."""
        self.countdowns[f"{name} {symbol}"] = self.now_ms() + time_ms
        if not time_ms:
            del self.countdowns[f"{name} {symbol}"]
        self.to_keep["countdowns"] = self.countdowns

    def live_key(self, account: str) -> str:
        """Return the account's listen key while it lives, or ""."""
        key, until_ms = self.listen_keys.get(account, ("", 0))
        return key if until_ms >= self.now_ms() else ""

    def listen_key(self, account: str, *, is_new: bool = True) -> str:
        """Return the account's listen key, extended; a new one if it may be. Raises Refused."""
        key = self.live_key(account)
        refuse_if((not (key or is_new), -1125))
        self.listen_keys[account] = (key or self.clock.token(64), self.now_ms() + LISTEN_KEY_MS)
        self.to_keep["listen_keys"] = self.listen_keys
        return self.live_key(account)

    def drop_listen_key(self, account: str) -> None:
        self.listen_keys.pop(account, None)
        self.to_keep["listen_keys"] = self.listen_keys
