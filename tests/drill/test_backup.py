"""A host is lost while it trades; another takes over from an encrypted backup, at the same exchange."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import msgspec
import pytest

from bot.backup import new_key
from bot.events import FillBooked, Restored
from tests.appliance import BTC, Appliance, Signaler
from tests.harness import wait_until
from tests.schemas import decoded

PRIVATE, RECIPIENT = new_key()
BOTCTL = Path(sys.executable).with_name("botctl")


def _botctl(host: Appliance, *words: str, text: str = "") -> tuple[int, dict]:
    done = subprocess.run([BOTCTL, *words, "--json", "--config", host.path], input=text, capture_output=True,
                          text=True, timeout=60)
    assert done.returncode in (0, 1, 78), done.stderr
    if done.stdout:
        decoded(words, done.stdout)
    return done.returncode, json.loads(done.stdout) if done.stdout else {"error": done.stderr}


@pytest.fixture
def market(tmp_path: Path) -> Iterator[Appliance]:
    """Return the exchange: it is on no host of ours, and does not forget."""
    (folder := tmp_path / "market").mkdir()
    with Appliance(folder, paper={"latency_ms": 0}) as exchange:
        exchange.start("paper")
        yield exchange


def _host(market: Appliance, name: str, **tables) -> Appliance:
    """Return a host of its own with the market's account; its strategy is played by the test."""
    (folder := market.path.parent.parent / name).mkdir()
    urls = {key: getattr(market.config.exchange, key) for key in ("rest_url", "ws_url", "sapi_url")}
    return Appliance(folder, executor={"reconcile_s": 2}, exchange=urls, backup={"recipient": RECIPIENT},
                     paper=msgspec.to_builtins(market.config.paper), **tables)


def _reach(market: Appliance, signaler: Signaler, qty: str, **exits: float) -> None:
    """Move the position; exits: their distance from the mark, as a share."""
    signaler.position()
    mark = float(market._http("GET", "/fapi/v1/premiumIndex?symbol=BTCUSDT", None)["markPrice"])
    prices = {name: f"{mark * (1 + share):.0f}" for name, share in exits.items()}
    outcome = signaler.outcome(signaler.send(signaler.signal(qty, mark=mark, **prices)).seq)
    assert outcome.outcome == "done", outcome.reason


def _rests(market: Appliance) -> set[tuple[str, str, str]]:
    return {(o["clientAlgoId"], o["side"], o["quantity"]) for o in market.open_stops()
            if not o["clientAlgoId"].startswith("tc")}  # the canary's come and go


def _destroy(host: Appliance) -> Path:
    """Lose a host with all it had, and return what was fetched from it in time: its newest backup."""
    newest = max(host.config.path("backup").glob("*.age"))
    kept = shutil.copy(newest, host.path.parent.parent)
    for name in list(host.processes):
        host.kill(name)
    shutil.rmtree(host.config.state_path)
    return Path(kept)


def test_host_that_is_lost_is_restored_on_another_with_what_the_backup_lacks(market, tmp_path):
    with _host(market, "old") as old:
        old.start("gateway", "executor")
        old.wait_running()
        signaler = Signaler(old)
        _reach(market, signaler, "0.010", stop_loss=-0.05)
        # The backup is made while orders fill.
        made: list = []
        backup = threading.Thread(target=lambda: made.append(_botctl(old, "backup", "make")))
        backup.start()
        for qty in ("0.012", "0.014", "0.016"):
            _reach(market, signaler, qty)
        backup.join()
        (code, told), = made
        assert (code, told["kept"], told["damaged"]) == (0, 1, [])
        # What it lacks: a flip, with new exits, and more of it.
        _reach(market, signaler, "-0.010", stop_loss=0.05, take_profit=-0.05)
        _reach(market, signaler, "-0.020", stop_loss=0.06)
        wait_until(lambda: {(side, qty) for _, side, qty in _rests(market)} == {("BUY", "0.020")}
                   and len(_rests(market)) == 2)
        rested, sent = _rests(market), {o["clientOrderId"] for o in market.exchange_orders()}
        stop_loss = old.journal().books().book(BTC).stop_loss
        kept = _destroy(old)
        signaler.close()
    with _host(market, "new") as new:
        code, told = _botctl(new, "restore", str(kept), "--key", "-", text=PRIVATE)
        assert (code, told["halted"]) == (0, ["all"]), told
        new.start("gateway", "executor")
        wait_until(lambda: new.status()["state"] == "HALTED" and new.journal().newest("reconciled", 1)
                   and new.journal().books().restored_ns == 0, 30)
        # The books are the exchange's again, the exits the ones that were planned last, and nothing was sent.
        assert _botctl(new, "reconcile")[1]["text"] == "books and exchange agree"
        book = new.journal().books().book(BTC)
        assert book.position_qty == market.exchange_position() == Decimal("-0.020")
        assert book.stop_loss == stop_loss and book.take_profit and not book.locks
        assert {o.id for o in book.orders.values() if o.rests} == {name for name, _, _ in rested}
        assert _rests(market) == rested
        assert {o["clientOrderId"] for o in market.exchange_orders()} == sent
        assert all("restored from" in h["why"] for h in new.status()["halted"])
        # A person has looked: trading goes on, and the chain is whole.
        assert _botctl(new, "resume")[0] == 0
        new.wait_running()
        signaler = Signaler(new)
        _reach(market, signaler, "-0.010")
        _reach(market, signaler, "0")
        wait_until(lambda: not _rests(market))
        signaler.close()
        assert market.exchange_position() == new.our_position() == 0
        assert _botctl(new, "journal", "verify")[1]["is_whole"] and not new.status()["halted"]
        events = [entry.event for entry in new.journal().since(0)]
        fills = [e for e in events if isinstance(e, FillBooked)]
        booked = {e.trade_id for e in fills}
        assert len(booked) == len(fills) and any(e.cause == "restored" for e in fills)
        trades = market.ask("GET", "/fapi/v1/userTrades", symbol="BTCUSDT", limit=1000)
        assert booked == {str(t["id"]) for t in trades}, "each trade of the account is booked once"
        assert sum(isinstance(e, Restored) for e in events) == 1


@pytest.mark.drill
def test_host_restored_while_the_old_one_trades_on_halts_again(market, tmp_path):
    with _host(market, "old") as old, _host(market, "new") as new:
        old.start("gateway", "executor")
        old.wait_running()
        signaler = Signaler(old)
        _reach(market, signaler, "0.010", stop_loss=-0.05)
        assert _botctl(old, "backup", "make")[0] == 0
        kept = max(old.config.path("backup").glob("*.age"))
        assert _botctl(new, "restore", str(kept), "--key", "-", text=PRIVATE)[0] == 0
        new.start("gateway", "executor")
        wait_until(lambda: new.status()["state"] == "HALTED" and new.journal().books().restored_ns == 0, 30)
        assert _botctl(new, "resume")[0] == 0
        new.wait_running()
        # Nobody had ended the old host.
        _reach(market, signaler, "0.020")
        wait_until(lambda: any("second instance" in h["why"] for h in new.status()["halted"]), 10)
        signaler.close()


def test_backup_that_was_changed_is_noticed_by_the_next_run_and_told_by_health(market):
    with _host(market, "host") as host:
        host.start("gateway", "executor", "health")
        host.wait_running()

        def finds(rule: str) -> bool:
            return any(f["rule"] == rule for f in host.beats().get("health", {}).get("findings", []))

        wait_until(lambda: finds("backup_old"))  # none was made yet
        assert _botctl(host, "backup", "make")[0] == 0
        wait_until(lambda: not finds("backup_old") and not finds("backup_failed"), 20)
        assert host.status()["backup"]["is_good"] and host.beats()["health"]["backup"]["kept"] == 1
        path = max(host.config.path("backup").glob("*.age"))
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 1
        path.write_bytes(raw)
        code, told = _botctl(host, "backup", "make")
        assert (code, told["damaged"], told["kept"]) == (1, [path.stem], 1)
        wait_until(lambda: finds("backup_failed"))
        assert host.status()["state"] == "RUNNING", "trading goes on"
        path.unlink()
        path.with_suffix(".json").unlink()
        assert _botctl(host, "backup", "make")[0] == 0
        wait_until(lambda: not finds("backup_failed"), 20)
