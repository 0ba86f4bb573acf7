"""JSON lines on stdout: one object a line, event names from one list. Edge to python-json-logger.

A loop that logs cannot fill the disk: each event may burst, then comes once a second, and says how
many lines it left out. What moves or proves money is never left out: limits bound it already.
"""

import logging
import sys
from typing import Any

from pythonjsonlogger.json import JsonFormatter

from bot.clock import Clock

# Every event that may be logged, with what it tells. A test holds the code against this list.
EVENTS = {
    "started": "the process runs; config fingerprint, version, pid",
    "stopping": "a stop was requested; why",
    "stopped": "the process ends cleanly",
    "crashed": "an error ended the process; traceback",
    "message_dropped": "a message was malformed, oversized, of another version or not ours",
    "warm": "the strategy has its instruments and history; Ticks reach it from now on",
    "signal_sent": "a Target became a signal: written to the outbox and pushed",
    "signal_outcome": "the executor closed a signal",
    "target_rounded": "a Target was moved onto the instrument's grid; what it was and what was sent",
    "target_held": "a Target waits; for what",
    "target_refused": "a Target did not become a signal; the rule, the value, the count since the last line",
    "outbox_failed": "the outbox could not be written; the signal was not sent, or is not yet synced",
    "outbox_cut": "a torn record at the end of the outbox was left out; its signal never existed",
    "cycle": "what a turn of the loop did, in a sentence",
    "private_stream_up": "the account's own stream is connected; the books are compared next",
    "private_stream_down": "the account's own stream is lost; no entry until it is back and compared",
    "reconciled": "books and exchange were compared; differences, if any",
    "reconcile_failed": "a comparison could not be finished; it is tried again",
    "query_failed": "the exchange did not answer a question; it is asked again",
    "order_missed": "the exchange does not know an order whose outcome is unknown; evidence, not proof",
    "order_absent": "an unknown order was missed long enough, everywhere: it never existed",
    "order_answered": "an order was sent and answered; what the answer proves",
    "cancel_answered": "a cancel was sent and answered",
    "status_unrecognized": "the exchange used an order status nobody here knows; kept raw",
    "fill": "an execution of ours was booked",
    "signal": "a new signal was journaled",
    "outcome": "a signal got its one outcome",
    "flattening": "a step of flatten: halt, kill, cancel, close, flat",
    "canary": "whether the exchange takes a stop changed; while it does not, nothing opens",
    "dead_man": "the executor is silent or in a loop for too long; our entries are canceled, stops stay",
    "dead_man_failed": "the dead-man's switch could not ask the exchange; it tries again",
    "command_unanswered": "an operator's command was done, its answer could not be written",
    "commanded": "an operator's command was answered; who, why, the answer",
    "adopted": "an operator took over what the exchange says of a position",
    "symbol_locked": "no new risk in a symbol; why",
    "symbol_unlocked": "a lock's cause is gone",
    "halted": "trading is halted; who, why",
    "halt_failed": "a crash loop's halt could not be written; it is tried again",
    "resumed": "a halt was ended by the operator",
    "position_unprotected": "a position lacked its stop past the budget and is being closed",
    "late_fill_closed": "an order counted as absent filled after all; the excess is being closed",
    "stream_up": "a market stream is connected",
    "stream_down": "a market stream ended, by whom and why; it is opened again after wait_ms, at random less",
    "feed_condition": "a symbol's data is fresh, quiet (marks, no trades or quotes) or stale (no marks)",
    "history_failed": "candles could not be fetched; it is tried again",
    "history_refused": "a subscription asks for a history that does not exist or is one too many",
    "exchange_unreachable": "the exchange does not answer at our start; it is tried again",
    "config_reread": "the file was read again on SIGHUP; what is in force now, and what waits for a restart",
    "symbol_unlisted": "the exchange does not list a symbol of the config: it is locked, the others go on",
    "config_refused": "the file to be read again is wrong, or cannot be put in force; nothing changed",
    "disk_full": "there is no room to write below state_dir: the process waits for it",
    "beat_unwritten": "the beat could not be written anew; the old file is overwritten in place",
    "page_unavailable": "the status page's port could not be bound; health works without",
    "metrics_unavailable": "the metrics port could not be bound; the process works without",
    "finding": "health found something wrong: which rule, which process, the limit and the value",
    "finding_ended": "a finding is gone; how long it lasted",
    "alert_undelivered": "the receiver of what cannot wait did not take it; it is tried again",
    "killed": "a process was ended by force, to be started again; why"}
MONEY = frozenset((
    "signal", "signal_sent", "signal_outcome", "outcome", "order_answered", "cancel_answered", "order_absent",
    "order_missed", "fill", "halted", "resumed", "commanded", "adopted", "position_unprotected",
    "symbol_locked", "symbol_unlocked", "flattening", "dead_man", "dead_man_failed", "command_unanswered",
    "reconciled", "canary", "status_unrecognized", "crashed", "killed"))
BURST = 100  # lines of one event at once; a start of ten strategies logs fewer
PER_S = 1.0  # then; 40 events of 300 bytes at this rate are 1 GB a day, and supervisord rotates at 20 MB
SECRET_CHARS_MIN = 8  # shorter ones would blot out words


class Log:
    """The process's log. The first field of anything about an order is client_order_id."""

    def __init__(self, process: str, clock: Clock, level: str = "INFO", stream=None) -> None:
        self._clock = clock
        self._process = process
        self._logger = logging.Logger(process, level)
        self._formatter = _Formatter([], json_default=str)
        handler = logging.StreamHandler(stream or sys.stdout)
        handler.setFormatter(self._formatter)
        self._logger.addHandler(handler)
        self._buckets: dict[str, tuple[float, int]] = {}  # event -> lines left, as of when (monotonic)
        self.suppressed: dict[str, int] = {}  # event -> lines left out in this run
        self._unsaid: dict[str, int] = {}

    def hide(self, *secrets: str) -> None:
        """Blot these texts out of every line from now on, wherever they stand."""
        self._formatter.secrets += tuple(s for s in secrets if len(s) >= SECRET_CHARS_MIN)

    def info(self, event: str, **fields: Any) -> None:
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self._write(logging.ERROR, event, fields)

    def _write(self, level: int, event: str, fields: dict[str, Any]) -> None:
        if event not in EVENTS:
            raise KeyError(f'log event "{event}" is not listed in bot/log.py EVENTS')
        if self._logger.isEnabledFor(level) and self._may_write(event):
            if event in self._unsaid:
                fields["suppressed"] = self._unsaid.pop(event)
            # A dict as the message: `extra` would refuse names that logging uses itself ("process", "name").
            self._logger.log(level, {
                "ts_ns": self._clock.wall_ns(), "level": logging.getLevelName(level),
                "process": self._process, "event": event, **fields})

    def _may_write(self, event: str) -> bool:
        if event in MONEY:
            return True
        now_ns = self._clock.mono_ns()
        lines, then_ns = self._buckets.get(event, (BURST, now_ns))
        lines = min(BURST, lines + (now_ns - then_ns) / 1e9 * PER_S)
        self._buckets[event] = (lines - 1 if lines >= 1 else lines, now_ns)
        if lines < 1:
            self.suppressed[event] = self.suppressed.get(event, 0) + 1
            self._unsaid[event] = self._unsaid.get(event, 0) + 1
        return lines >= 1


class _Formatter(JsonFormatter):
    secrets: tuple[str, ...] = ()

    def format(self, record: logging.LogRecord) -> str:
        line = super().format(record)
        for secret in self.secrets:
            line = line.replace(secret, "***")
        return line


class Tally:
    """Counts by reason; the first is logged at once, then one line per reason each 10 s at most."""

    EVERY_NS = 10_000_000_000  # a flood must not fill the disk with what it says about itself

    def __init__(self, event: str, log: Log, clock: Clock) -> None:
        self.counts: dict[str, int] = {}
        self._event, self._log, self._clock = event, log, clock
        self._said: dict[str, tuple[int, int]] = {}  # reason -> (when, count then)

    def add(self, reason: str, number: int = 1, **fields: Any) -> None:
        """Count, and perhaps log: `count` since the last line of this reason, `total` of this run."""
        now_ns, total = self._clock.mono_ns(), self.counts.get(reason, 0) + number
        self.counts[reason] = total
        said_ns, said_total = self._said.get(reason, (-self.EVERY_NS, 0))
        if now_ns - said_ns >= self.EVERY_NS:
            self._said[reason] = (now_ns, total)
            self._log.warning(self._event, reason=reason, count=total - said_total, total=total, **fields)
