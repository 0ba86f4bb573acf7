"""How the paper exchange words things: REST rows and user-stream events as Binance USD-M sends them.

Source: recorded and documented samples of the real API; numbers are strings, times milliseconds.
"""

from collections.abc import Iterator
from decimal import ROUND_DOWN, Decimal
from typing import Any

from bot import paper_model as model
from bot.paper_ledger import Ledger
from bot.paper_model import BRACKETS, ZERO, Contract, Fill, Income, Order, Position

Json = dict[str, Any]

ACCOUNT = {"feeTier": 0, "canTrade": True, "canDeposit": True, "canWithdraw": True, "updateTime": 0,
           "multiAssetsMargin": False, "tradeGroupId": -1}
# The user stream's names for fields of a position's row.
POSITION = {"s": "symbol", "pa": "positionAmt", "ep": "entryPrice", "bep": "breakEvenPrice",
            "up": "unrealizedProfit", "mt": "marginType", "iw": "isolatedWallet", "ps": "positionSide",
            "ma": "marginAsset", "cr": "realized"}


def amount(value: Decimal) -> str:
    """Return money as text, to eight places."""
    return f"{value.quantize(model.MONEY, ROUND_DOWN):f}"


def row_json(row: Order | Fill | Income, ledger: Ledger) -> Json:
    """Return a row of /fapi/v1/order, algoOrder, userTrades or income."""
    if isinstance(row, Order):
        return {name: value for name, _, value in _fields(row, ledger.contracts[row.symbol]) if name}
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


def _fields(order: Order, contract: Contract) -> Iterator[tuple[str, str, Any]]:
    # Its name in a REST row, its letter in the user stream ("" where it has none), and the value.
    price, filled = contract.level(order.price, order.filled)
    trigger, qty = contract.level(order.trigger, order.qty)
    average = contract.price(order.spent / order.filled, 4) if order.filled else "0.00"
    yield from (
        ("symbol", "s", order.symbol), ("side", "S", order.side), ("positionSide", "ps", "BOTH"),
        ("timeInForce", "f", order.tif), ("price", "p", price), ("workingType", "wt", order.working_type),
        ("priceMatch", "pm", "NONE"), ("priceProtect", "pP", False), ("reduceOnly", "R", order.reduce_only),
        ("closePosition", "cp", order.close_position), ("goodTillDate", "gtd", 0),
        ("selfTradePreventionMode", "V", "EXPIRE_MAKER"))
    if order.kind == "order":
        yield from (
            ("orderId", "i", order.id), ("clientOrderId", "c", order.client_id), ("type", "o", order.type),
            ("status", "X", order.status), ("origType", "ot", order.orig_type), ("origQty", "q", qty),
            ("executedQty", "z", filled), ("cumQty", "", filled), ("cumQuote", "", f"{order.spent:f}"),
            ("avgPrice", "ap", average), ("stopPrice", "sp", trigger), ("time", "", order.time_ms),
            ("updateTime", "T", order.update_ms))
    else:
        yield from (
            ("algoId", "aid", order.id), ("clientAlgoId", "caid", order.client_id),
            ("algoStatus", "X", order.status), ("algoType", "at", "CONDITIONAL"), ("quantity", "q", qty),
            ("orderType", "o", order.type), ("actualOrderId", "ai", str(order.ref or "")),
            ("actualPrice", "ap", average), ("actualQty", "aq", filled), ("triggerPrice", "tp", trigger),
            ("triggerTime", "tt", order.trigger_ms), ("createTime", "", order.time_ms),
            ("updateTime", "", order.update_ms), ("icebergQuantity", "", None), ("tpOrderType", "", ""),
            *((name, "", "0.000") for name in ("tpTriggerPrice", "tpPrice", "slTriggerPrice", "slPrice")),
            ("", "act", "MARKET" if order.ref else "0"))


def brackets_json(symbol: str) -> Json:
    """Return a symbol's entry of /fapi/v1/leverageBracket."""
    floors = [0, *(int(cap) for cap, *_ in BRACKETS)]
    return {"symbol": symbol, "brackets": [
        {"bracket": i + 1, "initialLeverage": leverage, "notionalCap": int(cap), "notionalFloor": floors[i],
         "maintMarginRatio": float(ratio), "cum": float(cum)}
        for i, (cap, leverage, ratio, cum) in enumerate(BRACKETS)]}


def position_json(ledger: Ledger, name: str, symbol: str, then: Position | None = None) -> Json:
    """Return a position, as it is or was then, with the fields of all positionRisk and account versions."""
    position, contract = then or ledger.position(name, symbol), ledger.contracts[symbol]
    leverage, mark = ledger.leverage(name, symbol), ledger.mark(symbol)
    notional, fee = position.qty * mark, ledger.taker_fee if position.qty > 0 else -ledger.taker_fee
    initial, cap = amount(abs(notional) / leverage), str(model.notional_max(leverage))
    profit = amount(notional - position.cost)
    return {
        "symbol": symbol, "positionAmt": contract.qty(position.qty), "positionSide": "BOTH",
        "entryPrice": contract.price(position.entry, 3),  # and where closing as taker would bring nothing:
        "breakEvenPrice": contract.price(position.entry * (1 + fee) / (1 - fee), 3),
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
    return {
        **(ACCOUNT if version == 2 else {}), **totals, **frees,
        "assets": [{"asset": "USDT", **asset, **frees, "marginAvailable": True,
                    "updateTime": account.update_ms}],
        "positions": [position_json(ledger, name, symbol)
                      for symbol in (ledger.contracts if version == 2 else ledger.held(name))]}


def balance_json(ledger: Ledger, name: str) -> list[Json]:
    """Return /fapi/v2/balance, which v3 equals."""
    asset = account_json(ledger, name, 3)["assets"][0]
    keys = ("asset", "crossWalletBalance", "crossUnPnl", "availableBalance", "maxWithdrawAmount",
            "marginAvailable", "updateTime")
    return [{"accountAlias": "SgsR", "balance": asset["walletBalance"], **{key: asset[key] for key in keys}}]


def event_json(event: model.Event, ledger: Ledger, now_ms: int) -> list[Json]:
    """Return what the user stream says about an event."""
    if isinstance(event, model.AccountEvent):
        what: Json = {"e": "ACCOUNT_UPDATE", "T": event.time_ms, "E": now_ms}
        if event.reason == "CONFIG":
            setting = {"s": event.symbol, "l": ledger.leverage(event.account, event.symbol)}
            return [what | {"e": "ACCOUNT_CONFIG_UPDATE", "ac": setting}]
        wallet, rows = amount(event.wallet), []
        if event.symbol:
            row = position_json(ledger, event.account, event.symbol, event.position)
            row["realized"] = amount(event.position.realized)
            rows.append({letter: row[name] for letter, name in POSITION.items()})
        return [what | {"a": {"m": event.reason, "P": rows, "B": [
            {"a": "USDT", "wb": wallet, "cw": wallet, "bc": amount(event.change)}]}}]
    if not isinstance(event, model.OrderEvent):
        return []
    order, fill, times = event.order, event.fill, {"T": event.order.update_ms, "E": now_ms}
    contract = ledger.contracts[order.symbol]
    body = {letter: value for _, letter, value in _fields(order, contract) if letter}
    if order.kind == "algo":
        return [{"e": "ALGO_UPDATE", **times, "o": body | ({"rm": order.reason} if order.reason else {})}]
    price, qty = contract.level(fill.price, fill.qty) if fill else ("0", "0")
    body |= {"x": event.execution, "l": qty, "L": price, "t": fill.id if fill else 0,
             "m": bool(fill and fill.is_maker), "rp": amount(fill.realized) if fill else "0",
             "b": "0", "a": "0", "si": 0, "ss": 0} | ({"N": "USDT", "n": amount(fill.fee)} if fill else {})
    lite = [{"e": "TRADE_LITE", **times, **{key: body[key] for key in "sqpmcSLlti"}}] if fill else []
    return [*lite, {"e": "ORDER_TRADE_UPDATE", **times, "o": body}]
