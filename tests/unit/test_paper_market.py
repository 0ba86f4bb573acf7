"""The synthetic market: the same for the same seed, honest about its levels, and followed by its frames."""

import json
import sys
from collections import Counter
from copy import deepcopy
from decimal import Decimal
from functools import lru_cache
from itertools import pairwise

import ccxt
import pytest

from bot.config import PaperConfig
from bot.paper_feed import CANDLES, FUNDING_RATE, GRID_MS, INTERVALS, MINUTES_MAX
from bot.paper_market import LOOP_MS, build_market, canonical_stream

START_MS = 1_700_000_012_345
BTC = "BTCUSDT"


built = lru_cache(lambda seed: build_market(PaperConfig(seed=seed), START_MS))


def market(seed=1):
    """Return a fresh market: a copy of one that took half a second; they share what never changes."""
    made = built(seed)
    return deepcopy(made, {id(part): part for part in (*made.sources, made._seconds)})


def source_of(made, symbol=BTC):
    return next(source for source in made.sources if source.contract.symbol == symbol)


def run(made, from_ms, to_ms, step_ms=100):
    frames = made.advance(from_ms)
    for now_ms in range(from_ms + step_ms, to_ms + 1, step_ms):
        frames += made.advance(now_ms)
    return frames


def kinds(frames, kind, symbol=BTC):
    return [json.loads(f.raw) for f in frames if f.stream == f"{symbol.lower()}@{kind}"]


@pytest.fixture(scope="module")
def minutes():
    """Five minutes of frames, from the start on."""
    made = market()
    return made, run(made, START_MS, START_MS + 300_000, 500)


def test_frames_with_any_pace_of_advance_are_byte_equal():
    whole = run(market(), START_MS, START_MS + 20_000, 20_000)
    small = run(market(), START_MS, START_MS + 20_000, 37)
    few, made = [], market()
    made.advance(START_MS)
    while part := made.advance(START_MS + 20_000, 7):
        assert len(part) <= 7
        few += part
    assert few == whole
    assert small == [f for f in whole if f.time_ms <= small[-1].time_ms] and len(small) > 1_000


def test_frames_with_another_seed_or_start_differ():
    first = [f.raw for f in run(market(), START_MS, START_MS + 2_000)]
    assert first != [f.raw for f in run(market(seed=2), START_MS, START_MS + 2_000)]
    assert source_of(market(seed=2)).planted != source_of(market()).planted


def test_frames_after_a_restart_go_on_where_the_clock_is(minutes):
    _, before = minutes
    at_ms = START_MS + 200_000
    again = market()
    after = run(again, at_ms, at_ms + 50_000, 250)
    expected = [f for f in before if after[0].time_ms <= f.time_ms <= at_ms + 50_000]
    assert after == expected
    closed = again.feeds[BTC].klines("1m", 3)[0]
    assert closed == minutes[0].feeds[BTC].klines("1m", 1, start_ms=closed[0])[0]


def test_start_a_month_later_costs_no_simulation():
    made = market()
    later = START_MS + 30 * 86_400_000
    assert made.advance(later) == []
    assert sum(f.stream.startswith("btcusdt@") for f in made.advance(later + 1_000)) > 20


def test_frames_with_their_times_are_in_order_and_due(minutes):
    _, frames = minutes
    assert all(a.time_ms <= b.time_ms for a, b in zip(frames, frames[1:], strict=False))
    assert all(json.loads(f.raw)["E"] == f.time_ms for f in frames)


def test_trades_with_both_streams_are_numbered_without_a_hole(minutes):
    _, frames = minutes
    for symbol in (BTC, "ETHUSDT"):
        ids = [t["t"] for t in kinds(frames, "trade", symbol)]
        assert ids == list(range(ids[0], ids[0] + len(ids))) and len(ids) > 2_500
        assert [a["a"] for a in kinds(frames, "aggTrade", symbol)] == ids


def test_loop_with_its_seam_goes_on_without_a_hole_and_without_a_jump():
    made, seam_ms = market(), START_MS // 1_000 * 1_000 + 1_000 + LOOP_MS
    frames = run(made, seam_ms - 5_000, seam_ms + 5_000, 500)
    for symbol in (BTC, "ETHUSDT"):
        trades = kinds(frames, "trade", symbol)
        assert [t["t"] for t in trades] == [*range(trades[0]["t"], trades[0]["t"] + len(trades))]
        assert min(t["T"] for t in trades) < seam_ms < max(t["T"] for t in trades)
        assert all(abs(float(b["p"]) / float(a["p"]) - 1) < 0.0003 for a, b in pairwise(trades))


def test_mark_price_in_a_gap_goes_on_each_second(minutes):
    _, frames = minutes
    for symbol in (BTC, "ETHUSDT"):
        marks = [m["E"] for m in kinds(frames, "markPrice@1s", symbol)]
        assert marks == list(range(marks[0], marks[0] + 300_000, 1_000))
        assert all(m["T"] % 28_800_000 == 0 for m in kinds(frames, "markPrice@1s", symbol))


def test_market_over_half_an_hour_has_bursts_and_gaps():
    made = market()
    times = [at for at, *_ in source_of(made).trades]
    bursts = Counter(at // 100 for at in times)
    silences = [b - a for a, b in zip(times, times[1:], strict=False) if b - a > 3_500]
    assert max(bursts.values()) >= 35
    assert 1 <= len(silences) <= 6 and max(silences) < 8_000


def test_price_after_the_start_touches_levels_again_and_again():
    for seed in (1, 2, 3):
        made = market(seed=seed)
        for symbol in (BTC, "ETHUSDT"):
            touches = touches_of(made, symbol, 600)
            assert 15_000 <= touches[0] <= 30_000
            waits = [b - a for a, b in zip(touches, touches[1:], strict=False)]
            assert max(waits) <= 90_000 and len(touches) >= 8


def levels_of(made, symbol):
    made = source_of(made, symbol)
    return [level * made.contract.tick for level in made.planted]


def touches_of(made, symbol, seconds):
    """When the path came within 0.02 % of a level, having been 0.1 % away from it before."""
    hour = source_of(made, symbol)
    found, near = [], None
    for offset in range(0, seconds * 1_000, 200):
        price = hour.path[offset // GRID_MS]
        level = min(hour.planted, key=lambda at: abs(at - price))
        if abs(level / price - 1) < 0.0002 and near != level:
            found.append(offset)
            near = level
        elif near and abs(near / price - 1) > 0.001:
            near = None
    return found


def turns_of(prices, reversal):
    """Return the extremes of a zigzag: where the price turned by more than `reversal`."""
    found, extreme, direction = [], prices[0], 1
    for price in prices:
        if (price - extreme) * direction > 0:
            extreme = price
        elif abs(price / extreme - 1) > reversal:
            found.append(extreme)
            direction, extreme = -direction, price
    return found[1:]  # the first one is where the prices began


def share_near(prices, levels, tolerance):
    return sum(min(abs(float(level) / price - 1) for level in levels) <= tolerance
               for price in prices) / len(prices)


def test_trades_with_a_naive_swing_detector_turn_at_the_planted_levels(minutes):
    made, frames = minutes
    for symbol in (BTC, "ETHUSDT"):
        turns = turns_of([float(t["p"]) for t in kinds(frames, "trade", symbol)], 0.0015)
        assert len(turns) >= 3
        assert share_near(turns, levels_of(made, symbol), 0.0004) == 1


def test_history_with_a_naive_swing_detector_turns_at_the_planted_levels(minutes):
    made, fresh = minutes[0], market()
    fresh.advance(START_MS)
    rows = fresh.feeds[BTC].klines("1m", 500)
    assert len(rows) == 500 and all(b[0] - a[0] == 60_000 for a, b in zip(rows, rows[1:], strict=False))
    swings = []
    for i in range(2, len(rows) - 2):
        around = rows[i - 2:i + 3]
        high, low = float(rows[i][2]), float(rows[i][3])
        swings += [high] if high == max(float(row[2]) for row in around) else []
        swings += [low] if low == min(float(row[3]) for row in around) else []
    assert len(swings) > 100
    assert share_near(swings, levels_of(made, BTC), 0.0005) > 0.97


def test_candles_with_the_frames_are_made_of_the_trades(minutes):
    made, frames = minutes
    closed = [k["k"] for k in kinds(frames, "kline_1m") if k["k"]["x"]]
    assert len(closed) == 5
    rows = {row[0]: row for row in made.feeds[BTC].klines("1m", 6)}
    for candle in closed[1:]:
        trades = [t for t in kinds(frames, "trade") if candle["t"] <= t["T"] <= candle["T"]]
        prices = [Decimal(t["p"]) for t in trades]
        assert [Decimal(candle[key]) for key in "ohlc"] == [prices[0], max(prices), min(prices), prices[-1]]
        assert Decimal(candle["v"]) == sum(Decimal(t["q"]) for t in trades)
        assert (candle["n"], candle["f"], candle["L"]) == (len(trades), trades[0]["t"], trades[-1]["t"])
        assert rows[candle["t"]][1:6] == [candle[key] for key in "ohlcv"]
    grid_ms = START_MS // 500 * 500
    made = market()
    running = kinds(run(made, grid_ms, grid_ms + 5_000), "kline_1m")[-1]["k"]
    assert made.feeds[BTC].klines("1m", 1)[0][1:6] == [running[key] for key in "ohlcv"]


def test_klines_with_span_and_interval_are_cut_as_asked(minutes):
    made, _ = minutes
    rows = made.feeds[BTC].klines("1m", 500)
    assert made.feeds[BTC].klines("1m", 3, start_ms=rows[-9][0] - 1) == rows[-9:-6]
    assert made.feeds[BTC].klines("1m", 2, end_ms=rows[-5][0]) == rows[-6:-4]
    five = made.feeds[BTC].klines("5m", 2)[0]
    parts = [row for row in rows if five[0] <= row[0] < five[0] + 300_000]
    assert five[2] == max(row[2] for row in parts) and five[8] == sum(row[8] for row in parts)
    assert made.feeds[BTC].ticker()["count"] >= sum(row[8] for row in rows)
    with pytest.raises(KeyError):
        made.feeds[BTC].klines("7m", 1)


def python_calls(action):
    """Return how many functions of Python an action calls: what it costs, on any machine."""
    names = []
    sys.setprofile(lambda frame, event, arg: names.append(frame.f_code.co_name) if event == "call" else None)
    try:
        action()
    finally:
        sys.setprofile(None)
    return len(names)


def test_candle_of_a_month_costs_hardly_more_than_that_of_a_minute():
    made = market()
    made.advance(START_MS + 3 * 86_400_000)
    feed = made.feeds[BTC]
    assert len(feed.minutes) == MINUTES_MAX
    costs = {name: python_calls(lambda: feed.klines(name, 1)) for name in INTERVALS}
    assert max(costs.values()) < 2 * costs["1m"] < 100, costs
    assert feed.klines("1M", 1)[0][8] > 1_000 * feed.klines("1m", 1)[0][8], "it is of all of them"


def test_kline_streams_of_all_intervals_cost_little_beside_the_market():
    costs = []
    for wanted in ({"kline_1m"}, CANDLES):
        made = market()
        made.advance(START_MS)
        for feed in made.feeds.values():
            feed.wanted |= {*wanted}
        costs.append(python_calls(lambda: made.advance(START_MS + 2_000)))
    assert costs[0] > 1_000 and costs[1] < 5 * costs[0], costs


class Follower:
    """A client that keeps a book as the exchange's documentation says, strictly."""

    def __init__(self):
        self.events, self.book, self.last = [], None, None

    def take(self, frames, symbol=BTC):
        self.events += kinds(frames, "depth@100ms", symbol)
        if self.book is not None:
            self.apply()

    def sync(self, snapshot):
        self.book = [{str(p): q for p, q in side} for side in (snapshot.bids, snapshot.asks)]
        self.events = [e for e in self.events if e["u"] >= snapshot.last_update_id]
        self.first_id = snapshot.last_update_id
        self.apply()

    def apply(self):
        for event in self.events:
            if self.last is None:
                assert event["U"] <= self.first_id <= event["u"] or event["pu"] == self.first_id
            else:
                assert event["pu"] == self.last
            self.last = event["u"]
            for side, changes in zip(self.book, (event["b"], event["a"]), strict=True):
                for price, qty in changes:
                    side[price] = Decimal(qty)
                    if not side[price]:
                        del side[price]
        self.events = []

    def same_as(self, book):
        mine = [{Decimal(p): q for p, q in side.items()} for side in self.book]
        return mine == [dict(book.bids), dict(book.asks)]


def test_book_with_a_client_that_follows_the_diffs_is_equal():
    made, follower = market(), Follower()
    start_ms = START_MS // 100 * 100
    made.advance(start_ms)
    follower.take(run(made, start_ms + 100, start_ms + 700))
    follower.sync(made.feeds[BTC].book())
    for step in range(8, 900):
        follower.take(made.advance(start_ms + 100 * step))
        if step % 40 == 0:
            assert follower.same_as(made.feeds[BTC].book())
            book = made.feeds[BTC].book()
            assert book.bids[0][0] < book.asks[0][0]
            assert book.bids == sorted(book.bids, reverse=True) and book.asks == sorted(book.asks)
    assert follower.last is not None


def test_quotes_with_the_diffs_show_the_same_best():
    made, follower = market(), Follower()
    start_ms = START_MS // 100 * 100
    made.advance(start_ms)
    follower.sync(made.feeds[BTC].book())
    best = None
    for step in range(1, 300):
        frames = made.advance(start_ms + 100 * step)
        follower.take(frames)
        if quotes := kinds(frames, "bookTicker"):
            best = quotes[-1]
            assert Decimal(best["B"]) == follower.book[0][best["b"]]
        if best:
            assert max(map(Decimal, follower.book[0])) == Decimal(best["b"])
            assert min(map(Decimal, follower.book[1])) == Decimal(best["a"])


def test_consume_with_the_best_asks_takes_depth_that_heals():
    made = market()
    start_ms = START_MS // 100 * 100
    before = run(made, start_ms, start_ms + 20_000)
    asks = made.feeds[BTC].book().asks
    ids = made.feeds[BTC].consume("BUY", [asks[0], (asks[1][0], asks[1][1] / 2)])
    now = made.feeds[BTC].book()
    assert now.asks[0][0] == asks[1][0] and now.asks[0][1] < asks[1][1]
    assert kinds(before, "trade")[-1]["t"] + 1 == ids[0]
    assert [t.trade_id for t in made.feeds[BTC].trades][-2:] == ids
    assert made.feeds[BTC].last() == asks[1][0]
    after = run(made, start_ms + 20_000, start_ms + 30_000)
    trades = kinds(after, "trade")
    assert [t["t"] for t in trades] == list(range(ids[0], ids[0] + len(trades)))
    assert not trades[0]["m"] and trades[0]["p"] == str(asks[0][0])
    untouched = market()
    run(untouched, start_ms, start_ms + 30_000)
    assert made.feeds[BTC].book().asks == untouched.feeds[BTC].book().asks
    mine, theirs = made.feeds[BTC].klines("1m", 2), untouched.feeds[BTC].klines("1m", 2)
    assert sum(row[8] for row in mine) == sum(row[8] for row in theirs) + 2


def test_book_after_consumption_is_followed_by_the_diffs():
    made, follower = market(), Follower()
    start_ms = START_MS // 100 * 100
    made.advance(start_ms)
    follower.sync(made.feeds[BTC].book())
    for step in range(1, 60):
        follower.take(made.advance(start_ms + 100 * step))
        assert follower.same_as(made.feeds[BTC].book())
        if step % 10 == 0:
            made.feeds[BTC].consume("SELL", made.feeds[BTC].book().bids[:3])


def test_trade_ids_after_a_restart_stay_above_the_ledger():
    made = market()
    made.advance(START_MS + 1_000)
    booked = made.feeds[BTC].trades[-1].trade_id + 5_000
    again = build_market(PaperConfig(), START_MS, {BTC: booked})
    frames = run(again, START_MS + 1_000, START_MS + 2_000)
    assert kinds(frames, "trade")[0]["t"] == booked + 1


def test_prices_with_mark_and_index_stay_near_the_last(minutes):
    made, _ = minutes
    for symbol in (BTC, "ETHUSDT"):
        last = made.feeds[symbol].last()
        assert abs(made.feeds[symbol].mark() / last - 1) < Decimal("0.002")
        assert abs(made.feeds[symbol].index() / last - 1) < Decimal("0.003")
    rate, next_ms = FUNDING_RATE, made.feeds[BTC].funding_ms()
    assert rate == Decimal("0.0001") and next_ms % 28_800_000 == 0


def test_symbols_with_ccxt_are_parsed_as_markets():
    exchange = ccxt.binanceusdm()
    listings = [feed.contract.listing() for feed in market().feeds.values()]
    parsed = {m["symbol"]: m for m in exchange.parse_markets(listings)}
    btc, eth = parsed["BTC/USDT:USDT"], parsed["ETH/USDT:USDT"]
    assert (btc["precision"]["price"], btc["precision"]["amount"]) == (0.1, 0.001)
    assert (eth["precision"]["price"], eth["precision"]["amount"]) == (0.01, 0.001)
    assert btc["swap"] and btc["linear"] and btc["active"] and btc["contractSize"] == 1
    assert (btc["limits"]["cost"]["min"], eth["limits"]["cost"]["min"]) == (100, 20)
    assert btc["limits"]["market"]["max"] == 2_000


@pytest.mark.parametrize(("name", "canonical"), [
    ("BTCUSDT@depth", "btcusdt@depth@100ms"), ("btcusdt@depth@0ms", "btcusdt@depth@100ms"),
    ("btcusdt@markPrice", "btcusdt@markPrice@1s"), ("btcusdt@trade", "btcusdt@trade"),
    ("btcusdt@kline_1m", "btcusdt@kline_1m")])
def test_canonical_stream_with_a_subscription_names_the_frames(name, canonical):
    assert canonical_stream(name) == canonical
