"""The edge to time and chance: the only module that reads a clock or draws a random number."""

import asyncio
import secrets
import time


class Clock:
    """Real time and randomness; a simulator passes an object with the same methods.

    Units: nanoseconds. wall_ns is for records and for comparing with the exchange, mono_ns for
    intervals: it never steps, and is the same for all processes of one boot (CLOCK_MONOTONIC).
    """

    def wall_ns(self) -> int:
        return time.time_ns()

    def mono_ns(self) -> int:
        return time.monotonic_ns()

    async def sleep(self, seconds: float) -> None:
        await asyncio.sleep(seconds)

    def token(self, length: int) -> str:
        """Return `length` random characters of 0-9A-Z, for ids that must not meet twice."""
        alphabet = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZ"
        return "".join(secrets.choice(alphabet) for _ in range(length))

    def jitter(self) -> float:
        """Return a random factor in [0.5, 1.0), to spread reconnects."""
        return 0.5 + secrets.randbelow(1 << 20) / (1 << 21)
