"""How the paper exchange words things: REST answers and user-stream events as Binance USD-M sends them.

Source: recorded and documented samples of the real API; numbers are strings, times milliseconds.
"""

from decimal import ROUND_DOWN, Decimal
from typing import Any

from bot.paper_ledger import Ledger
from bot.paper_model import (
    BRACKETS,
    MONEY,
    ZERO,
    AccountEvent,
    Event,
    Fill,
    Income,
    Order,
    OrderEvent,
    Position,
    Rules,
    maintenance,
    notional_max,
)

Json = dict[str, Any]


def amount(value: Decimal) -> str:
    """Return money as text, to eight places."""
    return f"{value.quantize(MONEY, ROUND_DOWN):f}"


def price_text(value: Decimal, rules: Rules, more: int = 0) -> str:
    """Return a price as text, to the symbol's precision and `more` places."""
    return f"{value.quantize(rules.price_step.normalize().scaleb(-more), ROUND_DOWN):f}" if value else "0"


def qty_text(value: Decimal, rules: Rules) -> str:
    return f"{value.quantize(rules.qty_step.normalize()):f}"


def average(order: Order, rules: Rules) -> str:
    return price_text(order.spent / order.filled, rules, 4) if order.filled else "0.00"


def order_json(order: Order, rules: Rules) -> Json:
    """Return an order as /fapi/v1/order or, a conditional one, /fapi/v1/algoOrder does."""
    same = {
        "symbol": order.symbol, "side": order.side, "positionSide": "BOTH", "timeInForce": order.tif,
        "price": price_text(order.price, rules), "workingType": order.working_type, "priceMatch": "NONE",
        "priceProtect": False, "reduceOnly": order.reduce_only, "closePosition": order.close_position,
        "selfTradePreventionMode": "EXPIRE_MAKER", "goodTillDate": 0, "updateTime": order.update_ms}
    filled, trigger = qty_text(order.filled, rules), price_text(order.trigger, rules)
    if order.kind == "order":
        return same | {
            "orderId": order.id, "clientOrderId": order.client_id, "status": order.status,
            "type": order.type, "origType": order.orig_type, "origQty": qty_text(order.qty, rules),
            "executedQty": filled, "cumQty": filled, "cumQuote": f"{order.spent:f}",
            "avgPrice": average(order, rules), "stopPrice": trigger, "time": order.time_ms}
    return same | {
        "algoId": order.id, "clientAlgoId": order.client_id, "algoStatus": order.status,
        "algoType": "CONDITIONAL", "orderType": order.type, "quantity": qty_text(order.qty, rules),
        "actualOrderId": str(order.ref or ""), "actualPrice": average(order, rules), "actualQty": filled,
        "triggerPrice": trigger, "icebergQuantity": None, "tpTriggerPrice": "0.000", "tpPrice": "0.000",
        "slTriggerPrice": "0.000", "slPrice": "0.000", "tpOrderType": "", "createTime": order.time_ms,
        "triggerTime": order.trigger_ms}


def trade_json(fill: Fill, rules: Rules) -> Json:
    """Return a fill as /fapi/v1/userTrades does."""
    return {
        "symbol": fill.symbol, "id": fill.id, "orderId": fill.order_id, "side": fill.side,
        "price": price_text(fill.price, rules), "qty": qty_text(fill.qty, rules),
        "realizedPnl": amount(fill.realized), "quoteQty": f"{fill.price * fill.qty:f}",
        "commission": amount(fill.fee), "commissionAsset": rules.quote, "time": fill.time_ms,
        "positionSide": "BOTH", "buyer": fill.side == "BUY", "maker": fill.is_maker}


def income_json(line: Income) -> Json:
    """Return a line of /fapi/v1/income."""
    trade = str(line.trade_id or "")
    return {"symbol": line.symbol, "incomeType": line.reason, "income": amount(line.amount), "asset": "USDT",
            "info": trade or line.reason, "time": line.time_ms, "tranId": line.id, "tradeId": trade}


def brackets_json(symbol: str) -> Json:
    """Return a symbol's entry of /fapi/v1/leverageBracket."""
    floors = [0, *(int(cap) for cap, *_ in BRACKETS)]
    return {"symbol": symbol, "brackets": [
        {"bracket": i + 1, "initialLeverage": leverage, "notionalCap": int(cap), "notionalFloor": floors[i],
         "maintMarginRatio": float(ratio), "cum": float(cum)}
        for i, (cap, leverage, ratio, cum) in enumerate(BRACKETS)]}


def position_json(ledger: Ledger, name: str, symbol: str) -> Json:
    """Return a position with the fields of positionRisk and of account's positions, all versions."""
    position, rules, mark = ledger.position(name, symbol), ledger.rules[symbol], ledger.marks[symbol]
    leverage, notional = ledger.leverage(name, symbol), position.qty * mark
    initial = amount(abs(notional) / leverage)
    cap = notional_max(leverage)
    return {
        "symbol": symbol, "positionAmt": qty_text(position.qty, rules), "positionSide": "BOTH",
        "entryPrice": price_text(position.entry, rules, 3), "breakEvenPrice": _even(position, ledger, rules),
        "markPrice": amount(mark), "unRealizedProfit": amount(position.unrealized(mark)),
        "unrealizedProfit": amount(position.unrealized(mark)), "notional": amount(notional),
        "liquidationPrice": price_text(_liquidation(ledger, name, symbol), rules, 3),
        "isolatedMargin": "0", "isolatedWallet": "0", "isolated": False, "marginType": "cross",
        "isAutoAddMargin": "false", "leverage": str(leverage), "maxNotionalValue": str(cap),
        "maxNotional": str(cap), "marginAsset": rules.quote, "initialMargin": initial,
        "maintMargin": amount(maintenance(notional)), "positionInitialMargin": initial,
        "openOrderInitialMargin": "0", "adl": 1, "bidNotional": "0", "askNotional": "0",
        "updateTime": position.update_ms}


def account_json(ledger: Ledger, name: str, version: int) -> Json:
    """Return the account as /fapi/v2/account or v3/account do."""
    account = ledger.accounts[name]
    bound, resting, unrealized = ledger.margin(name)
    held = ledger.held(name)
    maintained = sum(map(maintenance, held.values()), ZERO)
    free = amount(max(ZERO, ledger.available(name)))
    asset = {
        "walletBalance": amount(account.wallet), "unrealizedProfit": amount(unrealized),
        "marginBalance": amount(account.wallet + unrealized), "maintMargin": amount(maintained),
        "initialMargin": amount(bound + resting), "positionInitialMargin": amount(bound),
        "openOrderInitialMargin": amount(resting), "crossWalletBalance": amount(account.wallet),
        "crossUnPnl": amount(unrealized)}
    totals = {f"total{key[0].upper()}{key[1:]}": value for key, value in asset.items()}
    frees = {"availableBalance": free, "maxWithdrawAmount": free}
    general = {"feeTier": 0, "canTrade": True, "canDeposit": True, "canWithdraw": True, "updateTime": 0,
               "multiAssetsMargin": False, "tradeGroupId": -1} if version == 2 else {}
    return {
        **general, **totals, **frees,
        "assets": [{"asset": "USDT", **asset, **frees, "marginAvailable": True,
                    "updateTime": account.update_ms}],
        "positions": [position_json(ledger, name, symbol) for symbol in (ledger.rules if general else held)]}


def balance_json(ledger: Ledger, name: str) -> list[Json]:
    """Return /fapi/v2/balance, which v3 equals."""
    asset = account_json(ledger, name, 3)["assets"][0]
    keys = ("asset", "crossWalletBalance", "crossUnPnl", "availableBalance", "maxWithdrawAmount",
            "marginAvailable", "updateTime")
    return [{"accountAlias": "SgsR", "balance": asset["walletBalance"], **{key: asset[key] for key in keys}}]


def event_json(event: Event, ledger: Ledger, now_ms: int) -> list[Json]:
    """Return what the user stream says about an event."""
    if isinstance(event, OrderEvent):
        rules, times = ledger.rules[event.order.symbol], {"T": event.order.update_ms, "E": now_ms}
        if event.order.kind == "algo":
            return [{"e": "ALGO_UPDATE", **times, "o": _algo_body(event.order, rules)}]
        body = _order_body(event, rules)
        lite = {key: body[key] for key in ("s", "q", "p", "m", "c", "S", "L", "l", "t", "i")}
        return [{"e": "TRADE_LITE", **times, **lite}] * bool(event.fill) + [
            {"e": "ORDER_TRADE_UPDATE", **times, "o": body}]
    return [_account_event(event, ledger, now_ms)] if isinstance(event, AccountEvent) else []


def _order_body(event: OrderEvent, rules: Rules) -> Json:
    order, fill = event.order, event.fill
    return {
        "s": order.symbol, "c": order.client_id, "S": order.side, "o": order.type, "f": order.tif,
        "q": qty_text(order.qty, rules), "p": price_text(order.price, rules), "ap": average(order, rules),
        "sp": price_text(order.trigger, rules), "x": event.execution, "X": order.status, "i": order.id,
        "l": qty_text(fill.qty if fill else ZERO, rules), "z": qty_text(order.filled, rules),
        "L": price_text(fill.price if fill else ZERO, rules),
        **({"N": rules.quote, "n": amount(fill.fee)} if fill else {}),
        "T": order.update_ms, "t": fill.id if fill else 0, "b": "0", "a": "0",
        "m": bool(fill and fill.is_maker), "R": order.reduce_only, "wt": order.working_type,
        "ot": order.orig_type, "ps": "BOTH", "cp": order.close_position, "pP": False, "si": 0, "ss": 0,
        "rp": amount(fill.realized) if fill else "0", "V": "EXPIRE_MAKER", "pm": "NONE", "gtd": 0}


def _algo_body(algo: Order, rules: Rules) -> Json:
    return {
        "caid": algo.client_id, "aid": algo.id, "at": "CONDITIONAL", "o": algo.type, "s": algo.symbol,
        "S": algo.side, "ps": "BOTH", "f": algo.tif, "q": qty_text(algo.qty, rules), "X": algo.status,
        "ai": str(algo.ref or ""), "ap": average(algo, rules), "aq": qty_text(algo.filled, rules),
        "act": "MARKET" if algo.ref else "0", "tp": price_text(algo.trigger, rules), "p": "0",
        "V": "EXPIRE_MAKER", "wt": algo.working_type, "pm": "NONE", "cp": algo.close_position, "pP": False,
        "R": algo.reduce_only, "tt": algo.trigger_ms, "gtd": 0,
        **({"rm": algo.reason} if algo.reason else {})}


def _account_event(event: AccountEvent, ledger: Ledger, now_ms: int) -> Json:
    if event.reason == "CONFIG":
        return {"e": "ACCOUNT_CONFIG_UPDATE", "T": event.time_ms, "E": now_ms,
                "ac": {"s": event.symbol, "l": ledger.leverage(event.account, event.symbol)}}
    wallet = amount(event.wallet)
    balance = {"a": "USDT", "wb": wallet, "cw": wallet, "bc": amount(event.change)}
    positions = []
    if event.symbol:
        position, rules = event.position, ledger.rules[event.symbol]
        positions.append({
            "s": event.symbol, "pa": qty_text(position.qty, rules), "mt": "cross", "iw": "0", "ps": "BOTH",
            "ep": price_text(position.entry, rules, 3), "bep": _even(position, ledger, rules),
            "cr": amount(position.realized), "ma": rules.quote,
            "up": amount(position.unrealized(ledger.marks[event.symbol]))})
    return {"e": "ACCOUNT_UPDATE", "T": event.time_ms, "E": now_ms,
            "a": {"m": event.reason, "B": [balance], "P": positions}}


def _even(position: Position, ledger: Ledger, rules: Rules) -> str:
    # Where closing at the taker's fee would bring nothing and cost nothing.
    fee = ledger.taker_fee if position.qty > 0 else -ledger.taker_fee
    return price_text(position.entry * (1 + fee) / (1 - fee), rules, 3)


def _liquidation(ledger: Ledger, name: str, symbol: str) -> Decimal:
    # The mark at which the whole wallet covers this position's maintenance margin no more.
    qty, mark = ledger.position(name, symbol).qty, ledger.marks[symbol]
    if not qty:
        return ZERO
    spare = ledger.accounts[name].wallet + ledger.margin(name)[2] - sum(
        map(maintenance, ledger.held(name).values()), ZERO)
    ratio = next(row[2] for row in BRACKETS if abs(qty * mark) <= row[0])
    return max(ZERO, mark - spare / (qty - abs(qty) * ratio))
