"""Looking at processes: what is stuck or too big is killed, a crash loop is halted, the rest is told.

health looks at everybody with it, guard at health alone. supervisord starts again what was killed; it is
SIGKILL, because a stop would wait for a frozen process. RULES names all that can be found.
"""

from collections import deque
from collections.abc import Callable
from statistics import linear_regression
from typing import Any

from bot import probe
from bot.clock import Clock
from bot.config import Config
from bot.halt import HaltFiles
from bot.log import Log
from bot.probe import ProgramInfo, Vitals

RULES = {
    "process_down": "a process does not run",
    "process_stuck": "a process lived and did not beat; it was killed",
    "process_restarting": "a process crashed more often than restarts_max or restarts_per_day_max allow",
    "memory_high": "a process held more than memory_mb_max; it was killed",
    "memory_growing": "a process's memory grew by more than memory_growth_mb_per_h_max",
    "cpu_busy": "a process used more of a core than cpu_pct_max",
    "descriptors_high": "a process used more than descriptors_pct_max of its file descriptors",
    "disk_low": "the disk of state_dir has less than disk_free_mb_min",
    "host_memory_low": "the host has less memory than host_memory_mb_min",
    "backup_failed": "the last backup was not made, or a kept one is not what it was",
    "backup_old": "the newest good backup is older than backup.age_h_max, or there is none",
    "clock_offset": "the host's clock differs from the exchange's by more than clock_offset_ms_max"}
MB = 1_000_000
PAUSE_NS = 5_000_000_000  # a second between two looks is meant; so long means we were frozen ourselves
SAMPLE_NS, SAMPLES = 10_000_000_000, 360  # one each 10 s, for an hour
SLOPE_NS, BUSY_NS = 1_800_000_000_000, 30_000_000_000  # the least span a slope and a load are told of
# A start has not beaten yet: its imports take 12 s on a host with ten times the work it can do. Killing for
# that adds to the work, and no start would ever come to an end.
START_TIMES = 3
DAY_NS = 86_400_000_000_000
WHO = "health"  # guard halts in its name
KEEP_NS = 10_000_000_000  # what was killed is told this long, or nobody would see it


class Watch:
    """Remembers what it saw of each process. `look` is called each second; times are monotonic."""

    def __init__(self, config: Config, clock: Clock, log: Log, *, halts: HaltFiles,
                 kill: Callable[[str, int], bool],
                 vitals: Callable[[int], Vitals | None] = probe.vitals) -> None:
        self._config, self._rules, self._clock, self._log = config, config.health, clock, log
        self._halts, self._vitals, self._kill = halts, vitals, kill
        self._born: dict[str, tuple[int, int]] = {}  # name -> pid, when we saw it first
        self._samples: dict[str, deque[tuple[int, int, float]]] = {}  # when, rss, cpu_s
        self._spawns: dict[str, dict[int, int]] = {}  # name -> supervisord's start of a failed spawn -> when
        self._programs: dict[str, ProgramInfo] = {}  # as the last look found them
        self._looked_ns = 0
        self._found: dict[tuple[str, str], str] = {}
        self._since: dict[tuple[str, str], int] = {}
        self._kept: dict[tuple[str, str], tuple[int, str]] = {}
        self.kills: dict[str, int] = {}
        self.vitals: dict[str, dict[str, Any]] = {}

    def look(self, names: tuple[str, ...], beats: dict[str, dict[str, Any]],
             programs: dict[str, ProgramInfo]) -> None:
        """Look at each process once, and do what follows."""
        now_ns = self._clock.mono_ns()
        if now_ns - self._looked_ns > PAUSE_NS:
            self._born.clear()  # we slept, and perhaps all did: nobody is stuck for that
        self._looked_ns, self._found, self.vitals = now_ns, {}, {}
        for name in names:
            self._look_at(name, beats.get(name, {}), programs.get(name), now_ns)

    def find(self, rule: str, subject: str, text: str) -> None:
        """Note that something is wrong just now."""
        self._found[rule, subject] = text

    def tell(self) -> None:
        """Log what is new and what is gone since the last time."""
        now_ns = self._clock.mono_ns()
        self._kept = {key: kept for key, kept in self._kept.items() if now_ns - kept[0] < KEEP_NS}
        self._found = {key: text for key, (_, text) in self._kept.items()} | self._found
        for (rule, subject), text in self._found.items():
            if (rule, subject) not in self._since:
                self._since[rule, subject] = now_ns
                self._log.warning("finding", rule=rule, subject=subject, text=text)
        for rule, subject in [key for key in self._since if key not in self._found]:
            lasted_s = (now_ns - self._since.pop((rule, subject))) // 1_000_000_000
            self._log.info("finding_ended", rule=rule, subject=subject, lasted_s=lasted_s)

    def status(self) -> dict[str, Any]:
        """Return it for the beat: findings, what each process uses, kills."""
        counts = {rule: {"": 0} for rule in RULES}  # a series of each rule also while nothing is wrong
        for rule, subject in self._found:
            counts[rule][subject] = 1
        age_s = {key: max(0, self._looked_ns - ns) // 1_000_000_000 for key, ns in self._since.items()}
        return {"findings": [{"rule": key[0], "subject": key[1], "text": text, "age_s": age_s[key]}
                             for key, text in self._found.items()],
                "finding_counts": counts, "processes": self.vitals, "kills": self.kills}

    def _look_at(self, name: str, beat: dict[str, Any], program: ProgramInfo | None, now_ns: int) -> None:
        self._check_loop(name, beat, program, now_ns)
        pid = program.pid if program else beat.get("pid", 0)
        vitals = self._vitals(pid) if pid else None
        if vitals is None:
            self._born.pop(name, None)
            self.find("process_down", name,
                      f"{program.state}: {program.description}" if program else "no process")
            return
        if self._born.get(name, (0, 0))[0] != pid:
            self._born[name], self._samples[name] = (pid, now_ns), deque(maxlen=SAMPLES)
        seen_ns = max(self._born[name][1], beat.get("mono_ns", 0) if beat.get("pid") == pid else 0)
        silent_ms, stuck_ms = (now_ns - seen_ns) // 1_000_000, self._rules.stuck_ms
        if beat.get("pid") != pid:
            stuck_ms *= START_TIMES
        rss_mb = vitals.rss_bytes // MB
        if silent_ms > stuck_ms:
            self._end(name, pid, "process_stuck", f"no beat for {silent_ms} ms, limit {stuck_ms}")
        elif rss_mb > self._rules.memory_mb_max:
            self._end(name, pid, "memory_high", f"{rss_mb} MB, limit {self._rules.memory_mb_max}")
        else:
            self._check_use(name, vitals, beat, now_ns)

    def _end(self, name: str, pid: int, rule: str, text: str) -> None:
        if self._kill(name, pid):
            self.kills[name] = self.kills.get(name, 0) + 1
            self._kept[rule, name] = self._clock.mono_ns(), text
            self._log.error("killed", rule=rule, subject=name, pid=pid, text=text)

    def _check_use(self, name: str, vitals: Vitals, beat: dict[str, Any], now_ns: int) -> None:
        samples, rules = self._samples[name], self._rules
        if not samples or now_ns - samples[-1][0] >= SAMPLE_NS:
            samples.append((now_ns, vitals.rss_bytes, vitals.cpu_s))
        growth = 0.0
        if samples[-1][0] - samples[0][0] >= SLOPE_NS:
            growth = linear_regression([s[0] / 1e9 for s in samples], [s[1] for s in samples]).slope
        if growth * 3_600 > rules.memory_growth_mb_per_h_max * MB:
            self.find("memory_growing", name, f"{growth * 3_600 / MB:.0f} MB an hour, "
                                              f"limit {rules.memory_growth_mb_per_h_max}")
        back = next((s for s in reversed(samples) if now_ns - s[0] >= BUSY_NS), None)
        cpu_pct = 100e9 * (vitals.cpu_s - back[2]) / (now_ns - back[0]) if back else 0.0
        if cpu_pct > rules.cpu_pct_max:
            self.find("cpu_busy", name, f"{cpu_pct:.0f} % of a core, limit {rules.cpu_pct_max}")
        used, most = beat.get("descriptors", 0), beat.get("descriptors_max", 1)
        if used * 100 > most * rules.descriptors_pct_max:
            self.find("descriptors_high", name, f"{used} of {most}, limit {rules.descriptors_pct_max} %")
        self.vitals[name] = {
            "rss_bytes": vitals.rss_bytes, "growth_bytes_per_s": round(growth, 1), "cpu_s": vitals.cpu_s,
            "cpu_pct": round(cpu_pct, 1), "descriptors": used, "threads": vitals.threads}

    def _check_loop(self, name: str, beat: dict[str, Any], program: ProgramInfo | None, now_ns: int) -> None:
        # Two sources: the marks each start leaves in its beat, and supervisord's spawns that ended before
        # they could beat (an import that fails or hangs).
        spawns, last = self._spawns.setdefault(name, {}), self._programs.get(name, program)
        if program is not None and last is not None:
            has_failed = program.state in ("BACKOFF", "FATAL")
            ended = program if has_failed else last if last.pid and last.pid != program.pid else None
            if ended is not None and beat.get("run", 0) < ended.start * 1_000_000_000:
                spawns.setdefault(ended.start, now_ns)
            self._programs[name] = program
        self._spawns[name] = {start: ns for start, ns in spawns.items() if ns > now_ns - DAY_NS}
        for most, window_s in ((self._rules.restarts_max, self._rules.restart_window_s),
                               (self._rules.restarts_per_day_max, DAY_NS // 1_000_000_000)):
            oldest_ns = now_ns - window_s * 1_000_000_000
            crashes = sorted(ns for ns in (*beat.get("crash_starts", []), *self._spawns[name].values())
                             if oldest_ns < ns <= now_ns)
            if len(crashes) <= most or crashes[-1] < now_ns - self._rules.restart_window_s * 1_000_000_000:
                continue
            text = f"{name} crashed {len(crashes)} times within {window_s} s, limit {most}"
            self.find("process_restarting", name, text)
            scope = name.replace("-", ":", 1) if name.startswith("strategy-") else "all"
            ended_ns = self._halts.ended_ns(scope)  # who resumed has seen what was before
            unforgiven = sum(ns > ended_ns or ended_ns > now_ns for ns in crashes)
            if name != "paper" and unforgiven > most:
                self._halt(name, scope, text)

    def _halt(self, name: str, scope: str, text: str) -> None:
        try:
            if any(h.scope == scope and WHO in h.who.split(", ") for h in self._halts.list()):
                return
            halt = self._halts.set(scope, who=WHO, why=f"{text}; see its log", clock=self._clock)
        except OSError as error:  # the next look tries again
            self.find("process_restarting", name, f"{text}; the halt cannot be written: {error}")
            self._log.error("halt_failed", scope=scope, error=str(error))
            return
        if WHO in halt.who.split(", "):  # else it could not be added to somebody's halt, which stands
            self._log.error("halted", scope=scope, who=halt.who, why=halt.why)
