"""What travels: encoding, what is refused, exact loss counting, and a stranger who only read docs/wire.md."""

import asyncio
import random
import struct
from decimal import Decimal

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from bot import wire
from bot.bus import ZmqPublisher, ZmqPuller
from bot.config import BusConfig, Channel
from bot.errors import WireError
from bot.model import Heartbeat, Tick, TradingSignal
from tests.harness import free_port, wait_until

BTC = "BTC/USDT:USDT"
NS = 1_760_000_001_500_000_000
SIGNAL = TradingSignal(
    strategy="sr", run=1, seq=3, symbol=BTC, target_qty=Decimal("-0.016"), stop_loss=Decimal("60900.0"),
    take_profit=None, created_ns=NS, expires_ns=NS + 5, position_version=4, tick_run=2, tick_seq=7,
    tick_price=61000.1, tick_exchange_ns=NS, tick_receive_ns=NS, reason="")
DECODERS = [wire.decode_tick, wire.decode_signal, wire.decode_report]


def tick(seq: int, *, run: int = 1, symbol: str = BTC) -> Tick:
    return Tick(symbol=symbol, kind="mark", price=1.0, size=0.0, bid=None, bid_size=None, ask=None,
                ask_size=None, side=None, exchange_ns=0, receive_ns=0, run=run, seq=seq)


def beat(last_seq: int, *, run: int = 1) -> Heartbeat:
    return Heartbeat(publisher="gateway", run=run, time_ns=0, last_seq={BTC: last_seq})


def fields_of(message) -> list:
    return msgspec.msgpack.decode(wire.encode(message))


def test_signal_with_all_fields_survives_the_way():
    assert wire.decode_signal(wire.encode(SIGNAL)) == SIGNAL
    assert str(wire.decode_signal(wire.encode(SIGNAL)).stop_loss) == "60900.0", "money keeps its digits"


def test_message_with_fields_of_a_later_minor_change_is_understood():
    assert wire.decode_signal(msgspec.msgpack.encode([*fields_of(SIGNAL), "new"])) == SIGNAL


@pytest.mark.parametrize(("decode", "message"), [
    (wire.decode_tick, tick(1)), (wire.decode_signal, SIGNAL), (wire.decode_report, beat(1))])
def test_message_with_another_version_is_counted_as_such(decode, message):
    fields = fields_of(message)
    fields[1] = 2
    with pytest.raises(WireError) as caught:
        decode(msgspec.msgpack.encode(fields))
    assert caught.value.reason == "version"


@pytest.mark.parametrize("decode", DECODERS)
@pytest.mark.parametrize("raw", [b"", b"\xc1", b"\x00", b"\x90", b"\x91\xa4tick", b"[1,2]", b"\x80",
                                 b"\xdd\xff\xff\xff\xff", b"\x92\xa4tick\x01", b"\x91" * 5_000,
                                 wire.encode(tick(1))[:-1], wire.encode(SIGNAL)[:-1]])
def test_bytes_with_no_message_in_them_are_malformed(decode, raw):
    with pytest.raises(WireError) as caught:
        decode(raw)
    assert caught.value.reason == "malformed"


def test_message_with_another_channel_is_malformed():
    for decode, raw in ((wire.decode_tick, wire.encode(SIGNAL)), (wire.decode_report, wire.encode(tick(1))),
                        (wire.decode_signal, wire.encode(beat(1)))):
        with pytest.raises(WireError):
            decode(raw)


@pytest.mark.parametrize(("number", "value"), [
    (6, "NaN"), (6, "sNaN"), (6, "-Infinity"), (6, "1E+999999999"), (6, "1E-999999999"), (6, "9" * 40),
    (7, "Infinity"), (8, "0E+400"), (14, float("nan")), (14, float("inf")), (4, 2**64 - 1), (3, 2**63),
    (12, 2**64 - 1), (6, "0x10"), (6, True), (6, None), (2, None), (4, "3"), (4, 1.5)])
def test_signal_with_a_number_nothing_can_calculate_with_is_malformed(number, value):
    fields = fields_of(SIGNAL)
    fields[number] = value
    with pytest.raises(WireError) as caught:
        wire.decode_signal(msgspec.msgpack.encode(fields))
    assert caught.value.reason == "malformed" and len(str(caught.value)) < 400


@given(st.binary(max_size=200))
def test_decoders_with_any_bytes_raise_nothing_but_wire_error(raw):
    for decode in DECODERS:
        try:
            decode(raw)
        except WireError:
            pass


def test_decoders_with_every_mutation_of_a_message_raise_nothing_but_wire_error():
    raw = wire.encode(SIGNAL)
    generator = random.Random(1)
    for _ in range(5_000):
        mutated = bytearray(raw)
        for _ in range(generator.randint(1, 4)):
            mutated[generator.randrange(len(raw))] = generator.randrange(256)
        try:
            wire.decode_signal(bytes(mutated))
        except WireError:
            pass


def test_topics_with_symbols_that_begin_alike_do_not_match():
    assert not wire.tick_topic("A/BC:BC").startswith(wire.tick_topic("A/B"))
    assert not wire.report_topic("sr2").startswith(wire.report_topic("sr"))
    assert not wire.snapshot_topic(BTC, "15m", 50).startswith(wire.snapshot_topic(BTC, "1m", 50))
    assert not wire.snapshot_topic(BTC, "1m", 500).startswith(wire.snapshot_topic(BTC, "1m", 50))


def test_loss_with_gaps_and_a_late_join_is_exact():
    counter = wire.LossCounter()
    for seq in (11, 12, 15, 16, 20):  # joined at 11; 13, 14, 17, 18, 19 are lost
        assert counter.saw_tick(tick(seq))
    assert (counter.received, counter.lost) == (5, 5) and list(counter.lost_of.values()) == [5]


def test_loss_at_the_end_of_a_run_shows_by_heartbeat():
    counter = wire.LossCounter()
    counter.saw_tick(tick(1))
    counter.saw_heartbeat(beat(4), frozenset({BTC}))
    counter.saw_heartbeat(beat(4), frozenset({BTC}))
    assert counter.lost == 3
    counter.saw_tick(tick(5))
    assert (counter.received, counter.lost) == (2, 3)


def test_loss_of_the_first_ticks_of_a_later_run_is_counted():
    counter = wire.LossCounter()
    counter.saw_tick(tick(100))
    counter.saw_tick(tick(3, run=2))
    assert counter.lost == 2


def test_loss_of_a_whole_later_run_shows_by_heartbeat():
    counter = wire.LossCounter()
    counter.saw_tick(tick(1))
    counter.saw_heartbeat(beat(7, run=2), frozenset({BTC}))
    assert counter.lost == 7


def test_loss_with_runs_whose_clock_stepped_back_is_counted_alike():
    counter = wire.LossCounter()
    counter.saw_tick(tick(5, run=1_000))
    assert counter.saw_tick(tick(1, run=10)), "a restarted publisher after a clock step is the current one"
    assert counter.lost == 0 and counter.received == 2


def test_loss_with_repetitions_counts_them_apart_and_refuses_them():
    counter = wire.LossCounter()
    assert counter.saw_tick(tick(1))
    assert not counter.saw_tick(tick(1))
    assert (counter.received, counter.lost, counter.repeated) == (1, 0, 1)


def test_loss_with_a_straggler_of_an_old_run_counts_it_and_does_not_act_on_it():
    counter = wire.LossCounter()
    counter.saw_tick(tick(1))
    counter.saw_tick(tick(1, run=2))
    assert not counter.saw_tick(tick(2)), "received, and of a run already over"
    assert (counter.received, counter.lost) == (3, 0)


def test_heartbeat_with_symbols_not_subscribed_to_counts_nothing():
    counter = wire.LossCounter()
    counter.saw_heartbeat(beat(50), frozenset({"ETH/USDT:USDT"}))
    counter.saw_tick(tick(51))
    assert counter.lost == 0


@given(st.lists(st.booleans(), min_size=1, max_size=200), st.integers(0, 50))
def test_loss_with_any_pattern_of_drops_equals_the_truth(arrives, first):
    counter = wire.LossCounter()
    seqs = [first + number for number, came in enumerate(arrives, 1) if came]
    for seq in seqs:
        counter.saw_tick(tick(seq))
    if seqs:
        counter.saw_heartbeat(beat(first + len(arrives)), frozenset({BTC}))
        assert counter.received == len(seqs)
        assert counter.lost == first + len(arrives) - seqs[0] + 1 - len(seqs)


# A strategy in another language: it has read docs/wire.md and has a ZeroMQ library, nothing of ours.

def pack(value) -> bytes:
    """MessagePack, as much of it as the page asks for."""
    if value is None:
        return b"\xc0"
    if isinstance(value, list):
        return struct.pack(">BH", 0xDC, len(value)) + b"".join(map(pack, value))
    if isinstance(value, str):
        return struct.pack(">BB", 0xD9, len(value.encode())) + value.encode()
    if isinstance(value, float):
        return struct.pack(">Bd", 0xCB, value)
    return struct.pack(">BQ", 0xCF, value) if value >= 0 else struct.pack(">Bq", 0xD3, value)


def unpack(raw: bytes, at: int = 0) -> tuple:
    """Return (value, next position)."""
    code, at = raw[at], at + 1
    if code < 0x80 or code >= 0xE0:
        return (code if code < 0x80 else code - 0x100), at
    if code == 0xC0:
        return None, at
    numbers = {0xCA: ">f", 0xCB: ">d", 0xCC: ">B", 0xCD: ">H", 0xCE: ">I", 0xCF: ">Q", 0xD0: ">b", 0xD1: ">h",
               0xD2: ">i", 0xD3: ">q"}
    if code in numbers:
        size = struct.calcsize(numbers[code])
        return struct.unpack(numbers[code], raw[at:at + size])[0], at + size
    if code & 0xE0 == 0xA0 or code in (0xD9, 0xDA):
        width = {0xD9: 1, 0xDA: 2}.get(code, 0)
        size = int.from_bytes(raw[at:at + width], "big") if width else code & 0x1F
        return raw[at + width:at + width + size].decode(), at + width + size
    items, at = [], at + (2 if code == 0xDC else 0)
    for _ in range(int.from_bytes(raw[at - 2:at], "big") if code == 0xDC else code & 0x0F):
        item, at = unpack(raw, at)
        items.append(item)
    return items, at


def test_stranger_with_the_page_alone_gets_ticks_and_signals():
    asyncio.run(asyncio.wait_for(strangers_day(), 20))


async def strangers_day() -> None:
    bus = BusConfig()
    ticks = Channel(endpoint=f"tcp://127.0.0.1:{free_port()}", hwm=1_000, linger_ms=0)
    signals = Channel(endpoint=f"tcp://127.0.0.1:{free_port()}", hwm=1_000, linger_ms=0)
    publisher, puller = ZmqPublisher(ticks, bus), ZmqPuller(signals, bus, signals.endpoint)
    context = zmq.Context()
    try:
        sub, push = context.socket(zmq.SUB), context.socket(zmq.PUSH)
        sub.setsockopt(zmq.SUBSCRIBE, b"t/BTC/USDT:USDT/")
        sub.connect(ticks.endpoint)
        push.setsockopt(zmq.IMMEDIATE, 1)
        push.connect(signals.endpoint)

        def received() -> bool:
            publisher.send(wire.tick_topic(BTC), wire.encode(tick(7)))
            return bool(sub.poll(20))

        wait_until(received)
        topic, raw = sub.recv_multipart()
        name, version, symbol, kind, price, *_, seq = unpack(raw)[0]
        assert topic == b"t/BTC/USDT:USDT/"
        assert (name, version, symbol, kind, price, seq) == ("tick", 1, BTC, "mark", 1.0, 7)

        push.send(pack(["signal", 1, "sr", 1, 3, BTC, "-0.016", "60900.0", None, NS, NS + 5, 4, 2, 7, 61000.1,
                        NS, NS, ""]))
        arrived: list[bytes] = []
        puller.watch(arrived.extend)
        while not arrived:
            await asyncio.sleep(0.01)
        assert wire.decode_signal(arrived[0]) == SIGNAL
    finally:
        publisher.close()
        puller.close()
        context.destroy(linger=0)
