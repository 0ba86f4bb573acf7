"""Every broken configuration is one clear line, and nothing starts on it."""

import importlib.util
import subprocess
import sys
from decimal import Decimal
from pathlib import Path

import pytest

from bot.config import BusConfig, Channel, LimitsConfig
from bot.config_file import check_secret_file, load, parse, read_secret
from bot.errors import EXIT_CONFIG, ConfigError
from tests.harness import ROOT, write_config

BTC = "BTC/USDT:USDT"
OTHER = {"class": "a.b:C", "symbols": [BTC]}

# What is changed in a good file, and what the error must say: the key's path, then the rule and value.
BROKEN = {
    "unknown_key": ({"gateway": {"symbls": []}}, ["gateway: ", "unknown field `symbls`"]),
    "unknown_table": ({"gatway": {"symbols": []}}, ["unknown field `gatway`"]),
    "missing_limit": ({"limits": {"order_notional_max": None}},
                      ["limits: ", "missing required field `order_notional_max`"]),
    "missing_table": ({"limits": None}, ["missing required field `limits`"]),
    "no_strategy": ({"strategy": None}, ["missing required field `strategy`"]),
    "empty_strategies": ({"strategy": {"levels": None}}, ["strategy: ", "length >= 1"]),
    "wrong_type": ({"bus": {"ticks": {"hwm": "many"}}}, ["bus.ticks.hwm: must be `int`; was many"]),
    "table_for_value": ({"state_dir": {"path": "var"}}, ["state_dir: must be `str`; was a table"]),
    "value_for_table": ({"limits": 3}, ["limits: must be a table; was 3"]),
    "negative_hwm": ({"bus": {"ticks": {"hwm": -1}}}, ["bus.ticks.hwm: must be `int` >= 1; was -1"]),
    "linger_too_long": ({"bus": {"reports": {"linger_ms": 60_000}}},
                        ["bus.reports.linger_ms: must be `int` <= 10000; was 60000"]),
    "unknown_market": ({"paper": {"market": "real"}},
                       ["paper.market: must be one of synthetic, recording; was real"]),
    "unknown_mode": ({"mode": "production"}, ["mode: must be one of paper, testnet, live; was production"]),
    "limit_of_nothing": ({"limits": {"order_notional_max": 0}},
                         ["limits.order_notional_max: must be from 0.001 to 1,000,000,000; was 0"]),
    "negative_limit": ({"limits": {"price_collar_pct": -1}}, ["limits.price_collar_pct: ", "was -1"]),
    "collar_that_is_none": ({"limits": {"price_collar_pct": 90}}, ["limits.price_collar_pct: ", "was 90"]),
    "limit_not_a_number": ({"limits": {"order_notional_max": "lots"}}, ["limits.order_notional_max: "]),
    "limit_not_finite": ({"limits": {"order_notional_max": "NaN"}},
                         ["limits.order_notional_max: must be a finite number, 0 or more; was NaN"]),
    "negative_fee": ({"paper": {"taker_fee": Decimal("-0.1")}}, ["paper.taker_fee: ", "was -0.1"]),
    "settled_in_another_currency": ({"strategy": {"levels": {"symbols": ["BTC/USDC:USDC"]}}},
                                    ["strategy.levels.symbols: must be settled in USDT", "BTC/USDC:USDC"]),
    "exposure_below_position": ({"limits": {"exposure_notional_max": 10}},
                                ["limits.exposure_notional_max: must be at least 40000", "was 10"]),
    "position_below_order": ({"limits": {"position_notional_max": 10}},
                             ["limits.position_notional_max: must be at least 20000", "was 10"]),
    "timeout_below_two_pings": ({"bus": {"zmtp_timeout_ms": 1_500}},
                                ["bus.zmtp_timeout_ms: must be at least 2000", "was 1500"]),
    "silence_below_two_beats": ({"bus": {"silence_ms": 1_000}}, ["bus.silence_ms: ", "was 1000"]),
    "stale_below_the_mark": ({"gateway": {"stale_ms": 500}},
                             ["gateway.stale_ms: must be at least 2000", "was 500"]),
    "absent_before_the_fence": ({"executor": {"absent_after_s": 2}},
                                ["executor.absent_after_s: must be at least 4 ", "was 2"]),
    "dead_man_before_a_restart": ({"guard": {"cancel_after_s": 59}},
                                  ["guard.cancel_after_s: must be at least 60 ", "was 59"]),
    "backoff_upside_down": ({"gateway": {"reconnect_ms_max": 100}},
                            ["gateway.reconnect_ms_max: ", "was 100"]),
    "signal_dies_before_resend": ({"strategy": {"levels": {"signal_ttl_ms": 600}}},
                                  ["strategy.levels.signal_ttl_ms: ", "was 600"]),
    "non_loopback_bind": ({"bus": {"ticks": {"endpoint": "tcp://0.0.0.0:5555"}}},
                          ["bus.ticks.endpoint: ", "never beyond loopback", "was tcp://0.0.0.0:5555"]),
    "endpoint_without_port": ({"bus": {"ticks": {"endpoint": "tcp://127.0.0.1"}}}, ["bus.ticks.endpoint: "]),
    "endpoint_with_port_0": ({"bus": {"ticks": {"endpoint": "tcp://127.0.0.1:0"}}}, ["bus.ticks.endpoint: "]),
    "port_out_of_range": ({"bus": {"ticks": {"endpoint": "tcp://127.0.0.1:70000"}}},
                          ["bus.ticks.endpoint: "]),
    "users_in_part": ({"users": {"trade": "bot-trade"}},
                      ["users: feed, trade and strategy must all be given"]),
    "users_that_share": ({"users": {"feed": "bot", "trade": "bot", "strategy": "s-{strategy}"}},
                         ["users: ", "and differ"]),
    "users_with_one_for_all_strategies": ({"users": {"feed": "f", "trade": "t", "strategy": "s"}},
                                          ["users: ", "must hold {strategy}"]),
    "users_with_one_endpoint": ({"users": {"feed": "f", "trade": "t", "strategy": "s-{strategy}"}},
                                ["bus.signals.endpoint: with [users] each strategy needs its own"]),
    "relative_ipc": ({"bus": {"ticks": {"endpoint": "ipc://ticks"}}}, ["bus.ticks.endpoint: "]),
    "endpoint_twice": ({"bus": {"ticks": {"endpoint": "tcp://127.0.0.1:5999"},
                                "reports": {"endpoint": "tcp://127.0.0.1:5999"}}},
                       ["bus.reports.endpoint: must differ from bus.ticks.endpoint"]),
    "paper_bind_beyond_loopback": ({"paper": {"bind": "0.0.0.0:5560"}}, ["paper.bind: ", "was 0.0.0.0:5560"]),
    "paper_on_a_bus_port": ({"paper": {"bind": "127.0.0.1:5999"},
                             "bus": {"ticks": {"endpoint": "tcp://127.0.0.1:5999"}}},
                            ["bus.ticks.endpoint: must differ from paper.bind"]),
    "paper_mode_with_real_url": ({"exchange": {"rest_url": "https://fapi.binance.com"}},
                                 ["exchange.rest_url: mode paper", "was https://fapi.binance.com"]),
    "live_mode_on_loopback": ({"mode": "live", "paper": None}, ["exchange.rest_url: mode live"]),
    "live_mode_with_paper": ({"mode": "live", "exchange": {"rest_url": "https://fapi.binance.com",
                                                           "ws_url": "wss://fstream.binance.com",
                                                           "sapi_url": "https://api.binance.com"}},
                             ["paper: mode live has no paper exchange"]),
    "live_mode_without_key_rights": ({"mode": "live", "paper": None, "exchange": {
        "rest_url": "https://fapi.binance.com", "ws_url": "wss://fstream.binance.com", "sapi_url": ""}},
        ["exchange.sapi_url: must be", "was "]),
    "url_with_path": ({"exchange": {"rest_url": "http://127.0.0.1:5560/fapi"}}, ["exchange.rest_url: "]),
    "url_of_wrong_kind": ({"exchange": {"ws_url": "http://127.0.0.1:5560"}}, ["exchange.ws_url: ", "ws"]),
    "url_with_bad_port": ({"exchange": {"rest_url": "http://127.0.0.1:99999"}}, ["exchange.rest_url: "]),
    "symbol_in_two_strategies": ({"strategy": {"other": OTHER}},
                                 [f"strategy.other.symbols: {BTC} already belongs to strategy.levels"]),
    "symbol_twice": ({"strategy": {"levels": {"symbols": [BTC, BTC]}}},
                     [f"strategy.levels.symbols: names {BTC} twice"]),
    "symbol_of_no_future": ({"strategy": {"levels": {"symbols": ["BTCUSDT"]}}},
                            ["strategy.levels.symbols: ", 'was "BTCUSDT"']),
    "listen_to_nonsense": ({"strategy": {"levels": {"listen": ["btc"]}}}, ["strategy.levels.listen: "]),
    "symbol_not_listed_on_paper": ({"strategy": {"levels": {"symbols": ["DOGE/USDT:USDT"]}}},
                                   ["paper.symbols: ", "DOGE/USDT:USDT"]),
    "strategy_without_symbols": ({"strategy": {"levels": {"symbols": []}}},
                                 ["strategy.levels.symbols: must be `array` of length >= 1; was []"]),
    "class_without_colon": ({"strategy": {"levels": {"class": "bot.support_resistance"}}},
                            ["strategy.levels.class: ", "matching regex", "was bot.support_resistance"]),
    "item_of_wrong_type": ({"strategy": {"levels": {"symbols": [BTC, 3]}}},
                           ["strategy.levels.symbols[1]: must be `str`; was 3"]),
    "strategy_with_a_bad_name": ({"strategy": {"Levels": OTHER, "levels": None}},
                                 ["strategy.Levels: a name is"]),
    "missing_key_file": ({"exchange": {"api_key_file": "/nowhere/api.key"}},
                         ["exchange.api_key_file: cannot be read: /nowhere/api.key: No such file"]),
    "folder_for_key_file": ({"exchange": {"api_secret_file": "/"}},
                            ["exchange.api_secret_file: must be a file"]),
    "missing_account_key": ({"paper": {"accounts": {"main": {"api_key_file": "/nowhere/k"}}}},
                            ["paper.accounts.main.api_key_file: cannot be read"]),
    "recording_not_named": ({"paper": {"market": "recording"}}, ["paper.recording: ", "needs a file"]),
    "recording_not_there": ({"paper": {"market": "recording", "recording": "/nowhere.gz"}},
                            ["paper.recording: must be a file; /nowhere.gz is not"]),
    "folder_for_journal": ({"journal": {"path": "/tmp"}}, ["journal.path: must be a file; /tmp is a folder"]),
}


def error_of(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load(path)
    return str(caught.value)


def test_config_with_everything_right_loads(tmp_path):
    config = load(write_config(tmp_path))
    assert config.mode == "paper" and config.symbols() == (BTC,)
    assert config.state_path == tmp_path / "var"


def test_channel_with_only_its_endpoint_given_keeps_its_own_defaults(tmp_path):
    without = {"hwm": None, "linger_ms": None}
    own = BusConfig()
    bus = load(write_config(tmp_path, bus={"ticks": without, "signals": without,
                                           "reports": {"hwm": None, "endpoint": None, "linger_ms": 7}})).bus
    for name in ("ticks", "signals"):
        channel, default = getattr(bus, name), getattr(own, name)
        assert channel.endpoint != default.endpoint
        assert (channel.hwm, channel.linger_ms) == (default.hwm, default.linger_ms)
    assert bus.reports == Channel(endpoint=own.reports.endpoint, hwm=own.reports.hwm, linger_ms=7)


@pytest.mark.parametrize("kind", BROKEN)
def test_config_with_one_thing_broken_says_which(tmp_path, kind):
    overrides, expected = BROKEN[kind]
    path = write_config(tmp_path, **overrides)
    text = error_of(path)
    assert text.startswith(f"{path}: ") and "\n" not in text
    for part in expected:
        assert part in text


@pytest.mark.parametrize("absurd", [
    "1000000000000000000", "1e18", "nan", "inf", "-inf", '"1e18"', '"NaN"', '"sNaN"', '"Infinity"', "-1",
    "-0.001", "0", "-1e18", "1e-999999999", "1e999999999", '"lots"', '"12 USDT"', '""', "true", "[10]",
    "{a = 1}", "2026-01-01"])
@pytest.mark.parametrize("key", LimitsConfig.__struct_fields__)
def test_limit_with_an_absurd_value_is_refused_and_named(tmp_path, key, absurd):
    path = write_config(tmp_path, limits={key: "ABSURD"})
    path.write_text(path.read_text().replace('"ABSURD"', absurd))
    text = error_of(path)
    assert text.startswith(f"{path}: limits.{key}: must be ") and "; was " in text and "\n" not in text
    assert len(text) < 250


@pytest.mark.parametrize(("key", "most"), [
    ("order_notional_max", 10**9), ("position_notional_max", 10**9), ("exposure_notional_max", 10**9),
    ("day_loss_max", 10**9), ("leverage_max", 125), ("price_collar_pct", 50), ("mark_jump_pct_max", 50),
    ("liquidation_distance_pct_min", 99), ("orders_per_minute_max", 1_200), ("repeats_per_minute_max", 1_200),
    ("open_orders_max", 200), ("signal_age_ms_max", 86_400_000), ("tick_age_ms_max", 86_400_000)])
def test_limit_at_the_most_it_may_be_is_taken_and_one_step_beyond_not(tmp_path, key, most):
    wide = {"order_notional_max": 1} if key == "position_notional_max" else {}
    if key in ("order_notional_max", "position_notional_max"):
        wide |= dict.fromkeys(("position_notional_max", "exposure_notional_max"), 10**9)
    ttl = {"levels": {"signal_ttl_ms": 86_400_000}}
    assert getattr(load(write_config(tmp_path, limits=wide | {key: most}, strategy=ttl)).limits, key) == most
    step = Decimal("0.001") if LimitsConfig.__annotations__[key].__origin__ is Decimal else 1
    text = error_of(write_config(tmp_path, limits=wide | {key: most + step}, strategy=ttl))
    assert f"limits.{key}: must be " in text and f"; was {most + step}" in text


@pytest.mark.parametrize(("content", "expected"), [
    (b"mode = paper", "is not TOML: Invalid value (at line 1"),
    (b"\xff\xfe", "cannot be read"),
    (b"", "missing required field `mode`"),
])
def test_config_with_no_sense_is_one_line(tmp_path, content, expected):
    path = tmp_path / "bot.toml"
    path.write_bytes(content)
    assert expected in error_of(path) and "\n" not in error_of(path)


def test_config_with_no_file_says_so(tmp_path):
    assert error_of(tmp_path / "none.toml").endswith("none.toml: cannot be read: No such file or directory")
    assert error_of(tmp_path).endswith("cannot be read: Is a directory")


def test_key_file_with_open_mode_is_refused(tmp_path):
    path = write_config(tmp_path)
    (tmp_path / "api.key").chmod(0o644)
    text = error_of(path)
    assert "exchange.api_key_file: must have mode 0400 or 0600" in text and "has 0644; chmod 600" in text
    (tmp_path / "api.key").chmod(0o400)
    load(path)


def test_secret_with_nothing_in_it_is_refused_and_never_shown(tmp_path):
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    with pytest.raises(ConfigError, match="key: is empty"):
        read_secret(secret, "key")
    secret.write_bytes(b"s3cr\xe9t")
    with pytest.raises(ConfigError) as caught:
        read_secret(secret, "key")
    assert "s3cr" not in str(caught.value)
    secret.write_text(" hello\n")
    assert read_secret(secret, "key") == "hello"


def test_secret_file_with_a_symlink_to_a_private_file_passes(tmp_path):
    secret = tmp_path / "secret"
    secret.touch(mode=0o600)
    (tmp_path / "link").symlink_to(secret)
    check_secret_file(tmp_path / "link", "key")


def test_numbers_with_a_point_stay_exact(tmp_path):
    config = load(write_config(tmp_path, limits={"price_collar_pct": Decimal("0.1")}))
    assert config.limits.price_collar_pct == Decimal("0.1")


def test_example_config_with_its_keys_made_is_valid(tmp_path):
    path = tmp_path / "bot.toml"
    text = (ROOT / "ops" / "bot.example.toml").read_text()
    path.write_text(text.replace('state_dir = "var"', f'state_dir = "{tmp_path}"'))
    (tmp_path / "keys").mkdir()
    for name in ("paper.key", "paper.secret"):
        (tmp_path / "keys" / name).touch(mode=0o600)
    config = load(path)
    assert config.mode == "paper" and list(config.strategy) == ["sr"]
    assert config.exchange.api_key_file == config.paper.accounts["main"].api_key_file


def test_parse_with_missing_key_files_leaves_them_to_check(tmp_path):
    path = write_config(tmp_path)
    (tmp_path / "api.key").unlink()
    assert parse(path).mode == "paper"


PROCESSES = ["gateway", "strategy", "executor", "paper", "run"]


@pytest.mark.parametrize("process", [p for p in PROCESSES if importlib.util.find_spec(f"bot.{p}")])
@pytest.mark.parametrize("kind", ["missing_limit", "non_loopback_bind", "missing_key_file"])
def test_process_with_broken_config_exits_78_and_starts_nothing(tmp_path, process, kind):
    path = write_config(tmp_path, **BROKEN[kind][0])
    arguments = ["--name", "levels"] if process == "strategy" else []
    done = subprocess.run([sys.executable, "-m", f"bot.{process}", "--config", str(path), *arguments],
                          capture_output=True, text=True, timeout=30, cwd=ROOT)
    assert done.returncode == EXIT_CONFIG
    assert done.stdout == ""
    assert done.stderr == f"config error: {error_of(path)}\n"
    assert not (tmp_path / "var").exists()


def test_key_file_with_no_right_to_look_is_left_to_the_one_who_needs_it(tmp_path, monkeypatch):
    def refuse(self, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "stat", refuse)
    check_secret_file(tmp_path / "secret", "key")
    with pytest.raises(ConfigError, match="key: cannot be read"):
        read_secret(tmp_path / "secret", "key")


def test_paper_keys_that_make_run_makes_may_be_missing_and_others_not(tmp_path):
    keys = {"api_key_file": "keys/a", "api_secret_file": "keys/b"}
    path = write_config(tmp_path, exchange=keys, paper={"accounts": {"main": keys}})
    assert load(path).mode == "paper"
    with pytest.raises(ConfigError, match=r"exchange\.api_key_file: cannot be read"):
        load(write_config(tmp_path, exchange={"api_key_file": str(tmp_path / "other")}))
