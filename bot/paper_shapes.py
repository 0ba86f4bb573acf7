"""How the paper exchange words things: REST answers and user-stream events as Binance USD-M sends them.

Source: recorded and documented samples of the real API; numbers are strings, times milliseconds.
"""

from decimal import ROUND_DOWN, Decimal
from typing import Any

from bot.paper_ledger import Ledger
from bot.paper_model import (
    ZERO,
    AccountEvent,
    Algo,
    AlgoEvent,
    Event,
    Fill,
    Income,
    Order,
    OrderEvent,
    Position,
    Rules,
)

Json = dict[str, Any]
# Notional cap, leverage, maintenance ratio, cum: the real BTCUSDT table's first rows, for all symbols.
BRACKETS = ((300_000, 125, "0.004", "0"), (800_000, 100, "0.005", "300"), (3_000_000, 75, "0.0065", "1500"),
            (12_000_000, 50, "0.01", "12000"), (70_000_000, 25, "0.02", "132000"),
            (100_000_000, 20, "0.025", "482000"))
RATE_LIMITS = [
    {"rateLimitType": "REQUEST_WEIGHT", "interval": "MINUTE", "intervalNum": 1, "limit": 2400},
    {"rateLimitType": "ORDERS", "interval": "MINUTE", "intervalNum": 1, "limit": 1200},
    {"rateLimitType": "ORDERS", "interval": "SECOND", "intervalNum": 10, "limit": 300}]


def amount(value: Decimal) -> str:
    """Return money as text, to eight places."""
    return f"{value.quantize(Decimal('0.00000001'), ROUND_DOWN):f}"


def price_text(value: Decimal, rules: Rules, more: int = 0) -> str:
    """Return a price as text, to the symbol's precision and `more` places."""
    return f"{value.quantize(rules.price_step.normalize().scaleb(-more), ROUND_DOWN):f}" if value else "0"


def qty_text(value: Decimal, rules: Rules) -> str:
    return f"{value.quantize(rules.qty_step.normalize()):f}"


def average(row: Order | Algo, rules: Rules) -> str:
    return price_text(row.quote / row.filled, rules, 4) if row.filled else "0.00"


def order_json(order: Order, rules: Rules) -> Json:
    """Return an order as GET, POST and DELETE of /fapi/v1/order do."""
    return {
        "orderId": order.id, "symbol": order.symbol, "status": order.status,
        "clientOrderId": order.client_id, "price": price_text(order.price, rules),
        "avgPrice": average(order, rules), "origQty": qty_text(order.qty, rules),
        "executedQty": qty_text(order.filled, rules), "cumQty": qty_text(order.filled, rules),
        "cumQuote": f"{order.quote:f}", "timeInForce": order.tif, "type": order.type,
        "reduceOnly": order.reduce_only, "closePosition": order.close_position, "side": order.side,
        "positionSide": "BOTH", "stopPrice": price_text(order.stop_price, rules),
        "workingType": order.working_type, "priceProtect": False, "origType": order.orig_type,
        "priceMatch": "NONE", "selfTradePreventionMode": "EXPIRE_MAKER", "goodTillDate": 0,
        "time": order.time_ms, "updateTime": order.update_ms}


def algo_json(algo: Algo, rules: Rules) -> Json:
    """Return a conditional order as /fapi/v1/algoOrder does."""
    return {
        "algoId": algo.id, "clientAlgoId": algo.client_id, "algoType": "CONDITIONAL",
        "orderType": algo.type, "symbol": algo.symbol, "side": algo.side, "positionSide": "BOTH",
        "timeInForce": algo.tif, "quantity": qty_text(algo.qty, rules), "algoStatus": algo.status,
        "actualOrderId": str(algo.order_id or ""), "actualPrice": average(algo, rules),
        "actualQty": qty_text(algo.filled, rules), "triggerPrice": price_text(algo.trigger, rules),
        "price": "0", "icebergQuantity": None, "tpTriggerPrice": "0.000", "tpPrice": "0.000",
        "slTriggerPrice": "0.000", "slPrice": "0.000", "tpOrderType": "",
        "selfTradePreventionMode": "EXPIRE_MAKER", "workingType": algo.working_type, "priceMatch": "NONE",
        "closePosition": algo.close_position, "priceProtect": False, "reduceOnly": algo.reduce_only,
        "createTime": algo.time_ms, "updateTime": algo.update_ms, "triggerTime": algo.trigger_ms,
        "goodTillDate": 0}


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
    return {"symbol": line.symbol, "incomeType": line.kind, "income": amount(line.amount), "asset": "USDT",
            "info": trade or line.kind, "time": line.time_ms, "tranId": line.id, "tradeId": trade}


def maintenance(notional: Decimal) -> Decimal:
    """Return the maintenance margin of a position's notional."""
    for cap, _, ratio, cum in BRACKETS:
        if notional <= cap or cap == BRACKETS[-1][0]:
            return notional * Decimal(ratio) - Decimal(cum)
    return ZERO


def brackets_json(symbol: str) -> Json:
    """Return a symbol's entry of /fapi/v1/leverageBracket."""
    floor, rows = 0, []
    for number, (cap, leverage, ratio, cum) in enumerate(BRACKETS, 1):
        rows.append({"bracket": number, "initialLeverage": leverage, "notionalCap": cap,
                     "notionalFloor": floor, "maintMarginRatio": float(ratio), "cum": float(cum)})
        floor = cap
    return {"symbol": symbol, "brackets": rows}


def position_json(ledger: Ledger, name: str, symbol: str, version: int) -> Json:
    """Return a position as positionRisk does, version 2 or 3."""
    position, rules, mark = ledger.position(name, symbol), ledger.rules[symbol], ledger.marks[symbol]
    leverage = ledger.leverage(name, symbol)
    notional, entry = position.qty * mark, position.entry
    row: Json = {
        "symbol": symbol, "positionAmt": qty_text(position.qty, rules),
        "entryPrice": price_text(entry, rules, 3),
        "breakEvenPrice": price_text(_even(position, ledger), rules, 3),
        "markPrice": amount(mark), "unRealizedProfit": amount(position.unrealized(mark)),
        "liquidationPrice": price_text(_liquidation(ledger, name, symbol), rules, 3),
        "isolatedMargin": "0", "isolatedWallet": "0", "positionSide": "BOTH",
        "notional": amount(notional), "updateTime": position.update_ms}
    if version == 2:
        cap = next((cap for cap, most, *_ in reversed(BRACKETS) if leverage <= most), BRACKETS[0][0])
        return row | {"leverage": str(leverage), "maxNotionalValue": str(cap), "marginType": "cross",
                      "isAutoAddMargin": "false"}
    initial = abs(notional) / leverage
    return row | {"marginAsset": rules.quote, "initialMargin": amount(initial),
                  "maintMargin": amount(maintenance(abs(notional))), "positionInitialMargin": amount(initial),
                  "openOrderInitialMargin": "0", "adl": 1, "bidNotional": "0", "askNotional": "0"}


def account_json(ledger: Ledger, name: str, version: int) -> Json:
    """Return the account as /fapi/v2/account or v3/account do."""
    account = ledger.accounts[name]
    bound, resting, unrealized = ledger.margin(name)
    held = {symbol: position.qty for symbol, position in account.positions.items() if position.qty}
    maintained = sum((maintenance(abs(qty) * ledger.marks[symbol]) for symbol, qty in held.items()), ZERO)
    free = max(ZERO, ledger.available(name))
    asset = {
        "walletBalance": amount(account.wallet), "unrealizedProfit": amount(unrealized),
        "marginBalance": amount(account.wallet + unrealized), "maintMargin": amount(maintained),
        "initialMargin": amount(bound + resting), "positionInitialMargin": amount(bound),
        "openOrderInitialMargin": amount(resting), "crossWalletBalance": amount(account.wallet),
        "crossUnPnl": amount(unrealized), "availableBalance": amount(free), "maxWithdrawAmount": amount(free)}
    totals = {f"total{key[0].upper()}{key[1:]}": value for key, value in asset.items()
              if key not in ("availableBalance", "maxWithdrawAmount")}
    shown = ledger.rules if version == 2 else held
    general = {"feeTier": 0, "canTrade": True, "canDeposit": True, "canWithdraw": True, "updateTime": 0,
               "multiAssetsMargin": False, "tradeGroupId": -1} if version == 2 else {}
    return general | totals | {
        "availableBalance": asset["availableBalance"], "maxWithdrawAmount": asset["maxWithdrawAmount"],
        "assets": [{"asset": "USDT", **asset, "marginAvailable": True, "updateTime": account.update_ms}],
        "positions": [_account_position(ledger, name, symbol, version) for symbol in shown]}


def balance_json(ledger: Ledger, name: str) -> list[Json]:
    """Return /fapi/v2/balance, which v3 equals."""
    asset = account_json(ledger, name, 3)["assets"][0]
    return [{"accountAlias": "SgsR", "asset": "USDT", "balance": asset["walletBalance"],
             **{key: asset[key] for key in ("crossWalletBalance", "crossUnPnl", "availableBalance",
                                            "maxWithdrawAmount", "marginAvailable", "updateTime")}}]


def event_json(event: Event, ledger: Ledger, now_ms: int) -> list[Json]:
    """Return what the user stream says about an event."""
    if isinstance(event, OrderEvent):
        return _order_events(event, ledger.rules[event.order.symbol], now_ms)
    if isinstance(event, AlgoEvent):
        return [_algo_event(event.algo, ledger.rules[event.algo.symbol], now_ms)]
    return [_account_event(event, ledger, now_ms)]


def _account_position(ledger: Ledger, name: str, symbol: str, version: int) -> Json:
    row = position_json(ledger, name, symbol, 3)
    keys = ("symbol", "positionSide", "positionAmt", "notional", "isolatedWallet", "initialMargin",
            "maintMargin", "positionInitialMargin", "openOrderInitialMargin", "updateTime")
    shown = {key: row[key] for key in keys} | {"unrealizedProfit": row["unRealizedProfit"]}
    if version == 2:
        shown |= {"entryPrice": row["entryPrice"], "breakEvenPrice": row["breakEvenPrice"],
                  "leverage": str(ledger.leverage(name, symbol)), "isolated": False,
                  "maxNotional": str(BRACKETS[0][0]), "bidNotional": "0", "askNotional": "0"}
    return shown | {"isolatedMargin": "0"}


def _even(position: Position, ledger: Ledger) -> Decimal:
    # Where closing at the taker's fee would bring nothing and cost nothing.
    sign = 1 if position.qty > 0 else -1
    return position.entry * (1 + sign * ledger.taker_fee) / (1 - sign * ledger.taker_fee)


def _liquidation(ledger: Ledger, name: str, symbol: str) -> Decimal:
    # The mark at which the whole wallet covers this position's maintenance margin no more.
    position = ledger.position(name, symbol)
    if not position.qty:
        return ZERO
    mark, qty = ledger.marks[symbol], position.qty
    _, _, unrealized = ledger.margin(name)
    spare = ledger.accounts[name].wallet + unrealized - maintenance(abs(qty) * mark)
    return max(ZERO, mark - spare / (qty - abs(qty) * Decimal(BRACKETS[0][2])))


def _order_events(event: OrderEvent, rules: Rules, now_ms: int) -> list[Json]:
    order, fill = event.order, event.fill
    body: Json = {
        "s": order.symbol, "c": order.client_id, "S": order.side, "o": order.type, "f": order.tif,
        "q": qty_text(order.qty, rules), "p": price_text(order.price, rules), "ap": average(order, rules),
        "sp": price_text(order.stop_price, rules), "x": event.execution, "X": order.status, "i": order.id,
        "l": qty_text(fill.qty if fill else ZERO, rules), "z": qty_text(order.filled, rules),
        "L": price_text(fill.price if fill else ZERO, rules)}
    if fill:
        body |= {"N": rules.quote, "n": amount(fill.fee)}
    body |= {
        "T": order.update_ms, "t": fill.id if fill else 0, "b": "0", "a": "0",
        "m": bool(fill and fill.is_maker), "R": order.reduce_only, "wt": order.working_type,
        "ot": order.orig_type, "ps": "BOTH", "cp": order.close_position,
        "rp": amount(fill.realized) if fill else "0", "pP": False, "si": 0, "ss": 0, "V": "EXPIRE_MAKER",
        "pm": "NONE", "gtd": 0}
    times = {"T": order.update_ms, "E": now_ms}
    lite: list[Json] = []
    if fill:
        lite = [{"e": "TRADE_LITE", **times, "s": order.symbol, "q": body["q"], "p": body["p"],
                 "m": body["m"], "c": order.client_id, "S": order.side, "L": body["L"], "l": body["l"],
                 "t": fill.id, "i": order.id}]
    return [*lite, {"e": "ORDER_TRADE_UPDATE", **times, "o": body}]


def _algo_event(algo: Algo, rules: Rules, now_ms: int) -> Json:
    body: Json = {
        "caid": algo.client_id, "aid": algo.id, "at": "CONDITIONAL", "o": algo.type, "s": algo.symbol,
        "S": algo.side, "ps": "BOTH", "f": algo.tif, "q": qty_text(algo.qty, rules), "X": algo.status,
        "ai": str(algo.order_id or ""), "ap": average(algo, rules), "aq": qty_text(algo.filled, rules),
        "act": "MARKET" if algo.order_id else "0", "tp": price_text(algo.trigger, rules), "p": "0",
        "V": "EXPIRE_MAKER", "wt": algo.working_type, "pm": "NONE", "cp": algo.close_position, "pP": False,
        "R": algo.reduce_only, "tt": algo.trigger_ms, "gtd": 0}
    if algo.reason:
        body["rm"] = algo.reason
    return {"e": "ALGO_UPDATE", "T": algo.update_ms, "E": now_ms, "o": body}


def _account_event(event: AccountEvent, ledger: Ledger, now_ms: int) -> Json:
    if event.reason == "CONFIG":
        return {"e": "ACCOUNT_CONFIG_UPDATE", "T": event.time_ms, "E": now_ms,
                "ac": {"s": event.symbol, "l": ledger.leverage(event.account, event.symbol)}}
    positions = []
    if event.symbol:
        position, rules = event.position, ledger.rules[event.symbol]
        positions = [{
            "s": event.symbol, "pa": qty_text(position.qty, rules),
            "ep": price_text(position.entry, rules, 3),
            "cr": amount(position.realized), "up": amount(position.unrealized(ledger.marks[event.symbol])),
            "mt": "cross", "iw": "0", "ps": "BOTH", "ma": rules.quote,
            "bep": price_text(_even(position, ledger), rules, 3)}]
    return {"e": "ACCOUNT_UPDATE", "T": event.time_ms, "E": now_ms, "a": {
        "m": event.reason, "B": [{"a": "USDT", "wb": amount(event.wallet), "cw": amount(event.wallet),
                                  "bc": amount(event.change)}], "P": positions}}
