"""Flatten's own rules: what is canceled when, how much is closed, when it is over, who holds the lock."""

import asyncio
import os
import signal
import subprocess
import sys
from decimal import Decimal

import pytest

from bot.config_file import load
from bot.errors import ExchangeError, InvariantError
from bot.flatten import HOLDER, Flattener, is_seized
from bot.halt import HaltFiles
from bot.journal import take_lock
from bot.orders import OrderStatus
from bot.outcome import Answer
from bot.rows import ExchangePosition
from tests.factory import BTC, ETH, HandClock, instrument
from tests.harness import wait_until, write_config


class HastyClock(HandClock):
    """Waits by moving itself."""

    async def sleep(self, seconds):
        self.step(seconds)

    def jitter(self):
        return 1.0


class FakeExchange:
    """An account: positions and orders by name; `closes` is how much of each close is filled."""

    def __init__(self, clock, positions, orders, *, closes=1.0, silences=0):
        self.clock, self.held, self.open, self.log = clock, dict(positions), dict(orders), []
        self.closes, self.silences = closes, silences
        self.instruments = {symbol: instrument(symbol=symbol, qty_max=Decimal(5)) for symbol in (BTC, ETH)}

    async def load(self):
        await self._hear()

    def server_ns(self):
        return self.clock.wall_ns()

    async def positions(self):
        await self._hear()
        return {
            symbol: ExchangePosition(
                symbol=symbol, qty=qty, entry_price=Decimal(1), mark_price=Decimal(1), liquidation_price=None
            )
            for symbol, qty in self.held.items()
            if qty
        }

    async def open_orders(self):
        await self._hear()
        return [
            OrderStatus(
                symbol=BTC,
                client_order_id=name,
                exchange_order_id="1",
                side="buy",
                qty=Decimal(1),
                executed_qty=Decimal(0),
                raw_status="NEW",
                event="accept",
                is_conditional=reduces,
                reduce_only=reduces,
                trigger_price=None,
                update_ns=0,
            )
            for name, reduces in self.open.items()
        ]

    def build(self, request):
        assert request.reduce_only and request.type == "market"
        return request

    async def submit(self, request):
        self.log.append((request.side, request.symbol, request.qty))
        filled = request.qty * Decimal(str(self.closes))
        self.held[request.symbol] += filled if request.side == "buy" else -filled
        return Answer(
            status=200,
            is_sent=True,
            body=b'{"orderId": 1, "status": "FILLED", "clientOrderId": "%s"}'
            % request.client_order_id.encode(),
        )

    async def cancel(self, symbol, name, *, is_conditional):
        self.log.append(("cancel", name, {s: q for s, q in self.held.items() if q}))
        self.open.pop(name, None)
        return Answer(status=200, is_sent=True, body=b'{"clientOrderId": "x", "status": "CANCELED"}')

    async def _hear(self):
        if self.silences:
            self.silences -= 1
            raise ExchangeError("silent", status=503)


def flatten(tmp_path, exchange_of, **tables):
    """Flatten a fake account; return it, the clock's seconds that passed, and what was told."""
    config, clock, told = load(write_config(tmp_path, **tables)), HastyClock(), []
    exchange = exchange_of(clock)
    began = clock.mono
    asyncio.run(Flattener(config, clock, exchange, told.append).flatten("op", "a test"))
    return exchange, (clock.mono - began) / 1e9, told


def test_flatten_with_stops_and_entries_cancels_entries_first_and_stops_last(tmp_path):
    exchange, _, told = flatten(tmp_path, lambda clock: FakeExchange(
        clock, {BTC: Decimal(2), ETH: Decimal(-3)}, {"entry": False, "stop": True}))
    assert exchange.log[:2] == [("sell", BTC, 2), ("buy", ETH, 3)] and exchange.open == {}
    cancels = [line for line in exchange.log if line[0] == "cancel"]
    assert [name for _, name, _ in cancels] == ["entry", "stop"]
    assert cancels[1][2] == {}, "a stop goes when nothing is held any more"
    assert told[-1].startswith("flat after")
    assert HaltFiles(tmp_path / "var" / "halt").list()[0].why == "flatten: a test"


def test_flatten_with_more_than_one_order_may_be_closes_in_parts(tmp_path):
    exchange, _, _ = flatten(tmp_path, lambda clock: FakeExchange(clock, {BTC: Decimal(12)}, {}))
    assert [qty for _, _, qty in exchange.log] == [5, 5, 2]


def test_flatten_with_fills_that_stay_behind_goes_on_until_the_exchange_says_zero(tmp_path):
    class Thin(FakeExchange):
        async def submit(self, request):
            self.closes = 1 if request.qty < Decimal("0.3") else 0.5
            return await super().submit(request)
    exchange, _, _ = flatten(tmp_path, lambda clock: Thin(clock, {BTC: Decimal(2)}, {"stop": True}))
    assert exchange.held[BTC] == 0 and len(exchange.log) > 4
    assert exchange.log[-1] == ("cancel", "stop", {}), "what is held meanwhile keeps its stop"


@pytest.mark.parametrize("window_s", [3, 40])
def test_flatten_with_nothing_to_do_still_waits_for_what_the_executor_had_signed(tmp_path, window_s):
    _, took_s, _ = flatten(tmp_path, lambda clock: FakeExchange(clock, {}, {}),
                           exchange={"recv_window_ms": window_s * 1_000}, executor={"fence_margin_ms": 1_000})
    assert window_s + 1 <= took_s <= window_s + 6


def test_flatten_with_a_first_answer_that_lags_looks_again(tmp_path):
    class Lagging(FakeExchange):
        looks = 0

        async def positions(self):
            self.looks += 1
            return await super().positions() if self.looks > 1 else {}
    exchange, _, _ = flatten(tmp_path, lambda clock: Lagging(clock, {BTC: Decimal(1)}, {}),
                             exchange={"recv_window_ms": 500}, executor={"fence_margin_ms": 1})
    assert exchange.held[BTC] == 0


def test_flatten_with_an_order_that_arrives_late_closes_what_it_opened(tmp_path):
    class Late(FakeExchange):
        async def positions(self):
            if self.clock.mono > 10_500_000_000 and not self.log:
                self.held[BTC] = Decimal(1)
            return await super().positions()
    exchange, _, _ = flatten(tmp_path, lambda clock: Late(clock, {}, {}))
    assert exchange.log == [("sell", BTC, 1)] and exchange.held[BTC] == 0


def test_flatten_with_an_exchange_that_is_silent_for_long_goes_on(tmp_path):
    exchange, _, told = flatten(
        tmp_path, lambda clock: FakeExchange(clock, {BTC: Decimal(1)}, {}, silences=50)
    )
    assert exchange.held[BTC] == 0 and "asking again" in told[1]


def test_cancel_entries_with_strangers_and_exits_takes_ours_alone(tmp_path):
    clock = HastyClock()
    exchange = FakeExchange(
        clock, {BTC: Decimal(1)}, {"th1": False, "tg2": False, "web_3": False, "th4": True}
    )
    flattener = Flattener(load(write_config(tmp_path)), clock, exchange, lambda text: None)
    assert asyncio.run(flattener.cancel_entries()) == ["th1", "tg2"]
    assert set(exchange.open) == {"web_3", "th4"}


def test_flatten_with_a_frozen_holder_of_the_lock_ends_it_and_holds_it_itself(tmp_path):
    config = load(write_config(tmp_path))
    path = config.path(config.journal.path)
    holder = subprocess.Popen([sys.executable, "-c", "import sys, time; from pathlib import Path\n"
                               "from bot.journal import take_lock\n"
                               f"take_lock(Path({str(path)!r})); print('held', flush=True); time.sleep(99)",
                               "bot.executor"],
                              stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    holder.send_signal(signal.SIGSTOP)
    seen = []

    class Looking(FakeExchange):
        async def positions(self):
            seen.append((is_seized(path), holder.poll()))
            return await super().positions()

    async def run():
        clock = HastyClock()
        clock.sleep = lambda seconds: (clock.step(seconds), asyncio.sleep(0.02))[1]
        flattener = Flattener(config, clock, Looking(clock, {}, {}), lambda text: None)
        await flattener.flatten("op", "a test")
    asyncio.run(run())
    wait_until(lambda: holder.poll() == -signal.SIGKILL, 5)
    assert seen and all(is_held for is_held, _ in seen)
    assert path.with_suffix(".lock").read_text().split() == [str(os.getpid()), HOLDER]
    assert not is_seized(path)
    os.close(take_lock(path))  # free again
    holder.stdout.close()


def test_flatten_with_a_number_in_the_lock_that_is_anothers_by_now_kills_nobody(tmp_path):
    config = load(write_config(tmp_path))
    path = config.path(config.journal.path)
    handle = take_lock(path)
    other = subprocess.Popen(["sleep", "99"])
    path.with_suffix(".lock").write_text(f"{other.pid}\n")
    told, clock = [], HastyClock()
    exchange = FakeExchange(clock, {BTC: Decimal(1)}, {})
    assert asyncio.run(Flattener(config, clock, exchange, told.append).flatten("op", "a test"))
    assert other.poll() is None and "its holder does not end" in told[1] and exchange.held[BTC] == 0
    other.kill()
    other.wait()
    os.close(handle)


@pytest.mark.parametrize("text", ["", "12 \n", f"12 {HOLDER}\n", "\udcff"])
def test_seized_with_nobody_holding_is_no(tmp_path, text):
    path = tmp_path / "journal.db"
    path.with_suffix(".lock").write_bytes(text.encode(errors="surrogateescape"))
    assert not is_seized(path)
    assert not is_seized(tmp_path / "none.db")


def test_seized_with_an_executor_holding_is_no(tmp_path):
    handle = take_lock(tmp_path / "journal.db")
    assert not is_seized(tmp_path / "journal.db")
    os.close(handle)


def test_flatten_with_a_halt_that_cannot_be_written_goes_on(tmp_path):
    (tmp_path / "var").mkdir()
    (tmp_path / "var" / "halt").write_text("in the way")
    _, _, told = flatten(tmp_path, lambda clock: FakeExchange(clock, {}, {}))
    assert "cannot be written" in told[0] and told[-1].startswith("flat after")


def test_flatten_with_a_position_that_cannot_be_closed_closes_the_others(tmp_path):
    class Odd(FakeExchange):
        def build(self, request):
            if request.symbol == BTC:
                raise InvariantError("quantity must be 0.0015; was 0.001")
            return super().build(request)

        async def positions(self):
            if self.held[ETH] == 0:  # a person closes the odd ones, in the exchange's app
                self.held[BTC] = Decimal(0)
            return await super().positions()

    held = {"XYZUSDT": Decimal(3), BTC: Decimal("0.0015"), ETH: Decimal(-3)}
    exchange, _, told = flatten(tmp_path, lambda clock: Odd(clock, held, {}))
    assert exchange.log == [("buy", ETH, Decimal(3))]
    assert "3 XYZUSDT: not listed any more, close it in the exchange's app" in told[-1]
    assert any("not sent: quantity must be" in text for text in told)


def test_flatten_with_a_step_that_became_coarser_closes_what_it_can(tmp_path):
    def exchange_of(clock):
        exchange = FakeExchange(clock, {BTC: Decimal("0.0150")}, {})
        exchange.instruments[BTC] = instrument(qty_increment=Decimal("0.01"))
        positions = exchange.positions

        async def until_dust():
            if exchange.held[BTC] < Decimal("0.01"):
                exchange.held[BTC] = Decimal(0)
            return await positions()
        exchange.positions = until_dust
        return exchange

    exchange, _, _ = flatten(tmp_path, exchange_of)
    assert exchange.log == [("sell", BTC, Decimal("0.01"))]
