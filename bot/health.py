"""health: looks at every process and at the host each second; kills what hangs, halts what loops.

Reads: beats, supervisord, the kernel. Writes: its own beat with the findings, HALT files.
State: none on disk but these. Holds no key. Run: python -m bot.health --config FILE
"""

import asyncio
import sys
from typing import Any

from bot import backup, probe
from bot.alert import Teller, urgent
from bot.bus import ZmqSubscriber
from bot.daemon import Daemon, run
from bot.halt import HaltFiles
from bot.probe import Supervisor
from bot.programs import names
from bot.status import read_beats
from bot.watch import MB, Watch
from bot.web import StatusPage, serve

LOOK_S = 1.0


async def main(daemon: Daemon) -> None:
    """Find what is stuck, too big, in a loop or short, and do what can be done without a person."""
    config, rules = daemon.config, daemon.config.health
    supervisor, left = Supervisor(config.path("run/supervisor.sock")), probe.host(config.state_path)
    halts, teller = HaltFiles(config.path("halt")), Teller(config, daemon.clock, daemon.log)
    watch = Watch(config, daemon.clock, daemon.log, halts=halts, kill=supervisor.kill)
    backups: dict[str, Any] = {}
    daemon.status = lambda: {**watch.status(), "host": left, "backup": backups, "alerts": teller.counts}
    since_ns = daemon.clock.mono_ns()

    async def look() -> None:
        programs = {p.name: p for p in await asyncio.to_thread(supervisor.programs)}
        beats = read_beats(config)
        watch.look(tuple(name for name in names(config) if name != "health"), beats, programs)
        left.update(probe.host(config.state_path))
        for rule, key, least in (("disk_low", "disk_free_bytes", rules.disk_free_mb_min),
                                 ("host_memory_low", "memory_available_bytes", rules.host_memory_mb_min)):
            if left[key] < least * MB:
                watch.find(rule, "host", f"{left[key] // MB} MB, limit {least}")
        backups.update(backup.told(config, daemon.clock) or {})
        if not backups.get("is_good", True):
            watch.find("backup_failed", "host", backups["text"])
        if backups.get("is_old"):
            watch.find("backup_old", "host",
                       f"{backups['newest'] or 'none'}, limit {config.backup.age_h_max} h")
        for name in ("executor", "gateway"):
            offset_ms = beats.get(name, {}).get("clock_offset_ms") or 0
            if abs(offset_ms) > rules.clock_offset_ms_max:
                watch.find("clock_offset", name, f"{offset_ms} ms, limit {rules.clock_offset_ms_max}")
        watch.tell()
        teller.see(urgent(beats, halts.list(), watch.status()["findings"], daemon.clock.mono_ns(), since_ns),
                   knows_positions="symbols" in beats.get("executor", {}))
        if programs:  # a supervisord that does not answer starts nobody again: systemd is to end it
            probe.feed_watchdog()

    daemon.every(LOOK_S, look)
    daemon.spawn(teller.work())
    ticks = ZmqSubscriber(config.bus.ticks, config.bus, [])
    page = StatusPage(config, daemon.clock, ticks)
    ticks.watch(page.on_tick_messages)
    close = await serve(page, rules.page_port, daemon.log) if rules.page_port else None
    await daemon.stopping.wait()
    if close:
        await close()
    ticks.close()


if __name__ == "__main__":
    sys.exit(run("health", main))
