"""How much of the exchange's request limits is used, by its own headers, and who may use the rest. Pure.

The counters are the exchange's: of this host's address (weight) and of the account (orders), so what
one process hears is true for all; each tells the others in its beat. Windows go by the exchange's clock.
"""

import re
from typing import Any, Literal

import msgspec

from bot.outcome import RETRY_LATER_S_MAX

Action = Literal["query", "entry", "rest"]
# Header, window in seconds, and limit as long as exchangeInfo has not told it (its rateLimits of 2026).
# Orders weigh nothing, cancels 1.
COUNTERS = {"weight_1m": ("x-mbx-used-weight-1m", 60, 2_400),
            "orders_10s": ("x-mbx-order-count-10s", 10, 300),
            "orders_1m": ("x-mbx-order-count-1m", 60, 1_200)}
LISTED = {("REQUEST_WEIGHT", "MINUTE", 1): "weight_1m", ("ORDERS", "SECOND", 10): "orders_10s",
          ("ORDERS", "MINUTE", 1): "orders_1m"}
# Above so much of a limit an action waits for the next window: entries first, then questions. What is
# left is for cancels, closes and stops ("rest"), which are held back by a ban alone.
SHARE_MAX: dict[Action, float] = {"entry": 0.80, "query": 0.90}
SLOW_SHARE = 0.70  # from here on questions are spread out
BAN_NS_MAX = int((RETRY_LATER_S_MAX + 60) * 1e9)  # and a minute for clocks that differ
NONE = 0, 0  # no counter was told


class Usage(msgspec.Struct, frozen=True, kw_only=True):
    """What a process knows: counter -> (window, used), and until when nothing may be sent.

    Both by the exchange's clock: this host's may step.
    """

    used: dict[str, tuple[int, int]] = {}
    banned_until_ns: int = 0


class Budget:
    """The counters of this process, and what the others told."""

    def __init__(self) -> None:
        self.usage = Usage()
        self.limits = {name: limit for name, (_, _, limit) in COUNTERS.items()}

    def learn(self, rows: list[dict[str, Any]]) -> None:
        """Take in exchangeInfo's rateLimits; rows of other kinds are left out."""
        for row in rows:
            name = LISTED.get((row["rateLimitType"], row["interval"], row["intervalNum"]))
            if name and int(row["limit"]) > 0:
                self.limits[name] = int(row["limit"])

    def hear(self, headers: dict[str, str], server_ns: int) -> None:
        """Take in the counters of an answer that left the exchange at server_ns."""
        told = {name: (_window(name, server_ns), int(headers[header]))
                for name, (header, _, _) in COUNTERS.items()
                if re.fullmatch(r"\d{1,9}", headers.get(header, ""))}
        self.merge(Usage(used=told), server_ns)

    def ban(self, until_ns: int, server_ns: int) -> None:
        """Let nothing out until then, by the exchange's clock, which is at server_ns."""
        self.merge(Usage(banned_until_ns=until_ns), server_ns)

    def fill(self, name: str, server_ns: int) -> None:
        """Take a limit as used up in the window of server_ns: the exchange said so."""
        self.merge(Usage(used={name: (_window(name, server_ns), self.limits[name])}), server_ns)

    def merge(self, told: Usage, server_ns: int) -> None:
        """Take in what another process knows: of each counter the later window, then the larger number.

        What lies further ahead than it can was written down by a clock that was off, and is dropped.
        """
        sources = self.usage, told
        used = {name: max(row for row in (*(u.used.get(name, NONE) for u in sources), NONE)
                          if row[0] <= _window(name, server_ns) + 1) for name in COUNTERS}
        bans = [u.banned_until_ns for u in sources]
        latest_ns = server_ns + BAN_NS_MAX
        self.usage = Usage(used=used, banned_until_ns=max(ns if ns <= latest_ns else 0 for ns in bans))

    def share(self, name: str, server_ns: int) -> float:
        """Return how much of a limit is used in the window of server_ns."""
        window, used = self.usage.used.get(name, NONE)
        return used / self.limits[name] if window == _window(name, server_ns) else 0.0

    def refusal(self, action: Action, server_ns: int) -> str:
        """Return why this kind of request may not leave now, "" when it may."""
        wait_s = (self.usage.banned_until_ns - server_ns) / 1e9
        if wait_s > 0:
            return f"banned for another {wait_s:.0f} s"
        for name in COUNTERS:
            share = self.share(name, server_ns)
            if action != "rest" and share >= SHARE_MAX[action] and (action == "entry" or name == "weight_1m"):
                return (f"{share:.0%} of {self.limits[name]} {name} is used; from {SHARE_MAX[action]:.0%} on "
                        "the rest is kept for cancels, closes and stops")
        return ""


def _window(name: str, server_ns: int) -> int:
    return server_ns // (COUNTERS[name][1] * 1_000_000_000)
