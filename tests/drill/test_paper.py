"""The paper exchange as a real process: ccxt on it, kill -9, faults, garbage, streams."""

import asyncio
import gzip
import hashlib
import hmac
import http.client
import itertools
import json
import os
import random
import resource
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from urllib.parse import urlencode

import aiohttp
import ccxt
import pytest

from bot.errors import EXIT_SOFTWARE
from bot.paper_rest import ROUTES
from tests.harness import API_KEY, API_SECRET, asker, data_path, stop_process, wait_until, write_config
from tests.paper import KEY, SYMBOL, Paper

CCXT_SYMBOL = "BTC/USDT:USDT"
ALONE = {"symbols": [CCXT_SYMBOL]}  # starts in half the time
names = itertools.count()


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    server = Paper(write_config(tmp_path_factory.mktemp("paper")))
    began = time.monotonic()
    status, rows, _ = server.call("GET", "/fapi/v1/klines?symbol=BTCUSDT&interval=1m&limit=500")
    server.first_candles = status, len(rows), time.monotonic() - began
    yield server
    assert stop_process(server.process) == 0


@pytest.fixture(autouse=True)
def clean(paper):
    paper.control("faults", method="DELETE")
    paper.control("clock", {"offset_ms": 0})
    paper.flatten()


def exchange(paper):
    client = ccxt.binanceusdm({"apiKey": API_KEY, "secret": API_SECRET, "enableRateLimit": False, "options": {
        "fetchCurrencies": False, "fetchMargins": False}})
    for name, url in client.urls["api"].items():
        if isinstance(url, str):
            client.urls["api"][name] = url.replace("https://fapi.binance.com", f"http://{paper.host}")
    return client


def test_ccxt_with_only_its_url_changed_trades(paper):
    client = exchange(paper)
    market = client.load_markets()[CCXT_SYMBOL]
    assert market["precision"] == {"amount": 0.001, "price": 0.1, "base": 1e-08, "quote": 1e-08}
    entry = client.create_order(CCXT_SYMBOL, "market", "buy", 0.05,
                                params={"clientOrderId": "entry1", "newOrderRespType": "RESULT"})
    assert (entry["status"], entry["filled"], entry["clientOrderId"]) == ("closed", 0.05, "entry1")
    position, = client.fetch_positions()
    assert (position["symbol"], position["contracts"], position["side"]) == (CCXT_SYMBOL, 0.05, "long")
    assert position["leverage"] == 20
    stop = client.create_order(CCXT_SYMBOL, "STOP_MARKET", "sell", 0.05, params={
        "triggerPrice": round(entry["average"] * 0.9, 1), "reduceOnly": True, "workingType": "MARK_PRICE",
        "clientOrderId": "stop1"})
    limit = client.create_order(CCXT_SYMBOL, "limit", "buy", 0.01, round(entry["average"] * 0.98, 1))
    assert [o["id"] for o in client.fetch_open_orders(CCXT_SYMBOL)] == [limit["id"]]
    triggers = client.fetch_open_orders(CCXT_SYMBOL, params={"trigger": True})
    assert [(o["id"], o["clientOrderId"]) for o in triggers] == [(stop["id"], "stop1")]
    assert client.cancel_order(limit["id"], CCXT_SYMBOL)["status"] == "canceled"
    assert client.fetch_order(limit["id"], CCXT_SYMBOL)["status"] == "canceled"
    assert client.fetch_order(None, CCXT_SYMBOL, {"clientOrderId": "entry1"})["status"] == "closed"
    client.cancel_order(None, CCXT_SYMBOL, {"trigger": True, "clientOrderId": "stop1"})
    assert client.fetch_open_orders(CCXT_SYMBOL, params={"trigger": True}) == []
    trades = client.fetch_my_trades(CCXT_SYMBOL, params={"orderId": entry["id"]})
    assert sum(t["amount"] for t in trades) == pytest.approx(0.05)
    assert trades[0]["fee"]["currency"] == "USDT"
    balance = client.fetch_balance()["USDT"]
    assert 9_000 < balance["free"] < balance["total"] < 10_000
    with pytest.raises(ccxt.ExchangeError, match="-2019"):
        client.create_order(CCXT_SYMBOL, "market", "buy", 100)
    with pytest.raises(ccxt.OrderNotFound, match="-2011"):
        client.cancel_order("1", CCXT_SYMBOL)


@pytest.mark.parametrize(("change", "status", "code"), [
    ({"timestamp": 1}, 400, -1021), ({"timestamp": 99_999_999_999_999}, 400, -1021),
    ({"timestamp": "x"}, 400, -1102), ({"recvWindow": 60_001}, 400, -1131),
    ({"secret": "wrong"}, 400, -1022), ({"key": "nobody"}, 401, -2015), ({"key": ""}, 401, -2014),
    ({"symbol": "NOPE"}, 400, -1121), ({"symbol": ""}, 400, -1102), ({"side": "HOLD"}, 400, -1117),
    ({"type": "FOO"}, 400, -1116), ({"type": "STOP_MARKET"}, 400, -4120), ({"type": "LIMIT"}, 400, -1102),
    ({"quantity": "NaN"}, 400, -1100), ({"quantity": "1e3"}, 400, -1100), ({"quantity": "-1"}, 400, -1100),
    ({"quantity": "0.0001"}, 400, -1111), ({"quantity": "0.001"}, 400, -4164),
    ({"quantity": "9" * 20}, 400, -4005), ({"quantity": "10"}, 400, -2019),
    ({"price": "5"}, 400, -1106), ({"reduceOnly": "true"}, 400, -2022), ({"reduceOnly": "ja"}, 400, -1102),
    ({"positionSide": "LONG"}, 400, -4061), ({"newClientOrderId": "a b"}, 400, -1100),
    ({"newClientOrderId": "x" * 37}, 400, -1100), ({"timeInForce": "GTD"}, 400, -1115)])
def test_order_with_one_thing_wrong_is_refused_with_the_real_code(paper, change, status, code):
    wish = {"symbol": SYMBOL, "side": "BUY", "type": "MARKET", "quantity": "0.010", **change}
    got, answer, _ = paper.signed("POST", "/fapi/v1/order", **wish)
    assert (got, answer["code"]) == (status, code), answer
    assert set(answer) == {"code", "msg"}
    assert paper.position() == 0


def test_paths_nobody_knows_and_wrong_methods_get_binance_shaped_404s(paper):
    for method, path in (("GET", "/"), ("GET", "/fapi/v9/x"), ("PUT", "/fapi/v1/time"), ("GET", "/paper/x")):
        status, answer, _ = paper.call(method, path)
        assert (status, answer["code"]) == (404, -5000)


def test_parameters_in_the_body_count_and_headers_count_weight_and_orders(paper):
    wait_until(lambda: time.time() % 10 < 7, 15)  # not across a window's edge
    address = asker()
    used = int(paper.call("GET", "/fapi/v1/ping", address=address)[2]["X-MBX-USED-WEIGHT-1M"])
    body = urlencode({"symbol": SYMBOL, "side": "BUY", "type": "MARKET", "quantity": "0.010",
                      "timestamp": int(time.time() * 1000)})
    body += "&signature=" + hmac.new(API_SECRET.encode(), body.encode(), hashlib.sha256).hexdigest()
    counts = []
    for _ in range(2):
        status, answer, headers = paper.call("POST", "/fapi/v1/order", body=body, headers=KEY,
                                             address=address)
        assert (status, answer["status"], answer["executedQty"]) == (200, "NEW", "0"), "ACK is the default"
        counts.append((int(headers["X-MBX-ORDER-COUNT-10S"]), int(headers["X-MBX-ORDER-COUNT-1M"])))
    assert counts[1] == (counts[0][0] + 1, counts[0][1] + 1)
    depth = paper.call("GET", "/fapi/v1/depth", {"symbol": SYMBOL}, address=address)
    assert int(depth[2]["X-MBX-USED-WEIGHT-1M"]) == used + 10, "orders weigh nothing on the address"


def test_kill_minus_nine_at_any_moment_forgets_nothing(tmp_path):
    server = Paper(write_config(tmp_path, paper=ALONE))
    try:
        price = server.price()
        for round_ in range(2):
            acknowledged = []
            for number in range(8):
                name = f"r{round_}n{number}"
                if number % 4 == 2:
                    answer = server.signed("POST", "/fapi/v1/order", symbol=SYMBOL, side="BUY", type="LIMIT",
                                           timeInForce="GTC", quantity="0.010", newClientOrderId=name,
                                           price=f"{price * Decimal('0.97'):.1f}")
                elif number % 4 == 3:
                    answer = server.stop("STOP_MARKET", f"{price * Decimal('0.8'):.1f}", clientAlgoId=name)
                else:
                    answer = server.market(newClientOrderId=name)
                assert answer[0] == 200, answer
                acknowledged.append(name)
            before = _books(server)
            assert before["position"] == f"{0.04 * (round_ + 1):.3f}"
            server.process.kill()
            server.process.wait()
            server.start()
            after = _books(server)
            assert after == before
            known = {o["clientOrderId"] for o in server.signed("GET", "/fapi/v1/allOrders", symbol=SYMBOL)[1]}
            known |= {o["clientAlgoId"] for o in server.signed("GET", "/fapi/v1/openAlgoOrders")[1]}
            assert set(acknowledged) <= known
        trades = [t["id"] for t in before["trades"]]
        assert trades == sorted(set(trades)), "trade ids go on where they were"
        assert server.market()[1]["orderId"] > max(o["orderId"] for o in before["orders"])
    finally:
        stop_process(server.process)


def _books(server):
    account = server.signed("GET", "/fapi/v2/account")[1]
    return {"wallet": account["totalWalletBalance"],
            "position": next(p["positionAmt"] for p in account["positions"] if p["symbol"] == SYMBOL),
            "open": server.signed("GET", "/fapi/v1/openOrders")[1],
            "algos": server.signed("GET", "/fapi/v1/openAlgoOrders")[1],
            "orders": server.signed("GET", "/fapi/v1/allOrders", symbol=SYMBOL)[1],
            "trades": server.signed("GET", "/fapi/v1/userTrades", symbol=SYMBOL)[1],
            "income": server.signed("GET", "/fapi/v1/income", limit=1000)[1]}


def test_kill_minus_nine_in_the_middle_of_orders_keeps_what_was_acknowledged(tmp_path):
    server = Paper(write_config(tmp_path, paper=ALONE))
    try:
        for round_ in range(2):
            server.control("faults", {"match": "POST /fapi/v1/order", "skip": 5, "do": "delay_answer",
                                      "delay_ms": 60_000})
            for number in range(5):
                assert server.market(newClientOrderId=f"r{round_}n{number}")[0] == 200
            with ThreadPoolExecutor(1) as asking:
                last = asking.submit(server.market, newClientOrderId=f"r{round_}last", timeout=60)
                wait_until(lambda: server.position() == Decimal("0.060") * (round_ + 1))
                server.process.kill()
                server.process.wait()
                with pytest.raises(OSError):
                    last.result()
            server.start()
            orders = server.signed("GET", "/fapi/v1/allOrders", symbol=SYMBOL)[1]
            assert sum(o["status"] == "FILLED" for o in orders) == 6 * (round_ + 1), "executed is kept too"
            assert server.position() == Decimal("0.060") * (round_ + 1)
    finally:
        stop_process(server.process)


@pytest.mark.parametrize(("wrong", "error"), [("books", "InvariantError"), ("disk", "OperationalError")])
def test_exchange_whose_books_or_disk_fail_ends_and_comes_back_with_what_is_on_disk(tmp_path, wrong, error):
    server = Paper(write_config(tmp_path, paper=ALONE), "tests.wrong_paper")
    try:
        assert server.market(newClientOrderId="kept")[0] == 200
        if wrong == "disk":  # as if it were full: no file grows beyond what the largest has
            most = max(path.stat().st_size for path in (tmp_path / "var").glob("paper.db*"))
            resource.prlimit(server.process.pid, resource.RLIMIT_FSIZE, (most, most))
        try:
            status = server.market(quantity="0.013" if wrong == "books" else "0.010", timeout=5)[0]
        except (OSError, http.client.HTTPException):
            status = None
        assert status in (None, 500), "nothing is acknowledged that is not on disk"
        assert server.process.wait(10) == EXIT_SOFTWARE
        last = json.loads(server.log.read_text().splitlines()[-1])
        assert (last["event"], last["error"].split(":")[0]) == ("crashed", error)
        server.start()
        assert server.position() == Decimal("0.010")
        orders = server.signed("GET", "/fapi/v1/allOrders", symbol=SYMBOL)[1]
        assert [o["clientOrderId"] for o in orders] == ["kept"]
        assert server.market()[0] == 200
    finally:
        assert stop_process(server.process) == 0


@pytest.mark.parametrize(("fault", "outcome", "filled"), [
    ({"do": "lose_request"}, OSError, "0"), ({"do": "lose_answer"}, OSError, "0.010"),
    ({"do": "hang"}, OSError, "0"), ({"do": "truncate"}, http.client.IncompleteRead, "0.010"),
    ({"do": "duplicate"}, 200, "0.020"), ({"do": "delay", "delay_ms": 300}, 200, "0.010"),
    ({"do": "delay_answer", "delay_ms": 300}, 200, "0.010"),
    ({"do": "answer", "status": 503, "body": '{"code":-1000,"msg":"Unknown error"}'}, 503, "0"),
    ({"do": "answer", "status": 408, "body": '{"code":-1007,"msg":""}', "is_executed": True}, 408, "0.010"),
    ({"do": "answer", "body": "<html>", "is_executed": True}, 200, "0.010")])
def test_fault_of_each_kind_does_what_it_says_once_and_to_the_right_request(paper, fault, outcome, filled):
    paper.control("faults", {"match": "POST /fapi/v1/order", "skip": 1, **fault})
    assert paper.market()[0] == 200
    began = time.monotonic()
    if isinstance(outcome, int):
        assert paper.market()[0] == outcome
    else:
        with pytest.raises((outcome, http.client.RemoteDisconnected)):
            paper.market(timeout=0.5)
    assert time.monotonic() - began >= fault.get("delay_ms", 0) / 1000
    assert paper.position() == Decimal("0.010") + Decimal(filled)
    assert paper.market("SELL")[0] == 200, "it was for one request"
    assert paper.control("faults", method="GET") == []


def test_fault_delaying_past_the_fence_is_refused_by_the_time_window(paper):
    paper.control("faults", {"match": "POST /fapi/v1/order", "do": "delay", "delay_ms": 700})
    assert paper.market(recvWindow=500)[1]["code"] == -1021
    assert paper.position() == 0


def test_clock_fault_shifts_the_servers_time_and_its_window(paper):
    paper.control("clock", {"offset_ms": 6_000})  # its market stands still for so long afterwards
    server_ms = paper.call("GET", "/fapi/v1/time")[1]["serverTime"]
    assert abs(server_ms - time.time() * 1000 - 6_000) < 1_000
    assert paper.market()[1]["code"] == -1021
    paper.control("clock", {"offset_ms": 0})
    assert paper.market()[0] == 200


def test_manual_trade_changes_the_position_behind_the_clients_back(paper):
    order = paper.control("trade", {"account": "main", "symbol": SYMBOL, "side": "SELL", "qty": "0.010"})
    assert order["client_id"].startswith("web_")
    assert paper.position() == Decimal("-0.010")
    for wish in ({}, {"account": "x", "symbol": SYMBOL, "side": "BUY", "qty": "1"}, {"qty": "NaN"}, []):
        assert paper.call("POST", "/paper/trade", body=json.dumps(wish))[0] == 400


def test_hedged_account_is_readable_and_cannot_trade(paper):
    assert paper.signed("POST", "/fapi/v1/positionSide/dual", dualSidePosition="true")[0] == 200
    assert paper.signed("GET", "/fapi/v1/positionSide/dual")[1] == {"dualSidePosition": True}
    assert paper.market()[1]["code"] == -4061
    assert paper.signed("POST", "/fapi/v1/positionSide/dual", dualSidePosition="false")[0] == 200


def run_ws(paper, path, work):
    async def run():
        async with aiohttp.ClientSession() as session, session.ws_connect(f"ws://{paper.host}{path}") as ws:
            return await asyncio.wait_for(work(ws), 20)
    return asyncio.run(run())


def listen_key(paper):
    return paper.call("POST", "/fapi/v1/listenKey", headers=KEY)[1]["listenKey"]


async def events_until(ws, done):
    seen = []
    while not (seen and done(seen[-1])):
        seen.append(await ws.receive_json())
    return seen


@pytest.mark.parametrize("path", [
    "/ws/{}", "/private/ws?listenKey={}", "/private/ws/{}", "/stream?streams={}"])
def test_user_stream_with_an_order_tells_its_life_in_order(paper, path):
    key = listen_key(paper)
    assert listen_key(paper) == key, "a live key is given again"

    async def work(ws):
        answer = await asyncio.to_thread(paper.market, newClientOrderId=f"u{next(names)}")
        unwrap = (lambda e: e["data"]) if path.startswith("/stream") else (lambda e: e)
        return answer[1], [unwrap(e) for e in await events_until(
            ws, lambda e: unwrap(e)["e"] == "ORDER_TRADE_UPDATE" and unwrap(e)["o"]["X"] == "FILLED")]

    order, events = run_ws(paper, path.format(key), work)
    updates = [e["o"] for e in events if e["e"] == "ORDER_TRADE_UPDATE"]
    first = updates[0]
    assert (first["x"], first["i"], first["c"]) == ("NEW", order["orderId"], order["clientOrderId"])
    assert all(u["x"] == "TRADE" for u in updates[1:])
    assert sum(Decimal(u["l"]) for u in updates) == Decimal("0.010")
    account = next(e["a"] for e in events if e["e"] == "ACCOUNT_UPDATE")
    assert account["m"] == "ORDER"
    assert {p["s"]: p["pa"] for p in account["P"]} == {SYMBOL: "0.010"} or len(updates) > 2
    rows = paper.signed("GET", "/fapi/v1/userTrades", symbol=SYMBOL, orderId=order["orderId"])[1]
    assert [(r["id"], r["commission"]) for r in rows] == [(u["t"], u["n"]) for u in updates[1:]]


def test_stop_with_the_market_reaching_it_triggers_and_says_so_like_binance(paper):
    paper.market()
    key = listen_key(paper)

    async def work(ws):
        for type_, away in (("STOP_MARKET", Decimal("-0.2")), ("TAKE_PROFIT_MARKET", Decimal("0.2"))):
            status = 0
            while status != 200:  # the market may be past it by the time it arrives
                trigger = str(await asyncio.to_thread(paper.price) + away)
                status, answer, _ = await asyncio.to_thread(paper.stop, type_, trigger, clientAlgoId=type_)
                assert status == 200 or answer["code"] == -2021, answer
        return await events_until(ws, lambda e: e["e"] == "ALGO_UPDATE" and e["o"]["X"] == "FINISHED")

    events = run_ws(paper, f"/private/ws?listenKey={key}", work)
    done = events[-1]["o"]
    mine = [e["o"] for e in events if e["e"] == "ALGO_UPDATE" and e["o"]["aid"] == done["aid"]]
    assert [o["X"] for o in mine] == ["NEW", "TRIGGERING", "TRIGGERED", "FINISHED"]
    assert [bool(o["ai"]) for o in mine] == [False, False, True, True]
    assert (done["aq"], done["act"]) == ("0.010", "MARKET")
    child = [e["o"] for e in events if e["e"] == "ORDER_TRADE_UPDATE"]
    assert [(o["x"], o["c"], str(o["i"]), o["o"], o["ot"], o["R"]) for o in child[:1]] == [
        ("NEW", done["caid"], done["ai"], "MARKET", done["caid"], True)]
    assert paper.position() == 0
    row = paper.signed("GET", "/fapi/v1/algoOrder", clientAlgoId=done["caid"])[1]
    assert (row["algoStatus"], row["actualOrderId"]) == ("FINISHED", done["ai"])
    order = paper.signed("GET", "/fapi/v1/order", symbol=SYMBOL, origClientOrderId=done["caid"])[1]
    assert (order["status"], order["origType"]) == ("FILLED", done["caid"])


def test_listen_key_that_expired_says_so_and_is_not_kept_alive(paper):
    key = listen_key(paper)

    async def work(ws):
        await asyncio.to_thread(paper.control, "stream", {"match": "user:main", "do": "expire"})
        return await ws.receive_json()

    assert run_ws(paper, f"/ws/{key}", work)["e"] == "listenKeyExpired"
    answer = paper.call("PUT", "/fapi/v1/listenKey", headers=KEY)
    assert answer[1]["code"] == -1125
    assert listen_key(paper) != key


def test_first_question_for_candles_is_answered_at_once(paper):
    status, rows, took_s = paper.first_candles
    assert (status, rows) == (200, 500)
    assert took_s < 2, "all else waits meanwhile, the beat too"


def test_client_that_expects_to_be_told_to_continue_is(paper):
    with socket.create_connection(paper.host.split(":"), timeout=5) as client:
        client.sendall(b"POST /fapi/v1/order HTTP/1.1\r\nHost: paper\r\nExpect: 100-continue\r\n"
                       b"Content-Length: 3\r\nConnection: close\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 100 ")
        client.sendall(b"a=b")
        assert client.recv(100).startswith(b"HTTP/1.1 401 ")


def test_market_streams_with_both_generations_of_urls_say_the_same(paper):
    async def first(ws):
        return await ws.receive_json()

    for path in ("/ws/btcusdt@trade", "/public/ws/btcusdt@trade", "/public/ws/btcusdt@bookTicker",
                 "/ws/btcusdt@markPrice@1s", "/ws/btcusdt@depth@100ms", "/market/ws/btcusdt@aggTrade"):
        frame = run_ws(paper, path, first)
        assert (frame["s"], "stream" in frame) == (SYMBOL, False)
    for path in ("/stream?streams=btcusdt@trade/ethusdt@trade", "/market/stream?streams=btcusdt@kline_1m"):
        frame = run_ws(paper, path, first)
        assert frame["stream"].startswith(("btcusdt@", "ethusdt@"))
        assert frame["data"]["s"] in ("BTCUSDT", "ETHUSDT")


def test_subscriptions_with_ids_are_added_listed_and_removed(paper):
    async def work(ws):
        async def ask(method, params, id_):
            await ws.send_json({"method": method, "params": params, "id": id_})
            return next(m for m in reversed(await events_until(ws, lambda m: m.get("id") == id_)))

        assert await ask("SUBSCRIBE", ["btcusdt@markPrice@1s", "btcusdt@depth@500ms"], 1) == {
            "result": None, "id": 1}
        assert (await ask("LIST_SUBSCRIPTIONS", [], 2))["result"] == [
            "btcusdt@markPrice@1s", "btcusdt@depth@500ms"]
        frames = [await ws.receive_json() for _ in range(5)]
        assert {f["stream"] for f in frames} <= {"btcusdt@markPrice@1s", "btcusdt@depth@500ms"}
        await ask("UNSUBSCRIBE", ["btcusdt@markPrice@1s", "btcusdt@depth@500ms", "never@was"], 3)
        assert (await ask("LIST_SUBSCRIPTIONS", [], 4))["result"] == []
        for garbage in ("", "{", "[]", "null", '{"method":"X","id":5}', '{"method":["a"],"id":5}',
                        '{"method":"SUBSCRIBE","params":{"a":1},"id":5}', "[" * 30_000,
                        '{"method":"SUBSCRIBE","params":[1,null],"id":5}', "\u0000", f'"{"x" * 50_000}"'):
            await ws.send_str(garbage)
            assert "error" in await ws.receive_json()
        return await ask("LIST_SUBSCRIPTIONS", [], 6)

    assert run_ws(paper, "/stream", work) == {"result": [], "id": 6}


def test_stream_faults_with_open_connections_gap_freeze_close_and_go_half_open(paper):
    async def work(ws):
        def fault(**what):
            return asyncio.to_thread(paper.control, "stream", {"match": "btcusdt@aggTrade", **what})

        first = (await ws.receive_json())["a"]
        assert await fault(do="gap", count=3) == {"connections": 1}
        ids = [first]
        while ids[-1] < first + 20:
            ids.append((await ws.receive_json())["a"])
        assert len(range(first, ids[-1] + 1)) - len(ids) == 3, "exactly three were lost"
        await fault(do="freeze", duration_ms=500)
        began = time.monotonic()
        last = ids[-1]
        while (newest := (await ws.receive_json())["a"]) == last + 1:  # what was on its way already
            last = newest
        assert time.monotonic() - began > 0.3
        await fault(do="half_open")
        with pytest.raises(asyncio.TimeoutError):
            while True:
                await asyncio.wait_for(ws.receive(), 0.4)
        await fault(do="close")
        return await ws.receive()

    message = run_ws(paper, "/ws/btcusdt@aggTrade", work)
    assert message.type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.ERROR, aiohttp.WSMsgType.CLOSE)


def test_garbage_of_all_kinds_never_ends_the_server(paper):
    rng, host = random.Random(1), paper.host.split(":")
    requests = [b"\x00\xff" * 50, b"GET\r\n\r\n", b"GET / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nab",
                b"POST /fapi/v1/order HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
                b"GET /ws/btcusdt@trade HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\n\r\n",
                b"GET /ws HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
                + os.urandom(300),
                b"GET /fapi/v1/depth?symbol=%ff%fe&limit=\xc3 HTTP/1.1\r\nHost: x\r\n\r\n"]
    requests += [rng.randbytes(rng.randrange(1, 400)) for _ in range(30)]
    for request in requests:
        with socket.create_connection((host[0], int(host[1])), 2) as connection:
            connection.settimeout(0.2)
            connection.sendall(request)
            try:
                connection.recv(1000)
            except OSError:
                pass
    values = ["", "0", "-1", "NaN", "1e999", "\x00", SYMBOL, "true", "9" * 400, "'; DROP", "\u202e", "1.1.1"]
    keys = ["symbol", "limit", "startTime", "endTime", "fromId", "orderId", "interval", "side", "type",
            "quantity", "price", "timeInForce", "algoId", "clientAlgoId", "triggerPrice", "leverage"]
    for name, route in ROUTES.items():
        method, path = name.split()
        for _ in range(6):
            params = {key: rng.choice(values) for key in rng.sample(keys, rng.randrange(len(keys)))}
            if rng.random() < 0.7:
                params["symbol"] = SYMBOL
            call = paper.signed if route.security == "signed" else lambda m, p, **kw: paper.call(m, p, kw)
            status, answer, _ = call(method, path, **params)
            assert status in (200, 400, 401), (name, params, answer)
            assert not isinstance(answer, bytes), (name, params, answer)
    assert paper.process.poll() is None
    assert paper.is_up()
    log = (paper.config.parent / "bot.paper.log").read_text().splitlines()
    assert {"message_dropped"} <= {json.loads(line)["event"] for line in log}, "counted, as JSON"


def test_order_book_by_the_documented_procedure_follows_recorded_frames(tmp_path):
    """Buffer the stream, take the snapshot, drop what is older, and then each pu is the u before it."""
    recording = data_path("hftbacktest/usdm-btcusdt-20240808.gz")
    if not recording.is_file():
        pytest.skip(f"the recording {recording} is absent (TRADEHOST_DATA)")
    with gzip.open(recording) as lines:
        snapshot = next(json.loads(raw) for raw in (line.partition(b" ")[2] for line in lines)
                        if b"lastUpdateId" in raw)
    server = Paper(write_config(tmp_path, paper={
        "market": "recording", "recording": str(recording), "playback": "raw", "speed": Decimal(0),
        **ALONE}))

    async def work(ws):
        book = [{float(price): qty for price, qty in snapshot[side]} for side in ("bids", "asks")]
        told = server.call("GET", "/fapi/v1/depth", {"symbol": SYMBOL, "limit": 1000})[1]
        assert [[float(price) for price, _ in told[side]] for side in ("bids", "asks")] == [*map(list, book)]
        last, applied, quote = None, 0, None
        while applied < 2_000:
            event = await ws.receive_json()
            if event["e"] == "bookTicker":
                quote = event
                continue
            if event["u"] < snapshot["lastUpdateId"]:
                continue
            if last is None:
                assert event["U"] <= snapshot["lastUpdateId"] <= event["u"]
            else:
                assert event["pu"] == last, "no gap"
            last, applied = event["u"], applied + 1
            for side, changes in zip(book, (event["b"], event["a"]), strict=True):
                side.update((float(price), qty) for price, qty in changes)
                for price in [float(price) for price, qty in changes if float(qty) == 0]:
                    del side[price]
            assert max(book[0]) < min(book[1]), "never crossed"
        assert abs(max(book[0]) - float(quote["b"])) < 20
        return last

    async def run():
        async with aiohttp.ClientSession() as session, session.ws_connect(
                f"ws://{server.host}/ws/btcusdt@depth@0ms", max_msg_size=0) as ws:
            await ws.send_json({"method": "SUBSCRIBE", "params": ["btcusdt@bookTicker"], "id": 1})
            while "id" not in await ws.receive_json():
                pass
            return await asyncio.wait_for(work(ws), 60)

    try:
        assert asyncio.run(run()) > snapshot["lastUpdateId"]
    finally:
        assert stop_process(server.process) == 0


def test_raw_playback_as_fast_as_it_goes_waits_for_a_slow_reader_and_loses_nothing(tmp_path):
    recording = data_path("hftbacktest/usdm-btcusdt-20240808.gz")
    if not recording.is_file():
        pytest.skip(f"the recording {recording} is absent (TRADEHOST_DATA)")
    with gzip.open(recording) as lines:
        frames = [line.partition(b" ")[2].strip() for line in lines]
    recorded = [frame for frame in frames if frame.startswith(b'{"stream"')]
    server = Paper(write_config(tmp_path, paper={
        "market": "recording", "recording": str(recording), "playback": "raw", "speed": Decimal(0),
        **ALONE}))

    fast, slow = [], []

    async def read(session, seen):
        path = "/stream?streams=btcusdt@trade/btcusdt@bookTicker/btcusdt@depth@0ms"
        async with session.ws_connect(f"ws://{server.host}{path}", max_msg_size=0) as ws:
            while len(seen) < len(recorded):
                seen.append((await ws.receive()).data.encode())
                if seen is slow and len(seen) == 10_000:
                    await asyncio.sleep(2)
                    assert len(fast) < len(recorded) * 0.8, "nothing is buffered without bound"

    async def run():
        async with aiohttp.ClientSession() as session:
            await asyncio.wait_for(asyncio.gather(read(session, fast), read(session, slow)), 120)

    try:
        asyncio.run(run())
        assert fast == recorded, "byte-equal, in order, once"
        assert slow == recorded, "the playback waits for who reads slowly"
        assert server.market()[1]["code"] == -4108, "what was long ago cannot be traded"
    finally:
        assert stop_process(server.process) == 0
