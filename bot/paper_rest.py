"""The paper exchange's REST interface: parameters, signatures, weights, and one handler per endpoint.

`answer` takes and returns plain values, so it needs no socket. Refusals are worded as Binance USD-M
words them; what cannot be parsed is a refusal too, never an error of the server.
"""

import hashlib
import hmac
import re
from collections import Counter
from collections.abc import Callable
from decimal import Decimal
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import msgspec

from bot.paper_engine import Engine
from bot.paper_model import ZERO, Algo, Fill, Income, Order, Refused
from bot.paper_shapes import (
    RATE_LIMITS,
    Json,
    account_json,
    algo_json,
    balance_json,
    brackets_json,
    income_json,
    order_json,
    position_json,
    price_text,
    qty_text,
    trade_json,
)

RECV_WINDOW_MS, RECV_WINDOW_MS_MAX, AHEAD_MS_MAX = 5_000, 60_000, 1_000
NUMBER = r"^([0-9]{1,20})(\.[0-9]{1,20})?$"
CLIENT_ID = r"^[\.A-Z\:/a-z0-9_-]{1,36}$"
CONDITIONAL = ("STOP", "STOP_MARKET", "TAKE_PROFIT", "TAKE_PROFIT_MARKET", "TRAILING_STOP_MARKET")


class Answer(NamedTuple):
    """What goes back: HTTP status, body, headers."""

    status: int
    body: bytes
    headers: dict[str, str]


class Route(NamedTuple):
    """One endpoint: its handler, its weight, who may call (none, key, signed), does it match orders."""

    handler: Callable[["Rest", str, "Params"], Any]
    weight: int = 1
    security: str = "none"
    is_order: bool = False


class Params:
    """The parameters of one request. Every reader raises Refused with the exchange's own words."""

    def __init__(self, engine: Engine, query: str, body: str) -> None:
        self.engine = engine
        self.values = dict(parse_qsl(f"{query}&{body}", keep_blank_values=True))

    def text(self, name: str, default: str | None = None, pattern: str = "") -> str:
        value = self.values.get(name) or default
        if value is None:
            raise Refused(-1102, f"Mandatory parameter '{name}' was not sent, was empty/null, or malformed.")
        if pattern and value != default and not re.fullmatch(pattern, value, re.ASCII):
            raise Refused(-1100, f"Illegal characters found in parameter '{name}'; legal range is '{pattern}'.")
        return value

    def optional(self, name: str) -> str | None:
        return self.values.get(name) or None

    def number(self, name: str, default: str | None = None) -> Decimal:
        return Decimal(self.text(name, default, NUMBER))

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.text(name, None if default is None else str(default))
        if not re.fullmatch(r"-?[0-9]{1,18}", value, re.ASCII):
            raise Refused(-1102, f"Mandatory parameter '{name}' was not sent, was empty/null, or malformed.")
        return int(value)

    def maybe(self, name: str) -> int | None:
        return self.integer(name) if self.values.get(name) else None

    def limit(self, default: int, most: int) -> int:
        value = self.integer("limit", default)
        if not 0 < value <= most:
            raise Refused(-1130, "Data sent for parameter 'limit' is not valid.")
        return value

    def flag(self, name: str) -> bool:
        value = self.text(name, "false").lower()
        if value not in ("true", "false"):
            raise Refused(-1102, f"Mandatory parameter '{name}' was not sent, was empty/null, or malformed.")
        return value == "true"

    def choice(self, name: str, choices: tuple[str, ...], code: int, text: str, default: str | None = None) -> Any:
        value = self.text(name, default)
        if value not in choices:
            raise Refused(code, text)
        return value

    def symbol(self) -> str:
        symbol = self.text("symbol")
        if symbol not in self.engine.ledger.rules:
            raise Refused(-1121, "Invalid symbol.")
        return symbol

    def symbols(self) -> list[str]:
        return [self.symbol()] if self.values.get("symbol") else list(self.engine.ledger.rules)

    def span(self) -> dict[str, int | None]:
        return {"start_ms": self.maybe("startTime"), "end_ms": self.maybe("endTime")}


class Rest:
    """All endpoints over one engine. keys: API key -> (account, secret)."""

    def __init__(self, engine: Engine, keys: dict[str, tuple[str, str]]) -> None:
        self.engine, self.keys = engine, keys
        self._used: Counter[str] = Counter()  # of the running minute and ten seconds; see _count
        self._windows: dict[str, int] = {}

    def route(self, method: str, path: str) -> Route | None:
        return ROUTES.get(f"{method} {path}")

    def answer(self, method: str, path: str, query: str, body: str, api_key: str | None) -> Answer:
        """Serve one request. query and body as they were on the wire: they are what was signed."""
        headers: dict[str, str] = {}
        try:
            route = self.route(method, path)
            if route is None:
                raise Refused(-5000, f"Path {path}, Method {method} is invalid", 404)
            headers["X-MBX-USED-WEIGHT-1M"] = str(self._count("weight", 60_000, route.weight))
            params = Params(self.engine, query, body)
            account = self._account(route, params, query, body, api_key)
            if route.is_order:
                for name, window_ms in (("10S", 10_000), ("1M", 60_000)):
                    used = self._count(f"{account} orders {name}", window_ms, 1)
                    headers[f"X-MBX-ORDER-COUNT-{name}"] = str(used)
            return Answer(200, msgspec.json.encode(route.handler(self, account, params)), headers)
        except Refused as refusal:
            return Answer(refusal.status, msgspec.json.encode({"code": refusal.code, "msg": refusal.text}), headers)

    def _count(self, name: str, window_ms: int, weight: int) -> int:
        window = self.engine.now_ms() // window_ms
        if self._windows.get(name) != window:
            self._windows[name], self._used[name] = window, 0
        self._used[name] += weight
        return self._used[name]

    def _account(self, route: Route, params: Params, query: str, body: str, api_key: str | None) -> str:
        if route.security == "none":
            return ""
        if not api_key:
            raise Refused(-2014, "API-key format invalid.", 401)
        if api_key not in self.keys:
            raise Refused(-2015, "Invalid API-key, IP, or permissions for action", 401)
        account, secret = self.keys[api_key]
        if route.security == "signed":
            sent = params.text("signature")
            signed = "".join(re.sub(r"(^|&)signature=[^&]*", "", part) for part in (query, body))
            right = hmac.new(secret.encode(), signed.encode(), hashlib.sha256).hexdigest()
            if not hmac.compare_digest(right.encode(), sent.encode()):
                raise Refused(-1022, "Signature for this request is not valid.")
            self._check_time(params)
        return account

    def _check_time(self, params: Params) -> None:
        sent, window = params.integer("timestamp"), params.integer("recvWindow", RECV_WINDOW_MS)
        if not 0 <= window <= RECV_WINDOW_MS_MAX:
            raise Refused(-1131, "recvWindow must be less than 60000")
        if sent >= self.engine.now_ms() + AHEAD_MS_MAX:
            raise Refused(-1021, "Timestamp for this request was 1000ms ahead of the server's time.")
        if self.engine.now_ms() - sent > window:
            raise Refused(-1021, "Timestamp for this request is outside of the recvWindow.")

    # Market data

    def exchange_info(self, _: str, p: Params) -> Json:
        return {"timezone": "UTC", "serverTime": self.engine.now_ms(), "futuresType": "U_MARGINED",
                "rateLimits": RATE_LIMITS, "exchangeFilters": [],
                "assets": [{"asset": "USDT", "marginAvailable": True, "autoAssetExchange": "-10000"}],
                "symbols": self.engine.market.symbols()}

    def depth(self, _: str, p: Params) -> Json:
        symbol, limit = p.symbol(), p.limit(500, 1_000)
        book, rules = self.engine.market.book(symbol), self.engine.ledger.rules[symbol]
        bids, asks = ([[price_text(price, rules), qty_text(qty, rules)] for price, qty in side[:limit]]
                      for side in (book.bids, book.asks))
        now_ms = self.engine.now_ms()
        return {"lastUpdateId": book.last_update_id, "E": now_ms, "T": now_ms, "bids": bids, "asks": asks}

    def trades(self, _: str, p: Params) -> list[Json]:
        return self.engine.market.recent_trades(p.symbol(), p.limit(500, 1_000))

    def agg_trades(self, _: str, p: Params) -> list[Json]:
        return [{"a": t["id"], "p": t["price"], "q": t["qty"], "f": t["id"], "l": t["id"], "T": t["time"],
                 "m": t["isBuyerMaker"]} for t in self.trades("", p)]

    def klines(self, _: str, p: Params) -> list[Any]:
        intervals = ("1m", "3m", "5m", "15m", "30m", "1h", "2h", "4h", "6h", "8h", "12h", "1d", "3d", "1w", "1M")
        interval = p.choice("interval", intervals, -1120, "Invalid interval.")
        return self.engine.market.klines(p.symbol(), interval, p.limit(500, 1_500), **p.span())

    def premium_index(self, _: str, p: Params) -> Any:
        market, rows = self.engine.market, []
        for symbol in p.symbols():
            rate, next_ms = market.funding(symbol)
            rows.append({"symbol": symbol, "markPrice": f"{market.mark_price(symbol):.8f}",
                         "indexPrice": f"{market.index_price(symbol):.8f}",
                         "estimatedSettlePrice": f"{market.index_price(symbol):.8f}",
                         "lastFundingRate": f"{rate:.8f}", "interestRate": "0.00010000",
                         "nextFundingTime": next_ms, "time": self.engine.now_ms()})
        return _one_or_all(p, rows)

    def book_ticker(self, _: str, p: Params) -> Any:
        rows = []
        for symbol in p.symbols():
            book, rules = self.engine.market.book(symbol), self.engine.ledger.rules[symbol]
            (bid, bid_qty), (ask, ask_qty) = (side[0] if side else (ZERO, ZERO) for side in (book.bids, book.asks))
            rows.append({"symbol": symbol, "bidPrice": price_text(bid, rules), "bidQty": qty_text(bid_qty, rules),
                         "askPrice": price_text(ask, rules), "askQty": qty_text(ask_qty, rules),
                         "time": self.engine.now_ms(), "lastUpdateId": book.last_update_id})
        return _one_or_all(p, rows)

    def price(self, _: str, p: Params) -> Any:
        market, rules = self.engine.market, self.engine.ledger.rules
        return _one_or_all(p, [{"symbol": s, "price": price_text(market.last_price(s), rules[s]),
                                "time": self.engine.now_ms()} for s in p.symbols()])

    def day(self, _: str, p: Params) -> Any:
        return _one_or_all(p, [self._day(symbol) for symbol in p.symbols()])

    def _day(self, symbol: str) -> Json:
        rows = self.engine.market.klines(symbol, "1m", 1_440)
        trades = self.engine.market.recent_trades(symbol, 1)
        first, last = Decimal(rows[0][1]), self.engine.market.last_price(symbol)
        volume, quote = sum(Decimal(row[5]) for row in rows), sum(Decimal(row[7]) for row in rows)
        last_id = trades[-1]["id"] if trades else 0
        return {"symbol": symbol, "priceChange": f"{last - first:f}", "lastPrice": f"{last:f}",
                "priceChangePercent": f"{(last - first) / first * 100:.3f}",
                "weightedAvgPrice": f"{quote / volume if volume else last:.2f}",
                "lastQty": trades[-1]["qty"] if trades else "0", "openPrice": f"{first:f}",
                "highPrice": f"{max(Decimal(row[2]) for row in rows):f}",
                "lowPrice": f"{min(Decimal(row[3]) for row in rows):f}", "volume": f"{volume:f}",
                "quoteVolume": f"{quote:f}", "openTime": rows[0][0], "closeTime": self.engine.now_ms(),
                "firstId": last_id - sum(row[8] for row in rows), "lastId": last_id,
                "count": sum(row[8] for row in rows)}

    # Account

    def positions(self, account: str, p: Params, version: int) -> list[Json]:
        ledger = self.engine.ledger
        shown = p.symbols() if version == 2 else [
            s for s in p.symbols() if ledger.position(account, s).qty or ledger.open_orders(account, s)]
        return [position_json(ledger, account, symbol, version) for symbol in shown]

    def account_config(self, account: str, p: Params) -> Json:
        return {"feeTier": 0, "canTrade": True, "canDeposit": True, "canWithdraw": True, "updateTime": 0,
                "dualSidePosition": self.engine.ledger.accounts[account].is_hedged,
                "multiAssetsMargin": False, "tradeGroupId": -1}

    def symbol_config(self, account: str, p: Params) -> list[Json]:
        ledger = self.engine.ledger
        return [{"symbol": s, "marginType": "CROSSED", "isAutoAddMargin": False,
                 "leverage": ledger.leverage(account, s),
                 "maxNotionalValue": position_json(ledger, account, s, 2)["maxNotionalValue"]} for s in p.symbols()]

    def set_dual(self, account: str, p: Params) -> Json:
        wanted = p.flag("dualSidePosition")
        ledger = self.engine.ledger
        if wanted == ledger.accounts[account].is_hedged:
            raise Refused(-4059, "No need to change position side.")
        if any(ledger.position(account, s).qty for s in ledger.rules):
            raise Refused(-4068, "Position side cannot be changed if there exists position.")
        self.engine.set_hedged(account, wanted)
        return {"code": 200, "msg": "success"}

    def set_leverage(self, account: str, p: Params) -> Json:
        symbol, leverage = p.symbol(), p.integer("leverage")
        if not 1 <= leverage <= 125:
            raise Refused(-4028, f"Leverage {leverage} is not valid")
        self.engine.set_leverage(account, symbol, leverage)
        shown = position_json(self.engine.ledger, account, symbol, 2)
        return {"symbol": symbol, "leverage": leverage, "maxNotionalValue": shown["maxNotionalValue"]}

    def set_margin_type(self, account: str, p: Params) -> Json:
        p.symbol()
        wanted = p.choice("marginType", ("CROSSED", "ISOLATED"), -1102, "Invalid marginType.")
        if wanted == "CROSSED":
            raise Refused(-4046, "No need to change margin type.")
        raise Refused(-4047, "Margin type cannot be changed if there exists open orders.")  # not supported

    def income(self, account: str, p: Params) -> list[Json]:
        rows = self.engine.store.find("income", Income, account, symbol=p.optional("symbol"),
                                      name=p.optional("incomeType"), limit=p.limit(100, 1_000), **p.span())
        return [income_json(row) for row in rows]

    def commission(self, account: str, p: Params) -> Json:
        config = self.engine.config
        return {"symbol": p.symbol(), "makerCommissionRate": str(config.maker_fee),
                "takerCommissionRate": str(config.taker_fee), "rpiCommissionRate": "0"}

    def user_trades(self, account: str, p: Params) -> list[Json]:
        symbol = p.symbol()
        rows = self.engine.store.find("fill", Fill, account, symbol=symbol, ref=p.maybe("orderId"),
                                      from_id=p.maybe("fromId"), limit=p.limit(500, 1_000), **p.span())
        return [trade_json(row, self.engine.ledger.rules[symbol]) for row in rows]

    def listen_key(self, account: str, p: Params) -> Json:
        return {"listenKey": self.engine.listen_key(account)}

    def keep_listen_key(self, account: str, p: Params) -> Json:
        if self.engine.account_of(self.engine.listen_keys.get(account, ("", 0))[0]) is None:
            raise Refused(-1125, "This listenKey does not exist.")
        return self.listen_key(account, p)

    def drop_listen_key(self, account: str, p: Params) -> Json:
        self.engine.drop_listen_key(account)
        return {}

    # Orders

    def new_order(self, account: str, p: Params) -> Json:
        symbol, side = p.symbol(), p.choice("side", ("BUY", "SELL"), -1117, "Invalid side.")
        if (type_ := p.text("type")) in CONDITIONAL:
            raise Refused(-4120, "Order type not supported for this endpoint. Please use the Algo Order API "
                                 "endpoints instead.")
        p.choice("type", ("LIMIT", "MARKET"), -1116, "Invalid orderType.")
        is_limit = type_ == "LIMIT"
        if not is_limit and p.optional("price"):
            raise Refused(-1106, "Parameter 'price' sent when not required.")
        tif = p.choice("timeInForce", ("GTC", "IOC", "FOK", "GTX"), -1115, "Invalid timeInForce.",
                       None if is_limit else "GTC")
        self._check_side(p)
        order = self.engine.place(Order(
            id=0, account=account, symbol=symbol, side=side, type=type_, tif=tif, qty=p.number("quantity"),
            client_id=p.text("newClientOrderId", self.engine.clock.token(22), CLIENT_ID),
            price=p.number("price") if is_limit else ZERO, reduce_only=p.flag("reduceOnly"), time_ms=0,
            update_ms=0))
        if p.text("newOrderRespType", "ACK") != "RESULT":
            order = msgspec.structs.replace(order, status="NEW", filled=ZERO, quote=ZERO)
        shown = order_json(order, self.engine.ledger.rules[symbol])
        del shown["time"]
        return shown

    def order(self, account: str, p: Params) -> Json:
        symbol, id_, name = p.symbol(), p.maybe("orderId"), p.optional("origClientOrderId")
        self._check_ids(id_, name, "orderId", "origClientOrderId")
        rows = self.engine.store.find("order", Order, account, symbol=symbol, id_=id_,
                                      name=None if id_ else name, limit=1)
        if not rows:
            raise Refused(-2013, "Order does not exist.")
        return order_json(rows[-1], self.engine.ledger.rules[symbol])

    def open_order(self, account: str, p: Params) -> Json:
        return order_json(self._open_order(account, p, -2013, "Order does not exist."), self._rules(p))

    def cancel_order(self, account: str, p: Params) -> Json:
        order = self._open_order(account, p, -2011, "Unknown order sent.")
        self.engine.cancel(order)
        return order_json(order, self._rules(p))

    def open_orders(self, account: str, p: Params) -> list[Json]:
        ledger = self.engine.ledger
        return [order_json(o, ledger.rules[o.symbol]) for s in p.symbols() for o in ledger.open_orders(account, s)]

    def cancel_orders(self, account: str, p: Params) -> Json:
        for order in self.engine.ledger.open_orders(account, p.symbol()):
            self.engine.cancel(order)
        return {"code": 200, "msg": "The operation of cancel all open order is done."}

    def all_orders(self, account: str, p: Params) -> list[Json]:
        rows = self.engine.store.find("order", Order, account, symbol=p.symbol(), from_id=p.maybe("orderId"),
                                      limit=p.limit(500, 1_000), **p.span())
        return [order_json(row, self._rules(p)) for row in rows]

    # Conditional orders

    def new_algo(self, account: str, p: Params) -> Json:
        p.choice("algoType", ("CONDITIONAL",), -1102, "Mandatory parameter 'algoType' was not sent, was "
                                                      "empty/null, or malformed.")
        symbol, side = p.symbol(), p.choice("side", ("BUY", "SELL"), -1117, "Invalid side.")
        type_ = p.choice("type", ("STOP_MARKET", "TAKE_PROFIT_MARKET"), -1116, "Invalid orderType.")
        working = p.choice("workingType", ("MARK_PRICE", "CONTRACT_PRICE"), -1102,
                           "Invalid workingType.", "CONTRACT_PRICE")
        tif = p.choice("timeInForce", ("GTC", "IOC", "FOK", "GTX", "GTE_GTC"), -1115, "Invalid timeInForce.", "GTC")
        self._check_side(p)
        closes, reduces = p.flag("closePosition"), p.flag("reduceOnly")
        for name in ("quantity", "reduceOnly"):
            if closes and p.optional(name):
                raise Refused(-4136 if name == "quantity" else -1106,
                              "Target strategy invalid for orderType TRAILING_STOP_MARKET,closePosition true"
                              if name == "quantity" else "Parameter 'reduceonly' sent when not required.")
        algo = self.engine.place_algo(Algo(
            id=0, account=account, symbol=symbol, side=side, type=type_, tif=tif, trigger=p.number("triggerPrice"),
            client_id=p.text("clientAlgoId", self.engine.clock.token(22), CLIENT_ID), working_type=working,
            qty=ZERO if closes else p.number("quantity"), reduce_only=reduces, close_position=closes, time_ms=0,
            update_ms=0))
        return algo_json(algo, self.engine.ledger.rules[symbol])

    def algo(self, account: str, p: Params) -> Json:
        id_, name = p.maybe("algoId"), p.optional("clientAlgoId")
        self._check_ids(id_, name, "algoId", "clientAlgoId")
        rows = self.engine.store.find("algo", Algo, account, id_=id_, name=None if id_ else name, limit=1)
        if not rows:
            raise Refused(-2013, "Order does not exist.")
        return algo_json(rows[-1], self.engine.ledger.rules[rows[-1].symbol])

    def cancel_algo(self, account: str, p: Params) -> Json:
        id_, name = p.maybe("algoId"), p.optional("clientAlgoId")
        self._check_ids(id_, name, "algoId", "clientAlgoId")
        algo = self.engine.ledger.find_algo(account, id_, name)
        if algo is None:
            raise Refused(-2011, "Unknown order sent.")
        self.engine.cancel(algo)
        return {"algoId": algo.id, "clientAlgoId": algo.client_id, "code": "200", "msg": "success"}

    def open_algos(self, account: str, p: Params) -> list[Json]:
        ledger = self.engine.ledger
        return [algo_json(a, ledger.rules[a.symbol]) for s in p.symbols() for a in ledger.open_algos(account, s)]

    def cancel_algos(self, account: str, p: Params) -> Json:
        for algo in self.engine.ledger.open_algos(account, p.symbol()):
            self.engine.cancel(algo)
        return {"code": 200, "msg": "The operation of cancel all open order is done."}

    def all_algos(self, account: str, p: Params) -> list[Json]:
        rows = self.engine.store.find("algo", Algo, account, symbol=p.symbol(), from_id=p.maybe("algoId"),
                                      limit=p.limit(500, 1_000), **p.span())
        return [algo_json(row, self._rules(p)) for row in rows]

    def _rules(self, p: Params) -> Any:
        return self.engine.ledger.rules[p.symbol()]

    def _open_order(self, account: str, p: Params, code: int, text: str) -> Order:
        id_, name = p.maybe("orderId"), p.optional("origClientOrderId")
        self._check_ids(id_, name, "orderId", "origClientOrderId")
        order = self.engine.ledger.find(account, p.symbol(), id_, name)
        if order is None:
            raise Refused(code, text)
        return order

    def _check_ids(self, id_: int | None, name: str | None, *names: str) -> None:
        if id_ is None and name is None:
            raise Refused(-1102, "Param '{}' or '{}' must be sent, but both were empty/null!".format(*names))

    def _check_side(self, p: Params) -> None:
        if p.text("positionSide", "BOTH") != "BOTH":
            raise Refused(-4061, "Order's position side does not match user's setting.")


def _one_or_all(p: Params, rows: list[Json]) -> Any:
    return rows[0] if p.values.get("symbol") else rows


def _account_route(version: int) -> Route:
    return Route(lambda r, a, p: account_json(r.engine.ledger, a, version), 5, "signed")


ROUTES: dict[str, Route] = {
    "GET /fapi/v1/ping": Route(lambda r, a, p: {}),
    "GET /fapi/v1/time": Route(lambda r, a, p: {"serverTime": r.engine.now_ms()}),
    "GET /fapi/v1/exchangeInfo": Route(Rest.exchange_info),
    "GET /fapi/v1/depth": Route(Rest.depth, 10),
    "GET /fapi/v1/trades": Route(Rest.trades, 5),
    "GET /fapi/v1/aggTrades": Route(Rest.agg_trades, 20),
    "GET /fapi/v1/klines": Route(Rest.klines, 5),
    "GET /fapi/v1/premiumIndex": Route(Rest.premium_index),
    "GET /fapi/v1/ticker/bookTicker": Route(Rest.book_ticker, 2),
    "GET /fapi/v1/ticker/price": Route(Rest.price),
    "GET /fapi/v2/ticker/price": Route(Rest.price),
    "GET /fapi/v1/ticker/24hr": Route(Rest.day),
    "GET /fapi/v2/account": _account_route(2),
    "GET /fapi/v3/account": _account_route(3),
    "GET /fapi/v2/balance": Route(lambda r, a, p: balance_json(r.engine.ledger, a), 5, "signed"),
    "GET /fapi/v3/balance": Route(lambda r, a, p: balance_json(r.engine.ledger, a), 5, "signed"),
    "GET /fapi/v2/positionRisk": Route(lambda r, a, p: r.positions(a, p, 2), 5, "signed"),
    "GET /fapi/v3/positionRisk": Route(lambda r, a, p: r.positions(a, p, 3), 5, "signed"),
    "GET /fapi/v1/accountConfig": Route(Rest.account_config, 5, "signed"),
    "GET /fapi/v1/symbolConfig": Route(Rest.symbol_config, 5, "signed"),
    "GET /fapi/v1/positionSide/dual": Route(
        lambda r, a, p: {"dualSidePosition": r.engine.ledger.accounts[a].is_hedged}, 30, "signed"),
    "POST /fapi/v1/positionSide/dual": Route(Rest.set_dual, 1, "signed"),
    "GET /fapi/v1/multiAssetsMargin": Route(lambda r, a, p: {"multiAssetsMargin": False}, 30, "signed"),
    "GET /fapi/v1/leverageBracket": Route(
        lambda r, a, p: [brackets_json(symbol) for symbol in p.symbols()], 1, "signed"),
    "POST /fapi/v1/leverage": Route(Rest.set_leverage, 1, "signed"),
    "POST /fapi/v1/marginType": Route(Rest.set_margin_type, 1, "signed"),
    "GET /fapi/v1/income": Route(Rest.income, 30, "signed"),
    "GET /fapi/v1/commissionRate": Route(Rest.commission, 20, "signed"),
    "GET /fapi/v1/userTrades": Route(Rest.user_trades, 5, "signed"),
    "POST /fapi/v1/listenKey": Route(Rest.listen_key, 1, "key"),
    "PUT /fapi/v1/listenKey": Route(Rest.keep_listen_key, 1, "key"),
    "DELETE /fapi/v1/listenKey": Route(Rest.drop_listen_key, 1, "key"),
    "POST /fapi/v1/order": Route(Rest.new_order, 0, "signed", True),
    "GET /fapi/v1/order": Route(Rest.order, 1, "signed"),
    "DELETE /fapi/v1/order": Route(Rest.cancel_order, 1, "signed"),
    "GET /fapi/v1/openOrder": Route(Rest.open_order, 1, "signed"),
    "GET /fapi/v1/openOrders": Route(Rest.open_orders, 1, "signed"),
    "DELETE /fapi/v1/allOpenOrders": Route(Rest.cancel_orders, 1, "signed"),
    "GET /fapi/v1/allOrders": Route(Rest.all_orders, 5, "signed"),
    "POST /fapi/v1/algoOrder": Route(Rest.new_algo, 0, "signed", True),
    "GET /fapi/v1/algoOrder": Route(Rest.algo, 1, "signed"),
    "DELETE /fapi/v1/algoOrder": Route(Rest.cancel_algo, 1, "signed"),
    "GET /fapi/v1/openAlgoOrders": Route(Rest.open_algos, 1, "signed"),
    "DELETE /fapi/v1/algoOpenOrders": Route(Rest.cancel_algos, 1, "signed"),
    "GET /fapi/v1/allAlgoOrders": Route(Rest.all_algos, 5, "signed"),
}
