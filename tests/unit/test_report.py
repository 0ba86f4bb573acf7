"""The day: money, slippage, latency, outcomes and incidents add up to what the journal says."""

from decimal import Decimal

import msgspec
import pytest

from bot.errors import InvariantError
from bot.events import (
    CREDITED_NS,
    Adopted,
    Commanded,
    FillBooked,
    Halted,
    OrderChanged,
    OrderIntended,
    Reconciled,
    SignalClosed,
    SignalReceived,
    Started,
    Unprotected,
)
from bot.journal import Entry
from bot.model import TradingSignal
from bot.orders import OrderRequest
from bot.report import chart_html, day_json, day_lines, latency_rows, pnl_rows, summarize

BTC, MS = "BTC/USDT:USDT", 1_000_000


def received(seq: int, price: float = 100.0, at_ns: int = 0) -> SignalReceived:
    return SignalReceived(received_ns=at_ns, signal=TradingSignal(
        strategy="s", run=1, seq=seq, symbol=BTC, target_qty=Decimal(1), stop_loss=None, take_profit=None,
        created_ns=at_ns, expires_ns=at_ns + 1, position_version=0, tick_run=1, tick_seq=1, tick_price=price,
        tick_exchange_ns=at_ns, tick_receive_ns=at_ns, reason="<script>"))


def filled(side: str, qty: str, price: str, *, signal: str = "", cause: str = "signal", pnl: str = "0",
           fee: str = "0.1", trade: str = "1") -> FillBooked:
    return FillBooked(symbol=BTC, trade_id=trade, client_order_id="o", exchange_order_id="1", signal=signal,
                      cause=cause, side=side, qty=Decimal(qty), price=Decimal(price), fee=Decimal(fee),
                      fee_currency="USDT", realized_pnl=Decimal(pnl), exchange_ns=5)


def intended(signal: str, at_ns: int, leg: str = "open") -> OrderIntended:
    request = OrderRequest(client_order_id="o" + leg, symbol=BTC, side="buy", qty=Decimal(1), type="market",
                           reduce_only=False, trigger_price=None)
    return OrderIntended(request=request, epoch="e", strategy="s", signal=signal, leg=leg,
                         position_qty=Decimal(0), checks={}, intended_ns=at_ns)


def compared(wallet: str, *differences: str, unexplained: str = "0", income_ns: int = 0,
             **income: str) -> Reconciled:
    return Reconciled(trigger="timer", differences=differences, positions={}, wallet_balance=Decimal(wallet),
                      unexplained=Decimal(unexplained), exchange_ns=2 * CREDITED_NS, income_ns=income_ns,
                      income={k: Decimal(v) for k, v in income.items()})


def day_of(*events, step_ns: int = MS):
    return summarize([Entry(n, n * step_ns, event) for n, event in enumerate(events, 1)], 0, 10**9)


def test_pnl_with_trades_funding_and_more_tells_them_apart():
    day = day_of(compared("1000"), filled("buy", "1", "100"), filled("sell", "1", "110", pnl="10", trade="2"),
                 compared("1007.3", FUNDING_FEE="-2"))
    symbol, funding, other, total, _ = pnl_rows(day)
    assert (symbol["realized_pnl"], symbol["fees"], symbol["net"]) == (10, Decimal("-0.2"), Decimal("9.8"))
    assert (funding["net"], other["net"], total["net"]) == (-2, Decimal("-0.5"), Decimal("7.3"))


def test_fees_in_another_currency_stand_by_themselves_and_in_no_sum():
    bnb = msgspec.structs.replace(filled("sell", "1", "110", pnl="10", fee="0.02"), fee_currency="BNB")
    day = day_of(compared("1000"), bnb, compared("1010"))
    symbol, _, other, total, _, fees = pnl_rows(day)
    assert (symbol["fees"], symbol["net"], other["net"], total["net"]) == (0, 10, 0, 10)
    assert (fees["of"], fees["fees"]) == ("fees in BNB", Decimal("-0.02"))


def test_transfers_are_no_gain_and_income_that_is_read_twice_counts_once():
    lagging = {"TRANSFER": "100", "FUNDING_FEE": "-1"}
    day = day_of(compared("1000", TRANSFER="7"),  # of before the span
                 compared("1050", TRANSFER="50"),
                 compared("1148", unexplained="-1", **lagging),
                 compared("1148", income_ns=2 * CREDITED_NS - 1, **(lagging | {"FUNDING_FEE": "-2"})),
                 compared("1148", **(lagging | {"FUNDING_FEE": "-2"})),
                 compared("1128", TRANSFER="-20"))
    funding, other, total, paid = pnl_rows(day)
    assert (funding["net"], other["net"], total["net"], paid["net"]) == (-2, 0, -2, 130)


def test_stop_that_was_missing_for_long_is_an_incident_and_for_moments_is_none():
    def lacks(since_ns: int, symbol: str = BTC) -> Unprotected:
        return Unprotected(symbol=symbol, since_ns=since_ns)
    day = day_of(lacks(1_500 * MS), lacks(0), lacks(4_500 * MS), lacks(0), step_ns=1_500 * MS)
    assert day.incidents == []
    day = day_of(lacks(1_500 * MS), lacks(0), step_ns=2_500 * MS)
    assert [text.partition("  ")[2] for text in day.incidents] == [f"{BTC} had lacked its stop for 3.5 s"]


def test_funding_with_a_fill_that_is_not_compared_yet_does_not_count_it():
    early, late = (filled("sell", "1", "110", pnl="10", trade=trade) for trade in "12")
    assert day_of(early, compared("1000"), compared("999"), late).other == -1


@pytest.mark.parametrize(("side", "price", "cost"), [
    ("buy", "101", 2), ("buy", "99", -2), ("sell", "99", 2), ("sell", "101", -2)])
def test_slippage_with_either_side_is_what_it_cost_against_the_tick(side, price, cost):
    day = day_of(received(1, 100.0), filled(side, "2", price, signal="s/1/1"))
    assert day.pnl[BTC].slippage == cost
    assert pnl_rows(day)[0]["slippage_bp"] == round(Decimal(cost) / (2 * Decimal(price)) * 10_000, 2)


def test_slippage_in_basis_points_is_of_what_signals_ordered_alone():
    day = day_of(received(1, 100.0), filled("buy", "2", "101", signal="s/1/1"),
                 filled("sell", "2", "90", cause="stop", trade="2"))
    assert pnl_rows(day)[0]["slippage_bp"] == round(Decimal(2) / 202 * 10_000, 2)


def test_slippage_with_a_stop_has_no_tick_to_blame():
    assert day_of(received(1), filled("sell", "1", "90", signal="s/1/1", cause="stop")).pnl[BTC].slippage == 0


def test_latency_with_entries_counts_them_and_not_the_exits():
    accepted = OrderChanged(client_order_id="oopen", signal="s/1/1", event="accept")
    day = day_of(received(1, at_ns=2 * MS), intended("s/1/1", 5 * MS), intended("s/1/1", 9 * MS, leg="stop"),
                 accepted, accepted)
    rows = {row["latency"]: row for row in latency_rows(day)}
    assert (rows["tick_to_order"]["count"], rows["tick_to_order"]["max_ms"]) == (1, 3.0)
    assert rows["order_round_trip"]["count"] == 1
    assert rows["order_round_trip"]["p95_ms"] <= rows["order_round_trip"]["max_ms"]


def test_outcomes_and_incidents_with_reasons_are_counted_and_told():
    denied = SignalClosed(
        signal="s/1/1",
        symbol=BTC,
        outcome="denied",
        reason="stale_mark: limit 1 ms, was 2",
        filled_qty=Decimal(0),
    )
    day = day_of(denied, denied, Started(epoch="e", version="1", config="c"),
                 Halted(scope="all", who="op", why="lunch"), compared("1"), compared("1", "BTC: 1 of 2"))
    assert day_json(day)["outcomes"] == {"denied stale_mark": 2}
    assert [text.partition("  ")[2][:8] for text in day.incidents] == ["executor", "halted (", "compared"]
    assert "incidents: 3" in day_lines(day)


def test_commands_are_incidents_by_what_they_led_to():
    def typed(verb: str) -> Commanded:
        return Commanded(id=verb, verb=verb, symbol=BTC, who="op", why="a look")
    adopted = Adopted(symbol=BTC, qty=Decimal(1), entry_price=Decimal(9), cursor=1, causes=(), who="op",
                      why="mine")
    day = day_of(typed("reconcile"), compared("1"), typed("adopt"), typed("flatten"))  # both refused
    assert day.incidents == []
    absent = OrderChanged(client_order_id="th1", signal="s", event="absent", text="declared absent by op")
    day = day_of(typed("cancel"), typed("adopt"), adopted, absent)
    assert [text.partition("  ")[2][:14] for text in day.incidents][:2] == ["operator op: c", f"{BTC}:"]
    assert "declared absent by op" in day.incidents[2]


def test_day_with_a_fill_of_nothing_is_no_money_to_report():
    with pytest.raises(InvariantError, match="journal verify"):
        day_of(filled("buy", "0", "100"))


def test_day_with_nothing_in_it_says_so():
    assert "no order was sent" in day_lines(day_of())


def test_chart_with_markup_in_the_journal_keeps_it_text():
    page = chart_html(
        day_of(compared("1"), Halted(scope="all", who="op", why="</script><script>alert(1)")), "paper"
    )
    assert "alert(1)" in page
    assert "<script>alert(1)" not in page
    assert 'src="' not in page.replace("src=\"data:", "")  # opens anywhere, with no network
