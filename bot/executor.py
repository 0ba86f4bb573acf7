"""OrderExecutor: signals in, orders out, and the one who answers for every position.

    signal -> journal -> acknowledged -> decided -> intent journaled and synced -> sent, once
Whatever changed, `cycle` asks for each touched symbol what follows from its books, records it,
makes it durable, and only then lets anything leave. A restart folds the same books and goes on.
"""

import os
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from decimal import Decimal
from typing import Any, get_args

from bot import __version__, wire
from bot.bookkeeper import Bookkeeper
from bot.books import Books, SymbolBook
from bot.bus import ZmqPublisher, ZmqPuller, ZmqSubscriber, signal_endpoint
from bot.canary import Canary
from bot.clock import Clock
from bot.commands import CommandFiles
from bot.config import Config
from bot.config_file import read_secret
from bot.connection import pool, rights_pool
from bot.crash import point
from bot.daemon import Daemon, run
from bot.decision import CloseSignal, Context, MoveExits, SendOrder, endings, next_step
from bot.desk import Desk
from bot.errors import ExchangeError, JournalError, WireError
from bot.events import ExitsSet, Halted, Resumed, Started
from bot.exchange import Exchange, library
from bot.flatten import is_seized
from bot.halt import HaltFiles
from bot.journal import Journal
from bot.log import Log, Tally
from bot.model import Heartbeat, Outcome, PositionReport, Report, Tick, TradingSignal
from bot.orders import Leg, Order, OrderRequest, OrderType, Side, client_order_id, new_epoch
from bot.protection import as_held, is_protected
from bot.protector import Protector
from bot.reconciler import Reconciler
from bot.sender import OrderSender
from bot.status import read_beats, read_usage
from bot.stream import open_stream
from bot.targets import TokenBucket
from bot.trading_state import TradingState

SEIZED_S = 0.5  # between looks at whether a flatten has let go
CYCLE_S = 0.25  # turns without news: expiries, retries, the budget of unprotected seconds
STOP_TURN_S, STOP_MS = 0.05, 1_500  # and how long the stop of a late fill may take
READS_JOURNAL = "the journal is read"  # bot-switch waits for its end
SPARE_CONNECTIONS = 8  # each opens when all others wait for an answer
TEXT_MAX = 300  # of a dropped message's description in the log
INTAKE_BURST_S = 60  # a runner sends its few waiting signals again after an outage; a flood goes on
STRANGERS_PER_S = 2  # signals under names that no strategy has, together: each is journaled and denied


class OrderExecutor:
    """Turns signals into orders. Everything it touches is passed in."""

    def __init__(self, config: Config, clock: Clock, log: Log, *, run_id: int, exchange: Exchange,
                 journal: Journal, books: Books, halts: HaltFiles, publish: Callable[[bytes, bytes], None],
                 open_stream: Callable[..., Awaitable],
                 spawn: Callable[[Coroutine[Any, Any, None]], Any]) -> None:
        self._config, self._clock, self._log, self._run = config, clock, log, run_id
        self._exchange, self._halts, self._publish, self._spawn = exchange, halts, publish, spawn
        self.losses = wire.LossCounter()
        self.dropped = Tally("message_dropped", log, clock)
        self.denied: Counter[str] = Counter()  # signals of this run, by the rule that said no
        self.books = books
        self.keeper = Bookkeeper(journal, books, clock, self._report, self.halt_all)
        self.reconciler = Reconciler(config, clock, log, exchange=exchange, keeper=self.keeper,
                                     open_stream=open_stream, wake=self.cycle, halt=self.halt_all)
        self.trading_state = TradingState(config, clock, exchange=exchange, halts=halts, books=self.books,
                                          reconciler=self.reconciler,
                                          canary=lambda: (self.canary.trouble, self.canary.has_answered))
        self.canary = Canary(clock, log, period_s=config.executor.canary_s, exchange=exchange,
                             books=self.books, symbols=lambda: self.reconciler.traded,
                             mark_of=self.trading_state.mark_of)
        self.sender = OrderSender(log, exchange=exchange, keeper=self.keeper, halts=halts,
                                  reconciler=self.reconciler, wake=self.cycle, halt=self.halt_all)
        self.desk = Desk(config, clock, log, files=CommandFiles(config.state_path / "commands"),
                         exchange=exchange, keeper=self.keeper, reconciler=self.reconciler,
                         dropped=self.dropped, close=self.close_for_operator, cancel=self._send_cancel)
        self.protector = Protector(config.executor, clock, log, keeper=self.keeper, intend=self.intend,
                                   fence_ns=self.reconciler.fence_ns)
        self.subscribed = frozenset(config.symbols())
        self._intake: dict[str, TokenBucket] = {}  # by strategy; "" for all strangers

    def begin(self) -> None:
        """Start a new epoch: orders of the last one that had no answer are unknown now."""
        epoch = new_epoch(self._clock.wall_ns(), self._clock.token(2))
        self.keeper.journal.begin_epoch(epoch)
        point("executor.epoch_begun")
        self.keeper.record(Started(epoch=epoch, version=__version__, config=self._config.fingerprint()))
        for book in self.books.symbols.values():
            for order in book.live_orders():
                if order.state == "INTENDED":
                    self.keeper.change(order, "lose", text="the executor ended before the answer")
        self.keeper.commit()

    def on_signal_messages(self, batch: list[bytes], strategy: str | None = None) -> None:
        """Take raw signals in. strategy: whose endpoint they came from, when each has its own."""
        for raw in batch:
            try:
                signal = wire.decode_signal(raw)
                if strategy is not None and signal.strategy != strategy:
                    raise WireError("impostor", f"{strategy} sent a signal as {signal.strategy}")
            except WireError as error:
                self.dropped.add(error.reason, channel="signals", text=str(error)[:TEXT_MAX])
                continue
            self.process_received_signal(signal)
        self.cycle()

    def process_received_signal(self, signal: TradingSignal) -> None:
        """Journal a signal once. It is acknowledged, and acted on, by the next cycle's commit.

        What comes faster than the strategy's runner lets through is not acknowledged: it stays in its
        outbox. A process that is no runner cannot fill the disk with it.
        """
        point("executor.signal_received")
        if self.keeper.acknowledge_again(signal):
            return
        if not self._takes_in(signal.strategy):
            self.dropped.add("too_many", channel="signals", text=f"{signal.strategy} sends more than its "
                             "signals_per_s_max: is something else than its runner sending?"[:TEXT_MAX])
            return
        self.keeper.receive(signal)
        point("executor.signal_recorded")
        self._log.info("signal", strategy=signal.strategy, run=signal.run, seq=signal.seq,
                       symbol=signal.symbol, target_qty=signal.target_qty, reason=signal.reason)

    def _takes_in(self, strategy: str) -> bool:
        table = self._config.strategy.get(strategy)
        per_s, name = (table.signals_per_s_max, strategy) if table else (STRANGERS_PER_S, "")
        bucket = self._intake.setdefault(name, TokenBucket(per_s, INTAKE_BURST_S))
        if not bucket.has_token(self._clock.mono_ns()):
            return False
        bucket.take()
        return True

    def on_tick_messages(self, batch: list[tuple[bytes, bytes]]) -> None:
        """Take market data in: the prices that limits look at, and the exact count of losses."""
        for _, raw in batch:
            try:
                message = wire.decode_tick(raw)
            except WireError as error:
                self.dropped.add(error.reason, channel="ticks", text=str(error)[:TEXT_MAX])
                continue
            self.trading_state.hear_gateway()
            if isinstance(message, Heartbeat):
                self.losses.saw_heartbeat(message, self.subscribed)
            elif isinstance(message, Tick) and self.losses.saw_tick(message):
                self.trading_state.see_price(message)

    def cycle(self) -> None:
        """Do what follows from the books, now."""
        self._check_day()
        self._journal_halts()
        orders, cancels = [], []
        asked = {symbol for symbol, book in self.books.symbols.items() if book.signals}
        for symbol in sorted({*self.reconciler.traded} | asked):
            orders += self._act(symbol)
            placed, canceled = self.protector.act(symbol, self.trading_state.of_symbol(symbol)[0],
                                                  is_read=symbol in self.reconciler.read)
            orders += placed
            cancels += canceled
        point("executor.cycle_recorded")
        self.keeper.commit()
        point("executor.cycle_committed")
        changed, self.keeper.touched = self.keeper.touched, set()
        for symbol in sorted(changed):
            self._report_position(symbol)
        for order in orders:
            self._send(order)
        for order in cancels:
            self._send_cancel(order)

    async def end(self) -> None:
        """Begin nothing more; let answers and fills arrive, which nobody would know of, and protect them."""
        self.trading_state.is_ending = True
        end_ns = self._clock.mono_ns() + (self._config.exchange.request_timeout_ms + STOP_MS) * 1_000_000
        while self._clock.mono_ns() < end_ns:
            self.cycle()
            if not self.reconciler.sending and all(
                    is_protected(as_held(book)) and all(o.state == "UNKNOWN" for o in book.working())
                    for book in self.books.symbols.values()):
                return
            await self._clock.sleep(STOP_TURN_S)

    def close_for_operator(self, symbol: str, who: str) -> None:
        """Close what is held of the symbol, reduce-only, in the operator's name."""
        held = as_held(self.books.book(symbol)).position_qty
        order = self.intend(symbol, "flatten", "sell" if held > 0 else "buy", abs(held), reduce_only=True,
                            signal="", checks={"operator": who})
        self.keeper.commit()
        self._send(order)

    def _send(self, order: Order) -> None:
        self.reconciler.sending.add(order.id)
        self._spawn(self.sender.send_market_order(order))

    def _send_cancel(self, order: Order) -> None:
        self.reconciler.sending.add(order.id)
        self._spawn(self.sender.cancel(order))

    def halt_all(self, who: str, why: str) -> None:
        """Halt trading, synced to disk before anything else happens."""
        halt = self._halts.set("all", who=who, why=why, clock=self._clock)
        self._log.error("halted", scope="all", who=halt.who, why=halt.why)

    def _act(self, symbol: str) -> list[Order]:
        orders: list[Order] = []
        if self.books.book(symbol).signals:
            for ended in endings(self.books.book(symbol), self._context(symbol)):
                self._close_signal(ended, symbol)
        while True:
            book = self.books.book(symbol)
            step = next_step(book, self._context(symbol))
            if isinstance(step, CloseSignal):
                self._close_signal(step, symbol)
            elif isinstance(step, MoveExits):
                self._set_exits(book, step.signal.signal, step.signal.id)
                self.keeper.close_signal(step.signal.id, symbol, "done", "the exits were moved", Decimal(0))
            elif isinstance(step, SendOrder):
                if step.set_exits:
                    self._set_exits(book, step.signal.signal, step.signal.id)
                orders.append(self.intend(symbol, step.leg, step.side, step.qty, checks=step.checks,
                                          reduce_only=step.leg != "open", signal=step.signal.id))
            else:
                return orders

    def _close_signal(self, step: CloseSignal, symbol: str) -> None:
        self.keeper.close_signal(step.signal.id, symbol, step.outcome, step.reason, step.signal.filled_qty)
        self._log.info("outcome", signal=step.signal.id, symbol=symbol, outcome=step.outcome,
                       reason=step.reason)
        if step.outcome == "denied":
            self.denied[step.reason.partition(":")[0]] += 1
        elif step.outcome == "rejected":
            self.reconciler.request("an order was rejected")

    def _set_exits(self, book: SymbolBook, signal: TradingSignal, name: str) -> None:
        # A signal that keeps the side and names no exit leaves the ones in force: protection never
        # ends by omission. A new side starts with what its signal says.
        keeps_side = book.position_qty != 0 and (book.position_qty > 0) == (signal.target_qty > 0)
        stop_loss = signal.stop_loss or (book.stop_loss if keeps_side else None)
        take_profit = signal.take_profit or (book.take_profit if keeps_side else None)
        if (stop_loss, take_profit) != (book.stop_loss, book.take_profit) or not keeps_side:
            self.keeper.record(ExitsSet(symbol=signal.symbol, signal=name, stop_loss=stop_loss,
                                        take_profit=take_profit), signal.symbol)

    def intend(self, symbol: str, leg: Leg, side: Side, qty: Decimal, *, reduce_only: bool, signal: str,
                checks: dict[str, str], trigger_price: Decimal | None = None) -> Order:
        """Record an order to be sent after the commit; its id is made here, once."""
        # Without a signal the symbol stands for it: ids of two symbols never meet.
        name, run_id, seq = signal.rsplit("/", 2) if signal else (symbol, "0", "0")
        order_id = client_order_id(self.books.epoch, strategy=name, run=int(run_id), seq=int(seq), leg=leg,
                                   attempt=self.books.book(symbol).intents)
        rules = self._exchange.instruments.get(symbol)
        if rules is not None and leg in ("reduce", "close", "flatten"):  # the rules may be new
            qty = min(qty // rules.qty_increment * rules.qty_increment or qty, rules.qty_max)
        type_: OrderType = leg if leg == "stop" or leg == "take_profit" else "market"
        request = OrderRequest(client_order_id=order_id, symbol=symbol, side=side, qty=qty, type=type_,
                               reduce_only=reduce_only, trigger_price=trigger_price)
        strategy = name if signal else self._config.owner_of(symbol) or "none"
        return self.keeper.intend(request, strategy=strategy, signal=signal, leg=leg, checks=checks)

    def _check_day(self) -> None:
        loss = self.trading_state.day_loss()
        if loss and not any(h.scope == "all" for h in self._halts.list()):
            self.halt_all("executor", loss)

    def _context(self, symbol: str) -> Context:
        (state, why), now_ns = self.trading_state.of_symbol(symbol), self._clock.wall_ns()
        return Context(
            owner=self._config.owner_of(symbol), state=state, state_reason=why, limits=self._config.limits,
            instrument=self._exchange.instruments.get(symbol), prices=self.trading_state.prices(symbol),
            now_ns=now_ns, exchange_now_ns=now_ns + self._exchange.clock_offset_ns,
            exposure=self.trading_state.exposure(symbol), rate_refusal=self._exchange.refusal("entry"),
            fence_ns=self.reconciler.fence_ns)

    def _journal_halts(self) -> None:
        halts = {h.scope: h for h in self._halts.list()}
        for scope, halt in halts.items():
            if scope not in self.books.halts:
                self.keeper.record(Halted(scope=scope, who=halt.who, why=halt.why))
                self._log.warning("halted", scope=scope, who=halt.who, why=halt.why)
        for scope in [s for s in self.books.halts if s not in halts]:
            self.keeper.record(Resumed(scope=scope))
            self._log.warning("resumed", scope=scope)

    def _report(self, report: Report) -> None:
        self._publish(wire.report_topic(report.strategy), wire.encode(report))

    def report_positions(self) -> None:
        """Publish the snapshot of every symbol of every strategy."""
        for symbol in self.reconciler.traded:
            self._report_position(symbol)

    def _report_position(self, symbol: str) -> None:
        book, owner = self.books.book(symbol), self._config.owner_of(symbol)
        if owner is None or not self.reconciler.last_mono_ns:
            return  # before the first comparison nobody knows the position
        self._report(PositionReport(
            strategy=owner, symbol=symbol, position_qty=book.position_qty, entry_price=book.entry_price,
            position_version=book.version, open_orders=len(book.live_orders()),
            unknown_orders=len(book.unknown()), state=self.trading_state.of_symbol(symbol)[0],
            time_ns=self._clock.wall_ns(), executor_run=self._run))

    def beat(self) -> None:
        """Publish the heartbeat of the reports channel."""
        self._publish(wire.HEARTBEAT_TOPIC, wire.encode(Heartbeat(
            publisher="executor", run=self._run, time_ns=self._clock.wall_ns(), last_seq={},
            clock_offset_ns=self._exchange.clock_offset_ns)))

    def status(self) -> dict[str, Any]:
        """Return what botctl status shows of the executor."""
        state, why = self.trading_state.of_all()
        compared_ns = self.reconciler.last_mono_ns
        return {
            "state": state, "state_reason": why, "mode": self._config.mode, "epoch": self.books.epoch,
            "counters": {"ticks": self.losses.received, "ticks_lost": self.losses.lost,
                         **{name: getattr(self.books, name) for name in ("signals", "orders", "fills")}},
            "lost": self.losses.lost_of,
            "outcomes": {name: self.books.outcomes.get(name, 0) for name in get_args(Outcome)},
            "denied": self.denied, "dropped": self.dropped.counts,
            "symbols": {symbol: {**self.trading_state.told_of(symbol),
                                 "unprotected_s": self.protector.unprotected_s(symbol)}
                        for symbol in self.books.symbols},
            **self.trading_state.money(), "canary": self.canary.trouble,
            "canary_red": int(bool(self.canary.trouble) or not self.canary.has_answered),
            "tick_to_order": self.sender.tick_to_order.status(),
            "order_round_trip": self.sender.round_trip.status(),
            "owners": {s: name for name, table in self._config.strategy.items() for s in table.symbols},
            "clock_offset_ms": self._exchange.clock_offset_ns // 1_000_000,
            "rate": self._exchange.budget.usage, "rate_share": self._exchange.shares(),
            "reconcile_age_ms": (self._clock.mono_ns() - compared_ns) // 1_000_000 if compared_ns else None,
            "differences": self.reconciler.differences}


async def main(daemon: Daemon) -> None:
    """Turn trading signals into orders, and answer for every position."""
    config, clock, bus = daemon.config, daemon.clock, daemon.config.bus
    secret = [read_secret(config.path(getattr(config.exchange, key)), f"exchange.{key}")
              for key in ("api_key_file", "api_secret_file")]
    daemon.log.hide(*secret)
    while is_seized(config.path(config.journal.path)):  # a flatten goes on: nobody sends beside it
        if daemon.stopping.is_set():
            return
        await clock.sleep(SEIZED_S)
    await daemon.wait_for_disk()
    # Entries on their way are at most so many: there is always a connection for a close, a stop or a cancel.
    orders = pool(config.exchange, clock, config.limits.open_orders_max + SPARE_CONNECTIONS)
    exchange = Exchange(config.exchange, clock, orders=orders,
                        queries=pool(config.exchange, clock), keys=(secret[0], secret[1]),
                        rights=rights_pool(config.exchange, clock))
    publisher = ZmqPublisher(bus.reports, bus)
    halts = HaltFiles(config.state_path / "halt")
    try:
        journal = Journal(config.path(config.journal.path), clock, identity=config.identity(),
                          checkpoint_events=config.journal.checkpoint_events)
        books = journal.load(lambda seq: daemon.tell("RECONCILING", f"{READS_JOURNAL}: event {seq}"))
        executor = OrderExecutor(
            config, clock, daemon.log, run_id=daemon.run, exchange=exchange, journal=journal, books=books,
            halts=halts, publish=publisher.send, open_stream=open_stream, spawn=daemon.spawn)
    except JournalError as error:
        halts.set("all", who="executor", why=str(error), clock=clock)
        raise
    executor.begin()
    if "SUPERVISOR_ENABLED" in os.environ:  # supervisord's word to its children: health and guard are others
        executor.trading_state.expect_watchers()
    daemon.status = executor.status
    await _load(daemon, exchange)
    sockets = _open_sockets(daemon, executor)
    for task in (executor.reconciler.follow, executor.reconciler.compare, executor.reconciler.chase):
        daemon.spawn(task())
    daemon.every(CYCLE_S, executor.cycle)
    daemon.every(CYCLE_S, executor.desk.work)
    for work in (lambda: exchange.hear_usage(read_usage(config, "gateway")), executor.canary.work,
                 lambda: executor.trading_state.hear_beats(read_beats(config)), executor.beat):
        daemon.every(bus.heartbeat_ms / 1_000, work)
    daemon.every(config.executor.snapshot_ms / 1_000, executor.report_positions)
    daemon.every(config.executor.reconcile_s, journal.look)
    daemon.every(config.executor.clock_check_s, lambda: _quietly(daemon, exchange.measure_clock()))
    await daemon.stopping.wait()
    for socket in sockets.values():
        socket.close()
    await executor.end()
    publisher.close()
    journal.close()


def _open_sockets(daemon: Daemon, executor: OrderExecutor) -> dict[str, ZmqPuller | ZmqSubscriber]:
    config, bus = daemon.config, daemon.config.bus
    ticks = ZmqSubscriber(bus.ticks, bus, [wire.HEARTBEAT_TOPIC, *map(wire.tick_topic, config.symbols())])
    sockets: dict[str, ZmqPuller | ZmqSubscriber] = {bus.ticks.endpoint: ticks}

    def open_new() -> None:
        for name in config.strategy:
            endpoint = signal_endpoint(bus, name)
            if endpoint not in sockets:
                owner = name if "{strategy}" in bus.signals.endpoint else None
                sockets[endpoint] = puller = ZmqPuller(bus.signals, bus, endpoint)
                puller.watch(lambda batch, owner=owner: executor.on_signal_messages(batch, owner))

    def reread() -> None:
        open_new()  # first: when it fails nothing has changed
        for symbol in set(config.symbols()) - executor.subscribed:
            ticks.subscribe(wire.tick_topic(symbol))
        executor.subscribed |= set(config.symbols())
        executor.reconciler.request("the configuration was read again")

    open_new()
    ticks.watch(executor.on_tick_messages)
    daemon.reread = reread
    return sockets


async def _load(daemon: Daemon, exchange: Exchange) -> None:
    # The exchange may be down at our start: keep asking, nothing can be sent before.
    while not daemon.stopping.is_set():
        try:
            await exchange.load()
            for symbol in exchange.unlisted(daemon.config.symbols()):
                daemon.log.error("symbol_unlisted", symbol=symbol)
            return
        except ExchangeError as error:
            daemon.log.warning("exchange_unreachable", error=str(error))
            await daemon.clock.sleep(1.0)


async def _quietly(daemon: Daemon, work: Awaitable[None]) -> None:
    try:
        await work
    except ExchangeError as error:
        daemon.log.warning("query_failed", client_order_id="", error=str(error))


if __name__ == "__main__":
    library()
    raise SystemExit(run("executor", main))
