"""The paper exchange's REST interface: parameters, signatures, time windows, weights, refusals.

`Rest.answer`, and `answer_ws` for the websocket order API, take and return plain values, so they need no
socket. Refusals are worded as Binance
USD-M words them; what cannot be parsed is a refusal too, never an error of the server.
"""

import hashlib
import hmac
import re
from collections.abc import Callable, Iterable
from decimal import Decimal
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import msgspec

from bot.paper_engine import Engine
from bot.paper_feed import Feed
from bot.paper_model import Refused, refuse_if

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

# What a parameter may look like, the code of the refusal, and what is made of it. All others: an integer.
NUMBER = (r"^([0-9]{1,20})(\.[0-9]{1,20})?$", -1100, Decimal)
NAME = (r"^[\.A-Z\:/a-z0-9_-]{1,36}$", -1100, str)
TEXT, INTEGER = (r"\S+", -1102, str), (r"-?[0-9]{1,18}", -1102, int)
FLAG = (r"(?i)true|false", -1102, lambda value: value.lower() == "true")
PARAMETERS: dict[str, tuple[str, int, Callable[[str], Any]]] = {
    "quantity": NUMBER, "price": NUMBER, "triggerPrice": NUMBER,
    "newClientOrderId": NAME, "clientAlgoId": NAME, "origClientOrderId": NAME,
    "symbol": TEXT, "pair": TEXT, "signature": TEXT, "incomeType": TEXT,
    "reduceOnly": FLAG, "closePosition": FLAG, "dualSidePosition": FLAG,
    "side": ("BUY|SELL", -1117, str), "positionSide": ("BOTH", -4061, str),
    "type": ("LIMIT|MARKET|STOP|TAKE_PROFIT|STOP_MARKET|TAKE_PROFIT_MARKET|TRAILING_STOP_MARKET", -1116, str),
    "timeInForce": ("GTC|IOC|FOK|GTX|GTE_GTC", -1115, str),
    "workingType": ("MARK_PRICE|CONTRACT_PRICE", -1102, str), "algoType": ("CONDITIONAL", -1102, str),
    "marginType": ("CROSSED|ISOLATED", -1102, str), "newOrderRespType": ("ACK|RESULT", -1102, str),
    "interval": ("1m|3m|5m|15m|30m|1h|2h|4h|6h|8h|12h|1d|3d|1w|1M", -1120, str)}


class Params:
    """The parameters of one request, and whose it is. Every reader raises Refused."""

    def __init__(self, engine: Engine, address: str, values: Iterable[tuple[str, str]]) -> None:
        self.engine, self.ledger, self.address = engine, engine.ledger, address
        self.account, self.received_ms, self.values = "", engine.now_ms(), dict(values)

    def get(self, name: str, default: Any = None) -> Any:
        """Return a parameter's value, the default when it was not sent."""
        if not (value := self.values.get(name)):
            return default
        pattern, code, convert = PARAMETERS.get(name, INTEGER)
        refuse_if((not re.fullmatch(pattern, value, re.ASCII), code, name, pattern),
                  (name in ("symbol", "pair") and value not in self.ledger.contracts, -1121))
        return convert(value)

    def __getitem__(self, name: str) -> Any:
        """Return the value of a parameter that must be sent."""
        refuse_if(((value := self.get(name)) is None, -1102, name))
        return value

    def feed(self, name: str = "symbol") -> Feed:
        return self.engine.feed(self[name])

    def limit(self, default: int, most: int) -> int:
        refuse_if((not 0 < self.get("limit", default) <= most, -1130, "limit"))
        return int(self.get("limit", default))

    def symbols(self) -> list[str]:
        """Return the symbol that was sent, or else all."""
        return [self["symbol"]] if self.values.get("symbol") else list(self.ledger.contracts)


Handler = Callable[[Params], Any]


class Answer(NamedTuple):
    """What goes back."""

    status: int
    body: bytes
    headers: dict[str, str]


class Route(NamedTuple):
    """One endpoint. security: none, key, signed; orders: what it counts in the 10 s counter.

    weight: a number, (with a symbol, without), or by `limit` {up to: weight}.
    """

    security: str
    handler: Handler
    weight: int | tuple[int, int] | dict[int, int] = 1
    orders: int = 0

    def weight_of(self, params: Params) -> int:
        if isinstance(self.weight, tuple):
            return self.weight[not params.values.get("symbol")]
        if isinstance(self.weight, dict):
            limit = params.get("limit", 500)
            return next((weight for most, weight in self.weight.items() if limit <= most), 0)
        return self.weight


class Rest:
    """Endpoints over one engine. keys: API key -> (account, secret); routes: "METHOD path" -> Route."""

    def __init__(self, engine: Engine, keys: dict[str, tuple[str, str]], routes: dict[str, Route]) -> None:
        self.engine, self.keys, self.routes = engine, keys, routes
        self._used: dict[str, tuple[int, int]] = {}  # counter -> (its window, used)
        self._banned: dict[str, int] = {}  # address -> until when

    def answer(self, request: str, query: str, body: str, api_key: str, address: str,
               received_ms: int | None = None) -> Answer:
        """Serve one request ("METHOD path"); query and body as they were on the wire, and were signed."""
        params = Params(self.engine, address, parse_qsl(f"{query}&{body}", keep_blank_values=True))
        params.received_ms = received_ms or params.received_ms
        signed = "".join(re.sub(r"(^|&)signature=[^&]*", "", part) for part in (query, body))
        status, value, headers = self._serve(request, params, signed, api_key)
        return Answer(status, msgspec.json.encode(value), headers)

    def answer_ws(self, message: str, address: str) -> bytes:
        """Serve one message of the websocket order API. Raises msgspec.MsgspecError."""
        wish = msgspec.json.decode(message, type=WsRequest)
        params = Params(self.engine, address, ((name, plain(value)) for name, value in wish.params.items()))
        signed = "&".join(f"{name}={value}" for name, value in sorted(params.values.items())
                          if name != "signature")
        route = WS_METHODS.get(wish.method, wish.method).replace(" ", " /fapi/")
        status, value, headers = self._serve(route, params, signed, params.values.get("apiKey", ""))
        return msgspec.json.encode({
            "id": wish.id, "status": status, "result" if status == 200 else "error": value, "rateLimits": [
                {**self.engine.limits.listing()[0], "count": int(headers.get("X-MBX-USED-WEIGHT-1M", 0))}]})

    def _serve(self, name: str, params: Params, signed: str, api_key: str) -> tuple[int, Any, dict[str, str]]:
        headers: dict[str, str] = {}
        try:
            if (route := self.routes.get(name)) is None:
                raise Refused(-5000, *name.partition(" ")[::-2])
            self._weigh(params.address, route.weight_of(params), headers)
            if route.security != "none":
                refuse_if((not api_key, -2014), (api_key not in self.keys, -2015))
                params.account, secret = self.keys[api_key]
                if route.security == "signed":
                    _check_signature(params, secret, signed)
            if route.orders:
                self._count_orders(params.account, route.orders, headers)
            self.engine.wake()
            value = route.handler(params)
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


class WsRequest(msgspec.Struct):
    """A message of the websocket order API."""

    method: str
    id: str | int | None = None
    params: dict[str, Any] = {}


def plain(value: Any) -> str:
    """Return a JSON value as the client had it in what it signed."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_signature(params: Params, secret: str, signed: str) -> None:
    right = hmac.new(secret.encode(), signed.encode(errors="replace"), hashlib.sha256).hexdigest()
    sent, time_ms = params["signature"].encode(errors="replace"), params["timestamp"]
    window_ms, received_ms = params.get("recvWindow", RECV_WINDOW_MS), params.received_ms
    refuse_if((not hmac.compare_digest(right.encode(), sent), -1022),
              (not 0 <= window_ms <= RECV_WINDOW_MS_MAX, -1131),
              (received_ms - time_ms > window_ms, -1021))
    if time_ms >= received_ms + AHEAD_MS_MAX:
        raise Refused(-1021, text="Timestamp for this request was 1000ms ahead of the server's time.")
