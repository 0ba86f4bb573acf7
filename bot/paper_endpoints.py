"""The paper exchange's endpoints: one function each, from parameters to the JSON of Binance USD-M."""

from decimal import Decimal
from functools import partial
from typing import Any

from bot import paper_shapes as shapes
from bot.paper_model import ZERO, Fill, Income, Order, Refused, refuse_if
from bot.paper_rest import LIMITS, Params, Route
from bot.paper_shapes import Json

DONE = {"code": 200, "msg": "The operation of cancel all open order is done."}
CLIENT_IDS = {"order": ("orderId", "origClientOrderId"), "algo": ("algoId", "clientAlgoId")}


def exchange_info(p: Params) -> Json:
    return {"timezone": "UTC", "serverTime": p.engine.now_ms(), "futuresType": "U_MARGINED",
            "rateLimits": [dict(zip(("rateLimitType", "interval", "intervalNum", "limit"), row, strict=True))
                           for row in LIMITS],
            "assets": [{"asset": "USDT", "marginAvailable": True, "autoAssetExchange": "-10000"}],
            "exchangeFilters": [], "symbols": p.engine.market.symbols()}


def depth(p: Params) -> Json:
    symbol, limit, now_ms = p.symbol(), p.limit(500, 1_000), p.engine.now_ms()
    book, rules = p.engine.market.book(symbol), p.ledger.rules[symbol]
    bids, asks = ([[shapes.price_text(price, rules), shapes.qty_text(qty, rules)]
                   for price, qty in side[:limit]] for side in (book.bids, book.asks))
    return {"lastUpdateId": book.last_update_id, "E": now_ms, "T": now_ms, "bids": bids, "asks": asks}


def trades(p: Params) -> list[Json]:
    return p.engine.market.recent_trades(p.symbol(), p.limit(500, 1_000))


def agg_trades(p: Params) -> list[Json]:
    return [{"a": t["id"], "p": t["price"], "q": t["qty"], "f": t["id"], "l": t["id"], "T": t["time"],
             "m": t["isBuyerMaker"]} for t in trades(p)]


def klines(p: Params) -> list[Any]:
    return p.engine.market.klines(p.symbol(), p.text("interval"), p.limit(500, 1_500),
                                  p.maybe_integer("startTime"), p.maybe_integer("endTime"))


def premium_index(p: Params, symbol: str) -> Json:
    market, (rate, next_ms) = p.engine.market, p.engine.market.funding(symbol)
    index = f"{market.index_price(symbol):.8f}"
    return {"symbol": symbol, "markPrice": f"{market.mark_price(symbol):.8f}", "indexPrice": index,
            "estimatedSettlePrice": index, "lastFundingRate": f"{rate:.8f}", "interestRate": "0.00010000",
            "nextFundingTime": next_ms, "time": p.engine.now_ms()}


def book_ticker(p: Params, symbol: str) -> Json:
    book, rules = p.engine.market.book(symbol), p.ledger.rules[symbol]
    (bid, bid_qty), (ask, ask_qty) = (side[0] if side else (ZERO, ZERO) for side in (book.bids, book.asks))
    return {"symbol": symbol,
            "bidPrice": shapes.price_text(bid, rules), "bidQty": shapes.qty_text(bid_qty, rules),
            "askPrice": shapes.price_text(ask, rules), "askQty": shapes.qty_text(ask_qty, rules),
            "time": p.engine.now_ms(), "lastUpdateId": book.last_update_id}


def last_price(p: Params, symbol: str) -> Json:
    return {"symbol": symbol, "price": f"{p.engine.market.last_price(symbol):f}", "time": p.engine.now_ms()}


def day(p: Params, symbol: str) -> Json:
    rows, newest = p.engine.market.klines(symbol, "1h", 24), p.engine.market.recent_trades(symbol, 1)[-1:]
    first, last = Decimal(rows[0][1]), p.engine.market.last_price(symbol)
    volume, spent = sum(Decimal(row[5]) for row in rows), sum(Decimal(row[7]) for row in rows)
    count, last_id = sum(row[8] for row in rows), newest[0]["id"] if newest else 0
    return {"symbol": symbol, "priceChange": f"{last - first:f}", "lastPrice": f"{last:f}",
            "priceChangePercent": f"{(last - first) / first * 100:.3f}", "openPrice": f"{first:f}",
            "weightedAvgPrice": f"{spent / volume if volume else last:.2f}", "volume": f"{volume:f}",
            "highPrice": max((row[2] for row in rows), key=Decimal), "quoteVolume": f"{spent:f}",
            "lowPrice": min((row[3] for row in rows), key=Decimal), "count": count, "openTime": rows[0][0],
            "lastQty": newest[0]["qty"] if newest else "0", "closeTime": p.engine.now_ms(),
            "firstId": last_id - count, "lastId": last_id}


def each(row: Any) -> Any:
    """Make an endpoint of a row: one symbol's row, or without a symbol the list of all."""
    def endpoint(p: Params) -> Any:
        return row(p, p.symbol()) if p.maybe("symbol") else [row(p, symbol) for symbol in p.symbols()]
    return endpoint


def positions(p: Params, version: int) -> list[Json]:
    shown = [s for s in p.symbols() if version == 2 or p.ledger.position(p.account, s).qty
             or p.ledger.mine(p.account, "order", s)]
    return [shapes.position_json(p.ledger, p.account, symbol) for symbol in shown]


def account_config(p: Params) -> Json:
    return {"feeTier": 0, "canTrade": True, "canDeposit": True, "canWithdraw": True, "updateTime": 0,
            "dualSidePosition": p.ledger.accounts[p.account].is_hedged, "multiAssetsMargin": False,
            "tradeGroupId": -1}


def symbol_config(p: Params) -> list[Json]:
    rows = [shapes.position_json(p.ledger, p.account, symbol) for symbol in p.symbols()]
    return [{"symbol": row["symbol"], "marginType": "CROSSED", "isAutoAddMargin": False,
             "leverage": int(row["leverage"]), "maxNotionalValue": row["maxNotionalValue"]} for row in rows]


def set_dual(p: Params) -> Json:
    account, wanted = p.ledger.accounts[p.account], p.flag("dualSidePosition")
    refuse_if((wanted == account.is_hedged, -4059, "No need to change position side."),
              (any(position.qty for position in account.positions.values()), -4068,
               "Position side cannot be changed if there exists position."))
    account.is_hedged = wanted
    p.engine.store.keep("accounts", p.ledger.accounts)
    return {"code": 200, "msg": "success"}


def set_leverage(p: Params) -> Json:
    symbol, leverage = p.symbol(), p.integer("leverage")
    refuse_if((not 1 <= leverage <= 125, -4028, f"Leverage {leverage} is not valid"))
    p.ledger.set_leverage(p.account, symbol, leverage, p.engine.now_ms())
    p.engine.commit()
    row = shapes.position_json(p.ledger, p.account, symbol)
    return {"symbol": symbol, "leverage": leverage, "maxNotionalValue": row["maxNotionalValue"]}


def set_margin_type(p: Params) -> Json:
    p.symbol()
    if p.text("marginType") == "CROSSED":
        raise Refused(-4046, "No need to change margin type.")
    raise Refused(-4047, "Margin type cannot be changed if there exists open orders.")  # cross only here


def commission(p: Params) -> Json:
    config = p.engine.config
    return {"symbol": p.symbol(), "makerCommissionRate": str(config.maker_fee),
            "takerCommissionRate": str(config.taker_fee), "rpiCommissionRate": "0"}


def history(p: Params, kind: str, type_: Any, shape: Any, from_name: str = "fromId", limit: int = 500) -> Any:
    """Return what the store keeps, by the filters the request has."""
    tests = {"symbol =": p.symbol() if p.maybe("symbol") or kind != "income" else None,
             "name =": p.maybe("incomeType") if kind == "income" else None,
             "ref =": p.maybe_integer("orderId") if kind == "fill" else None,
             "id >=": p.maybe_integer(from_name), "time_ms >=": p.maybe_integer("startTime"),
             "time_ms <=": p.maybe_integer("endTime")}
    rows = p.engine.store.find(kind, type_, p.account, tests, p.limit(limit, 1_000))
    return [shape(row) if kind == "income" else shape(row, p.ledger.rules[row.symbol]) for row in rows]


def keep_listen_key(p: Params) -> Json:
    if not p.engine.account_of(p.engine.listen_keys.get(p.account, ("", 0))[0]):
        raise Refused(-1125, "This listenKey does not exist.")
    return {"listenKey": p.engine.listen_key(p.account)}


def drop_listen_key(p: Params) -> Json:
    p.engine.drop_listen_key(p.account)
    return {}


def new_order(p: Params) -> Json:
    symbol, type_ = p.symbol(), p.text("type")
    refuse_if((type_ not in ("LIMIT", "MARKET"), -4120, "Order type not supported for this endpoint. Please "
               "use the Algo Order API endpoints instead."),
              (type_ == "MARKET" and p.maybe("price"), -1106, "Parameter 'price' sent when not required."))
    p.text("positionSide", "BOTH")
    wants_result = p.text("newOrderRespType", "ACK") == "RESULT"
    order = p.engine.place(Order(
        account=p.account, symbol=symbol, side=p.side(), type=type_, qty=p.number("quantity"),
        tif=p.text("timeInForce", "GTC" if type_ == "MARKET" else None), reduce_only=p.flag("reduceOnly"),
        price=p.number("price") if type_ == "LIMIT" else ZERO,
        client_id=p.text("newClientOrderId", p.engine.clock.token(22))))
    shown = shapes.order_json(order, p.ledger.rules[symbol])
    del shown["time"]
    return shown if wants_result else shown | {
        "status": "NEW", "executedQty": "0", "cumQty": "0", "cumQuote": "0", "avgPrice": "0.00"}


def new_algo(p: Params) -> Json:
    p.text("algoType")
    symbol, closes = p.symbol(), p.flag("closePosition")
    if (type_ := p.text("type")) not in ("STOP_MARKET", "TAKE_PROFIT_MARKET"):
        raise Refused(-1116, "Invalid orderType.")
    p.text("positionSide", "BOTH")
    for name in ("quantity", "reduceOnly"):
        if closes and p.maybe(name):
            raise Refused(-1106, f"Parameter '{name}' sent when not required.")
    return shapes.order_json(p.engine.place(Order(
        kind="algo", account=p.account, symbol=symbol, side=p.side(), type=type_,
        trigger=p.number("triggerPrice"), qty=ZERO if closes else p.number("quantity"),
        tif=p.text("timeInForce", "GTC"), reduce_only=p.flag("reduceOnly"), close_position=closes,
        working_type=p.text("workingType", "CONTRACT_PRICE"),
        client_id=p.text("clientAlgoId", p.engine.clock.token(22)))), p.ledger.rules[symbol])


def named(p: Params, kind: str) -> tuple[int | None, str | None]:
    """Return the id or else the client id that the request names an order by."""
    id_name, client_name = CLIENT_IDS[kind]
    id_, client_id = p.maybe_integer(id_name), p.maybe(client_name)
    if id_ is None and client_id is None:
        raise Refused(-1102, f"Param '{client_name}' or '{id_name}' must be sent, but both were empty/null!")
    return id_, client_id if id_ is None else None


def get(p: Params, kind: str) -> Json:
    id_, client_id = named(p, kind)
    tests = {"symbol =": p.symbol() if kind == "order" else None, "id =": id_, "name =": client_id}
    for order in p.engine.store.find(kind, Order, p.account, tests, 1):
        return shapes.order_json(order, p.ledger.rules[order.symbol])
    raise Refused(-2013, "Order does not exist.")


def get_open(p: Params, kind: str, refusal: Refused | None = None) -> Order:
    id_, client_id = named(p, kind)
    for order in p.ledger.mine(p.account, kind, p.symbol() if kind == "order" else None):
        if (order.id == id_ if id_ is not None else order.client_id == client_id):
            return order
    raise refusal or Refused(-2013, "Order does not exist.")


def cancel(p: Params, kind: str) -> Json:
    order = get_open(p, kind, Refused(-2011, "Unknown order sent."))
    p.engine.cancel(order)
    if kind == "algo":
        return {"algoId": order.id, "clientAlgoId": order.client_id, "code": "200", "msg": "success"}
    return shapes.order_json(order, p.ledger.rules[order.symbol])


def list_open(p: Params, kind: str) -> list[Json]:
    return [shapes.order_json(order, p.ledger.rules[symbol]) for symbol in p.symbols()
            for order in p.ledger.mine(p.account, kind, symbol)]


def cancel_all(p: Params, kind: str) -> Json:
    for order in p.ledger.mine(p.account, kind, p.symbol()):
        p.engine.cancel(order)
    return DONE


def open_order(p: Params) -> Json:
    return shapes.order_json(get_open(p, "order"), p.ledger.rules[p.symbol()])


PUBLIC = {
    "ping": Route(lambda p: {}),
    "time": Route(lambda p: {"serverTime": p.engine.now_ms()}),
    "exchangeInfo": Route(exchange_info), "depth": Route(depth, 10), "trades": Route(trades, 5),
    "aggTrades": Route(agg_trades, 20), "klines": Route(klines, 5), "ticker/24hr": Route(each(day)),
    "premiumIndex": Route(each(premium_index)), "ticker/price": Route(each(last_price)),
    "ticker/bookTicker": Route(each(book_ticker), 2),
}
SIGNED: dict[str, tuple[Any, int]] = {  # endpoint -> handler, weight
    "GET v2/account": (lambda p: shapes.account_json(p.ledger, p.account, 2), 5),
    "GET v3/account": (lambda p: shapes.account_json(p.ledger, p.account, 3), 5),
    "GET v2/balance": (lambda p: shapes.balance_json(p.ledger, p.account), 5),
    "GET v3/balance": (lambda p: shapes.balance_json(p.ledger, p.account), 5),
    "GET v2/positionRisk": (partial(positions, version=2), 5),
    "GET v3/positionRisk": (partial(positions, version=3), 5),
    "GET v1/accountConfig": (account_config, 5), "GET v1/symbolConfig": (symbol_config, 5),
    "GET v1/positionSide/dual": (lambda p: {"dualSidePosition": p.ledger.accounts[p.account].is_hedged}, 30),
    "POST v1/positionSide/dual": (set_dual, 1),
    "GET v1/multiAssetsMargin": (lambda p: {"multiAssetsMargin": False}, 30),
    "GET v1/leverageBracket": (lambda p: [shapes.brackets_json(symbol) for symbol in p.symbols()], 1),
    "POST v1/leverage": (set_leverage, 1), "POST v1/marginType": (set_margin_type, 1),
    "GET v1/commissionRate": (commission, 20),
    "GET v1/income": (partial(history, kind="income", type_=Income, shape=shapes.income_json, limit=100), 30),
    "GET v1/userTrades": (partial(history, kind="fill", type_=Fill, shape=shapes.trade_json), 5),
    "GET v1/order": (partial(get, kind="order"), 1), "DELETE v1/order": (partial(cancel, kind="order"), 1),
    "GET v1/openOrder": (open_order, 1), "GET v1/openOrders": (partial(list_open, kind="order"), 1),
    "DELETE v1/allOpenOrders": (partial(cancel_all, kind="order"), 1),
    "GET v1/allOrders": (
        partial(history, kind="order", type_=Order, shape=shapes.order_json, from_name="orderId"), 5),
    "GET v1/algoOrder": (partial(get, kind="algo"), 1),
    "DELETE v1/algoOrder": (partial(cancel, kind="algo"), 1),
    "GET v1/openAlgoOrders": (partial(list_open, kind="algo"), 1),
    "DELETE v1/algoOpenOrders": (partial(cancel_all, kind="algo"), 1),
    "GET v1/allAlgoOrders": (
        partial(history, kind="algo", type_=Order, shape=shapes.order_json, from_name="algoId"), 5),
}
ROUTES: dict[str, Route] = {
    **{f"GET /fapi/v1/{name}": route for name, route in PUBLIC.items()},
    **{name.replace(" ", " /fapi/"): Route(handler, weight, "signed")
       for name, (handler, weight) in SIGNED.items()},
    "POST /fapi/v1/order": Route(new_order, 0, "signed", is_order=True),
    "POST /fapi/v1/algoOrder": Route(new_algo, 0, "signed", is_order=True),
    "POST /fapi/v1/listenKey": Route(lambda p: {"listenKey": p.engine.listen_key(p.account)}, 1, "key"),
    "PUT /fapi/v1/listenKey": Route(keep_listen_key, 1, "key"),
    "DELETE /fapi/v1/listenKey": Route(drop_listen_key, 1, "key"),
}
