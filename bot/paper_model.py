"""The nouns of the paper exchange's books: rules, orders, fills, positions, accounts, events. Pure."""

from decimal import ROUND_HALF_UP, Decimal
from typing import Any, Literal

import msgspec

Side = Literal["BUY", "SELL"]
Levels = list[tuple[Decimal, Decimal]]  # (price, qty), best first

ZERO = Decimal(0)
MONEY = Decimal("0.00000001")  # fees and profits are booked to eight places, half up
OPEN = ("NEW", "PARTIALLY_FILLED", "TRIGGERING", "TRIGGERED")
# Notional cap, leverage, maintenance ratio, cum: the recorded BTCUSDT brackets, for all symbols.
BRACKETS = [(Decimal(cap), leverage, Decimal(ratio), Decimal(cum)) for cap, leverage, ratio, cum in (
    (300_000, 150, "0.004", 0), (800_000, 100, "0.005", 300), (3_000_000, 75, "0.0065", 1_500),
    (12_000_000, 50, "0.01", 12_000), (70_000_000, 25, "0.02", 132_000),
    (100_000_000, 20, "0.025", 482_000), (230_000_000, 10, "0.05", 2_982_000),
    (480_000_000, 5, "0.1", 14_482_000), (600_000_000, 4, "0.125", 26_482_000),
    (800_000_000, 3, "0.15", 41_482_000), (1_200_000_000, 2, "0.25", 121_482_000),
    (1_800_000_000, 1, "0.5", 421_482_000))]

CLOSED = (-4108, "Symbol is on delivering or delivered or settling or closed or pre-trading.")


class Refused(Exception):
    """The exchange says no: `code` and `text` as the real one words them, `status` of HTTP."""

    def __init__(self, code: int, text: str, status: int = 400) -> None:
        super().__init__(f"{code} {text}")
        self.code, self.text, self.status = code, text, status


def refuse_if(*rules: tuple[object, int, str]) -> None:
    """Raise Refused for the first rule that is broken: (is it, code, text)."""
    for is_broken, code, text in rules:
        if is_broken:
            raise Refused(code, text)


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """What a symbol's filters say (exchangeInfo)."""

    symbol: str
    status: str = "TRADING"
    quote: str
    price_step: Decimal
    price_min: Decimal
    price_max: Decimal
    price_up: Decimal
    price_down: Decimal
    qty_step: Decimal
    qty_min: Decimal
    qty_max: Decimal
    market_qty_max: Decimal
    notional_min: Decimal
    orders_max: int
    algos_max: int

    @classmethod
    def of(cls, info: dict[str, Any]) -> "Rules":
        """Read one entry of exchangeInfo's `symbols`."""
        rows = {row["filterType"]: row for row in info["filters"]}
        price, lot, percent = rows["PRICE_FILTER"], rows["LOT_SIZE"], rows["PERCENT_PRICE"]
        return msgspec.convert({
            "symbol": info["symbol"], "status": info["status"], "quote": info["quoteAsset"],
            "price_step": price["tickSize"], "price_min": price["minPrice"], "price_max": price["maxPrice"],
            "price_up": percent["multiplierUp"], "price_down": percent["multiplierDown"],
            "qty_step": lot["stepSize"], "qty_min": lot["minQty"], "qty_max": lot["maxQty"],
            "market_qty_max": rows["MARKET_LOT_SIZE"]["maxQty"],
            "notional_min": rows["MIN_NOTIONAL"]["notional"], "orders_max": rows["MAX_NUM_ORDERS"]["limit"],
            "algos_max": rows["MAX_NUM_ALGO_ORDERS"]["limit"]}, cls)

    def check_qty(self, qty: Decimal, most: Decimal) -> None:
        """Check a quantity against the lot size. Raises Refused."""
        refuse_if((qty <= 0, -4003, "Quantity less than or equal to zero."),
                  (qty > most, -4005, "Quantity greater than max quantity."),
                  (qty % self.qty_step, -1111, "Precision is over the maximum defined for this asset."),
                  (qty < self.qty_min, -4004, "Quantity less than min quantity."))

    def check_price(self, price: Decimal) -> None:
        """Check a price against the price filter. Raises Refused."""
        refuse_if((price <= 0, -4001, "Price less than 0."),
                  (price > self.price_max, -4002, "Price greater than max price."),
                  (price.normalize().quantize(self.price_step.normalize()) != price, -1111,
                   "Precision is over the maximum defined for this asset."),
                  (price % self.price_step, -4014, "Price not increased by tick size."),
                  (price < self.price_min, -4013, "Price less than min price."))


class Order(msgspec.Struct, kw_only=True):
    """An order of the matching engine, or a conditional one ("algo") that waits for its trigger.

    price 0: market. qty 0: the whole position. ref: of an order the algo it came from, of an algo the
    order it became. execution: what its fills are called, CALCULATED of liquidation and ADL.
    """

    kind: Literal["order", "algo"] = "order"
    id: int = 0
    account: str
    symbol: str
    client_id: str
    side: Side
    type: str
    tif: str = "GTC"
    qty: Decimal
    price: Decimal = ZERO
    trigger: Decimal = ZERO
    working_type: str = "CONTRACT_PRICE"
    reduce_only: bool = False
    close_position: bool = False
    orig_type: str = ""
    status: str = "NEW"
    execution: str = "TRADE"
    filled: Decimal = ZERO
    spent: Decimal = ZERO
    ref: int = 0
    reason: str = ""
    time_ms: int = 0
    update_ms: int = 0
    trigger_ms: int = 0

    @property
    def sign(self) -> int:
        return 1 if self.side == "BUY" else -1

    def is_due(self, price: Decimal) -> bool:
        """Say whether the price triggers it."""
        rises = (self.side == "BUY") == self.type.startswith("STOP")
        return price >= self.trigger if rises else price <= self.trigger

    def crosses(self, price: Decimal) -> bool:
        """Say whether it may trade at the price."""
        return not self.price or (price <= self.price if self.side == "BUY" else price >= self.price)


class Fill(msgspec.Struct, frozen=True, kw_only=True):
    """One execution. realized: the profit it closed, before the fee."""

    id: int
    account: str
    symbol: str
    order_id: int
    side: Side
    price: Decimal
    qty: Decimal
    fee: Decimal
    realized: Decimal
    is_maker: bool
    time_ms: int


class Position(msgspec.Struct):
    """One-way position. qty and cost are signed; cost is what the open part was bought for.

    flow (all that was ever bought, less sold) and realized are kept apart so that they can be
    compared: realized == cost - flow, to the last digit. Likewise qty and traded.
    """

    qty: Decimal = ZERO
    cost: Decimal = ZERO
    flow: Decimal = ZERO
    traded: Decimal = ZERO
    realized: Decimal = ZERO
    fees: Decimal = ZERO
    funding: Decimal = ZERO
    update_ms: int = 0

    @property
    def entry(self) -> Decimal:
        return self.cost / self.qty if self.qty else ZERO

    def unrealized(self, mark: Decimal) -> Decimal:
        return self.qty * mark - self.cost

    def apply(self, qty: Decimal, price: Decimal) -> Decimal:
        """Book a fill of signed qty; return the profit it realized.

        Average cost: closing takes its share of the cost out, rounded to money, and the rest of it
        with the last contract, so that nothing is ever lost to rounding.
        """
        self.flow += qty * price
        self.traded += qty
        closing = min(qty, -self.qty, key=abs) if self.qty * qty < 0 else ZERO
        share = self.cost if closing == -self.qty else money(self.cost * -closing / self.qty)
        realized = -closing * price - share
        self.cost += (qty - closing) * price - share
        self.qty += qty
        self.realized += realized
        return realized


class Account(msgspec.Struct):
    """One account: a USDT wallet in cross margin.

    deposited: what came from outside, of the insurance fund too. funded_ms: the funding it has had.
    """

    name: str
    wallet: Decimal = ZERO
    deposited: Decimal = ZERO
    positions: dict[str, Position] = {}
    leverage: dict[str, int] = {}
    is_hedged: bool = False
    funded_ms: int = 0
    update_ms: int = 0


class Limits(msgspec.Struct, forbid_unknown_fields=True):
    """What the limiter allows (POST /paper/limits), and until when it bans every address."""

    weight_1m: int = 2_400
    orders_10s: int = 300
    orders_1m: int = 1_200
    banned_until_ms: int = 0

    def listing(self) -> list[dict[str, Any]]:
        rows = [("REQUEST_WEIGHT", "MINUTE", 1, self.weight_1m), ("ORDERS", "MINUTE", 1, self.orders_1m),
                ("ORDERS", "SECOND", 10, self.orders_10s)]
        return [dict(zip(("rateLimitType", "interval", "intervalNum", "limit"), row, strict=True))
                for row in rows]


class OrderEvent(msgspec.Struct, frozen=True):
    """An order changed: the order as it was then; execution as the user stream calls it."""

    account: str
    execution: str
    order: Order
    fill: Fill | None = None


class AccountEvent(msgspec.Struct, frozen=True):
    """Balance or positions changed; both as they were then."""

    account: str
    reason: str
    symbol: str
    wallet: Decimal
    change: Decimal
    position: Position
    time_ms: int


class Income(msgspec.Struct, frozen=True):
    """One line of the account's history of money (`GET /fapi/v1/income`)."""

    id: int
    account: str
    symbol: str
    reason: str
    amount: Decimal
    trade_id: int
    time_ms: int


Event = OrderEvent | AccountEvent | Income


def maintenance(notional: Decimal) -> Decimal:
    """Return the maintenance margin of a position."""
    _, _, ratio, cum = next((row for row in BRACKETS if abs(notional) <= row[0]), BRACKETS[-1])
    return abs(notional) * ratio - cum


def notional_max(leverage: int) -> Decimal:
    """Return the largest position a leverage allows."""
    return next(cap for cap, most, *_ in reversed(BRACKETS) if leverage <= most)


def money(value: Decimal) -> Decimal:
    """Round to the eight places money is booked in."""
    return value.quantize(MONEY, ROUND_HALF_UP)
