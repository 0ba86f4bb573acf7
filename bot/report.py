"""The day: profit and loss, slippage, latency, outcomes and incidents of a span, out of the journal.

A table for people, JSON for scripts, and one HTML file with the charts in it that opens anywhere.
"""

import html
from collections.abc import Iterable
from decimal import Decimal
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import msgspec

from bot import events
from bot.alert import UNPROTECTED_S_MAX
from bot.config import SETTLE
from bot.errors import InvariantError
from bot.explain import clock_text, tell
from bot.journal import Entry
from bot.page import table_lines

STATIC = Path(__file__).with_name("static")
INCIDENTS = (events.Started, events.Halted, events.Resumed, events.SymbolLocked, events.SymbolUnlocked,
             events.Adopted, events.Restored, events.Commanded, events.OrderChanged)
ZERO = Decimal(0)
MS = 1e6


class Pnl(msgspec.Struct):
    """Money of one symbol in its settlement currency.

    slippage: paid against the deciding Ticks' prices, by what signals ordered; decided: that's volume.
    """

    fills: int = 0
    volume: Decimal = ZERO
    decided: Decimal = ZERO
    realized_pnl: Decimal = ZERO
    fees: Decimal = ZERO
    slippage: Decimal = ZERO


class Day(msgspec.Struct):
    """What happened in a span. Times in nanoseconds, latencies in milliseconds."""

    from_ns: int
    to_ns: int
    pnl: dict[str, Pnl] = {}
    wallet: list[tuple[int, Decimal]] = []
    fills: list[events.FillBooked] = []
    outcomes: dict[str, int] = {}
    latencies_ms: dict[str, list[float]] = {}
    incidents: list[str] = []
    other: Decimal = ZERO  # what moved the wallet beside trades, as far as compared: `income` is of it
    other_fees: dict[str, Decimal] = {}  # by currency: in no sum here
    income: dict[str, Decimal] = {}  # by the exchange's type; transfers are no gain


def summarize(entries: Iterable[Entry], from_ns: int, to_ns: int) -> Day:
    """Return the day that these journal entries, in their sequence, tell."""
    day = Day(from_ns, to_ns)
    signals: dict[str, events.SignalReceived] = {}
    intents: dict[str, events.OrderIntended] = {}
    naked_ns: dict[str, int] = {}
    traded = ZERO  # since the first comparison
    told: dict[str, Decimal] = {}  # income that the last comparison had read, where that did not explain all
    for entry in entries:
        event = entry.event
        if isinstance(event, events.SignalReceived):
            signals[event.key] = event
        elif isinstance(event, events.SignalClosed):
            reason = "" if event.outcome == "done" else event.reason.partition(":")[0]
            name = f"{event.outcome} {reason}".strip()
            day.outcomes[name] = day.outcomes.get(name, 0) + 1
        elif isinstance(event, events.OrderIntended):
            intents[event.key] = event
            if event.signal in signals and event.leg not in ("stop", "take_profit"):
                decided_ns = signals[event.signal].signal.tick_receive_ns
                day.latencies_ms.setdefault("tick_to_order", []).append((event.intended_ns - decided_ns) / MS)
        elif isinstance(event, events.OrderChanged) and event.event == "accept" and event.key in intents:
            waited_ns = entry.ts_ns - intents.pop(event.key).intended_ns
            day.latencies_ms.setdefault("order_round_trip", []).append(waited_ns / MS)
        elif isinstance(event, events.FillBooked):
            _book(day, event, signals.get(event.signal))
            traded += event.realized_pnl - event.settle_fee if day.wallet else ZERO
        elif isinstance(event, events.Reconciled):
            day.wallet.append((entry.ts_ns, event.wallet_balance))
            day.other = event.wallet_balance - day.wallet[0][1] - traded
            for kind in event.income if day.wallet[1:] else ():  # of the first: from before the span
                day.income[kind] = day.income.get(kind, ZERO) + event.income[kind] - told.get(kind, ZERO)
            told = {} if event.is_explained else event.income
            if event.differences:
                day.incidents.append(tell(entry))
        elif isinstance(event, events.Unprotected):
            _see_stop(day, entry.ts_ns, event, naked_ns)
        elif isinstance(event, INCIDENTS) and (
                getattr(event, "verb", "cancel"), getattr(event, "event", "absent")) == ("cancel", "absent"):
            day.incidents.append(tell(entry))  # the other commands are told by what they led to, if anything
    return day


def _see_stop(day: Day, ts_ns: int, event: events.Unprotected, naked_ns: dict[str, int]) -> None:
    # After each entry there are moments without a stop; longer is an incident.
    since_ns = naked_ns.pop(event.symbol, ts_ns)
    if event.since_ns:
        naked_ns[event.symbol] = event.since_ns
    elif ts_ns - since_ns > UNPROTECTED_S_MAX * 1e9:
        day.incidents.append(f"{clock_text(ts_ns)}  {event.symbol} had lacked its stop for "
                             f"{(ts_ns - since_ns) / 1e9:.1f} s")


def _book(day: Day, fill: events.FillBooked, signal: events.SignalReceived | None) -> None:
    if fill.qty <= 0 or fill.price <= 0:
        raise InvariantError(f"a fill has a quantity and a price above 0; {fill.key} has {fill.qty} at "
                             f"{fill.price}: botctl journal verify")
    row = day.pnl.setdefault(fill.symbol, Pnl())
    row.fills += 1
    row.volume += fill.qty * fill.price
    row.realized_pnl += fill.realized_pnl
    row.fees += fill.settle_fee
    if fill.fee_currency != SETTLE:
        day.other_fees[fill.fee_currency] = day.other_fees.get(fill.fee_currency, ZERO) + fill.fee
    if signal is not None and fill.cause == "signal":
        sign = 1 if fill.side == "buy" else -1
        row.decided += fill.qty * fill.price
        row.slippage += sign * fill.qty * (fill.price - Decimal(repr(signal.signal.tick_price)))
    day.fills.append(fill)


def latency_rows(day: Day) -> list[dict[str, Any]]:
    """Return the latencies as rows: count, median, 95th percentile, maximum."""
    return [
        {"latency": name, "count": len(values), "median_ms": round(median(values), 1),
         "p95_ms": round(quantiles(values, n=20, method="inclusive")[-1] if values[1:] else values[0], 1),
         "max_ms": round(max(values), 1)}
        for name, values in day.latencies_ms.items() if values]


def pnl_rows(day: Day) -> list[dict[str, Any]]:
    """Return the money as rows: each symbol, what is not of trades, the sum, and what is no gain at all."""
    rows: list[dict[str, Any]] = [
        {"of": symbol, "fills": row.fills, "volume": row.volume, "realized_pnl": row.realized_pnl,
         "fees": -row.fees, "net": row.realized_pnl - row.fees, "slippage": row.slippage,
         "slippage_bp": round(row.slippage / row.decided * 10_000, 2) if row.decided else None}
        for symbol, row in sorted(day.pnl.items())]
    funding, paid = day.income.get("FUNDING_FEE", ZERO), day.income.get("TRANSFER", ZERO)
    rows.append({"of": "funding", "net": funding})
    rows.append({"of": "other", "net": day.other - funding - paid})
    rows.append({"of": "sum", "net": sum((row["net"] for row in rows), ZERO)})
    rows.append({"of": "paid in or out", "net": paid})
    rows += [{"of": f"fees in {name}", "fees": -fee} for name, fee in sorted(day.other_fees.items())]
    return [{key: round(value, 4) if isinstance(value, Decimal) else value for key, value in row.items()}
            for row in rows]


def day_json(day: Day) -> dict[str, Any]:
    """Return the day for scripts."""
    return {"from_ns": day.from_ns, "to_ns": day.to_ns, "pnl": pnl_rows(day), "latencies": latency_rows(day),
            "outcomes": dict(sorted(day.outcomes.items())), "incidents": day.incidents,
            "wallet_balance": day.wallet[-1][1] if day.wallet else None}


def day_lines(day: Day) -> list[str]:
    """Return the day for people."""
    return [
        f"{clock_text(day.from_ns)[:19]} to {clock_text(day.to_ns)[:19]} UTC", "",
        *table_lines(pnl_rows(day), ("of", "fills", "volume", "realized_pnl", "fees", "net", "slippage",
                                     "slippage_bp")), "",
        *table_lines(latency_rows(day), ("latency", "count", "median_ms", "p95_ms", "max_ms"),
                     "no order was sent"), "",
        *table_lines([{"outcome": name, "signals": count} for name, count in sorted(day.outcomes.items())],
                     ("outcome", "signals"), "no signal was received"), "",
        f"incidents: {len(day.incidents)}", *day.incidents]


def chart_html(day: Day, mode: str) -> str:
    """Return one HTML file: the tables, the wallet and the sum of what trades brought, drawn."""
    total, traded = ZERO, []
    for fill in day.fills:
        total += fill.realized_pnl - fill.settle_fee
        traded.append((fill.exchange_ns, total))
    data = msgspec.json.encode({name: [{"time": ns // 1_000_000_000, "value": float(value)}
                                       for ns, value in points]
                                for name, points in (("wallet", day.wallet), ("trades", traded))}).decode()
    title = html.escape(f"tradehost {mode.upper()} {clock_text(day.from_ns)[:16]} to "
                        f"{clock_text(day.to_ns)[:16]} UTC")
    text = html.escape("\n".join(day_lines(day)))
    return _CHART.format(title=title, text=text, data=data.replace("<", "\\u003c"),
                         style=(STATIC / "page.css").read_text(encoding="utf-8"),
                         kit=(STATIC / "lightweight-charts.js").read_text(encoding="utf-8"))


_CHART = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta name="viewport" content="width=device-width"><title>{title}</title><style>{style}</style>
<header data-state="">{title}</header><main style="grid-template-columns:minmax(0,1fr)"><section>
<h2>Wallet, and what trades brought after fees</h2><div id="chart" class="chart"></div></section>
<section class="wide"><pre style="white-space:pre">{text}</pre></section></main>
<footer>Charts: TradingView Lightweight Charts, Copyright 2026 TradingView, Inc., tradingview.com</footer>
<script>{kit}</script><script>
const data = {data}, css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name);
const chart = LightweightCharts.createChart(document.getElementById("chart"), {{ autoSize: true,
  layout: {{ background: {{ color: css("--card") }}, textColor: css("--soft"), attributionLogo: false }},
  grid: {{ vertLines: {{ color: css("--line") }}, horzLines: {{ color: css("--line") }} }},
  leftPriceScale: {{ visible: true }}, timeScale: {{ timeVisible: true }} }});
for (const [name, tint, side] of [["wallet", "--link", "right"], ["trades", "--up", "left"]]) {{
  const points = new Map(data[name].map((point) => [point.time, point]));
  chart.addSeries(LightweightCharts.LineSeries, {{ title: name, color: css(tint), priceScaleId: side }})
    .setData([...points.values()].sort((a, b) => a.time - b.time));
}}
chart.timeScale().fitContent();
</script></html>
"""
