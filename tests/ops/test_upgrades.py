"""Upgrades, roll-backs and broken releases under trading, on a throwaway host: make test-host INVENTORY=FILE.

The host that test_host.py left goes from its paper exchange to "testnet": an exchange of its own on that
host, which neither systemd unit nor release of ours touches. So it can be asked, all through an upgrade,
what is held and whether it is protected.
"""

import json
import os
import re
import shlex
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.harness import wait_until
from tests.host import FLIPPER, FLIPPER_VARS, PYTHON, Host, Source

pytestmark = pytest.mark.host

FOLDER = "/var/lib/exchange"
SWITCHES = int(os.environ.get("TRADEHOST_SWITCHES", "11"))  # odd: it ends with the newest
BOUND_S = 120  # until a release is RUNNING, or back: a shared machine is slow
EXCHANGE = {"rest_url": "http://127.0.0.1:5570", "ws_url": "ws://127.0.0.1:5570",
            "sapi_url": "http://127.0.0.1:5570"}
KEYS = {name: letter * 64 for name, letter in (("old.key", "K"), ("old.secret", "S"), ("new.key", "N"),
                                               ("new.secret", "T"))}
# Both key pairs are the same account's, as after a new key was made and before the old one is deleted.
RUN_EXCHANGE = """
import bot.paper as paper
made = paper._keys
paper._keys = lambda *given: {key: ("main", secret) for key, (_, secret) in made(*given).items()}
raise SystemExit(paper.run("paper", paper.main))
"""
EXCHANGE_CONFIG = """
mode = "paper"
state_dir = "/var/lib/exchange"
[exchange]
rest_url = "http://127.0.0.1:5570"
ws_url = "ws://127.0.0.1:5570"
api_key_file = "old.key"
api_secret_file = "old.secret"
[limits]
order_notional_max = 1
position_notional_max = 1
exposure_notional_max = 1
day_loss_max = 1
price_collar_pct = 1
orders_per_minute_max = 1
[strategy.none]
class = "bot.support_resistance:SupportResistanceStrategy"
symbols = ["BTC/USDT:USDT"]
[metrics]
base_port = 0
[paper]
bind = "127.0.0.1:5570"
accounts = {main = {api_key_file = "old.key", api_secret_file = "old.secret"},
            other = {api_key_file = "new.key", api_secret_file = "new.secret"}}
""".replace(",\n            other", ", other")
# Asks the exchange four times a second, from an address of its own, and notes the seconds without a stop.
EYE = """
import hashlib, hmac, http.client, json, sys, time
key, secret = (open(f"/var/lib/exchange/{name}").read() for name in ("old.key", "old.secret"))

def ask(path):
    query = f"symbol=BTCUSDT&timestamp={time.time_ns() // 1_000_000}&recvWindow=5000"
    sign = hmac.new(secret.encode(), query.encode(), hashlib.sha256).hexdigest()
    connection = http.client.HTTPConnection("127.0.0.1", 5570, timeout=5, source_address=("127.0.9.9", 0))
    connection.request("GET", f"/fapi/{path}?{query}&signature={sign}", headers={"X-MBX-APIKEY": key})
    return json.loads(connection.getresponse().read())

seen = {"looks": 0, "held": 0, "naked_s_max": 0.0}
naked_since = None
while True:
    held = sum(abs(float(p["positionAmt"])) for p in ask("v3/positionRisk"))
    covered = sum(float(o["quantity"]) for o in ask("v1/openAlgoOrders") if o["orderType"] == "STOP_MARKET")
    seen["looks"] += 1
    seen["held"] += held > 0
    naked_since = (naked_since or time.monotonic()) if held > covered + 1e-9 else None
    naked_s = time.monotonic() - naked_since if naked_since else 0.0
    seen["naked_s_max"] = max(seen["naked_s_max"], naked_s)
    with open("/var/lib/exchange/eye.json", "w") as file:
        json.dump(seen, file)
    time.sleep(0.25)
"""
# The journal, held against what is promised of every signal and every order.
PROOF = """
import json, sys, time
from collections import Counter
from pathlib import Path
from bot.journal import JournalReader
from bot.model import signal_id

starts, signals, outcomes, intents, wrong = [], {}, {}, Counter(), []
for entry in JournalReader(Path("/var/lib/bot/journal/testnet.db")).since(0):
    event, kind = entry.event, str(entry.event.__struct_config__.tag)
    if kind == "started":
        starts.append((entry.ts_ns, event.epoch))
    elif kind == "signal":
        signals[event.key] = event.signal
    elif kind == "outcome":
        outcomes.setdefault(event.key, []).append((entry.ts_ns, event.outcome))
    elif kind == "intent":
        intents[event.key] += 1
        if event.epoch != starts[-1][1]:
            wrong.append(event.key)
oldest_ns = time.time_ns() - 30 * 10**9
carried = [name for name, signal in signals.items() for at_ns, _ in starts
           if signal.created_ns < at_ns < outcomes.get(name, [(0, "")])[0][0]]
print(json.dumps({
    "starts": len(starts), "signals": len(signals), "intents": len(intents),
    "outcomes": Counter(told[0][1] for told in outcomes.values()),
    "twice": [name for name, count in intents.items() if count > 1]
             + [name for name, told in outcomes.items() if len(told) > 1],
    "of_an_epoch_that_was_over": wrong,
    "without_outcome": [name for name, signal in signals.items()
                        if name not in outcomes and signal.created_ns < oldest_ns],
    "expired_too_early": [name for name, told in outcomes.items()
                          if told[0][1] == "expired" and told[0][0] < signals[name].expires_ns],
    "carried_over_a_start": {name: outcomes[name][0][1] for name in carried}}))
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Source:
    return Source(tmp_path_factory.mktemp("source") / "tradehost")


@pytest.fixture(scope="module")
def host(source) -> Host:
    host = Host()
    host.vars |= {
        "release_source": str(source.folder), "bot_mode": "testnet", "bot_exchange": EXCHANGE,
        "bot_api_key": KEYS["old.key"], "bot_api_secret": KEYS["old.secret"],
        "bot_switch_bound_s": BOUND_S, "bot_switch_keep": 9,  # the exchange runs from the oldest
        **FLIPPER_VARS, "bot_tables": {"executor": {"reconcile_s": 10}}}
    return host


def current(host: Host) -> str:
    return Path(host.do("readlink /opt/bot/current").stdout.strip()).name


def proof(host: Host) -> dict:
    done = host.do(f"{PYTHON} -", text=PROOF)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def run_beside(host: Host, unit: str, command: str) -> None:
    done = host.do(f"systemd-run --unit={unit} --uid=bot-trade -p Restart=always -p RestartSec=1 "
                   f"-p StartLimitIntervalSec=0 {command}")
    assert done.returncode == 0, done.stderr


def gap_of(text: str) -> float:
    return float(re.search(r"nobody traded for ([\d.]+) s", text)[1])


def wait_for_fills(host: Host, more: int = 3) -> None:
    before = host.status()["counters"]["fills"]
    wait_until(lambda: host.status()["counters"]["fills"] >= before + more, 60)


def test_host_on_paper_goes_to_another_exchange_with_keys_from_the_vault(host, source):
    assert host.do("install -d -m 700 -o bot-trade /var/lib/exchange").returncode == 0
    for name, text in {**KEYS, "bot.toml": EXCHANGE_CONFIG, "run.py": RUN_EXCHANGE, "eye.py": EYE}.items():
        write = f"cat > /var/lib/exchange/{name}; chown bot-trade /var/lib/exchange/{name}; " \
                f"chmod 600 /var/lib/exchange/{name}"
        assert host.do(write, text=text).returncode == 0
    python = host.do("readlink -f /opt/bot/current").stdout.strip() + "/.venv/bin/python"
    run_beside(host, "exchange", f"{python} {FOLDER}/run.py --config {FOLDER}/bot.toml")
    source.good.append(source.commit(flipper=FLIPPER))
    recap, text = host.play("deploy.yml")
    assert recap["failed"] == 0 and KEYS["old.secret"] not in text and KEYS["old.key"] not in text
    assert host.status()["mode"] == "TESTNET" and current(host) == source.good[-1]
    wait_for_fills(host)
    run_beside(host, "eye", f"python3 {FOLDER}/eye.py")
    assert host.do("stat -c '%U %a' /etc/bot/keys/api.secret").stdout.strip() == "bot-trade 400"
    # By standard input: sudo logs what it is asked to do.
    found = host.do("grep -rlF -f - /etc /opt/bot /var/lib/bot /var/log", text=KEYS["old.secret"])
    assert found.stdout.split() == ["/etc/bot/keys/api.secret"], found.stdout


def test_upgrades_and_roll_backs_under_trading_lose_and_double_nothing(host, source):
    source.good.append(source.commit(__init__=lambda text: text + "\n# the next release\n"))
    gaps = []
    for number in range(SWITCHES):
        wait_for_fills(host)
        is_back = number % 2
        _, text = host.play("rollback.yml" if is_back else "deploy.yml")
        assert current(host) == source.good[-2 if is_back else -1]
        gaps.append(gap_of(text))
        assert host.do("pgrep -fc '^/opt/bot/.*-m bot.executor'").stdout.strip() == "1"
    wait_for_fills(host)
    print(f"{SWITCHES} switches under trading: nobody traded for {', '.join(f'{gap:.1f}' for gap in gaps)} s")
    _assert_all_accounted_for(host, starts=SWITCHES + 1)


@pytest.mark.long
def test_release_that_cannot_be_imported_is_refused_while_the_old_one_trades(host, source):
    _assert_refused(host, source, "nothing_there", guard=lambda text: "import nothing_there\n" + text)


@pytest.mark.long
def test_release_that_refuses_the_configuration_is_refused_while_the_old_one_trades(host, source):
    _assert_refused(host, source, "unknown field `path`", config=lambda text: text.replace(
        '    path: Annotated[str, Meta(description="SQLite',
        '    file: Annotated[str, Meta(description="SQLite'))


def test_release_that_fails_once_it_trades_is_rolled_back_by_itself(host, source):
    before = current(host)
    source.commit(executor=lambda text: text.replace(
        "        self._check_day()\n", "        self._check_day()\n"
        "        assert self._clock.wall_ns() - self._run < 4 * 10**9, 'broken after four seconds'\n"))
    _, text = host.play("deploy.yml", is_good=False)
    source.reset()
    assert "does not run" in text and f"{before} runs again: RUNNING" in text, text
    print(f"rolled back by itself: nobody traded for {gap_of(text):.1f} s in all")
    assert current(host) == before and not host.status()["halted"]
    wait_for_fills(host)
    _assert_all_accounted_for(host, starts=SWITCHES + 3)


@pytest.mark.long
def test_keys_with_their_successors_are_rotated_and_wrong_ones_refused_beside_trading(host):
    before = host.pids()
    host.vars |= {"bot_api_key": "W" * 64, "bot_api_secret": "X" * 64}
    _, text = host.play("rotate-keys.yml", is_good=False)
    assert "the key is refused" in text and "X" * 64 not in text and host.pids() == before
    host.vars |= {"bot_api_key": KEYS["new.key"], "bot_api_secret": KEYS["new.secret"]}
    _, text = host.play("rotate-keys.yml")
    assert KEYS["new.secret"] not in text and "Delete the old key" in text
    assert host.do("cat /etc/bot/keys/api.key").stdout == KEYS["new.key"]
    assert host.do("ls -d /etc/bot/before /etc/bot/next").stdout == "", "no key lies about"
    wait_for_fills(host)
    recap, _ = host.play("deploy.yml")
    assert recap["changed"] == 0, "what was rotated is what the inventory says"


def _assert_refused(host: Host, source: Source, said: str, **texts: Callable[[str], str]) -> None:
    before, pids = current(host), host.pids()
    source.commit(**texts)
    _, text = host.play("deploy.yml", is_good=False)
    source.reset()
    assert said in " ".join(text.split()), text  # it is wrapped
    assert current(host) == before and host.pids() == pids, "what runs was not touched"
    assert host.status()["state"] == "RUNNING"


def _assert_all_accounted_for(host: Host, *, starts: int) -> None:
    told = proof(host)
    print(json.dumps(told))
    assert told["starts"] >= starts and told["intents"] > starts
    for wrong in ("twice", "of_an_epoch_that_was_over", "without_outcome", "expired_too_early"):
        assert not told[wrong], (wrong, told[wrong])
    done = host.do("botctl reconcile")
    assert done.returncode == 0 and "agree" in done.stdout, done.stdout + done.stderr
    status = host.status()
    assert not status["locked_symbols"] and not status["unknown_orders"] and not status["halted"]
    eye = json.loads(host.do("cat /var/lib/exchange/eye.json").stdout)
    print(f"seen by the exchange: {shlex.quote(json.dumps(eye))}")
    assert eye["held"] > eye["looks"] / 2, "a position was open nearly all the time"
    assert eye["naked_s_max"] < 5, "and protected all through it"  # a busy machine; past 10 s it is closed
    assert time.time() - float(host.do("stat -c %Y /var/lib/exchange/eye.json").stdout) < 10
