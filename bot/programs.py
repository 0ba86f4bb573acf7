"""The programs supervisord keeps alive, made from the config, and where the running config is noted."""

import hashlib
import os
import sys
from pathlib import Path

import msgspec

from bot.config import Config
from bot.errors import ConfigError

# Stop order is the reverse: guard (60), health (50), strategies (40), executor (30), gateway (20), and the
# exchange last.
# A strategy only has to sync its outbox; the paper exchange to close its ledger.
SECTION = """\
[program:{name}]
{mark}command=%(ENV_BOT_PYTHON)s -m {command} --config %(ENV_BOT_CONFIG)s{arguments}
priority={priority}
startsecs=2
startretries=20
autorestart=unexpected
exitcodes=78
stopwaitsecs=3
stopasgroup=true
killasgroup=true
redirect_stderr=true
stdout_logfile=%(ENV_BOT_STATE_DIR)s/log/{name}.log
stdout_logfile_maxbytes=20MB
stdout_logfile_backups=5
"""
ROOT = Path(sys.prefix).parent  # the checkout: what holds the virtual environment
# Noted where botctl of the same checkout looks, whatever the config's state_dir is.
RUNNING_CONFIG = Path("var") / "run" / "config.path"


def sections(config: Config) -> dict[str, str]:
    """Return the supervisor sections that depend on the config, by program name."""
    made = {}
    if config.mode == "paper" and config.paper is not None:
        made["paper"] = SECTION.format(name="paper", command="bot.paper", arguments="", priority=10, mark="")
    for name, table in config.strategy.items():
        # A table that changes changes the section: "supervisorctl update" then restarts this one alone.
        mark = hashlib.sha256(msgspec.json.encode(table, order="sorted")).hexdigest()[:12]
        made[f"strategy-{name}"] = SECTION.format(
            name=f"strategy-{name}", command="bot.strategy", arguments=f" --name {name}", priority=40,
            mark=f'environment=BOT_STRATEGY_TABLE="{mark}"\n')
    return made


def names(config: Config) -> tuple[str, ...]:
    """Return every program's name, in the order of start."""
    made = sections(config)
    paper = tuple(n for n in made if n == "paper")
    return *paper, "gateway", "executor", *(n for n in made if n != "paper"), "health", "guard"


def _users(config: Config) -> dict[str, str]:
    # A section that is read once more is merged with the first: only who runs it stands here.
    users, made = config.users, "[supervisord]\nuser=root\n"
    for name in names(config):
        kind, _, strategy = name.partition("-")
        user = users.strategy.format(strategy=strategy) if kind == "strategy" else \
            users.feed if name in ("gateway", "health") else users.trade
        made += f"\n[program:{name}]\nuser={user}\n"
    return {"users": made} if users.trade else {}


def write_sections(config: Config) -> None:
    """Write the sections below state_dir/supervisor.d, remove those of programs that are gone; targets."""
    folder, made = config.path("supervisor.d"), sections(config) | _users(config)
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.glob("*.conf"):
        if path.stem not in made:
            path.unlink()
    for name, text in made.items():
        (folder / f"{name}.conf").write_text(text, encoding="utf-8")
    write_targets(config)


def write_targets(config: Config) -> None:
    """Write where each process's metrics are: Prometheus (file_sd) follows strategies that come and go."""
    targets = [{"targets": [f"127.0.0.1:{port}"], "labels": {"process": name, "mode": config.mode.upper()}}
               for name in names(config) if (port := config.metrics_port(name))]
    path = config.path("metrics/targets.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_bytes(msgspec.json.encode(targets))
    part.chmod(0o644)  # Prometheus is none of our users; nothing in it is secret
    os.replace(part, path)


def note_config(path: Path, state_path: Path, root: Path = ROOT) -> None:
    """Note the config that runs and its state_dir, for botctl without --config, or with it broken."""
    note = root / RUNNING_CONFIG
    note.parent.mkdir(parents=True, exist_ok=True)
    note.write_text(f"{path.resolve()}\n{state_path}\n", encoding="utf-8")


def find_config(root: Path = ROOT) -> Path:
    """Return BOT_CONFIG, else the config that was started last from this checkout. Raises ConfigError."""
    return Path(os.environ["BOT_CONFIG"]) if "BOT_CONFIG" in os.environ else _noted(root)[0]


def find_state_path(root: Path = ROOT) -> Path:
    """Return its state_dir: a halt needs no more than this. Raises ConfigError."""
    return Path(os.environ["BOT_STATE_DIR"]) if "BOT_STATE_DIR" in os.environ else _noted(root)[1]


def _noted(root: Path) -> tuple[Path, Path]:
    try:
        config, state = (root / RUNNING_CONFIG).read_text(encoding="utf-8").split("\n")[:2]
    except (OSError, ValueError):
        raise ConfigError("--config: nothing was started from here yet; give --config FILE") from None
    return Path(config), Path(state)
