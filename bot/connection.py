"""HTTP requests that are sent at most once, each with a full account of how far it got.

One byte may have left: then nothing is ever repeated here, for no method. Edge to the network (h11).
"""

from collections.abc import Sequence

from bot.clock import Clock
from bot.outcome import Answer


class RestConnection:
    """One kept-open connection to one host; one request at a time, others wait."""

    def __init__(self, base_url: str, clock: Clock, *, connect_timeout_ms: int, request_timeout_ms: int,
                 body_bytes_max: int, ca_file: str | None = None) -> None:
        raise NotImplementedError

    async def request(self, method: str, url: str, headers: dict[str, str], body: bytes) -> Answer:
        """Send one request and return its answer; network trouble is told in it, never raised."""
        raise NotImplementedError

    async def warm(self) -> bool:
        """Open the connection ahead of need; return whether it is open."""
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError


class RestPool:
    """Several connections to one host, so that a request does not wait behind a slow one."""

    def __init__(self, connections: Sequence[RestConnection]) -> None:
        raise NotImplementedError

    async def request(self, method: str, url: str, headers: dict[str, str], body: bytes) -> Answer:
        """Send one request on an idle connection, the one used last if possible."""
        raise NotImplementedError

    async def warm(self) -> bool:
        """Open one connection ahead of need; return whether it is open."""
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError
