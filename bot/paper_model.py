"""The nouns of the paper exchange's books: rules, orders, fills, positions, accounts, events. Pure."""

from decimal import ROUND_HALF_UP, Decimal
from typing import Any, Literal

import msgspec

Side = Literal["BUY", "SELL"]
Levels = list[tuple[Decimal, Decimal]]  # (price, qty), best first

ZERO = Decimal(0)
MONEY = Decimal("0.00000001")  # fees and profits are booked to eight places, half up
OPEN = ("NEW", "PARTIALLY_FILLED")
OPEN_ALGO = ("NEW", "TRIGGERING", "TRIGGERED")


class Refused(Exception):
    """The exchange says no: `code` and `text` as the real one words them, `status` of HTTP."""

    def __init__(self, code: int, text: str, status: int = 400) -> None:
        super().__init__(f"{code} {text}")
        self.code, self.text, self.status = code, text, status


class Rules(msgspec.Struct, frozen=True):
    """What a symbol's filters say (exchangeInfo)."""

    symbol: str
    base: str
    quote: str
    price_step: Decimal
    price_min: Decimal
    price_max: Decimal
    qty_step: Decimal
    qty_min: Decimal
    qty_max: Decimal
    market_qty_max: Decimal
    notional_min: Decimal
    price_up: Decimal
    price_down: Decimal
    orders_max: int
    algos_max: int

    @classmethod
    def of(cls, info: dict[str, Any]) -> "Rules":
        """Read one entry of exchangeInfo's `symbols`."""
        filters = {item["filterType"]: item for item in info["filters"]}
        price, lot = filters["PRICE_FILTER"], filters["LOT_SIZE"]
        percent = filters.get("PERCENT_PRICE", {})
        return cls(
            symbol=info["symbol"], base=info["baseAsset"], quote=info["quoteAsset"],
            price_step=Decimal(price["tickSize"]), price_min=Decimal(price["minPrice"]),
            price_max=Decimal(price["maxPrice"]), qty_step=Decimal(lot["stepSize"]),
            qty_min=Decimal(lot["minQty"]), qty_max=Decimal(lot["maxQty"]),
            market_qty_max=Decimal(filters.get("MARKET_LOT_SIZE", lot)["maxQty"]),
            notional_min=Decimal(filters.get("MIN_NOTIONAL", {}).get("notional", "0")),
            price_up=Decimal(percent.get("multiplierUp", "10")),
            price_down=Decimal(percent.get("multiplierDown", "0")),
            orders_max=int(filters.get("MAX_NUM_ORDERS", {}).get("limit", 200)),
            algos_max=int(filters.get("MAX_NUM_ALGO_ORDERS", {}).get("limit", 10)))

    def check_qty(self, qty: Decimal, most: Decimal) -> None:
        """Check a quantity against the lot size. Raises Refused."""
        if qty <= 0:
            raise Refused(-4003, "Quantity less than or equal to zero.")
        if qty % self.qty_step:
            raise Refused(-1111, "Precision is over the maximum defined for this asset.")
        if qty < self.qty_min:
            raise Refused(-4004, "Quantity less than min quantity.")
        if qty > most:
            raise Refused(-4005, "Quantity greater than max quantity.")

    def check_price(self, price: Decimal) -> None:
        """Check a price against the price filter. Raises Refused."""
        if price <= 0:
            raise Refused(-4001, "Price less than 0.")
        if places(price) > places(self.price_step):
            raise Refused(-1111, "Precision is over the maximum defined for this asset.")
        if price % self.price_step:
            raise Refused(-4014, "Price not increased by tick size.")
        if price < self.price_min:
            raise Refused(-4013, "Price less than min price.")
        if price > self.price_max:
            raise Refused(-4002, "Price greater than max price.")


class Order(msgspec.Struct):
    """An order of the matching engine. price 0: market."""

    id: int
    account: str
    symbol: str
    client_id: str
    side: Side
    type: str
    tif: str
    qty: Decimal
    price: Decimal
    reduce_only: bool
    time_ms: int
    update_ms: int
    status: str = "NEW"
    filled: Decimal = ZERO
    quote: Decimal = ZERO
    close_position: bool = False
    orig_type: str = ""
    stop_price: Decimal = ZERO
    working_type: str = "CONTRACT_PRICE"
    algo_id: int = 0

    @property
    def sign(self) -> int:
        return 1 if self.side == "BUY" else -1


class Algo(msgspec.Struct):
    """A conditional order, waiting for its trigger. qty 0: closes the whole position."""

    id: int
    account: str
    symbol: str
    client_id: str
    side: Side
    type: str
    tif: str
    qty: Decimal
    trigger: Decimal
    working_type: str
    reduce_only: bool
    close_position: bool
    time_ms: int
    update_ms: int
    status: str = "NEW"
    trigger_ms: int = 0
    order_id: int = 0
    filled: Decimal = ZERO
    quote: Decimal = ZERO
    reason: str = ""

    def is_due(self, price: Decimal) -> bool:
        """Say whether the price triggers it."""
        rises = (self.side == "BUY") == self.type.startswith("STOP")
        return price >= self.trigger if rises else price <= self.trigger


class Fill(msgspec.Struct, frozen=True):
    """One execution. realized: profit it closed, before the fee."""

    id: int
    account: str
    symbol: str
    order_id: int
    client_id: str
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
    compared: realized == cost - flow, to the last digit.
    """

    qty: Decimal = ZERO
    cost: Decimal = ZERO
    flow: Decimal = ZERO
    traded: Decimal = ZERO
    realized: Decimal = ZERO
    fees: Decimal = ZERO
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
        closing = ZERO
        if self.qty * qty < 0:
            closing = qty if abs(qty) <= abs(self.qty) else -self.qty
        share = self.cost if closing == -self.qty else money(self.cost * -closing / self.qty)
        realized = -closing * price - share
        self.cost += (qty - closing) * price - share
        self.qty += qty
        self.realized += realized
        return realized


class Account(msgspec.Struct):
    """One account: a USDT wallet in cross margin."""

    name: str
    wallet: Decimal = ZERO
    deposited: Decimal = ZERO
    positions: dict[str, Position] = {}
    leverage: dict[str, int] = {}
    is_hedged: bool = False
    update_ms: int = 0


class OrderEvent(msgspec.Struct, frozen=True):
    """An order changed; execution as the user stream calls it; the order as it was then."""

    execution: Literal["NEW", "TRADE", "CANCELED", "EXPIRED"]
    order: Order
    fill: Fill | None = None


class AlgoEvent(msgspec.Struct, frozen=True):
    """A conditional order changed."""

    algo: Algo


class AccountEvent(msgspec.Struct, frozen=True):
    """Balance or positions changed; both as they were then."""

    account: str
    reason: str
    symbol: str
    wallet: Decimal
    change: Decimal
    position: Position
    time_ms: int


Event = OrderEvent | AlgoEvent | AccountEvent


class Income(msgspec.Struct, frozen=True):
    """One line of the account's history of money (`GET /fapi/v1/income`)."""

    id: int
    account: str
    symbol: str
    kind: str
    amount: Decimal
    trade_id: int
    time_ms: int

    @classmethod
    def of_fill(cls, fill: Fill) -> list["Income"]:
        """Return what a fill brought and cost; ids stay unique because a fill has two lines at most."""
        lines = [cls(fill.id * 2, fill.account, fill.symbol, "COMMISSION", -fill.fee, fill.id, fill.time_ms)]
        if fill.realized:
            lines.append(cls(fill.id * 2 + 1, fill.account, fill.symbol, "REALIZED_PNL", fill.realized,
                             fill.id, fill.time_ms))
        return lines

    @classmethod
    def of_change(cls, event: AccountEvent) -> "Income":
        """Return the line of a change that no fill made."""
        kind = "TRANSFER" if event.reason == "DEPOSIT" else event.reason
        return cls(event.time_ms, event.account, event.symbol, kind, event.change, 0, event.time_ms)


def money(value: Decimal) -> Decimal:
    """Round to the eight places money is booked in."""
    return value.quantize(MONEY, ROUND_HALF_UP)


def places(value: Decimal) -> int:
    """Return how many decimal places the value really has."""
    return max(0, -int(value.normalize().as_tuple().exponent))
