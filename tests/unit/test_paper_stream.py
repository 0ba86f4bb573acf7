"""The paper exchange's websockets without a process: what takes hours is shown with a clock that is moved."""

import asyncio
from types import SimpleNamespace

import aiohttp
from aiohttp import web

from bot.paper_stream import PING_S, Hub


def test_connection_that_is_silent_is_pinged_every_three_minutes(monkeypatch):
    async def run():
        loop = asyncio.get_running_loop()
        real_time, ahead_s = loop.time, 0.0
        monkeypatch.setattr(loop, "time", lambda: real_time() + ahead_s)
        engine = SimpleNamespace(now_ms=lambda: 0, account_of=lambda key: "", listener=None)
        app = web.Application()
        app.router.add_get("/ws-fapi/v1", Hub(engine, None).serve)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        url = f"ws://127.0.0.1:{site._server.sockets[0].getsockname()[1]}/ws-fapi/v1"
        seen = []
        async with aiohttp.ClientSession() as session, session.ws_connect(url, autoping=False) as ws:
            for _ in range(2):
                for step_s in (PING_S - 5, 10):
                    await asyncio.sleep(0.05)  # the server has read the pong
                    ahead_s += step_s
                    try:
                        seen.append((await asyncio.wait_for(ws.receive(), 0.3)).type)
                        await ws.pong()
                    except TimeoutError:
                        seen.append(None)
        await runner.cleanup()
        return seen

    ping = aiohttp.WSMsgType.PING
    assert asyncio.run(run()) == [None, ping, None, ping]
