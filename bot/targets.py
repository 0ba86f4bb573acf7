"""What a strategy's Target must be before it becomes a signal, and how often one may. Pure rules."""

from collections.abc import Mapping
from decimal import ROUND_CEILING, ROUND_DOWN, ROUND_FLOOR, Decimal

import msgspec

from bot.model import Instrument, Outcome, Target, Tick, TradingSignal

NUMBER_MAX = Decimal(10**15)  # larger ones lose their last digits in 28-digit arithmetic
REASON_MAX = 300  # characters kept of a reason: it is journaled with the signal
RETRY_OUTCOMES: tuple[Outcome, ...] = ("denied", "expired", "rejected", "absent")
RETRY_NS_MIN, RETRY_NS_MAX = 1_000_000_000, 30_000_000_000  # waits double: a limit is not hammered


class Refusal(msgspec.Struct, frozen=True):
    """Why a Target does not become a signal: the word it is counted under, and a sentence."""

    reason: str
    text: str


def fit(target: Target, *, symbols: tuple[str, ...], instruments: Mapping[str, Instrument],
        ticks: Mapping[str, Tick]) -> Target | Refusal:
    """Return the Target on the instrument's grid, or why it is refused.

    The quantity is cut toward zero: never more than was asked for. Exits move away from the price, by
    less than one increment: a long's stop down and its take-profit up, a short's the other way. So
    rounding never makes a stop fire at once and never takes less profit than was asked for.
    A flat target has no exits; what it names is left out, and never keeps it from closing.
    """
    if not isinstance(target, Target) or target.symbol not in symbols:
        own = ", ".join(symbols)
        return Refusal("foreign_symbol", f"must be a Target for one of {own}; was {target!r:.200}")
    for name in ("qty", "stop_loss", "take_profit"):
        value = getattr(target, name)
        if value is None and name != "qty":
            continue
        if not isinstance(value, Decimal) or not value.is_finite() or abs(value) > NUMBER_MAX:
            return Refusal("not_finite", f"{name} must be a finite Decimal, at most 1e15; was {value!r:.60}")
    tick = ticks.get(target.symbol)
    if tick is None:
        return Refusal("no_tick", f"there must be a Tick of {target.symbol} to decide on; there was none yet")
    return _on_grid(target, instruments[target.symbol], tick.price)


def _on_grid(target: Target, instrument: Instrument, price: float) -> Target | Refusal:
    qty = _quantized(target.qty, instrument.qty_increment, ROUND_DOWN)
    if target.qty == 0:
        return msgspec.structs.replace(target, qty=Decimal(0), stop_loss=None, take_profit=None)
    if qty == 0:
        return Refusal("qty_too_small", f"qty must be at least {instrument.qty_increment}; was {target.qty}")
    below, above = ("stop_loss", "take_profit") if qty > 0 else ("take_profit", "stop_loss")
    exits = {}
    for name, rounding in ((below, ROUND_FLOOR), (above, ROUND_CEILING)):
        value = getattr(target, name)
        if value is not None:
            exits[name] = value = _quantized(value, instrument.price_increment, rounding)
            if value <= 0 or (value >= price if name == below else value <= price):
                side = "above 0 and below" if name == below else "above"
                return Refusal("wrong_side", f"{name} of {'long' if qty > 0 else 'short'} {abs(qty)} must be "
                                             f"{side} the Tick's price {price}; was {value}")
    return msgspec.structs.replace(target, qty=qty, **exits)


def _quantized(value: Decimal, increment: Decimal, rounding: str) -> Decimal:
    return (value / increment).to_integral_value(rounding) * increment


class TokenBucket:
    """At most per_s a second in the long run, what comes in burst_s at once."""

    def __init__(self, per_s: int, burst_s: float = 2.0) -> None:
        self._per_s, self._full, self._filled_ns = per_s, burst_s * per_s, 0
        self._tokens = self._full

    def has_token(self, now_ns: int) -> bool:
        """Return whether one may go; now_ns must not run backwards."""
        earned = (now_ns - self._filled_ns) * self._per_s / 1e9
        self._tokens, self._filled_ns = min(self._full, self._tokens + earned), now_ns
        return self._tokens >= 1

    def take(self) -> None:
        self._tokens -= 1


class Sent(msgspec.Struct):
    """The newest signal of a symbol, and what became of it. retry_ns: monotonic."""

    run: int
    seq: int
    position_version: int
    exits: tuple[Decimal, Decimal | None, Decimal | None]  # qty, stop_loss, take_profit
    sent_ns: int
    outcome: Outcome | None = None
    denials: int = 0
    retry_ns: int = 0

    def saw_outcome(self, outcome: Outcome, now_ns: int) -> None:
        is_told_again = self.outcome is not None  # as often as the signal was sent again
        self.outcome = outcome
        if outcome in RETRY_OUTCOMES and not is_told_again:
            self.retry_ns = now_ns + min(RETRY_NS_MIN << min(self.denials, 10), RETRY_NS_MAX)
            self.denials += 1

    def says(self, target: Target) -> bool:
        return self.exits == (target.qty, target.stop_loss, target.take_profit)

    def may_repeat(self, position_version: int, position_qty: Decimal, now_ns: int, *, is_lost: bool) -> bool:
        """Return whether an equal Target may become a signal once more, now or after the back-off.

        is_lost: acknowledged to an earlier run of this process, which did not hear the outcome.
        """
        qty = self.exits[0]
        if qty != 0 and position_version != self.position_version:
            return False  # what a stop, or the operator, took out does not come back
        if self.outcome is not None:
            return self.outcome in RETRY_OUTCOMES
        # Outcomes may be dropped on the way; an exit must not be forgotten with one.
        return is_lost or (qty == 0 and position_qty != 0 and now_ns - self.sent_ns > RETRY_NS_MAX)


def sent_of(signal: TradingSignal, now_ns: int, before: Sent | None = None) -> Sent:
    """Return the memory of a signal; the back-off goes on when `before` said the same."""
    exits = (signal.target_qty, signal.stop_loss, signal.take_profit)
    denials = before.denials if before is not None and before.exits == exits else 0
    return Sent(signal.run, signal.seq, signal.position_version, exits, now_ns, denials=denials)
