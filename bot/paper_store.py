"""What the paper exchange remembers: one SQLite file. An exchange does not forget.

What happened is committed and synced before anybody hears of it (WAL, synchronous=FULL), so that
neither kill -9 nor a power cut takes back what was acknowledged. Rows are documents: the struct as
JSON beside the columns it is looked up by.
"""

import sqlite3
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from bot.errors import ConfigError
from bot.paper_ledger import Ledger
from bot.paper_model import OPEN, Account, AccountEvent, Event, Fill, Income, Order, OrderEvent

SCHEMA = """
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
    """The file: rows, and a state table of single values."""

    def __init__(self, path: Path | str) -> None:
        try:
            self._db = sqlite3.connect(path, isolation_level=None)
            self._db.executescript("PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;" + SCHEMA)
        except sqlite3.Error as error:
            raise ConfigError(f"paper.state: {path} cannot be used: {error}") from None

    def close(self) -> None:
        self._db.close()

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
        if any(isinstance(event, AccountEvent) for event in events):
            self.keep("accounts", ledger.accounts)
        self._db.execute("COMMIT")

    def keep(self, name: str, value: Any) -> None:
        """Write one value of the state table."""
        self._db.execute("INSERT OR REPLACE INTO state VALUES (?, ?)", (name, msgspec.json.encode(value)))

    def kept(self, name: str, type_: type[T], default: T) -> T:
        """Return one value of the state table."""
        found = self._db.execute("SELECT body FROM state WHERE name = ?", (name,)).fetchone()
        return msgspec.json.decode(found[0], type=type_) if found else default

    def find(self, kind: str, account: str, tests: dict[str, Any], limit: int) -> list[Any]:
        """Return rows oldest first: those that pass the tests ("column op" -> value, None: no test).

        With a lower bound the first ones from there on, else the newest.
        """
        given = {test: value for test, value in tests.items() if value is not None}
        where = "".join(f" AND {test} ?" for test in given)
        order = "" if ">=" in where else "DESC"
        rows = self._db.execute(
            f"SELECT body FROM row WHERE kind = ? AND account = ?{where} "
            f"ORDER BY time_ms {order}, id {order} LIMIT ?", (kind, account, *given.values(), limit))
        found = [msgspec.json.decode(body, type=TYPES[kind]) for body, in rows]
        return found[::-1] if order else found

    def trade_ids(self) -> dict[str, int]:
        """Return the highest booked trade id per symbol."""
        return dict(self._db.execute("SELECT symbol, max(id) FROM row WHERE kind = 'fill' GROUP BY symbol"))

    def _put(self, kind: str, row: Order | Fill | Income, *, name: str = "", ref: int = 0,
             is_open: bool = False) -> None:
        self._db.execute("INSERT OR REPLACE INTO row VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                         (kind, row.account, row.symbol, row.id, name, ref, is_open, row.time_ms,
                          msgspec.json.encode(row)))
