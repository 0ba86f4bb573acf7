"""The paper exchange: Binance USD-M's REST and websocket API on [paper] bind, over a local market.

Its faults are told to `/paper/...`; docs/paper.md says what each does, with an example.
Reads: requests. Writes: its state file. State: accounts, orders, positions, fills, kept over kill -9.
"""

import asyncio
import sys
from collections.abc import Callable
from decimal import Decimal
from fnmatch import fnmatchcase
from functools import partial
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import msgspec
from aiohttp import web
from msgspec import Meta
from msgspec.structs import astuple, replace

from bot.config import PaperConfig
from bot.config_file import read_secret
from bot.crash import point
from bot.daemon import Daemon, run
from bot.errors import ConfigError
from bot.log import Tally
from bot.paper_engine import Engine, Limits, Store
from bot.paper_market import build_market
from bot.paper_model import Count, Filters, Milliseconds, Refused, Side
from bot.paper_rest import ROUTES, Answer, Request, Rest, WsRequest, account_json, refused
from bot.paper_stream import Hub, StreamFault

FRAMES_MAX = 500  # per step: about 150 kB a connection
STEP_S = 0.005  # frames due within it go out together
HANG_S = 3_600.0
Status = Literal["PENDING_TRADING", "TRADING", "PRE_SETTLE", "SETTLING", "CLOSE"]


class Fault(msgspec.Struct, forbid_unknown_fields=True):
    """A fault of the next request, or after `skip` the n-th, that matches "METHOD path" (* is a wildcard)."""

    match: str
    do: Literal["lose_request", "hang", "delay", "duplicate", "lose_answer", "delay_answer", "truncate",
                "answer", "limbo", "lag"]
    skip: Count = 0
    times: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    delay_ms: Milliseconds = 0
    status: Annotated[int, Meta(ge=200, le=599)] = 200
    body: str = ""
    headers: dict[str, str] = {}
    is_executed: bool = False


class Control:
    """What /paper/... answers: faults in, and the truth out. inject: see paper_stream's Hub."""

    def __init__(self, engine: Engine, inject: Callable[..., Any]) -> None:
        self.engine, ledger = engine, engine.ledger
        self.waiting: list[Fault] = []  # first come first taken
        self.names = f"accounts {', '.join(ledger.accounts)}; symbols {', '.join(ledger.contracts)}"
        told = partial(msgspec.defstruct, "Told", forbid_unknown_fields=True)  # the type of what one is told
        one_of: Any = Literal.__getitem__
        account, symbol = ("account", one_of((*ledger.accounts,))), ("symbol", one_of((*ledger.contracts,)))
        offset_ms = ("offset_ms", Annotated[int, Meta(ge=-86_400_000, le=86_400_000)])
        offset_pct = ("offset_pct", Annotated[float, Meta(ge=-99, le=1_000)])
        self.commands: dict[str, tuple[Any, Callable[..., Any]]] = {
            "POST /paper/faults": (Fault, lambda *fault: self.waiting.append(Fault(*fault))),
            "GET /paper/faults": (told([]), lambda: self.waiting),
            "DELETE /paper/faults": (told([]), self.waiting.clear),
            "POST /paper/stream": (told([("match", str), ("do", StreamFault), ("count", Count, 1),
                                        ("duration_ms", Milliseconds, 0)]), inject),
            "POST /paper/limits": (Limits, lambda *most: setattr(engine.limiter, "limits", Limits(*most))),
            "POST /paper/clock": (told([offset_ms]), partial(setattr, engine, "offset_ms")),
            "POST /paper/mark": (told([symbol, offset_pct]), lambda symbol, pct: setattr(
                engine.feeds[symbol], "mark_factor", 1 + Decimal(str(pct)) / 100)),
            "POST /paper/funding": (told([account, ("rate", Decimal)]), ledger.fund),
            "POST /paper/symbol": (told([symbol, ("status", Status, "TRADING"), ("filters", Filters, {})]),
                                   engine.change_symbol),
            "POST /paper/liquidate": (told([account, symbol]), partial(ledger.force, "liquidation")),
            "POST /paper/adl": (told([account, symbol, ("qty", Decimal | None, None)]),
                                partial(ledger.force, "adl")),
            "POST /paper/trade": (told([account, symbol, ("side", Side), ("qty", Decimal),
                                       ("reduce_only", bool, False)]), engine.trade),
            "GET /paper/state": (told([]), lambda: {
                name: {**account_json(ledger, name, 2), "orders": ledger.mine(name, "order"),
                       "algos": ledger.mine(name, "algo")} for name in ledger.accounts})}

    def take(self, request: str) -> Fault | None:
        """Return the fault of this request ("METHOD path"), counted down."""
        for fault in [fault for fault in self.waiting if fnmatchcase(request, fault.match)]:
            if fault.skip:
                fault.skip -= 1
                continue
            fault.times -= 1
            if not fault.times:
                self.waiting.remove(fault)
            return fault
        return None

    def answer(self, request: str, body: str) -> Answer:
        try:
            if (command := self.commands.get(request)) is None:
                raise Refused(-5000, *request.partition(" ")[::-2])
            wish = msgspec.json.decode(body or "{}", type=command[0])
            self.engine.wake()
            value = command[1](*astuple(wish))
            self.engine.commit()
            return Answer(200, msgspec.json.encode({} if value is None else value), {})
        except (msgspec.MsgspecError, KeyError, ValueError, ArithmeticError) as error:
            return refused(Refused(-1102, text=f"{error}; there are {self.names}"))
        except Refused as refusal:
            return refused(refusal)


class Server:
    """HTTP in front of the engine: requests with their faults, and the control endpoint."""

    def __init__(self, daemon: Daemon, engine: Engine, keys: dict[str, tuple[str, str]]) -> None:
        self.clock, self.engine, self.spawn = daemon.clock, engine, daemon.spawn
        self.rest = Rest(engine, keys)
        self.hub = Hub(engine, self.answer_ws)
        self.control = Control(engine, self.hub.inject)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        if request.headers.get("Upgrade", "").lower() == "websocket":
            return await self.hub.serve(request)
        if request.headers.get("Expect", "").lower() == "100-continue":
            await request.writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        name, body = f"{request.method} {request.path}", (await request.read()).decode(errors="replace")
        if request.path.startswith("/paper/"):
            return _response(self.control.answer(name, body))
        answer = await self._serve(self.rest.over_http(
            name, request.raw_path.partition("?")[2], body, request.headers.get("X-MBX-APIKEY", ""),
            request.remote or ""))
        if answer is None and request.transport:
            request.transport.abort()
        return _response(answer or Answer(500, b"", {}))

    async def answer_ws(self, message: str, address: str) -> bytes | None:
        """Serve one message of the websocket order API; None: the connection is cut. Raises ValueError."""
        wish = msgspec.json.decode(message, type=WsRequest)
        answer = await self._serve(self.rest.over_ws(wish, address))
        return self.rest.told_ws(wish, answer) if answer else None

    async def _serve(self, request: Request) -> Answer | None:
        # None: there is no answer, the connection is cut.
        fault = self.control.take(request.name)
        if fault is None:
            return await self._execute(request)
        delay_s = fault.delay_ms / 1_000
        if fault.do in ("lose_request", "hang"):
            await self.clock.sleep(HANG_S if fault.do == "hang" else 0)
            return None
        if fault.do == "delay":
            await self.clock.sleep(delay_s)
            request.received_ms = self.engine.now_ms()
        if fault.do == "lag" and request.name.startswith("GET"):
            request.seen_ms = request.received_ms - fault.delay_ms
        answer = Answer(fault.status, fault.body.encode(), fault.headers)
        if fault.do == "limbo":
            if fault.is_executed:  # it is inside the exchange: its time window was kept when it came
                self.spawn(self._execute(request, delay_s))
            answer = refused(Refused(-1007))
        elif fault.do != "answer":
            answer = await self._execute(request)
        if fault.do == "duplicate" or (fault.do == "answer" and fault.is_executed):
            await self._execute(request)
        if fault.do == "delay_answer":
            await self.clock.sleep(delay_s)
        if fault.do == "truncate":  # half of it, and then the connection is closed
            status, body, headers = answer
            answer = Answer(status, body[:len(body) // 2], {**headers, "Content-Length": str(len(body))})
        return answer if fault.do != "lose_answer" else None

    async def _execute(self, request: Request, after_s: float = 0) -> Answer:
        route = ROUTES.get(request.name)
        await self.clock.sleep(after_s)
        if route and (route.orders or request.name.startswith("DELETE")):
            await self.clock.sleep(self.engine.config.latency_ms / 1_000)
        answer = self.rest.serve(request)
        if route and route.orders:
            point("paper.before_answer")
        return answer

    async def play(self, stopping: asyncio.Event) -> None:
        while not stopping.is_set():
            frames = self.engine.step(FRAMES_MAX)
            self.hub.publish(frames)
            if not self.engine.market.is_tradable:
                await self.hub.drain()
            await self.clock.sleep(0 if len(frames) == FRAMES_MAX else STEP_S)


async def main(daemon: Daemon) -> None:
    config = daemon.config.paper
    if config is None or not config.accounts:
        raise ConfigError("paper: must have at least one account; see paper.accounts in docs/config.md")
    store = Store(daemon.config.path(config.state))
    start_ms = store.kept("market_start_ms", int, daemon.clock.wall_ns() // 1_000_000)
    store.keep("market_start_ms", start_ms)
    config = replace(config, recording=str(daemon.config.path(config.recording)))
    market = build_market(config, start_ms, store.trade_ids())
    server = Server(daemon, Engine(config, market, store, daemon.clock), _keys(daemon, config))
    tally = Tally("message_dropped", daemon.log, daemon.clock)  # of what aiohttp says about broken requests
    logger: Any = SimpleNamespace(debug=lambda *_, **__: None, exception=lambda text, *args, exc_info=None:
                                  tally.add("http", error=f"{text % args}: {exc_info!r}"))
    runner = web.ServerRunner(web.Server(server.handle, access_log=None, logger=logger), shutdown_timeout=0.5)
    await runner.setup()
    host, _, port = config.bind.rpartition(":")
    try:
        await web.TCPSite(runner, host, int(port)).start()
    except OSError as error:
        raise ConfigError(f"paper.bind: {config.bind} cannot be bound: {error.strerror}") from None
    try:
        await server.play(daemon.stopping)
    finally:
        for connection in list(server.hub.connections):
            await connection.ws.close(code=1001)  # the server goes away
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


def _response(answer: Answer) -> web.Response:
    headers = {"Content-Type": "application/json", **answer.headers}
    response = web.Response(status=answer.status, body=answer.body, headers=headers)
    if "Content-Length" in headers:
        response.force_close()
    return response


if __name__ == "__main__":
    sys.exit(run("paper", main))
