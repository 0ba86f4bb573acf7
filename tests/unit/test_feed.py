"""bot/feed.py: frames to Ticks, each once; what is no price; stale and quiet."""

import gzip
import json
import math
import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bot.feed import FrameDecoder, SymbolFeed, stream_names
from bot.wire import decode_tick, encode
from tests.harness import data_path

SYMBOL = "BTC/USDT:USDT"
RECORDING = data_path("hftbacktest/usdm-btcusdt-20240808.gz")
S = 1_000_000_000
STALE_NS = 5 * S
T0 = 1_723_161_256_000  # ms


def _pair(run=7):
    feed = SymbolFeed(SYMBOL, 0)
    return FrameDecoder({"BTCUSDT": feed}, run), feed


def _trade(t, price="61800.30", at_ms=T0, **more):
    return _frame("trade", E=at_ms, T=at_ms, t=t, p=price, q="0.006", X="MARKET", m=False, **more)


def _quote(u, bid="61800.20", ask="61800.30", at_ms=T0, **more):
    return _frame("bookTicker", **{"u": u, "b": bid, "B": "2.507", "a": ask, "A": "2.510", "T": at_ms,
                                   "E": at_ms, **more})


def _mark(at_ms, price="61801.5"):
    return _frame("markPriceUpdate", E=at_ms, p=price, i="61802", P="61803", r="0.0001", T=at_ms + 9_999)


def _frame(kind, **fields):
    return json.dumps({"stream": f"btcusdt@{kind}", "data": {"e": kind, "s": "BTCUSDT", **fields}}).encode()


def test_decoder_with_trade_frame_gives_its_tick():
    decoder, _ = _pair(run=7)
    raw = (b'{"stream":"btcusdt@trade","data":{"e":"trade","E":1723161256324,"T":1723161256322,"s":"BTCUSDT",'
           b'"t":5266583935,"p":"61800.30","q":"0.006","X":"MARKET","m":true}}')
    tick = decoder.decode(raw, 11, 12)
    assert (tick.symbol, tick.kind, tick.side) == (SYMBOL, "trade", "sell")
    assert (tick.price, tick.size) == (61800.30, 0.006)
    assert (tick.exchange_ns, tick.receive_ns, tick.run, tick.seq) == (1_723_161_256_322_000_000, 11, 7, 1)
    assert (tick.bid, tick.bid_size, tick.ask, tick.ask_size) == (None, None, None, None)


def test_decoder_with_quote_frame_gives_both_sides_and_their_middle():
    decoder, _ = _pair()
    tick = decoder.decode(_quote(1, "100.0", "100.5"), 1, 1)
    assert (tick.kind, tick.price, tick.size, tick.side) == ("quote", 100.25, 0.0, None)
    assert (tick.bid, tick.bid_size, tick.ask, tick.ask_size) == (100.0, 2.507, 100.5, 2.510)
    assert tick.exchange_ns == T0 * 1_000_000


def test_decoder_with_mark_frame_takes_the_event_time_not_the_next_funding():
    decoder, _ = _pair()
    tick = decoder.decode(_mark(T0), 1, 1)
    assert (tick.kind, tick.price, tick.exchange_ns) == ("mark", 61801.5, T0 * 1_000_000)


def test_decoder_with_bare_or_spaced_or_turned_frames_reads_them_alike():
    decoder, _ = _pair()
    frames = [json.loads(_trade(n)) for n in (1, 2, 3)]
    spellings = (json.dumps(frames[0]["data"]).encode(),
                 b' { "data" : ' + json.dumps(frames[1]["data"]).encode() + b' , "stream" : "x" } ',
                 json.dumps({"data": dict(reversed(frames[2]["data"].items()))}).encode())
    assert [decoder.decode(raw, 1, 1).seq for raw in spellings] == [1, 2, 3]
    assert not decoder.dropped


def test_decoder_with_all_kinds_counts_one_sequence_per_symbol():
    feeds = {"BTCUSDT": SymbolFeed(SYMBOL, 0), "ETHUSDT": SymbolFeed("ETH/USDT:USDT", 0)}
    decoder = FrameDecoder(feeds, 7)
    raws = [_trade(1), _quote(1), _mark(T0), _trade(1).replace(b"BTCUSDT", b"ETHUSDT"), _trade(2)]
    ticks = [decoder.decode(raw, 1, 1) for raw in raws]
    assert [(t.symbol[:3], t.seq) for t in ticks] == [
        ("BTC", 1), ("BTC", 2), ("BTC", 3), ("ETH", 1), ("BTC", 4)]


NO_PRICE = {
    "malformed": [
        b"", b"\xff\xfe", b"[]", b"null", b"{}", b'{"stream":"x"}', b"[" * 100_000, b'{"e":"trade"}',
        _trade(1)[:-1], _trade("one"), _trade(10**30), _trade(1, price="1e999"), _trade(1, price=""),
        _trade(1, at_ms=10**15), _trade(1, at_ms=-1)],
    "unknown_symbol": [_trade(1).replace(b"BTCUSDT", b"XRPUSDT")],
    "bad_price": [
        _trade(1, price="0"), _trade(1, price="-5"), _trade(1, price="nan"), _trade(1, price="inf"),
        _quote(1, bid="0.00"), _quote(1, B="nan"), _quote(1, A="-1"), _mark(T0, "0"), _mark(T0, "NaN")],
    "crossed": [_quote(1, bid="100.2", ask="100.1")],
    "other": [
        b'{"result":null,"id":1}', b'{"error":{"code":2,"msg":"no"},"id":1}', b'{"e":"kline"}',
        b'{"stream":"btcusdt@depth","data":{"e":"depthUpdate","b":[],"a":[]}}'],
}


@pytest.mark.parametrize("reason, raw", [(reason, raw) for reason, raws in NO_PRICE.items() for raw in raws],
                         ids=lambda value: repr(value)[:60])
def test_decoder_with_what_is_no_price_counts_its_reason_and_goes_on(reason, raw):
    decoder, _ = _pair()
    assert decoder.decode(raw, 1, 1) is None
    assert decoder.dropped == {reason: 1}
    assert decoder.samples[reason] == raw[:200]
    assert decoder.decode(_trade(2, at_ms=T0 + 1), 1, 1).seq == 1
    assert decoder.decode(_quote(2, at_ms=T0 + 1), 1, 1).seq == 2
    assert decoder.decode(_mark(T0 + 1), 1, 1).seq == 3


@given(st.one_of(st.binary(max_size=300), st.builds(
    lambda raw, at, byte: raw[:at % len(raw)] + bytes([byte]) + raw[at % len(raw) + 1:],
    st.sampled_from([_trade(1), _quote(1), _mark(T0)]), st.integers(0, 400), st.integers(0, 255))))
def test_decoder_with_any_bytes_never_raises_and_what_it_gives_can_be_encoded(raw):
    decoder, _ = _pair()
    tick = decoder.decode(raw, 1, 1)
    if tick is None:
        assert decoder.dropped.total() == 1
    else:
        assert math.isfinite(tick.price) and tick.price > 0
        assert decode_tick(encode(tick)) == tick


@pytest.mark.parametrize("kind", ["INSURANCE_FUND", "ADL", "NA"])
def test_decoder_with_trade_off_the_market_drops_it_and_misses_none(kind):
    decoder, feed = _pair()
    decoder.decode(_trade(1), 1, 1)
    raw = _trade(2, price="0" if kind == "NA" else "1000").replace(b'"MARKET"', f'"{kind}"'.encode())
    assert decoder.decode(raw, 1, 1) is None
    assert decoder.decode(_trade(3), 1, 1).seq == 2
    assert (decoder.dropped, feed.missed_trades) == ({"off_market": 1}, 0)
    assert feed.last == 61800.30


def test_decoder_with_frames_again_after_a_reconnect_tells_each_once():
    decoder, _ = _pair()
    raws = [_trade(n, at_ms=T0 + n // 2) for n in range(1, 11)]
    raws += [_quote(n, f"{60_000 + n}") for n in range(1, 11)]
    raws += [_mark(T0 + 1_000 * n) for n in range(3)]
    first = [decoder.decode(raw, 1, 1) for raw in raws]
    again = [decoder.decode(raw, 2, 2) for raw in raws]
    assert all(first) and not any(again)
    assert decoder.dropped == {"repeated": 23}
    assert decoder.decode(_trade(11, at_ms=T0 + 5), 1, 1).seq == 24


def test_decoder_with_hole_in_the_trade_ids_counts_the_missed():
    decoder, feed = _pair()
    for trade_id in (5, 6, 10, 11):
        decoder.decode(_trade(trade_id), 1, 1)
    assert feed.missed_trades == 3


def test_decoder_with_an_exchange_that_begins_anew_goes_on():
    # Ids from 1 again with later times, or the whole clock set back by more than a minute.
    decoder, _ = _pair()
    assert decoder.decode(_trade(1_000), 1, 1) and decoder.decode(_quote(1_000), 1, 1)
    assert decoder.decode(_mark(T0), 1, 1)
    assert decoder.decode(_trade(1, at_ms=T0 + 1), 1, 1)
    assert decoder.decode(_quote(1, "5", at_ms=T0 + 1), 1, 1)
    assert decoder.decode(_trade(1, at_ms=T0 - 61_000), 1, 1)
    assert decoder.decode(_mark(T0 - 61_000), 1, 1)
    assert not decoder.dropped


def test_decoder_with_quote_that_changed_nothing_is_alive_and_tells_nothing():
    decoder, feed = _pair()
    assert decoder.decode(_quote(1), 1, 1 * S)
    assert decoder.decode(_quote(2, at_ms=T0 + 1), 1, 2 * S) is None
    assert decoder.decode(_quote(3, at_ms=T0 + 2, B="2.6"), 1, 3 * S)
    assert decoder.decode(_quote(4, at_ms=T0 + 3, A="1"), 1, 3 * S)
    assert decoder.dropped == {"unchanged": 1}
    assert feed.ticks["quote"] == feed.seq == 3


def test_feed_without_a_mark_is_stale_from_the_start():
    _, feed = _pair()
    assert feed.condition(0, STALE_NS) == "stale"


def test_feed_with_trades_and_no_marks_is_stale():
    decoder, feed = _pair()
    decoder.decode(_mark(T0), 1, 0)
    for second in range(1, 10):
        decoder.decode(_trade(second, at_ms=T0 + second), 1, second * S)
    assert feed.condition(5 * S, STALE_NS) == "fresh"
    assert feed.condition(5 * S + 1, STALE_NS) == "stale"


def test_feed_with_marks_that_make_no_progress_is_stale():
    decoder, feed = _pair()
    for second in range(10):
        decoder.decode(_mark(T0), 1, second * S)
    assert feed.condition(9 * S, STALE_NS) == "stale"


def test_feed_with_marks_and_no_trades_is_quiet_and_a_trade_wakes_it():
    decoder, feed = _pair()
    for second in range(10):
        decoder.decode(_mark(T0 + second * 1_000), 1, second * S)
    assert feed.condition(9 * S, STALE_NS) == "quiet"
    decoder.decode(_trade(1), 1, 9 * S)
    assert feed.condition(9 * S, STALE_NS) == "fresh"


def test_stream_names_with_symbols_are_lower_case_and_symbol_by_symbol():
    assert stream_names(["BTCUSDT", "ETHUSDT"], ("trade", "bookTicker")) == [
        "btcusdt@trade", "btcusdt@bookTicker", "ethusdt@trade", "ethusdt@bookTicker"]


@pytest.mark.skipif(not RECORDING.is_file(), reason=f"recorded data is absent: {RECORDING} (TRADEHOST_DATA)")
def test_decoder_with_the_recording_gives_every_trade_and_quote_in_order_once():
    with gzip.open(RECORDING) as file:
        raws = [line.split(b" ", 1)[1].rstrip() for line in file]
    expected = []
    for raw in raws:  # an independent reading, by the standard library
        data = json.loads(raw).get("data", {})
        if data.get("e") == "trade":
            expected.append(("trade", float(data["p"]), float(data["q"]), None, None, None, None,
                             "sell" if data["m"] else "buy", data["T"] * 1_000_000))
        elif data.get("e") == "bookTicker":
            bid, bid_size, ask, ask_size = (float(data[key]) for key in "bBaA")
            expected.append(("quote", (bid + ask) / 2, 0.0, bid, bid_size, ask, ask_size, None,
                             data["T"] * 1_000_000))
    decoder, feed = _pair()
    began = time.perf_counter()
    ticks = [tick for raw in raws if (tick := decoder.decode(raw, 1, 1)) is not None]
    took = time.perf_counter() - began
    assert [(t.kind, t.price, t.size, t.bid, t.bid_size, t.ask, t.ask_size, t.side, t.exchange_ns)
            for t in ticks] == expected
    assert [t.seq for t in ticks] == list(range(1, len(ticks) + 1))
    assert feed.ticks == {"trade": 21_313, "quote": 66_089, "mark": 0}
    # 6,551 depth frames and one REST answer are no Ticks; nothing else is missing.
    assert decoder.dropped == {"other": 6_551, "malformed": 1} and feed.missed_trades == 0
    quotes = [(t.bid, t.bid_size, t.ask, t.ask_size) for t in ticks if t.kind == "quote"]
    assert all(a != b for a, b in pairwise(quotes)), "each of them changed price or size"
    print(f"{len(raws)} recorded frames, {len(ticks)} Ticks, {len(raws) / took:,.0f} frames/s decoded")
