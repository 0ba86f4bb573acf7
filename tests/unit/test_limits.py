"""Limits one step to either side, the unknown at full size, and numbers no signal should hold.

The controls of exchange-facts 4: where each is kept, and whose tests bite when it is taken out.
  3 size of an order         limits, config_file (no limit so high that it is none): here, config_file
  4 price collar             limits check_prices: here
  5 position, gross, leverage, open orders: limits, exposure, trading_state: here, exposure
  6 loss of the day          exposure, executor: trading_state, drill/test_limits
  7 message throttle         budget (entries stop at 80 %), outcome (-1015): budget, exchange
  8 repeated execution       limits repeats, runner: here, runner
  9 duplicates               bookkeeper, journal; the same target changes nothing: bookkeeper, decision
 10 stale data               limits, trading_state, by the exchange's clock, which goes by the monotonic one
 11 reasonable prices        trading_state mark_jump, limits crossed_book: trading_state, here
 12 clock                    trading_state clock_offset, exchange server_ns: trading_state, exchange
 15 start gate               trading_state start_gate, journal lock and identity: trading_state, journal
 16 private stream lost      reconciler: nothing opens, and no entry rests that were to be canceled
 17 self-trades              nothing of ours rests but triggers; EXPIRED_IN_MATCH ends an order: rows
 18 liquidation, ADL         recorder: booked, locked, alerted: reconciler
 19 keys                     contract (rights), config_file (modes), log, daemon (no core): drill/test_botctl
 20 audit                    journal: chain, checkpoint, tip, look: journal
 21 restart loops            watch halts: watch
 22 bans                     budget: nothing leaves until its end: budget, exchange
 24 disk, memory             trading_state REDUCING_RULES, journal: trading_state, drill/test_exhaustion
"""

import itertools

import msgspec
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from bot.books import SymbolBook
from bot.config import LimitsConfig
from bot.limits import (
    MAY_PASS,
    Denial,
    check_entry,
    check_prices,
    check_sender,
    check_signal,
    tightened,
    worst_position,
)
from bot.model import Instrument
from tests.factory import (
    BTC,
    MS,
    NOW,
    SECOND,
    D,
    changed,
    exposure,
    filled,
    folded,
    holding,
    instrument,
    intended,
    limits,
    prices,
    received,
    signal,
)

EMPTY = SymbolBook(symbol=BTC)


def rule(denial):
    assert denial is None or (isinstance(denial, Denial) and str(denial).startswith(denial.rule + ": "))
    return denial and denial.rule


def judged(wanted, book=EMPTY, *, now_ns=NOW, exchange_now_ns=NOW, **changes):
    return rule(
        check_signal(
            wanted, book, instrument(), limits(**changes), now_ns=now_ns, exchange_now_ns=exchange_now_ns
        )
    )


def priced(side="buy", *, now_ns=NOW, limit=None, **changes):
    checks = {}
    denial = check_prices(prices(**changes), limit or limits(), side, exchange_now_ns=now_ns, checks=checks)
    return rule(denial)


def entered(qty, *, side="buy", book=EMPTY, mark="100", limit=None, beside=None, **changes):
    return rule(
        check_entry(
            book,
            instrument(**changes),
            limit or limits(),
            side=side,
            qty=D(qty),
            mark=D(mark),
            exposure=exposure(**(beside or {})),
            now_ns=NOW,
            checks={},
        )
    )


def test_signal_that_breaks_no_rule_passes():
    assert judged(signal("1", stop_loss=D("99.9"), take_profit=D("100.1"))) is None
    assert judged(signal("-1", stop_loss=D("100.1"), take_profit=D("99.9"))) is None
    assert judged(signal("0")) is None


@pytest.mark.parametrize(
    ("age_ns", "expected"),
    [
        (2_000 * MS, None),
        (2_000 * MS + 1, "signal_age"),
        (-1_000 * MS, None),
        (-1_000 * MS - 1, "signal_age"),
        (10**18, "signal_age"),
        (-(2**64), "signal_age"),
    ],
)
def test_signal_with_age_at_the_limit_passes_and_beyond_not(age_ns, expected):
    assert judged(signal(created_ns=NOW - age_ns)) == expected


@pytest.mark.parametrize(
    ("age_ns", "expected"),
    [
        (5_000 * MS, None),
        (5_000 * MS + 1, "stale_tick"),
        (-1_000 * MS, None),
        (-1_000 * MS - 1, "stale_tick"),
        (NOW, "stale_tick"),
        (-(2**63), "stale_tick"),
    ],
)
def test_signal_with_tick_age_at_the_limit_passes_and_beyond_not(age_ns, expected):
    assert judged(signal(tick_exchange_ns=NOW - age_ns)) == expected


def test_signal_with_tick_is_aged_by_the_exchange_clock_and_with_itself_by_ours():
    ahead = NOW + 60 * SECOND
    assert judged(signal(tick_exchange_ns=ahead), exchange_now_ns=ahead) is None
    assert judged(signal(), exchange_now_ns=ahead) == "stale_tick"
    assert judged(signal(created_ns=ahead, tick_exchange_ns=ahead), exchange_now_ns=ahead) == "signal_age"


@pytest.mark.parametrize("version", [0, 2, 2**63])
def test_signal_with_another_position_version_is_denied(version):
    assert judged(signal(position_version=version), holding("0", version=1).book(BTC)) == "stale_position"
    assert judged(signal(position_version=1), holding("0", version=1).book(BTC)) is None


@pytest.mark.parametrize(
    ("target", "fields", "expected"),
    [
        ("1", {"stop_loss": D("100")}, "stop_side"),
        ("1", {"stop_loss": D("100.1")}, "stop_side"),
        ("1", {"take_profit": D("100")}, "take_profit_side"),
        ("1", {"take_profit": D("99.9")}, "take_profit_side"),
        ("-1", {"stop_loss": D("100")}, "stop_side"),
        ("-1", {"stop_loss": D("99.9")}, "stop_side"),
        ("-1", {"take_profit": D("100")}, "take_profit_side"),
        ("-1", {"take_profit": D("100.1")}, "take_profit_side"),
        ("0", {"stop_loss": D("100.1"), "take_profit": D("1")}, None),  # flat needs no exits
        ("1", {"stop_loss": D("99.95")}, "bad_price"),
        ("1", {"take_profit": D("100.05")}, "bad_price"),
        ("0.0005", {}, "bad_quantity"),
        ("-1.0001", {}, "bad_quantity"),
        ("0.001", {}, None),
    ],
)
def test_signal_with_exits_or_quantity_off_the_mark_is_denied(target, fields, expected):
    assert judged(signal(target, **fields)) == expected


HOSTILE = [
    "NaN",
    "sNaN",
    "-NaN",
    "NaN12",
    "Infinity",
    "-Infinity",
    "1E+1000000",
    "-1E+1000000",
    "1E-1000000",
    "1E+999999",
    "9" * 300 + ".5",
]


@pytest.mark.parametrize("number", HOSTILE)
def test_signal_with_hostile_quantity_is_denied_and_raises_nothing(number):
    denial = check_signal(signal(number), EMPTY, instrument(), limits(), now_ns=NOW, exchange_now_ns=NOW)
    assert denial.rule == "bad_quantity" and len(denial.text) < 200


@pytest.mark.parametrize("number", [*HOSTILE, "0", "-0", "-100", "-1E-1000000"])
@pytest.mark.parametrize("field", ["stop_loss", "take_profit"])
@pytest.mark.parametrize("target", ["1", "-1", "0"])
def test_signal_with_hostile_exit_is_denied_and_raises_nothing(number, field, target):
    denial = check_signal(
        signal(target, **{field: D(number)}), EMPTY, instrument(), limits(), now_ns=NOW, exchange_now_ns=NOW
    )
    assert denial.rule == "bad_price" and len(denial.text) < 200


@pytest.mark.parametrize("price", [0.0, -0.0, -1.0, float("nan"), float("inf"), float("-inf")])
def test_signal_with_hostile_tick_price_is_denied_unless_it_wants_out(price):
    assert judged(signal("1", tick_price=price)) == "bad_price"
    assert judged(signal("-1", tick_price=price, stop_loss=D(1))) == "bad_price"
    assert judged(signal("0", tick_price=price)) is None


@pytest.mark.parametrize("increment", ["0", "1E-1000000"])
def test_signal_with_an_instrument_without_increment_is_denied_and_raises_nothing(increment):
    broken = instrument(qty_increment=D(increment))
    for target in ("1", "0"):
        denial = check_signal(signal(target), EMPTY, broken, limits(), now_ns=NOW, exchange_now_ns=NOW)
        assert denial is None or denial.rule == "bad_quantity"
    assert check_signal(
        signal("1"), EMPTY, instrument(qty_increment=D(0)), limits(), now_ns=NOW, exchange_now_ns=NOW
    )


anything = st.one_of(
    st.decimals(allow_nan=True, allow_infinity=True), st.sampled_from([D(n) for n in HOSTILE])
)
integers = st.one_of(st.integers(-(2**63), 2**64 - 1), st.integers(NOW - 9 * SECOND, NOW + 9 * SECOND))


@settings(max_examples=300, deadline=None)
@given(anything, st.none() | anything, st.none() | anything, st.floats(), integers, integers, integers)
def test_signal_with_any_fields_is_judged_without_raising(target, stop, take, price, created, version, tick):
    wanted = signal(
        target_qty=D(target),
        stop_loss=stop,
        take_profit=take,
        tick_price=price,
        created_ns=created,
        position_version=version,
        tick_exchange_ns=tick,
    )
    denial = check_signal(wanted, EMPTY, instrument(), limits(), now_ns=NOW, exchange_now_ns=NOW)
    if denial is None:
        assert target.is_finite() and all(p is None or p > 0 for p in (stop, take))
        check_entry(
            EMPTY,
            instrument(),
            limits(),
            side="buy",
            qty=abs(target),
            mark=D(100),
            exposure=exposure(),
            now_ns=NOW,
            checks={},
        )


@pytest.mark.parametrize(
    ("strategy", "owner", "age_ns", "expected"),
    [
        ("levels", "levels", 0, None),
        ("levels", "levels", -SECOND, None),
        ("levels", "levels", 10**18, None),
        ("levels", "levels", -SECOND - 1, "signal_age"),
        ("levels", "other", 0, "not_owner"),
        ("levels", None, 0, "not_owner"),
        ("", None, 0, "not_owner"),
    ],
)
def test_sender_with_symbol_of_another_or_from_the_future_has_no_say(strategy, owner, age_ns, expected):
    wanted = signal(strategy=strategy, created_ns=NOW - age_ns)
    assert rule(check_sender(wanted, owner, now_ns=NOW)) == expected


@pytest.mark.parametrize("side", ["buy", "sell"])
@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"mark": None}, "no_price"),
        ({"bid": None}, "no_price"),
        ({"ask": None}, "no_price"),
        *(
            ({field: D(number)}, "bad_price")
            for field in ("mark", "bid", "ask")
            for number in ("0", "-0", "-1", "NaN", "sNaN", "Infinity", "-Infinity")
        ),
        ({"bid": D("100.2")}, "crossed_book"),
        ({"bid": D("100.1")}, None),
        ({"bid": D("100.4"), "ask": D("100.3")}, "crossed_book"),
        ({"mark_ns": NOW - 3_000 * MS}, None),
        ({"mark_ns": NOW - 3_000 * MS - 1}, "stale_mark"),
        ({"mark_ns": NOW + 1_000 * MS}, None),
        ({"mark_ns": NOW + 1_000 * MS + 1}, "stale_mark"),
        ({"mark_ns": 0}, "stale_mark"),
        ({"quote_ns": NOW - 3_600 * SECOND}, None),  # a quiet market does not quote; the mark goes on
        ({"mark": D("1E+400")}, "price_collar"),
        ({"mark": D("1E-400")}, "price_collar"),
    ],
)
def test_prices_with_something_wrong_are_no_ground_for_an_order(side, changes, expected):
    assert priced(side, **changes) == expected


@pytest.mark.parametrize(
    ("side", "changes", "expected"),
    [
        ("buy", {"ask": D("101")}, None),
        ("buy", {"ask": D("101.01")}, "price_collar"),
        ("sell", {"bid": D("99")}, None),
        ("sell", {"bid": D("98.99")}, "price_collar"),
        ("buy", {"bid": D("98.99")}, None),
        ("sell", {"ask": D("101.01")}, None),  # the side that is hit counts
        ("buy", {"ask": D("99"), "bid": D("98")}, None),
        ("buy", {"ask": D("98.99"), "bid": D("98")}, "price_collar"),
    ],
)
def test_prices_with_best_price_at_the_collar_pass_and_beyond_not(side, changes, expected):
    assert priced(side, **changes) == expected


def test_prices_with_a_verdict_leave_their_evidence():
    checks = {}
    check_prices(prices(), limits(), "buy", exchange_now_ns=NOW + 7 * MS, checks=checks)
    assert checks == {"mark_age_ms": "7 of 3000", "quote_age_ms": "7", "price_collar_pct": "0.1000 of 1"}


@pytest.mark.parametrize(
    ("qty", "fields", "expected"),
    [
        ("10", {}, None),
        ("10.001", {}, "order_notional"),
        ("1E+18", {}, "order_notional"),
        ("0.05", {}, None),
        ("0.049", {}, "too_small"),
        ("0.001", {}, "too_small"),
        ("1", {"qty_min": D(1), "qty_increment": D(1)}, None),
        ("0.999", {"qty_min": D(1), "qty_increment": D(1)}, "too_small"),
        ("10", {"qty_min": D("0.002")}, "too_small"),  # filled in part, 0.001 would stay that nothing closes
        ("10", {"qty_min": D("0.002"), "qty_increment": D("0.002")}, None),
        ("5", {"qty_max": D(5)}, None),
        ("5.001", {"qty_max": D(5)}, "too_large"),
        ("1", {"contract_size": D(10)}, None),
        ("1.001", {"contract_size": D(10)}, "order_notional"),
        ("1", {"status": "BREAK"}, "not_trading"),
        ("1", {"status": ""}, "not_trading"),
        ("1", {"status": "trading"}, "not_trading"),
    ],
)
def test_entry_with_quantity_at_the_limit_passes_and_one_step_beyond_not(qty, fields, expected):
    assert entered(qty, **fields) == expected
    assert entered(qty, side="sell", **fields) == expected


@pytest.mark.parametrize(
    ("entries", "expected"), [(0, None), (9, None), (10, "order_rate"), (10**6, "order_rate")]
)
def test_entry_with_rate_at_the_limit_passes_and_beyond_not(entries, expected):
    assert entered("1", beside={"entries_last_minute": entries}) == expected


@pytest.mark.parametrize(("side", "held"), [("buy", "12"), ("sell", "-12")])
@pytest.mark.parametrize(("qty", "expected"), [("8", None), ("8.001", "position_notional")])
def test_entry_with_position_at_the_limit_passes_and_one_step_beyond_not(side, held, qty, expected):
    assert entered(qty, side=side, book=holding(held).book(BTC)) == expected


UNSETTLED = {
    "INTENDED": (),
    "UNKNOWN": ("lose",),
    "ACCEPTED": ("accept",),
    "PENDING_CANCEL": ("accept", "request_cancel"),
}


@pytest.mark.parametrize("state", UNSETTLED)
@pytest.mark.parametrize(("qty", "expected"), [("5", None), ("5.001", "position_notional")])
def test_entry_with_unsettled_order_counts_it_at_full_size(state, qty, expected):
    books = holding(
        "5", received(signal()), intended("o1", "10"), *(changed("o1", e) for e in UNSETTLED[state])
    )
    assert books.book(BTC).orders["o1"].state == state
    assert entered(qty, book=books.book(BTC)) == expected


def test_entry_with_partly_filled_order_counts_what_is_left_once():
    books = holding("5", received(signal()), intended("o1", "10"), filled("o1", "4"))
    assert worst_position(books.book(BTC), D(1)) == 5 + 10 + 1
    assert worst_position(books.book(BTC), D(-1)) == 5 + 4 - 1  # what would reduce may as well not fill


def test_entry_with_closed_order_whose_fills_are_missing_counts_it():
    books = folded(received(signal()), intended("o1", "10"), changed("o1", "expire", executed_qty=D(3)))
    assert worst_position(books.book(BTC), D(1)) == 11


def test_entry_with_settled_and_resting_orders_counts_neither():
    books = folded(
        received(signal()),
        intended("o1", "10"),
        changed("o1", "reject"),
        intended("s1", "10", "buy", leg="stop", trigger="110"),
        changed("s1", "accept"),
    )
    assert worst_position(books.book(BTC), D(1)) == 1


@settings(max_examples=200, deadline=None)
@given(
    st.integers(-30_000, 30_000), st.integers(1, 30_000), st.booleans(), st.integers(1, 30_000), st.booleans()
)
def test_entry_with_any_books_never_leads_beyond_the_limit(held, qty, is_buy, other, other_buys):
    assume(held == 0 or (held > 0) == is_buy)  # what goes against a position is no entry
    books = holding(
        str(D(held) / 1_000),
        received(signal()),
        intended("o1", str(D(other) / 1_000), "buy" if other_buys else "sell"),
        changed("o1", "lose"),
    )
    if entered(str(D(qty) / 1_000), side="buy" if is_buy else "sell", book=books.book(BTC)) is None:
        signed = D(qty if is_buy else -qty) / 1_000
        settled = D(held) / 1_000
        unknown = D(other if other_buys else -other) / 1_000
        for outcome in (settled + signed, settled + signed + (unknown if other_buys == is_buy else 0)):
            assert abs(outcome) * 100 <= 2_000
        assert abs(signed) * 100 <= 1_000


def test_entry_with_all_checks_leaves_their_evidence():
    checks = {}
    check_entry(
        holding("5").book(BTC),
        instrument(),
        limits(),
        side="buy",
        qty=D(2),
        mark=D(100),
        exposure=exposure(
            entries_last_minute=3, others_notional=D(800), open_orders=2, liquidation_distance_pct=D(40)
        ),
        now_ns=NOW,
        checks=checks,
    )
    assert checks == {
        "order_notional": "200.00 of 1000",
        "position_notional": "700.00 of 2000",
        "orders_per_minute": "4 of 10",
        "repeats_per_minute": "1 of 8",
        "open_orders": "3 of 12",
        "exposure_notional": "1500.00 of 5000",
        "leverage": "0.150 of 5",
        "liquidation_distance_pct": "40.00, least 10",
    }


@pytest.mark.parametrize(
    ("beside", "expected"),
    [
        ({"others_notional": D(4_900)}, None),
        ({"others_notional": D("4900.01")}, "exposure_notional"),
        ({"equity": D(20)}, None),
        ({"equity": D("19.99")}, "leverage"),
        ({"equity": D(0)}, "no_equity"),
        ({"equity": D(-1)}, "no_equity"),
        ({"equity": None}, "no_equity"),
        ({"open_orders": 11}, None),
        ({"open_orders": 12}, "open_orders"),
        ({"liquidation_distance_pct": D(10)}, None),
        ({"liquidation_distance_pct": D("9.999")}, "liquidation_distance"),
        ({"liquidation_distance_pct": D(0)}, "liquidation_distance"),
        ({"liquidation_distance_pct": D(-25)}, "liquidation_distance"),
    ],
)
def test_entry_with_the_account_at_a_limit_passes_and_one_step_beyond_not(beside, expected):
    assert entered("1", beside=beside) == entered("1", side="sell", beside=beside) == expected


@pytest.mark.parametrize(("count", "expected"), [(7, None), (8, "repeats")])
def test_entry_that_repeats_itself_is_held_up_by_direction_and_only_for_a_minute(count, expected):
    tries = [
        event
        for n in range(count)
        for event in (intended(f"o{n}", now_ns=NOW - 59 * SECOND), changed(f"o{n}", "reject"))
    ]
    book = folded(received(signal()), *tries).book(BTC)
    assert entered("1", book=book) == expected
    assert entered("1", side="sell", book=book) is None
    for order in book.orders.values():
        order.intended_ns -= SECOND
    assert entered("1", book=book) is None


def test_entry_counts_the_other_way_an_unknown_order_may_end_in_the_exposure():
    books = holding("-5", received(signal()), intended("o1", "10", "sell"), changed("o1", "lose"))
    beside = {"others_notional": D(3_500)}
    assert entered("9", book=books.book(BTC), beside=beside) is None
    assert entered("9", book=books.book(BTC), beside={"others_notional": D("3500.01")}) == "exposure_notional"


# What each limit leaves above what the entry comes to, in its smallest step: below zero is a no.
room = st.sampled_from([0, 1, 0, 1, 0, 10**9, 0, -1])
thousandths = st.integers(-40_000, 40_000)


@settings(max_examples=800, deadline=None)
@given(
    side=st.sampled_from([1, -1]),
    held=st.integers(0, 40_000),
    qty=st.integers(1, 40_000),
    lost=st.lists(st.tuples(thousandths.filter(bool), st.integers(0, 99)), max_size=4),
    mark=st.integers(1, 1_000_000),
    size=st.sampled_from([1, 10]),
    others=st.integers(0, 10**9),
    leverage=st.integers(1, 5),
    counts=st.tuples(st.integers(0, 9), st.integers(0, 9), st.integers(0, 4), st.integers(0, 4)),
    has_distance=st.booleans(),
    rooms=st.tuples(*[room] * 11),
)
def test_entry_with_anything_passes_exactly_when_an_independent_model_lets_it(
    side, held, qty, lost, mark, size, others, leverage, counts, has_distance, rooms
):
    # The model: every way it may end, in whole thousandths of a contract and whole 1/10,000 of money.
    leaves = [n // abs(n) * (abs(n) - abs(n) * pct // 100) for n, pct in lost]
    position = side * held + sum(n - left for (n, _), left in zip(lost, leaves, strict=True))
    assume(position * side >= 0)  # what goes against a position is no entry
    ends = {position}
    for move in (side * qty, *leaves):
        ends |= {end + move for end in ends}
    mine = max(end * side for end in ends)
    notional, gross = qty * mark * size, others + max(map(abs, ends)) * mark * size
    entries, orders, repeats, others_repeats = counts
    own = limits(
        order_notional_max=D(notional + rooms[0]).scaleb(-4),
        position_notional_max=D(mine * mark * size + rooms[1]).scaleb(-4),
        exposure_notional_max=D(gross + rooms[2]).scaleb(-4),
        leverage_max=D(leverage),
        orders_per_minute_max=entries + 1 + rooms[3],
        open_orders_max=orders + 1 + rooms[4],
        repeats_per_minute_max=repeats + 1 + rooms[5],
        liquidation_distance_pct_min=D(10),
    )
    rules = {
        "qty_min": D(qty - rooms[6]).scaleb(-3),
        "qty_increment": D(qty + 1).scaleb(-3),
        "qty_max": D(mine + rooms[7]).scaleb(-3),
        "notional_min": D(notional - rooms[8]).scaleb(-4),
        "contract_size": D(size),
    }
    beside = {
        "others_notional": D(others).scaleb(-4),
        "equity": D(-(-gross // leverage) + rooms[9]).scaleb(-4),
        "entries_last_minute": entries,
        "open_orders": orders,
        "liquidation_distance_pct": D(10_000 + rooms[10]).scaleb(-3) if has_distance else None,
    }
    word, other = ("buy", "sell") if side > 0 else ("sell", "buy")
    events = [received(signal())]
    for n in range(repeats + others_repeats):
        events += [intended(f"r{n}", "1", word if n < repeats else other), changed(f"r{n}", "reject")]
    for n, ((total, _), left) in enumerate(zip(lost, leaves, strict=True)):
        towards = "buy" if total > 0 else "sell"
        events += [intended(f"o{n}", str(D(abs(total)).scaleb(-3)), towards, leg="flatten")]
        events += [changed(f"o{n}", "lose")]
        if left != total:
            events += [filled(f"o{n}", str(D(abs(total - left)).scaleb(-3)), towards, trade=f"o{n}")]
    book = holding(str(D(side * held).scaleb(-3)), *events).book(BTC)
    said = entered(
        D(qty).scaleb(-3), side=word, book=book, mark=D(mark).scaleb(-1), limit=own, beside=beside, **rules
    )
    assert (said is None) == all(left >= 0 for left in (*rooms[:10], rooms[10] if has_distance else 0)), said


def test_may_pass_with_each_state_and_action_is_the_table_of_the_design():
    table = {  # DESIGN 5
        "RUNNING": "entry reduce protect close operator",
        "REDUCING": "reduce protect close operator",
        "LOCKED": "reduce protect close operator",
        "HALTED": "protect close operator",
        "RECONCILING": "operator",
    }
    actions = {"entry", "reduce", "protect", "close", "operator"}
    assert set(MAY_PASS) == set(table)
    for state, action in itertools.product(table, actions):
        assert (action in MAY_PASS[state]) == (action in table[state].split()), (state, action)


@pytest.mark.parametrize("name", LimitsConfig.__struct_fields__)
def test_limit_that_is_read_again_only_becomes_tighter(name):
    old, sign = limits(), -1 if name.endswith("_min") else 1
    one = 1 if isinstance(getattr(old, name), int) else D("0.01")
    tighter, looser = (changed_limits(old, name, -sign * one), changed_limits(old, name, sign * one))
    assert tightened(old, tighter) == tighter and tightened(old, looser) == old
    assert tightened(tighter, old) == tighter, "and stays so until the next start"


def changed_limits(old, name, by):
    return msgspec.structs.replace(old, **{name: getattr(old, name) + by})


def test_limits_with_nothing_given_have_no_unlimited_default():
    with pytest.raises(TypeError):
        LimitsConfig()
    assert isinstance(instrument(), Instrument)
