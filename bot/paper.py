"""The paper exchange: Binance USD-M's REST and websocket API on [paper] bind, over a local market.

Reads: requests. Writes: its state file. State: accounts, orders, positions, fills, kept over kill -9.
Faults and the market's levels are behind `/paper/...` on the same port.
"""

import asyncio
import sys
from typing import Any

import msgspec
from aiohttp import web

from bot.config import PaperConfig
from bot.config_file import read_secret
from bot.crash import point
from bot.daemon import Daemon, run
from bot.errors import ConfigError, InvariantError
from bot.log import Tally
from bot.paper_endpoints import ROUTES
from bot.paper_engine import Engine
from bot.paper_faults import Control
from bot.paper_feed import HISTORY_MS
from bot.paper_market import build_market
from bot.paper_rest import Answer, Rest
from bot.paper_store import Store
from bot.paper_stream import Hub

FRAMES_MAX = 500  # per step: about 150 kB a connection
STEP_S_MIN, STEP_S_MAX = 0.002, 0.05  # frames due within 2 ms go out together
HANG_S = 3_600.0
REST_S = 0.02  # between two candles of the past, while nobody waits for them
OF_THE_PAST = ("klines", "ticker/24hr")  # paths that end so are answered when it is made
LIMBO = (b'{"code":-1007,"msg":"Timeout waiting for response from backend server. Send status unknown; '
         b'execution status unknown."}')


class Server:
    """HTTP in front of the engine: requests with their faults, and the control endpoint."""

    def __init__(self, daemon: Daemon, engine: Engine, keys: dict[str, tuple[str, str]]) -> None:
        self.clock, self.engine = daemon.clock, engine
        self.rest = Rest(engine, keys, ROUTES)
        self.hub = Hub(engine, self.rest.answer_ws)
        self.control, self.spawn = Control(engine, self.hub.inject), daemon.spawn
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.pasts: dict[str, asyncio.Task] = {}  # by symbol, being made
        self._asked: set[str] = set()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Serve any request."""
        try:
            if request.headers.get("Upgrade", "").lower() == "websocket":
                return await self.hub.serve(request)
            body = (await request.read()).decode(errors="replace")
            if request.path.startswith("/paper/"):
                status, value = self.control.answer(f"{request.method} {request.path}", body)
                return _response(Answer(status, msgspec.json.encode(value), {}))
            return await self._serve(request, body)
        except InvariantError as error:
            # The books are wrong in memory and right on disk: start afresh from there.
            if not self.broken.done():
                self.broken.set_exception(error)
            raise

    async def _serve(self, request: web.Request, body: str) -> web.StreamResponse:
        fault = self.control.take(f"{request.method} {request.path}")
        if fault is None:
            return _response(await self._execute(request, body))
        delay_s = fault.delay_ms / 1_000
        if fault.do in ("lose_request", "hang"):
            await self.clock.sleep(HANG_S if fault.do == "hang" else 0)
            return _cut(request)
        if fault.do == "delay":
            await self.clock.sleep(delay_s)
        answer = Answer(fault.status, fault.body.encode(), fault.headers)
        if fault.do == "limbo":
            if fault.is_executed:
                self.spawn(self._execute_later(request, body, delay_s))
            answer = Answer(408, LIMBO, {})
        elif fault.do != "answer":
            self.engine.lag_ms = fault.delay_ms if fault.do == "lag" and request.method == "GET" else 0
            answer = await self._execute(request, body)
            self.engine.lag_ms = 0
        if fault.do == "duplicate" or (fault.do == "answer" and fault.is_executed):
            await self._execute(request, body)
        if fault.do == "lose_answer":
            return _cut(request)
        if fault.do == "delay_answer":
            await self.clock.sleep(delay_s)
        return await _truncated(request, answer) if fault.do == "truncate" else _response(answer)

    async def _execute_later(self, request: web.Request, body: str, delay_s: float) -> None:
        # It is inside the exchange: its time window was kept when it came.
        received_ms = self.engine.now_ms()
        await self.clock.sleep(delay_s)
        await self._execute(request, body, received_ms)

    async def _execute(self, request: web.Request, body: str, received_ms: int | None = None) -> Answer:
        name = f"{request.method} {request.path}"
        route = ROUTES.get(name)
        if self.pasts and name.lower().endswith(OF_THE_PAST):
            asked = [s for s in self.pasts if f"symbol={s}" in request.raw_path] or [*self.pasts]
            self._asked.update(asked)
            await asyncio.wait([self.pasts[symbol] for symbol in asked])
        if route and (route.orders or request.method == "DELETE"):
            await self.clock.sleep(self.engine.config.latency_ms / 1_000)
        key, address = request.headers.get("X-MBX-APIKEY", ""), request.remote or ""
        answer = self.rest.answer(name, request.raw_path.partition("?")[2], body,
                                  key, address, received_ms)
        if route and route.orders:
            point("paper.before_answer")
        return answer

    async def remember(self, symbol: str) -> None:
        """Make the candles of a symbol's past, newest first.

        They take a second, on a busy host many: made in one piece they would keep the beat waiting, and what
        does not beat is killed. So whoever asks for them waits, and all else goes on.
        """
        now_ms, feed = self.engine.now_ms() // 60_000 * 60_000, self.engine.market.feeds[symbol]
        for open_ms in range(now_ms, max(feed.history_ms, now_ms - HISTORY_MS), -60_000):
            feed.row(open_ms, open_ms + 59_999)
            await self.clock.sleep(0 if symbol in self._asked else REST_S)


class Complaints:
    """What aiohttp says about requests that broke: counted and logged as everything else is."""

    def __init__(self, tally: Tally) -> None:
        self._tally = tally

    def exception(self, text: str, *args: Any, exc_info: Any = None) -> None:
        self._tally.add("http", error=f"{text % args}: {exc_info!r}")

    def debug(self, text: str, *args: Any, exc_info: Any = None) -> None:
        pass


async def main(daemon: Daemon) -> None:
    """Run the local paper exchange."""
    config = daemon.config.paper
    if config is None:
        raise ConfigError("paper: the table is missing; the paper exchange needs [paper] and an account")
    store = Store(daemon.config.path(config.state))
    start_ms = store.kept("market_start_ms", int, daemon.clock.wall_ns() // 1_000_000)
    store.keep("market_start_ms", start_ms)
    if config.recording:
        config = msgspec.structs.replace(config, recording=str(daemon.config.path(config.recording)))
    market = build_market(config, start_ms, store.trade_ids())
    engine = Engine(config, market, store, daemon.clock)
    server = Server(daemon, engine, _keys(daemon, config))
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    complaints: Any = Complaints(Tally("message_dropped", daemon.log, daemon.clock))
    runner = web.AppRunner(app, access_log=None, logger=complaints, shutdown_timeout=0.5)
    await runner.setup()
    host, _, port = config.bind.rpartition(":")
    try:
        await web.TCPSite(runner, host, int(port)).start()
    except OSError as error:
        raise ConfigError(f"paper.bind: {config.bind} cannot be bound: {error.strerror}") from None
    if market.is_tradable:
        server.pasts = {symbol: daemon.spawn(server.remember(symbol)) for symbol in market.feeds}
    try:
        await _play(daemon, engine, server)
    finally:
        await server.hub.close()
        await runner.cleanup()
        store.close()


async def _play(daemon: Daemon, engine: Engine, server: Server) -> None:
    while not daemon.stopping.is_set():
        frames = engine.step(FRAMES_MAX)
        server.hub.publish(frames)
        if not engine.market.is_tradable:
            await server.hub.drain()
        if server.broken.done():
            server.broken.result()
        due_ms = engine.market.next_due_ms()
        wait_s = STEP_S_MAX if due_ms is None else (due_ms - engine.now_ms()) / 1_000
        await daemon.clock.sleep(
            0 if len(frames) == FRAMES_MAX else min(max(wait_s, STEP_S_MIN), STEP_S_MAX))


def _keys(daemon: Daemon, config: PaperConfig) -> dict[str, tuple[str, str]]:
    keys: dict[str, tuple[str, str]] = {}
    for name, account in config.accounts.items():
        path, table = daemon.config.path, f"paper.accounts.{name}"
        key = read_secret(path(account.api_key_file), f"{table}.api_key_file")
        if key in keys:
            raise ConfigError(f"{table}.api_key_file: is the key of {keys[key][0]} too; give it its own")
        keys[key] = (name, read_secret(path(account.api_secret_file), f"{table}.api_secret_file"))
    return keys


def _response(answer: Answer) -> web.Response:
    return web.Response(status=answer.status, body=answer.body, headers=answer.headers,
                        content_type="application/json")


def _cut(request: web.Request) -> web.Response:
    if request.transport:
        request.transport.abort()
    return web.Response(status=500)


async def _truncated(request: web.Request, answer: Answer) -> web.StreamResponse:
    response = web.StreamResponse(status=answer.status, headers=answer.headers)
    response.content_type, response.content_length = "application/json", len(answer.body)
    await response.prepare(request)
    await response.write(answer.body[:len(answer.body) // 2])
    if request.transport:
        request.transport.close()
    return response


if __name__ == "__main__":
    sys.exit(run("paper", main))
