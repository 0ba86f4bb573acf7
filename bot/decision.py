"""What a signal leads to next, given the books. Pure, and asked again after every change.

A signal says where the position should be. A target that increases the position acts once; one
that reduces stays in force until reached, and one below an entry whose end is not known until that
is known; a flip is a reduce-only leg and then an opening leg. One
order moves a symbol at a time; the newest signal waits behind it, and only a signal without an
order can be superseded. Because the answer follows from the books alone, a restart needs no memory.
"""

from decimal import Decimal

import msgspec

from bot.books import OpenSignal, SymbolBook, is_newer
from bot.config import LimitsConfig
from bot.exposure import Exposure
from bot.limits import MAY_PASS, Denial, Prices, check_entry, check_prices, check_sender, check_signal
from bot.model import Instrument, Outcome, TradingSignal
from bot.orders import Leg, Order, Side
from bot.protection import as_held

CLOCK_SLACK_NS = 1_000_000_000  # as signals from the future are allowed in limits.py
REDUCE_ATTEMPTS_MAX = 5  # rejected in a row; then the strategy is told and may decide anew
REDUCE_WAIT_NS = 500_000_000  # doubles per attempt that filled nothing: 0.5, 1, 2 ... 32 s


class Context(msgspec.Struct, frozen=True, kw_only=True):
    """What a decision looks at beside the books."""

    owner: str | None  # the strategy that trades this symbol
    state: str  # of the symbol: RUNNING, REDUCING, LOCKED, HALTED, RECONCILING
    state_reason: str
    limits: LimitsConfig
    instrument: Instrument | None
    prices: Prices
    now_ns: int
    exchange_now_ns: int
    exposure: Exposure
    fence_ns: int  # after so long the exchange refuses what was sent and did not arrive
    rate_refusal: str = ""  # why the exchange's request limits let no entry leave


class CloseSignal(msgspec.Struct, frozen=True):
    """Give the signal its one outcome."""

    signal: OpenSignal
    outcome: Outcome
    reason: str


class SendOrder(msgspec.Struct, frozen=True):
    """Send a market order for the signal. set_exits: its stop and take-profit are the plan now."""

    signal: OpenSignal
    leg: Leg
    side: Side
    qty: Decimal
    checks: dict[str, str]
    set_exits: bool


class MoveExits(msgspec.Struct, frozen=True):
    """The target is reached already: only the exits change."""

    signal: OpenSignal


Step = CloseSignal | SendOrder | MoveExits


def next_step(book: SymbolBook, context: Context) -> Step | None:
    """Return what to do next in this symbol, None when there is nothing or something is awaited."""
    if not book.signals:
        return None
    waiting = [s for s in book.signals if not s.orders]
    if ended := endings(book, context):
        return ended[0]
    if book.working():
        return _pass_unknown(waiting, book, context)
    acting = next((s for s in book.signals if s.orders), None)
    if waiting and _outlasts_entry(waiting[0], book) and not _adds(book, waiting[0].signal.target_qty):
        return _begin(waiting[0], book, context)
    if acting is not None:
        return _continue(acting, book, context, newer_waits=bool(waiting))
    return _begin(waiting[0], book, context)


def _pass_unknown(waiting: list[OpenSignal], book: SymbolBook, context: Context) -> Step | None:
    # An entry nobody knows the end of holds up what adds risk, not what takes it away: a reduction is
    # sized on what is booked, reduce-only, and stays in force until that entry is known.
    # An exit nobody knows the end of may be sent again where it goes to zero, and where the exchange would
    # refuse the first if it came now: reduce-only, the two cannot take more than there is.
    working = {o.id for o in book.working()}
    if any(o.state != "UNKNOWN" or o.leg not in ("open", "reduce") for o in book.working()):
        return None
    if exits := [o for o in book.working() if o.leg == "reduce"]:
        may_arrive = any(o.may_arrive(context.now_ns, context.fence_ns) for o in exits)
        return None if may_arrive else _exit_again(waiting, book, context)
    free = next((s for s in book.signals if s.orders and working.isdisjoint(s.orders)), None)
    if free is not None:
        step = _continue(free, book, context, newer_waits=bool(waiting))
        return step if isinstance(step, SendOrder) and step.leg == "reduce" else None
    if waiting and _reduce_qty(book.position_qty, waiting[0].signal.target_qty):
        return _begin(waiting[0], book, context)
    return None


def _exit_again(waiting: list[OpenSignal], book: SymbolBook, context: Context) -> Step | None:
    signal = waiting[0] if waiting else next(s for s in reversed(book.signals) if s.orders)
    held = book.position_qty
    if held == 0 or _reduce_qty(held, signal.signal.target_qty) != abs(held):
        return None
    step = _begin(signal, book, context) if waiting else _continue(signal, book, context, newer_waits=False)
    return step if isinstance(step, SendOrder) and step.leg == "reduce" else None


def endings(book: SymbolBook, context: Context) -> list[CloseSignal]:
    """Return the outcomes of all waiting signals that will lead to nothing, whatever the others do."""
    ended, waiting = [], []
    for signal in (s for s in book.signals if not s.orders):  # denied ones supersede nothing
        denial = check_sender(signal.signal, context.owner, now_ns=context.now_ns)
        if denial is not None:
            ended.append(_deny(signal, denial))
        else:
            waiting.append(signal)
    by_run = {s.signal.run: s.age_name for s in sorted(waiting, key=lambda s: s.signal.seq)}
    newest = max(by_run.values(), default=(0, 0, 0))
    known = book.newest.get(context.owner or "", newest)
    has_stepped_back = known[0] > context.now_ns + CLOCK_SLACK_NS  # this host's clock, since
    if is_newer(known, newest) and (known[1] == newest[1] or not has_stepped_back):
        newest = known
    for signal in waiting:
        if signal.age_name != newest:
            ended.append(CloseSignal(signal, "superseded", "a newer signal for this symbol was received"))
        elif context.now_ns >= signal.signal.expires_ns and not _outlasts_entry(signal, book):
            age_ms = (context.now_ns - signal.signal.created_ns) // 1_000_000
            ended.append(CloseSignal(signal, "expired", "not acted on in its time to live, was "
                                     f"{age_ms} ms old"))
    return ended


def _outlasts_entry(signal: OpenSignal, book: SymbolBook) -> bool:
    # An entry that has no end yet may still fill: a newer target that wants less is in force until then.
    entry = next((s for s in book.signals if s.orders and book.orders[s.orders[-1]].leg == "open"), None)
    target = signal.signal.target_qty
    return (entry is not None and target.is_finite() and is_newer(signal.age_name, entry.age_name)
            and _reduce_qty(entry.signal.target_qty, target) > 0)


def _adds(book: SymbolBook, target: Decimal) -> bool:
    return target != book.position_qty and _reduce_qty(book.position_qty, target) == 0


def _begin(signal: OpenSignal, book: SymbolBook, context: Context) -> Step | None:
    wanted = signal.signal
    if context.state == "RECONCILING":
        return None  # waits, and expires in its time
    if context.instrument is None:
        return _deny(signal, Denial("not_trading", f"{wanted.symbol} is not listed at the exchange"))
    now_ns, exchange_now_ns = ((wanted.created_ns, wanted.tick_exchange_ns) if _outlasts_entry(signal, book)
                               else (context.now_ns, context.exchange_now_ns))
    denial = check_signal(wanted, book, context.instrument, context.limits, now_ns=now_ns,
                          exchange_now_ns=exchange_now_ns)
    if denial is not None:
        return _deny(signal, denial)
    if wanted.target_qty == book.position_qty:
        return _already_there(signal, book, context)
    if _reduce_qty(book.position_qty, wanted.target_qty):
        return _reduce(signal, book, context)
    return _open(signal, book, context)


def _already_there(signal: OpenSignal, book: SymbolBook, context: Context) -> Step:
    wanted = signal.signal
    if book.position_qty == 0 or (wanted.stop_loss, wanted.take_profit) in (
            (None, None), (book.stop_loss, book.take_profit)):
        return CloseSignal(signal, "done", "the position is already there")
    denial = _state_denial("protect", context)
    if denial is None and context.state == "HALTED" and _gives_way(book, wanted):
        denial = Denial("halted", f"{context.state_reason}; under a halt a stop only moves closer")
    return _deny(signal, denial) if denial else MoveExits(signal)


def _gives_way(book: SymbolBook, wanted: TradingSignal) -> bool:
    # Whether the new exits would let the position lose more, or move its take-profit.
    if wanted.take_profit not in (None, book.take_profit):
        return True
    if wanted.stop_loss is None or book.stop_loss is None:
        return False
    closer = wanted.stop_loss - book.stop_loss
    return closer < 0 if book.position_qty > 0 else closer > 0


def _reduce_qty(held: Decimal, target: Decimal) -> Decimal:
    # Unsigned; a flip first goes to zero. 0: the target does not reduce.
    if held == 0 or ((held > 0) == (target > 0) and abs(target) >= abs(held)):
        return Decimal(0)
    return abs(held) if (held > 0) != (target > 0) else abs(held) - abs(target)


def _reduce(signal: OpenSignal, book: SymbolBook, context: Context) -> Step | None:
    denial = _state_denial("reduce", context)
    if denial is not None:
        return _deny(signal, denial)
    qty = _reduce_qty(as_held(book).position_qty, signal.signal.target_qty)
    if qty == 0:
        return None  # what the books hold is not there, or is not told yet: it waits for the two to agree
    if context.instrument is not None and qty > context.instrument.qty_max:
        qty = context.instrument.qty_max  # of one order; the signal stays in force for the rest
    keeps_side = (signal.signal.target_qty > 0) == (book.position_qty > 0) and signal.signal.target_qty != 0
    return SendOrder(signal, "reduce", "sell" if book.position_qty > 0 else "buy", qty,
                     {"state": context.state, "reduce_only": "true"}, set_exits=keeps_side)


def _open(signal: OpenSignal, book: SymbolBook, context: Context) -> Step:
    assert context.instrument is not None
    add = signal.signal.target_qty - book.position_qty
    side: Side = "buy" if add > 0 else "sell"
    checks = {"state": context.state,
              "signal_age_ms": f"{(context.now_ns - signal.signal.created_ns) // 1_000_000} "
                               f"of {context.limits.signal_age_ms_max}"}
    full = Denial("rate_budget", context.rate_refusal) if context.rate_refusal else None
    denial = _state_denial("entry", context) or full or check_prices(
        context.prices, context.limits, side, exchange_now_ns=context.exchange_now_ns, checks=checks)
    if denial is None:
        assert context.prices.mark is not None
        denial = check_entry(book, context.instrument, context.limits, side=side, qty=abs(add),
                             mark=context.prices.mark, checks=checks,
                             exposure=context.exposure, now_ns=context.now_ns)
    if denial is not None:
        return _deny(signal, denial)
    return SendOrder(signal, "open", side, abs(add), checks, set_exits=True)


def _continue(signal: OpenSignal, book: SymbolBook, context: Context, *, newer_waits: bool) -> Step | None:
    orders = [book.orders[name] for name in signal.orders]
    last = orders[-1]
    if last.leg == "open":
        return _close_by(signal, last)
    if _reduce_qty(book.position_qty, signal.signal.target_qty) == 0:
        if newer_waits or not _has_opening_leg(signal, orders, book):
            return CloseSignal(signal, "done", f"reduced to {book.position_qty}")
        return _open_second_leg(signal, book, context)
    if newer_waits:
        return _close_by(signal, last)
    if context.state == "RECONCILING":
        return None
    if [o.state for o in orders[-REDUCE_ATTEMPTS_MAX:]] == ["REJECTED"] * REDUCE_ATTEMPTS_MAX:
        return _close_by(signal, last)
    fruitless = next((n for n, o in enumerate(reversed(orders)) if o.filled_qty), len(orders))
    wait_ns = REDUCE_WAIT_NS << min(max(fruitless - 1, 0), 6)
    # A clock that stepped back must not hold a reduction up.
    return None if 0 <= context.now_ns - last.intended_ns < wait_ns else _reduce(signal, book, context)


def _has_opening_leg(signal: OpenSignal, orders: list[Order], book: SymbolBook) -> bool:
    # A flip: its first leg traded towards the target's side. A reduction whose position was taken
    # out meanwhile trades away from it, and must not buy that back.
    target = signal.signal.target_qty
    return book.position_qty == 0 and target != 0 and (orders[0].request.side == "buy") == (target > 0)


def _open_second_leg(signal: OpenSignal, book: SymbolBook, context: Context) -> Step | None:
    if context.now_ns >= signal.signal.expires_ns:
        return CloseSignal(signal, "expired", "the position was closed; the opening leg came too late")
    if context.state == "RECONCILING" or context.instrument is None:
        return None
    denial = check_signal(signal.signal, book, context.instrument, context.limits, now_ns=context.now_ns,
                          exchange_now_ns=context.exchange_now_ns)
    return _deny(signal, denial) if denial is not None else _open(signal, book, context)


def _close_by(signal: OpenSignal, last: Order) -> CloseSignal:
    if signal.filled_qty != 0:
        return CloseSignal(signal, "done", f"filled {abs(signal.filled_qty)}")
    if last.state == "ABSENT":
        return CloseSignal(signal, "absent", last.text or "the order never reached the exchange")
    text = f"{last.code} {last.text}".strip() if last.state == "REJECTED" else f"{last.state} unfilled"
    return CloseSignal(signal, "rejected", f"the exchange said {text}")


def _state_denial(action: str, context: Context) -> Denial | None:
    if action in MAY_PASS[context.state]:
        return None
    return Denial(context.state.lower(), context.state_reason or f"no {action} while {context.state}")


def _deny(signal: OpenSignal, denial: Denial) -> CloseSignal:
    return CloseSignal(signal, "denied", str(denial))
