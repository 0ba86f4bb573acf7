"""The status page: small, read-only, on loopback, served by health. Its files are in bot/static.

GET /api/state what is now, /api/history what was, /runbook the RUNBOOK.md of this release. Whoever asks,
the journal is read at most once a second. It answers to loopback names only (DNS rebinding).
"""

import asyncio
import html
import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any, TypedDict

import mistune
import msgspec
from aiohttp import web

from bot.alert import UNPROTECTED_S_MAX, ask
from bot.bus import ZmqSubscriber
from bot.clock import Clock
from bot.config import Config
from bot.errors import JournalError, WireError
from bot.events import Adopted, FillBooked, Reconciled
from bot.journal import JournalReader
from bot.log import Log
from bot.model import Snapshot
from bot.status import gather, order_rows, read_beats, signal_rows
from bot.wire import decode_tick, snapshot_topic

STATIC = Path(__file__).with_name("static")
RUNBOOK = Path(__file__).resolve().parents[1] / "RUNBOOK.md"
FRESH_NS = 900_000_000  # a page asks each second; however many are open, the journal is read once for all
NEAR_PCT, LOSS_RATIO, COMPARED_S = 10, 0.7, 100  # as ops/prometheus/alerts.yml has them
ASK_S = 1.0  # of the Alertmanager, which is on this host
CANDLES, FILLS, COMPARISONS, ROWS = 500, 500, 2_000, 20
NAMES = {"127.0.0.1", "localhost", "[::1]"}
HEADERS = {"Content-Security-Policy":  # the chart library writes style attributes
           "default-src 'self'; img-src data:; style-src 'self' 'unsafe-inline'",
           "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Cache-Control": "no-store",
           "Referrer-Policy": "no-referrer"}


class Ringing(TypedDict):
    """An alert as the Alertmanager holds it."""

    labels: dict[str, str]
    annotations: dict[str, str]


class StatusPage:
    """What the page asks for, gathered from beats, halt files, the journal and the ticks channel."""

    def __init__(self, config: Config, clock: Clock, ticks: ZmqSubscriber) -> None:
        self._config, self._clock, self._ticks = config, clock, ticks
        self._snapshots: dict[str, Snapshot] = {}
        self._asked: set[str] = set()
        self._kept: dict[Callable[[], dict[str, Any]], tuple[int, bytes]] = {}
        self._turn = asyncio.Lock()

    def on_tick_messages(self, batch: list[tuple[bytes, bytes]]) -> None:
        """Keep the newest candles of each symbol."""
        for _, raw in batch:
            try:
                message = decode_tick(raw)
            except WireError:
                continue  # the executor counts and tells them
            if isinstance(message, Snapshot) and message.timeframe:
                self._snapshots[message.instrument.symbol] = message

    async def answer(self, make: Callable[[], dict[str, Any]]) -> bytes:
        """Return what `make` tells, as JSON, made in a thread and at most once a second."""
        async with self._turn:
            kept_ns, raw = self._kept.get(make, (-FRESH_NS, b""))
            if self._clock.mono_ns() - kept_ns >= FRESH_NS:
                raw = msgspec.json.encode(await asyncio.to_thread(make))
                self._kept[make] = self._clock.mono_ns(), raw
            return raw

    def state(self) -> dict[str, Any]:
        """Return everything that changes from second to second."""
        status, beats = gather(self._config, self._clock), read_beats(self._config)
        open_pnl = sum((self._open_pnl(row, status["prices"]) for row in status["positions"]), Decimal(0))
        told = {} if status["state"] == "DOWN" else beats.get("executor", {}).get("symbols", {})
        symbols, ringing = {s: told.get(s, {}) for s in self._config.symbols()}, self._ringing()
        found: dict[str, Any] = {
            "time_ns": self._clock.wall_ns(), "status": status, "symbols": symbols,
            "alerts": alerts(status, beats, ringing or ()), "has_alertmanager": ringing is not None,
            "levels": {s: levels for beat in beats.values() for s, levels in beat.get("levels", {}).items()},
            **money(status["wallet_balance"], open_pnl),
            "currency": next((s.instrument.settle for s in self._snapshots.values()), ""),
            "orders": [], "signals": []}
        reader = self._reader()
        if reader is not None:
            found |= {"orders": order_rows(reader.books())[:ROWS], "signals": signal_rows(reader, ROWS)}
            reader.close()
        return found

    def history(self) -> dict[str, Any]:
        """Return candles, fills, equity and positions over time, oldest first."""
        found: dict[str, Any] = {"candles": {symbol: snapshot.candles
                                             for symbol, snapshot in self._snapshots.items()},
                                 "fills": [], "equity": [], "positions": {}}
        reader = self._reader()
        if reader is None:
            return found
        for entry in reversed(reader.newest("fill", FILLS)):
            fill = entry.event
            assert isinstance(fill, FillBooked)
            found["fills"].append({"symbol": fill.symbol, "time_ns": fill.exchange_ns, "side": fill.side,
                                   "qty": fill.qty, "price": fill.price, "cause": fill.cause})
        for entry in reversed(reader.newest("reconciled", COMPARISONS)):
            assert isinstance(entry.event, Reconciled)
            found["equity"].append((entry.ts_ns, entry.event.wallet_balance + entry.event.unrealized_pnl))
        found["positions"] = self._positions(reader)
        reader.close()
        return found

    def ask_candles(self) -> None:
        """Subscribe to the candles of symbols that are new; the gateway answers, and repeats."""
        count = min(CANDLES, self._config.gateway.history_count_max)
        for symbol in set(self._config.symbols()) - self._asked:
            self._ticks.subscribe(snapshot_topic(symbol, "1m", count))
            self._asked.add(symbol)

    def _positions(self, reader: JournalReader) -> dict[str, list[tuple[int, Decimal]]]:
        # Backwards from what is held now: the fills say what it was before each.
        now_ns, moves = self._clock.wall_ns(), []
        for entry in [*reader.newest("fill", FILLS), *reader.newest("adopted", FILLS)]:
            event = entry.event
            assert isinstance(event, FillBooked | Adopted)
            signed = event.qty if isinstance(event, Adopted) or event.side == "buy" else -event.qty
            moves.append((entry.seq, entry.ts_ns, event.symbol, signed))
        found = {}
        for symbol, book in reader.books().symbols.items():
            qty = book.position_qty
            points = [(now_ns, qty)]
            for _, ts_ns, moved, signed in sorted(moves, reverse=True):
                if moved == symbol:
                    points.append((ts_ns, qty))
                    qty -= signed
            found[symbol] = points[::-1]
        return found

    def _open_pnl(self, position: dict[str, Any], prices: dict[str, Any]) -> Decimal:
        mark = prices.get(position["symbol"], {}).get("mark")
        if not position["qty"] or mark is None or position["entry_price"] is None:
            return Decimal(0)
        snapshot = self._snapshots.get(position["symbol"])
        size = snapshot.instrument.contract_size if snapshot else Decimal(1)
        return position["qty"] * (Decimal(repr(mark)) - position["entry_price"]) * size

    def _ringing(self) -> list[Ringing] | None:
        try:
            raw = ask(f"{self._config.health.alertmanager_url}/api/v2/alerts", timeout_s=ASK_S)
            return msgspec.json.decode(raw, type=list[Ringing])
        except (OSError, msgspec.MsgspecError):
            return None  # none runs here, or it is out of order: the page says so

    def _reader(self) -> JournalReader | None:
        try:
            return JournalReader(self._config.path(self._config.journal.path))
        except JournalError:
            return None  # the status says so


def money(wallet: Decimal | None, open_pnl: Decimal) -> dict[str, str]:
    """Return the account in words; before the first comparison nobody knows it."""
    if wallet is None:
        return {"wallet": "-", "unrealized": "-", "equity": "-"}
    return {"wallet": f"{wallet:.2f}", "unrealized": f"{open_pnl:.2f}", "equity": f"{wallet + open_pnl:.2f}"}


# What health and guard find, and the alert that comes of it.
ALERT_OF = {
    "process_down": "ProcessDown", "process_stuck": "ProcessKilled", "memory_high": "ProcessKilled",
    "process_restarting": "ProcessCrashing", "memory_growing": "ProcessOverloaded",
    "cpu_busy": "ProcessOverloaded", "descriptors_high": "ProcessOverloaded", "disk_low": "HostShort",
    "host_memory_low": "HostShort", "clock_offset": "ClockOffset", "backup_old": "BackupOld",
    "backup_failed": "BackupBad"}


def alerts(status: dict[str, Any], beats: dict[str, dict[str, Any]],
           ringing: Iterable[Ringing] = ()) -> list[dict[str, str]]:
    """Return what a person should look at, the worst first, by the names of alerts and runbook sections.

    ringing: what the Alertmanager holds; what is not seen here is told in its words.
    """
    executor = beats.get("executor", {})
    lacks_s = {symbol: told.get("unprotected_s", 0) for symbol, told in executor.get("symbols", {}).items()}
    for row in status["positions"]:  # the journal knows it also of an executor that has not told yet
        lacks_s[row["symbol"]] = max(lacks_s.get(row["symbol"], 0), row["unprotected_s"] or 0)
    found = [("PositionUnprotected", symbol, f"it lacks its stop for {lacks:.0f} s")
             for symbol, lacks in lacks_s.items() if lacks > UNPROTECTED_S_MAX]
    found += [("TradingHalted" if h["scope"] == "all" else "SymbolHalted", h["scope"],
               f"by {h['who']}: {h['why']}") for h in status["halted"]]
    if status["state"] == "DOWN":
        found.append(("ExecutorDown", "executor", status["state_reason"]))
    if status["journal_error"]:
        found.append(("ExecutorDown", "journal", status["journal_error"]))
    found += [("SymbolLocked", symbol, f"{cause}: {text}")
              for symbol, locks in status["locked_symbols"].items() for cause, text in locks.items()]
    if status["state"] != "DOWN":  # what it told of money last is not what is now
        found += _money(executor)
    if beats.get("guard", {}).get("flattening"):
        found.append(("Flattened", "", "guard closes everything just now"))
    if status["unknown_orders"]:
        found.append(("OrderUnknown", "", f"{status['unknown_orders']} orders without an outcome"))
    found += [("FeedStale", symbol, "its data makes no progress") for symbol in status["stale"]]
    found += [(ALERT_OF.get(f["rule"], f["rule"]), f["subject"],
               f"{f['rule']}: {f['text']} (for {f['age_s']} s)")
              for f in status["findings"] if (f["rule"], f["subject"]) != ("process_down", "executor")]
    if status["state"] == "REDUCING":
        found.append(("TradingReduced", "", status["state_reason"]))
    seen = {name for name, _, _ in found} | {"Watchdog"}  # that one rings always
    found += [(name, labels.get("symbol") or labels.get("process", ""), a["annotations"].get("summary", ""))
              for a in ringing if (name := (labels := a["labels"]).get("alertname", "?")) not in seen]
    told = {(name, subject): text for name, subject, text in reversed(found)}  # of two, the first counts
    return [{"name": name, "subject": subject, "text": text, "href": f"runbook#{name.lower()}"}
            for (name, subject), text in reversed(told.items())]


def _money(executor: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for symbol, told in executor.get("symbols", {}).items():
        pct = told.get("liquidation_distance_pct")
        if pct is not None and float(pct) < NEAR_PCT:
            yield "LiquidationNear", symbol, f"{float(pct):.1f} % from liquidation"
    loss = float(executor.get("day_loss_ratio") or 0)
    if loss >= LOSS_RATIO:
        yield ("DayLossLimit" if loss >= 1 else "DayLossNear"), "", f"{loss:.0%} of day_loss_max is lost"
    if executor.get("canary_red"):
        yield "StopsRefused", "", f"no stop is proven to pass: {executor.get('canary') or 'not tried yet'}"
    age_s = (executor.get("reconcile_age_ms") or 0) / 1e3
    if age_s > COMPARED_S or executor.get("state") == "RECONCILING":
        yield "NotReconciled", "", f"the last comparison was {age_s:.0f} s ago" if age_s else "none so far"
    if executor.get("differences"):
        yield "BooksDiffer", "", f"{executor['differences']} differences between books and exchange"


def runbook_page() -> str:
    """Return the runbook as a page, its headings with the anchors that links use; markup in it is text."""
    text = mistune.create_markdown(renderer=_Renderer(escape=True), plugins=["table"])(_runbook())
    return ('<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" '
            'content="width=device-width"><title>tradehost runbook</title><link rel="stylesheet" '
            f'href="page.css"><main class="text"><section>{text}</section></main></html>')


class _Renderer(mistune.HTMLRenderer):
    def heading(self, text: str, level: int, **_: Any) -> str:
        return f'<h{level} id="{_anchor(html.unescape(text))}">{text}</h{level}>\n'

    def link(self, text: str, url: str, title: str | None = None) -> str:
        return super().link(text, url, title) if url.startswith("#") else text  # other pages are not served


def _runbook() -> str:
    return RUNBOOK.read_text(encoding="utf-8") if RUNBOOK.exists() else "RUNBOOK.md is not in this release"


def _anchor(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")  # as GitHub makes it


async def serve(page: StatusPage, port: int, log: Log) -> Callable[[], Awaitable[None]] | None:
    """Serve the page on loopback; return what ends it, or None when the port is taken.

    No process ends for want of its page.
    """
    app = web.Application(middlewares=[_guarded])

    async def api(request: web.Request) -> web.Response:
        page.ask_candles()
        make = page.state if request.path.endswith("state") else page.history
        return web.Response(body=await page.answer(make), content_type="application/json")

    async def index(_: web.Request) -> web.FileResponse:
        return web.FileResponse(STATIC / "index.html")

    async def runbook(_: web.Request) -> web.Response:
        return web.Response(text=runbook_page(), content_type="text/html")

    app.add_routes([web.get("/", index), web.get("/runbook", runbook), web.get("/api/state", api),
                    web.get("/api/history", api), web.static("/", STATIC)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
    except OSError as error:
        log.warning("page_unavailable", port=port, error=str(error))
        await runner.cleanup()
        return None
    return runner.cleanup


@web.middleware
async def _guarded(request: web.Request,
                   handler: Callable[[web.Request], Awaitable[web.StreamResponse]]) -> web.StreamResponse:
    if re.sub(r":\d+$", "", request.host) not in NAMES:
        raise web.HTTPForbidden(text="only loopback names are answered; tunnel with ssh -L and use localhost")
    response = await handler(request)
    response.headers.update(HEADERS)
    return response
