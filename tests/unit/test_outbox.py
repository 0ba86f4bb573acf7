"""The outbox file: torn at every byte, damaged, full, compacted."""

import errno
import itertools
from decimal import Decimal

import pytest

from bot.errors import OutboxError
from bot.model import TradingSignal
from bot.outbox import COMPACT_BYTES, Outbox, OutboxFile
from bot.wire import encode

BTC, ETH = "BTC/USDT:USDT", "ETH/USDT:USDT"


def signal(seq, symbol=BTC, run=7, reason="because"):
    return TradingSignal(
        strategy="levels", run=run, seq=seq, symbol=symbol, target_qty=Decimal("0.010"), stop_loss=None,
        take_profit=Decimal("61000.1"), created_ns=1, expires_ns=2, position_version=3, tick_run=4,
        tick_seq=5, tick_price=60_000.5, tick_exchange_ns=6, tick_receive_ns=7, reason=reason)


def keys(outbox):
    return [key for key, _ in outbox.pending()]


class FaultyFile:
    """The bytes a disk would hold; `fail` names the calls that raise, `room` the bytes still free."""

    def __init__(self, data=b""):
        self.data, self.synced = data, b""
        self.fail, self.room = set(), 10**9

    def _check(self, call):
        if call in self.fail:
            raise OSError(errno.EIO, f"{call} failed")

    def read(self):
        return self.data

    def append(self, data):
        self._check("append")
        fits = data[:self.room]
        self.data += fits
        self.room -= len(fits)
        if fits != data:
            raise OSError(errno.ENOSPC, "no space left on device")

    def sync(self):
        self._check("sync")
        self.synced = self.data

    def replace(self, data):
        self._check("replace")
        if len(data) > self.room + len(self.data):
            raise OSError(errno.ENOSPC, "no space left on device")
        self.data = self.synced = data


def test_outbox_with_signals_and_acks_keeps_the_rest_over_a_restart(tmp_path):
    path = tmp_path / "outbox" / "levels.outbox"
    outbox = Outbox(OutboxFile(path))
    for seq in (1, 2, 3):
        outbox.append(signal(seq))
    assert outbox.acknowledge((7, 2))
    assert not outbox.acknowledge((7, 2)), "only once"
    assert not outbox.acknowledge((6, 1)), "another run's"
    outbox.sync()

    again = Outbox(OutboxFile(path))
    assert again.pending() == [((7, 1), encode(signal(1))), ((7, 3), encode(signal(3)))], "in order"
    assert (len(again), again.cut_bytes) == (2, 0)
    assert path.stat().st_mode & 0o777 == 0o600


def test_outbox_with_everything_acknowledged_still_knows_each_symbols_newest():
    file = FaultyFile()
    outbox = Outbox(file)
    for number in (signal(1), signal(2, ETH), signal(3)):
        outbox.append(number)
        outbox.acknowledge((7, number.seq))
    assert Outbox(file).newest() == {BTC: signal(3), ETH: signal(2, ETH)}
    assert keys(Outbox(file)) == []


def test_outbox_with_file_cut_at_every_byte_keeps_what_was_whole():
    file, ends = FaultyFile(), []
    outbox = Outbox(file)
    for seq in (1, 2, 3):
        outbox.append(signal(seq))
        ends.append(len(file.data))
    outbox.acknowledge((7, 1))
    ends.append(len(file.data))
    for length in range(len(file.data) + 1):
        whole = sum(end <= length for end in ends)
        torn = Outbox(FaultyFile(file.data[:length]))
        assert keys(torn) == [[], [(7, 1)], [(7, 1), (7, 2)], [(7, 1), (7, 2), (7, 3)],
                              [(7, 2), (7, 3)]][whole]
        assert torn.cut_bytes == length - (ends[whole - 1] if whole else 0)


def test_outbox_with_torn_tail_goes_on_without_it():
    file = FaultyFile()
    Outbox(file).append(signal(1))
    file.data += file.data[:20]
    torn = Outbox(file)
    torn.append(signal(2))
    assert keys(Outbox(file)) == [(7, 1), (7, 2)]
    assert Outbox(file).cut_bytes == 0


@pytest.mark.parametrize("tail", [b"\0" * 300, b"OBX1" + b"\xff" * 40, b"OBX1\x05\0\0\0"])
def test_outbox_with_garbage_behind_the_last_record_cuts_it_off(tail):
    file = FaultyFile()
    Outbox(file).append(signal(1))
    again = Outbox(FaultyFile(file.data + tail))
    assert (keys(again), again.cut_bytes) == ([(7, 1)], len(tail))


def test_outbox_with_damage_at_every_byte_before_the_tail_refuses_to_load():
    file = FaultyFile()
    outbox = Outbox(file)
    outbox.append(signal(1))
    first = len(file.data)
    outbox.append(signal(2))
    for at in range(first):
        damaged = bytearray(file.data)
        damaged[at] ^= 0x10
        with pytest.raises(OutboxError, match=f"damaged at byte 0, a whole record follows at {first}"):
            Outbox(FaultyFile(bytes(damaged)))


def test_outbox_with_whole_record_of_another_version_says_so():
    file = FaultyFile()
    outbox = Outbox(file)
    outbox._write(b"S\x92\xa6signal\x02")
    with pytest.raises(OutboxError, match="another version at byte 0"):
        Outbox(file)


def test_outbox_with_full_disk_denies_the_signal_and_recovers():
    file = FaultyFile()
    outbox = Outbox(file)
    outbox.append(signal(1))
    for room in (0, 1, 30):  # nothing, or a part of the record, was written
        file.room = room
        with pytest.raises(OSError, match="no space"):
            outbox.append(signal(2))
        assert keys(outbox) == [(7, 1)], "what was not written does not exist"
        assert keys(Outbox(FaultyFile(file.data))) == [(7, 1)], "after a crash neither"
        file.room = 10**9
    outbox.append(signal(3))
    assert keys(outbox) == keys(Outbox(file)) == [(7, 1), (7, 3)]


def test_outbox_with_failed_sync_writes_its_signals_anew():
    file = FaultyFile()
    outbox = Outbox(file)
    outbox.append(signal(1))
    file.fail = {"sync"}
    with pytest.raises(OSError, match="sync failed"):
        outbox.sync()
    assert keys(outbox) == [(7, 1)], "it was written, and may have been pushed"
    file.data = b""  # the kernel dropped the pages
    file.fail = {"replace"}
    with pytest.raises(OSError, match="replace failed"):
        outbox.sync()
    file.fail = set()
    outbox.sync()
    assert keys(Outbox(FaultyFile(file.synced))) == [(7, 1)]


def test_outbox_with_failed_acknowledgement_sends_no_more_in_this_run():
    file = FaultyFile()
    outbox = Outbox(file)
    outbox.append(signal(1))
    file.fail = {"append"}
    with pytest.raises(OSError, match="append failed"):
        outbox.acknowledge((7, 1))
    assert keys(outbox) == []
    assert keys(Outbox(FaultyFile(file.data))) == [(7, 1)], "once more after a restart"


def test_outbox_with_many_acknowledged_signals_stays_small(tmp_path):
    path = tmp_path / "levels.outbox"
    outbox = Outbox(OutboxFile(path))
    outbox.append(signal(0, "XRP/USDT:USDT"))
    outbox.acknowledge((7, 0))
    outbox.append(signal(1, ETH))
    sizes = []
    for seq in range(2, 2_000):
        outbox.append(signal(seq, reason="a" * 200))
        outbox.acknowledge((7, seq))
        sizes.append(path.stat().st_size)
    assert COMPACT_BYTES - 1_000 < max(sizes) < COMPACT_BYTES + 1_000
    assert sum(after < before for before, after in itertools.pairwise(sizes)) == 2, "rewritten twice"
    again = Outbox(OutboxFile(path))
    assert keys(again) == [(7, 1)]
    newest = {BTC: signal(1_999, reason="a" * 200), ETH: signal(1, ETH),
              "XRP/USDT:USDT": signal(0, "XRP/USDT:USDT")}
    assert again.newest() == newest, "also that of a symbol whose signals were all acknowledged"
    assert [p.name for p in tmp_path.iterdir()] == ["levels.outbox"]


def test_outbox_with_many_pending_signals_is_not_rewritten_at_each_write():
    file = FaultyFile()
    outbox, rewritten = Outbox(file), []
    replace, file.replace = file.replace, lambda data: (rewritten.append(len(data)), replace(data))
    for seq in range(1, 3_001):
        outbox.append(signal(seq, reason="a" * 200))
    assert len(outbox) == 3_000
    assert 1 <= len(rewritten) <= 4
    assert keys(Outbox(file)) == [(7, seq) for seq in range(1, 3_001)]


def test_outbox_with_real_file_is_written_before_append_returns(tmp_path):
    path = tmp_path / "levels.outbox"
    Outbox(OutboxFile(path)).append(signal(1))
    assert keys(Outbox(OutboxFile(path))) == [(7, 1)], "another reader sees it: kill -9 loses nothing"


def test_outbox_with_restored_real_file_reads_after_a_rewrite(tmp_path):
    path = tmp_path / "levels.outbox"
    file = OutboxFile(path)
    file.read()
    file.replace(b"new")
    file.append(b" and more")
    assert path.read_bytes() == b"new and more"
