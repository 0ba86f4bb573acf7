"""Flatten everything with nothing but the exchange: no journal, no bus, no disk, no other process.

Run by guard, and by botctl when guard is gone. The executor is ended and its lock held to the end, so
that nobody else sends; every close is reduce-only, so that a lost answer may be followed by another try.
"""

import fcntl
import os
import signal
from collections.abc import Awaitable, Callable
from decimal import Decimal
from pathlib import Path
from typing import TypeVar

from bot.clock import Clock
from bot.config import Config
from bot.config_file import read_secret
from bot.connection import pool
from bot.errors import ConfigError, ExchangeError, InvariantError
from bot.exchange import Exchange
from bot.halt import HaltFiles
from bot.orders import GUARD_PREFIX, OrderRequest, OrderStatus, is_ours
from bot.outcome import classify, classify_cancel
from bot.probe import is_program

LOOK_S = 0.5  # between two looks at the positions (weight 5 of 2,400 a minute)
ORDERS_TURNS = 10  # every so many of them at the orders too, and each time when nothing is held (weight 80)
ZERO_S = 2.0  # between those
WAIT_S_MIN, WAIT_S_MAX = 0.3, 5.0  # after a question that got no answer; doubles
SEIZE_TURNS, SEIZE_S = 100, 0.1  # SIGKILL takes effect when a frozen process's disk wait ends
ZEROS = 2  # looks that must find nothing, so that an answer from a lagging replica does not end it
HOLDER = "guard"  # in the lock file, behind the pid: an executor that finds it waits instead of failing
HOLDERS = ("executor", "guard")  # who is killed for the lock

Told = Callable[[str], None]
Found = TypeVar("Found")


def open_exchange(config: Config, clock: Clock, hide: Callable[..., None]) -> Exchange:
    """Return an exchange of one's own, with the keys, which a log hides. Raises ConfigError without."""
    key, secret = (read_secret(config.path(getattr(config.exchange, name)), f"exchange.{name}")
                   for name in ("api_key_file", "api_secret_file"))
    hide(key, secret)
    return Exchange(config.exchange, clock, orders=pool(config.exchange, clock),
                    queries=pool(config.exchange, clock), keys=(key, secret), is_urgent=True)


class Flattener:
    """Ends the executor, cancels every order, closes every position. tell: hears each step in words."""

    def __init__(self, config: Config, clock: Clock, exchange: Exchange, tell: Told) -> None:
        self._config, self._clock, self._exchange, self._tell = config, clock, exchange, tell
        self._made = 0
        self._run = f"{clock.wall_ns() // 1_000_000:x}{clock.token(2)}"

    async def flatten(self, who: str, why: str) -> bool:
        """Return when the exchange says that nothing is held and nothing rests, and no sooner.

        False: all but what is held in symbols that it lists no more, which no order can close.
        """
        began_ns = self._clock.mono_ns()
        self._halt(who, why)
        lock = await self._seize()
        try:
            await self._ask(self._exchange.load)
            # Whatever the executor signed arrives before this, or is refused by the exchange.
            fence_ns = self._exchange.server_ns() + 1_000_000 * (
                self._config.exchange.recv_window_ms + self._config.executor.fence_margin_ms)
            turn = zeros = 0
            while zeros < ZEROS or self._exchange.server_ns() < fence_ns:
                held = await self._ask(self._exchange.positions)
                positions = {s: p for s, p in held.items() if s in self._exchange.instruments}
                for symbol, position in positions.items():
                    await self._close(symbol, position.qty)
                orders = (
                    await self._sweep(bool(positions)) if turn % ORDERS_TURNS == 0 or not positions else 1)
                zeros, turn = 0 if positions or orders else zeros + 1, turn + 1
                await self._clock.sleep(LOOK_S if positions else ZERO_S)
        finally:
            if lock is not None:
                os.close(lock)
        left = ", ".join(f"{position.qty} {symbol}" for symbol, position in held.items())
        self._tell(
            f"flat after {(self._clock.mono_ns() - began_ns) / 1e9:.1f} s: the exchange says no "
            + (f"other position than {left}: not listed any more, close it in the exchange's app" if left
               else "position and no order") + "; trading stays halted until botctl resume")
        return not left

    async def cancel_entries(self) -> list[str]:
        """Cancel our orders that are not reduce-only; return their names. Raises ExchangeError."""
        entries = [order for order in await self._exchange.open_orders()
                   if is_ours(order.client_order_id) and not order.reduce_only]
        for order in entries:
            await self._cancel(order)
        return [order.client_order_id for order in entries]

    async def _sweep(self, is_held: bool) -> int:
        # While something is held its stops stay. Returns how many orders were there.
        orders = await self._ask(self._exchange.open_orders)
        for order in [o for o in orders if not (is_held and o.reduce_only)]:
            await self._cancel(order)
        return sum(order.symbol in self._exchange.instruments for order in orders)

    async def _close(self, symbol: str, held: Decimal) -> None:
        instrument = self._exchange.instruments[symbol]
        step, self._made = instrument.qty_increment, self._made + 1
        qty = min(abs(held) // step * step or step, instrument.qty_max)  # the step may be a new one
        request = OrderRequest(
            client_order_id=f"{GUARD_PREFIX}{self._run}{self._made}", symbol=symbol, type="market",
            side="sell" if held > 0 else "buy", qty=qty, reduce_only=True)
        try:
            answer = await self._exchange.submit(self._exchange.build(request))
            outcome = classify(answer, request.client_order_id)
            said = f"{outcome.kind} {outcome.text}".strip()
        except (ExchangeError, InvariantError) as error:  # one that cannot be built must not keep the others
            said = f"not sent: {error}"
        self._tell(f"close {request.side} {request.qty} of {held} {symbol}: {said}")

    async def _cancel(self, order: OrderStatus) -> None:
        try:
            answer = await self._exchange.cancel(order.symbol, order.client_order_id,
                                                 is_conditional=order.is_conditional)
            outcome = classify_cancel(answer, order.client_order_id)
            said = f"{outcome.kind} {outcome.text}".strip()
        except ExchangeError as error:
            said = f"not sent: {error}"
        self._tell(f"cancel {order.client_order_id} {order.symbol}: {said}")

    async def _ask(self, question: Callable[[], Awaitable[Found]]) -> Found:
        wait_s = WAIT_S_MIN
        while True:
            try:
                return await question()
            except ExchangeError as error:
                self._tell(f"the exchange gives no answer to go by, asking again: {error}")
                await self._clock.sleep(wait_s * self._clock.jitter())
                wait_s = min(wait_s * 2, WAIT_S_MAX)

    def _halt(self, who: str, why: str) -> None:
        try:
            HaltFiles(self._config.path("halt")).set("all", who=who, why=f"flatten: {why}", clock=self._clock)
            self._tell("halted")
        except OSError as error:
            self._tell(
                f"the halt cannot be written ({error}); going on: halt again before the executor starts")

    async def _seize(self) -> int | None:
        # Nobody who holds this lock may go on sending; who thaws later finds itself killed.
        path = self._config.path(self._config.journal.path).with_suffix(".lock")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            self._tell(f"the executor's lock cannot be opened ({error}); going on: see that none runs")
            return None
        for _ in range(SEIZE_TURNS):
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self._kill(path)
                await self._clock.sleep(SEIZE_S)
            else:
                _sign(handle)
                return handle
        os.close(handle)
        self._tell("the executor's lock is held and its holder does not end; going on: see that none runs")
        return None

    def _kill(self, path: Path) -> None:
        try:
            pid = int(path.read_text().split()[0])
            # A number that outlived its process may be anybody's by now.
            if pid != os.getpid() and any(is_program(pid, name) for name in HOLDERS):
                os.kill(pid, signal.SIGKILL)
                self._tell(f"killed {pid}, the holder of the executor's lock")
        except (OSError, ValueError, IndexError) as error:
            self._tell(f"the holder of the executor's lock cannot be ended: {error}")


def _sign(handle: int) -> None:
    try:
        os.truncate(handle, 0)
        os.pwrite(handle, f"{os.getpid()} {HOLDER}\n".encode(), 0)
    except OSError:  # a full disk: an executor then fails at the lock, and is started again
        pass


def is_seized(path: Path) -> bool:
    """Return whether a flatten holds the lock of this journal just now."""
    lock = path.with_suffix(".lock")
    try:
        if HOLDER not in lock.read_text():
            return False
        with open(lock) as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (OSError, UnicodeDecodeError):
        return False
    return False


async def flatten_here(config: Config, tell: Told, *, who: str, why: str) -> bool:
    """Flatten from the process that calls; return whether all is flat.

    Raises ConfigError when the keys cannot be read.
    """
    try:
        exchange = open_exchange(config, Clock(), lambda *_: None)
    except (ConfigError, PermissionError) as error:
        raise ConfigError(f"{error}: flatten needs the trading keys; run it as the user that owns them "
                          "(on a host: systemctl start bot-flatten)") from None
    return await Flattener(config, Clock(), exchange, tell).flatten(who, why)
