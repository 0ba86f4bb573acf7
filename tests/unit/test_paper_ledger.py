"""The paper exchange's books against a second, tiny model of an account, and rule by rule."""

import ast
import itertools
from collections import Counter
from dataclasses import dataclass, field
from decimal import ROUND_HALF_UP, Decimal
from fractions import Fraction
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bot import paper_model
from bot.errors import InvariantError
from bot.paper_engine import Store
from bot.paper_feed import FUNDING_MS, FUNDING_RATE, Book
from bot.paper_ledger import Ledger
from bot.paper_model import TEXTS, Contract, Income, Order, OrderEvent, Refused
from bot.paper_rest import PARAMETERS

D = Decimal
BTC, ETH = "BTCUSDT", "ETHUSDT"
CONTRACT = Contract(BTC, D("0.1"), D("0.001"), "TRADING", {
    "PRICE_FILTER": {"minPrice": "1", "maxPrice": "1000000"}, "LOT_SIZE": {"maxQty": "100"},
    "MARKET_LOT_SIZE": {"maxQty": "50"}, "MIN_NOTIONAL": {"notional": "50"}, "MAX_NUM_ORDERS": {"limit": "3"},
    "MAX_NUM_ALGO_ORDERS": {"limit": "2"}})
TAKER, MAKER = D("0.0005"), D("0.0002")
names = itertools.count()


def levels(*pairs: tuple[str, str]) -> list[tuple[Decimal, Decimal]]:
    return [(D(price), D(qty)) for price, qty in pairs]


BIDS = levels(("99.9", "1"), ("99.8", "2"))
ASKS = levels(("100.1", "1"), ("100.2", "2"))


class Feed:
    """A market whose prices and depth a test sets."""

    def __init__(self):
        self.contract, self.bids, self.asks, self.ids = CONTRACT, BIDS, ASKS, itertools.count(1)
        self.mark_price = self.last_price = D("100")

    def mark(self):
        return self.mark_price

    def last(self):
        return self.last_price

    def book(self):
        return Book(self.bids, self.asks, 0)

    def consume(self, side, fills, maker_price=0):
        return [next(self.ids) for _ in fills]


def new_ledger(balance: str = "100000") -> Ledger:
    ledger = Ledger({BTC: Feed()}, taker_fee=TAKER, maker_fee=MAKER)
    ledger.now_ms = 1
    ledger.deposit("main", D(balance))
    ledger.events()
    return ledger


def place(ledger: Ledger, row: Order, bids=BIDS, asks=ASKS) -> Order:
    ledger.feeds[BTC].bids, ledger.feeds[BTC].asks = bids, asks
    return ledger.place(row)


def meet(ledger: Ledger, bids=BIDS, asks=ASKS, now_ms=2, **prices: Decimal) -> None:
    """Let open orders meet a market; prices: last_price, mark_price."""
    ledger.now_ms, feed = now_ms, ledger.feeds[BTC]
    for name, value in {"bids": bids, "asks": asks, **prices}.items():
        setattr(feed, name, value)
    ledger.meet(BTC)


def order(side: str, qty: str, **fields) -> Order:
    fields = {"type": "LIMIT" if "price" in fields else "MARKET", "client_id": f"id{next(names)}", **fields}
    for name in ("price", "trigger"):
        if name in fields:
            fields[name] = D(fields[name])
    return Order(account="main", symbol=BTC, side=side, qty=D(qty), **fields)


def algo(side: str, qty: str, trigger: str, type_: str = "STOP_MARKET", **fields) -> Order:
    return order(side, qty, kind="algo", type=type_, trigger=trigger, **fields)


def refusal(ledger: Ledger, row: Order) -> int:
    before = msgspec.json.encode((ledger.accounts, ledger.open))
    ledger.events()
    with pytest.raises(Refused) as caught:
        place(ledger, row)
    assert msgspec.json.encode((ledger.accounts, ledger.open)) == before, "a refusal changes nothing"
    assert ledger.events() == []
    return caught.value.code


def said(ledger: Ledger) -> list[tuple[str, str]]:
    return [(e.order.kind, e.execution) for e in ledger.events() if isinstance(e, OrderEvent)]


def test_refusals_with_any_code_have_the_exchanges_words():
    used = {code for _, code, _ in PARAMETERS.values()}
    for path in Path(paper_model.__file__).parent.glob("paper*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
                used |= {-node.operand.value} if 1_000 <= node.operand.value < 6_000 else set()
    assert used - {-1135} | {418} == set(TEXTS), "-1135 says what was wrong with the JSON, 418 is a status"
    assert [Refused(code, "a", "b").text for code in TEXTS if "{" in Refused(code, "a", "b").text] == []


def test_market_order_with_thin_levels_walks_them_and_expires_the_rest():
    ledger = new_ledger()
    row = order("BUY", "5")
    place(ledger, row)
    fills = [e.fill for e in ledger.events() if isinstance(e, OrderEvent) and e.fill]
    assert [(f.price, f.qty) for f in fills] == ASKS
    assert (row.status, row.filled, row.spent) == ("EXPIRED", D(3), D("300.5"))
    assert ledger.open == {}


def test_market_order_with_an_empty_book_expires_unfilled():
    ledger = new_ledger()
    row = order("BUY", "1")
    place(ledger, row, [], [])
    assert (row.status, row.filled) == ("EXPIRED", D(0))


@pytest.mark.parametrize(("tif", "qty", "price", "status", "filled"), [
    ("GTC", "2", "100.1", "PARTIALLY_FILLED", "1"), ("GTC", "1", "100", "NEW", "0"),
    ("IOC", "2", "100.1", "EXPIRED", "1"), ("IOC", "1", "100", "EXPIRED", "0"),
    ("FOK", "2", "100.1", "EXPIRED", "0"), ("FOK", "3", "100.2", "FILLED", "3"),
    ("GTX", "1", "100", "NEW", "0")])
def test_limit_order_with_a_time_in_force_ends_as_it_says(tif, qty, price, status, filled):
    ledger = new_ledger()
    row = order("BUY", qty, price=price, tif=tif)
    place(ledger, row)
    assert (row.status, row.filled) == (status, D(filled))
    assert (row.id in ledger.open) == (status in ("NEW", "PARTIALLY_FILLED"))


def test_resting_order_with_the_market_crossing_it_fills_at_its_price_as_maker():
    ledger = new_ledger()
    row = order("BUY", "2", price="99.5")
    place(ledger, row)
    meet(ledger, [], levels(("99.6", "9")), 2)
    assert row.filled == 0
    meet(ledger, [], levels(("99.3", "1.5")), 3)
    meet(ledger, [], levels(("99.5", "9")), 4)
    fills = [e.fill for e in ledger.events() if isinstance(e, OrderEvent) and e.fill]
    assert [(f.price, f.qty, f.is_maker, f.time_ms) for f in fills] == [
        (D("99.5"), D("1.5"), True, 3), (D("99.5"), D("0.5"), True, 4)]
    assert fills[0].fee == D("99.5") * D("1.5") * MAKER
    assert row.status == "FILLED"
    assert ledger.open == {}


@pytest.mark.parametrize(("row", "code"), [
    (order("BUY", "0"), -4003), (order("BUY", "0.0005"), -1111), (order("BUY", "51"), -4005),
    (order("BUY", "101", price="100"), -4005), (order("BUY", "0.4"), -4164),
    (order("BUY", "1", price="100.05"), -1111), (order("BUY", "1", price="0"), -4001),
    (order("BUY", "1", price="105.1"), -4016), (order("SELL", "1", price="94.9"), -4024),
    (order("SELL", "1", reduce_only=True), -2022), (order("BUY", "1", price="100.1", tif="GTX"), -5022),
    (algo("SELL", "1", "100"), -2021), (algo("BUY", "1", "99"), -2021),
    (algo("SELL", "1", "99", "TAKE_PROFIT_MARKET"), -2021), (algo("SELL", "0.0001", "99"), -1111),
    (algo("SELL", "1", "99.99"), -1111)])
def test_order_with_a_broken_rule_is_refused_with_the_exchanges_code(row, code):
    assert refusal(new_ledger(), row) == code


@pytest.mark.parametrize(("price", "code"), [("102.5", -4014), ("102.55", -1111), ("102.500", -4014)])
def test_price_off_the_tick_is_told_from_one_beyond_the_precision(price, code):
    ledger = new_ledger()
    ledger.contracts[BTC] = CONTRACT.changed("TRADING", {"PRICE_FILTER": {"tickSize": "5", "minPrice": "5"}})
    assert refusal(ledger, order("BUY", "1", price=price)) == code
    assert refusal(ledger, algo("BUY", "1", price)) == code


def test_order_with_too_little_margin_is_refused_until_leverage_allows_it():
    ledger = new_ledger("100")
    assert refusal(ledger, order("BUY", "20.1")) == -2019
    ledger.set_leverage("main", BTC, 50)
    place(ledger, order("BUY", "20.1", price="100"))
    assert refusal(ledger, order("BUY", "40", price="99")) == -2019, "what rests binds margin too"


def test_client_id_with_an_open_order_is_refused_and_free_again_after_it():
    ledger = new_ledger()
    first = order("BUY", "1", price="99", client_id="same")
    place(ledger, first)
    assert refusal(ledger, order("BUY", "1", client_id="same")) == -4116
    ledger.cancel(first)
    place(ledger, order("BUY", "1", client_id="same"))
    place(ledger, order("BUY", "1", client_id="same"))
    assert ledger.position("main", BTC).qty == 2, "ids are unique among open orders only"


def test_hedged_account_with_any_order_refuses_it():
    ledger = new_ledger()
    ledger.accounts["main"].is_hedged = True
    assert refusal(ledger, order("BUY", "1")) == -4061
    assert refusal(ledger, algo("SELL", "1", "90")) == -4061


def test_reduce_only_order_with_more_than_the_position_is_cut_to_it():
    ledger = new_ledger()
    place(ledger, order("BUY", "1"))
    row = order("SELL", "5", reduce_only=True)
    place(ledger, row)
    assert (row.status, row.qty) == ("FILLED", D(1))
    assert ledger.position("main", BTC).qty == 0


def test_position_below_the_least_notional_can_have_its_stop_and_be_closed_reduce_only_alone():
    ledger = new_ledger()
    place(ledger, order("BUY", "1"))
    place(ledger, order("SELL", "0.9", reduce_only=True))
    stop = algo("SELL", "0.1", "98", reduce_only=True)
    place(ledger, stop)
    assert stop.status == "NEW" and refusal(ledger, order("SELL", "0.1")) == -4164
    row = order("SELL", "0.1", reduce_only=True)
    place(ledger, row)
    assert row.status == "FILLED" and ledger.position("main", BTC).qty == 0


def test_reduce_only_order_resting_when_the_position_closes_expires():
    ledger = new_ledger()
    place(ledger, order("BUY", "1"))
    row = order("SELL", "1", price="104", reduce_only=True)
    stop = algo("SELL", "0", "90", close_position=True, tif="GTE_GTC")
    place(ledger, row)
    place(ledger, stop)
    place(ledger, order("SELL", "1"))
    assert (row.status, stop.status, ledger.open) == ("EXPIRED", "EXPIRED", {})


def test_stop_with_its_trigger_reached_becomes_a_market_order_of_the_same_client_id():
    ledger = new_ledger()
    place(ledger, order("BUY", "1"))
    stop = algo("SELL", "1", "98", reduce_only=True, client_id="stop", working_type="MARK_PRICE")
    place(ledger, stop)
    ledger.events()
    meet(ledger, now_ms=4, last_price=D("97"), mark_price=D("98.1"))
    assert ledger.events() == []
    meet(ledger, now_ms=5, last_price=D("99"), mark_price=D("98"))
    events = [e for e in ledger.events() if isinstance(e, OrderEvent)]
    assert [(e.order.kind, e.execution) for e in events] == [
        ("algo", "TRIGGERING"), ("algo", "TRIGGERED"), ("order", "NEW"), ("order", "TRADE"),
        ("algo", "FINISHED")]
    child = events[3].order
    assert (child.client_id, child.type, child.orig_type, child.reduce_only) == (
        "stop", "MARKET", "STOP_MARKET", True)
    assert [e.order.ref for e in events] == [0, child.id, stop.id, stop.id, child.id]
    assert (stop.status, stop.filled, stop.spent, stop.trigger_ms) == ("FINISHED", D(1), D("99.9"), 5)
    assert ledger.open == {}


def test_stop_with_nothing_left_to_reduce_is_rejected_when_it_triggers():
    ledger = new_ledger()
    stop = algo("SELL", "1", "98", reduce_only=True)
    place(ledger, stop)
    meet(ledger, last_price=D("98"))
    assert (stop.status, stop.reason, ledger.open) == ("REJECTED", "Reduce Only reject", {})
    assert said(ledger)[-1] == ("algo", "REJECTED")


def test_close_position_stop_with_a_position_closes_all_of_it():
    ledger = new_ledger()
    place(ledger, order("SELL", "2"), levels(("100", "9")))
    stop = algo("BUY", "0", "102", close_position=True)
    place(ledger, stop)
    assert refusal(ledger, algo("BUY", "0", "103", close_position=True)) == -4130
    meet(ledger, last_price=D("102"))
    assert ledger.position("main", BTC).qty == 0


def test_open_orders_with_their_number_reached_refuse_one_more():
    ledger = new_ledger()
    for _ in range(int(CONTRACT.numbers["MAX_NUM_ORDERS.limit"])):
        place(ledger, order("BUY", "1", price="99"))
    for _ in range(int(CONTRACT.numbers["MAX_NUM_ALGO_ORDERS.limit"])):
        place(ledger, algo("SELL", "1", "90"))
    assert refusal(ledger, order("BUY", "1", price="99")) == -2025
    assert refusal(ledger, algo("SELL", "1", "90")) == -4045


def paid(ledger: Ledger, reason: str) -> list[Decimal]:
    return [e.amount for e in ledger.events() if isinstance(e, Income) and e.reason == reason]


def test_funding_by_market_time_is_paid_once_for_each_boundary_that_passed():
    ledger = new_ledger()
    ledger.now_ms = 10 * FUNDING_MS + 1
    place(ledger, order("BUY", "2"))
    fee, told = -2 * D("100") * FUNDING_RATE, []
    for at_ms in (10 * FUNDING_MS + 1, 11 * FUNDING_MS - 1, 11 * FUNDING_MS, 11 * FUNDING_MS + 1_000,
                  14 * FUNDING_MS + 1, 14 * FUNDING_MS + 2):
        ledger.now_ms = at_ms
        ledger.care("main")
        told.append(paid(ledger, "FUNDING_FEE"))
    assert told == [[], [], [fee], [], [fee] * 3, []]
    assert ledger.position("main", BTC).funding == 4 * fee


def test_funding_by_market_time_with_a_short_position_is_received():
    ledger = new_ledger()
    for ledger.now_ms in (FUNDING_MS, FUNDING_MS + 1):
        ledger.care("main")
    place(ledger, order("SELL", "2"))
    ledger.events()
    ledger.now_ms = 2 * FUNDING_MS
    ledger.care("main")
    assert paid(ledger, "FUNDING_FEE") == [2 * D("100") * FUNDING_RATE]


@pytest.mark.parametrize(("btc", "eth", "left"), [
    ("100", "100", [BTC, ETH]), ("91.3", "110", [ETH]), ("60", "60", [])])
def test_liquidation_goes_on_over_positions_from_the_largest_as_long_as_it_is_due(btc, eth, left):
    ledger = new_ledger("30")
    ledger.feeds[ETH], ledger.contracts[ETH] = Feed(), CONTRACT
    for symbol, qty in ((ETH, "0.6"), (BTC, "4")):
        ledger.feeds[symbol].asks = levels(("100", "9"))
        ledger.place(msgspec.structs.replace(order("BUY", qty), symbol=symbol))
    ledger.place(order("BUY", "0.6", price="96"))
    ledger.events()
    for symbol, mark in ((BTC, btc), (ETH, eth)):
        ledger.feeds[symbol].mark_price, ledger.feeds[symbol].bids = D(mark), levels((mark, "9"))
    assert ledger.is_due_for_liquidation("main") == (left != [BTC, ETH])
    ledger.care("main")
    fills = [e.order for e in ledger.events() if isinstance(e, OrderEvent) and e.fill]
    assert [row.symbol for row in fills] == [symbol for symbol in (BTC, ETH) if symbol not in left]
    assert sorted(ledger.held("main")) == left
    assert len(ledger.open) == (left == [BTC, ETH]), "orders go first"
    assert left or ledger.accounts["main"].wallet == 0, "the insurance fund pays what is missing"


def test_adl_of_a_quantity_off_the_step_is_refused():
    ledger = new_ledger()
    place(ledger, order("BUY", "1"))
    ledger.events()
    for qty, code in (("0.0005", -1111), ("1.001", -4003), ("0", -4003)):
        with pytest.raises(Refused) as caught:
            ledger.force("adl", "main", BTC, D(qty))
        assert (caught.value.code, ledger.events(), ledger.open) == (code, [], {})
    ledger.force("adl", "main", BTC, D("0.001"))
    assert ledger.position("main", BTC).qty == D("0.999")


@pytest.mark.parametrize("damage", ["wallet", "realized", "qty", "fees"])
def test_books_with_a_damaged_number_do_not_pass_the_check(damage):
    ledger = new_ledger()
    place(ledger, order("BUY", "1"))
    ledger.check("main")
    holder = ledger.accounts["main"] if damage == "wallet" else ledger.accounts["main"].positions[BTC]
    setattr(holder, damage, getattr(holder, damage) + D("0.00000001"))
    with pytest.raises(InvariantError):
        ledger.check("main")


# A second bookkeeper: every contract is kept apart, nothing is shared with the ledger's arithmetic.

@dataclass
class Model:
    wallet: Decimal
    qty: int = 0  # thousandths, signed
    cost: Fraction = Fraction(0)
    fees: Decimal = field(default=D(0))

    def fund(self, mark: Decimal, rate: Decimal) -> None:
        self.wallet -= round_half_up(Fraction(self.qty, 1000) * Fraction(mark) * Fraction(rate))

    def is_liquidated(self, mark: Decimal) -> bool:
        worth = Fraction(self.qty, 1000) * Fraction(mark)
        ratio, off = next((ratio, off) for most, ratio, off in TIERS if abs(worth) <= most)
        return self.qty != 0 and Fraction(self.wallet) + worth - self.cost < abs(worth) * ratio - off

    def fill(self, side: str, price: Decimal, qty: Decimal, rate: Decimal) -> None:
        sign, steps = (1 if side == "BUY" else -1), int(qty * 1000)
        fee = (price * qty * rate).quantize(D("0.00000001"), ROUND_HALF_UP)
        closing = min(steps, abs(self.qty)) if self.qty * sign < 0 else 0
        if closing:
            share = self.cost * closing / abs(self.qty)
            if closing != abs(self.qty):
                share = Fraction(round_half_up(share))
            profit = Fraction(price) * closing / 1000 * -sign - share
            self.wallet += as_decimal(profit)
            self.cost -= share
        self.cost += Fraction(price) * (steps - closing) * sign / 1000
        self.qty += sign * steps
        self.wallet -= fee
        self.fees += fee


def round_half_up(value: Fraction) -> Decimal:
    scaled = abs(value) * 10**8
    units = int(scaled) + (scaled - int(scaled) >= Fraction(1, 2))
    return D(units) * D("0.00000001") * (1 if value >= 0 else -1)


def as_decimal(value: Fraction) -> Decimal:
    result = D(value.numerator) / D(value.denominator)
    assert Fraction(result) == value, "money has finitely many places"
    return result


STEP = st.tuples(
    st.sampled_from(["market", "market", "limit", "reduce", "algo", "cancel", "restart", "fund", "adl",
                     "mark"]),
    st.sampled_from(["BUY", "SELL"]), st.integers(1, 5_000), st.integers(960, 1_040), st.integers(1, 400))
# Maintenance of the brackets these positions reach: up to a notional, its ratio and what is taken off.
TIERS = ((300_000, Fraction(4, 1000), 0), (800_000, Fraction(5, 1000), 300),
         (3_000_000, Fraction(65, 10_000), 1_500))


@settings(max_examples=300, deadline=None)
@given(st.lists(STEP, max_size=40), st.sampled_from([20, 40, 1_000_000]))
def test_account_with_any_sequence_of_orders_equals_the_second_bookkeeper(steps, balance):
    play(steps, balance)


@pytest.mark.drill
def test_account_with_thousands_of_sequences_equals_the_second_bookkeeper():
    seen = Counter()

    @settings(max_examples=3_000, deadline=None)
    @given(st.lists(STEP, min_size=10, max_size=60), st.sampled_from([10, 20, 40, 100, 50_000]))
    def drill(steps, balance):
        seen.update(what for what, *_ in steps)
        seen.update(sequences=1, steps=len(steps), **play(steps, balance))

    drill()
    print("\n" + ", ".join(f"{count:,} {name}" for name, count in seen.most_common()))
    assert seen["sequences"] >= 3_000 and seen["liquidations"] >= 100


def play(steps, balance):
    """Let both keep the books of a sequence; return how many fills and liquidations it had."""
    liquidations = 0
    ledger, model, store = new_ledger(str(balance)), Model(D(balance)), Store(":memory:")
    store.keep("accounts", ledger.accounts)
    trade_ids: list[int] = []
    for number, (what, side, steps_qty, tenths, depth) in enumerate(steps, 2):
        bids = levels((f"{tenths / 10 - 0.1:.1f}", f"{depth / 100:.2f}"), (f"{tenths / 10 - 0.7:.1f}", "3"))
        asks = levels((f"{tenths / 10:.1f}", f"{depth / 100:.2f}"), (f"{tenths / 10 + 0.9:.1f}", "3"))
        qty = f"{steps_qty / 1000:.3f}"
        ledger.now_ms = number
        feed = ledger.feeds[BTC]
        try:
            if what in ("market", "reduce"):
                place(ledger, order(side, qty, reduce_only=what == "reduce"), bids, asks)
            elif what == "limit":
                place(ledger, order(side, qty, price=f"{tenths / 10:.1f}"))
            elif what == "algo":
                feed.last_price = D("100")
                place(ledger, algo(side, qty, f"{tenths / 10:.1f}"))
            elif what == "cancel" and ledger.open:
                ledger.cancel(next(iter(ledger.open.values())))
            elif what == "restart":
                ledger = restarted(ledger, store)
            elif what == "fund":
                ledger.fund("main", D(tenths - 1_000) / 10_000)
                model.fund(feed.mark(), D(tenths - 1_000) / 10_000)
            elif what == "adl":
                ledger.force("adl", "main", BTC, D(qty))
            elif what == "mark":
                feed.mark_price = D(tenths) / 10 + D((steps_qty - 2_500) * 100 // 120) / 100
        except Refused:
            pass
        meet(ledger, bids, asks, number, last_price=D(tenths) / 10)
        record(ledger, model, store, trade_ids)
        is_due = model.is_liquidated(feed.mark())
        assert ledger.is_due_for_liquidation("main") == is_due
        if is_due:
            notional = liquidated(ledger)
            liquidations += 1
            record(ledger, model, store, trade_ids, -1)
            fee = min(as_decimal(Fraction(round_half_up(notional / 80))), max(D(0), model.wallet))
            model.wallet += -model.wallet if model.wallet < 0 else -fee
            compare(ledger, model)
    assert trade_ids == sorted(set(trade_ids))
    return {"fills": len(trade_ids), "liquidations": liquidations}


def liquidated(ledger):
    """Liquidate, and return the notional by what the fills say."""
    held = ledger.position("main", BTC).qty
    ledger.care("main")
    assert ledger.open == {}, "orders go first"
    fills = [e for e in ledger._events if isinstance(e, OrderEvent) and e.fill]
    assert {e.execution for e in fills} == {"CALCULATED"}
    assert sum(e.fill.qty for e in fills) == abs(held)
    return sum((Fraction(e.fill.price) * Fraction(e.fill.qty) for e in fills), Fraction(0))


def record(ledger, model, store, trade_ids, unlike=0):
    events = ledger.events()
    store.save(ledger, events, {})
    for event in events:
        if isinstance(event, OrderEvent) and event.fill:
            fill = event.fill
            trade_ids.append(fill.id)
            model.fill(fill.side, fill.price, fill.qty, MAKER if fill.is_maker else TAKER)
    if not unlike:
        compare(ledger, model)


def restarted(ledger: Ledger, store: Store) -> Ledger:
    fresh = Ledger(ledger.feeds, taker_fee=TAKER, maker_fee=MAKER)
    fresh.now_ms = ledger.now_ms
    store.load(fresh)
    assert msgspec.json.encode((fresh.accounts, list(fresh.open.values()))) == msgspec.json.encode(
        (ledger.accounts, sorted(ledger.open.values(), key=lambda o: o.id)))
    assert fresh.last_ids["order"] <= ledger.last_ids["order"]
    return fresh


def compare(ledger: Ledger, model: Model) -> None:
    account, position = ledger.accounts["main"], ledger.position("main", BTC)
    assert account.wallet == model.wallet
    assert position.qty == D(model.qty) / 1000
    assert Fraction(position.cost) == model.cost
    assert position.fees == model.fees
