"""How fast messages are made, read, and carried between two processes' worth of sockets."""

import asyncio
import time
from dataclasses import dataclass

import pytest

from bot.bus import ZmqPublisher, ZmqSubscriber
from bot.config import BusConfig, Channel
from bot.model import Tick
from bot.wire import decode_tick, encode, tick_topic
from tests.harness import free_port

COUNT = 100_000
NS = 1_760_000_000_000_000_000
TICK = Tick(symbol="BTC/USDT:USDT", kind="quote", price=61000.15, size=0.0, bid=61000.1, bid_size=1.5,
            ask=61000.2, ask_size=2.5, side=None, exchange_ns=NS, receive_ns=NS, run=NS, seq=123_456)

pytestmark = pytest.mark.bench


@dataclass
class Stopwatch:
    name: str

    def __enter__(self) -> None:
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        each_us = (time.perf_counter() - self.started) / COUNT * 1e6
        print(f"\n{self.name}: {each_us:.2f} us each, {1e6 / each_us:,.0f} a second", end="")


def test_tick_with_encoding_and_decoding_is_measured():
    raw = encode(TICK)
    with Stopwatch("encode"):
        for _ in range(COUNT):
            encode(TICK)
    with Stopwatch("decode"):
        for _ in range(COUNT):
            decode_tick(raw)


def test_tick_with_the_way_over_loopback_is_measured():
    async def scenario() -> None:
        bus = BusConfig()
        ticks = Channel(endpoint=f"tcp://127.0.0.1:{free_port()}", hwm=COUNT, linger_ms=0)
        publisher, heard = ZmqPublisher(ticks, bus), []
        topics: list[bytes] = []
        publisher.watch(topics.extend)
        subscriber = ZmqSubscriber(ticks, bus, [tick_topic(TICK.symbol)])
        done = asyncio.Event()

        def take(batch: list[tuple[bytes, bytes]]) -> None:
            heard.extend(decode_tick(raw).seq for _, raw in batch)
            if len(heard) == COUNT:
                done.set()

        subscriber.watch(take)
        while not topics:
            await asyncio.sleep(0.01)
        with Stopwatch("encode, publish, receive, decode in one process"):
            for number in range(COUNT):
                publisher.send(tick_topic(TICK.symbol), encode(TICK))
                if number % 500 == 0:
                    await asyncio.sleep(0)
            await done.wait()
        subscriber.close()
        publisher.close()

    asyncio.run(asyncio.wait_for(scenario(), 60))
