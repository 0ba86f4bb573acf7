"""typed-binance, which validates every answer and event by its documented type. Prints what failed.

Unmodified but for the base URLs.
"""

import asyncio
import json
import re
import sys

from typed_binance import Binance

url, key, secret = sys.argv[1:]
sockets = url.replace("http", "ws")
BTC, LIMIT = "BTCUSDT", {"symbol": "BTCUSDT", "side": "BUY", "type": "LIMIT", "timeInForce": "GTC",
                         "quantity": "0.010"}
# What the exchange's own samples have, NONE and null, and this client does not know.
OTHERWISE = {"priceMatch", "icebergQuantity"}
STREAMS = [("streams", "agg_trade", ["btcusdt"], {}), ("streams", "mark_price", ["btcusdt"], {}),
           ("streams", "ticker", ["btcusdt"], {}), ("streams", "mini_ticker", ["btcusdt"], {}),
           ("streams", "kline", ["btcusdt"], {"interval": "1m"}), ("streams", "mark_price_arr", [], {}),
           ("public_streams", "book_ticker", ["btcusdt"], {}),
           ("public_streams", "diff_depth", ["btcusdt"], {"speed": 100}),
           ("public_streams", "partial_depth", ["btcusdt"], {"levels": 5, "speed": 100})]


def calls(price):
    """Return (group, method, arguments)."""
    low, far = f"{price * 0.97:.1f}", f"{price * 0.9:.1f}"
    stop = {"algoType": "CONDITIONAL", "symbol": BTC, "side": "SELL", "type": "STOP_MARKET",
            "quantity": "0.010", "triggerPrice": far}
    market = {"symbol": BTC, "side": "BUY", "type": "MARKET", "quantity": "0.010"}
    return [
        ("http.market", "ping", [], {}), ("http.market", "time", [], {}),
        ("http.market", "exchange_info", [], {}), ("http.market", "depth", [BTC], {"limit": 20}),
        ("http.market", "trades", [BTC], {}), ("http.market", "agg_trades", [BTC], {}),
        ("http.market", "klines", [BTC], {"interval": "1m"}),
        ("http.market", "premium_index", [], {"symbol": BTC}),
        ("http.market", "funding_rate", [], {"symbol": BTC}), ("http.market", "funding_info", [], {}),
        ("http.market", "ticker_24hr", [], {"symbol": BTC}), ("http.market", "ticker_price_v2", [], {}),
        ("http.market", "ticker_book", [], {}), ("http.market", "open_interest", [BTC], {}),
        ("http.account", "account_v2", [], {}), ("http.account", "account_v3", [], {}),
        ("http.account", "balance_v2", [], {}), ("http.account", "balance_v3", [], {}),
        ("http.account", "account_config", [], {}), ("http.account", "symbol_config", [], {}),
        ("http.account", "leverage_bracket", [], {}), ("http.account", "rate_limit_order", [], {}),
        ("http.account", "income", [], {}), ("http.trading", "position_mode", [], {}),
        ("http.trading", "multi_assets_mode", [], {}), ("http.trading", "leverage", [BTC], {"leverage": 20}),
        ("http.trading", "new_order", [market | {"newOrderRespType": "RESULT"}], {}),
        ("http.trading", "new_order", [market], {}),
        ("http.trading", "new_order", [LIMIT | {"price": low, "newClientOrderId": "typed1"}], {}),
        ("http.trading", "query_order", [], {"symbol": BTC, "orig_client_order_id": "typed1"}),
        ("http.trading", "open_order", [], {"symbol": BTC, "orig_client_order_id": "typed1"}),
        ("http.trading", "open_orders", [], {"symbol": BTC}),
        ("http.trading", "cancel_order", [], {"symbol": BTC, "orig_client_order_id": "typed1"}),
        ("http.trading", "new_algo_order", [stop | {"clientAlgoId": "typed2"}], {}),
        ("http.trading", "query_algo_order", [], {"client_algo_id": "typed2"}),
        ("http.trading", "algo_open_orders", [], {}), ("http.trading", "all_algo_orders", [BTC], {}),
        ("http.trading", "cancel_algo_order", [], {"client_algo_id": "typed2"}),
        ("http.trading", "cancel_all_algo_open_orders", [BTC], {}),
        ("http.trading", "cancel_all_open_orders", [BTC], {}),
        ("http.trading", "countdown_cancel_all", [BTC], {"countdown_time": 0}),
        ("http.trading", "position_risk_v2", [], {}), ("http.trading", "position_risk_v3", [], {}),
        ("http.trading", "all_orders", [], {"symbol": BTC}), ("http.trading", "user_trades", [BTC], {}),
        ("ws.market", "depth", [BTC], {}), ("ws.market", "ticker_book", [], {"symbol": BTC}),
        ("ws.account", "status_v2", [], {}), ("ws.account", "balance_v2", [], {}),
        ("ws.account", "position_v2", [], {}),
        ("ws.trading", "new_order", [LIMIT | {"price": low, "newClientOrderId": "typed3"}], {}),
        ("ws.trading", "query_order", [], {"symbol": BTC, "orig_client_order_id": "typed3"}),
        ("ws.trading", "cancel_order", [], {"symbol": BTC, "orig_client_order_id": "typed3"})]


async def main():
    answers, futures = [], f"{sockets}/stream"
    client = Binance.new(api_key=key, secret_key=secret, urls={"usdm_futures": {
        "http": url, "streams": futures, "public_streams": futures, "private_streams": f"{sockets}/ws",
        "ws": f"{sockets}/ws-fapi/v1"}})
    async with client:
        api = client.usdm_futures

        async def attempt(name, work):
            try:
                await asyncio.wait_for(work, 20)
                answers.append([name, "", []])
            except Exception as error:  # whatever a client raises is what the test is after
                fields = {*re.findall(r"(?m)^(?:\S*\.)?(\w+)\n  ", str(error))}
                text = f"{type(error).__name__}: {error}"[:300]
                answers.append([name, "" if fields and fields <= OTHERWISE else text, []])

        async def hear(stream, events=1, act=None):
            async with stream as heard:
                if act:
                    await act()
                for _ in range(events):
                    await anext(aiter(heard))

        price = float((await api.http.market.ticker_price_v2(symbol=BTC))["price"])
        for group, method, args, named in calls(price):
            target = api
            for part in group.split("."):
                target = getattr(target, part)
            await attempt(f"{group}.{method}", getattr(target, method)(*args, **named))
        for group, method, args, named in STREAMS:
            stream = getattr(getattr(api, group), method)(*args, **named)
            await attempt(f"{group}.{method}", hear(stream))
        listen_key = (await api.http.account.listen_key_start())["listenKey"]
        await attempt("private_streams.user_data", hear(
            api.private_streams.user_data(listen_key), 4,
            lambda: api.http.trading.new_order({"symbol": BTC, "side": "SELL", "type": "MARKET",
                                                "quantity": "0.020"})))
    print(json.dumps(answers))


asyncio.run(main())
