"""Malformed, oversized, old-version and random bytes on every socket: counted, logged, dropped."""

import os
import socket
import time
from pathlib import Path
from urllib.parse import urlsplit

import msgspec
import zmq

from bot.model import Heartbeat
from bot.wire import HEARTBEAT_TOPIC, MESSAGE_BYTES_MAX, encode, tick_topic
from tests.appliance import BTC, Appliance, Signaler
from tests.harness import wait_until

OLD_VERSION = msgspec.msgpack.encode(["signal", 0, "levels", 1, 1])
OLD_TICK = msgspec.msgpack.encode(["tick", 0, BTC, "trade", 1.0])


def _junk(limit: int) -> list[list[bytes]]:
    return [[b""], [b"\xff" * 40], [os.urandom(200)], [b"not msgpack"], [msgspec.msgpack.encode({"a": 1})],
            [b"a", b"b", b"c"], [b"\x93" * 5_000], [b"x" * (limit + 1)], [OLD_VERSION], [OLD_TICK]]


def _raw_tcp(endpoint: str) -> None:
    url = urlsplit(endpoint)
    for payload in (os.urandom(500), b"GET / HTTP/1.1\r\n\r\n", b"\xff" + b"\0" * 8 + b"\x7f" + b"\0" * 60):
        with socket.create_connection((url.hostname or "", url.port or 0), timeout=2) as line:
            line.sendall(payload)


def test_appliance_with_junk_on_its_bound_sockets_drops_it_and_trades_on(tmp_path: Path) -> None:
    with Appliance(tmp_path, paper={"latency_ms": 0}) as appliance:
        appliance.start("paper", "gateway", "executor")
        appliance.wait_running()
        bus, signaler = appliance.config.bus, Signaler(appliance)
        signaler.position()
        for parts in _junk(MESSAGE_BYTES_MAX):
            signaler.push.send_multipart(parts)
        for channel in (bus.ticks, bus.signals, bus.reports):
            _raw_tcp(channel.endpoint)
        for channel in (bus.ticks, bus.reports):  # a subscriber that talks
            talker = signaler._context.socket(zmq.XSUB)
            talker.connect(channel.endpoint)
            for parts in _junk(MESSAGE_BYTES_MAX):
                talker.send_multipart(parts)
        _raw_tcp(appliance.config.exchange.rest_url)
        beat = appliance.config.state_path / "run" / "executor.json"
        dropped = wait_until(lambda: (d := msgspec.json.decode(beat.read_bytes())["dropped"])
                             and sum(d.values()) >= len(_junk(1)) and d)
        assert dropped["oversized"] == 1 and dropped["version"] >= 1 and dropped["malformed"] >= 6
        assert any(line["event"] == "message_dropped" for line in appliance.log("executor"))
        mark = float(appliance._http("GET", "/fapi/v1/premiumIndex?symbol=BTCUSDT", None)["markPrice"])
        signal = signaler.send(signaler.signal("0.010", mark=mark, stop_loss=f"{mark * 0.95:.0f}"))
        assert signaler.outcome(signal.seq).outcome == "done"
        assert all(p.poll() is None for p in appliance.processes.values())
        signaler.close()


def test_executor_with_junk_on_the_ticks_it_hears_counts_it(tmp_path: Path) -> None:
    with Appliance(tmp_path) as appliance:
        appliance.start("paper", "executor")
        context = zmq.Context()
        rogue = context.socket(zmq.PUB)
        rogue.bind(appliance.config.bus.ticks.endpoint)
        beat = appliance.config.state_path / "run" / "executor.json"
        began = time.monotonic()

        def counted() -> bool:
            for parts in _junk(MESSAGE_BYTES_MAX):
                rogue.send_multipart([tick_topic(BTC), *parts])
            rogue.send_multipart([HEARTBEAT_TOPIC, encode(Heartbeat(
                publisher="gateway", run=1, time_ns=1, last_seq={"no such": 5}))])
            if not beat.exists():
                return False
            dropped = msgspec.json.decode(beat.read_bytes()).get("dropped", {})
            return {"oversized", "version", "malformed"} <= set(dropped)

        wait_until(counted, 30, step=0.3)
        assert appliance.processes["executor"].poll() is None
        assert time.monotonic() - began < 30
        context.destroy(linger=0)
