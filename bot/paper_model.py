"""The nouns of the paper exchange's books: rules, orders, fills, positions, accounts, events. Pure."""

import tomllib
from decimal import ROUND_DOWN, ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import msgspec

Side = Literal["BUY", "SELL"]
Levels = list[tuple[Decimal, Decimal]]  # (price, qty), best first
Count = Annotated[int, msgspec.Meta(ge=0, le=1_000_000)]
Milliseconds = Annotated[int, msgspec.Meta(ge=0, le=86_400_000)]
Json = dict[str, Any]
Filters = dict[str, dict[str, str]]  # of a listing, by filterType

ZERO = Decimal(0)
MONEY = Decimal("0.00000001")  # fees and profits are booked to eight places, half up
OPEN = ("NEW", "PARTIALLY_FILLED", "TRIGGERING", "TRIGGERED")
T = TypeVar("T")
_TABLES = tomllib.loads(Path(__file__).with_name("paper.toml").read_text(encoding="utf-8"))


def table(name: str, type_: type[T]) -> T:
    """Return a table of paper.toml. Raises msgspec.ValidationError: it is not of that type."""
    return msgspec.convert(_TABLES[name], type_, str_keys=True)


def worded(kind: str, known: Json) -> Json:
    """Return a row as the exchange words it. known: what its $names stand for; amounts have eight places."""
    row = {name: known[word[1:]] if str(word).startswith("$") else word for name, word in ROWS[kind].items()}
    return {name: amount(value) if isinstance(value, Decimal) else value for name, value in row.items()}


def amount(value: Decimal) -> str:
    return f"{value.quantize(MONEY, ROUND_DOWN):f}"


class Bracket(msgspec.Struct, rename="camel"):
    """The leverage of a position up to a notional, and its maintenance margin: notional * ratio - cum."""

    notional_cap: Decimal
    initial_leverage: int
    maint_margin_ratio: Decimal
    cum: Decimal


BRACKETS = table("brackets", list[Bracket])
TEXTS, STATUSES = table("refusals", dict[int, str]), table("statuses", dict[int, int])
ROWS, FILTERS = table("rows", dict[str, Json]), table("filters", list[str])
NOTIONAL_MIN = table("notional_min", dict[str, str])


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
    return value.quantize(MONEY, ROUND_HALF_UP)


def bracket(notional: Decimal) -> Bracket:
    return next((row for row in BRACKETS if abs(notional) <= row.notional_cap), BRACKETS[-1])


def maintenance(notional: Decimal) -> Decimal:
    row = bracket(notional)
    return abs(notional) * row.maint_margin_ratio - row.cum


def notional_max(leverage: int) -> Decimal:
    return next(row.notional_cap for row in reversed(BRACKETS) if leverage <= row.initial_leverage)


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
        if min(self.tick, self.step) <= 0 or not all(n.is_finite() for n in self.numbers.values()):
            raise ValueError(f"filters must be numbers, tickSize and stepSize above 0; were {self.numbers}")

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
                  (price.quantize(self._increments[0]) != price, -1111),
                  (price % self.tick, -4014), (price < self.numbers["PRICE_FILTER.minPrice"], -4013))

    def listing(self) -> dict[str, Any]:
        """Return the entry of exchangeInfo. Shape: GET /fapi/v1/exchangeInfo."""
        (price_places, qty_places), (tick, step) = (
            [len(f"{n}".partition(".")[2]) for n in self._increments], map(str, self._increments))
        most = 10_000 * 10 ** (3 - min(3, qty_places))
        known = {
            "symbol": self.symbol, "status": self.status, "base": self.symbol.removesuffix("USDT"),
            "tick": tick, "step": step, "price_places": price_places, "qty_places": qty_places,
            "qty_max": str(most), "market_qty_max": str(most // 5),
            "notional_min": NOTIONAL_MIN.get(self.symbol, "5")}
        return worded("listing", known) | {
            "filters": [worded(kind, known) | self._filters.get(kind, {}) for kind in FILTERS]}


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


Event = OrderEvent | AccountEvent | Income
