"""The outbox: a strategy's signals on disk until the executor's journal has them. Edge to the disk.

A record is MAGIC, payload length, CRC-32 of the payload, payload; the payload is b"S" and the signal
as it goes over the wire, or b"A" and the (run, seq) acknowledged. Each record is one write(2).
"""

import os
import struct
import zlib
from pathlib import Path

from bot.errors import OutboxError, WireError
from bot.model import TradingSignal
from bot.wire import decode_signal, encode

MAGIC = b"OBX1"
_HEADER = struct.Struct("<4sII")
_ACK = struct.Struct("<cQQ")
COMPACT_BYTES = 262_144  # about 1,000 signals with their acknowledgements; rewritten in milliseconds

Key = tuple[int, int]  # (run, seq)


class OutboxFile:
    """The file; a simulator passes an object with the same methods. All raise OSError."""

    def __init__(self, path: Path) -> None:
        self._path, self._handle = path, -1
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)

    def read(self) -> bytes:
        self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.fsync(folder)  # the file's name must survive a power cut too
        finally:
            os.close(folder)
        return self._path.read_bytes()

    def append(self, data: bytes) -> None:
        written = os.write(self._handle, data)
        if written != len(data):
            raise OSError(f"{self._path}: {written} of {len(data)} bytes were written; is the disk full?")

    def sync(self) -> None:
        os.fsync(self._handle)

    def replace(self, data: bytes) -> None:
        part = self._path.with_suffix(".part")
        with open(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self._path)
        old = self._handle
        self.read()
        os.close(old)


class Outbox:
    """Unacknowledged signals in order of writing, and the newest signal of each symbol.

    Raises OutboxError when the file is damaged before its tail. cut_bytes: of a torn tail, left out.
    """

    def __init__(self, file: OutboxFile) -> None:
        self._file, self._limit = file, COMPACT_BYTES
        self._kept: dict[Key, tuple[TradingSignal, bytes]] = {}
        self._acked: set[Key] = set()
        data = file.read()
        self._size = self._fold(data)
        self.cut_bytes = len(data) - self._size
        self._unsynced = False
        # After a torn tail, a failed write or a failed fsync (the kernel may have dropped those pages)
        # it is not known what the file holds: it is written anew before anything is added.
        self._doubtful = self.cut_bytes > 0

    def __len__(self) -> int:
        return len(self._kept) - len(self._acked)

    def pending(self) -> list[tuple[Key, bytes]]:
        """Return ((run, seq), raw) of what must be sent until acknowledged, the oldest first."""
        return [(key, raw) for key, (_, raw) in self._kept.items() if key not in self._acked]

    def newest(self) -> dict[str, TradingSignal]:
        """Return the newest signal of each symbol, acknowledged or not."""
        return {signal.symbol: signal for signal, _ in self._kept.values()}

    def append(self, signal: TradingSignal) -> None:
        """Write the signal; from now on it exists. Raises OSError or WireError, and then it does not."""
        raw = encode(signal)
        decode_signal(raw)  # what the executor would drop as malformed would be sent for ever
        self._write(b"S" + raw)
        self._unsynced = True
        self._kept[signal.run, signal.seq] = (signal, raw)

    def acknowledge(self, key: Key) -> bool:
        """Send the signal no more; False when it was not kept.

        Raises OSError: after a restart it may be sent once more, which the executor recognizes.
        """
        if key not in self._kept or key in self._acked:
            return False
        self._acked.add(key)
        self._write(_ACK.pack(b"A", *key))
        return True

    def sync(self) -> None:
        """Make what was appended durable. Raises OSError; the next call tries again."""
        if self._unsynced and self._doubtful:
            self._rewrite()
        elif self._unsynced:
            self._doubtful = True
            self._file.sync()
            self._doubtful = self._unsynced = False

    def _write(self, payload: bytes) -> None:
        if self._doubtful or self._size > self._limit:
            self._rewrite()
        self._doubtful = True
        self._file.append(_record(payload))
        self._doubtful = False
        self._size += _HEADER.size + len(payload)

    def _rewrite(self) -> None:
        newest = {(signal.run, signal.seq) for signal in self.newest().values()}
        self._kept = {k: kept for k, kept in self._kept.items() if k not in self._acked or k in newest}
        self._acked &= self._kept.keys()
        data = b"".join(_record(b"S" + raw) + (_record(_ACK.pack(b"A", *k)) if k in self._acked else b"")
                        for k, (_, raw) in self._kept.items())
        self._file.replace(data)
        self._size, self._unsynced, self._doubtful = len(data), False, False
        self._limit = max(COMPACT_BYTES, 2 * len(data))

    def _fold(self, data: bytes) -> int:
        offset = 0
        while (payload := _payload(data, offset)) is not None:
            try:
                if payload[:1] == b"S":
                    signal = decode_signal(payload[1:])
                    self._kept[signal.run, signal.seq] = (signal, payload[1:])
                else:
                    self._acked.add(_ACK.unpack(payload)[1:])
            except (WireError, struct.error) as error:
                raise OutboxError(f"outbox: record of another version at byte {offset}: {error}") from None
            offset += _HEADER.size + len(payload)
        self._acked &= self._kept.keys()
        later = offset
        while (later := data.find(MAGIC, later + 1)) >= 0:
            if _payload(data, later) is not None:  # a torn tail has nothing whole behind it
                raise OutboxError(f"outbox: damaged at byte {offset}, a whole record follows at {later}; "
                                  "halt, compare with botctl signals, then move the file away")
        return offset


def _record(payload: bytes) -> bytes:
    return _HEADER.pack(MAGIC, len(payload), zlib.crc32(payload)) + payload


def _payload(data: bytes, offset: int) -> bytes | None:
    if len(data) - offset < _HEADER.size:
        return None
    magic, length, crc = _HEADER.unpack_from(data, offset)
    payload = data[offset + _HEADER.size:offset + _HEADER.size + length]
    return payload if magic == MAGIC and 0 < len(payload) == length and zlib.crc32(payload) == crc else None
