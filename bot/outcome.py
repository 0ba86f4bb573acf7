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

# The signature or the key is refused, whatever is sent: nothing of ours gets through any more.
KEY_REFUSED = frozenset({-1022, -2014, -2015})
NOTHING_TO_REDUCE = -2022  # "ReduceOnly Order is rejected"
# What the symbol's rules refused: they may have changed since they were read.
RULES_REFUSED = frozenset({-1111, -1121, *range(-4061, -4002), -4131, -4140, -4164})
# Codes that count only in a 4xx answer of the shape {"code": int, "msg": str} (exchange-facts 1.2,
# from Binance's error-code page). First match wins; a code in no row is unknown.
ORDER_CODES: tuple[tuple[OrderKind, frozenset[int]], ...] = (
    # Limits, clock, signature; -2014 and -2015: the key is malformed, unknown, or may not do this.
    ("not_executed", frozenset({-1003, -1015, -1021, *KEY_REFUSED})),
    ("duplicate", frozenset({-4116})),  # an order with this id is OPEN: query and adopt it
    # -2020: unable to fill; -2023: in liquidation; -2024: position, -2028: margin not sufficient; -2025:
    # too many open orders; -2026: not reduce-only with this type (all on the error-code page).
    ("rejected", frozenset({*range(-1130, -1101), -2010, *range(-2028, -2017), *range(-4061, -4002),
                            # -4120: a conditional order at the plain endpoint (nautilus #3287).
                            -4120, -4131, -4164, -5021, -5022, -5028})),
)
CANCEL_CODES: tuple[tuple[CancelKind, frozenset[int]], ...] = (
    ("gone", frozenset({-2011, -2013})), ("not_executed", ORDER_CODES[0][1]), ("rejected", ORDER_CODES[2][1]))
# Refused by the limiter in front of the exchange, whatever the body says (error-code page, 429 and 418).
LIMITER_STATUS = frozenset({418, 429})
# Without Retry-After or a ban's end: the minute of the weight counter, the least ban (exchange-facts 1.1).
WEIGHT_WAIT_S, BAN_WAIT_S = 60.0, 120.0
RETRY_LATER_S_MAX = 3 * 86_400.0  # the longest ban the exchange documents


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

    needs_operator: the exchange itself said that it does not know; that the order is not found later then
    proves nothing.
    """

    kind: OrderKind
    code: int = 0
    text: str = ""
    needs_operator: bool = False


class CancelOutcome(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a cancel. "gone": not open now, which says nothing of its end: query it."""

    kind: CancelKind
    code: int = 0
    text: str = ""


def classify(answer: Answer, client_order_id: str) -> OrderOutcome:
    """Return what the answer to a new order, plain or conditional, proves."""
    code, text = error_of(answer)
    if _never_left(answer):
        return OrderOutcome(kind="not_sent", text=answer.error)
    if answer.error or answer.status == 0:
        return OrderOutcome(kind="unknown", text=answer.error or "no answer")
    if answer.status == 200 and _is_about(answer.body, client_order_id) is not None:
        return OrderOutcome(kind="accepted")
    needs_operator = code == -1007 or (answer.status == 503 and "unknown" in text.lower())
    return OrderOutcome(kind=_by_code(answer.status, code, ORDER_CODES), code=code, text=text,
                        needs_operator=needs_operator)


def classify_cancel(answer: Answer, client_order_id: str) -> CancelOutcome:
    """Return what the answer to a cancel, plain or conditional, proves."""
    code, text = error_of(answer)
    if _never_left(answer):
        return CancelOutcome(kind="not_sent", text=answer.error)
    if answer.error or answer.status == 0:
        return CancelOutcome(kind="unknown", text=answer.error or "no answer")
    about = _is_about(answer.body, client_order_id) if answer.status == 200 else None
    # A conditional order's cancel is acknowledged without its status ("code": "200").
    if about is not None and about.get("status", about.get("algoStatus", "CANCELED")) == "CANCELED":
        return CancelOutcome(kind="canceled")
    return CancelOutcome(kind=_by_code(answer.status, code, CANCEL_CODES), code=code, text=text)


def error_of(answer: Answer) -> tuple[int, str]:
    """Return the exchange's error code, 0 when there is none, and what to show of the answer."""
    table = _json_object(answer.body)
    code = table.get("code") if table else None
    if isinstance(code, int) and not isinstance(code, bool) and isinstance(table.get("msg"), str):
        return code, f"{answer.status} {code} {table['msg'][:200]}"
    return 0, f"{answer.status} {answer.body[:200].decode('ascii', 'replace')}".strip()


def retry_later_s(answer: Answer, server_ns: int | None) -> float | None:
    """Return how long nothing may be sent after this answer, None when it says nothing of the kind.

    The end of a ban stands in Retry-After (seconds) or in the text ("banned until" and ms since 1970, by
    its clock as server_ns; None while that is not known, and a usual time counts).
    """
    code, text = error_of(answer)
    if answer.status not in LIMITER_STATUS and code != -1003:
        return None
    header = answer.headers.get("retry-after", "")
    until = re.search(r"until (\d{13})\b", text)
    if re.fullmatch(r"\d{1,9}", header):
        wait = float(header)
    elif until and server_ns is not None:
        wait = max(0.0, int(until[1]) / 1e3 - server_ns / 1e9)
    else:
        wait = BAN_WAIT_S if answer.status == 418 else WEIGHT_WAIT_S
    return min(wait, RETRY_LATER_S_MAX)


def _never_left(answer: Answer) -> bool:
    return not answer.is_sent and answer.status == 0


def _by_code(status: int, code: int, table: tuple[tuple[Any, frozenset[int]], ...]) -> Any:
    if status in LIMITER_STATUS:
        return "not_executed"
    if 400 <= status < 500:
        return next((kind for kind, codes in table if code in codes), "unknown")
    return "unknown"


def _is_about(body: bytes, client_order_id: str) -> dict[str, Any] | None:
    # The order the answer names, when it is ours: both ids of the same kind.
    table = _json_object(body)
    for number, name in (("orderId", "clientOrderId"), ("algoId", "clientAlgoId")):
        exchange_id = table.get(number)
        is_number = isinstance(exchange_id, int) and not isinstance(exchange_id, bool) and exchange_id > 0
        if is_number and table.get(name) == client_order_id:
            return table
    return None


def _json_object(body: bytes) -> dict[str, Any]:
    try:
        value = msgspec.json.decode(body)
    except (msgspec.DecodeError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}
