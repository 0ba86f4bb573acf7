"""The protector over real books, with time moved by hand and refusals."""

import io
import itertools

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bot.bookkeeper import Bookkeeper
from bot.books import LAG_NS, Books
from bot.config import ExecutorConfig
from bot.errors import IllegalTransition
from bot.events import ExitsSet, Reconciled, Restored, SymbolLocked
from bot.log import Log
from bot.orders import CLOSED, IN_FLIGHT, OrderRequest
from bot.protection import is_protected
from bot.protector import RETRY_WAIT_NS, SETTLE_S_MAX, Protector
from tests.factory import BTC, ETH, SECOND, D, HandClock, changed, filled, intended, received, signal

BUDGET_S, FENCE_S = 10, 4


class NoJournal:
    """Keeps nothing: the protector's own rules are looked at here."""

    def append(self, event):
        pass

    def commit(self):
        pass


class Bench:
    def __init__(self):
        self.clock, self.count, self.out, self.budget_s = HandClock(), 0, io.StringIO(), BUDGET_S
        self.books = Books()
        self.keeper = Bookkeeper(NoJournal(), self.books, self.clock, lambda report: None,
                                 lambda who, why: None)
        self.restart()

    def restart(self):
        log = Log("executor", self.clock, stream=self.out)
        self.protector = Protector(
            ExecutorConfig(unprotected_s_max=self.budget_s),
            self.clock,
            log,
            keeper=self.keeper,
            intend=self.intend,
            fence_ns=FENCE_S * SECOND,
        )

    @property
    def book(self):
        return self.books.book(BTC)

    def intend(self, symbol, leg, side, qty, *, reduce_only, signal, checks, trigger_price=None):
        assert reduce_only  # whatever protects can only make a position smaller
        self.count += 1
        request = OrderRequest(
            client_order_id=f"{leg[0]}{self.count}",
            symbol=symbol,
            side=side,
            qty=qty,
            reduce_only=True,
            trigger_price=trigger_price,
            type=leg if leg in ("stop", "take_profit") else "market",
        )
        return self.keeper.intend(request, strategy="levels", signal=signal, leg=leg, checks=checks)

    def fill(self, qty, side="buy", name="", cause="signal", at_ns=None):
        self.count += 1
        at_ns = self.clock.wall if at_ns is None else at_ns
        self.keeper.record(filled(name, qty, side, trade=f"t{self.count}", cause=cause, exchange_ns=at_ns))

    def plan(self, stop="90", take=None, name="levels/7/1"):
        self.keeper.record(
            ExitsSet(symbol=BTC, signal=name, stop_loss=stop and D(stop), take_profit=take and D(take))
        )

    def enter(self, qty="10", side="buy", **plan):
        self.plan(**plan)
        self.fill(qty, side)

    def want(self, target):
        """Let a signal say where the position should be."""
        self.keeper.record(received(signal(target)))
        self.keeper.close_signal("levels/7/1", BTC, "done", "the position is already there", D(0))

    def differ(self, there):
        """Let comparisons find this position at the exchange, signed, and again past what an answer lags."""
        self.keeper.lock(BTC, "books_differ", f"exchange {there}, ours {self.book.position_qty}")
        self.compare(there)
        self.clock.step(LAG_NS / SECOND)
        self.compare(there)
        self.clock.step(0.1)

    def compare(self, there):
        self.keeper.record(
            Reconciled(
                trigger="t",
                differences=(),
                positions={BTC: D(there)},
                wallet_balance=D(0),
                exchange_ns=self.clock.wall,
            )
        )

    def act(self, state="RUNNING", *, is_read=True):
        """Return what is to be sent and canceled now, in words."""
        placed, canceled = self.protector.act(BTC, state, is_read=is_read)
        return [
            f"{o.leg} {o.request.side} {o.request.qty} {o.request.trigger_price or ''}".strip()
            for o in placed
        ], [o.id for o in canceled]

    def answer(self, event, *, code=0, leg=None):
        """Let the exchange answer everything in flight."""
        for order in list(self.book.orders.values()):
            if order.state in IN_FLIGHT and leg in (None, order.leg):
                self.keeper.change(order, event, code=code)

    def protect(self):
        assert self.act() == (["stop sell 10 90"], [])
        self.answer("accept")
        assert self.act() == ([], [])


@pytest.fixture
def bench():
    return Bench()


def test_entry_with_a_stop_is_protected_at_once_with_one_of_full_size(bench):
    bench.enter()
    assert bench.act() == (["stop sell 10 90"], [])
    assert bench.protector.unprotected_s(BTC) == 0.0
    bench.clock.step(0.5)
    assert bench.act() == ([], []) and bench.protector.unprotected_s(BTC) == 0.5
    bench.answer("accept")
    assert bench.act() == ([], []) and bench.protector.unprotected_s(BTC) == 0.0
    stop = next(iter(bench.book.orders.values()))
    assert stop.request.reduce_only and stop.signal == "levels/7/1"


def test_late_fill_beyond_the_target_is_closed_once_and_told(bench):
    bench.enter()
    bench.want("4")
    bench.keeper.record(SymbolLocked(symbol=BTC, cause="late_fill", evidence="o1 was ABSENT"))
    assert bench.act("LOCKED") == (["close sell 6"], [])
    assert "late_fill_closed" in bench.out.getvalue() and "o1 was ABSENT" in bench.out.getvalue()
    assert bench.act("LOCKED") == ([], [])
    bench.fill("6", "sell", name="c2", cause="close")
    assert bench.act("LOCKED") == (["stop sell 4 90"], [])


def test_seconds_without_a_stop_go_on_through_restarts_and_end_with_the_stop(bench):
    bench.enter()
    bench.act()
    bench.answer("lose")
    for _ in range(int(BUDGET_S) + 1):  # an executor that dies again and again
        assert bench.act()[0] in ([], ["stop sell 10 90"])
        bench.answer("lose")
        bench.clock.step(1)
        bench.restart()
        assert bench.protector.unprotected_s(BTC) >= 1, "what health is told before anything is compared"
    assert bench.act() == (["close sell 10"], [])
    bench.fill("10", "sell", cause="close")
    bench.act()
    assert bench.book.unprotected_ns == 0
    bench.enter()
    bench.restart()
    bench.clock.step(3_600)
    bench.act()
    assert bench.protector.unprotected_s(BTC) == 0, "nobody saw it before"


def test_entry_of_which_next_to_nothing_filled_gets_its_stop_and_is_closed_like_any_other(bench):
    # Below every minimum of an entry: what is reduce-only has none, so that nothing is left over.
    bench.enter("0.001")
    assert bench.act() == (["stop sell 0.001 90"], [])
    bench.answer("reject", code=-1111)
    bench.clock.step(BUDGET_S + 0.1)
    assert bench.act() == (["close sell 0.001"], [])
    close = list(bench.book.orders.values())[-1]
    assert close.request.reduce_only
    bench.fill("0.001", "sell", close.id, cause="close")
    assert bench.act() == ([], []) and bench.book.position_qty == 0 == bench.protector.unprotected_s(BTC)


@pytest.mark.parametrize("there", ["0", "-4"])
def test_position_that_a_person_closed_at_the_exchange_is_neither_protected_nor_closed(bench, there):
    bench.enter()
    bench.protect()
    bench.differ(there)
    assert bench.act("LOCKED") == ([], []), "an answer that lags takes no stop away"
    bench.keeper.change(bench.book.orders["s2"], "expire")
    for _ in range(4 * 60):
        bench.clock.step(0.25)
        assert bench.act("LOCKED") == ([], []) and bench.protector.unprotected_s(BTC) == 0
    bench.keeper.unlock(BTC, "books_differ", "both say 10")  # or it had lagged
    assert bench.act() == (["stop sell 10 90"], [])


def test_position_that_a_person_closed_in_part_is_protected_and_closed_as_far_as_it_is_there(bench):
    bench.enter()
    bench.differ("4")
    assert bench.act("LOCKED") == (["stop sell 4 90"], [])
    bench.answer("reject", code=-2021)
    assert bench.act("LOCKED") == (["close sell 4"], [])
    bench.fill("4", "sell", name="c3", cause="close")
    bench.clock.step(60)
    assert bench.act("LOCKED") == ([], []), "6 of ours are not there"


def test_exits_of_a_position_that_a_person_closed_in_part_stay_and_move(bench):
    bench.enter(take="110")
    bench.act()
    bench.answer("accept")
    bench.differ("4")
    assert bench.act("LOCKED") == ([], [])
    bench.plan("95", take="120", name="levels/7/2")
    assert bench.act("LOCKED") == (["stop sell 4 95"], ["t3"])
    bench.answer("accept")
    bench.keeper.change(bench.book.orders["t3"], "cancel")
    assert bench.act("LOCKED") == (["take_profit sell 4 120"], ["s2"])
    bench.answer("accept")
    bench.keeper.change(bench.book.orders["s2"], "cancel")
    assert bench.act("LOCKED") == ([], [])
    bench.keeper.unlock(BTC, "books_differ", "both say 10")
    assert bench.act() == (["stop sell 10 95"], ["t5"])


def trigger(bench, name, executed="0"):
    bench.keeper.record(changed(name, "accept", triggered_id="77", executed_qty=D(executed)))


@pytest.mark.parametrize("executed", ["0", "10"])
def test_stop_that_was_triggered_is_waited_for_and_then_has_another_and_a_close_behind_it(bench, executed):
    bench.enter()
    bench.protect()
    trigger(bench, "s2", executed)
    assert bench.act() == ([], [])
    bench.clock.step(SETTLE_S_MAX)
    assert bench.act() == ([], []), "its fill is a moment away"
    bench.clock.step(0.25)
    assert bench.act() == (["stop sell 10 90"], [])
    bench.answer("reject", code=-2021)
    assert bench.act() == (["close sell 10"], [])
    bench.fill("10", "sell", "s2", cause="stop")  # after all
    bench.answer("reject", code=-2022)
    bench.clock.step(60)
    assert bench.act() == ([], []) and bench.book.position_qty == 0


def test_stop_whose_fill_was_never_booked_protects_no_other_position(bench):
    bench.enter()
    bench.protect()
    trigger(bench, "s2", "10")
    bench.fill("10", "sell", cause="operator")  # adopted
    assert bench.act() == ([], [])
    bench.clock.step(60)
    bench.enter(name="levels/7/2")
    assert bench.act() == (["stop sell 10 90"], [])


def test_exit_whose_fill_was_never_booked_does_not_keep_the_others_from_moving(bench):
    bench.enter(take="110")
    bench.act()
    bench.answer("accept", leg="stop")
    take = next(o.id for o in bench.book.orders.values() if o.leg == "take_profit")
    bench.keeper.change(bench.book.orders[take], "accept")
    trigger(bench, take, "10")
    bench.act()
    bench.clock.step(60)
    bench.plan("95", take="110", name="levels/7/9")
    assert "stop sell 10 95" in bench.act()[0]


def test_position_that_one_answer_does_not_show_yet_gets_its_stop(bench):
    bench.enter()
    bench.keeper.lock(BTC, "books_differ", "exchange 0, ours 10")
    bench.compare("0")
    assert bench.act("LOCKED") == (["stop sell 10 90"], []), "the answer may lag behind the fill"
    bench.clock.step(1)
    bench.compare("0")
    bench.act("LOCKED")
    assert bench.protector.unprotected_s(BTC) == 1


def test_fill_that_the_comparison_saw_and_the_books_did_not_is_not_missing_twice(bench):
    bench.enter()
    bench.protect()
    bench.differ("4")  # its stop filled 6 there, and the list of trades lags
    bench.fill("6", "sell", "s2", cause="stop", at_ns=bench.clock.wall - SECOND * 6)
    bench.keeper.change(bench.book.orders["s2"], "expire")
    assert bench.act("LOCKED") == (["stop sell 4 90"], [])
    bench.fill("4", "sell")
    bench.compare("0")
    assert bench.act("LOCKED") == ([], []), "and what is sold after it is gone"


def test_entry_that_fills_late_beside_a_position_that_a_person_closed_is_protected(bench):
    bench.enter()
    bench.differ("0")
    bench.fill("2")
    assert bench.act("LOCKED") == (["stop sell 2 90"], [])


def test_position_that_a_person_made_larger_is_protected_as_far_as_it_is_ours(bench):
    bench.enter()
    bench.differ("14")
    assert bench.act("LOCKED") == (["stop sell 10 90"], [])


def test_entry_without_a_stop_needs_none(bench):
    bench.enter(stop=None)
    bench.clock.step(60)
    assert bench.act() == ([], []) and bench.protector.unprotected_s(BTC) == 0.0


def test_short_position_is_protected_on_the_other_side(bench):
    bench.enter("3", "sell", stop="110", take="90")
    assert bench.act() == (["stop buy 3 110", "take_profit buy 3 90"], [])


def test_position_that_shrank_gets_its_new_stop_first_and_then_loses_the_old_one(bench):
    bench.enter()
    bench.protect()
    bench.fill("4", "sell")
    assert bench.act() == (["stop sell 6 90"], [])
    assert bench.act() == ([], [])
    bench.answer("accept")
    assert bench.act() == ([], ["s2"])
    assert bench.book.orders["s2"].state == "PENDING_CANCEL"


def test_take_profit_that_filled_ends_the_stop_too(bench):
    bench.enter(take="110")
    assert bench.act() == (["stop sell 10 90", "take_profit sell 10 110"], [])
    bench.answer("accept")
    bench.fill("10", "sell", name="t3", cause="take_profit")
    assert bench.act() == ([], ["s2"])


def test_cancel_without_an_answer_is_sent_again_after_a_while_and_not_before(bench):
    bench.enter()
    bench.protect()
    bench.fill("10", "sell")
    assert bench.act() == ([], ["s2"])
    bench.clock.step(0.9)
    assert bench.act() == ([], [])
    bench.clock.step(0.1)
    assert bench.act() == ([], ["s2"])  # its answer was lost
    bench.keeper.change(bench.book.orders["s2"], "refuse_cancel")
    assert bench.act() == ([], [])  # refused: not at once either
    bench.clock.step(1)
    assert bench.act() == ([], ["s2"])
    bench.keeper.change(bench.book.orders["s2"], "cancel")
    bench.clock.step(5)
    assert bench.act() == ([], [])


def test_cancel_with_a_restart_before_it_left_is_sent_by_the_next_run(bench):
    bench.enter()
    bench.protect()
    bench.fill("10", "sell")
    assert bench.act() == ([], ["s2"])
    bench.restart()
    assert bench.act() == ([], ["s2"])


def test_stop_lost_before_its_first_byte_is_placed_again_behind_the_fence_and_nothing_is_closed(bench):
    bench.enter()
    bench.act()
    bench.answer("lose")  # the executor was killed behind the commit
    bench.restart()
    bench.clock.step(FENCE_S)
    assert bench.act("LOCKED") == ([], []), "it might still arrive"
    bench.clock.step(0.1)
    assert bench.act("LOCKED") == (["stop sell 10 90"], [])
    assert bench.act("LOCKED") == ([], [])
    bench.keeper.change(bench.book.orders["s3"], "accept")
    for _ in range(300):
        bench.clock.step(1)
        assert bench.act("LOCKED") == ([], []), "protected: the lost one may stay unknown"
    bench.keeper.change(bench.book.orders["s2"], "accept")  # it had arrived after all
    assert bench.act() == ([], ["s2"])
    bench.keeper.change(bench.book.orders["s2"], "cancel")
    assert bench.act() == ([], []) and [o.id for o in bench.book.live_orders()] == ["s3"]


def test_budget_shorter_than_the_fence_closes_what_lost_its_stop_and_places_no_other(bench):
    bench.budget_s = FENCE_S - 2
    bench.restart()
    bench.enter()
    bench.act()
    bench.answer("lose")
    bench.clock.step(bench.budget_s)
    assert bench.act("LOCKED") == ([], [])
    bench.clock.step(0.1)
    assert bench.act("LOCKED") == (["close sell 10"], [])
    bench.fill("10", "sell", name=bench.book.working()[-1].id, cause="close")
    bench.keeper.change(bench.book.unknown()[0], "accept")  # it arrives after all
    assert bench.act("LOCKED")[1] == ["s2"]


def test_resized_stop_whose_outcome_is_unknown_is_placed_again_beside_the_old_one(bench):
    bench.enter()
    bench.protect()
    bench.fill("5")
    assert bench.act()[0] == ["stop sell 15 90"]
    bench.answer("lose")
    bench.clock.step(FENCE_S + 0.1)
    assert bench.act("LOCKED") == (["stop sell 15 90"], [])
    bench.answer("accept")
    assert bench.act() == ([], ["s2", "s4"]), "the newest stays"


def test_stops_whose_outcome_stays_unknown_are_tried_seldom_and_past_the_budget_the_position_is_closed(bench):
    bench.enter()
    tries = {"stop": [], "close": []}
    for _ in range(4 * 120):
        for text in bench.act("LOCKED")[0]:
            tries[text.split()[0]].append(bench.clock.mono / 1e9)
        bench.answer("lose")
        bench.clock.step(0.25)
    first = tries["stop"][0]
    assert [round(at - first) for at in tries["stop"]][:2] == [0, 4] and 5 <= len(tries["stop"]) <= 7
    assert BUDGET_S < tries["close"][0] - first <= BUDGET_S + 1
    assert "position_unprotected" in bench.out.getvalue()
    bench.fill("10", "sell", cause="close")
    bench.answer("accept", leg="stop")
    assert len(bench.act("LOCKED")[1]) == len(tries["stop"])  # found after all: nothing is left to protect


def test_stop_that_is_refused_is_tried_again_with_back_off_and_then_the_position_is_closed(bench):
    bench.enter()
    start, tries = bench.clock.wall, []
    while not any(o.leg == "close" for o in bench.book.orders.values()):
        for text in bench.act()[0]:
            tries.append((text, (bench.clock.wall - start) // SECOND))
        bench.answer("reject", code=-2019, leg="stop")
        bench.clock.step(0.25)
        assert len(tries) < 20
    stop, close = "stop sell 10 90", "close sell 10"
    assert tries == [(stop, 0), (stop, 1), (stop, 3), (stop, 7), (close, BUDGET_S)]


@pytest.mark.parametrize("end", ["expire", "cancel"])
def test_stop_that_the_exchange_ends_at_once_is_not_placed_in_a_loop(bench, end):
    bench.enter()
    bench.act()
    bench.answer("accept")
    bench.keeper.change(bench.book.orders["s2"], end)
    assert bench.act() == ([], [])
    bench.clock.step(1)
    assert bench.act() == (["stop sell 10 90"], [])


def test_stop_that_never_left_is_tried_again(bench):
    bench.enter()
    bench.act()
    bench.answer("not_sent")
    assert bench.act() == ([], [])
    bench.clock.step(1)
    assert bench.act() == (["stop sell 10 90"], [])


def test_stop_that_would_trigger_at_once_closes_the_position_at_once(bench):
    bench.enter()
    bench.act()
    bench.answer("reject", code=-2021)
    assert bench.act() == (["close sell 10"], [])


def test_stop_moved_to_a_price_already_passed_closes_the_position_at_once(bench):
    bench.enter()
    bench.protect()
    bench.plan("99", name="levels/7/2")
    assert bench.act() == (["stop sell 10 99"], [])
    bench.answer("reject", code=-2021, leg="stop")
    assert bench.act() == (["close sell 10"], [])


def test_next_position_after_a_stop_that_was_passed_lives(bench):
    bench.enter()
    bench.act()
    bench.answer("reject", code=-2021)
    bench.act()
    bench.fill("10", "sell", name="c3", cause="close")
    assert bench.act() == ([], [])
    bench.clock.step(30)
    bench.enter(name="levels/7/2")  # the same price again
    assert bench.act() == (["stop sell 10 90"], [])


def test_stop_of_a_new_position_does_not_wait_for_the_back_off_of_the_last(bench):
    bench.enter()
    for _ in range(4):
        bench.act()
        bench.answer("reject", code=-2019)
        bench.clock.step(9)
    bench.fill("10", "sell")
    bench.act()
    bench.enter(name="levels/7/2")
    assert bench.act() == (["stop sell 10 90"], [])


def test_close_that_is_refused_is_tried_again_with_back_off(bench):
    bench.enter()
    bench.act()
    bench.answer("reject", code=-2021)
    start, tries = bench.clock.wall, []
    for _ in range(64):
        if bench.act()[0] == ["close sell 10"]:
            tries.append((bench.clock.wall - start) / SECOND)
        bench.answer("reject", code=-1003, leg="close")
        bench.answer("reject", code=-2021, leg="stop")  # between the closes the stop is tried again
        bench.clock.step(0.25)
    assert tries == [0, 1, 3, 7, 15]


def test_exit_that_never_left_is_tried_again_each_second_however_long_the_link_was_down(bench):
    bench.enter()
    start, tries = bench.clock.wall, []
    for _ in range(4 * 70):
        if bench.act()[0]:
            tries.append((bench.clock.wall - start) / SECOND)
        bench.answer("not_sent")
        bench.clock.step(0.25)
    assert max(b - a for a, b in itertools.pairwise(tries)) <= 1.25 and tries[-1] > 68


def test_close_of_the_next_position_does_not_wait_for_the_back_off_of_the_last(bench):
    bench.enter()
    for _ in range(9):
        bench.act()
        bench.answer("reject", code=-2021)
        bench.clock.step(64)
    bench.fill("10", "sell", cause="operator")
    bench.act()
    bench.enter(name="levels/7/2")
    bench.act()
    bench.answer("reject", code=-2021)
    assert bench.act()[0] == ["close sell 10"]
    bench.answer("reject", code=-2021)
    bench.clock.step(1)
    assert "close sell 10" in bench.act()[0]


def test_close_of_an_excess_whose_outcome_is_unknown_is_not_repeated(bench):
    bench.enter()
    bench.protect()
    bench.want("4")
    bench.keeper.lock(BTC, "late_fill", "o1 was ABSENT and filled")
    assert bench.act()[0] == ["close sell 6"]
    bench.answer("lose", leg="close")
    bench.clock.step(60)
    assert "close sell 6" not in bench.act()[0], "both could be executed"


def test_close_of_an_excess_whose_answer_hangs_is_not_repeated(bench):
    bench.enter()
    bench.protect()
    bench.want("4")
    bench.keeper.lock(BTC, "late_fill", "o1 was ABSENT and filled")
    assert bench.act("LOCKED") == (["close sell 6"], [])
    for _ in range(4 * 20):
        bench.clock.step(0.25)
        assert not any("close" in text for text in bench.act("LOCKED")[0])
    bench.answer("reject", code=-2019, leg="close")
    assert bench.act("LOCKED")[0] == ["close sell 6"]


def test_excess_beside_a_reduction_whose_outcome_is_unknown_is_not_closed(bench):
    bench.enter()
    bench.protect()
    bench.want("4")
    bench.keeper.lock(BTC, "late_fill", "o1 was ABSENT and filled")
    bench.keeper.record(received(signal("4", seq=2)))
    bench.keeper.record(intended("r9", "6", "sell", leg="reduce", signal="levels/7/2"))
    bench.keeper.change(bench.book.orders["r9"], "lose")
    assert bench.act("LOCKED") == ([], []), "both could be executed"
    bench.keeper.change(bench.book.orders["r9"], "reject")
    assert bench.act("LOCKED") == (["close sell 6"], [])


def test_position_with_an_excess_that_has_no_stop_in_time_is_closed_beside_an_unknown_reduction(bench):
    bench.enter()
    bench.want("4")
    bench.keeper.lock(BTC, "late_fill", "o1 was ABSENT and filled")
    bench.keeper.record(received(signal("4", seq=2)))
    bench.keeper.record(intended("r9", "6", "sell", leg="reduce", signal="levels/7/2"))
    bench.keeper.change(bench.book.orders["r9"], "lose", code=-1007)
    bench.act("LOCKED")
    bench.answer("reject", code=-2021, leg="stop")  # the price has passed it
    assert bench.act("LOCKED")[0] == ["close sell 10"]


def test_close_whose_outcome_is_unknown_is_tried_again_reduce_only(bench):
    bench.enter()
    bench.act()
    bench.answer("reject", code=-2021)
    assert bench.act() == (["close sell 10"], [])
    bench.answer("lose")
    assert bench.act("LOCKED") == ([], [])
    bench.clock.step(1)
    assert bench.act("LOCKED") == (["close sell 10"], [])


def test_close_in_part_is_followed_by_one_of_the_rest(bench):
    bench.enter()
    bench.act()
    bench.answer("reject", code=-2021)
    bench.act()
    bench.fill("4", "sell", name="c3", cause="close")
    assert bench.act() == ([], [])
    bench.keeper.change(bench.book.orders["c3"], "expire")
    assert bench.act() == (["close sell 6"], [])


@pytest.mark.parametrize("step_s", [-3_600, 3_600])
def test_clock_that_steps_does_not_hold_protection_up(bench, step_s):
    bench.enter()
    bench.act()
    bench.answer("reject", code=-2019)
    bench.clock.wall += step_s * SECOND
    assert bench.act() == (["stop sell 10 90"], [])
    assert bench.protector.unprotected_s(BTC) == 0  # an interval, by the clock that never steps


@pytest.mark.parametrize("event", [None, "accept"])
def test_order_that_moves_the_position_is_waited_for(bench, event):
    bench.enter()
    bench.keeper.record(received(signal()))
    bench.keeper.record(intended("r1", "4", "sell", leg="reduce"))
    if event:
        bench.keeper.change(bench.book.orders["r1"], event)
    assert bench.act() == ([], [])
    assert bench.protector.unprotected_s(BTC) == 0
    bench.clock.step(2)
    assert bench.protector.unprotected_s(BTC) == 2  # but the time counts
    bench.fill("4", "sell", name="r1")
    assert bench.act() == (["stop sell 6 90"], [])


def test_order_whose_outcome_is_unknown_does_not_keep_the_position_from_its_stop(bench):
    bench.enter()
    bench.keeper.record(received(signal()))
    bench.keeper.record(intended("r1", "4", "sell", leg="reduce"))
    bench.keeper.change(bench.book.orders["r1"], "lose")
    assert bench.act("LOCKED") == (["stop sell 10 90"], [])


@pytest.mark.parametrize(
    ("state", "is_read", "acts"),
    [
        ("RUNNING", False, True),
        ("REDUCING", False, True),
        ("LOCKED", False, True),
        ("HALTED", False, True),
        ("RECONCILING", False, False),
        ("RECONCILING", True, True),
    ],
)
@pytest.mark.parametrize("action", ["place", "close"])
def test_state_with_table_of_the_design_lets_protection_pass(bench, state, is_read, acts, action):
    bench.enter()
    expected = "stop sell 10 90"
    if action == "close":
        bench.act()
        bench.answer("reject", code=-2021)
        expected = "close sell 10"
    assert bench.act(state, is_read=is_read) == ([expected] if acts else [], [])


@pytest.mark.parametrize(("is_read", "acts"), [(False, False), (True, True)])
def test_restored_journal_protects_nothing_before_the_exchange_told_the_position(bench, is_read, acts):
    bench.enter()
    bench.keeper.record(Restored(backup="b", lacks_since_ns=1, restored_ns=2, who="ann"))
    assert bench.act("HALTED", is_read=is_read) == (["stop sell 10 90"] if acts else [], [])


def test_symbols_with_their_own_time_are_told_apart(bench):
    bench.enter()
    bench.act()
    bench.clock.step(3)
    assert (bench.protector.unprotected_s(BTC), bench.protector.unprotected_s(ETH)) == (3, 0)


class World(Bench):
    """A bench whose exchange answers as hypothesis likes, and whose fills follow its rules."""

    def play(self, kind, number):
        orders = [o for o in self.book.orders.values() if o.state not in CLOSED]
        order = orders[number % len(orders)] if orders else None
        if kind == "enter":
            if self.book.position_qty == 0:
                self.enter(
                    str(number % 3 + 1),
                    "buy" if number % 2 else "sell",
                    stop="90" if number % 2 else "110",
                    name=f"levels/7/{self.count}",
                )
        elif kind == "reduce" and abs(self.book.position_qty) > 1:
            self.fill("1", self.out_side)
        elif kind == "wait":
            self.clock.step(number / 2)
        elif kind == "restart":
            self.restart()
        elif kind == "fill" and order is not None and order.request.side == self.out_side:
            qty = min(order.request.qty - order.filled_qty, abs(self.book.position_qty))  # reduce-only
            if qty:
                self.fill(str(qty), self.out_side, name=order.id, cause="stop")
        elif order is not None and kind not in ("enter", "reduce", "fill"):
            try:
                self.keeper.change(order, kind, code=-2021 if number > 4 else 0)
            except IllegalTransition:
                pass

    @property
    def out_side(self):
        return "sell" if self.book.position_qty > 0 else "buy"

    def check(self, placed, canceled):
        qty = abs(self.book.position_qty)
        assert all(o.request.qty == qty and o.request.reduce_only for o in placed)
        assert len(placed) <= 1
        if placed and placed[0].leg == "close":
            refused = [
                o for o in self.book.orders.values() if o.code == -2021 and o.signal == self.book.exits_signal
            ]
            assert refused or self.protector.unprotected_s(BTC) > BUDGET_S
        stops = [o for o in self.book.orders.values() if o.request.is_conditional and o.state not in CLOSED]
        live = [o for o in stops if o.state not in ("PENDING_CANCEL", "UNKNOWN")]  # lost: fence by fence
        assert len([o for o in live if o.request.side == self.out_side]) <= 2 or not qty
        if (
            qty
            and not placed
            and not canceled
            and not any(o.state in IN_FLIGHT for o in stops)
            and not (self.book.working())
            and live
            and len(live) == 1
            and is_protected(self.book)
        ):
            assert live[0].request.qty - live[0].filled_qty >= qty

    def settle(self):
        """Let faults stop: what is asked is answered, and the position ends protected or closed."""
        for _ in range(60):
            for state in ("RUNNING", "LOCKED"):
                for name in self.act(state)[1]:
                    self.keeper.change(self.book.orders[name], "cancel")
            for order in list(self.book.orders.values()):
                if order.leg == "close" and order.state not in CLOSED:
                    qty = min(order.request.qty - order.filled_qty, abs(self.book.position_qty))
                    if qty and order.request.side == self.out_side:
                        self.fill(str(qty), order.request.side, name=order.id, cause="close")
                    if order.state not in CLOSED:
                        self.keeper.change(order, "expire")
                elif order.state in IN_FLIGHT:
                    self.keeper.change(order, "accept")
            self.clock.step(2)


KINDS = [
    "enter",
    "reduce",
    "wait",
    "restart",
    "fill",
    "accept",
    "lose",
    "reject",
    "absent",
    "not_sent",
    "expire",
    "cancel",
    "refuse_cancel",
]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.tuples(st.sampled_from(KINDS), st.integers(0, 9)), max_size=40))
def test_protection_with_any_events_keeps_its_promise_and_ends_well(events):
    world = World()
    for kind, number in events:
        world.play(kind, number)
        world.check(*world.protector.act(BTC, "RUNNING", is_read=True))
    world.settle()
    stops = [o for o in world.book.orders.values() if o.request.is_conditional and o.state not in CLOSED]
    assert is_protected(world.book)
    assert len(stops) == (1 if world.book.position_qty else 0)
    assert sum(o.signed_leaves_qty for o in stops) == -world.book.position_qty


def test_retry_wait_is_short_against_the_budget():
    assert RETRY_WAIT_NS * 7 < BUDGET_S * SECOND  # tries at 0, 1, 3 and 7 s
