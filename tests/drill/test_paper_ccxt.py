"""ccxt and ccxt.pro, unmodified but for URLs, on the paper exchange: one row per method a trader uses."""

import asyncio
import contextlib
import datetime
import inspect
import itertools
import socket
import ssl
import threading

import ccxt
import ccxt.async_support
import ccxt.pro
import pytest

from tests.harness import API_KEY, API_SECRET, free_port, stop_process, write_config
from tests.paper import Paper

HOST = "demo-fapi.localhost"  # "https://demo-fapi" is what ccxt knows the futures by
BTC, ETH = "BTC/USDT:USDT", "ETH/USDT:USDT"
names = itertools.count()
TRIGGER = {"trigger": True}


@pytest.fixture(scope="module")
def paper(tmp_path_factory):
    server = Paper(write_config(tmp_path_factory.mktemp("paper"), paper={"latency_ms": 0}))
    server.control("limits", {"weight_1m": 1_000_000})
    yield server
    assert stop_process(server.process) == 0


@pytest.fixture(autouse=True)
def clean(paper):
    paper.flatten()


def client(paper, module):
    made = module.binanceusdm({"apiKey": API_KEY, "secret": API_SECRET, "enableRateLimit": False})
    api = made.urls["api"]
    for name, url in api.items():
        if isinstance(url, str):
            for host in ("fapi.binance.com", "api.binance.com"):
                url = url.replace(f"https://{host}", f"http://{paper.host}")
            api[name] = url
    if "ws" in api:
        api["ws"]["linear"] = f"ws://{paper.host}/ws"
        api["ws"]["ws-api"]["linear"] = f"ws://{paper.host}/ws-fapi/v1"
    return made


@pytest.fixture(scope="module")
def sync(paper):
    made = client(paper, ccxt)
    made.load_markets()
    return made


class InAsync:
    """ccxt's async client, called as the sync one is."""

    def __init__(self, made):
        self.made, self.loop = made, asyncio.new_event_loop()

    def __getattr__(self, name):
        found = getattr(self.made, name)

        def call(*args, **named):
            answer = found(*args, **named)
            return self.loop.run_until_complete(answer) if inspect.isawaitable(answer) else answer
        return call if callable(found) else found


@pytest.fixture(scope="module")
def in_async(paper):
    made = InAsync(client(paper, ccxt.async_support))
    made.load_markets()
    yield made
    made.close()


@pytest.fixture(params=["sync", "in_async"])
def world(request):
    return request.getfixturevalue(request.param)


READS = [  # method, arguments, what its answer must be
    ("fetch_time", (), lambda v: v > 1_600_000_000_000),
    ("fetch_markets", (), lambda v: {m["symbol"] for m in v} == {BTC, ETH}),
    ("load_markets", (), lambda v: v[BTC]["limits"]["cost"]["min"] > 0),
    ("fetch_ticker", (BTC,), lambda v: v["last"] > 0 and v["high"] >= v["low"]),
    ("fetch_tickers", (), lambda v: set(v) == {BTC, ETH}),
    ("fetch_bids_asks", (), lambda v: all(t["bid"] < t["ask"] for t in v.values())),
    ("fetch_last_prices", (), lambda v: v[BTC]["price"] > 0),
    ("fetch_trades", (BTC,), lambda v: len(v) > 100 and v[-1]["side"] in ("buy", "sell")),
    ("fetch_order_book", (BTC, 20), lambda v: v["bids"][0][0] < v["asks"][0][0] and v["nonce"]),
    ("fetch_ohlcv", (BTC, "5m", None, 10), lambda v: len(v) == 10),
    ("fetch_mark_ohlcv", (BTC, "1m"), lambda v: len(v) >= 500),
    ("fetch_index_ohlcv", (BTC, "1m"), lambda v: len(v) >= 500),
    ("fetch_mark_price", (BTC,), lambda v: v["markPrice"] > 0),
    ("fetch_mark_prices", (), lambda v: set(v) == {BTC, ETH}),
    ("fetch_funding_rate", (BTC,), lambda v: v["fundingRate"] == 0.0001),
    ("fetch_funding_rates", (), lambda v: set(v) == {BTC, ETH}),
    ("fetch_funding_rate_history", (BTC,), lambda v: len(v) == 100),
    ("fetch_funding_history", (BTC,), lambda v: isinstance(v, list)),
    ("fetch_funding_intervals", (), lambda v: v == {}),
    ("fetch_open_interest", (BTC,), lambda v: v["symbol"] == BTC),
    ("fetch_leverage", (BTC,), lambda v: v["longLeverage"] == 20),
    ("fetch_leverages", (), lambda v: v[BTC]["longLeverage"] == 20),
    ("fetch_leverage_tiers", (), lambda v: v[BTC][0]["maxLeverage"] == 150),
    ("fetch_market_leverage_tiers", (BTC,), lambda v: len(v) == 12),
    ("set_leverage", (20, BTC), lambda v: int(v["leverage"]) == 20),
    ("fetch_margin_mode", (BTC,), lambda v: v["marginMode"] == "cross"),
    ("fetch_margin_modes", (), lambda v: v[BTC]["marginMode"] == "cross"),
    ("fetch_position_mode", (BTC,), lambda v: v["hedged"] is False),
    ("fetch_balance", (), lambda v: 9_000 < v["USDT"]["total"] < 11_000),
    ("fetch_positions", (), lambda v: v == []),
    ("fetch_positions_risk", (), lambda v: all(not p["contracts"] for p in v)),
    ("fetch_account_positions", (), lambda v: isinstance(v, list)),
    ("fetch_trading_fee", (BTC,), lambda v: v["taker"] == 0.0005),
    ("fetch_trading_fees", (), lambda v: BTC in v),
    ("fetch_open_orders", (BTC,), lambda v: v == []),
    ("fetch_open_orders", (BTC, None, None, TRIGGER), lambda v: v == []),
    ("fetch_closed_orders", (BTC,), lambda v: isinstance(v, list)),
    ("fetch_orders", (BTC,), lambda v: isinstance(v, list)),
    ("fetch_orders", (BTC, None, None, TRIGGER), lambda v: isinstance(v, list)),
    ("fetch_canceled_orders", (BTC,), lambda v: isinstance(v, list)),
    ("fetch_my_trades", (BTC,), lambda v: isinstance(v, list)),
    ("fetch_ledger", ("USDT",), lambda v: v[0]["type"] in ("transfer", "fee", "trade")),
    ("cancel_all_orders", (BTC,), lambda v: isinstance(v, list)),
    ("cancel_all_orders", (BTC, TRIGGER), lambda v: isinstance(v, list)),
]


@pytest.mark.parametrize(("method", "args", "is_right"), READS, ids=lambda v: v if isinstance(v, str) else "")
def test_ccxt_method_that_reads_works_in_both_worlds(world, method, args, is_right):
    assert is_right(getattr(world, method)(*args))


def round_price(sync, share):
    return float(sync.price_to_precision(BTC, sync.fetch_ticker(BTC)["last"] * share))


ORDERS = [  # type, side, price as a share of the last, params, status afterwards
    ("market", "buy", None, {}, "closed"), ("limit", "buy", 1.01, {}, "closed"),
    ("limit", "buy", 0.97, {}, "open"), ("limit", "buy", 0.97, {"timeInForce": "IOC"}, "expired"),
    ("limit", "buy", 0.97, {"timeInForce": "FOK"}, "expired"),
    ("limit", "buy", 0.97, {"postOnly": True}, "open"),
    ("market", "sell", None, {"stopLossPrice": 0.9}, "open"),
    ("market", "sell", None, {"takeProfitPrice": 1.1, "reduceOnly": True}, "open"),
    ("STOP_MARKET", "sell", None, {"stopPrice": 0.9, "closePosition": True}, "open"),
    ("TAKE_PROFIT_MARKET", "buy", None, {"triggerPrice": 0.9, "workingType": "MARK_PRICE"}, "open")]


@pytest.mark.parametrize(("type_", "side", "share", "params", "status"), ORDERS, ids=str)
def test_ccxt_order_of_each_type_is_found_and_canceled_by_id_and_client_id(world, type_, side, share, params,
                                                                           status):
    world.create_order(BTC, "market", "buy", 0.01)
    prices = {k: round_price(world, v) if isinstance(v, float) else v for k, v in params.items()}
    is_trigger = any(isinstance(v, float) for v in params.values())
    where, name = TRIGGER if is_trigger else {}, f"row{next(names)}"
    made = world.create_order(BTC, type_, side, 0.01, share and round_price(world, share),
                             {"clientOrderId": name, **prices})
    assert made["clientOrderId"] == name
    assert world.fetch_order(made["id"], BTC, where)["status"] == status
    assert world.fetch_order(None, BTC, {"clientOrderId": name, **where})["id"] == made["id"]
    opened = {o["id"] for o in world.fetch_open_orders(BTC, params=where)}
    assert (made["id"] in opened) == (status == "open")
    if status == "open":
        world.cancel_order(made["id"], BTC, where)
        assert world.fetch_order(made["id"], BTC, where)["status"] == "canceled"
        with pytest.raises(ccxt.OrderNotFound, match="-2011"):
            world.cancel_order(None, BTC, {"clientOrderId": name, **where})
    elif status == "closed":
        trades = world.fetch_my_trades(BTC, params={"orderId": made["id"]})
        assert sum(t["amount"] for t in trades) == pytest.approx(0.01)


def test_ccxt_orders_at_once_and_canceled_by_ids_or_all(world):
    price = round_price(world, 0.97)
    wishes = [{"symbol": BTC, "type": "limit", "side": "buy", "amount": 0.01, "price": price}] * 3
    made = world.create_orders(wishes)
    assert [o["status"] for o in made] == ["open"] * 3
    assert [o["status"] for o in world.cancel_orders([o["id"] for o in made[:2]], BTC)] == ["canceled"] * 2
    assert [o["id"] for o in world.fetch_open_orders(BTC)] == [made[2]["id"]]
    world.cancel_all_orders(BTC)
    assert world.fetch_open_orders(BTC) == []


REFUSALS = [  # code, the class that ccxt makes of it on the real host, what is done
    (-2019, ccxt.InsufficientFunds, lambda c: c.create_order(BTC, "market", "buy", 40)),
    (-4164, ccxt.InvalidOrder, lambda c: c.create_order(BTC, "limit", "buy", 0.001, round_price(c, 0.97))),
    (-2022, ccxt.InvalidOrder, lambda c: c.create_order(BTC, "market", "buy", 0.01, None,
                                                        {"reduceOnly": True})),
    (-4005, ccxt.BaseError, lambda c: c.create_order(BTC, "market", "buy", 10_000)),
    (-4016, ccxt.BaseError, lambda c: c.create_order(BTC, "limit", "buy", 0.01, round_price(c, 1.2))),
    (-5022, ccxt.OrderNotFillable, lambda c: c.create_order(BTC, "limit", "buy", 0.01, round_price(c, 1.01),
                                                            {"postOnly": True})),
    (-2021, ccxt.OrderImmediatelyFillable, lambda c: c.create_order(
        BTC, "market", "sell", 0.01, None, {"stopLossPrice": round_price(c, 1.1)})),
    (-2013, ccxt.OrderNotFound, lambda c: c.fetch_order("1", BTC)),
    (-2011, ccxt.OrderNotFound, lambda c: c.cancel_order("1", BTC)),
    (-4028, ccxt.BaseError, lambda c: c.fapiPrivatePostLeverage({"symbol": "BTCUSDT", "leverage": 151})),
    (-4047, ccxt.BaseError, lambda c: c.fapiPrivatePostMarginType({
        "symbol": "BTCUSDT", "marginType": "ISOLATED"})),
    (-4046, ccxt.MarginModeAlreadySet, lambda c: c.set_margin_mode("cross", BTC)),
    (-4059, ccxt.BaseError, lambda c: c.set_position_mode(False)),
    (-1121, ccxt.BadSymbol, lambda c: c.fapiPublicGetDepth({"symbol": "NOPE"})),
    (-4120, ccxt.BaseError, lambda c: c.fapiPrivatePostOrder({
        "symbol": "BTCUSDT", "side": "SELL", "type": "STOP_MARKET", "quantity": "0.01", "stopPrice": "1"})),
    (-4061, ccxt.OperationRejected, lambda c: c.create_order(BTC, "market", "buy", 0.01, None,
                                                             {"positionSide": "LONG"}))]


@pytest.mark.parametrize(("code", "class_", "action"), REFUSALS, ids=[str(row[0]) for row in REFUSALS])
def test_ccxt_refusal_carries_its_code_and_over_tls_its_class(world, secure, code, class_, action):
    with pytest.raises(ccxt.BaseError, match=str(code)):
        action(world)
    with pytest.raises(class_, match=str(code)) as caught:
        action(secure)
    assert type(caught.value) is class_ or class_ is ccxt.BaseError


def certificate(folder, host):
    """Make a test CA and a certificate of it for a host; return their paths."""
    x509 = pytest.importorskip("cryptography.x509")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    now = datetime.datetime.now(datetime.UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]
    subjects = [x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]) for name in ("test CA", host)]
    for number, (key, subject) in enumerate(zip(keys, subjects, strict=True)):
        builder = (x509.CertificateBuilder().subject_name(subject).issuer_name(subjects[0])
                   .public_key(key.public_key()).serial_number(number + 1)
                   .not_valid_before(now - datetime.timedelta(days=1))
                   .not_valid_after(now + datetime.timedelta(days=1))
                   .add_extension(x509.BasicConstraints(ca=not number, path_length=None), critical=True)
                   .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
                   .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
                   .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key()),
                                  critical=False))
        pem = builder.sign(keys[0], hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        (folder / f"{number}.pem").write_bytes(pem)
    (folder / "key.pem").write_bytes(keys[1].private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return folder / "0.pem", folder / "1.pem", folder / "key.pem"


@contextlib.contextmanager
def terminator(paper, port, chain, key):
    """Serve TLS on a port in front of the paper exchange."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, key)

    async def pump(reader, writer):
        with contextlib.suppress(OSError):
            while data := await reader.read(65_536):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def accept(reader, writer):
        inner = await asyncio.open_connection(*paper.host.split(":"))
        await asyncio.gather(pump(reader, inner[1]), pump(inner[0], writer))

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    server = asyncio.run_coroutine_threadsafe(
        asyncio.start_server(accept, "127.0.0.1", port, ssl=context), loop).result(5)
    yield

    async def end():
        server.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    asyncio.run_coroutine_threadsafe(end(), loop).result(5)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)


@pytest.fixture(scope="module")
def secure(paper, tmp_path_factory):
    """Return a ccxt client over TLS, at a host name that gives it the futures error map."""
    port, resolve = free_port(), socket.getaddrinfo
    ca, chain, key = certificate(tmp_path_factory.mktemp("tls"), HOST)
    with terminator(paper, port, chain, key), pytest.MonkeyPatch.context() as patch:
        # Not every resolver knows the names below localhost (RFC 6761).
        patch.setattr(socket, "getaddrinfo", lambda host, *args, **more: resolve(
            "127.0.0.1" if host == HOST else host, *args, **more))
        made = client(paper, ccxt)
        base = f"https://{HOST}:{port}"
        made.urls["api"] = {name: url.replace(f"http://{paper.host}", base) if isinstance(url, str) else url
                            for name, url in made.urls["api"].items()}
        made.validateServerSsl = str(ca)
        made.load_markets()
        yield made


def watch(paper, scenario):
    async def run():
        made = client(paper, ccxt.pro)
        try:
            await made.load_markets()
            async with asyncio.timeout(40):
                return await scenario(made)
        finally:
            await made.close()
    return asyncio.run(run())


WATCHES = [  # method, arguments, what each answer must be
    ("watch_ticker", (BTC,), lambda v: v["last"] > 0), ("watch_tickers", ([BTC, ETH],), bool),
    ("watch_tickers", (), bool), ("watch_mark_price", (BTC,), lambda v: v["markPrice"] > 0),
    ("watch_mark_prices", (), bool), ("watch_trades", (BTC,), lambda v: v[-1]["price"] > 0),
    ("watch_trades_for_symbols", ([BTC, ETH],), bool), ("watch_bids_asks", ([BTC, ETH],), bool),
    ("watch_order_book", (BTC,), lambda v: v["bids"][0][0] < v["asks"][0][0]),
    ("watch_order_book_for_symbols", ([BTC, ETH],), lambda v: v["nonce"]),
    ("watch_ohlcv", (BTC, "1m"), lambda v: len(v[-1]) == 6), ("watch_ohlcv", (BTC, "15m"), bool)]


@pytest.fixture(scope="module")
def watched(paper):
    """What each hears twice, or why not: all at once, they wait for their streams."""
    async def hear(made, method, args, is_right):
        return [bool(is_right(await getattr(made, method)(*args))) for _ in range(2)]

    return watch(paper, lambda made: asyncio.gather(
        *(hear(made, *row) for row in WATCHES), return_exceptions=True))


@pytest.mark.parametrize("number", range(len(WATCHES)), ids=[row[0] for row in WATCHES])
def test_ccxt_pro_watch_with_a_public_stream_hears_it(watched, number):
    assert watched[number] == [True, True]


def test_ccxt_pro_watches_of_the_account_hear_an_order(paper):
    async def scenario(made):
        heard = {name: asyncio.create_task(getattr(made, name)()) for name in (
            "watch_orders", "watch_my_trades", "watch_balance", "watch_positions")}
        await asyncio.sleep(1)
        order = await made.create_order(BTC, "market", "buy", 0.01)
        told = {name: await task for name, task in heard.items()}
        assert told["watch_orders"][-1]["id"] == told["watch_my_trades"][-1]["order"] == order["id"]
        assert told["watch_balance"]["USDT"]["total"] > 0
        assert told["watch_positions"][-1]["contracts"] == 0.01
    watch(paper, scenario)


def test_ccxt_pro_orders_over_websocket_are_made_found_and_canceled(paper):
    async def scenario(made):
        price = float(made.price_to_precision(BTC, (await made.fetch_ticker(BTC))["last"] * 0.97))
        order = await made.create_order_ws(BTC, "limit", "buy", 0.01, price)
        assert (await made.fetch_order_ws(order["id"], BTC))["status"] == "open"
        assert (await made.cancel_order_ws(order["id"], BTC))["status"] == "canceled"
        with pytest.raises(ccxt.BaseError, match="-2011"):
            await made.cancel_order_ws(order["id"], BTC)
        assert (await made.fetch_balance_ws())["USDT"]["total"] > 0
        assert (await made.fetch_positions_ws()) is not None
        assert (await made.fetch_order_book_ws(BTC))["bids"]
        assert (await made.fetch_ticker_ws(BTC))["bid"] > 0
    watch(paper, scenario)
