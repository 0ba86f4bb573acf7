"""The paper exchange's endpoints: a method each, from a request's parameters to Binance USD-M's JSON."""

import re
from collections.abc import Callable, Iterable
from copy import copy
from decimal import Decimal
from typing import Any

import msgspec

from bot import paper_shapes as shapes
from bot.paper_engine import Engine
from bot.paper_feed import FUNDING_MS, FUNDING_RATE, Feed
from bot.paper_model import ZERO, Order, Refused, refuse_if
from bot.paper_shapes import Json, row_json

SOME_DAY_MS = 1 << 50
NAMES = {"order": ("orderId", "origClientOrderId"), "algo": ("algoId", "clientAlgoId")}
# What a parameter may look like, the code of the refusal, and what is made of it. All others: an integer.
NUMBER = (r"^([0-9]{1,20})(\.[0-9]{1,20})?$", -1100, Decimal)
NAME = (r"^[\.A-Z\:/a-z0-9_-]{1,36}$", -1100, str)
TEXT, INTEGER = (r"\S+", -1102, str), (r"-?[0-9]{1,18}", -1102, int)
FLAG = (r"(?i)true|false", -1102, lambda value: value.lower() == "true")
PARAMETERS: dict[str, tuple[str, int, Callable[[str], Any]]] = {
    **dict.fromkeys(("quantity", "price", "triggerPrice"), NUMBER),
    **dict.fromkeys(("newClientOrderId", "clientAlgoId", "origClientOrderId"), NAME),
    **dict.fromkeys(("symbol", "pair", "signature", "incomeType"), TEXT),
    **dict.fromkeys(("reduceOnly", "closePosition", "dualSidePosition"), FLAG),
    "side": ("BUY|SELL", -1117, str), "positionSide": ("BOTH", -4061, str),
    "type": ("LIMIT|MARKET|STOP|TAKE_PROFIT|STOP_MARKET|TAKE_PROFIT_MARKET|TRAILING_STOP_MARKET", -1116, str),
    "timeInForce": ("GTC|IOC|FOK|GTX|GTE_GTC", -1115, str),
    "workingType": ("MARK_PRICE|CONTRACT_PRICE", -1102, str), "algoType": ("CONDITIONAL", -1102, str),
    "marginType": ("CROSSED|ISOLATED", -1102, str), "newOrderRespType": ("ACK|RESULT", -1102, str),
    "interval": ("1m|3m|5m|15m|30m|1h|2h|4h|6h|8h|12h|1d|3d|1w|1M", -1120, str)}


class Request:
    """The parameters of one request, whose it is, and what each endpoint makes of it. All raise Refused."""

    def __init__(self, engine: Engine, address: str, values: Iterable[tuple[str, str]]) -> None:
        self.engine, self.ledger, self.address = engine, engine.ledger, address
        self.account, self.received_ms, self.values = "", engine.now_ms(), dict(values)
        self.seen_ms = engine.now_ms() - engine.lag_ms  # up to when orders and fills show in queries

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

    # The market

    def exchange_info(self) -> Json:
        return {"timezone": "UTC", "serverTime": self.engine.now_ms(), "futuresType": "U_MARGINED",
                "rateLimits": self.engine.limits.listing(), "exchangeFilters": [],
                "assets": [{"asset": "USDT", "marginAvailable": True, "autoAssetExchange": "-10000"}],
                "symbols": [c.listing() for c in self.ledger.contracts.values() if c.status != "CLOSE"]}

    def depth(self) -> Json:
        (bids, asks, id_), now_ms = self.feed().shown(self.limit(500, 1_000)), self.engine.now_ms()
        return {"lastUpdateId": id_, "E": now_ms, "T": now_ms, "bids": bids, "asks": asks}

    def trades(self) -> list[Json]:
        return self.feed().recent(self.limit(500, 1_000))

    def agg_trades(self) -> list[Json]:
        return [{"a": t["id"], "p": t["price"], "q": t["qty"], "nq": t["qty"], "f": t["id"], "l": t["id"],
                 "T": t["time"], "m": t["isBuyerMaker"]} for t in self.trades()]

    def klines(self, name: str = "symbol") -> list[Any]:
        return self.feed(name).klines(self["interval"], self.limit(500, 1_500), self.get("startTime"),
                                      self.get("endTime"))

    def premium_index(self, symbol: str) -> Json:
        feed = self.engine.feed(symbol)
        index = f"{feed.index():.8f}"
        return {"symbol": symbol, "markPrice": f"{feed.mark():.8f}", "indexPrice": index,
                "estimatedSettlePrice": index, "lastFundingRate": f"{FUNDING_RATE:.8f}",
                "interestRate": "0.00010000", "nextFundingTime": feed.funding_ms(),
                "time": self.engine.now_ms()}

    def funding_rates(self) -> list[Json]:
        feed, symbol = self.feed(), self["symbol"]
        return [{"symbol": symbol, "fundingRate": f"{FUNDING_RATE:.8f}", "markPrice": f"{feed.mark():.8f}",
                 "fundingTime": feed.funding_ms() - back * FUNDING_MS, "rateType": "Regular"}
                for back in range(self.limit(100, 1_000), 0, -1)]

    def book_ticker(self, symbol: str) -> Json:
        *sides, update_id = self.engine.feed(symbol).shown(1)
        (bid, bid_qty), (ask, ask_qty) = (side[0] if side else ("0", "0") for side in sides)
        return {"symbol": symbol, "bidPrice": bid, "bidQty": bid_qty, "askPrice": ask, "askQty": ask_qty,
                "time": self.engine.now_ms(), "lastUpdateId": update_id}

    # The account

    def position(self, symbol: str) -> Json:
        return shapes.position_json(self.ledger, self.account, symbol)

    def positions(self, version: int) -> list[Json]:
        return [self.position(symbol) for symbol in self.symbols()
                if version == 2 or self.ledger.position(self.account, symbol).qty
                or self.ledger.mine(self.account, "order", symbol)]

    def mode(self) -> Json:
        return {"dualSidePosition": self.ledger.accounts[self.account].is_hedged}

    def symbol_config(self, symbol: str) -> Json:
        row = self.position(symbol)
        return {"symbol": symbol, "marginType": "CROSSED", "isAutoAddMargin": False,
                "leverage": int(row["leverage"]), "maxNotionalValue": row["maxNotionalValue"]}

    def set_dual(self) -> Json:
        account, wanted = self.ledger.accounts[self.account], self["dualSidePosition"]
        refuse_if((wanted == account.is_hedged, -4059), (self.ledger.held(self.account), -4068))
        account.is_hedged = wanted
        self.engine.store.keep("accounts", self.ledger.accounts)
        return {"code": 200, "msg": "success"}

    def set_leverage(self) -> Json:
        self.ledger.set_leverage(self.account, self["symbol"], self["leverage"])
        return {"symbol": self["symbol"], "leverage": self["leverage"],
                "maxNotionalValue": self.position(self["symbol"])["maxNotionalValue"]}

    def set_margin_type(self) -> Json:
        refuse_if((self["marginType"] == "CROSSED", -4046),
                  (self["symbol"] in self.ledger.held(self.account), -4048))
        raise Refused(-4047)  # cross only here

    def commission(self) -> Json:
        return {"symbol": self["symbol"], "makerCommissionRate": str(self.ledger.maker_fee),
                "takerCommissionRate": str(self.ledger.taker_fee), "rpiCommissionRate": "0"}

    def history(self, kind: str, limit: int = 500) -> list[Json]:
        """Return what the store keeps, by the filters the request has."""
        is_income = kind == "income"
        tests = {"symbol =": self.get("symbol") if is_income else self["symbol"],
                 "name =": self.get("incomeType") if is_income else None,
                 "ref =": self.get("orderId") if kind == "fill" else None,
                 "id >=": self.get({"order": "orderId", "algo": "algoId"}.get(kind, "fromId")),
                 "time_ms >=": self.get("startTime"),
                 "time_ms <=": min(self.get("endTime", SOME_DAY_MS), self.seen_ms)}
        rows = [row_json(row, self.ledger)
                for row in self.engine.store.find(kind, self.account, tests, self.limit(limit, 1_000))]
        if kind == "order":  # only here
            rows = [{**row, "pair": row["symbol"], "cumBase": row["executedQty"]} for row in rows]
        return rows

    def listen_key(self, *, is_kept: bool = False) -> Json:
        key = self.engine.listen_keys.get(self.account, ("", 0))[0]
        refuse_if((is_kept and not self.engine.account_of(key), -1125))
        return {"listenKey": self.engine.listen_key(self.account)}

    # Orders

    def new_order(self) -> Json:
        symbol, is_limit = self["symbol"], self["type"] == "LIMIT"
        refuse_if((self["type"] not in ("LIMIT", "MARKET"), -4120),
                  (not is_limit and self.get("price"), -1106, "price"))
        self.get("positionSide")
        wants_result = self.get("newOrderRespType") == "RESULT"
        shown = row_json(self.engine.place(Order(
            account=self.account, symbol=symbol, side=self["side"], type=self["type"], qty=self["quantity"],
            tif=self["timeInForce"] if is_limit else self.get("timeInForce", "GTC"),
            price=self["price"] if is_limit else ZERO, reduce_only=self.get("reduceOnly", False),
            client_id=self.get("newClientOrderId") or self.engine.clock.token(22))), self.ledger)
        del shown["time"]
        return shown if wants_result else shown | {
            "status": "NEW", "executedQty": "0", "cumQty": "0", "cumQuote": "0", "avgPrice": "0.00"}

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
            client_id=self.get("clientAlgoId") or self.engine.clock.token(22))), self.ledger)

    def named(self, kind: str, seen_ms: int = SOME_DAY_MS) -> Order | None:
        """Return the newest order with the id or else the client id that the request names."""
        (id_, id_name), (client_id, client_name) = ((self.get(name), name) for name in NAMES[kind])
        if id_ is None and client_id is None:
            raise Refused(-1102, text=f"Param '{client_name}' or '{id_name}' must be sent, but both were "
                                      "empty/null!")
        found: list[Order] = self.engine.store.find(kind, self.account, {
            "symbol =": self["symbol"] if kind == "order" else None, "id =": id_,
            "name =": client_id if id_ is None else None, "time_ms <=": seen_ms}, 1)
        return found[0] if found else None

    def query(self, kind: str, *, is_open: bool = False) -> Json:
        order = self.named(kind, self.seen_ms)
        if order is None or (is_open and order.id not in self.ledger.open):
            raise Refused(-2013)
        return row_json(order, self.ledger)

    def list_open(self, kind: str) -> list[Json]:
        return [row_json(order, self.ledger) for symbol in self.symbols()
                for order in self.ledger.mine(self.account, kind, symbol)
                if order.time_ms <= self.seen_ms]

    def cancel(self, kind: str) -> Json:
        stored = self.named(kind)
        if stored is None or (order := self.ledger.open.get(stored.id)) is None:
            raise Refused(-2011)
        self.ledger.cancel(order)
        if kind == "algo":
            return {"algoId": order.id, "clientAlgoId": order.client_id, "code": "200", "msg": "success"}
        return row_json(order, self.ledger)

    def cancel_all(self, kind: str) -> Json:
        self.ledger.cancel_all(self.account, self["symbol"], (kind,))
        return {"code": 200, "msg": "The operation of cancel all open order is done."}

    def batch(self, action: Callable[["Request"], Any], wishes: list[Json]) -> list[Json]:
        """Answer each of a few requests for itself."""
        answers = []
        for wish in wishes:
            one = copy(self)
            one.values = {name: plain(value) for name, value in wish.items()}
            try:
                answers.append(action(one))
            except Refused as refusal:
                answers.append(refusal.body)
        return answers

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
        return self.batch(Request.new_order, wishes)

    def cancel_orders(self) -> list[Json]:
        wishes = [{"symbol": self["symbol"], key: value} for name, key, type_ in (
            ("orderIdList", "orderId", list[int]), ("origClientOrderIdList", "origClientOrderId", list[str]))
            for value in self.listed(name, type_, 10)]
        return self.batch(lambda one: one.cancel("order"), wishes)

    def count_down(self) -> Json:
        refuse_if((self["countdownTime"] < 0, -1130, "countdownTime"))
        self.engine.count_down(self.account, self["symbol"], self["countdownTime"])
        return {"symbol": self["symbol"], "countdownTime": str(self["countdownTime"])}


def plain(value: Any) -> str:
    """Return a JSON value as the client had it in what it signed."""
    return str(value).lower() if isinstance(value, bool) else str(value)
