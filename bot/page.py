"""What botctl prints for people: tables, and the status as one page. Pure."""

from decimal import Decimal
from typing import Any

from bot.explain import clock_text
from bot.model import visible


def table_lines(rows: list[dict[str, Any]], columns: tuple[str, ...], empty: str = "none") -> list[str]:
    """Return rows as aligned lines below their names."""
    if not rows:
        return [empty]
    cells = [list(columns), *([_cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return ["  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
            for line in cells]


def status_lines(status: dict[str, Any]) -> list[str]:
    """Return the page of `botctl status`: what is wrong first, then processes, positions, counters."""
    lines = [f"{status['mode']}  {status['state']}  {status['state_reason']}".rstrip()]
    lines += [f"HALTED {h['scope']} by {h['who']} since {clock_text(h['since_ns'])[:19]}: {h['why']}"
              for h in status["halted"]]
    lines += [f"LOCKED {symbol} {cause}: {text}" for symbol, locks in status["locked_symbols"].items()
              for cause, text in locks.items()]
    lines += [f"UNPROTECTED {row['symbol']} for {row['unprotected_s']:.0f} s: stop {row['stop']}"
              for row in status["positions"] if row["unprotected_s"] is not None]
    if status["journal_error"]:
        lines.append(f"journal: {status['journal_error']}")
    lines += [f"{f['rule']} {f['subject']}: {f['text']} (for {f['age_s']} s)" for f in status["findings"]]
    counters = status["counters"] | {key: status[key] for key in ("open_orders", "unknown_orders")}
    return [*lines, "",
            *table_lines(status["processes"], ("name", "pid", "state", "uptime_s", "heartbeat_age_ms",
                                               "memory_mb", "cpu_pct")), "",
            *table_lines(status["positions"], ("symbol", "qty", "entry_price", "stop", "take_profit",
                                               "realized_pnl", "strategy"), "no position yet"), "",
            "  ".join(f"{name} {value}" for name, value in counters.items()),
            *_backup_lines(status["backup"])]


def _backup_lines(backup: dict[str, Any] | None) -> list[str]:
    if backup is None or not backup["newest"]:
        return [f"backup  {backup['text']}"] if backup else []
    word = backup["text"] or "restored and folded"
    return [f"backup  {backup['newest']}, {backup['age_s'] // 3_600} h old, {word}; {backup['kept']} kept"]


def fit(lines: list[str], columns: int, rows: int, last: str) -> str:
    """Return the lines as one screen: cut to its width and height, with `last` at the bottom."""
    shown = lines if len(lines) < rows else [*lines[:rows - 2], f"... {len(lines) - rows + 2} more lines"]
    shown = [visible(line)[:columns - 1] for line in shown]
    # Home, each line cleared to its end, the rest of the screen too: no flicker, nothing left behind.
    return "\x1b[H" + "".join(f"{line}\x1b[K\r\n" for line in shown) + "\x1b[J" + last[:columns - 1]


def stop_text(plan: Decimal | None, at: list[Decimal | None], *, lacks: bool) -> str | None:
    """Return a stop as it rests at the exchange, and as it is planned where that is not the same."""
    if plan is None and not at:
        return None
    said = "none planned" if plan is None else _cell(plan)
    if lacks or not at:
        return f"{said} ({'NOT FOR ALL OF IT' if at else 'NOT AT THE EXCHANGE'})"
    return said if plan in at else f"{said} ({', '.join(map(_cell, at))} rests)"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, Decimal) and "." in f"{value:f}":
        return f"{value:f}".rstrip("0").rstrip(".")
    return visible(str(value))
