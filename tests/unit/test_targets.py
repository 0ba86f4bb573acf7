"""The rules between a Target and a signal: grid, refusals, rate, what may be said again."""

from decimal import Decimal

import pytest

from bot.model import Instrument, Target, Tick, TradingSignal
from bot.targets import RETRY_NS_MAX, RETRY_NS_MIN, Refusal, TokenBucket, fit, sent_of

BTC, ETH = "BTC/USDT:USDT", "ETH/USDT:USDT"
SECOND = 1_000_000_000


def instrument(**changes):
    fields = {"symbol": BTC, "exchange_symbol": "BTCUSDT", "status": "TRADING",
              "price_increment": Decimal("0.10"), "qty_increment": Decimal("0.001"),
              "qty_min": Decimal("0.001"), "qty_max": Decimal(100), "notional_min": Decimal(100),
              "contract_size": Decimal(1), "settle": "USDT"}
    return Instrument(**{**fields, **changes})


def tick(price=60_000.0, symbol=BTC, seq=1):
    return Tick(symbol=symbol, kind="trade", price=price, size=1.0, bid=None, bid_size=None, ask=None,
                ask_size=None, side="buy", exchange_ns=0, receive_ns=0, run=1, seq=seq)


def fitted(qty="0.010", stop=None, take=None, symbol=BTC, ticks=None):
    target = Target(symbol, Decimal(qty), stop and Decimal(stop), take and Decimal(take), "why")
    return fit(target, symbols=(BTC,), instruments={BTC: instrument()},
               ticks={BTC: tick()} if ticks is None else ticks)


@pytest.mark.parametrize(("wanted", "expected"), [
    (("0.0109", "59900.19", "60100.11"), ("0.010", "59900.10", "60100.20")),  # long: away, away
    (("-0.0109", "60100.11", "59900.19"), ("-0.010", "60100.20", "59900.10")),  # short: mirrored
    (("0.010", "59900.1", "60100.2"), ("0.010", "59900.1", "60100.2")),
    (("1E-2", None, None), ("0.01", None, None)),
])
def test_target_with_numbers_off_the_grid_moves_away_from_the_price(wanted, expected):
    target = fitted(*wanted)
    assert (target.qty, target.stop_loss, target.take_profit) == tuple(n and Decimal(n) for n in expected)


def test_target_with_zero_and_exits_loses_the_exits_and_is_let_through():
    assert fitted("0", "59900", "1") == Target(BTC, Decimal(0), reason="why")


@pytest.mark.parametrize(("target", "reason"), [
    (("0.0009",), "qty_too_small"),
    (("-0.0009",), "qty_too_small"),
    (("NaN",), "not_finite"),
    (("Infinity",), "not_finite"),
    (("1E+400",), "not_finite"),
    (("1", "NaN"), "not_finite"),
    (("1", "60000"), "wrong_side"),  # a stop at the price would fire at once
    (("1", "60000.1"), "wrong_side"),
    (("1", "59999", "60000"), "wrong_side"),
    (("-1", "60000"), "wrong_side"),
    (("-1", "60001", "60000"), "wrong_side"),
    (("1", "-5"), "wrong_side"),
    (("1", "0.05"), "wrong_side"),  # becomes 0 on the grid
    (("1", None, None, ETH), "foreign_symbol"),
    (("1", None, None, BTC, {}), "no_tick"),
    (("0", None, None, BTC, {}), "no_tick"),
])
def test_target_with_a_broken_rule_is_refused_by_name(target, reason):
    refusal = fitted(*target)
    assert isinstance(refusal, Refusal)
    assert refusal.reason == reason


@pytest.mark.parametrize("wish", [
    "buy", 1, Target(BTC, 0.5), Target(BTC, 1), Target(BTC, None), Target(["BTC"], Decimal(1)),
    Target(BTC, Decimal(1), stop_loss=59_000.0)])
def test_target_with_wrong_types_is_refused(wish):
    known = {"symbols": (BTC,), "instruments": {BTC: instrument()}, "ticks": {BTC: tick()}}
    assert isinstance(fit(wish, **known), Refusal)


def test_bucket_with_two_a_second_gives_four_at_once_and_then_two_a_second():
    bucket, taken = TokenBucket(2), []
    for step in range(101):
        now_ns = 10**15 + step * SECOND // 20
        if bucket.has_token(now_ns):
            bucket.take()
            taken.append(step / 20)
    assert taken == [0, 0.05, 0.1, 0.15, *(n / 2 for n in range(1, 11))]


def sent(qty="1", version=3):
    signal = TradingSignal(
        strategy="s", run=1, seq=1, symbol=BTC, target_qty=Decimal(qty), stop_loss=None, take_profit=None,
        created_ns=0, expires_ns=0, position_version=version, tick_run=1, tick_seq=1, tick_price=1.0,
        tick_exchange_ns=0, tick_receive_ns=0, reason="")
    return signal, sent_of(signal, 0)


@pytest.mark.parametrize(("outcome", "may"), [
    ("denied", True), ("expired", True), ("rejected", True), ("absent", True), ("done", False),
    ("superseded", False), (None, False)])
def test_sent_with_an_outcome_says_whether_it_may_be_said_again(outcome, may):
    _, memory = sent()
    if outcome:
        memory.saw_outcome(outcome, 0)
    assert memory.may_repeat(3, Decimal(0), 0, is_lost=False) is may
    assert not memory.may_repeat(4, Decimal(0), 0, is_lost=False), "what a stop took out does not come back"


def test_sent_with_denial_after_denial_waits_twice_as_long_up_to_thirty_seconds():
    signal, memory = sent()
    waits = []
    for _ in range(7):
        memory.saw_outcome("denied", 100)
        waits.append((memory.retry_ns - 100) // SECOND)
        memory = sent_of(signal, 100, before=memory)
    assert waits == [1, 2, 4, 8, 16, 30, 30]
    assert (RETRY_NS_MIN, RETRY_NS_MAX) == (SECOND, 30 * SECOND)
    other, _ = sent("2")
    fresh = sent_of(other, 100, before=memory)
    fresh.saw_outcome("denied", 100)
    assert fresh.retry_ns == 100 + SECOND, "another target begins anew"


def test_sent_of_an_exit_with_its_outcome_lost_may_be_said_again():
    _, memory = sent("0")
    assert not memory.may_repeat(3, Decimal(1), RETRY_NS_MAX, is_lost=False)
    assert memory.may_repeat(3, Decimal(1), RETRY_NS_MAX + 1, is_lost=False)
    assert not memory.may_repeat(3, Decimal(0), RETRY_NS_MAX + 1, is_lost=False), "it was reached"


def test_sent_of_an_earlier_run_with_its_outcome_lost_may_be_said_again_unless_the_position_moved():
    _, memory = sent()
    assert memory.may_repeat(3, Decimal(0), 0, is_lost=True)
    assert not memory.may_repeat(4, Decimal(0), 0, is_lost=True)
