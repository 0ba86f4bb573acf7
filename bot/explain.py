"""The story of a signal or an order in words, from the Tick to the fill, out of the journal."""

from datetime import UTC, datetime
from typing import Any

from bot.events import FillBooked, OrderIntended
from bot.journal import Entry, JournalReader
from bot.model import visible


def find_story(reader: JournalReader, name: str) -> list[Entry]:
    """Return the events of the signal behind this name, else of the order or fill alone; [] when unknown."""
    found = reader.find("intent", name) or reader.find("fill", name)
    if isinstance(found, OrderIntended) and not found.signal:
        return reader.order_story(name, found.request.symbol)
    if isinstance(found, FillBooked) and not found.signal:
        if found.client_order_id:
            return reader.order_story(found.client_order_id, found.symbol)
        return [entry for entry in reader.story(found.symbol) if entry.event == found]
    return reader.story(found.story if found else name)


def tell(entry: Entry) -> str:
    """Return one event as a line; what more there is to tell stands indented below it."""
    lines = _TELL[str(entry.event.__struct_config__.tag)](entry.event).split(f"\n{'':28}")
    return f"{clock_text(entry.ts_ns)}  " + f"\n{'':28}".join(map(visible, lines))


def clock_text(ns: int) -> str:
    """Return a time as people and logs write it, in UTC, with microseconds."""
    return datetime.fromtimestamp(ns / 1e9, UTC).strftime("%Y-%m-%d %H:%M:%S.%f")


def _signal(event: Any) -> str:
    signal = event.signal
    exits = ", ".join(f"{name} {price}" for name, price in (
        ("stop", signal.stop_loss), ("take-profit", signal.take_profit)) if price is not None)
    return (
        f"signal {event.key}: {signal.symbol} to {signal.target_qty} ({exits or 'no exits'}) because "
        f"{signal.reason or '(no reason given)'}\n"
        f"{'':28}decided on Tick {signal.tick_run}/{signal.tick_seq} at {signal.tick_price}, exchange time "
        f"{clock_text(signal.tick_exchange_ns)}, received {clock_text(signal.tick_receive_ns)};\n"
        f"{'':28}created {clock_text(signal.created_ns)}, valid until {clock_text(signal.expires_ns)}, "
        f"position version {signal.position_version}")


def _intent(event: Any) -> str:
    request = event.request
    trigger = f" when the mark passes {request.trigger_price}" if request.trigger_price is not None else ""
    checks = "".join(f"\n{'':28}checked {name}: {value}" for name, value in event.checks.items())
    return (f"order {request.client_order_id}: {event.leg}, {request.side} {request.qty} {request.symbol} "
            f"{request.type}{trigger}{', reduce-only' if request.reduce_only else ''}, at position "
            f"{event.position_qty}; journaled before it was sent{checks}")


def _order(event: Any) -> str:
    said = ", ".join(part for part in (
        f"exchange order {event.exchange_order_id}" if event.exchange_order_id else "",
        f"the exchange's word {event.raw_status}" if event.raw_status else "",
        f"code {event.code}" if event.code else "", event.text,
        f"triggered as {event.triggered_id}" if event.triggered_id else "") if part)
    return f"order {event.client_order_id}: {event.event}" + (f" ({said})" if said else "")


def _answered(event: Any) -> str:
    if not event.is_sent:
        return f"nothing left for order {event.client_order_id}: {event.error}"
    came = f"HTTP {event.status} {event.body}" if event.status else f"no answer: {event.error}"
    return (f"order {event.client_order_id} left {clock_text(event.sent_ns)}: {event.sent}\n"
            f"{'':28}came back {clock_text(event.received_ns)}: {came}")


def _fill(event: Any) -> str:
    return (f"fill {event.trade_id} of {event.client_order_id}: {event.side} {event.qty} {event.symbol} at "
            f"{event.price}, fee {event.fee} {event.fee_currency}, cause {event.cause}, "
            f"realized {event.realized_pnl.normalize():f}")


_TELL = {
    "started": lambda e: f"executor started, epoch {e.epoch}, version {e.version}, config {e.config}",
    "signal": _signal, "intent": _intent, "order": _order, "fill": _fill, "answered": _answered,
    "outcome": lambda e: f"outcome of {e.signal}: {e.outcome} ({e.reason}), filled {e.filled_qty}",
    "exits": lambda e: f"exits of {e.symbol}: stop {e.stop_loss}, take-profit {e.take_profit}",
    "unprotected": lambda e: (f"{e.symbol} lacks its stop since {clock_text(e.since_ns)}" if e.since_ns
                              else f"{e.symbol} no longer lacks its stop"),
    "locked": lambda e: f"{e.symbol} locked, {e.cause}: {e.evidence}",
    "unlocked": lambda e: f"{e.symbol} no longer locked for {e.cause}: {e.evidence}",
    "halted": lambda e: f"halted ({e.scope}) by {e.who}: {e.why}",
    "resumed": lambda e: f"resumed ({e.scope})",
    "commanded": lambda e: f"operator {e.who}: {e.verb} {e.strategy or e.symbol} ({e.why})",
    "adopted": lambda e: f"{e.symbol}: {e.qty} adopted by {e.who} ({e.why}); locks ended: "
                         f"{', '.join(e.causes) or 'none'}",
    "restored": lambda e: (f"restored by {e.who} from {e.backup}, which lacks what happened since "
                           f"{clock_text(e.lacks_since_ns)}" if e.backup else f"begun empty by {e.who}"),
    "reconciled": lambda e: f"compared with the exchange ({e.trigger}): "
                            f"{'; '.join(e.differences) or 'no difference'}"}
