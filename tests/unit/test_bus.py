"""The sockets as they really behave: real ones, on loopback, with what goes wrong there."""

import asyncio
import os
import random
import socket
import stat
import time
from collections.abc import Callable, Coroutine

import pytest
import zmq

from bot.bus import HARD_LIMIT_FACTOR, ZmqPublisher, ZmqPuller, ZmqPusher, ZmqSubscriber, signal_endpoint
from bot.config import BusConfig, Channel
from bot.errors import ConfigError, WireError
from bot.model import Heartbeat, Tick
from bot.wire import HEARTBEAT_TOPIC, MESSAGE_BYTES_MAX, LossCounter, decode_tick, encode, tick_topic
from tests.harness import free_port

BTC = "BTC/USDT:USDT"
BUS = BusConfig(zmtp_heartbeat_ms=100, zmtp_timeout_ms=300, silence_ms=500)


def channel(**changes) -> Channel:
    return Channel(**{"endpoint": f"tcp://127.0.0.1:{free_port()}", "hwm": 1_000, "linger_ms": 0, **changes})


def play(scenario: Callable[[], Coroutine]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 20))


async def until(predicate: Callable[[], object], timeout: float = 5) -> None:
    deadline = time.monotonic() + timeout
    while not predicate():
        assert time.monotonic() < deadline, "not true in time"
        await asyncio.sleep(0.005)


class Sink:
    """A subscriber or puller's messages, and what was lost of the Ticks among them."""

    def __init__(self) -> None:
        self.messages: list = []
        self.loss = LossCounter()
        self.malformed = 0

    def take(self, batch: list) -> None:
        self.messages += batch

    def take_ticks(self, batch: list[tuple[bytes, bytes]]) -> None:
        for _, raw in batch:
            try:
                message = decode_tick(raw)
            except WireError:
                self.malformed += 1
                continue
            if isinstance(message, Tick):
                self.messages.append(message.seq)
                self.loss.saw_tick(message)
            elif isinstance(message, Heartbeat):
                self.loss.saw_heartbeat(message, frozenset({BTC}))


class Source:
    """A publisher of numbered Ticks, as the gateway is one."""

    def __init__(self, ticks: Channel, run: int = 1) -> None:
        self.publisher, self.run, self.seq = ZmqPublisher(ticks, BUS), run, 0
        self.topics: list[bytes] = []
        self.publisher.watch(self.topics.extend)

    def send(self, count: int = 1) -> None:
        for _ in range(count):
            self.seq += 1
            self.publisher.send(tick_topic(BTC), encode(Tick(
                symbol=BTC, kind="trade", price=1.0, size=0.0, bid=None, bid_size=None, ask=None,
                ask_size=None, side="buy", exchange_ns=0, receive_ns=0, run=self.run, seq=self.seq)))

    def beat(self) -> None:
        self.publisher.send(HEARTBEAT_TOPIC, encode(Heartbeat(
            publisher="gateway", run=self.run, time_ns=0, last_seq={BTC: self.seq})))


async def rebound(make: Callable):
    """Bind again in the process that has just closed: libzmq lets go of the port a moment later."""
    made: list = []

    def bind() -> bool:
        try:
            made.append(make())
        except ConfigError:
            return False
        return True

    await until(bind)
    return made[0]


def subscribe(ticks: Channel, sink: Sink) -> ZmqSubscriber:
    subscriber = ZmqSubscriber(ticks, BUS, [tick_topic(BTC), HEARTBEAT_TOPIC])
    subscriber.watch(sink.take_ticks)
    return subscriber


async def joined(source: Source, sink: Sink) -> None:
    def heard() -> bool:
        source.send()
        return bool(sink.messages)
    await until(heard)
    await until(lambda: sink.messages[-1] == source.seq)


def test_socket_with_its_config_has_every_option_set():
    async def scenario():
        bus = BusConfig(zmtp_heartbeat_ms=700, zmtp_timeout_ms=2_100)
        one, other = channel(hwm=7, linger_ms=55), channel(hwm=7, linger_ms=55)
        sockets = [ZmqPublisher(one, bus), ZmqSubscriber(one, bus, []), ZmqPuller(other, bus, other.endpoint),
                   ZmqPusher(other, bus, other.endpoint)]
        for own in sockets:
            get = own._socket.getsockopt
            assert (get(zmq.SNDHWM), get(zmq.RCVHWM), get(zmq.LINGER)) == (7, 7, 55)
            assert get(zmq.MAXMSGSIZE) == MESSAGE_BYTES_MAX * HARD_LIMIT_FACTOR
            assert (get(zmq.HEARTBEAT_IVL), get(zmq.HEARTBEAT_TIMEOUT)) == (700, 2_100)
            assert get(zmq.HEARTBEAT_TTL) == 2_100
            assert (get(zmq.RECONNECT_IVL), get(zmq.RECONNECT_IVL_MAX)) == (50, 1_000)
        assert sockets[3]._socket.getsockopt(zmq.IMMEDIATE) == 1
        for own in sockets:
            own.close()
    play(scenario)


def test_push_with_no_peer_refuses_at_once():
    async def scenario():
        signals = channel()
        pusher = ZmqPusher(signals, BUS, signals.endpoint)
        await asyncio.sleep(0.1)
        assert not pusher.send(b"nobody is there"), "IMMEDIATE: it must not queue for a peer that never came"
        pusher.close()
    play(scenario)


def test_push_with_a_restarted_puller_reaches_the_new_one():
    async def scenario():
        signals, sink = channel(), Sink()
        puller = ZmqPuller(signals, BUS, signals.endpoint)
        puller.watch(sink.take)
        pusher = ZmqPusher(signals, BUS, signals.endpoint)
        await until(lambda: pusher.send(b"one"))
        await until(lambda: sink.messages)
        puller.close()
        await until(lambda: not pusher.send(b"lost or refused"))
        again = await rebound(lambda: ZmqPuller(signals, BUS, signals.endpoint))
        again.watch(sink.take)
        await until(lambda: pusher.send(b"two"))
        await until(lambda: sink.messages[-1] == b"two")
        again.close()
        pusher.close()
    play(scenario)


def test_push_with_a_puller_that_reads_nothing_is_refused_at_the_mark():
    async def scenario():
        signals = channel(hwm=5)
        puller = ZmqPuller(signals, BUS, signals.endpoint)  # bound, and never read
        pusher = ZmqPusher(signals, BUS, signals.endpoint)
        await until(lambda: pusher.send(b"x"))
        sent, payload = 1, b"x" * 1_000
        # The kernel's socket buffers lie between the two marks: they hold some thousand of these.
        while pusher.send(payload) and sent < 100_000:
            sent += 1
            if sent % 100 == 0:
                await asyncio.sleep(0.001)
        assert 5 <= sent < 100_000
        puller.close()
        pusher.close()
    play(scenario)


def test_late_joiner_with_loss_counting_counts_only_what_it_missed_since():
    async def scenario():
        ticks, sink = channel(), Sink()
        source = Source(ticks)
        source.send(500)
        subscriber = subscribe(ticks, sink)
        await joined(source, sink)
        first = sink.messages[0]
        source.send(300)
        source.beat()
        await until(lambda: sink.messages[-1] == source.seq)
        assert first > 500 and sink.messages == list(range(first, source.seq + 1))
        assert sink.loss.lost == 0
        subscriber.close()
        source.publisher.close()
    play(scenario)


def test_slow_subscriber_with_drops_counts_them_exactly():
    async def scenario():
        ticks, sink = channel(hwm=10), Sink()
        source = Source(ticks)
        subscriber = subscribe(ticks, sink)
        await joined(source, sink)
        # 20,000 in one go, while this loop does not read: far beyond both marks and the kernel's buffers.
        first, before = sink.messages[0], len(sink.messages)
        source.send(20_000)
        await until(lambda: len(sink.messages) > before)
        for _ in range(50):  # a drop at the end shows only by a heartbeat, which may be dropped itself
            source.beat()
            await asyncio.sleep(0.01)
        published = source.seq - first + 1
        assert sink.loss.lost > 0, "nothing was dropped: this test shows nothing"
        assert sink.loss.received == len(sink.messages)
        assert sink.loss.received + sink.loss.lost == published
        assert sink.messages == sorted(set(sink.messages)), "in order, once"
        subscriber.close()
        source.publisher.close()
    play(scenario)


def test_subscriber_with_a_restarted_publisher_hears_the_new_run():
    async def scenario():
        ticks, sink = channel(), Sink()
        source = Source(ticks)
        subscriber = subscribe(ticks, sink)
        await joined(source, sink)
        source.publisher.close()
        again = await rebound(lambda: Source(ticks, run=2))
        sink.messages.clear()
        await joined(again, sink)
        again.beat()
        # Whatever the new run published before it was heard is lost, and counted.
        assert sink.loss.lost == sink.messages[0] - 1
        subscriber.close()
        again.publisher.close()
    play(scenario)


def test_publisher_with_a_restarted_subscriber_serves_it_again():
    async def scenario():
        ticks, sink = channel(), Sink()
        source = Source(ticks)
        first = subscribe(ticks, Sink())
        await until(lambda: tick_topic(BTC) in source.topics)
        first.close()
        source.topics.clear()
        second = subscribe(ticks, sink)
        await until(lambda: tick_topic(BTC) in source.topics)
        await joined(source, sink)
        second.close()
        source.publisher.close()
    play(scenario)


def test_publisher_with_subscribers_hears_each_of_them_ask():
    async def scenario():
        ticks = channel()
        source = Source(ticks)
        one, two = ZmqSubscriber(ticks, BUS, [b"s/A/"]), ZmqSubscriber(ticks, BUS, [b"s/A/"])
        await until(lambda: source.topics.count(b"s/A/") == 2)
        one.subscribe(b"s/B/")
        await until(lambda: b"s/B/" in source.topics)
        one.close()
        await asyncio.sleep(0.05)
        assert source.topics.count(b"s/A/") == 2, "an unsubscription is no question"
        two.close()
        source.publisher.close()
    play(scenario)


def test_socket_whose_wake_up_was_eaten_by_a_command_of_its_own_still_hears():
    # Both sides of libzmq's edge-triggered descriptor: whatever handles commands clears it, messages or not.
    async def scenario() -> None:
        reports, sink, asked = channel(), Sink(), Sink()
        publisher = ZmqPublisher(reports, BUS)
        publisher.watch(asked.take)
        subscriber = ZmqSubscriber(reports, BUS, [b"reports."])
        subscriber.watch(sink.take)
        await until(lambda: asked.messages)
        for socket_, other in ((subscriber, publisher), (publisher, subscriber)):
            sink.messages.clear()
            asked.messages.clear()
            if socket_ is subscriber:
                other.send(b"reports.levels", b"1")
            else:
                other.subscribe(b"more.")
            time.sleep(0.1)  # it arrives; nobody has looked yet
            socket_._socket.getsockopt(zmq.EVENTS)
            await until(lambda: sink.messages or asked.messages, 1)
        publisher.close()
        subscriber.close()

    play(scenario)


def test_publisher_with_nobody_there_never_blocks():
    async def scenario():
        source = Source(channel(hwm=1))
        source.send(50_000)
        source.publisher.close()
    play(scenario)


def test_close_with_linger_0_does_not_hold_the_process():
    async def scenario():
        ticks = channel()
        source = Source(ticks)
        subscriber = ZmqSubscriber(ticks, BUS, [b""])
        await until(lambda: source.topics)
        source.send(10_000)
        started = time.monotonic()
        source.publisher.close()
        subscriber.close()
        assert time.monotonic() - started < 0.2
    play(scenario)


JUNK = [[b""], [b"\x00" * 50], [b"\xfe" + os.urandom(200)], [b"a", b"b"], [b"", b"", b""], [b"x" * 1_025],
        [b"x" * (MESSAGE_BYTES_MAX + 1)], [b"{}"], [b"\xdd\xff\xff\xff\xff"]]


def test_puller_with_junk_hands_it_over_to_be_counted():
    async def scenario():
        signals, sink = channel(), Sink()
        puller = ZmqPuller(signals, BUS, signals.endpoint)
        puller.watch(sink.take)
        stranger = zmq.Context.instance().socket(zmq.PUSH)
        stranger.connect(signals.endpoint)
        for parts in JUNK:
            stranger.send_multipart(parts)
        stranger.send(b"good")
        await until(lambda: b"good" in sink.messages)
        assert len(sink.messages) == len(JUNK) + 1
        assert sink.messages.count(b"") == 3, "a wrong number of parts arrives as nothing"
        stranger.close(linger=0)
        puller.close()
    play(scenario)


def test_puller_with_a_message_beyond_the_hard_limit_closes_that_connection_only():
    async def scenario():
        signals, sink = channel(), Sink()
        puller = ZmqPuller(signals, BUS, signals.endpoint)
        puller.watch(sink.take)
        stranger = zmq.Context.instance().socket(zmq.PUSH)
        stranger.connect(signals.endpoint)
        pusher = ZmqPusher(signals, BUS, signals.endpoint)
        await until(lambda: pusher.send(b"before"))
        stranger.send(b"x" * (MESSAGE_BYTES_MAX * HARD_LIMIT_FACTOR + 1))
        await asyncio.sleep(0.1)
        await until(lambda: pusher.send(b"after"))
        await until(lambda: sink.messages[-1:] == [b"after"])
        assert all(len(m) < 10 for m in sink.messages)
        stranger.close(linger=0)
        pusher.close()
        puller.close()
    play(scenario)


def test_subscriber_with_junk_from_its_publisher_counts_it_and_lives():
    async def scenario():
        ticks, sink = channel(), Sink()
        source = Source(ticks)
        subscriber = subscribe(ticks, sink)
        await joined(source, sink)
        topic = tick_topic(BTC)
        for parts in JUNK:
            source.publisher._socket.send_multipart([topic, *parts])
        source.send()
        await until(lambda: sink.messages[-1] == source.seq)
        assert sink.malformed == len(JUNK)
        subscriber.close()
        source.publisher.close()
    play(scenario)


def test_publisher_with_junk_from_a_subscriber_hears_no_question():
    async def scenario():
        ticks, sink = channel(), Sink()
        source = Source(ticks)
        stranger = zmq.Context.instance().socket(zmq.XSUB)
        stranger.connect(ticks.endpoint)
        stranger.send(b"\x01s/A/")
        await until(lambda: source.topics == [b"s/A/"])
        for parts in JUNK:
            stranger.send_multipart(parts)
        subscriber = subscribe(ticks, sink)
        await joined(source, sink)
        assert set(source.topics) == {b"s/A/", tick_topic(BTC), HEARTBEAT_TOPIC}
        stranger.close(linger=0)
        subscriber.close()
        source.publisher.close()
    play(scenario)


GREETING = b"\xff\x00\x00\x00\x00\x00\x00\x00\x01\x7f\x03\x00NULL" + b"\x00" * 48  # of ZMTP 3.0


@pytest.mark.parametrize("garbage", [
    b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", b"\x00" * 100, b"\xff" * 64,
    GREETING, GREETING + b"\x06" + b"\xff" * 8,
    random.Random(1).randbytes(5_000)])
def test_ports_with_garbage_below_zeromq_go_on_serving(garbage):
    async def scenario():
        ticks, signals, sink, pulled = channel(), channel(), Sink(), Sink()
        source, puller = Source(ticks), ZmqPuller(signals, BUS, signals.endpoint)
        puller.watch(pulled.take)
        intruders = []
        for endpoint in (ticks.endpoint, signals.endpoint):
            intruder = socket.create_connection(("127.0.0.1", int(endpoint.rpartition(":")[2])), timeout=1)
            intruder.sendall(garbage)
            intruders.append(intruder)
        subscriber, pusher = subscribe(ticks, sink), ZmqPusher(signals, BUS, signals.endpoint)
        await joined(source, sink)
        await until(lambda: pusher.send(b"good"))
        # Random bytes can pass for a peer of ZMTP's first version: what comes of it is malformed, no more.
        await until(lambda: b"good" in pulled.messages)
        for own in (*intruders, subscriber, pusher, puller, source.publisher):
            own.close()
    play(scenario)


def test_bind_with_a_taken_port_is_a_config_error():
    async def scenario():
        ticks = channel()
        first = ZmqPublisher(ticks, BUS)
        with pytest.raises(ConfigError, match=r"cannot be bound: .*is another instance running"):
            ZmqPublisher(ticks, BUS)
        first.close()
    play(scenario)


def test_ipc_with_a_folder_open_to_others_is_refused(tmp_path):
    async def scenario():
        tmp_path.chmod(0o755)
        ipc = channel(endpoint=f"ipc://{tmp_path}/ticks")
        with pytest.raises(ConfigError, match="must be closed to others; chmod o="):
            ZmqPublisher(ipc, BUS)
        tmp_path.chmod(0o700)
        sink, source = Sink(), Source(ipc)
        subscriber = subscribe(ipc, sink)
        await joined(source, sink)
        subscriber.close()
        source.publisher.close()
    play(scenario)


def test_ipc_with_any_umask_is_open_to_all_who_may_enter_its_folder(tmp_path):
    tmp_path.chmod(0o710)
    before = os.umask(0o077)
    try:
        publisher = ZmqPublisher(channel(endpoint=f"ipc://{tmp_path}/ticks"), BUS)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "ticks").stat().st_mode) == 0o770
    publisher.close()


def test_ipc_with_a_folder_that_is_not_there_is_a_config_error(tmp_path):
    with pytest.raises(ConfigError, match="its folder is not there"):
        ZmqPublisher(channel(endpoint=f"ipc://{tmp_path}/nowhere/ticks"), BUS)


def test_signal_endpoint_with_a_placeholder_is_the_strategys_own():
    own = BusConfig(signals=channel(endpoint="ipc:///run/bot/{strategy}/signals"))
    assert signal_endpoint(own, "sr") == "ipc:///run/bot/sr/signals"
    assert signal_endpoint(BUS, "sr") == BUS.signals.endpoint
