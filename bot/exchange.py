"""The exchange: builds, signs and parses with ccxt; moves no byte itself. Edge to ccxt.

Requests leave through two lanes that are passed in: one for orders and cancels, one for queries.
ccxt's own network code, rate limiter and exception classes are not used (exchange-facts 0).
"""

import importlib.util
import sys
from collections.abc import Callable, Container, Iterator, Sequence, Set
from contextlib import contextmanager
from decimal import Decimal
from typing import Any, Protocol
from urllib.parse import urlsplit

import msgspec

from bot.budget import SLOW_SHARE, Action, Budget, Usage
from bot.clock import Clock
from bot.config import ExchangeConfig
from bot.errors import ConfigError, ExchangeError
from bot.model import Candle, Instrument
from bot.orders import ExchangeFill, OrderRequest, OrderStatus
from bot.outcome import Answer, error_of, retry_later_s
from bot.rows import (
    ALGO,
    FILL,
    ORDER,
    UNREADABLE,
    AccountSettings,
    ExchangePosition,
    KeyRights,
    PrivateEvent,
    SymbolSettings,
    read_account,
    read_fill,
    read_income,
    read_instrument,
    read_key_rights,
    read_position,
    read_private,
    read_status,
    read_symbol_settings,
)
from bot.signed_request import SignedRequest, check_built

# The exchanges whose orders, answers and streams the tests know. Another one is a row here, readers in
# bot/rows.py, codes in bot/outcome.py, and its recorded answers in the tests.
TRADABLE = ("binanceusdm",)
NOT_FOUND, CLOCK_REFUSED, TOO_MUCH, TOO_MANY_ORDERS = (-2011, -2013), -1021, -1003, -1015
QUERY_SLOW_S = 0.5  # between questions once much of the weight is used: 120 a minute at most
URGENT_TRIES, URGENT_WAIT_S = 5, 0.2  # flatten's: an overloaded exchange answers every second or third
PAGE_ROWS, KLINES_MAX = 1_000, 1_500  # of userTrades, allOrders, allAlgoOrders and income; of klines
WEEK_MS = 7 * 86_400_000 - 1  # they answer for less than 7 days at once (exchange-facts 1.1)
INCOME_PAGES_MAX = 10  # of weight 30 each; three such looks at two comparisons a minute leave some


class Rest(Protocol):
    """One lane to the exchange; bot.connection.RestPool, or a simulator's."""

    async def request(self, method: str, url: str, headers: dict[str, str], body: bytes = b"",
                      may_send: Callable[[], str] | None = None) -> Answer: ...


class Exchange:
    """One account at one exchange. keys: (API key, secret), None for market data alone.

    rights: the lane to sapi_url, where a key's rights are told.
    is_urgent: its questions may use what the request limits keep for cancels and closes, and are asked
    again at once when an answer says nothing.
    Raises ConfigError for an exchange outside the tested table. Queries raise ExchangeError (status,
    code) on anything but a clean answer, and when the budget keeps them back.
    """

    def __init__(self, config: ExchangeConfig, clock: Clock, *, orders: Rest, queries: Rest,
                 keys: tuple[str, str] | None, rights: Rest | None = None, is_urgent: bool = False) -> None:
        if config.id not in TRADABLE:
            raise ConfigError(f'exchange.id: must be one of {", ".join(TRADABLE)}; was "{config.id}"')
        self._unreadable, ccxt = (*UNREADABLE, library("base.errors").BaseError), library(config.id)
        self._config, self._clock = config, clock
        self._orders, self._queries, self._rights = orders, queries, rights
        api_key, secret = keys or ("", "")
        self._ccxt: Any = getattr(ccxt, config.id)(
            {"apiKey": api_key, "secret": secret, "maxRetriesOnFailure": 0})
        self._ccxt.number = str  # money never becomes a float
        base = config.rest_url.rstrip("/")
        self._ccxt.urls["api"] = {
            section: (config.sapi_url.rstrip("/") if section == "sapi" else base) + urlsplit(url).path
            for section, url in self._ccxt.urls["api"].items()}
        self._ahead_ns = clock.wall_ns() - clock.mono_ns()  # exchange time minus the monotonic clock
        self._is_measured = False  # till then it is this host's word, which may be far off
        self._symbols: dict[str, str] = {}
        self._markets: dict[str, dict[str, Any]] = {}
        self.instruments: dict[str, Instrument] = {}
        # early: what was heard by a clock that is not measured yet; it is told to nobody, and then forgotten
        self.budget, self._early, self._is_urgent = Budget(), Budget(), is_urgent

    async def load(self) -> None:
        """Measure the clock and fetch the instruments."""
        await self.measure_clock()
        await self._read_listing(None)

    def unlisted(self, symbols: Sequence[str]) -> list[str]:
        """Return the symbols that are not listed. Raises ConfigError when none is: then the file is wrong."""
        missing = [symbol for symbol in symbols if symbol not in self.instruments]
        if missing and len(missing) == len(symbols):
            raise ConfigError(f"symbols: at least one must be listed by {self._config.id}; was "
                              f"{', '.join(missing)}")
        return missing

    async def refresh(self, symbols: Sequence[str]) -> None:
        """Fetch the rules of these symbols again; one that is not listed any more gets status DELISTED."""
        ids = {self._id(symbol): symbol for symbol in symbols if symbol in self.instruments}
        for symbol in set(ids.values()) - await self._read_listing(ids):
            self.instruments[symbol] = msgspec.structs.replace(self.instruments[symbol], status="DELISTED")

    async def _read_listing(self, ids: Container[str] | None) -> Set[str]:
        # Of these contracts, or of all; returns our names of those that are there.
        info = await self._query("GET", "fapiPublic", "exchangeInfo")
        with self._reading("exchangeInfo"):
            self.budget.learn(info.get("rateLimits", []))
            rows = [row for row in info["symbols"] if ids is None or row["symbol"] in ids]
            listed = dict(filter(None, map(self._listing, rows)))
            if ids is None and not listed:
                raise ValueError(f"no contract of {len(rows)}")
            self._markets |= {symbol: market for symbol, (_, market) in listed.items()}
            self._ccxt.set_markets(list(self._markets.values()))
            self.instruments |= {symbol: instrument for symbol, (instrument, _) in listed.items()}
            self._symbols = {row.exchange_symbol: symbol for symbol, row in self.instruments.items()}
        return listed.keys()

    async def measure_clock(self, tries: int = 3) -> None:
        """Measure the exchange's clock; the fastest of a few round trips counts."""
        measured = []
        for _ in range(tries):
            sent_ns = self._clock.mono_ns()
            row = await self._query("GET", "fapiPublic", "time")
            received_ns = self._clock.mono_ns()
            with self._reading("time"):  # whole milliseconds: the middle of the one it names
                server_ns = int(row["serverTime"]) * 1_000_000 + 500_000
            measured.append((received_ns - sent_ns, server_ns - (sent_ns + received_ns) // 2))
        self._ahead_ns, self._is_measured, self._early = min(measured)[1], True, Budget()

    @property
    def clock_offset_ns(self) -> int:
        """Return the exchange's clock minus this host's wall clock, now; 0 before it was measured."""
        return self.server_ns() - self._clock.wall_ns()

    def server_ns(self) -> int:
        """Return the exchange's time. It goes by the monotonic clock: the host's may step."""
        return self._clock.mono_ns() + self._ahead_ns

    async def candles(self, symbol: str, timeframe: str, count: int) -> list[Candle]:
        """Return the last closed candles, oldest first; at most 1,499."""
        rows = await self._query("GET", "fapiPublic", "klines", symbol=self._id(symbol), interval=timeframe,
                                 limit=min(count + 1, KLINES_MAX))
        now_ms = self.server_ns() // 1_000_000
        with self._reading("klines"):
            closed = [row for row in rows if row[6] < now_ms]
            return [Candle(row[0] * 1_000_000, *map(float, row[1:6])) for row in closed][-count:]

    def build(self, request: OrderRequest) -> SignedRequest:
        """Build and sign an order. Nothing leaves.

        Raises InvariantError when what was built is not exactly what was asked (ccxt rounds prices),
        ExchangeError when ccxt refuses to build it.
        """
        exchange_symbol = self._id(request.symbol)
        params: dict[str, Any] = {"reduceOnly": True} if request.reduce_only else {}
        if request.is_conditional:
            name = "stopLossPrice" if request.type == "stop" else "takeProfitPrice"
            params |= {name: f"{request.trigger_price or 0:f}", "clientAlgoId": request.client_order_id,
                       "isAlgoOrder": True, "workingType": "MARK_PRICE", "algoType": "CONDITIONAL"}
        else:
            params["newClientOrderId"] = request.client_order_id
        timestamp_ms, window_ms = self.server_ns() // 1_000_000, self._config.recv_window_ms
        try:
            fields = self._ccxt.create_order_request(request.symbol, "market", request.side,
                                                     f"{request.qty:f}", None, params)
        except self._unreadable as error:
            raise ExchangeError(f"order {request.client_order_id} cannot be built: {error}") from None
        fields |= {"timestamp": timestamp_ms, "recvWindow": window_ms}
        signed = self._sign("POST", "fapiPrivate", "algoOrder" if request.is_conditional else "order", fields)
        built = SignedRequest(client_order_id=request.client_order_id, timestamp_ms=timestamp_ms,
                              fence_ns=(timestamp_ms + window_ms) * 1_000_000, **signed)
        check_built(request, exchange_symbol, built, window_ms)
        return built

    async def submit(self, signed: SignedRequest, may_send: Callable[[], str] | None = None) -> Answer:
        """Send the order, once; bot.outcome.classify says what the answer proves.

        may_send is asked immediately before the first byte leaves: "" lets it, words keep it back.
        """
        return self._note(await self._orders.request(
            "POST", signed.url, signed.headers, signed.body,
            lambda: self.refusal("rest") or (may_send() if may_send else "")))

    def hear_usage(self, told: Usage) -> None:
        """Take in what another process of this host knows of the request limits."""
        self.budget.merge(told, self.server_ns())

    def shares(self) -> dict[str, float]:
        """Return how much of each request limit is used in its window now, 0 to 1."""
        return {name: round(self.budget.share(name, self.server_ns()), 4) for name in self.budget.limits}

    def refusal(self, action: Action) -> str:
        """Return why the request limits let this kind of request not leave now, "" when they do."""
        now_ns = self.server_ns()
        return self._early.refusal(action, now_ns) or self.budget.refusal(action, now_ns)

    def answered_order(self, answer: Answer) -> OrderStatus | None:
        """Return the order that an accepted answer describes, None when it cannot be read."""
        try:
            row = msgspec.json.decode(answer.body)
            return read_status(row, ALGO if "algoId" in row else ORDER, self._symbols)
        except UNREADABLE:
            return None

    async def cancel(self, symbol: str, client_order_id: str, *, is_conditional: bool) -> Answer:
        """Send a cancel, once; bot.outcome.classify_cancel says what the answer proves."""
        path, name = ("algoOrder", "clientAlgoId") if is_conditional else ("order", "origClientOrderId")
        params = {"symbol": self._id(symbol), name: client_order_id}
        return self._note(await self._orders.request(
            "DELETE", **self._sign("DELETE", "fapiPrivate", path, params),
            may_send=lambda: self.refusal("rest")))

    async def order(self, symbol: str, client_order_id: str, *, is_conditional: bool) -> OrderStatus | None:
        """Return the order, or None when the exchange says that it does not know it.

        A triggered conditional order is told with the end of the order it turned into, which is asked
        for by its exchange id, and keeps the client id (nautilus #3664).
        """
        status = await self._find(ALGO, symbol, clientAlgoId=client_order_id) if is_conditional else None
        if status is None:
            return await self._find(ORDER, symbol, origClientOrderId=client_order_id)
        if not status.triggered_id:
            return status
        child = await self._find(ORDER, symbol, orderId=status.triggered_id)
        return status if child is None else msgspec.structs.replace(
            status, executed_qty=child.executed_qty, event=child.event, update_ns=child.update_ns,
            raw_status=f"{status.raw_status}/{child.raw_status}")

    async def open_orders(self, symbol: str | None = None) -> list[OrderStatus]:
        """Return open orders, plain and conditional."""
        where = {"symbol": self._id(symbol)} if symbol else {}
        plain = await self._query("GET", "fapiPrivate", "openOrders", **where)
        return self._statuses(plain, await self._query("GET", "fapiPrivate", "openAlgoOrders", **where))

    async def orders_since(self, symbol: str, start_ns: int) -> list[OrderStatus]:
        """Return all orders, plain and conditional, made since start_ns (exchange clock)."""
        plain = await self._pages("allOrders", symbol, ("orderId", "orderId"), start_ns)
        conditional = await self._pages("allAlgoOrders", symbol, ("algoId", "algoId"), start_ns)
        return self._statuses(plain, conditional)

    async def fills_since(self, symbol: str, *, from_trade_id: int | None = None,
                          start_ns: int | None = None) -> list[ExchangeFill]:
        """Return fills, oldest first, from a trade id on, or since start_ns (exchange clock)."""
        rows = await self._pages("userTrades", symbol, ("id", "fromId"), start_ns, from_trade_id)
        with self._reading("userTrades"):
            return [read_fill(row, FILL, self._symbols) for row in rows]

    async def positions(self) -> dict[str, ExchangePosition]:
        """Return the positions that are not zero, by symbol. Raises ExchangeError in hedge mode."""
        rows = await self._query("GET", "fapiPrivateV3", "positionRisk")
        with self._reading("positionRisk"):
            return {p.symbol: p for p in (read_position(row, self._symbols) for row in rows) if p.qty}

    async def account(self) -> AccountSettings:
        """Return the account's modes, and its balance."""
        modes = await self._query("GET", "fapiPrivate", "accountConfig")
        balances = await self._query("GET", "fapiPrivateV3", "balance")
        with self._reading("account"):
            return read_account(modes, balances)

    async def income(self, start_ns: int) -> tuple[dict[str, Decimal], int, bool]:
        """Return what came in after start_ns (its clock), trades left out, by type, and the newest's time.

        And whether that is all: of a list that is too long its oldest, which is told first.
        """
        rows, start_ms, is_whole = list[Any](), start_ns // 1_000_000, False
        with self._reading("income"):
            for _ in range(INCOME_PAGES_MAX):
                page = await self._query("GET", "fapiPrivate", "income", limit=PAGE_ROWS, startTime=start_ms)
                is_whole = len(page) < PAGE_ROWS
                start_ms = start_ms if is_whole else max(row["time"] for row in page)  # all of it once more
                rows += [row for row in page if is_whole or row["time"] < start_ms]
                if is_whole or page[0]["time"] >= start_ms:
                    break
            return *read_income(rows, start_ns), is_whole

    async def key_rights(self) -> KeyRights | None:
        """Return what the key may do, None where nobody tells it. Raises ExchangeError."""
        if self._rights is None:
            return None
        answer = await self._rights.request("GET", **self._sign("GET", "sapi", "account/apiRestrictions", {}))
        if answer.status != 200 or answer.error:
            raise ExchangeError(f"apiRestrictions: {answer.error or error_of(answer)[1]}")
        with self._reading("apiRestrictions"):
            return read_key_rights(msgspec.json.decode(answer.body))

    async def symbol_settings(self) -> dict[str, SymbolSettings]:
        """Return margin mode and leverage, by symbol."""
        rows = await self._query("GET", "fapiPrivate", "symbolConfig")
        with self._reading("symbolConfig"):
            return {self._symbols[row["symbol"]]: read_symbol_settings(row)
                    for row in rows if row["symbol"] in self._symbols}

    async def listen_key(self) -> str:
        """Return a key for the private stream, good for 60 minutes; one that lives is extended."""
        row = await self._query("POST", "fapiPrivate", "listenKey")
        with self._reading("listenKey"):
            return str(row["listenKey"])

    async def keep_listen_key(self) -> None:
        """Extend the key by 60 minutes. Raises ExchangeError; code -1125: take a new key."""
        await self._query("PUT", "fapiPrivate", "listenKey")

    def private_url(self, listen_key: str) -> str:
        """Return the address of the private stream."""
        return f"{self._config.ws_url.rstrip('/')}/private/ws?listenKey={listen_key}"

    def market_url(self, section: str, streams: list[str]) -> str:
        """Return the address that carries the streams: public those of trades and books, market others."""
        return f"{self._config.ws_url.rstrip('/')}/{section}/stream?streams={'/'.join(streams)}"

    def parse_private(self, raw: bytes) -> list[PrivateEvent]:
        """Return what a private frame says; never raises. A trade gives its order's status, then the fill."""
        return read_private(raw, self._symbols)

    def _listing(self, row: Any) -> tuple[str, tuple[Instrument, dict[str, Any]]] | None:
        try:
            market = self._ccxt.parse_market(row)
            return (market["symbol"], (read_instrument(market), market)) if market["linear"] else None
        except self._unreadable:
            return None  # an exotic contract must not keep the others from trading

    def _statuses(self, plain: list[Any], conditional: list[Any]) -> list[OrderStatus]:
        with self._reading("orders"):
            return ([read_status(row, ORDER, self._symbols) for row in plain]
                    + [read_status(row, ALGO, self._symbols) for row in conditional])

    async def _find(self, names: tuple[str, ...], symbol: str, **where: str) -> OrderStatus | None:
        path = "algoOrder" if names is ALGO else "order"
        try:
            row = await self._query("GET", "fapiPrivate", path, symbol=self._id(symbol), **where)
        except ExchangeError as error:
            if error.code in NOT_FOUND and 400 <= error.status < 500:
                return None
            raise
        with self._reading(path):
            status = read_status(row, names, self._symbols)
            told = {status.client_order_id, status.exchange_order_id}
            if status.symbol != symbol or not told & {*where.values()}:
                raise ValueError(f"asked for {where}, was told of {status.client_order_id}")
            return status

    async def _pages(self, path: str, symbol: str, names: tuple[str, str], start_ns: int | None,
                     from_id: int | None = None) -> list[Any]:
        # names: of a row's id, and of the parameter for "from this id on", which excludes times. The
        # windows of time are walked through all the same; rows that come twice fall together.
        rows: dict[int, Any] = {}
        start_ms = None if start_ns is None else start_ns // 1_000_000
        while True:
            where = {names[1]: from_id} if from_id is not None else {} if start_ms is None else {
                "startTime": start_ms, "endTime": start_ms + WEEK_MS}
            page = await self._query("GET", "fapiPrivate", path, symbol=self._id(symbol), limit=PAGE_ROWS,
                                     **where)
            with self._reading(path):
                found = {int(row[names[0]]): row for row in page}
                if from_id is not None and found and min(found) < from_id:
                    raise ValueError(f"asked for ids from {from_id}, was told of {min(found)}")
            rows |= found
            if len(found) >= PAGE_ROWS:
                from_id = max(found) + 1
            elif start_ms is not None and start_ms + WEEK_MS < self.server_ns() // 1_000_000:
                start_ms, from_id = start_ms + WEEK_MS + 1, None
            else:
                return [rows[key] for key in sorted(rows)]

    async def _query(self, method: str, section: str, path: str, **params: Any) -> Any:
        tries = 0
        while True:
            try:
                return await self._ask(method, section, path, params)
            except ExchangeError as error:
                tries += 1
                if not self._is_urgent or tries == URGENT_TRIES or 400 <= error.status < 500:
                    raise
                await self._clock.sleep(URGENT_WAIT_S)

    async def _ask(self, method: str, section: str, path: str, params: dict[str, Any]) -> Any:
        if not self._is_urgent and self.budget.share("weight_1m", self.server_ns()) >= SLOW_SHARE:
            await self._clock.sleep(QUERY_SLOW_S)
        if refusal := self.refusal("rest" if self._is_urgent else "query"):
            raise ExchangeError(f"{path}: not asked: {refusal}", code=TOO_MUCH)
        answer = self._note(await self._queries.request(method, **self._sign(method, section, path, params)))
        if answer.status == 200 and not answer.error:
            with self._reading(path):
                return msgspec.json.decode(answer.body)
        if (code := error_of(answer)[0]) == CLOCK_REFUSED:
            await self.measure_clock()
        raise ExchangeError(f"{path}: {answer.error or error_of(answer)[1]}", status=answer.status, code=code)

    def _sign(self, method: str, section: str, path: str, params: dict[str, Any]) -> dict[str, Any]:
        if section != "fapiPublic" and path != "listenKey":
            params = {"timestamp": self.server_ns() // 1_000_000, "recvWindow": self._config.recv_window_ms,
                      **params}
        try:
            signed = self._ccxt.sign(path, [section, method], method, params)
        except self._unreadable as error:  # no keys were given
            raise ExchangeError(f"{path}: {error}") from None
        return {"url": signed["url"], "headers": signed["headers"] or {},
                "body": (signed["body"] or "").encode()}

    def _note(self, answer: Answer) -> Answer:
        now_ns, budget = self.server_ns(), self.budget if self._is_measured else self._early
        budget.hear(answer.headers, now_ns)
        wait_s = retry_later_s(answer, now_ns if self._is_measured else None)
        if wait_s is not None:
            budget.ban(now_ns + int(wait_s * 1e9), now_ns)
        elif error_of(answer)[0] == TOO_MANY_ORDERS:  # it counts orders alone: queries may go on
            budget.fill("orders_10s", now_ns)
        return answer

    @contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        try:
            yield
        except self._unreadable as error:
            raise ExchangeError(f"{what}: cannot be read: {error!r}"[:300], status=200) from None

    def _id(self, symbol: str) -> str:
        if symbol not in self.instruments:
            raise ExchangeError(f"{symbol}: not listed by {self._config.id}, or not loaded")
        return self.instruments[symbol].exchange_symbol


def library(name: str = TRADABLE[0]) -> Any:
    """Import a module of ccxt; a process does before its first beat: busy then, it would look stuck."""
    # Its __init__ imports a hundred exchanges, 0.4 s: a package that was not executed stands for it.
    spec = None if "ccxt" in sys.modules else importlib.util.find_spec("ccxt")
    if spec is not None:
        sys.modules["ccxt"] = importlib.util.module_from_spec(spec)
    try:
        return importlib.import_module(f"ccxt.{name}")
    finally:
        if spec is not None:
            del sys.modules["ccxt"]
