"""bot/stream.py against a real local websocket server, and against a raw socket that answers no ping."""

import asyncio
import base64
import hashlib
from contextlib import asynccontextmanager

import pytest
from aiohttp import WSMsgType, web

from bot.stream import StreamClosed, open_stream

BURST = 1_131  # frames within 100 ms: the worst of the recorded BTCUSDT file
FRAME_MAX = 65_536


@asynccontextmanager
async def _server(talk):
    async def handle(request: web.Request) -> web.WebSocketResponse:
        socket = web.WebSocketResponse(autoping=False)
        await socket.prepare(request)
        await talk(socket)
        return socket

    app = web.Application()
    app.router.add_get("/stream", handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    port = site._server.sockets[0].getsockname()[1]
    try:
        yield f"ws://127.0.0.1:{port}/stream"
    finally:
        await runner.cleanup()


async def _open(url, **options):
    return await open_stream(url, **{"connect_timeout_ms": 2_000, "frame_bytes_max": FRAME_MAX, **options})


async def _read_all(stream) -> tuple[list[bytes], str]:
    frames = []
    try:
        async with asyncio.timeout(10):
            async for raw in stream:
                frames.append(raw)
    except StreamClosed as closed:
        return frames, str(closed)
    raise AssertionError("a stream ends with StreamClosed, never silently")


def _collect(talk, **options) -> tuple[list[bytes], str]:
    async def main():
        async with _server(talk) as url:
            return await _read_all(await _open(url, **options))
    return asyncio.run(main())


def test_stream_with_back_to_back_burst_yields_every_frame_in_order():
    sent = [b'{"n":%d,"pad":"%s"}' % (n, b"x" * (n % 300)) for n in range(BURST)]

    async def talk(socket):
        for raw in sent:
            await socket.send_str(raw.decode())
        await socket.close()

    frames, _ = _collect(talk)
    assert frames == sent
    print(f"{len(frames)} frames back to back")


def test_stream_with_a_slow_reader_loses_nothing():
    sent = [b"%d" % n + b"x" * 1_000 for n in range(5_000)]

    async def talk(socket):
        for raw in sent:
            await socket.send_str(raw.decode())
        await socket.close()

    async def main():
        async with _server(talk) as url:
            stream = await _open(url)
            await asyncio.sleep(0.3)  # the buffers fill: 5 MB do not fit
            return await _read_all(stream)

    frames, _ = asyncio.run(main())
    assert frames == sent


@pytest.mark.parametrize("raw", [b'{"a": "\xc3\xa9"}', b" {} \n", b"", b"\xff\xfe not utf-8"])
def test_stream_with_odd_frames_yields_exactly_their_bytes(raw):
    async def talk(socket):
        await socket.send_frame(raw, WSMsgType.TEXT)
        await socket.send_frame(raw, WSMsgType.BINARY)
        await socket.close()

    frames, _ = _collect(talk)
    assert frames == [raw, raw]
    assert {type(frame) for frame in frames} == {bytes}


def test_stream_with_oversized_frame_yields_what_came_before_and_says_the_limit():
    async def talk(socket):
        await socket.send_str("before")
        await socket.send_str("x" * (FRAME_MAX + 1))
        await socket.receive()

    frames, why = _collect(talk)
    assert frames == [b"before"]
    assert "longer than 65536 bytes" in why


def test_stream_with_close_code_says_code_and_text():
    async def talk(socket):
        await socket.send_str("last")
        await socket.close(code=1008, message=b"listen key expired")

    frames, why = _collect(talk)
    assert frames == [b"last"]
    assert "1008" in why and "listen key expired" in why


def test_stream_with_cut_connection_yields_what_came_before():
    async def talk(socket):
        await socket.send_str("one")
        await asyncio.sleep(0.05)
        socket._req.transport.abort()

    frames, why = _collect(talk)
    assert frames == [b"one"]
    assert why.startswith("connection lost")


def test_stream_with_ping_answers_with_its_payload():
    answers = []

    async def talk(socket):
        await socket.ping(b"1718123456")
        answers.append(await socket.receive())
        await socket.close()

    _collect(talk)
    assert [(a.type, bytes(a.data)) for a in answers] == [(WSMsgType.PONG, b"1718123456")]


def test_stream_send_with_bytes_arrives_as_one_text_frame():
    heard = []

    async def talk(socket):
        heard.append(await socket.receive())
        await socket.close()

    async def main():
        async with _server(talk) as url:
            stream = await _open(url)
            await stream.send(b'{"method":"SUBSCRIBE"}')
            await _read_all(stream)
            with pytest.raises(StreamClosed):
                await stream.send(b"too late")

    asyncio.run(main())
    assert [(m.type, m.data) for m in heard] == [(WSMsgType.TEXT, '{"method":"SUBSCRIBE"}')]


def test_stream_close_with_a_reader_in_another_task_ends_the_reader():
    async def talk(socket):
        await socket.send_str("one")
        await socket.receive()

    async def main():
        async with _server(talk) as url:
            stream = await _open(url)
            reader = asyncio.create_task(_read_all(stream))
            await asyncio.sleep(0.05)
            await stream.close()
            return await reader

    assert asyncio.run(main()) == ([b"one"], "closed by us")


def test_open_stream_with_nobody_listening_raises_stream_closed():
    with pytest.raises(StreamClosed, match="cannot connect"):
        asyncio.run(_open("ws://127.0.0.1:1/stream"))


def test_open_stream_with_http_refusal_raises_stream_closed():
    async def main():
        async with _server(None) as url:
            await _open(url + "/nowhere")

    with pytest.raises(StreamClosed, match="404"):
        asyncio.run(main())


def _mute_server(handshake: bool):
    # A peer that is connected, reads, and never says a word: no pong either.
    async def handle(reader, writer):
        request = await reader.readuntil(b"\r\n\r\n")
        if handshake:
            key = next(line.split(b": ")[1] for line in request.split(b"\r\n")
                       if line.lower().startswith(b"sec-websocket-key"))
            accept = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
            writer.write(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                         b"Sec-WebSocket-Accept: " + accept + b"\r\n\r\n")
        while await reader.read(1_000):
            pass
        writer.close()

    async def main():
        server = await asyncio.start_server(handle, "127.0.0.1", 0)
        url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/stream"
        try:
            stream = await _open(url, connect_timeout_ms=200, ping_s=0.2)
            return await _read_all(stream)
        finally:
            server.close()

    return asyncio.run(main())


def test_open_stream_with_mute_peer_gives_up_after_the_timeout():
    with pytest.raises(StreamClosed, match="within 200 ms"):
        _mute_server(handshake=False)


def test_stream_with_half_open_connection_ends_by_missing_pong():
    frames, why = _mute_server(handshake=True)
    assert frames == [] and "PONG" in why
