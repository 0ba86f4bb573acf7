"""What should rest at the exchange, given the books: full size, new stop first, one take-profit."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bot.events import ExitsSet, SymbolLocked
from bot.orders import CLOSED, IN_FLIGHT
from bot.protection import Exit, is_protected, is_stop_passed, late_excess, next_steps, refusals, wanted_exits
from tests.factory import BTC, D, changed, filled, holding, intended

WAYS = {
    "INTENDED": (),
    "UNKNOWN": ("lose",),
    "ACCEPTED": ("accept",),
    "PENDING_CANCEL": ("accept", "request_cancel"),
    "CANCELED": ("cancel",),
    "EXPIRED": ("expire",),
    "REJECTED": ("reject",),
    "ABSENT": ("lose", "absent"),
}


def resting(name, qty, side="sell", *, kind="stop", trigger="90", state="ACCEPTED", signal="", **fields):
    events = [intended(name, qty, side, leg=kind, trigger=trigger, signal=signal)]
    events += [changed(name, event) for event in WAYS[state]]
    return [*events, changed(name, "accept", **fields)] if fields else events


def stop(qty="10", side="sell", price="90"):
    return Exit("stop", side, D(qty), D(price))


def take(qty="10", side="sell", price="110"):
    return Exit("take_profit", side, D(qty), D(price))


def steps(books):
    decided = next_steps(books.book(BTC))
    return list(decided.place), list(decided.cancel)


def held(qty, *orders, stop="90", take=None):
    return holding(qty, *(event for order in orders for event in order), stop=stop, take=take)


@pytest.mark.parametrize(
    ("qty", "prices", "expected"),
    [
        ("10", ("90", "110"), (stop(), take())),
        ("-10", ("110", "90"), (stop(side="buy", price="110"), take(side="buy", price="90"))),
        ("10", ("90", None), (stop(),)),
        ("10", (None, "110"), (take(),)),
        ("10", (None, None), ()),
        ("0", ("90", "110"), ()),
    ],
)
def test_wanted_exits_with_plan_and_position_have_full_size(qty, prices, expected):
    assert wanted_exits(held(qty, stop=prices[0], take=prices[1]).book(BTC)) == expected


def test_position_without_exits_gets_both_at_once():
    assert steps(held("10", take="110")) == ([stop(), take()], [])


def test_position_with_its_exits_at_rest_needs_nothing():
    books = held(
        "10", resting("s1", "10"), resting("t1", "10", kind="take_profit", trigger="110"), take="110"
    )
    assert steps(books) == ([], []) and is_protected(books.book(BTC))


@pytest.mark.parametrize("state", sorted(IN_FLIGHT))
def test_exit_in_flight_or_unknown_is_waited_for(state):
    books = held("10", resting("s1", "10", state=state))
    assert steps(books) == ([], []) and not is_protected(books.book(BTC))


@pytest.mark.parametrize("state", sorted(set(WAYS) & CLOSED))
def test_exit_that_ended_unfilled_is_placed_again(state):
    books = held("10", resting("s1", "10", state=state))
    assert steps(books) == ([stop()], []) and not is_protected(books.book(BTC))


@pytest.mark.parametrize(("held_qty", "old_qty", "protects"), [("6", "10", True), ("10", "6", False)])
def test_stop_of_another_size_stays_until_the_new_one_rests(held_qty, old_qty, protects):
    old = resting("s1", old_qty)
    books = held(held_qty, old)
    assert steps(books) == ([stop(held_qty)], []) and is_protected(books.book(BTC)) is protects
    books = held(held_qty, old, resting("s2", held_qty, state="INTENDED"))
    assert steps(books) == ([], [])
    books = held(held_qty, old, resting("s2", held_qty))
    assert steps(books) == ([], ["s1"]) and is_protected(books.book(BTC))


def test_stop_at_another_price_stays_until_the_new_one_rests():
    assert steps(held("10", resting("s1", "10", trigger="89"))) == ([stop()], [])
    assert steps(held("10", resting("s1", "10", trigger="89"), resting("s2", "10"))) == ([], ["s1"])


@pytest.mark.parametrize(("held_qty", "canceled"), [("3", ["s2"]), ("12", ["s2"])])
def test_resize_with_two_old_stops_keeps_the_larger_one_only(held_qty, canceled):
    books = held(held_qty, resting("s1", "10"), resting("s2", "6"))
    assert steps(books) == ([stop(held_qty)], canceled)


def test_resize_with_the_new_stop_unknown_still_cancels_what_is_too_much():
    books = held("3", resting("s1", "10"), resting("s2", "6"), resting("s3", "3", state="UNKNOWN"))
    assert steps(books) == ([], ["s2"])


def test_stop_of_the_other_side_is_canceled_at_once():
    books = held("-10", resting("s1", "10", "sell"), stop="110")
    assert steps(books) == ([stop(side="buy", price="110")], ["s1"])
    assert not is_protected(books.book(BTC))


def test_flat_position_cancels_every_exit_at_rest():
    books = held("0", resting("s1", "10"), resting("t1", "10", kind="take_profit", trigger="110"), take="110")
    assert steps(books) == ([], ["s1", "t1"]) and is_protected(books.book(BTC))


def test_flat_position_with_one_exit_unknown_cancels_the_others():
    books = held("0", resting("s1", "10"), resting("s2", "6", state="UNKNOWN"))
    assert steps(books) == ([], ["s1"])


def test_exit_that_is_being_canceled_is_named_again_until_it_is_gone():
    assert steps(held("0", resting("s1", "10", state="PENDING_CANCEL"))) == ([], ["s1"])
    assert steps(held("0", resting("s1", "10", state="CANCELED"))) == ([], [])


def test_stop_that_is_being_canceled_protects_nothing_and_is_replaced():
    books = held("10", resting("s1", "10", state="PENDING_CANCEL"))
    assert steps(books)[0] == [stop()] and not is_protected(books.book(BTC))


def test_take_profit_of_another_size_goes_before_the_new_one_comes():
    old = resting("t1", "10", kind="take_profit", trigger="110")
    assert steps(held("6", old, stop=None, take="110")) == ([], ["t1"])
    going = resting("t1", "10", kind="take_profit", trigger="110", state="PENDING_CANCEL")
    assert steps(held("6", going, stop=None, take="110")) == ([], ["t1"])
    gone = resting("t1", "10", kind="take_profit", trigger="110", state="CANCELED")
    assert steps(held("6", gone, stop=None, take="110")) == ([take("6")], [])


def test_plan_without_exits_cancels_what_rests():
    assert steps(held("10", resting("s1", "10"), stop=None)) == ([], ["s1"])


def test_second_stop_of_the_same_terms_is_one_too_many():
    assert steps(held("10", resting("s1", "10"), resting("s2", "10"))) == ([], ["s1"])


@pytest.mark.parametrize("executed", ["0", "4", "10"])
def test_triggered_stop_rests_no_more_and_is_not_canceled(executed):
    books = held("10", resting("s1", "10", triggered_id="77", executed_qty=D(executed)))
    assert steps(books) == ([stop()], []) and not is_protected(books.book(BTC))
    books.apply(filled("s1", "4", "sell", trade="2", cause="stop"))
    assert steps(books) == ([stop("6")], [])
    books.apply(filled("s1", "6", "sell", trade="3", cause="stop"))
    assert steps(books) == ([], []) and books.book(BTC).orders["s1"].state == "FILLED"


def test_triggered_take_profit_that_never_fills_stands_in_no_others_way():
    ghost = resting("t1", "10", kind="take_profit", trigger="110", triggered_id="77")
    assert steps(held("10", ghost, stop=None, take="110")) == ([take()], [])
    assert steps(held("0", ghost, take="110")) == ([], [])


def test_stop_of_which_the_exchange_executed_a_part_protects_the_rest_alone():
    books = held("10", resting("s1", "10", executed_qty=D(4)))
    assert not is_protected(books.book(BTC)) and steps(books) == ([stop()], [])


@pytest.mark.parametrize(("qty", "price", "fits"), [
    ("4", "90", True), ("6", "90", True), ("10", "90", True),
    ("3", "90", False), ("11", "90", False), ("10", "89", False)])
def test_stop_of_a_size_between_what_is_held_and_what_is_booked_fits(qty, price, fits):
    decided = next_steps(held("4", resting("s1", qty, trigger=price)).book(BTC), booked_qty=D(10))
    assert decided.place == (() if fits else (stop("4"),)) and decided.cancel == ()


def test_partly_filled_stop_that_covers_what_is_left_fits():
    books = held("10", resting("s1", "10"))
    books.apply(filled("s1", "4", "sell", trade="2", cause="stop"))
    assert steps(books) == ([], [])


@pytest.mark.parametrize(
    ("code", "signal", "trigger", "then", "expected"),
    [
        (-2021, "p", "90", [], True),
        (-2019, "p", "90", [], False),
        (-2021, "older", "90", [], False),  # refused for an earlier position
        (-2021, "p", "91", [], False),  # the plan has moved
        (-2021, "p", "90", resting("s2", "10", signal="p"), False),  # the price came back, it rests
        (-2021, "p", "90", resting("s2", "10", signal="p", state="INTENDED"), False),
        (-2021, "p", "90", resting("s2", "10", signal="p", state="REJECTED"), False),
    ],
)
def test_stop_refused_as_passed_counts_for_the_plan_in_force_only(code, signal, trigger, then, expected):
    books = held("10", resting("s1", "10", trigger=trigger, signal=signal, state="INTENDED"))
    books.apply(ExitsSet(symbol=BTC, signal="p", stop_loss=D(90), take_profit=None))
    books.apply(changed("s1", "reject", code=code))
    for event in then:
        books.apply(event)
    assert is_stop_passed(books.book(BTC)) is expected


def test_stop_refused_as_passed_counts_though_an_older_one_rests():
    books = held("10", resting("s0", "10", trigger="80"), resting("s1", "10", signal="p", state="INTENDED"))
    books.apply(ExitsSet(symbol=BTC, signal="p", stop_loss=D(90), take_profit=None))
    books.apply(changed("s1", "reject", code=-2021))
    assert is_protected(books.book(BTC)) and is_stop_passed(books.book(BTC))


def test_stop_refused_as_passed_ends_with_the_position():
    books = held("10", resting("s1", "10", state="INTENDED"))
    books.apply(changed("s1", "reject", code=-2021))
    assert is_stop_passed(books.book(BTC))
    books.apply(filled("", "10", "sell", trade="2", cause="close"))
    assert not is_stop_passed(books.book(BTC)) and is_protected(books.book(BTC))


@pytest.mark.parametrize(
    ("orders", "expected"),
    [
        ([], []),
        ([resting("s1", "10", state="REJECTED")], ["s1"]),
        (
            [
                resting("s1", "10", state="REJECTED"),
                resting("s2", "10", state="ABSENT"),
                resting("s3", "9", state="EXPIRED"),
            ],
            ["s1", "s2", "s3"],
        ),
        ([resting("s1", "10", state="REJECTED"), resting("s2", "10")], []),
        ([resting("s1", "10"), resting("s2", "10", state="REJECTED")], ["s2"]),
        ([resting("s1", "6", state="CANCELED")], []),  # by us, for another size
        ([resting("s1", "10", state="CANCELED")], ["s1"]),  # the same terms, gone at once: not again at once
        ([resting("s1", "10", state="REJECTED", signal="older")], []),
        ([resting("t1", "10", kind="take_profit", trigger="110", state="REJECTED")], []),
    ],
)
def test_refusals_with_orders_count_the_newest_in_a_row_for_this_plan(orders, expected):
    assert [o.id for o in refusals(held("10", *orders).book(BTC), stop())] == expected


states = st.sampled_from(sorted(WAYS))
anything = st.lists(
    st.tuples(
        st.sampled_from(["stop", "take_profit"]),
        st.integers(1, 4),
        st.booleans(),
        states,
        st.sampled_from(["90", "91"]),
    ),
    max_size=6,
)


@settings(max_examples=300, deadline=None)
@given(st.integers(-4, 4), anything, st.booleans(), st.booleans())
def test_next_steps_with_any_orders_at_rest_keep_the_promise(qty, orders, has_stop, has_take):
    books = held(
        str(qty),
        *(
            resting(f"o{n}", str(size), "buy" if is_buy else "sell", kind=kind, state=state, trigger=price)
            for n, (kind, size, is_buy, state, price) in enumerate(orders)
        ),
        stop="90" if has_stop else None,
        take="91" if has_take else None,
    )
    book = books.book(BTC)
    decided = next_steps(book)
    for exit_ in decided.place:
        assert exit_.qty == abs(qty) != 0 and exit_.side == ("sell" if qty > 0 else "buy")
        assert not any(o.request.type == exit_.type and o.is_in_flight for o in book.orders.values())
    for kind in ("stop", "take_profit"):
        rest = [
            o for o in book.orders.values() if o.request.type == kind and o.state not in CLOSED | IN_FLIGHT
        ]
        left = [o for o in rest if o.id not in decided.cancel]
        assert len(left) <= 1
        placed = [e for e in decided.place if e.type == kind]
        assert len(placed) <= 1
        if kind == "take_profit" and placed:
            assert not rest
        if (
            left
            and not placed
            and not any(o.is_in_flight and o.request.type == kind for o in book.orders.values())
        ):
            assert left[0].request.qty == abs(qty)
        if qty and kind == "stop" and has_stop and not placed:
            assert left or any(o.is_in_flight and o.request.type == "stop" for o in book.orders.values())
        if (
            any(o.request.side == ("sell" if qty > 0 else "buy") for o in rest)
            and qty
            and has_stop
            and kind == "stop"
        ):
            assert left  # never without the stop that is there, while a better one is on its way
    if not qty:
        assert not decided.place


@pytest.mark.parametrize(("qty", "target", "expected"), [
    ("10", "0", "10"), ("10", "4", "6"), ("10", "10", "0"), ("10", "20", "0"), ("10", "-3", "10"),
    ("-10", "-4", "6"), ("-10", "0", "10"), ("-10", "5", "10"), ("0", "0", "0"), ("0", "5", "0"),
    ("10", None, "0"),
])
def test_late_excess_is_what_exceeds_the_target_in_force(qty, target, expected):
    locked = SymbolLocked(symbol=BTC, cause="late_fill", evidence="")
    for orders, excess in (([locked], D(expected)), ([], 0)):  # the latter: nothing came late
        book = held(qty, orders).book(BTC)
        book.target_qty = target and D(target)
        assert late_excess(book) == excess
