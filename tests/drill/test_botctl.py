"""botctl as people and scripts use it, against an appliance that trades."""

import os
import pty
import re
import select
import sqlite3
import subprocess
import sys
import time
import urllib.request
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from bot.probe import Supervisor
from tests.faults import FaultyRun
from tests.harness import API_KEY, API_SECRET, ROOT, wait_until, write_config
from tests.schemas import SCHEMAS, decoded, verb_of

ETH = "ETH/USDT:USDT"

def botctl(path: Path, *words: str, code: int = 0) -> str:
    """Run botctl as a person does; return all it prints."""
    done = subprocess.run([sys.executable, "-m", "bot.botctl", *words, "--config", str(path)], text=True,
                          capture_output=True, cwd=ROOT, timeout=60)
    assert done.returncode == code, (words, done.returncode, done.stdout, done.stderr)
    return done.stdout + done.stderr


def asked(path: Path, *words: str, code: int = 0) -> Any:
    """Run botctl as a script does; return the answer in the verb's schema."""
    done = subprocess.run([sys.executable, "-m", "bot.botctl", *words, "--json", "--config", str(path)],
                          text=True, capture_output=True, cwd=ROOT, timeout=60)
    assert done.returncode == code, (words, done.returncode, done.stdout, done.stderr)
    return decoded(words, done.stdout)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    base = 12_000 + os.getpid() % 10_000  # a block of its own, below what free_port hands out
    with FaultyRun(tmp_path_factory.mktemp("botctl"), metrics={"base_port": base}) as run:
        run.wait_trading()
        run.path = run.appliance.path
        run.good = run.path.read_text()
        yield run


def test_botctl_with_every_looking_verb_keeps_its_schema(run):
    wait_until(lambda: run.status()["counters"]["fills"], 40)
    status = asked(run.path, "status")
    assert status.mode == "PAPER" and status.state == "RUNNING" and status.counters.fills
    assert {p.name for p in status.processes} == {"paper", "gateway", "executor", "strategy-levels", "health",
                                                  "guard"}
    wait_until(lambda: asked(run.path, "health").processes, 10)
    health = asked(run.path, "health")
    assert health.is_healthy and {u.name for u in health.processes} >= {"gateway", "guard"}
    signals = asked(run.path, "signals")
    assert signals and asked(run.path, "explain", signals[-1].signal)
    assert asked(run.path, "orders", "--all")
    assert asked(run.path, "positions")
    assert asked(run.path, "config", "check", str(run.path)).is_valid
    day = asked(
        run.path, "report", "--since", "1h", "--chart", str(run.path.with_name("day.html"))
    )
    assert "sum" in {row.of for row in day.pnl} and day.pnl[0].fills and day.outcomes and day.incidents
    assert day.latencies[0].count and run.path.with_name("day.html").stat().st_size > 100_000


ELSEWHERE = ("alert ", "backup ", "restore")  # their own drills ask them, by the same schemas


def test_botctl_with_every_verb_answers_scripts_in_its_schema(run):
    name = asked(run.path, "signals")[-1].signal
    asks = {
        ("status",): 0, ("health",): 0, ("doctor",): 0, ("config", "check"): 0, ("config", "apply"): 0,
        ("journal", "verify"): 0, ("orders", "--all"): 0, ("signals", "--count", "3"): 0, ("positions",): 0,
        ("report", "--since", "1h"): 0, ("explain", name): 0, ("explain", "nothing"): 1, ("reconcile",): 0,
        ("adopt", "BTC/USDT:USDT"): 1, ("halt", "--reason", "drill"): 0, ("cancel",): 0, ("flatten",): 0,
        ("resume",): 0}
    for words, code in asks.items():
        asked(run.path, *words, code=code)
    assert {verb_of(words) for words in asks} == {v for v in SCHEMAS if not v.startswith(ELSEWHERE)}
    run.wait_trading()


def test_doctor_with_all_well_finds_nothing_bad_and_says_what_it_cannot_know(run):
    checks = {c.name: c for c in asked(run.path, "doctor")}
    assert {c.verdict for c in checks.values()} <= {"good", "unknown"}
    assert checks["key rights"].verdict == "good"
    assert {"version", "config", "api_key_file", "disk", "memory", "bus.ticks", "metrics of gateway",
            "journal", "exchange", "clock", "account", "positions"} <= set(checks)


def test_doctor_of_a_candidate_leaves_what_runs_alone_and_finds_a_journal_of_another_account(run, tmp_path):
    candidate = tmp_path / "candidate.toml"
    candidate.write_text(run.path.read_text().replace("recover_s = 1", "recover_s = 2"))
    stale = {c.name: c for c in asked(candidate, "doctor", code=1)}
    assert stale["config"].verdict == "bad" and "changed since" in stale["config"].text
    checks = asked(candidate, "doctor", "--candidate")
    assert {c.verdict for c in checks} <= {"good", "unknown"} and "config" not in {c.name for c in checks}
    candidate.write_text(run.path.read_text() + "\n[account]\nleverage = 7\n")
    found = {c.name: c for c in asked(candidate, "doctor", "--candidate", code=1)}
    assert found["account"].verdict == "bad" and "leverage: must be 7, is" in found["account"].text
    candidate.write_text(run.path.read_text().replace("[exchange]", '[exchange]\naccount = "second"'))
    found = {c.name: c for c in asked(candidate, "doctor", "--candidate", code=1)}
    assert "belongs to account main, the config says second" in found["journal"].text


def test_doctor_with_an_open_key_file_and_nothing_running_names_both(tmp_path):
    path = write_config(tmp_path)
    (tmp_path / "api.secret").chmod(0o644)
    checks = {c.name: c for c in asked(path, "doctor", code=1)}
    assert checks["api_secret_file"].verdict == "bad" and "chmod 600" in checks["api_secret_file"].text
    (tmp_path / "api.secret").chmod(0o600)
    checks = {c.name: c for c in asked(path, "doctor", code=1)}
    assert checks["exchange"].verdict == "bad" and checks["bus.ticks"].verdict == "good"


def test_halt_and_resume_of_each_scope_say_what_they_do(run):
    for words, scope in (([], "all"), (["--strategy", "levels"], "strategy:levels"),
                         (["--symbol", "BTC/USDT:USDT"], "symbol:BTC/USDT:USDT")):
        assert asked(run.path, "halt", *words, "--reason", "drill").scope == scope
        assert [h.scope for h in asked(run.path, "status").halted] == [scope]
        assert asked(run.path, "resume", *words).was.why == "drill"
        assert asked(run.path, "resume", *words, code=1).was is None
    run.wait_trading()


def test_reconcile_and_adopt_answer_and_say_when_there_is_nothing(run):
    assert asked(run.path, "reconcile").is_done
    refused = asked(run.path, "adopt", "BTC", code=1)
    assert not refused.is_done and "no symbol BTC" in refused.text


def test_wrong_usage_says_what_is_right(run):
    for words, code, said in (
            (["stauts"], 2, "choose from"), ([], 2, "VERB"), (["explain"], 2, "ID"),
            (["status", "--watch", "--json"], 2, "for scripts"),
            (["halt", "--strategy", "nobody"], 2, "there are levels"),
            (["halt", "--symbol", "BTC"], 2, "there are BTC/USDT:USDT"),
            (["explain", "nothing"], 1, "botctl signals"), (["config", "apply", "/nowhere"], 78, "/nowhere")):
        assert said in botctl(run.path, *words, code=code), words


def test_journal_verify_says_whole_while_it_grows_and_finds_one_flipped_byte(run, tmp_path):
    first = asked(run.path, "journal", "verify")
    assert first.is_whole and first.events > first.orders and first.fills and len(first.hash) == 64
    assert "whole: " in botctl(run.path, "journal", "verify")
    copy = tmp_path / "bot.toml"
    copy.write_text(run.path.read_text().replace(str(run.appliance.config.state_path), str(tmp_path)))
    source = sqlite3.connect(run.appliance.config.path("journal.db"))
    with closing(source), closing(sqlite3.connect(tmp_path / "journal.db")) as target:
        source.backup(target)
        seq, body = target.execute("SELECT seq, body FROM events WHERE kind = 'fill' LIMIT 1").fetchone()
        with target:
            target.execute("UPDATE events SET body = ? WHERE seq = ?", (body.replace(b"BTC", b"BTB"), seq))
    assert "breaks the hash chain" in botctl(copy, "journal", "verify", code=1)


def test_status_watch_in_a_small_terminal_fits_and_ends_with_q(run):
    master, slave = pty.openpty()
    os.set_blocking(master, False)
    env = os.environ | {"COLUMNS": "80", "LINES": "24", "TERM": "xterm"}
    process = subprocess.Popen([sys.executable, "-m", "bot.botctl", "status", "--watch", "--config",
                                str(run.path)], stdin=slave, stdout=slave, cwd=ROOT, env=env)
    seen = b""
    deadline = time.monotonic() + 20
    while seen.count(b"\x1b[H") < 3 and time.monotonic() < deadline:
        if select.select([master], [], [], 1)[0]:
            seen += os.read(master, 65_536)
    os.write(master, b"q")
    assert process.wait(10) == 0
    os.close(slave)
    os.close(master)
    page = seen.decode().split("\x1b[H")[2]
    lines = page.replace("\x1b[K", "").replace("\x1b[J", "").replace("\r\n", "\n").split("\n")
    assert len(lines) <= 24 and max(map(len, lines)) <= 80
    assert "PAPER  RUNNING" in page and "q ends this" in page and "executor" in page


def test_logs_journal_beats_and_metrics_hold_no_secret(run):
    config = run.appliance.config
    texts = {}
    for name in ("gateway", "executor", "health", "guard", "paper", "strategy-levels"):
        url = f"http://127.0.0.1:{config.metrics_port(name)}/metrics"
        with urllib.request.urlopen(url, timeout=5) as answer:
            texts[f"metrics of {name}"] = answer.read()
    assert b"bot_order_round_trip_seconds_bucket" in texts["metrics of executor"]
    assert b"bot_process_resident_memory_bytes" in texts["metrics of health"]
    folder = config.state_path
    for path in [*folder.glob("log/*"), *folder.glob("run/*.json"), *folder.glob("journal.db*"),
                 *folder.glob("strategy/*/*"), *folder.glob("supervisor.d/*")]:
        # By another process: who opens and closes the journal's file itself loses SQLite's locks on it, and
        # with them what tells the executor that somebody reads (sqlite.org/howtocorrupt.html, 2.2).
        texts[str(path)] = subprocess.run(["cat", path], check=True, capture_output=True).stdout
    assert len(texts) > 20
    for process in run.status()["processes"]:
        texts[process["name"]] = Path(f"/proc/{process['pid']}/cmdline").read_bytes()
        limits = Path(f"/proc/{process['pid']}/limits").read_text(encoding="ascii")
        assert re.search(r"Max core file size +0 +0 ", limits), "a core would hold them"
    for where, text in texts.items():
        assert API_KEY.encode() not in text and API_SECRET.encode() not in text, where


HOLDER = """
from decimal import Decimal
from bot.model import Target

class Holder:
    def __init__(self, settings, instruments):
        self.stop = None

    def on_tick(self, tick):
        self.stop = self.stop or Decimal(int(tick.price * 0.9))
        return Target(tick.symbol, Decimal("0.050"), stop_loss=self.stop, reason="hold")
"""


def test_config_apply_with_a_strategy_added_changed_and_removed_restarts_nothing_else(run):
    (run.folder / "holder.py").write_text(HOLDER)
    good, new = run.good, run.folder / "new.toml"
    table = '\n[strategy.{}]\nclass = "holder:Holder"\nsymbols = ["{}"]\n'

    def apply(text, *words):
        new.write_text(text)
        return asked(run.path, "config", "apply", str(new), *words)

    def held():
        return run.appliance.journal().books().book(ETH).position_qty

    apply(good, "--flatten")  # whatever a try before this one has left
    before = wait_until(lambda: _pids(run), 20)
    assert set(before) == {"paper", "gateway", "executor", "strategy-levels", "health", "guard"}

    assert apply(good + table.format("second", ETH)).added == ["strategy-second"]
    assert run.path.read_text() == good + table.format("second", ETH)
    wait_until(lambda: held() and run.appliance.open_stops("ETHUSDT"), 40, 0.2)
    assert _pids(run, but="strategy-second") == before

    changed = apply(
        run.path.read_text().replace("signals_per_s_max = 5\n", "signals_per_s_max = 4\n", 1)
    ).changed
    assert changed == ["strategy-levels"]
    wait_until(lambda: _pids(run).get("strategy-levels") not in (None, before["strategy-levels"]), 20)
    before |= {"strategy-levels": _pids(run)["strategy-levels"]}
    assert _pids(run, but="strategy-second") == before

    now = run.path.read_text()
    new.write_text(good)
    assert "strategy.second holds 0.050" in botctl(run.path, "config", "apply", str(new), code=1)
    assert run.path.read_text() == now and "strategy-second" in _pids(run)
    third = now[:now.index("[strategy.second]")] + table.format("third", ETH)
    done = apply(third, "--adopt", "third")
    assert (done.added, done.changed, done.removed) == (["strategy-third"], [], ["strategy-second"])
    status = asked(run.path, "status")
    assert [p.strategy for p in status.positions] == ["levels", "third"] and not status.locked_symbols
    assert held() == Decimal("0.050")
    # The heir decides anew, and its stop is another: for a moment two rest, never none.
    wait_until(lambda: len(run.appliance.open_stops("ETHUSDT")) == 1, 20, 0.2)

    assert apply(good, "--flatten").removed == ["strategy-third"]
    assert held() == 0 and not run.appliance.open_stops("ETHUSDT") and not run.status()["halted"]
    wait_until(lambda: set(_pids(run)) == set(before), 20)
    assert run.appliance.beats()["executor"]["owners"] == {"BTC/USDT:USDT": "levels"}
    assert _pids(run, but="strategy-levels").items() <= before.items()


def test_config_apply_names_what_waits_and_doctor_says_the_same(run):
    def of_config():
        words = [sys.executable, "-m", "bot.botctl", "doctor", "--json", "--config", str(run.path)]
        done = subprocess.run(words, text=True, capture_output=True, cwd=ROOT, timeout=60)
        return next(c for c in decoded(["doctor"], done.stdout) if c.name == "config")

    new, everybody = run.folder / "new.toml", set(_pids(run))
    new.write_text(run.good.replace("notional = 1000\n", "notional = 1001\n"))
    done = asked(run.path, "config", "apply", str(new))
    assert (done.changed, done.waiting, done.restart) == (["strategy-levels"], [], [])
    assert of_config().verdict == "good"  # guard and the rest have all that concerns them

    new.write_text(run.good.replace("recover_s = 1\n", "recover_s = 2\n"))
    done = asked(run.path, "config", "apply", str(new))
    assert done.waiting == ["executor"] and set(done.restart) >= everybody - {"strategy-levels"}
    assert of_config().verdict == "bad" and "supervisorctl restart " in of_config().text
    subprocess.run([sys.executable, "-m", "supervisor.supervisorctl", "-s", "unix://"
                    f"{run.appliance.config.path('run/supervisor.sock')}", "restart", *everybody],
                   check=True, capture_output=True, timeout=60)
    run.wait_trading()
    assert wait_until(lambda: of_config().verdict == "good", 20, 0.5)


def _pids(run, but: str = "") -> dict[str, int]:
    # As supervisord knows them: a beat says that a process is gone only when it ended in order.
    programs = Supervisor(run.appliance.config.path("run/supervisor.sock")).programs()
    return {p.name: p.pid for p in programs if p.pid and p.name != but}
