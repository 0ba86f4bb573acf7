"""The paper exchange's REST interface: parameters, signatures, time windows, weights, refusals.

`Rest.answer`, and `answer_ws` for the websocket order API, take and return plain values, so they need no
socket. Refusals are worded as Binance
USD-M words them; what cannot be parsed is a refusal too, never an error of the server.
"""

import hashlib
import hmac
import re
from collections.abc import Callable
from decimal import Decimal
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import msgspec

from bot.paper_engine import Engine
from bot.paper_model import Refused, Side, refuse_if

RECV_WINDOW_MS, RECV_WINDOW_MS_MAX, AHEAD_MS_MAX = 5_000, 60_000, 1_000
PATIENCE = 10  # requests answered 429 in one minute before the address is banned, for this long:
BAN_MS = 120_000
# Websocket method -> endpoint; its parameters are the endpoint's, and apiKey.
WS_METHODS = {
    "ping": "GET v1/ping", "time": "GET v1/time", "depth": "GET v1/depth",
    "ticker.price": "GET v2/ticker/price", "ticker.book": "GET v1/ticker/bookTicker",
    "order.place": "POST v1/order", "order.status": "GET v1/order", "order.cancel": "DELETE v1/order",
    "algoOrder.place": "POST v1/algoOrder", "algoOrder.cancel": "DELETE v1/algoOrder",
    "account.position": "GET v2/positionRisk", "v2/account.position": "GET v3/positionRisk",
    "account.balance": "GET v2/balance", "v2/account.balance": "GET v3/balance",
    "account.status": "GET v2/account", "v2/account.status": "GET v3/account",
    "userDataStream.start": "POST v1/listenKey", "userDataStream.ping": "PUT v1/listenKey",
    "userDataStream.stop": "DELETE v1/listenKey"}

MALFORMED = "Mandatory parameter '{0}' was not sent, was empty/null, or malformed."
ILLEGAL = "Illegal characters found in parameter '{0}'; legal range is '{1}'."
NUMBER, CLIENT_ID = r"^([0-9]{1,20})(\.[0-9]{1,20})?$", r"^[\.A-Z\:/a-z0-9_-]{1,36}$"
FLAG = (r"(?i)true|false", -1102, MALFORMED)
# What each parameter may look like, and the code and words of the refusal. Others: an integer.
PARAMETERS: dict[str, tuple[str, int, str]] = {
    **dict.fromkeys(("quantity", "price", "triggerPrice"), (NUMBER, -1100, ILLEGAL)),
    **dict.fromkeys(("newClientOrderId", "clientAlgoId", "origClientOrderId"), (CLIENT_ID, -1100, ILLEGAL)),
    **dict.fromkeys(("symbol", "pair", "signature", "incomeType"), (r"\S+", -1102, MALFORMED)),
    **dict.fromkeys(("reduceOnly", "closePosition", "dualSidePosition"), FLAG),
    "side": ("BUY|SELL", -1117, "Invalid side."),
    "positionSide": ("BOTH", -4061, "Order's position side does not match user's setting."),
    "type": ("LIMIT|MARKET|STOP|TAKE_PROFIT|STOP_MARKET|TAKE_PROFIT_MARKET|TRAILING_STOP_MARKET", -1116,
             "Invalid orderType."),
    "timeInForce": ("GTC|IOC|FOK|GTX|GTE_GTC", -1115, "Invalid timeInForce."),
    "workingType": ("MARK_PRICE|CONTRACT_PRICE", -1102, MALFORMED),
    "algoType": ("CONDITIONAL", -1102, MALFORMED),
    "marginType": ("CROSSED|ISOLATED", -1102, MALFORMED),
    "newOrderRespType": ("ACK|RESULT", -1102, MALFORMED),
    "interval": ("1m|3m|5m|15m|30m|1h|2h|4h|6h|8h|12h|1d|3d|1w|1M", -1120, "Invalid interval."),
}


class Params:
    """The parameters of one request, and whose it is. Every reader raises Refused."""

    def __init__(self, engine: Engine, address: str, query: str = "", body: str = "") -> None:
        self.engine, self.ledger, self.address = engine, engine.ledger, address
        self.account, self.received_ms = "", engine.now_ms()
        self.values = dict(parse_qsl(f"{query}&{body}", keep_blank_values=True))

    def maybe(self, name: str) -> str | None:
        """Return a parameter that has its legal form, None when it was not sent."""
        value = self.values.get(name)
        pattern, code, text = PARAMETERS.get(name, (r"-?[0-9]{1,18}", -1102, MALFORMED))
        if value and not re.fullmatch(pattern, value, re.ASCII):
            raise Refused(code, text.format(name, pattern))
        return value or None

    def text(self, name: str, default: str | None = None) -> str:
        value = self.maybe(name) or default
        if value is None:
            raise Refused(-1102, MALFORMED.format(name))
        return value

    def number(self, name: str) -> Decimal:
        return Decimal(self.text(name))

    def integer(self, name: str, default: int | None = None) -> int:
        return int(self.text(name, None if default is None else str(default)))

    def maybe_integer(self, name: str) -> int | None:
        return None if self.maybe(name) is None else self.integer(name)

    def flag(self, name: str) -> bool:
        return self.text(name, "false").lower() == "true"

    def limit(self, default: int, most: int) -> int:
        if not 0 < (value := self.integer("limit", default)) <= most:
            raise Refused(-1130, "Data sent for parameter 'limit' is not valid.")
        return value

    def symbol(self) -> str:
        if (symbol := self.text("symbol")) not in self.ledger.rules:
            raise Refused(-1121, "Invalid symbol.")
        return symbol

    def side(self) -> Side:
        return "BUY" if self.text("side") == "BUY" else "SELL"

    def symbols(self) -> list[str]:
        return [self.symbol()] if self.maybe("symbol") else list(self.ledger.rules)


class Answer(NamedTuple):
    """What goes back."""

    status: int
    body: bytes
    headers: dict[str, str]


class Route(NamedTuple):
    """One endpoint. security: none, key, signed; orders: what it counts in the 10 s counter.

    weight: a number, (with a symbol, without), or by `limit` {up to: weight}.
    """

    handler: Callable[[Params], Any]
    weight: int | tuple[int, int] | dict[int, int] = 1
    security: str = "none"
    orders: int = 0

    def weight_of(self, params: Params) -> int:
        if isinstance(self.weight, tuple):
            return self.weight[not params.values.get("symbol")]
        if isinstance(self.weight, dict):
            limit = params.integer("limit", 500)
            return next((weight for most, weight in self.weight.items() if limit <= most), 0)
        return self.weight


class Rest:
    """Endpoints over one engine. keys: API key -> (account, secret); routes: "METHOD path" -> Route."""

    def __init__(self, engine: Engine, keys: dict[str, tuple[str, str]], routes: dict[str, Route]) -> None:
        self.engine, self.keys, self.routes = engine, keys, routes
        self._used: dict[str, tuple[int, int]] = {}  # counter -> (its window, used)
        self._banned: dict[str, int] = {}  # address -> until when

    def answer(self, method: str, path: str, query: str, body: str, api_key: str | None, address: str,
               received_ms: int | None = None) -> Answer:
        """Serve one request. query and body as they were on the wire: they are what was signed."""
        params = Params(self.engine, address, query, body)
        params.received_ms = received_ms or params.received_ms
        signed = "".join(re.sub(r"(^|&)signature=[^&]*", "", part) for part in (query, body))
        status, value, headers = self._serve(f"{method} {path}", params, signed, api_key)
        return Answer(status, msgspec.json.encode(value), headers)

    def answer_ws(self, message: str, address: str) -> bytes:
        """Serve one message of the websocket order API. Raises msgspec.MsgspecError."""
        wish = msgspec.json.decode(message, type=WsRequest)
        params = Params(self.engine, address)
        params.values = {name: _plain(value) for name, value in wish.params.items()}
        pairs = sorted((name, value) for name, value in params.values.items() if name != "signature")
        signed = "&".join(f"{name}={value}" for name, value in pairs)
        route = WS_METHODS.get(wish.method, wish.method).replace(" ", " /fapi/")
        status, value, headers = self._serve(route, params, signed, params.values.get("apiKey"))
        return msgspec.json.encode({
            "id": wish.id, "status": status, "result" if status == 200 else "error": value, "rateLimits": [
                {**self.engine.limits.listing()[0], "count": int(headers.get("X-MBX-USED-WEIGHT-1M", 0))}]})

    def _serve(self, name: str, params: Params, signed: str,
               api_key: str | None) -> tuple[int, Any, dict[str, str]]:
        headers: dict[str, str] = {}
        try:
            route = self.routes.get(name)
            if route is None:
                method, _, path = name.partition(" ")
                raise Refused(-5000, f"Path {path}, Method {method} is invalid", 404)
            self._weigh(params.address, route.weight_of(params), headers)
            if route.security != "none":
                params.account, secret = self._holder(api_key)
                if route.security == "signed":
                    self._check_signature(params, secret, signed)
            if route.orders:
                self._count_orders(params.account, route.orders, headers)
            if self.engine.market.is_tradable:
                self.engine.see_prices()
            return 200, route.handler(params), headers
        except Refused as refusal:
            return refusal.status, {"code": refusal.code, "msg": refusal.text}, headers

    def _weigh(self, address: str, weight: int, headers: dict[str, str]) -> None:
        now_ms, most = self.engine.now_ms(), self.engine.limits.weight_1m
        until_ms = max(self._banned.get(address, 0), self.engine.limits.banned_until_ms)
        if now_ms >= until_ms:
            if self._count(address, 60_000, weight, headers, "X-MBX-USED-WEIGHT-1M") <= most:
                return
            if self._count(f"{address} 429", 60_000, 1) <= PATIENCE:
                headers["Retry-After"] = str(60 - now_ms // 1_000 % 60)
                raise Refused(-1003, f"Too many requests; current limit of IP({address}) is {most} requests "
                              "per minute. Please use the websocket for live updates to avoid polling the "
                              "API.", 429)
            until_ms = self._banned[address] = now_ms + BAN_MS
        headers["Retry-After"] = str((until_ms - now_ms) // 1_000 + 1)
        raise Refused(-1003, f"Way too many requests; IP({address}) banned until {until_ms}. Please use the "
                      "websocket for live updates to avoid bans.", 418)

    def _count_orders(self, account: str, count: int, headers: dict[str, str]) -> None:
        limits, now_s = self.engine.limits, self.engine.now_ms() // 1_000
        for name, length_s, number, most, words in (("10S", 10, count, limits.orders_10s, "TEN_SECONDS"),
                                                    ("1M", 60, 1, limits.orders_1m, "MINUTE")):
            used = self._count(f"{account} {name}", length_s * 1_000, number, headers,
                               f"X-MBX-ORDER-COUNT-{name}")
            if used > most:
                headers["Retry-After"] = str(length_s - now_s % length_s)
                raise Refused(-1015, f"Too many new orders; current limit is {most} orders per {words}.", 429)

    def _count(self, name: str, window_ms: int, weight: int, headers: dict[str, str] | None = None,
               header: str = "") -> int:
        window, (then, used) = self.engine.now_ms() // window_ms, self._used.get(name, (0, 0))
        self._used[name] = (window, weight + (used if window == then else 0))
        if headers is not None:
            headers[header] = str(self._used[name][1])
        return self._used[name][1]

    def _holder(self, api_key: str | None) -> tuple[str, str]:
        if not api_key:
            raise Refused(-2014, "API-key format invalid.", 401)
        if api_key not in self.keys:
            raise Refused(-2015, "Invalid API-key, IP, or permissions for action", 401)
        return self.keys[api_key]

    def _check_signature(self, params: Params, secret: str, signed: str) -> None:
        sent = params.text("signature")
        right = hmac.new(secret.encode(), signed.encode(errors="replace"), hashlib.sha256).hexdigest()
        time_ms, window_ms = params.integer("timestamp"), params.integer("recvWindow", RECV_WINDOW_MS)
        refuse_if(
            (not hmac.compare_digest(right.encode(), sent.encode(errors="replace")), -1022,
             "Signature for this request is not valid."),
            (not 0 <= window_ms <= RECV_WINDOW_MS_MAX, -1131, "recvWindow must be less than 60000"),
            (time_ms >= params.received_ms + AHEAD_MS_MAX, -1021,
             "Timestamp for this request was 1000ms ahead of the server's time."),
            (params.received_ms - time_ms > window_ms, -1021,
             "Timestamp for this request is outside of the recvWindow."))


class WsRequest(msgspec.Struct):
    """A message of the websocket order API."""

    method: str
    id: str | int | None = None
    params: dict[str, Any] = {}


def _plain(value: Any) -> str:
    # As the client had it in what it signed.
    return str(value).lower() if isinstance(value, bool) else str(value)
