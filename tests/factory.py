"""Nouns for the tests of the pure core: signals, orders, fills, books, and a clock that is moved by hand."""

from decimal import Decimal as D

from bot.books import Books
from bot.config import LimitsConfig
from bot.events import FillBooked, OrderChanged, OrderIntended, SignalReceived
from bot.exposure import Exposure
from bot.limits import Prices
from bot.model import Instrument, TradingSignal
from bot.orders import OrderRequest

BTC, ETH = "BTC/USDT:USDT", "ETH/USDT:USDT"
MS, SECOND = 1_000_000, 1_000_000_000
NOW = 1_760_000_000 * SECOND


class HandClock:
    """A Clock that moves only when told to."""

    def __init__(self, now_ns=NOW):
        self.wall, self.mono, self.tokens = now_ns, 10 * SECOND, 0

    def step(self, seconds):
        self.wall += int(seconds * SECOND)
        self.mono += int(seconds * SECOND)

    def wall_ns(self):
        return self.wall

    def mono_ns(self):
        return self.mono

    def token(self, length):
        self.tokens += 1
        return str(self.tokens).rjust(length, "0")


def instrument(**changes):
    fields = {
        "symbol": BTC,
        "exchange_symbol": "BTCUSDT",
        "status": "TRADING",
        "price_increment": D("0.10"),
        "qty_increment": D("0.001"),
        "qty_min": D("0.001"),
        "qty_max": D(100),
        "notional_min": D(5),
        "contract_size": D(1),
        "settle": "USDT",
    }
    return Instrument(**{**fields, **changes})


def limits(**changes):
    fields = {
        "order_notional_max": D(1_000),
        "position_notional_max": D(2_000),
        "exposure_notional_max": D(5_000),
        "day_loss_max": D(500),
        "leverage_max": D(5),
        "liquidation_distance_pct_min": D(10),
        "repeats_per_minute_max": 8,
        "open_orders_max": 12,
        "mark_jump_pct_max": D(3),
        "price_collar_pct": D(1),
        "orders_per_minute_max": 10,
        "signal_age_ms_max": 2_000,
        "tick_age_ms_max": 3_000,
    }
    return LimitsConfig(**{**fields, **changes})


def exposure(**changes):
    """All is well beside the symbol's own book."""
    return Exposure(**{"equity": D(10_000), **changes})


def prices(now_ns=NOW, **changes):
    fields = {"mark": D(100), "mark_ns": now_ns, "bid": D("99.9"), "ask": D("100.1"), "quote_ns": now_ns}
    return Prices(**{**fields, **changes})


def signal(target="1", *, seq=1, now_ns=NOW, **changes):
    """A signal made at now_ns; prices of the market are about 100."""
    fields = {
        "strategy": "levels",
        "run": 7,
        "seq": seq,
        "symbol": BTC,
        "target_qty": D(target),
        "stop_loss": None,
        "take_profit": None,
        "created_ns": now_ns,
        "expires_ns": now_ns + 5 * SECOND,
        "position_version": 0,
        "tick_run": 3,
        "tick_seq": seq,
        "tick_price": 100.0,
        "tick_exchange_ns": now_ns,
        "tick_receive_ns": now_ns,
        "reason": "a level",
    }
    return TradingSignal(**{**fields, **changes})


def name_of(wanted):
    return f"{wanted.strategy}/{wanted.run}/{wanted.seq}"


def received(wanted, received_ns=None):
    return SignalReceived(
        signal=wanted, received_ns=wanted.created_ns if received_ns is None else received_ns
    )


def intended(
    name,
    qty="1",
    side="buy",
    *,
    leg="open",
    signal="levels/7/1",
    type=None,
    trigger=None,
    symbol=BTC,
    now_ns=NOW,
):
    kind = type or (leg if leg in ("stop", "take_profit") else "market")
    request = OrderRequest(
        client_order_id=name,
        symbol=symbol,
        side=side,
        qty=D(qty),
        type=kind,
        trigger_price=trigger and D(trigger),
        reduce_only=leg != "open",
    )
    return OrderIntended(
        request=request,
        epoch="e",
        strategy="levels",
        signal=signal,
        leg=leg,
        position_qty=D(0),
        checks={},
        intended_ns=now_ns,
    )


def changed(name, event, **fields):
    return OrderChanged(client_order_id=name, signal="", event=event, **fields)


def filled(name, qty="1", side="buy", *, trade="1", price="100", cause="signal", symbol=BTC, **changes):
    fields = {
        "exchange_order_id": "",
        "signal": "",
        "fee": D("0.01"),
        "fee_currency": "USDT",
        "realized_pnl": D(0),
        "exchange_ns": NOW,
    }
    return FillBooked(
        symbol=symbol,
        trade_id=trade,
        client_order_id=name,
        cause=cause,
        side=side,
        qty=D(qty),
        price=D(price),
        **{**fields, **changes},
    )


def folded(*events):
    books = Books()
    for event in events:
        books.apply(event)
    return books


def holding(qty, *events, price="100", stop=None, take=None, version=0, symbol=BTC):
    """Books with a position, as if bought at the price before anything else."""
    books = Books()
    if D(qty):
        books.apply(
            filled(
                "",
                str(abs(D(qty))),
                "buy" if D(qty) > 0 else "sell",
                trade="before",
                price=price,
                symbol=symbol,
            )
        )
    book = books._own(symbol)
    book.stop_loss, book.take_profit, book.version = stop and D(stop), take and D(take), version
    for event in events:
        books.apply(event)
    return books
