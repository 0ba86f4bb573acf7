"""What every process does the same way: reading the file again, and what it bears before it is up."""

import asyncio
import io
import os
import subprocess
import sys
from types import SimpleNamespace

from bot import executor
from bot.bus import ZmqPusher, signal_endpoint
from bot.config_file import load
from bot.daemon import Daemon
from bot.executor import OrderExecutor
from bot.log import Log, Tally
from bot.wire import encode
from tests.factory import HandClock, signal
from tests.harness import API_KEY, API_SECRET, ROOT, write_config

NEW = '[strategy.new]\nclass = "a:B"\nsymbols = ["ETH/USDT:USDT"]\n[paper]'


def daemon_of(path):
    clock, out = HandClock(), io.StringIO()
    config = load(path)
    return Daemon("executor", config, clock, Log("executor", clock, stream=out),
                  SimpleNamespace(config=path)), out


def test_daemon_with_a_file_that_cannot_be_put_in_force_goes_on_with_what_it_had(tmp_path):
    path = write_config(tmp_path)
    daemon, out = daemon_of(path)
    before = daemon.config.limits

    def refuse():
        assert "new" in daemon.config.strategy
        raise OSError("too many open files")

    daemon.reread = refuse
    path.write_text(path.read_text().replace("[paper]", NEW).replace("order_notional_max = 20000",
                                                                     "order_notional_max = 19999"))
    daemon._reread()
    assert list(daemon.config.strategy) == ["levels"] and daemon.config.limits == before
    assert '"config_refused"' in out.getvalue() and "too many open files" in out.getvalue()
    assert '"config_reread"' not in out.getvalue()
    daemon.reread = lambda: None
    daemon._reread()
    assert list(daemon.config.strategy) == ["levels", "new"] and daemon.config.limits != before


def test_executor_with_a_new_strategy_whose_endpoint_cannot_be_bound_hears_the_others(tmp_path):
    for name in ("levels", "other"):
        (tmp_path / "signals" / name).mkdir(parents=True, mode=0o700)
    path = write_config(tmp_path, bus={"signals": {"endpoint": f"ipc://{tmp_path}/signals/{{strategy}}/s"}},
                        paper={"symbols": ["BTC/USDT:USDT", "ETH/USDT:USDT", "SOL/USDT:USDT"]},
                        strategy={"other": {"class": "a:B", "symbols": ["SOL/USDT:USDT"]}})
    daemon, out = daemon_of(path)
    asked, heard = [], []
    stub = SimpleNamespace(on_signal_messages=lambda batch, owner: heard.append((batch, owner)),
                           on_tick_messages=None, subscribed=frozenset(),
                           reconciler=SimpleNamespace(request=asked.append))

    async def live():
        sockets = executor._open_sockets(daemon, stub)
        path.write_text(path.read_text().replace("[paper]", NEW))
        daemon._reread()
        assert len(sockets) == 3 and list(daemon.config.strategy) == ["levels", "other"] and not asked
        (tmp_path / "signals" / "new").mkdir(mode=0o700)
        daemon._reread()
        assert len(sockets) == 4 and list(daemon.config.strategy) == ["levels", "other", "new"] and asked
        signals = daemon.config.bus.signals
        pushers = {name: ZmqPusher(signals, daemon.config.bus, signal_endpoint(daemon.config.bus, name))
                   for name in ("levels", "new", "other")}
        for name, pusher in pushers.items():
            while not pusher.send(name.encode()):
                await asyncio.sleep(0.01)
        while len(heard) < 3:
            await asyncio.sleep(0.01)
        assert sorted(heard) == [([name.encode()], name) for name in pushers]
        for socket in (*sockets.values(), *pushers.values()):
            socket.close()

    asyncio.run(asyncio.wait_for(live(), 30))
    assert "mkdir -m 0700" in out.getvalue()


def test_executor_with_a_signal_under_another_strategys_name_drops_it():
    clock, taken = HandClock(), []
    it = OrderExecutor.__new__(OrderExecutor)
    it.dropped, it.cycle, it.process_received_signal = Tally(
        "message_dropped", Log("executor", clock, stream=io.StringIO()), clock), lambda: None, taken.append
    raw = encode(signal(strategy="other"))
    it.on_signal_messages([raw], "halted")
    assert not taken and it.dropped.counts == {"impostor": 1}, "a halted one would trade on as another"
    it.on_signal_messages([raw], "other")
    it.on_signal_messages([raw])
    assert [s.strategy for s in taken] == ["other"] * 2


def test_executor_with_its_keys_in_a_line_blots_them_out(tmp_path, monkeypatch):
    daemon, out = daemon_of(write_config(tmp_path))
    monkeypatch.setattr(executor, "is_seized", lambda path: True)
    daemon.stopping.set()
    asyncio.run(executor.main(daemon))
    daemon.log.error("crashed", error=f"{API_KEY} {API_SECRET}", traceback="")
    assert '"*** ***"' in out.getvalue() and API_KEY not in out.getvalue()


CHILD = """
import bot, os, signal, sys
os.kill(os.getpid(), signal.SIGHUP)
from bot.daemon import run
async def main(daemon):
    daemon.reread = lambda: daemon.stop("read again")
    await daemon.stopping.wait()
sys.exit(run("health", main))
"""


def child(tmp_path, supervisor):
    path = write_config(tmp_path)
    return subprocess.run([*supervisor, sys.executable, "-c", CHILD, "--config", str(path)], cwd=ROOT,
                          env=os.environ | {"SUPERVISOR_ENABLED": "1"}, capture_output=True, text=True,
                          timeout=60)


def test_daemon_with_sighup_while_it_imports_reads_the_file_when_it_is_up(tmp_path):
    done = child(tmp_path, [sys.executable, "-c", "import subprocess, sys; "
                            "sys.exit(subprocess.call(sys.argv[2:]))", "supervisord"])
    assert done.returncode == 0 and '"config_reread"' in done.stdout, done


def test_daemon_whose_supervisord_died_before_it_looked_ends(tmp_path):
    done = child(tmp_path, [])  # the parent is whoever took the orphan over
    assert done.returncode == 0 and "the parent process died" in done.stdout, done
