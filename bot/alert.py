"""What cannot wait: health tells a person directly, without Prometheus and the Alertmanager.

To the webhook in `[health] alert_url_file`, from a queue, in a thread, tried again: nothing waits for it.
Names are those of the rules in ops/prometheus/alerts.yml.
"""

import asyncio
import http.client
import re
import urllib.error
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from bot.clock import Clock
from bot.config import Config
from bot.config_file import read_secret
from bot.errors import ConfigError
from bot.halt import Halt
from bot.log import Log

ASK_S = 5.0  # a receiver that takes longer is tried again
ANSWER_BYTES_MAX = 4_000_000  # the longest, the Alertmanager's metrics, has some 100,000
QUEUE_MAX = 50  # the newest count; what is older is in the log
TRIES_MAX, WAIT_S_MAX = 12, 60.0  # 1, 2, 4 ... 60 s: ten minutes without a network
DOWN_NS = 30_000_000_000  # a crash is over after 8 s, a restart after 5; with Prometheus it is told after 15
UNPROTECTED_S_MAX = 2.0  # as the rule PositionUnprotected: a stop is placed within a fraction of this
AGAIN_NS = 3_600_000_000_000  # what is still so is told again each hour
SHORT_RULES = ("disk_low", "host_memory_low")  # Prometheus writes to the same disk
WORDS = {  # what each costs, as in alerts.yml, and its first sentence in RUNBOOK.md, for who wakes in Chinese
    "PositionUnprotected": ("The whole position is at risk: nothing limits its loss. It is closed by itself "
                            "after unprotected_s_max.", "部位沒有停損單。"),
    "TradingHalted": ("Open positions are held behind their stops alone; strategies cannot reduce them.",
                      "交易已停止（HALTED）。"),
    "ExecutorDown": ("Positions rest on the stops at the exchange. After guard.cancel_after_s (60) entries "
                     "are canceled.", "executor 沒有運作。"),
    "HostShort": ("Entries are missed; when the disk is full the executor waits, and nobody moves a stop.",
                  "主機的磁碟或記憶體不足，不會開新倉。")}

Name = tuple[str, str]  # alert, subject


def urgent(beats: dict[str, dict[str, Any]], halts: Iterable[Halt], findings: Iterable[dict[str, Any]],
           now_ns: int, since_ns: int) -> dict[Name, str]:
    """Return what cannot wait, in words. Times are monotonic; a silence counts from since_ns on."""
    found: dict[Name, str] = {}
    for halt in halts:
        if halt.scope == "all":
            found["TradingHalted", "all"] = f"HALTED by {halt.who}: {halt.why}. Type: botctl status"
    executor = beats.get("executor", {})
    beat_ns = executor.get("mono_ns", 0)
    if now_ns - (beat_ns if since_ns < beat_ns <= now_ns else since_ns) > DOWN_NS:
        found["ExecutorDown", "executor"] = ("the executor does not beat; nobody moves stops, or places one "
                                             "that is lacking. Type: botctl status")
    # What a dead executor told last stays so until somebody says otherwise.
    for symbol, told in executor.get("symbols", {}).items() if beat_ns <= now_ns else ():
        if told.get("unprotected_s", 0) > UNPROTECTED_S_MAX:
            lacks_s = told["unprotected_s"] + (now_ns - beat_ns) / 1e9
            found["PositionUnprotected", symbol] = f"{symbol} lacks its stop for {lacks_s:.0f} s. " \
                                                   "Type: botctl positions"
    for finding in findings:
        if finding["rule"] in SHORT_RULES:
            found["HostShort", finding["rule"]] = f"{finding['rule']}: {finding['text']}. Type: botctl health"
    return found


def ask(url: str, body: Any = None, *, method: str = "", timeout_s: float = ASK_S) -> bytes:
    """POST as JSON, GET without a body; return the answer, cut where it is too long.

    Raises OSError; its text never holds the URL.
    """
    request = urllib.request.Request(  # noqa: S310  config and read_url let http and https pass alone
        url, None if body is None else msgspec.json.encode(body), {"Content-Type": "application/json"},
        method=method or None)
    # The Alertmanager is on this host: a proxy, which other receivers may need, is in the way.
    is_here = request.host.split(":")[0] in ("127.0.0.1", "localhost")
    handlers = [urllib.request.ProxyHandler({})] if is_here else []
    try:
        with urllib.request.build_opener(*handlers).open(request, timeout=timeout_s) as answer:
            return answer.read(ANSWER_BYTES_MAX)
    except urllib.error.HTTPError as error:
        said = b""
        with suppress(OSError, http.client.HTTPException):  # it may be cut off
            said = error.read(200)
        raise OSError(f"HTTP {error.code} {said.decode(errors='replace')}".strip()) from None
    except urllib.error.URLError as error:
        raise OSError(str(error.reason)) from None
    except (http.client.HTTPException, ValueError) as error:
        raise OSError(type(error).__name__) from None


class Teller:
    """Hands what is new, and what is over, to the receiver. see() each second; work() beside it, for ever."""

    def __init__(self, config: Config, clock: Clock, log: Log, *,
                 send: Callable[[str, Any], Any] = ask) -> None:
        self._config, self._clock, self._log, self._send = config, clock, log, send
        self._path = config.path(config.health.alert_url_file)
        self._told: dict[Name, tuple[int, str]] = {}  # what is so -> when it was told last, in which words
        self._queue: deque[dict[str, Any]] = deque(maxlen=QUEUE_MAX)
        self._is_due = asyncio.Event()
        self.counts = {"sent": 0, "failed": 0, "dropped": 0}

    def see(self, found: dict[Name, str], *, knows_positions: bool = True) -> None:
        """Take in what is urgent just now; where nobody knows of positions what was told of them stays."""
        now_ns = self._clock.mono_ns()
        if not knows_positions:
            found = {name: text for name, (_, text) in self._told.items() if name[0] == "PositionUnprotected"
                     } | found
        for name, text in found.items():
            if name not in self._told or now_ns - self._told[name][0] >= AGAIN_NS:
                self._told[name] = now_ns, text
                self._put("firing", name, text)
        for name in [name for name in self._told if name not in found]:
            self._put("resolved", name, self._told.pop(name)[1])

    def _put(self, status: str, name: Name, text: str) -> None:
        if not self._path.exists():
            return  # nobody is to be told
        if len(self._queue) == QUEUE_MAX:
            self.counts["dropped"] += 1
        self._queue.append(message(self._config, self._clock, status, name, text))
        self._is_due.set()

    async def work(self) -> None:
        """Send, one after the other."""
        while True:
            await self._is_due.wait()
            while self._queue:
                await self._deliver(self._queue.popleft())
            self._is_due.clear()

    async def _deliver(self, body: dict[str, Any]) -> None:
        wait_s = 1.0
        for _ in range(TRIES_MAX):
            try:
                url = read_url(self._path)
                self._log.hide(url)
                await asyncio.to_thread(self._send, url, body)
                self.counts["sent"] += 1
                return
            except (OSError, ConfigError) as error:
                self.counts["failed"] += 1
                self._log.warning("alert_undelivered", text=body["text"], error=str(error), wait_s=wait_s)
            await self._clock.sleep(wait_s)
            wait_s = min(wait_s * 2, WAIT_S_MAX)
        self.counts["dropped"] += 1


def read_url(path: Path) -> str:
    """Return the receiver's URL, which is as good as a key. Raises ConfigError."""
    url = read_secret(path, "health.alert_url_file")
    if not re.match(r"https?://[\w.-]+", url):
        raise ConfigError(f"health.alert_url_file: must hold an http or https URL: {path}")
    return url


def message(config: Config, clock: Clock, status: str, name: Name, text: str) -> dict[str, Any]:
    """Return one alert in the form of the Alertmanager's webhook; Slack, Telegram and others show `text`."""
    (alert, subject), is_over = name, status == "resolved"
    impact, chinese = WORDS.get(alert, ("", ""))
    summary = f"{config.mode.upper()}: {text}"
    said = (f"{'OVER' if is_over else 'ALERT'} {alert}: {summary}",
            chinese and is_over * "已解除：" + chinese, "" if is_over else impact)
    return {
        "version": "4", "status": status, "receiver": "health",
        "text": "\n".join(filter(None, said)),
        "alerts": [{"status": status, "startsAt": time_text(clock.wall_ns()),
                    "labels": {"alertname": alert, "severity": "critical", "mode": config.mode.upper(),
                               "subject": subject, "process": "health"},
                    "annotations": {"summary": summary, "impact": impact, "summary_zh_TW": chinese,
                                    "runbook_url": f"RUNBOOK.md#{alert.lower()}"}}]}


def time_text(ns: int) -> str:
    """Return a wall time as RFC 3339 has it."""
    return datetime.fromtimestamp(ns / 1e9, UTC).isoformat()
