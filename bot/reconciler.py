"""Asks the exchange what is true: the private stream, unsettled orders, and the whole books.

The private stream is a hint that comes fast; REST is the truth that is fetched. Unknown stays
unknown until the exchange gives evidence (DESIGN 4.3), and a difference is never papered over: it
locks its symbol and is shown.
"""

import asyncio
from collections.abc import Awaitable, Callable
from decimal import Decimal
from math import inf
from typing import Any

from bot.bookkeeper import Bookkeeper
from bot.clock import Clock
from bot.config import Config
from bot.contract import Contract
from bot.crash import point
from bot.errors import ExchangeError
from bot.events import Reconciled
from bot.exchange import Exchange
from bot.exposure import transfers
from bot.log import Log
from bot.orders import OPEN, PREFIX, ExchangeFill, Order, OrderStatus
from bot.recorder import NOT_OF_THE_BOOKS, Recorder
from bot.rows import ExchangePosition, ListenKeyExpired, Unrecognized
from bot.stream import StreamClosed

MISSES_MIN = 3  # "not found" so many times, spread over absent_after_s, before absence is considered
COMPARE_S_MAX = 30  # what one comparison may take when the exchange is slow
CHASE_S = 0.1  # how often unsettled orders are looked at; each has its own, growing, wait
CHASE_WAIT_MS_MAX = 30_000
SYMBOLS_ASKED_MAX = 40  # one by one; more together weigh less
NO_SYMBOL = -1121  # "Invalid symbol": delisted since the listing was read
DEAD_KEY = -1125  # "This listenKey does not exist": the private stream says nothing any more
# A fill is told on the stream within milliseconds. One that the exchange's list shows and the stream has
# not told for this long proves that the stream is lossy or frozen, whatever its socket says.
STREAM_LATE_NS = 5_000_000_000
HEALTHY_NS = 60_000_000_000  # a stream that lived this long is no part of a series of failures
LISTED_NS = 180_000_000_000  # after so long the lists show that an order at rest was triggered
RETRY_S = 1.0  # after a failed reconciliation; weight about 50 of 2,400 a minute
FRAME_BYTES_MAX = 1_048_576
CLOCK_SLACK_NS = 5_000_000_000  # fetch a little more past than needed; fills are booked once anyway
EXPLAINS = ("foreign_fill", "liquidation", "adl", "late_fill")  # locks that tell why positions differ


class Chase:
    """What is remembered of an order that is being asked for."""

    def __init__(self, now_ns: int, wait_ms: int) -> None:
        self.wait_ms = wait_ms
        self.next_ns = now_ns + wait_ms * 1_000_000
        self.misses = self.first_miss_ns = 0  # in a row, behind the fence and since up_ns
        self.up_ns = 0  # since when the private stream has had no gap


class Reconciler:
    """Keeps the books true. `wake` runs the executor's cycle; `halt` stops everything."""

    def __init__(self, config: Config, clock: Clock, log: Log, *, exchange: Exchange, keeper: Bookkeeper,
                 open_stream: Callable[..., Awaitable], wake: Callable[[], None],
                 halt: Callable[[str, str], None]) -> None:
        self._config, self._clock, self._log = config, clock, log
        self._exchange, self._keeper, self._books = exchange, keeper, keeper.books
        self._open_stream, self._wake, self._halt = open_stream, wake, halt
        self._stream_up_ns: int | None = None  # monotonic; None while there is a gap
        self._stream: Any = None
        self._stream_since_ns = 0  # exchange time
        self._since_ns = 0  # likewise, of our first comparison
        self._untold: dict[tuple[str, str], int] = {}  # fills known from REST alone -> exchange time
        self.recorder = Recorder(log, keeper=keeper, halt=halt, is_traded=lambda name: name in self.traded)
        self._lock, self._unlock = self.recorder.lock, self.recorder.unlock
        self.contract = Contract(config, clock, exchange=exchange, books=keeper.books, lock=self._lock,
                                 unlock=self._unlock)
        self._chases: dict[str, Chase] = {}
        self._turn = asyncio.Lock()  # one comparison at a time
        self._wanted, self._trigger = asyncio.Event(), ""
        self.sending: set[str] = set()  # orders and cancels whose answer is awaited right now
        self.fences: dict[str, int] = {}  # client order id -> server time after which it cannot arrive
        self._is_compared = False  # since the stream came up
        self.told: dict[str, ExchangePosition] = {}  # positions, as the exchange said last
        self._gone: dict[str, tuple[int, int]] = {}  # orders that rested -> looks in a row, since when
        self.read: set[str] = set()  # symbols whose position the exchange has told since our start
        self.last_mono_ns, self.differences = 0, 0  # of the last comparison

    @property
    def is_ready(self) -> bool:
        """Return whether the books were compared since the stream came up, and lately."""
        late_ns = (self._config.executor.reconcile_s * 2 + COMPARE_S_MAX) * 1_000_000_000
        return self._is_compared and self._clock.mono_ns() - self.last_mono_ns < late_ns

    @property
    def fence_ns(self) -> int:
        """Return after how long the exchange refuses what was sent and has not arrived."""
        return (self._config.exchange.recv_window_ms + self._config.executor.fence_margin_ms) * 1_000_000

    @property
    def traded(self) -> tuple[str, ...]:
        """Return the symbols to answer for: those of strategies, and those that still hold something."""
        ours = {s for strategy in self._config.strategy.values() for s in strategy.symbols}
        held = {b.symbol for b in self._books.symbols.values()
                if b.position_qty or b.live_orders() or b.locks}
        return tuple(sorted(ours | held))

    async def follow(self) -> None:
        """Follow the private stream for ever; each time it is up again, compare the books."""
        gateway, wait_ms = self._config.gateway, 0  # the first time again at once
        while True:
            lived_ns = 0
            try:
                key = await self._exchange.listen_key()
                stream = await self._open_stream(
                    self._exchange.private_url(key), frame_bytes_max=FRAME_BYTES_MAX,
                    connect_timeout_ms=self._config.exchange.connect_timeout_ms)
                up_ns = self._clock.mono_ns()
                reason = await self._listen(stream)
                lived_ns = self._clock.mono_ns() - up_ns
            except (ExchangeError, StreamClosed) as error:
                reason = str(error)
            if lived_ns > HEALTHY_NS:
                wait_ms = 0
            self._log.warning("private_stream_down", error=reason, retry_ms=wait_ms)
            await self._clock.sleep(wait_ms / 1_000 * self._clock.jitter())
            wait_ms = min(max(wait_ms * 2, gateway.reconnect_ms_min), gateway.reconnect_ms_max)

    async def _listen(self, stream: Any) -> str:
        # Until the stream ends; returns why it did.
        self._stream, self._stream_up_ns = stream, self._clock.mono_ns()
        self._stream_since_ns = self._exchange.server_ns()
        self._log.info("private_stream_up")
        self.request("private stream up")
        try:
            async for raw in stream:
                if not self._hear(raw):
                    break
            return "listen key expired"
        except StreamClosed as error:
            return str(error)
        finally:
            self._stream = self._stream_up_ns = None
            self._is_compared = False
            self._untold.clear()
            self._gone.clear()
            await stream.close()
            self._wake()

    async def _keep_key(self) -> None:
        # A key lives 60 minutes from each time it is kept; a dead one may not have been told.
        try:
            await self._exchange.keep_listen_key()
        except ExchangeError as error:
            if error.code != DEAD_KEY:
                raise
            await self._drop_stream("the listen key is dead")

    async def _drop_stream(self, reason: str) -> None:
        # `follow` opens another, and what the gap hid is fetched.
        if self._stream is not None:
            self._log.warning("private_stream_down", error=reason, retry_ms=0)
            self._stream_up_ns, self._is_compared = None, False
            await self._stream.close()

    async def _check_stream(self) -> None:
        late = [key for key, at_ns in self._untold.items()
                if self._exchange.server_ns() - at_ns > STREAM_LATE_NS]
        if late:
            self._untold.clear()
            await self._drop_stream(f"fill {late[0][1]} of {late[0][0]} was not told: lossy or frozen")

    def request(self, trigger: str) -> None:
        """Ask for a comparison soon; several requests are one."""
        self._trigger = trigger
        self._wanted.set()

    async def compare(self) -> None:
        """Compare the books when asked to and each reconcile_s, for ever."""
        while True:
            try:
                async with asyncio.timeout(self._books.compare_in_s(self._config.executor.reconcile_s)):
                    await self._wanted.wait()
            except TimeoutError:
                self._trigger = "timer"
            self._wanted.clear()
            try:
                await self.reconcile(self._trigger)
            except ExchangeError as error:
                self._log.warning("reconcile_failed", trigger=self._trigger, error=str(error))
                if error.code == NO_SYMBOL:
                    self.contract.doubt()
                await self._clock.sleep(RETRY_S)
                self._wanted.set()

    async def reconcile(self, trigger: str) -> list[str]:
        """Compare all there is with the exchange; return the differences. Raises ExchangeError."""
        up_ns = self._stream_up_ns
        self._since_ns = self._since_ns or self._exchange.server_ns()
        async with self._turn:
            await self._keep_key()
            account = await self._exchange.account()
            differences = await self.contract.check(account, self.traded)
            differences += await self._compare_orders()
            cursors = {symbol: await self.fetch_fills(symbol) for symbol in self.traded}
            positions = await self._positions()
            account, told_ns, income, income_ns = await self.contract.money()
            for symbol in self.traded:
                if self._books.restored_ns:
                    self.recorder.take_plan(symbol)
                differences += await self._compare_position(symbol, positions)
            point("reconciler.compared")
            told, rest = self.contract.check_balance(account.wallet_balance, income)
            differences += told
            self._keeper.record(Reconciled(
                trigger=trigger, differences=tuple(differences), positions=positions, cursors=cursors,
                wallet_balance=account.wallet_balance, income=income, income_ns=income_ns, unexplained=rest,
                transfers=transfers(self._books, income), exchange_ns=told_ns,
                unrealized_pnl=sum((p.unrealized_pnl for p in self.told.values()
                                    if p.qty == self._books.book(p.symbol).position_qty), Decimal(0))))
            self._keeper.commit()
            self.read &= {*self.traded}  # what comes back one day is compared again first
            live = {o.id for book in self._books.symbols.values() for o in book.live_orders()}
            self.fences = {name: fence_ns for name, fence_ns in self.fences.items() if name in live}
            self._is_compared = up_ns is not None and self._stream_up_ns == up_ns
            self.last_mono_ns, self.differences = self._clock.mono_ns(), len(differences)
            self._log.info("reconciled", trigger=trigger, differences=differences)
        self._wake()
        return differences

    async def fetch_fills(self, symbol: str, *, is_adopted: bool = False) -> int:
        """Book every fill of the symbol that is not in the books; return the last trade's id.

        What was read before is not read again; is_adopted: nor what is nobody's. Raises ExchangeError.
        """
        book = self._books.book(symbol)
        if not self.contract.is_listed(symbol):
            return book.last_trade_id
        if book.last_trade_id:
            fills = await self._exchange.fills_since(symbol, from_trade_id=book.last_trade_id + 1)
        else:
            first_ns = min((o.intended_ns + self._exchange.clock_offset_ns for o in book.orders.values()),
                           default=self._books.lacks_since_ns or self._since_ns)
            fills = await self._exchange.fills_since(symbol, start_ns=first_ns - CLOCK_SLACK_NS)
        names: dict[str, str] = {}
        for fill in fills:
            if self._books.find_order(symbol, client_order_id=fill.client_order_id,
                                      exchange_order_id=fill.exchange_order_id) is None and not names:
                listed = await self._exchange.orders_since(symbol, fill.exchange_ns - CLOCK_SLACK_NS)
                names = {o.exchange_order_id: o.client_order_id for o in listed if not o.is_conditional}
            if (self.recorder.book(fill, names.get(fill.exchange_order_id, fill.client_order_id))
                    and self._stream is not None and fill.exchange_ns > self._stream_since_ns):
                self._untold[symbol, fill.trade_id] = fill.exchange_ns
        self._keeper.commit()
        # The lists of orders may lag: a fill that is nobody's may be one of these orders', and is read again.
        awaited = any(o.is_in_flight or o.executed_qty > o.filled_qty for o in book.orders.values())
        late_ns = self._exchange.server_ns() - LISTED_NS if any(
            o.request.is_conditional for o in book.live_orders()) else inf
        nobodys = [int(fill.trade_id) for fill in fills if (awaited or fill.exchange_ns > late_ns)
                   and not self._keeper.journal.has("fill", f"{symbol}#{fill.trade_id}")]
        if nobodys and not is_adopted:
            return min(nobodys) - 1
        return max([book.last_trade_id, *(int(fill.trade_id) for fill in fills)])

    async def chase(self) -> None:
        """Ask for unsettled orders until they are settled, for ever."""
        while True:
            await self._check_stream()
            now_ns = self._clock.mono_ns()
            unsettled = {o.id: o for b in self._books.symbols.values() for o in b.live_orders()
                         if o.id not in self.sending and not o.rests and self.contract.is_listed(b.symbol)}
            self._chases = {name: self._chases.get(name) or Chase(now_ns, self._config.executor.resolve_ms)
                            for name in unsettled}
            for name, chase in self._chases.items():
                if now_ns >= chase.next_ns and not self._exchange.refusal("query"):
                    await self._ask(unsettled[name], chase)
            await self._clock.sleep(CHASE_S)

    async def _ask(self, order: Order, chase: Chase) -> None:
        chase.wait_ms = min(chase.wait_ms * 2, CHASE_WAIT_MS_MAX)
        chase.next_ns = self._clock.mono_ns() + chase.wait_ms * 1_000_000
        request = order.request
        try:
            status = await self._exchange.order(request.symbol, order.id,
                                                is_conditional=request.is_conditional)
            if order.id in self.sending:
                return
            if status is None:
                await self._missed(order, chase)
            else:
                self.recorder.learn(order, status)
                if status.executed_qty > order.filled_qty or order.executed_qty > order.filled_qty:
                    await self.fetch_fills(request.symbol)
        except ExchangeError as error:
            self._log.warning("query_failed", client_order_id=order.id, error=str(error))
        self._keeper.commit()
        self._wake()

    async def _missed(self, order: Order, chase: Chase) -> None:
        now_ns = self._clock.mono_ns()
        if not self._is_fenced(order) or self._stream_up_ns is None:
            chase.misses = 0
            return
        if chase.misses == 0 or chase.up_ns != self._stream_up_ns:
            chase.misses, chase.first_miss_ns, chase.up_ns = 0, now_ns, self._stream_up_ns
        chase.misses += 1
        span_s = (now_ns - chase.first_miss_ns) / 1e9
        self._log.info("order_missed", client_order_id=order.id, misses=chase.misses, span_s=round(span_s, 1))
        if order.state != "UNKNOWN" or order.code == -1007 or chase.misses < MISSES_MIN:
            return
        if span_s >= self._config.executor.absent_after_s and await self._is_nowhere(order):
            self._keeper.change(order, "absent",
                                text=f"missed {chase.misses} times over {span_s:.0f} s, in no list")
            self._log.warning("order_absent", client_order_id=order.id, misses=chase.misses,
                              span_s=round(span_s, 1))

    async def declare_absent(self, order: Order, who: str) -> None:
        """Take the operator's word that it never was, unless a list (for LISTED_NS: a position) denies."""
        request, is_word = order.request, self._is_fenced(order, LISTED_NS)
        if (self._is_fenced(order) and await self._is_nowhere(order, is_word) and await self._exchange.order(
                request.symbol, order.id, is_conditional=request.is_conditional) is None):
            self._keeper.change(order, "absent", text=f"declared absent by {who}; in no list")

    def _is_fenced(self, order: Order, more_ns: int = 0) -> bool:
        # The exchange would refuse it now if it came for the first time: by its own clock and what was
        # signed, as absence has to be proven; Order.may_arrive is for what may be sent beside it.
        fence_ns = self.fences.get(order.id)
        if fence_ns is None:  # sent by an earlier epoch: it left before this process began
            window_ms = self._config.exchange.recv_window_ms
            fence_ns = self.fences[order.id] = self._exchange.server_ns() + window_ms * 1_000_000
        margin_ns = self._config.executor.fence_margin_ms * 1_000_000
        return self._exchange.server_ns() > fence_ns + margin_ns + more_ns

    async def _is_nowhere(self, order: Order, is_word: bool = False) -> bool:
        # By the exchange's clock, or by this host's where that is the earlier: it may have stepped since.
        symbol, filled_qty = order.request.symbol, order.filled_qty
        start_ns = order.intended_ns + min(0, self._exchange.clock_offset_ns) - CLOCK_SLACK_NS
        listed = (await self._exchange.open_orders(symbol)
                  + await self._exchange.orders_since(symbol, start_ns))
        if any(o.client_order_id == order.id for o in listed):
            return False
        await self.fetch_fills(symbol)
        is_equal = (await self._positions()).get(symbol, Decimal(0)) == self._books.book(symbol).position_qty
        return (is_equal or is_word) and order.filled_qty == filled_qty

    async def _positions(self) -> dict[str, Decimal]:
        self.told = await self._exchange.positions()
        return {symbol: position.qty for symbol, position in self.told.items()}

    async def _compare_orders(self) -> list[str]:
        differences = []
        # Of all symbols the answer weighs 80, of one 2; the first look is for orders of a lost journal too.
        everywhere = not self.is_ready or len(self.traded) >= SYMBOLS_ASKED_MAX
        asked: tuple[str | None, ...] = (
            (None,) if everywhere else tuple(s for s in self.traded if self.contract.is_listed(s)))
        open_now = [status for symbol in asked for status in await self._exchange.open_orders(symbol)]
        for status in open_now:
            order = self.recorder.find(status)
            if order is not None:
                self.recorder.learn(order, status)
            elif status.client_order_id.startswith(PREFIX):
                if not self.recorder.take_back(status):
                    self.recorder.unknown_of_ours(status.client_order_id)
            elif status.symbol in self.traded and not status.client_order_id.startswith(NOT_OF_THE_BOOKS):
                evidence = f"order {status.client_order_id} {status.side} {status.qty} is not ours"
                differences.append(f"{status.symbol} foreign_order: {evidence}")
                self._lock(status.symbol, "foreign_order", evidence)
        foreign = {d.split(" ")[0] for d in differences}
        for symbol in self.traded:
            if symbol not in foreign:
                self._unlock(symbol, "foreign_order", "no foreign order is open any more")
        names = {o.client_order_id for o in open_now}
        self._gone = {name: looks for name, looks in self._gone.items() if name not in names}
        for book in list(self._books.symbols.values()):
            for order in book.live_orders():
                if order.id not in {*names, *self.sending} and self.contract.is_listed(book.symbol):
                    request = order.request
                    told = await self._exchange.order(request.symbol, order.id,
                                                      is_conditional=request.is_conditional)
                    if told is not None:
                        self._gone.pop(order.id, None)
                        self.recorder.learn(order, told)
                    elif order.state in OPEN:
                        differences += await self._check_gone(order)
        self._keeper.commit()
        return differences

    async def _check_gone(self, order: Order) -> list[str]:
        # One that rested is in no answer any more: expired days ago, or taken away. Answers may lag, and one
        # that is there after all would be nobody's: it takes the evidence that an unknown order takes.
        now_ns = self._clock.mono_ns()
        misses, first_ns = self._gone.get(order.id, (0, now_ns))
        self._gone[order.id] = misses + 1, first_ns
        is_long = now_ns - first_ns >= self._config.executor.absent_after_s * 1_000_000_000
        if misses + 1 >= MISSES_MIN and is_long and await self._is_nowhere(order):
            del self._gone[order.id]
            self._keeper.change(order, "expire", text=f"missed {misses + 1} times, in no list")
        return [f"{order.request.symbol} order_missing: {order.id} is {order.state} in the books, and the "
                "exchange does not know it"]

    async def _compare_position(self, symbol: str, positions: dict[str, Decimal]) -> list[str]:
        self.read.add(symbol)
        ours = self._books.book(symbol).position_qty
        if self._config.owner_of(symbol) is None and ours:
            self._lock(symbol, "orphan", f"the strategy of a position of {ours} left the configuration: give "
                       "the symbol to one again, or close it at the exchange and adopt")
        else:
            self._unlock(symbol, "orphan", "it has a strategy, or nothing is left")
        for look in (1, 2):
            held, ours = positions.get(symbol, Decimal(0)), self._books.book(symbol).position_qty
            working = self._books.book(symbol).working()
            leaves = [o.signed_leaves_qty for o in working]
            # What moves is looked at when it has ended, and what unknown orders explain when they are known.
            if any(o.state != "UNKNOWN" for o in working) or (
                    sum(q for q in leaves if q < 0) <= held - ours <= sum(q for q in leaves if q > 0)):
                if held == ours:
                    self._unlock(symbol, "books_differ", f"both say {ours}")
                return []
            if look == 1:
                # A fill between the two questions looks like a difference: ask once more.
                await self._clock.sleep(0.3)
                await self.fetch_fills(symbol)
                positions.update({symbol: (await self._positions()).get(symbol, Decimal(0))})
        causes = [c for c in self._books.book(symbol).locks if c in EXPLAINS]
        evidence = (f"the exchange says {held}, our fills and adoptions say {ours}: {held - ours} is "
                    f"explained by {', '.join(causes) or 'no trade in its list'}; "
                    "protected and closed is what both hold")
        self._lock(symbol, "books_differ", evidence)
        return [f"{symbol} books_differ: {evidence}"]

    def _hear(self, raw: bytes) -> bool:
        # False: the stream is of no more use.
        for said in self._exchange.parse_private(raw):
            if isinstance(said, ListenKeyExpired):
                return False
            if isinstance(said, OrderStatus):
                order = self.recorder.find(said)
                if order is not None:
                    self.recorder.learn(order, said)
                elif self._is_compared and said.client_order_id.startswith(PREFIX):
                    self.recorder.unknown_of_ours(said.client_order_id)
                if said.event is None:
                    self._log.warning("status_unrecognized", client_order_id=said.client_order_id,
                                      raw_status=said.raw_status)
            elif isinstance(said, ExchangeFill):
                self._untold.pop((said.symbol, said.trade_id), None)
                self.recorder.book(said, said.client_order_id)
            elif isinstance(said, Unrecognized):
                self._log.warning("message_dropped", channel="private", reason=said.reason)
        self._keeper.commit()
        self._wake()
        return True
