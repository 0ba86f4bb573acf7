"""The ZeroMQ sockets: every option set here, explicitly, from config. Edge to pyzmq.

Sockets are read when the event loop says so (`watch`) and written without ever blocking.
"""

import asyncio
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import zmq

from bot.config import BusConfig, Channel
from bot.errors import ConfigError
from bot.wire import MESSAGE_BYTES_MAX

BATCH_MAX = 500  # messages handed over in one go, so that a flood does not starve the timers
LOOK_S = 0.1  # between looks without a wake-up: the delay of a message whose wake-up was lost
# libzmq closes the connection of a larger message unseen; what lies between this and
# MESSAGE_BYTES_MAX arrives, is not decoded, and is counted.
HARD_LIMIT_FACTOR = 16


class _Socket:
    """What all four kinds share: options, binding, the edge-triggered wake-up, counters."""

    def __init__(self, kind: int, channel: Channel, bus: BusConfig) -> None:
        self._socket: Any = zmq.Context.instance().socket(kind)
        options = {
            zmq.LINGER: channel.linger_ms,
            zmq.SNDHWM: channel.hwm,
            zmq.RCVHWM: channel.hwm,
            zmq.MAXMSGSIZE: MESSAGE_BYTES_MAX * HARD_LIMIT_FACTOR,
            zmq.HEARTBEAT_IVL: bus.zmtp_heartbeat_ms,
            zmq.HEARTBEAT_TIMEOUT: bus.zmtp_timeout_ms,
            zmq.HEARTBEAT_TTL: bus.zmtp_timeout_ms,
            zmq.RECONNECT_IVL: 50,  # ms; a restarted peer is found at once
            zmq.RECONNECT_IVL_MAX: 1_000}
        for option, value in options.items():
            self._socket.setsockopt(option, value)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._handler: Callable | None = None

    def bind(self, endpoint: str) -> None:
        if endpoint.startswith("ipc://"):
            folder = Path(endpoint.removeprefix("ipc://")).parent
            if not folder.is_dir():
                raise ConfigError(f"{endpoint}: its folder is not there; mkdir -m 0700 {folder}")
            # An ipc path is open to all who can reach it, and a second bind steals it in silence.
            if stat.S_IMODE(folder.stat().st_mode) & 0o007:
                raise ConfigError(f"{endpoint}: its folder must be closed to others; chmod o= {folder}")
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            raise ConfigError(f"{endpoint}: cannot be bound: {error}; is another instance running?") from None
        if endpoint.startswith("ipc://"):  # the folder decides who may come, whatever the umask is
            Path(endpoint.removeprefix("ipc://")).chmod(0o770)

    def watch(self, handler: Callable) -> None:
        """Call handler with a list of messages whenever there are some."""
        self._loop, self._handler = asyncio.get_running_loop(), handler
        self._loop.add_reader(self._socket.fileno(), self._drain)
        self._look()

    def close(self) -> None:
        if self._loop is not None:
            self._loop.remove_reader(self._socket.fileno())
            self._loop = None
        self._socket.close()

    def _look(self) -> None:
        # Any call on the socket (send, poll, connect) may handle the command that a message came with, and so
        # clear the descriptor; nothing ever sets it again while that message waits (seen with libzmq 4.3.5).
        if self._loop is not None:
            self._loop.call_later(LOOK_S, self._look)
            self._drain()

    def _drain(self) -> None:
        # The FD is edge-triggered: read until EAGAIN, or come back by ourselves.
        if self._loop is None:
            return
        batch: list = []
        while len(batch) < BATCH_MAX:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                break
            message = self._shape(parts)
            if message is not None:
                batch.append(message)
        else:
            self._loop.call_soon(self._drain)
        if batch and self._handler is not None:
            self._handler(batch)

    def _shape(self, parts: list[bytes]):
        raise NotImplementedError  # each receiving kind says what a message is


class ZmqPublisher(_Socket):
    """PUB, bound. An XPUB in truth: it hears subscriptions, so a late joiner is served at once."""

    def __init__(self, channel: Channel, bus: BusConfig) -> None:
        super().__init__(zmq.XPUB, channel, bus)
        # Say each subscription, also one that another subscriber has already: it may be a restart.
        self._socket.setsockopt(zmq.XPUB_VERBOSE, 1)
        self.bind(channel.endpoint)

    def send(self, topic: bytes, raw: bytes) -> None:
        """Publish; never blocks. What a slow subscriber loses here its LossCounter counts."""
        self._socket.send_multipart((topic, raw), zmq.NOBLOCK)

    def _shape(self, parts: list[bytes]) -> bytes | None:
        # b"\x01topic" subscribes, b"\x00topic" unsubscribes; anything else is not for us.
        return parts[0][1:] if len(parts) == 1 and parts[0][:1] == b"\x01" else None


class ZmqSubscriber(_Socket):
    """SUB, connected. Messages are (topic, raw); a wrong number of parts arrives as (b"", b"")."""

    def __init__(self, channel: Channel, bus: BusConfig, topics: list[bytes]) -> None:
        super().__init__(zmq.SUB, channel, bus)
        self._endpoint, self._silence_s, self._is_heard = channel.endpoint, bus.silence_ms / 1_000, False
        for topic in topics:
            self.subscribe(topic)
        self._socket.connect(channel.endpoint)

    def subscribe(self, topic: bytes) -> None:
        self._socket.setsockopt(zmq.SUBSCRIBE, topic)

    def watch(self, handler: Callable) -> None:
        super().watch(handler)
        asyncio.get_running_loop().call_later(self._silence_s, self._mend)

    def _mend(self) -> None:
        # libzmq never connects again to a peer that broke its protocol, as a message above the hard
        # limit does (seen with 4.3.5): this socket would be deaf for ever.
        if self._loop is None:
            return
        if not self._is_heard:
            self._drain()  # after a freeze of this process, what came is still to be read
        if not self._is_heard:
            self._socket.disconnect(self._endpoint)
            self._socket.connect(self._endpoint)
        self._is_heard = False
        self._loop.call_later(self._silence_s, self._mend)

    def _shape(self, parts: list[bytes]) -> tuple[bytes, bytes] | None:
        self._is_heard = True
        if len(parts) != 2:
            return b"", b""
        return parts[0], parts[1]


class ZmqPusher(_Socket):
    """PUSH, connected. With nobody there it refuses (IMMEDIATE) instead of queueing to nobody."""

    def __init__(self, channel: Channel, bus: BusConfig, endpoint: str) -> None:
        super().__init__(zmq.PUSH, channel, bus)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.connect(endpoint)

    def send(self, raw: bytes) -> bool:
        """Return False when there is no peer or its queue is full. True is no delivery promise."""
        try:
            self._socket.send(raw, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True


class ZmqPuller(_Socket):
    """PULL, bound. Messages are raw bytes; a wrong number of parts arrives as b""."""

    def __init__(self, channel: Channel, bus: BusConfig, endpoint: str) -> None:
        super().__init__(zmq.PULL, channel, bus)
        self.bind(endpoint)

    def _shape(self, parts: list[bytes]) -> bytes | None:
        if len(parts) != 1:
            return b""
        return parts[0]


def signal_endpoint(bus: BusConfig, strategy: str) -> str:
    """Return where the strategy's signals go: one endpoint for all, or one each."""
    return bus.signals.endpoint.replace("{strategy}", strategy)
