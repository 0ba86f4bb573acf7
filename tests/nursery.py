"""A supervisor for drills: forks processes from one that has imported everything, restarts what dies.

They are real processes, each with its own pid, sockets and files; a restart costs a fork instead of
a second of imports, so that hundreds of crashes fit into a minute. Commands come on stdin, a line
each: `start NAME`, `forget NAME`. It ends, and everything with it, when stdin does.
"""

import json
import os
import runpy
import select
import signal
import sys
import time
import traceback
from pathlib import Path

import bot.botctl
import bot.daemon
import bot.executor
import bot.gateway
import bot.paper
import bot.strategy

INSTEAD = dict(pair.split("=") for pair in sys.argv[2:])  # bot.NAME -> the module that plays it
RESTART_S = 0.05  # each module is run anew in the child; what it imports is there already


def main(config: Path) -> None:
    wanted: dict[str, int] = {}  # name -> pid, 0: to be started
    ended: dict[int, float] = {}
    buffer = b""
    while True:
        if select.select([0], [], [], 0.01)[0]:
            data = os.read(0, 65_536)
            if not data:
                break
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                word, name = line.decode().split()
                wanted.setdefault(name, 0) if word == "start" else wanted.pop(name, None)
        changed = False
        for name, pid in list(wanted.items()):
            if pid and os.waitpid(pid, os.WNOHANG)[0]:
                wanted[name], ended[pid] = 0, time.monotonic()
                changed = True
        for name in [n for n, pid in wanted.items() if not pid]:
            if all(time.monotonic() - at > RESTART_S for at in ended.values()):
                wanted[name] = fork(name, config)
                changed = True
        if changed:
            (config.parent / "pids.part").write_text(json.dumps(wanted))
            os.replace(config.parent / "pids.part", config.parent / "pids.json")
    for pid in filter(None, wanted.values()):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def fork(name: str, config: Path) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        module, _, strategy = name.partition("-")
        with open(config.parent / f"bot.{name}.log", "ab") as log, open(os.devnull, "rb") as nothing:
            os.dup2(nothing.fileno(), 0)
            os.dup2(log.fileno(), 1)
            os.dup2(log.fileno(), 2)
        module = INSTEAD.get(module, module)
        sys.argv = [f"bot.{module}", "--config", str(config), *(["--name", strategy] if strategy else [])]
        bot.daemon._parent = os.getppid()
        runpy.run_module(module if "." in module else f"bot.{module}", run_name="__main__")
    except SystemExit as ending:
        code = int(ending.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
