"""What the exchange does of its own: liquidation, ADL, delisting, bans, lag, limbo; docs/paper.md."""

import asyncio
import hashlib
import hmac
import itertools
import json
import re
import time
from decimal import Decimal
from typing import get_args, get_type_hints

import aiohttp
import pytest

from bot.paper import Fault
from bot.paper_stream import StreamFault
from tests.harness import API_KEY, API_SECRET, ROOT, stop_process, wait_until, write_config
from tests.paper import KEY, SYMBOL, Paper

ETH = "ETHUSDT"
names = itertools.count()


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    server = Paper(write_config(tmp_path_factory.mktemp("paper"), paper={"latency_ms": 0}))
    yield server
    assert stop_process(server.process) == 0


@pytest.fixture(autouse=True)
def clean(paper):
    paper.control("faults", method="DELETE")
    paper.control("limits", {})
    paper.control("symbol", {"symbol": ETH})
    paper.control("mark", {"symbol": SYMBOL, "offset_pct": 0})
    paper.flatten()


def listen(paper, work, until, path="/private/ws?listenKey={}"):
    """Return (work's result, the user stream's frames until one passes)."""
    key = paper.call("POST", "/fapi/v1/listenKey", headers=KEY)[1]["listenKey"]

    async def run():
        async with aiohttp.ClientSession() as session, session.ws_connect(
                f"ws://{paper.host}{path.format(key)}") as ws:
            result, seen = await asyncio.to_thread(work), []
            while not (seen and until(seen[-1])):
                seen.append(await ws.receive_json(timeout=20))
            return result, seen
    return asyncio.run(run())


def is_end(prefix):
    return lambda e: (e["e"] == "ORDER_TRADE_UPDATE" and e["o"]["c"].startswith(prefix)
                      and e["o"]["X"] == "FILLED")


@pytest.mark.parametrize(("command", "prefix", "qty", "left"), [
    ("liquidate", "autoclose-", None, "0"), ("adl", "adl_autoclose", "0.010", "0.020")])
def test_forced_order_with_a_position_is_told_by_stream_and_queries(paper, command, prefix, qty, left):
    paper.market(quantity="0.030")
    wish = {"account": "main", "symbol": SYMBOL} | ({"qty": qty} if qty else {})
    _, events = listen(paper, lambda: paper.control(command, wish), is_end(prefix))
    updates = [e["o"] for e in events if e["e"] == "ORDER_TRADE_UPDATE"]
    assert {(o["x"], o["o"], o["f"], o["S"], o["R"]) for o in updates[1:]} == {
        ("CALCULATED", "LIMIT", "IOC", "SELL", True)}
    assert (updates[0]["x"], updates[0]["X"]) == ("NEW", "NEW")
    assert paper.position() == Decimal(left)
    last = updates[-1]
    order = paper.signed("GET", "/fapi/v1/order", symbol=SYMBOL, origClientOrderId=last["c"])[1]
    assert (order["status"], order["executedQty"]) == ("FILLED", qty or "0.030")
    rows = paper.signed("GET", "/fapi/v1/userTrades", symbol=SYMBOL, orderId=last["i"])[1]
    assert sum(Decimal(row["qty"]) for row in rows) == Decimal(order["executedQty"])
    income = paper.signed("GET", "/fapi/v1/income", startTime=last["T"], incomeType="INSURANCE_CLEAR")[1]
    assert bool(income) == (command == "liquidate")
    assert paper.call("POST", f"/paper/{command}", body=json.dumps({**wish, "qty": "9"}))[0] == 400


def test_mark_price_alone_with_a_full_position_liquidates(paper):
    free = Decimal(paper.signed("GET", "/fapi/v3/balance")[1][0]["availableBalance"])
    qty = f"{free * 15 / paper.price():.3f}"
    assert paper.market(quantity=qty)[0] == 200
    order = paper.signed("POST", "/fapi/v1/order", symbol=ETH, side="BUY", type="LIMIT", timeInForce="GTC",
                         quantity="0.020", price="2900")[1]
    last = paper.price()
    _, events = listen(paper, lambda: paper.control("mark", {"symbol": SYMBOL, "offset_pct": -8}),
                       is_end("autoclose-"))
    assert abs(paper.price() / last - 1) < Decimal("0.02"), "the market itself stood still"
    ended = [(e["o"]["i"], e["o"]["x"]) for e in events if e["e"] == "ORDER_TRADE_UPDATE"]
    assert ended[0] == (order["orderId"], "CANCELED"), "orders go first"
    assert paper.position() == 0
    account = paper.signed("GET", "/fapi/v2/account")[1]
    assert Decimal(account["totalWalletBalance"]) >= 0
    paper.control("mark", {"symbol": SYMBOL, "offset_pct": 0})


def test_funding_with_a_position_is_paid_and_told(tmp_path):
    paper = Paper(write_config(tmp_path, paper={"latency_ms": 0}))
    try:
        paper.market(quantity="0.100")
        _, events = listen(paper, lambda: paper.control("funding", {"account": "main", "rate": "0.001"}),
                           lambda e: e["e"] == "ACCOUNT_UPDATE" and e["a"]["m"] == "FUNDING_FEE")
        row, = paper.signed("GET", "/fapi/v1/income", incomeType="FUNDING_FEE")[1]
        assert Decimal(row["income"]) == Decimal(events[-1]["a"]["B"][0]["bc"])
        assert abs(Decimal(row["income"]) + paper.price() / 10_000) < 1
        assert events[-1]["a"]["P"] == []
        assert paper.call("POST", "/paper/funding", body='{"account":"main","rate":"NaN"}')[0] == 400
    finally:
        assert stop_process(paper.process) == 0


def test_symbol_that_is_delisted_ends_orders_and_position_and_comes_back(paper):
    def order(**wish):
        return paper.signed("POST", "/fapi/v1/order", symbol=ETH, side="BUY", **wish)

    assert order(type="MARKET", quantity="0.020")[0] == 200
    order(type="LIMIT", timeInForce="GTC", quantity="0.020", price="2900")
    _, events = listen(paper, lambda: paper.control("symbol", {"symbol": ETH, "status": "SETTLING"}),
                       is_end("settlement_autoclose-"))
    assert events[0]["o"]["x"] == "CANCELED"
    listed = {s["symbol"]: s for s in paper.call("GET", "/fapi/v1/exchangeInfo")[1]["symbols"]}
    assert (listed[ETH]["status"], listed[SYMBOL]["status"]) == ("SETTLING", "TRADING")
    assert order(type="MARKET", quantity="0.020")[1]["code"] == -4108
    paper.control("symbol", {"symbol": ETH, "filters": {"LOT_SIZE": {"stepSize": "0.1", "minQty": "0.1"}}})
    assert order(type="MARKET", quantity="0.020")[1]["code"] == -1111
    for wrong in ({"stepSize": "0"}, {"stepSize": "x"}, {"stepSize": "NaN"}):
        wish = {"symbol": ETH, "filters": {"LOT_SIZE": wrong}}
        assert paper.call("POST", "/paper/symbol", body=json.dumps(wish))[0] == 400
    assert order(type="MARKET", quantity="0.020")[1]["code"] == -1111


def test_lag_with_fresh_orders_hides_them_from_every_query(paper):
    paper.control("faults", {"match": "GET /fapi/v1/*", "do": "lag", "delay_ms": 1_500, "times": 1_000})
    name = f"lag{next(names)}"
    began = time.monotonic()
    paper.market(newClientOrderId=f"m{name}")
    paper.signed("POST", "/fapi/v1/order", symbol=SYMBOL, side="BUY", type="LIMIT", timeInForce="GTC",
                 quantity="0.010", price=f"{paper.price() * Decimal('0.97'):.1f}", newClientOrderId=name)

    def seen():
        one = paper.signed("GET", "/fapi/v1/order", symbol=SYMBOL, origClientOrderId=name)
        single = paper.signed("GET", "/fapi/v1/openOrder", symbol=SYMBOL, origClientOrderId=name)
        lists = [paper.signed("GET", f"/fapi/v1/{path}", symbol=SYMBOL)[1]
                 for path in ("openOrders", "allOrders", "userTrades")]
        trade_ids = {row["id"] for row in lists[2]}
        return [one[0], single[0], *(any(row["clientOrderId"] == name for row in rows) for rows in lists[:2]),
                len(trade_ids - before)]

    before = set()
    before = {row["id"] for row in paper.signed("GET", "/fapi/v1/userTrades", symbol=SYMBOL)[1]}
    assert seen() == [400, 400, False, False, 0]
    assert time.monotonic() - began < 1.5
    assert paper.position() == Decimal("0.010"), "the position does not lag"
    wait_until(lambda: seen()[:4] == [200, 200, True, True] and seen()[4])


@pytest.mark.parametrize("is_executed", [True, False])
def test_limbo_executes_later_or_never_whatever_the_window_said(paper, is_executed):
    paper.control("faults", {"match": "POST /fapi/v1/order", "do": "limbo", "delay_ms": 600,
                             "is_executed": is_executed})
    status, answer, _ = paper.market(recvWindow=300, newClientOrderId=(name := f"limbo{next(names)}"))
    assert (status, answer["code"]) == (408, -1007)
    found = [paper.signed("GET", "/fapi/v1/order", symbol=SYMBOL, origClientOrderId=name)[0]]
    time.sleep(1)
    found.append(paper.signed("GET", "/fapi/v1/order", symbol=SYMBOL, origClientOrderId=name)[0])
    assert found == [400, 200 if is_executed else 400]


def test_limits_with_too_many_requests_answer_429_and_then_418(paper):
    paper.control("limits", {"weight_1m": 30, "orders_10s": 2})
    wait_until(lambda: time.time() % 60 < 50, 15)
    address, answers = ("127.0.0.77", 0), []
    for _ in range(45):
        status, answer, headers = paper.call("GET", "/fapi/v1/ping", address=address)
        answers.append((status, answer.get("code", 0)))
        assert status == 200 or 1 <= int(headers["Retry-After"]) <= 121
    assert answers == [(200, 0)] * 30 + [(429, -1003)] * 10 + [(418, -1003)] * 5
    assert int(re.search(r"banned until (\d+)", answer["msg"])[1]) > time.time() * 1000 + 100_000
    assert paper.call("GET", "/fapi/v1/ping")[0] == 200, "another address is another client"
    wait_until(lambda: time.time() % 10 < 7, 15)
    got = [paper.market() for _ in range(3)][-1]
    assert (got[0], got[1]["code"]) == (429, -1015)
    paper.control("limits", {"banned_until_ms": int(time.time() * 1000) + 5_000})
    assert paper.call("GET", "/fapi/v1/ping")[0] == 418
    limits = paper.control("limits", {"weight_1m": 7})
    assert limits == {}
    assert paper.call("GET", "/fapi/v1/exchangeInfo")[1]["rateLimits"][0]["limit"] == 7


def test_weights_with_limits_and_symbols_are_the_real_ones(paper):
    number = itertools.count(1)
    for path, weight in (("depth?symbol=BTCUSDT&limit=5", 2), ("depth?symbol=BTCUSDT&limit=1000", 20),
                         ("klines?symbol=BTCUSDT&interval=1m&limit=1500", 10), ("premiumIndex", 10),
                         ("ticker/24hr", 40), ("ticker/24hr?symbol=BTCUSDT", 1)):
        answer = paper.call("GET", f"/fapi/v1/{path}", address=(f"127.0.0.{100 + next(number)}", 0))
        assert answer[2]["X-MBX-USED-WEIGHT-1M"] == str(weight), path


def test_countdown_that_is_not_extended_cancels_the_symbols_plain_orders(paper):
    def rest():
        return paper.signed("POST", "/fapi/v1/order", symbol=SYMBOL, side="BUY", type="LIMIT",
                            timeInForce="GTC", quantity="0.010",
                            price=f"{paper.price() * Decimal('0.97'):.1f}")[0]

    def count(ms):
        assert paper.signed("POST", "/fapi/v1/countdownCancelAll", symbol=SYMBOL, countdownTime=ms)[0] == 200

    assert rest() == 200
    count(400)
    count(0)
    time.sleep(0.6)
    assert len(paper.signed("GET", "/fapi/v1/openOrders", symbol=SYMBOL)[1]) == 1, "0 stops it"
    count(300)
    wait_until(lambda: paper.signed("GET", "/fapi/v1/openOrders", symbol=SYMBOL)[1] == [], 5)


def test_batches_answer_each_order_for_itself(paper):
    good = {"symbol": SYMBOL, "side": "BUY", "type": "LIMIT", "timeInForce": "GTC", "quantity": "0.010",
            "price": f"{paper.price() * Decimal('0.97'):.1f}"}
    wishes = [good | {"newClientOrderId": "b1"}, good | {"side": "HOLD"}, good | {"newClientOrderId": "b2"}]
    status, rows, _ = paper.signed("POST", "/fapi/v1/batchOrders", batchOrders=json.dumps(wishes))
    assert status == 200
    assert [row.get("clientOrderId", row.get("code")) for row in rows] == ["b1", -1117, "b2"]
    ids = [rows[0]["orderId"], 5]
    rows = paper.signed("DELETE", "/fapi/v1/batchOrders", symbol=SYMBOL, orderIdList=json.dumps(ids))[1]
    assert [row.get("status", row.get("code")) for row in rows] == ["CANCELED", -2011]
    for wrong in ("x", "[1]", json.dumps([good] * 6), '{"a":1}'):
        assert paper.signed("POST", "/fapi/v1/batchOrders", batchOrders=wrong)[0] == 400


@pytest.mark.parametrize(("params", "code"), [
    ({"leverage": 151}, -4028), ({"leverage": 0}, -4028), ({"leverage": 1}, -2028)])
def test_leverage_with_a_position_keeps_its_rules(paper, params, code):
    paper.market(quantity="0.300")
    assert paper.signed("POST", "/fapi/v1/leverage", symbol=SYMBOL, **params)[1]["code"] == code
    assert paper.signed("GET", "/fapi/v1/symbolConfig", symbol=SYMBOL)[1][0]["leverage"] == 20


def test_streams_with_reordered_frames_and_at_the_end_of_a_day(paper):
    async def run():
        async with aiohttp.ClientSession() as session, session.ws_connect(
                f"ws://{paper.host}/ws/btcusdt@aggTrade") as ws:
            ids = [(await ws.receive_json())["a"]]
            await asyncio.to_thread(paper.control, "stream", {
                "match": "btcusdt@aggTrade", "do": "reorder", "count": 4})
            while ids[-1] < ids[0] + 30:
                ids.append((await ws.receive_json(timeout=20))["a"])
            back = [i for i, (a, b) in enumerate(itertools.pairwise(ids)) if b < a]
            assert len(back) == 3 and sorted(ids) == list(range(min(ids), max(ids) + 1))
            await asyncio.to_thread(paper.control, "stream", {
                "match": "btcusdt@aggTrade", "do": "age", "duration_ms": 86_400_000})
            while (message := await ws.receive(timeout=20)).type is aiohttp.WSMsgType.TEXT:
                pass
            return message.type, message.data
    assert asyncio.run(run()) == (aiohttp.WSMsgType.CLOSE, 1000)


def sign(params):
    params = {"apiKey": API_KEY, "timestamp": int(time.time() * 1000), **params}
    words = {k: str(v).lower() if isinstance(v, bool) else v for k, v in sorted(params.items())}
    text = "&".join(f"{k}={v}" for k, v in words.items()).encode()
    return params | {"signature": hmac.new(API_SECRET.encode(), text, hashlib.sha256).hexdigest()}


@pytest.mark.parametrize(("fault", "told", "is_executed"), [
    ({"do": "lose_request"}, None, False),
    ({"do": "lose_answer"}, None, True),
    ({"do": "answer", "status": 503, "body": '{"code": -1000}'}, (503, {"code": -1000}), False),
    ({"do": "limbo", "delay_ms": 50, "is_executed": True}, (408, -1007), True),
    ({"do": "delay", "delay_ms": 300}, (200, None), True)], ids=lambda value: str(value)[:20])
def test_fault_of_a_request_reaches_the_websocket_order_api(paper, fault, told, is_executed):
    async def run():
        async with aiohttp.ClientSession() as session, session.ws_connect(
                f"ws://{paper.host}/ws-fapi/v1") as ws:
            begun = time.monotonic()
            await ws.send_json({"id": 1, "method": "order.place", "params": sign(
                {"symbol": SYMBOL, "side": "BUY", "type": "MARKET", "quantity": "0.010"})})
            message = await ws.receive(timeout=10)
            return message, time.monotonic() - begun

    before = paper.position()
    paper.control("faults", {"match": "POST /fapi/v1/order", **fault})
    message, took_s = asyncio.run(run())
    if told is None:
        assert message.type is not aiohttp.WSMsgType.TEXT, "the connection is cut"
    else:
        answer = json.loads(message.data)
        assert answer["status"] == told[0]
        assert told[1] in (None, answer.get("error"), answer.get("error", {}).get("code"))
        assert took_s >= (fault["delay_ms"] / 1_000 if fault["do"] == "delay" else 0)
    wait_until(lambda: paper.position() - before == (Decimal("0.010") if is_executed else 0), 5)
    paper.flatten()


def test_order_api_over_websocket_places_tells_and_cancels(paper):
    async def run():
        async with aiohttp.ClientSession() as session, session.ws_connect(
                f"ws://{paper.host}/ws-fapi/v1") as ws:
            async def ask(method, **params):
                await ws.send_json({"id": next(names), "method": method, "params": sign(params)})
                return await ws.receive_json(timeout=10)

            placed = await ask("order.place", symbol=SYMBOL, side="BUY", type="LIMIT", timeInForce="GTC",
                               quantity=0.01, price=round(float(price) * 0.97, 1), reduceOnly=False)
            assert placed["status"] == 200, placed
            assert placed["rateLimits"][0]["rateLimitType"] == "REQUEST_WEIGHT"
            named = {"symbol": SYMBOL, "orderId": placed["result"]["orderId"]}
            assert (await ask("order.status", **named))["result"]["status"] == "NEW"
            assert (await ask("order.cancel", **named))["result"]["status"] == "CANCELED"
            refused = await ask("order.cancel", **named)
            assert (refused["status"], refused["error"]["code"]) == (400, -2011)
            assert (await ask("account.status", symbol=SYMBOL))["result"]["positions"]
            assert (await ask("nonsense"))["status"] == 404
            for junk in ("", "{", "[]", "null", '{"id":[]}', '{"method":"ping","params":[]}', "[" * 9_000,
                         '{"method":"order.place","params":{"symbol":{"a":1},"apiKey":"x"}}'):
                await ws.send_str(junk)
                assert (await ws.receive_json(timeout=10))["status"] in (400, 401)
            return await ask("ping")

    price = paper.price()
    assert asyncio.run(run())["result"] == {}


def test_streams_of_all_symbols_and_of_every_kind_send_their_own(paper):
    wanted = ["!ticker@arr", "!miniTicker@arr", "!markPrice@arr@1s", "!bookTicker", "btcusdt@kline_5m",
              "ethusdt@depth20@100ms", "btcusdt@ticker", "ethusdt@miniTicker"]

    async def run():
        async with aiohttp.ClientSession() as session, session.ws_connect(
                f"ws://{paper.host}/stream?streams={'/'.join(wanted)}") as ws:
            seen = {}
            while len(seen) < len(wanted):
                frame = await ws.receive_json(timeout=20)
                seen[frame["stream"]] = frame["data"]
            return seen
    seen = asyncio.run(run())
    assert {row["s"] for row in seen["!ticker@arr"]} == {SYMBOL, ETH}
    assert {row["e"] for row in seen["!markPrice@arr@1s"]} == {"markPriceUpdate"}
    assert seen["btcusdt@kline_5m"]["k"]["i"] == "5m"
    assert len(seen["ethusdt@depth20@100ms"]["b"]) == 20


def test_docs_with_every_example_does_what_it_shows(paper):
    page = (ROOT / "docs/paper.md").read_text()
    lines = re.findall(r"^    (GET|POST|DELETE) (/paper/\S+)(?: (.*))?$", page, re.MULTILINE)
    told = {path for _, path, _ in lines}
    source = (ROOT / "bot/paper.py").read_text()
    assert told == set(re.findall(r'"(?:GET|POST|DELETE) (/paper/\w+)"', source)), "each has an example"
    kinds = {json.loads(body)["do"] for _, path, body in lines if body and '"do"' in body}
    assert kinds == {*get_args(get_type_hints(Fault)["do"]), *get_args(StreamFault)}
    for method, path, body in lines:
        status, answer, _ = paper.call(method, path, body=body or None)
        assert status == 200, (path, body, answer)
    paper.control("faults", method="DELETE")
