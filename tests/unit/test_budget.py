"""The exchange's request limits: whose counters, which window, and what is kept for protection."""

import pytest

from bot.budget import BAN_NS_MAX, COUNTERS, Budget, Usage
from tests.factory import NOW, SECOND

MINUTE_START = NOW - NOW % (60 * SECOND)


def heard(at_ns=MINUTE_START, **counters):
    budget = Budget()
    budget.hear({COUNTERS[name][0]: str(value) for name, value in counters.items()}, at_ns)
    return budget


def refusal(budget, action, at_ns=MINUTE_START):
    return budget.refusal(action, at_ns)


@pytest.mark.parametrize(("counters", "refused"), [
    ({}, ()),
    ({"weight_1m": 1_919, "orders_10s": 239, "orders_1m": 959}, ()),
    ({"weight_1m": 1_920}, ("entry",)),
    ({"weight_1m": 2_160}, ("entry", "query")),
    ({"orders_10s": 240}, ("entry",)),
    ({"orders_1m": 960}, ("entry",)),
    ({"orders_10s": 300, "orders_1m": 1_200}, ("entry",)),  # questions are no orders
    ({"weight_1m": 2_400}, ("entry", "query")),
])
def test_refusal_with_what_is_used_keeps_the_rest_for_protection(counters, refused):
    budget = heard(**counters)
    assert tuple(a for a in ("entry", "query", "rest") if refusal(budget, a)) == refused


def test_refusal_in_the_next_window_is_over():
    budget = heard(weight_1m=2_400, orders_10s=300)
    assert "orders_10s" not in refusal(budget, "entry", MINUTE_START + 10 * SECOND)
    assert refusal(budget, "query", MINUTE_START + 59 * SECOND)
    assert refusal(budget, "query", MINUTE_START + 60 * SECOND) == ""


def test_refusal_with_a_ban_holds_for_everything_until_it_ends():
    budget = Budget()
    budget.ban(MINUTE_START + 7 * SECOND, MINUTE_START)
    budget.ban(MINUTE_START + 3 * SECOND, MINUTE_START)  # a shorter one does not end it
    assert {refusal(budget, a) for a in ("entry", "query", "rest")} == {"banned for another 7 s"}
    assert refusal(budget, "rest", MINUTE_START + 7 * SECOND) == ""


def test_merge_takes_the_later_window_and_then_the_larger_number():
    ours = heard(weight_1m=100, orders_10s=5)
    ours.merge(heard(weight_1m=2_000).usage, MINUTE_START)
    ours.merge(heard(MINUTE_START - SECOND, weight_1m=2_399).usage, MINUTE_START)  # of the minute before
    ours.merge(Usage(banned_until_ns=NOW + SECOND), MINUTE_START)
    assert round(ours.share("weight_1m", MINUTE_START) * 2_400) == 2_000
    assert round(ours.share("orders_10s", MINUTE_START) * 300) == 5
    assert refusal(ours, "rest")


def test_merge_drops_what_lies_further_ahead_than_it_can_also_of_its_own():
    ahead = heard(MINUTE_START + 300 * SECOND, weight_1m=5)
    ahead.ban(MINUTE_START + 300 * SECOND + BAN_NS_MAX, MINUTE_START + 300 * SECOND)
    ours = heard(weight_1m=2_300)
    ours.merge(ahead.usage, MINUTE_START)
    ahead.merge(ours.usage, MINUTE_START)
    for budget in (ours, ahead):
        assert refusal(budget, "query") and not refusal(budget, "rest")
    ours.merge(heard(MINUTE_START + 60 * SECOND, weight_1m=2_350).usage, MINUTE_START)
    assert refusal(ours, "query", MINUTE_START + 60 * SECOND), "of another clock, a little ahead"


def test_hear_with_headers_that_are_no_numbers_keeps_what_is_known():
    budget = heard(weight_1m=7)
    budget.hear({"x-mbx-used-weight-1m": "1e9", "x-mbx-order-count-10s": ""}, MINUTE_START)
    assert round(budget.share("weight_1m", MINUTE_START) * 2_400) == 7


def test_limits_are_the_exchanges_own_and_other_kinds_are_left_out():
    budget = heard(orders_10s=24)
    assert refusal(budget, "entry") == ""
    budget.learn([{"rateLimitType": "ORDERS", "interval": "SECOND", "intervalNum": 10, "limit": 30},
                  {"rateLimitType": "ORDERS", "interval": "DAY", "intervalNum": 1, "limit": 1},
                  {"rateLimitType": "ORDERS", "interval": "MINUTE", "intervalNum": 1, "limit": 0}])
    assert refusal(budget, "entry").startswith("80% of 30 orders_10s")
    assert budget.limits == {"weight_1m": 2_400, "orders_10s": 30, "orders_1m": 1_200}
