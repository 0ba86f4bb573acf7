"""Limits and states: what may pass, and why not. Pure; counts the unknown at full size.

Each check returns its evidence for the journal, so that `explain` can show what was looked at.
"""

from decimal import Decimal
from typing import Literal

import msgspec

from bot.books import CLOCK_SLACK_NS, SymbolBook
from bot.config import Config, LimitsConfig
from bot.events import NOT_OWNER
from bot.exposure import Exposure, entries_since, worst_qty
from bot.model import Instrument, TradingSignal
from bot.orders import Side

MS, MINUTE_NS = 1_000_000, 60_000_000_000  # nanoseconds
Action = Literal["entry", "reduce", "protect", "close", "operator"]

# DESIGN 5, second table. RECONCILING protects once the symbol's position was read.
MAY_PASS: dict[str, frozenset[str]] = {
    "RUNNING": frozenset({"entry", "reduce", "protect", "close", "operator"}),
    "REDUCING": frozenset({"reduce", "protect", "close", "operator"}),
    "LOCKED": frozenset({"reduce", "protect", "close", "operator"}),
    "HALTED": frozenset({"protect", "close", "operator"}),
    "RECONCILING": frozenset({"operator"}),
}


class Prices(msgspec.Struct, frozen=True, kw_only=True):
    """What is known of a symbol's market; None: nothing yet. Times by the exchange's clock."""

    mark: Decimal | None = None
    mark_ns: int = 0
    bid: Decimal | None = None
    ask: Decimal | None = None
    quote_ns: int = 0


class Denial(msgspec.Struct, frozen=True):
    """Our no: the rule, and the words for people."""

    rule: str
    text: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.text}"


def tightened(old: LimitsConfig, new: LimitsConfig) -> LimitsConfig:
    """Return the tighter of each limit: names end in _max, or in _min where more is tighter."""
    pairs = {name: (getattr(old, name), getattr(new, name)) for name in LimitsConfig.__struct_fields__}
    return LimitsConfig(**{n: max(pair) if n.endswith("_min") else min(pair) for n, pair in pairs.items()})


def waits_for_restart(old: Config, new: Config) -> list[str]:
    """Return the sections that a process that reads the file again does not take."""
    waiting = [name for name in new.__struct_fields__
               if name not in ("strategy", "limits") and getattr(new, name) != getattr(old, name)]
    is_looser = tightened(old.limits, new.limits) != new.limits
    return waiting + ["limits that became looser"] * is_looser


def check_sender(signal: TradingSignal, owner: str | None, *, now_ns: int) -> Denial | None:
    """Return why the signal has no say in its symbol, not even over older signals."""
    if signal.strategy != owner:
        return Denial(NOT_OWNER, f"{signal.symbol} belongs to {owner or 'no strategy'}")
    if signal.created_ns > now_ns + CLOCK_SLACK_NS:
        return Denial("signal_age", f"made {(signal.created_ns - now_ns) // MS} ms in the future; "
                      "is a clock wrong?")
    return None


def check_signal(signal: TradingSignal, book: SymbolBook, instrument: Instrument, limits: LimitsConfig, *,
                 now_ns: int, exchange_now_ns: int) -> Denial | None:
    """Return why the signal may not lead to an order, None when it may. Its fields may be anything.

    now_ns: this host's clock, as the signal's created time; exchange_now_ns: the exchange's.
    """
    age_ns = now_ns - signal.created_ns
    if not -CLOCK_SLACK_NS <= age_ns <= limits.signal_age_ms_max * MS:
        return Denial("signal_age", f"limit {limits.signal_age_ms_max} ms, was {age_ns // MS} ms")
    tick_age_ns = exchange_now_ns - signal.tick_exchange_ns
    if not -CLOCK_SLACK_NS <= tick_age_ns <= (limits.tick_age_ms_max + limits.signal_age_ms_max) * MS:
        return Denial("stale_tick", f"its Tick was {tick_age_ns // MS} ms old; limit "
                      f"{limits.tick_age_ms_max} ms and {limits.signal_age_ms_max} ms for the signal")
    if signal.position_version != book.version:
        return Denial("stale_position", f"decided on position version {signal.position_version}, "
                      f"it is {book.version} since a stop, an exit or an operator moved it")
    if not _is_multiple(signal.target_qty, instrument.qty_increment):
        return Denial("bad_quantity", f"target_qty must be a multiple of {instrument.qty_increment}, "
                      f"was {_shown(signal.target_qty)}")
    for name in ("stop_loss", "take_profit"):
        price = getattr(signal, name)
        if price is not None and not (_is_price(price) and _is_multiple(price, instrument.price_increment)):
            return Denial("bad_price", f"{name} must be a positive multiple of {instrument.price_increment}, "
                          f"was {_shown(price)}")
    return _check_exit_side(signal)


def _check_exit_side(signal: TradingSignal) -> Denial | None:
    # A stop on the wrong side would fire at once, or never.
    if signal.target_qty == 0:
        return None
    price = Decimal(repr(signal.tick_price))
    if not _is_price(price):
        return Denial("bad_price", f"tick_price must be a positive number, was {price}")
    is_long, stop, take = signal.target_qty > 0, signal.stop_loss, signal.take_profit
    if stop is not None and not (stop < price if is_long else stop > price):
        return Denial("stop_side", f"the stop {stop} is not beyond the price {price}")
    if take is not None and not (take > price if is_long else take < price):
        return Denial("take_profit_side", f"the take-profit {take} is not ahead of the price {price}")
    return None


def _is_price(price: Decimal) -> bool:
    # is_finite first: a comparison with NaN raises.
    return price.is_finite() and price > 0


def _is_multiple(number: Decimal, increment: Decimal) -> bool:
    try:
        return number % increment == 0
    except ArithmeticError:
        return False  # infinite, a signaling NaN, or more than 28 digits of steps


def _shown(number: Decimal) -> str:
    return str(number)[:40]  # a hostile number may have 100,000 digits


def check_prices(prices: Prices, limits: LimitsConfig, side: Side, *, exchange_now_ns: int,
                 checks: dict[str, str]) -> Denial | None:
    """Return why these prices are no ground for an order; fill in the checks made."""
    if prices.mark is None or prices.bid is None or prices.ask is None:
        return Denial("no_price", "no mark or no quote has arrived yet; is the gateway up?")
    if not (_is_price(prices.mark) and _is_price(prices.bid) and _is_price(prices.ask)):
        return Denial("bad_price", f"must be positive: mark {prices.mark}, bid {prices.bid}, "
                      f"ask {prices.ask}")
    if prices.bid > prices.ask:
        return Denial("crossed_book", f"the bid {prices.bid} is above the ask {prices.ask}")
    mark_age_ns = exchange_now_ns - prices.mark_ns
    checks["mark_age_ms"] = f"{mark_age_ns // MS} of {limits.tick_age_ms_max}"
    # A quiet market may not quote for long; the mark comes each second and bounds the quote.
    checks["quote_age_ms"] = f"{(exchange_now_ns - prices.quote_ns) // MS}"
    if not -CLOCK_SLACK_NS <= mark_age_ns <= limits.tick_age_ms_max * MS:
        return Denial("stale_mark", f"limit {limits.tick_age_ms_max} ms, was {mark_age_ns // MS} ms")
    best = prices.ask if side == "buy" else prices.bid
    away_pct = abs(best - prices.mark) / prices.mark * 100
    checks["price_collar_pct"] = f"{away_pct:.4f} of {limits.price_collar_pct}"
    if away_pct > limits.price_collar_pct:
        return Denial("price_collar", f"limit {limits.price_collar_pct} %, the best price {best} is "
                      f"{away_pct:.3f} % from the mark {prices.mark}")
    return None


def check_entry(book: SymbolBook, instrument: Instrument, limits: LimitsConfig, *, side: Side, qty: Decimal,
                mark: Decimal, exposure: Exposure, now_ns: int, checks: dict[str, str]) -> Denial | None:
    """Return why a quantity (unsigned, a multiple of the increment) may not be added."""
    if instrument.status != "TRADING":
        return Denial("not_trading", f"{instrument.symbol} has status {instrument.status}")
    notional = qty * instrument.contract_size * mark
    checks["order_notional"] = f"{notional:.2f} of {limits.order_notional_max}"
    if notional > limits.order_notional_max:
        return Denial("order_notional", f"limit {limits.order_notional_max}, was {notional:.2f}")
    signed = qty if side == "buy" else -qty
    worst = worst_position(book, signed)
    worst_notional = abs(worst) * instrument.contract_size * mark
    checks["position_notional"] = f"{worst_notional:.2f} of {limits.position_notional_max}"
    if worst_notional > limits.position_notional_max:
        return Denial("position_notional", f"limit {limits.position_notional_max}, would be "
                      f"{worst_notional:.2f} with all open and unknown orders")
    worst_notional = max(abs(worst), worst_qty(book)) * instrument.contract_size * mark
    denial = (_check_rates(book, limits, side, exposure, now_ns, checks)
              or _check_account(limits, worst_notional, exposure, checks))
    if denial is not None:
        return denial
    if qty < instrument.qty_min or notional < instrument.notional_min:
        return Denial("too_small", f"{qty} ({notional:.2f}) is below the exchange's minimum "
                      f"{instrument.qty_min} or {instrument.notional_min}")
    if instrument.qty_min > instrument.qty_increment:  # reduce-only is exempt from notional_min alone
        return Denial("too_small", f"filled in part, it could leave {instrument.qty_increment}: below the "
                      f"exchange's minimum {instrument.qty_min}, it could not be closed")
    if max(qty, abs(worst)) > instrument.qty_max:  # more could not be closed, or stopped, by one order
        return Denial("too_large", f"{qty}, making {abs(worst)}, is above the exchange's maximum "
                      f"{instrument.qty_max} of one order: it could not be closed or stopped by one")
    return None


def _check_rates(book: SymbolBook, limits: LimitsConfig, side: Side, exposure: Exposure, now_ns: int,
                 checks: dict[str, str]) -> Denial | None:
    entries, repeats_max = exposure.entries_last_minute, limits.repeats_per_minute_max
    checks["orders_per_minute"] = f"{entries + 1} of {limits.orders_per_minute_max}"
    if entries >= limits.orders_per_minute_max:
        return Denial("order_rate", f"limit {limits.orders_per_minute_max} entries per minute")
    repeats = sum(o.request.side == side for o in entries_since([book], now_ns - MINUTE_NS, now_ns))
    checks["repeats_per_minute"] = f"{repeats + 1} of {repeats_max}"
    if repeats >= repeats_max:
        return Denial("repeats", f"limit {repeats_max} entries to the same side per minute in one symbol")
    checks["open_orders"] = f"{exposure.open_orders + 1} of {limits.open_orders_max}"
    if exposure.open_orders >= limits.open_orders_max:
        return Denial("open_orders", f"limit {limits.open_orders_max}, there are {exposure.open_orders} that "
                      "are not settled")
    return None


def _check_account(limits: LimitsConfig, worst_notional: Decimal, exposure: Exposure,
                   checks: dict[str, str]) -> Denial | None:
    gross, equity = exposure.others_notional + worst_notional, exposure.equity
    checks["exposure_notional"] = f"{gross:.2f} of {limits.exposure_notional_max}"
    if gross > limits.exposure_notional_max:
        return Denial("exposure_notional", f"limit {limits.exposure_notional_max}, would be {gross:.2f} with "
                      "all symbols' open and unknown orders")
    if equity is None or not equity > 0:
        return Denial("no_equity", f"the account's worth is {'not known yet' if equity is None else equity}")
    checks["leverage"] = f"{gross / equity:.3f} of {limits.leverage_max}"
    if gross > limits.leverage_max * equity:
        return Denial("leverage", f"limit {limits.leverage_max}, would be {gross / equity:.3f}: {gross:.2f} "
                      f"over an equity of {equity:.2f}")
    distance_pct, least_pct = exposure.liquidation_distance_pct, limits.liquidation_distance_pct_min
    checks["liquidation_distance_pct"] = f"{'none' if distance_pct is None else f'{distance_pct:.2f}'}, " \
                                         f"least {least_pct}"
    if distance_pct is not None and distance_pct < least_pct:
        return Denial("liquidation_distance", f"limit {least_pct} %, the exchange would liquidate "
                      f"{distance_pct:.2f} % from the mark")
    return None


def worst_position(book: SymbolBook, signed_qty: Decimal) -> Decimal:
    """Return the largest position that may come of this order and of all that is not settled."""
    same_side = sum((o.signed_leaves_qty for o in book.working()
                     if (o.signed_leaves_qty > 0) == (signed_qty > 0)), Decimal(0))
    return book.position_qty + same_side + signed_qty
