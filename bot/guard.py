"""guard: watches health in turn: kills it when it hangs, halts all when it restarts in a loop.

Reads: health's beat, supervisord. Writes: its own beat, HALT files. Run: python -m bot.guard --config FILE
"""

import asyncio
import sys

from bot.daemon import Daemon, run
from bot.halt import HaltFiles
from bot.probe import Supervisor
from bot.status import read_beats
from bot.watch import Watch

LOOK_S = 1.0


async def main(daemon: Daemon) -> None:
    """Keep health alive, as health keeps the others."""
    config = daemon.config
    watch = Watch(config, daemon.clock, daemon.log, halts=HaltFiles(config.path("halt")))
    supervisor = Supervisor(config.path("run/supervisor.sock"))
    daemon.status = watch.status

    async def look() -> None:
        programs = {p.name: p for p in await asyncio.to_thread(supervisor.programs)}
        watch.look(("health",), read_beats(config), programs)
        watch.tell()

    daemon.every(LOOK_S, look)
    await daemon.stopping.wait()


if __name__ == "__main__":
    sys.exit(run("guard", main))
