"""What every process does the same way: reading the file again, and what it bears before it is up."""

import asyncio
import io
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from bot import executor
from bot.bus import ZmqPusher, signal_endpoint
from bot.config_file import load
from bot.daemon import Daemon
from bot.events import ExitsSet, Started, SymbolLocked
from bot.executor import OrderExecutor
from bot.journal import Journal
from bot.log import Log, Tally
from bot.protection import is_protected
from bot.trading_state import TradingState
from bot.wire import encode
from tests.factory import BTC, ETH, D, HandClock, changed, filled, folded, intended, received, signal
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


def test_executor_that_reads_a_long_journal_beats_meanwhile(tmp_path, monkeypatch):
    daemon, _ = daemon_of(write_config(tmp_path))
    config, told = daemon.config, []
    path, beat = config.path(config.journal.path), config.run_path("executor") / "executor.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    beat.parent.mkdir(parents=True, exist_ok=True)
    journal = Journal(path, daemon.clock, identity=config.identity(), checkpoint_events=1_000)
    journal.load()
    for number in range(10):
        journal.append(Started(epoch=str(number), version="1", config=""))
    journal.close()
    monkeypatch.setattr("bot.journal.TOLD_EVENTS", 3)
    beats = daemon._beat
    monkeypatch.setattr(daemon, "_beat", lambda: (beats(), told.append(json.loads(beat.read_bytes()))))
    monkeypatch.setattr(executor, "OrderExecutor", lambda *_, books, **__: 1 / len(books.symbols))
    with pytest.raises(ZeroDivisionError):
        asyncio.run(executor.main(daemon))
    assert [(b["state"], b["state_reason"]) for b in told] == [
        ("RECONCILING", f"the journal is read: event {seq}") for seq in (3, 6, 9)]


@pytest.mark.parametrize("fill_s", [0, 1, 99])
def test_executor_that_ends_goes_on_until_what_is_filled_has_its_stop_and_begins_nothing(fill_s):
    clock, turns, seen = HandClock(), [], []
    books = folded(received(signal("1")), intended("o1"), changed("o1", "accept"),
                   ExitsSet(symbol=BTC, signal="levels/7/1", stop_loss=D(90), take_profit=None),
                   received(signal("1", symbol=ETH)), intended("u1", symbol=ETH), changed("u1", "lose"))
    it = OrderExecutor.__new__(OrderExecutor)
    it.books, it._clock, it._config = books, clock, SimpleNamespace(
        exchange=SimpleNamespace(request_timeout_ms=5_000))
    it.reconciler, it.trading_state = SimpleNamespace(sending=set()), SimpleNamespace(is_ending=False)

    async def sleep(seconds):
        clock.step(seconds)

    def cycle():
        assert it.trading_state.is_ending
        turns.append(clock.mono)
        passed_s = len(turns) / 20
        if passed_s >= fill_s and not seen:
            seen.append("fill")
            books.apply(filled("o1"))
        elif seen == ["fill"]:
            seen.append("stop")
            books.apply(intended("s1", side="sell", leg="stop", trigger="90"))
            it.reconciler.sending.add("s1")
        elif seen == ["fill", "stop"] and passed_s > fill_s + 0.5:
            it.reconciler.sending.clear()
            books.apply(changed("s1", "accept"))

    clock.sleep, it.cycle = sleep, cycle
    asyncio.run(it.end())
    assert is_protected(books.book(BTC)) and (seen == ["fill", "stop"]) == (fill_s < 99)
    assert len(turns) / 20 <= min(fill_s + 1, 6.5)


def test_trading_state_of_an_executor_that_ends_lets_protection_pass_and_nothing_else():
    it = TradingState.__new__(TradingState)
    it.is_ending, it._halts = True, SimpleNamespace(list=list, covering=lambda **_: None)
    it._config, it._books = SimpleNamespace(owner_of=lambda symbol: "levels"), folded()
    assert it.of_symbol(BTC)[0] == "RECONCILING"


@pytest.mark.parametrize(("causes", "count"), [(["flattened"], 0), (["flattened", "orphan"], 1)])
def test_flatten_that_is_in_force_rings_no_alert_for_its_lock(causes, count):
    it = TradingState.__new__(TradingState)
    it._books = folded(*(SymbolLocked(symbol=BTC, cause=cause, evidence="") for cause in causes))
    it.of_symbol, it._liquidation_distance_pct = lambda symbol: ("LOCKED", ""), lambda symbol: None
    assert it.told_of(BTC)["locks"] == count


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
