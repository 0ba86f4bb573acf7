"""The paper exchange: Binance USD-M's REST and websocket API on [paper] bind, over a local market.

Reads: requests. Writes: its state file. State: accounts, orders, positions, fills, kept over kill -9.
"""

import asyncio
import sys
from types import SimpleNamespace
from typing import Any

import msgspec
from aiohttp import web

from bot.config import PaperConfig
from bot.config_file import read_secret
from bot.crash import point
from bot.daemon import Daemon, run
from bot.errors import ConfigError, InvariantError
from bot.log import Tally
from bot.paper_engine import Engine, Store
from bot.paper_faults import Control
from bot.paper_market import build_market
from bot.paper_rest import ROUTES, Answer, Rest
from bot.paper_stream import Hub

FRAMES_MAX = 500  # per step: about 150 kB a connection
STEP_S_MIN, STEP_S_MAX = 0.002, 0.05  # frames due within 2 ms go out together
HANG_S = 3_600.0
LIMBO = (b'{"code":-1007,"msg":"Timeout waiting for response from backend server. Send status unknown; '
         b'execution status unknown."}')


class Server:
    """HTTP in front of the engine: requests with their faults, and the control endpoint."""

    def __init__(self, daemon: Daemon, engine: Engine, keys: dict[str, tuple[str, str]]) -> None:
        self.clock, self.engine, self.spawn = daemon.clock, engine, daemon.spawn
        self.rest = Rest(engine, keys)
        self.hub = Hub(engine, self.rest.answer_ws)
        self.control = Control(engine, self.hub.inject)
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Serve any request."""
        try:
            if request.headers.get("Upgrade", "").lower() == "websocket":
                return await self.hub.serve(request)
            body = (await request.read()).decode(errors="replace")
            if request.path.startswith("/paper/"):
                status, value = self.control.answer(f"{request.method} {request.path}", body)
                return await _respond(request, (status, msgspec.json.encode(value), {}))
            return await self._serve(request, body)
        except InvariantError as error:
            # The books are wrong in memory and right on disk: start afresh from there.
            if not self.broken.done():
                self.broken.set_exception(error)
            raise

    async def _serve(self, request: web.Request, body: str) -> web.StreamResponse:
        fault = self.control.take(f"{request.method} {request.path}")
        if fault is None:
            return await _respond(request, await self._execute(request, body))
        delay_s = fault.delay_ms / 1_000
        if fault.do in ("lose_request", "hang"):
            await self.clock.sleep(HANG_S if fault.do == "hang" else 0)
            return _cut(request)
        if fault.do == "delay":
            await self.clock.sleep(delay_s)
        answer: Answer = fault.status, fault.body.encode(), fault.headers
        if fault.do == "limbo":
            if fault.is_executed:
                self.spawn(self._execute(request, body, delay_s))
            answer = 408, LIMBO, {}
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
        return await _respond(request, answer, share=0.5 if fault.do == "truncate" else 1)

    async def _execute(self, request: web.Request, body: str, after_s: float = 0) -> Answer:
        # after_s: it is inside the exchange; its time window was kept when it came.
        name, received_ms = f"{request.method} {request.path}", self.engine.now_ms()
        route = ROUTES.get(name)
        await self.clock.sleep(after_s)
        if route and (route.orders or request.method == "DELETE"):
            await self.clock.sleep(self.engine.config.latency_ms / 1_000)
        answer = self.rest.answer(name, request.raw_path.partition("?")[2], body,
                                  request.headers.get("X-MBX-APIKEY", ""), request.remote or "", received_ms)
        if route and route.orders:
            point("paper.before_answer")
        return answer

    async def play(self, stopping: asyncio.Event) -> None:
        """Let the market go on until the process ends."""
        while not stopping.is_set():
            frames = self.engine.step(FRAMES_MAX)
            self.hub.publish(frames)
            if not self.engine.market.is_tradable:
                await self.hub.drain()
            if self.broken.done():
                self.broken.result()
            due_ms = self.engine.market.next_due_ms()
            wait_s = STEP_S_MAX if due_ms is None else (due_ms - self.engine.now_ms()) / 1_000
            await self.clock.sleep(
                0 if len(frames) == FRAMES_MAX else min(max(wait_s, STEP_S_MIN), STEP_S_MAX))


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
    server = Server(daemon, Engine(config, market, store, daemon.clock), _keys(daemon, config))
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    tally = Tally("message_dropped", daemon.log, daemon.clock)  # of what aiohttp says about broken requests
    logger: Any = SimpleNamespace(debug=lambda *_, **__: None, exception=lambda text, *args, exc_info=None:
                                  tally.add("http", error=f"{text % args}: {exc_info!r}"))
    runner = web.AppRunner(app, access_log=None, logger=logger, shutdown_timeout=0.5)
    await runner.setup()
    host, _, port = config.bind.rpartition(":")
    try:
        await web.TCPSite(runner, host, int(port)).start()
    except OSError as error:
        raise ConfigError(f"paper.bind: {config.bind} cannot be bound: {error.strerror}") from None
    try:
        await server.play(daemon.stopping)
    finally:
        await server.hub.close()
        await runner.cleanup()
        store.close()


def _keys(daemon: Daemon, config: PaperConfig) -> dict[str, tuple[str, str]]:
    keys: dict[str, tuple[str, str]] = {}
    for name, account in config.accounts.items():
        path, table = daemon.config.path, f"paper.accounts.{name}"
        key = read_secret(path(account.api_key_file), f"{table}.api_key_file")
        if key in keys:
            raise ConfigError(f"{table}.api_key_file: is the key of {keys[key][0]} too; give it its own")
        keys[key] = (name, read_secret(path(account.api_secret_file), f"{table}.api_secret_file"))
    return keys


def _cut(request: web.Request) -> web.Response:
    if request.transport:
        request.transport.abort()
    return web.Response(status=500)


async def _respond(request: web.Request, answer: Answer, share: float = 1) -> web.StreamResponse:
    # share: so much of the body goes out, then the connection is closed.
    status, body, headers = answer
    if share == 1:
        return web.Response(status=status, body=body, headers=headers, content_type="application/json")
    response = web.StreamResponse(status=status, headers=headers)
    response.content_type, response.content_length = "application/json", len(body)
    await response.prepare(request)
    await response.write(body[:int(len(body) * share)])
    if request.transport:
        request.transport.close()
    return response


if __name__ == "__main__":
    sys.exit(run("paper", main))
