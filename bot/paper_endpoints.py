"""The paper exchange's endpoints: one function each, from parameters to the JSON of Binance USD-M."""

from collections.abc import Callable
from copy import copy
from functools import partial
from typing import Any

import msgspec

from bot import paper_shapes as shapes
from bot.paper_feed import FUNDING_MS, FUNDING_RATE
from bot.paper_model import ZERO, Order, Refused, refuse_if
from bot.paper_rest import Handler, Params, Route, plain
from bot.paper_shapes import Json, row_json

SOME_DAY_MS = 1 << 50
NAMES = {"order": ("orderId", "origClientOrderId"), "algo": ("algoId", "clientAlgoId")}


def exchange_info(p: Params) -> Json:
    return {"timezone": "UTC", "serverTime": p.engine.now_ms(), "futuresType": "U_MARGINED",
            "rateLimits": p.engine.limits.listing(), "exchangeFilters": [],
            "assets": [{"asset": "USDT", "marginAvailable": True, "autoAssetExchange": "-10000"}],
            "symbols": [c.listing() for c in p.ledger.contracts.values() if c.status != "CLOSE"]}


def depth(p: Params) -> Json:
    feed, now_ms = p.feed(), p.engine.now_ms()
    book = feed.book(p.limit(500, 1_000))
    bids, asks = ([feed.contract.level(*pair) for pair in side] for side in (book.bids, book.asks))
    return {"lastUpdateId": book.last_update_id, "E": now_ms, "T": now_ms, "bids": bids, "asks": asks}


def trades(p: Params) -> list[Json]:
    return p.feed().recent(p.limit(500, 1_000))


def agg_trades(p: Params) -> list[Json]:
    return [{"a": t["id"], "p": t["price"], "q": t["qty"], "nq": t["qty"], "f": t["id"], "l": t["id"],
             "T": t["time"], "m": t["isBuyerMaker"]} for t in trades(p)]


def klines(p: Params, name: str = "symbol") -> list[Any]:
    return p.feed(name).klines(p["interval"], p.limit(500, 1_500), p.get("startTime"), p.get("endTime"))


def premium_index(p: Params, symbol: str) -> Json:
    feed = p.engine.feed(symbol)
    index = f"{feed.index():.8f}"
    return {"symbol": symbol, "markPrice": f"{feed.mark():.8f}", "indexPrice": index,
            "estimatedSettlePrice": index, "lastFundingRate": f"{FUNDING_RATE:.8f}",
            "interestRate": "0.00010000", "nextFundingTime": feed.funding_ms(), "time": p.engine.now_ms()}


def funding_rates(p: Params) -> list[Json]:
    feed, symbol = p.feed(), p["symbol"]
    return [{"symbol": symbol, "fundingRate": f"{FUNDING_RATE:.8f}", "markPrice": f"{feed.mark():.8f}",
             "fundingTime": feed.funding_ms() - back * FUNDING_MS, "rateType": "Regular"}
            for back in range(p.limit(100, 1_000), 0, -1)]


def book_ticker(p: Params, symbol: str) -> Json:
    feed = p.engine.feed(symbol)
    book = feed.book(1)
    (bid, bid_qty), (ask, ask_qty) = (feed.contract.level(*side[0] if side else (ZERO, ZERO))
                                      for side in (book.bids, book.asks))
    return {"symbol": symbol, "bidPrice": bid, "bidQty": bid_qty, "askPrice": ask, "askQty": ask_qty,
            "time": p.engine.now_ms(), "lastUpdateId": book.last_update_id}


def last_price(p: Params, symbol: str) -> Json:
    return {"symbol": symbol, "price": f"{p.engine.feed(symbol).last():f}", "time": p.engine.now_ms()}


def each(row: Callable[[Params, str], Json], *, is_list: bool = False) -> Handler:
    """Make an endpoint of a row: one symbol's row, or without a symbol (or is_list) the list of all."""
    def endpoint(p: Params) -> Any:
        rows = [row(p, symbol) for symbol in p.symbols()]
        return rows[0] if p.get("symbol") and not is_list else rows
    return endpoint


def fixed(value: Any) -> Handler:
    """Make an endpoint that always says the same."""
    return lambda p: value


def position(p: Params, symbol: str) -> Json:
    return shapes.position_json(p.ledger, p.account, symbol)


def positions(p: Params, version: int) -> list[Json]:
    return [position(p, symbol) for symbol in p.symbols() if version == 2
            or p.ledger.position(p.account, symbol).qty or p.ledger.mine(p.account, "order", symbol)]


def mode(p: Params) -> Json:
    return {"dualSidePosition": p.ledger.accounts[p.account].is_hedged}


def symbol_config(p: Params, symbol: str) -> Json:
    row = position(p, symbol)
    return {"symbol": symbol, "marginType": "CROSSED", "isAutoAddMargin": False,
            "leverage": int(row["leverage"]), "maxNotionalValue": row["maxNotionalValue"]}


def set_dual(p: Params) -> Json:
    account, wanted = p.ledger.accounts[p.account], p["dualSidePosition"]
    refuse_if((wanted == account.is_hedged, -4059), (p.ledger.held(p.account), -4068))
    account.is_hedged = wanted
    p.engine.store.keep("accounts", p.ledger.accounts)
    return {"code": 200, "msg": "success"}


def set_leverage(p: Params) -> Json:
    p.ledger.set_leverage(p.account, p["symbol"], p["leverage"])
    return {"symbol": p["symbol"], "leverage": p["leverage"],
            "maxNotionalValue": position(p, p["symbol"])["maxNotionalValue"]}


def set_margin_type(p: Params) -> Json:
    refuse_if((p["marginType"] == "CROSSED", -4046), (p["symbol"] in p.ledger.held(p.account), -4048))
    raise Refused(-4047)  # cross only here


def commission(p: Params) -> Json:
    return {"symbol": p["symbol"], "makerCommissionRate": str(p.ledger.maker_fee),
            "takerCommissionRate": str(p.ledger.taker_fee), "rpiCommissionRate": "0"}


def history(p: Params, kind: str, limit: int = 500) -> list[Json]:
    """Return what the store keeps, by the filters the request has."""
    tests = {"symbol =": p.get("symbol") if kind == "income" else p["symbol"],
             "name =": p.get("incomeType") if kind == "income" else None,
             "ref =": p.get("orderId") if kind == "fill" else None,
             "id >=": p.get({"order": "orderId", "algo": "algoId"}.get(kind, "fromId")),
             "time_ms >=": p.get("startTime"),
             "time_ms <=": min(p.get("endTime", SOME_DAY_MS), p.engine.seen_ms())}
    rows = p.engine.store.find(kind, p.account, tests, p.limit(limit, 1_000))
    shown = [row_json(row, p.ledger) for row in rows]
    if kind == "order":  # only here
        shown = [{**row, "pair": row["symbol"], "cumBase": row["executedQty"]} for row in shown]
    return shown


def listen_key(p: Params) -> Json:
    return {"listenKey": p.engine.listen_key(p.account)}


def keep_listen_key(p: Params) -> Json:
    refuse_if((not p.engine.account_of(p.engine.listen_keys.get(p.account, ("", 0))[0]), -1125))
    return listen_key(p)


def drop_listen_key(p: Params) -> Json:
    p.engine.drop_listen_key(p.account)
    return {}


def new_order(p: Params) -> Json:
    symbol, is_limit = p["symbol"], p["type"] == "LIMIT"
    refuse_if((p["type"] not in ("LIMIT", "MARKET"), -4120),
              (not is_limit and p.get("price"), -1106, "price"))
    p.get("positionSide")
    wants_result = p.get("newOrderRespType") == "RESULT"
    shown = row_json(p.engine.place(Order(
        account=p.account, symbol=symbol, side=p["side"], type=p["type"], qty=p["quantity"],
        tif=p["timeInForce"] if is_limit else p.get("timeInForce", "GTC"),
        price=p["price"] if is_limit else ZERO, reduce_only=p.get("reduceOnly", False),
        client_id=p.get("newClientOrderId") or p.engine.clock.token(22))), p.ledger)
    del shown["time"]
    return shown if wants_result else shown | {
        "status": "NEW", "executedQty": "0", "cumQty": "0", "cumQuote": "0", "avgPrice": "0.00"}


def new_algo(p: Params) -> Json:
    symbol, closes, _ = p["symbol"], p.get("closePosition", False), p["algoType"]
    refuse_if((p["type"] not in ("STOP_MARKET", "TAKE_PROFIT_MARKET"), -1116),
              *((closes and p.get(name), -1106, name) for name in ("quantity", "reduceOnly")))
    p.get("positionSide")
    return row_json(p.engine.place(Order(
        kind="algo", account=p.account, symbol=symbol, side=p["side"], type=p["type"],
        trigger=p["triggerPrice"], qty=ZERO if closes else p["quantity"], tif=p.get("timeInForce", "GTC"),
        reduce_only=p.get("reduceOnly", False), close_position=closes,
        working_type=p.get("workingType", "CONTRACT_PRICE"),
        client_id=p.get("clientAlgoId") or p.engine.clock.token(22))), p.ledger)


def named(p: Params, kind: str, seen_ms: int = SOME_DAY_MS) -> Order | None:
    """Return the newest order with the id or else the client id that the request names."""
    (id_, id_name), (client_id, client_name) = ((p.get(name), name) for name in NAMES[kind])
    if id_ is None and client_id is None:
        raise Refused(-1102, text=f"Param '{client_name}' or '{id_name}' must be sent, but both were "
                                  "empty/null!")
    found: list[Order] = p.engine.store.find(kind, p.account, {
        "symbol =": p["symbol"] if kind == "order" else None, "id =": id_,
        "name =": client_id if id_ is None else None, "time_ms <=": seen_ms}, 1)
    return found[0] if found else None


def get(p: Params, kind: str, *, is_open: bool = False) -> Json:
    order = named(p, kind, p.engine.seen_ms())
    if order is None or (is_open and order.id not in p.ledger.open):
        raise Refused(-2013)
    return row_json(order, p.ledger)


def list_open(p: Params, kind: str) -> list[Json]:
    return [row_json(order, p.ledger) for symbol in p.symbols()
            for order in p.ledger.mine(p.account, kind, symbol) if order.time_ms <= p.engine.seen_ms()]


def cancel(p: Params, kind: str) -> Json:
    stored = named(p, kind)
    if stored is None or (order := p.ledger.open.get(stored.id)) is None:
        raise Refused(-2011)
    p.ledger.cancel(order)
    if kind == "algo":
        return {"algoId": order.id, "clientAlgoId": order.client_id, "code": "200", "msg": "success"}
    return row_json(order, p.ledger)


def cancel_all(p: Params, kind: str) -> Json:
    p.ledger.cancel_all(p.account, p["symbol"], (kind,))
    return {"code": 200, "msg": "The operation of cancel all open order is done."}


def batch(p: Params, action: Handler, wishes: list[Json]) -> list[Json]:
    """Answer each of a few requests for itself."""
    answers = []
    for wish in wishes:
        one = copy(p)
        one.values = {name: plain(value) for name, value in wish.items()}
        try:
            answers.append(action(one))
        except Refused as refusal:
            answers.append(refusal.body)
    return answers


def listed(p: Params, name: str, type_: Any, most: int) -> Any:
    """Return a parameter that is a JSON list; ccxt writes its name in small letters."""
    text = p.values.get(name) or p.values.get(name.lower()) or "[]"
    try:
        found = msgspec.json.decode(text, type=type_)
    except msgspec.MsgspecError:
        raise Refused(-1130, name) from None
    refuse_if((len(found) > most, -4082))
    return found


def new_orders(p: Params) -> list[Json]:
    return batch(p, new_order, listed(p, "batchOrders", list[dict[str, str | int | float | bool]], 5))


def cancel_orders(p: Params) -> list[Json]:
    return batch(p, partial(cancel, kind="order"), [
        {"symbol": p["symbol"], key: value} for name, key, type_ in (
            ("orderIdList", "orderId", int), ("origClientOrderIdList", "origClientOrderId", str))
        for value in listed(p, name, list[type_], 10)])  # type: ignore[valid-type]


def count_down(p: Params) -> Json:
    refuse_if((p["countdownTime"] < 0, -1130, "countdownTime"))
    p.engine.count_down(p.account, p["symbol"], p["countdownTime"])
    return {"symbol": p["symbol"], "countdownTime": str(p["countdownTime"])}


BY_LIMIT = {99: 1, 499: 2, 1_000: 5, 1_500: 10}  # weights of candles
RIGHTS = {"ipRestrict": True, "createTime": 0, "enableReading": True, "enableFutures": True} | dict.fromkeys((
    "enableWithdrawals", "enableInternalTransfer", "permitsUniversalTransfer", "enableSpotAndMarginTrading",
    "enableMargin", "enableVanillaOptions", "enablePortfolioMarginTrading"), False)
PUBLIC: dict[str, tuple[Any, ...]] = {  # endpoint -> handler, weight (1)
    "GET v1/ping": (fixed({}),), "GET v1/time": (lambda p: {"serverTime": p.engine.now_ms()},),
    "GET v1/exchangeInfo": (exchange_info,), "GET v1/depth": (depth, {50: 2, 100: 5, 500: 10, 1_000: 20}),
    "GET v1/trades": (trades, 5), "GET v1/historicalTrades": (trades, 20),
    "GET v1/aggTrades": (agg_trades, 20), "GET v1/klines": (klines, BY_LIMIT),
    "GET v1/continuousKlines": (partial(klines, name="pair"), BY_LIMIT),
    "GET v1/markPriceKlines": (klines, BY_LIMIT),
    "GET v1/indexPriceKlines": (partial(klines, name="pair"), BY_LIMIT),
    "GET v1/ticker/24hr": (each(lambda p, symbol: p.engine.feed(symbol).ticker()), (1, 40)),
    "GET v1/premiumIndex": (each(premium_index), (1, 10)), "GET v1/fundingRate": (funding_rates, 0),
    "GET v1/fundingInfo": (fixed([]), 0), "GET v1/ticker/price": (each(last_price), (1, 2)),
    "GET v2/ticker/price": (each(last_price), (1, 2)),
    "GET v1/ticker/bookTicker": (each(book_ticker), (2, 5)),
    "GET v1/openInterest": (lambda p: {"symbol": p["symbol"], "openInterest": "0.000",
                                       "time": p.engine.now_ms()},)}
KEYED: dict[str, tuple[Any, ...]] = {
    "POST v1/listenKey": (listen_key,), "PUT v1/listenKey": (keep_listen_key,),
    "DELETE v1/listenKey": (drop_listen_key,)}
SIGNED: dict[str, tuple[Any, ...]] = {
    "GET v2/account": (lambda p: shapes.account_json(p.ledger, p.account, 2), 5),
    "GET v3/account": (lambda p: shapes.account_json(p.ledger, p.account, 3), 5),
    "GET v2/balance": (lambda p: shapes.balance_json(p.ledger, p.account), 5),
    "GET v3/balance": (lambda p: shapes.balance_json(p.ledger, p.account), 5),
    "GET v2/positionRisk": (partial(positions, version=2), 5),
    "GET v3/positionRisk": (partial(positions, version=3), 5),
    "GET v1/accountConfig": (lambda p: shapes.ACCOUNT | mode(p), 5),
    "GET v1/symbolConfig": (each(symbol_config, is_list=True), 5),
    "GET v1/positionSide/dual": (mode, 30), "POST v1/positionSide/dual": (set_dual,),
    "GET v1/multiAssetsMargin": (fixed({"multiAssetsMargin": False}), 30),
    "GET v1/leverageBracket": (each(lambda p, symbol: shapes.brackets_json(symbol), is_list=True),),
    "POST v1/leverage": (set_leverage,), "POST v1/marginType": (set_margin_type,),
    "GET v1/commissionRate": (commission, 20),
    "GET v1/rateLimit/order": (lambda p: p.engine.limits.listing()[1:],),
    "GET v1/income": (partial(history, kind="income", limit=100), 30),
    "GET v1/userTrades": (partial(history, kind="fill"), 5),
    "GET v1/order": (partial(get, kind="order"),), "DELETE v1/order": (partial(cancel, kind="order"),),
    "GET v1/openOrder": (partial(get, kind="order", is_open=True),),
    "GET v1/openOrders": (partial(list_open, kind="order"), (1, 40)),
    "DELETE v1/allOpenOrders": (partial(cancel_all, kind="order"),),
    "DELETE v1/batchOrders": (cancel_orders,), "POST v1/countdownCancelAll": (count_down, 10),
    "GET v1/allOrders": (partial(history, kind="order"), 5),
    "GET v1/algoOrder": (partial(get, kind="algo"),), "DELETE v1/algoOrder": (partial(cancel, kind="algo"),),
    "GET v1/openAlgoOrders": (partial(list_open, kind="algo"), (1, 40)),
    "DELETE v1/algoOpenOrders": (partial(cancel_all, kind="algo"),),
    "GET v1/allAlgoOrders": (partial(history, kind="algo"), 5),
    "POST v1/order": (new_order, 0, 1), "POST v1/algoOrder": (new_algo, 0, 1),  # what it counts as orders
    "POST v1/batchOrders": (new_orders, 0, 5)}
ROUTES = {
    **{name.replace(" ", " /fapi/"): Route(security, *row) for security, table in (
        ("none", PUBLIC), ("key", KEYED), ("signed", SIGNED)) for name, row in table.items()},
    "GET /sapi/v1/account/apiRestrictions": Route("signed", fixed(RIGHTS)),
    # What ccxt asks of the spot side when it loads markets with a key.
    "GET /sapi/v1/capital/config/getall": Route("signed", fixed([]), 10),
    "GET /sapi/v1/margin/allPairs": Route("key", fixed([])),
    "GET /sapi/v1/margin/isolated/allPairs": Route("signed", fixed([]), 10)}
