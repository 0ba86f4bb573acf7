"""The paper exchange's faults: what is to go wrong with which request, told through `/paper/faults`.

Deterministic: a fault is for the next, or after `skip` the n-th, request of a kind. Example, the
answer to the second order from now is lost although the order is executed:
curl -d '{"match": "POST /fapi/v1/order", "skip": 1, "do": "lose_answer"}' 127.0.0.1:5560/paper/faults
"""

from fnmatch import fnmatchcase
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Count = Annotated[int, Meta(ge=0, le=1_000_000)]
Milliseconds = Annotated[int, Meta(ge=0, le=86_400_000)]


class Fault(msgspec.Struct, forbid_unknown_fields=True):
    """One fault. match: "METHOD path", with * as wildcard.

    do: lose_request (closed unread), hang (taken, never executed, never answered), delay (executed
    delay_ms late), duplicate (executed twice, the first answer returned), lose_answer (executed,
    closed without an answer), delay_answer, truncate (half of the body, then closed), answer
    (status, body and headers as given; executed before only with is_executed).
    """

    match: str
    do: Literal["lose_request", "hang", "delay", "duplicate", "lose_answer", "delay_answer", "truncate",
                "answer"]
    skip: Count = 0
    times: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    delay_ms: Milliseconds = 0
    status: Annotated[int, Meta(ge=200, le=599)] = 200
    body: str = ""
    headers: dict[str, str] = {}
    is_executed: bool = False


class StreamFault(msgspec.Struct, forbid_unknown_fields=True):
    """One fault of websocket connections that are open now.

    match: of a stream they carry, "btcusdt@trade" or "user:NAME". do: gap (the next `count` frames are
    lost), freeze (nothing is sent for `duration_ms`, and is lost), half_open (nothing is sent, read or
    answered any more), close (the connection is reset), expire (listenKeyExpired is sent).
    """

    match: str
    do: Literal["gap", "freeze", "half_open", "close", "expire"]
    count: Count = 1
    duration_ms: Milliseconds = 0


class Faults:
    """The faults that wait, first come first taken."""

    def __init__(self) -> None:
        self.waiting: list[Fault] = []

    def take(self, request: str) -> Fault | None:
        """Return the fault of this request ("METHOD path"), counted down."""
        for fault in self.waiting:
            if not fnmatchcase(request, fault.match):
                continue
            if fault.skip:
                fault.skip -= 1
                continue
            fault.times -= 1
            if not fault.times:
                self.waiting.remove(fault)
            return fault
        return None
