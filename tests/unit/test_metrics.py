"""Metrics by Prometheus' conventions, made of beats."""

import shutil
import subprocess
import urllib.request
from decimal import Decimal

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from bot.metrics import LATENCY_S, TABLE, BeatCollector, Histogram, serve
from tests.harness import free_port

BASE = {"name": "executor", "mono_ns": 5, "run": 1_700_000_000_000_000_000, "crash_starts": [1, 2],
        "suppressed": {"query_failed": 3}}


def full_beat() -> dict:
    """Return a beat in which every metric of the table has a value."""
    histogram = Histogram()
    histogram.observe(0.004)
    histogram.observe(99)
    beat = dict(BASE)
    for metric in TABLE:
        path = metric.path.split("|")[0].split(".")
        if path[0] in ("run", "age_ns", "crash_starts", "suppressed"):
            continue
        value = histogram.status() if metric.kind == "histogram" else metric.one_if or 7
        here = beat
        for key in path[:-1]:
            here = here.setdefault("BTC" if key == "*" else key, {})
        here["x" if path[-1] == "*" else path[-1]] = {"stateset": "RUNNING", "info": "1.0"}.get(
            metric.kind, value
        )
    return beat


def scraped(beat: dict, now_ns: int = 5) -> str:
    registry = CollectorRegistry()
    registry.register(BeatCollector(lambda: (beat, now_ns)))
    return generate_latest(registry).decode()


def test_metrics_with_a_full_beat_tell_every_one_of_the_table():
    families = {f.name: f for f in text_string_to_metric_families(scraped(full_beat()))}
    assert set(families) == {m.name.removesuffix("_total") for m in TABLE}
    assert all(s.labels["process"] == "executor" for f in families.values() for s in f.samples)


def test_metrics_with_an_empty_beat_tell_nothing_and_do_not_fail():
    assert scraped({}) == ""
    assert "bot_start_time_seconds" in scraped(BASE)


def test_metrics_with_labels_units_and_states_have_their_values():
    text = scraped(
        {
            **BASE,
            "version": "0.1.0",
            "symbols": {"BTC/USDT:USDT": {"age_ms": {"mark": 250, "trade": None}, "condition": "quiet",
                                          "state": "LOCKED", "liquidation_distance_pct": Decimal(20)},
                        "ETH/USDT:USDT": {"condition": "stale", "liquidation_distance_pct": None}},
            "streams": {"prices-0": "up", "marks-1": "down"},
            "state": "HALTED",
            "lost": {"BTC/USDT:USDT": 2, "ETH/USDT:USDT": 0},
            "wallet_balance": "10000.5",
        },
        now_ns=1_500_000_005,
    )
    assert 'bot_feed_age_seconds{kind="mark",process="executor",symbol="BTC/USDT:USDT"} 0.25' in text
    assert 'kind="trade"' not in text, "never heard is not 0"
    assert 'bot_build_info{process="executor",version="0.1.0"} 1.0' in text
    assert 'bot_stream_up{process="executor",stream="prices-0"} 1.0' in text
    assert 'bot_stream_up{process="executor",stream="marks-1"} 0.0' in text
    assert 'bot_state{process="executor",state="HALTED"} 1.0' in text
    assert 'bot_state{process="executor",state="RUNNING"} 0.0' in text
    assert 'bot_symbol_state{process="executor",state="LOCKED",symbol="BTC/USDT:USDT"} 1.0' in text
    assert 'bot_feed_stale{process="executor",symbol="BTC/USDT:USDT"} 0.0' in text
    assert 'bot_feed_stale{process="executor",symbol="ETH/USDT:USDT"} 1.0' in text
    assert 'bot_ticks_lost_total{process="executor",symbol="BTC/USDT:USDT"} 2.0' in text
    distance = 'bot_position_liquidation_distance_ratio{process="executor",symbol='
    assert f'{distance}"BTC/USDT:USDT"}} 0.2' in text and f'{distance}"ETH' not in text
    assert 'bot_wallet_balance{process="executor"} 10000.5' in text
    assert 'bot_heartbeat_age_seconds{process="executor"} 1.5' in text
    assert 'bot_log_lines_suppressed_total{event="query_failed",process="executor"} 3.0' in text


def test_histogram_with_values_on_and_beyond_the_bounds_counts_each_once():
    histogram = Histogram()
    for seconds in (0.001, 0.0011, 5.0, 5.1):
        histogram.observe(seconds)
    text = scraped({**BASE, "order_round_trip": histogram.status()})
    name = "bot_order_round_trip_seconds"
    assert f'{name}_bucket{{le="0.001",process="executor"}} 1.0' in text
    assert f'{name}_bucket{{le="0.0025",process="executor"}} 2.0' in text
    assert f'{name}_bucket{{le="{LATENCY_S[-1]}",process="executor"}} 3.0' in text
    assert f'{name}_bucket{{le="+Inf",process="executor"}} 4.0' in text
    assert f'{name}_count{{process="executor"}} 4.0' in text


def test_metrics_served_answer_on_loopback_and_a_taken_port_is_told():
    port = free_port()
    assert serve(port, lambda: (BASE, 5))
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as answer:
        assert b"bot_crash_starts" in answer.read()
    assert not serve(port, lambda: (BASE, 5))


def test_metrics_with_promtool_are_lint_free():
    if shutil.which("promtool") is None:
        pytest.skip("promtool is missing: Debian's package prometheus has it")
    done = subprocess.run(["promtool", "check", "metrics"], input=scraped(full_beat()), capture_output=True,
                          text=True, timeout=30)
    assert done.returncode == 0 and done.stdout + done.stderr == "", done.stderr
