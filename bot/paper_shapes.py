"""How the paper exchange words things: REST answers and user-stream events as Binance USD-M sends them.

Source: recorded and documented samples of the real API; numbers are strings, times milliseconds.
"""

from decimal import ROUND_DOWN, Decimal
from typing import Any

from bot import paper_model as model
from bot.paper_ledger import Ledger
from bot.paper_model import BRACKETS, ZERO, Contract, Fill, Income, Order, OrderEvent, Position

Json = dict[str, Any]

ACCOUNT = {"feeTier": 0, "canTrade": True, "canDeposit": True, "canWithdraw": True, "updateTime": 0,
           "multiAssetsMargin": False, "tradeGroupId": -1}
# The user stream's letter for a field of the REST answer: of all orders, plain ones, conditional ones.
LETTERS = {"s": "symbol", "S": "side", "ps": "positionSide", "f": "timeInForce", "p": "price",
           "wt": "workingType", "pm": "priceMatch", "pP": "priceProtect", "R": "reduceOnly",
           "cp": "closePosition", "V": "selfTradePreventionMode", "gtd": "goodTillDate"}
ORDER_LETTERS = LETTERS | {"c": "clientOrderId", "i": "orderId", "o": "type", "ot": "origType",
                           "q": "origQty", "z": "executedQty", "ap": "avgPrice", "sp": "stopPrice",
                           "X": "status", "T": "updateTime"}
ALGO_LETTERS = LETTERS | {"caid": "clientAlgoId", "aid": "algoId", "at": "algoType", "o": "orderType",
                          "q": "quantity", "aq": "actualQty", "ap": "actualPrice", "ai": "actualOrderId",
                          "tp": "triggerPrice", "X": "algoStatus", "tt": "triggerTime"}


def amount(value: Decimal) -> str:
    """Return money as text, to eight places."""
    return f"{value.quantize(model.MONEY, ROUND_DOWN):f}"


def row_json(row: Order | Fill | Income, ledger: Ledger) -> Json:
    """Return a row of /fapi/v1/order, algoOrder, userTrades or income."""
    if isinstance(row, Order):
        return _order(row, ledger.contracts[row.symbol])
    if isinstance(row, Fill):
        price, qty = ledger.contracts[row.symbol].level(row.price, row.qty)
        return {
            "symbol": row.symbol, "id": row.id, "orderId": row.order_id, "side": row.side, "price": price,
            "qty": qty, "realizedPnl": amount(row.realized), "quoteQty": f"{row.price * row.qty:f}",
            "commission": amount(row.fee), "commissionAsset": "USDT", "time": row.time_ms,
            "positionSide": "BOTH", "buyer": row.side == "BUY", "maker": row.is_maker}
    trade = str(row.trade_id or "")
    return {"symbol": row.symbol, "incomeType": row.reason, "income": amount(row.amount), "asset": "USDT",
            "info": trade or row.reason, "time": row.time_ms, "tranId": row.id, "tradeId": trade}


def _order(order: Order, contract: Contract) -> Json:
    price, filled = contract.level(order.price, order.filled)
    trigger, qty = contract.level(order.trigger, order.qty)
    average = contract.price(order.spent / order.filled, 4) if order.filled else "0.00"
    same = {
        "symbol": order.symbol, "side": order.side, "positionSide": "BOTH", "timeInForce": order.tif,
        "price": price, "workingType": order.working_type, "priceMatch": "NONE",
        "priceProtect": False, "reduceOnly": order.reduce_only, "closePosition": order.close_position,
        "selfTradePreventionMode": "EXPIRE_MAKER", "goodTillDate": 0, "updateTime": order.update_ms}
    if order.kind == "order":
        return same | {
            "orderId": order.id, "clientOrderId": order.client_id, "status": order.status,
            "type": order.type, "origType": order.orig_type, "origQty": qty, "executedQty": filled,
            "cumQty": filled, "cumQuote": f"{order.spent:f}", "avgPrice": average, "stopPrice": trigger,
            "time": order.time_ms}
    return same | dict.fromkeys(("tpTriggerPrice", "tpPrice", "slTriggerPrice", "slPrice"), "0.000") | {
        "algoId": order.id, "clientAlgoId": order.client_id, "algoStatus": order.status,
        "algoType": "CONDITIONAL", "orderType": order.type, "quantity": qty,
        "actualOrderId": str(order.ref or ""), "actualPrice": average, "actualQty": filled,
        "triggerPrice": trigger, "icebergQuantity": None, "tpOrderType": "", "createTime": order.time_ms,
        "triggerTime": order.trigger_ms}


def brackets_json(symbol: str) -> Json:
    """Return a symbol's entry of /fapi/v1/leverageBracket."""
    floors = [0, *(int(cap) for cap, *_ in BRACKETS)]
    return {"symbol": symbol, "brackets": [
        {"bracket": i + 1, "initialLeverage": leverage, "notionalCap": int(cap), "notionalFloor": floors[i],
         "maintMarginRatio": float(ratio), "cum": float(cum)}
        for i, (cap, leverage, ratio, cum) in enumerate(BRACKETS)]}


def position_json(ledger: Ledger, name: str, symbol: str) -> Json:
    """Return a position with the fields of positionRisk and of account's positions, all versions."""
    position, contract, mark = ledger.position(name, symbol), ledger.contracts[symbol], ledger.mark(symbol)
    leverage, notional = ledger.leverage(name, symbol), position.qty * mark
    initial, cap = amount(abs(notional) / leverage), str(model.notional_max(leverage))
    profit = amount(notional - position.cost)
    return {
        "symbol": symbol, "positionAmt": contract.qty(position.qty), "positionSide": "BOTH",
        "entryPrice": contract.price(position.entry, 3), "breakEvenPrice": _even(position, ledger, contract),
        "markPrice": amount(mark), "unRealizedProfit": profit, "unrealizedProfit": profit,
        "notional": amount(notional),
        "liquidationPrice": contract.price(ledger.liquidation_price(name, symbol), 3),
        "isolatedMargin": "0", "isolatedWallet": "0", "isolated": False, "marginType": "cross",
        "isAutoAddMargin": "false", "leverage": str(leverage), "maxNotionalValue": cap, "maxNotional": cap,
        "marginAsset": "USDT", "initialMargin": initial, "positionInitialMargin": initial,
        "maintMargin": amount(model.maintenance(notional)), "openOrderInitialMargin": "0", "adl": 1,
        "bidNotional": "0", "askNotional": "0", "updateTime": position.update_ms}


def account_json(ledger: Ledger, name: str, version: int) -> Json:
    """Return the account as /fapi/v2/account or v3/account do."""
    account = ledger.accounts[name]
    bound, resting, unrealized = ledger.margin(name)
    wallet, free = amount(account.wallet), amount(max(ZERO, ledger.available(name)))
    asset = {
        "walletBalance": wallet, "unrealizedProfit": amount(unrealized),
        "marginBalance": amount(account.wallet + unrealized), "maintMargin": amount(ledger.maintained(name)),
        "initialMargin": amount(bound + resting), "positionInitialMargin": amount(bound),
        "openOrderInitialMargin": amount(resting), "crossWalletBalance": wallet,
        "crossUnPnl": amount(unrealized)}
    totals = {f"total{key[0].upper()}{key[1:]}": value for key, value in asset.items()}
    frees = {"availableBalance": free, "maxWithdrawAmount": free}
    shown = ledger.contracts if version == 2 else ledger.held(name)
    return {
        **(ACCOUNT if version == 2 else {}), **totals, **frees,
        "assets": [{"asset": "USDT", **asset, **frees, "marginAvailable": True,
                    "updateTime": account.update_ms}],
        "positions": [position_json(ledger, name, symbol) for symbol in shown]}


def balance_json(ledger: Ledger, name: str) -> list[Json]:
    """Return /fapi/v2/balance, which v3 equals."""
    asset = account_json(ledger, name, 3)["assets"][0]
    keys = ("asset", "crossWalletBalance", "crossUnPnl", "availableBalance", "maxWithdrawAmount",
            "marginAvailable", "updateTime")
    return [{"accountAlias": "SgsR", "balance": asset["walletBalance"], **{key: asset[key] for key in keys}}]


def event_json(event: model.Event, ledger: Ledger, now_ms: int) -> list[Json]:
    """Return what the user stream says about an event."""
    if isinstance(event, OrderEvent):
        return _order_event(event, ledger.contracts[event.order.symbol], now_ms)
    return [_account_event(event, ledger, now_ms)] if isinstance(event, model.AccountEvent) else []


def _order_event(event: OrderEvent, contract: Contract, now_ms: int) -> list[Json]:
    order, fill, times = event.order, event.fill, {"T": event.order.update_ms, "E": now_ms}
    row = _order(order, contract)
    if order.kind == "algo":
        body = {letter: row[name] for letter, name in ALGO_LETTERS.items()} | {
            "act": "MARKET" if order.ref else "0", **({"rm": order.reason} if order.reason else {})}
        return [{"e": "ALGO_UPDATE", **times, "o": body}]
    price, qty = contract.level(fill.price, fill.qty) if fill else ("0", "0")
    body = {letter: row[name] for letter, name in ORDER_LETTERS.items()} | {
        "x": event.execution, "l": qty, "L": price, "t": fill.id if fill else 0,
        "m": bool(fill and fill.is_maker), "rp": amount(fill.realized) if fill else "0",
        "b": "0", "a": "0", "si": 0, "ss": 0}
    update = {"e": "ORDER_TRADE_UPDATE", **times, "o": body}
    if not fill:
        return [update]
    body |= {"N": "USDT", "n": amount(fill.fee)}
    return [{"e": "TRADE_LITE", **times, **{key: body[key] for key in "sqpmcSLlti"}}, update]


def _account_event(event: model.AccountEvent, ledger: Ledger, now_ms: int) -> Json:
    if event.reason == "CONFIG":
        return {"e": "ACCOUNT_CONFIG_UPDATE", "T": event.time_ms, "E": now_ms,
                "ac": {"s": event.symbol, "l": ledger.leverage(event.account, event.symbol)}}
    wallet, positions = amount(event.wallet), []
    if event.symbol:
        position, contract = event.position, ledger.contracts[event.symbol]
        positions.append({
            "s": event.symbol, "pa": contract.qty(position.qty), "mt": "cross", "iw": "0", "ps": "BOTH",
            "ep": contract.price(position.entry, 3), "bep": _even(position, ledger, contract),
            "cr": amount(position.realized), "ma": "USDT",
            "up": amount(position.qty * ledger.mark(event.symbol) - position.cost)})
    return {"e": "ACCOUNT_UPDATE", "T": event.time_ms, "E": now_ms, "a": {
        "m": event.reason, "P": positions,
        "B": [{"a": "USDT", "wb": wallet, "cw": wallet, "bc": amount(event.change)}]}}


def _even(position: Position, ledger: Ledger, contract: Contract) -> str:
    # Where closing at the taker's fee would bring nothing and cost nothing.
    fee = ledger.taker_fee if position.qty > 0 else -ledger.taker_fee
    return contract.price(position.entry * (1 + fee) / (1 - fee), 3)
