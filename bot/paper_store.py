"""What the paper exchange remembers: one SQLite file. An exchange does not forget.

What happened is committed and synced before anybody hears of it (WAL, synchronous=FULL: about
0.2 ms here), so that neither kill -9 nor a power cut takes back what was acknowledged. Rows are
documents: the struct as JSON beside the columns it is looked up by.
"""

import sqlite3
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from bot.errors import ConfigError
from bot.paper_ledger import Ledger
from bot.paper_model import (
    OPEN,
    OPEN_ALGO,
    Account,
    AccountEvent,
    Algo,
    AlgoEvent,
    Event,
    Fill,
    Income,
    Order,
    OrderEvent,
)

SCHEMA = """
CREATE TABLE IF NOT EXISTS row (
  kind TEXT, account TEXT, symbol TEXT, id INTEGER, name TEXT, ref INTEGER, is_open INTEGER,
  time_ms INTEGER, body BLOB, PRIMARY KEY (kind, account, id, symbol)) WITHOUT ROWID;
CREATE INDEX IF NOT EXISTS row_time ON row (kind, account, time_ms, id);
CREATE INDEX IF NOT EXISTS row_name ON row (kind, account, name);
CREATE INDEX IF NOT EXISTS row_ref ON row (kind, account, ref);
CREATE INDEX IF NOT EXISTS row_open ON row (kind) WHERE is_open = 1;
CREATE TABLE IF NOT EXISTS state (name TEXT PRIMARY KEY, body BLOB);
"""
T = TypeVar("T")


class Store:
    """The file. kinds: order, algo, fill, income; the state table holds accounts and single values."""

    def __init__(self, path: Path | str) -> None:
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute("PRAGMA synchronous = FULL")
            self._db.executescript(SCHEMA)
        except sqlite3.Error as error:
            raise ConfigError(f"paper.state: {path} cannot be used: {error}") from None

    def close(self) -> None:
        self._db.close()

    def load(self, ledger: Ledger) -> None:
        """Fill a fresh ledger with what was."""
        for name, body in self._db.execute("SELECT name, body FROM state WHERE name LIKE 'account/%'"):
            ledger.accounts[name.partition("/")[2]] = msgspec.json.decode(body, type=Account)
        for order in self._open("order", Order):
            ledger.orders[order.id] = order
        for algo in self._open("algo", Algo):
            ledger.algos[algo.id] = algo
        for kind, name in (("order", "last_order_id"), ("algo", "last_algo_id")):
            last, = self._db.execute("SELECT max(id) FROM row WHERE kind = ?", (kind,)).fetchone()
            setattr(ledger, name, max(getattr(ledger, name), last or 0))
        for name in ledger.accounts:
            ledger.check(name)

    def save(self, ledger: Ledger, events: list[Event]) -> None:
        """Write what happened, all or nothing, synced when this returns."""
        self._db.execute("BEGIN IMMEDIATE")
        for event in events:
            if isinstance(event, OrderEvent):
                order = event.order
                self._put("order", order, name=order.client_id, is_open=order.status in OPEN)
                if event.fill:
                    self._put("fill", event.fill, ref=order.id)
                    self._income(Income.of_fill(event.fill))
            elif isinstance(event, AlgoEvent):
                algo = event.algo
                self._put("algo", algo, name=algo.client_id, is_open=algo.status in OPEN_ALGO)
            else:
                if event.change:
                    self._income([Income.of_change(event)])
        for account in {event.account for event in events if isinstance(event, AccountEvent)}:
            self.keep(f"account/{account}", ledger.accounts[account])
        self._db.execute("COMMIT")

    def keep(self, name: str, value: Any) -> None:
        """Write one value of the state table."""
        self._db.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (name, msgspec.json.encode(value)))

    def kept(self, name: str, type_: type[T], default: T) -> T:
        """Return one value of the state table."""
        found = self._db.execute("SELECT body FROM state WHERE name = ?", (name,)).fetchone()
        return msgspec.json.decode(found[0], type=type_) if found else default

    def find(self, kind: str, type_: type[T], account: str, *, symbol: str | None = None,
             id_: int | None = None, name: str | None = None, ref: int | None = None,
             from_id: int | None = None, start_ms: int | None = None, end_ms: int | None = None,
             limit: int = 500) -> list[T]:
        """Return rows oldest first: from from_id or start_ms on when given, else the newest ones."""
        tests = {"symbol = ?": symbol, "id = ?": id_, "name = ?": name, "ref = ?": ref,
                 "id >= ?": from_id, "time_ms >= ?": start_ms, "time_ms <= ?": end_ms}
        given = {test: value for test, value in tests.items() if value is not None}
        is_forward = from_id is not None or start_ms is not None
        rows = self._db.execute(
            "SELECT body FROM row WHERE kind = ? AND account = ?" + "".join(f" AND {test}" for test in given)
            + f" ORDER BY time_ms {'' if is_forward else 'DESC'}, id {'' if is_forward else 'DESC'} LIMIT ?",
            (kind, account, *given.values(), limit)).fetchall()
        found = [msgspec.json.decode(body, type=type_) for body, in rows]
        return found if is_forward else found[::-1]

    def trade_ids(self) -> dict[str, int]:
        """Return the highest booked trade id per symbol."""
        return dict(self._db.execute("SELECT symbol, max(id) FROM row WHERE kind = 'fill' GROUP BY symbol"))

    def _open(self, kind: str, type_: type[T]) -> list[T]:
        rows = self._db.execute("SELECT body FROM row WHERE kind = ? AND is_open = 1 ORDER BY id", (kind,))
        return [msgspec.json.decode(body, type=type_) for body, in rows]

    def _income(self, rows: list[Income]) -> None:
        for row in rows:
            self._put("income", row, name=row.kind)

    def _put(self, kind: str, row: Order | Algo | Fill | Income, *, name: str = "", ref: int = 0,
             is_open: bool = False) -> None:
        self._db.execute("INSERT OR REPLACE INTO row VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                         (kind, row.account, row.symbol, row.id, name, ref, is_open, row.time_ms,
                          msgspec.json.encode(row)))
