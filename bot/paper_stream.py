"""The paper exchange's websockets: market streams in both URL generations, user data, the order API.

Each frame is encoded once, as the bytes of a websocket message, and the bytes go to all who want it.
A connection that does not read is cut (as on the real exchange) when the market is live; raw playback
waits for it instead: nothing is dropped there, and nothing is buffered beyond BUFFER_BYTES.
"""

import json
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import msgspec
from aiohttp import WSMsgType, web

from bot.paper_engine import Engine
from bot.paper_faults import StreamFault
from bot.paper_feed import ON_DEMAND, Frame
from bot.paper_market import canonical_stream
from bot.paper_model import Event
from bot.paper_shapes import event_json

LIFE_MS = 86_400_000  # the exchange ends each connection after 24 hours
CLOSE_FRAME = b"\x88\x02\x03\xe8"  # code 1000
# Streams over all symbols: of which kind of frame they are made.
OF_ALL = {"markPrice@1s": "!markPrice@arr", "ticker": "!ticker@arr", "miniTicker": "!miniTicker@arr"}
OF_EACH = {"bookTicker": "!bookTicker"}
PING_S = 180.0  # the exchange pings every three minutes
STREAMS_MAX = 200  # per connection
MESSAGE_BYTES_MAX = 65_536  # of a client's message
BUFFER_BYTES = 262_144  # raw playback waits while more than this is unsent
BUFFER_BYTES_MAX = 16_777_216  # a live connection with more unsent (a minute of a busy market) is cut


class Connection:
    """One websocket. names: canonical stream -> as the client called it (the envelope says it so)."""

    def __init__(self, ws: web.WebSocketResponse, request: web.Request, kind: str, opened_ms: int) -> None:
        self.ws, self.address, self.opened_ms = ws, request.remote or "", opened_ms
        self.transport: Any = request.transport
        self.is_combined, self.is_order_api = kind == "stream", kind == "ws-fapi"
        self.names: dict[str, str] = {}
        self.account, self.listen_key = "", ""
        self.lost, self.frozen_until_ms, self.is_half_open = 0, 0, False
        self.reordered, self.held = 0, list[bytes]()
        self.out: list[bytes] = []

    @property
    def unsent(self) -> int:
        return 0 if self.transport.is_closing() else self.transport.get_write_buffer_size()

    def flush(self) -> None:
        """Hand over what was collected, in one write."""
        if self.out and not (self.transport.is_closing() or self.ws.closed):
            self.transport.write(b"".join(self.out))
        self.out.clear()

    def put(self, message: bytes, now_ms: int) -> None:
        """Collect a message, unless a fault swallows or holds it."""
        if self.lost:
            self.lost -= 1
        elif self.reordered:
            self.held.append(message)
            if len(self.held) == self.reordered:
                self.out += reversed(self.held)
                self.reordered, self.held = 0, []
        elif not self.is_half_open and now_ms >= self.frozen_until_ms:
            self.out.append(message)


class Hub:
    """All websocket connections. order_api: from a message and its sender's address to the answer."""

    def __init__(self, engine: Engine, order_api: Callable[[str, str], bytes]) -> None:
        self.engine, self.order_api, self._second = engine, order_api, 0
        self.connections: set[Connection] = set()
        self._readers: dict[str, list[Connection]] = defaultdict(list)
        engine.listener = self.tell

    async def serve(self, request: web.Request) -> web.WebSocketResponse:
        """Serve one connection from its handshake to its end."""
        ws = web.WebSocketResponse(compress=False, heartbeat=PING_S, max_msg_size=MESSAGE_BYTES_MAX)
        await ws.prepare(request)
        path = request.path.strip("/").split("/")
        if path[0] in ("public", "market", "private"):
            del path[0]
        connection = Connection(ws, request, path[0], self.engine.now_ms())
        self.connections.add(connection)
        try:
            query = request.query
            wanted = [*path[1:], *query.get("streams", "").split("/"), query.get("listenKey", "")]
            if not connection.is_order_api:  # ccxt numbers its connections
                self._subscribe(connection, [name for name in wanted if name and not name.isdigit()])
            async for message in ws:
                if message.type is WSMsgType.TEXT:
                    connection.out.append(text_frame(self._control(connection, message.data)))
                    connection.flush()
                while connection.is_half_open and not connection.transport.is_closing():
                    await self.engine.clock.sleep(0.05)
        finally:
            self._unsubscribe(connection, list(connection.names.values()))
            self.connections.discard(connection)
        return ws

    def publish(self, frames: list[Frame]) -> None:
        """Send market frames to those who want them."""
        touched: set[Connection] = set()
        now_ms, of_all = self.engine.now_ms(), defaultdict[str, list[bytes]](list)
        for frame in frames:
            self._spread(frame, frame.stream, now_ms, touched)
            kind = frame.stream.partition("@")[2]
            if kind in OF_EACH:
                self._spread(frame, OF_EACH[kind], now_ms, touched)
            elif kind in OF_ALL:
                of_all[OF_ALL[kind]].append(frame.raw)
        for stream, rows in of_all.items():
            self._spread(Frame(stream, b"[%s]" % b",".join(rows), now_ms), stream, now_ms, touched)
        for connection in touched:
            self._send(connection)
        if now_ms // 1_000 != self._second:
            self._second = now_ms // 1_000
            self._end_old(now_ms)

    def _spread(self, frame: Frame, stream: str, now_ms: int, touched: set[Connection]) -> None:
        made: dict[str, bytes] = {}
        for connection in self._readers.get(stream, ()):
            name = connection.names[stream] if connection.is_combined else ""
            if name not in made:
                made[name] = text_frame(_payload(frame.raw, name))
            connection.put(made[name], now_ms)
            touched.add(connection)

    def _end_old(self, now_ms: int) -> None:
        for connection in list(self.connections):
            if connection.account and not self.engine.account_of(connection.listen_key):
                self._expire(connection, now_ms)
            if now_ms - connection.opened_ms >= LIFE_MS and not connection.transport.is_closing():
                connection.out.append(CLOSE_FRAME)
                connection.flush()
                connection.transport.close()

    def _expire(self, connection: Connection, now_ms: int) -> None:
        body = {"e": "listenKeyExpired", "E": now_ms, "listenKey": connection.listen_key}
        self._tell([connection], msgspec.json.encode(body), now_ms)
        connection.account = ""

    def tell(self, events: list[Event]) -> None:
        """Send what happened to an account to its user streams."""
        now_ms = self.engine.now_ms()
        for event in events:
            readers = [c for c in self.connections if c.account == event.account]
            for body in event_json(event, self.engine.ledger, now_ms) if readers else ():
                self._tell(readers, msgspec.json.encode(body), now_ms)

    def inject(self, fault: StreamFault) -> int:
        """Apply a fault to the open connections that carry the stream; return how many."""
        found = [c for c in self.connections if f"user:{c.account}" == fault.match
                 or canonical_stream(fault.match) in c.names]
        now_ms = self.engine.now_ms()
        for connection in found:
            if fault.do == "gap":
                connection.lost += fault.count
            elif fault.do == "reorder":
                connection.reordered = fault.count
            elif fault.do == "age":
                connection.opened_ms -= fault.duration_ms
            elif fault.do == "freeze":
                connection.frozen_until_ms = now_ms + fault.duration_ms
            elif fault.do == "half_open":
                connection.is_half_open = True
                connection.transport.pause_reading()
            elif fault.do == "close":
                connection.transport.abort()
            else:
                self.engine.drop_listen_key(connection.account)
                self._expire(connection, now_ms)
        return len(found)

    async def drain(self) -> None:
        """Wait until everybody has read most of what was sent."""
        while any(c.unsent > BUFFER_BYTES for c in self.connections):
            await self.engine.clock.sleep(0.001)

    async def close(self) -> None:
        """Close all connections, saying that the server goes away."""
        for connection in list(self.connections):
            await connection.ws.close(code=1001)

    def _send(self, connection: Connection) -> None:
        connection.flush()
        if self.engine.market.is_tradable and connection.unsent > BUFFER_BYTES_MAX:
            connection.transport.abort()

    def _tell(self, readers: list[Connection], body: bytes, now_ms: int) -> None:
        for connection in readers:
            name = connection.listen_key if connection.is_combined else ""
            connection.put(text_frame(_payload(body, name)), now_ms)
            self._send(connection)

    def _subscribe(self, connection: Connection, names: list[str]) -> None:
        for name in names:
            if "@" not in name and not name.startswith("!"):
                connection.listen_key, connection.account = name, self.engine.account_of(name)
                continue
            stream = canonical_stream(name)
            if stream not in connection.names:
                self._readers[stream].append(connection)
            connection.names[stream] = name
            self._want(stream)
            if "@markPrice" not in stream:  # on a connection of its own, and in no recording
                self.engine.market.start(self.engine.now_ms())

    def _want(self, stream: str) -> None:
        symbol, _, kind = stream.partition("@")
        if stream.startswith("!"):
            symbol, kind = "", stream[1:].split("@")[0]
        for feed in self.engine.market.feeds.values():
            if symbol.upper() in ("", feed.contract.symbol):
                feed.wanted |= {kind} & ON_DEMAND

    def _unsubscribe(self, connection: Connection, names: list[str]) -> None:
        for name in names:
            stream = canonical_stream(name)
            if connection.names.pop(stream, None) is not None:
                self._readers[stream].remove(connection)

    def _control(self, connection: Connection, text: str) -> bytes:
        id_: Any = None
        if connection.is_order_api:
            try:
                return self.order_api(text, connection.address)
            except msgspec.MsgspecError as error:
                return msgspec.json.encode({"id": None, "status": 400, "error": {
                    "code": -1135, "msg": f"Invalid JSON Request: {error}"}})
        try:
            message = json.loads(text)
            id_ = message.get("id")
            return msgspec.json.encode({"result": self._command(connection, message), "id": id_})
        except (ValueError, AttributeError, RecursionError) as error:
            return msgspec.json.encode({"error": {"code": 2, "msg": f"Invalid request: {error}"}, "id": id_})

    def _command(self, connection: Connection, message: dict[str, Any]) -> Any:
        method, params = message.get("method"), message.get("params", [])
        if method == "LIST_SUBSCRIPTIONS":
            return [*connection.names.values()]
        if not isinstance(params, list):
            raise ValueError("params must be an array")
        if method == "SET_PROPERTY" and len(params) == 2 and params[0] == "combined":
            connection.is_combined = params[1] is True
            return None
        actions: dict[Any, Callable[[Connection, list[str]], None]] = {
            "SUBSCRIBE": self._subscribe, "UNSUBSCRIBE": self._unsubscribe}
        if not isinstance(method, str) or method not in actions:
            raise ValueError(f"unknown variant `{method}`, expected one of `SUBSCRIBE`, `UNSUBSCRIBE`, "
                             "`LIST_SUBSCRIPTIONS`, `SET_PROPERTY`, `GET_PROPERTY`")
        if not all(isinstance(name, str) for name in params):
            raise ValueError("every stream must be a string")
        if len(connection.names) + len(params) > STREAMS_MAX and method == "SUBSCRIBE":
            raise ValueError(f"at most {STREAMS_MAX} streams a connection")
        actions[method](connection, params)
        return None


def text_frame(payload: bytes) -> bytes:
    """Return a whole, unmasked websocket text message (RFC 6455 section 5.2)."""
    size = len(payload)
    if size < 126:
        return bytes((0x81, size)) + payload
    if size < 65_536:
        return b"\x81\x7e" + size.to_bytes(2, "big") + payload
    return b"\x81\x7f" + size.to_bytes(8, "big") + payload


def _payload(raw: bytes, name: str) -> bytes:
    # With the envelope of a combined stream as the exchange writes it: a recorded frame is whole again.
    return b'{"stream":"%s","data":%s}' % (name.encode(), raw) if name else raw

