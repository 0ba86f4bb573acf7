"""Messages to bytes and back, topics, and the exact counting of what was lost."""

import math
from decimal import Decimal

import msgspec

from bot.errors import WireError
from bot.model import VERSION, Heartbeat, Message, ReportMessage, Tick, TickMessage, TradingSignal

MESSAGE_BYTES_MAX = 262_144  # a Snapshot of 1,500 candles takes 90 kB
_encoder = msgspec.msgpack.Encoder()
_tick_decoder = msgspec.msgpack.Decoder(TickMessage)
_signal_decoder = msgspec.msgpack.Decoder(TradingSignal)
_report_decoder = msgspec.msgpack.Decoder(ReportMessage)

HEARTBEAT_TOPIC = b"h/"
DIGITS_MAX = 18  # before and behind the point of a Decimal: more than any contract or price has


def tick_topic(symbol: str) -> bytes:
    # The closing slash keeps a prefix subscription for "A/B" from matching "A/BC".
    return f"t/{symbol}/".encode()


def snapshot_topic(symbol: str, timeframe: str = "", count: int = 0) -> bytes:
    """Return the topic of a Snapshot; subscribing to it is how a strategy asks for it."""
    return (f"s/{symbol}/{timeframe}/{count}/" if timeframe else f"s/{symbol}/").encode()


def report_topic(strategy: str) -> bytes:
    return f"r/{strategy}/".encode()


def encode(message: Message) -> bytes:
    return _encoder.encode(message)


def decode_tick(raw: bytes) -> TickMessage:
    """Decode a message of the ticks channel. Raises WireError."""
    return _decode(_tick_decoder, raw)


def decode_signal(raw: bytes) -> TradingSignal:
    """Decode a message of the signals channel. Raises WireError."""
    signal = _decode(_signal_decoder, raw)
    _check_numbers(signal)
    return signal


def decode_report(raw: bytes) -> ReportMessage:
    """Decode a message of the reports channel. Raises WireError."""
    return _decode(_report_decoder, raw)


def _decode(decoder, raw: bytes):
    if len(raw) > MESSAGE_BYTES_MAX:
        raise WireError("oversized", f"limit {MESSAGE_BYTES_MAX} bytes; was {len(raw)}")
    try:
        return decoder.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError) as error:
        raise WireError(_reason(raw), f"{error}; was {len(raw)} bytes {raw[:40]!r}") from None


def _check_numbers(message: Message) -> None:
    # What the types let through and arithmetic, JSON or SQLite would choke on: NaN, 1E+999999999, 2**64-1.
    for name in message.__struct_fields__:
        value = getattr(message, name)
        if isinstance(value, Decimal):
            fits = (value.is_finite() and value.adjusted() <= DIGITS_MAX
                    and int(value.as_tuple().exponent) >= -DIGITS_MAX)
        elif isinstance(value, int):
            fits = abs(value) < 1 << 63
        else:
            fits = not isinstance(value, float) or math.isfinite(value)
        if not fits:
            raise WireError("malformed", f"{name} must be a number of everyday size, was {str(value)[:40]}")


def _reason(raw: bytes) -> str:
    # Only for the count: was it one of ours in another version, or no message at all?
    try:
        fields = msgspec.msgpack.decode(raw)
        if isinstance(fields, list) and isinstance(fields[0], str) and isinstance(fields[1], int):
            return "malformed" if fields[1] == VERSION else "version"
    except (msgspec.MsgspecError, ValueError, RecursionError, OverflowError, IndexError):
        pass
    return "malformed"


class LossCounter:
    """Count Ticks lost between the first and the last seq seen of each publisher run, exactly.

    A heartbeat is published behind the Ticks it counts on the same connection, so what it names
    and has not arrived is lost. What was published before the first run was joined is not counted;
    of every later run seq 1 is expected. Runs are told apart, never compared: clocks step back.
    """

    RUNS_MAX = 4  # remembered per symbol: the current one, and old ones still draining

    def __init__(self) -> None:
        self.received = 0
        self.repeated = 0
        self.lost_of: dict[str, int] = {}  # by symbol
        self._runs: dict[str, dict[int, int]] = {}  # symbol -> {run: last seq}, oldest run first

    @property
    def lost(self) -> int:
        """Return the Ticks lost, of all symbols."""
        return sum(self.lost_of.values())

    def saw_tick(self, tick: Tick) -> bool:
        """Count a Tick; return False when it is a repetition or of a run already over."""
        runs = self._runs_of(tick.symbol)
        last = self._last_seq(runs, tick.run, joined_at=tick.seq - 1)
        if tick.seq <= last:
            self.repeated += 1
            return False
        self.lost_of[tick.symbol] += tick.seq - last - 1
        self.received += 1
        runs[tick.run] = tick.seq
        return tick.run == next(reversed(runs))

    def saw_heartbeat(self, beat: Heartbeat, symbols: frozenset[str]) -> None:
        """Count what the heartbeat names and has not arrived, for the symbols subscribed to."""
        for symbol, seq in beat.last_seq.items():
            if symbol in symbols:
                runs = self._runs_of(symbol)
                last = self._last_seq(runs, beat.run, joined_at=seq)
                self.lost_of[symbol] += max(0, seq - last)
                runs[beat.run] = max(seq, last)

    def _runs_of(self, symbol: str) -> dict[int, int]:
        if symbol not in self._runs:
            self._runs[symbol], self.lost_of[symbol] = {}, 0
        return self._runs[symbol]

    def _last_seq(self, runs: dict[int, int], run: int, *, joined_at: int) -> int:
        if run not in runs:
            runs[run] = 0 if runs else joined_at
            if len(runs) > self.RUNS_MAX:
                del runs[next(iter(runs))]
        return runs[run]
