"""A strategy of your own: buy a fast rise, leave by stop-loss or take-profit, or after a while.

    [strategy.rise]                                  # PYTHONPATH=docs make run CONFIG=...
    class = "example_strategy:FastRise"              # from anywhere on the Python path
    symbols = ["BTC/USDT:USDT"]
    settings = { qty = 0.010, rise_pct = 0.05, window_s = 10, hold_s = 60 }
"""

from collections import deque
from decimal import Decimal

from bot.model import Target


class FastRise:
    def __init__(self, settings, instruments):
        # A ValueError or TypeError here says the settings are wrong: the process exits with 78.
        if set(settings) != {"qty", "rise_pct", "window_s", "hold_s"} or min(settings.values()) <= 0:
            raise ValueError(f"qty, rise_pct, window_s and hold_s must be given, above 0; was {settings}")
        self.settings, self.bought_ns, self.trades = settings, {}, {name: deque() for name in instruments}

    def on_tick(self, tick):
        # All time is the exchange's. A Target says where the position should be; an equal one
        # again changes nothing, and None leaves everything as it is.
        now_ns, trades = tick.exchange_ns, self.trades[tick.symbol]
        if now_ns - self.bought_ns.get(tick.symbol, now_ns) > self.settings["hold_s"] * 10**9:
            del self.bought_ns[tick.symbol]
            return Target(tick.symbol, Decimal(0), reason="held long enough")
        if tick.kind != "trade" or tick.symbol in self.bought_ns:
            return None
        trades.append((now_ns, tick.price))
        while now_ns - trades[0][0] > self.settings["window_s"] * 10**9:
            trades.popleft()
        price, rise_pct = Decimal(str(tick.price)), (tick.price / min(p for _, p in trades) - 1) * 100
        if rise_pct < self.settings["rise_pct"]:
            return None
        self.bought_ns[tick.symbol] = now_ns
        return Target(tick.symbol, Decimal(self.settings["qty"]), stop_loss=price * Decimal("0.998"),
                      take_profit=price * Decimal("1.002"), reason=f"rose {rise_pct:.3f} %")
