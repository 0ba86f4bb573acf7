"""A websocket client: every frame as it was received, in order, none merged, none lost. Edge to aiohttp."""

import asyncio
import re
from typing import Any

import aiohttp

from bot.errors import TradehostError

PING_S = 10.0  # our own ping; no byte for 1.5 times this is a half-open connection (TCP needs minutes)
CLOSE_WAIT_S = 0.5  # for the other side's close frame; a frozen peer never sends it


class StreamClosed(TradehostError):
    """The stream is over, or never began; the text says why."""


class Stream:
    """An open stream. Iterating yields frames as bytes until StreamClosed is raised.

    Pings are answered while it is read. What arrived before the end is yielded before the end.
    """

    def __init__(self, session: aiohttp.ClientSession, socket: "aiohttp.ClientWebSocketResponse[Any]",
                 frame_bytes_max: int) -> None:
        self._session, self._socket, self._frame_bytes_max = session, socket, frame_bytes_max
        self._closed_by_us = False

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> bytes:
        message = await self._socket.receive()
        if message.type is aiohttp.WSMsgType.TEXT or message.type is aiohttp.WSMsgType.BINARY:
            return message.data
        await self._session.close()
        raise StreamClosed(self._why(message))

    def _why(self, message: Any) -> str:
        code = self._socket.close_code
        if self._closed_by_us:
            return "closed by us"
        if code == aiohttp.WSCloseCode.MESSAGE_TOO_BIG and message.type is aiohttp.WSMsgType.ERROR:
            return f"a frame was longer than {self._frame_bytes_max} bytes"
        if message.type is aiohttp.WSMsgType.CLOSE:
            return f"closed by the exchange: code {code} {message.extra or ''}".rstrip()
        error = message.data if message.type is aiohttp.WSMsgType.ERROR else self._socket.exception()
        return f"connection lost: {error}" if error else "connection lost"

    async def send(self, raw: bytes) -> None:
        """Send one text frame. Raises StreamClosed."""
        try:
            await self._socket.send_frame(raw, aiohttp.WSMsgType.TEXT)
        except (aiohttp.ClientError, OSError) as error:
            raise StreamClosed(f"connection lost: {error}") from None

    async def close(self) -> None:
        """End the stream, from any task; whoever iterates gets StreamClosed."""
        self._closed_by_us = True
        await self._socket.close()
        await self._session.close()


async def open_stream(url: str, *, connect_timeout_ms: int, frame_bytes_max: int,
                      ping_s: float = PING_S) -> Stream:
    """Connect, TLS and handshake included. Raises StreamClosed."""
    session, socket = aiohttp.ClientSession(), None
    try:
        async with asyncio.timeout(connect_timeout_ms / 1_000):
            # decode_text=False: the bytes of the frame, not a str of them.
            socket = await session.ws_connect(
                url, max_msg_size=frame_bytes_max, heartbeat=ping_s, decode_text=False,
                timeout=aiohttp.ClientWSTimeout(ws_close=CLOSE_WAIT_S))
    except TimeoutError:
        raise StreamClosed(f"no connection within {connect_timeout_ms} ms") from None
    except (aiohttp.ClientError, OSError) as error:
        # The address of a private stream holds its key.
        raise StreamClosed(f"cannot connect: {re.sub(r'[?][^ ]*', '?...', str(error))}") from None
    finally:
        if socket is None:
            await session.close()
    return Stream(session, socket, frame_bytes_max)
