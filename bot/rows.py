"""What the exchange's rows and private events say, as nouns. Pure.

Read from the raw answers, because ccxt folds statuses together and drops what it does not know. Every
reader raises one of UNREADABLE on a row of another shape; read_private never raises.
"""

from collections.abc import Mapping
from decimal import Decimal
from typing import Any

import msgspec

from bot.config import SETTLE
from bot.model import Instrument
from bot.orders import ExchangeFill, OrderEvent, OrderStatus, Side

Row = dict[str, Any]
UNREADABLE = (msgspec.DecodeError, RecursionError, AttributeError, LookupError, TypeError, ValueError,
              ArithmeticError)

# The exchange's word -> the order table's event. A word that is missing here is kept raw and alerts.
EVENT_OF_STATUS: dict[str, OrderEvent] = {
    "NEW": "accept", "PARTIALLY_FILLED": "fill", "FILLED": "complete", "CANCELED": "cancel",
    "REJECTED": "reject", "EXPIRED": "expire", "EXPIRED_IN_MATCH": "expire",
    "TRIGGERING": "accept", "TRIGGERED": "accept",  # of conditional orders; FINISHED: see read_status
}
# Names of the same things in an order, its event, a conditional order and its event; in a fill and its event.
ORDER = ("symbol", "clientOrderId", "orderId", "side", "origQty", "executedQty", "status", "reduceOnly",
         "stopPrice", "type", "updateTime", "")
ORDER_EVENT = ("s", "c", "i", "S", "q", "z", "X", "R", "sp", "o", "T", "")
ALGO = ("symbol", "clientAlgoId", "algoId", "side", "quantity", "actualQty", "algoStatus", "reduceOnly",
        "triggerPrice", "orderType", "updateTime", "actualOrderId")
ALGO_EVENT = ("s", "caid", "aid", "S", "q", "aq", "X", "R", "tp", "o", "T", "ai")
FILL = ("symbol", "id", "orderId", "side", "qty", "price", "commission", "commissionAsset", "realizedPnl",
        "maker", "time")
FILL_EVENT = ("s", "t", "i", "S", "l", "L", "n", "N", "rp", "m", "T")
SIDES: dict[str, Side] = {"BUY": "buy", "SELL": "sell"}
OF_TRADES = frozenset({"REALIZED_PNL", "COMMISSION"})  # income that our fills tell of already
# They say what ORDER_TRADE_UPDATE says, with less, and what is compared: balances and positions.
SILENT_EVENTS = frozenset({"TRADE_LITE", "ACCOUNT_UPDATE"})


class ExchangePosition(msgspec.Struct, frozen=True, kw_only=True):
    """A position as the exchange tells it. qty: signed contracts."""

    symbol: str
    qty: Decimal
    entry_price: Decimal
    mark_price: Decimal
    liquidation_price: Decimal | None

    @property
    def unrealized_pnl(self) -> Decimal:
        """Return what closing at the mark would bring, fees left out."""
        return self.qty * (self.mark_price - self.entry_price)


class AccountSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The account's modes, and its balance in the settlement currency."""

    is_hedge_mode: bool
    is_multi_asset: bool
    can_trade: bool
    wallet_balance: Decimal


class KeyRights(msgspec.Struct, frozen=True, kw_only=True):
    """What the API key may do (GET /sapi/v1/account/apiRestrictions)."""

    can_withdraw: bool
    can_trade_futures: bool
    is_ip_restricted: bool

    def troubles(self) -> list[str]:
        """Return what a key of this appliance must not be, in words."""
        return [text for text, is_wrong in {
            "the API key may withdraw: take that right away at the exchange": self.can_withdraw,
            "the API key may not trade futures: allow it at the exchange": not self.can_trade_futures,
            "the API key works from any address: restrict it to this host's at the exchange":
                not self.is_ip_restricted}.items() if is_wrong]


class SymbolSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How the account trades one symbol. margin_mode: cross or isolated."""

    margin_mode: str
    leverage: int


class ListenKeyExpired(msgspec.Struct, frozen=True):
    """The private stream is dead although connected: a new listen key and connection are needed."""

    listen_key: str


class Unrecognized(msgspec.Struct, frozen=True):
    """A private frame, or a part of one, that nobody here can read: log it, count it, go on."""

    reason: str
    raw: bytes


PrivateEvent = OrderStatus | ExchangeFill | ListenKeyExpired | Unrecognized


def money(value: Any) -> Decimal:
    """Return an amount exactly. Raises ValueError for a float and for what is not finite."""
    amount = Decimal(value)
    if isinstance(value, float) or not amount.is_finite():
        raise ValueError(f"an amount must be a finite number in text; was {value!r}")
    return amount


def read_status(row: Row, names: tuple[str, ...], symbols: Mapping[str, str]) -> OrderStatus:
    """Return an order; names says which kind of row it is, symbols maps the exchange's to ours."""
    values: list[Any] = [row.get(name) for name in names]
    (symbol, client_id, exchange_id, side, qty, executed, word, reduce_only, trigger, type_, time_ms,
     triggered_id) = values
    event = EVENT_OF_STATUS.get(word)
    if word == "FINISHED" and executed is not None:  # triggered, and then filled or ended
        event = "complete" if money(executed) >= money(qty) else "expire"
    return OrderStatus(
        symbol=symbols.get(_text(symbol), symbol), client_order_id=_text(client_id),
        exchange_order_id=str(int(exchange_id)), side=SIDES[side], qty=money(qty),
        executed_qty=money(executed or 0), raw_status=_text(word), event=event,
        is_conditional=names in (ALGO, ALGO_EVENT), reduce_only=reduce_only is True,
        trigger_price=money(trigger or 0) or None, update_ns=int(time_ms) * 1_000_000,
        triggered_id=str(triggered_id or ""), type=str(type_ or row.get("type", "")))


def read_fill(row: Row, names: tuple[str, ...], symbols: Mapping[str, str]) -> ExchangeFill:
    """Return an execution; the fee is positive when it was paid."""
    values: list[Any] = [row.get(name) for name in names]
    symbol, trade_id, order_id, side, qty, price, fee, currency, pnl, is_maker, time_ms = values
    return ExchangeFill(
        symbol=symbols.get(_text(symbol), symbol), trade_id=str(int(trade_id)),
        exchange_order_id=str(int(order_id)), client_order_id=_text(row.get("c", "")), side=SIDES[side],
        qty=money(qty), price=money(price), fee=money(fee or 0), fee_currency=_text(currency or ""),
        realized_pnl=money(pnl or 0), is_maker=is_maker is True, exchange_ns=int(time_ms) * 1_000_000)


def read_position(row: Row, symbols: Mapping[str, str]) -> ExchangePosition:
    """Return a position. Raises ValueError for one of hedge mode: only one-way mode is traded."""
    qty, symbol = money(row["positionAmt"]), row["symbol"]
    if qty and row["positionSide"] != "BOTH":
        raise ValueError(f"{symbol}: a {row['positionSide']} position of hedge mode: close it in the "
                         "exchange's app, and switch to one-way mode")
    return ExchangePosition(
        symbol=symbols.get(symbol, symbol), qty=qty, entry_price=money(row["entryPrice"]),
        mark_price=money(row["markPrice"]), liquidation_price=money(row["liquidationPrice"]) or None)


def read_income(rows: list[Row], after_ns: int) -> tuple[dict[str, Decimal], int]:
    """Return the sums in SETTLE by type, of what is later and comes of no trade; the newest's time."""
    sums: dict[str, Decimal] = {}
    newest_ns = 0
    for row in rows:
        kind, at_ns = row["incomeType"], int(row["time"]) * 1_000_000
        if row["asset"] == SETTLE and at_ns > after_ns and kind not in OF_TRADES:
            sums[kind], newest_ns = sums.get(kind, Decimal(0)) + money(row["income"]), max(newest_ns, at_ns)
    return sums, newest_ns


def read_account(modes: Row, balances: list[Row]) -> AccountSettings:
    """Return the account's modes, and its balance in SETTLE: 0 where it is not listed."""
    balance = next((row["balance"] for row in balances if row["asset"] == SETTLE), 0)
    return AccountSettings(
        is_hedge_mode=modes["dualSidePosition"], is_multi_asset=modes["multiAssetsMargin"],
        can_trade=modes["canTrade"], wallet_balance=money(balance))


def read_key_rights(row: Row) -> KeyRights:
    """Return what the API key may do."""
    return KeyRights(can_withdraw=row["enableWithdrawals"], can_trade_futures=row["enableFutures"],
                     is_ip_restricted=row["ipRestrict"])


def read_symbol_settings(row: Row) -> SymbolSettings:
    """Return a symbol's settings; a margin mode nobody here knows is kept as the exchange says it."""
    mode = _text(row["marginType"])
    return SymbolSettings(margin_mode={"CROSSED": "cross", "ISOLATED": "isolated"}.get(mode, mode),
                          leverage=int(row["leverage"]))


def read_instrument(market: dict[str, Any]) -> Instrument:
    """Return the rules of a contract, from what ccxt made of its row."""
    # A market order must keep both rules of size, so the stricter of each counts.
    filters = {row["filterType"]: row for row in market["info"]["filters"]}
    lots = [filters[name] for name in ("LOT_SIZE", "MARKET_LOT_SIZE") if name in filters]
    return Instrument(
        symbol=market["symbol"], exchange_symbol=market["id"], status=market["info"]["status"],
        price_increment=money(filters["PRICE_FILTER"]["tickSize"]),
        qty_increment=max(money(lot["stepSize"]) for lot in lots),
        qty_min=max(money(lot["minQty"]) for lot in lots), qty_max=min(money(lot["maxQty"]) for lot in lots),
        notional_min=money(market["limits"]["cost"]["min"] or 0), settle=market["settle"],
        contract_size=money(market["contractSize"]))


def read_private(raw: bytes, symbols: Mapping[str, str]) -> list[PrivateEvent]:
    """Return what a private frame says; never raises. A trade gives its order's status, then the fill."""
    kind = "frame"
    try:
        frame = msgspec.json.decode(raw)
        frame = frame.get("data", frame)  # of a combined stream
        kind = str(frame["e"])[:40]
        if kind == "ORDER_TRADE_UPDATE":
            return _order_event(frame["o"], raw, symbols)
        if kind == "ALGO_UPDATE":
            return [read_status({"T": frame["T"], **frame["o"]}, ALGO_EVENT, symbols)]
        if kind == "listenKeyExpired":
            return [ListenKeyExpired(str(frame.get("listenKey", "")))]
        return [] if kind in SILENT_EVENTS else [Unrecognized(kind, raw)]
    except UNREADABLE as error:
        return [Unrecognized(f"{kind}: {error!r}"[:200], raw)]


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"must be text; was {value!r}")
    return value


def _order_event(row: Row, raw: bytes, symbols: Mapping[str, str]) -> list[PrivateEvent]:
    status = read_status(row, ORDER_EVENT, symbols)
    if money(row["l"]) <= 0 or row["x"] not in ("TRADE", "CALCULATED"):  # the latter: liquidation, ADL
        return [status]
    if row["t"] <= 0:  # a fill without an identity could be booked twice: reconciliation finds it
        return [status, Unrecognized(f"fill of {row['c']} without a trade id", raw)]
    return [status, read_fill(row, FILL_EVENT, symbols)]
