"""The monitoring of a pushed host: it listens on loopback, in a sandbox, sees every process, and tells.

After tests/ops/test_host.py, on the same host: make test-host INVENTORY=FILE.
"""

import json
import re
import shlex
from urllib.parse import quote

import pytest

from tests.harness import wait_until
from tests.host import Host, Source

UNITS = ("prometheus", "prometheus-alertmanager", "prometheus-node-exporter")
# A receiver of both kinds of message, on the host: writes each body to a file.
RECEIVER = """
import http.server, sys
class Taker(http.server.BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        open("/run/told", "ab").write(self.path.encode() + b" " + body + b"\\n")
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b'{"ok": true, "result": {"message_id": 1, "chat": {"id": 1, "type": "private"}}}')
http.server.HTTPServer(("127.0.0.1", 9099), Taker).serve_forever()
"""

pytestmark = [pytest.mark.host, pytest.mark.long]


@pytest.fixture(scope="module")
def host() -> Host:
    return Host()


def ask(host: Host, promql: str) -> list[dict]:
    """Return what Prometheus there says now."""
    url = f"http://127.0.0.1:9090/api/v1/query?query={quote(promql)}"
    code = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1]).read().decode())"
    done = host.do(f"python3 -c {shlex.quote(code)} {shlex.quote(url)}")
    return json.loads(done.stdout)["data"]["result"] if done.stdout.startswith("{") else []


def test_monitoring_listens_on_loopback_alone_in_a_sandbox(host):
    listening = host.do("ss -Hltn").stdout
    ports = {port: address for address, port in re.findall(r"\s(\S+):(\d+)\s", listening)}
    assert {ports[port] for port in ("9090", "9093", "9100")} == {"127.0.0.1"}, listening
    for unit in UNITS:
        text = host.do(f"systemd-analyze security --no-pager {unit}.service").stdout
        exposure = float(re.search(r"Overall exposure level for .*: ([\d.]+)", text)[1])
        print(f"exposure of {unit}: {exposure}")
        assert exposure <= 2.0
        assert host.do(f"systemctl is-enabled {unit}").stdout.strip() == "enabled"
    shown = host.do("systemctl show prometheus -p MemoryMax -p OOMScoreAdjust -p Nice").stdout
    assert "MemoryMax=536870912" in shown and "OOMScoreAdjust=800" in shown and "Nice=10" in shown
    assert host.do("cat /etc/prometheus/alertmanager.yml", user="nobody").returncode != 0


def test_monitoring_sees_every_process_and_finds_nothing(host):
    host.wait_running()
    names = {row["name"] for row in host.status()["processes"]}
    up = 'up{job="tradehost"} == 1'
    wait_until(lambda: {row["metric"]["process"] for row in ask(host, up)} == names, 30)
    assert ask(host, 'up{job="node"} == 1') and ask(host, "node_memory_MemAvailable_bytes")
    assert ask(host, 'bot_state{state="RUNNING",mode="PAPER"} == 1')


def test_alert_on_the_host_goes_the_whole_way_with_secrets_from_the_vault(host):
    url, telegram_token = "http://127.0.0.1:9099", "123:secret-of-telegram"
    host.do(f"rm -f /run/told; systemd-run --unit told python3 -c {shlex.quote(RECEIVER)}")
    try:
        recap, _ = host.play("site.yml", "-e", json.dumps({
            "monitoring_webhook_url": f"{url}/webhook", "monitoring_telegram_bot_token": telegram_token,
            "monitoring_telegram_chat_id": -5, "monitoring_direct_url": f"{url}/direct"}))
        assert recap["failed"] == 0
        config = host.do("cat /etc/prometheus/alertmanager.yml").stdout
        assert telegram_token in config and "chat_id: -5" in config
        # Telegram itself is out of reach: its messages go to the same receiver.
        host.do(f"sed -i '/chat_id: -5/{{p;s#chat_id: -5#api_url: {url}#}}' /etc/prometheus/alertmanager.yml")
        host.do("systemctl reload prometheus-alertmanager")
        done = host.do("botctl alert test")
        assert done.returncode == 0, done.stdout + done.stderr
        told = host.do("cat /run/told").stdout
        assert "/webhook " in told and "/direct " in told, told
        assert f"/bot{telegram_token}/sendMessage" in told, told
        host.do("botctl halt --reason 'to be told'")
        wait_until(lambda: re.search("/webhook .*TradingHalted", host.do("cat /run/told").stdout), 15)
        told = host.do("cat /run/told").stdout
        assert re.search("/direct .*HALTED by root: to be told", told), told
        assert "已停止" in told or "\\u5df2" in told
        host.do("botctl resume")
        host.wait_running()
    finally:
        host.do("systemctl stop told")


def test_rules_of_a_release_go_with_it_when_it_is_rolled_back(host, tmp_path):
    source = Source(tmp_path / "tradehost")
    told = 'count(ALERTS{alertname="Watchdog", of="a later release"})'
    rules = source.folder / "ops" / "prometheus" / "alerts.yml"
    rules.write_text(re.sub(r"(alert: Watchdog\n(?:.*\n)*?)( +)labels:\n",
                            r"\1\2labels:\n\2  of: a later release\n", rules.read_text()))
    source.commit()
    before = host.do("readlink /opt/bot/current").stdout
    host.play("deploy.yml", "-e", json.dumps({"release_source": str(source.folder)}))
    wait_until(lambda: ask(host, told), 40)
    host.play("rollback.yml")
    assert host.do("readlink /opt/bot/current").stdout == before
    wait_until(lambda: not ask(host, told), 40)


def test_monitoring_that_is_turned_off_is_stopped_and_trading_goes_on(host):
    before = host.pids()
    assert host.do("test -e /var/lib/bot/alert.url").returncode == 0
    host.play("site.yml", "-e", "monitoring_enabled=false")
    assert host.do("test -e /var/lib/bot/alert.url").returncode != 0, "who is not named any more is not told"
    for unit in UNITS:
        assert host.do(f"systemctl is-active {unit}").stdout.strip() == "inactive"
    assert host.pids() == before
