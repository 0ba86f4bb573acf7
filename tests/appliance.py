"""A running appliance in a test: real processes on free ports, the exchange's own truth beside ours."""

import hashlib
import hmac
import http.client
import json
import os
import signal
import subprocess
import time
from decimal import Decimal
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

import zmq

from bot.clock import Clock
from bot.config_file import load
from bot.journal import JournalReader
from bot.model import PositionReport, SignalOutcome, TradingSignal
from bot.status import gather
from bot.wire import decode_report, encode, report_topic
from tests.harness import API_KEY, API_SECRET, asker, start_process, stop_process, wait_until, write_config

BTC = "BTC/USDT:USDT"


class Appliance:
    """The processes of one configuration. Use as a context manager: whatever was started is ended."""

    def __init__(self, tmp_path: Path, **overrides: Any) -> None:
        self.path = write_config(tmp_path, **overrides)
        self.config = load(self.path)
        self.processes: dict[str, subprocess.Popen] = {}
        self.clock_offset_ms = 0  # of the exchange, where a test sets one

    def __enter__(self) -> "Appliance":
        return self

    def __exit__(self, *_: object) -> None:
        for name in reversed(list(self.processes)):
            self.stop(name)

    def start(self, *names: str) -> None:
        """Start processes by name: paper, gateway, executor, strategy-NAME."""
        for name in names:
            module, _, strategy = name.partition("-")
            args = ("--name", strategy) if strategy else ()
            self.processes[name] = start_process(f"bot.{module}", self.path, *args)

    def stop(self, name: str) -> int:
        """End one process cleanly (CONT first, in case a test froze it)."""
        process = self.processes.pop(name)
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
        return stop_process(process)

    def beats(self) -> dict[str, dict[str, Any]]:
        """Return the beat files that are there by name, also those of a strategy that is not configured."""
        files = [*self.config.path("run").glob("*.json"), *self.config.path("strategy").glob("*/*.json")]
        return {path.stem: json.loads(path.read_text()) for path in files}

    def kill(self, name: str) -> None:
        """kill -9, and wait until it is gone."""
        process = self.processes.pop(name)
        process.kill()
        process.wait()

    def status(self) -> dict[str, Any]:
        """Return what botctl status shows."""
        return gather(self.config, Clock())

    def wait_running(self, timeout: float = 30) -> None:
        """Wait until the executor says RUNNING."""
        wait_until(lambda: self.status()["state"] == "RUNNING", timeout)

    def journal(self) -> JournalReader:
        return JournalReader(self.config.path(self.config.journal.path))

    def log(self, name: str) -> list[dict[str, Any]]:
        """Return the JSON log lines of a process."""
        path = self.path.parent / f"bot.{name.partition('-')[0]}.log"
        return [json.loads(line) for line in path.read_text().splitlines() if line.startswith("{")]

    def ask(self, method: str, path: str, **params: Any) -> Any:
        """Ask the exchange itself, signed by an implementation of our own; return its JSON."""
        params = {k: v for k, v in params.items() if v is not None}
        params["timestamp"] = time.time_ns() // 1_000_000 + self.clock_offset_ms
        query = urlencode(params)
        query += "&signature=" + hmac.new(API_SECRET.encode(), query.encode(), hashlib.sha256).hexdigest()
        return self._http(method, f"{path}?{query}", None)

    def control(self, method: str, path: str, body: Any = None) -> Any:
        """Use the paper exchange's control endpoint, for example control("POST", "/paper/faults", {...})."""
        return self._http(method, path, json.dumps(body) if body is not None else None)

    def _http(self, method: str, target: str, body: str | None) -> Any:
        url = urlsplit(self.config.exchange.rest_url)
        connection = http.client.HTTPConnection(url.hostname or "", url.port, timeout=5,
                                                source_address=asker())
        try:
            connection.request(method, target, body, {"X-MBX-APIKEY": API_KEY})
            return json.loads(connection.getresponse().read())
        finally:
            connection.close()

    def exchange_position(self, symbol: str = "BTCUSDT") -> Decimal:
        """Return the position as the exchange tells it."""
        rows = self.ask("GET", "/fapi/v3/positionRisk", symbol=symbol)
        return sum((Decimal(row["positionAmt"]) for row in rows), Decimal(0))

    def exchange_orders(self, symbol: str = "BTCUSDT") -> list[dict[str, Any]]:
        """Return all plain orders the exchange ever saw of this account."""
        return self.ask("GET", "/fapi/v1/allOrders", symbol=symbol, limit=1000)

    def open_stops(self, symbol: str = "BTCUSDT") -> list[dict[str, Any]]:
        """Return the conditional orders at rest."""
        return self.ask("GET", "/fapi/v1/openAlgoOrders", symbol=symbol)

    def our_position(self, symbol: str = BTC) -> Decimal:
        """Return the position as the journal folds."""
        return self.journal().books().book(symbol).position_qty


class Signaler:
    """A strategy played by the test: pushes signals, hears reports."""

    def __init__(self, appliance: Appliance, strategy: str = "levels") -> None:
        bus = appliance.config.bus
        self._context = zmq.Context()
        self.push = self._context.socket(zmq.PUSH)
        self.push.setsockopt(zmq.LINGER, 0)
        self.push.connect(bus.signals.endpoint)
        self.reports = self._context.socket(zmq.SUB)
        self.reports.setsockopt(zmq.SUBSCRIBE, report_topic(strategy))
        self.reports.connect(bus.reports.endpoint)
        self.ticks = self._context.socket(zmq.SUB)
        self.ticks.setsockopt(zmq.SUBSCRIBE, b"t/")
        self.ticks.connect(bus.ticks.endpoint)
        self.strategy, self.run, self.seq = strategy, time.time_ns(), 0
        self.heard: list[Any] = []

    def close(self) -> None:
        self._context.destroy(linger=0)

    def listen(self, wait_ms: int = 50) -> list[Any]:
        """Take in all reports that are there; return everything heard so far."""
        while self.reports.poll(wait_ms):
            self.heard.append(decode_report(self.reports.recv_multipart()[1]))
            wait_ms = 0
        return self.heard

    def position(self, timeout: float = 20) -> PositionReport:
        """Return the newest position report."""
        def newest() -> PositionReport | None:
            return next((m for m in reversed(self.listen()) if isinstance(m, PositionReport)), None)
        self.heard = [m for m in self.heard if not isinstance(m, PositionReport)]
        return wait_until(newest, timeout)

    def outcome(self, seq: int, timeout: float = 20) -> SignalOutcome:
        """Return the outcome of one of our signals."""
        return wait_until(lambda: next((m for m in self.listen() if isinstance(m, SignalOutcome)
                                        and (m.run, m.seq) == (self.run, seq)), None), timeout)

    def signal(self, qty: str, *, mark: float, stop_loss: str | None = None, take_profit: str | None = None,
               **changes: Any) -> TradingSignal:
        """Make the next signal, fresh, decided on the newest position version heard."""
        self.seq += 1
        now = time.time_ns()
        version = next((m.position_version for m in reversed(self.heard) if isinstance(m, PositionReport)), 0)
        fields: dict[str, Any] = {
            "strategy": self.strategy, "run": self.run, "seq": self.seq, "symbol": BTC,
            "target_qty": Decimal(qty), "stop_loss": Decimal(stop_loss) if stop_loss else None,
            "take_profit": Decimal(take_profit) if take_profit else None, "created_ns": now,
            "expires_ns": now + 5_000_000_000, "position_version": version, "tick_run": 1, "tick_seq": 1,
            "tick_price": mark, "tick_exchange_ns": now, "tick_receive_ns": now, "reason": "a test"}
        return TradingSignal(**(fields | changes))

    def send(self, signal: TradingSignal) -> TradingSignal:
        """Push it, waiting for the executor to be there."""
        self.push.send(encode(signal))
        return signal


def pid_exists(pid: int) -> bool:
    """Return whether a process lives."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
