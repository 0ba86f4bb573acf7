"""Apply, append, commit, report: in this sequence, once, and told again when asked again."""

import pytest

from bot.bookkeeper import CAUSE_OF_LEG, Bookkeeper
from bot.errors import IllegalTransition, InvariantError, JournalError
from bot.events import FillBooked, OrderChanged, SignalReceived, SymbolLocked
from bot.journal import Journal
from bot.model import Ack, FillReport, OrderReport, SignalOutcome
from bot.orders import ExchangeFill, OrderRequest, OrderStatus
from tests.factory import BTC, ETH, NOW, D, HandClock, signal


class Desk:
    """A bookkeeper over a real journal, and all it published."""

    def __init__(self, path):
        self.clock, self.path, self.published = HandClock(), path / "journal.db", []
        self.halts = []
        self.open()

    def open(self):
        self.journal = Journal(self.path, self.clock, identity={"account": "main"}, checkpoint_events=50)
        self.keeper = Bookkeeper(self.journal, self.journal.load(), self.clock, self.published.append,
                                 lambda who, why: self.halts.append(why))
        self.journal.begin_epoch("e")

    def restart(self):
        self.journal.close()
        self.published.clear()
        self.open()

    def told(self):
        self.keeper.commit()
        reports = list(self.published)
        self.published.clear()
        return reports

    def order(self, name="o1", qty="2", side="buy", leg="open", trigger=None):
        if leg in ("open", "reduce"):
            self.keeper.receive(signal())
        request = OrderRequest(
            client_order_id=name,
            symbol=BTC,
            side=side,
            qty=D(qty),
            trigger_price=trigger,
            type=leg if leg in ("stop", "take_profit") else "market",
        )
        return self.keeper.intend(request, strategy="levels", signal="levels/7/1", leg=leg, checks={"a": "1"})


@pytest.fixture
def desk(tmp_path):
    desk = Desk(tmp_path)
    yield desk
    desk.journal.close()


def status(event, executed="0", **changes):
    fields = {
        "symbol": BTC,
        "client_order_id": "o1",
        "exchange_order_id": "9",
        "side": "buy",
        "qty": D(2),
        "raw_status": "X",
        "is_conditional": False,
        "reduce_only": False,
        "trigger_price": None,
        "update_ns": 0,
    }
    return OrderStatus(event=event, executed_qty=D(executed), **{**fields, **changes})


def fill(trade="1", qty="1", **changes):
    fields = {
        "symbol": BTC,
        "exchange_order_id": "9",
        "client_order_id": "o1",
        "side": "buy",
        "price": D(100),
        "fee": D("0.05"),
        "fee_currency": "USDT",
        "realized_pnl": D(0),
        "is_maker": False,
        "exchange_ns": NOW,
    }
    return ExchangeFill(trade_id=trade, qty=D(qty), **{**fields, **changes})


def test_signal_with_first_and_second_arrival_is_journaled_once_and_acknowledged_twice(desk):
    assert not desk.keeper.acknowledge_again(signal())
    desk.keeper.receive(signal())
    assert desk.keeper.touched == {BTC}
    assert desk.keeper.acknowledge_again(signal())  # again before the commit
    ack = Ack(strategy="levels", run=7, seq=1)
    assert desk.told() == [ack, ack]
    assert desk.keeper.acknowledge_again(signal())
    assert desk.told() == [ack]
    assert desk.keeper.books.signals == 1 and len(desk.keeper.books.book(BTC).signals) == 1


def test_signal_with_restart_of_the_executor_is_known_still(desk):
    desk.keeper.receive(signal())
    desk.keeper.commit()
    desk.restart()
    assert desk.keeper.acknowledge_again(signal())
    assert desk.told() == [Ack(strategy="levels", run=7, seq=1)]
    assert [s.id for s in desk.keeper.books.book(BTC).signals] == ["levels/7/1"]


def test_signal_with_outcome_lost_on_the_way_is_told_it_again(desk):
    desk.keeper.receive(signal())
    desk.keeper.close_signal("levels/7/1", BTC, "denied", "limit", D("-1.5"))
    first = desk.told()
    assert isinstance(first[1], SignalOutcome)
    assert (first[1].outcome, first[1].reason, first[1].filled_qty) == ("denied", "limit", D("-1.5"))
    desk.restart()
    assert desk.keeper.acknowledge_again(signal())
    assert desk.told() == first


@pytest.mark.parametrize("name", ["a/b", "/", "", "x/1/2", "'; DROP TABLE events; --", "nul\0nul", "ü" * 500])
def test_signal_with_hostile_strategy_name_gets_its_outcome(desk, name):
    stranger = signal(strategy=name)
    desk.keeper.receive(stranger)
    desk.keeper.close_signal(f"{name}/7/1", BTC, "denied", "not_owner", D(0))
    outcome = desk.told()[1]
    assert (outcome.strategy, outcome.run, outcome.seq, outcome.outcome) == (name, 7, 1, "denied")
    desk.restart()
    assert desk.keeper.acknowledge_again(stranger)
    assert [type(r) for r in desk.told()] == [Ack, SignalOutcome]


@pytest.mark.parametrize("number", ["NaN", "sNaN", "Infinity", "1E+1000000", "-0"])
def test_signal_with_hostile_numbers_is_journaled_and_read_back(desk, number):
    desk.keeper.receive(signal(number, stop_loss=D(number)))
    desk.keeper.commit()
    desk.restart()
    assert str(desk.keeper.books.book(BTC).signals[0].signal.target_qty) == str(D(number))


def test_signal_that_no_journal_could_read_back_is_refused_and_not_acknowledged(desk):
    with pytest.raises(JournalError, match="signal levels/7/1 was refused"):
        desk.keeper.receive(signal(tick_price=float("nan")))
    with pytest.raises(JournalError):
        desk.keeper.commit()
    assert desk.published == []


def test_signal_with_second_outcome_is_refused(desk):
    desk.keeper.receive(signal())
    desk.keeper.close_signal("levels/7/1", BTC, "done", "", D(0))
    with pytest.raises(InvariantError, match="second outcome"):
        desk.keeper.close_signal("levels/7/1", BTC, "denied", "", D(0))
    assert [type(r) for r in desk.told()] == [Ack, SignalOutcome]


def test_reports_with_commit_that_fails_are_not_sent(desk, monkeypatch):
    def full():
        raise JournalError("disk full")

    desk.keeper.receive(signal())
    monkeypatch.setattr(desk.journal, "commit", full)
    with pytest.raises(JournalError):
        desk.keeper.commit()
    assert desk.published == []
    monkeypatch.undo()


def test_record_with_illegal_event_leaves_journal_and_books_as_they_were(desk):
    order = desk.order()
    desk.keeper.change(order, "reject")
    desk.told()
    desk.keeper.touched = set()
    before = desk.keeper.books.encode()
    with pytest.raises(IllegalTransition):
        desk.keeper.record(OrderChanged(client_order_id="o1", signal="", event="lose"), BTC)
    assert desk.keeper.books.encode() == before and desk.told() == [] and desk.keeper.touched == set()
    desk.restart()
    assert desk.keeper.books.encode() == before
    assert len(desk.halts) == 1, "what the books refuse halts trading"


def test_intent_with_commit_is_reported_and_found(desk):
    order = desk.order()
    report = desk.told()[1]
    assert isinstance(report, OrderReport)
    assert (report.client_order_id, report.state, report.qty, report.leg) == ("o1", "INTENDED", D(2), "open")
    intent = desk.journal.find("intent", "o1")
    assert (intent.request, intent.checks, intent.position_qty) == (order.request, {"a": "1"}, D(0))


@pytest.mark.parametrize(
    ("before", "event", "fields", "is_news"),
    [
        ((), "accept", {}, True),
        (("accept",), "accept", {}, False),  # a poll that says what is known
        (("accept",), "accept", {"exchange_order_id": "9"}, True),
        (("accept",), "accept", {"executed": "1"}, True),
        (("accept",), "accept", {"triggered_id": "t"}, True),
        (("accept", "cancel"), "accept", {}, False),  # NEW behind CANCELED
        (("accept", "cancel"), "accept", {"executed": "1"}, True),  # but more was executed than we knew
        (("accept", "expire"), "accept", {"executed": "1"}, True),
        (("reject",), "accept", {"executed": "1"}, True),
        (("accept", "cancel"), "reject", {}, False),  # illegal: a late report is no event
        (("lose",), "lose", {}, False),
    ],
)
def test_change_with_and_without_news_is_recorded_or_not(desk, before, event, fields, is_news):
    order = desk.order()
    for earlier in before:
        assert desk.keeper.change(order, earlier)
    desk.told()
    said = status(
        event,
        fields.get("executed", "0"),
        exchange_order_id=fields.get("exchange_order_id", ""),
        triggered_id=fields.get("triggered_id", ""),
    )
    assert desk.keeper.change(order, event, status=said) is is_news
    assert len(desk.told()) == is_news


def test_change_with_code_is_recorded_though_the_state_stays(desk):
    order = desk.order()
    desk.keeper.change(order, "lose")
    assert desk.keeper.change(order, "lose", code=-1007, text="Timeout")
    assert (order.state, order.code, order.text) == ("UNKNOWN", -1007, "Timeout")


@pytest.mark.parametrize("event", ["fill", "complete"])
def test_status_with_cumulative_fill_books_nothing_but_waits_for_the_fills(desk, event):
    order = desk.order()
    assert desk.keeper.report_status(order, status(event, "2"))
    assert (order.state, order.filled_qty, order.executed_qty) == ("ACCEPTED", D(0), D(2))
    assert desk.keeper.books.book(BTC).position_qty == 0 and not order.is_settled
    desk.keeper.change(order, "expire")
    assert not order.is_settled


def test_status_nobody_knows_changes_nothing(desk):
    order = desk.order()
    desk.told()
    assert not desk.keeper.report_status(order, status(None, "1"))
    assert desk.told() == [] and order.state == "INTENDED"


def test_fill_with_same_trade_id_is_booked_once_per_symbol_across_a_restart(desk):
    order = desk.order()
    assert desk.keeper.book_fill(fill(), order, "signal")
    assert not desk.keeper.book_fill(fill(), order, "signal")
    assert not desk.keeper.book_fill(fill(qty="5"), None, "operator")  # whatever it says now
    assert desk.keeper.book_fill(fill(symbol=ETH, client_order_id=""), None, "operator")
    desk.told()
    desk.restart()
    assert not desk.keeper.book_fill(fill(), desk.keeper.books.book(BTC).orders["o1"], "signal")
    assert desk.keeper.books.book(BTC).position_qty == 1 and desk.keeper.books.fills == 2


def test_fill_with_order_is_reported_to_its_strategy(desk):
    order = desk.order()
    desk.told()
    desk.keeper.book_fill(fill(client_order_id="child-of-o1"), order, "signal")
    report = desk.told()[0]
    assert isinstance(report, FillReport)
    assert (report.strategy, report.client_order_id, report.qty, report.fee) == (
        "levels",
        "o1",
        D(1),
        D("0.05"),
    )


def test_fill_beyond_the_order_is_journaled_all_the_same(desk):
    order = desk.order()
    assert desk.keeper.book_fill(fill(qty="2.001"), order, "signal")
    assert desk.journal.has("fill", f"{BTC}#1")


def test_lock_with_same_cause_twice_is_recorded_once(desk):
    assert desk.keeper.lock(BTC, "late_fill", "first") and not desk.keeper.lock(BTC, "late_fill", "second")
    assert desk.keeper.lock(BTC, "other", "x")
    assert desk.keeper.books.book(BTC).locks == {"late_fill": "first", "other": "x"}
    assert desk.keeper.unlock(BTC, "other", "gone") and not desk.keeper.unlock(BTC, "other", "gone")
    assert not desk.keeper.unlock(ETH, "late_fill", "never was")
    assert desk.keeper.books.book(BTC).locks == {"late_fill": "first"}


def test_touched_with_changes_names_their_symbols(desk):
    desk.order()
    desk.keeper.touched = set()
    desk.keeper.book_fill(fill(symbol=ETH, client_order_id=""), None, "operator")
    desk.keeper.record(SymbolLocked(symbol=BTC, cause="c", evidence=""))
    assert desk.keeper.touched == {ETH}


def test_commit_with_many_events_checkpoints_and_a_restart_gives_equal_books(desk):
    for seq in range(1, 130):
        desk.keeper.receive(signal(seq=seq))
        desk.keeper.close_signal(f"levels/7/{seq}", BTC, "denied", "x", D(0))
        desk.keeper.commit()
    before = desk.keeper.books.encode()
    assert desk.journal._db.execute("SELECT count(*) FROM checkpoints").fetchone()[0] == 3
    desk.restart()
    assert desk.keeper.books.encode() == before


def test_cause_of_leg_with_every_leg_tells_signals_from_all_else():
    assert {leg for leg, cause in CAUSE_OF_LEG.items() if cause == "signal"} == {"open", "reduce"}
    assert set(CAUSE_OF_LEG) == {"open", "reduce", "stop", "take_profit", "close", "flatten"}


def test_events_with_their_identities_are_what_the_journal_keeps_once():
    event = FillBooked(
        symbol=BTC,
        trade_id="5",
        client_order_id="",
        exchange_order_id="",
        signal="",
        cause="stop",
        side="buy",
        qty=D(1),
        price=D(1),
        fee=D(0),
        fee_currency="",
        realized_pnl=D(0),
        exchange_ns=0,
    )
    assert (event.key, event.story) == (f"{BTC}#5", BTC)
    assert SignalReceived(signal=signal(), received_ns=0).key == "levels/7/1"
