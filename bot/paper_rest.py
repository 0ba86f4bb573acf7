"""The paper exchange's REST interface and websocket order API: endpoints, rows, signatures, time windows.

Plain values in and out, no socket. What cannot be parsed is a refusal too, never an error of the server.
"""

import hashlib
import hmac
import re
from collections.abc import Callable, Iterable
from copy import copy
from decimal import Decimal
from typing import Any, NamedTuple
from urllib.parse import parse_qsl

import msgspec
from msgspec.structs import asdict, replace

from bot import paper_model as model
from bot.paper_engine import Engine
from bot.paper_feed import FUNDING_MS, FUNDING_RATE, Feed
from bot.paper_ledger import Ledger
from bot.paper_model import ZERO, Fill, Income, Json, Order, Position, Refused, refuse_if, table, worded

RECV_WINDOW_MS, RECV_WINDOW_MS_MAX, AHEAD_MS_MAX = 5_000, 60_000, 1_000
SOME_DAY_MS = 1 << 50
NAMES = {"order": ("orderId", "origClientOrderId"), "algo": ("algoId", "clientAlgoId")}
VALUES: dict[str, Callable[[str], Any]] = {
    "number": Decimal, "text": str, "integer": int, "flag": lambda value: value.lower() == "true"}
# name -> what it may look like, the code of the refusal, and what is made of it.
PARAMETERS = table("parameters", dict[str, tuple[str, int, str]])
INTEGER = "-?[0-9]{1,18}", -1102, "integer"


def row_json(row: Order | Fill | Income, ledger: Ledger, kind: str, **more: Any) -> Json:
    """Return a row about an order, a fill or an income, as REST or the user stream ("..._event") words it."""
    if isinstance(row, Income):
        more |= {"trade": str(row.trade_id or ""), "info": str(row.trade_id or row.reason)}
        return worded(kind, asdict(row) | more)
    contract = ledger.contracts[row.symbol]
    more |= {"price": contract.price(row.price), "qty": contract.qty(row.qty)}
    if isinstance(row, Fill):
        more |= {"spent": f"{row.price * row.qty:f}", "is_buyer": row.side == "BUY"}
    else:
        average = contract.price(row.spent / row.filled, 4) if row.filled else "0.00"
        more |= {"filled": contract.qty(row.filled), "trigger": contract.price(row.trigger), "nothing": None,
                 "average": average, "spent": f"{row.spent:f}", "ref": str(row.ref or "")}
    return worded(kind, asdict(row) | more)


def position_json(ledger: Ledger, name: str, symbol: str, kind: str = "position",
                  then: Position | None = None) -> Json:
    """Return a position, as it is or was then; "position" has the fields of positionRisk and account."""
    position, contract = then or ledger.position(name, symbol), ledger.contracts[symbol]
    leverage, mark = ledger.leverage(name, symbol), ledger.feeds[symbol].mark()
    entry = position.cost / position.qty if position.qty else ZERO
    notional, fee = position.qty * mark, ledger.taker_fee if position.qty > 0 else -ledger.taker_fee
    return worded(kind, {
        "symbol": symbol, "qty": contract.qty(position.qty), "entry": contract.price(entry, 3),
        # where closing as taker would bring nothing
        "break_even": contract.price(entry * (1 + fee) / (1 - fee), 3), "mark": mark,
        "profit": notional - position.cost, "notional": notional, "realized": position.realized,
        "liquidation": contract.price(ledger.liquidation_price(name, symbol), 3), "leverage": leverage,
        "leverage_text": str(leverage), "cap": str(model.notional_max(leverage)),
        "initial": abs(notional) / leverage, "maintained": model.maintenance(notional),
        "update_ms": position.update_ms})


def known_of_account(ledger: Ledger, name: str) -> Json:
    account, sums = ledger.accounts[name], ledger.sums(name)
    return {**sums, "free": max(ZERO, sums["free"]), "update_ms": account.update_ms,
            "is_hedged": account.is_hedged}


def account_json(ledger: Ledger, name: str, version: int) -> Json:
    known = known_of_account(ledger, name)
    symbols = ledger.contracts if version == 2 else ledger.held(name)
    return worded(f"account_{version}", known) | {
        "assets": [worded("asset", known)],
        "positions": [position_json(ledger, name, symbol) for symbol in symbols]}


class Answer(NamedTuple):
    """What a request is told."""

    status: int
    body: bytes
    headers: dict[str, str]


def refused(refusal: Refused, headers: dict[str, str] | None = None) -> Answer:
    return Answer(refusal.status, msgspec.json.encode(refusal.body), headers or {})


class Request:
    """One request ("METHOD path"), whose it is, and what each endpoint makes of it. All raise Refused.

    signed: its parameters as they were on the wire, without the signature. seen_ms: a fault, queries do not
    see orders and fills that are younger.
    """

    def __init__(self, engine: Engine, name: str, values: Iterable[tuple[str, str]], signed: str, key: str,
                 address: str) -> None:
        self.engine, self.ledger, self.received_ms = engine, engine.ledger, engine.now_ms()
        self.name, self.values, self.signed, self.key = name, dict(values), signed, key
        self.address, self.account, self.seen_ms = address, "", SOME_DAY_MS

    def get(self, name: str, default: Any = None) -> Any:
        """Return a parameter's value, the default when it was not sent."""
        if not (value := self.values.get(name)):
            return default
        pattern, code, kind = PARAMETERS.get(name, INTEGER)
        refuse_if((not re.fullmatch(pattern, value, re.ASCII), code, name, pattern),
                  (name in ("symbol", "pair") and value not in self.ledger.contracts, -1121))
        return VALUES[kind](value)

    def __getitem__(self, name: str) -> Any:
        """Return the value of a parameter that must be sent."""
        refuse_if(((value := self.get(name)) is None, -1102, name))
        return value

    def limit(self, default: int, most: int) -> int:
        refuse_if((not 0 < self.get("limit", default) <= most, -1130, "limit"))
        return int(self.get("limit", default))

    def symbols(self) -> list[str]:
        """Return the symbol that was sent, or else all."""
        return [self["symbol"]] if self.values.get("symbol") else list(self.ledger.contracts)

    # The market

    def depth(self) -> Json:
        symbol, limit = self["symbol"], self.get("limit", 500)
        refuse_if((limit not in (5, 10, 20, 50, 100, 500, 1_000), -4021))
        (bids, asks, id_), now_ms = self.engine.feeds[symbol].shown(limit), self.engine.now_ms()
        return {"lastUpdateId": id_, "E": now_ms, "T": now_ms, "bids": bids, "asks": asks}

    def trades(self) -> list[Json]:
        """Return public trades: from an id or a time on, or else the newest."""
        from_id, start_ms, limit = self.get("fromId", 0), self.get("startTime", 0), self.limit(500, 1_000)
        feed, end_ms = self.engine.feeds[self["symbol"]], self.get("endTime", SOME_DAY_MS)
        found = [t for t in feed.trades if t.trade_id >= from_id and start_ms <= t.time_ms <= end_ms]
        return feed.listed(found[:limit] if from_id or start_ms else found[-limit:])

    def funding_rates(self) -> list[Json]:
        feed, symbol = self.engine.feeds[self["symbol"]], self["symbol"]
        return [{"symbol": symbol, "fundingRate": f"{FUNDING_RATE:.8f}", "markPrice": f"{feed.mark():.8f}",
                 "fundingTime": feed.funding_ms() - back * FUNDING_MS, "rateType": "Regular"}
                for back in range(self.limit(100, 1_000), 0, -1)]

    def book_ticker(self, feed: Feed) -> Json:
        *sides, update_id = feed.shown(1)
        (bid, bid_qty), (ask, ask_qty) = (side[0] if side else ("0", "0") for side in sides)
        return {"symbol": feed.contract.symbol, "bidPrice": bid, "bidQty": bid_qty, "askPrice": ask,
                "askQty": ask_qty, "time": self.engine.now_ms(), "lastUpdateId": update_id}

    # The account

    def positions(self, version: int) -> list[Json]:
        return [position_json(self.ledger, self.account, symbol) for symbol in self.symbols()
                if version == 2 or self.ledger.position(self.account, symbol).qty
                or self.ledger.mine(self.account, "order", symbol)]

    def set_mode(self) -> None:
        account, wanted = self.ledger.accounts[self.account], self["dualSidePosition"]
        refuse_if(
            (wanted == account.is_hedged, -4059), (self.ledger.held(self.account), -4068),
            (any(order.account == self.account for order in self.ledger.open.values()), -4067))
        account.is_hedged = wanted
        self.engine.to_keep["accounts"] = self.ledger.accounts

    def set_leverage(self) -> Json:
        self.ledger.set_leverage(self.account, self["symbol"], self["leverage"])
        return position_json(self.ledger, self.account, self["symbol"], "leverage")

    def history(self, kind: str) -> list[Json]:
        """Return what the store keeps, by the filters the request has."""
        is_income = kind == "income"
        tests = {"symbol =": self.get("symbol") if is_income else self["symbol"],
                 "name =": self.get("incomeType") if is_income else None,
                 "ref =": self.get("orderId") if kind == "fill" else None,
                 "id >=": self.get({"order": "orderId", "algo": "algoId"}.get(kind, "fromId")),
                 "time_ms >=": self.get("startTime"),
                 "time_ms <=": min(self.get("endTime", SOME_DAY_MS), self.seen_ms)}
        limit = self.limit(100 if is_income else 500, 1_000)
        return [row_json(row, self.ledger, "past_order" if kind == "order" else kind)
                for row in self.engine.store.find(kind, self.account, tests, limit)]

    # Orders

    def new_order(self) -> Json:
        symbol, is_limit = self["symbol"], self["type"] == "LIMIT"
        refuse_if((self["type"] not in ("LIMIT", "MARKET"), -4120),
                  (not is_limit and self.get("price"), -1106, "price"))
        self.get("positionSide")
        kind = "order_result" if self.get("newOrderRespType") == "RESULT" else "order_ack"
        return row_json(self.engine.place(Order(
            account=self.account, symbol=symbol, side=self["side"], type=self["type"], qty=self["quantity"],
            tif=self["timeInForce"] if is_limit else self.get("timeInForce", "GTC"),
            price=self["price"] if is_limit else ZERO, reduce_only=self.get("reduceOnly", False),
            client_id=self.get("newClientOrderId") or self.engine.clock.token(22))), self.ledger, kind)

    def new_algo(self) -> Json:
        symbol, closes, _ = self["symbol"], self.get("closePosition", False), self["algoType"]
        refuse_if((self["type"] not in ("STOP_MARKET", "TAKE_PROFIT_MARKET"), -1116),
                  *((closes and self.get(name), -1106, name) for name in ("quantity", "reduceOnly")))
        self.get("positionSide")
        return row_json(self.engine.place(Order(
            kind="algo", account=self.account, symbol=symbol, side=self["side"], type=self["type"],
            trigger=self["triggerPrice"], qty=ZERO if closes else self["quantity"],
            tif=self.get("timeInForce", "GTC"), reduce_only=self.get("reduceOnly", False),
            close_position=closes, working_type=self.get("workingType", "CONTRACT_PRICE"),
            client_id=self.get("clientAlgoId") or self.engine.clock.token(22))), self.ledger, "algo")

    def named(self, kind: str, code: int, *, is_open: bool = True) -> Order:
        """Return the newest order with the id or else the client id that is sent, or refuse with the code."""
        (id_, id_name), (client_id, client_name) = ((self.get(name), name) for name in NAMES[kind])
        if id_ is None and client_id is None:
            raise Refused(-1102, text=f"Param '{client_name}' or '{id_name}' must be sent, but both were "
                                      "empty/null!")
        found = self.engine.store.find(kind, self.account, {
            "symbol =": self["symbol"] if kind == "order" else None, "id =": id_,
            "name =": client_id if id_ is None else None, "time_ms <=": self.seen_ms}, 1)
        refuse_if((not found or (is_open and found[0].id not in self.ledger.open), code))
        return self.ledger.open.get(found[0].id) or found[0]

    def list_open(self, kind: str) -> list[Json]:
        return [row_json(order, self.ledger, kind) for symbol in self.symbols()
                for order in self.ledger.mine(self.account, kind, symbol)
                if order.time_ms <= self.seen_ms]

    def cancel(self, kind: str) -> Json:
        order = self.named(kind, -2011)
        self.ledger.cancel(order)
        return row_json(order, self.ledger, "canceled_algo" if kind == "algo" else kind)

    def one_of(self, wish: Json, action: Callable[["Request"], Json]) -> Json:
        """Answer one of a few requests in one for itself."""
        one = copy(self)
        one.values = {name: plain(value) for name, value in wish.items()}
        try:
            return action(one)
        except Refused as refusal:
            return refusal.body

    def listed(self, name: str, type_: Any, most: int) -> Any:
        """Return a parameter that is a JSON list; ccxt writes its name in small letters."""
        text = self.values.get(name) or self.values.get(name.lower()) or "[]"
        try:
            found = msgspec.json.decode(text, type=type_)
        except msgspec.MsgspecError:
            raise Refused(-1130, name) from None
        refuse_if((len(found) > most, -4082))
        return found

    def new_orders(self) -> list[Json]:
        wishes = self.listed("batchOrders", list[dict[str, str | int | float | bool]], 5)
        return [self.one_of(wish, Request.new_order) for wish in wishes]

    def cancel_orders(self) -> list[Json]:
        wishes = [{"symbol": self["symbol"], key: value} for name, key, type_ in (
            ("orderIdList", "orderId", list[int]), ("origClientOrderIdList", "origClientOrderId", list[str]))
            for value in self.listed(name, type_, 10)]
        return [self.one_of(wish, lambda one: one.cancel("order")) for wish in wishes]

    def count_down(self) -> Json:
        refuse_if((self["countdownTime"] < 0, -1130, "countdownTime"))
        self.engine.count_down(self.account, self["symbol"], self["countdownTime"])
        return {"symbol": self["symbol"], "countdownTime": str(self["countdownTime"])}


# The answers that are one expression, by paper.toml's name for them; the others are Request's methods.
ANSWERS: dict[str, Callable[..., Any]] = {
    "time": lambda r: {"serverTime": r.engine.now_ms()},
    "exchange_info": lambda r: worded("exchange_info", {
        "time_ms": r.engine.now_ms(), "limits": r.engine.limiter.limits.listing(),
        "symbols": [c.listing() for c in r.ledger.contracts.values() if c.status != "CLOSE"]}),
    "agg_trades": lambda r: [worded("agg_trade", row) for row in r.trades()],
    "klines": lambda r, name: r.engine.feeds[r[name]].klines(
        r["interval"], r.limit(500, 1_500), r.get("startTime"), r.get("endTime")),
    "premium_index": lambda r, feed: worded("premium_index", {
        "symbol": feed.contract.symbol, "mark": feed.mark(), "index": feed.index(), "rate": FUNDING_RATE,
        "funding_ms": feed.funding_ms(), "time_ms": r.engine.now_ms()}),
    "ticker": lambda r, feed: feed.ticker(),
    "price": lambda r, feed: {
        "symbol": feed.contract.symbol, "price": f"{feed.last():f}", "time": r.engine.now_ms()},
    "open_interest": lambda r: {"symbol": r["symbol"], "openInterest": "0.000", "time": r.engine.now_ms()},
    "account": lambda r, version: account_json(r.ledger, r.account, version),
    "balance": lambda r: [worded("balance", known_of_account(r.ledger, r.account))],
    "account_config": lambda r: worded("account_config", known_of_account(r.ledger, r.account)),
    "mode": lambda r: {"dualSidePosition": r.ledger.accounts[r.account].is_hedged},
    "symbol_config": lambda r, symbol: position_json(r.ledger, r.account, symbol, "symbol_config"),
    "order_limits": lambda r: r.engine.limiter.limits.listing()[1:],
    "brackets": lambda r, symbol: {"symbol": symbol, "brackets": table("brackets", list[Json])},
    "commission": lambda r: {
        "symbol": r["symbol"], "makerCommissionRate": str(r.ledger.maker_fee),
        "takerCommissionRate": str(r.ledger.taker_fee), "rpiCommissionRate": "0"},
    "set_margin_type": lambda r: refuse_if(  # cross only here
        (r["marginType"] == "CROSSED", -4046), (r["symbol"] in r.ledger.held(r.account), -4048),
        (True, -4047)),
    "query": lambda r, kind: row_json(r.named(kind, -2013, is_open=False), r.ledger, kind),
    "query_open": lambda r, kind: row_json(r.named(kind, -2013), r.ledger, kind),
    "listen_key": lambda r: {"listenKey": r.engine.listen_key(r.account)},
    "keep_listen_key": lambda r: {"listenKey": r.engine.listen_key(r.account, is_new=False)},
    "drop_listen_key": lambda r: r.engine.drop_listen_key(r.account),
    "cancel_all": lambda r, kind: r.ledger.cancel_all(r.account, r["symbol"], (kind,))}


class Route(msgspec.Struct, forbid_unknown_fields=True):
    """One endpoint; paper.toml says what the fields mean. security: none, key, signed."""

    do: str = ""
    each: str = ""
    every: str = ""
    says: Any = None
    of: Any = None
    weight: int | tuple[int, int] | dict[int, int] = 1
    orders: int = 0
    ws: list[str] = []
    security: str = "none"

    def weight_of(self, request: Request) -> int:
        if isinstance(self.weight, tuple):
            return self.weight[not request.values.get("symbol")]
        if isinstance(self.weight, dict):
            limit = request.get("limit", 500)
            return next((weight for most, weight in self.weight.items() if limit <= most), 0)
        return self.weight

    def answer(self, request: Request) -> Any:
        def made(name: str, *of: Any) -> Any:
            return (ANSWERS.get(name) or getattr(Request, name))(request, *of)

        if self.each:
            rows = [made(self.each, request.engine.feeds[symbol]) for symbol in request.symbols()]
            return rows[0] if request.get("symbol") else rows
        if self.every:
            return [made(self.every, symbol) for symbol in request.symbols()]
        said = made(self.do, *filter(None, [self.of])) if self.do else None
        return said if self.says is None else self.says


# By "METHOD path", and their names by those of the websocket order API.
ROUTES = {name: replace(route, security=security)
          for security, routes in table("routes", dict[str, dict[str, Route]]).items()
          for name, route in routes.items()}
WS_METHODS = {method: name for name, route in ROUTES.items() for method in route.ws}


class WsRequest(msgspec.Struct):
    method: str
    id: str | int | None = None
    params: dict[str, Any] = {}


class Rest:
    """Endpoints over one engine. keys: API key -> (account, secret)."""

    def __init__(self, engine: Engine, keys: dict[str, tuple[str, str]]) -> None:
        self.engine, self.keys = engine, keys

    def over_http(self, name: str, query: str, body: str, key: str, address: str) -> Request:
        """Return the request; query and body as they were on the wire."""
        signed = "".join(re.sub(r"(^|&)signature=[^&]*", "", part) for part in (query, body))
        values = parse_qsl(f"{body}&{query}", keep_blank_values=True)
        return Request(self.engine, name, values, signed, key, address)

    def over_ws(self, wish: WsRequest, address: str) -> Request:
        values = {name: plain(value) for name, value in wish.params.items()}
        signed = "&".join(f"{name}={value}" for name, value in sorted(values.items()) if name != "signature")
        name = WS_METHODS.get(wish.method, f"{wish.method} ")
        return Request(self.engine, name, values.items(), signed, values.get("apiKey", ""), address)

    def told_ws(self, wish: WsRequest, answer: Answer) -> bytes:
        """Return an answer as the websocket order API words it."""
        limit = self.engine.limiter.limits.listing()[0]
        return msgspec.json.encode({
            "id": wish.id, "status": answer.status,
            "result" if answer.status == 200 else "error": msgspec.Raw(answer.body or b"null"),
            "rateLimits": [{**limit, "count": int(answer.headers.get("X-MBX-USED-WEIGHT-1M", 0))}]})

    def serve(self, request: Request) -> Answer:
        headers, limiter = dict[str, str](), self.engine.limiter
        try:
            if (route := ROUTES.get(request.name)) is None:
                raise Refused(-5000, *request.name.partition(" ")[::-2])
            limiter.weigh(request.address, route.weight_of(request), headers)
            if route.security != "none":
                refuse_if((not request.key, -2014), (request.key not in self.keys, -2015))
                request.account, secret = self.keys[request.key]
                if route.security == "signed":
                    _check_signature(request, secret)
            if route.orders:
                limiter.count_orders(request.account, route.orders, headers)
            self.engine.wake()
            value = route.answer(request)
            self.engine.commit()
            return Answer(200, msgspec.json.encode(value), headers)
        except Refused as refusal:
            return refused(refusal, headers)


def _check_signature(request: Request, secret: str) -> None:
    right = hmac.new(secret.encode(), request.signed.encode(errors="replace"), hashlib.sha256).hexdigest()
    sent, time_ms = request["signature"].lower().encode(errors="replace"), request["timestamp"]
    window_ms, received_ms = request.get("recvWindow", RECV_WINDOW_MS), request.received_ms
    refuse_if((not hmac.compare_digest(right.encode(), sent), -1022),
              (not 0 <= window_ms <= RECV_WINDOW_MS_MAX, -1131),
              (received_ms - time_ms > window_ms, -1021))
    if time_ms >= received_ms + AHEAD_MS_MAX:
        raise Refused(-1021, text="Timestamp for this request was 1000ms ahead of the server's time.")


def plain(value: Any) -> str:
    """Return a JSON value as the client had it in what it signed."""
    return str(value).lower() if isinstance(value, bool) else str(value)
