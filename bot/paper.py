"""The paper exchange: Binance USD-M's REST and websocket API on [paper] bind, over a local market.

Reads: requests. Writes: its state file. State: accounts, orders, positions, fills, kept over kill -9.
Faults and the market's levels are behind `/paper/...` on the same port. Run: python -m bot.paper
"""

import asyncio
import sys
from typing import Any

import msgspec
from aiohttp import web

from bot.config import PaperConfig
from bot.config_file import read_secret
from bot.daemon import Daemon, run
from bot.errors import ConfigError, InvariantError
from bot.paper_engine import Engine
from bot.paper_faults import Fault, Faults, StreamFault
from bot.paper_market import build_market
from bot.paper_model import ZERO, Order, Refused
from bot.paper_rest import Answer, Rest
from bot.paper_shapes import account_json
from bot.paper_store import Store
from bot.paper_stream import Hub

FRAMES_MAX = 500  # per step: about 150 kB a connection
STEP_S_MIN, STEP_S_MAX = 0.002, 0.05  # frames due within 2 ms go out together
HANG_S = 3_600.0


class Server:
    """HTTP in front of the engine: requests with their faults, and the control endpoint."""

    def __init__(self, daemon: Daemon, engine: Engine, keys: dict[str, tuple[str, str]]) -> None:
        self.daemon, self.engine = daemon, engine
        self.rest, self.hub, self.faults = Rest(engine, keys), Hub(engine), Faults()
        self.broken: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def handle(self, request: web.Request) -> web.StreamResponse:
        """Serve any request."""
        if request.headers.get("Upgrade", "").lower() == "websocket":
            return await self.hub.serve(request)
        body = (await request.read()).decode(errors="replace")
        try:
            if request.path.startswith("/paper/"):
                return _response(self._control(request.method, request.path, body))
            return await self._serve(request, body)
        except InvariantError as error:
            # The books are wrong in memory and right on disk: start afresh from there.
            if not self.broken.done():
                self.broken.set_exception(error)
            raise

    async def _serve(self, request: web.Request, body: str) -> web.StreamResponse:
        fault = self.faults.take(f"{request.method} {request.path}")
        do = fault.do if fault else ""
        if do in ("lose_request", "hang"):
            await self.daemon.clock.sleep(HANG_S if do == "hang" else 0)
            return _cut(request)
        if fault and do == "delay":
            await self.daemon.clock.sleep(fault.delay_ms / 1_000)
        answer = Answer(200, b"", {})
        for _ in range(2 if do == "duplicate" else 0 if fault and do == "answer" and not fault.is_executed else 1):
            later = await self._execute(request, body)
            answer = answer if answer.body else later
        if do == "lose_answer":
            return _cut(request)
        if fault and do == "delay_answer":
            await self.daemon.clock.sleep(fault.delay_ms / 1_000)
        if fault and do == "answer":
            answer = Answer(fault.status, fault.body.encode(), fault.headers)
        if do == "truncate":
            return await _truncated(request, answer)
        return _response(answer)

    async def _execute(self, request: web.Request, body: str) -> Answer:
        route = self.rest.route(request.method, request.path)
        if route and (route.is_order or request.method == "DELETE"):
            await self.daemon.clock.sleep(self.engine.config.latency_ms / 1_000)
        query = request.raw_path.partition("?")[2]
        return self.rest.answer(request.method, request.path, query, body, request.headers.get("X-MBX-APIKEY"))

    def _control(self, method: str, path: str, body: str) -> Answer:
        engine, ledger = self.engine, self.engine.ledger
        try:
            match method, path:
                case "POST", "/paper/faults":
                    self.faults.waiting.append(msgspec.json.decode(body, type=Fault))
                case "DELETE", "/paper/faults":
                    self.faults.waiting.clear()
                case "GET", "/paper/faults":
                    return _json(self.faults.waiting)
                case "POST", "/paper/stream":
                    return _json({"connections": self.hub.inject(msgspec.json.decode(body, type=StreamFault))})
                case "POST", "/paper/clock":
                    engine.offset_ms = msgspec.json.decode(body, type=dict[str, int])["offset_ms"]
                case "POST", "/paper/trade":
                    wish = msgspec.json.decode(body, type=ManualTrade)
                    return _json(engine.place(Order(
                        id=0, account=wish.account, symbol=wish.symbol, side=wish.side, type="MARKET", tif="GTC",
                        client_id=f"web_{engine.clock.token(20)}", qty=wish.qty, price=ZERO, time_ms=0,
                        update_ms=0, reduce_only=False)))
                case "GET", "/paper/levels":
                    return _json({symbol: engine.market.levels(symbol) for symbol in ledger.rules})
                case "GET", "/paper/state":
                    return _json({name: {**account_json(ledger, name, 2),
                                         "orders": ledger.open_orders(name), "algos": ledger.open_algos(name)}
                                  for name in ledger.accounts})
                case _:
                    return Answer(404, b'{"code":-5000,"msg":"no such control"}', {})
        except (msgspec.MsgspecError, KeyError) as error:
            return Answer(400, msgspec.json.encode({"code": -1102, "msg": str(error)}), {})
        except Refused as refusal:
            return Answer(400, msgspec.json.encode({"code": refusal.code, "msg": refusal.text}), {})
        return _json({})


class ManualTrade(msgspec.Struct, forbid_unknown_fields=True):
    """A person trades on the account behind the bot's back."""

    account: str
    symbol: str
    side: Any
    qty: Any


async def main(daemon: Daemon) -> None:
    """Run the local paper exchange."""
    config = daemon.config.paper
    if config is None:
        raise ConfigError("paper: the table is missing; the paper exchange needs [paper] and an account")
    store = Store(daemon.config.path(config.state))
    start_ms = store.kept("market_start_ms", int, daemon.clock.wall_ns() // 1_000_000)
    store.keep("market_start_ms", start_ms)
    engine = Engine(config, build_market(config, start_ms, store.trade_ids()), store, daemon.clock)
    server = Server(daemon, engine, _keys(daemon, config))
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", server.handle)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    host, _, port = config.bind.rpartition(":")
    try:
        await web.TCPSite(runner, host, int(port)).start()
    except OSError as error:
        raise ConfigError(f"paper.bind: {config.bind} cannot be bound: {error.strerror}") from None
    daemon.spawn(_end_when_broken(server))
    try:
        await _play(daemon, engine, server.hub)
    finally:
        await server.hub.close()
        await runner.cleanup()
        store.close()


async def _play(daemon: Daemon, engine: Engine, hub: Hub) -> None:
    while not daemon.stopping.is_set():
        frames = engine.step(FRAMES_MAX)
        hub.publish(frames)
        if not engine.market.is_tradable:
            await hub.drain()
        due = engine.market.next_due_ms()
        wait_s = STEP_S_MAX if due is None else (due - engine.now_ms()) / 1_000
        await daemon.clock.sleep(0 if len(frames) == FRAMES_MAX else min(max(wait_s, STEP_S_MIN), STEP_S_MAX))


async def _end_when_broken(server: Server) -> None:
    await server.broken


def _keys(daemon: Daemon, config: PaperConfig) -> dict[str, tuple[str, str]]:
    keys = {}
    for name, account in config.accounts.items():
        table = f"paper.accounts.{name}"
        key = read_secret(daemon.config.path(account.api_key_file), f"{table}.api_key_file")
        if key in keys:
            raise ConfigError(f"{table}.api_key_file: two accounts must not share a key")
        keys[key] = (name, read_secret(daemon.config.path(account.api_secret_file), f"{table}.api_secret_file"))
    return keys


def _json(value: Any) -> Answer:
    return Answer(200, msgspec.json.encode(value), {})


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
