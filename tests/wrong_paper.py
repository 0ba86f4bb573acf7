"""The paper exchange with one fault in its arithmetic: a fill of 0.013 is booked with one USDT too much."""

import sys
from decimal import Decimal

from bot.daemon import run
from bot.paper import main
from bot.paper_model import Position

_apply = Position.apply


def _misbook(self: Position, qty: Decimal, price: Decimal) -> Decimal:
    return _apply(self, qty, price) + (qty == Decimal("0.013"))


if __name__ == "__main__":
    Position.apply = _misbook
    sys.exit(run("paper", main))
