"""The paper exchange's REST interface and websocket order API: routes, signatures, time windows, weights.

Plain values in and out, no socket. What cannot be parsed is a refusal too, never an error of the server.
"""

import hashlib
import hmac
import re
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import msgspec

from bot import paper_shapes as shapes
from bot.paper_endpoints import Request, plain
from bot.paper_engine import Engine
from bot.paper_model import Refused, refuse_if
from bot.paper_shapes import Json

RECV_WINDOW_MS, RECV_WINDOW_MS_MAX, AHEAD_MS_MAX = 5_000, 60_000, 1_000
PATIENCE = 10  # requests answered 429 in one minute before the address is banned, for this long:
BAN_MS = 120_000
Handler = Callable[[Request], Any]
Answer = tuple[int, bytes, dict[str, str]]  # status, body, headers


class Route(NamedTuple):
    """One endpoint. security: none, key, signed; orders: what it counts in the 10 s counter.

    weight: a number, (with a symbol, without), or by `limit` {up to: weight}.
    """

    security: str
    handler: Handler
    weight: int | tuple[int, int] | dict[int, int] = 1
    orders: int = 0

    def weight_of(self, request: Request) -> int:
        if isinstance(self.weight, tuple):
            return self.weight[not request.values.get("symbol")]
        if isinstance(self.weight, dict):
            limit = request.get("limit", 500)
            return next((weight for most, weight in self.weight.items() if limit <= most), 0)
        return self.weight


def each(row: Callable[[Request, str], Json], *, is_list: bool = False) -> Handler:
    """Make an endpoint of a row: one symbol's row, or without a symbol (or is_list) the list of all."""
    def endpoint(request: Request) -> Any:
        rows = [row(request, symbol) for symbol in request.symbols()]
        return rows[0] if request.get("symbol") and not is_list else rows
    return endpoint


def fixed(value: Any) -> Handler:
    """Make an endpoint that always says the same."""
    return lambda request: value


R, BY_LIMIT = Request, {99: 1, 499: 2, 1_000: 5, 1_500: 10}  # weights of candles
RIGHTS = {"ipRestrict": True, "createTime": 0, "enableReading": True, "enableFutures": True} | dict.fromkeys((
    "enableWithdrawals", "enableInternalTransfer", "permitsUniversalTransfer", "enableSpotAndMarginTrading",
    "enableMargin", "enableVanillaOptions", "enablePortfolioMarginTrading"), False)
PUBLIC: dict[str, tuple[Any, ...]] = {  # endpoint -> handler, weight (1), orders
    "GET v1/ping": (fixed({}),), "GET v1/time": (lambda r: {"serverTime": r.engine.now_ms()},),
    "GET v1/exchangeInfo": (R.exchange_info,), "GET v1/depth": (R.depth, {50: 2, 100: 5, 500: 10, 1_000: 20}),
    "GET v1/trades": (R.trades, 5), "GET v1/historicalTrades": (R.trades, 20),
    "GET v1/aggTrades": (R.agg_trades, 20),
    **{f"GET v1/{name}": (partial(R.klines, name=key), BY_LIMIT) for name, key in (
        ("klines", "symbol"), ("continuousKlines", "pair"), ("markPriceKlines", "symbol"),
        ("indexPriceKlines", "pair"))},
    "GET v1/ticker/24hr": (each(lambda r, symbol: r.engine.feed(symbol).ticker()), (1, 40)),
    "GET v1/premiumIndex": (each(R.premium_index), (1, 10)),
    "GET v1/fundingRate": (R.funding_rates, 0), "GET v1/fundingInfo": (fixed([]), 0),
    **{f"GET v{version}/ticker/price": (each(lambda r, symbol: {
        "symbol": symbol, "price": f"{r.engine.feed(symbol).last():f}", "time": r.engine.now_ms()}), (1, 2))
       for version in (1, 2)},
    "GET v1/ticker/bookTicker": (each(R.book_ticker), (2, 5)),
    "GET v1/openInterest": (lambda r: {"symbol": r["symbol"], "openInterest": "0.000",
                                       "time": r.engine.now_ms()},)}
KEYED: dict[str, tuple[Any, ...]] = {
    "POST v1/listenKey": (R.listen_key,), "PUT v1/listenKey": (partial(R.listen_key, is_kept=True),),
    "DELETE v1/listenKey": (lambda r: r.engine.drop_listen_key(r.account) or {},)}
SIGNED: dict[str, tuple[Any, ...]] = {
    "GET v2/account": (lambda r: shapes.account_json(r.ledger, r.account, 2), 5),
    "GET v3/account": (lambda r: shapes.account_json(r.ledger, r.account, 3), 5),
    **{f"GET v{version}/balance": (lambda r: shapes.balance_json(r.ledger, r.account), 5)
       for version in (2, 3)},
    **{f"GET v{version}/positionRisk": (partial(R.positions, version=version), 5) for version in (2, 3)},
    "GET v1/accountConfig": (lambda r: shapes.ACCOUNT | r.mode(), 5),
    "GET v1/symbolConfig": (each(R.symbol_config, is_list=True), 5),
    "GET v1/positionSide/dual": (R.mode, 30), "POST v1/positionSide/dual": (R.set_dual,),
    "GET v1/multiAssetsMargin": (fixed({"multiAssetsMargin": False}), 30),
    "GET v1/leverageBracket": (each(lambda r, symbol: shapes.brackets_json(symbol), is_list=True),),
    "POST v1/leverage": (R.set_leverage,), "POST v1/marginType": (R.set_margin_type,),
    "GET v1/commissionRate": (R.commission, 20),
    "GET v1/rateLimit/order": (lambda r: r.engine.limits.listing()[1:],),
    "GET v1/income": (partial(R.history, kind="income", limit=100), 30),
    "GET v1/userTrades": (partial(R.history, kind="fill"), 5),
    "GET v1/openOrder": (partial(R.query, kind="order", is_open=True),),
    "POST v1/order": (R.new_order, 0, 1), "POST v1/algoOrder": (R.new_algo, 0, 1),
    "POST v1/batchOrders": (R.new_orders, 0, 5), "DELETE v1/batchOrders": (R.cancel_orders,),
    "POST v1/countdownCancelAll": (R.count_down, 10)}
for kind, one, opened, all_of, every in (("order", "order", "openOrders", "allOpenOrders", "allOrders"),
                                         ("algo", "algoOrder", "openAlgoOrders", "algoOpenOrders",
                                          "allAlgoOrders")):
    SIGNED |= {
        f"GET v1/{one}": (partial(R.query, kind=kind),), f"DELETE v1/{one}": (partial(R.cancel, kind=kind),),
        f"GET v1/{opened}": (partial(R.list_open, kind=kind), (1, 40)),
        f"DELETE v1/{all_of}": (partial(R.cancel_all, kind=kind),),
        f"GET v1/{every}": (partial(R.history, kind=kind), 5)}
ROUTES = {
    **{name.replace(" ", " /fapi/"): Route(security, *row) for security, table in (
        ("none", PUBLIC), ("key", KEYED), ("signed", SIGNED)) for name, row in table.items()},
    "GET /sapi/v1/account/apiRestrictions": Route("signed", fixed(RIGHTS)),
    # What ccxt asks of the spot side when it loads markets with a key.
    "GET /sapi/v1/capital/config/getall": Route("signed", fixed([]), 10),
    "GET /sapi/v1/margin/allPairs": Route("key", fixed([])),
    "GET /sapi/v1/margin/isolated/allPairs": Route("signed", fixed([]), 10)}
# Websocket method -> endpoint; its parameters are the endpoint's, and apiKey.
WS_METHODS = {
    "ping": "GET v1/ping", "time": "GET v1/time", "depth": "GET v1/depth",
    "ticker.price": "GET v2/ticker/price", "ticker.book": "GET v1/ticker/bookTicker",
    "order.place": "POST v1/order", "order.status": "GET v1/order", "order.cancel": "DELETE v1/order",
    "algoOrder.place": "POST v1/algoOrder", "algoOrder.cancel": "DELETE v1/algoOrder",
    **{f"{prefix}account.{name}": f"GET v{version}/{path}" for prefix, version in (("", 2), ("v2/", 3))
       for name, path in (("position", "positionRisk"), ("balance", "balance"), ("status", "account"))},
    "userDataStream.start": "POST v1/listenKey", "userDataStream.ping": "PUT v1/listenKey",
    "userDataStream.stop": "DELETE v1/listenKey"}


class WsRequest(msgspec.Struct):
    """A message of the websocket order API."""

    method: str
    id: str | int | None = None
    params: dict[str, Any] = {}


class Rest:
    """Endpoints over one engine. keys: API key -> (account, secret)."""

    def __init__(self, engine: Engine, keys: dict[str, tuple[str, str]]) -> None:
        self.engine, self.keys = engine, keys
        self._used: dict[str, tuple[int, int]] = {}  # counter -> (its window, used)
        self._banned: dict[str, int] = {}  # address -> until when

    def answer(self, name: str, query: str, body: str, api_key: str, address: str,
               received_ms: int | None = None) -> Answer:
        """Serve one request ("METHOD path"); query and body as they were on the wire, and were signed."""
        request = Request(self.engine, address, parse_qsl(f"{query}&{body}", keep_blank_values=True))
        request.received_ms = received_ms or request.received_ms
        signed = "".join(re.sub(r"(^|&)signature=[^&]*", "", part) for part in (query, body))
        status, value, headers = self._serve(name, request, signed, api_key)
        return status, msgspec.json.encode(value), headers

    def answer_ws(self, message: str, address: str) -> bytes:
        """Serve one message of the websocket order API. Raises msgspec.MsgspecError."""
        wish = msgspec.json.decode(message, type=WsRequest)
        request = Request(self.engine, address, ((name, plain(value)) for name, value in wish.params.items()))
        signed = "&".join(f"{name}={value}" for name, value in sorted(request.values.items())
                          if name != "signature")
        route = WS_METHODS.get(wish.method, wish.method).replace(" ", " /fapi/")
        status, value, headers = self._serve(route, request, signed, request.values.get("apiKey", ""))
        return msgspec.json.encode({
            "id": wish.id, "status": status, "result" if status == 200 else "error": value, "rateLimits": [
                {**self.engine.limits.listing()[0], "count": int(headers.get("X-MBX-USED-WEIGHT-1M", 0))}]})

    def _serve(self, name: str, request: Request, signed: str, key: str) -> tuple[int, Any, dict[str, str]]:
        headers: dict[str, str] = {}
        try:
            if (route := ROUTES.get(name)) is None:
                raise Refused(-5000, *name.partition(" ")[::-2])
            self._weigh(request.address, route.weight_of(request), headers)
            if route.security != "none":
                refuse_if((not key, -2014), (key not in self.keys, -2015))
                request.account, secret = self.keys[key]
                if route.security == "signed":
                    _check_signature(request, secret, signed)
            if route.orders:
                self._count_orders(request.account, route.orders, headers)
            self.engine.wake()
            value = route.handler(request)
            self.engine.commit()
            return 200, value, headers
        except Refused as refusal:
            return refusal.status, refusal.body, headers

    def _weigh(self, address: str, weight: int, headers: dict[str, str]) -> None:
        now_ms, most = self.engine.now_ms(), self.engine.limits.weight_1m
        until_ms = max(self._banned.get(address, 0), self.engine.limits.banned_until_ms)
        if now_ms >= until_ms:
            if self._count(address, 60, weight, headers, "X-MBX-USED-WEIGHT-1M") <= most:
                return
            headers["Retry-After"] = str(60 - now_ms // 1_000 % 60)
            refuse_if((self._count(f"{address} 429", 60, 1, {}) <= PATIENCE, -1003, address, most))
            until_ms = self._banned[address] = now_ms + BAN_MS
        headers["Retry-After"] = str((until_ms - now_ms) // 1_000 + 1)
        raise Refused(-1003, status=418, text=f"Way too many requests; IP({address}) banned until "
                      f"{until_ms}. Please use the websocket for live updates to avoid bans.")

    def _count_orders(self, account: str, count: int, headers: dict[str, str]) -> None:
        limits, now_s = self.engine.limits, self.engine.now_ms() // 1_000
        for name, length_s, number, most, words in (("10S", 10, count, limits.orders_10s, "TEN_SECONDS"),
                                                    ("1M", 60, 1, limits.orders_1m, "MINUTE")):
            header = f"X-MBX-ORDER-COUNT-{name}"
            if self._count(f"{account} {header}", length_s, number, headers, header) > most:
                headers["Retry-After"] = str(length_s - now_s % length_s)
                raise Refused(-1015, most, words)

    def _count(self, name: str, window_s: int, weight: int, headers: dict[str, str], header: str = "") -> int:
        window, (then, used) = self.engine.now_ms() // 1_000 // window_s, self._used.get(name, (0, 0))
        self._used[name] = (window, weight + (used if window == then else 0))
        if header:
            headers[header] = str(self._used[name][1])
        return self._used[name][1]


def _check_signature(request: Request, secret: str, signed: str) -> None:
    right = hmac.new(secret.encode(), signed.encode(errors="replace"), hashlib.sha256).hexdigest()
    sent, time_ms = request["signature"].encode(errors="replace"), request["timestamp"]
    window_ms, received_ms = request.get("recvWindow", RECV_WINDOW_MS), request.received_ms
    refuse_if((not hmac.compare_digest(right.encode(), sent), -1022),
              (not 0 <= window_ms <= RECV_WINDOW_MS_MAX, -1131),
              (received_ms - time_ms > window_ms, -1021))
    if time_ms >= received_ms + AHEAD_MS_MAX:
        raise Refused(-1021, text="Timestamp for this request was 1000ms ahead of the server's time.")
