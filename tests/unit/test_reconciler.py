"""Unknown stays unknown until all the evidence is there: each piece of it is needed."""

import asyncio
from types import SimpleNamespace

import msgspec
import pytest

from bot.bookkeeper import Bookkeeper
from bot.config import AccountConfig
from bot.desk import Desk
from bot.errors import ExchangeError
from bot.events import CREDITED_NS, Adopted, ExitsSet, Restored
from bot.journal import Journal
from bot.log import Log
from bot.orders import ExchangeFill, OrderRequest, OrderStatus
from bot.reconciler import LISTED_NS, MISSES_MIN, Reconciler
from bot.rows import AccountSettings, ListenKeyExpired, SymbolSettings
from bot.stream import StreamClosed
from tests.factory import BTC, ETH, NOW, SECOND, D, HandClock, filled, instrument, intended, signal

ABSENT_AFTER_S, WINDOW_MS, MARGIN_MS = 20, 5_000, 5_000
NAME = "th-e-1-open"


class Over(Exception):
    """The time the test gave is over."""


class Clock(HandClock):
    until = 0

    async def sleep(self, seconds):
        self.step(seconds)
        await asyncio.sleep(0)
        if self.wall > self.until:
            raise Over

    def jitter(self):
        return 1.0


def status(name=NAME, event="accept", **changes):
    fields = {
        "symbol": BTC, "client_order_id": name, "exchange_order_id": "9", "side": "buy", "qty": D(2),
        "executed_qty": D(0), "raw_status": "NEW", "event": event, "is_conditional": False,
        "reduce_only": False, "trigger_price": None, "update_ns": NOW,
    }
    return OrderStatus(**(fields | changes))


def fill(name=NAME, trade="1", qty="2", **changes):
    fields = {
        "symbol": BTC, "trade_id": trade, "exchange_order_id": "9", "client_order_id": name, "side": "buy",
        "qty": D(qty), "price": D(100), "fee": D(0), "fee_currency": "USDT", "realized_pnl": D(0),
        "is_maker": False, "exchange_ns": NOW,
    }
    return ExchangeFill(**(fields | changes))


class Bench:
    """A reconciler over a real journal; this is the exchange, and says what the test put here."""

    def __init__(self, path):
        self.clock, self.halts, self.woken = Clock(), [], 0
        self.instruments, self.clock_offset_ns = {BTC: instrument()}, 0
        self.found, self.open, self.past, self.trades, self.held = None, [], [], [], D(0)
        self.said, self.wallet = [], D(1)
        self.listed, self.listed_ns, self.is_whole = {}, NOW + 1, True
        self.journal = Journal(path / "journal.db", self.clock, identity={}, checkpoint_events=50)
        self.keeper = Bookkeeper(
            self.journal, self.journal.load(), self.clock, lambda report: None, self.halt
        )
        self.journal.begin_epoch("e")
        config = SimpleNamespace(
            account=AccountConfig(),
            strategy={"levels": SimpleNamespace(symbols=[BTC])},
            owner_of=lambda s: "levels",
            gateway=SimpleNamespace(reconnect_ms_min=50, reconnect_ms_max=1_000),
            exchange=SimpleNamespace(recv_window_ms=WINDOW_MS, instruments_s=300, connect_timeout_ms=1_000),
            executor=SimpleNamespace(
                absent_after_s=ABSENT_AFTER_S, fence_margin_ms=MARGIN_MS, reconcile_s=60, resolve_ms=100
            ),
        )
        self.it = Reconciler(
            config,
            self.clock,
            Log("executor", self.clock),
            exchange=self,
            keeper=self.keeper,
            open_stream=self.open_stream,
            wake=self.wake,
            halt=self.halt,
        )
        self.it._stream_up_ns = self.clock.mono_ns()

    def halt(self, who, why):
        self.halts.append(why)

    def wake(self):
        self.woken += 1

    def server_ns(self):
        return self.clock.wall

    def refusal(self, kind):
        return ""

    async def order(self, symbol, name, *, is_conditional):
        return self.found

    async def open_orders(self, symbol):
        return self.open

    async def orders_since(self, symbol, start_ns):
        return self.past

    async def fills_since(self, symbol, **since):
        return self.trades

    async def positions(self):
        return {BTC: SimpleNamespace(symbol=BTC, qty=self.held, unrealized_pnl=D(0), liquidation_price=None,
                                     entry_price=D(100))}

    async def income(self, start_ns):
        rows = self.listed if self.listed_ns > start_ns else {}
        return dict(rows), self.listed_ns if rows else 0, self.is_whole

    async def account(self):
        return AccountSettings(
            wallet_balance=self.wallet,
            is_hedge_mode=False,
            is_multi_asset=False,
            can_trade=True,
        )

    async def symbol_settings(self):
        return dict.fromkeys(
            (BTC, ETH), SymbolSettings(margin_mode="cross", leverage=AccountConfig().leverage)
        )

    async def key_rights(self):
        return None

    async def refresh(self, symbols):
        pass

    async def listen_key(self):
        return "key"

    async def keep_listen_key(self):
        pass

    def private_url(self, key):
        return f"ws://exchange/{key}"

    def parse_private(self, raw):
        return self.said

    async def open_stream(self, url, **options):
        return self

    def __aiter__(self):
        return self

    async def __anext__(self):
        await self.clock.sleep(0.1)
        return b""

    async def close(self):
        pass

    def unknown_order(self, code=0):
        self.keeper.receive(signal("2"))
        request = OrderRequest(client_order_id=NAME, symbol=BTC, side="buy", qty=D(2), type="market")
        order = self.keeper.intend(request, strategy="levels", signal="levels/7/1", leg="open", checks={})
        self.keeper.change(order, "lose", code=code, text="no answer")
        self.it.fences[NAME] = self.clock.wall + WINDOW_MS * 1_000_000
        return order

    def stop(self):
        request = OrderRequest(client_order_id=NAME, symbol=BTC, side="sell", qty=D(2), type="stop",
                               trigger_price=D(90), reduce_only=True)
        return self.keeper.intend(request, strategy="levels", signal="levels/7/1", leg="stop", checks={})

    def play(self, loop, for_s):
        self.clock.until = self.clock.wall + for_s * SECOND
        with pytest.raises(Over):
            asyncio.run(loop())


@pytest.fixture
def bench(tmp_path):
    bench = Bench(tmp_path)
    yield bench
    bench.journal.close()


FENCE_S = (WINDOW_MS + MARGIN_MS) / 1_000


def test_unknown_order_with_all_the_evidence_is_absent_and_not_before(bench):
    order = bench.unknown_order()
    bench.play(bench.it.chase, FENCE_S + ABSENT_AFTER_S - 1)
    assert order.state == "UNKNOWN", "the span is counted from the fence on"
    bench.play(bench.it.chase, 60)
    assert order.state == "ABSENT" and bench.woken and not bench.halts


@pytest.mark.parametrize("spoil", [
    lambda b: b.open.append(status()),
    lambda b: b.past.append(status()),
    lambda b: setattr(b, "held", D(2)),
    lambda b: setattr(b.it, "_stream_up_ns", None),
    lambda b: b.it.fences.update({NAME: b.clock.wall + 3_600 * SECOND}),
    lambda b: setattr(b, "found", status(event=None, raw_status="PENDING_MYSTERY")),
], ids=["open", "listed", "position_differs", "stream_down", "not_fenced", "found_in_no_known_state"])
def test_unknown_order_with_one_piece_of_evidence_missing_stays_unknown(bench, spoil):
    order = bench.unknown_order()
    spoil(bench)
    bench.play(bench.it.chase, 300)
    assert order.state == "UNKNOWN"


def test_unknown_order_that_the_exchange_itself_does_not_know_is_for_the_operator_alone(bench):
    order = bench.unknown_order(code=-1007)
    bench.play(bench.it.chase, 300)
    assert order.state == "UNKNOWN"
    asyncio.run(bench.it.declare_absent(order, "op"))
    assert order.state == "ABSENT" and "op" in order.text


@pytest.mark.parametrize("spoil", [
    lambda b: b.open.append(status()),
    lambda b: setattr(b, "held", D(2)),
    lambda b: setattr(b, "found", status()),
    lambda b: b.it.fences.update({NAME: b.clock.wall + 3_600 * SECOND}),
], ids=["open", "position_differs", "found", "not_fenced"])
def test_declare_absent_with_a_sign_of_the_order_does_nothing(bench, spoil):
    order = bench.unknown_order(code=-1007)
    bench.clock.step(FENCE_S + 1)
    spoil(bench)
    asyncio.run(bench.it.declare_absent(order, "op"))
    assert order.state == "UNKNOWN"
    bench.clock.step(LISTED_NS / SECOND)
    asyncio.run(bench.it.declare_absent(order, "op"))
    assert (order.state == "ABSENT") == (bench.held == 2), "a person's trade is no sign of it then"


def desk_of(bench, **changes):
    config = SimpleNamespace(strategy={"levels": SimpleNamespace(symbols=(BTC,))})
    return Desk(config, bench.clock, Log("x", bench.clock), **({
        "files": SimpleNamespace(waiting=lambda: ([], [])), "exchange": bench, "keeper": bench.keeper,
        "reconciler": bench.it, "dropped": None, "close": None, "cancel": None} | changes))


OF_OP = SimpleNamespace(symbol=BTC, strategy="", who="op", why="by hand")


@pytest.mark.parametrize("code", [0, -1007])
def test_unknown_order_and_a_manual_trade_in_one_symbol_are_told_apart_and_adopted(bench, code):
    bench.keeper.record(filled("", "3", "buy", trade="t0"))
    order, desk = bench.unknown_order(code=code), desk_of(bench)  # buys 2
    bench.clock.until = bench.clock.wall + 10**6 * SECOND
    book = bench.keeper.books.book(BTC)
    for held in (3, 4, 5):
        bench.held = D(held)
        assert asyncio.run(bench.it.reconcile("test")) == [] and not book.locks, "it may explain that"
    bench.held = D(0)  # a person closed the 3
    told, = asyncio.run(bench.it.reconcile("test"))
    assert "says 0, our fills and adoptions say 3" in told and list(book.locks) == ["books_differ"]
    assert not asyncio.run(desk._adopt(OF_OP)).is_done
    bench.clock.step(FENCE_S + LISTED_NS / SECOND + 1)
    answered = asyncio.run(desk._adopt(OF_OP))
    assert answered.is_done and "adopted -3" in answered.text and order.id in answered.text
    assert (order.state, book.position_qty, book.locks) == ("ABSENT", 0, {})


@pytest.mark.parametrize("end", ["filled", "absent"])
def test_flatten_beside_an_unknown_entry_is_not_flat_and_closes_what_it_filled(bench, end):
    order, closed = bench.unknown_order(), []
    desk = desk_of(bench, close=lambda symbol, who: closed.append((symbol, who)))
    bench.clock.until = bench.clock.wall + 10**6 * SECOND
    answered = asyncio.run(desk._flatten(OF_OP))
    assert not answered.is_done and order.id in answered.text
    book = bench.keeper.books.book(BTC)
    assert (book.target_qty, list(book.locks), closed) == (0, ["flattened"], [])
    bench.keeper = Bookkeeper(bench.journal, bench.keeper.books, bench.clock, lambda report: None, bench.halt)
    if end == "absent":
        bench.keeper.change(order, "absent")
    else:
        bench.it.recorder.book(fill(), NAME)
    asyncio.run(desk.work())
    assert not closed, "the position is not read yet"
    bench.it.read.add(BTC)
    asyncio.run(desk.work())
    assert bool(closed) == (end == "filled") == bool(book.locks) and book.target_qty == 0
    if end == "filled":
        bench.keeper.record(intended("f1", "2", "sell", leg="flatten", now_ns=bench.clock.wall))
        bench.keeper.change(book.orders["f1"], "reject")
        asyncio.run(desk.work())
        assert len(closed) == 1, "not again at once"
        bench.clock.step(3)
        asyncio.run(desk.work())
        assert len(closed) == 2 and "op" in closed[0][1]
        bench.keeper.record(filled("", "2", "sell", trade="t9"))
        asyncio.run(desk.work())
        assert not book.locks and len(closed) == 2


def test_flatten_of_a_position_that_a_person_closed_sends_nothing_and_waits_for_the_adoption(bench):
    bench.keeper.record(filled("", "2", "buy", trade="t0"))
    closed, bench.held = [], D(0)
    desk = desk_of(bench, close=lambda symbol, who: closed.append(symbol))
    bench.clock.until = bench.clock.wall + 10**6 * SECOND
    for _ in range(3):
        bench.clock.step(LISTED_NS / SECOND)
        asyncio.run(bench.it.reconcile("test"))
    assert not asyncio.run(desk._flatten(OF_OP)).is_done and not closed
    assert asyncio.run(desk._adopt(OF_OP)).is_done and not bench.keeper.books.book(BTC).locks


def test_flatten_of_a_symbol_that_was_flat_and_fills_late_closes_that_too(bench):
    closed = []
    desk = desk_of(bench, close=lambda symbol, who: closed.append(symbol))
    assert desk._is_flat(BTC)
    bench.keeper.record(filled("", "2", "buy", trade="t0"))
    assert not desk._is_flat(BTC) and closed == [BTC]


@pytest.mark.parametrize("passed_s", [30, 200])
def test_fill_of_our_own_stop_is_booked_though_both_lists_lag(bench, passed_s):
    bench.keeper.record(filled("", "2", "buy", trade="0"))
    stop = bench.stop()
    rests = {"is_conditional": True, "exchange_order_id": "5000", "side": "sell"}
    bench.keeper.change(stop, "accept", status=status(**rests))
    bench.open, bench.held, bench.clock.until = [status(**rests)], D(0), bench.clock.wall + 10**6 * SECOND
    bench.trades = [fill(name="", trade="41", exchange_order_id="77", side="sell")]
    bench.trades[0] = msgspec.structs.replace(bench.trades[0], exchange_ns=bench.clock.wall)

    async def fills_since(symbol, from_trade_id=0, **since):
        return [t for t in bench.trades if int(t.trade_id) >= from_trade_id]
    bench.fills_since = fills_since
    asyncio.run(bench.it.reconcile("private stream up"))
    book = bench.keeper.books.book(BTC)
    assert book.position_qty == 2 and "foreign_fill" in book.locks, "nobody knows whose it is"
    bench.clock.step(passed_s)
    asyncio.run(bench.it.reconcile("timer"))
    assert (book.last_trade_id == 41) == (passed_s > 180), "one day it is taken for another's"
    bench.open, bench.past = [], [status(exchange_order_id="77")]
    bench.found = status(triggered_id="77", event="complete", executed_qty=D(2), **rests)
    asyncio.run(bench.it.reconcile("timer"))
    if passed_s < 180:
        assert (book.position_qty, book.locks, stop.is_settled) == (0, {}, True)


def test_fill_of_somebody_else_that_is_adopted_beside_a_stop_does_not_come_again(bench):
    bench.keeper.record(filled("", "2", "buy", trade="0"))
    rests = {"is_conditional": True, "exchange_order_id": "5000", "side": "sell"}
    bench.keeper.change(bench.stop(), "accept", status=status(**rests))
    bench.open, bench.held, bench.clock.until = [status(**rests)], D(1), bench.clock.wall + 10**6 * SECOND
    bench.trades = [msgspec.structs.replace(fill(name="web_1", qty=D(1), trade="41", side="sell"),
                                            exchange_ns=bench.clock.wall)]
    asyncio.run(bench.it.reconcile("test"))
    book = bench.keeper.books.book(BTC)
    assert sorted(book.locks) == ["books_differ", "foreign_fill"]
    assert asyncio.run(desk_of(bench)._adopt(OF_OP)).is_done
    asyncio.run(bench.it.reconcile("test"))
    assert (book.position_qty, book.locks, book.last_trade_id) == (1, {}, 41)


def test_unknown_order_of_an_earlier_epoch_is_fenced_from_the_start_on(bench):
    order = bench.unknown_order()
    bench.it.fences.clear()
    bench.play(bench.it.chase, FENCE_S - 1)
    assert bench.it._chases[NAME].misses == 0, "before the fence a miss says nothing"
    bench.play(bench.it.chase, 120)
    assert order.state == "ABSENT"


def test_misses_before_the_stream_came_back_do_not_count(bench):
    order = bench.unknown_order()
    bench.play(bench.it.chase, 50)  # asked ever less often: the third miss behind the fence comes at 51 s
    bench.it._stream_up_ns = bench.clock.mono_ns()
    bench.play(bench.it.chase, 3)
    assert order.state == "UNKNOWN" and bench.it._chases[NAME].misses == 1
    bench.play(bench.it.chase, 120)
    assert order.text.startswith(f"missed {MISSES_MIN} times"), "three, with no gap between them"


def test_misses_within_the_margin_behind_the_window_do_not_count(bench):
    bench.unknown_order()
    bench.play(bench.it.chase, FENCE_S - 1)
    assert bench.it._chases[NAME].misses == 0


def test_misses_that_are_too_few_prove_nothing_however_long_they_span(bench):
    order = bench.unknown_order()
    bench.it._config.executor.absent_after_s = 0
    bench.play(bench.it.chase, 120)
    assert order.text.startswith(f"missed {MISSES_MIN} times")


def test_answer_to_a_question_during_which_the_order_was_sent_again_to_cancel_is_not_taken(bench):
    order = bench.unknown_order()

    async def cancelling(symbol, name, *, is_conditional):
        bench.it.sending.add(name)
        return status()

    bench.order = cancelling
    bench.play(bench.it.chase, 5)
    assert order.state == "UNKNOWN"


def test_absent_order_that_fills_after_all_is_booked_and_locks(bench):
    order = bench.unknown_order()
    bench.clock.step(FENCE_S + 1)
    asyncio.run(bench.it.declare_absent(order, "op"))
    bench.said = [fill()]
    bench.it._hear(b"")
    assert "was ABSENT and filled 2" in bench.keeper.books.book(BTC).locks["late_fill"]
    assert bench.keeper.books.book(BTC).position_qty == 2


def test_absent_order_that_is_seen_open_after_all_locks_before_it_fills(bench):
    order = bench.unknown_order()
    bench.clock.step(FENCE_S + 1)
    asyncio.run(bench.it.declare_absent(order, "op"))
    bench.said = [status()]
    bench.it._hear(b"")
    assert "was ABSENT and is NEW" in bench.keeper.books.book(BTC).locks["late_fill"]


@pytest.mark.parametrize("show", [
    lambda b: b.open.append(status("th-another-9-open")),
    lambda b: b.trades.append(fill("th-another-9-open")),
], ids=["order", "fill"])
def test_order_with_our_prefix_that_the_journal_does_not_know_halts(bench, show):
    bench.unknown_order()
    show(bench)
    asyncio.run(bench.it.reconcile("test"))
    assert "th-another-9-open has our prefix and is not in the journal" in bench.halts[0]


def test_ready_ends_when_the_stream_breaks_and_begins_with_the_next_comparison(bench):
    bench.it._stream_up_ns = None
    bench.play(bench.it.follow, 1)
    assert not bench.it.is_ready, "connected, not compared"
    bench.it._stream_up_ns = bench.clock.mono_ns()
    asyncio.run(bench.it.reconcile("test"))
    assert bench.it.is_ready
    bench.said = [ListenKeyExpired(listen_key="key")]
    bench.play(bench.it.follow, 1)
    assert not bench.it.is_ready


@pytest.mark.parametrize("end", ["closed", "key"])
def test_private_stream_that_ends_at_once_is_opened_ever_less_often_and_at_once_after_a_long_life(bench, end):
    opened, lives_s = [], [0, 0, 0, 0, 0, 0, 0, 100, 0]

    class Stream:
        async def __anext__(self):
            bench.clock.step(lives_s[len(opened) - 1] if len(opened) <= len(lives_s) else 0)
            await asyncio.sleep(0)
            if end == "closed":
                raise StreamClosed("code 1012")
            return b""

        def __aiter__(self):
            return self

        async def close(self):
            pass

    async def open_stream(url, **options):
        opened.append(bench.clock.wall)
        if len(opened) > 10:
            raise Over
        return Stream()

    bench.said, bench.it._open_stream = [ListenKeyExpired(listen_key="key")], open_stream
    bench.play(bench.it.follow, 1_000)
    gaps_ms = [(b - a) // 1_000_000 for a, b in zip(opened, opened[1:], strict=False)]
    assert gaps_ms == [0, 50, 100, 200, 400, 800, 1_000, 100_000, 50, 100]


def test_ready_ends_when_comparisons_stay_away(bench):
    asyncio.run(bench.it.reconcile("test"))
    bench.clock.step(2 * 60 + 29)
    assert bench.it.is_ready
    bench.clock.step(2)
    assert not bench.it.is_ready


def test_comparison_during_which_the_stream_broke_does_not_count(bench):
    async def positions():
        bench.it._stream_up_ns = bench.clock.mono_ns() + 1  # another connection meanwhile
        return {}

    bench.positions = positions
    asyncio.run(bench.it.reconcile("test"))
    assert not bench.it.is_ready


def test_symbol_that_is_not_listed_any_more_is_locked_alone_and_nothing_is_asked_of_it(bench):
    order = bench.unknown_order()
    bench.instruments = {ETH: instrument(symbol=ETH)}
    bench.it._config.strategy["levels"].symbols.append(ETH)
    asked = []

    async def failing(symbol, *args, **where):
        asked.append(symbol)
        if symbol == BTC:
            raise ExchangeError(f"{symbol}: not listed")
        return []

    bench.open_orders = bench.orders_since = bench.fills_since = bench.order = failing
    bench.play(bench.it.chase, 60)
    for _ in range(2):
        asyncio.run(bench.it.reconcile("test"))
        assert bench.it.is_ready
    assert BTC not in asked and order.state == "UNKNOWN"
    assert "not listed" in bench.keeper.books.book(BTC).locks["not_trading"]
    assert not bench.keeper.books.book(ETH).locks


@pytest.mark.parametrize("is_known", [True, False])
def test_symbol_that_is_delisted_at_run_time_is_locked_alone(bench, is_known):
    order = bench.unknown_order()
    bench.instruments[ETH] = instrument(symbol=ETH)
    bench.it._config.strategy["levels"].symbols.append(ETH)
    bench.it.last_mono_ns, bench.it._is_compared, bench.clock.until = bench.clock.mono, True, 2 * NOW
    compared_ns = bench.clock.mono

    async def refresh(symbols):
        bench.instruments[BTC] = msgspec.structs.replace(instrument(), status="DELISTED")

    async def failing(symbol, *args, **where):
        if symbol == BTC:
            raise ExchangeError("openOrders: 400 -1121 Invalid symbol.", status=400, code=-1121)
        return []

    async def a_while():
        if is_known:
            await refresh(())
        bench.clock.step(1)
        bench.it.request("test")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await bench.it.compare()

    bench.refresh = refresh
    bench.open_orders = bench.orders_since = bench.fills_since = bench.order = failing
    asyncio.run(a_while())
    assert bench.it.is_ready and compared_ns < bench.it.last_mono_ns <= compared_ns + 3 * SECOND
    assert "DELISTED" in bench.keeper.books.book(BTC).locks["not_trading"] and order.state == "UNKNOWN"
    assert not bench.keeper.books.book(ETH).locks


def test_query_that_fails_is_asked_again(bench):
    order = bench.unknown_order()

    async def failing(symbol, name, *, is_conditional):
        raise ExchangeError("503")

    bench.order, answering = failing, bench.order
    bench.play(bench.it.chase, 200)
    assert order.state == "UNKNOWN"
    bench.order = answering
    bench.play(bench.it.chase, 100)
    assert order.state == "ABSENT"


def test_fill_whose_order_is_listed_late_is_booked_when_it_is(bench):
    bench.unknown_order()
    bench.trades, bench.held = [fill(name="", trade="41")], D(2)

    async def fills_since(symbol, from_trade_id=0, **since):
        return [t for t in bench.trades if int(t.trade_id) >= from_trade_id]
    bench.fills_since = fills_since
    asyncio.run(bench.it.reconcile("test"))
    book = bench.keeper.books.book(BTC)
    assert "foreign_fill" in book.locks and book.position_qty == 0, "nobody knows whose it is"
    listed = status(executed_qty=D(2), event="complete", raw_status="FILLED")
    bench.found, bench.past = listed, [listed]
    asyncio.run(bench.it.reconcile("test"))
    assert book.position_qty == 2 and not book.locks and not book.working() and book.last_trade_id == 41


def test_fill_of_somebody_else_that_was_adopted_does_not_come_again(bench):
    bench.trades, bench.held = [fill(name="web_1", trade="41")], D(2)
    bench.keeper.record(Adopted(symbol=BTC, qty=D(2), entry_price=D(100), who="op", why="mine",
                                causes=("foreign_fill",), cursor=41))
    bench.unknown_order()
    asyncio.run(bench.it.reconcile("test"))
    assert not bench.keeper.books.book(BTC).locks


LOST = "th-lost-9-s"  # an order of ours whose intent went with the journal's tail


def restored(bench):
    bench.keeper.record(Restored(backup="b", lacks_since_ns=NOW - 9, restored_ns=NOW, who="ann"))


def lost_exit(name=LOST, kind="STOP_MARKET", **changes):
    return status(name, **({"exchange_order_id": name[-1].encode().hex(), "side": "sell", "type": kind,
                            "is_conditional": True, "reduce_only": True, "trigger_price": D(90)} | changes))


def test_restored_journal_takes_in_fills_and_exits_that_it_lacks(bench):
    restored(bench)
    bench.trades, bench.held = [fill(name="th-lost-9-o", trade="41")], D(2)
    bench.open = [lost_exit(), lost_exit("th-lost-9-t", "TAKE_PROFIT_MARKET", trigger_price=D(120))]
    assert asyncio.run(bench.it.reconcile("test")) == [] and not bench.halts
    book = bench.keeper.books.book(BTC)
    assert (book.position_qty, book.stop_loss, book.take_profit) == (2, 90, 120)
    assert {o.leg: o.state for o in book.orders.values()} == {"stop": "ACCEPTED", "take_profit": "ACCEPTED"}
    # Once compared it is a journal like any other.
    bench.open.append(lost_exit("th-lost-9-x"))
    asyncio.run(bench.it.reconcile("test"))
    assert "th-lost-9-x has our prefix" in bench.halts[0]


@pytest.mark.parametrize("what", [
    lambda b: b.open.append(lost_exit(update_ns=NOW + 1)),
    lambda b: b.open.append(lost_exit(reduce_only=False)),
    lambda b: b.open.append(lost_exit(is_conditional=False)),
    lambda b: b.trades.append(fill(name=LOST, trade="41", exchange_ns=NOW + 1)),
], ids=["later exit", "not an exit", "not conditional", "later fill"])
def test_restored_journal_with_anything_else_of_ours_halts(bench, what):
    restored(bench)
    what(bench)
    asyncio.run(bench.it.reconcile("test"))
    assert f"{LOST} has our prefix" in bench.halts[0] and not bench.keeper.books.book(BTC).position_qty


def test_restored_journal_keeps_the_old_stop_where_none_rests_and_drops_the_old_take_profit(bench):
    bench.trades, bench.held = [fill(name="th-lost-9-o", trade="41")], D(4)
    bench.keeper.record(Adopted(symbol=BTC, qty=D(2), entry_price=D(100), who="op", why="x", causes=()))
    bench.keeper.record(ExitsSet(symbol=BTC, signal="s/1/1", stop_loss=D(80), take_profit=D(150)))
    restored(bench)
    asyncio.run(bench.it.reconcile("test"))
    book = bench.keeper.books.book(BTC)
    assert (book.position_qty, book.stop_loss, book.take_profit) == (4, 80, None)


@pytest.mark.parametrize("leg", ["stop", "open"])
def test_order_at_rest_that_no_answer_knows_any_more_is_expired_after_some_looks(bench, leg):
    order = bench.unknown_order() if leg == "open" else bench.stop()
    bench.keeper.change(order, "accept")
    for look in range(MISSES_MIN + 1):
        assert order.state == "ACCEPTED", look
        (told,) = asyncio.run(bench.it.reconcile("test"))
        assert "order_missing" in told
    bench.clock.step(ABSENT_AFTER_S)
    asyncio.run(bench.it.reconcile("test"))
    assert order.state == "EXPIRED" and "in no list" in order.text
    assert asyncio.run(bench.it.reconcile("test")) == []


@pytest.mark.parametrize("sign", [
    lambda b: b.past.append(status()), lambda b: setattr(b, "held", D(1))], ids=["listed", "position"])
def test_order_at_rest_with_any_sign_of_it_stays(bench, sign):
    order = bench.stop()
    bench.keeper.change(order, "accept")
    sign(bench)
    bench.clock.until = bench.clock.wall + 3_600 * SECOND
    for _ in range(5):
        bench.clock.step(ABSENT_AFTER_S)
        asyncio.run(bench.it.reconcile("test"))
    assert order.state == "ACCEPTED"


def test_symbol_that_left_is_compared_anew_when_it_comes_back(bench):
    asyncio.run(bench.it.reconcile("test"))
    assert bench.it.read == {BTC}
    bench.it._config.strategy.clear()
    asyncio.run(bench.it.reconcile("test"))
    assert bench.it.read == set()


@pytest.mark.parametrize("ahead_s", [3_600, -3_600])
def test_lists_are_asked_from_before_the_send_by_the_exchanges_clock(bench, ahead_s):
    order, asked = bench.unknown_order(), []
    bench.clock_offset_ns = ahead_s * SECOND

    async def orders_since(symbol, start_ns):
        asked.append(start_ns)
        return []
    bench.orders_since = orders_since
    bench.clock.step(FENCE_S + 1)
    asyncio.run(bench.it.declare_absent(order, "op"))
    assert asked and max(asked) < NOW + ahead_s * SECOND


def test_order_whose_first_fill_is_listed_only_now_is_not_nowhere(bench):
    order = bench.unknown_order()
    bench.trades, bench.held = [fill(qty="1")], D(1)
    bench.clock.step(FENCE_S + 1)
    assert not asyncio.run(bench.it._is_nowhere(order))
    assert order.state == "PARTIALLY_FILLED"


def test_order_at_rest_that_was_seen_again_or_behind_a_gap_is_looked_for_anew(bench):
    order = bench.stop()
    bench.keeper.change(order, "accept")
    for end in (lambda: bench.open.append(status()), lambda: bench.play(bench.it.follow, 1)):
        for _ in range(MISSES_MIN - 1):
            asyncio.run(bench.it.reconcile("test"))
        bench.said = [ListenKeyExpired(listen_key="key")]
        end()
        bench.clock.step(ABSENT_AFTER_S)
        asyncio.run(bench.it.reconcile("test"))
        bench.open.clear()
        asyncio.run(bench.it.reconcile("test"))
        assert order.state == "ACCEPTED"


def test_order_event_with_our_prefix_that_the_journal_does_not_know_halts_at_once(bench):
    bench.unknown_order()
    bench.said = [status("th-another-8-open", exchange_order_id="71")]
    bench.it._hear(b"")  # a comparison tells whose it is, after a restore too
    asyncio.run(bench.it.reconcile("test"))
    for name in (NAME, "tc-canary", "web_1", "tg-flatten"):
        bench.said = [status(name, exchange_order_id=str(len(name)))]
        bench.it._hear(b"")
    assert not bench.halts
    bench.said = [status("th-another-9-open", exchange_order_id="70")]
    bench.it._hear(b"")
    assert "th-another-9-open has our prefix and is not in the journal" in bench.halts[0]


def test_fill_of_an_order_that_was_forgotten_is_booked_and_locks(bench):
    order = bench.unknown_order()
    bench.clock.step(FENCE_S + 1)
    asyncio.run(bench.it.declare_absent(order, "op"))
    book = bench.keeper.books.book(BTC)
    del book.orders[NAME]  # as after many newer ones
    book.last_trade_id, bench.trades, bench.held, bench.past = 5, [fill(name="", trade="7")], D(2), [status()]
    for _ in range(2):
        asyncio.run(bench.it.reconcile("test"))
    assert book.position_qty == 2 and NAME in book.locks["late_fill"] and not bench.halts
    assert bench.journal.find("fill", f"{BTC}#7").client_order_id == NAME


def test_answer_of_an_order_that_was_settled_and_forgotten_meanwhile_is_no_event(bench):
    stop = bench.stop()
    bench.keeper.change(stop, "accept", status=status(is_conditional=True, exchange_order_id="9"))
    bench.said = [fill(side="sell")]
    bench.it._hear(b"")
    assert stop.state == "FILLED"
    del bench.keeper.books.book(BTC).orders[NAME]  # as after many newer ones
    bench.it.recorder.learn(stop, status(is_conditional=True, event="complete", triggered_id="10"))
    bench.keeper.commit()
    assert not bench.halts


@pytest.mark.parametrize("amount", [500, -300])
def test_transfer_between_the_balance_and_its_list_is_no_loss_and_no_gain(bench, amount):
    asked, account = [], bench.account

    async def told():
        answer = await account()
        asked.append(answer)
        if len(asked) == 4:  # two in a comparison: for the modes, and for the balance
            bench.wallet, bench.listed = D(7 + amount), {"TRANSFER": D(amount), "FUNDING_FEE": D(6)}
        elif len(asked) == 3:
            bench.wallet = D(7)  # the list shows funding and transfer a moment later
        return answer

    bench.account = told
    for _ in range(3):
        asyncio.run(bench.it.reconcile("test"))
    books = bench.keeper.books
    assert books.day.transfers == amount and books.wallet_balance == 7 + amount
    assert len(asked) == 2 + 3 + 2, "asked again only where they disagree"
    assert books.explained[0] == 1 and books.income, "another payment as old may come late"
    bench.clock.step(200)
    asyncio.run(bench.it.reconcile("test"))
    assert books.explained == (7 + amount, books.wallet_ns - CREDITED_NS) and not books.income
    assert books.day.transfers == amount


def test_payment_that_is_credited_later_than_it_is_stamped_is_found(bench):
    for _ in range(2):
        asyncio.run(bench.it.reconcile("test"))
        bench.clock.step(CREDITED_NS / SECOND + 60)
    stamped_ns = bench.clock.wall
    bench.clock.step(3)
    asyncio.run(bench.it.reconcile("test"))  # nothing has moved yet
    bench.clock.step(5)
    bench.wallet, bench.listed, bench.listed_ns = D("0.4"), {"FUNDING_FEE": D("-0.6")}, stamped_ns
    for _ in range(12):
        assert asyncio.run(bench.it.reconcile("test")) == []
        bench.clock.step(30)
    assert bench.keeper.books.explained[0] == bench.wallet


def test_balance_that_fills_and_funding_explain_is_no_difference(bench):
    asyncio.run(bench.it.reconcile("test"))
    bench.listed, bench.found = {"FUNDING_FEE": D("-0.2")}, status(raw_status="FILLED", event="complete")
    bench.unknown_order()
    bench.trades, bench.held = [fill(fee=D("0.1"), realized_pnl=D(3))], D(2)
    bench.wallet = D(1) + 3 - D("0.1") - D("0.2")
    assert asyncio.run(bench.it.reconcile("test")) == []
    assert bench.keeper.books.explained[0] == 1
    for _ in range(8):
        bench.clock.step(30)
        assert asyncio.run(bench.it.reconcile("test")) == []
    assert bench.keeper.books.explained[0] == bench.wallet


def test_balance_that_nothing_explains_is_told_once_it_lasts_and_then_taken_as_it_is(bench):
    asyncio.run(bench.it.reconcile("test"))
    bench.wallet, found = D(1) - 40, []
    for _ in range(8):
        bench.clock.step(1)
        found.append(asyncio.run(bench.it.reconcile("test")))
    assert [len(f) for f in found] == [0, 0, 1, 1, 1, 1, 1, 0]
    assert "account balance_differs: -40 of -39" in found[2][0]
    assert not bench.halts and not bench.keeper.books.book(BTC).locks


def test_balance_whose_income_is_too_long_to_read_is_told_at_once(bench):
    asyncio.run(bench.it.reconcile("test"))
    bench.wallet, bench.listed, bench.is_whole = D(1) - 40, {"TRANSFER": D(-30)}, False
    (told,) = asyncio.run(bench.it.reconcile("test"))
    assert "-10 of -39" in told and "too long to be read in full" in told
    assert bench.keeper.books.day.transfers == -30
    bench.wallet = D(1) - 30  # behind what was read there are trades of ours alone
    assert asyncio.run(bench.it.reconcile("test")) == []
    compare = bench.it._compare_position

    async def fill_between(symbol, positions):
        bench.keeper.books.earned += 5  # a fill that the stream tells after the balance was read
        return await compare(symbol, positions)
    bench.it._compare_position = fill_between
    assert asyncio.run(bench.it.reconcile("test")) == [], "no list was read now: the old one is no reason"


def test_fill_that_is_booked_after_the_balance_with_it_is_no_difference(bench):
    asyncio.run(bench.it.reconcile("test"))
    bench.unknown_order()
    bench.found, bench.wallet = status(), D(4)  # the exchange's list lacks the trade, the balance has it
    assert asyncio.run(bench.it.reconcile("test")) == []
    assert bench.keeper.books.explained[0] == 1, "still what was explained last"
    bench.trades, bench.held = [fill(realized_pnl=D(3))], D(2)
    for _ in range(8):
        bench.clock.step(1)
        assert asyncio.run(bench.it.reconcile("test")) == []
    assert bench.keeper.books.explained[0] == 4


def test_fences_of_settled_orders_are_forgotten_and_others_are_kept(bench):
    order = bench.unknown_order()
    asyncio.run(bench.it.reconcile("test"))
    assert NAME in bench.it.fences
    bench.keeper.change(order, "reject", code=-2019)
    asyncio.run(bench.it.reconcile("test"))
    assert not bench.it.fences


def test_fill_of_a_refused_order_that_is_told_twice_locks_once(bench):
    order = bench.unknown_order()
    bench.keeper.change(order, "reject", code=-2019)
    bench.said = [fill(qty="1")]
    bench.it._hear(b"")
    assert "was REJECTED and filled 1" in bench.keeper.books.book(BTC).locks["late_fill"]
    bench.keeper.unlock(BTC, "late_fill", "adopted")
    bench.it._hear(b"")
    assert not bench.keeper.books.book(BTC).locks


def test_more_executed_than_was_ordered_is_booked_and_halts_whatever_tells_it_first(bench):
    bench.unknown_order()
    bench.said = [status(executed_qty=D(3), event="complete", raw_status="FILLED"), fill(qty="3")]
    bench.it._hear(b"")
    book = bench.keeper.books.book(BTC)
    assert book.position_qty == 3 and not book.working()
    assert "filled more than was ordered" in bench.halts[0]


def test_fill_of_an_order_with_the_number_of_our_stop_is_not_the_stops(bench):
    stop = bench.stop()
    bench.keeper.change(stop, "accept", status=status(is_conditional=True, exchange_order_id="9"))
    bench.said = [fill(name="web_1", exchange_order_id="9")]  # a stop's number and an order's are of two rows
    bench.it._hear(b"")
    assert stop.state == "ACCEPTED" and "foreign_fill" in bench.keeper.books.book(BTC).locks
    bench.keeper.change(stop, "accept", status=status(is_conditional=True, exchange_order_id="9",
                                                      triggered_id="10"))
    bench.said = [fill(name="", trade="2", side="sell", exchange_order_id="10")]
    bench.it._hear(b"")
    assert stop.state == "FILLED"


def test_books_are_compared_by_the_timer_also_while_the_private_stream_is_away(bench):
    stop = bench.stop()
    bench.keeper.change(stop, "accept")
    bench.it._stream_up_ns = None
    bench.found = status(is_conditional=True, side="sell", executed_qty=D(2), event="complete",
                         triggered_id="10", raw_status="FINISHED/FILLED")
    bench.trades, bench.held = [fill(name="", side="sell", exchange_order_id="10")], D(-2)
    bench.it._config.executor.reconcile_s = 0.01

    async def a_while():
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await bench.it.compare()
    asyncio.run(a_while())
    assert stop.state == "FILLED", "a stop that fired is not missed for as long as the gap lasts"
    assert not bench.it.is_ready


@pytest.mark.parametrize(("held", "comparisons"), [("0", 2), ("2", 1)])
def test_position_that_differs_is_looked_at_again_soon_and_once_more_when_it_stays(
        bench, monkeypatch, held, comparisons):
    bench.keeper.change(bench.unknown_order(), "accept")
    bench.it.recorder.book(fill(), NAME)
    bench.held, bench.clock.until = D(held), bench.clock.wall + 10**6 * SECOND
    monkeypatch.setattr("bot.books.LAG_NS", SECOND // 100)

    async def a_while():
        bench.it.request("test")
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.5):
                await bench.it.compare()

    asyncio.run(a_while())
    assert bench.keeper.books.reconciled == comparisons, "far below reconcile_s"
    assert bench.keeper.books.book(BTC).held_qty == D(held)


@pytest.mark.parametrize(("name", "cause", "lock"), [
    ("autoclose-1700000000000", "liquidation", "liquidation"), ("adl_autoclose", "adl", "adl"),
    ("settlement_autoclose-1", "operator", "settlement"), ("delivery_autoclose-1", "operator", "settlement")])
def test_fill_that_the_exchange_made_is_booked_raises_the_version_and_locks(bench, name, cause, lock):
    version = bench.keeper.books.book(BTC).version
    assert bench.it.recorder.book(fill(name=name), name)
    book = bench.keeper.books.book(BTC)
    assert book.position_qty == 2 and book.version == version + 1 and not bench.halts
    assert list(book.locks) == [lock] and "the exchange closed 2" in book.locks[lock]
    assert bench.journal.find("fill", f"{BTC}#1").cause == cause
    assert not bench.it.recorder.book(fill(name=name), name), "once"
