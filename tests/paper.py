"""A running paper exchange in a test, and a client of it that signs by an implementation of its own."""

import hashlib
import hmac
import http.client
import json
import time
import tomllib
from decimal import Decimal
from urllib.parse import urlencode

from tests.harness import API_KEY, API_SECRET, asker, start_process, wait_until

SYMBOL = "BTCUSDT"
KEY = {"X-MBX-APIKEY": API_KEY}


class Paper:
    """A running paper exchange and a client that signs for it."""

    def __init__(self, config, module="bot.paper"):
        self.config = config
        self.host = tomllib.loads(config.read_text())["paper"]["bind"]
        self.start(module)

    def start(self, module="bot.paper"):
        self.log, self.process = self.config.parent / f"{module}.log", start_process(module, self.config)
        wait_until(self.is_up, 20)

    def is_up(self):
        assert self.process.poll() is None, self.log.read_text()
        try:
            return self.call("GET", "/fapi/v1/ping")[0] == 200
        except OSError:
            return False

    def call(self, method, path, params=None, *, body=None, headers=None, timeout=10, address=None):
        """Return (status, JSON or text, headers)."""
        connection = http.client.HTTPConnection(self.host, timeout=timeout,
                                                source_address=address or asker())
        try:
            path += f"?{urlencode(params)}" if params else ""
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            text = answer.read()
        finally:
            connection.close()
        try:
            return answer.status, json.loads(text), answer.headers
        except ValueError:
            return answer.status, text, answer.headers

    def signed(self, method, path, *, key=API_KEY, secret=API_SECRET, timeout=10, **params):
        params = {"timestamp": int(time.time() * 1000), **params}
        query = urlencode(params)
        query += "&signature=" + hmac.new(secret.encode(), query.encode(), hashlib.sha256).hexdigest()
        return self.call(method, f"{path}?{query}", headers={"X-MBX-APIKEY": key}, timeout=timeout)

    def market(self, side="BUY", quantity="0.010", **params):
        return self.signed("POST", "/fapi/v1/order", symbol=SYMBOL, side=side, type="MARKET",
                           quantity=quantity, newOrderRespType="RESULT", **params)

    def stop(self, type_, trigger, **params):
        return self.signed("POST", "/fapi/v1/algoOrder", algoType="CONDITIONAL", symbol=SYMBOL, side="SELL",
                           type=type_, quantity="0.010", triggerPrice=trigger, reduceOnly="true", **params)

    def control(self, path, value=None, method="POST"):
        body = None if value is None else json.dumps(value)
        status, answer, _ = self.call(method, f"/paper/{path}", body=body)
        assert status == 200, answer
        return answer

    def price(self):
        return Decimal(self.call("GET", "/fapi/v1/ticker/price", {"symbol": SYMBOL})[1]["price"])

    def position(self):
        row, = self.signed("GET", "/fapi/v2/positionRisk", symbol=SYMBOL)[1]
        return Decimal(row["positionAmt"])

    def flatten(self):
        self.signed("DELETE", "/fapi/v1/allOpenOrders", symbol=SYMBOL)
        self.signed("DELETE", "/fapi/v1/algoOpenOrders", symbol=SYMBOL)
        if position := self.position():
            self.market("SELL" if position > 0 else "BUY", str(abs(position)), reduceOnly="true")
        assert self.position() == 0
