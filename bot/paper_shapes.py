"""How the paper exchange words things: REST rows and user-stream events as Binance USD-M sends them.

Source: recorded and documented samples of the real API; numbers are strings, times milliseconds.
"""

from decimal import ROUND_DOWN, Decimal
from typing import Any

from msgspec import to_builtins

from bot import paper_model as model
from bot.paper_ledger import Ledger
from bot.paper_model import ZERO, Contract, Fill, Income, Order, Position, table

Json = dict[str, Any]

# What is the same in all rows of a kind, and other names for fields of a row: (streams) letters.
SAME = table("same", dict[str, Json])
LETTERS = table("letters", dict[str, dict[str, str]])


def lettered(kind: str, row: Json) -> Json:
    """Return those fields of a row that have a name in a table of LETTERS, by it."""
    return {letter: row[name] for letter, name in LETTERS[kind].items()}


def amount(value: Decimal) -> str:
    return f"{value.quantize(model.MONEY, ROUND_DOWN):f}"


def row_json(row: Order | Fill | Income, ledger: Ledger) -> Json:
    """Return a row of /fapi/v1/order, algoOrder, userTrades or income."""
    if isinstance(row, Order):
        return order_json(row, ledger.contracts[row.symbol])
    if isinstance(row, Fill):
        price, qty = ledger.contracts[row.symbol].level(row.price, row.qty)
        return SAME["fill"] | lettered("fill", to_builtins(row) | {
            "price": price, "qty": qty, "spent": f"{row.price * row.qty:f}", "fee": amount(row.fee),
            "realized": amount(row.realized), "is_buyer": row.side == "BUY"})
    trade = str(row.trade_id or "")
    return {"symbol": row.symbol, "incomeType": row.reason, "income": amount(row.amount), "asset": "USDT",
            "info": trade or row.reason, "time": row.time_ms, "tranId": row.id, "tradeId": trade}


def order_json(order: Order, contract: Contract) -> Json:
    price, filled = contract.level(order.price, order.filled)
    trigger, qty = contract.level(order.trigger, order.qty)
    average = contract.price(order.spent / order.filled, 4) if order.filled else "0.00"
    return SAME["order"] | SAME[order.kind] | lettered(f"{order.kind}_row", to_builtins(order) | {
        "price": price, "filled": filled, "trigger": trigger, "qty": qty, "average": average,
        "spent": f"{order.spent:f}", "ref": str(order.ref or ""), "nothing": None})


def position_json(ledger: Ledger, name: str, symbol: str, then: Position | None = None) -> Json:
    """Return a position, as it is or was then, with the fields of all positionRisk and account versions."""
    position, contract = then or ledger.position(name, symbol), ledger.contracts[symbol]
    leverage, mark = ledger.leverage(name, symbol), ledger.mark(symbol)
    notional, fee = position.qty * mark, ledger.taker_fee if position.qty > 0 else -ledger.taker_fee
    initial, cap = amount(abs(notional) / leverage), str(model.notional_max(leverage))
    profit = amount(notional - position.cost)
    return SAME["position"] | {
        "symbol": symbol, "positionAmt": contract.qty(position.qty),
        "entryPrice": contract.price(position.entry, 3),  # and where closing as taker would bring nothing:
        "breakEvenPrice": contract.price(position.entry * (1 + fee) / (1 - fee), 3),
        "markPrice": amount(mark), "unRealizedProfit": profit, "unrealizedProfit": profit,
        "notional": amount(notional),
        "liquidationPrice": contract.price(ledger.liquidation_price(name, symbol), 3),
        "leverage": str(leverage), "maxNotionalValue": cap, "maxNotional": cap, "initialMargin": initial,
        "positionInitialMargin": initial, "maintMargin": amount(model.maintenance(notional)),
        "updateTime": position.update_ms}


def account_json(ledger: Ledger, name: str, version: int) -> Json:
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
        **(SAME["account"] if version == 2 else {}), **totals, **frees,
        "assets": [{"asset": "USDT", **asset, **frees, "marginAvailable": True,
                    "updateTime": account.update_ms}],
        "positions": [position_json(ledger, name, symbol)
                      for symbol in (ledger.contracts if version == 2 else ledger.held(name))]}


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
            rows.append(lettered("position", row))
        return [what | {"a": {"m": event.reason, "P": rows, "B": [
            {"a": "USDT", "wb": wallet, "cw": wallet, "bc": amount(event.change)}]}}]
    if not isinstance(event, model.OrderEvent):
        return []
    order, fill, times = event.order, event.fill, {"T": event.order.update_ms, "E": now_ms}
    contract = ledger.contracts[order.symbol]
    body = lettered(order.kind, order_json(order, contract))
    if order.kind == "algo":
        body |= {"act": "MARKET" if order.ref else "0"} | ({"rm": order.reason} if order.reason else {})
        return [{"e": "ALGO_UPDATE", **times, "o": body}]
    body |= SAME["execution"] | {"x": event.execution}
    if fill:
        price, qty = contract.level(fill.price, fill.qty)
        body |= {"l": qty, "L": price, "t": fill.id, "m": fill.is_maker, "rp": amount(fill.realized),
                 "N": "USDT", "n": amount(fill.fee)}
    lite = [{"e": "TRADE_LITE", **times, **{key: body[key] for key in "sqpmcSLlti"}}] if fill else []
    return [*lite, {"e": "ORDER_TRADE_UPDATE", **times, "o": body}]
