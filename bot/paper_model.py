"""The nouns of the paper exchange's books: rules, orders, fills, positions, accounts, events. Pure."""

from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from typing import Any, Literal

import msgspec

Side = Literal["BUY", "SELL"]
Levels = list[tuple[Decimal, Decimal]]  # (price, qty), best first
Filters = dict[str, dict[str, str]]  # of a listing, by filterType

ZERO = Decimal(0)
MONEY = Decimal("0.00000001")  # fees and profits are booked to eight places, half up
NOTIONAL_MIN = {"BTCUSDT": "100", "ETHUSDT": "20"}  # the exchange's own; elsewhere 5
OPEN = ("NEW", "PARTIALLY_FILLED", "TRIGGERING", "TRIGGERED")
# Notional cap, leverage, maintenance ratio, cum: the recorded BTCUSDT brackets, for all symbols.
BRACKETS = [(Decimal(cap), leverage, Decimal(ratio), Decimal(cum)) for cap, leverage, ratio, cum in (
    (300_000, 150, "0.004", 0), (800_000, 100, "0.005", 300), (3_000_000, 75, "0.0065", 1_500),
    (12_000_000, 50, "0.01", 12_000), (70_000_000, 25, "0.02", 132_000),
    (100_000_000, 20, "0.025", 482_000), (230_000_000, 10, "0.05", 2_982_000),
    (480_000_000, 5, "0.1", 14_482_000), (600_000_000, 4, "0.125", 26_482_000),
    (800_000_000, 3, "0.15", 41_482_000), (1_200_000_000, 2, "0.25", 121_482_000),
    (1_800_000_000, 1, "0.5", 421_482_000))]

# The exchange's refusals, as it words them.
TEXTS = {
    -1003: "Too many requests; current limit of IP({}) is {} requests per minute. Please use the websocket "
           "for live updates to avoid polling the API.",
    -1015: "Too many new orders; current limit is {} orders per {}.",
    -1021: "Timestamp for this request is outside of the recvWindow.",
    -1022: "Signature for this request is not valid.", -1120: "Invalid interval.", -1121: "Invalid symbol.",
    -1100: "Illegal characters found in parameter '{}'; legal range is '{}'.",
    -1102: "Mandatory parameter '{}' was not sent, was empty/null, or malformed.",
    -1106: "Parameter '{}' sent when not required.", -1125: "This listenKey does not exist.",
    -1111: "Precision is over the maximum defined for this asset.", -1115: "Invalid timeInForce.",
    -1116: "Invalid orderType.", -1117: "Invalid side.", -1130: "Data sent for parameter '{}' is not valid.",
    -1131: "recvWindow must be less than 60000", -2011: "Unknown order sent.",
    -2013: "Order does not exist.", -2014: "API-key format invalid.",
    -2015: "Invalid API-key, IP, or permissions for action", -2019: "Margin is insufficient.",
    -2021: "Order would immediately trigger.", -2022: "ReduceOnly Order is rejected.",
    -2025: "Reach max open order limit.", -4001: "Price less than 0.", -4002: "Price greater than max price.",
    -2027: "Exceeded the maximum allowable position at current leverage.",
    -2028: "Leverage is smaller than permitted: insufficient margin balance.",
    -4003: "Quantity less than or equal to zero.", -4004: "Quantity less than min quantity.",
    -4005: "Quantity greater than max quantity.", -4013: "Price less than min price.",
    -4014: "Price not increased by tick size.", -4016: "Limit price can't be higher than {}.",
    -4024: "Limit price can't be lower than {}.", -4028: "Leverage {} is not valid",
    -4045: "Reach max stop order limit.", -4046: "No need to change margin type.",
    -4047: "Margin type cannot be changed if there exists open orders.",
    -4048: "Margin type cannot be changed if there exists position.",
    -4059: "No need to change position side.", -4082: "Invalid number of batch place orders.",
    -4061: "Order's position side does not match user's setting.",
    -4068: "Position side cannot be changed if there exists position.",
    -4108: "Symbol is on delivering or delivered or settling or closed or pre-trading.",
    -4116: "ClientOrderId is duplicated.",
    -4120: "Order type not supported for this endpoint. Please use the Algo Order API endpoints instead.",
    -4130: "An open stop or take profit order with GTE and closePosition in the direction is existing.",
    -4164: "Order's notional must be no smaller than {} (unless you choose reduce only).",
    -5000: "Path {}, Method {} is invalid",
    -5022: "Due to the order could not be executed as maker, the Post Only order will be rejected. The order "
           "will not be recorded in the order history"}
STATUSES = {-1003: 429, -1015: 429, -2014: 401, -2015: 401, -5000: 404}  # of HTTP; all others 400


class Refused(Exception):
    """The exchange says no, as the real one words it: `body` as JSON, `status` of HTTP."""

    def __init__(self, code: int, *words: object, text: str = "", status: int = 0) -> None:
        self.code, self.text = code, text or TEXTS[code].format(*words)
        self.status = status or STATUSES.get(code, 400)
        self.body = {"code": code, "msg": self.text}
        super().__init__(f"{code} {self.text}")


def refuse_if(*rules: tuple[Any, ...]) -> None:
    """Raise Refused for the first rule that is broken: (is it, code, words of the text)."""
    for is_broken, code, *words in rules:
        if is_broken:
            raise Refused(code, *words)


def money(value: Decimal) -> Decimal:
    """Round to the eight places money is booked in."""
    return value.quantize(MONEY, ROUND_HALF_UP)


def bracket(notional: Decimal) -> tuple[Decimal, int, Decimal, Decimal]:
    """Return the bracket that a position is in."""
    return next((row for row in BRACKETS if abs(notional) <= row[0]), BRACKETS[-1])


def maintenance(notional: Decimal) -> Decimal:
    """Return the maintenance margin of a position."""
    _, _, ratio, cum = bracket(notional)
    return abs(notional) * ratio - cum


def notional_max(leverage: int) -> Decimal:
    """Return the largest position a leverage allows."""
    return next(cap for cap, most, *_ in reversed(BRACKETS) if leverage <= most)


class Contract:
    """A listed contract, and what changed in its listing since. Raises ValueError, ArithmeticError.

    `numbers` by filter and field, "LOT_SIZE.stepSize".
    """

    def __init__(self, symbol: str, tick: Decimal, step: Decimal, status: str = "TRADING",
                 filters: Filters | None = None) -> None:
        self.symbol, self.status = symbol, status
        self._increments, self._filters = (tick, step), filters or {}
        self.numbers = {f"{row['filterType']}.{key}": Decimal(value) for row in self.listing()["filters"]
                        for key, value in row.items() if key != "filterType"}
        self.tick, self.step = self.numbers["PRICE_FILTER.tickSize"], self.numbers["LOT_SIZE.stepSize"]
        if min(self.tick, self.step) <= 0:
            raise ValueError(f"tickSize and stepSize must be greater than 0; were {self.tick}, {self.step}")

    def changed(self, status: str, filters: Filters) -> "Contract":
        return Contract(self.symbol, *self._increments, status, filters)

    def price(self, value: Decimal, more: int = 0) -> str:
        """Return a price as text, to the contract's precision and `more` places."""
        return f"{value.quantize(self.tick.scaleb(-more), ROUND_DOWN):f}"

    def qty(self, value: Decimal) -> str:
        return f"{value.quantize(self.step):f}"

    def level(self, price: Decimal, qty: Decimal) -> list[str]:
        return [self.price(price), self.qty(qty)]

    def check_qty(self, qty: Decimal, lot: str) -> None:
        """Check a quantity against LOT_SIZE, or the largest of MARKET_LOT_SIZE. Raises Refused."""
        refuse_if((qty <= 0, -4003), (qty > self.numbers[f"{lot}.maxQty"], -4005),
                  (qty % self.step, -1111), (qty < self.numbers["LOT_SIZE.minQty"], -4004))

    def check_price(self, price: Decimal) -> None:
        """Check a price against the price filter. Raises Refused."""
        refuse_if((price <= 0, -4001), (price > self.numbers["PRICE_FILTER.maxPrice"], -4002),
                  (price.normalize().quantize(self.tick.normalize()) != price, -1111),
                  (price % self.tick, -4014), (price < self.numbers["PRICE_FILTER.minPrice"], -4013))

    def listing(self) -> dict[str, Any]:
        """Return the entry of exchangeInfo. Shape: GET /fapi/v1/exchangeInfo."""
        price_places, qty_places = (len(f"{n}".partition(".")[2]) for n in self._increments)
        tick, step = map(str, self._increments)
        lot, most = {"minQty": step, "stepSize": step}, 10_000 * 10 ** (3 - min(3, qty_places))
        filters: dict[str, dict[str, Any]] = {
            "PRICE_FILTER": {"minPrice": tick, "maxPrice": "10000000", "tickSize": tick},
            "LOT_SIZE": {"maxQty": str(most), **lot}, "MARKET_LOT_SIZE": {"maxQty": str(most // 5), **lot},
            "MAX_NUM_ORDERS": {"limit": 200}, "MAX_NUM_ALGO_ORDERS": {"limit": 10},
            "MIN_NOTIONAL": {"notional": NOTIONAL_MIN.get(self.symbol, "5")},
            "PERCENT_PRICE": {"multiplierUp": "1.0500", "multiplierDown": "0.9500", "multiplierDecimal": "4"}}
        return {
            "symbol": self.symbol, "pair": self.symbol, "contractType": "PERPETUAL", "status": self.status,
            "deliveryDate": 4133404800000, "onboardDate": 1569398400000, "maintMarginPercent": "2.5000",
            "requiredMarginPercent": "5.0000", "baseAsset": self.symbol.removesuffix("USDT"),
            "quoteAsset": "USDT", "marginAsset": "USDT", "pricePrecision": price_places,
            "quantityPrecision": qty_places, "baseAssetPrecision": 8, "quotePrecision": 8,
            "underlyingType": "COIN", "underlyingSubType": [], "triggerProtect": "0.0500",
            "liquidationFee": "0.012500", "marketTakeBound": "0.05", "maxMoveOrderLimit": 10000,
            "filters": [{"filterType": kind, **row, **self._filters.get(kind, {})}
                        for kind, row in filters.items()],
            "orderTypes": ["LIMIT", "MARKET", "STOP", "STOP_MARKET", "TAKE_PROFIT", "TAKE_PROFIT_MARKET",
                           "TRAILING_STOP_MARKET"],
            "timeInForce": ["GTC", "IOC", "FOK", "GTX", "GTD"]}


class Row(msgspec.Struct, kw_only=True):
    """What the store keeps a document of."""

    id: int = 0
    account: str
    symbol: str
    time_ms: int = 0


class Order(Row, kw_only=True):
    """An order of the matching engine, or a conditional one ("algo") that waits for its trigger.

    price 0: market. qty 0: the whole position. ref: of an order the algo it came from, of an algo the
    order it became. execution: what its fills are called, CALCULATED of liquidation and ADL.
    """

    kind: Literal["order", "algo"] = "order"
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


class Fill(Row, kw_only=True):
    """One execution. realized: the profit it closed, before the fee."""

    order_id: int
    side: Side
    price: Decimal
    qty: Decimal
    fee: Decimal
    realized: Decimal
    is_maker: bool


class Income(Row, kw_only=True):
    """One line of the account's history of money (`GET /fapi/v1/income`)."""

    reason: str
    amount: Decimal
    trade_id: int = 0


class Position(msgspec.Struct):
    """One-way position. qty and cost are signed."""

    qty: Decimal = ZERO
    cost: Decimal = ZERO  # what the open part was bought for
    flow: Decimal = ZERO  # all that was ever bought, less sold: realized == cost - flow, to the last digit
    traded: Decimal = ZERO  # likewise of qty
    realized: Decimal = ZERO
    fees: Decimal = ZERO
    funding: Decimal = ZERO
    update_ms: int = 0

    @property
    def entry(self) -> Decimal:
        return self.cost / self.qty if self.qty else ZERO

    def apply(self, qty: Decimal, price: Decimal) -> Decimal:
        """Book a fill of signed qty; return the profit it realized.

        Closing takes its share of the cost out, rounded to money; the last contract takes what is left.
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
    """One account: a USDT wallet in cross margin."""

    name: str
    wallet: Decimal = ZERO
    deposited: Decimal = ZERO  # what came from outside, of the insurance fund too
    positions: dict[str, Position] = {}
    leverage: dict[str, int] = {}
    is_hedged: bool = False
    funded_ms: int = 0  # the funding it has had
    update_ms: int = 0


class Limits(msgspec.Struct, forbid_unknown_fields=True):
    """What the limiter allows (POST /paper/limits), and until when it bans every address."""

    weight_1m: int = 2_400
    orders_10s: int = 300
    orders_1m: int = 1_200
    banned_until_ms: int = 0

    def listing(self) -> list[dict[str, Any]]:
        return [{"rateLimitType": kind, "interval": interval, "intervalNum": number, "limit": limit}
                for kind, interval, number, limit in (
                    ("REQUEST_WEIGHT", "MINUTE", 1, self.weight_1m), ("ORDERS", "MINUTE", 1, self.orders_1m),
                    ("ORDERS", "SECOND", 10, self.orders_10s))]


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


Event = OrderEvent | AccountEvent | Income
