"""Rows and private events, against the recorded shapes and against anything else."""

import json
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bot.orders import ExchangeFill, OrderStatus
from bot.rows import (
    ALGO,
    EVENT_OF_STATUS,
    FILL,
    ORDER,
    ORDER_EVENT,
    ListenKeyExpired,
    Unrecognized,
    money,
    read_fill,
    read_position,
    read_private,
    read_status,
)
from tests.harness import data_path

BTC = "BTC/USDT:USDT"
SYMBOLS = {"BTCUSDT": BTC, "BNBUSDT": "BNB/USDT:USDT"}
SAMPLES = data_path("nautilus_trader/binance_futures_json")
needs_samples = pytest.mark.skipif(not SAMPLES.is_dir(), reason=f"recorded shapes are not in {SAMPLES}")

EVENT = {
    "e": "ORDER_TRADE_UPDATE", "T": 1_568_879_465_651, "E": 1_568_879_465_652, "o": {
        "s": "BTCUSDT", "c": "th1", "S": "BUY", "o": "MARKET", "q": "0.005", "p": "0", "sp": "0",
        "x": "TRADE", "X": "PARTIALLY_FILLED",
        "i": 88, "l": "0.002", "z": "0.003", "L": "61000.10", "N": "USDT",
        "n": "0.0488", "T": 1_568_879_465_650, "t": 77, "m": False, "R": True, "ps": "BOTH", "rp": "-1.5"}}
ALGO_ROW = {
    "algoId": 5, "clientAlgoId": "th2", "algoType": "CONDITIONAL", "orderType": "STOP_MARKET",
    "symbol": "BTCUSDT", "side": "SELL", "quantity": "0.003", "algoStatus": "NEW", "actualOrderId": "",
    "actualQty": "0.000", "triggerPrice": "59000.00", "reduceOnly": True, "updateTime": 12}


def event(**changes):
    return json.dumps({**EVENT, "o": {**EVENT["o"], **changes}}).encode()


def sample(name):
    return (SAMPLES / f"{name}.json").read_bytes()


def test_private_with_trade_gives_status_then_fill():
    status, fill = read_private(event(), SYMBOLS)
    assert status == OrderStatus(
        symbol=BTC, client_order_id="th1", exchange_order_id="88", side="buy", qty=Decimal("0.005"),
        executed_qty=Decimal("0.003"), raw_status="PARTIALLY_FILLED", event="fill", is_conditional=False,
        reduce_only=True, trigger_price=None, update_ns=1_568_879_465_650_000_000, type="MARKET")
    assert fill == ExchangeFill(
        symbol=BTC, trade_id="77", exchange_order_id="88", client_order_id="th1", side="buy",
        qty=Decimal("0.002"), price=Decimal("61000.10"), fee=Decimal("0.0488"), fee_currency="USDT",
        realized_pnl=Decimal("-1.5"), is_maker=False, exchange_ns=1_568_879_465_650_000_000)


def test_private_with_combined_stream_envelope_reads_the_same():
    wrapped = json.dumps({"stream": "key", "data": json.loads(event())}).encode()
    assert read_private(wrapped, SYMBOLS) == read_private(event(), SYMBOLS)


@pytest.mark.parametrize(("word", "wanted"), [
    *EVENT_OF_STATUS.items(), ("EXPIRED_IN_MATCH", "expire"), ("NEW_ADL", None), ("NEW_INSURANCE", None),
    ("SOMETHING_NEW", None)])
def test_private_with_any_status_word_keeps_it_raw(word, wanted):
    [status] = read_private(event(X=word, x="NEW", l="0"), SYMBOLS)
    assert (status.raw_status, status.event) == (word, wanted)


def test_private_with_execution_but_no_trade_gives_no_fill():
    assert len(read_private(event(x="NEW"), SYMBOLS)) == 1
    assert len(read_private(event(l="0"), SYMBOLS)) == 1


@pytest.mark.parametrize("trade_id", [0, -1])
def test_private_with_fill_without_identity_is_not_booked_but_told(trade_id):
    status, said = read_private(event(t=trade_id), SYMBOLS)
    assert isinstance(status, OrderStatus) and isinstance(said, Unrecognized)
    assert "trade id" in said.reason


def test_private_with_unlisted_symbol_keeps_the_exchanges_name():
    assert read_private(event(s="ETHUSDT"), SYMBOLS)[0].symbol == "ETHUSDT"


@pytest.mark.parametrize("changes", [
    {"q": 0.005}, {"q": "NaN"}, {"q": "Infinity"}, {"q": "many"}, {"q": None}, {"q": []}, {"z": 1.5},
    {"S": "LONG"}, {"S": None}, {"c": None}, {"c": 5}, {"s": None}, {"i": None}, {"i": "x"}, {"T": None},
    {"X": None}, {"X": []}, {"L": 61000.1}, {"l": None}, {"t": None}, {"sp": "-"}, {"n": "free"}])
def test_private_with_misshapen_order_is_unrecognized(changes):
    raw = event(**changes)
    [said] = read_private(raw, SYMBOLS)
    assert isinstance(said, Unrecognized) and said.raw == raw
    assert said.reason.startswith("ORDER_TRADE_UPDATE: ")


@pytest.mark.parametrize("raw", [
    b"", b"{", b"[]", b"null", b"1", b'"e"', b"{}", b'{"e":null}', b"\xff", b"[" * 9999, b'{"data":[]}',
    b'{"e":"MARGIN_CALL","E":1}', b'{"e":"ORDER_TRADE_UPDATE"}', b'{"e":"ORDER_TRADE_UPDATE","o":{}}',
    b'{"e":"ALGO_UPDATE","T":1,"o":{}}', b'{"result":null,"id":1}'])
def test_private_with_other_frame_is_unrecognized(raw):
    [said] = read_private(raw, SYMBOLS)
    assert isinstance(said, Unrecognized) and len(said.reason) <= 200


def test_private_with_expired_key_says_so():
    assert read_private(b'{"e":"listenKeyExpired","E":1,"listenKey":"k"}', SYMBOLS) == [ListenKeyExpired("k")]
    assert read_private(b'{"e":"listenKeyExpired","E":1}', SYMBOLS) == [ListenKeyExpired("")]


@needs_samples
def test_private_with_recorded_account_update_says_nothing_that_is_not_compared():
    for name in ("user_data_json__account_update", "user_data_json__account_update_bnfcr"):
        assert read_private(sample(name), SYMBOLS) == []


@needs_samples
@pytest.mark.parametrize(("name", "client_order_id", "word", "wanted", "fill_qty"), [
    ("new", "TEST", "NEW", "accept", None),
    ("trade", "TEST", "PARTIALLY_FILLED", "fill", "0.001"),
    ("trade_partial", "TEST", "PARTIALLY_FILLED", "fill", "0.001"),
    ("calculated", "autoclose-1234567890", "FILLED", "complete", "0.014"),
    ("calculated_pending", "autoclose-pending-0000", "NEW", "accept", None),
    ("adl", "adl_autoclose_12345", "NEW_ADL", None, "0.005"),
    ("insurance", "autoclose-insurance-5678", "NEW_INSURANCE", None, "0.020"),
    ("settlement", "settlement_autoclose-9999", "FILLED", "complete", "0.010"),
    ("delivery", "delivery_autoclose-12345", "FILLED", "complete", "1")])
def test_private_with_recorded_order_update_tells_exchange_made_orders(
        name, client_order_id, word, wanted, fill_qty):
    status, *fills = read_private(sample(f"user_data_json__order_update_{name}"), SYMBOLS)
    assert (status.client_order_id, status.raw_status, status.event) == (client_order_id, word, wanted)
    assert [str(fill.qty) for fill in fills] == ([fill_qty] if fill_qty else [])
    for fill in fills:
        assert (fill.client_order_id, fill.side, fill.symbol) == (client_order_id, status.side, status.symbol)


@needs_samples
@pytest.mark.parametrize(("name", "wanted"), [("new", "accept"), ("canceled", "cancel")])
def test_private_with_recorded_algo_update_tells_the_conditional_order(name, wanted):
    [status] = read_private(sample(f"user_data_json__algo_update_{name}"), SYMBOLS)
    assert status == OrderStatus(
        symbol="BNB/USDT:USDT", client_order_id="Q5xaq5EGKgXXa0fD7fs0Ip", exchange_order_id="2148719",
        side="sell", qty=Decimal("0.01"), executed_qty=Decimal(0), raw_status=name.upper(), event=wanted,
        is_conditional=True, reduce_only=False, trigger_price=Decimal(750),
        update_ns=1_750_515_742_297_000_000, type="TAKE_PROFIT")


@needs_samples
def test_private_with_recorded_trade_lite_says_nothing_twice():
    assert read_private(sample("user_data_json__trade_lite"), SYMBOLS) == []


@needs_samples
def test_read_with_recorded_rows_tells_orders_and_positions():
    row = json.loads(sample("http_json__order_response"))
    status = read_status(row, ORDER, SYMBOLS)
    assert (status.client_order_id, status.exchange_order_id) == ("testOrder123", "12345678")
    assert status.event == "accept"
    assert (status.qty, status.trigger_price, status.is_conditional) == (Decimal("0.001"), None, False)
    [row] = json.loads(sample("http_json__open_algo_orders"))
    status = read_status(row, ALGO, SYMBOLS)
    assert (status.client_order_id, status.type) == ("test-algo-order-1", "STOP_MARKET")
    assert status.is_conditional
    assert status.trigger_price == Decimal(45_000)
    [row] = json.loads(sample("http_json__position_risk"))
    position = read_position(row, SYMBOLS)
    assert (position.symbol, position.qty, position.entry_price) == (BTC, Decimal("0.001"), Decimal(50_000))
    assert (position.mark_price, position.liquidation_price) == (Decimal(51_000), Decimal(45_000))
    with pytest.raises(ValueError, match="hedge mode: close it"):
        read_position({**row, "positionSide": "LONG"}, SYMBOLS)


@pytest.mark.parametrize(("changes", "wanted"), [
    ({"algoStatus": "TRIGGERED", "actualOrderId": "9"}, "accept"),
    ({"algoStatus": "FINISHED", "actualOrderId": "9", "actualQty": "0.003"}, "complete"),
    ({"algoStatus": "FINISHED", "actualOrderId": "9", "actualQty": "0.001"}, "expire"),
    ({"algoStatus": "FINISHED", "actualOrderId": "9", "actualQty": None}, None)])
def test_read_status_with_triggered_order_tells_what_became_of_it(changes, wanted):
    status = read_status({**ALGO_ROW, **changes}, ALGO, SYMBOLS)
    assert (status.event, status.triggered_id, status.exchange_order_id) == (wanted, "9", "5")


def test_read_fill_with_a_row_of_the_list_knows_no_client_id():
    fill = read_fill({"symbol": "BTCUSDT", "id": 1, "orderId": 2, "side": "SELL", "qty": "1", "price": "2",
                      "commission": "0.1", "commissionAsset": "BNB", "realizedPnl": "3", "maker": True,
                      "time": 4}, FILL, SYMBOLS)
    assert (fill.client_order_id, fill.trade_id, fill.side, fill.is_maker) == ("", "1", "sell", True)


@pytest.mark.parametrize("value", [1.5, float("nan"), "NaN", "-Infinity", "sNaN"])
def test_money_with_inexact_or_endless_value_raises(value):
    with pytest.raises((ValueError, ArithmeticError)):
        money(value)


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.just("1.5") | st.just([])


KEYS = st.sampled_from([*ORDER_EVENT, "x", "l", "L", "t", "m", "n", "N", "rp"])
KINDS = st.sampled_from(["ORDER_TRADE_UPDATE", "ALGO_UPDATE", "ACCOUNT_UPDATE"])


@given(changes=st.dictionaries(KEYS, VALUES), kind=KINDS, junk=st.binary(max_size=50))
def test_private_with_anything_never_raises(changes, kind, junk):
    frame = {**EVENT, "e": kind, "a": {**EVENT["o"], **changes}, "o": {**EVENT["o"], **changes}}
    for raw in (json.dumps(frame).encode(), junk, b'{"e":' + junk + b"}"):
        for said in read_private(raw, SYMBOLS):
            if isinstance(said, (OrderStatus, ExchangeFill)):
                assert said.qty.is_finite() and said.side in ("buy", "sell") and isinstance(said.symbol, str)
            if isinstance(said, ExchangeFill):
                assert said.price.is_finite() and int(said.trade_id) > 0
