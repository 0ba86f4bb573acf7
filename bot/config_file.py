"""Reading the configuration file, and the rules that one key's type cannot say."""

import ipaddress
import os
import re
import stat
import tomllib
from decimal import Decimal
from pathlib import Path
from typing import Any, get_args, get_type_hints
from urllib.parse import SplitResult, urlsplit

import msgspec

from bot.config import SETTLE, BusConfig, Channel, Config, Table
from bot.errors import ConfigError

# Beyond these a limit is none, or a mistyped number (444 bn instead of 58 M USD: Citi, 2022). 125: the
# exchange's highest leverage. A long is never 100 % from its liquidation.
LIMITS_LEAST = Decimal("0.001")
LIMITS_MOST = {
    **dict.fromkeys(("order_notional_max", "position_notional_max", "exposure_notional_max", "day_loss_max"),
                    10**9),
    "leverage_max": 125, "price_collar_pct": 50, "mark_jump_pct_max": 50, "liquidation_distance_pct_min": 99}


def load(path: Path) -> Config:
    """Read and check the file. Raises ConfigError with the key's path, the rule and the value."""
    config = parse(path)
    try:
        check(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return config


def parse(path: Path) -> Config:
    """Read the file and check each key by itself. Raises ConfigError."""
    try:
        text = path.read_text(encoding="utf-8")
        # Numbers with a point stay exact: limits are money.
        data = tomllib.loads(text, parse_float=Decimal)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {getattr(error, 'strerror', None) or error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: is not TOML: {error}") from None
    _fill_channels(data)
    try:
        return msgspec.convert(data, Config)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{path}: {_plain(data, str(error))}") from None


def _fill_channels(data: dict[str, Any]) -> None:
    # A channel's defaults are its own (bus.ticks holds more than bus.signals): a port changes alone.
    bus = data.get("bus")
    for name, default in msgspec.structs.asdict(BusConfig()).items():
        if isinstance(default, Channel) and isinstance(bus, dict) and isinstance(bus.get(name), dict):
            bus[name] = msgspec.structs.asdict(default) | bus[name]


def _plain(data: dict[str, Any], text: str) -> str:
    # msgspec says "Expected `int` >= 1 - at `$.bus.ticks.hwm`"; people want key, rule and value.
    match = re.fullmatch(r"(.*?)(?: - at `(?:key in )?`?\$\.?(.*?)`)?", text, re.DOTALL)
    rule, where = match.groups() if match else (text, None)
    if not where:
        return rule
    value, keys = _value_at(data, where.replace("[...]", ".*").split("."), text)
    if "Invalid enum value" in rule:
        rule = f"must be one of {', '.join(_words(keys))}"
    if rule.startswith("Object "):
        return f"{'.'.join(keys)}: {rule}"
    rule = re.sub(r", got `\w+`$", "", rule).replace("Expected", "must be").replace("`object`", "a table")
    rule = rule.replace("Invalid decimal string", "must be a number")
    return f"{'.'.join(keys)}: {rule}; was {_short(value)}"


def _value_at(data: dict[str, Any], keys: list[str], text: str) -> tuple[Any, list[str]]:
    # A key of a table of tables is "*" here: it is the one that still fails when it is alone.
    value: Any = data
    for number, key in enumerate(keys):
        if key == "*":
            key = keys[number] = next(k for k in value if _fails_alone(data, value, k, text))
        name, *places = key.replace("]", "").split("[")
        value = value[name]
        for place in places:
            value = value[int(place)]
    return value, keys


def _fails_alone(data: dict[str, Any], table: dict[str, Any], key: str, text: str) -> bool:
    kept = dict(table)
    table.clear()
    table[key] = kept[key]
    try:
        msgspec.convert(data, Config)
    except msgspec.ValidationError as error:
        return str(error) == text
    finally:
        table.clear()
        table.update(kept)
    return False


def _words(keys: list[str]) -> tuple[str, ...]:
    kind: Any = Config
    for key in keys:
        kind = get_type_hints(kind)[key]
        kind = next((t for t in get_args(kind) if isinstance(t, type)), kind)
    return get_args(kind)


def _short(value: Any) -> str:
    text = "a table" if isinstance(value, dict) else str(value) if value != "" else '""'
    return text.splitlines()[0][:80]


def check(config: Config) -> None:
    """Check what one key's type cannot say. Raises ConfigError."""
    _check_numbers(config, "")
    _check_names(config)
    _check_addresses(config)
    _check_budgets(config)
    _check_files(config)


def _check_numbers(table: Any, where: str) -> None:
    for name in table.__struct_fields__:
        value, key = getattr(table, name), f"{where}{name}"
        if isinstance(value, Decimal) and not (value.is_finite() and value >= 0):
            raise ConfigError(f"{key}: must be a finite number, 0 or more; was {_short(value)}")
        if isinstance(value, Decimal) and where == "limits.":
            most = LIMITS_MOST[name]
            if not LIMITS_LEAST <= value <= most:
                raise ConfigError(f"{key}: must be from {LIMITS_LEAST} to {most:,}; was {_short(value)} "
                                  "(to stop trading use botctl halt)")
        if isinstance(value, Table):
            _check_numbers(value, f"{key}.")
        elif isinstance(value, dict):
            for entry, item in value.items():
                if isinstance(item, Table):
                    _check_numbers(item, f"{key}.{entry}.")


def _check_names(config: Config) -> None:
    symbol_owner: dict[str, str] = {}
    for name, strategy in config.strategy.items():
        if not re.fullmatch(r"[a-z][a-z0-9_-]{0,30}", name):
            raise ConfigError(f"strategy.{name}: a name is a-z, 0-9, _ and -, at most 31, first a letter")
        for key in ("symbols", "listen"):
            _check_symbols(f"strategy.{name}.{key}", getattr(strategy, key))
        for symbol in strategy.symbols:
            if symbol in symbol_owner:
                raise ConfigError(f"strategy.{name}.symbols: {symbol} already belongs to "
                                  f"strategy.{symbol_owner[symbol]}; a symbol has exactly one strategy")
            if not symbol.endswith(f":{SETTLE}"):
                raise ConfigError(f"strategy.{name}.symbols: must be settled in {SETTLE}, as the limits are; "
                                  f"was {symbol}")
            symbol_owner[symbol] = name
    _check_symbols("gateway.symbols", config.gateway.symbols)
    users = (config.users.feed, config.users.trade, config.users.strategy)
    if any(users) and not (all(users) and "{strategy}" in users[2] and len(set(users)) == len(users)):
        raise ConfigError("users: feed, trade and strategy must all be given and differ, and strategy must "
                          f"hold {{strategy}}; was {', '.join(users)}")
    if any(users) and "{strategy}" not in config.bus.signals.endpoint:
        raise ConfigError("bus.signals.endpoint: with [users] each strategy needs its own, an ipc path with "
                          f"{{strategy}}; was {config.bus.signals.endpoint}")
    if config.paper is not None:
        _check_symbols("paper.symbols", config.paper.symbols)
        for symbol in config.symbols():
            if config.mode == "paper" and symbol not in config.paper.symbols:
                raise ConfigError(f"paper.symbols: must list all that is fed or traded; {symbol} is missing")


def _check_symbols(key: str, symbols: tuple[str, ...]) -> None:
    for number, symbol in enumerate(symbols):
        if not re.fullmatch(r"[A-Z0-9]{1,20}/[A-Z0-9]{1,10}:[A-Z0-9]{1,10}(-[0-9]{6})?", symbol):
            raise ConfigError(f'{key}: a symbol is written like "BTC/USDT:USDT"; was "{symbol}"')
        if symbol in symbols[:number]:
            raise ConfigError(f"{key}: names {symbol} twice")


def _check_addresses(config: Config) -> None:
    _check_bus(config)
    _check_urls(config)
    if config.paper is not None:
        _check_paper(config)


def _check_bus(config: Config) -> None:
    endpoints: dict[str, str] = {}
    if config.paper is not None:
        endpoints[f"tcp://{config.paper.bind}"] = "paper.bind"
    strategies = [f"strategy-{n}" for n in config.strategy]
    for name in ("gateway", "executor", "guard", "health", "paper", *strategies):
        endpoint = f"tcp://127.0.0.1:{config.metrics_port(name)}"
        key = f"strategy.{name[9:]}.metrics_port" if name.startswith("strategy-") else "metrics.base_port"
        if config.metrics.base_port and endpoint in endpoints:
            raise ConfigError(f"{key}: must differ from {endpoints[endpoint]}; was {endpoint} too")
        endpoints[endpoint] = key
    for name in ("ticks", "signals", "reports"):
        endpoint = getattr(config.bus, name).endpoint
        key = f"bus.{name}.endpoint"
        if endpoint in endpoints:
            raise ConfigError(f"{key}: must differ from {endpoints[endpoint]}; was {endpoint} too")
        endpoints[endpoint] = key
        url = urlsplit(endpoint)
        if url.scheme == "ipc" and url.path.startswith("/"):
            continue
        if url.scheme != "tcp" or not _is_loopback(url.hostname) or not _port(url):
            raise ConfigError(f"{key}: must be tcp://127.0.0.1:PORT or ipc:///PATH, never beyond loopback; "
                              f"was {endpoint}")


def _check_urls(config: Config) -> None:
    for key, schemes in (("rest_url", ("http", "https")), ("ws_url", ("ws", "wss")),
                         ("sapi_url", ("http", "https"))):
        value = getattr(config.exchange, key)
        if key == "sapi_url" and not value and config.mode != "live":
            continue
        url = urlsplit(value)
        if url.scheme not in schemes or not url.hostname or url.path not in ("", "/") or _port(url) == 0:
            raise ConfigError(f"exchange.{key}: must be {' or '.join(schemes)}://HOST without a path; "
                              f"was {value}")
        local = _is_loopback(url.hostname)
        if config.mode == "paper" and not local:
            raise ConfigError(f"exchange.{key}: mode paper trades on loopback only; was {value}")
        if config.mode == "live" and (local or url.scheme in ("http", "ws")):
            raise ConfigError(f"exchange.{key}: mode live needs an encrypted address beyond loopback; "
                              f"was {value}")


def _check_paper(config: Config) -> None:
    assert config.paper is not None
    if config.mode == "live":
        raise ConfigError("paper: mode live has no paper exchange; remove the table")
    host, _, port = config.paper.bind.rpartition(":")
    if not _is_loopback(host) or not port.isdigit() or not 0 < int(port) < 65_536:
        raise ConfigError(f"paper.bind: must be 127.0.0.1:PORT; was {config.paper.bind}")
    if config.paper.market == "recording" and not config.paper.recording:
        raise ConfigError('paper.recording: market = "recording" needs a file; was ""')


def _is_loopback(host: str | None) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host or "").is_loopback
    except ValueError:
        return False


def _port(url: SplitResult) -> int | None:
    # None: not given; 0: none that can be used
    try:
        return url.port
    except ValueError:
        return 0


def _check_budgets(config: Config) -> None:
    bus, exchange, executor, limits = config.bus, config.exchange, config.executor, config.limits
    rules: list[tuple[str, Decimal | int, str, Decimal | int]] = [
        ("bus.zmtp_timeout_ms", bus.zmtp_timeout_ms, "bus.zmtp_heartbeat_ms", bus.zmtp_heartbeat_ms * 2),
        ("bus.silence_ms", bus.silence_ms, "bus.heartbeat_ms", bus.heartbeat_ms * 2),
        ("gateway.reconnect_ms_max", config.gateway.reconnect_ms_max, "gateway.reconnect_ms_min",
         config.gateway.reconnect_ms_min),
        # The exchange marks once a second: below two seconds a healthy feed would look dead.
        ("gateway.stale_ms", config.gateway.stale_ms, "the mark price's period", 2_000),
        ("executor.absent_after_s", executor.absent_after_s, "recv_window_ms + fence_margin_ms",
         -(-(exchange.recv_window_ms + executor.fence_margin_ms) // 1_000)),
        # Killed after stuck_ms, a start of three times that on a busy host, and 20 s for its tries.
        ("guard.cancel_after_s", config.guard.cancel_after_s, "four times health.stuck_ms and 20 s",
         4 * config.health.stuck_ms // 1_000 + 20),
        ("limits.position_notional_max", limits.position_notional_max, "limits.order_notional_max",
         limits.order_notional_max),
        ("limits.exposure_notional_max", limits.exposure_notional_max, "limits.position_notional_max",
         limits.position_notional_max),
    ]
    for name, strategy in config.strategy.items():
        rules.append((f"strategy.{name}.signal_ttl_ms", strategy.signal_ttl_ms,
                      f"strategy.{name}.resend_ms", strategy.resend_ms * 2))
        rules.append((f"strategy.{name}.signal_ttl_ms", strategy.signal_ttl_ms,
                      "limits.signal_age_ms_max", limits.signal_age_ms_max))
    if config.guard.flatten_after_s:
        rules.append(("guard.flatten_after_s", config.guard.flatten_after_s, "guard.cancel_after_s",
                      config.guard.cancel_after_s))
    for key, value, least_key, least in rules:
        if value < least:
            raise ConfigError(f"{key}: must be at least {least} (from {least_key}); was {value}")


def _check_files(config: Config) -> None:
    accounts = config.paper.accounts if config.paper else {}
    for table, names in (("exchange", config.exchange),
                         *((f"paper.accounts.{n}", account) for n, account in accounts.items())):
        for key in ("api_key_file", "api_secret_file"):
            path = config.path(getattr(names, key))
            is_made = config.mode == "paper" and path.resolve().is_relative_to(config.state_path)
            if not (is_made and not path.exists()):  # make run makes it
                check_secret_file(path, f"{table}.{key}")
    recording = config.path(config.paper.recording) if config.paper and config.paper.recording else None
    if recording is not None and not recording.is_file():
        raise ConfigError(f"paper.recording: must be a file; {recording} is not")
    if os.path.isdir(config.path(config.journal.path)):  # a strategy may not look there
        raise ConfigError(f"journal.path: must be a file; {config.path(config.journal.path)} is a folder")


def check_secret_file(path: Path, key: str) -> None:
    """Check that a secret is a private file. A process that may not look at all passes: the one
    that needs the key will not. Raises ConfigError.
    """
    try:
        mode = path.stat().st_mode
    except PermissionError:
        return
    except OSError as error:
        raise ConfigError(f"{key}: cannot be read: {path}: {error.strerror} (in paper mode make run makes it)"
                          ) from None
    if not stat.S_ISREG(mode):
        raise ConfigError(f"{key}: must be a file; {path} is not")
    if stat.S_IMODE(mode) not in (0o400, 0o600):
        raise ConfigError(f"{key}: must have mode 0400 or 0600; {path} has {stat.S_IMODE(mode):04o}; "
                          f"chmod 600 {path}")


def read_secret(path: Path, key: str) -> str:
    """Return the secret in the file, stripped. Raises ConfigError; the text never holds the secret."""
    check_secret_file(path, key)
    try:
        secret = path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        raise ConfigError(f"{key}: cannot be read as ASCII text: {path}") from None
    if not secret:
        raise ConfigError(f"{key}: is empty: {path}")
    return secret
