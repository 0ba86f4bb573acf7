"""The strategy runner: Ticks in, the user's class asked, TradingSignals out until acknowledged.

The whole logic of the strategy process, without its sockets: time, outbox and the way out are passed
in. What the user's class raises goes through: nobody knows what state it left behind.
"""

from collections.abc import Callable, Iterator
from math import inf
from typing import Any

import msgspec

from bot.clock import Clock
from bot.config import Config, StrategyConfig
from bot.crash import point
from bot.errors import ConfigError, WireError
from bot.log import Log, Tally
from bot.model import (
    Ack,
    Candle,
    FillReport,
    Heartbeat,
    Instrument,
    OrderReport,
    PositionReport,
    SignalOutcome,
    Snapshot,
    Target,
    Tick,
    TradingSignal,
)
from bot.outbox import Key, Outbox
from bot.targets import REASON_MAX, Refusal, TokenBucket, fit, sent_of
from bot.user_class import history_of
from bot.wire import (
    HEARTBEAT_TOPIC,
    LossCounter,
    decode_report,
    decode_tick,
    encode,
    snapshot_topic,
    tick_topic,
)

LEVELS_MAX = 100  # per symbol in a beat; more lines than that is no picture
TEXT_MAX = 200  # characters of foreign bytes in a log line
RESEND_NS_MAX = 10_000_000_000  # waits double: what a slow executor has not read yet must not become more
OUTCOME_WAIT_NS = 2_000_000_000  # most signals have ended by then; an unknown order takes longer

Batch = list[tuple[bytes, bytes]]
SymbolReport = SignalOutcome | OrderReport | FillReport | PositionReport


class _Waiting(msgspec.Struct, frozen=True):
    # A Target on its way, with what it was decided on. position_version None: not known then.
    wish: Target
    target: Target
    tick: Tick
    created_ns: int
    since_ns: int
    position_version: int | None


class StrategyRunner:
    """One strategy between its ticks, its reports and its signals.

    send: hands raw bytes to the executor, False when it does not take them. Handlers take lists of
    (topic, raw). What user code raises goes through.
    """

    def __init__(self, name: str, config: Config, strategy_class: type, *, run: int, clock: Clock,
                 outbox: Outbox, send: Callable[[bytes], bool], log: Log) -> None:
        self.name, self.config, self.run = name, config, run
        self.table: StrategyConfig = config.strategy[name]
        self.symbols = tuple(dict.fromkeys(self.table.symbols + self.table.listen))
        self.losses = LossCounter()
        self.dropped = Tally("message_dropped", log, clock)
        self.refused = Tally("target_refused", log, clock)
        self._failed = Tally("outbox_failed", log, clock)
        self._class, self._clock, self._log = strategy_class, clock, log
        self._outbox, self._send = outbox, send
        self._strategy: Any = None
        self._instruments: dict[str, Instrument] = {}
        self._history: dict[str, tuple[Candle, ...]] = {}
        wanted = history_of(strategy_class, config, name)
        self._instrument_topics = {snapshot_topic(symbol): symbol for symbol in self.symbols}
        self._history_topics = {snapshot_topic(symbol, *wanted): symbol for symbol in self.symbols if wanted}
        self._ticks: dict[str, Tick] = {}
        self._positions: dict[str, PositionReport] = {}
        self._gateway_ns = self._executor_ns = -inf  # when each was last heard, monotonic
        self._executor_run = 0
        self._stale: tuple[str, ...] = ()
        self._waiting: dict[str, _Waiting] = {}
        self._held: dict[str, str] = {}  # symbol -> what its waiting Target waits for
        self._asked: dict[str, int] = {}  # when each symbol's missing outcome was last asked for, monotonic
        self._bucket = TokenBucket(self.table.signals_per_s_max)
        self._seq = self._acked = 0
        self._pushed: dict[Key, tuple[int, int]] = {}  # when each is due again, monotonic, and the wait then
        self._sent = {symbol: sent_of(signal, 0) for symbol, signal in outbox.newest().items()}
        if outbox.cut_bytes:
            log.warning("outbox_cut", cut_bytes=outbox.cut_bytes)

    def tick_topics(self) -> list[bytes]:
        """Return what to subscribe to on the ticks channel; a history topic is also a question."""
        ticks = [tick_topic(symbol) for symbol in self.symbols]
        return [HEARTBEAT_TOPIC, *ticks, *self._instrument_topics, *self._history_topics]

    def on_tick_messages(self, batch: Batch) -> None:
        """Take messages of the ticks channel, in order."""
        for topic, message in self._decoded(batch, decode_tick, "ticks"):
            self._gateway_ns = self._clock.mono_ns()
            if isinstance(message, Tick):
                self._on_tick(message)
            elif isinstance(message, Heartbeat):
                self.losses.saw_heartbeat(message, frozenset(self.symbols))
                self._stale = message.stale
            else:
                self._on_snapshot(topic, message)

    def on_report_messages(self, batch: Batch) -> None:
        """Take messages of the reports channel, in order."""
        for _, message in self._decoded(batch, decode_report, "reports"):
            now_ns = self._executor_ns = self._clock.mono_ns()
            if isinstance(message, Heartbeat):
                self._saw_executor(message.run)
            elif message.strategy != self.name:
                self._drop("foreign", "reports", f"for strategy {message.strategy!r}")
            elif isinstance(message, Ack):
                self._on_ack((message.run, message.seq))
            elif message.symbol not in self.table.symbols:
                self._drop("foreign", "reports", f"for symbol {message.symbol!r}")
            else:
                self._on_report(message, now_ns)

    def cycle(self, now_ns: int) -> str:
        """Send again what is due, and let waiting Targets go; return a sentence when something happened."""
        pushed = self._flush(now_ns)
        self._ask_outcomes(now_ns)
        for symbol in list(self._waiting):
            self._release(symbol, now_ns)
        if pushed:
            return f"sent {pushed} of {len(self._outbox)} unacknowledged signals again"
        missing = self._missing()
        return f"waiting for the gateway's snapshots: {', '.join(missing)}" if missing else ""

    def status(self) -> dict[str, Any]:
        """Return what botctl shows of this process."""
        return {
            "ticks": self.losses.received, "ticks_lost": self.losses.lost, "lost": self.losses.lost_of,
            "ticks_repeated": self.losses.repeated, "dropped": self.dropped.counts,
            "refused": self.refused.counts, "signals": self._seq, "acked": self._acked,
            "outbox": len(self._outbox), "warm": self._strategy is not None,
            "waiting_for": self._missing(), "held": self._held, "levels": self._levels(),
            "positions": {symbol: {"qty": str(position.position_qty), "version": position.position_version,
                                   "state": position.state} for symbol, position in self._positions.items()}}

    def _levels(self) -> dict[str, list[float]]:
        show = getattr(self._strategy, "levels", None)  # optional: what the status page draws
        return {symbol: [float(price) for price in prices][:LEVELS_MAX]
                for symbol, prices in show().items()} if show else {}

    def _decoded(self, batch: Batch, decode: Callable[[bytes], Any], channel: str) -> Iterator[tuple]:
        for topic, raw in batch:
            try:
                message = decode(raw)
            except WireError as error:
                self._drop(error.reason, channel, str(error))
                continue
            yield topic, message

    def _drop(self, reason: str, channel: str, text: str) -> None:
        self.dropped.add(reason, channel=channel, text=text[:TEXT_MAX])

    def _on_tick(self, tick: Tick) -> None:
        if tick.symbol not in self.symbols:
            self._drop("foreign", "ticks", f"for symbol {tick.symbol!r}")
        elif not 0 < tick.price < inf:
            self._drop("malformed", "ticks", f"the price of {tick.symbol} must be above 0; was {tick.price}")
        elif self.losses.saw_tick(tick):
            self._ticks[tick.symbol] = tick
            if self._strategy is not None and (target := self._strategy.on_tick(tick)) is not None:
                self._want(target)

    def _on_snapshot(self, topic: bytes, snapshot: Snapshot) -> None:
        # The instrument's topic is a prefix of everybody's history topics: others' answers pass by.
        symbol = self._instrument_topics.get(topic) or self._history_topics.get(topic)
        if symbol is None:
            return
        instrument = snapshot.instrument
        increments = (instrument.price_increment, instrument.qty_increment)
        if instrument.symbol != symbol or not all(i.is_finite() and i > 0 for i in increments):
            self._drop("malformed", "ticks", f"{instrument!r}")
            return
        self._instruments[symbol] = instrument
        if topic in self._history_topics and self._strategy is None:
            self._history[symbol] = snapshot.candles
        if self._strategy is None and not self._missing():
            self._warm_up()

    def _missing(self) -> list[str]:
        asked = self.symbols if self._history_topics else ()
        return [*(symbol for symbol in self.symbols if symbol not in self._instruments),
                *(f"history of {symbol}" for symbol in asked if symbol not in self._history)]

    def _warm_up(self) -> None:
        try:
            self._strategy = self._class(dict(self.table.settings), self._instruments)
        except (ValueError, TypeError) as error:
            raise ConfigError(f"strategy.{self.name}.settings: {self.table.class_path} refuses them: "
                              f"{error}") from error
        for symbol, candles in self._history.items():
            self._strategy.on_history(symbol, candles)
        for position in self._positions.values():
            self._tell(position)
        self._log.info("warm", candles={symbol: len(candles) for symbol, candles in self._history.items()})

    def _tell(self, report: SymbolReport) -> None:
        if self._strategy is not None and hasattr(self._strategy, "on_report"):
            self._strategy.on_report(report)

    def _saw_executor(self, run: int) -> None:
        # Another executor process: what its predecessor said of positions is no longer the newest, and what
        # that one had not read is lost.
        if run != self._executor_run:
            self._executor_run = run
            self._positions.clear()
            self._pushed.clear()

    def _on_ack(self, key: Key) -> None:
        point("runner.ack_heard")
        self._pushed.pop(key, None)
        try:
            self._acked += self._outbox.acknowledge(key)
        except OSError as error:
            self._acked += 1
            self._failed.add("acknowledge", error=str(error))
        point("runner.ack_written")

    def _on_report(self, report: SymbolReport, now_ns: int) -> None:
        if isinstance(report, PositionReport):
            self._saw_executor(report.executor_run)
            self._positions[report.symbol] = report
        elif isinstance(report, SignalOutcome):
            self._log.info("signal_outcome", run=report.run, seq=report.seq, symbol=report.symbol,
                           outcome=report.outcome, reason=report.reason, filled_qty=report.filled_qty)
            sent = self._sent.get(report.symbol)
            if sent is not None and (sent.run, sent.seq) == (report.run, report.seq):
                sent.saw_outcome(report.outcome, now_ns)
        self._tell(report)

    def _want(self, wish: Target) -> None:
        target = fit(wish, symbols=self.table.symbols, instruments=self._instruments, ticks=self._ticks)
        if isinstance(target, Refusal):
            self.refused.add(target.reason, text=target.text)
            return
        symbol, now_ns = target.symbol, self._clock.mono_ns()
        position = self._positions.get(symbol)
        self._waiting[symbol] = _Waiting(wish, target, self._ticks[symbol], self._clock.wall_ns(), now_ns,
                                         position.position_version if position else None)
        self._release(symbol, now_ns)

    def _release(self, symbol: str, now_ns: int) -> None:
        waiting, position = self._waiting[symbol], self._positions.get(symbol)
        if position is not None and self._is_settled(waiting.target, position, now_ns):
            self._forget(symbol)
            return
        hindrance = self._hindrance(waiting.target, position, now_ns)
        # Older than either the executor would deny it: no need to bother its journal.
        ttl_ms = min(self.table.signal_ttl_ms, self.config.limits.signal_age_ms_max)
        if now_ns - waiting.since_ns > ttl_ms * 1_000_000:
            self._forget(symbol)
            self.refused.add("held_too_long", symbol=symbol,
                             text=f"limit {ttl_ms} ms; it waited for {hindrance or 'this process'}")
        elif not hindrance and position is not None:
            self._forget(symbol)
            self._emit(waiting, position.position_version, now_ns)
        elif self._held.get(symbol) != hindrance:
            self._held[symbol] = hindrance
            self._log.info("target_held", symbol=symbol, waits_for=hindrance, target=repr(waiting.target))

    def _forget(self, symbol: str) -> None:
        del self._waiting[symbol]
        self._held.pop(symbol, None)

    def _is_settled(self, target: Target, position: PositionReport, now_ns: int) -> bool:
        sent = self._sent.get(target.symbol)
        if sent is None or not sent.says(target):
            return False
        is_lost = sent.run != self.run and (sent.run, sent.seq) not in dict(self._outbox.pending())
        return not sent.may_repeat(position.position_version, position.position_qty, now_ns, is_lost=is_lost)

    def _hindrance(self, target: Target, position: PositionReport | None, now_ns: int) -> str:
        silence_ns = self.config.bus.silence_ms * 1_000_000
        sent = self._sent.get(target.symbol)
        if position is None:
            return "the executor's first position report"
        if now_ns - self._executor_ns > silence_ns:
            return "the executor, which is silent"
        if now_ns - self._gateway_ns > silence_ns:
            return "the gateway, which is silent"
        if target.symbol in self._stale:
            return "fresh data of the symbol"
        if sent is not None and sent.says(target) and now_ns < sent.retry_ns:
            return f"the back-off after {sent.outcome}"
        return "" if self._bucket.has_token(now_ns) else "signals_per_s_max"

    def _emit(self, waiting: _Waiting, position_version: int, now_ns: int) -> None:
        target, tick = waiting.target, waiting.tick
        if waiting.position_version not in (None, position_version):
            self.refused.add("position_changed", symbol=target.symbol, text="decided on position version "
                             f"{waiting.position_version}, it is {position_version} now")
            return
        if len(self._outbox) >= self.table.outbox_max:
            self.refused.add("outbox_full", symbol=target.symbol, text=f"limit {self.table.outbox_max}")
            return
        self._bucket.take()
        self._seq += 1
        signal = TradingSignal(
            strategy=self.name, run=self.run, seq=self._seq, symbol=target.symbol, target_qty=target.qty,
            stop_loss=target.stop_loss, take_profit=target.take_profit, created_ns=waiting.created_ns,
            expires_ns=waiting.created_ns + self.table.signal_ttl_ms * 1_000_000,
            position_version=position_version, tick_run=tick.run, tick_seq=tick.seq,
            tick_price=tick.price, tick_exchange_ns=tick.exchange_ns, tick_receive_ns=tick.receive_ns,
            reason=target.reason[:REASON_MAX])
        point("runner.decided")
        try:
            self._outbox.append(signal)
        except OSError as error:
            self._failed.add("append", symbol=target.symbol, error=str(error))
            return
        except WireError as error:
            self.refused.add("malformed", symbol=target.symbol, text=str(error))
            return
        point("runner.appended")
        self._sent[target.symbol] = sent_of(signal, now_ns, before=self._sent.get(target.symbol))
        self._asked[target.symbol] = now_ns
        self._flush(now_ns)
        if target != waiting.wish:
            self._log.info("target_rounded", seq=signal.seq, wish=repr(waiting.wish), target=repr(target))
        self._log.info("signal_sent", seq=signal.seq, symbol=signal.symbol, target_qty=signal.target_qty,
                       stop_loss=signal.stop_loss, take_profit=signal.take_profit, reason=signal.reason)

    def _ask_outcomes(self, now_ns: int) -> None:
        # Reports may be lost: to a signal that it knows the executor answers with its outcome.
        pending = dict(self._outbox.pending())
        for symbol, sent in self._sent.items():
            if sent.run != self.run or sent.outcome is not None or (sent.run, sent.seq) in pending:
                self._asked[symbol] = now_ns
            elif now_ns - self._asked.get(symbol, 0) >= OUTCOME_WAIT_NS:
                self._send(encode(self._outbox.newest()[symbol]))
                self._asked[symbol] = now_ns

    def _flush(self, now_ns: int) -> int:
        # In order, so that no signal overtakes an older one that was never pushed.
        pushed, first_wait_ns = 0, self.table.resend_ms * 1_000_000
        for key, raw in self._outbox.pending():
            due_ns, wait_ns = self._pushed.get(key, (now_ns, first_wait_ns))
            if now_ns >= due_ns:
                if not self._send(raw):
                    break
                point("runner.pushed")
                self._pushed[key] = now_ns + wait_ns, min(wait_ns * 2, max(RESEND_NS_MAX, first_wait_ns))
                pushed += 1
        try:
            self._outbox.sync()
            if pushed:
                point("runner.synced")
        except OSError as error:
            self._failed.add("sync", error=str(error))
        return pushed
