"""Metrics as Prometheus reads them, made of the beat each process writes anyway. Edge to prometheus_client.

TABLE says where in a beat each number stands; a `*` in the path is a label. docs/metrics.md is made of it.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.registry import Collector

# From what a bus and a sync take to request_timeout_ms.
LATENCY_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)
STATES = ("RUNNING", "RECONCILING", "REDUCING", "LOCKED", "HALTED")


class Metric(NamedTuple):
    """One metric. path: where in the beat; scale: to base units; one_if: the word that counts as 1."""

    name: str
    kind: str
    text: str
    path: str
    labels: tuple[str, ...] = ()
    scale: float = 1.0
    one_if: str = ""


TABLE = (
    Metric("bot_build_info", "info", "1; the version that runs", "version", ("version",)),
    Metric("bot_start_time_seconds", "gauge", "when the process started, since 1970", "run", (), 1e-9),
    Metric("bot_heartbeat_age_seconds", "gauge", "since the process's last beat", "age_ns", (), 1e-9),
    Metric("bot_crash_starts", "gauge", "starts after a crash that are remembered", "crash_starts"),
    Metric("bot_log_lines_suppressed_total", "counter", "log lines left out by the rate limit",
           "suppressed.*", ("event",)),
    Metric("bot_messages_dropped_total", "counter", "messages that were malformed, foreign or too many",
           "dropped.*", ("reason",)),
    Metric("bot_clock_offset_seconds", "gauge", "exchange's clock minus the host's", "clock_offset_ms", (),
           1e-3),
    Metric("bot_feed_ticks_total", "counter", "Ticks published", "symbols.*.ticks", ("symbol",)),
    Metric("bot_feed_age_seconds", "gauge", "since the exchange made the newest Tick", "symbols.*.age_ms.*",
           ("symbol", "kind"), 1e-3),
    Metric("bot_feed_stale", "gauge", "1 while the symbol's mark price makes no progress",
           "symbols.*.condition", ("symbol",), one_if="stale"),
    Metric("bot_feed_trades_missed_total", "counter", "trades missed, by the exchange's own numbers",
           "symbols.*.missed_trades", ("symbol",)),
    Metric("bot_stream_up", "gauge", "1 while the market stream is connected", "streams.*", ("stream",),
           one_if="up"),
    Metric("bot_stream_reconnects_total", "counter", "market streams opened again", "reconnects"),
    Metric("bot_ticks_received_total", "counter", "Ticks received from the bus", "counters.ticks|ticks"),
    Metric("bot_ticks_lost_total", "counter", "Ticks lost on the bus", "lost.*", ("symbol",)),
    Metric("bot_signals_total", "counter", "signals: sent, at a strategy; journaled, at the executor",
           "counters.signals|signals"),
    Metric("bot_signals_acknowledged_total", "counter", "signals that the executor has journaled", "acked"),
    Metric("bot_outbox_signals", "gauge", "signals not acknowledged yet", "outbox"),
    Metric("bot_targets_refused_total", "counter", "Targets that became no signal", "refused.*", ("reason",)),
    Metric("bot_signal_outcomes_total", "counter", "signals by their one outcome", "outcomes.*",
           ("outcome",)),
    Metric("bot_signals_denied_total", "counter", "signals denied in this run, by the rule that said no",
           "denied.*", ("rule",)),
    Metric("bot_orders_total", "counter", "order intents journaled", "counters.orders"),
    Metric("bot_fills_total", "counter", "fills booked", "counters.fills"),
    Metric("bot_tick_to_order_seconds", "histogram", "from the Tick's receipt to the order's first byte",
           "tick_to_order"),
    Metric("bot_order_round_trip_seconds", "histogram", "from an order's first byte to its answer",
           "order_round_trip"),
    Metric("bot_state", "stateset", "1 for the state the executor is in", "state", ("state",)),
    Metric("bot_symbol_state", "stateset", "1 for the state that counts for the symbol", "symbols.*.state",
           ("symbol", "state")),
    Metric("bot_position_unprotected_seconds", "gauge", "how long a position lacks its stop",
           "symbols.*.unprotected_s", ("symbol",)),
    Metric("bot_position_contracts", "gauge", "position by our books, signed", "symbols.*.position_qty",
           ("symbol",)),
    Metric("bot_position_liquidation_distance_ratio", "gauge",
           "from the mark to the price the exchange would liquidate at, as a share of the mark",
           "symbols.*.liquidation_distance_pct", ("symbol",), 1e-2),
    Metric("bot_unknown_orders", "gauge", "orders whose outcome nobody knows", "symbols.*.unknown_orders",
           ("symbol",)),
    Metric("bot_symbol_locks", "gauge", "causes for which a symbol takes no new risk", "symbols.*.locks",
           ("symbol",)),
    Metric("bot_reconcile_age_seconds", "gauge", "since the books were last compared with the exchange",
           "reconcile_age_ms", (), 1e-3),
    Metric("bot_reconcile_differences", "gauge", "differences the last comparison found", "differences"),
    Metric("bot_exchange_used_ratio", "gauge", "share of the exchange's request limits that is used",
           "rate_share.*", ("limit",)),
    Metric("bot_guard_flattens_total", "counter", "flattens of everything", "flattens"),
    Metric("bot_guard_dead_man_fired_total", "counter", "times the dead-man's switch acted",
           "dead_man_fired"),
    Metric("bot_wallet_balance", "gauge", "in the settlement currency", "wallet_balance"),
    Metric("bot_equity", "gauge", "wallet and unrealized, in the settlement currency", "equity"),
    Metric("bot_day_pnl", "gauge", "of the UTC day without transfers, in the settlement currency", "day_pnl"),
    Metric("bot_day_loss_ratio", "gauge", "the day's loss as a share of day_loss_max", "day_loss_ratio"),
    Metric("bot_canary_red", "gauge", "1 while it is not proven that the exchange takes stops", "canary_red"),
    Metric("bot_process_resident_memory_bytes", "gauge", "memory a process holds", "processes.*.rss_bytes",
           ("name",)),
    Metric("bot_process_memory_growth_bytes_per_second", "gauge", "its slope over the last hour at most",
           "processes.*.growth_bytes_per_s", ("name",)),
    Metric("bot_process_cpu_seconds_total", "counter", "processor time used", "processes.*.cpu_s", ("name",)),
    Metric("bot_process_open_fds", "gauge", "open file descriptors", "processes.*.descriptors", ("name",)),
    Metric("bot_process_threads", "gauge", "threads", "processes.*.threads", ("name",)),
    Metric("bot_process_kills_total", "counter", "processes ended by force for being stuck or too big",
           "kills.*", ("name",)),
    Metric("bot_host_disk_free_bytes", "gauge", "free where state_dir is", "host.disk_free_bytes"),
    Metric("bot_host_memory_available_bytes", "gauge", "memory available on the host",
           "host.memory_available_bytes"),
    Metric("bot_backup_age_seconds", "gauge", "since the newest good backup was made", "backup.age_s"),
    Metric("bot_backup_good", "gauge", "1 when the last one was restored and folded, and all kept are whole",
           "backup.is_good"),
    Metric("bot_backup_kept", "gauge", "good backups on this host", "backup.kept"),
    Metric("bot_backup_size_bytes", "gauge", "of all of them", "backup.bytes"),
    Metric("bot_alerts_told_total", "counter", "urgent alerts of health: sent, failed (a try), dropped",
           "alerts.*", ("result",)),
    Metric("bot_findings", "gauge", "1: it is so just now", "finding_counts.*.*", ("rule", "subject")))


class Histogram:
    """Counts of durations, cumulated only when they are told."""

    def __init__(self) -> None:
        self._counts, self._sum = [0] * (len(LATENCY_S) + 1), 0.0

    def observe(self, seconds: float) -> None:
        self._counts[bisect_left(LATENCY_S, seconds)] += 1
        self._sum += seconds

    def status(self) -> dict[str, Any]:
        """Return it for a beat."""
        return {"counts": list(self._counts), "sum": self._sum}


class BeatCollector(Collector):
    """Turns the newest beat into metrics at each scrape."""

    def __init__(self, beat: Callable[[], tuple[dict[str, Any], int]]) -> None:
        self._beat = beat

    def collect(self) -> Iterable:
        beat, now_ns = self._beat()
        if not beat:
            return
        beat = {**beat, "age_ns": now_ns - beat["mono_ns"], "crash_starts": len(beat["crash_starts"])}
        for metric in TABLE:
            family = _family(metric)
            for labels, value in _values(beat, metric):
                _add(family, metric, [beat["name"], *labels], value)
            if family.samples:
                yield family


def serve(port: int, beat: Callable[[], tuple[dict[str, Any], int]]) -> bool:
    """Serve metrics on loopback, from a thread; beat returns the newest one and the time now (monotonic).

    Return False when the port is taken: no process ends for want of its metrics.
    """
    registry = CollectorRegistry()
    registry.register(BeatCollector(beat))
    try:
        start_http_server(port, addr="127.0.0.1", registry=registry)
    except OSError:
        return False
    return True


def _family(metric: Metric):
    labels = ["process", *metric.labels]
    if metric.kind == "counter":
        return CounterMetricFamily(metric.name.removesuffix("_total"), metric.text, labels=labels)
    if metric.kind == "histogram":
        return HistogramMetricFamily(metric.name, metric.text, labels=labels)
    return GaugeMetricFamily(metric.name, metric.text, labels=labels)


def _values(beat: dict[str, Any], metric: Metric) -> Iterator[tuple[list[str], Any]]:
    for path in metric.path.split("|"):
        found = list(_walk(beat, path.split(".")))
        if found:
            yield from found
            return


def _walk(value: Any, path: list[str]) -> Iterator[tuple[list[str], Any]]:
    if not path:
        if (value is not None and not isinstance(value, dict)) or "sum" in (value or ()):
            yield [], value
        return
    if not isinstance(value, dict):
        return
    for key in (list(value) if path[0] == "*" else [path[0]]):
        if key in value:
            for labels, found in _walk(value[key], path[1:]):
                yield ([key, *labels] if path[0] == "*" else labels), found


def _add(family, metric: Metric, labels: list[str], value: Any) -> None:
    if metric.kind == "histogram":
        total, buckets = 0, []
        for bound, count in zip((*map(str, LATENCY_S), "+Inf"), value["counts"], strict=True):
            total += count
            buckets.append((bound, total))
        family.add_metric(labels, buckets, value["sum"])
    elif metric.kind == "info":
        family.add_metric([*labels, value], 1.0)
    elif metric.kind == "stateset":
        for state in STATES:
            family.add_metric([*labels, state], float(state == value))
    else:
        family.add_metric(labels, float(value == metric.one_if) if metric.one_if
                          else float(value) * metric.scale)
