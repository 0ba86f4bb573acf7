"""The table of exchange-facts 1.2, row by row, and the answers of 1.3 that mislead other clients."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bot.outcome import Answer, classify, classify_cancel, error_of, retry_later_s

OURS = "th0epochabcdefo0"
REJECTED = [*range(-1130, -1101), -2010, *range(-2028, -2017), *range(-4061, -4002),
            -4120, -4131, -4164, -5021, -5022, -5028]
NOT_EXECUTED = [-1003, -1015, -1021, -1022, -2014, -2015]
UNLISTED = [0, 1, 200, -1, -1000, -1001, -1006, -1007, -1008, -1016, -1100, -1101, -1131, -2011, -2013, -2016,
            -2029, -4002, -4062, -4115, -4117, -5020, -5023, -99999]


def answer(status=200, body=b"", **fields):
    body = body if isinstance(body, bytes) else json.dumps(body).encode()
    return Answer(status=status, body=body, is_sent=True, **fields)


def refusal(status, code, msg="words", **fields):
    return answer(status, {"code": code, "msg": msg}, **fields)


@pytest.mark.parametrize("body", [
    {"orderId": 1, "clientOrderId": OURS, "status": "NEW"},
    {"algoId": 7, "clientAlgoId": OURS, "algoStatus": "NEW"},
])
def test_classify_with_our_id_accepts(body):
    assert classify(answer(200, body), OURS).kind == "accepted"


@pytest.mark.parametrize("body", [
    b"", b"{", b"{}", b"[]", b"null", b"12", b'"orderId"', b"<html>ok</html>", b"\xff\xfe", b"\xef\xbb\xbf{}",
    b'{"orderId": 1, "clientOrderId": "' + OURS.encode(),  # cut
    {"orderId": 1}, {"clientOrderId": OURS}, {"orderId": None, "clientOrderId": OURS},
    {"orderId": 0, "clientOrderId": OURS}, {"orderId": -1, "clientOrderId": OURS},
    {"orderId": True, "clientOrderId": OURS}, {"orderId": "", "clientOrderId": OURS},
    {"orderId": 1, "clientOrderId": OURS + "x"}, {"orderId": 1, "clientOrderId": None},
    {"orderId": 1, "clientAlgoId": OURS}, {"algoId": 1, "clientOrderId": OURS},
    [{"orderId": 1, "clientOrderId": OURS}], {"data": {"orderId": 1, "clientOrderId": OURS}},
    {"code": -2019, "msg": "Margin is insufficient."},
])
def test_classify_with_any_other_200_is_unknown(body):
    assert classify(answer(200, body), OURS).kind == "unknown"
    assert classify_cancel(answer(200, body), OURS).kind == "unknown"


@pytest.mark.parametrize("status", [0, 201, 202, 204, 301, 400, 404, 500, 503])
def test_classify_with_an_order_but_another_status_is_not_accepted(status):
    assert classify(answer(status, {"orderId": 1, "clientOrderId": OURS}), OURS).kind == "unknown"


@pytest.mark.parametrize("code", REJECTED)
def test_classify_with_listed_code_is_rejected(code):
    outcome = classify(refusal(400, code), OURS)
    assert (outcome.kind, outcome.code, outcome.text) == ("rejected", code, f"400 {code} words")
    assert classify_cancel(refusal(400, code), OURS).kind == "rejected"


@pytest.mark.parametrize("code", [*REJECTED, *NOT_EXECUTED, -4116, -2011])
@pytest.mark.parametrize("status", [200, 302, 500, 502, 503, 504])
def test_classify_with_listed_code_outside_4xx_is_unknown(status, code):
    assert classify(refusal(status, code), OURS).kind == "unknown"
    assert classify_cancel(refusal(status, code), OURS).kind == "unknown"


@pytest.mark.parametrize("code", UNLISTED)
@pytest.mark.parametrize("status", [400, 401, 403, 404, 408, 409, 500, 503])
def test_classify_with_unlisted_code_is_unknown(status, code):
    assert classify(refusal(status, code), OURS).kind == "unknown"


@pytest.mark.parametrize("code", NOT_EXECUTED)
def test_classify_with_clock_signature_or_limit_is_not_executed(code):
    assert classify(refusal(400, code), OURS).kind == "not_executed"
    assert classify_cancel(refusal(400, code), OURS).kind == "not_executed"


@pytest.mark.parametrize("body", [b"", b"<html>", b'{"code":-1003,"msg":"Too many requests."}'])
@pytest.mark.parametrize("status", [418, 429])
def test_classify_with_limiter_status_is_not_executed(status, body):
    assert classify(answer(status, body), OURS).kind == "not_executed"
    assert retry_later_s(answer(status, body), 0) == (120 if status == 418 else 60)
    assert classify_cancel(answer(status, body), OURS).kind == "not_executed"


def test_classify_with_duplicate_id_is_never_rejected():
    assert classify(refusal(400, -4116, "ClientOrderId is duplicated."), OURS).kind == "duplicate"


@pytest.mark.parametrize(("status", "code", "msg", "needs_operator"), [
    (503, -1000, "Unknown error, please check your request or try again later.", True),
    (408, -1007, "Timeout waiting for response from backend server.", True),
    (503, -1001, "Internal error; unable to process your request. Please try again.", False),
    (503, -1008, "Request throttled by system-level protection.", False),
    (400, -1006, "An unexpected response was received from the message bus.", False),
])
def test_classify_with_system_trouble_is_unknown(status, code, msg, needs_operator):
    outcome = classify(refusal(status, code, msg), OURS)
    assert (outcome.kind, outcome.code, outcome.needs_operator) == ("unknown", code, needs_operator)


@pytest.mark.parametrize(("body", "needs_operator"), [
    (b"Unknown error, please check your request or try again later.", True),
    (b"Service Unavailable.", False), (b"", False)])
def test_classify_with_503_without_code_is_unknown(body, needs_operator):
    outcome = classify(answer(503, body), OURS)
    assert (outcome.kind, outcome.needs_operator) == ("unknown", needs_operator)


@pytest.mark.parametrize("body", [
    b'{"code":-2019}', b'{"code":"-2019","msg":"x"}', b'{"code":-2019.0,"msg":"x"}',
    b'{"code":true,"msg":"x"}', b'{"code":-2019,"msg":null}', b'[{"code":-2019,"msg":"x"}]',
    b'{"code":-2019,"msg":"x"', b"-2019"])
def test_classify_with_a_misshapen_refusal_is_unknown(body):
    assert classify(answer(400, body), OURS).kind == "unknown"


@pytest.mark.parametrize("error", ["ConnectionResetError: ", "RemoteProtocolError: cut", "TimeoutError: "])
def test_classify_with_trouble_after_a_byte_left_is_unknown(error):
    sent = Answer(is_sent=True, error=error)
    assert (classify(sent, OURS).kind, classify(sent, OURS).text) == ("unknown", error)
    assert classify_cancel(sent, OURS).kind == "unknown"
    # Even a body that looks like an answer proves nothing when it was not complete.
    cut = answer(200, {"orderId": 1, "clientOrderId": OURS}, error=error)
    assert classify(cut, OURS).kind == "unknown"


def test_classify_without_an_answer_and_without_a_reason_is_unknown():
    assert classify(Answer(is_sent=True), OURS).kind == "unknown"


def test_classify_with_no_byte_sent_is_not_sent():
    refused = Answer(is_sent=False, error="cannot connect: ConnectionRefusedError")
    assert classify(refused, OURS).kind == "not_sent"
    assert classify_cancel(refused, OURS).kind == "not_sent"


def test_classify_with_an_answer_to_nothing_sent_does_not_say_not_sent():
    assert classify(Answer(status=500, is_sent=False), OURS).kind == "unknown"


@pytest.mark.parametrize(("body", "kind"), [
    ({"orderId": 1, "clientOrderId": OURS, "status": "CANCELED"}, "canceled"),
    ({"algoId": 1, "clientAlgoId": OURS, "code": "200", "msg": "success"}, "canceled"),
    ({"algoId": 1, "clientAlgoId": OURS, "algoStatus": "CANCELED"}, "canceled"),
    ({"algoId": 1, "clientAlgoId": OURS, "algoStatus": "FINISHED"}, "unknown"),
    ({"orderId": 1, "clientOrderId": OURS, "status": "FILLED"}, "unknown"),
    ({"orderId": 1, "clientOrderId": OURS, "status": "PARTIALLY_FILLED"}, "unknown"),
    ({"orderId": 1, "clientOrderId": "other", "status": "CANCELED"}, "unknown")])
def test_classify_cancel_with_200_reads_the_status(body, kind):
    assert classify_cancel(answer(200, body), OURS).kind == kind


@pytest.mark.parametrize("code", [-2011, -2013])
def test_classify_cancel_with_no_such_open_order_is_gone(code):
    assert classify_cancel(refusal(400, code), OURS).kind == "gone"


NOW = 1_700_000_000 * 10**9


@pytest.mark.parametrize(("given_answer", "seconds"), [
    (refusal(429, -1003, headers={"retry-after": "7"}), 7),
    (refusal(418, -1003, headers={"retry-after": "180"}), 180),
    (refusal(418, -1003, "IP banned until 1700000030000. Use"), 30),
    (refusal(418, -1003, "banned until 1600000000000"), 0),
    (refusal(429, -1003, "banned until 9999999999999"), 3 * 86_400),
    (refusal(429, -1003, headers={"retry-after": "soon"}), 60),
    (refusal(429, -1003, headers={"retry-after": "9" * 400}), 60),
    (refusal(400, -1003), 60), (refusal(429, -1015), 60), (refusal(400, -1015), None),
    (refusal(400, -2019), None), (answer(503), None)])
def test_retry_later_with_header_text_or_nothing(given_answer, seconds):
    assert retry_later_s(given_answer, NOW) == seconds


def test_retry_later_with_a_bans_end_and_no_clock_to_compare_it_with_is_a_usual_time():
    assert retry_later_s(refusal(418, -1003, "IP banned until 1700000030000. Use"), None) == 120


def test_error_of_with_long_text_is_short():
    assert len(error_of(refusal(400, -1, "x" * 100_000))[1]) < 250
    assert len(error_of(answer(500, b"x" * 100_000))[1]) < 250


KEYS = st.sampled_from(["orderId", "clientOrderId", "algoId", "clientAlgoId", "code", "msg", "status"])
LEAVES = st.none() | st.booleans() | st.integers() | st.text() | st.sampled_from([OURS, -2019, -2011, 1])
JSON = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(KEYS | st.text(), inner, max_size=5), max_leaves=12)
BODIES = st.binary() | JSON.map(lambda value: json.dumps(value).encode())


@given(status=st.integers(0, 999), body=BODIES, is_sent=st.booleans(), error=st.sampled_from(["", "torn"]),
       retry=st.text())
@example(status=200, body=b"[" * 100_000, is_sent=True, error="", retry="")
def test_classify_with_anything_never_raises_and_proves_only_by_shape(status, body, is_sent, error, retry):
    given_answer = Answer(status=status, body=body, is_sent=is_sent, error=error,
                          headers={"retry-after": retry})
    order, cancel = classify(given_answer, OURS), classify_cancel(given_answer, OURS)
    try:
        table = json.loads(body)
    except (ValueError, RecursionError):
        table = None
    table = table if isinstance(table, dict) else {}
    is_refusal = 400 <= status < 500 and not error and type(table.get("code")) is int \
        and type(table.get("msg")) is str
    is_ours = status == 200 and not error and any(
        type(table.get(number)) is int and table[number] > 0 and table.get(name) == OURS
        for number, name in (("orderId", "clientOrderId"), ("algoId", "clientAlgoId")))
    assert (order.kind == "accepted") == is_ours
    assert order.kind != "rejected" or (is_refusal and table["code"] in REJECTED)
    assert cancel.kind != "canceled" or is_ours
    assert cancel.kind not in ("rejected", "gone") or is_refusal
    assert (order.kind == "not_sent") == (not is_sent and status == 0)
