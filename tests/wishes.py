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
