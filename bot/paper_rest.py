"""The paper exchange's REST interface: parameters, signatures, time windows, weights, refusals.

`Rest.answer` takes and returns plain values, so it needs no socket. Refusals are worded as Binance
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
from bot.paper_model import Refused, Side

RECV_WINDOW_MS, RECV_WINDOW_MS_MAX, AHEAD_MS_MAX = 5_000, 60_000, 1_000
LIMITS = [("REQUEST_WEIGHT", "MINUTE", 1, 2_400), ("ORDERS", "MINUTE", 1, 1_200),
          ("ORDERS", "SECOND", 10, 300)]

MALFORMED = "Mandatory parameter '{0}' was not sent, was empty/null, or malformed."
ILLEGAL = "Illegal characters found in parameter '{0}'; legal range is '{1}'."
NUMBER, CLIENT_ID = r"^([0-9]{1,20})(\.[0-9]{1,20})?$", r"^[\.A-Z\:/a-z0-9_-]{1,36}$"
FLAG = (r"(?i)true|false", -1102, MALFORMED)
# What each parameter may look like, and the code and words of the refusal. Others: an integer.
PARAMETERS: dict[str, tuple[str, int, str]] = {
    **dict.fromkeys(("quantity", "price", "triggerPrice"), (NUMBER, -1100, ILLEGAL)),
    **dict.fromkeys(("newClientOrderId", "clientAlgoId", "origClientOrderId"), (CLIENT_ID, -1100, ILLEGAL)),
    **dict.fromkeys(("symbol", "signature", "incomeType"), (r"\S+", -1102, MALFORMED)),
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

    def __init__(self, engine: Engine, query: str, body: str) -> None:
        self.engine, self.ledger, self.account = engine, engine.ledger, ""
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
    """One endpoint. security: none, key, signed; kind "order" counts against the order limits."""

    handler: Callable[[Params], Any]
    weight: int = 1
    security: str = "none"
    is_order: bool = False


class Rest:
    """Endpoints over one engine. keys: API key -> (account, secret); routes: "METHOD path" -> Route."""

    def __init__(self, engine: Engine, keys: dict[str, tuple[str, str]], routes: dict[str, Route]) -> None:
        self.engine, self.keys, self.routes = engine, keys, routes
        self._used: dict[str, tuple[int, int]] = {}  # counter -> (its window, used)

    def answer(self, method: str, path: str, query: str, body: str, api_key: str | None) -> Answer:
        """Serve one request. query and body as they were on the wire: they are what was signed."""
        headers: dict[str, str] = {}
        try:
            route = self.routes.get(f"{method} {path}")
            if route is None:
                raise Refused(-5000, f"Path {path}, Method {method} is invalid", 404)
            headers["X-MBX-USED-WEIGHT-1M"] = self._count("weight", 60_000, route.weight)
            params = Params(self.engine, query, body)
            if route.security != "none":
                params.account, secret = self._holder(api_key)
                if route.security == "signed":
                    self._check_signature(params, secret, query, body)
            if route.is_order:
                for name, window_ms in (("10S", 10_000), ("1M", 60_000)):
                    count = self._count(f"{params.account} {name}", window_ms, 1)
                    headers[f"X-MBX-ORDER-COUNT-{name}"] = count
            if self.engine.market.is_tradable:
                self.engine.see_prices()
            return Answer(200, msgspec.json.encode(route.handler(params)), headers)
        except Refused as refusal:
            body_ = msgspec.json.encode({"code": refusal.code, "msg": refusal.text})
            return Answer(refusal.status, body_, headers)

    def _count(self, name: str, window_ms: int, weight: int) -> str:
        window, (then, used) = self.engine.now_ms() // window_ms, self._used.get(name, (0, 0))
        self._used[name] = (window, weight + (used if window == then else 0))
        return str(self._used[name][1])

    def _holder(self, api_key: str | None) -> tuple[str, str]:
        if not api_key:
            raise Refused(-2014, "API-key format invalid.", 401)
        if api_key not in self.keys:
            raise Refused(-2015, "Invalid API-key, IP, or permissions for action", 401)
        return self.keys[api_key]

    def _check_signature(self, params: Params, secret: str, query: str, body: str) -> None:
        sent = params.text("signature")
        signed = "".join(re.sub(r"(^|&)signature=[^&]*", "", part) for part in (query, body))
        right = hmac.new(secret.encode(), signed.encode(), hashlib.sha256).hexdigest()
        if not hmac.compare_digest(right.encode(), sent.encode()):
            raise Refused(-1022, "Signature for this request is not valid.")
        time_ms, window_ms = params.integer("timestamp"), params.integer("recvWindow", RECV_WINDOW_MS)
        if not 0 <= window_ms <= RECV_WINDOW_MS_MAX:
            raise Refused(-1131, "recvWindow must be less than 60000")
        if time_ms >= self.engine.now_ms() + AHEAD_MS_MAX:
            raise Refused(-1021, "Timestamp for this request was 1000ms ahead of the server's time.")
        if self.engine.now_ms() - time_ms > window_ms:
            raise Refused(-1021, "Timestamp for this request is outside of the recvWindow.")
