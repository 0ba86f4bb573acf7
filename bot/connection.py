"""HTTP requests that are sent at most once, each with a full account of how far it got.

Once a byte may have left, nothing is ever repeated here, for no method: an HTTP library that quietly
sends a DELETE again when a kept connection dies (exchange-facts 0.7) would make a cancel's answer lie.
Edge to the network (asyncio transports, h11).
"""

import asyncio
import select
import ssl
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

import h11
import msgspec

from bot.clock import Clock
from bot.config import ExchangeConfig
from bot.outcome import Answer

# A connection idle for longer is not trusted: load balancers commonly drop one after 60 s.
IDLE_S_MAX = 30
BODY_BYTES_MAX = 64_000_000  # the longest answer is exchangeInfo, a few MB for a thousand symbols


class RestConnection:
    """One kept-open connection to one host; one request at a time, others wait.

    Limits: milliseconds to open (TLS included) and from then to the end of the answer; bytes of body.
    ca_file: trusted instead of the system's certificates.
    """

    def __init__(self, base_url: str, clock: Clock, *, connect_timeout_ms: int, request_timeout_ms: int,
                 body_bytes_max: int, ca_file: str | None = None) -> None:
        url = urlsplit(base_url)
        self._scheme, self._netloc, self._host = url.scheme, url.netloc, url.hostname or ""
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._tls = ssl.create_default_context(cafile=ca_file) if url.scheme == "https" else None
        self._clock = clock
        self._connect_timeout_s, self._request_timeout_s = connect_timeout_ms / 1e3, request_timeout_ms / 1e3
        self._body_bytes_max = body_bytes_max
        self._lock = asyncio.Lock()
        self._wire: _Wire | None = None
        self._used_ns = 0

    async def request(self, method: str, url: str, headers: dict[str, str], body: bytes = b"",
                      may_send: Callable[[], str] | None = None) -> Answer:
        """Send one request and return its answer; network trouble is told in it, never raised.

        url: absolute at this host, or a path; ValueError for another host. may_send is asked when the
        connection stands, immediately before the first byte: "" lets it leave, words keep it back.
        """
        request = self._head(method, url, headers, body)
        async with self._lock:
            sent_ns = self._clock.wall_ns()
            status, fields, answer, is_sent, trouble = 0, dict[str, str](), b"", False, ""
            try:
                wire = await self._open()
                refusal = may_send() if may_send is not None else ""
                if refusal:
                    return Answer(error=f"kept back: {refusal}", sent_ns=sent_ns, received_ns=sent_ns)
                sent_ns, is_sent = self._clock.wall_ns(), True
                async with asyncio.timeout(self._request_timeout_s):
                    status, fields, answer = await _exchange(wire, request, body, self._body_bytes_max)
            except (OSError, h11.RemoteProtocolError) as error:  # refused, DNS, TLS, timeout, torn, garbage
                trouble = ("" if is_sent else "cannot connect: ") + f"{type(error).__name__}: {error}"
            finally:  # also when this task is canceled: a late answer must not meet the next request
                if self._wire is not None and is_sent and not self._wire.is_reusable():
                    self._drop()
            return Answer(status=status, headers=fields, body=answer, is_sent=is_sent, error=trouble,
                          sent_ns=sent_ns, received_ns=self._clock.wall_ns())

    async def warm(self) -> bool:
        """Open the connection ahead of need; return whether it is open."""
        async with self._lock:
            try:
                return await self._open() is not None
            except OSError:
                return False

    async def close(self) -> None:
        """Close the connection; the next request opens another."""
        self._drop()

    def _head(self, method: str, url: str, headers: dict[str, str], body: bytes) -> h11.Request:
        parts = urlsplit(url)
        if (parts.scheme, parts.netloc) not in ((self._scheme, self._netloc), ("", "")):
            raise ValueError(f"url: must be at {self._scheme}://{self._netloc}; was {url.split('?')[0]}")
        fields = {"Host": self._netloc, "Accept": "application/json", **headers}
        if body or method not in ("GET", "DELETE"):
            fields["Content-Length"] = str(len(body))
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        return h11.Request(method=method, target=target, headers=list(fields.items()))

    async def _open(self) -> "_Wire":
        # Returns a connection on which nothing has been sent since its last answer.
        now_ns = self._clock.mono_ns()
        if self._wire is not None and (self._wire.is_dead() or now_ns - self._used_ns > IDLE_S_MAX * 1e9):
            self._drop()
        if self._wire is None:
            loop = asyncio.get_running_loop()
            async with asyncio.timeout(self._connect_timeout_s):
                # asyncio sets TCP_NODELAY on every TCP socket.
                _, self._wire = await loop.create_connection(_Wire, self._host, self._port, ssl=self._tls)
        self._used_ns = now_ns
        return self._wire

    def _drop(self) -> None:
        if self._wire is not None:
            self._wire.transport.abort()
            self._wire = None


class RestPool:
    """Several connections to one host, so that a request does not wait behind a slow one."""

    def __init__(self, connections: Sequence[RestConnection]) -> None:
        self._connections = connections  # each opens when it is needed, the last first
        self._idle: asyncio.LifoQueue[RestConnection] = asyncio.LifoQueue()
        for connection in connections:
            self._idle.put_nowait(connection)

    async def request(self, method: str, url: str, headers: dict[str, str], body: bytes = b"",
                      may_send: Callable[[], str] | None = None) -> Answer:
        """Send one request on an idle connection, the one used last if possible."""
        connection = await self._idle.get()
        try:
            return await connection.request(method, url, headers, body, may_send)
        finally:
            self._idle.put_nowait(connection)

    async def warm(self) -> bool:
        """Open the connection that is used first; return whether it is open."""
        return await self._connections[-1].warm()

    async def close(self) -> None:
        """Close all connections."""
        for connection in self._connections:
            await connection.close()


def rights_pool(config: ExchangeConfig, clock: Clock) -> RestPool | None:
    """Return a connection to where a key's rights are told, None when it is not configured."""
    return (
        pool(msgspec.structs.replace(config, rest_url=config.sapi_url), clock, 1) if config.sapi_url else None
    )


def pool(config: ExchangeConfig, clock: Clock, connections: int = 2) -> RestPool:
    """Return connections to the configured exchange."""
    return RestPool([RestConnection(
        config.rest_url, clock, connect_timeout_ms=config.connect_timeout_ms,
        request_timeout_ms=config.request_timeout_ms, body_bytes_max=BODY_BYTES_MAX)
        for _ in range(connections)])


class _Wire(asyncio.Protocol):
    # One TCP or TLS connection: what came, and whether more can come. An end of the peer's closes it.
    transport: asyncio.Transport

    def __init__(self) -> None:
        self.http = h11.Connection(h11.CLIENT)
        self.received, self.is_closed = bytearray(), False
        self._error: Exception | None = None
        self._news = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.received += data
        self._news.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.is_closed, self._error = True, exc
        self._news.set()

    async def read(self) -> bytes:
        # b"" at the end of the stream. Raises when it was torn.
        while not self.received and not self.is_closed:
            self._news.clear()
            await self._news.wait()
        data = bytes(self.received)
        self.received.clear()
        if not data and self._error is not None:
            raise ConnectionError(f"torn: {self._error!r}")
        return data

    def is_reusable(self) -> bool:
        # After an answer: both sides are ready for another, and no byte came that nobody asked for.
        return (self.http.our_state is self.http.their_state is h11.DONE and not self.received
                and self.http.trailing_data == (b"", False) and not self.is_closed)

    def is_dead(self) -> bool:
        # Anything that came in idleness is an end, or a byte nobody asked for; the kernel may know of
        # it before the event loop does.
        if self.received or self.is_closed or self.transport.is_closing():
            return True
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), select.POLLIN)
        return bool(poll.poll(0))


async def _exchange(wire: _Wire, request: h11.Request, body: bytes,
                    body_bytes_max: int) -> tuple[int, dict[str, str], bytes]:
    # Raises OSError or h11.RemoteProtocolError when the answer is not complete and well framed.
    http = wire.http
    if http.our_state is h11.DONE:
        http.start_next_cycle()
    out = http.send(request) or b""
    if body:
        out += http.send(h11.Data(data=body)) or b""
    out += http.send(h11.EndOfMessage()) or b""
    wire.transport.write(out)
    status, fields, parts, size = 0, dict[str, str](), list[bytes](), 0
    while True:
        event = http.next_event()
        if event is h11.NEED_DATA:
            data = await wire.read()
            if not data and not status:
                raise ConnectionError("closed before an answer")
            http.receive_data(data)
        elif isinstance(event, h11.Response):
            status = event.status_code
            fields = {name.decode("latin-1"): value.decode("latin-1") for name, value in event.headers}
            _check_framing(status, fields)
        elif isinstance(event, h11.Data):
            size += len(event.data)
            if size > body_bytes_max:
                raise OSError(f"answer longer than {body_bytes_max} bytes")
            parts.append(bytes(event.data))
        elif isinstance(event, h11.EndOfMessage):
            return status, fields, b"".join(parts)
        elif not isinstance(event, h11.InformationalResponse):
            raise OSError("not an answer to a request")


def _check_framing(status: int, fields: dict[str, str]) -> None:
    # A body that is ended by closing may be a cut one, and nobody could tell.
    if not {"content-length", "transfer-encoding"} & fields.keys() and status not in (204, 304):
        raise OSError("answer without a length")
    if fields.get("content-encoding", "identity") != "identity":
        raise OSError(f"answer in an encoding not asked for: {fields['content-encoding'][:40]}")
