"""The exchange edge, the outcome table and the connection against the paper exchange's own process."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import asynccontextmanager
from decimal import Decimal
from itertools import count, pairwise
from pathlib import Path

import pytest

from bot.clock import Clock
from bot.connection import pool
from bot.errors import ExchangeError
from bot.exchange import Exchange
from bot.orders import ExchangeFill, OrderRequest, OrderStatus
from bot.outcome import classify, classify_cancel
from bot.rows import ListenKeyExpired
from bot.stream import open_stream
from tests.appliance import BTC, Appliance
from tests.harness import API_KEY, API_SECRET, wait_until

QTY = Decimal("0.010")
NUMBERS = count()


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Appliance]:
    folder: Path = tmp_path_factory.mktemp("paper")
    with Appliance(folder, paper={"latency_ms": 0},
                   exchange={"request_timeout_ms": 700, "recv_window_ms": 2_000}) as appliance:
        appliance.start("paper")
        wait_until(lambda: _is_up(appliance))
        # 700 ms are too short for the first to ask for a past that is still being made.
        wait_until(lambda: _is_up(appliance, "klines?symbol=BTCUSDT&interval=1m&limit=500"), 60)
        yield appliance


def _is_up(appliance: Appliance, query: str = "time") -> bool:
    try:
        return bool(appliance._http("GET", f"/fapi/v1/{query}", None))
    except OSError:
        return False


@asynccontextmanager
async def connected(paper: Appliance):
    clock, config = Clock(), paper.config.exchange
    lanes = [pool(config, clock), pool(config, clock)]
    exchange = Exchange(config, clock, orders=lanes[0], queries=lanes[1], keys=(API_KEY, API_SECRET))
    try:
        await exchange.load()
        yield exchange
    finally:
        for lane in lanes:
            await lane.close()


def drill(paper: Appliance, scenario) -> None:
    async def run() -> None:
        async with asyncio.timeout(40):
            async with connected(paper) as exchange:
                await scenario(exchange)
    asyncio.run(run())


def entry(**changes) -> OrderRequest:
    return OrderRequest(**{"client_order_id": f"thdrill{next(NUMBERS)}", "symbol": BTC, "side": "buy",
                           "qty": QTY, **changes})


def stop(trigger: Decimal, **changes) -> OrderRequest:
    return entry(**{"side": "sell", "type": "stop", "reduce_only": True, "trigger_price": trigger, **changes})


async def send(exchange: Exchange, request: OrderRequest):
    return classify(await exchange.submit(exchange.build(request)), request.client_order_id)


async def flat(exchange: Exchange) -> None:
    for status in await exchange.open_orders():
        await exchange.cancel(status.symbol, status.client_order_id, is_conditional=status.is_conditional)
    for symbol, position in (await exchange.positions()).items():
        side = "sell" if position.qty > 0 else "buy"
        await send(exchange, entry(symbol=symbol, side=side, qty=abs(position.qty), reduce_only=True))


async def mark(exchange: Exchange, paper: Appliance) -> Decimal:
    row = await asyncio.to_thread(paper._http, "GET", "/fapi/v1/premiumIndex?symbol=BTCUSDT", None)
    step = exchange.instruments[BTC].price_increment
    return (Decimal(row["markPrice"]) // step) * step


def orders_named(paper: Appliance, name: str) -> list:
    return [row for row in paper.exchange_orders() if row["clientOrderId"] == name]


def test_load_with_real_process_knows_contracts_candles_and_clock(paper):
    async def scenario(exchange):
        assert exchange.instruments[BTC].status == "TRADING"
        assert abs(exchange.clock_offset_ns) < 50_000_000
        candles = await exchange.candles(BTC, "1m", 120)
        assert len(candles) == 120
        assert all(b.start_ns - a.start_ns == 60 * 10**9 for a, b in pairwise(candles))
        assert 0 <= exchange.server_ns() - candles[-1].start_ns - 60 * 10**9 < 61 * 10**9
        paper.control("POST", "/paper/clock", {"offset_ms": 1_270})
        try:
            await exchange.measure_clock()
            assert abs(exchange.clock_offset_ns - 1_270_000_000) < 50_000_000
            assert (await exchange.account()).can_trade  # its timestamp is the exchange's
        finally:
            paper.control("POST", "/paper/clock", {"offset_ms": 0})
        assert exchange.budget.usage.used["weight_1m"][1] > 0
    drill(paper, scenario)


def test_market_order_with_private_stream_tells_one_story(paper):
    async def scenario(exchange):
        key = await exchange.listen_key()
        assert await exchange.listen_key() == key
        await exchange.keep_listen_key()
        stream = await open_stream(exchange.private_url(key), connect_timeout_ms=2_000,
                                   frame_bytes_max=1_000_000)
        request, start_ns = entry(), exchange.server_ns() - 10**9
        signed = exchange.build(request)
        answer = await exchange.submit(signed)
        assert classify(answer, request.client_order_id).kind == "accepted"
        answered = exchange.answered_order(answer)
        assert (answered.event, answered.executed_qty) == ("complete", QTY)

        heard: list = []
        while not any(isinstance(e, OrderStatus) and e.event == "complete" for e in heard):
            heard += exchange.parse_private(await anext(aiter(stream)))
        told = [e for e in heard if isinstance(e, ExchangeFill)]
        listed = [f for f in await exchange.fills_since(BTC, start_ns=start_ns)
                  if f.exchange_order_id == answered.exchange_order_id]
        assert sum(f.qty for f in told) == sum(f.qty for f in listed) == QTY
        assert {(f.symbol, f.trade_id, f.price, f.fee, f.side) for f in told} == {
            (f.symbol, f.trade_id, f.price, f.fee, f.side) for f in listed}
        assert {f.client_order_id for f in told} == {request.client_order_id}

        asked = await exchange.order(BTC, request.client_order_id, is_conditional=False)
        assert (asked.event, asked.executed_qty, asked.exchange_order_id) == (
            "complete", QTY, answered.exchange_order_id)
        assert (await exchange.positions())[BTC].qty == QTY
        since = await exchange.orders_since(BTC, start_ns)
        assert request.client_order_id in {o.client_order_id for o in since}
        first, *_ = await exchange.fills_since(BTC, from_trade_id=int(listed[0].trade_id))
        assert first == listed[0]

        paper.control("POST", "/paper/stream", {"match": "user:main", "do": "expire"})
        heard = []
        while not any(isinstance(e, ListenKeyExpired) for e in heard):
            heard += exchange.parse_private(await anext(aiter(stream)))
        await stream.close()
        await flat(exchange)
        assert await exchange.positions() == {}
    drill(paper, scenario)


def test_stop_with_its_whole_life_is_told_by_its_own_id(paper):
    async def scenario(exchange):
        await send(exchange, entry())
        far = stop((await mark(exchange, paper)) * Decimal("0.9") // 1)
        assert (await send(exchange, far)).kind == "accepted"
        duplicate = await send(exchange, far)
        assert (duplicate.kind, duplicate.code) == ("duplicate", -4116)
        [resting] = await exchange.open_orders(BTC)
        assert (resting.client_order_id, resting.is_conditional, resting.reduce_only) == (
            far.client_order_id, True, True)
        assert (resting.trigger_price, resting.qty, resting.side, resting.event) == (
            far.trigger_price, QTY, "sell", "accept")
        assert await exchange.order(BTC, far.client_order_id, is_conditional=False) is None

        canceled = await exchange.cancel(BTC, far.client_order_id, is_conditional=True)
        assert classify_cancel(canceled, far.client_order_id).kind == "canceled"
        again = await exchange.cancel(BTC, far.client_order_id, is_conditional=True)
        assert classify_cancel(again, far.client_order_id).kind == "gone"
        assert (await exchange.order(BTC, far.client_order_id, is_conditional=True)).event == "cancel"

        now = await mark(exchange, paper)
        refused = await send(exchange, stop(now * 2))
        assert (refused.kind, refused.code) == ("rejected", -2021)
        # One of the two, close by, is triggered by the next small move of the market.
        near = [stop(now - 2), stop(now + 2, type="take_profit")]
        for request in near:
            await send(exchange, request)
        ended: list = []
        while not ended:
            await asyncio.sleep(0.2)
            told = [await exchange.order(BTC, r.client_order_id, is_conditional=True) for r in near]
            ended = [status for status in told if status.event == "complete"]
        assert ended[0].raw_status == "FINISHED/FILLED" and ended[0].executed_qty == QTY
        fills = await exchange.fills_since(BTC, start_ns=exchange.server_ns() - 60 * 10**9)
        assert sum(f.qty for f in fills if f.exchange_order_id == ended[0].triggered_id) == QTY
        await flat(exchange)
    drill(paper, scenario)


def test_reduce_only_with_nothing_to_reduce_is_rejected(paper):
    async def scenario(exchange):
        await flat(exchange)
        outcome = await send(exchange, entry(reduce_only=True))
        assert (outcome.kind, outcome.code) == ("rejected", -2022)
    drill(paper, scenario)


UNKNOWN = json.dumps({"code": -1000, "msg": "Unknown error, please check your request or try again later."})
MARGIN = json.dumps({"code": -2019, "msg": "Margin is insufficient."})


@pytest.mark.parametrize(("fault", "kind", "orders"), [
    ({"do": "lose_request"}, "unknown", 0),
    ({"do": "hang"}, "unknown", 0),
    ({"do": "lose_answer"}, "unknown", 1),
    ({"do": "truncate"}, "unknown", 1),
    ({"do": "delay_answer", "delay_ms": 1_000}, "unknown", 1),
    ({"do": "delay_answer", "delay_ms": 100}, "accepted", 1),
    ({"do": "answer", "status": 503, "body": UNKNOWN, "is_executed": True}, "unknown", 1),
    ({"do": "answer", "status": 200, "body": "", "is_executed": True}, "unknown", 1),
    ({"do": "answer", "status": 200, "body": "{}", "is_executed": True}, "unknown", 1),
    ({"do": "answer", "status": 502, "body": "<html>Bad gateway</html>", "is_executed": True}, "unknown", 1),
    ({"do": "answer", "status": 400, "body": MARGIN}, "rejected", 0),
    ({"do": "answer", "status": 400, "body": '{"code":-1021,"msg":"Timestamp"}'}, "not_executed", 0),
], ids=lambda value: value if isinstance(value, str) else str(value)[:40])
def test_order_with_every_fault_leaves_once_and_is_never_called_what_it_is_not(paper, fault, kind, orders):
    async def scenario(exchange):
        await exchange.account()
        paper.control("POST", "/paper/faults", {"match": "POST /fapi/v1/order", **fault})
        request = entry()
        outcome = await send(exchange, request)
        assert outcome.kind == kind
        assert outcome.needs_operator == (fault.get("body") == UNKNOWN)
        asked = await exchange.order(BTC, request.client_order_id, is_conditional=False)
        assert (asked is not None) == bool(orders)
        await flat(exchange)  # the same lane serves the next request
        await asyncio.sleep(0.3 if fault["do"] == "delay_answer" else 0)
        assert len(await asyncio.to_thread(orders_named, paper, request.client_order_id)) == orders
    drill(paper, scenario)


@pytest.mark.parametrize("do", ["lose_answer", "truncate"])
def test_cancel_with_lost_answer_is_unknown_and_left_once(paper, do):
    async def scenario(exchange):
        await send(exchange, entry())
        request = stop((await mark(exchange, paper)) * Decimal("0.9") // 1)
        await send(exchange, request)
        paper.control("POST", "/paper/faults", {"match": "DELETE /fapi/v1/algoOrder", "do": do})
        answer = await exchange.cancel(BTC, request.client_order_id, is_conditional=True)
        assert classify_cancel(answer, request.client_order_id).kind == "unknown"
        assert (await exchange.order(BTC, request.client_order_id, is_conditional=True)).event == "cancel"
        await flat(exchange)
    drill(paper, scenario)


def test_query_with_a_ban_waits_it_out(paper):
    async def scenario(exchange):
        paper.control("POST", "/paper/faults", {
            "match": "GET /fapi/v1/accountConfig", "do": "answer", "status": 429,
            "headers": {"Retry-After": "1"}, "body": '{"code":-1003,"msg":"Too many requests."}'})
        with pytest.raises(ExchangeError):
            await exchange.account()
        with pytest.raises(ExchangeError, match="banned for another"):
            await exchange.positions()
        while exchange.budget.usage.banned_until_ns > exchange.server_ns():
            await asyncio.sleep(0.05)
        assert await exchange.positions() == {}
    drill(paper, scenario)


def test_submit_with_no_exchange_is_not_sent(paper):
    async def scenario(exchange):
        request = entry()
        signed = exchange.build(request)
        paper.stop("paper")
        try:
            outcome = classify(await exchange.submit(signed), request.client_order_id)
            assert outcome.kind == "not_sent"
        finally:
            paper.start("paper")
            await asyncio.to_thread(wait_until, lambda: _is_up(paper))
        assert await exchange.order(BTC, request.client_order_id, is_conditional=False) is None
    drill(paper, scenario)
