"""The exchange edge without a network: what is built, signed, asked, and how answers are read."""

import asyncio
import hashlib
import hmac
import json
import subprocess
import sys
from decimal import Decimal
from urllib.parse import parse_qsl, urlsplit

import msgspec
import pytest

from bot.budget import COUNTERS, Budget, Usage
from bot.config import ExchangeConfig
from bot.errors import ConfigError, ExchangeError, InvariantError
from bot.exchange import INCOME_PAGES_MAX, PAGE_ROWS, WEEK_MS, Exchange
from bot.orders import OrderRequest
from bot.outcome import Answer
from bot.rows import SymbolSettings
from tests.harness import API_KEY, API_SECRET, ROOT, data_path

BTC = "BTC/USDT:USDT"
START_MS = 1_700_000_000_000
RECORDED = data_path("cryptofeed/BINANCE_FUTURES.0")
CONFIG = ExchangeConfig(rest_url="http://127.0.0.1:5560", ws_url="ws://127.0.0.1:5560/", api_key_file="",
                        api_secret_file="")
INFO = {"symbols": [{
    "symbol": "BTCUSDT", "contractType": "PERPETUAL", "deliveryDate": 4_133_404_800_000, "status": "TRADING",
    "baseAsset": "BTC", "quoteAsset": "USDT", "marginAsset": "USDT", "pricePrecision": 2,
    "quantityPrecision": 3,
    "orderTypes": ["LIMIT", "MARKET", "STOP", "STOP_MARKET", "TAKE_PROFIT", "TAKE_PROFIT_MARKET"],
    "filters": [{"filterType": "PRICE_FILTER", "minPrice": "1", "maxPrice": "1000000", "tickSize": "0.10"},
                {"filterType": "LOT_SIZE", "minQty": "0.001", "maxQty": "1000", "stepSize": "0.001"},
                {"filterType": "MARKET_LOT_SIZE", "minQty": "0.002", "maxQty": "120", "stepSize": "0.001"},
                {"filterType": "MIN_NOTIONAL", "notional": "100"}]}]}


class FakeClock:
    wall, mono = START_MS * 1_000_000, 5_000_000_000

    def __init__(self):
        self.slept = []

    async def sleep(self, seconds):
        self.slept.append(seconds)

    def wall_ns(self):
        return self.wall

    def mono_ns(self):
        return self.mono

    def advance(self, ns):
        self.wall += ns
        self.mono += ns


class Lane:
    """Answers by path; remembers what was asked. A path's answer is a value, an Answer, or a function."""

    def __init__(self, clock, **answers):
        self.clock, self.asked, self.refusals = clock, [], []
        self.answers = {"time": lambda _: {"serverTime": self.clock.wall // 1_000_000},
                        "exchangeInfo": INFO, **answers}

    async def request(self, method, url, headers, body=b"", may_send=None):
        parts = urlsplit(url)
        params = dict(parse_qsl(parts.query or body.decode()))
        self.asked.append((method, parts.path, params, headers))
        answer = self.answers[parts.path.rsplit("/", 1)[1]]
        answer = answer(params) if callable(answer) else answer
        if isinstance(answer, Answer):
            return msgspec.structs.replace(answer, received_ns=self.clock.wall)
        return Answer(status=200, body=json.dumps(answer).encode(), is_sent=True)

    def of(self, name):
        return [params for _, path, params, _ in self.asked if path.endswith("/" + name)]


def refusal(code, status=400, msg="no", **headers):
    return Answer(status=status, body=json.dumps({"code": code, "msg": msg}).encode(), is_sent=True,
                  headers={name.replace("_", "-"): value for name, value in headers.items()})


def loaded(keys=(API_KEY, API_SECRET), config=CONFIG, **answers):
    clock = FakeClock()
    lane = Lane(clock, **answers)
    exchange = Exchange(config, clock, orders=lane, queries=lane, keys=keys)
    asyncio.run(exchange.load())
    lane.asked.clear()
    return exchange, lane, clock


def market_order(**changes):
    return OrderRequest(**{"client_order_id": "th0abco0", "symbol": BTC, "side": "buy",
                           "qty": Decimal("0.005"), **changes})


def stop_order(**changes):
    return market_order(**{"side": "sell", "type": "stop", "trigger_price": Decimal("61000.1"),
                           "reduce_only": True, **changes})


def test_exchange_outside_the_table_is_a_config_error():
    for name in ("bybit", "binance", "__init__"):
        with pytest.raises(ConfigError, match=r"exchange\.id: must be one of binanceusdm"):
            Exchange(msgspec.structs.replace(CONFIG, id=name), FakeClock(), orders=None, queries=None,
                     keys=None)


def test_load_with_both_size_rules_takes_the_stricter():
    exchange, _lane, _clock = loaded()
    instrument = exchange.instruments[BTC]
    assert (instrument.exchange_symbol, instrument.status) == ("BTCUSDT", "TRADING")
    assert instrument.settle == "USDT"
    assert (instrument.price_increment, instrument.qty_increment) == (Decimal("0.1"), Decimal("0.001"))
    assert (instrument.qty_min, instrument.qty_max) == (Decimal("0.002"), Decimal(120))
    assert (instrument.notional_min, instrument.contract_size) == (Decimal(100), Decimal(1))


@pytest.mark.skipif(not RECORDED.is_file(), reason=f"recorded exchangeInfo is not at {RECORDED}")
def test_load_with_recorded_listing_reads_every_contract_exactly():
    info = json.loads(RECORDED.read_text().split(": ", 1)[1].split("\n")[0])
    exchange, _lane, _clock = loaded(exchangeInfo=info)
    listed = {row["symbol"]: row for row in info["symbols"]}
    assert len(exchange.instruments) == len(listed) == 122
    for instrument in exchange.instruments.values():
        row = listed[instrument.exchange_symbol]
        rules = {rule["filterType"]: rule for rule in row["filters"]}
        assert instrument.status == row["status"]
        assert instrument.price_increment == Decimal(rules["PRICE_FILTER"]["tickSize"])
        assert instrument.qty_increment >= Decimal(rules["LOT_SIZE"]["stepSize"])
        assert instrument.qty_max <= Decimal(rules["MARKET_LOT_SIZE"]["maxQty"])
        assert instrument.notional_min == Decimal(rules["MIN_NOTIONAL"]["notional"])
        assert instrument.symbol.startswith(f"{row['baseAsset']}/{row['quoteAsset']}:{row['marginAsset']}")


def test_load_with_one_exotic_contract_keeps_the_others():
    bare = {key: value for key, value in INFO["symbols"][0].items() if key != "filters"}
    info = {"symbols": [{**bare, "symbol": "ODD"}, *INFO["symbols"], 5]}
    exchange, _lane, _clock = loaded(exchangeInfo=info)
    assert list(exchange.instruments) == [BTC]
    assert exchange.build(market_order())


@pytest.mark.parametrize("broken", [
    {}, {"symbols": [{}]}, {"symbols": 5}, {"symbols": []}, [], {"symbols": [{"symbol": "X"}]},
    Answer(status=200, body=b"<html>", is_sent=True)])
def test_load_with_garbled_listing_raises_exchange_error(broken):
    with pytest.raises(ExchangeError):
        loaded(exchangeInfo=broken)


def test_measure_clock_with_uneven_round_trips_believes_the_fastest():
    clock = FakeClock()
    trips = iter([(400, 100), (10, 10), (900, 5)])  # milliseconds there and back

    def time(_):
        there, back = next(trips)
        clock.advance(there * 1_000_000)
        server_ms = clock.wall // 1_000_000 + 1_250
        clock.advance(back * 1_000_000)
        return {"serverTime": server_ms}
    lane = Lane(clock, time=time)
    exchange = Exchange(CONFIG, clock, orders=lane, queries=lane, keys=None)
    assert exchange.clock_offset_ns == 0
    asyncio.run(exchange.measure_clock())
    assert abs(exchange.clock_offset_ns - 1_250_000_000) <= 1_000_000
    server_ns = exchange.server_ns()
    clock.wall += 3_600 * 10**9  # the host's clock steps: the exchange's does not
    assert exchange.server_ns() == server_ns
    assert abs(exchange.clock_offset_ns - 1_250_000_000 + 3_600 * 10**9) <= 1_000_000


def signature_of(text):
    return hmac.new(API_SECRET.encode(), text.encode(), hashlib.sha256).hexdigest()


def test_build_with_market_order_signs_exactly_that():
    exchange, _lane, clock = loaded()
    signed = exchange.build(market_order(reduce_only=True))
    text, _, signature = signed.body.decode().rpartition("&signature=")
    assert dict(parse_qsl(text)) == {
        "symbol": "BTCUSDT", "side": "BUY", "type": "MARKET", "quantity": "0.005", "reduceOnly": "true",
        "newClientOrderId": "th0abco0", "newOrderRespType": "RESULT", "recvWindow": "3000",
        "timestamp": str(clock.wall // 1_000_000)}
    assert signature == signature_of(text)
    assert signed.url == "http://127.0.0.1:5560/fapi/v1/order"
    assert signed.headers["X-MBX-APIKEY"] == API_KEY
    assert signed.fence_ns == (signed.timestamp_ms + 3_000) * 1_000_000


@pytest.mark.parametrize(("kind", "name"), [("stop", "STOP_MARKET"), ("take_profit", "TAKE_PROFIT_MARKET")])
def test_build_with_conditional_order_goes_to_the_algo_endpoint(kind, name):
    exchange, _lane, clock = loaded()
    signed = exchange.build(stop_order(type=kind))
    text, _, signature = signed.body.decode().rpartition("&signature=")
    assert dict(parse_qsl(text)) == {
        "symbol": "BTCUSDT", "side": "SELL", "type": name, "quantity": "0.005", "triggerPrice": "61000.1",
        "reduceOnly": "true", "clientAlgoId": "th0abco0", "algoType": "CONDITIONAL",
        "workingType": "MARK_PRICE", "newOrderRespType": "RESULT", "recvWindow": "3000",
        "timestamp": str(clock.wall // 1_000_000)}
    assert signature == signature_of(text)
    assert signed.url == "http://127.0.0.1:5560/fapi/v1/algoOrder"
    assert signed.fence_ns == clock.wall + 3_000 * 1_000_000


def test_build_with_measured_clock_stamps_the_exchanges_time():
    exchange, _lane, clock = loaded(time=lambda _: {"serverTime": START_MS + 90_000})
    signed = exchange.build(market_order())
    assert signed.timestamp_ms == START_MS + 90_000
    clock.wall += 10**12  # a step of the host's clock
    assert exchange.build(market_order()).timestamp_ms == START_MS + 90_000


@pytest.mark.parametrize("request_", [
    market_order(qty=Decimal("0.0056")),  # ccxt would cut it to 0.005
    stop_order(trigger_price=Decimal("61000.17")),  # ccxt would round it to 61000.2
    stop_order(reduce_only=False), stop_order(trigger_price=None), stop_order(trigger_price=Decimal(0))])
def test_build_with_what_would_leave_otherwise_than_asked_raises(request_):
    exchange, lane, _clock = loaded()
    with pytest.raises((InvariantError, ExchangeError)):
        exchange.build(request_)
    assert not lane.asked


@pytest.mark.parametrize(("key", "value"), [
    ("symbol", "ETHUSDT"), ("side", "SELL"), ("quantity", "0.006"), ("type", "LIMIT"), ("reduceOnly", True),
    ("newClientOrderId", "x-cvBPrNm9abc"), ("price", "1"), ("closePosition", True), ("positionSide", "LONG"),
    ("recvWindow", 60_000), ("timestamp", 1), ("quantity", None)])
def test_build_with_a_library_that_changes_anything_raises(key, value, monkeypatch):
    exchange, _lane, _clock = loaded()
    library = exchange._ccxt
    real = library.sign

    def meddling(path, api, method, params):
        return real(path, api, method, {k: v for k, v in {**params, key: value}.items() if v is not None})
    monkeypatch.setattr(library, "sign", meddling)
    with pytest.raises(InvariantError, match=key):
        exchange.build(market_order())


def test_exchange_imports_none_of_the_others_that_the_library_has_nor_stands_in_its_way():
    told = subprocess.run([sys.executable, "-c", """
import sys
from bot.clock import Clock
from bot.config import ExchangeConfig
from bot.exchange import Exchange
Exchange(ExchangeConfig(rest_url="http://127.0.0.1:5560", ws_url="ws://127.0.0.1:5560/", api_key_file="",
                        api_secret_file=""), Clock(), orders=None, queries=None, keys=None)
assert "ccxt.binance" in sys.modules and "ccxt.kraken" not in sys.modules and "ccxt" not in sys.modules
import ccxt
assert ccxt.binanceusdm is sys.modules["ccxt.binanceusdm"].binanceusdm and ccxt.kraken
print("whole")
"""], capture_output=True, text=True, timeout=60)
    assert told.stdout == "whole\n", told.stderr


def test_build_with_a_library_that_sends_elsewhere_raises(monkeypatch):
    exchange, _lane, _clock = loaded()
    real = exchange._ccxt.sign
    monkeypatch.setattr(exchange._ccxt, "sign", lambda path, *rest: real("order/test", *rest))
    with pytest.raises(InvariantError, match="order/test"):
        exchange.build(market_order())


@pytest.mark.parametrize("request_", [
    market_order(symbol="ETH/USDT:USDT"), market_order(qty=Decimal("0.0004")), market_order(qty=Decimal(0))])
def test_build_with_what_cannot_be_built_raises_exchange_error(request_):
    exchange, _lane, _clock = loaded()
    with pytest.raises(ExchangeError):
        exchange.build(request_)


def test_build_without_keys_raises_exchange_error():
    exchange, _lane, _clock = loaded(keys=None)
    with pytest.raises(ExchangeError):
        exchange.build(market_order())


def test_signed_request_when_shown_holds_no_secret():
    exchange, _lane, _clock = loaded()
    signed = exchange.build(market_order())
    assert "quantity=0.005" in signed.sent_text and signed.sent_text.startswith("POST /fapi/v1/order ")
    for text in (repr(signed), str(signed), signed.sent_text, f"{signed}", repr([signed]), repr(exchange)):
        assert API_KEY not in text and API_SECRET not in text and "signature" not in text


def test_submit_sends_the_signed_bytes_and_passes_the_last_question_on():
    clock, seen = FakeClock(), {}

    class OrderLane(Lane):
        async def request(self, method, url, headers, body=b"", may_send=None):
            seen.update(method=method, url=url, headers=headers, body=body, may_send=may_send)
            return Answer(status=200, body=b"{}", is_sent=True, headers={"x-mbx-order-count-10s": "7"})
    exchange = Exchange(CONFIG, clock, orders=OrderLane(clock), queries=Lane(clock),
                        keys=(API_KEY, API_SECRET))
    asyncio.run(exchange.load())
    signed = exchange.build(market_order())
    assert asyncio.run(exchange.submit(signed, may_send=lambda: "halted")).status == 200
    may_send = seen.pop("may_send")
    assert seen == {"method": "POST", "url": signed.url, "headers": signed.headers, "body": signed.body}
    assert may_send() == "halted"
    exchange.budget.ban(clock.wall_ns() + 9 * 10**9, clock.wall_ns())
    assert may_send() == "banned for another 9 s"
    assert exchange.budget.usage.used["orders_10s"][1] == 7


@pytest.mark.parametrize(("is_conditional", "path", "name"), [
    (False, "/fapi/v1/order", "origClientOrderId"), (True, "/fapi/v1/algoOrder", "clientAlgoId")])
def test_cancel_asks_by_our_id_with_the_exchanges_time(is_conditional, path, name):
    exchange, lane, clock = loaded(order={}, algoOrder={}, time=lambda _: {"serverTime": START_MS - 5_000})
    asyncio.run(exchange.cancel(BTC, "th1", is_conditional=is_conditional))
    [(method, asked, params, _headers)] = lane.asked
    assert (method, asked, params[name], params["symbol"]) == ("DELETE", path, "th1", "BTCUSDT")
    assert (params["timestamp"], params["recvWindow"]) == (str(START_MS - 5_000), "3000")
    assert clock.wall == START_MS * 1_000_000


def order_row(**changes):
    return {"orderId": 3, "clientOrderId": "th1", "symbol": "BTCUSDT", "side": "BUY", "origQty": "0.005",
            "executedQty": "0.005", "status": "FILLED", "reduceOnly": False, "stopPrice": "0",
            "type": "MARKET", "updateTime": START_MS, **changes}


def algo_row(**changes):
    return {"algoId": 8, "clientAlgoId": "th1", "symbol": "BTCUSDT", "side": "SELL", "quantity": "0.005",
            "algoStatus": "NEW", "triggerPrice": "61000.1", "reduceOnly": True, "orderType": "STOP_MARKET",
            "actualOrderId": "", "actualQty": "0", "updateTime": START_MS, **changes}


def ask(exchange, is_conditional=False):
    return asyncio.run(exchange.order(BTC, "th1", is_conditional=is_conditional))


@pytest.mark.parametrize("code", [-2013, -2011])
def test_order_with_a_definite_not_found_is_none(code):
    exchange, lane, _clock = loaded(order=refusal(code), algoOrder=refusal(code))
    assert ask(exchange) is None
    assert ask(exchange, is_conditional=True) is None
    assert [path.rsplit("/")[-1] for _, path, _, _ in lane.asked] == ["order", "algoOrder", "order"]


@pytest.mark.parametrize("answer", [
    refusal(-2013, status=500), refusal(-2014, status=401), refusal(-1000, status=503),
    Answer(is_sent=True, error="torn"), Answer(status=200, body=b"", is_sent=True), {}, [],
    order_row(symbol="ETHUSDT"), order_row(clientOrderId="th2"), order_row(origQty=0.005)])
def test_order_with_anything_else_raises_and_never_says_absent(answer):
    exchange, _lane, _clock = loaded(order=answer)
    with pytest.raises(ExchangeError):
        ask(exchange)


def test_order_with_triggered_stop_tells_the_end_of_the_order_it_became():
    exchange, lane, _clock = loaded(
        algoOrder=algo_row(algoStatus="FINISHED", actualOrderId="77", actualQty=None),
        order=order_row(orderId=77, clientOrderId="another", executedQty="0.004", status="EXPIRED"))
    status = ask(exchange, is_conditional=True)
    assert lane.of("order")[0]["orderId"] == "77"
    assert (status.client_order_id, status.exchange_order_id, status.triggered_id) == ("th1", "8", "77")
    assert (status.event, status.raw_status) == ("expire", "FINISHED/EXPIRED")
    assert status.executed_qty == Decimal("0.004")


def test_order_with_triggered_stop_not_listed_yet_tells_the_stop():
    exchange, _lane, _clock = loaded(algoOrder=algo_row(algoStatus="TRIGGERED", actualOrderId="77"),
                                     order=refusal(-2013))
    status = ask(exchange, is_conditional=True)
    assert (status.event, status.triggered_id) == ("accept", "77")


def test_order_with_stop_known_only_as_its_child_is_found():
    exchange, _lane, _clock = loaded(algoOrder=refusal(-2013), order=order_row())
    assert ask(exchange, is_conditional=True).event == "complete"


def test_open_orders_are_plain_and_conditional():
    exchange, lane, _clock = loaded(openOrders=[order_row(status="NEW")], openAlgoOrders=[algo_row()])
    plain, conditional = asyncio.run(exchange.open_orders())
    assert (plain.is_conditional, conditional.is_conditional) == (False, True)
    assert conditional.trigger_price == Decimal("61000.1")
    assert "symbol" not in lane.of("openOrders")[0]
    asyncio.run(exchange.open_orders(BTC))
    assert lane.of("openAlgoOrders")[1]["symbol"] == "BTCUSDT"


class History:
    """An exchange's list: at most `limit` rows, of a window under 7 days or from an id on, never both."""

    def __init__(self, rows, id_name, id_param):
        self.rows, self.id_name, self.id_param = rows, id_name, id_param

    def __call__(self, params):
        rows = self.rows
        if self.id_param in params:
            assert "startTime" not in params and "endTime" not in params
            rows = [row for row in rows if row[self.id_name] >= int(params[self.id_param])]
        elif "startTime" in params:
            start, end = int(params["startTime"]), int(params.get("endTime", START_MS + WEEK_MS))
            assert "endTime" not in params or end - start < 7 * 86_400_000
            rows = [row for row in rows if start <= row["time"] <= end]
        return rows[:int(params["limit"])]


def trade_row(number, time):
    return {"symbol": "BTCUSDT", "id": number, "orderId": 3, "side": "BUY", "qty": "0.001",
            "price": "61000.1", "commission": "0.01",
            "commissionAsset": "USDT", "realizedPnl": "0", "maker": False, "time": time}


def fills(exchange, **where):
    return [int(fill.trade_id) for fill in asyncio.run(exchange.fills_since(BTC, **where))]


def test_fills_since_with_weeks_and_full_pages_are_all_told_once():
    ages_ms = sorted([0, 5, 3 * WEEK_MS, *range(1, 2_501), *(2 * WEEK_MS + n for n in range(1_000))],
                     reverse=True)
    rows = [trade_row(n + 1, START_MS - age) for n, age in enumerate(ages_ms)]
    exchange, lane, _clock = loaded(userTrades=History(rows, "id", "fromId"))
    start_ns = (START_MS - 3 * WEEK_MS - 1_000) * 1_000_000
    assert fills(exchange, start_ns=start_ns) == list(range(1, len(rows) + 1))
    assert len(lane.asked) < 15
    assert fills(exchange, from_trade_id=1_100) == list(range(1_100, len(rows) + 1))
    assert fills(exchange, from_trade_id=len(rows) + 1) == []
    assert fills(exchange) == list(range(1, 1_001)) + list(range(1_001, len(rows) + 1))


def test_fills_since_with_a_list_that_does_not_move_on_raises():
    page = [trade_row(n, START_MS) for n in range(1, 1_001)]
    exchange, lane, _clock = loaded(userTrades=page)
    with pytest.raises(ExchangeError, match="asked for ids from 1001"):
        fills(exchange, from_trade_id=1)
    assert len(lane.asked) == 2


def test_orders_since_are_plain_and_conditional_by_pages():
    plain = [{**order_row(orderId=n), "time": START_MS} for n in range(1, 1_300)]
    conditional = [{**algo_row(algoId=n), "time": START_MS} for n in range(1, 30)]
    exchange, _lane, _clock = loaded(allOrders=History(plain, "orderId", "orderId"),
                                     allAlgoOrders=History(conditional, "algoId", "algoId"))
    found = asyncio.run(exchange.orders_since(BTC, (START_MS - 1_000) * 1_000_000))
    assert [int(o.exchange_order_id) for o in found if not o.is_conditional] == list(range(1, 1_300))
    assert [int(o.exchange_order_id) for o in found if o.is_conditional] == list(range(1, 30))


def test_positions_tell_what_is_not_zero_and_refuse_hedge_mode():
    def row(qty, side="BOTH"):
        return {"symbol": "BTCUSDT", "positionAmt": qty, "positionSide": side, "entryPrice": "1",
                "markPrice": "2", "liquidationPrice": "0"}
    exchange, lane, _clock = loaded(positionRisk=[row("0"), row("-0.003"), row("0", "LONG")])
    positions = asyncio.run(exchange.positions())
    assert {s: p.qty for s, p in positions.items()} == {BTC: Decimal("-0.003")}
    assert positions[BTC].liquidation_price is None
    lane.answers["positionRisk"] = [row("1", "SHORT")]
    with pytest.raises(ExchangeError, match="hedge"):
        asyncio.run(exchange.positions())


def test_account_tells_modes_and_the_settlement_balance():
    modes = {"dualSidePosition": True, "multiAssetsMargin": False, "canTrade": True}
    balances = [{"asset": "BNB", "balance": "1", "availableBalance": "1"},
                {"asset": "USDT", "balance": "10000.50", "availableBalance": "9000"}]
    exchange, lane, _clock = loaded(accountConfig=modes, balance=balances)
    account = asyncio.run(exchange.account())
    assert (account.is_hedge_mode, account.is_multi_asset, account.can_trade) == (True, False, True)
    assert account.wallet_balance == Decimal("10000.50")
    assert [path for _, path, _, _ in lane.asked] == ["/fapi/v1/accountConfig", "/fapi/v3/balance"]


def test_income_is_of_the_settlement_currency_later_than_asked_and_of_no_trade():
    told = [("TRANSFER", "10.5", "USDT", 8), ("TRANSFER", "-3", "USDT", 9), ("TRANSFER", "10000", "USDC", 8),
            ("FUNDING_FEE", "-0.25", "USDT", 8), ("FUNDING_FEE", "-9", "USDT", 7),
            ("REALIZED_PNL", "5", "USDT", 8), ("COMMISSION", "-1", "USDT", 8), ("TRANSFER", "-5", "BNB", 8)]
    rows = [{"incomeType": kind, "income": amount, "asset": asset, "time": START_MS - 10 + ms}
            for kind, amount, asset, ms in told]
    exchange, lane, _ = loaded(income=rows)
    told = asyncio.run(exchange.income((START_MS - 3) * 1_000_000))
    assert told == ({"TRANSFER": Decimal("7.5"), "FUNDING_FEE": Decimal("-0.25")},
                    (START_MS - 1) * 1_000_000, True)
    (asked,) = lane.of("income")
    assert asked["startTime"] == str(START_MS - 3) and "incomeType" not in asked


def income_of(*times, start_ms=START_MS - 3 * WEEK_MS):
    rows = [{"incomeType": "TRANSFER", "income": "1", "asset": "USDT", "time": ms} for ms in times]
    exchange, lane, _ = loaded(income=History(rows, "", ""))
    sums, newest_ns, is_whole = asyncio.run(exchange.income((start_ms - 1) * 1_000_000))
    return int(sums.get("TRANSFER", 0)), newest_ns // 1_000_000, is_whole, len(lane.of("income"))


def test_income_of_many_pages_and_weeks_counts_each_row_once():
    # Three in each millisecond: a page of 1,000 ends between rows of the same time.
    times = [START_MS - 3 * WEEK_MS, *(START_MS - 1_000 + n // 3 for n in range(3_000)), START_MS]
    found, newest_ms, is_whole, asked = income_of(*times)
    assert (found, newest_ms, is_whole) == (len(times), START_MS, True) and asked < 10
    assert income_of(*times[-2:], start_ms=START_MS) == (1, START_MS, True, 1)
    assert income_of(START_MS - 1, start_ms=START_MS - 20 * WEEK_MS) == (1, START_MS - 1, True, 1)


def test_income_that_cannot_be_read_in_full_says_so():
    found, _, is_whole, asked = income_of(*[START_MS - 9] * (PAGE_ROWS + 1), START_MS, start_ms=START_MS - 10)
    assert (found, is_whole, asked) == (0, False, 1), "of more in a millisecond than a page has, which is it?"
    first_ms = START_MS - PAGE_ROWS * INCOME_PAGES_MAX
    many = income_of(*range(first_ms, START_MS + 1), start_ms=first_ms)
    assert not many[2] and many[3] == INCOME_PAGES_MAX and many[0] > (PAGE_ROWS - 1) * (INCOME_PAGES_MAX - 1)


def test_key_rights_are_asked_of_the_spot_api_alone_and_may_be_unknown():
    clock, said = FakeClock(), {"enableWithdrawals": False, "enableFutures": True, "ipRestrict": True}
    lane, spot = Lane(clock), Lane(clock, apiRestrictions=said)
    config = msgspec.structs.replace(CONFIG, sapi_url="https://spot.example")
    exchange = Exchange(config, clock, orders=lane, queries=lane, keys=(API_KEY, API_SECRET), rights=spot)
    rights = asyncio.run(exchange.key_rights())
    assert rights.troubles() == [] and lane.asked == []
    method, path, params, _ = spot.asked[0]
    assert (method, path) == ("GET", "/sapi/v1/account/apiRestrictions") and params["signature"]
    for name, word in (
        ("enableWithdrawals", "withdraw"),
        ("enableFutures", "futures"),
        ("ipRestrict", "any address"),
    ):
        spot.answers["apiRestrictions"] = said | {name: not said[name]}
        (text,) = asyncio.run(exchange.key_rights()).troubles()
        assert word in text
    for broken in ({"ipRestrict": True}, refusal(-2015, status=401)):
        spot.answers["apiRestrictions"] = broken
        with pytest.raises(ExchangeError):
            asyncio.run(exchange.key_rights())
    assert asyncio.run(loaded()[0].key_rights()) is None


def test_candles_with_an_open_one_at_the_end_leave_it_out():
    def row(n):
        start = START_MS - (5 - n) * 60_000
        return [start, "1.5", "2", "1", "1.75", "12", start + 59_999, "0", 1, "0", "0", "0"]
    exchange, lane, _clock = loaded(klines=[row(n) for n in range(6)])
    candles = asyncio.run(exchange.candles(BTC, "1m", 3))
    assert [c.start_ns for c in candles] == [(START_MS - n * 60_000) * 1_000_000 for n in (3, 2, 1)]
    assert (candles[0].open, candles[0].high, candles[0].low) == (1.5, 2.0, 1.0)
    assert (candles[0].close, candles[0].volume) == (1.75, 12.0)
    assert lane.of("klines") == [{"symbol": "BTCUSDT", "interval": "1m", "limit": "4"}]


def test_query_with_a_ban_is_the_last_until_it_ends():
    exchange, lane, clock = loaded(openOrders=refusal(-1003, status=429, retry_after="7"), openAlgoOrders=[])
    with pytest.raises(ExchangeError) as caught:
        asyncio.run(exchange.open_orders())
    assert (caught.value.status, caught.value.code) == (429, -1003)
    assert exchange.budget.usage.banned_until_ns == exchange.server_ns() + 7 * 10**9
    lane.asked.clear()
    lane.answers["openOrders"] = []
    with pytest.raises(ExchangeError, match="banned for another 7 s"):
        asyncio.run(exchange.open_orders())
    assert not lane.asked
    clock.wall -= 3_600 * 10**9  # somebody sets this host's clock: an hour without a stop it must not be
    clock.advance(7 * 10**9)
    assert asyncio.run(exchange.open_orders()) == []


def starting(ahead_s):
    """Return an exchange on a host whose clock is off, not asked yet; its lane, clock, and true time."""
    clock = FakeClock()
    lane = Lane(clock)
    exchange = Exchange(CONFIG, clock, orders=lane, queries=lane, keys=None)
    return exchange, lane, clock, {"serverTime": START_MS - ahead_s * 1_000}


@pytest.mark.parametrize("ahead_s", [300, 86_400, -86_400])
def test_counters_heard_before_the_clock_was_measured_do_not_hide_those_after(ahead_s):
    exchange, lane, _clock, told = starting(ahead_s)
    for used in ("100", "2399"):
        lane.answers["time"] = Answer(status=200, body=json.dumps(told).encode(), is_sent=True,
                                      headers={"x-mbx-used-weight-1m": used})
        asyncio.run(exchange.measure_clock(1))
    assert "is used" in exchange.refusal("query")
    other = Budget()
    other.merge(exchange.budget.usage, exchange.server_ns())
    assert "is used" in other.refusal("query", exchange.server_ns())


@pytest.mark.parametrize("ahead_s", [300, -86_400])
@pytest.mark.parametrize("msg", ["no", f"banned until {START_MS + 7_000}."])
def test_ban_before_the_clock_was_measured_holds_this_process_back_and_no_other(ahead_s, msg):
    exchange, lane, clock, told = starting(ahead_s)
    lane.answers["time"] = refusal(-1003, status=429, msg=msg)
    with pytest.raises(ExchangeError, match="-1003"):
        asyncio.run(exchange.measure_clock())
    assert exchange.budget.usage.banned_until_ns == 0 and len(lane.asked) == 1
    clock.advance(59 * 10**9)
    with pytest.raises(ExchangeError, match="banned for another 1 s"):
        asyncio.run(exchange.measure_clock())
    clock.advance(10**9)
    lane.answers["time"] = told
    asyncio.run(exchange.measure_clock())
    assert not exchange.refusal("rest")


def test_submit_with_too_many_orders_leaves_queries_free():
    exchange, lane, _clock = loaded(order=refusal(-1015), openOrders=[], openAlgoOrders=[])
    asyncio.run(exchange.submit(exchange.build(market_order())))
    assert exchange.budget.usage.banned_until_ns == 0
    lane.answers["order"] = refusal(-1003, status=418)
    asyncio.run(exchange.submit(exchange.build(market_order())))
    assert exchange.budget.usage.banned_until_ns == exchange.server_ns() + 120 * 10**9


def test_submit_with_too_many_orders_holds_entries_back_for_a_while_and_nothing_else():
    exchange, _lane, clock = loaded(order=refusal(-1015, retry_after="7"))
    asyncio.run(exchange.submit(exchange.build(market_order())))
    assert "orders_10s" in exchange.refusal("entry")
    assert not exchange.refusal("rest") and not exchange.refusal("query")
    clock.advance(10 * 10**9)
    assert not exchange.refusal("entry")


def test_refresh_follows_changed_rules_and_tells_of_a_delisting():
    exchange, lane, _clock = loaded()
    old = INFO["symbols"][0]
    row = {**old, "status": "SETTLING", "filters": [
        {**f, "stepSize": "0.010"} if f["filterType"] == "LOT_SIZE" else f for f in old["filters"]]}
    lane.answers["exchangeInfo"] = {"symbols": [row]}
    asyncio.run(exchange.refresh([BTC]))
    assert (exchange.instruments[BTC].status, exchange.instruments[BTC].qty_increment) == (
        "SETTLING", Decimal("0.010"))
    assert "quantity=0.05" in exchange.build(market_order(qty=Decimal("0.05"))).sent_text
    lane.answers["exchangeInfo"] = {"symbols": []}
    asyncio.run(exchange.refresh([BTC, "NO/USDT:USDT"]))
    assert exchange.instruments[BTC].status == "DELISTED"


def test_symbol_settings_are_read_and_an_unknown_margin_mode_is_kept():
    exchange, lane, _clock = loaded(symbolConfig=[
        {"symbol": "BTCUSDT", "marginType": "ISOLATED", "leverage": 7}, {"symbol": "XUSDT"}])
    wanted = SymbolSettings(margin_mode="isolated", leverage=7)
    assert asyncio.run(exchange.symbol_settings()) == {BTC: wanted}
    lane.answers["symbolConfig"] = [{"symbol": "BTCUSDT", "marginType": "ODD", "leverage": 7}]
    assert asyncio.run(exchange.symbol_settings())[BTC].margin_mode == "ODD"
    lane.answers["symbolConfig"] = [{"symbol": "BTCUSDT"}]
    with pytest.raises(ExchangeError):
        asyncio.run(exchange.symbol_settings())


def test_query_with_most_of_the_weight_used_waits_and_then_is_not_asked():
    exchange, lane, clock = loaded(openOrders=[], openAlgoOrders=[])
    asyncio.run(exchange.open_orders())
    assert clock.slept == []
    exchange.budget.hear({"x-mbx-used-weight-1m": "1700"}, exchange.server_ns())
    asyncio.run(exchange.open_orders())
    assert len(clock.slept) == 2 and min(clock.slept) > 0
    exchange.budget.hear({"x-mbx-used-weight-1m": "2200"}, exchange.server_ns())
    lane.asked.clear()
    with pytest.raises(ExchangeError, match="not asked"):
        asyncio.run(exchange.open_orders())
    assert lane.asked == []


def test_query_that_waits_when_a_ban_comes_is_not_asked():
    exchange, lane, clock = loaded(openOrders=[], openAlgoOrders=[])
    exchange.budget.hear({"x-mbx-used-weight-1m": "1700"}, exchange.server_ns())

    async def sleep(seconds):
        exchange.hear_usage(Usage(banned_until_ns=exchange.server_ns() + 9 * 10**9))
    clock.sleep = sleep
    with pytest.raises(ExchangeError, match="banned for another 9 s"):
        asyncio.run(exchange.open_orders())
    assert lane.asked == []


def test_query_with_clock_refused_measures_the_clock():
    exchange, lane, _clock = loaded(openOrders=refusal(-1021))
    lane.answers["time"] = {"serverTime": START_MS + 2_000}
    with pytest.raises(ExchangeError) as caught:
        asyncio.run(exchange.open_orders())
    assert caught.value.code == -1021
    assert abs(exchange.clock_offset_ns - 2_000_000_000) <= 1_000_000


def test_answers_with_counters_are_remembered_and_garbage_is_not():
    exchange, lane, _clock = loaded()
    lane.answers["time"] = Answer(status=200, body=b'{"serverTime":1}', is_sent=True, headers={
        "x-mbx-used-weight-1m": "41", "x-mbx-order-count-10s": "-3", "x-mbx-order-count-1m": "9" * 30})
    asyncio.run(exchange.measure_clock())
    assert [exchange.budget.usage.used.get(n, (0, 0))[1] for n in COUNTERS] == [41, 0, 0]


@pytest.mark.parametrize(("body", "wanted"), [
    (order_row(), "complete"), (algo_row(), "accept"), ({}, None), ([], None), ({"orderId": 1}, None)])
def test_answered_order_with_any_body_never_raises(body, wanted):
    exchange, _lane, _clock = loaded()
    status = exchange.answered_order(Answer(status=200, body=json.dumps(body).encode(), is_sent=True))
    assert (status and status.event) == wanted
    assert exchange.answered_order(Answer(status=200, body=b"<", is_sent=True)) is None


def test_listen_key_needs_the_key_and_no_signature():
    exchange, lane, _clock = loaded(listenKey={"listenKey": "abc"})
    assert asyncio.run(exchange.listen_key()) == "abc"
    asyncio.run(exchange.keep_listen_key())
    assert [(m, p, params) for m, p, params, _ in lane.asked] == [
        ("POST", "/fapi/v1/listenKey", {}), ("PUT", "/fapi/v1/listenKey", {})]
    assert lane.asked[0][3]["X-MBX-APIKEY"] == API_KEY
    lane.answers["listenKey"] = refusal(-1125)
    with pytest.raises(ExchangeError) as caught:
        asyncio.run(exchange.keep_listen_key())
    assert caught.value.code == -1125


def test_urls_of_streams_go_by_class_of_data():
    exchange, _lane, _clock = loaded()
    assert exchange.private_url("abc") == "ws://127.0.0.1:5560/private/ws?listenKey=abc"
    assert exchange.market_url("public", ["btcusdt@trade", "btcusdt@bookTicker"]) == (
        "ws://127.0.0.1:5560/public/stream?streams=btcusdt@trade/btcusdt@bookTicker")


def test_parse_private_knows_our_symbols():
    exchange, _lane, _clock = loaded()
    raw = json.dumps({"e": "ALGO_UPDATE", "T": 1, "o": {
        "caid": "th1", "aid": 1, "o": "STOP_MARKET", "s": "BTCUSDT", "S": "SELL", "q": "1", "X": "NEW",
        "tp": "5", "R": True}}).encode()
    assert exchange.parse_private(raw)[0].symbol == BTC


@pytest.mark.parametrize(("is_urgent", "failures", "asked"), [(True, 4, 5), (True, 5, 5), (False, 1, 1)])
def test_question_with_an_overloaded_exchange_is_asked_again_only_when_urgent(is_urgent, failures, asked):
    clock, left = FakeClock(), [failures]

    def overloaded(_):
        left[0] -= 1
        return refusal(-1008, 503) if left[0] >= 0 else []
    lane = Lane(clock, positionRisk=overloaded)
    exchange = Exchange(CONFIG, clock, orders=lane, queries=lane, keys=(API_KEY, API_SECRET),
                        is_urgent=is_urgent)
    asyncio.run(exchange.load())
    if failures < 5 and is_urgent:
        assert asyncio.run(exchange.positions()) == {}
    else:
        with pytest.raises(ExchangeError, match="positionRisk"):
            asyncio.run(exchange.positions())
    assert len(lane.of("positionRisk")) == asked


def test_question_with_a_plain_no_is_not_asked_again_even_when_urgent():
    clock = FakeClock()
    lane = Lane(clock, positionRisk=refusal(-2015, 401))
    exchange = Exchange(CONFIG, clock, orders=lane, queries=lane, keys=(API_KEY, API_SECRET), is_urgent=True)
    asyncio.run(exchange.load())
    with pytest.raises(ExchangeError):
        asyncio.run(exchange.positions())
    assert len(lane.of("positionRisk")) == 1


def test_question_with_most_of_the_weight_used_is_kept_back_but_for_urgent_ones():
    for is_urgent in (True, False):
        clock = FakeClock()
        lane = Lane(clock, positionRisk=[])
        exchange = Exchange(CONFIG, clock, orders=lane, queries=lane, keys=(API_KEY, API_SECRET),
                            is_urgent=is_urgent)
        asyncio.run(exchange.load())
        exchange.budget.hear({"x-mbx-used-weight-1m": "2300"}, exchange.server_ns())
        if is_urgent:
            assert asyncio.run(exchange.positions()) == {}
        else:
            with pytest.raises(ExchangeError, match="not asked"):
                asyncio.run(exchange.positions())


@pytest.mark.parametrize("name", ["executor", "gateway", "guard"])
def test_process_with_the_exchange_has_imported_its_library_before_its_first_beat(name):
    # health gives a start three times as long as one that has beaten once and is busy then.
    code = ("import runpy, sys, bot.daemon; "
            "bot.daemon.run = lambda *_: 'ccxt.binanceusdm' in sys.modules and 7; "
            f"runpy.run_module('bot.{name}', run_name='__main__')")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 7
