"""The lines a person reads at `make run`."""

import re
from decimal import Decimal

import pytest

from bot.model import Ack, FillReport, Heartbeat, OrderReport, PositionReport, SignalOutcome, Tick
from bot.screen import ORDERS_MAX, Screen, event_line

BTC = "BTC/USDT:USDT"
NS = 1_760_000_001_500_000_000


@pytest.fixture
def screen():
    return Screen((BTC,), silence_ns=3_000_000_000)


def order(state: str, leg: str = "open", **changes) -> OrderReport:
    fields = {"strategy": "sr", "symbol": BTC, "client_order_id": "th1", "leg": leg, "side": "sell",
              "qty": Decimal("0.0160"), "filled_qty": Decimal(0), "trigger_price": None,
              "state": state, "reason": "", "time_ns": NS}
    return OrderReport(**{**fields, **changes})


def position(qty: str, **changes) -> PositionReport:
    fields = {"strategy": "sr", "symbol": BTC, "position_qty": Decimal(qty),
              "entry_price": Decimal("61000.20"), "position_version": 1, "open_orders": 0,
              "unknown_orders": 0, "state": "RUNNING", "time_ns": NS, "executor_run": 1}
    return PositionReport(**{**fields, **changes})


def tick(price: float) -> Tick:
    return Tick(symbol=BTC, kind="mark", price=price, size=0.0, bid=None, bid_size=None, ask=None,
                ask_size=None, side=None, exchange_ns=0, receive_ns=0, run=1, seq=1)


def words(line: str | None) -> str:
    assert line is not None
    assert re.match(r"\d\d:\d\d:\d\d  \S", line) and "\n" not in line
    return " ".join(line.split()[1:])


def test_screen_with_a_fill_shows_price_quantity_and_fee(screen):
    fill = FillReport(strategy="sr", symbol=BTC, client_order_id="th1", trade_id="1", side="buy",
                      qty=Decimal("0.016"), price=Decimal("61000.20"), fee=Decimal("0.48800160"),
                      fee_currency="USDT", exchange_ns=NS)
    assert words(screen.line_of(fill, NS)) == f"fill BUY 0.016 {BTC} at 61000.2, fee 0.4880016 USDT"


def test_screen_with_an_order_tells_each_state_once(screen):
    assert screen.line_of(order("INTENDED"), NS) is None
    assert words(screen.line_of(order("ACCEPTED"), NS)) == f"order SELL 0.016 {BTC} ACCEPTED"
    assert screen.line_of(order("ACCEPTED"), NS) is None
    assert words(screen.line_of(order("REJECTED", reason="-2019"), NS)).endswith("REJECTED (-2019)")


def test_screen_with_exits_names_them_and_their_trigger(screen):
    line = screen.line_of(order("ACCEPTED", "stop", trigger_price=Decimal("60900.0")), NS)
    assert words(line) == f"stop SELL 0.016 {BTC} at 60900 ACCEPTED"
    line = screen.line_of(order("ACCEPTED", "take_profit", client_order_id="th2"), NS)
    assert words(line).startswith("take-profit ")


def test_screen_with_many_orders_forgets_the_oldest(screen):
    for number in range(ORDERS_MAX + 10):
        screen.line_of(order("ACCEPTED", client_order_id=f"th{number}"), NS)
    assert len(screen._orders) == ORDERS_MAX


def test_screen_with_an_outcome_says_why(screen):
    outcome = SignalOutcome(strategy="sr", run=1, seq=1, symbol=BTC, outcome="denied",
                            reason="stale_position", filled_qty=Decimal(0), time_ns=NS)
    assert words(screen.line_of(outcome, NS)) == f"signal sr {BTC} denied: stale_position"


def test_screen_with_positions_tells_changes_only(screen):
    assert words(screen.line_of(position("0"), NS)) == f"position sr {BTC} flat RUNNING"
    assert screen.line_of(position("0"), NS) is None
    assert words(screen.line_of(position("-0.016"), NS)).endswith("short 0.016 at 61000.2 RUNNING")
    assert words(screen.line_of(position("-0.016", state="LOCKED", unknown_orders=1), NS)).endswith(
        "LOCKED, 1 unknown orders")
    assert words(screen.line_of(position("-0.016", state="LOCKED", position_version=2), NS))


def test_screen_with_an_ack_or_a_beat_says_nothing(screen):
    assert screen.line_of(Ack(strategy="sr", run=1, seq=1), NS) is None
    assert screen.line_of(Heartbeat(publisher="executor", run=1, time_ns=NS, last_seq={}), NS) is None


def test_status_line_with_nothing_heard_yet_says_so(screen):
    assert words(screen.status_line(NS)) == (
        f"status {BTC} no price yet | 0 ticks | no word from the executor yet")


def test_status_line_with_ticks_tells_price_count_position_and_staleness(screen):
    screen.saw_tick(tick(61000.1))
    screen.saw_tick(tick(61000.2))
    screen.line_of(position("0.016"), NS)
    assert words(screen.status_line(NS)) == (
        f"status {BTC} 61,000.2 | 2 ticks | sr {BTC} long 0.016 at 61000.2 RUNNING")
    screen.saw_tick(Heartbeat(publisher="gateway", run=1, time_ns=NS, last_seq={}, stale=(BTC,)))
    assert "61,000.2 STALE" in screen.status_line(NS)


def test_status_line_with_a_silent_executor_says_for_how_long(screen):
    screen.line_of(position("0"), NS)
    assert "NO WORD" not in screen.status_line(NS + 3_000_000_000)
    assert screen.status_line(NS + 12_000_000_000).endswith("NO WORD FROM THE EXECUTOR for 12 s")


def test_large_round_quantities_are_written_out(screen):
    assert " 60000 " in words(screen.line_of(order("ACCEPTED", qty=Decimal("6E+4")), NS))


def test_event_line_with_a_text_carries_the_time():
    assert words(event_line(NS, "gateway FATAL")) == "process gateway FATAL"
