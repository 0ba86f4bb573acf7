"""How the paper exchange words things: REST rows and user-stream events as Binance USD-M sends them.

Source: recorded and documented samples of the real API; numbers are strings, times milliseconds.
"""

from typing import Any

from msgspec.structs import asdict

from bot import paper_model as model
from bot.paper_ledger import Ledger
from bot.paper_model import ZERO, Fill, Income, Json, Order, Position, amount, worded


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
    notional, fee = position.qty * mark, ledger.taker_fee if position.qty > 0 else -ledger.taker_fee
    return worded(kind, {
        "symbol": symbol, "qty": contract.qty(position.qty), "entry": contract.price(position.entry, 3),
        # where closing as taker would bring nothing
        "break_even": contract.price(position.entry * (1 + fee) / (1 - fee), 3), "mark": mark,
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


def event_json(event: model.Event, ledger: Ledger, now_ms: int) -> list[Json]:
    """Return what the user stream says about an event."""
    if isinstance(event, model.AccountEvent):
        what: Json = {"e": "ACCOUNT_UPDATE", "T": event.time_ms, "E": now_ms}
        if event.reason == "CONFIG":
            setting = {"s": event.symbol, "l": ledger.leverage(event.account, event.symbol)}
            return [what | {"e": "ACCOUNT_CONFIG_UPDATE", "ac": setting}]
        wallet, rows = amount(event.wallet), [
            position_json(ledger, event.account, event.symbol, "position_event", event.position)
        ] if event.symbol else []
        return [what | {"a": {"m": event.reason, "P": rows, "B": [
            {"a": "USDT", "wb": wallet, "cw": wallet, "bc": amount(event.change)}]}}]
    if not isinstance(event, model.OrderEvent):
        return []
    order, fill, times = event.order, event.fill, {"T": event.order.update_ms, "E": now_ms}
    body = row_json(order, ledger, f"{order.kind}_event", execution=event.execution)
    if order.kind == "algo":
        body |= {"act": "MARKET" if order.ref else "0"} | ({"rm": order.reason} if order.reason else {})
        return [{"e": "ALGO_UPDATE", **times, "o": body}]
    body |= row_json(fill, ledger, "fill_event") if fill else {}
    lite = [{"e": "TRADE_LITE", **times, **{key: body[key] for key in "sqpmcSLlti"}}] if fill else []
    return [*lite, {"e": "ORDER_TRADE_UPDATE", **times, "o": body}]
