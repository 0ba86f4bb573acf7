"""What others do to the account, and what the private stream does not tell: seen, classified, mended."""

import http.client
import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing
from decimal import Decimal
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from tests.appliance import BTC, Appliance, Signaler
from tests.harness import API_KEY, wait_until

ETH = "ETH/USDT:USDT"

SEEN_S = 5 + 2  # within 5 s of the next reconciliation, one each 2 s


@pytest.fixture
def running(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Appliance]:
    with Appliance(tmp_path, executor={"reconcile_s": 2, "absent_after_s": getattr(request, "param", 5)},
                   exchange={"request_timeout_ms": 1_500, "recv_window_ms": 1_500, "instruments_s": 1},
                   paper={"latency_ms": 0}) as appliance:
        appliance.start("paper", "gateway", "executor")
        appliance.wait_running()
        yield appliance


@pytest.fixture
def signaler(running: Appliance) -> Iterator[Signaler]:
    played = Signaler(running)
    played.position()
    yield played
    played.close()


def _mark(appliance: Appliance) -> float:
    return float(appliance._http("GET", "/fapi/v1/premiumIndex?symbol=BTCUSDT", None)["markPrice"])


def _send(appliance: Appliance, signaler: Signaler, qty: str) -> int:
    """Send a signal that was decided on what the exchange's position is now."""
    signaler.position()
    return signaler.send(signaler.signal(qty, mark=_mark(appliance))).seq


def _reach(appliance: Appliance, signaler: Signaler, qty: str) -> None:
    outcome = signaler.outcome(_send(appliance, signaler, qty))
    assert outcome.outcome == "done", outcome.reason
    wait_until(lambda: appliance.exchange_position() == appliance.our_position() == Decimal(qty), 10)


def _locks(appliance: Appliance, symbol: str = BTC) -> dict[str, str]:
    return appliance.status()["locked_symbols"].get(symbol, {})


def _botctl(appliance: Appliance, *args: str) -> tuple[int, str]:
    command = [sys.executable, "-m", "bot.botctl", args[0], "--config", str(appliance.path), *args[1:]]
    told = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return told.returncode, told.stdout + told.stderr


def _reconciled(appliance: Appliance, more: int) -> None:
    """Wait for so many more comparisons."""
    before = appliance.journal().books().reconciled
    wait_until(lambda: appliance.journal().books().reconciled >= before + more, 20)


def test_manual_trade_locks_its_symbol_until_it_is_adopted(running: Appliance, signaler: Signaler) -> None:
    _reach(running, signaler, "0.010")
    running.control("POST", "/paper/trade", {
        "account": "main", "symbol": "BTCUSDT", "side": "BUY", "qty": "0.005"})
    wait_until(lambda: _locks(running).keys() == {"foreign_fill", "books_differ"}, SEEN_S)
    locks = _locks(running)
    assert ": buy " in locks["foreign_fill"] and "web_" in locks["foreign_fill"]
    assert "0.015" in locks["books_differ"] and "explained by foreign_fill" in locks["books_differ"]
    assert running.status()["locked_symbols"].keys() == {BTC}
    denied = signaler.outcome(_send(running, signaler, "0.020"))
    assert denied.outcome == "denied" and "foreign_fill" in denied.reason
    version = signaler.position().position_version

    assert _botctl(running, "adopt", "DOGE/USDT:USDT") == (1, "there is no symbol DOGE/USDT:USDT\n")
    code, text = _botctl(running, "adopt", BTC, "--reason", "my own trade")
    assert code == 0 and "adopted 0.005" in text
    assert running.our_position() == running.exchange_position() == Decimal("0.015")
    wait_until(lambda: signaler.position().position_version == version + 1)
    _reconciled(running, 2)
    assert _locks(running) == {}  # the trade is not met again
    assert _botctl(running, "adopt", BTC)[0] == 1  # nothing to adopt
    assert _botctl(running, "reconcile") == (0, "books and exchange agree\n")
    assert "my own trade" in _botctl(running, "explain", BTC)[1]

    running.kill("executor")
    commands = running.config.state_path / "commands"
    (commands / "1.json").write_text("{")
    running.start("executor")
    running.wait_running()
    assert _locks(running) == {} and running.our_position() == Decimal("0.015")
    wait_until(lambda: (commands / "1.damaged").exists())
    _reach(running, signaler, "0.020")


def test_position_closed_in_the_exchanges_app_is_left_alone_until_it_is_adopted(running: Appliance,
                                                                                signaler: Signaler) -> None:
    _reach(running, signaler, "0.010")
    running.control("POST", "/paper/trade", {
        "account": "main", "symbol": "BTCUSDT", "side": "SELL", "qty": "0.010"})
    wait_until(lambda: _locks(running).keys() == {"foreign_fill", "books_differ"}, SEEN_S)
    before = running.journal().books().orders
    running.control("POST", "/paper/trade", {
        "account": "main", "symbol": "BTCUSDT", "side": "BUY", "qty": "0.004"})
    _reconciled(running, 3)
    assert running.exchange_position() == Decimal("0.004"), "what a person opened by hand is not sold"
    assert running.journal().books().orders <= before + 1  # a stop for it, at the most
    assert _botctl(running, "adopt", BTC, "--reason", "my own trade")[0] == 0
    assert running.our_position() == Decimal("0.004")


def _pay_behind_many_trades(appliance: Appliance, amount: int, *, trades: int) -> None:
    """Write into the stopped exchange's memory what an outage may bring: fees, and then a transfer."""
    rows = [("COMMISSION", "-0.5")] * trades + [("TRANSFER", str(amount))]
    now_ms, path = time.time_ns() // 1_000_000, appliance.config.path(appliance.config.paper.state)
    with closing(sqlite3.connect(path)) as store, store:
        for n, (kind, paid) in enumerate(rows):
            row = {"id": 10**6 + n, "account": "main", "symbol": "", "reason": kind, "amount": paid,
                   "time_ms": now_ms - 2_000 + n // 3}
            store.execute("INSERT INTO row VALUES ('income', 'main', '', ?, ?, 0, 0, ?, ?)",
                          (row["id"], kind, row["time_ms"], json.dumps(row).encode()))
        (body,), = store.execute("SELECT body FROM state WHERE name = 'accounts'")
        accounts = json.loads(body)
        for name in ("wallet", "deposited"):
            accounts["main"][name] = str(Decimal(accounts["main"][name]) + amount)
        store.execute("UPDATE state SET body = ? WHERE name = 'accounts'", (json.dumps(accounts).encode(),))


def test_transfer_behind_more_trades_than_a_page_has_is_no_loss_of_the_day(running: Appliance) -> None:
    for name in ("executor", "paper"):
        running.stop(name)
    _pay_behind_many_trades(running, -9_000, trades=2_500)
    running.start("paper", "executor")
    running.wait_running()
    assert running.journal().books().day.transfers == -9_000
    told = running.status()
    assert not told["halted"] and told["wallet_balance"] == 1_000
    assert _botctl(running, "reconcile") == (0, "books and exchange agree\n")


def test_liquidation_and_adl_are_booked_and_lock_until_adopted(running: Appliance,
                                                              signaler: Signaler) -> None:
    for path, cause, left in (("/paper/liquidate", "liquidation", "0"), ("/paper/adl", "adl", "0.006")):
        _reach(running, signaler, "0.010")
        qty = {"qty": "0.004"} if cause == "adl" else {}
        running.control("POST", path, {"account": "main", "symbol": "BTCUSDT", **qty})
        wait_until(lambda cause=cause: cause in _locks(running), SEEN_S)
        wait_until(lambda left=left: running.our_position() == Decimal(left), 10)
        assert running.exchange_position() == Decimal(left)
        assert "the exchange closed" in _locks(running)[cause]
        denied = signaler.outcome(_send(running, signaler, "0.020"))
        assert denied.outcome == "denied" and cause in denied.reason
        assert _botctl(running, "adopt", BTC)[0] == 0
        assert _locks(running) == {}


def test_foreign_orders_and_changed_settings_lock_and_unlock_by_themselves(running: Appliance,
                                                                         signaler: Signaler) -> None:
    price = f"{_mark(running) * 0.95:.0f}"
    running.ask("POST", "/fapi/v1/order", symbol="BTCUSDT", side="BUY", type="LIMIT", timeInForce="GTC",
                quantity="0.010", price=price, newClientOrderId="byhand1")
    running.ask("POST", "/fapi/v1/leverage", symbol="BTCUSDT", leverage=5)
    running.control("POST", "/paper/symbol", {"symbol": "BTCUSDT", "status": "PRE_SETTLE"})
    wait_until(lambda: _locks(running).keys() >= {"foreign_order", "leverage", "not_trading"}, SEEN_S)
    assert "byhand1" in _locks(running)["foreign_order"]
    assert _locks(running)["leverage"] == "must be 20, is 5 at the exchange"
    assert "PRE_SETTLE" in _locks(running)["not_trading"]
    assert running.status()["locked_symbols"].keys() == {BTC}
    assert running.status()["state"] == "RUNNING"
    running.control("POST", "/paper/symbol", {
        "symbol": "BTCUSDT", "status": "TRADING", "filters": {"LOT_SIZE": {"stepSize": "0.005"}}})
    running.ask("POST", "/fapi/v1/leverage", symbol="BTCUSDT", leverage=20)
    running.ask("DELETE", "/fapi/v1/order", symbol="BTCUSDT", origClientOrderId="byhand1")
    wait_until(lambda: _locks(running) == {}, SEEN_S)
    denied = signaler.outcome(_send(running, signaler, "0.011"))
    assert denied.outcome == "denied" and "multiple of 0.005" in denied.reason
    _reach(running, signaler, "0.010")


def test_symbol_that_was_delisted_is_locked_alone_also_through_restarts(tmp_path: Path) -> None:
    strategies = {name: {"class": "bot.support_resistance:SupportResistanceStrategy", "symbols": [symbol],
                         "settings": {"notional": 1_000}} for name, symbol in (("levels", BTC), ("eth", ETH))}
    with Appliance(tmp_path, executor={"reconcile_s": 2}, exchange={"instruments_s": 1}, strategy=strategies,
                   paper={"latency_ms": 0, "symbols": [BTC, ETH]}) as running:
        running.start("paper", "gateway", "executor")
        running.wait_running()
        running.control("POST", "/paper/symbol", {"symbol": "ETHUSDT", "status": "CLOSE"})
        wait_until(lambda: "not_trading" in _locks(running, ETH), SEEN_S)
        for name in ("gateway", "executor"):
            running.kill(name)
            running.start(name)
        running.wait_running()
        wait_until(lambda: "not_trading" in _locks(running, ETH), SEEN_S)
        assert (
            "not listed" in _locks(running, ETH)["not_trading"]
            or "DELISTED" in _locks(running, ETH)["not_trading"]
        )
        signaler = Signaler(running)
        signaler.position()
        _reach(running, signaler, "0.010")
        assert running.status()["locked_symbols"].keys() == {ETH}
        signaler.close()


def test_key_that_may_withdraw_lets_nothing_open(running: Appliance, signaler: Signaler) -> None:
    rights = {"enableWithdrawals": True, "enableFutures": True, "ipRestrict": True}
    fault = {"match": "GET /sapi/v1/account/apiRestrictions", "do": "answer", "status": 200,
             "body": json.dumps(rights)}
    running.control("POST", "/paper/faults", fault | {"times": 100})
    wait_until(lambda: "may withdraw" in running.status()["state_reason"], SEEN_S)
    assert running.status()["state"] == "REDUCING"
    assert "key rights" in _botctl(running, "doctor")[1]
    running.control("DELETE", "/paper/faults")
    wait_until(lambda: running.status()["state"] == "RUNNING", SEEN_S)


def test_key_that_is_refused_halts(running: Appliance, signaler: Signaler) -> None:
    running.control("POST", "/paper/faults", {
        "match": "POST /fapi/v1/order", "do": "answer", "status": 401,
        "body": '{"code":-2015,"msg":"Invalid API-key, IP, or permissions for action"}'})
    refused = signaler.outcome(_send(running, signaler, "0.010"))
    assert refused.outcome == "rejected" and "-2015" in refused.reason
    wait_until(lambda: running.status()["state"] == "HALTED")
    assert "refuses our key" in running.status()["halted"][0]["why"]


def test_private_stream_that_keeps_silent_is_renewed_and_no_fill_is_lost(running: Appliance,
                                                                         signaler: Signaler) -> None:
    def wait_up(times: int) -> None:
        wait_until(lambda: [line["event"] for line in running.log("executor")].count(
            "private_stream_up") == times)

    def downs(word: str) -> int:
        return sum(line["event"] == "private_stream_down" and word in line["error"]
                   for line in running.log("executor"))
    faults = {"do": "gap", "count": 50}, {"do": "freeze", "duration_ms": 600_000}, {"do": "half_open"}
    for number, fault in enumerate(faults, 1):
        running.control("POST", "/paper/stream", {"match": "user:main", **fault})
        _reach(running, signaler, f"0.0{number}0")
        wait_until(lambda number=number: downs("lossy or frozen") == number, 5 + SEEN_S)
        wait_up(1 + number)
        assert _locks(running) == {}
    running.control("POST", "/paper/stream", {"match": "user:main", "do": "freeze", "duration_ms": 600_000})
    connection = http.client.HTTPConnection(urlsplit(running.config.exchange.rest_url).netloc, timeout=5)
    connection.request("DELETE", "/fapi/v1/listenKey", headers={"X-MBX-APIKEY": API_KEY})
    assert connection.getresponse().status == 200  # dead, and nobody is told
    wait_until(lambda: downs("listen key is dead") == 1, SEEN_S)
    wait_up(5)
    running.control("POST", "/paper/stream", {"match": "user:main", "do": "expire"})
    wait_until(lambda: downs("listen key expired") == 1)
    wait_up(6)
    _reconciled(running, 1)
    running.wait_running()
    _reach(running, signaler, "0.040")


@pytest.mark.parametrize("running", [60], indirect=True)  # not before the operator
def test_fill_after_the_operator_declared_absence_is_booked_and_its_excess_closed(running: Appliance,
                                                                               signaler: Signaler) -> None:
    running.control("POST", "/paper/faults", {
        "match": "POST /fapi/v1/order", "do": "limbo", "is_executed": True, "delay_ms": 30_000})
    sent = time.monotonic()
    seq = _send(running, signaler, "0.010")
    wait_until(lambda: running.status()["unknown_orders"] == 1)
    told: list[tuple[str, float]] = []

    def declared() -> bool:
        told.append((_botctl(running, "adopt", BTC, "--reason", "not there")[1], time.monotonic() - sent))
        return "declared absent" in told[-1][0]
    wait_until(declared, 10)
    assert "is moving" in told[0][0] or told[0][1] > 2.5, f"before the fence has passed: {told}"
    assert signaler.outcome(seq).outcome == "absent"
    assert signaler.outcome(_send(running, signaler, "0")).outcome == "done"
    assert time.monotonic() - sent < 30, "too slow for what it means to show"
    wait_until(lambda: "late_fill" in _locks(running), 20)
    wait_until(lambda: running.exchange_position() == running.our_position() == 0, 10)
    orders = [(o["side"], o["reduceOnly"]) for o in running.exchange_orders()]
    assert orders == [("BUY", False), ("SELL", True)]
    assert _botctl(running, "adopt", BTC)[0] == 0
    _reach(running, signaler, "0.010")


def test_request_limits_keep_their_rest_for_closes_and_bans_stop_everybody(running: Appliance,
                                                                          signaler: Signaler) -> None:
    def weight() -> int:
        connection = http.client.HTTPConnection(urlsplit(running.config.exchange.rest_url).netloc, timeout=5)
        connection.request("GET", "/fapi/v1/time")
        return int(connection.getresponse().headers["X-MBX-USED-WEIGHT-1M"])

    _reach(running, signaler, "0.010")
    wait_until(lambda: time.time() % 60 < 35, 30)  # the counters live for a minute
    running.control("POST", "/paper/faults", {
        "match": "GET /fapi/v1/openOrders", "do": "answer", "body": "[]",
        "headers": {"X-MBX-USED-WEIGHT-1M": "2000"}})
    wait_until(lambda: "rate_budget" in signaler.outcome(_send(running, signaler, "0.011")).reason, 10)
    _reach(running, signaler, "0")
    running.control("POST", "/paper/faults", {
        "match": "GET /fapi/v1/openOrders", "do": "answer", "status": 418, "headers": {"Retry-After": "8"},
        "body": '{"code":-1003,"msg":"Way too many requests; IP banned."}'})
    wait_until(lambda: "banned" in running.status()["state_reason"], 10)
    time.sleep(1.2)  # one beat: the gateway has heard of it
    before = weight()
    time.sleep(3)
    assert weight() in (before + 1, 1)  # mine; or a new minute, in which nobody but me asked
    wait_until(lambda: running.status()["state"] == "RUNNING", 20)
