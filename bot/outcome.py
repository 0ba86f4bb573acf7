"""What the answer to an order or a cancel proves. Pure.

Read from raw status, numeric code and JSON shape, because a library's exception classes mislead: an
empty 200 looks like an order to them, a cut body like a rejection (exchange-facts 1.3). Whatever the
tables below do not name is "unknown": in flight, until the exchange itself gives evidence.
"""

import re
from typing import Any, Literal

import msgspec

OrderKind = Literal["accepted", "rejected", "not_executed", "duplicate", "not_sent", "unknown"]
CancelKind = Literal["canceled", "gone", "rejected", "not_executed", "not_sent", "unknown"]


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    """What came back for one request, or how far it got.

    status: 0 when no complete answer came. headers: names in lower case. is_sent: a byte of the
    request may have left. error: "" when the answer is complete and well framed. Times: clock.wall_ns.
    """

    status: int = 0
    headers: dict[str, str] = {}
    body: bytes = b""
    is_sent: bool = False
    error: str = ""
    sent_ns: int = 0
    received_ns: int = 0


class OrderOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a new order.

    retry_later_s: nothing may be sent before so many seconds have passed. needs_operator: the exchange
    itself said that it does not know; evidence of absence is then not to be trusted.
    """

    kind: OrderKind
    code: int = 0
    text: str = ""
    retry_later_s: float | None = None
    needs_operator: bool = False


class CancelOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a cancel. "gone": not open now, which says nothing of its end: query it."""

    kind: CancelKind
    code: int = 0
    text: str = ""
    retry_later_s: float | None = None


def classify(answer: Answer, client_order_id: str) -> OrderOutcome:
    """Return what the answer to a new order proves."""
    raise NotImplementedError


def classify_cancel(answer: Answer, client_order_id: str) -> CancelOutcome:
    """Return what the answer to a cancel proves."""
    raise NotImplementedError
