"""The paper exchange's endpoints: one function each, from parameters to the JSON of Binance USD-M."""

from copy import copy
from functools import partial
from typing import Any

import msgspec

from bot import paper_shapes as shapes
from bot.paper_feed import FUNDING_MS, FUNDING_RATE
from bot.paper_model import ZERO, Fill, Income, Order, Refused, refuse_if
from bot.paper_rest import Params, Route
from bot.paper_shapes import Json

DONE = {"code": 200, "msg": "The operation of cancel all open order is done."}
SOME_DAY_MS = 1 << 50
CLIENT_IDS = {"order": ("orderId", "origClientOrderId"), "algo": ("algoId", "clientAlgoId")}


def exchange_info(p: Params) -> Json:
    return {"timezone": "UTC", "serverTime": p.engine.now_ms(), "futuresType": "U_MARGINED",
            "rateLimits": p.engine.limits.listing(), "exchangeFilters": [],
            "assets": [{"asset": "USDT", "marginAvailable": True, "autoAssetExchange": "-10000"}],
            "symbols": [row for row in p.engine.listings() if row["status"] != "CLOSE"]}


def depth(p: Params) -> Json:
    symbol, limit, now_ms = p.symbol(), p.limit(500, 1_000), p.engine.now_ms()
    book, rules = p.engine.feed(symbol).book(), p.ledger.rules[symbol]
    bids, asks = ([[shapes.price_text(price, rules), shapes.qty_text(qty, rules)]
                   for price, qty in side[:limit]] for side in (book.bids, book.asks))
    return {"lastUpdateId": book.last_update_id, "E": now_ms, "T": now_ms, "bids": bids, "asks": asks}


def trades(p: Params) -> list[Json]:
    return p.engine.feed(p.symbol()).recent(p.limit(500, 1_000))


def agg_trades(p: Params) -> list[Json]:
    return [{"a": t["id"], "p": t["price"], "q": t["qty"], "f": t["id"], "l": t["id"], "T": t["time"],
             "m": t["isBuyerMaker"]} for t in trades(p)]


def klines(p: Params, name: str = "symbol") -> list[Any]:
    if p.maybe(name) not in p.ledger.rules:
        raise Refused(-1121, "Invalid symbol.")
    return p.engine.feed(p.text(name)).klines(p.text("interval"), p.limit(500, 1_500),
                                              p.maybe_integer("startTime"), p.maybe_integer("endTime"))


def premium_index(p: Params, symbol: str) -> Json:
    feed = p.engine.feed(symbol)
    index = f"{feed.index():.8f}"
    return {"symbol": symbol, "markPrice": f"{feed.mark():.8f}", "indexPrice": index,
            "estimatedSettlePrice": index, "lastFundingRate": f"{FUNDING_RATE:.8f}",
            "interestRate": "0.00010000", "nextFundingTime": feed.funding_ms(), "time": p.engine.now_ms()}


def funding_rates(p: Params) -> list[Json]:
    feed = p.engine.feed(p.symbol())
    return [{"symbol": p.symbol(), "fundingRate": f"{FUNDING_RATE:.8f}", "markPrice": f"{feed.mark():.8f}",
             "fundingTime": feed.funding_ms() - back * FUNDING_MS}
            for back in range(p.limit(100, 1_000), 0, -1)]


def book_ticker(p: Params, symbol: str) -> Json:
    book, rules = p.engine.feed(symbol).book(1), p.ledger.rules[symbol]
    (bid, bid_qty), (ask, ask_qty) = (side[0] if side else (ZERO, ZERO) for side in (book.bids, book.asks))
    return {"symbol": symbol,
            "bidPrice": shapes.price_text(bid, rules), "bidQty": shapes.qty_text(bid_qty, rules),
            "askPrice": shapes.price_text(ask, rules), "askQty": shapes.qty_text(ask_qty, rules),
            "time": p.engine.now_ms(), "lastUpdateId": book.last_update_id}


def last_price(p: Params, symbol: str) -> Json:
    return {"symbol": symbol, "price": f"{p.engine.feed(symbol).last():f}", "time": p.engine.now_ms()}


def each(row: Any, *, is_list: bool = False) -> Any:
    """Make an endpoint of a row: one symbol's row, or without a symbol (or is_list) the list of all."""
    def endpoint(p: Params) -> Any:
        rows = [row(p, symbol) for symbol in p.symbols()]
        return rows[0] if p.maybe("symbol") and not is_list else rows
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
    p.ledger.set_leverage(p.account, symbol, leverage, p.engine.now_ms())
    p.engine.commit()
    row = shapes.position_json(p.ledger, p.account, symbol)
    return {"symbol": symbol, "leverage": leverage, "maxNotionalValue": row["maxNotionalValue"]}


def set_margin_type(p: Params) -> Json:
    symbol, is_cross = p.symbol(), p.text("marginType") == "CROSSED"
    refuse_if((is_cross, -4046, "No need to change margin type."),
              (symbol in p.ledger.held(p.account), -4048,
               "Margin type cannot be changed if there exists position."))
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
             "time_ms <=": min(p.maybe_integer("endTime") or SOME_DAY_MS, p.engine.seen_ms())}
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
    tests = {"symbol =": p.symbol() if kind == "order" else None, "id =": id_, "name =": client_id,
             "time_ms <=": p.engine.seen_ms()}
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
            for order in p.ledger.mine(p.account, kind, symbol) if order.time_ms <= p.engine.seen_ms()]


def cancel_all(p: Params, kind: str) -> Json:
    p.engine.cancel_all(p.account, p.symbol(), (kind,))
    return DONE


def open_order(p: Params) -> Json:
    if (order := get_open(p, "order")).time_ms > p.engine.seen_ms():
        raise Refused(-2013, "Order does not exist.")
    return shapes.order_json(order, p.ledger.rules[order.symbol])


def batch(p: Params, action: Any, wishes: list[Json]) -> list[Json]:
    """Answer each of a few requests for itself."""
    answers = []
    for wish in wishes:
        one = copy(p)
        one.values = {name: str(value).lower() if isinstance(value, bool) else str(value)
                      for name, value in wish.items()}
        try:
            answers.append(action(one))
        except Refused as refusal:
            answers.append({"code": refusal.code, "msg": refusal.text})
    return answers


def listed(p: Params, name: str, type_: Any, most: int) -> Any:
    """Return a parameter that is a JSON list; ccxt writes its name in small letters."""
    text = p.values.get(name) or p.values.get(name.lower()) or "[]"
    try:
        found = msgspec.json.decode(text, type=type_)
    except msgspec.MsgspecError:
        raise Refused(-1130, f"Data sent for parameter '{name}' is not valid.") from None
    refuse_if((len(found) > most, -4082, "Invalid number of batch place orders."))
    return found


def new_orders(p: Params) -> list[Json]:
    return batch(p, new_order, listed(p, "batchOrders", list[dict[str, str | int | float | bool]], 5))


def cancel_orders(p: Params) -> list[Json]:
    symbol = p.symbol()
    ids = [{"symbol": symbol, "orderId": id_} for id_ in listed(p, "orderIdList", list[int], 10)]
    names = listed(p, "origClientOrderIdList", list[str], 10)
    return batch(p, partial(cancel, kind="order"),
                 [*ids, *({"symbol": symbol, "origClientOrderId": name} for name in names)])


def count_down(p: Params) -> Json:
    symbol, time_ms = p.symbol(), p.integer("countdownTime")
    refuse_if((time_ms < 0, -1130, "Data sent for parameter 'countdownTime' is not valid."))
    p.engine.count_down(p.account, symbol, time_ms)
    return {"symbol": symbol, "countdownTime": str(time_ms)}


def order_rate(p: Params) -> list[Json]:
    return p.engine.limits.listing()[1:]


def fixed(value: Any) -> Any:
    """Make an endpoint that always says the same."""
    return lambda p: value


BY_LIMIT = {99: 1, 499: 2, 1_000: 5, 1_500: 10}  # weights of candles
PUBLIC = {
    "v1/ping": Route(fixed({})), "v1/time": Route(lambda p: {"serverTime": p.engine.now_ms()}),
    "v1/exchangeInfo": Route(exchange_info), "v1/depth": Route(depth, {50: 2, 100: 5, 500: 10, 1_000: 20}),
    "v1/trades": Route(trades, 5), "v1/historicalTrades": Route(trades, 20),
    "v1/aggTrades": Route(agg_trades, 20), "v1/klines": Route(klines, BY_LIMIT),
    "v1/continuousKlines": Route(partial(klines, name="pair"), BY_LIMIT),
    "v1/markPriceKlines": Route(klines, BY_LIMIT),
    "v1/indexPriceKlines": Route(partial(klines, name="pair"), BY_LIMIT),
    "v1/ticker/24hr": Route(each(lambda p, symbol: p.engine.feed(symbol).ticker()), (1, 40)),
    "v1/premiumIndex": Route(each(premium_index), (1, 10)), "v1/fundingRate": Route(funding_rates, 0),
    "v1/fundingInfo": Route(fixed([]), 0), "v1/ticker/price": Route(each(last_price), (1, 2)),
    "v2/ticker/price": Route(each(last_price), (1, 2)),
    "v1/ticker/bookTicker": Route(each(book_ticker), (2, 5)),
    "v1/openInterest": Route(lambda p: {"symbol": p.symbol(), "openInterest": "0.000",
                                        "time": p.engine.now_ms()}),
}
ORDERS: dict[str, tuple[Any, int]] = {  # endpoint -> handler, what it counts
    "POST v1/order": (new_order, 1), "POST v1/algoOrder": (new_algo, 1),
    "POST v1/batchOrders": (new_orders, 5)}
SIGNED: dict[str, tuple[Any, int | tuple[int, int]]] = {  # endpoint -> handler, weight
    "GET v2/account": (lambda p: shapes.account_json(p.ledger, p.account, 2), 5),
    "GET v3/account": (lambda p: shapes.account_json(p.ledger, p.account, 3), 5),
    "GET v2/balance": (lambda p: shapes.balance_json(p.ledger, p.account), 5),
    "GET v3/balance": (lambda p: shapes.balance_json(p.ledger, p.account), 5),
    "GET v2/positionRisk": (partial(positions, version=2), 5),
    "GET v3/positionRisk": (partial(positions, version=3), 5),
    "GET v1/accountConfig": (account_config, 5), "GET v1/symbolConfig": (symbol_config, 5),
    "GET v1/positionSide/dual": (lambda p: {"dualSidePosition": p.ledger.accounts[p.account].is_hedged}, 30),
    "POST v1/positionSide/dual": (set_dual, 1),
    "GET v1/multiAssetsMargin": (fixed({"multiAssetsMargin": False}), 30),
    "GET v1/leverageBracket": (
        each(lambda p, symbol: shapes.brackets_json(symbol), is_list=True), 1),
    "POST v1/leverage": (set_leverage, 1), "POST v1/marginType": (set_margin_type, 1),
    "GET v1/commissionRate": (commission, 20), "GET v1/rateLimit/order": (order_rate, 1),
    "GET v1/income": (partial(history, kind="income", type_=Income, shape=shapes.income_json, limit=100), 30),
    "GET v1/userTrades": (partial(history, kind="fill", type_=Fill, shape=shapes.trade_json), 5),
    "GET v1/order": (partial(get, kind="order"), 1), "DELETE v1/order": (partial(cancel, kind="order"), 1),
    "GET v1/openOrder": (open_order, 1), "GET v1/openOrders": (partial(list_open, kind="order"), (1, 40)),
    "DELETE v1/allOpenOrders": (partial(cancel_all, kind="order"), 1),
    "DELETE v1/batchOrders": (cancel_orders, 1), "POST v1/countdownCancelAll": (count_down, 10),
    "GET v1/allOrders": (
        partial(history, kind="order", type_=Order, shape=shapes.order_json, from_name="orderId"), 5),
    "GET v1/algoOrder": (partial(get, kind="algo"), 1),
    "DELETE v1/algoOrder": (partial(cancel, kind="algo"), 1),
    "GET v1/openAlgoOrders": (partial(list_open, kind="algo"), (1, 40)),
    "DELETE v1/algoOpenOrders": (partial(cancel_all, kind="algo"), 1),
    "GET v1/allAlgoOrders": (
        partial(history, kind="algo", type_=Order, shape=shapes.order_json, from_name="algoId"), 5),
}
ROUTES: dict[str, Route] = {
    **{f"GET /fapi/{name}": route for name, route in PUBLIC.items()},
    **{name.replace(" ", " /fapi/"): Route(handler, weight, "signed")
       for name, (handler, weight) in SIGNED.items()},
    **{name.replace(" ", " /fapi/"): Route(handler, 0, "signed", orders)
       for name, (handler, orders) in ORDERS.items()},
    "POST /fapi/v1/listenKey": Route(lambda p: {"listenKey": p.engine.listen_key(p.account)}, 1, "key"),
    "PUT /fapi/v1/listenKey": Route(keep_listen_key, 1, "key"),
    "DELETE /fapi/v1/listenKey": Route(drop_listen_key, 1, "key"),
    "GET /sapi/v1/account/apiRestrictions": Route(fixed({
        "ipRestrict": True, "createTime": 0, "enableReading": True, "enableFutures": True,
        "enableWithdrawals": False, "enableInternalTransfer": False, "permitsUniversalTransfer": False,
        "enableSpotAndMarginTrading": False, "enableMargin": False, "enableVanillaOptions": False,
        "enablePortfolioMarginTrading": False}), 1, "signed"),
    # What ccxt asks of the spot side when it loads markets with a key.
    "GET /sapi/v1/capital/config/getall": Route(fixed([]), 10, "signed"),
    "GET /sapi/v1/margin/allPairs": Route(fixed([]), 1, "key"),
    "GET /sapi/v1/margin/isolated/allPairs": Route(fixed([]), 10, "signed"),
}
