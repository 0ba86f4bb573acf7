"""The supervisor sections, and where the running config is noted."""

import configparser
import json

import pytest

from bot.config_file import load
from bot.errors import ConfigError
from bot.programs import find_config, find_state_path, names, note_config, sections, write_sections
from tests.harness import ROOT, write_config

ETH = {"class": "a.b:C", "symbols": ["ETH/USDT:USDT"]}
LIVE = {"mode": "live", "paper": None,
        "exchange": {"rest_url": "https://x.example", "ws_url": "wss://x.example",
                     "sapi_url": "https://api.example.com"}}


def read(text: str) -> configparser.SectionProxy:
    parser = configparser.RawConfigParser()
    parser.read_string(text)
    return parser[parser.sections()[0]]


def fixed() -> configparser.RawConfigParser:
    parser = configparser.RawConfigParser(inline_comment_prefixes=(" ;",))
    parser.read(ROOT / "ops" / "supervisord.conf")
    return parser


def test_sections_with_paper_and_strategies_make_one_program_each(tmp_path):
    made = sections(load(write_config(tmp_path, strategy={"eth": ETH})))
    assert set(made) == {"paper", "strategy-levels", "strategy-eth"}
    assert read(made["strategy-eth"])["command"] == (
        "%(ENV_BOT_PYTHON)s -m bot.strategy --config %(ENV_BOT_CONFIG)s --name eth")
    assert read(made["paper"])["command"] == "%(ENV_BOT_PYTHON)s -m bot.paper --config %(ENV_BOT_CONFIG)s"


def test_sections_with_live_mode_have_no_paper(tmp_path):
    assert set(sections(load(write_config(tmp_path, **LIVE)))) == {"strategy-levels"}


def test_names_with_all_programs_are_in_the_order_of_start(tmp_path):
    config = load(write_config(tmp_path))
    assert names(config) == ("paper", "gateway", "executor", "strategy-levels", "health", "guard")
    parser = fixed()
    made = {f"program:{name}": read(text) for name, text in sections(config).items()}
    priorities = [int((made | dict(parser))[f"program:{name}"]["priority"]) for name in names(config)]
    assert priorities == sorted(priorities), "supervisord stops in the reverse order"


def test_every_program_has_the_same_careful_options(tmp_path):
    parser = fixed()
    programs = [parser[s] for s in parser.sections() if s.startswith("program:")]
    programs += [read(text) for text in sections(load(write_config(tmp_path))).values()]
    assert len(programs) == 6
    for program in programs:
        assert program["stopasgroup"] == program["killasgroup"] == program["redirect_stderr"] == "true"
        assert program["autorestart"] == "unexpected" and program["exitcodes"] == "78"
        assert int(program["startretries"]) >= 10 and 1 <= int(program["startsecs"]) <= 5
        assert 1 <= int(program["stopwaitsecs"]) <= 8
        assert program["stdout_logfile"].startswith("%(ENV_BOT_STATE_DIR)s/log/")
        assert program["stdout_logfile_maxbytes"].endswith("MB") and int(program["stdout_logfile_backups"])


def test_write_sections_with_a_strategy_gone_removes_its_file(tmp_path):
    write_sections(load(write_config(tmp_path, strategy={"eth": ETH})))
    folder = tmp_path / "var" / "supervisor.d"
    assert {p.stem for p in folder.iterdir()} == {"paper", "strategy-levels", "strategy-eth"}
    write_sections(load(write_config(tmp_path)))
    assert {p.stem for p in folder.iterdir()} == {"paper", "strategy-levels"}


def test_sections_with_a_strategy_changed_differ_for_that_one_alone(tmp_path):
    before = sections(load(write_config(tmp_path, strategy={"eth": ETH})))
    after = sections(load(write_config(tmp_path, strategy={"eth": ETH, "levels": {"signals_per_s_max": 7}})))
    assert {name for name in before if before[name] != after[name]} == {"strategy-levels"}


def test_find_config_with_one_noted_finds_it_from_anywhere(tmp_path, monkeypatch):
    path = write_config(tmp_path)
    monkeypatch.chdir(tmp_path)
    note_config(path.relative_to(tmp_path), tmp_path / "state", root=tmp_path)
    assert find_state_path(root=tmp_path) == tmp_path / "state"
    monkeypatch.chdir("/")
    assert find_config(root=tmp_path) == path


def test_find_config_with_nothing_started_says_what_to_do(tmp_path):
    with pytest.raises(ConfigError, match="give --config FILE"):
        find_config(root=tmp_path)


def test_write_sections_with_users_says_who_runs_what(tmp_path):
    users = {"feed": "bot-feed", "trade": "bot-trade", "strategy": "bot-s-{strategy}"}
    config = load(write_config(tmp_path, strategy={"eth": ETH}, users=users, bus={
        "signals": {"endpoint": f"ipc://{tmp_path}/{{strategy}}/socket"}}))
    write_sections(config)
    parser = fixed()
    parser.read(sorted(config.path("supervisor.d").glob("*.conf")))
    made = {s.removeprefix("program:"): parser[s]["user"] for s in parser.sections() if "user" in parser[s]}
    assert made == {
        "supervisord": "root", "gateway": "bot-feed", "health": "bot-feed", "executor": "bot-trade",
        "guard": "bot-trade", "paper": "bot-trade", "strategy-levels": "bot-s-levels",
        "strategy-eth": "bot-s-eth"}
    assert all(parser[f"program:{name}"]["command"] for name in names(config)), "merged, not replaced"


def test_targets_name_the_port_of_each_process_for_anybody_to_read(tmp_path):
    config = load(write_config(tmp_path, strategy={"eth": ETH}, metrics={"base_port": 9_560}))
    write_sections(config)
    path = config.path("metrics/targets.json")
    told = {row["labels"]["process"]: (row["targets"], row["labels"]["mode"])
            for row in json.loads(path.read_text())}
    assert told == {name: ([f"127.0.0.1:{config.metrics_port(name)}"], "PAPER") for name in names(config)}
    assert path.stat().st_mode & 0o777 == 0o644
    write_sections(load(write_config(tmp_path, metrics={"base_port": 9_560})))
    assert "strategy-eth" not in path.read_text()
    write_sections(load(write_config(tmp_path)))
    assert json.loads(path.read_text()) == [], "no metrics, no targets"
