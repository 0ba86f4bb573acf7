"""SupportResistanceStrategy on hand-made candles and Ticks, and on the synthetic market's planted levels."""

import json
from decimal import Decimal

import msgspec
import pytest

from bot.config import PaperConfig
from bot.model import Candle, Instrument, PositionReport, SignalOutcome, Target, Tick
from bot.paper_market import build_market
from bot.support_resistance import LevelBook, Settings, SupportResistanceStrategy

BTC = "BTC/USDT:USDT"
MINUTE = 60_000_000_000
SECOND = 1_000_000_000
START_NS = 1_000_000 * MINUTE
LOW, HIGH = 60_000.0, 60_300.0  # the range of the hand-made market, 0.5 %


def instrument(symbol=BTC, **changes):
    fields = {"symbol": symbol, "exchange_symbol": "X", "status": "TRADING",
              "price_increment": Decimal("0.10"), "qty_increment": Decimal("0.001"),
              "qty_min": Decimal("0.001"), "qty_max": Decimal(100), "notional_min": Decimal(100),
              "contract_size": Decimal(1), "settle": "USDT"}
    return Instrument(**{**fields, **changes})


def tick(price, at_ns, kind="trade", symbol=BTC, size=1.0):
    return Tick(symbol=symbol, kind=kind, price=price, size=size, bid=None, bid_size=None, ask=None,
                ask_size=None, side="buy", exchange_ns=at_ns, receive_ns=at_ns, run=1, seq=1)


def wave(minutes=60, low=LOW, high=HIGH):
    """Return candles before START_NS that swing between low and high, a turn each third minute."""
    prices = [low, (low + high) / 2, (low + high) / 2, high, (low + high) / 2, (low + high) / 2]
    return [Candle(START_NS - (minutes - n) * MINUTE, p, p + 5, p - 5, p, 1.0)
            for n, p in ((n, prices[n % 6]) for n in range(minutes))]


class Play:
    """The strategy with a flat position, and time that passes one second per trade."""

    def __init__(self, candles=None, position="0", **settings):
        self.strategy = SupportResistanceStrategy(
            {"notional": Decimal(1_000), "candles_min": 50, **settings}, {BTC: instrument()})
        self.strategy.on_history(BTC, wave() if candles is None else candles)
        self.now_ns = START_NS
        if position is not None:
            self.position(position)

    def position(self, qty, symbol=BTC):
        self.strategy.on_report(PositionReport(
            strategy="s", symbol=symbol, position_qty=Decimal(qty), entry_price=None, position_version=1,
            open_orders=0, unknown_orders=0, state="RUNNING", time_ns=0, executor_run=1))

    def trade(self, *prices, step_ns=SECOND):
        """Return the Targets that trades at these prices bring, None where there was none."""
        told = []
        for price in prices:
            self.now_ns += step_ns
            told.append(self.strategy.on_tick(tick(price, self.now_ns)))
        return told

    def levels(self):
        return [level.price for level in self.strategy._markets[BTC].book.levels]


def only(targets):
    found = [target for target in targets if target is not None]
    assert len(found) == 1
    return found[0]


# Levels

def book_of(candles, **settings):
    book = LevelBook(Settings(qty=Decimal(1), **settings))
    book.add_history(candles)
    return book


def test_levels_with_swings_at_two_prices_are_those_two():
    levels = book_of(wave()).levels
    assert [level.price for level in levels] == [LOW - 5, HIGH + 5]
    assert all(8 <= level.touches <= 10 for level in levels)


def test_levels_with_too_few_touches_do_not_count():
    candles = wave(20)
    assert len(book_of(candles, touches_min=2).levels) == 2
    assert book_of(candles, touches_min=4).levels == []


def test_levels_with_swings_apart_by_more_than_the_tolerance_are_not_one():
    near = book_of(wave(high=LOW * 1.0007), tolerance_pct=0.1).levels
    assert len(near) == 1, "0.07 % and the candles' 10 apart: one level"
    assert len(book_of(wave(high=LOW * 1.0015), tolerance_pct=0.1).levels) == 2


def test_levels_with_window_rolling_forget_old_swings():
    book = book_of(wave(60, low=50_000.0, high=50_250.0), window=60)
    assert [round(level.price, -2) for level in book.levels] == [50_000, 50_300]
    later = [msgspec.structs.replace(c, start_ns=c.start_ns + 60 * MINUTE) for c in wave(60)]
    book.add_history(later)
    assert [level.price for level in book.levels] == [LOW - 5, HIGH + 5]


def test_swing_with_its_newer_side_not_closed_is_no_level():
    """A swing low is known only `swing_candles` closed candles later."""
    prices = [5.0, 4.0, 3.0, 4.0, 5.0]
    candles = [Candle(START_NS + n * MINUTE, p, p, p, p, 1.0) for n, p in enumerate(prices)]
    assert book_of(candles[:4], touches_min=1).levels == []
    assert [level.price for level in book_of(candles, touches_min=1).levels] == [3.0]


def test_candles_with_trades_close_only_when_a_later_minute_has_come():
    book = book_of([])
    for second, price in ((0, 10.0), (20, 12.0), (40, 9.0), (59, 11.0)):
        book.add_tick(tick(price, START_NS + second * SECOND, size=2.0))
    book.add_tick(tick(99.0, START_NS + 59 * SECOND, kind="quote"))
    assert list(book.candles) == []
    book.add_tick(tick(99.0, START_NS + 60 * SECOND, kind="mark"))
    assert list(book.candles) == [Candle(START_NS, 10.0, 12.0, 9.0, 11.0, 8.0)]
    book.add_tick(tick(50.0, START_NS + 59 * SECOND))
    book.add_tick(tick(11.0, START_NS + 61 * SECOND))
    book.add_tick(tick(50.0, START_NS + 59 * SECOND))
    book.add_tick(tick(11.0, START_NS + 190 * SECOND))
    assert [c.start_ns for c in book.candles] == [START_NS, START_NS + MINUTE], "a late trade is left out"
    assert book.candles[1] == Candle(START_NS + MINUTE, 11.0, 11.0, 11.0, 11.0, 1.0)


def test_candles_with_history_that_overlaps_are_taken_once():
    candles = wave(10)
    book = book_of(candles)
    book.add_tick(tick(1.0, candles[-1].start_ns + 30 * SECOND))
    book.add_tick(tick(1.0, START_NS + 30 * SECOND))
    assert list(book.candles) == candles
    book.add_history(candles)
    assert list(book.candles) == candles


def test_levels_from_live_ticks_equal_those_from_history():
    """Same path: what the candles of trades make is what the same candles make as history."""
    live, candles = book_of([]), wave(60)
    for candle in candles:
        for n, price in enumerate((candle.open, candle.high, candle.low, candle.close)):
            live.add_tick(tick(price, candle.start_ns + n * 10 * SECOND, size=0.25))
    live.add_tick(tick(1.0, START_NS, kind="mark"))
    assert list(live.candles) == candles
    assert live.levels == book_of(candles).levels


# Entries

def test_long_with_support_touched_and_confirmed_is_entered():
    play = Play()
    assert play.trade(60_200.0, 60_100.0, 60_050.0, 60_000.0, 59_990.0, 60_010.0) == [None] * 6
    target = only(play.trade(60_015.0))  # 0.0417 % above the extreme 59,990
    level = Decimal(str(LOW - 5))
    assert (target.symbol, target.qty) == (BTC, Decimal("0.016")), "1,000 USDT, cut to the increment"
    assert target.stop_loss == Decimal("59905.0"), "0.15 % beyond the level, on the grid"
    assert target.stop_loss < level
    assert target.take_profit == Decimal("60275.0"), "half a band (30.0) before the resistance at 60,305"
    assert "support 59995" in target.reason
    assert "59990" in target.reason


def test_short_with_resistance_touched_and_confirmed_is_entered():
    play = Play()
    target = only(play.trade(60_100.0, 60_250.0, 60_310.0, 60_290.0, 60_280.0))
    assert target.qty == Decimal("-0.016")
    assert target.stop_loss == Decimal("60395.5")
    assert target.take_profit == Decimal("60025.1"), "half a band before the support at 59,995"
    assert "resistance 60305" in target.reason


@pytest.mark.parametrize("prices", [
    (60_200.0, 60_050.0, 60_073.0),  # not confirmed: 0.038 %
    (60_200.0, 60_040.0, 60_080.0),  # confirmed outside the band: too far from the level
    (60_000.0, 59_990.0, 60_020.0),  # began inside the band: nobody saw from where it came
    (60_200.0, 60_100.0, 60_060.0, 60_090.0),  # never touched
])
def test_touch_with_something_missing_is_not_entered(prices):
    assert not any(Play().trade(*prices))


def test_take_profit_with_opposite_level_near_keeps_the_least_reward():
    play = Play(candles=wave(high=LOW + 150), reward_min=2.0)
    target = only(play.trade(60_100.0, 60_050.0, 59_990.0, 60_015.0))
    assert target.take_profit == Decimal("60235.0"), "twice the 110 to the stop"


def test_take_profit_with_opposite_level_far_is_the_percentage():
    target = only(Play(take_profit_pct=0.2).trade(60_200.0, 59_990.0, 60_020.0))
    assert target.take_profit == Decimal("60140.0")


def test_entry_with_qty_setting_uses_it():
    play = Play(notional=None, qty=Decimal("0.123"))
    assert only(play.trade(60_200.0, 59_990.0, 60_020.0)).qty == Decimal("0.123")


def test_entry_with_notional_below_one_increment_is_left_for_the_runner_to_refuse():
    strategy = SupportResistanceStrategy({"notional": 100, "candles_min": 50},
                                         {BTC: instrument(qty_increment=Decimal(1))})
    play = Play()
    play.strategy = strategy
    strategy.on_history(BTC, wave())
    play.position("0")
    assert 0 < only(play.trade(60_200.0, 59_990.0, 60_020.0)).qty < 1


def test_break_with_price_beyond_the_band_drops_the_level_until_it_turns_there_again():
    play = Play()
    assert not any(play.trade(60_200.0, 60_000.0, 59_930.0, 60_200.0, 59_990.0, 60_020.0))
    assert play.levels() == [HIGH + 5]
    play.trade(60_200.0, step_ns=2 * MINUTE)
    assert play.levels() == [HIGH + 5], "old swings do not bring it back"
    for price in (60_100.0, 59_995.0, 60_100.0, 60_200.0, 60_200.0):
        play.trade(price, step_ns=MINUTE)
    assert play.levels() == [LOW - 5, HIGH + 5], "a new swing does"


def test_break_with_a_jump_across_the_band_drops_the_level():
    play = Play()
    play.trade(60_200.0, 59_900.0)
    assert play.levels() == [HIGH + 5]


def test_break_after_the_levels_were_made_anew_is_still_noticed():
    play = Play()
    play.trade(60_200.0, 60_000.0)
    play.trade(60_000.0, step_ns=MINUTE)  # closes a candle in the middle of the touch
    play.trade(59_930.0)
    assert play.levels() == [HIGH + 5]


# When it must not enter

TOUCH = (60_200.0, 60_050.0, 59_990.0, 60_020.0)


def test_entry_before_warm_up_is_not_made():
    assert not any(Play(candles=wave(49)).trade(*TOUCH))
    assert any(Play(candles=wave(50)).trade(*TOUCH))


def test_entry_without_history_is_not_made_before_enough_candles_were_built():
    play, entries = Play(candles=[], candles_min=50), []
    for minute in range(70):
        price = wave()[minute % 60].close
        entries.append(any(play.trade(price, price + 30, price, step_ns=20 * SECOND)))
    assert not any(entries[:50])
    assert any(entries[50:])


@pytest.mark.parametrize("position", [None, "0.5", "-0.5"])
def test_entry_with_a_position_or_none_reported_is_not_made(position):
    assert not any(Play(position=position).trade(*TOUCH))


def test_entry_after_an_entry_waits_for_the_cool_down():
    play = Play(cooldown_s=30)
    assert any(play.trade(*TOUCH))
    assert not any(play.trade(*TOUCH, *TOUCH))  # 8 s
    play.now_ns += 30 * SECOND
    assert any(play.trade(*TOUCH))


def test_exit_noticed_in_the_report_is_answered_with_one_flat_target_and_a_cool_down():
    play = Play(cooldown_s=30)
    assert any(play.trade(*TOUCH))
    play.position("0.016")
    play.now_ns += 300 * SECOND
    assert not any(play.trade(*TOUCH)), "in a position"
    play.position("0")
    assert play.trade(60_200.0, 60_200.0) == [Target(BTC, Decimal(0), reason="the position was closed"), None]
    assert not any(play.trade(*TOUCH))
    play.now_ns += 30 * SECOND
    assert any(play.trade(*TOUCH))


def test_reports_of_other_kinds_and_symbols_change_nothing():
    play = Play()
    play.position("5", symbol="ETH/USDT:USDT")
    play.strategy.on_report(SignalOutcome(strategy="s", run=1, seq=1, symbol=BTC, outcome="denied", reason="",
                                          filled_qty=Decimal(0), time_ns=0))
    assert any(play.trade(*TOUCH))


def test_decisions_with_the_future_cut_off_are_the_same():
    """No look-ahead: what is decided on a Tick does not depend on later ones."""
    ticks, price = [], 60_150.0
    for n in range(1_500):
        leg = 60_150 + 160 * (1 - abs(n % 120 - 60) / 30)
        price = leg + (n * 7919 % 13 - 6)
        ticks.append(tick(price, START_NS + n * SECOND))

    def decided(count):
        play = Play(cooldown_s=0)
        return [play.strategy.on_tick(t) for t in ticks[:count]]

    whole = decided(len(ticks))
    assert sum(target is not None for target in whole) >= 5
    for count in (100, 555, 1_200):
        assert decided(count) == whole[:count]


# Settings

@pytest.mark.parametrize(("settings", "text"), [
    ({}, "exactly one of qty and notional"),
    ({"qty": Decimal(1), "notional": 5}, "exactly one of qty and notional"),
    ({"qty": Decimal(0)}, "exactly one of qty and notional"),
    ({"notional": -5}, "exactly one of qty and notional"),
    ({"notional": 1_000, "tolerance": 1}, "unknown field `tolerance`"),
    ({"notional": 1_000, "window": 501}, "window"),
    ({"notional": 1_000, "tolerance_pct": 0}, "tolerance_pct"),
    ({"notional": 1_000, "tolerance_pct": "0.1"}, "tolerance_pct"),
    ({"notional": 1_000, "cooldown_s": Decimal("0.5")}, "cooldown_s"),
    ({"notional": 1_000, "candles_min": 101, "window": 100}, "candles_min must be at most window 100"),
    ({"notional": 1_000, "confirm_pct": Decimal("0.2")}, "confirm_pct must be at most tolerance_pct 0.1"),
    ({"notional": 1_000, "stop_pct": Decimal("0.1")}, "stop_pct must be above tolerance_pct 0.1"),
    ({"notional": 99}, "notional must be at least 100 for BTC"),
    ({"qty": Decimal("0.0005")}, "qty must be at least 0.001"),
    ({"qty": Decimal("0.0015")}, "multiple of 0.001"),
])
def test_settings_with_a_broken_rule_are_refused(settings, text):
    with pytest.raises(ValueError, match=text):
        SupportResistanceStrategy(settings, {BTC: instrument()})


# The synthetic market

SYMBOLS = {"BTCUSDT": BTC, "ETHUSDT": "ETH/USDT:USDT"}
TEN_MINUTES_MS = 600_000


def listed(entry):
    filters = {f["filterType"]: f for f in entry["filters"]}
    return instrument(SYMBOLS[entry["symbol"]], price_increment=Decimal(filters["PRICE_FILTER"]["tickSize"]),
                      qty_increment=Decimal(filters["LOT_SIZE"]["stepSize"]),
                      notional_min=Decimal(filters["MIN_NOTIONAL"]["notional"]))


def entries_on(seed, start_ms=1_760_000_000_000):
    """Trade ten minutes of the synthetic market; return (seconds since start, symbol, price) of entries."""
    market = build_market(PaperConfig(seed=seed), start_ms)
    market.advance(start_ms)
    instruments = {SYMBOLS[name]: listed(feed.contract.listing()) for name, feed in market.feeds.items()}
    play, entries, held = Play(), [], {}
    play.strategy = SupportResistanceStrategy({"notional": 1_000}, instruments)
    for name, symbol in SYMBOLS.items():
        rows = market.feeds[name].klines("1m", 501)[:-1]
        play.strategy.on_history(symbol, [Candle(row[0] * 10**6, *map(float, row[1:6])) for row in rows])
        play.position("0", symbol)
    for frame in market.advance(start_ms + TEN_MINUTES_MS):
        if not frame.stream.endswith("@trade"):
            continue
        trade = json.loads(frame.raw)
        symbol = SYMBOLS[trade["s"]]
        price = float(trade["p"])
        if symbol in held and not min(held[symbol]) < price < max(held[symbol]):
            del held[symbol]
            play.position("0", symbol)
        target = play.strategy.on_tick(tick(price, trade["T"] * 10**6, symbol=symbol, size=float(trade["q"])))
        if target is not None and target.qty:
            held[symbol] = (target.stop_loss, target.take_profit)
            play.position(target.qty, symbol)
            entries.append(((trade["T"] - start_ms) / 1_000, symbol, price))
    planted = {SYMBOLS[made.contract.symbol]: [float(level * made.contract.tick) for level in made.planted]
               for made in market.sources}
    return entries, planted


@pytest.mark.parametrize("seed", [1, pytest.param(2, marks=pytest.mark.drill)])
def test_entries_on_the_synthetic_market_lie_at_planted_levels(seed):
    entries, planted = entries_on(seed)
    assert entries[0][0] < 40, f"the first entry came after {entries[0][0]} s"
    honest = sum(min(abs(price / level - 1) for level in planted[symbol]) <= 0.0010
                 for _, symbol, price in entries)
    assert len(entries) >= 7
    assert honest >= 0.9 * len(entries), f"{honest} of {len(entries)} entries"
