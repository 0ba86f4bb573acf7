"""The order table, pair by pair, and the ids that an intent is known by."""

import re
from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bot.errors import IllegalTransition
from bot.orders import (
    CLOSED,
    GUARD_PREFIX,
    IN_FLIGHT,
    OPEN,
    PREFIX,
    TABLE,
    Leg,
    OrderEvent,
    OrderRequest,
    OrderState,
    client_order_id,
    is_ours,
    new_epoch,
    next_state,
)
from tests.factory import BTC, NOW, D

STATES, EVENTS, LEGS = get_args(OrderState), get_args(OrderEvent), get_args(Leg)
P, C, F, X, E, R, A, U, W = (
    "PARTIALLY_FILLED",
    "ACCEPTED",
    "FILLED",
    "CANCELED",
    "EXPIRED",
    "REJECTED",
    "ABSENT",
    "UNKNOWN",
    "PENDING_CANCEL",
)
# Written out a second time, by hand: a slip of the pen in the table must meet an objection.
#         event:  lose not_sent accept reject absent fill complete request_cancel cancel refuse_cancel expire
EXPECTED = {
    "INTENDED": (U, A,    C,    R,    None, P,    F,    None, X,    None, E),
    U:          (U, None, C,    R,    A,    P,    F,    None, X,    None, E),
    C:          (C, None, C,    R,    None, P,    F,    W,    X,    None, E),
    P:          (P, None, P,    None, None, P,    F,    W,    X,    None, E),
    W:          (None, None, W, R,    None, W,    F,    W,    X,    C,    E),
    F:          (None, None, F, None, None, None, None, None, None, F,    None),
    X:          (None, None, X, None, None, X,    F,    None, X,    X,    None),
    E:          (None, None, E, None, None, E,    F,    None, None, E,    E),
    R:          (None, None, R, R,    None, R,    F,    None, None, None, None),
    A:          (None, None, C, R,    None, P,    F,    None, X,    None, E),
}  # fmt: skip
PAIRS = [(state, event, EXPECTED[state][n]) for state in STATES for n, event in enumerate(EVENTS)]


@pytest.mark.parametrize(("state", "event", "after"), [p for p in PAIRS if p[2]])
def test_order_with_legal_event_goes_where_the_table_says(state, event, after):
    assert next_state(state, event) == after


@pytest.mark.parametrize(("state", "event"), [p[:2] for p in PAIRS if not p[2]])
def test_order_with_illegal_event_raises_and_names_the_legal_ones(state, event):
    before = {name: dict(row) for name, row in TABLE.items()}
    with pytest.raises(
        IllegalTransition, match=f"state {state} cannot {event}; legal are {next(iter(TABLE[state]))}"
    ):
        next_state(state, event)
    assert before == TABLE


@pytest.mark.parametrize(("state", "event"), [("NEW", "fill"), ("", ""), (U, "Fill"), (F, "overfill")])
def test_order_with_unheard_of_state_or_event_raises(state, event):
    with pytest.raises(IllegalTransition):
        next_state(state, event)


def test_states_with_their_groups_are_in_exactly_one():
    assert set(TABLE) == set(STATES) == set(EXPECTED)
    assert set(STATES) == IN_FLIGHT | OPEN | CLOSED
    assert len(IN_FLIGHT) + len(OPEN) + len(CLOSED) == len(STATES)
    assert {event for row in TABLE.values() for event in row} == set(EVENTS)
    assert {state for row in TABLE.values() for state in row.values()} <= set(STATES)


@pytest.mark.parametrize("state", sorted(CLOSED - {"FILLED"}))
def test_closed_order_with_late_fill_takes_it(state):
    assert next_state(state, "fill") in (state, "PARTIALLY_FILLED")
    assert next_state(state, "complete") == "FILLED"


def test_filled_order_with_another_fill_is_an_overfill():
    for event in ("fill", "complete"):
        with pytest.raises(IllegalTransition):
            next_state("FILLED", event)


@given(st.lists(st.sampled_from(EVENTS), max_size=30))
def test_order_with_any_events_is_unknown_only_by_loss_and_absent_only_by_evidence(events):
    state = "INTENDED"
    for event in events:
        try:
            after = next_state(state, event)
        except IllegalTransition:
            continue
        assert after != "INTENDED"  # an intent is submitted once
        assert (after == "UNKNOWN") <= (event == "lose")
        assert (after == "ABSENT") <= (event in ("absent", "not_sent"))
        if state in CLOSED and after not in CLOSED:
            assert state == "ABSENT"  # only absence was a judgement of ours, and may be proven wrong
        state = after


ids = st.tuples(
    st.sampled_from(["levels", "a", "b-2", "x" * 31]),
    st.integers(0, 2**64 - 1),
    st.integers(0, 2**64 - 1),
    st.sampled_from(LEGS),
    st.integers(0, 36**8 - 1),
)


def make_id(epoch, parts):
    strategy, run, seq, leg, attempt = parts
    return client_order_id(epoch, strategy=strategy, run=run, seq=seq, leg=leg, attempt=attempt)


@given(st.integers(NOW, NOW * 2), ids)
def test_client_order_id_with_any_origin_fits_every_exchange(wall_ns, parts):
    name = make_id(new_epoch(wall_ns, "Z9"), parts)
    assert re.fullmatch("[A-Za-z][A-Za-z0-9]{0,31}", name)  # exchange-facts 1.4, OKX's is the narrowest
    assert not name.startswith(("autoclose", "adl_", "settlement_", "delivery_"))
    assert is_ours(name) and name.startswith(PREFIX) and not name.startswith(GUARD_PREFIX)


@settings(max_examples=300)
@given(ids, ids)
def test_client_order_id_with_any_part_changed_is_another(one, other):
    epochs = new_epoch(NOW, "AA"), new_epoch(NOW, "AB"), new_epoch(NOW + 1_000_000, "AA")
    assert (make_id(epochs[0], one) == make_id(epochs[0], other)) == (one == other)
    assert len({make_id(epoch, one) for epoch in epochs}) == 3


def test_client_order_id_with_every_leg_and_attempt_is_unique():
    names = {
        client_order_id("e", strategy=strategy, run=run, seq=seq, leg=leg, attempt=attempt)
        for strategy in ("a", "ab")
        for run in (1, 11, 2)
        for seq in (1, 11, 2)
        for leg in LEGS
        for attempt in range(40)
    }
    assert len(names) == 2 * 3 * 3 * len(LEGS) * 40


def test_client_order_id_with_the_same_parts_is_the_same():
    parts = ("levels", 1, 2, "open", 3)
    assert make_id("e", parts) == make_id("e", parts) == "the" + make_id("e", parts)[3:13] + "o3"


@pytest.mark.parametrize("name", ["", "autoclose-1", "adl_autoclose", "web_x", "TH1", "xth1", "android_1"])
def test_client_order_id_of_others_is_not_ours(name):
    assert not is_ours(name)


def test_guard_prefix_is_ours():
    assert is_ours(GUARD_PREFIX + "x")


@pytest.mark.parametrize(("type_", "expected"), [("market", False), ("stop", True), ("take_profit", True)])
def test_order_request_with_a_type_that_rests_is_conditional(type_, expected):
    request = OrderRequest(client_order_id="x", symbol=BTC, side="buy", qty=D(1), type=type_)
    assert request.is_conditional is expected
