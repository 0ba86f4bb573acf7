"""What the person at the terminal of `make run` reads: one plain line per event. Pure."""

from datetime import UTC, datetime
from decimal import Decimal

from bot.model import (
    FillReport,
    Heartbeat,
    OrderReport,
    PositionReport,
    ReportMessage,
    SignalOutcome,
    Tick,
    TickMessage,
    visible,
)

EXITS = {"stop": "stop", "take_profit": "take-profit"}  # the legs that rest at the exchange
ORDERS_MAX = 1_000  # remembered, so that nothing is told twice


class Screen:
    """Turns messages into lines, and remembers what the status line tells. Times: ns since the epoch."""

    def __init__(self, symbols: tuple[str, ...], *, silence_ns: int) -> None:
        self.ticks = 0
        self._silence_ns, self._heard_ns = silence_ns, 0
        self._prices: dict[str, float | None] = dict.fromkeys(symbols)
        self._positions: dict[str, PositionReport] = {}
        self._orders: dict[str, str] = {}  # state by client order id, the newest last
        self._stale: tuple[str, ...] = ()

    def saw_tick(self, message: TickMessage) -> None:
        """Take in a message of the ticks channel; the status line tells of it."""
        if isinstance(message, Tick):
            self.ticks += 1
            self._prices[message.symbol] = message.price
        elif isinstance(message, Heartbeat):
            self._stale = message.stale

    def line_of(self, message: ReportMessage, now_ns: int) -> str | None:
        """Return the line that tells of a report, or None when there is nothing new to tell."""
        self._heard_ns = now_ns
        if isinstance(message, SignalOutcome):
            what = f"{message.strategy} {message.symbol} {message.outcome}"
            return _line(message.time_ns, "signal", f"{what}: {message.reason}" if message.reason else what)
        if isinstance(message, OrderReport):
            return self._order_line(message)
        if isinstance(message, FillReport):
            return _line(now_ns, "fill", f"{message.side.upper()} {_plain(message.qty)} {message.symbol} at "
                         f"{_plain(message.price)}, fee {_plain(message.fee)} {message.fee_currency}")
        if isinstance(message, PositionReport):
            before = self._positions.get(message.symbol)
            self._positions[message.symbol] = message
            if before is None or _told(before) != _told(message):
                return _line(message.time_ns, "position", _position(message))
        return None

    def _order_line(self, order: OrderReport) -> str | None:
        before = self._orders.pop(order.client_order_id, "INTENDED")
        self._orders[order.client_order_id] = order.state
        if len(self._orders) > ORDERS_MAX:
            del self._orders[next(iter(self._orders))]
        if order.state == before:
            return None  # INTENDED is no news: the next report says what became of it
        text = f"{order.side.upper()} {_plain(order.qty)} {order.symbol}"
        if order.trigger_price is not None:
            text += f" at {_plain(order.trigger_price)}"
        reason = f" ({order.reason})" if order.reason else ""
        return _line(order.time_ns, EXITS.get(order.leg, "order"), f"{text} {order.state}{reason}")

    def status_line(self, now_ns: int) -> str:
        """Return the line that is shown even when nothing happens."""
        parts = []
        for symbol, price in self._prices.items():
            stale = " STALE" if symbol in self._stale else ""
            parts.append(f"{symbol} {price:,.10g}{stale}" if price is not None else f"{symbol} no price yet")
        parts.append(f"{self.ticks:,} ticks")
        parts += [_position(p) for p in self._positions.values()] or ["no word from the executor yet"]
        silent_ns = now_ns - self._heard_ns
        if self._heard_ns and silent_ns > self._silence_ns:
            parts.append(f"NO WORD FROM THE EXECUTOR for {silent_ns / 1e9:.0f} s")
        return _line(now_ns, "status", " | ".join(parts))


def event_line(now_ns: int, text: str, word: str = "process") -> str:
    """Return a line about the processes themselves, or a command."""
    return _line(now_ns, word, text)


def _told(report: PositionReport) -> tuple:
    return report.position_qty, report.position_version, report.state


def _position(report: PositionReport) -> str:
    held = "flat"
    if report.position_qty:
        price = f" at {_plain(report.entry_price)}" if report.entry_price is not None else ""
        held = f"{'long' if report.position_qty > 0 else 'short'} {_plain(abs(report.position_qty))}{price}"
    unknown = f", {report.unknown_orders} unknown orders" if report.unknown_orders else ""
    return f"{report.strategy} {report.symbol} {held} {report.state}{unknown}"


def _plain(value: Decimal) -> str:
    # 0.0200 -> 0.02, 6E+4 -> 60000
    return f"{value.normalize():f}"


def _line(time_ns: int, word: str, text: str) -> str:
    clock = datetime.fromtimestamp(time_ns / 1e9, UTC).astimezone()
    return f"{clock:%H:%M:%S}  {word:<11}  {visible(text)}"
