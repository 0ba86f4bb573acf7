"""Starting real processes in tests: ports, a whole configuration, waiting, ending."""

import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SLACK = 3
_askers = itertools.count()
API_KEY, API_SECRET = "K" * 64, "S" * 64
# Below the range the kernel takes for outgoing connections (32768 on), starting elsewhere in each
# process: tests run side by side.
PORTS = range(10_000, 32_000)
_next_port = itertools.count(os.getpid() * 97)


def free_port() -> int:
    """Return a loopback port that was free a moment ago, and a different one each time."""
    while True:
        port = PORTS[next(_next_port) % len(PORTS)]
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port


def asker() -> tuple[str, int]:
    """Return a loopback address to ask from: the exchange limits by address, and a test may ask often."""
    number = next(_askers)
    return f"127.0.{1 + number // 250 % 250}.{1 + number % 250}", 0


def data_path(name: str) -> Path:
    """Return where a recording would be; the caller skips when it is absent."""
    return Path(os.environ.get("TRADEHOST_DATA", ROOT.parent / "shared" / "data")) / name


def write_config(tmp_path: Path, **overrides: Any) -> Path:
    """Write a complete paper configuration with free ports and key files of its own.

    overrides are tables merged over it, for example paper={"seed": 3}; a value of None removes a key.
    """
    for name, secret in (("api.key", API_KEY), ("api.secret", API_SECRET)):
        (tmp_path / name).write_text(secret)
        (tmp_path / name).chmod(0o600)
    keys = {"api_key_file": str(tmp_path / "api.key"), "api_secret_file": str(tmp_path / "api.secret")}
    port = free_port()
    tables = {
        "mode": "paper",
        "state_dir": str(tmp_path / "var"),
        "exchange": {"rest_url": f"http://127.0.0.1:{port}", "ws_url": f"ws://127.0.0.1:{port}",
                     "sapi_url": f"http://127.0.0.1:{port}", **keys},
        "limits": {"order_notional_max": 20_000, "position_notional_max": 40_000,
                   "exposure_notional_max": 80_000, "day_loss_max": 9_000, "leverage_max": 100,
                   "price_collar_pct": 2, "orders_per_minute_max": 60, "repeats_per_minute_max": 60},
        "executor": {"recover_s": 1},
        "strategy": {"levels": {"class": "bot.support_resistance:SupportResistanceStrategy",
                                "symbols": ["BTC/USDT:USDT"], "settings": {"notional": 1_000}}},
        "bus": {name: {"endpoint": f"tcp://127.0.0.1:{free_port()}", "hwm": 100_000, "linger_ms": 0}
                for name in ("ticks", "signals", "reports")},
        "metrics": {"base_port": 0}, "health": {"page_port": 0},
        "paper": {"bind": f"127.0.0.1:{port}", "accounts": {"main": keys}},
    }
    path = tmp_path / "bot.toml"
    path.write_text(_toml(_merged(tables, overrides)))
    return path


def start_process(module: str, config: Path, *args: str) -> subprocess.Popen:
    """Start `python -m module --config config args`; its output goes to MODULE.log beside config."""
    with open(config.parent / f"{module}.log", "ab") as log:
        return subprocess.Popen([sys.executable, "-m", module, "--config", str(config), *args],
                                stdout=log, stderr=subprocess.STDOUT, cwd=ROOT)


def stop_process(process: subprocess.Popen, timeout: float = 10) -> int:
    """End a process with SIGTERM, by force when that takes too long; return its exit code."""
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            process.kill()
    return process.wait()


def wait_until(predicate: Callable[[], Any], timeout: float = 10, step: float = 0.02) -> Any:
    """Return predicate()'s first true value; fail when it takes far longer than `timeout` seconds.

    timeout is what a machine of its own needs; a shared one gets SLACK times that.
    """
    deadline = time.monotonic() + timeout * SLACK
    while not (value := predicate()):
        assert time.monotonic() < deadline, f"not true within {timeout * SLACK} s: {predicate}"
        time.sleep(step)
    return value


def _merged(table: dict, overrides: dict) -> dict:
    result = dict(table)
    for key, value in overrides.items():
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict) and isinstance(result.get(key), dict):
            result[key] = _merged(result[key], value)
        else:
            result[key] = value
    return result


def _toml(tables: dict, path: str = "") -> str:
    lines = [f"{key} = {_value(value)}" for key, value in tables.items() if not isinstance(value, dict)]
    for key, value in tables.items():
        if isinstance(value, dict):
            lines += [f"[{path}{key}]", _toml(value, f"{path}{key}.")]
    return "\n".join(lines)


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(item) for item in value) + "]"
    if isinstance(value, Decimal):
        return format(value, "f") if "." in format(value, "f") else f"{value:f}.0"
    return str(value) if isinstance(value, (int, float)) else '"' + str(value).replace('"', '\\"') + '"'
