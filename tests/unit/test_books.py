"""The fold: equal bytes, an independent model of positions, and refusals that change nothing."""

import copy
import hashlib
import itertools
import json
from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bot.books import CLOCK_SLACK_NS, LAYOUT, NAMES_KEPT, SETTLED_KEPT_NS, SETTLED_ORDERS_KEPT, Books
from bot.errors import IllegalTransition, InvariantError
from bot.events import (
    NOT_OWNER,
    Adopted,
    Commanded,
    ExitsSet,
    Halted,
    Reconciled,
    Restored,
    Resumed,
    SignalClosed,
    Started,
    SymbolLocked,
    SymbolUnlocked,
)
from bot.limits import check_sender
from tests.factory import (
    BTC,
    ETH,
    NOW,
    SECOND,
    D,
    changed,
    filled,
    folded,
    holding,
    intended,
    name_of,
    received,
    signal,
)


def closed(name="levels/7/1", outcome="done", symbol=BTC):
    return SignalClosed(signal=name, symbol=symbol, outcome=outcome, reason="", filled_qty=D(0))


def refuses(books, event, text=".", error=InvariantError):
    """Apply, watch it raise, and hold every byte of the books against what they were before."""
    before, twin = books.encode(), copy.deepcopy(books)
    with pytest.raises(error, match=text):
        books.apply(event)
    assert books.encode() == before and books == twin


# The shape of what a checkpoint holds, by LAYOUT: a checkpoint of another shape, read as this one, says less.
LAYOUT_SHAPES = {4: "fdac5ffbe4bf", 5: "15ec68c03bed"}


def test_layout_with_another_shape_of_the_books_is_another_number():
    def bare(part):  # without the docstrings
        if isinstance(part, dict):
            return {name: bare(inner) for name, inner in part.items() if name != "description"}
        return [bare(inner) for inner in part] if isinstance(part, list) else part

    shape = json.dumps(bare(msgspec.json.schema(Books)), sort_keys=True, default=str)
    digest = hashlib.sha256(shape.encode()).hexdigest()[:12]
    assert LAYOUT_SHAPES.get(LAYOUT) == digest, f"the fields have changed: raise LAYOUT, note {digest} for it"


def test_book_of_a_symbol_that_somebody_made_up_goes_with_its_last_signal():
    made_up = "X1/USDT:USDT"
    symbols = (made_up, made_up, BTC)
    books = folded(*(received(signal(seq=n, symbol=symbol)) for n, symbol in enumerate(symbols, 1)))
    for n, symbol in enumerate(symbols, 1):
        assert symbol in books.symbols
        end = closed(f"levels/7/{n}", "denied", symbol)
        books.apply(msgspec.structs.replace(end, reason=str(check_sender(signal(), None, now_ns=NOW))))
    assert books.symbols == {} and books.outcomes == {"denied": 3}
    held = holding("1", received(signal()))
    held.apply(msgspec.structs.replace(closed(outcome="denied"), reason=f"{NOT_OWNER}: of nobody"))
    assert held.book(BTC).position_qty, "a position is never forgotten"


# A pool of events that often fit one another, so that random sequences get somewhere.
names = st.sampled_from(["o1", "o2", "o3", "s1"])
qtys = st.sampled_from(["1", "0.5", "2", "0.001"])
symbols = st.sampled_from([BTC, ETH])
signals = st.builds(
    lambda seq, symbol, age: received(signal(seq=seq, symbol=symbol, now_ns=NOW - age)),
    st.integers(1, 3),
    symbols,
    st.integers(0, 5),
)
events = st.one_of(
    st.builds(lambda epoch: Started(epoch=epoch, version="1", config="c"), st.sampled_from(["e1", "e2"])),
    signals,
    st.builds(
        lambda seq, outcome, symbol: closed(f"levels/7/{seq}", outcome, symbol),
        st.integers(1, 3),
        st.sampled_from(["done", "denied"]),
        symbols,
    ),
    st.builds(
        lambda name, qty, side, leg, seq, symbol: intended(
            name,
            qty,
            side,
            leg=leg,
            signal=f"levels/7/{seq}",
            trigger="90" if leg == "stop" else None,
            symbol=symbol,
        ),
        names,
        qtys,
        st.sampled_from(["buy", "sell"]),
        st.sampled_from(["open", "reduce", "stop", "close"]),
        st.integers(1, 3),
        symbols,
    ),
    st.builds(
        lambda name, event, executed: changed(name, event, executed_qty=D(executed), exchange_order_id="9"),
        names,
        st.sampled_from(
            [
                "lose",
                "accept",
                "reject",
                "absent",
                "cancel",
                "expire",
                "request_cancel",
                "refuse_cancel",
                "complete",
                "fill",
            ]
        ),
        st.sampled_from(["0", "0.5", "-1", "9"]),
    ),
    st.builds(
        lambda name, qty, side, price, cause, trade, symbol: filled(
            name, qty, side, price=price, cause=cause, trade=trade, symbol=symbol
        ),
        names,
        qtys,
        st.sampled_from(["buy", "sell"]),
        st.sampled_from(["100", "0", "99.5", "NaN"]),
        st.sampled_from(["signal", "stop"]),
        st.sampled_from(["1", "22", "x"]),
        symbols,
    ),
    st.builds(
        lambda stop: ExitsSet(symbol=BTC, signal="levels/7/1", stop_loss=stop, take_profit=None),
        st.sampled_from([None, D(90)]),
    ),
    st.builds(lambda cause: SymbolLocked(symbol=ETH, cause=cause, evidence="e"), st.sampled_from(["a", "b"])),
    st.builds(
        lambda cause: SymbolUnlocked(symbol=ETH, cause=cause, evidence="e"), st.sampled_from(["a", "b"])
    ),
    st.just(Halted(scope="all", who="w", why="y")),
    st.just(Resumed(scope="all")),
    st.just(Reconciled(trigger="t", differences=("d",), positions={BTC: D(1)}, wallet_balance=D(5))),
)


@settings(max_examples=250, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(events, max_size=40))
def test_fold_with_any_events_is_equal_twice_and_refusals_change_nothing(history):
    books, taken = Books(), []
    for event in history:
        before = books.encode()
        try:
            books.apply(event)
            taken.append(event)
        except (InvariantError, IllegalTransition):
            assert books.encode() == before
    assert folded(*taken).encode() == books.encode()
    assert Books.decode(books.encode()) == books
    assert Books.decode(books.encode()).encode() == books.encode()
    half = len(taken) // 2
    resumed = Books.decode(folded(*taken[:half]).encode())
    for event in taken[half:]:
        resumed.apply(event)
    assert resumed.encode() == books.encode()


class Position:
    """The same in another way: lots in exact fractions, averaged, closed against the entry price."""

    def __init__(self):
        self.qty, self.cost = Fraction(0), Fraction(0)

    def trade(self, qty, price):
        if self.qty * qty < 0:  # closes first
            part = min(abs(qty), abs(self.qty)) * (1 if qty > 0 else -1)
            self.cost += self.cost / self.qty * part
            self.qty += part
            qty -= part
        self.qty += qty
        self.cost += qty * price

    @property
    def entry(self):
        return self.cost / self.qty if self.qty else None


trades = st.tuples(st.integers(1, 5_000), st.booleans(), st.integers(1, 10_000_000), st.integers(-99, 99))


@settings(max_examples=200, deadline=None)
@given(st.lists(trades, max_size=25))
def test_position_with_any_fills_follows_an_independent_model(history):
    books, model, pnl = Books(), Position(), Decimal(0)
    for n, (qty, is_buy, price, cents) in enumerate(history):
        books.apply(
            filled(
                "",
                str(D(qty) / 1_000),
                "buy" if is_buy else "sell",
                trade=str(n),
                price=str(D(price) / 100),
                realized_pnl=D(cents) / 100,
            )
        )
        pnl += D(cents) / 100
        model.trade(Fraction(qty if is_buy else -qty, 1_000), Fraction(price, 100))
    book = books.book(BTC)
    assert Fraction(book.position_qty) == model.qty
    assert (book.realized_pnl, book.fees, books.fills) == (pnl, D("0.01") * len(history), len(history))
    if model.entry is None:
        assert book.entry_price is None
    else:
        exact = D(model.entry.numerator) / D(model.entry.denominator)
        assert book.entry_price.quantize(D("1E-12"), ROUND_HALF_EVEN) == exact.quantize(
            D("1E-12"), ROUND_HALF_EVEN
        )


@pytest.mark.parametrize(
    ("history", "entry"),
    [
        ([("1", "buy", "100"), ("1", "buy", "110")], "105"),
        ([("2", "buy", "100"), ("1", "sell", "50")], "100"),  # a partial close keeps the price
        ([("1", "buy", "100"), ("3", "sell", "120")], "120"),  # turned over: what is left was sold at 120
        ([("1", "sell", "100"), ("1", "buy", "90")], None),
    ],
)
def test_entry_price_with_fills_is_the_average_of_what_is_left(history, entry):
    books = folded(*(filled("", q, side, price=p, trade=str(n)) for n, (q, side, p) in enumerate(history)))
    assert books.book(BTC).entry_price == (entry and D(entry))


def test_order_with_fill_beyond_its_quantity_is_booked_as_the_exchange_did_it():
    books = folded(received(signal()), intended("o1"), changed("o1", "accept"), filled("o1", "0.9"))
    books.apply(filled("o1", "0.101", trade="2"))
    books.apply(filled("o1", "0.001", trade="3"))
    order = books.book(BTC).orders["o1"]
    assert (order.state, order.filled_qty, books.book(BTC).position_qty) == ("FILLED", D("1.002"), D("1.002"))


@pytest.mark.parametrize("field", ["qty", "price", "fee", "realized_pnl"])
@pytest.mark.parametrize("number", ["NaN", "sNaN", "Infinity", "-Infinity", "-1", "0"])
@pytest.mark.parametrize("name", ["o1", ""])
def test_fill_with_impossible_number_is_refused_without_change(field, number, name):
    books = folded(received(signal()), intended("o1"))
    event = (
        filled(name, **{field: number}) if field in ("qty", "price") else filled(name, **{field: D(number)})
    )
    if field in ("fee", "realized_pnl") and D(number).is_finite():
        books.apply(event)  # a rebate, a loss
    else:
        refuses(books, event, "no fill can have")


def test_fill_of_the_other_side_is_refused_without_change():
    refuses(folded(received(signal()), intended("o1")), filled("o1", side="sell"), "o1 is a buy")


def test_fill_in_a_new_symbol_that_is_refused_leaves_no_book_behind():
    books = folded(filled(""))
    refuses(books, filled("", "NaN", symbol=ETH))
    assert list(books.symbols) == [BTC]


def test_signal_with_second_outcome_is_refused_without_change():
    books = folded(received(signal()), received(signal(seq=2)), closed())
    refuses(books, closed(outcome="denied"), "second outcome")
    assert books.outcomes == {"done": 1}


def test_signal_with_outcome_in_a_symbol_without_book_is_refused_without_change():
    refuses(folded(received(signal())), closed(symbol=ETH), "not open")


def test_signal_received_twice_is_refused_without_change():
    refuses(folded(received(signal())), received(signal("3")), "received twice")


def test_order_intended_twice_is_refused_without_change():
    refuses(folded(received(signal()), intended("o1"), filled("o1")), intended("o1"), "intended twice")


def test_order_with_second_one_working_is_refused_without_change():
    books = folded(received(signal()), intended("o1"), changed("o1", "lose"))
    refuses(books, intended("o2"), "second to move")
    books.apply(intended("s1", leg="stop", trigger="90"))  # rests, and moves nothing
    books.apply(intended("c1", leg="close", side="sell"))  # an unprotected position does not wait for o1
    books.apply(changed("o1", "absent"))
    books.apply(filled("c1", side="sell"))
    books.apply(intended("o2"))


@pytest.mark.parametrize("history", [[], [received(signal()), closed()], [received(signal(symbol=ETH))]])
def test_order_for_a_signal_that_is_not_open_is_refused_without_change(history):
    refuses(folded(*history), intended("o1"), "levels/7/1, which is not open")


@pytest.mark.parametrize("qty", ["0", "-1", "NaN", "sNaN", "Infinity"])
def test_order_with_impossible_quantity_is_refused_without_change(qty):
    refuses(folded(received(signal())), intended("o1", qty), "positive quantity")


def test_order_with_illegal_event_is_refused_without_change():
    books = folded(received(signal()), intended("o1"), filled("o1"))
    refuses(
        books,
        changed("o1", "lose", code=5, text="t", exchange_order_id="7"),
        "FILLED cannot lose",
        IllegalTransition,
    )
    refuses(books, changed("nobody", "accept"), "not in the books")


@pytest.mark.parametrize("executed", ["-1", "NaN", "sNaN", "Infinity"])
def test_order_with_impossible_executed_quantity_is_refused_without_change(executed):
    refuses(
        folded(received(signal()), intended("o1")),
        changed("o1", "accept", executed_qty=D(executed)),
        "cannot have executed",
    )


@pytest.mark.parametrize(
    "cause", ["signal", "stop", "take_profit", "liquidation", "adl", "operator", "close", "restored"]
)
def test_version_with_fill_rises_unless_a_signal_caused_it(cause):
    books = holding("1", version=4)
    books.apply(filled("", "0.5", "sell", cause=cause))
    assert books.book(BTC).version == (4 if cause == "signal" else 5)


def test_version_with_everything_but_fills_stays():
    books = folded(
        received(signal()),
        intended("o1"),
        changed("o1", "lose"),
        changed("o1", "absent"),
        closed(),
        ExitsSet(symbol=BTC, signal="x", stop_loss=D(1), take_profit=None),
        SymbolLocked(symbol=BTC, cause="c", evidence=""),
        SymbolUnlocked(symbol=BTC, cause="c", evidence=""),
    )
    assert books.book(BTC).version == 0


@pytest.mark.parametrize(
    ("end", "state"), [("cancel", "CANCELED"), ("expire", "EXPIRED"), ("reject", "REJECTED")]
)
def test_closed_order_with_late_fill_books_it(end, state):
    books = folded(received(signal()), intended("o1"), changed("o1", end), filled("o1", "0.4"))
    book = books.book(BTC)
    assert (book.orders["o1"].state, book.position_qty, book.signals[0].filled_qty) == (
        state,
        D("0.4"),
        D("0.4"),
    )
    books.apply(filled("o1", "0.6", trade="2"))
    assert book.orders["o1"].state == "FILLED"


def test_absent_order_with_late_fill_is_alive_again_and_counts():
    books = folded(received(signal()), intended("o1"), changed("o1", "lose"), changed("o1", "absent"))
    assert not books.book(BTC).working()
    books.apply(filled("o1", "0.4"))
    assert [o.signed_leaves_qty for o in books.book(BTC).working()] == [D("0.6")]


def test_closed_order_with_word_of_more_executed_is_not_settled_until_it_is_booked():
    books = folded(received(signal()), intended("o1"), changed("o1", "expire", executed_qty=D("0.4")))
    order = books.book(BTC).orders["o1"]
    assert not order.is_settled and order.signed_leaves_qty == 1
    books.apply(filled("o1", "0.4"))
    assert order.is_settled and order.signed_leaves_qty == 0


def test_closed_order_with_late_word_of_execution_waits_for_its_fills_again():
    books = folded(received(signal()), intended("o1"), changed("o1", "cancel"))
    books.apply(changed("o1", "accept", executed_qty=D("0.4")))
    assert (books.book(BTC).orders["o1"].state, len(books.book(BTC).working())) == ("CANCELED", 1)


@pytest.mark.parametrize(
    ("state", "events"), [("INTENDED", ()), ("UNKNOWN", ("lose",)), ("ACCEPTED", ("accept",))]
)
def test_unsettled_order_counts_at_full_size(state, events):
    books = folded(received(signal()), intended("o1", "3", "sell"), *(changed("o1", e) for e in events))
    order = books.book(BTC).orders["o1"]
    assert (order.state, order.signed_leaves_qty, books.book(BTC).working()) == (state, D(-3), [order])
    assert books.book(BTC).unknown() == ([order] if state == "UNKNOWN" else [])


def test_order_with_fewer_words_later_forgets_nothing():
    books = folded(
        received(signal()),
        intended("o1", "2"),
        changed("o1", "accept", exchange_order_id="9", triggered_id="8", code=1, text="t", executed_qty=D(2)),
        changed("o1", "accept"),
    )
    order = books.book(BTC).orders["o1"]
    assert (order.exchange_order_id, order.triggered_id, order.code, order.text, order.executed_qty) == (
        "9",
        "8",
        1,
        "t",
        D(2),
    )


def test_find_order_with_each_of_its_names_finds_it():
    books = folded(
        received(signal()),
        intended("o1"),
        changed("o1", "accept", exchange_order_id="9"),
        intended("s1", leg="stop", trigger="90"),
        changed("s1", "accept", exchange_order_id="7", triggered_id="8"),
    )
    order, stop = books.book(BTC).orders["o1"], books.book(BTC).orders["s1"]
    assert books.find_order(BTC, client_order_id="o1") is order
    assert books.find_order(BTC, exchange_order_id="9") is order
    assert books.find_order(BTC, client_order_id="x", exchange_order_id="8") is stop
    assert books.find_order(BTC, exchange_order_id="7") is None, "a conditional order's own number"
    assert books.find_order(BTC, client_order_id="x", exchange_order_id="") is None
    assert books.find_order(ETH, client_order_id="o1") is None


def many(books, count, leg="stop", start=0, now_ns=NOW):
    for n in range(start, start + count):
        books.apply(intended(f"x{n}", leg=leg, trigger="90", now_ns=now_ns + n))
        books.apply(changed(f"x{n}", "reject"))


def test_settled_orders_with_many_newer_ones_are_forgotten_but_not_the_last_minute():
    books = Books()
    many(books, SETTLED_ORDERS_KEPT * 3)
    assert len(books.book(BTC).orders) == SETTLED_ORDERS_KEPT * 3  # the order rate is counted over them
    many(books, 1, start=1_000, now_ns=NOW + SETTLED_KEPT_NS)
    kept = list(books.book(BTC).orders)
    assert len(kept) == SETTLED_ORDERS_KEPT + 1 and kept[0] == f"x{SETTLED_ORDERS_KEPT * 2}"


def test_settled_order_of_an_open_signal_is_kept_as_long_as_it_is_open():
    books = folded(received(signal()), intended("o1"), changed("o1", "expire"))
    many(books, SETTLED_ORDERS_KEPT * 2)
    many(books, 2, start=1_000, now_ns=NOW + 2 * SETTLED_KEPT_NS)
    assert "o1" in books.book(BTC).orders
    books.apply(closed())
    many(books, 1, start=2_000, now_ns=NOW + 2 * SETTLED_KEPT_NS)
    assert "o1" not in books.book(BTC).orders


def test_unsettled_order_with_many_newer_ones_is_never_forgotten():
    books = folded(intended("u", leg="stop", trigger="90"), changed("u", "lose"))
    many(books, SETTLED_ORDERS_KEPT * 2)
    many(books, 1, start=1_000, now_ns=NOW + 3_600 * SECOND)
    assert "u" in books.book(BTC).orders and len(books.book(BTC).orders) == SETTLED_ORDERS_KEPT + 2


def test_newest_with_signals_out_of_sequence_is_the_one_made_last():
    books = folded(received(signal(seq=2, now_ns=NOW)), received(signal(seq=1, now_ns=NOW - 5)))
    assert books.book(BTC).newest == {"levels": (NOW, 7, 2)}
    books.apply(received(signal(seq=3, now_ns=NOW - 5)))  # its host's clock stepped back
    books.apply(received(signal(run=6, now_ns=NOW - 9)))
    assert books.book(BTC).newest == {"levels": (NOW - 5, 7, 3)}


def test_newest_with_signal_from_the_future_is_not_moved():
    books = folded(
        received(signal(seq=1)),
        received(signal(seq=2, now_ns=NOW + CLOCK_SLACK_NS + 1), received_ns=NOW),
        received(signal(seq=3, now_ns=2**64 - 1), received_ns=NOW),
    )
    assert books.book(BTC).newest == {"levels": (NOW, 7, 1)}


def test_newest_with_strangers_is_told_apart_and_bounded():
    books = folded(
        received(signal()), *(received(signal(strategy=f"x{n}", now_ns=NOW - n - 1)) for n in range(30))
    )
    assert books.book(BTC).newest["levels"] == (NOW, 7, 1)
    assert len(books.book(BTC).newest) == NAMES_KEPT


def test_target_in_force_is_that_of_what_acted_never_of_what_was_denied():
    books = folded(received(signal("2")), intended("o1"), changed("o1", "lose"), changed("o1", "absent"))
    assert books.book(BTC).target_qty == 2
    books.apply(closed(outcome="absent"))
    for seq, (target, outcome) in enumerate((("0", "denied"), ("5", "expired"), ("7", "superseded")), 2):
        books.apply(received(signal(target, seq=seq)))
        books.apply(closed(f"levels/7/{seq}", outcome=outcome))
        assert books.book(BTC).target_qty == 2, outcome
    books.apply(received(signal("1", seq=9)))
    books.apply(closed("levels/7/9", outcome="done"))  # it was there already
    assert books.book(BTC).target_qty == 1
    books.apply(intended("f", leg="flatten", signal=""))
    assert books.book(BTC).target_qty == 0


@pytest.mark.parametrize("side", [1, -1])
@pytest.mark.parametrize("gone", ["stop", "take_profit", "liquidation", "adl", "operator", "adopted"])
def test_target_in_force_with_what_was_taken_out_is_no_more_than_what_is_held(gone, side):
    books = holding(f"{2 * side}")
    books.book(BTC).target_qty = D(3 * side)
    for number, (qty, left) in enumerate((("0.5", "1.5"), ("1.5", "0"))):
        books.apply(
            Adopted(symbol=BTC, qty=D(qty) * -side, entry_price=None, who="ann", why="mine", causes=(),
                    cursor=0) if gone == "adopted" else
            filled("", qty, "sell" if side > 0 else "buy", trade=str(number), cause=gone))
        assert books.book(BTC).target_qty == D(left) * side
    books.book(BTC).target_qty = D(side)
    books.apply(filled("", "4", "buy" if side > 0 else "sell", trade="9", cause="operator"))
    assert books.book(BTC).target_qty == side, "what comes from elsewhere is no target of ours"


def test_signal_with_fills_of_its_orders_sums_them_signed():
    books = holding(
        "2",
        received(signal("-1")),
        intended("r1", "2", "sell", leg="reduce"),
        filled("r1", "2", "sell"),
        intended("o1", "1", "sell"),
        filled("o1", "0.5", "sell", trade="2"),
        intended("s1", "1", "buy", leg="stop", trigger="110"),
        filled("s1", "0.1", "buy", trade="3"),
    )
    assert books.book(BTC).signals[0].filled_qty == D("-2.5")
    assert books.book(BTC).signals[0].orders == ["r1", "o1"]


def test_books_with_each_kind_of_event_count_and_remember():
    books = folded(
        Started(epoch="e9", version="1", config="c"),
        received(signal()),
        closed(outcome="denied"),
        Halted(scope="all", who="ann", why="lunch"),
        Halted(scope="symbol:X", who="bob", why="x"),
        Resumed(scope="symbol:X"),
        Resumed(scope="never"),
        SymbolLocked(symbol=BTC, cause="a", evidence="1"),
        SymbolLocked(symbol=BTC, cause="b", evidence="2"),
        SymbolUnlocked(symbol=BTC, cause="b", evidence=""),
        SymbolUnlocked(symbol=BTC, cause="c", evidence=""),
        ExitsSet(symbol=BTC, signal="s", stop_loss=D(9), take_profit=D(11)),
        filled("", trade="41"),
        filled("", trade="7"),
        filled("", trade="²"),
        filled("", trade="9" * 5_000),
        Reconciled(trigger="t", differences=(), positions={}, wallet_balance=D(77), cursors={BTC: 41}),
        Reconciled(trigger="t", differences=(), positions={}, wallet_balance=D(77), cursors={BTC: 7}),
    )
    book = books.book(BTC)
    assert (books.epoch, books.halts, books.signals, books.outcomes) == (
        "e9",
        {"all": "ann: lunch"},
        1,
        {"denied": 1},
    )
    assert (books.wallet_balance, books.reconciled, book.locks) == (D(77), 2, {"a": "1"})
    assert (book.stop_loss, book.take_profit, book.exits_signal, book.last_trade_id) == (D(9), D(11), "s", 41)


def test_book_of_a_symbol_where_nothing_happened_is_empty_and_not_kept():
    books = Books()
    assert books.book(BTC).position_qty == 0 and books.symbols == {}


def test_books_with_equal_histories_share_nothing():
    one, other = folded(received(signal())), folded(received(signal()))
    one.apply(intended("o1"))
    one.apply(SymbolLocked(symbol=BTC, cause="a", evidence=""))
    assert (
        other.book(BTC).signals[0].orders == []
        and other.book(BTC).orders == {}
        and other.book(BTC).locks == {}
    )


def test_order_with_every_sequence_of_two_events_keeps_the_books_whole():
    kinds = ["lose", "accept", "reject", "cancel", "expire", "request_cancel", "refuse_cancel", "absent"]
    for pair in itertools.permutations(kinds, 2):
        books = folded(received(signal()), intended("o1"))
        for event in pair:
            before = books.encode()
            try:
                books.apply(changed("o1", event))
            except IllegalTransition:
                assert books.encode() == before
        assert books.book(BTC).position_qty == 0
        assert name_of(signal()) == books.book(BTC).signals[0].id


def adopted(qty, *causes, entry="105"):
    return Adopted(symbol=BTC, qty=D(qty), entry_price=D(entry), who="ann", why="mine", causes=causes)


@pytest.mark.parametrize(("held", "qty", "keeps_exits"), [
    ("2", "1", True), ("2", "-1", True), ("-2", "-1", True), ("2", "0", True),
    ("2", "-2", False), ("2", "-3", False), ("-2", "3", False), ("0", "1", False),
])
def test_adoption_moves_the_position_and_ends_its_locks(held, qty, keeps_exits):
    books = holding(held, stop="90")
    before = books.book(BTC).version
    for cause in ("books_differ", "foreign_order"):
        books.apply(SymbolLocked(symbol=BTC, cause=cause, evidence=""))
    books.apply(Commanded(id="1", verb="adopt", symbol=BTC, who="ann", why="mine"))
    books.apply(adopted(qty, "books_differ", "adl"))
    book, after = books.book(BTC), D(held) + D(qty)
    assert (book.position_qty, book.entry_price) == (after, D("105") if after else None)
    assert (book.version, book.locks.keys()) == (before + 1, {"foreign_order"})
    assert (book.stop_loss is not None) == keeps_exits
    assert Books.decode(books.encode()) == books


def test_restored_books_deny_what_was_decided_before_until_a_comparison():
    books = holding("2", stop="90")
    before = books.book(BTC).version
    books.apply(Restored(backup="b", lacks_since_ns=1, restored_ns=2, who="ann"))
    assert (books.book(BTC).version, books.restored_ns) == (before + 1, 2)
    books.apply(Reconciled(trigger="start", differences=(), positions={}, wallet_balance=D(1)))
    assert (books.lacks_since_ns, books.restored_ns) == (0, 0)


def test_restore_forgets_the_target_in_force_or_a_late_fills_excess_would_be_measured_by_an_old_one():
    books = holding("5")
    books.book(BTC).target_qty = D("1")
    books.apply(Restored(backup="b", lacks_since_ns=1, restored_ns=2, who="ann"))
    assert books.book(BTC).target_qty is None


@pytest.mark.parametrize(("qty", "side", "keeps_exits"), [
    ("1", "buy", True), ("1", "sell", True), ("2", "sell", False), ("3", "sell", False)])
def test_fill_of_a_lost_tail_that_ends_the_position_ends_its_exits(qty, side, keeps_exits):
    books = holding("2", stop="90")
    books.apply(filled("", qty, side, cause="restored"))
    assert (books.book(BTC).stop_loss is not None) == keeps_exits


def test_adoption_with_an_order_at_work_or_no_number_is_refused():
    books = holding("2", received(signal("1")), intended("r1", "1", "sell", leg="reduce"))
    refuses(books, adopted("1"), "orders at work: r1")
    refuses(holding("2"), adopted("NaN"), "cannot be adopted")
