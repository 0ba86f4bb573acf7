"""What health tells a person itself: what is urgent, once, again each hour, and when it is over."""

import asyncio
import contextlib
import io
import socket
import threading

import pytest

from bot.alert import (
    AGAIN_NS,
    DOWN_NS,
    QUEUE_MAX,
    SHORT_RULES,
    TRIES_MAX,
    WORDS,
    Teller,
    ask,
    message,
    read_url,
    urgent,
)
from bot.config_file import load
from bot.errors import ConfigError
from bot.halt import Halt
from bot.log import Log
from tests.factory import HandClock
from tests.harness import ROOT, free_port, write_config
from tests.runbook import section

S = 1_000_000_000
HALT = Halt("all", "health", "a loop", 1)
URL = "https://hooks.example/secret-token"


def found(executor: dict | None = None, *, halts=(), findings=(), now_ns=100 * S, since_ns=0):
    beats = {} if executor is None else {"executor": {"mono_ns": now_ns, **executor}}
    return urgent(beats, halts, findings, now_ns, since_ns)


def test_urgent_with_all_well_is_nothing():
    assert found({"symbols": {"BTC": {"unprotected_s": 2.0}}}, halts=[Halt("symbol:BTC", "op", "odd", 1)],
                 findings=[{"rule": "cpu_busy", "text": "x"}]) == {}


def test_urgent_with_each_cause_names_it_and_the_first_command():
    told = found({"symbols": {"BTC": {"unprotected_s": 2.1}, "ETH": {"unprotected_s": 0.0}}}, halts=[HALT],
                 findings=[{"rule": "disk_low", "text": "900 MB, limit 1000"}])
    assert set(told) == {("TradingHalted", "all"), ("PositionUnprotected", "BTC"), ("HostShort", "disk_low")}
    assert "health: a loop" in told["TradingHalted", "all"] and "900 MB" in told["HostShort", "disk_low"]
    assert all("Type: botctl " in text for text in told.values())


@pytest.mark.parametrize(("beat_ns", "since_ns", "is_down"), [
    (100 * S - DOWN_NS, 0, False), (100 * S - DOWN_NS - 1, 0, True),
    (None, 100 * S - DOWN_NS, False), (None, 100 * S - DOWN_NS - 1, True),
    (1, 99 * S, False),  # from before our start: it has its time again
    (200 * S, 99 * S, False), (200 * S, 0, True),  # of another boot: no beat of this one
])
def test_urgent_with_a_silent_executor_counts_from_its_beat_or_our_start(beat_ns, since_ns, is_down):
    executor = {} if beat_ns is None else {"mono_ns": beat_ns, "symbols": {}}
    told = urgent({"executor": executor}, [], [], 100 * S, since_ns)
    assert set(told) == ({("ExecutorDown", "executor")} if is_down else set())


def test_urgent_with_a_dead_executor_says_of_its_symbols_what_was_so_last():
    told = found({"mono_ns": 60 * S, "symbols": {"BTC": {"unprotected_s": 9.0}, "ETH": {"unprotected_s": 0}}})
    assert set(told) == {("PositionUnprotected", "BTC"), ("ExecutorDown", "executor")}
    assert "for 49 s" in told["PositionUnprotected", "BTC"]
    assert found({"mono_ns": 200 * S, "symbols": {"BTC": {"unprotected_s": 9.0}}}, since_ns=99 * S) == {}


class World:
    """A Teller whose receiver does what a test says."""

    def __init__(self, tmp_path, has_file=True):
        config = load(write_config(tmp_path))
        self.clock, self.out = HandClock(), io.StringIO()
        self.path, self.got, self.failures, self.slept = config.path("alert.url"), [], 0, []
        self.path.parent.mkdir(exist_ok=True)
        if has_file:
            self.path.write_text(URL)
            self.path.chmod(0o600)
        self.clock.sleep = self._sleep
        self.teller = Teller(config, self.clock, Log("health", self.clock, stream=self.out), send=self._send)

    async def _sleep(self, seconds):
        self.slept.append(seconds)

    def _send(self, url, body):
        if self.failures:
            self.failures -= 1
            raise OSError(f"no route to {URL}")
        self.got.append((url, body))

    def work(self):
        """Let it send what is queued."""
        async def turn():
            work = asyncio.create_task(self.teller.work())
            while self.teller._queue or self.teller._is_due.is_set():
                await asyncio.sleep(0.001)
            work.cancel()
        asyncio.run(turn())
        return [body["text"].split("\n")[0] for _, body in self.got]


def test_teller_tells_once_then_each_hour_and_when_it_is_over(tmp_path):
    world = World(tmp_path)
    for _ in range(3):
        world.teller.see({("TradingHalted", "all"): "HALTED by op: odd"})
        world.clock.step(1)
    assert world.work() == ["ALERT TradingHalted: PAPER: HALTED by op: odd"]
    world.clock.step(AGAIN_NS / S)
    world.teller.see({("TradingHalted", "all"): "HALTED by op: odd"})
    assert len(world.work()) == 2
    world.teller.see({})
    world.teller.see({})
    assert world.work()[2:] == ["OVER TradingHalted: PAPER: HALTED by op: odd"]
    url, body = world.got[0]
    assert url == URL and body["status"] == "firing" and body["version"] == "4"
    assert body["alerts"][0]["labels"]["alertname"] == "TradingHalted"
    assert body["alerts"][0]["annotations"]["runbook_url"] == "RUNBOOK.md#tradinghalted"
    assert world.teller.counts == {"sent": 3, "failed": 0, "dropped": 0}


def test_message_with_each_alert_says_what_it_costs_and_in_chinese(tmp_path):
    rules = (ROOT / "ops" / "prometheus" / "alerts.yml").read_text(encoding="utf-8")
    told = found({"mono_ns": 1, "symbols": {"BTC": {"unprotected_s": 3}}}, halts=[HALT],
                 findings=[{"rule": rule, "text": "x"} for rule in SHORT_RULES])
    assert WORDS.keys() == {name for name, _ in told}
    config, clock = load(write_config(tmp_path)), HandClock()
    for name, text in told.items():
        impact, chinese = WORDS[name[0]]
        assert f'impact: "{impact}"' in rules.split(f"alert: {name[0]}\n")[1].split("- alert: ")[0]
        assert section(name[0]).text.splitlines()[2].startswith(f"**{chinese}**")
        firing = message(config, clock, "firing", name, text)
        assert firing["text"] == f"ALERT {name[0]}: PAPER: {text}\n{chinese}\n{impact}"
        assert firing["alerts"][0]["annotations"]["summary_zh_TW"] == chinese
        assert message(config, clock, "resolved", name, text)["text"].endswith(f"{text}\n已解除：{chinese}")
    assert message(config, clock, "firing", ("AlertTest", "all"), "x")["text"] == "ALERT AlertTest: PAPER: x"


def test_teller_keeps_a_position_unprotected_while_a_new_executor_has_not_told(tmp_path):
    world = World(tmp_path)
    world.teller.see({("PositionUnprotected", "BTC"): "lacks it", ("TradingHalted", "all"): "HALTED"})
    world.teller.see({}, knows_positions=False)
    assert world.work() == ["ALERT PositionUnprotected: PAPER: lacks it",
                            "ALERT TradingHalted: PAPER: HALTED", "OVER TradingHalted: PAPER: HALTED"]
    world.clock.step(AGAIN_NS / S)
    world.teller.see({}, knows_positions=False)
    assert world.work()[3:] == ["ALERT PositionUnprotected: PAPER: lacks it"], "told again each hour"
    world.teller.see({})
    assert world.work()[4:] == ["OVER PositionUnprotected: PAPER: lacks it"]


def test_teller_whose_receiver_fails_tries_again_and_keeps_the_secret(tmp_path):
    world = World(tmp_path)
    world.failures = 3
    world.teller.see({("HostShort", "disk_low"): "short"})
    assert len(world.work()) == 1 and world.slept == [1.0, 2.0, 4.0]
    assert world.teller.counts == {"sent": 1, "failed": 3, "dropped": 0}
    assert "alert_undelivered" in world.out.getvalue() and "secret-token" not in world.out.getvalue()


def test_teller_with_a_dead_receiver_drops_what_is_old_and_counts_it(tmp_path):
    world = World(tmp_path)
    world.failures = TRIES_MAX
    for number in range(QUEUE_MAX + 5):
        world.teller.see({("HostShort", str(number)): "short"})
        world.teller._told.clear()
    assert world.teller.counts["dropped"] == 5
    world.work()
    assert world.teller.counts["dropped"] == 6 and max(world.slept) <= 60 and sum(world.slept) > 300


def test_teller_without_a_file_tells_nobody_and_with_an_open_one_says_why(tmp_path):
    world = World(tmp_path, has_file=False)
    world.teller.see({("TradingHalted", "all"): "odd"})
    assert world.work() == [] and world.teller.counts == {"sent": 0, "failed": 0, "dropped": 0}
    world = World(tmp_path)
    world.path.chmod(0o644)
    world.teller.see({("TradingHalted", "all"): "odd"})
    assert world.work() == [] and "must have mode 0400 or 0600" in world.out.getvalue()


@pytest.mark.parametrize("text", ["file:///etc/passwd", "hooks.example", "https://"])
def test_url_that_is_no_web_address_is_refused(tmp_path, text):
    path = tmp_path / "alert.url"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match="http or https"):
        read_url(path)


def test_ask_with_nobody_there_raises_an_oserror_without_the_address():
    with pytest.raises(OSError, match="refused") as raised:
        ask(f"http://127.0.0.1:{free_port()}/token", {})
    assert "token" not in str(raised.value)


def test_ask_with_an_answer_without_end_reads_so_much_and_no_more(monkeypatch):
    monkeypatch.setattr("bot.alert.ANSWER_BYTES_MAX", 1_000)
    with socket.create_server(("127.0.0.1", 0)) as server:
        def answer() -> None:
            connection, _ = server.accept()
            with connection, contextlib.suppress(OSError):  # they hang up
                connection.recv(65_536)
                connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
                while True:
                    connection.sendall(bytes(65_536))
        thread = threading.Thread(target=answer)
        thread.start()
        assert ask(f"http://127.0.0.1:{server.getsockname()[1]}/", {}) == bytes(1_000)
        thread.join(10)
        assert not thread.is_alive()


def test_ask_whose_refusal_is_cut_off_raises_an_oserror_too():
    # Anything else would end health, and a loop of that would halt trading for a broken receiver.
    with socket.create_server(("127.0.0.1", 0)) as server:
        def answer() -> None:
            connection, _ = server.accept()
            with connection:
                connection.recv(65_536)
                connection.sendall(b"HTTP/1.1 500 No\r\nTransfer-Encoding: chunked\r\n\r\n")
        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(OSError, match="HTTP 500"):
            ask(f"http://127.0.0.1:{server.getsockname()[1]}/token", {})
        thread.join()
