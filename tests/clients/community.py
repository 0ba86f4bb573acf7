"""python-binance and Binance's older connector, unmodified but for the base URL. Prints what failed."""

import json
import sys

from binance.client import Client
from binance.um_futures import UMFutures

url, key, secret = sys.argv[1:]
BTC = "BTCUSDT"
older = UMFutures(key=key, secret=secret, base_url=url)
Client.FUTURES_URL = f"{url}/fapi"
wide = Client(key, secret, ping=False)
price = float(older.ticker_price(BTC)["price"])
low, far = round(price * 0.97, 1), round(price * 0.9, 1)
order = {"symbol": BTC, "side": "BUY", "type": "LIMIT", "quantity": 0.01, "price": low,
         "timeInForce": "GTC"}
CALLS = [
    (older.time, {}), (older.exchange_info, {}), (older.depth, {"symbol": BTC}),
    (older.trades, {"symbol": BTC}),
    (older.agg_trades, {"symbol": BTC}), (older.klines, {"symbol": BTC, "interval": "1m"}),
    (older.mark_price, {"symbol": BTC}), (older.funding_rate, {"symbol": BTC}),
    (older.ticker_24hr_price_change, {"symbol": BTC}), (older.book_ticker, {"symbol": BTC}),
    (older.account, {}), (older.balance, {}), (older.get_position_risk, {}), (older.get_position_mode, {}),
    (older.leverage_brackets, {}), (older.commission_rate, {"symbol": BTC}), (older.get_income_history, {}),
    (older.change_leverage, {"symbol": BTC, "leverage": 20}),
    (older.new_order, {**order, "newClientOrderId": "older1"}),
    (older.query_order, {"symbol": BTC, "origClientOrderId": "older1"}),
    (older.get_open_orders, {"symbol": BTC, "origClientOrderId": "older1"}),
    (older.get_orders, {"symbol": BTC}),
    (older.cancel_order, {"symbol": BTC, "origClientOrderId": "older1"}),
    (older.countdown_cancel_order, {"symbol": BTC, "countdownTime": 0}),
    (older.get_all_orders, {"symbol": BTC}), (older.get_account_trades, {"symbol": BTC}),
    (older.cancel_open_orders, {"symbol": BTC}), (older.new_listen_key, {}),
    (wide.futures_ping, {}), (wide.futures_time, {}), (wide.futures_exchange_info, {}),
    (wide.futures_order_book, {"symbol": BTC}), (wide.futures_recent_trades, {"symbol": BTC}),
    (wide.futures_klines, {"symbol": BTC, "interval": "5m"}), (wide.futures_mark_price, {}),
    (wide.futures_funding_rate, {"symbol": BTC}), (wide.futures_ticker, {}),
    (wide.futures_symbol_ticker, {"symbol": BTC}), (wide.futures_orderbook_ticker, {}),
    (wide.futures_account, {}), (wide.futures_account_balance, {}), (wide.futures_position_information, {}),
    (wide.futures_get_position_mode, {}), (wide.futures_leverage_bracket, {}),
    (wide.futures_change_leverage, {"symbol": BTC, "leverage": 20}),
    (wide.futures_create_order, {"symbol": BTC, "side": "BUY", "type": "MARKET", "quantity": 0.01}),
    (wide.futures_create_order, {**order, "newClientOrderId": "wide1"}),
    (wide.futures_get_order, {"symbol": BTC, "origClientOrderId": "wide1"}),
    (wide.futures_cancel_order, {"symbol": BTC, "origClientOrderId": "wide1"}),
    (wide.futures_create_order, {"symbol": BTC, "side": "SELL", "type": "STOP_MARKET", "quantity": 0.01,
                                 "triggerPrice": far, "clientAlgoId": "wide2"}),
    (wide.futures_get_open_orders, {"symbol": BTC}), (wide.futures_get_all_orders, {"symbol": BTC}),
    (wide.futures_account_trades, {"symbol": BTC}), (wide.futures_income_history, {}),
    (wide.futures_place_batch_order, {"batchOrders": [{**{k: str(v) for k, v in order.items()}}]}),
    (wide.futures_cancel_all_open_orders, {"symbol": BTC}), (wide.futures_stream_get_listen_key, {})]
answers = []
for call, arguments in CALLS:
    name = f"{type(call.__self__).__name__}.{call.__name__}"
    try:
        call(**arguments)
        answers.append([name, "", []])
    except Exception as error:  # whatever a client raises is what the test is after
        answers.append([name, f"{type(error).__name__}: {error}"[:300], []])
print(json.dumps(answers))
