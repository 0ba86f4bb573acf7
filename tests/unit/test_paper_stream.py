"""The paper exchange's websockets without a process: what takes hours is shown with a clock that is moved."""

import asyncio
import contextlib
import json
from types import SimpleNamespace

import aiohttp
import pytest
from aiohttp import web

from bot.paper_engine import LISTEN_KEY_MS
from bot.paper_feed import Frame
from bot.paper_stream import BUFFER_BYTES_MAX, LIFE_MS, PING_S, STREAMS_MAX, Connection, Hub
from tests.unit.test_paper_engine import World

OF_PUBLIC = ("depth@100ms", "depth5@100ms", "bookTicker", "trade")
OF_MARKET = ("aggTrade", "kline_1m", "ticker", "miniTicker", "markPrice@1s")


@contextlib.asynccontextmanager
async def opened(hub, path):
    """Serve a hub, and open a websocket to it that answers no ping."""
    app = web.Application()
    app.router.add_get("/{path:.*}", hub.serve)
    runner = web.AppRunner(app, shutdown_timeout=0)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    url = f"ws://127.0.0.1:{site._server.sockets[0].getsockname()[1]}{path}"
    try:
        async with aiohttp.ClientSession() as session, session.ws_connect(url, autoping=False) as ws:
            yield ws
    finally:
        await runner.cleanup()


@pytest.fixture
def world():
    made = World()
    made.engine.clock.sleep = asyncio.sleep
    yield made
    made.store.close()


async def asked(ws, method, names=()):
    """Return the answer, and before it what the streams said."""
    await ws.send_json({"id": 1, "method": method, "params": list(names)})
    seen = []
    while True:
        message = await ws.receive_json(timeout=10)
        if "id" in message:
            return message, seen
        seen.append(message)


def test_connection_that_is_silent_is_pinged_every_three_minutes(monkeypatch):
    async def run():
        loop = asyncio.get_running_loop()
        real_time, ahead_s = loop.time, 0.0
        monkeypatch.setattr(loop, "time", lambda: real_time() + ahead_s)
        engine = SimpleNamespace(now_ms=lambda: 0, account_of=lambda key: "", listener=None)
        seen = []
        async with opened(Hub(engine, None), "/ws-fapi/v1") as ws:
            for _ in range(2):
                for step_s in (PING_S - 5, 10):
                    await asyncio.sleep(0.05)  # the server has read the pong
                    ahead_s += step_s
                    try:
                        seen.append((await asyncio.wait_for(ws.receive(), 0.3)).type)
                        await ws.pong()
                    except TimeoutError:
                        seen.append(None)
        return seen

    ping = aiohttp.WSMsgType.PING
    assert asyncio.run(run()) == [None, ping, None, ping]


def test_streams_with_their_number_reached_refuse_one_more(world):
    async def run():
        async with opened(Hub(world.engine, None), "/ws/btcusdt@trade") as ws:
            most = [f"btcusdt@s{number}" for number in range(STREAMS_MAX - 1)]
            assert (await asked(ws, "SUBSCRIBE", most))[0] == {"id": 1, "result": None}
            assert "error" in (await asked(ws, "SUBSCRIBE", ["btcusdt@aggTrade"]))[0]
            listed = (await asked(ws, "LIST_SUBSCRIPTIONS"))[0]["result"]
            assert listed == ["btcusdt@trade", *most]

    assert STREAMS_MAX == 200
    asyncio.run(run())


def test_client_that_is_half_open_is_not_read_any_more(world):
    async def run():
        hub = Hub(world.engine, None)
        async with opened(hub, "/ws/btcusdt@trade") as ws:
            await ws.ping()
            assert (await ws.receive(timeout=10)).type is aiohttp.WSMsgType.PONG
            assert hub.inject("btcusdt@trade", "half_open", 1, 0) == {"connections": 1}
            await ws.ping()
            with pytest.raises(TimeoutError):
                await ws.receive(timeout=0.2)
            hub.inject("btcusdt@trade", "close", 1, 0)

    asyncio.run(run())


@pytest.mark.parametrize(("route", "served"), [
    ("/public", OF_PUBLIC), ("/market", OF_MARKET), ("/private", ()), ("", OF_PUBLIC + OF_MARKET)])
@pytest.mark.parametrize("path", ["/ws", "/stream"])
def test_route_of_a_stream_url_serves_its_own_and_is_silent_about_the_rest(world, route, served, path):
    of_all = {"/public": {"!bookTicker"}, "/market": {"!ticker@arr", "!miniTicker@arr", "!markPrice@arr@1s"}}
    of_all |= {"": of_all["/public"] | of_all["/market"], "/private": set()}
    kinds = OF_PUBLIC + OF_MARKET

    async def run():
        hub = Hub(world.engine, None)
        async with opened(hub, f"{route}{path}") as ws:
            names = [f"btcusdt@{kind}" for kind in kinds] + sorted(of_all[""])
            assert (await asked(ws, "SUBSCRIBE", names))[0]["result"] is None, "acknowledged, all of them"
            hub.publish([Frame(f"btcusdt@{kind}", json.dumps({"k": kind}).encode(), world.ms)
                         for kind in kinds])
            return (await asked(ws, "LIST_SUBSCRIPTIONS"))[1]

    seen = asyncio.run(run())
    if path == "/stream":
        assert {m["stream"] for m in seen} == {f"btcusdt@{kind}" for kind in served} | of_all[route]
    else:
        assert {m["k"] for m in seen if "k" in m} == {*served}
        assert any(isinstance(m, list) for m in seen) == ("ticker" in served)


class Transport:
    """A client's side that never reads: what is written stays."""

    def __init__(self, unsent=0):
        self.unsent, self.sent, self.ended = unsent, b"", ""
        self.abort = self.close = lambda: setattr(self, "ended", "cut")

    def get_write_buffer_size(self):
        return self.unsent

    def is_closing(self):
        return bool(self.ended)

    def write(self, data):
        self.sent += data


def connected(hub, name, unsent=0):
    """Return the transport of a connection of a hub that has one stream."""
    transport = Transport(unsent)
    request = SimpleNamespace(remote="", transport=transport)
    made = Connection(SimpleNamespace(closed=False), request, "any", "ws", hub.engine.now_ms())
    hub.connections.add(made)
    made.names[name] = name
    return transport


@pytest.mark.parametrize("is_live", [True, False], ids=["live", "raw playback"])
def test_connection_that_does_not_read_is_cut_when_the_market_is_live(world, is_live):
    world.engine.market.is_tradable = is_live
    hub = Hub(world.engine, None)
    slow, stuck = (connected(hub, "btcusdt@trade", unsent) for unsent in (BUFFER_BYTES_MAX,
                                                                           BUFFER_BYTES_MAX + 1))
    hub.publish([Frame("btcusdt@trade", b"{}", world.ms)])
    assert (slow.ended, stuck.ended) == ("", "cut" if is_live else "")


def test_listen_key_of_sixty_minutes_says_that_it_expired_and_tells_no_more(world):
    hub, key = Hub(world.engine, None), world.ask("POST /fapi/v1/listenKey")["listenKey"]
    transport = connected(hub, key)
    world.order()
    assert b"ORDER_TRADE_UPDATE" in transport.sent
    world.after(LISTEN_KEY_MS)
    hub.publish([])
    assert b"listenKeyExpired" not in transport.sent
    world.after(1)
    hub.publish([])
    assert transport.sent.count(b"listenKeyExpired") == 1 and key.encode() in transport.sent
    told = len(transport.sent)
    world.ask("POST /fapi/v1/listenKey")
    world.order()
    hub.publish([])
    assert (len(transport.sent), transport.ended) == (told, ""), "the connection itself stays"
    world.after(LIFE_MS - LISTEN_KEY_MS)
    hub.publish([])
    assert transport.ended == "cut"
