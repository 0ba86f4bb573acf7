"""Money and exposure: every case of what is open, held and won, held against sums made another way."""

from fractions import Fraction

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bot.books import DAY_NS, Books
from bot.events import Reconciled, SymbolLocked
from bot.exposure import day_pnl, distance_pct, entries_since, equity, gross_notional, worst_qty
from bot.rows import ExchangePosition
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
    instrument,
    intended,
    received,
    signal,
)

INSTRUMENTS = {BTC: instrument(), ETH: instrument(symbol=ETH)}
DAY = NOW // DAY_NS * DAY_NS


def reconciled(wallet, at_ns=NOW, **changes):
    return Reconciled(trigger="t", differences=(), positions={}, wallet_balance=D(wallet), exchange_ns=at_ns,
                      **{name: D(value) for name, value in changes.items()})


def marks(**at):
    return {BTC: None, ETH: None, **{{"btc": BTC, "eth": ETH}[k]: v and D(v) for k, v in at.items()}}.get


def pnl(books, mark="100"):
    return day_pnl(books, equity(books, {}, marks(btc=mark), INSTRUMENTS))


def sold(realized, at_ns, **changes):
    changes |= {"realized_pnl": D(realized), "exchange_ns": at_ns}
    return filled("", "2", "sell", trade="2", price="95", **changes)


def test_day_with_fills_fees_funding_and_a_moving_mark_adds_them_all_up():
    books = folded(reconciled(1_000), filled("", "2", fee=D("0.5"), exchange_ns=NOW + 1))
    assert pnl(books, "90") == D("-20.5"), "the fee, and what the position has lost"
    books.apply(sold(-10, NOW + 2, fee=D("0.25")))
    assert pnl(books, "80") == D("-10.75"), "realized; nothing is held any more"
    books.apply(reconciled("985.25", NOW + SECOND))
    assert pnl(books) == D("-14.75"), "the exchange's balance knows of the funding too, which counts once"


def test_day_with_a_fill_beside_the_comparison_counts_it_once_whenever_it_is_told():
    before = folded(reconciled(1_000), filled("", "2", fee=D(0), exchange_ns=NOW))
    for events in (
        [sold(-10, NOW + 5, fee=D(0)), reconciled(1_000, NOW + 4)],  # told before, traded after the balance
        [reconciled(990, NOW + 6), sold(-10, NOW + 5, fee=D(0))],  # told after, in the balance already
        [sold(-10, NOW + 5, fee=D(0)), reconciled(990, NOW + 5)],
    ):
        books = Books.decode(before.encode())
        for event in events:
            books.apply(event)
        assert pnl(books) == -10, events


def test_day_with_a_fee_in_another_currency_leaves_it_out():
    books = folded(reconciled(1_000), filled("", "2", fee=D("0.5"), fee_currency="BNB", exchange_ns=NOW + 1))
    assert pnl(books) == 0


def test_day_with_money_paid_in_or_out_has_won_or_lost_nothing():
    books = folded(reconciled(1_000), reconciled(700, NOW + SECOND, transfers=-300))
    assert pnl(books) == 0
    books.apply(reconciled(5_690, NOW + 2 * SECOND, transfers=4_700))
    assert pnl(books) == -10


def test_day_that_turns_starts_with_what_the_last_comparison_saw():
    evening, morning = DAY + DAY_NS - 1, DAY + DAY_NS
    books = folded(reconciled(1_000, DAY), reconciled(900, evening, unrealized_pnl=-50, transfers=0))
    assert pnl(books) == -100
    books.apply(reconciled(890, morning, unrealized_pnl=-45))
    assert (books.day.number, books.day.equity) == (morning // DAY_NS, 850)
    assert pnl(books) == 40, "and what came over midnight counts for the new day"


def test_day_that_turns_while_money_was_moved_counts_it_for_neither():
    books = folded(reconciled(1_000, DAY), reconciled(1_100, DAY + 1, transfers=100),
                   reconciled(1_600, DAY + DAY_NS, transfers=600))
    assert pnl(books) == 0 and books.day.transfers == 0
    books.apply(reconciled(1_650, DAY + DAY_NS + 1, transfers=50))
    assert pnl(books) == 0


@pytest.mark.parametrize(("days", "expected"), [(1, -400), (2, 0), (30, 0)])
def test_day_after_a_long_absence_starts_with_what_is_there(days, expected):
    books = folded(reconciled(1_000, DAY), reconciled(600, DAY + days * DAY_NS))
    assert pnl(books) == expected


def test_day_with_an_exchange_clock_that_steps_back_stays_the_same_day():
    books = folded(reconciled(1_000, DAY), reconciled(900, DAY - 1))
    assert pnl(books) == -100 and books.day.number == DAY // DAY_NS


def test_day_before_the_first_comparison_is_not_known_and_a_restart_does_not_reset_it():
    assert pnl(Books()) is None and pnl(folded(filled("", "2"))) is None
    books = folded(reconciled(1_000), reconciled(700, NOW + 1))
    assert pnl(Books.decode(books.encode())) == -300


def test_journal_older_than_the_day_is_folded_without_one():
    old = Reconciled(trigger="t", differences=(), positions={}, wallet_balance=D(1_000))
    books = folded(old)
    assert books.day is None and pnl(books) is None and books.wallet_balance == 1_000


qtys = st.integers(-50, 50)


@given(qtys, st.lists(st.tuples(qtys.filter(bool), st.sampled_from(["intend", "lose", "reject", "fill"])),
                      max_size=4), st.integers(1, 10**6))
def test_exposure_with_any_books_is_never_less_than_any_way_they_may_end(held, orders, mark):
    books = holding(str(held), *(received(signal(seq=n)) for n in range(1, 5)))
    book, may_fill = books._own(BTC), []
    for number, (qty, end) in enumerate(orders):
        name = f"o{number}"
        event = intended(name, str(abs(qty)), "buy" if qty > 0 else "sell", leg="flatten")
        books.apply(event)
        if end == "lose":
            books.apply(changed(name, "lose"))
        if end == "reject":
            books.apply(changed(name, "reject"))
        if end == "fill":
            books.apply(filled(name, "1", event.request.side, trade=name))
        done = {"fill": 1 if qty > 0 else -1}.get(end, 0)
        held += done
        if end != "reject":
            may_fill.append(qty - done)
    ends = {held}
    for leaves in may_fill:  # each order may fill or not, whatever the others do
        ends |= {end + leaves for end in ends}
    assert worst_qty(book) == max(map(abs, ends))
    gross = gross_notional([book], {}, lambda symbol: D(mark), INSTRUMENTS)
    assert Fraction(gross) == Fraction(max(map(abs, ends))) * mark


def test_exposure_without_a_mark_counts_the_entry_price():
    books = holding("-3", price="50")
    for mark in (None, D(0), D("NaN"), D(-1)):
        assert gross_notional(books.symbols.values(), {}, lambda symbol, m=mark: m, INSTRUMENTS) == 150
        assert equity(folded(reconciled(10)), {}, lambda symbol, m=mark: m, INSTRUMENTS) == 10


def test_equity_counts_every_position_at_its_mark_and_its_contract_size():
    short = filled("", "5", "sell", trade="e", price="10", fee=D(0), symbol=ETH)
    books = holding("2", reconciled(1_000), short)
    size = INSTRUMENTS | {ETH: instrument(symbol=ETH, contract_size=D(10))}
    assert equity(books, {}, marks(btc="101", eth="12"), size) == 1_000 + 2 - 100


@pytest.mark.parametrize(("mark", "qty", "liquidation", "expected"), [
    ("100", "1", "80", 20), ("100", "-1", "125", 25), ("100", "1", "100", 0), ("100", "-1", "100", 0),
    ("80", "1", "100", -25), ("125", "-1", "100", -20),  # beyond it: nearer than any limit, not far away
    ("100", "1", None, None), ("100", "0", "80", None), (None, "1", "80", None), ("0", "1", "80", None)])
def test_distance_to_liquidation_is_in_percent_of_the_mark_on_the_side_that_loses(
        mark, qty, liquidation, expected):
    told = ExchangePosition(symbol=BTC, qty=D(qty), entry_price=D(90), mark_price=D(90),
                            liquidation_price=liquidation and D(liquidation))
    assert distance_pct(mark and D(mark), told) == expected
    assert distance_pct(D(100), None) is None


def test_entries_are_counted_up_to_a_minute_and_no_other_orders():
    books = folded(received(signal()), intended("o1", now_ns=NOW), changed("o1", "reject"),
                   intended("s1", leg="stop", trigger="90", now_ns=NOW))
    counted = [len(entries_since(books.symbols.values(), now - 60 * SECOND, now))
               for now in (NOW - 1, NOW, NOW + 60 * SECOND - 1, NOW + 60 * SECOND)]
    assert counted == [0, 1, 1, 0]


def test_equity_of_a_position_that_a_person_closed_counts_its_loss_once():
    bought = filled("", "10", exchange_ns=NOW, fee=D(0))
    books = folded(reconciled(1_000), bought, SymbolLocked(symbol=BTC, cause="books_differ", evidence=""))
    assert pnl(books, "90") == -100
    books.apply(reconciled(900, NOW + SECOND))  # closed at 90 in the app
    assert pnl(books, "80") == pnl(books, "120") == -100
    books.apply(msgspec.structs.replace(reconciled(940, NOW + SECOND), positions={BTC: D(4)}))
    assert pnl(books, "80") == -140, "or 6 of 10"
