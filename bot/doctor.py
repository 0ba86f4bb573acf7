"""`botctl doctor`: everything that can be wrong around the processes, asked one by one. Changes nothing."""

import os
import platform
import ssl
import stat
import sys
from importlib.metadata import version
from pathlib import Path

import msgspec

from bot import __version__, probe
from bot.books import Books
from bot.bus import signal_endpoint
from bot.clock import Clock
from bot.config import Config
from bot.config_file import read_secret
from bot.connection import pool, rights_pool
from bot.contract import Contract
from bot.errors import ConfigError, ExchangeError, JournalError
from bot.exchange import Exchange
from bot.journal import JournalReader
from bot.programs import names
from bot.status import read_beats, stale
from bot.watch import MB

LIBRARIES = ("pyzmq", "msgspec", "ccxt", "aiohttp", "supervisor", "psutil", "prometheus-client")
OF_EXCHANGE = ("clock", "symbols", "account", "positions", "key rights")


class Check(msgspec.Struct, frozen=True):
    """One question and its answer. verdict: good, bad, or unknown when it could not be asked."""

    name: str
    verdict: str
    text: str


async def examine(config: Config, clock: Clock, path: Path, *, is_candidate: bool = False) -> list[Check]:
    """Return all checks, those of this host first, then the exchange's. path: of the configuration.

    is_candidate: another release or configuration than these runs beside; what runs is not judged by them.
    """
    of_running = [] if is_candidate else [*_versions(config), *_switch(Path(sys.prefix)), *_ports(config)]
    return [*of_running, *_files(config, path), *_host(config), *_journal(config),
            *await _exchange(config, clock)]


def _check(name: str, is_good: bool, text: str) -> Check:
    return Check(name, "good" if is_good else "bad", text)


def _versions(config: Config) -> list[Check]:
    beats = read_beats(config)
    other = [f"{name} runs {beat['version']}" for name, beat in beats.items()
             if beat["version"] != __version__ and not beat["ended"]]
    old = stale(config, beats)
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    return [_check("version", not other, "; ".join(other) or f"tradehost {__version__}, Python "
                   f"{platform.python_version()}, {ssl.OPENSSL_VERSION}, {libraries}"),
            _check("config", not old, f"changed since {', '.join(old)} read it: botctl config apply, then "
                   f"supervisorctl restart {' '.join(old)}" if old else
                   f"fingerprint {config.fingerprint()}; every process has what concerns it")]


def _switch(venv: Path) -> list[Check]:
    pending = (venv / "../../../switch.pending").resolve()  # /opt/bot's, of /opt/bot/current/.venv
    return [_check("switch", False, f"{pending}: one goes on, or was cut: sudo bot-switch ends it")
            ] if pending.exists() else []


def _files(config: Config, path: Path) -> list[Check]:
    checks = []
    for key in ("api_key_file", "api_secret_file"):
        try:
            read_secret(config.path(getattr(config.exchange, key)), f"exchange.{key}")
            checks.append(Check(key, "good", "is private and not empty"))
        except ConfigError as error:
            checks.append(Check(key, "bad", str(error)))
    # Whoever reaches these sockets is trusted; the rest others may read at most.
    closed = [Path(endpoint[6:]).parent for _, _, endpoint in _bus(config) if endpoint.startswith("ipc://")]
    closed.append(config.path("run/supervisor.sock"))
    places = [path.resolve(), config.state_path, config.path(config.journal.path),
              *(config.path(name) for name in ("run", "halt", "guard", "commands", "supervisor.d")), *closed]
    return checks + [_mode(place, 0o007 if place in closed else 0o002) for place in places
                     if os.path.lexists(place)]


def _mode(place: Path, forbidden: int) -> Check:
    mode = stat.S_IMODE(place.stat().st_mode)
    trouble = "others may write there; chmod o-w" if forbidden == 0o002 else "others may reach it; chmod o="
    is_good = not mode & forbidden
    return _check(f"mode of {place}", is_good, f"{mode:04o}" + ("" if is_good else f": {trouble}"))


def _host(config: Config) -> list[Check]:
    rules, left = config.health, probe.host(_existing(config.state_path))
    return [_check(name, left[key] >= least * MB, f"{left[key] // MB:,} MB free, at least {least:,}")
            for name, key, least in (("disk", "disk_free_bytes", rules.disk_free_mb_min),
                                     ("memory", "memory_available_bytes", rules.host_memory_mb_min))]


def _existing(path: Path) -> Path:
    return path if path.exists() else _existing(path.parent)


def _ports(config: Config) -> list[Check]:
    running = {name: beat["pid"] for name, beat in read_beats(config).items() if not beat["ended"]}
    wanted = _bus(config)
    if config.health.page_port:
        wanted.append(("health", "status page", f"tcp://127.0.0.1:{config.health.page_port}"))
    if "paper" in names(config) and config.paper is not None:
        wanted.append(("paper", "paper.bind", f"tcp://{config.paper.bind}"))
    wanted += [(name, f"metrics of {name}", f"tcp://127.0.0.1:{config.metrics_port(name)}")
               for name in names(config) if config.metrics_port(name)]
    return [_port(name, endpoint, process, running.get(process, 0)) for process, name, endpoint in wanted]


def _bus(config: Config) -> list[tuple[str, str, str]]:
    # Who binds, its name, its endpoint.
    bus, signals = config.bus, "bus.signals"
    to_executor = {signal_endpoint(bus, name): f"{signals} of {name}" for name in config.strategy} \
        if "{strategy}" in bus.signals.endpoint else {bus.signals.endpoint: signals}
    return [("gateway", "bus.ticks", bus.ticks.endpoint), ("executor", "bus.reports", bus.reports.endpoint),
            *(("executor", name, endpoint) for endpoint, name in to_executor.items())]


def _port(name: str, endpoint: str, process: str, pid: int) -> Check:
    is_open = probe.answers(endpoint)
    if is_open is None:
        return Check(name, "unknown", f"{endpoint} is closed to you: sudo botctl doctor")
    if is_open and pid and probe.listens(pid, endpoint) is False:
        return Check(name, "bad", f"{endpoint} is not held by {process}, pid {pid}, but by another: ss -ltnp")
    return _check(name, is_open == bool(pid), f"{endpoint} {'answers' if is_open else 'does not answer'}; "
                  f"{process} {'runs' if pid else 'does not run'}")


def _journal(config: Config) -> list[Check]:
    path = config.path(config.journal.path)
    if not path.exists():
        return [Check("journal", "unknown", f"{path} does not exist yet")]
    try:
        reader = JournalReader(path)
        try:
            books, stranger = reader.verify(), reader.stranger_to(config)
        finally:
            reader.close()
    except JournalError as error:
        return [Check("journal", "bad", str(error))]
    if stranger:
        return [Check("journal", "bad", f"{path}: {stranger}; give the other account a journal of its own, "
                      "journal.path")]
    return [Check("journal", "good", f"whole: {books.signals} signals, {books.orders} orders, {books.fills} "
                  f"fills; {path.stat().st_size // MB:,} MB")]


async def _exchange(config: Config, clock: Clock) -> list[Check]:
    try:
        keys = [read_secret(config.path(getattr(config.exchange, key)), f"exchange.{key}")
                for key in ("api_key_file", "api_secret_file")]
        queries = pool(config.exchange, clock)
        exchange = Exchange(config.exchange, clock, orders=queries, queries=queries, keys=(keys[0], keys[1]),
                            rights=rights_pool(config.exchange, clock))
        await exchange.load()
        await exchange.measure_clock()
    except (ConfigError, ExchangeError) as error:
        return [Check("exchange", "bad", f"{config.exchange.rest_url}: {error}"),
                *(Check(name, "unknown", "the exchange was not asked, see above") for name in OF_EXCHANGE)]
    offset_ms, most = exchange.clock_offset_ns // 1_000_000, config.health.clock_offset_ms_max
    missing = [symbol for symbol in config.symbols() if symbol not in exchange.instruments]
    checks = [Check("exchange", "good",
                    f"{config.exchange.rest_url} answers, {len(exchange.instruments)} symbols"),
              _check("clock", abs(offset_ms) <= most,
                     f"the exchange's is {offset_ms} ms ahead, at most {most}"),
              _check("symbols", not missing,
                     f"not listed: {', '.join(missing)}" if missing else "all are listed")]
    return [*checks, await _account(config, clock, exchange), await _positions(exchange),
            await _key_rights(exchange)]


async def _account(config: Config, clock: Clock, exchange: Exchange) -> Check:
    contract = Contract(config, clock, exchange=exchange, books=Books(), lock=lambda *_: None,
                        unlock=lambda *_: None)
    traded = sorted({symbol for table in config.strategy.values() for symbol in table.symbols})
    try:
        differences = await contract.check(await exchange.account(), traded)
    except (ExchangeError, ConfigError) as error:
        return Check("account", "bad", f"the key is refused, the answer was lost, or a setting: {error}")
    return _check("account", not differences, "; ".join(differences) or "may trade, one-way; asset mode, "
                  f"leverage and margin mode of {', '.join(traded)} are as [account] says")


async def _positions(exchange: Exchange) -> Check:
    try:
        held = [f"{symbol} {told.qty:f}" for symbol, told in (await exchange.positions()).items() if told.qty]
    except ExchangeError as error:
        return Check("positions", "bad", f"the key is refused, or the answer was lost: {error}")
    return Check("positions", "good", f"held at the exchange: {', '.join(held) or 'none'}")


async def _key_rights(exchange: Exchange) -> Check:
    try:
        rights = await exchange.key_rights()
    except ExchangeError as error:
        return Check("key rights", "bad", str(error))
    if rights is None:
        return Check("key rights", "unknown", "exchange.sapi_url is empty: look at the key in the exchange's "
                     "settings: futures trading, no withdrawals, from this address alone")
    return _check("key rights", not rights.troubles(),
                  "; ".join(rights.troubles()) or "futures, no withdrawals, from listed addresses alone")
