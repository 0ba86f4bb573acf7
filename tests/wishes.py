"""A strategy that wants what a file says: the test's hand on a real strategy process."""

from decimal import Decimal
from pathlib import Path

from bot.model import Target


class WishStrategy:
    """The file holds a quantity and a stop price, or a quantity alone."""

    def __init__(self, settings, instruments):
        self._path = Path(settings["wish"])

    def on_tick(self, tick):
        words = [Decimal(word) for word in self._path.read_text().split()]
        if not words or tick.kind != "quote":
            return None
        return Target(tick.symbol, words[0], stop_loss=words[1] if len(words) > 1 else None, reason="a wish")


class Restless:
    """Wants in and out again at every quote, with a stop."""

    def __init__(self, settings, instruments):
        self._notional, self._instruments = settings["notional"], instruments
        self._is_in = False

    def on_tick(self, tick):
        if tick.kind != "quote":
            return None
        self._is_in = not self._is_in
        qty = Decimal(self._notional) / Decimal(repr(tick.price)) if self._is_in else Decimal(0)
        stop = Decimal(repr(tick.price)) * Decimal("0.95") if self._is_in else None
        return Target(tick.symbol, qty, stop_loss=stop, reason="restless")
