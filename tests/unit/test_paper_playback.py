"""Recordings: raw to the byte, rebased without a seam, and refused when they are none."""

import gzip
import json
import os
import tracemalloc
import zipfile
from collections import Counter
from decimal import Decimal
from itertools import islice
from pathlib import Path

import ccxt
import pytest

from bot.config import PaperConfig
from bot.errors import ConfigError
from bot.paper_market import build_market

DATA = Path(os.environ.get("TRADEHOST_DATA") or Path(__file__).resolve().parents[3] / "shared" / "data")
HFT = DATA / "hftbacktest" / "usdm-btcusdt-20240808.gz"
CRYPTOFEED = DATA / "cryptofeed" / "BINANCE_FUTURES.ws.1.0"
NAMES = {"btcusdt@trade": b"trade", "btcusdt@bookTicker": b"bookTicker", "btcusdt@depth@100ms": b"depth@0ms"}
START_MS = 1_700_000_012_345
BTC = "BTCUSDT"


def recorded(path):
    if not path.exists():
        pytest.skip(f"the recording {path.name} is absent (TRADEHOST_DATA names its folder)")
    return path


def market(path, playback="rebased", start_ms=START_MS, speed=1, **more):
    return build_market(PaperConfig(market="recording", recording=str(path), playback=playback,
                                    speed=Decimal(speed)), start_ms, **more)


@pytest.fixture(scope="module")
def cut(tmp_path_factory):
    """The first 3,000 lines of the recording, 12 s, one trade among them of the insurance fund."""
    path = tmp_path_factory.mktemp("recording") / "cut.gz"
    with gzip.open(recorded(HFT), "rb") as whole, gzip.open(path, "wb", compresslevel=1) as part:
        lines = list(islice(whole, 3_000))
        at = next(i for i, line in enumerate(lines) if i > 500 and b"@trade" in line)
        event = json.loads(lines[at].split(b" ", 1)[1])["data"]
        lines[at] = lines[at].replace(b'"p":"' + event["p"].encode(), b'"p":"0').replace(b"MARKET", b"NA")
        part.writelines(lines)
    return path


def run(made, from_ms, to_ms, step_ms=100):
    frames = made.advance(from_ms)
    for now_ms in range(from_ms + step_ms, to_ms + 1, step_ms):
        frames += made.advance(now_ms)
    return frames


def kinds(frames, kind, symbol=BTC):
    return [json.loads(f.raw) for f in frames if f.stream == f"{symbol.lower()}@{kind}"]


def payloads(path, kind):
    with gzip.open(path, "rb") as file:
        found = [json.loads(line.split(b" ", 1)[1]) for line in file]
    return [line["data"] for line in found if line.get("stream", "").startswith(f"btcusdt@{kind}")]


def test_raw_at_full_speed_sends_every_byte_as_recorded_in_little_memory():
    made = market(recorded(HFT), "raw", speed=0)
    assert made.advance(1_000) == [] and not made.is_tradable
    made.begun_ms = 1_000
    counts, now_ms = Counter(), 1_000
    tracemalloc.start()
    with gzip.open(HFT, "rb") as file:
        expected = (line.split(b" ", 1)[1].rstrip(b"\n") for line in file)
        while frames := made.advance(now_ms, 700):
            now_ms += 1
            assert len(frames) <= 700 and {f.time_ms for f in frames} == {1_000}
            for frame in frames:
                wanted = next(expected)
                if not wanted.startswith(b'{"stream"'):
                    wanted = next(expected)
                assert b'{"stream":"btcusdt@%s","data":%s}' % (NAMES[frame.stream], frame.raw) == wanted
                counts[frame.stream] += 1
            if tracemalloc.is_tracing() and counts.total() > 30_000:  # 9 MB of them; tracing is slow
                assert tracemalloc.get_traced_memory()[1] < 4_000_000
                tracemalloc.stop()
        assert next(expected, None) is None
    assert counts == {"btcusdt@trade": 21_313, "btcusdt@bookTicker": 66_089, "btcusdt@depth@100ms": 6_551}
    assert made.advance(now_ms + 1) == []


def test_raw_at_speed_keeps_the_recorded_pace(cut):
    with gzip.open(cut, "rb") as file:
        stamps = [int(line.split(b" ")[0]) for line in file if b"lastUpdateId" not in line]
    for speed in (1, 10):
        made = market(cut, "raw", speed=speed)
        made.begun_ms = 5_000
        frames = run(made, 5_000, 5_050 + (stamps[-1] - stamps[0]) // 1_000_000 // speed, 50)
        assert len(frames) == len(stamps) and not made.advance(1 << 60)
        for frame, stamp in zip(frames, stamps, strict=True):
            assert abs(frame.time_ms - 5_000 - (stamp - stamps[0]) / 1e6 / speed) <= 1
    assert set(made.feeds) == {BTC} and made.feeds[BTC].klines("1m", 500) == []
    assert 61_000 < made.feeds[BTC].mark() < 62_000


def test_raw_of_the_other_format_sends_every_byte():
    made = market(recorded(CRYPTOFEED), "raw", speed=0)
    made.begun_ms = 1
    frames = []
    while part := made.advance(2, 500):
        frames += part
    lines = CRYPTOFEED.read_bytes().splitlines()[1:]
    assert all(b",\"data\":%s}" % f.raw in line for f, line in zip(frames, lines, strict=True))
    assert len(frames) == 1_535 and {f.raw[:1] + f.raw[-1:] for f in frames} == {b"{}"}
    assert len(made.feeds) == 4


def test_rebased_over_two_seams_is_seamless(cut):
    made = market(cut)
    frames = run(made, START_MS, START_MS + 30_000)
    trades = kinds(frames, "trade")
    recorded_count = len(payloads(cut, "trade"))
    assert recorded_count * 2 < len(trades)
    assert [t["t"] for t in trades] == list(range(trades[0]["t"], trades[0]["t"] + len(trades)))
    aggregates = [a["a"] for a in kinds(frames, "aggTrade")]
    assert aggregates == [t["t"] for t in trades if t["X"] == "MARKET"]
    diffs = kinds(frames, "depth@100ms")
    assert all(b["pu"] == a["u"] for a, b in zip(diffs, diffs[1:], strict=False))
    updates = [q["u"] for q in kinds(frames, "bookTicker")]
    assert updates == sorted(updates)
    assert all(json.loads(f.raw)["E"] <= f.time_ms <= START_MS + 30_000 for f in frames)
    assert all(a.time_ms <= b.time_ms for a, b in zip(frames, frames[1:], strict=False))


def test_rebased_with_the_recording_differs_by_constants_only(cut):
    made = market(cut)
    frames = run(made, START_MS, START_MS + 8_000)
    for kind, ids in (("trade", {"t"}), ("bookTicker", {"u"}), ("depth@100ms", {"U", "u", "pu"})):
        sent = kinds(frames, kind)
        originals = payloads(cut, kind.split("@")[0])
        first = next(i for i, o in enumerate(originals) if all(o[key] == sent[0][key] for key in ids))
        shift = sent[0]["E"] - originals[first]["E"]
        assert shift % 1_000 == 0 and len(sent) > 100
        for new, old in zip(sent, originals[first:], strict=False):
            assert new == {**old, "E": old["E"] + shift, "T": old["T"] + shift}
    assert START_MS - 1_000 <= kinds(frames, "depth@100ms")[0]["E"] <= START_MS + 2_500


def test_rebased_with_a_trade_of_the_insurance_fund_makes_no_price_of_it(cut):
    made = market(cut)
    frames = run(made, START_MS, START_MS + 9_000)
    odd = [t for t in kinds(frames, "trade") if t["X"] != "MARKET"]
    assert len(odd) == 1 and odd[0]["p"] == "0"
    assert all(t.price > 0 for t in made.feeds[BTC].trades)
    assert all(Decimal(row[3]) > 61_000 for row in made.feeds[BTC].klines("1m", 10))


def test_rebased_book_with_a_client_that_follows_is_equal_over_the_seam(cut):
    made = market(cut)
    made.advance(START_MS)
    snapshot = made.feeds[BTC].book()
    book = [dict(snapshot.bids), dict(snapshot.asks)]
    last = None
    for now_ms in range(START_MS + 100, START_MS + 20_000, 100):
        for event in kinds(made.advance(now_ms), "depth@100ms"):
            if event["u"] < snapshot.last_update_id:
                continue
            first_id = snapshot.last_update_id
            assert event["pu"] == last or (last is None and (
                event["U"] <= first_id <= event["u"] or event["pu"] == first_id))
            last = event["u"]
            for side, changes in zip(book, (event["b"], event["a"]), strict=True):
                for price, qty in changes:
                    side[Decimal(price)] = Decimal(qty)
        if now_ms % 1_000 // 100 == START_MS % 1_000 // 100:
            theirs = made.feeds[BTC].book(100_000)
            assert [{p: q for p, q in side.items() if q} for side in book] == [
                dict(theirs.bids), dict(theirs.asks)]
            assert theirs.bids[0][0] < theirs.asks[0][0]
            assert theirs.last_update_id == (last or theirs.last_update_id)


def test_rebased_after_a_restart_goes_on_in_the_same_loop(cut):
    made = market(cut)
    frames = run(made, START_MS, START_MS + 20_000)
    at_ms = START_MS + 13_000
    again = market(cut)
    after = run(again, at_ms, START_MS + 20_000)
    kept = ("trade", "depth@100ms", "bookTicker", "aggTrade", "kline_1m")
    for kind in kept:
        assert kinds(after, kind) == kinds([f for f in frames if f.time_ms > at_ms], kind)
    assert again.feeds[BTC].book() == made.feeds[BTC].book()
    assert again.feeds[BTC].klines("1m", 500) == made.feeds[BTC].klines("1m", 500)


def test_rebased_history_with_loops_before_the_start_has_the_recordings_extremes(cut):
    made = market(cut)
    made.advance(START_MS)
    rows = made.feeds[BTC].klines("1m", 500)
    prices = [Decimal(t["p"]) for t in payloads(cut, "trade") if t["X"] == "MARKET"]
    assert len(rows) >= 499 and all(b[0] - a[0] == 60_000 for a, b in zip(rows, rows[1:], strict=False))
    assert {row[2] for row in rows[5:-5]} == {str(max(prices[4:]))}
    assert {row[3] for row in rows[5:-5]} == {str(min(prices[4:]))}
    assert Decimal(rows[-1][4]) == prices[-1], "and the last one ends where the recording does"


def test_rebased_candles_with_the_trades_agree(cut):
    made = market(cut)
    frames = run(made, START_MS, START_MS + 120_000, 500)
    closed = [k["k"] for k in kinds(frames, "kline_1m") if k["k"]["x"]]
    assert len(closed) == 2
    trades = [t for t in kinds(frames, "trade")
              if closed[1]["t"] <= t["T"] <= closed[1]["T"] and t["X"] == "MARKET"]
    prices = [Decimal(t["p"]) for t in trades]
    assert [Decimal(closed[1][key]) for key in "ohlc"] == [prices[0], max(prices), min(prices), prices[-1]]
    assert closed[1]["n"] == len(trades)
    marks = [m["E"] for m in kinds(frames, "markPrice@1s")]
    assert marks == list(range(marks[0], marks[0] + len(marks) * 1_000, 1_000)) and len(marks) >= 119
    mark = Decimal(kinds(frames, "markPrice@1s")[-1]["p"])
    assert abs(mark / made.feeds[BTC].last() - 1) < Decimal("0.001")


def test_rebased_consume_with_the_best_bid_inserts_a_trade(cut):
    made = market(cut)
    run(made, START_MS, START_MS + 3_000)
    bids = made.feeds[BTC].book().bids
    ids = made.feeds[BTC].consume("SELL", bids[:1])
    assert made.feeds[BTC].book().bids[0] == bids[1]
    last = made.feeds[BTC].trades[-2].trade_id
    assert ids == [last + 1]
    trades = kinds(run(made, START_MS + 3_000, START_MS + 5_000), "trade")
    assert [t["t"] for t in trades] == list(range(ids[0], ids[0] + len(trades)))
    again = market(cut, trade_ids={BTC: ids[0] + 10_000})
    again.advance(START_MS + 5_000)
    frames = run(again, START_MS + 5_100, START_MS + 6_000)
    assert kinds(frames, "trade")[0]["t"] == ids[0] + 10_001


def test_rebased_symbols_with_ccxt_have_the_recorded_increments(cut):
    parsed = ccxt.binanceusdm().parse_markets([market(cut).feeds[BTC].contract.listing()])[0]
    assert parsed["symbol"] == "BTC/USDT:USDT"
    assert (parsed["precision"]["price"], parsed["precision"]["amount"]) == (0.1, 0.001)


def test_rebased_without_a_rest_answer_makes_a_book_around_the_quotes():
    made = market(recorded(CRYPTOFEED))
    frames = run(made, START_MS, START_MS + 40_000)
    for symbol in ("SUSHIUSDT", "AKROUSDT", "KEEPUSDT", "CTKUSDT"):
        diffs = kinds(frames, "depth@100ms", symbol)
        assert all(b["pu"] == a["u"] for a, b in zip(diffs, diffs[1:], strict=False)) and len(diffs) > 30
        assert [t["t"] for t in kinds(frames, "trade", symbol)] == [
            a["a"] for a in kinds(frames, "aggTrade", symbol)]
        best, quote = made.feeds[symbol].book(1), kinds(frames, "bookTicker", symbol)[-1]
        assert (best.bids[0][0], best.asks[0][0]) == (Decimal(quote["b"]), Decimal(quote["a"]))
    shifted = kinds(frames, "aggTrade", "SUSHIUSDT")
    assert all(b["f"] == a["l"] + 1 for a, b in zip(shifted, shifted[1:], strict=False))


CSV = """agg_trade_id,price,quantity,first_trade_id,last_trade_id,transact_time,is_buyer_maker
100,61800.1,0.010,500,502,1723161256100,false
101,61800.0,1.5,503,503,1723161256400,true
102,61805.2,0.002,504,509,1723161257900,false
"""


@pytest.mark.parametrize("has_header", [True, False])
@pytest.mark.parametrize("is_zip", [True, False])
def test_rebased_of_the_public_csv_trades_at_its_prices(tmp_path, has_header, is_zip):
    text = CSV if has_header else CSV.split("\n", 1)[1]
    path = tmp_path / "BTCUSDT-aggTrades-2024-08-08.csv"
    path.write_text(text)
    if is_zip:
        with zipfile.ZipFile(path.with_suffix(".zip"), "w") as archive:
            archive.write(path, path.name)
        path = path.with_suffix(".zip")
    made = market(path)
    frames = run(made, START_MS, START_MS + 8_000)
    trades = kinds(frames, "trade")
    assert [t["t"] for t in trades] == list(range(100, 100 + len(trades))) and len(trades) >= 9
    assert [(t["p"], t["q"], t["m"]) for t in trades[3:6]] == [
        ("61800.1", "0.010", False), ("61800.0", "1.500", True), ("61805.2", "0.002", False)]
    assert [(a["f"], a["l"]) for a in kinds(frames, "aggTrade")][2:4] == [(504, 509), (510, 512)]
    book = made.feeds[BTC].book()
    assert book.bids[0][0] < book.asks[0][0] and len(book.bids) > 20
    assert made.feeds[BTC].contract.listing()["filters"][0]["tickSize"] == "0.1"


@pytest.mark.parametrize("content", [b"", b"hello\n", b"\x1f\x8bnot gzip", b"1 {broken\n", None])
@pytest.mark.parametrize("playback", ["raw", "rebased"])
def test_recording_with_no_frames_is_a_config_error(tmp_path, content, playback):
    path = tmp_path / "broken.gz"
    if content is not None:
        path = path if content.startswith(b"\x1f") else path.with_suffix(".txt")
        path.write_bytes(content)
    with pytest.raises(ConfigError, match="recording"):
        market(path, playback)


def test_raw_of_the_public_csv_is_a_config_error(tmp_path):
    path = tmp_path / "BTCUSDT-aggTrades-2024-08-08.csv"
    path.write_text(CSV)
    with pytest.raises(ConfigError, match="raw"):
        market(path, "raw")
