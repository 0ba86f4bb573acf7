"""The paper exchange's websockets: market streams in both URL generations, user data, the order API.

Each frame is encoded once, as the bytes of a websocket message. A connection that does not read is cut (as on
the real exchange) when the market is live; raw playback waits for it instead.
"""

import re
from collections import defaultdict
from collections.abc import Awaitable, Callable
from typing import Any, Literal

import msgspec
from aiohttp import WSMsgType, web

from bot.paper_engine import Engine
from bot.paper_feed import ON_DEMAND, Frame
from bot.paper_ledger import Ledger
from bot.paper_market import canonical_stream
from bot.paper_model import AccountEvent, Event, Json, OrderEvent, amount
from bot.paper_rest import position_json, row_json

FOREVER_MS = 1 << 62
LIFE_MS = 86_400_000  # the exchange ends each connection after 24 hours
CLOSE_FRAME = b"\x88\x02\x03\xe8"  # code 1000
PUBLIC = "depth|bookTicker|trade"
ROUTES = {"public": PUBLIC, "market": f"(?!{PUBLIC})", "private": "$"}  # the kinds of streams each has
OF_ALL = {"markPrice@1s", "ticker", "miniTicker"}  # frames that "!...@arr" streams send together
PING_S = 180.0  # the exchange pings every three minutes
STREAMS_MAX = 200  # per connection
MESSAGE_BYTES_MAX = 65_536  # of a client's message
BUFFER_BYTES = 262_144  # raw playback waits while more than this is unsent
BUFFER_BYTES_MAX = 16_777_216  # a live connection with more unsent (a minute of a busy market) is cut
StreamFault = Literal["gap", "reorder", "freeze", "half_open", "close", "expire", "age"]


class Connection:
    """One websocket. names: stream, canonical or a listen key -> as the client called it."""

    def __init__(self, ws: web.WebSocketResponse, request: web.BaseRequest, route: str, kind: str,
                 opened_ms: int) -> None:
        self.ws, self.address, self.opened_ms = ws, request.remote or "", opened_ms
        self.transport: Any = request.transport
        self.route, self.is_combined, self.is_order_api = route, kind == "stream", kind == "ws-fapi"
        self.names: dict[str, str] = {}
        self.lost, self.reordered, self.frozen_until_ms = 0, 0, 0
        self.held, self.out = list[bytes](), list[bytes]()

    @property
    def unsent(self) -> int:
        return 0 if self.transport.is_closing() else self.transport.get_write_buffer_size()

    def put(self, message: bytes, now_ms: int) -> None:
        """Collect a message, unless a fault swallows or holds it."""
        if self.lost:
            self.lost -= 1
        elif now_ms >= self.frozen_until_ms:
            self.held.append(message)
            if len(self.held) >= self.reordered:
                self.out += reversed(self.held)
                self.reordered, self.held = 0, []

    def flush(self) -> None:
        if self.out and not (self.transport.is_closing() or self.ws.closed):
            self.transport.write(b"".join(self.out))
        self.out.clear()


class Hub:
    """All websocket connections. order_api: from a message and its sender's address to the answer."""

    def __init__(self, engine: Engine, order_api: Callable[[str, str], Awaitable[bytes | None]]) -> None:
        self.engine, self.order_api = engine, order_api
        self.connections: set[Connection] = set()
        engine.listener = self.tell

    async def serve(self, request: web.BaseRequest) -> web.WebSocketResponse:
        ws = web.WebSocketResponse(compress=False, heartbeat=PING_S, max_msg_size=MESSAGE_BYTES_MAX)
        await ws.prepare(request)
        route, kind, *wanted = re.sub(f"^/(?!({'|'.join(ROUTES)})/)", "/any/", request.path)[1:].split("/")
        connection = Connection(ws, request, route, kind, self.engine.now_ms())
        self.connections.add(connection)
        try:
            wanted += [*request.query.get("streams", "").split("/"), request.query.get("listenKey", "")]
            if not connection.is_order_api:  # ccxt numbers its connections
                self._subscribe(connection, [name for name in wanted if name and not name.isdigit()])
            async for message in ws:
                if message.type is WSMsgType.TEXT:
                    if (answer := await self._answer(connection, message.data)) is None:
                        connection.transport.abort()
                    else:
                        connection.out.append(enveloped(answer))
                        connection.flush()
                while connection.frozen_until_ms == FOREVER_MS and not connection.transport.is_closing():
                    await self.engine.clock.sleep(0.05)
        finally:
            self.connections.discard(connection)
        return ws

    def publish(self, frames: list[Frame]) -> None:
        """Send market frames to those who want them."""
        now_ms, of_all = self.engine.now_ms(), defaultdict[str, list[bytes]](list)
        for stream, raw, _ in frames:
            self._spread(stream, raw, now_ms)
            kind = stream.partition("@")[2]
            if kind == "bookTicker":
                self._spread("!bookTicker", raw, now_ms)
            elif kind in OF_ALL:
                of_all[f"!{kind.removesuffix('@1s')}@arr"].append(raw)
        for stream, rows in of_all.items():
            self._spread(stream, b"[%s]" % b",".join(rows), now_ms)
        self._flush(now_ms)

    def tell(self, events: list[Event]) -> None:
        """Send what happened to an account to its user streams."""
        now_ms = self.engine.now_ms()
        for event in events:
            key = self.engine.live_key(event.account)
            if any(key in connection.names for connection in self.connections):
                for body in event_json(event, self.engine.ledger, now_ms):
                    self._spread(key, msgspec.json.encode(body), now_ms)
        self._flush(now_ms)

    def inject(self, match: str, do: StreamFault, count: int, duration_ms: int) -> dict[str, int]:
        """Apply a fault to the open connections that carry a stream: "btcusdt@trade" or "user:NAME"."""
        account, now_ms = match.removeprefix("user:"), self.engine.now_ms()
        stream = self.engine.live_key(account) if account != match else canonical_stream(match)
        found = [connection for connection in self.connections if stream in connection.names]
        for connection in found:
            match do:
                case "gap":
                    connection.lost += count
                case "reorder":
                    connection.reordered = count
                case "age":
                    connection.opened_ms -= duration_ms
                case "freeze":
                    connection.frozen_until_ms = now_ms + duration_ms
                case "half_open":
                    connection.frozen_until_ms = FOREVER_MS
                    connection.transport.pause_reading()
                case "close":
                    connection.transport.abort()
                case "expire":
                    self.engine.drop_listen_key(account)
        return {"connections": len(found)}

    async def drain(self) -> None:
        """Wait until everybody has read most of what was sent."""
        while any(c.unsent > BUFFER_BYTES for c in self.connections):
            await self.engine.clock.sleep(0.001)

    def _is_live(self, key: str) -> bool:
        return key in map(self.engine.live_key, self.engine.listen_keys)

    def _spread(self, stream: str, raw: bytes, now_ms: int) -> None:
        made: dict[str, bytes] = {}
        for connection in self.connections:
            if name := connection.names.get(stream):
                name = name if connection.is_combined else ""
                made[name] = made.get(name) or enveloped(raw, name)
                connection.put(made[name], now_ms)

    def _flush(self, now_ms: int) -> None:
        # And end what is too old, a listen key or a connection, or is not read.
        for connection in self.connections:
            for key in [k for k in connection.names if is_key(k) and not self._is_live(k)]:
                body = msgspec.json.encode({"e": "listenKeyExpired", "E": now_ms, "listenKey": key})
                connection.put(enveloped(body, key if connection.is_combined else ""), now_ms)
                del connection.names[key]
            is_old = now_ms - connection.opened_ms >= LIFE_MS
            connection.out += [CLOSE_FRAME] if is_old else []
            connection.flush()
            if is_old:
                connection.transport.close()
            elif self.engine.market.is_tradable and connection.unsent > BUFFER_BYTES_MAX:
                connection.transport.abort()

    def _subscribe(self, connection: Connection, names: list[str]) -> None:
        for name in names:
            if is_key(name):
                connection.names |= {name: name} if self._is_live(name) else {}
                continue
            stream = canonical_stream(name)
            symbol, _, kind = stream.partition("@")
            if not re.match(ROUTES.get(connection.route, ""), kind or symbol[1:]):
                continue  # the real one acknowledges, and is silent
            connection.names[stream] = name
            for feed in self.engine.market.feeds.values():
                if symbol.upper() == feed.contract.symbol or stream.startswith("!"):
                    feed.wanted |= {kind, symbol[1:]} & ON_DEMAND
            if "@markPrice" not in stream:  # on a connection of its own, and in no recording
                self.engine.market.begun_ms = self.engine.market.begun_ms or self.engine.now_ms()

    async def _answer(self, connection: Connection, text: str) -> bytes | None:
        id_: Any = None
        try:
            if connection.is_order_api:
                return await self.order_api(text, connection.address)
            message = msgspec.json.decode(text)
            id_ = message.get("id")
            names = msgspec.convert(message.get("params", []), list[str])
            result = self._obey(connection, message.get("method"), names)
            return msgspec.json.encode({"result": result, "id": id_})
        except (ValueError, AttributeError, RecursionError) as error:
            is_api, words = connection.is_order_api, f"Invalid JSON Request: {error}"
            return msgspec.json.encode({"id": id_, "error": {"code": -1135 if is_api else 2, "msg": words},
                                        **({"status": 400} if is_api else {})})

    def _obey(self, connection: Connection, method: str, names: list[str]) -> list[str] | None:
        if method == "LIST_SUBSCRIPTIONS":
            return [*connection.names.values()]
        if method == "UNSUBSCRIBE":
            gone = {*names, *map(canonical_stream, names)}
            connection.names = {s: name for s, name in connection.names.items() if s not in gone}
        elif method != "SUBSCRIBE" or len(connection.names) + len(names) > STREAMS_MAX:
            raise ValueError(f"only (UN)SUBSCRIBE and LIST_SUBSCRIPTIONS; at most {STREAMS_MAX} streams")
        else:
            self._subscribe(connection, names)
        return None


def is_key(name: str) -> bool:
    """Say whether a subscription names an account by its listen key, not a market stream."""
    return "@" not in name and not name.startswith("!")


def enveloped(raw: bytes, name: str = "") -> bytes:
    """Return a whole, unmasked websocket text message (RFC 6455 section 5.2).

    With a name in a combined stream's envelope: a recorded frame is whole again.
    """
    payload = b'{"stream":"%s","data":%s}' % (name.encode(), raw) if name else raw
    mark, count = (b"", 1) if len(payload) < 126 else (b"\x7e", 2) if len(payload) < 65_536 else (b"\x7f", 8)
    return b"\x81" + mark + len(payload).to_bytes(count, "big") + payload


def event_json(event: Event, ledger: Ledger, now_ms: int) -> list[Json]:
    """Return what the user stream says about an event."""
    if isinstance(event, AccountEvent):
        what: Json = {"e": "ACCOUNT_UPDATE", "T": ledger.now_ms, "E": now_ms}
        if event.reason == "CONFIG":
            setting = {"s": event.symbol, "l": ledger.leverage(event.account, event.symbol)}
            return [what | {"e": "ACCOUNT_CONFIG_UPDATE", "ac": setting}]
        wallet, rows = amount(event.wallet), [
            position_json(ledger, event.account, event.symbol, "position_event", event.position)
        ] if event.symbol else []
        return [what | {"a": {"m": event.reason, "P": rows, "B": [
            {"a": "USDT", "wb": wallet, "cw": wallet, "bc": amount(event.change)}]}}]
    if not isinstance(event, OrderEvent):
        return []
    order, fill, times = event.order, event.fill, {"T": event.order.update_ms, "E": now_ms}
    body = row_json(order, ledger, f"{order.kind}_event", execution=event.execution)
    if order.kind == "algo":
        body |= {"act": "MARKET" if order.ref else "0"} | ({"rm": order.reason} if order.reason else {})
        return [{"e": "ALGO_UPDATE", **times, "o": body}]
    body |= row_json(fill, ledger, "fill_event") if fill else {}
    lite = [{"e": "TRADE_LITE", **times, **{key: body[key] for key in "sqpmcSLlti"}}] if fill else []
    return [*lite, {"e": "ORDER_TRADE_UPDATE", **times, "o": body}]
