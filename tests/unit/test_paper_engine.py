"""The paper exchange without a socket and with a clock that is moved: what it keeps, over a crash too."""

import contextlib
import hashlib
import hmac
import itertools
import json
import sqlite3
from decimal import Decimal
from types import SimpleNamespace
from urllib.parse import urlencode

import pytest

from bot import paper_engine
from bot.config import PaperAccount, PaperConfig
from bot.errors import ConfigError, InvariantError
from bot.paper import Control
from bot.paper_engine import LISTEN_KEY_MS, Engine, Store
from bot.paper_feed import Feed, Frame
from bot.paper_model import Contract, Position
from bot.paper_rest import Rest, WsRequest

D = Decimal
BTC, ETH = "BTCUSDT", "ETHUSDT"
KEY, SECRET = "K" * 64, "S" * 64
CONFIG = PaperConfig(accounts={"main": PaperAccount(api_key_file="key", api_secret_file="secret")})
START_MS = 1_700_000_000_000
ORDER, ALGO, DUAL = "POST /fapi/v1/order", "POST /fapi/v1/algoOrder", "POST /fapi/v1/positionSide/dual"
names = itertools.count()


class Killed(BaseException):
    """What a crash point raises instead of ending the tests."""


def quote(bid: str, ask: str = "") -> dict:
    return {"e": "bookTicker", "b": bid, "B": "5", "a": ask or str(D(bid) + 1), "A": "5"}


class World:
    """An exchange over quotes that a test sets; ask() is a client that signs in its own way."""

    def __init__(self, path=":memory:"):
        self.path, self.ms = path, START_MS
        self.start()

    def start(self, *symbols):
        kinds, price = {"trade", "bookTicker"}, D("60000")
        feeds = {symbol: Feed(Contract(symbol, D("0.1"), D("0.001")), kinds, price, None)
                 for symbol in symbols or (BTC, ETH)}
        for feed in feeds.values():
            feed.play(quote("60000"))

        def advance(now_ms, frames_max=0):
            for feed in feeds.values():
                feed.now_ms = now_ms
            return [Frame("", b"", now_ms)]

        market = SimpleNamespace(feeds=feeds, is_tradable=True, advance=advance, begun_ms=0)
        clock = SimpleNamespace(wall_ns=lambda: self.ms * 1_000_000,
                                token=lambda length: f"{next(names):0{length}}")
        self.store = Store(self.path)
        self.engine = Engine(CONFIG, market, self.store, clock)
        self.rest = Rest(self.engine, {KEY: ("main", SECRET)})
        self.ledger = self.engine.ledger

    def restart(self, *symbols):
        """Start again from what is on disk; a transaction that was open is lost, as by kill -9."""
        self.store.close()
        self.start(*symbols)

    def after(self, ms):
        self.ms += ms
        return self.engine.step(100)

    def ask(self, name, **params):
        query = urlencode({"timestamp": self.engine.now_ms(), **params})
        return self.send(name, f"{query}&signature={signature(query)}")

    def send(self, name, query, body=""):
        answer = self.rest.serve(self.rest.over_http(name, query, body, KEY, "127.0.0.1"))
        return json.loads(answer.body)

    def order(self, side="BUY", quantity="0.010", symbol=BTC, **params):
        params |= {"type": "LIMIT", "timeInForce": "GTC"} if "price" in params else {"type": "MARKET"}
        return self.ask(ORDER, symbol=symbol, side=side, quantity=quantity, **params)

    def control(self, path, **wish):
        return json.loads(Control(self.engine, None).answer(f"POST /paper/{path}", json.dumps(wish)).body)

    def held(self, symbol=BTC):
        return self.ledger.position("main", symbol).qty


def signature(text):
    return hmac.new(SECRET.encode(), text.encode(), hashlib.sha256).hexdigest()


@pytest.fixture
def world(tmp_path):
    made = World(tmp_path / "paper.db")
    yield made
    made.store.close()


@pytest.fixture
def crash(monkeypatch):
    """Die at a crash point from now on; "" ends that."""
    at = ""

    def point(name):
        if name == at:
            raise Killed

    def arm(name):
        nonlocal at
        at = name

    monkeypatch.setattr(paper_engine, "point", point)
    return arm


# What is kept

def test_listings_countdowns_and_listen_keys_are_kept_over_a_restart(world):
    key = world.ask("POST /fapi/v1/listenKey")["listenKey"]
    world.order(price="59000", newClientOrderId="rests")
    world.ask("POST /fapi/v1/countdownCancelAll", symbol=BTC, countdownTime=5_000)
    filters = {"LOT_SIZE": {"stepSize": "0.1", "minQty": "0.1"}}
    assert world.control("symbol", symbol=ETH, status="PRE_SETTLE", filters=filters) == {}
    world.restart()
    assert world.ask("POST /fapi/v1/listenKey")["listenKey"] == key
    contract = world.ledger.contracts[ETH]
    assert (contract.status, contract.step) == ("PRE_SETTLE", D("0.1"))
    world.after(4_000)
    assert [o.client_id for o in world.ledger.open.values()] == ["rests"]
    world.after(1_000)
    assert world.ledger.open == {}
    world.restart()
    assert world.engine.countdowns == {}, "it is over for good"


def test_listen_key_lives_sixty_minutes_from_its_last_keepalive(world):
    key = world.ask("POST /fapi/v1/listenKey")["listenKey"]
    for _ in range(2):
        world.after(LISTEN_KEY_MS)
        assert world.ask("PUT /fapi/v1/listenKey") == {"listenKey": key}
    assert LISTEN_KEY_MS == 60 * 60_000
    world.after(LISTEN_KEY_MS + 1)
    assert world.ask("PUT /fapi/v1/listenKey")["code"] == -1125
    assert world.ask("POST /fapi/v1/listenKey")["listenKey"] != key


@pytest.mark.parametrize("point", ["paper.before_commit", "paper.committed"])
def test_countdown_with_a_kill_between_its_end_and_its_cancels_cancels_after_the_restart(
        world, crash, point):
    world.order(price="59000")
    world.ask("POST /fapi/v1/countdownCancelAll", symbol=BTC, countdownTime=1_000)
    crash(point)
    with pytest.raises(Killed):
        world.after(1_500)
    crash("")
    world.restart()
    world.after(50)
    assert world.ledger.open == {} and world.engine.countdowns == {}
    assert world.ask("GET /fapi/v1/openOrders") == []


@pytest.mark.parametrize("point", ["paper.before_commit", "paper.committed"])
def test_delisting_with_a_kill_in_its_middle_leaves_no_position_in_what_settles(world, crash, point):
    world.order(symbol=ETH)
    world.order(symbol=ETH, price="59000")
    crash(point)
    with pytest.raises(Killed):
        world.control("symbol", symbol=ETH, status="SETTLING")
    crash("")
    world.restart()
    world.after(1_000)
    left = (world.ledger.contracts[ETH].status, world.held(ETH), len(world.ledger.open))
    assert left in {"paper.before_commit": [("TRADING", D("0.010"), 1), ("SETTLING", 0, 0)],
                    "paper.committed": [("TRADING", 0, 0), ("SETTLING", 0, 0)]}[point]
    world.control("symbol", symbol=ETH, status="SETTLING")
    world.restart()
    assert (world.ledger.contracts[ETH].status, world.held(ETH)) == ("SETTLING", 0)
    assert world.ledger.open == {}


@pytest.mark.parametrize("price", [{}, {"price": "59000"}], ids=["position", "order"])
def test_symbol_that_is_taken_out_while_something_is_open_in_it_is_named(world, price):
    world.order(symbol=ETH, **price)
    with pytest.raises(ConfigError, match=ETH):
        world.restart(BTC)
    world.restart()
    world.ask("DELETE /fapi/v1/allOpenOrders", symbol=ETH)
    if not price:
        world.order("SELL", symbol=ETH)
    world.restart(BTC)
    assert world.order()["status"] == "NEW"
    assert world.ask("GET /fapi/v2/account")["totalWalletBalance"]


def test_clock_fault_that_is_taken_back_hides_nothing_that_happened_meanwhile(world):
    world.engine.offset_ms = 5_000
    world.order(price="59000", newClientOrderId="rests")
    world.order(newClientOrderId="filled")
    world.engine.offset_ms = 0
    for name in ("rests", "filled"):
        found = world.ask("GET /fapi/v1/order", symbol=BTC, origClientOrderId=name)
        assert found.get("clientOrderId") == name, found
    for path, count in (("openOrders", 1), ("allOrders", 2), ("userTrades", 1)):
        assert len(world.ask(f"GET /fapi/v1/{path}", symbol=BTC)) == count, path
    assert len(world.ask("GET /fapi/v1/income")) == 2, "the deposit, the fee"


def test_books_that_do_not_balance_never_reach_the_disk(world, monkeypatch):
    world.order(newClientOrderId="kept")
    apply = Position.apply
    with monkeypatch.context() as patched:
        patched.setattr(Position, "apply", lambda self, qty, price: apply(self, qty, price) + 1)
        with pytest.raises(InvariantError):
            world.order()
    for later in (lambda: world.after(1_000), lambda: world.order(price="59000")):
        with contextlib.suppress(InvariantError):
            later()
    world.restart()
    assert world.held() == D("0.010")
    assert [row["clientOrderId"] for row in world.ask("GET /fapi/v1/allOrders", symbol=BTC)] == ["kept"]


@pytest.mark.parametrize(("name", "wish"), [
    ("POST /fapi/v1/countdownCancelAll", {"symbol": BTC, "countdownTime": 60_000}),
    ("POST /fapi/v1/listenKey", {}), (DUAL, {"dualSidePosition": "true"})])
def test_what_the_disk_does_not_take_ends_the_next_step(world, name, wish):
    world.store._db.execute(
        "CREATE TEMP TRIGGER full BEFORE INSERT ON state BEGIN SELECT RAISE(FAIL, 'full'); END")
    with pytest.raises(sqlite3.Error):
        world.ask(name, **wish)
    with pytest.raises(sqlite3.Error):
        world.after(10)


def test_setting_kept_beside_books_that_do_not_balance_is_not_written(world):
    world.ledger.accounts["main"].wallet += 1
    with pytest.raises(InvariantError):
        world.ask(DUAL, dualSidePosition="true")
    world.restart()
    assert world.ask("GET /fapi/v1/positionSide/dual") == {"dualSidePosition": False}


@pytest.mark.parametrize(("is_held", "payments"), [(False, 0), (True, 3)])
def test_funding_that_was_missed_is_paid_by_what_was_held_then(world, is_held, payments):
    world.after(1_000)
    if is_held:  # until the first step after the start
        world.order(quantity="0.1")
        world.ask(ALGO, symbol=BTC, algoType="CONDITIONAL", side="SELL", type="STOP_MARKET", quantity="0.1",
                  triggerPrice="59000")
    else:  # since that step
        world.order(quantity="0.1", price="59000")
    world.ms += 24 * 3_600_000
    world.restart()
    world.engine.feeds[BTC].play(quote("58000"))
    world.after(1)
    assert (world.held() == 0) == is_held, "the price went through it"
    assert len(world.ask("GET /fapi/v1/income", incomeType="FUNDING_FEE")) == payments


def test_account_whose_name_has_a_space_has_a_dead_mans_switch_too(world):
    world.ledger.deposit("my account", D(10_000))
    world.engine.count_down("my account", BTC, 1_000)
    world.after(2_000)
    assert world.engine.countdowns == {}


@pytest.mark.parametrize("tests", [{"name =": "th1", "time_ms <=": 9}, {"ref =": 3, "time_ms <=": 9},
                                   {"symbol =": BTC, "id >=": 5, "time_ms <=": 9}, {"time_ms >=": 5}])
def test_query_of_a_long_history_is_answered_from_an_index(world, tests):
    asked = []
    world.store._db.set_trace_callback(asked.append)
    world.store.find("fill", "main", tests, 10)
    world.store._db.set_trace_callback(None)
    plan = " ".join(row[3] for row in world.store._db.execute(f"EXPLAIN QUERY PLAN {asked[0]}"))
    column = next(iter(tests.keys() - {"symbol =", "time_ms <="}), "").split()[0]
    assert f"AND {column}" in plan and "TEMP B-TREE FOR ORDER BY" not in plan, plan


# What is refused

@pytest.mark.parametrize(("price", "code"), [({}, -4068), ({"price": "59000"}, -4067)])
def test_position_mode_with_something_open_stays_as_it_is(world, price, code):
    world.order(**price)
    assert world.ask(DUAL, dualSidePosition="false")["code"] == -4059
    assert world.ask(DUAL, dualSidePosition="true")["code"] == code
    assert world.ask("GET /fapi/v1/positionSide/dual") == {"dualSidePosition": False}


def test_position_mode_with_a_conditional_order_stays_as_it_is(world):
    wish = {"symbol": BTC, "algoType": "CONDITIONAL", "side": "SELL", "type": "STOP_MARKET",
            "triggerPrice": "50000", "quantity": "0.010"}
    assert world.ask(ALGO, **wish)["algoStatus"] == "NEW"
    assert world.ask(DUAL, dualSidePosition="true")["code"] == -4067
    world.ask("DELETE /fapi/v1/algoOpenOrders", symbol=BTC)
    assert world.ask(DUAL, dualSidePosition="true")["code"] == 200
    assert world.ask(ALGO, **wish)["code"] == -4061


@pytest.mark.parametrize(("name", "wish", "code"), [
    (ORDER, {"newOrderRespType": "FULL"}, -1136), (ALGO, {"workingType": "LAST"}, -4031),
    ("GET /fapi/v1/depth", {"limit": 7}, -4021), ("GET /fapi/v1/depth", {"limit": 1_001}, -4021)])
def test_parameter_of_a_few_values_with_another_has_a_code_of_its_own(world, name, wish, code):
    known = {"symbol": BTC, "side": "SELL", "quantity": "0.010", "algoType": "CONDITIONAL",
             "type": "STOP_MARKET" if name == ALGO else "MARKET", "triggerPrice": "50000"}
    assert world.ask(name, **known | wish)["code"] == code
    assert "code" not in world.ask(name, **known)


def test_parameter_in_query_and_body_is_the_querys(world):
    query = urlencode({"symbol": BTC, "side": "BUY", "type": "MARKET", "quantity": "0.010"})
    body = urlencode({"quantity": "0.020", "side": "SELL", "newOrderRespType": "RESULT",
                      "timestamp": world.engine.now_ms()})
    answer = world.send(ORDER, query, f"{body}&signature={signature(query + body)}")
    assert (answer["side"], answer["executedQty"]) == ("BUY", "0.010")


def test_signature_in_capitals_is_right(world):
    query = f"timestamp={world.engine.now_ms()}"
    assert world.send("GET /fapi/v3/balance", f"{query}&signature={signature(query).upper()}")[0]["asset"]
    assert world.send("GET /fapi/v3/balance", f"{query}&signature={'A' * 64}")["code"] == -1022


@pytest.mark.parametrize("name", [ORDER, "GET /fapi/v1/time", "/fapi/v1/time"])
def test_order_api_over_websocket_knows_no_rest_names(world, name):
    params = {"symbol": BTC, "side": "BUY", "type": "MARKET", "quantity": "0.010", "apiKey": KEY,
              "timestamp": world.engine.now_ms()}
    params["signature"] = signature("&".join(f"{key}={value}" for key, value in sorted(params.items())))
    for method, is_known in ((name, False), ("order.place", True)):
        answer = world.rest.serve(world.rest.over_ws(WsRequest(method, 1, params), "127.0.0.1"))
        assert (answer.status == 200) == is_known, answer
        assert (world.held() != 0) == is_known


@pytest.mark.parametrize(("kind", "field", "value"), [
    ("PRICE_FILTER", "tickSize", "Infinity"), ("MIN_NOTIONAL", "notional", "sNaN"),
    ("MIN_NOTIONAL", "notional", "NaN"), ("LOT_SIZE", "stepSize", "0")])
def test_listing_with_no_number_is_refused_and_changes_nothing(world, kind, field, value):
    answer = world.control("symbol", symbol=BTC, filters={kind: {field: value}})
    assert answer["code"] == -1102 and field in answer["msg"] and value in answer["msg"], answer
    assert world.order(price="59000")["status"] == "NEW"


# What others see

@pytest.mark.parametrize(("side", "price", "there"), [("BUY", "59990", "59980"), ("SELL", "60010", "60020")])
def test_public_trade_of_a_makers_fill_is_at_its_price(world, side, price, there):
    world.order(side, price=price)
    world.engine.feeds[BTC].play(quote(there))
    world.after(100)
    fill, = world.ask("GET /fapi/v1/userTrades", symbol=BTC)
    trade = world.ask("GET /fapi/v1/trades", symbol=BTC)[-1]
    assert (fill["maker"], D(fill["price"])) == (True, D(price))
    assert (trade["id"], D(trade["price"]), trade["isBuyerMaker"]) == (fill["id"], D(price), side == "BUY")


@pytest.mark.parametrize("wish", [{"account": "mian", "symbol": BTC}, {"account": "main", "symbol": "BTC"}])
def test_control_with_an_unknown_name_says_which_there_are(world, wish):
    answer = world.control("liquidate", **wish)
    assert answer["code"] == -1102 and "there are accounts main; symbols BTCUSDT, ETHUSDT" in answer["msg"]
