"""The executor with a real exchange beside it: real orders, lost and late answers, kill -9."""

import subprocess
import sys
import time
from collections.abc import Iterator
from decimal import Decimal
from pathlib import Path

import pytest

from bot.errors import EXIT_SOFTWARE
from bot.executor import INTAKE_BURST_S, STRANGERS_PER_S
from bot.halt import HaltFiles
from bot.model import Ack
from tests.appliance import BTC, Appliance, Signaler
from tests.harness import wait_until

QTY = Decimal("0.010")


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Appliance]:
    # absent_after_s is short here: production waits minutes for a lagging query side.
    with Appliance(tmp_path, executor={"reconcile_s": 2, "absent_after_s": 5, "unprotected_s_max": 3},
                   exchange={"request_timeout_ms": 1_500, "recv_window_ms": 1_500},
                   paper={"latency_ms": 0}) as appliance:
        appliance.start("paper")
        wait_until(lambda: _is_up(appliance))
        appliance.start("gateway", "executor")
        appliance.wait_running()
        yield appliance


@pytest.fixture
def signaler(running: Appliance) -> Iterator[Signaler]:
    played = Signaler(running)
    played.position()
    yield played
    played.close()


def _is_up(appliance: Appliance) -> bool:
    try:
        return "serverTime" in appliance._http("GET", "/fapi/v1/time", None)
    except OSError:
        return False


def _mark(appliance: Appliance) -> float:
    return float(appliance._http("GET", "/fapi/v1/premiumIndex?symbol=BTCUSDT", None)["markPrice"])


def _exits(mark: float) -> dict[str, str]:
    return {"stop_loss": f"{mark * 0.95:.0f}", "take_profit": f"{mark * 1.05:.0f}"}


def _enter(appliance: Appliance, signaler: Signaler, qty: str = "0.010", **exits: str) -> int:
    mark = _mark(appliance)
    signal = signaler.send(signaler.signal(qty, mark=mark, **(exits or _exits(mark))))
    return signal.seq


def _agree(appliance: Appliance) -> None:
    """Assert that books and exchange say the same, and that no intent made two orders."""
    wait_until(lambda: appliance.exchange_position() == appliance.our_position(), 10)
    names = [o["clientOrderId"] for o in appliance.exchange_orders()]
    assert len(names) == len(set(names))


def test_executor_with_an_entry_fills_protects_and_explains(running: Appliance, signaler: Signaler) -> None:
    seq = _enter(running, signaler)
    outcome = signaler.outcome(seq)
    assert (outcome.outcome, outcome.filled_qty) == ("done", QTY)
    assert running.exchange_position() == QTY
    stops = wait_until(lambda: len(s := running.open_stops()) == 2 and s)
    assert {s["orderType"] for s in stops} == {"STOP_MARKET", "TAKE_PROFIT_MARKET"}
    assert all(s["reduceOnly"] and Decimal(s["quantity"]) == QTY for s in stops)
    _agree(running)
    told = subprocess.run([sys.executable, "-m", "bot.botctl", "explain", "--config", str(running.path),
                           f"levels/{signaler.run}/{seq}"], capture_output=True, text=True, timeout=20)
    assert told.returncode == 0, told.stderr
    for word in (
        "decided on Tick",
        "journaled before it was sent",
        "checked order_notional",
        ": POST /fapi/v1/order ", "symbol=BTCUSDT",
        ": HTTP 200 {", '"orderId":',
        "fill",
        "outcome",
    ):
        assert word in told.stdout
    assert "signature" not in told.stdout


def test_executor_with_a_target_of_zero_leaves_nothing_behind(running: Appliance, signaler: Signaler) -> None:
    assert signaler.outcome(_enter(running, signaler)).outcome == "done"
    wait_until(lambda: len(running.open_stops()) == 2)
    closing = signaler.send(signaler.signal("0", mark=_mark(running)))
    assert signaler.outcome(closing.seq).outcome == "done"
    assert running.exchange_position() == 0
    wait_until(lambda: running.open_stops() == [])
    _agree(running)


def test_executor_with_a_flip_reduces_and_then_opens(running: Appliance, signaler: Signaler) -> None:
    assert signaler.outcome(_enter(running, signaler)).outcome == "done"
    mark = _mark(running)
    flip = signaler.send(signaler.signal("-0.020", mark=mark, stop_loss=f"{mark * 1.05:.0f}"))
    assert signaler.outcome(flip.seq).outcome == "done"
    assert running.exchange_position() == Decimal("-0.020")
    orders = [(o["side"], Decimal(o["origQty"]), o["reduceOnly"]) for o in running.exchange_orders()]
    assert orders == [("BUY", QTY, False), ("SELL", QTY, True), ("SELL", Decimal("0.020"), False)]
    stops = wait_until(lambda: len(s := running.open_stops()) == 1 and s)
    assert (stops[0]["side"], Decimal(stops[0]["quantity"])) == ("BUY", Decimal("0.020"))
    _agree(running)


def test_executor_with_a_new_stop_moves_it_new_first(running: Appliance, signaler: Signaler) -> None:
    assert signaler.outcome(_enter(running, signaler)).outcome == "done"
    wait_until(lambda: len(running.open_stops()) == 2)
    mark = _mark(running)
    higher = f"{mark * 0.97:.0f}"
    moved = signaler.send(signaler.signal("0.010", mark=mark, stop_loss=higher))
    assert signaler.outcome(moved.seq).outcome == "done"
    wait_until(lambda: [Decimal(s["triggerPrice"]) for s in running.open_stops()
                        if s["orderType"] == "STOP_MARKET"] == [Decimal(higher)])
    assert len(running.open_stops()) == 2  # the take-profit was kept: protection never ends by omission
    assert len(running.exchange_orders()) == 1
    _agree(running)


BAD_SIGNALS = [
    ({"created_ns": 1}, "signal_age"),  # first: behind a fresher one it would be superseded
    ({"target_qty": Decimal("100")}, "order_notional"),
    ({"position_version": 99}, "stale_position"),
    ({"strategy": "other"}, "not_owner"),
    ({"stop_loss": Decimal("9999999")}, "stop_side"),
    ({"target_qty": Decimal("0.0105")}, "bad_quantity"),
    ({"stop_loss": Decimal("-1")}, "bad_price"),
    ({"tick_exchange_ns": 1}, "stale_tick"),
    ({"expires_ns": 1}, "time to live"),
    ({"symbol": "DOGE/USDT:USDT"}, "not_owner"),
]


def test_executor_with_bad_signals_denies_each_with_its_rule(running: Appliance, signaler: Signaler) -> None:
    for changes, rule in BAD_SIGNALS:
        signal = signaler.send(signaler.signal("0.010", mark=_mark(running), **changes))
        name = f"{signal.strategy}/{signal.run}/{signal.seq}"
        closed = wait_until(lambda name=name: running.journal().find("outcome", name), 10)
        assert closed.outcome == ("expired" if "expires_ns" in changes else "denied"), changes
        assert rule in closed.reason
    assert running.exchange_orders() == []


def test_executor_with_a_flood_that_no_runner_held_back_takes_in_its_share(
        running: Appliance, signaler: Signaler) -> None:
    per_s = running.config.strategy["levels"].signals_per_s_max
    mark, began = _mark(running), time.monotonic()
    for number in range(1_000):  # books and journal would hold each made-up symbol, for ever
        for name in ("levels", f"stranger-{number}"):
            signaler.send(signaler.signal("0.010", mark=mark, symbol=f"X{number}/USDT:USDT", strategy=name))
    wait_until(lambda: running.beats()["executor"]["dropped"].get("too_many", 0) > 1_500, 20)
    share = (per_s + STRANGERS_PER_S) * (INTAKE_BURST_S + time.monotonic() - began)
    assert per_s * INTAKE_BURST_S <= running.journal().counts()["signal"] <= share
    assert set(running.journal().books().symbols) <= {BTC}
    entry = signaler.signal("0.010", mark=mark, **_exits(mark))
    def sent_until_acknowledged() -> bool:  # as its outbox would
        signaler.send(entry)
        return any(isinstance(m, Ack) and m.seq == entry.seq for m in signaler.listen(200))
    wait_until(sent_until_acknowledged, 10)
    assert signaler.outcome(entry.seq).outcome == "done"


def test_executor_with_a_repeated_signal_acks_again_and_acts_once(running: Appliance,
                                                                  signaler: Signaler) -> None:
    mark = _mark(running)
    signal = signaler.signal("0.010", mark=mark, **_exits(mark))
    for _ in range(5):
        signaler.send(signal)
    assert signaler.outcome(signal.seq).outcome == "done"
    wait_until(lambda: sum(isinstance(m, Ack) for m in signaler.listen()) == 5)
    assert len(running.exchange_orders()) == 1
    assert running.journal().counts()["outcome"] == 1


LOST_ANSWERS = [
    {"do": "lose_answer"}, {"do": "truncate"}, {"do": "delay_answer", "delay_ms": 2_500},
    {"do": "answer", "status": 503, "body": '{"code":-1000,"msg":"Unknown error"}', "is_executed": True},
    {"do": "answer", "status": 200, "body": "", "is_executed": True},
    {"do": "answer", "status": 200, "body": "{}", "is_executed": True},
    {"do": "answer", "status": 502, "body": "<html>bad gateway</html>", "is_executed": True},
]


def test_executor_with_lost_answers_finds_each_order(running: Appliance, signaler: Signaler) -> None:
    for number, fault in enumerate(LOST_ANSWERS, 1):
        running.control("POST", "/paper/faults", {"match": "POST /fapi/v1/order", **fault})
        entered = signaler.outcome(_enter(running, signaler))
        assert (entered.outcome, entered.filled_qty) == ("done", QTY), fault
        wait_until(lambda: len(running.open_stops()) == 2)
        closing = signaler.send(signaler.signal("0", mark=_mark(running)))
        assert signaler.outcome(closing.seq).outcome == "done"
        assert len(running.exchange_orders()) == 2 * number
        _agree(running)


def test_executor_with_a_lost_request_declares_absence_only_late(
    running: Appliance, signaler: Signaler
) -> None:
    running.control("POST", "/paper/faults", {"match": "POST /fapi/v1/order", "do": "lose_request"})
    began = time.monotonic()
    seq = _enter(running, signaler)
    wait_until(lambda: running.status()["unknown_orders"] == 1)
    wait_until(lambda: (p := signaler.position()).unknown_orders == 1 and p.state == "LOCKED")
    outcome = signaler.outcome(seq, timeout=40)
    assert outcome.outcome == "absent"
    assert time.monotonic() - began > 5 + 1.5  # absent_after_s behind the fence
    assert running.exchange_orders() == []
    assert signaler.outcome(_enter(running, signaler)).outcome == "done"  # and trading goes on
    _agree(running)


def test_executor_with_a_refused_order_tells_the_code(running: Appliance, signaler: Signaler) -> None:
    running.control("POST", "/paper/faults", {
        "match": "POST /fapi/v1/order", "do": "answer", "status": 400,
        "body": '{"code":-2019,"msg":"Margin is insufficient."}'})
    outcome = signaler.outcome(_enter(running, signaler))
    assert outcome.outcome == "rejected" and "-2019" in outcome.reason
    assert running.exchange_orders() == []


def test_executor_with_a_refused_stop_closes_past_the_budget(running: Appliance, signaler: Signaler) -> None:
    running.control("POST", "/paper/faults", {
        "match": "POST /fapi/v1/algoOrder", "do": "answer", "status": 400, "times": 100,
        "body": '{"code":-4120,"msg":"Order type not supported for this endpoint."}'})
    assert signaler.outcome(_enter(running, signaler)).outcome == "done"
    wait_until(lambda: running.exchange_position() == 0, 15)
    _agree(running)
    assert any(line["event"] == "position_unprotected" for line in running.log("executor"))


def test_executor_with_kill_9_at_any_time_loses_and_doubles_nothing(running: Appliance,
                                                                     signaler: Signaler) -> None:
    for turn in range(4):
        qty = ("0.010", "0.020", "-0.010", "0")[turn]
        mark = _mark(running)
        stop = {"stop_loss": f"{mark * (0.95 if float(qty) > 0 else 1.05):.0f}"} if float(qty) else {}
        if turn % 2:  # the answer is on its way when it dies
            running.control("POST", "/paper/faults", {
                "match": "POST /fapi/v1/order", "do": "delay_answer", "delay_ms": 700})
        signal = signaler.send(signaler.signal(qty, mark=mark, **stop))
        time.sleep(0.05 + 0.1 * turn)
        running.kill("executor")
        running.start("executor")
        running.wait_running()
        signaler.position()
        for _ in range(40):  # the runner's part: again until acknowledged
            signaler.send(signal)
            if any(isinstance(m, Ack) and m.seq == signal.seq for m in signaler.listen(200)):
                break
        closed = wait_until(lambda s=signal: running.journal().find("outcome", f"levels/{s.run}/{s.seq}"), 20)
        assert closed.outcome in ("done", "denied", "expired")
        _agree(running)
    counts = running.journal().counts()
    assert counts["signal"] == counts["outcome"] == 4


def test_executor_with_a_halt_lets_nothing_out_but_protection(running: Appliance, signaler: Signaler) -> None:
    assert signaler.outcome(_enter(running, signaler)).outcome == "done"
    wait_until(lambda: len(running.open_stops()) == 2)
    halt = [sys.executable, "-m", "bot.botctl", "halt", "--config", str(running.path), "--reason", "drill"]
    assert subprocess.run(halt, capture_output=True, timeout=20).returncode == 0
    denied = signaler.outcome(_enter(running, signaler, "0.020"))
    assert denied.outcome == "denied" and "drill" in denied.reason
    running.kill("executor")
    running.start("executor")
    wait_until(lambda: running.status()["state"] == "HALTED")
    assert len(running.open_stops()) == 2
    resume = subprocess.run([sys.executable, "-m", "bot.botctl", "resume", "--config", str(running.path)],
                            capture_output=True, text=True, timeout=20)
    assert resume.returncode == 0 and "drill" in resume.stdout
    running.wait_running()
    signaler.position()
    assert signaler.outcome(_enter(running, signaler, "0.020")).outcome == "done"
    _agree(running)


def test_executor_with_an_exit_that_fired_denies_what_was_decided_before(running: Appliance,
                                                                        signaler: Signaler) -> None:
    mark = _mark(running)
    # So close that the market's own noise takes it out soon, to whichever side it goes.
    signal = signaler.send(signaler.signal("0.010", mark=mark, stop_loss=f"{mark - 1:.1f}",
                                           take_profit=f"{mark + 1:.1f}"))
    assert signaler.outcome(signal.seq).outcome == "done"
    wait_until(lambda: running.exchange_position() == 0, 60)
    wait_until(lambda: running.our_position() == 0)
    late = signaler.send(signaler.signal("0.010", mark=_mark(running), position_version=0))
    outcome = signaler.outcome(late.seq)
    assert outcome.outcome == "denied" and "stale_position" in outcome.reason
    _agree(running)


def test_executor_with_a_manual_trade_locks_the_symbol(running: Appliance, signaler: Signaler) -> None:
    assert signaler.outcome(_enter(running, signaler)).outcome == "done"
    running.control(
        "POST", "/paper/trade", {"account": "main", "symbol": "BTCUSDT", "side": "BUY", "qty": "0.005"}
    )
    wait_until(lambda: BTC in running.status()["locked_symbols"], 10)
    denied = signaler.outcome(_enter(running, signaler, "0.020"))
    assert denied.outcome == "denied" and "locked" in denied.reason
    assert running.our_position() == QTY  # never papered over


def test_executor_with_a_second_one_started_refuses_it(running: Appliance) -> None:
    second = subprocess.run([sys.executable, "-m", "bot.executor", "--config", str(running.path)],
                            capture_output=True, text=True, timeout=20)
    assert second.returncode == 78
    assert "already running" in second.stderr


def test_executor_with_an_order_executed_twice_books_it_all_and_halts(running: Appliance,
                                                                      signaler: Signaler) -> None:
    running.control("POST", "/paper/faults", {"match": "POST /fapi/v1/order", "do": "duplicate"})
    _enter(running, signaler)
    wait_until(lambda: running.status()["state"] == "HALTED")
    wait_until(lambda: running.exchange_position() == running.our_position() == 2 * QTY)
    wait_until(lambda: {Decimal(s["quantity"]) for s in running.open_stops()} == {2 * QTY})
    assert running.processes["executor"].poll() is None, "somebody has to go on protecting"


def test_executor_with_an_unknown_entry_lets_an_exit_pass(running: Appliance, signaler: Signaler) -> None:
    assert signaler.outcome(_enter(running, signaler)).outcome == "done"
    running.control("POST", "/paper/faults", {"match": "POST /fapi/v1/order", "do": "lose_request"})
    _enter(running, signaler, "0.020")
    wait_until(lambda: running.status()["unknown_orders"] == 1)
    signaler.position()
    signaler.send(signaler.signal("0", mark=_mark(running)))
    wait_until(lambda: running.exchange_position() == 0, 4)
    _agree(running)


def test_executor_with_a_file_that_is_no_journal_halts_before_anything(tmp_path: Path) -> None:
    with Appliance(tmp_path) as appliance:
        path = appliance.config.path(appliance.config.journal.path)
        path.parent.mkdir(parents=True)
        path.write_bytes(b"this is no journal" * 1_000)
        appliance.start("executor")
        halts = HaltFiles(appliance.config.state_path / "halt")
        halt, = wait_until(halts.list)
        assert halt.scope == "all" and "restore a backup" in halt.why
        assert appliance.processes["executor"].wait(20) == EXIT_SOFTWARE
