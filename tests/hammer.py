"""A strategy process that signals as fast as the executor takes it: real runner, outbox and sockets.

Its Ticks are its own; every target is either reached already or denied, so that no order is made.
What it has sent is in its ledger: one line for each signal, written when the outbox has it.
Run: python -m tests.hammer --config FILE --name NAME; settings: ledger (path), signals (how many).
"""

import os
import sys
from decimal import Decimal
from pathlib import Path

from bot.bus import ZmqPusher, ZmqSubscriber, signal_endpoint
from bot.daemon import Daemon, run
from bot.log import Log
from bot.model import Heartbeat, Instrument, Snapshot, Target, Tick, TradingSignal
from bot.outbox import Outbox, OutboxFile
from bot.runner import StrategyRunner
from bot.strategy import _add_name
from bot.wire import HEARTBEAT_TOPIC, encode, report_topic, snapshot_topic, tick_topic

BACKLOG_MAX = 400  # unacknowledged: enough to keep the executor busy over a fsync
BURST = 50  # Ticks a turn


class Restless:
    """Wants something else at each Tick."""

    def __init__(self, settings, instruments):
        self._turn = 0

    def on_tick(self, tick):
        self._turn += 1
        too_much = Decimal(10_000_000 + self._turn)  # above every limit
        return Target(tick.symbol, too_much if self._turn % 2 else Decimal(0), reason="restless")


class LedgerOutbox(Outbox):
    """An outbox that also tells the test what it took in."""

    def __init__(self, file: OutboxFile, ledger: Path) -> None:
        super().__init__(file)
        self._ledger = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self.taken = len(ledger.read_bytes().split(b"\n")) - 1

    def append(self, signal: TradingSignal) -> None:
        super().append(signal)
        os.write(self._ledger, f"{signal.strategy}/{signal.run}/{signal.seq}\n".encode())
        self.taken += 1


async def main(daemon: Daemon) -> None:
    """Hammer the executor with signals."""
    config, name, clock = daemon.config, daemon.args.name, daemon.clock
    table = config.strategy[name]
    outbox = LedgerOutbox(OutboxFile(config.run_path(daemon.name) / f"{name}.outbox"),
                          Path(table.settings["ledger"]))
    pusher = ZmqPusher(config.bus.signals, config.bus, signal_endpoint(config.bus, name))
    runner = StrategyRunner(name, config, Restless, run=daemon.run, clock=clock, outbox=outbox,
                            send=pusher.send, log=Log(name, clock, "WARNING"))
    symbol, seq = table.symbols[0], 0
    reports = ZmqSubscriber(config.bus.reports, config.bus, [HEARTBEAT_TOPIC, report_topic(name)])
    one = Decimal("0.001")
    instrument = Instrument(symbol=symbol, exchange_symbol="X", status="TRADING", price_increment=one,
                            qty_increment=one, qty_min=one, qty_max=one, notional_min=one, contract_size=one,
                            settle="USDT")
    runner.on_tick_messages([(snapshot_topic(symbol), encode(Snapshot(
        instrument=instrument, timeframe="", candles=(), time_ns=0, run=1)))])

    def tick() -> tuple[bytes, bytes]:
        nonlocal seq
        seq, now_ns = seq + 1, clock.wall_ns()
        return tick_topic(symbol), encode(Tick(
            symbol=symbol, kind="trade", price=100.0, size=1.0, bid=None, bid_size=None, ask=None,
            ask_size=None, side="buy", exchange_ns=now_ns, receive_ns=now_ns, run=1, seq=seq))

    def turn() -> None:
        left = min(BURST, BACKLOG_MAX - len(outbox), table.settings["signals"] - outbox.taken)
        beat = Heartbeat(publisher="gateway", run=1, time_ns=0, last_seq={})
        runner.on_tick_messages([(HEARTBEAT_TOPIC, encode(beat)), *(tick() for _ in range(left))])
        runner.cycle(clock.mono_ns())

    reports.watch(runner.on_report_messages)
    daemon.status = runner.status
    daemon.every(0.005, turn)
    await daemon.stopping.wait()


if __name__ == "__main__":
    sys.exit(run("hammer", main, add_arguments=_add_name,
                 process_name=lambda args: f"strategy-{args.name}"))
