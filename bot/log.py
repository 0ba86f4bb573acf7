"""JSON lines on stdout: one object a line, event names from one list. Edge to python-json-logger."""

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
}


class Log:
    """The process's log. The first field of anything about an order is client_order_id."""

    def __init__(self, process: str, clock: Clock, level: str = "INFO", stream=None) -> None:
        self._clock = clock
        self._process = process
        self._logger = logging.Logger(process, level)
        handler = logging.StreamHandler(stream or sys.stdout)
        handler.setFormatter(JsonFormatter("%(message)s", rename_fields={"message": "event"},
                                           json_default=str))
        self._logger.addHandler(handler)

    def debug(self, event: str, **fields: Any) -> None:
        self._write(logging.DEBUG, event, fields)

    def info(self, event: str, **fields: Any) -> None:
        self._write(logging.INFO, event, fields)

    def warning(self, event: str, **fields: Any) -> None:
        self._write(logging.WARNING, event, fields)

    def error(self, event: str, **fields: Any) -> None:
        self._write(logging.ERROR, event, fields)

    def _write(self, level: int, event: str, fields: dict[str, Any]) -> None:
        if event not in EVENTS:
            raise KeyError(f'log event "{event}" is not listed in bot/log.py EVENTS')
        if self._logger.isEnabledFor(level):
            self._logger.log(level, event, extra={
                "ts_ns": self._clock.wall_ns(), "level": logging.getLevelName(level),
                "process": self._process, **fields})
