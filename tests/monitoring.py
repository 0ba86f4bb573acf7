"""Prometheus, Alertmanager and a receiver beside a running appliance, with the shipped rules and routes.

    with Appliance(path, **metrics_config()) as appliance, Monitoring(path, appliance) as monitoring:
        ...
        alert = monitoring.wait_alert("TradingHalted")    # as the receiver got it; .after_s(since)
        monitoring.wait_resolved("TradingHalted")

Only addresses, and the receivers, differ from what a host runs; scale shortens what waits outside the group
"money".
"""

import json
import re
import shutil
import subprocess
import threading
import time
import urllib.parse
import urllib.request
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bot.programs import write_targets
from tests.appliance import Appliance
from tests.harness import ROOT, free_port, wait_until

OPS = ROOT / "ops"
BINARIES = ("prometheus", "prometheus-alertmanager", "prometheus-node-exporter")
needs_monitoring = pytest.mark.skipif(
    any(shutil.which(name) is None for name in BINARIES),
    reason=f"one of {', '.join(BINARIES)} is missing: Debian's packages of these names have them")


def metrics_config(strategy: str = "levels") -> dict[str, Any]:
    """Return the overrides that give an Appliance of this strategy metrics and an Alertmanager's address."""
    ports = [free_port() for _ in range(5)]
    while ports[4] - ports[0] != 4:  # a process each, one after the other
        ports = [*ports[1:], free_port()]
    return {"health": {"alertmanager_url": f"http://127.0.0.1:{free_port()}"},
            "metrics": {"base_port": ports[0]}, "strategy": {strategy: {"metrics_port": free_port()}}}


@dataclass
class Received:
    """One alert in one message of the receiver. at: time.time() of its arrival."""

    name: str
    status: str
    labels: dict[str, str]
    annotations: dict[str, str]
    at: float = field(default_factory=time.time)


class Receiver:
    """Takes what Alertmanager, or health, posts, and forgets nothing."""

    def __init__(self) -> None:
        self.alerts: list[Received] = []
        self.bodies: list[dict[str, Any]] = []
        self.status, self.delay_s = 200, 0.0  # what it answers, and after how long
        taken = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                time.sleep(taken.delay_s)
                if taken.status == 200:
                    taken.bodies.append(body)
                    taken.alerts += [Received(a["labels"]["alertname"], a["status"], a["labels"],
                                              a["annotations"]) for a in body["alerts"]]
                self.send_response(taken.status)
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def last(self, name: str, status: str, since: float = 0.0, **labels: str) -> Received | None:
        """Return the newest message of an alert that came after `since`, None when there is none."""
        return next((a for a in reversed(self.alerts) if a.name == name and a.status == status
                     and a.at >= since and labels.items() <= a.labels.items()), None)


class Monitoring:
    """The servers. Use as a context manager; state is below tmp_path/monitoring."""

    def __init__(self, tmp_path: Path, appliance: Appliance, scale: float = 1.0) -> None:
        self.path = tmp_path / "monitoring"
        self.path.mkdir()
        self.port, self.node_port = free_port(), free_port()
        self.alertmanager_url = appliance.config.health.alertmanager_url
        self.alertmanager_port = int(self.alertmanager_url.rpartition(":")[2])
        self.receiver = Receiver()
        self._processes: dict[str, subprocess.Popen] = {}
        write_targets(appliance.config)
        ports = {"127.0.0.1:9090": f"127.0.0.1:{self.port}",
                 "127.0.0.1:9093": f"127.0.0.1:{self.alertmanager_port}",
                 "127.0.0.1:9100": f"127.0.0.1:{self.node_port}",
                 "/var/lib/bot": str(appliance.config.state_path)}
        for source in (OPS / "prometheus" / "prometheus.yml", OPS / "prometheus" / "recording.yml",
                       OPS / "prometheus" / "alerts.yml", OPS / "alertmanager" / "alertmanager.yml",
                       OPS / "alertmanager" / "tradehost.tmpl"):
            text = source.read_text(encoding="utf-8")
            for there, here in ports.items():
                text = text.replace(there, here)
            if source.name == "alerts.yml":
                text = scaled(text, scale)
            if source.name == "alertmanager.yml":
                hooks = f"webhook_configs: [{{url: '{self.receiver.url}'}}]"
                text = text.replace("  - name: people\n", f"  - name: people\n    {hooks}\n")
                text = text.replace("  - name: watchdog\n", f"  - name: watchdog\n    {hooks}\n")
            (self.path / source.name).write_text(text, encoding="utf-8")

    def __enter__(self) -> "Monitoring":
        self.start_alertmanager()
        self.start_prometheus()
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self._processes):
            self.stop(name)
        self.receiver.close()

    def start_prometheus(self) -> None:
        """Start Prometheus, and wait until it answers."""
        self._start("prometheus", self.port, f"--config.file={self.path}/prometheus.yml",
                    f"--storage.tsdb.path={self.path}/tsdb")

    def start_node_exporter(self) -> None:
        """Start what tells of the host."""
        self._start("prometheus-node-exporter", self.node_port, "--collector.disable-defaults",
                    "--collector.cpu", "--collector.filesystem", "--collector.loadavg")

    def start_alertmanager(self) -> None:
        """Start the Alertmanager, and wait until it answers."""
        self._start("prometheus-alertmanager", self.alertmanager_port, "--cluster.listen-address=",
                    f"--config.file={self.path}/alertmanager.yml", f"--storage.path={self.path}/alertmanager")

    def stop(self, name: str) -> None:
        """End prometheus or prometheus-alertmanager."""
        process = self._processes.pop(name)
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _start(self, name: str, port: int, *words: str) -> None:
        with open(self.path / f"{name}.log", "ab") as log:
            self._processes[name] = subprocess.Popen([name, *words, f"--web.listen-address=127.0.0.1:{port}"],
                                                     stdout=log, stderr=log, cwd=self.path)
        try:
            page = "metrics" if "node" in name else "-/ready"
            wait_until(lambda: _answers(f"http://127.0.0.1:{port}/{page}"), 10, step=0.1)
        except AssertionError:
            self.__exit__()
            raise AssertionError((self.path / f"{name}.log").read_text()[-2_000:]) from None

    def query(self, promql: str) -> list[dict[str, Any]]:
        """Return what a PromQL expression gives now: labels and value of each series."""
        url = f"http://127.0.0.1:{self.port}/api/v1/query?" + urllib.parse.urlencode({"query": promql})
        with urllib.request.urlopen(url, timeout=10) as answer:
            return [{**row["metric"], "value": float(row["value"][1])}
                    for row in json.loads(answer.read())["data"]["result"]]

    def wait_scraped(self, *processes: str, timeout: float = 30) -> None:
        """Wait until the metrics of each process are there."""
        wait_until(lambda: {row["process"] for row in self.query('up{job="tradehost"} == 1')}
                   >= set(processes), timeout, step=0.2)

    def firing(self) -> list[dict[str, str]]:
        """Return the labels of what Alertmanager holds to be true just now, without the Watchdog."""
        with urllib.request.urlopen(f"{self.alertmanager_url}/api/v2/alerts", timeout=10) as answer:
            return [a["labels"] for a in json.loads(answer.read()) if a["labels"]["alertname"] != "Watchdog"]

    def wait_alert(self, name: str, timeout: float = 15, since: float = 0.0, **labels: str) -> Received:
        """Return the alert as the receiver got it after `since`; fail when none comes in time."""
        return wait_until(lambda: self.receiver.last(name, "firing", since, **labels), timeout)

    def wait_resolved(self, name: str, timeout: float = 30, since: float = 0.0, **labels: str) -> Received:
        """Return the message that the alert is over."""
        return wait_until(lambda: self.receiver.last(name, "resolved", since, **labels), timeout)


def scaled(rules: str, scale: float) -> str:
    """Return the rules with each `for` outside the group "money" scaled."""
    def shorter(match: re.Match[str]) -> str:
        seconds = int(match[1]) * {"s": 1, "m": 60}[match[2]]
        return f"for: {max(1, round(seconds * scale))}s"
    money, rest = rules.split("\n  - name: trading\n")
    return f"{money}\n  - name: trading\n" + re.sub(r"for: (\d+)([sm])$", shorter, rest, flags=re.MULTILINE)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False
