"""The strategy process: a user's class between the ticks, the signals and the reports channel.

It holds no key and reaches nothing but the bus. All it decides is in runner.py; here are its sockets.
"""

import argparse
import sys

from bot.bus import ZmqPusher, ZmqSubscriber, signal_endpoint
from bot.daemon import Daemon, run
from bot.outbox import Outbox, OutboxFile
from bot.runner import StrategyRunner
from bot.user_class import load_class
from bot.wire import HEARTBEAT_TOPIC, report_topic

CYCLE_S = 0.05  # a tenth of the shortest wait that matters, resend_ms


async def main(daemon: Daemon) -> None:
    """Run one strategy: Ticks in, TradingSignals out."""
    config, name = daemon.config, daemon.args.name
    strategy_class = load_class(config, name)
    outbox = Outbox(OutboxFile(config.run_path(daemon.name) / f"{name}.outbox"))
    pusher = ZmqPusher(config.bus.signals, config.bus, signal_endpoint(config.bus, name))
    runner = StrategyRunner(name, config, strategy_class, run=daemon.run, clock=daemon.clock, outbox=outbox,
                            send=pusher.send, log=daemon.log)
    ticks = ZmqSubscriber(config.bus.ticks, config.bus, runner.tick_topics())
    reports = ZmqSubscriber(config.bus.reports, config.bus, [HEARTBEAT_TOPIC, report_topic(name)])
    daemon.status = runner.status
    said = ""

    def turn() -> None:
        nonlocal said
        sentence = runner.cycle(daemon.clock.mono_ns())
        if sentence and sentence != said:
            daemon.log.info("cycle", did=sentence)
        said = sentence

    ticks.watch(runner.on_tick_messages)
    reports.watch(runner.on_report_messages)
    daemon.every(CYCLE_S, turn)
    await daemon.stopping.wait()
    for socket in (ticks, reports, pusher):
        socket.close()


def _add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--name", required=True, help="the NAME of a [strategy.NAME] table in the file")


if __name__ == "__main__":
    sys.exit(run("strategy", main, add_arguments=_add_name,
                 process_name=lambda args: f"strategy-{args.name}"))
