"""DESIGN 3, sentence by sentence: what a signal leads to; then all of it played at random."""

import itertools

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from bot.books import Books, is_newer
from bot.decision import (
    REDUCE_ATTEMPTS_MAX,
    REDUCE_WAIT_NS,
    CloseSignal,
    Context,
    MoveExits,
    SendOrder,
    next_step,
)
from bot.errors import IllegalTransition, InvariantError
from bot.events import ExitsSet, Reconciled, SignalClosed, SymbolLocked, SymbolUnlocked
from bot.orders import IN_FLIGHT
from bot.protection import as_held
from tests.factory import (
    BTC,
    NOW,
    SECOND,
    D,
    changed,
    exposure,
    filled,
    instrument,
    intended,
    limits,
    name_of,
    prices,
    received,
    signal,
)

FENCE_S = 4
STATES = ("RUNNING", "REDUCING", "LOCKED", "HALTED", "RECONCILING")


class Table:
    """Books, a market and a clock, and the executor's part: what a step says is recorded."""

    def __init__(self, held="0"):
        self.now, self.state, self.owner, self.count = NOW, "RUNNING", "levels", 0
        self.limits, self.instrument, self.prices, self.entries = limits(), instrument(), None, 0
        self.rate_refusal = ""
        self.books, self.history, self.outcomes = Books(), [], {}
        if D(held):
            self.fill("", str(abs(D(held))), "buy" if D(held) > 0 else "sell")

    @property
    def book(self):
        return self.books.book(BTC)

    @property
    def position(self):
        return self.book.position_qty

    def record(self, event):
        self.books.apply(event)
        self.history.append(event)

    def send(self, target="1", *, seq=None, **fields):
        """A signal decided on what is known now arrives."""
        self.count += 1
        wanted = signal(
            target,
            now_ns=self.now,
            **{"seq": seq or self.count, "position_version": self.book.version, **fields},
        )
        self.record(received(wanted, self.now))
        return name_of(wanted)

    def fill(self, name, qty, side=None, *, cause="signal"):
        self.count += 1
        side = side or self.book.orders[name].request.side
        self.record(filled(name, qty, side, trade=f"t{self.count}", cause=cause))

    def answer(self, event, **fields):
        for order in self.book.working():
            self.record(changed(order.id, event, **fields))

    def context(self):
        return Context(
            owner=self.owner,
            state=self.state,
            state_reason="",
            limits=self.limits,
            instrument=self.instrument,
            prices=self.prices or prices(self.now),
            now_ns=self.now,
            exchange_now_ns=self.now,
            exposure=exposure(entries_last_minute=self.entries),
            fence_ns=FENCE_S * SECOND,
            rate_refusal=self.rate_refusal,
        )

    def step(self):
        return next_step(self.book, self.context())

    def act(self):
        """Do what follows until nothing does; return it in words."""
        said = []
        while (step := self.step()) is not None:
            said.append(self.perform(step))
            assert len(said) < 50
        return said

    def perform(self, step):
        name, wanted = step.signal.id, step.signal.signal
        if isinstance(step, SendOrder):
            if step.set_exits:
                self.exits(wanted)
            self.count += 1
            order = f"{step.leg[0]}{self.count}"
            self.record(intended(order, str(step.qty), step.side, leg=step.leg, signal=name, now_ns=self.now))
            return f"{step.leg} {step.side} {step.qty}"
        if isinstance(step, MoveExits):
            self.exits(wanted)
            step = CloseSignal(step.signal, "done", "moved")
        self.record(
            SignalClosed(
                signal=name,
                symbol=BTC,
                outcome=step.outcome,
                reason=step.reason,
                filled_qty=step.signal.filled_qty,
            )
        )
        assert name not in self.outcomes
        self.outcomes[name] = step.outcome
        return f"{step.outcome} {step.reason}"

    def exits(self, wanted):
        self.record(
            ExitsSet(
                symbol=BTC, signal=name_of(wanted), stop_loss=wanted.stop_loss, take_profit=wanted.take_profit
            )
        )

    def first_word(self):
        said = self.act()
        return said[0].split(" ")[0] if said else None

    def order(self):
        return self.book.working()[0]


@pytest.fixture
def table():
    return Table()


def at(held):
    return Table(held)


# An increase acts once.


@pytest.mark.parametrize(
    ("held", "target", "expected"),
    [
        ("0", "2", "open buy 2"),
        ("0", "-2", "open sell 2"),
        ("1", "3", "open buy 2"),
        ("-1", "-3", "open sell 2"),
    ],
)
def test_increase_with_nothing_in_the_way_sends_the_difference(held, target, expected):
    table = at(held)
    table.send(target, stop_loss=D(90) if D(target) > 0 else D(110))
    assert table.act() == [expected] and table.book.stop_loss in (90, 110)
    assert table.act() == []


def test_increase_that_filled_is_done(table):
    table.send("2")
    table.act()
    table.fill(table.order().id, "2")
    assert table.act() == ["done filled 2"] and table.position == 2


@pytest.mark.parametrize("end", ["expire", "cancel"])
def test_increase_that_filled_in_part_is_done_with_what_was_filled(table, end):
    name = table.send("2")
    table.act()
    table.fill(table.order().id, "0.5")
    table.answer(end)
    assert table.act() == ["done filled 0.5"]
    assert table.history[-1].filled_qty == D("0.5")
    table.now += 60 * SECOND
    assert table.act() == [] and table.outcomes == {name: "done"}


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        (["reject"], "rejected the exchange said -2019 no margin"),
        (["expire"], "rejected the exchange said EXPIRED unfilled"),
        (["cancel"], "rejected the exchange said CANCELED unfilled"),
        (["not_sent"], "absent no route"),
        (["lose", "absent"], "absent no route"),
    ],
)
def test_increase_that_filled_nothing_is_over_too(table, events, expected):
    table.send("2")
    table.act()
    for event in events[:-1]:
        table.answer(event)
        assert table.act() == []
    table.answer(
        events[-1],
        code=-2019 if events == ["reject"] else 0,
        text={"reject": "no margin"}.get(events[0], "no route"),
    )
    assert table.act() == [expected]


def test_increase_whose_fills_are_still_missing_waits_for_them(table):
    table.send("2")
    table.act()
    name = table.order().id
    table.answer("expire", executed_qty=D(1))
    assert table.act() == []
    table.fill(name, "1")
    assert table.act() == ["done filled 1"]


# A reduction stays in force until it is reached.


@pytest.mark.parametrize(
    ("held", "target", "expected", "keeps"),
    [
        ("3", "1", "reduce sell 2", True),
        ("3", "0", "reduce sell 3", False),
        ("-3", "-1", "reduce buy 2", True),
        ("-3", "0", "reduce buy 3", False),
        ("3", "-2", "reduce sell 3", False),
        ("-3", "2", "reduce buy 3", False),
    ],
)
def test_reduction_with_nothing_in_the_way_sends_the_difference_and_never_crosses_zero(
    held, target, expected, keeps
):
    table = at(held)
    table.send(target, stop_loss={True: D(90), False: D(110)}[D(target) > 0] if D(target) else None)
    step = table.step()
    assert f"{step.leg} {step.side} {step.qty}" == expected and step.set_exits is keeps
    assert step.qty <= abs(table.position)


def test_reduction_that_filled_in_part_goes_on_with_the_rest_until_reached():
    table = at("3")
    name = table.send("0")
    assert table.act() == ["reduce sell 3"]
    table.fill(table.order().id, "1")
    assert table.act() == []
    table.answer("expire")
    assert table.act() == []  # not at once
    table.now += REDUCE_WAIT_NS
    assert table.act() == ["reduce sell 2"]
    table.fill(table.order().id, "2")
    assert table.act() == ["done reduced to 0"]
    assert table.history[-1].filled_qty == -3 and table.outcomes == {name: "done"}


def test_reduction_goes_on_long_after_its_signal_expired():
    table = at("3")
    table.send("1")
    table.act()
    table.answer("expire")
    table.now += 3_600 * SECOND
    assert table.act() == ["reduce sell 2"]


def tries_of(table, end, seconds=40):
    tries, start = [], table.now
    while table.now < start + seconds * SECOND:
        said = table.act()
        if said:
            tries.append(((table.now - start) / SECOND, said[-1]))
        if table.book.working():
            table.answer(end, code=-2022 if end == "reject" else 0)
        table.now += SECOND // 4
    return tries


def test_reduction_that_is_refused_is_tried_again_with_back_off_and_then_told():
    table = at("3")
    table.send("0")
    tries = tries_of(table, "reject")
    assert [t for t, _ in tries] == [0, 0.5, 1.5, 3.5, 7.5, 7.75]
    assert [s for _, s in tries] == ["reduce sell 3"] * REDUCE_ATTEMPTS_MAX + [
        "rejected the exchange said -2022"
    ]


def test_reduction_that_is_refused_counts_refusals_in_a_row_only():
    table = at("9")
    table.send("0")
    for n in range(REDUCE_ATTEMPTS_MAX + 2):
        assert table.act()[-1].startswith("reduce sell")
        if n == REDUCE_ATTEMPTS_MAX - 2:
            table.fill(table.order().id, "1")
            table.answer("expire")
        else:
            table.answer("reject")
        table.now += 60 * SECOND
    assert not table.outcomes


def test_reduction_that_makes_progress_does_not_wait_longer_and_longer():
    table = at("9")
    table.send("0")
    for _ in range(8):
        assert table.act()[-1].startswith("reduce sell")
        table.fill(table.order().id, "1")
        table.answer("expire")
        assert table.act() == []
        table.now += REDUCE_WAIT_NS
    assert table.act() == ["reduce sell 1"]


@pytest.mark.parametrize("end", ["expire", "not_sent"])
def test_reduction_that_does_not_get_through_is_tried_as_long_as_it_takes(end):
    table = at("3")
    table.send("0")
    tries = [t for t, _ in tries_of(table, end, 100)]
    assert tries == [0, 0.5, 1.5, 3.5, 7.5, 15.5, 31.5, 63.5, 95.5]  # 32 s apart at most
    assert not table.outcomes


def test_reduction_is_not_held_up_by_a_clock_that_stepped_back():
    table = at("3")
    table.send("0")
    table.act()
    table.answer("expire")
    table.now -= 3_600 * SECOND
    assert table.act() == ["reduce sell 3"]


def test_exit_sent_again_is_not_held_up_by_a_clock_that_stepped_back():
    table = at("3")
    table.send("0")
    table.act()
    table.answer("lose")
    assert table.act() == []
    table.now -= 3_600 * SECOND
    assert table.act() == ["reduce sell 3"]
    assert table.act() == []


def test_reduction_larger_than_one_order_may_be_goes_in_parts():
    table = at("7")
    table.instrument = instrument(qty_max=D(3))
    table.send("0")
    said = []
    for _ in range(3):
        said += table.act()
        table.fill(table.order().id, str(table.order().request.qty))
        table.now += REDUCE_WAIT_NS
    assert [*said, *table.act()] == ["reduce sell 3", "reduce sell 3", "reduce sell 1", "done reduced to 0"]


@pytest.mark.parametrize(("held", "target", "expected"), [
    ("0.001", "0", "reduce sell 0.001"), ("-0.001", "0", "reduce buy 0.001"),
    ("1", "0.999", "reduce sell 0.001"), ("1", "0.001", "reduce sell 0.999"),
    ("0.001", "-1", "reduce sell 0.001")])
def test_reduction_below_the_least_an_entry_may_be_is_sent(held, target, expected):
    table = at(held)
    assert D("0.001") * 100 < table.instrument.notional_min
    table.send(target)
    assert table.first_word() == expected.split()[0]
    order = table.order()
    assert f"reduce {order.request.side} {order.request.qty}" == expected and order.request.reduce_only


def test_entry_filled_below_the_least_of_an_entry_is_done_and_can_be_left():
    table = at("0")
    table.send("1", stop_loss=D("99"))
    assert table.act() == ["open buy 1"]
    order = table.order()
    table.fill(order.id, "0.001")
    table.answer("expire", executed_qty=D("0.001"))
    assert table.act() == ["done filled 0.001"] and table.position == D("0.001")
    table.send("0")
    assert table.act() == ["reduce sell 0.001"]


def test_reduction_whose_position_was_taken_out_by_a_stop_buys_nothing_back():
    table = at("10")
    table.send("3")
    assert table.act() == ["reduce sell 7"]
    table.answer("expire")
    table.fill("", "10", "sell", cause="stop")
    table.now += SECOND
    assert table.act() == ["done reduced to 0"]


def test_reduction_whose_first_order_filled_late_buys_nothing_back():
    table = at("10")
    table.send("3")
    table.act()
    first = table.order().id
    table.answer("lose")
    table.answer("absent")
    table.now += SECOND
    assert table.act() == ["reduce sell 7"]
    second = table.order().id
    table.fill(first, "7")
    table.fill(second, "3")  # reduce-only: the exchange gave no more
    table.answer("expire")
    table.now += SECOND
    assert table.position == 0 and table.act() == ["done reduced to 0"]


def test_reduction_that_went_too_far_is_brought_back_to_zero_only():
    table = at("10")
    table.send("3")
    table.act()
    table.answer("expire")
    table.fill("", "12", "sell")
    table.now += SECOND
    assert table.act() == ["reduce buy 2"]
    table.fill(table.order().id, "2")
    assert table.act() == ["done reduced to 0"]


def test_reduction_in_part_with_an_unknown_order_waits_for_evidence():
    table = at("3")
    table.send("1")
    table.act()
    table.answer("lose")
    table.now += 3_600 * SECOND
    assert table.act() == [], "both could be executed, and leave too little"
    table.answer("absent")
    assert table.act() == ["reduce sell 2"]


@pytest.mark.parametrize("again", [False, True])
def test_exit_with_an_unknown_order_is_sent_again_when_the_first_cannot_come_any_more(again):
    table = at("3")
    table.send("0")
    table.act()
    table.answer("lose")
    table.now += FENCE_S * SECOND
    if again:  # the strategy says so once more
        table.send("0")
    assert table.act() == []
    table.now += 1
    assert table.act() == ["reduce sell 3"]
    assert table.act() == []
    table.fill(table.book.working()[-1].id, "3")
    assert table.act() == [], "the first is still to be explained"
    for order in table.book.unknown():
        table.record(changed(order.id, "reject"))
    assert {said.split()[0] for said in table.act()} <= {"done", "expired"}
    assert not table.book.signals and table.position == 0


def test_flip_with_an_unknown_first_leg_closes_again_and_opens_only_when_all_is_known():
    table = at("3")
    table.send("-2", stop_loss=D(110))
    assert table.act() == ["reduce sell 3"]
    table.answer("lose")
    table.now += FENCE_S * SECOND + 1
    assert table.act() == ["reduce sell 3"]
    table.fill(table.book.working()[-1].id, "3")
    assert table.act() == []


# A flip is a reduce-only leg and then an opening leg.


def flipped(**fields):
    table = at("3")
    table.send("-2", stop_loss=D(110), **fields)
    assert table.act() == ["reduce sell 3"] and table.book.stop_loss is None
    table.fill(table.order().id, "3")
    return table


def test_flip_closes_first_and_then_opens_with_its_own_exits():
    table = flipped()
    assert table.act() == ["open sell 2"] and table.book.stop_loss == 110
    table.fill(table.order().id, "2")
    assert table.act() == ["done filled 5"] and table.position == -2
    assert [o.leg for o in table.book.orders.values()] == ["reduce", "open"]


def test_flip_whose_first_leg_filled_in_part_reduces_on_before_it_opens():
    table = at("3")
    table.send("-2")
    table.act()
    table.fill(table.order().id, "1")
    table.answer("expire")
    table.now += REDUCE_WAIT_NS
    assert table.act() == ["reduce sell 2"]
    table.fill(table.order().id, "2")
    assert table.act() == ["open sell 2"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda t: setattr(t, "now", t.now + 5 * SECOND), "expired"),
        (lambda t: setattr(t, "now", t.now + 3 * SECOND), "denied signal_age"),
        (
            lambda t: (
                t.fill("", "0.1", "buy", cause="operator") or t.fill("", "0.1", "sell", cause="operator")
            ),
            "denied stale_position",
        ),
        (lambda t: setattr(t, "state", "LOCKED"), "denied locked"),
        (lambda t: setattr(t, "state", "HALTED"), "denied halted"),
        (lambda t: setattr(t, "prices", prices(t.now, bid=D(90))), "denied price_collar"),
        (lambda t: setattr(t, "entries", 10), "denied order_rate"),
    ],
)
def test_flip_whose_second_leg_came_too_late_stays_flat(change, expected):
    table = flipped()
    change(table)
    said = table.act()
    assert len(said) == 1 and said[0].startswith(expected)
    assert table.history[-1].filled_qty == -3


def test_flip_between_its_legs_waits_while_reconciling():
    table = flipped()
    table.state = "RECONCILING"
    assert table.act() == []
    table.state = "RUNNING"
    assert table.act() == ["open sell 2"]


def test_flip_with_a_newer_signal_between_its_legs_leaves_the_second_to_it():
    table = flipped()
    table.now += 1
    table.send("1")
    assert table.act() == ["done reduced to 0", "open buy 1"]


def test_flip_whose_second_leg_is_refused_is_done_with_the_first():
    table = flipped()
    table.act()
    table.answer("reject")
    assert table.act() == ["done filled 3"]


# One in flight, one slot, the newest wins.


def test_signal_behind_a_working_order_waits_and_the_newest_of_many_wins(table):
    first = table.send("2")
    table.act()
    waiting = []
    for target in ("3", "4", "5"):
        table.now += 1
        waiting.append(table.send(target))
        table.act()
    assert [table.outcomes.get(n) for n in (first, *waiting)] == [None, "superseded", "superseded", None]
    table.fill(table.order().id, "2")
    assert table.act() == ["done filled 2", "open buy 3"]


def test_signal_with_an_order_is_never_superseded(table):
    first = table.send("2")
    table.act()
    for event in (None, "lose", "lose"):
        if event:
            table.answer(event)
        table.now += 1
        table.send("0")
        table.act()
    assert first not in table.outcomes
    table.answer("absent")
    table.act()
    assert table.outcomes[first] == "absent"


def test_signals_that_came_together_lead_to_one_order_of_the_newest(table):
    names = [table.send(target, seq=seq) for target, seq in (("3", 5), ("4", 7), ("5", 6))]
    assert table.act()[-1] == "open buy 4"
    assert [table.outcomes.get(n) for n in names] == ["superseded", None, "superseded"]


@pytest.mark.parametrize("older", [{"seq": 4}, {"run": 6, "created_ns": NOW - 1}])
def test_older_signal_that_comes_after_a_newer_one_is_superseded(table, older):
    table.send("0", seq=5)  # done at once: the position is there
    assert table.act() == ["done the position is already there"]
    table.send("2", **older)
    assert table.first_word() == "superseded"


@pytest.mark.parametrize(("back_s", "passed_s"), [(0.5, 0.2), (60, 59.9), (60, 0.2)])
@pytest.mark.parametrize("waits", [False, True])
def test_exit_after_this_hosts_clock_stepped_back_is_no_older_signal(back_s, passed_s, waits):
    table = at("2")
    table.send("2", stop_loss=D(90))
    if not waits:
        table.act()
    table.now += int((passed_s - back_s) * SECOND)
    table.send("0")
    assert table.act()[-1] == "reduce sell 2"


@pytest.mark.parametrize(("older", "newer"), [((7, 1), (7, 2)), ((7, 9), (8, 1))])
def test_signals_of_one_moment_are_sorted_by_run_and_seq(table, older, newer):
    for run, seq in (newer, older):
        table.send("1", run=run, seq=seq)
    assert table.first_word() == "superseded" and table.outcomes == {
        f"levels/{older[0]}/{older[1]}": "superseded"
    }


def test_reduction_in_back_off_gives_way_to_a_newer_signal():
    table = at("3")
    first = table.send("1")
    table.act()
    table.fill(table.order().id, "1")
    table.answer("expire")
    table.now += 1
    table.send("3")
    assert table.act() == ["done filled 1", "open buy 1"]
    assert table.outcomes[first] == "done"


@pytest.mark.parametrize(
    ("end", "expected"), [("reject", "rejected"), ("not_sent", "absent"), ("expire", "rejected")]
)
def test_reduction_that_did_nothing_gives_way_and_says_so(end, expected):
    table = at("3")
    first = table.send("1")
    table.act()
    table.answer(end)
    table.now += 1
    table.send("0")
    assert table.act()[-1] == "reduce sell 3"
    assert table.outcomes[first] == expected


# Exits.


@pytest.mark.parametrize(
    ("stop", "take", "kind"),
    [
        ("95", None, MoveExits),
        ("90", "120", MoveExits),
        ("95", "110", MoveExits),
        ("90", "110", CloseSignal),
        (None, None, CloseSignal),
        (None, "110", MoveExits),
    ],
)
def test_same_target_moves_the_exits_only(stop, take, kind):
    table = at("2")
    table.exits(signal(stop_loss=D(90), take_profit=D(110)))
    table.send("2", stop_loss=stop and D(stop), take_profit=take and D(take))
    assert isinstance(table.step(), kind)
    assert table.first_word() == "done" and not table.book.orders


@pytest.mark.parametrize(
    ("held", "stop", "take", "passes"),
    [("2", "95", None, True), ("2", "85", None, False), ("2", "95", "120", False), ("2", None, "120", False),
     ("-2", "95", None, False), ("-2", "85", None, True)],
)
def test_exits_under_a_halt_only_move_closer(held, stop, take, passes):
    table = at(held)
    table.exits(signal(stop_loss=D(90), take_profit=None))
    table.state = "HALTED"
    table.send(held, stop_loss=stop and D(stop), take_profit=take and D(take),
               tick_price=100.0 if D(held) > 0 else 80.0)
    step = table.step()
    assert isinstance(step, MoveExits) if passes else step.reason.startswith("halted")


def test_same_target_of_nothing_has_no_exits_to_move(table):
    table.send("0", stop_loss=D(90))
    assert isinstance(table.step(), CloseSignal) and table.first_word() == "done"


# Denied, expired.


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"strategy": "other"}, "denied not_owner"),
        ({"position_version": 1}, "denied stale_position"),
        ({"created_ns": NOW - 3 * SECOND, "expires_ns": NOW + SECOND}, "denied signal_age"),
        ({"created_ns": NOW + 2 * SECOND, "expires_ns": NOW + 9 * SECOND}, "denied signal_age"),
        ({"tick_exchange_ns": NOW - 6 * SECOND}, "denied stale_tick"),
        ({"expires_ns": NOW}, "expired"),
        ({"expires_ns": 0}, "expired"),
        ({"target": "1.0005"}, "denied bad_quantity"),
        ({"target": "NaN"}, "denied bad_quantity"),
        ({"target": "sNaN"}, "denied bad_quantity"),
        ({"target": "1E+1000000"}, "denied bad_quantity"),
        ({"target": "-Infinity"}, "denied bad_quantity"),
        ({"stop_loss": D("sNaN")}, "denied bad_price"),
        ({"stop_loss": D("90.05")}, "denied bad_price"),
        ({"take_profit": D("0")}, "denied bad_price"),
        ({"stop_loss": D("101")}, "denied stop_side"),
        ({"tick_price": 0.0}, "denied bad_price"),
        ({"target": "11"}, "denied order_notional"),
        ({"target": "0.01"}, "denied too_small"),
    ],
)
def test_signal_with_something_wrong_gets_its_outcome_and_no_order(table, fields, expected):
    table.send(**fields)
    said = table.act()
    assert len(said) == 1 and said[0].startswith(expected)
    assert not table.book.orders and table.act() == []


@pytest.mark.parametrize("target", ["0", "1", "-2", "5"])
def test_signal_decided_on_an_older_position_is_denied_whatever_it_wants(target):
    table = at("3")
    table.fill("", "1", "sell", cause="stop")
    table.send(target, position_version=0)
    assert table.act()[0].startswith("denied stale_position")


def test_entry_with_the_request_limits_used_up_is_denied_and_a_reduction_is_not():
    table = Table("3")
    table.rate_refusal = "85% of 300 orders_10s is used"
    table.send("4")
    assert table.act() == ["denied rate_budget: 85% of 300 orders_10s is used"]
    table.send("1")
    assert table.act() == ["reduce sell 2"]


@pytest.mark.parametrize(
    "prices_",
    [
        prices(mark=D(0)),
        prices(mark=D("NaN")),
        prices(bid=D("sNaN")),
        prices(ask=None),
        prices(mark=None),
        prices(bid=D(101), ask=D(100)),
        prices(ask=D("Infinity")),
        prices(mark_ns=0),
        prices(ask=D(102)),
    ],
)
def test_entry_with_prices_that_are_no_ground_is_denied_and_a_reduction_is_not(prices_):
    table = at("1")
    table.prices = prices_
    table.send("2")
    assert table.first_word() == "denied"
    table.now += 1
    table.send("0")
    assert table.first_word() == "reduce"


def test_stranger_with_newer_signals_supersedes_nobody(table):
    stranger = table.send("5", strategy="other", created_ns=NOW + SECOND)
    future = table.send("6", created_ns=NOW + 60 * SECOND, expires_ns=NOW + 90 * SECOND)
    table.send("2", created_ns=NOW - 5)
    assert table.act()[-1] == "open buy 2"
    assert {stranger: "denied", future: "denied"} == table.outcomes
    table.fill(table.order().id, "2")
    table.act()
    table.now += 5
    table.send("0")
    assert table.act() == ["reduce sell 2"]


def test_stranger_is_denied_while_an_order_works(table):
    table.send("2")
    table.act()
    assert table.send("0", strategy="other") and table.first_word() == "denied"


@pytest.mark.parametrize("target", ["3", "NaN", "sNaN", "Infinity"])
def test_waiting_signal_expires_in_its_time_though_an_order_is_unknown(table, target):
    table.send("2")
    table.act()
    table.answer("lose")
    table.now += 1
    name = table.send(target)
    assert table.act() == []
    table.now += 5 * SECOND
    assert table.first_word() == "expired" and list(table.outcomes) == [name]


@pytest.mark.parametrize(
    ("target", "qty", "left"), [("0", "2", "0"), ("0.5", "1.5", "0.5"), ("-1", "2", "0")]
)
def test_exit_beside_an_unknown_entry_is_in_force_when_that_turns_out_filled(table, target, qty, left):
    table.send("2")
    table.act()
    entry = table.order().id
    table.answer("lose")
    table.now += 1
    name = table.send(target)
    assert table.act() == []
    table.now += 400 * SECOND
    assert table.act() == [] and not table.outcomes, "what wants less does not expire so soon"
    table.answer("accept")
    table.fill(entry, "2")
    table.books = Books.decode(table.books.encode())  # a restart needs no memory
    table.state = "RECONCILING"
    assert table.act() == []
    table.state = "LOCKED"
    assert table.act() == [f"reduce sell {qty}"] and table.book.target_qty == D(target)
    table.fill(table.order().id, qty)
    said = table.act()
    assert said[0] == "done filled 2" and table.position == D(left)
    assert table.outcomes[name] == ("expired" if target == "-1" else "done"), "it opens nothing that late"


def test_exit_beside_an_unknown_entry_that_is_absent_is_the_target_should_it_fill_after_all(table):
    table.send("2")
    table.act()
    table.answer("lose")
    table.now += 1
    name = table.send("0")
    table.now += 400 * SECOND
    table.act()
    table.answer("absent")
    assert [word.split()[0] for word in table.act()] == ["done", "absent"]
    assert table.book.target_qty == 0 and table.outcomes[name] == "done"


def test_smaller_target_beside_an_entry_that_ended_without_a_fill_opens_nothing_when_it_is_old(table):
    table.send("2")
    table.act()
    table.answer("lose")
    table.now += 1
    table.send("1")
    table.now += 400 * SECOND
    table.act()
    table.answer("reject")
    assert [word.split()[0] for word in table.act()] == ["rejected", "expired"]


def test_exit_beside_an_entry_found_filled_is_sent_again_when_its_own_outcome_is_unknown(table):
    table.send("2")
    table.act()
    entry = table.order().id
    table.answer("lose")
    table.now += 1
    table.send("0")
    table.act()
    table.fill(entry, "2")
    assert table.act() == ["reduce sell 2"]
    table.answer("lose")
    table.now += (FENCE_S + 1) * SECOND
    assert table.act() == ["reduce sell 2"]


def compared(table, there, *at_s):
    table.state = "LOCKED"
    table.record(SymbolLocked(symbol=BTC, cause="books_differ", evidence=""))
    for second in at_s:
        table.record(Reconciled(trigger="t", differences=(), positions={BTC: D(there)}, wallet_balance=D(0),
                                exchange_ns=NOW + second * SECOND))


@pytest.mark.parametrize(("there", "said"), [("-1", []), ("0", []), ("1", ["reduce sell 1"])])
def test_exit_of_a_position_that_a_person_closed_takes_what_is_there_and_is_not_lost(there, said):
    table = at("3")
    compared(table, there, 1, 6)
    table.send("0")
    assert table.act() == said
    if said:
        table.record(filled(table.order().id, "1", "sell", trade="x", exchange_ns=NOW + 7 * SECOND))
        table.now += 100 * SECOND
        assert table.act() == [], "in force, and the rest is not there"
        table.record(SymbolUnlocked(symbol=BTC, cause="books_differ", evidence="it had lagged"))
        assert table.act() == ["reduce sell 2"]
    else:
        table.now += 6 * SECOND
        assert table.first_word() == "expired", "not done: whoever wants it out says so again"


def test_exit_that_waits_for_a_position_leaves_as_soon_as_the_exchange_shows_it():
    table = at("3")
    compared(table, "0", 1, 6)
    table.send("0")
    assert table.act() == []
    table.record(SymbolUnlocked(symbol=BTC, cause="books_differ", evidence="both say 3"))
    assert table.act() == ["reduce sell 3"]


def test_exit_with_a_difference_that_one_answer_shows_takes_all_the_books_hold():
    table = at("3")
    compared(table, "0", 1, 2)
    table.send("0")
    assert table.act() == ["reduce sell 3"], "the answer may lag; reduce-only, it takes no more than is there"


def test_stop_of_a_position_that_a_person_closed_in_part_moves():
    table = at("3")
    compared(table, "1", 1, 6)
    table.send("3", stop_loss=D(90))
    assert table.act() == ["done moved"] and table.book.stop_loss == 90


def test_signal_with_reconciliation_under_way_waits_and_then_acts_or_expires():
    for wait, expected in ((SECOND, "open"), (5 * SECOND, "expired")):
        table = Table()
        table.state, table.instrument = "RECONCILING", None
        table.send("1")
        assert table.act() == []
        table.now += wait
        table.state, table.instrument = "RUNNING", instrument()
        assert table.first_word() == expected


def test_signal_for_a_symbol_that_is_not_listed_any_more_is_denied(table):
    table.state, table.instrument = "LOCKED", None
    table.send("1")
    assert table.act() == ["denied not_trading: BTC/USDT:USDT is not listed at the exchange"]


def test_owner_without_a_symbol_denies(table):
    table.owner = None
    table.send("1")
    assert table.act() == ["denied not_owner: BTC/USDT:USDT belongs to no strategy"]


ACTIONS = {"entry": ("1", "2"), "reduce": ("2", "1"), "flip": ("2", "-1"), "protect": ("1", "1")}
PASSES = {
    "entry": {"RUNNING"},
    "reduce": {"RUNNING", "REDUCING", "LOCKED"},
    "flip": {"RUNNING", "REDUCING", "LOCKED"},
    "protect": {"RUNNING", "REDUCING", "LOCKED", "HALTED"},
}


@pytest.mark.parametrize(("state", "action"), list(itertools.product(STATES, ACTIONS)))
def test_state_with_each_action_lets_pass_what_the_design_says(state, action):
    held, target = ACTIONS[action]
    table = at(held)
    table.state = state
    table.send(target, stop_loss=D(90) if D(target) > 0 else D(110))
    step = table.step()
    if state == "RECONCILING":
        assert step is None
    elif state in PASSES[action]:
        assert isinstance(step, MoveExits if action == "protect" else SendOrder)
        assert action != "flip" or step.leg == "reduce"
    else:
        assert isinstance(step, CloseSignal) and step.outcome == "denied"
        assert step.reason.startswith(state.lower())


@pytest.mark.parametrize(
    ("state", "expected"),
    [("HALTED", "denied"), ("RECONCILING", None), ("REDUCING", "reduce"), ("LOCKED", "reduce")],
)
def test_reduction_in_force_meets_the_state_of_its_next_try(state, expected):
    table = at("3")
    table.send("0")
    table.act()
    table.answer("expire")
    table.now += SECOND
    table.state = state
    assert table.first_word() == expected


def test_step_with_the_same_books_and_moment_is_the_same_after_any_restart():
    table = at("3")
    table.send("-2", stop_loss=D(110))
    for _ in range(3):
        before, table.books = table.step(), Books.decode(table.books.encode())
        assert table.step() == before
        if before is not None:
            table.perform(before)


class Play(RuleBasedStateMachine):
    """Signals, answers, losses, late fills, stops, restarts and states in any sequence."""

    def __init__(self):
        super().__init__()
        self.table = Table()
        self.table.limits = limits(orders_per_minute_max=1_200)
        self.acted, self.sent, self.late, self.compared = [D(0)], [], D(0), 1

    @initialize(held=st.sampled_from(["2", "-3", "0"]))
    def begin(self, held):
        if D(held):
            self.table.fill("", held.strip("-"), "sell" if held[0] == "-" else "buy")
            self.acted.append(D(held))

    def act(self):
        """Do what follows, and hold every step against the promises."""
        table = self.table
        while (step := table.step()) is not None:
            if isinstance(step, SendOrder):
                self.check_order(step)
            table.perform(step)

    def check_order(self, step):
        table, held, target = self.table, self.table.position, step.signal.signal.target_qty
        assert step.signal.id not in table.outcomes
        # A reduction may pass an entry nobody knows the end of, and an exit to zero one of its own kind that
        # cannot arrive any more; nothing else passes anything.
        there = abs(as_held(table.book).position_qty)
        is_exit = step.qty == there
        assert all(o.state == "UNKNOWN" and step.leg == "reduce" and (
            o.leg == "open" or (is_exit and o.leg == "reduce" and self.is_fenced(o, table.now)))
            for o in table.book.working())
        assert all(
            not is_newer(s.age_name, step.signal.age_name) or s.signal.strategy != "levels" or s.orders
            for s in table.book.signals
        )
        assert step.signal.signal.strategy == "levels" and step.qty > 0 and target.is_finite()
        signed = step.qty if step.side == "buy" else -step.qty
        if step.leg == "open":
            assert not any(table.book.orders[n].leg == "open" for n in step.signal.orders)  # acts once
            assert table.state == "RUNNING" and held * target >= 0 and held + signed == target
            assert abs(target) > abs(held) and table.now < step.signal.signal.expires_ns
            assert step.signal.signal.position_version == table.book.version
        else:
            assert table.state in PASSES["reduce"] and held * signed < 0 and step.qty <= there <= abs(held)
            assert abs(held + signed) >= (abs(target) if held * target > 0 else 0)
        if not step.signal.orders:
            assert step.signal.signal.position_version == table.book.version
            is_late = table.now >= step.signal.signal.expires_ns
            assert not is_late or (step.leg == "reduce" and self.is_beside_entry())
        self.acted.append(target)

    def is_beside_entry(self):
        book = self.table.book
        return any(s.orders and book.orders[s.orders[-1]].leg == "open" for s in book.signals)

    def is_fenced(self, order, now_ns):
        return now_ns - order.intended_ns > FENCE_S * SECOND

    @rule(
        wanted=st.sampled_from(["0", "1", "-1", "3", "-2", "2.5", "0.0005", "99"]),
        age=st.integers(0, 3),
        back=st.sampled_from([0, 0, 0, 1]),
        strategy=st.sampled_from(["levels"] * 5 + ["other"]),
        stop=st.booleans(),
        acts=st.booleans(),
    )
    def send(self, wanted, age, back, strategy, stop, acts):
        self.signal(wanted, age, back, strategy, stop, acts)

    def signal(self, wanted, age, back, strategy, stop, acts):
        stops = {1: D(90), -1: D(110), 0: None}[(D(wanted) > 0) - (D(wanted) < 0)]
        table = self.table
        self.sent.append(
            table.send(
                wanted,
                strategy=strategy,
                created_ns=table.now - age * SECOND // 2,
                stop_loss=stops if stop else None,
                position_version=max(0, table.book.version - back),
                expires_ns=table.now + 2 * SECOND,
            )
        )
        if acts:
            self.act()

    def pick(self, number, states=None):
        orders = [o for o in self.table.book.orders.values() if states is None or o.state in states]
        return orders[number % len(orders)] if orders else None

    @rule(
        number=st.integers(0, 5),
        event=st.sampled_from(["accept", "reject", "lose", "not_sent", "expire", "absent", "cancel"]),
    )
    def answer(self, number, event):
        order = self.pick(number, IN_FLIGHT | {"ACCEPTED", "PARTIALLY_FILLED"})
        if order is not None:
            try:
                self.table.record(changed(order.id, event))
            except IllegalTransition:
                return
        self.act()

    @precondition(lambda self: self.table.book.working())
    @rule(part=st.sampled_from([1, 1, 2]))
    def fill(self, part):
        self.book_fill(self.table.order(), part)

    @rule(number=st.integers(0, 9), part=st.sampled_from([1, 3]))
    def fill_late(self, number, part):
        order = self.pick(number)
        if order is not None:
            self.book_fill(order, part)

    def book_fill(self, order, part):
        held = self.table.position
        qty = ((order.request.qty - order.filled_qty) / part).quantize(D("0.001"))
        if order.leg == "reduce":  # the exchange keeps a reduce-only order from crossing zero
            qty = min(qty, abs(held)) if (held > 0) == (order.request.side == "sell") else D(0)
        if qty <= 0:
            return
        if order not in self.table.book.working():
            self.late += qty
        self.table.fill(order.id, str(qty))
        self.act()

    @precondition(lambda self: self.table.position and not self.table.book.working())
    @rule(stops=st.booleans(), quick=st.booleans())
    def flip(self, stops, quick):
        held = self.table.position
        self.signal(str(1 if held < 0 else -1), 0, 0, "levels", False, True)
        if stops and self.table.book.working():
            self.table.answer("expire")
            self.stop()
        elif quick and self.table.book.working():
            self.book_fill(self.table.order(), 1)

    @precondition(lambda self: self.table.position)
    @rule()
    def stop_fills(self):
        self.stop()

    def stop(self):
        held = self.table.position
        self.table.fill("", str(abs(held)), "sell" if held > 0 else "buy", cause="stop")
        self.act()

    @rule(tenths=st.integers(1, 30))
    def wait(self, tenths):
        self.table.now += tenths * SECOND // 10
        self.act()

    @rule(state=st.sampled_from(STATES), fresh=st.booleans())
    def change_state(self, state, fresh):
        self.table.state, self.table.prices = state, None if fresh else prices(0)
        self.act()

    @rule(there=st.sampled_from(["0", "1", "-1", "2"]), span_s=st.sampled_from([1, 6]))
    def comparisons_differ(self, there, span_s):
        self.compared += span_s
        compared(self.table, there, self.compared, self.compared + span_s)
        self.act()

    @rule()
    def comparison_agrees(self):
        self.table.record(SymbolUnlocked(symbol=BTC, cause="books_differ", evidence=""))
        self.act()

    @rule()
    def restart(self):
        again = Books()
        for event in self.table.history:
            again.apply(event)
        assert again.encode() == self.table.books.encode()
        self.table.books = Books.decode(again.encode())
        for order in self.table.book.live_orders():
            if order.state == "INTENDED":
                self.table.record(changed(order.id, "lose"))
        self.act()

    @invariant()
    def at_most_one_order_moves_the_position(self):
        working = [o for o in self.table.book.working() if o.state != "UNKNOWN" or o.leg != "open"]
        revived = sum(o.filled_qty > 0 or o.executed_qty > 0 for o in working)  # absent, and then it filled
        newest_ns = max((o.intended_ns for o in working), default=0)
        again = sum(o.leg == "reduce" and self.is_fenced(o, newest_ns) for o in working)
        assert len(working) <= 1 + revived + again

    @invariant()
    def position_is_never_beyond_what_a_target_asked_for(self):
        assert min(self.acted) - self.late <= self.table.position <= max(self.acted) + self.late

    @invariant()
    def every_signal_is_open_or_has_its_outcome(self):
        open_now = {s.id for s in self.table.book.signals}
        assert open_now.isdisjoint(self.table.outcomes)
        assert open_now | set(self.table.outcomes) == set(self.sent)

    def teardown(self):
        table = self.table
        self.comparison_agrees()
        table.state, table.prices = "RUNNING", None
        for _ in range(40):  # faults stop: what is asked is answered
            for order in table.book.working():
                if order.state == "INTENDED":
                    table.record(changed(order.id, "accept"))
                elif order.state == "UNKNOWN":
                    table.record(changed(order.id, "absent"))
                elif order.leg == "open" or table.position == 0:
                    table.record(changed(order.id, "expire"))
                else:
                    held = table.position
                    qty = min(order.request.qty - order.filled_qty, abs(held))
                    if (held > 0) == (order.request.side == "sell"):
                        table.fill(order.id, str(qty))
                    if order in table.book.working():
                        table.record(changed(order.id, "expire"))
            table.now += 20 * SECOND
            self.act()
        assert not table.book.signals and set(table.outcomes) == set(self.sent)


TestPlay = Play.TestCase
TestPlay.settings = settings(
    max_examples=300, stateful_step_count=50, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_table_refuses_a_second_order_so_that_the_play_is_honest():
    table = at("3")
    table.send("0")
    table.act()
    with pytest.raises(InvariantError):
        table.record(intended("x", leg="reduce", signal="levels/7/2"))
