"""The status page's own rules: whom it answers, what it calls an alert, where the runbook's anchors are."""

import asyncio
import json
import os
import re

import aiohttp
import pytest

from bot import web
from bot.alert import UNPROTECTED_S_MAX
from bot.clock import Clock
from bot.config_file import load
from bot.model import Candle, Instrument, Snapshot
from bot.watch import RULES
from bot.wire import encode
from tests.harness import ROOT, free_port, write_config
from tests.runbook import anchor, sections

STATUS = {"halted": [], "state": "RUNNING", "state_reason": "", "journal_error": "", "locked_symbols": {},
          "unknown_orders": 0, "stale": [], "findings": [], "positions": []}
SHIPPED = dict(re.findall(r"- alert: (\w+).*?severity: (\w+)",
                             (ROOT / "ops" / "prometheus" / "alerts.yml").read_text(encoding="utf-8"), re.S))
EXPRESSIONS = dict(re.findall(r"- alert: (\w+)\n +expr: (.*)",
                              (ROOT / "ops" / "prometheus" / "alerts.yml").read_text(encoding="utf-8")))
LINKS = {f"runbook#{anchor(section.name)}" for section in sections()}


class Topics:
    """A subscriber that only remembers what was asked of it."""

    def __init__(self) -> None:
        self.topics: list[bytes] = []

    def subscribe(self, topic: bytes) -> None:
        self.topics.append(topic)


class Silent:
    """A log that only remembers."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, dict]] = []

    def warning(self, event: str, **fields) -> None:
        self.lines.append((event, fields))


def page_of(tmp_path) -> web.StatusPage:
    return web.StatusPage(load(write_config(tmp_path)), Clock(), Topics())


def test_thresholds_of_page_and_direct_alerts_are_those_of_the_rules():
    assert EXPRESSIONS["PositionUnprotected"].endswith(f"[1d]) > {UNPROTECTED_S_MAX:g}")
    assert EXPRESSIONS["LiquidationNear"].endswith(f" < {web.NEAR_PCT / 100:.2f}")
    assert EXPRESSIONS["DayLossNear"].endswith(f" >= {web.LOSS_RATIO} < 1")
    assert EXPRESSIONS["DayLossLimit"].endswith(" >= 1")
    assert f"_seconds > {web.COMPARED_S} or " in EXPRESSIONS["NotReconciled"]


def answers(tmp_path, *requests: tuple[str, str, dict[str, str]]) -> list[tuple[int, str, dict[str, str]]]:
    """Serve a page and return (status, text, headers) of each (method, path, headers)."""
    async def ask() -> list[tuple[int, str, dict[str, str]]]:
        port, found = free_port(), []
        close = await web.serve(page_of(tmp_path), port, Silent())
        async with aiohttp.ClientSession() as session:
            for method, path, headers in requests:
                async with session.request(
                    method, f"http://127.0.0.1:{port}{path}", headers=headers
                ) as answer:
                    found.append((answer.status, await answer.text(), dict(answer.headers)))
        await close()
        return found
    return asyncio.run(ask())


def test_page_with_a_foreign_host_name_refuses(tmp_path):
    good, evil, tunneled = answers(tmp_path, ("GET", "/api/state", {}),
                                   ("GET", "/api/state", {"Host": "evil.example:9550"}),
                                   ("GET", "/", {"Host": "localhost:9550"}))
    assert (good[0], evil[0], tunneled[0]) == (200, 403, 200)
    assert "wallet" not in evil[1]


def test_page_with_any_writing_method_refuses(tmp_path):
    for status, _, _ in answers(
        tmp_path, *((method, "/api/state", {}) for method in ("POST", "PUT", "DELETE"))
    ):
        assert status == 405


def test_page_with_its_files_needs_nothing_from_elsewhere(tmp_path):
    index, state = answers(tmp_path, ("GET", "/", {}), ("GET", "/api/state", {}))
    assert "default-src 'self'" in index[2]["Content-Security-Policy"]
    assert not re.findall(r'(?:src|href)="(?:https?:)?//', index[1])
    assert '"state":"DOWN"' in state[1]  # nothing runs, and the page says so
    names = re.findall(r'(?:src|href)="([\w.-]+)"', index[1])
    assert {"page.js", "page.css", "lightweight-charts.js", "runbook"} == set(names)
    for name, (status, _, _) in zip(names, answers(tmp_path, *(("GET", f"/{n}", {}) for n in names)),
                                    strict=True):
        assert status == 200, name
    assert [a[0] for a in answers(tmp_path, ("GET", "/%2e%2e/web.py", {}), ("GET", "/../web.py", {}))] == [
        404,
        404,
    ]


def test_page_with_its_port_taken_is_told_and_not_served(tmp_path):
    async def twice() -> list[tuple[str, dict]]:
        port, log = free_port(), Silent()
        close = await web.serve(page_of(tmp_path), port, log)
        assert await web.serve(page_of(tmp_path), port, log) is None
        await close()
        return log.lines
    (event, fields), = asyncio.run(twice())
    assert event == "page_unavailable"
    assert fields["port"]


def test_answer_with_many_askers_is_made_once(tmp_path):
    made = []

    async def ask() -> set[bytes]:
        page = page_of(tmp_path)
        return set(await asyncio.gather(*(page.answer(make) for _ in range(20))))

    def make() -> dict:
        made.append(1)
        return {"n": len(made)}
    assert asyncio.run(ask()) == {b'{"n":1}'}


@pytest.mark.parametrize("is_there", [True, False])
def test_state_with_an_executor_that_is_gone_says_nothing_of_its_last_beat(tmp_path, is_there):
    page, clock = page_of(tmp_path), Clock()
    folder = page._config.path("run")
    folder.mkdir(parents=True)
    (folder / "executor.json").write_text(json.dumps({
        "pid": os.getpid() if is_there else 4_194_304, "run": clock.wall_ns(), "mono_ns": clock.mono_ns(),
        "version": "1", "config": "c", "ended": False, "crash_starts": [], "descriptors": 1,
        "descriptors_max": 9, "state": "RUNNING", "symbols": {"BTC/USDT:USDT": {"unprotected_s": 3.0}}}))
    state = page.state()
    assert (state["status"]["state"] == "RUNNING") is is_there
    assert bool(state["symbols"]["BTC/USDT:USDT"]) is is_there
    assert any(alert["name"] == "PositionUnprotected" for alert in state["alerts"]), "nobody said otherwise"


def test_candles_with_a_snapshot_are_told_and_asked_for_once(tmp_path):
    page = page_of(tmp_path)
    page.ask_candles()
    page.ask_candles()
    assert page._ticks.topics == [b"s/BTC/USDT:USDT/1m/500/"]
    instrument = Instrument(
        symbol="BTC/USDT:USDT",
        exchange_symbol="BTCUSDT",
        status="TRADING",
        price_increment="0.1",
        qty_increment="0.001",
        qty_min="0.001",
        qty_max="100",
        notional_min="5",
        contract_size="1",
        settle="USDT",
    )
    snapshot = Snapshot(instrument=instrument, timeframe="1m", time_ns=1, run=1,
                        candles=(Candle(60, 1.0, 3.0, 0.5, 2.0, 9.0),))
    page.on_tick_messages([(b"", b"junk"), (b"", encode(snapshot))])
    assert page.history()["candles"] == {"BTC/USDT:USDT": (Candle(60, 1.0, 3.0, 0.5, 2.0, 9.0),)}


@pytest.mark.parametrize(("change", "name", "subject"), [
    ({"halted": [{"scope": "all", "who": "op", "why": "lunch", "since_ns": 1}]}, "TradingHalted", "all"),
    ({"halted": [{"scope": "symbol:B", "who": "op", "why": "x", "since_ns": 1}]}, "SymbolHalted", "symbol:B"),
    ({"state": "DOWN", "state_reason": "it does not run"}, "ExecutorDown", "executor"),
    ({"state": "REDUCING", "state_reason": "the gateway is silent"}, "TradingReduced", ""),
    ({"journal_error": "event 7 breaks the hash chain"}, "ExecutorDown", "journal"),
    ({"locked_symbols": {"B": {"books_differ": "1 of 2"}}}, "SymbolLocked", "B"),
    ({"unknown_orders": 2}, "OrderUnknown", ""),
    ({"stale": ["B"]}, "FeedStale", "B"),
    ({"findings": [{"rule": "disk_low", "subject": "host", "text": "3 MB", "age_s": 1}]}, "HostShort",
     "host"),
])
def test_alerts_with_each_trouble_name_it_once(change, name, subject):
    assert web.alerts(STATUS, {}) == []
    change = {key: value * 2 if key == "findings" else value for key, value in change.items()}
    found = web.alerts(STATUS | change, {})
    assert [(alert["name"], alert["subject"]) for alert in found] == [(name, subject)]
    assert found[0]["href"] in LINKS


def test_alerts_with_a_position_without_its_stop_begin_with_it():
    halted = {"halted": [{"scope": "all", "who": "op", "why": "lunch", "since_ns": 1}]}
    symbols = {"B": {"unprotected_s": 3.4}, "C": {"unprotected_s": 0.1}, "D": {}}
    found = web.alerts(STATUS | halted, {"executor": {"symbols": symbols}})
    assert [(a["name"], a["subject"]) for a in found] == [("PositionUnprotected", "B"),
                                                          ("TradingHalted", "all")]
    status = STATUS | {"positions": [{"symbol": "B", "unprotected_s": 4.0},
                                     {"symbol": "C", "unprotected_s": None}]}
    for beats in ({}, {"executor": {"state": "REDUCING"}}):  # a new executor that has not told yet
        found = web.alerts(status, beats)
        assert [(a["name"], a["subject"]) for a in found] == [("PositionUnprotected", "B")]


def finds(rule: str, subject: str) -> dict:
    return {"findings": [{"rule": rule, "subject": subject, "text": "", "age_s": 1}]}


CAUSES = {  # of each critical alert, without an Alertmanager: what status says, what the beats say
    "PositionUnprotected": ({}, {"executor": {"symbols": {"B": {"unprotected_s": 2.1}}}}),
    "TradingHalted": ({"halted": [{"scope": "all", "who": "op", "why": "lunch", "since_ns": 1}]}, {}),
    "DayLossLimit": ({}, {"executor": {"day_loss_ratio": "1.02"}}),
    "LiquidationNear": ({}, {"executor": {"symbols": {"B": {"liquidation_distance_pct": "9.9"}}}}),
    "OrderUnknown": ({"unknown_orders": 1}, {}),
    "SymbolLocked": ({"locked_symbols": {"B": {"books_differ": "1 of 2"}}}, {}),
    "StopsRefused": ({}, {"executor": {"canary_red": 1, "canary": "-4120"}}),
    "ExecutorDown": ({"state": "DOWN"}, {}),
    "Flattened": ({}, {"guard": {"flattening": True}}),
    "NotReconciled": ({}, {"executor": {"reconcile_age_ms": 100_001}}),
    "FeedStale": ({"stale": ["B"]}, {}),
    "ProcessDown": (finds("process_down", "gateway"), {}),
    "HostShort": (finds("disk_low", "host"), {}),
    "BackupBad": (finds("backup_failed", "host"), {}),
}
# A count, which only somebody who remembers sees go up; an outbox that is not empty for moments all day long.
ALERTMANAGER_ALONE = {"DeadManFired", "SignalsUnacknowledged"}


def test_alerts_with_each_critical_one_have_a_line_without_an_alertmanager_too():
    critical = {name for name, severity in SHIPPED.items() if severity == "critical"}
    assert critical == CAUSES.keys() | ALERTMANAGER_ALONE
    for name, (change, beats) in CAUSES.items():
        assert [a["name"] for a in web.alerts(STATUS | change, beats)] == [name]
    quiet = {"reconcile_age_ms": 99_000, "day_loss_ratio": "0.69", "canary_red": 0, "differences": 0,
             "symbols": {"B": {"liquidation_distance_pct": "10", "unprotected_s": 0.0}}}
    assert web.alerts(STATUS, {"executor": quiet}) == []
    found = web.alerts(STATUS, {"executor": {"day_loss_ratio": 0.7, "differences": 2}})
    assert [a["name"] for a in found] == ["DayLossNear", "BooksDiffer"]


def test_alerts_with_an_alertmanager_name_each_that_rings_once():
    ringing = [{"labels": {"alertname": name, "symbol": "B"}, "annotations": {"summary": "its words"}}
               for name in SHIPPED]
    change, beats = CAUSES["OrderUnknown"]
    found = web.alerts(STATUS | change, beats, ringing)
    assert sorted(a["name"] for a in found) == sorted(SHIPPED.keys() - {"Watchdog"})
    assert [a["text"] for a in found if a["name"] == "OrderUnknown"] == ["1 orders without an outcome"]
    assert next(a for a in found if a["name"] == "SignalsDenied")["text"] == "its words"
    assert {a["href"] for a in found} <= LINKS


@pytest.mark.parametrize("raw", [b'[{"labels": {"alertname": "TicksLost"}, "annotations": {"summary": "5"}}]',
                                 b"junk", None])
def test_state_asks_the_alertmanager_and_says_whether_it_answered(tmp_path, monkeypatch, raw):
    def ask(url: str, **_) -> bytes:
        assert url == "http://127.0.0.1:9093/api/v2/alerts"
        if raw is None:
            raise OSError("refused")
        return raw
    monkeypatch.setattr(web, "ask", ask)
    state = page_of(tmp_path).state()
    is_heard = raw is not None and raw != b"junk"
    assert state["has_alertmanager"] is is_heard
    assert ("TicksLost" in [a["name"] for a in state["alerts"]]) is is_heard


def test_rules_of_health_with_the_alerts_they_lead_to_have_a_section():
    assert web.ALERT_OF.keys() == RULES.keys()
    for name in web.ALERT_OF.values():
        assert f"runbook#{name.lower()}" in LINKS, name


def test_runbook_with_markup_in_it_is_text(monkeypatch):
    monkeypatch.setattr(web, "_runbook", lambda: "# One\n## Halt <all> now\n<script>x</script>\n"
                                                 "[there](#halt-all-now) [b](javascript:x) [c](docs/logs.md)")
    page = web.runbook_page()
    assert "<script>" not in page
    assert '<h2 id="halt-all-now">Halt &lt;all&gt; now</h2>' in page
    assert re.findall('<a href="(.+?)"', page) == ["#halt-all-now"], "what is not served is no link"


def test_runbook_page_has_a_place_for_each_link_in_it():
    page = web.runbook_page()
    places = re.findall(r'<h2 id="(.+?)"', page)
    assert set(re.findall(r'<a href="#(.+?)"', page)) <= set(places)
    assert {f"runbook#{place}" for place in places} == LINKS
    assert "<table>" in page and "botctl flatten" in page
