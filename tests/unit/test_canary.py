"""The canary: green, red and silent answers, what is left behind, and what it asks for."""

import asyncio
from types import SimpleNamespace

import msgspec
import pytest

from bot.canary import AGAIN_S, TRIES_MAX, Canary
from bot.errors import ExchangeError
from bot.log import Log
from bot.orders import CANARY_PREFIX, PREFIX
from bot.outcome import Answer
from tests.factory import BTC, ETH, D, HandClock, holding, instrument

PERIOD_S = 300


def answer(status=200, code=0, msg="", **fields):
    body = {"code": code, "msg": msg} if code else fields
    return Answer(status=status, body=msgspec.json.encode(body), is_sent=True)


class Bench:
    """A canary; this is the exchange, and answers what the test put into `answers`."""

    def __init__(self, held="0", symbols=(BTC,), mark="100"):
        self.clock, self.sent, self.canceled, self.answers = HandClock(), [], [], []
        self.instruments = {BTC: instrument(), ETH: instrument(symbol=ETH)}
        self.cancels = []
        self.open, self.refused, self.symbols, self.mark = [], "", symbols, mark and D(mark)
        self.it = Canary(
            self.clock, Log("executor", self.clock), period_s=PERIOD_S, exchange=self, books=holding(held),
            symbols=lambda: self.symbols, mark_of=lambda symbol: self.mark)

    def refusal(self, action):
        return self.refused

    def build(self, request):
        self.sent.append(request)
        return request

    async def submit(self, request):
        told = self.answers.pop(0) if self.answers else None
        if isinstance(told, Exception):
            raise told
        return told or answer(algoId=1, clientAlgoId=request.client_order_id, algoStatus="NEW")

    async def open_orders(self, symbol):
        return self.open

    async def cancel(self, symbol, name, *, is_conditional):
        self.canceled.append((symbol, name, is_conditional))
        return self.cancels.pop(0) if self.cancels else answer()

    def fly(self, *answers, after_s=10**6):
        self.clock.step(after_s)
        self.answers = list(answers)
        asyncio.run(self.it.work())
        return self.it.trouble


REFUSED = answer(400, -4120, "Order type not supported for this endpoint.")


def test_canary_whose_cancel_gets_no_answer_is_canceled_again():
    bench = Bench()
    bench.cancels = [Answer(status=0, body=b"", is_sent=True, error="reset"), answer(status=503), answer()]
    assert bench.fly() == ""
    assert bench.canceled == 3 * [(BTC, bench.sent[0].client_order_id, True)]


def test_canary_that_is_taken_is_canceled_and_green():
    bench = Bench()
    assert bench.fly() == "" and bench.it.has_answered
    (request,) = bench.sent
    assert bench.canceled == [(BTC, request.client_order_id, True)]
    name = request.client_order_id
    assert name.startswith(CANARY_PREFIX) and not name.startswith(PREFIX)
    assert (request.type, request.reduce_only, request.side, request.trigger_price) == (
        "stop", True, "sell", D(80))
    assert request.qty * request.trigger_price > 5, "not below the exchange's minimum"


def test_canary_beside_a_short_position_stands_above_the_price():
    bench = Bench(held="-2")
    bench.fly()
    assert (bench.sent[0].side, bench.sent[0].trigger_price) == ("buy", D(120))


def test_canary_with_no_position_to_reduce_is_green():
    bench = Bench()
    assert bench.fly(answer(400, -2022, "ReduceOnly Order is rejected.")) == "" and bench.it.has_answered
    assert not bench.canceled


def test_canary_that_is_refused_is_red_until_it_is_taken_again():
    bench = Bench()
    assert "refuses stops" in bench.fly(REFUSED) and "-4120" in bench.it.trouble
    bench.fly(after_s=AGAIN_S - 0.001)
    assert bench.it.trouble and len(bench.sent) == 1, "not sooner"
    assert bench.fly(after_s=0.001) == ""


@pytest.mark.parametrize("silence", [
    Answer(status=0, is_sent=True, error="timeout"), answer(503, -1000, "Unknown error"),
    answer(429, -1003, "Too many requests"), ExchangeError("openOrders: timeout")])
def test_canary_without_a_word_is_nothing_new_and_often_a_trouble(silence):
    bench = Bench()
    for _ in range(TRIES_MAX - 1):
        assert bench.fly(silence) == "" and not bench.it.has_answered
    assert bench.fly(silence).startswith("stops are not proven") and bench.it.has_answered
    assert bench.fly() == ""
    assert bench.fly(silence) == "", "a green one stays green"
    bench.fly(REFUSED)
    assert "refuses stops" in bench.fly(silence), "and a red one red"


def test_canary_left_behind_by_a_crash_is_swept_and_nothing_else():
    bench = Bench()
    bench.open = [SimpleNamespace(client_order_id=name) for name in (f"{CANARY_PREFIX}old1", "th1", "web_1")]
    bench.fly()
    assert [name for _, name, _ in bench.canceled] == [f"{CANARY_PREFIX}old1", bench.sent[0].client_order_id]


def test_canary_flies_on_its_period_symbol_by_symbol_under_new_names():
    bench = Bench(symbols=(BTC, ETH))
    bench.fly()
    for _ in range(3):
        bench.fly(after_s=PERIOD_S - 0.001)
        bench.fly(after_s=0.001)
    assert sorted(r.symbol for r in bench.sent) == [BTC, BTC, ETH, ETH]
    assert len({r.client_order_id for r in bench.sent}) == 4


@pytest.mark.parametrize("spoil", [
    lambda b: setattr(b, "mark", None), lambda b: setattr(b, "symbols", ()),
    lambda b: setattr(b, "symbols", ("XYZ/USDT:USDT",)), lambda b: setattr(b, "refused", "used up")])
def test_canary_without_a_price_a_symbol_or_a_budget_waits(spoil):
    bench = Bench()
    spoil(bench)
    assert bench.fly() == "" and not bench.sent and not bench.it.has_answered


def test_canary_of_one_symbol_says_nothing_of_another():
    bench = Bench(symbols=(BTC, ETH))
    bench.fly(REFUSED)
    red = bench.sent[0].symbol
    for _ in range(3):
        assert red in bench.fly(REFUSED), "the red one flies again until it is green"
    assert {r.symbol for r in bench.sent} == {red} and bench.fly() == ""
    assert {r.symbol for r in bench.sent[-1:]} == {red}
    bench.fly()
    assert bench.sent[-1].symbol != red


def test_canary_whose_red_symbol_is_traded_no_more_is_green():
    bench = Bench(symbols=(BTC, ETH))
    bench.fly(REFUSED)
    bench.symbols = tuple({BTC, ETH} - {bench.sent[0].symbol})
    assert bench.fly() == ""


def test_canary_without_a_word_asks_again_soon():
    bench = Bench()
    bench.fly()
    refusal = answer(400, -4999, "a code of tomorrow")
    said = [bench.fly(refusal, after_s=PERIOD_S), *(bench.fly(refusal, after_s=AGAIN_S) for _ in range(2))]
    assert said[:2] == ["", ""] and "not proven" in said[2] and "-4999" in said[2]


@pytest.mark.parametrize("mark", ["0.05", "0", "-1", "NaN"])
def test_canary_with_a_mark_that_is_none_does_not_fly(mark):
    bench = Bench(mark=mark)
    assert bench.fly() == "" and not bench.sent
