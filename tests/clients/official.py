"""Binance's SDK (its answers are pydantic models), unmodified but for the base URL. Prints what failed."""

import json
import sys

from binance_sdk_derivatives_trading_usds_futures.derivatives_trading_usds_futures import (
    ConfigurationRestAPI,
    DerivativesTradingUsdsFutures,
)

url, key, secret = sys.argv[1:]
api = DerivativesTradingUsdsFutures(config_rest_api=ConfigurationRestAPI(
    api_key=key, api_secret=secret, base_path=url)).rest_api
BTC = "BTCUSDT"
price = float(api.symbol_price_ticker_v2(symbol=BTC).data().to_dict()["price"])
low, far = round(price * 0.97, 1), round(price * 0.9, 1)
CALLS = [
    ("test_connectivity", {}), ("check_server_time", {}), ("exchange_information", {}),
    ("order_book", {"symbol": BTC, "limit": 20}), ("recent_trades_list", {"symbol": BTC}),
    ("compressed_aggregate_trades_list", {"symbol": BTC}),
    ("kline_candlestick_data", {"symbol": BTC, "interval": "1m"}),
    ("mark_price_kline_candlestick_data", {"symbol": BTC, "interval": "1m"}),
    ("mark_price", {"symbol": BTC}), ("mark_price", {}), ("get_funding_rate_history", {"symbol": BTC}),
    ("get_funding_rate_info", {}), ("open_interest", {"symbol": BTC}),
    ("ticker24hr_price_change_statistics", {"symbol": BTC}), ("ticker24hr_price_change_statistics", {}),
    ("symbol_price_ticker", {}), ("symbol_order_book_ticker", {}),
    ("account_information_v2", {}), ("account_information_v3", {}), ("futures_account_balance_v2", {}),
    ("futures_account_balance_v3", {}), ("futures_account_configuration", {}), ("symbol_configuration", {}),
    ("notional_and_leverage_brackets", {}), ("get_current_position_mode", {}),
    ("get_current_multi_assets_mode", {}), ("user_commission_rate", {"symbol": BTC}),
    ("query_user_rate_limit", {}), ("change_initial_leverage", {"symbol": BTC, "leverage": 20}),
    ("new_order", {"symbol": BTC, "side": "BUY", "type": "MARKET", "quantity": 0.01,
                   "new_order_resp_type": "RESULT"}),
    ("new_order", {"symbol": BTC, "side": "BUY", "type": "LIMIT", "quantity": 0.01, "price": low,
                   "time_in_force": "GTC", "new_client_order_id": "official1"}),
    ("query_order", {"symbol": BTC, "orig_client_order_id": "official1"}),
    ("query_current_open_order", {"symbol": BTC, "orig_client_order_id": "official1"}),
    ("current_all_open_orders", {"symbol": BTC}),
    ("cancel_order", {"symbol": BTC, "orig_client_order_id": "official1"}),
    ("new_algo_order", {"algo_type": "CONDITIONAL", "symbol": BTC, "side": "SELL", "type": "STOP_MARKET",
                        "quantity": 0.01, "trigger_price": far, "client_algo_id": "official2"}),
    ("query_algo_order", {"client_algo_id": "official2"}), ("current_all_algo_open_orders", {}),
    ("query_all_algo_orders", {"symbol": BTC}), ("cancel_algo_order", {"client_algo_id": "official2"}),
    ("cancel_all_algo_open_orders", {"symbol": BTC}), ("cancel_all_open_orders", {"symbol": BTC}),
    ("auto_cancel_all_open_orders", {"symbol": BTC, "countdown_time": 0}),
    ("all_orders", {"symbol": BTC}), ("account_trade_list", {"symbol": BTC}), ("get_income_history", {}),
    ("position_information_v2", {}), ("position_information_v3", {}),
    ("start_user_data_stream", {}), ("keepalive_user_data_stream", {}), ("close_user_data_stream", {})]
answers = []
for name, arguments in CALLS:
    try:
        data = getattr(api, name)(**arguments).data()
        rows = data if isinstance(data, list) else [data]
        extra = [e for row in rows for e in getattr(row, "additional_properties", None) or ()]
        answers.append([name, "", extra])
    except Exception as error:  # whatever a client raises is what the test is after
        answers.append([name, f"{type(error).__name__}: {error}"[:300], []])
print(json.dumps(answers))
