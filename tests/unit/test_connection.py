"""RestConnection against a raw server that misbehaves in every way a request can meet."""

import asyncio
import ssl
import subprocess
from contextlib import asynccontextmanager

import pytest

from bot.clock import Clock
from bot.config import ExchangeConfig
from bot.connection import IDLE_S_MAX, RestConnection, RestPool, pool
from tests.harness import free_port

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nX-MBX-Used-Weight-1M: 5\r\n\r\n{}"


class Server:
    """Each connection is handled by the next script, the last one by all that follow."""

    def __init__(self, *scripts):
        self.scripts, self.requests, self.connections, self.writers = list(scripts), [], 0, []

    async def handle(self, reader, writer):
        script = self.scripts[min(self.connections, len(self.scripts) - 1)]
        self.connections += 1
        self.writers.append(writer)
        try:
            await script(self, reader, writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()

    async def read(self, reader):
        head = await reader.readuntil(b"\r\n\r\n")
        length = next((int(line.split(b":")[1]) for line in head.split(b"\r\n")
                       if line.lower().startswith(b"content-length")), 0)
        self.requests.append(head + await reader.readexactly(length))
        return self.requests[-1]


def always(*answers):
    """A script: one answer per request, then the connection stays open."""
    async def script(server, reader, writer):
        for reply in answers:
            await server.read(reader)
            writer.write(reply)
            await writer.drain()
        await reader.read()
    return script


def then_close(reply):
    async def script(server, reader, writer):
        await server.read(reader)
        writer.write(reply)
        await writer.drain()
    return script


async def reset(server, reader, writer):
    await server.read(reader)
    writer.transport.get_extra_info("socket").setsockopt(1, 13, b"\1\0\0\0\0\0\0\0")  # SO_LINGER 0: RST
    writer.transport.abort()


@asynccontextmanager
async def serving(*scripts, tls=None, scheme="http", clock=None, **options):
    server = Server(*scripts)
    listener = await asyncio.start_server(server.handle, "127.0.0.1", 0, ssl=tls)
    port = listener.sockets[0].getsockname()[1]
    options = {"connect_timeout_ms": 1_000, "request_timeout_ms": 1_000, "body_bytes_max": 100_000} | options
    connection = RestConnection(f"{scheme}://127.0.0.1:{port}", clock or Clock(), **options)
    server.port = port
    try:
        yield server, connection
    finally:
        await connection.close()
        listener.close()
        for writer in server.writers:
            writer.transport.abort()


def run(scenario):
    return asyncio.run(asyncio.wait_for(scenario, 20))


async def get(connection, path="/fapi/v1/time"):
    return await connection.request("GET", path, {})


def test_request_with_whole_answer_returns_it_and_keeps_the_connection():
    async def scenario():
        async with serving(always(OK, OK)) as (server, connection):
            before = Clock().wall_ns()
            url = f"http://127.0.0.1:{server.port}/fapi/v1/order?x=1"
            first = await connection.request("POST", url, {"X-MBX-APIKEY": "key"}, b"a=b&c=d")
            second = await get(connection)
            assert before <= first.sent_ns <= first.received_ns <= second.sent_ns
            assert (first.status, first.body, first.is_sent, first.error) == (200, b"{}", True, "")
            assert first.headers["x-mbx-used-weight-1m"] == "5"
            assert (second.status, server.connections) == (200, 1)
            head = server.requests[0]
            assert head.startswith(b"POST /fapi/v1/order?x=1 HTTP/1.1\r\n")
            assert f"host: 127.0.0.1:{server.port}\r\n".encode() in head.lower()
            assert b"content-length: 7\r\n" in head.lower() and head.endswith(b"\r\n\r\na=b&c=d")
            assert b"X-MBX-APIKEY: key" in head
            assert b"content-length" not in server.requests[1].lower()
    run(scenario())


def test_request_with_empty_post_says_its_length():
    async def scenario():
        async with serving(always(OK)) as (server, connection):
            await connection.request("POST", "/fapi/v1/listenKey", {}, b"")
            assert b"content-length: 0\r\n" in server.requests[0].lower()
    run(scenario())


def test_request_for_another_host_is_refused_before_anything():
    async def scenario():
        async with serving(always(OK)) as (server, connection):
            with pytest.raises(ValueError, match="must be at"):
                await get(connection, "http://127.0.0.1:1/x")
            assert server.connections == 0
    run(scenario())


@pytest.mark.parametrize("base_url", ["http://127.0.0.1:PORT", "http://nowhere.invalid:80",
                                      "https://127.0.0.1:PORT"])
def test_request_with_nobody_there_is_not_sent(base_url):
    async def scenario():
        connection = RestConnection(base_url.replace("PORT", str(free_port())), Clock(),
                                    connect_timeout_ms=3_000, request_timeout_ms=500, body_bytes_max=1_000)
        answer = await connection.request("POST", "/fapi/v1/order", {}, b"x=1")
        assert (answer.status, answer.is_sent) == (0, False)
        assert answer.error.startswith("cannot connect: ")
        assert not await connection.warm()
    run(scenario())


def test_request_with_silent_handshake_is_not_sent():
    async def silent(server, reader, writer):
        await reader.read()

    async def scenario():
        async with serving(silent, scheme="https", connect_timeout_ms=100) as (_server, connection):
            answer = await get(connection)
            assert (answer.is_sent, answer.error) == (False, "cannot connect: TimeoutError: ")
    run(scenario())


LATE = b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{}"


@pytest.mark.parametrize(("script", "words"), [
    (reset, "Connection"),
    (then_close(b""), "closed"),
    (then_close(b"HTTP/1.1 200 OK\r\nContent-Le"), "closed"),
    (then_close(LATE), "RemoteProtocolError"),
    (then_close(b"HTTP/1.1 200 OK\r\n\r\n{}"), "without a length"),
    (then_close(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n"), "RemoteProtocolError"),
    (then_close(b"\x16\x03\x01\x00\xff garbage \r\n\r\n"), "RemoteProtocolError"),
    (then_close(b"SSH-2.0-OpenSSH_9.2\r\n"), "closed"),
    (always(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nContent-Length: 3\r\n\r\n{}"), "RemoteProtocolError"),
    (always(b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n{}"), "RemoteProtocolError"),
    (always(b"HTTP/1.1 200 OK\r\nX: " + b"y" * 50_000), "RemoteProtocolError"),
    (always(b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: x\r\n\r\n"), "Error"),
    (always(b"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 2\r\n\r\n{}"), "encoding"),
    (always(b"HTTP/1.1 200 OK\r\nContent-Length: 200000\r\n\r\n" + b"x" * 200_000), "longer than 100000"),
    (always(b""), "TimeoutError"),
    (always(LATE), "TimeoutError"),
])
@pytest.mark.parametrize("method", ["GET", "POST", "DELETE", "PUT"])
def test_request_with_broken_answer_is_unknown_and_never_repeated(script, words, method):
    async def scenario():
        async with serving(script, always(OK), request_timeout_ms=150) as (server, connection):
            answer = await connection.request(method, "/fapi/v1/order", {}, b"")
            assert (answer.status, answer.body, answer.is_sent) == (0, b"", True)
            assert words in answer.error
            assert len(server.requests) == 1
            # The next request has a new connection, and its own answer.
            assert (await get(connection)).status == 200
            assert (len(server.requests), server.connections) == (2, 2)
    run(scenario())


def test_request_with_chunks_continue_and_pieces_returns_the_whole():
    async def script(server, reader, writer):
        await server.read(reader)
        for piece in (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 ", b"OK\r\nTransfer-Encoding: chunked\r\n",
                      b"\r\n1\r\n{\r\n", b"1\r\n}\r\n0", b"\r\n\r\n"):
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0.01)
        await reader.read()

    async def scenario():
        async with serving(script) as (_server, connection):
            answer = await get(connection)
            assert (answer.status, answer.body, answer.error) == (200, b"{}", "")
    run(scenario())


@pytest.mark.parametrize("method", ["GET", "POST", "DELETE"])
def test_request_with_kept_connection_found_dead_opens_another(method):
    async def scenario():
        async with serving(then_close(OK), always(OK)) as (server, connection):
            assert (await get(connection)).status == 200
            # At once: the kernel knows of the end, the event loop may not yet.
            assert (await connection.request(method, "/fapi/v1/order", {}, b"")).status == 200
            assert (len(server.requests), server.connections) == (2, 2)
    run(scenario())


def test_request_with_connection_closed_while_writing_is_unknown_and_not_repeated():
    async def closes_on_the_second(server, reader, writer):
        await server.read(reader)
        writer.write(OK)
        await server.read(reader)

    async def scenario():
        async with serving(closes_on_the_second, always(OK)) as (server, connection):
            await get(connection)
            answer = await connection.request("DELETE", "/fapi/v1/order", {}, b"")
            assert (answer.status, answer.is_sent, server.connections) == (0, True, 1)
            assert len(server.requests) == 2
    run(scenario())


@pytest.mark.parametrize("delay", [0, 0.05])
def test_request_with_two_answers_never_takes_the_second_for_the_next(delay):
    stray = b"HTTP/1.1 400 Bad Request\r\nContent-Length: 26\r\n\r\n" + b'{"code":-2019,"msg":"no."}'

    async def script(server, reader, writer):
        await server.read(reader)
        writer.write(OK + (stray if not delay else b""))
        await asyncio.sleep(delay)
        writer.write(stray if delay else b"")
        await reader.read()

    async def scenario():
        async with serving(script, always(OK)) as (server, connection):
            assert (await get(connection)).status == 200
            await asyncio.sleep(delay * 2)
            assert (await get(connection)).status == 200
            assert server.connections == 2
    run(scenario())


def test_request_after_connection_close_header_opens_another():
    closing = OK.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")

    async def scenario():
        async with serving(always(closing), always(OK)) as (server, connection):
            assert (await get(connection)).status == 200
            assert (await get(connection)).status == 200
            assert server.connections == 2
    run(scenario())


def test_request_after_long_idleness_opens_another():
    class Later(Clock):
        ahead_ns = 0

        def mono_ns(self):
            return super().mono_ns() + self.ahead_ns

    async def scenario():
        clock = Later()
        async with serving(always(OK, OK, OK), clock=clock) as (server, connection):
            await get(connection)
            clock.ahead_ns = (IDLE_S_MAX - 1) * 10**9
            await get(connection)
            assert server.connections == 1
            clock.ahead_ns += (IDLE_S_MAX + 1) * 10**9
            await get(connection)
            assert server.connections == 2
    run(scenario())


def test_request_canceled_never_leaves_its_answer_to_the_next():
    async def scenario():
        async with serving(always(b""), always(OK)) as (server, connection):
            first = asyncio.create_task(get(connection))
            while not server.requests:
                await asyncio.sleep(0.005)
            first.cancel()
            await asyncio.gather(first, return_exceptions=True)
            assert (await get(connection)).status == 200
            assert server.connections == 2
    run(scenario())


def test_requests_at_once_on_one_connection_wait_for_each_other():
    async def scenario():
        async with serving(always(*[OK] * 5)) as (server, connection):
            answers = await asyncio.gather(*(get(connection) for _ in range(5)))
            assert [answer.status for answer in answers] == [200] * 5
            assert server.connections == 1
    run(scenario())


def test_pool_with_one_slow_answer_serves_the_others():
    async def scenario():
        async with serving(always(b""), always(*[OK] * 3)) as (server, _connection):
            both = pool(ExchangeConfig(rest_url=f"http://127.0.0.1:{server.port}", ws_url="", api_key_file="",
                                       api_secret_file="", request_timeout_ms=300), Clock())
            slow = asyncio.create_task(get(both))
            while not server.requests:
                await asyncio.sleep(0.005)
            for _ in range(3):
                assert (await get(both)).status == 200
            assert not slow.done() and server.connections == 2
            assert (await slow).error.startswith("TimeoutError")
            await both.close()
    run(scenario())


def test_warm_opens_the_connection_that_the_next_request_uses():
    async def scenario():
        async with serving(always(OK)) as (server, connection):
            assert await RestPool([connection]).warm()
            while not server.connections:
                await asyncio.sleep(0.005)
            assert (await get(connection)).status == 200
            assert server.connections == 1
    run(scenario())


def test_request_kept_back_at_the_last_moment_sends_no_byte():
    async def scenario():
        async with serving(always(OK)) as (server, connection):
            asked = []

            def may_send():
                asked.append(server.connections)
                return "halted by me"
            answer = await connection.request("POST", "/fapi/v1/order", {}, b"x=1", may_send)
            assert (answer.is_sent, answer.status, answer.error) == (False, 0, "kept back: halted by me")
            answer = await connection.request("POST", "/fapi/v1/order", {}, b"x=2", lambda: "")
            assert answer.status == 200 and len(asked) == 1
            assert (server.connections, [r[-3:] for r in server.requests]) == (1, [b"x=2"])
    run(scenario())


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1",
               "-nodes", "-keyout", folder / "key.pem", "-out", folder / "cert.pem", "-days", "2",
               "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs openssl to make a certificate")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context, str(folder / "cert.pem")


def test_request_over_tls_keeps_the_connection_and_sees_its_end(certificate):
    tls, ca_file = certificate

    async def scenario():
        async with serving(always(OK, OK), tls=tls, scheme="https", ca_file=ca_file) as (server, connection):
            assert (await get(connection)).status == 200
            assert (await get(connection)).status == 200
            assert server.connections == 1
        async with serving(then_close(OK), always(OK), tls=tls, scheme="https",
                           ca_file=ca_file) as (server, connection):
            assert (await get(connection)).status == 200
            assert (await get(connection)).status == 200
            assert (len(server.requests), server.connections) == (2, 2)
    run(scenario())


def test_request_over_tls_with_unknown_certificate_is_not_sent(certificate):
    async def scenario():
        async with serving(always(OK), tls=certificate[0], scheme="https") as (server, connection):
            answer = await connection.request("POST", "/fapi/v1/order", {}, b"x=1")
            assert (answer.is_sent, answer.status, server.requests) == (False, 0, [])
            assert "CERTIFICATE_VERIFY_FAILED" in answer.error
    run(scenario())
