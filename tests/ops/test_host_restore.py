"""A host is lost, another takes over from its backup: make test-host INVENTORY=FILE with two throwaway hosts.

The first host trades (paper), is destroyed and stays off; the second one is made anew. An exchange does not
die with a host of ours: the test carries the paper exchange's ledger over. The tests run in their order.
"""

import json
import re
import shutil
import time
from pathlib import Path

import pytest

from tests.harness import wait_until
from tests.host import BACKUPS, FLIPPER, FLIPPER_VARS, Host, Source

pytestmark = [pytest.mark.host, pytest.mark.long]


def ask(host: Host, verb: str):
    """Return what botctl says there."""
    done = host.do(f"botctl {verb} --json")
    return json.loads(done.stdout) if done.stdout[:1] in ("{", "[") else {}


@pytest.fixture(scope="module")
def hosts(tmp_path_factory) -> tuple[Host, Host]:
    """Return one that trades, and one that is bare.

    The paper exchange stands still in between, and its market jumps then: a near exit would fire at once.
    """
    old = Host()
    try:
        new = Host(1)
    except IndexError:
        pytest.skip("the inventory has one host: a restore wants another")
    source = Source(tmp_path_factory.mktemp("source") / "tradehost")
    source.commit(flipper=FLIPPER)
    for host in (old, new):
        host.vars |= {**FLIPPER_VARS, "release_source": str(source.folder)}
    old.do("botctl resume")
    old.play("site.yml")
    old.wait_running()
    return old, new


def test_backup_of_a_host_is_fetched_proven_and_exposes_little(hosts):
    old, _ = hosts
    began = time.monotonic()
    _, text = old.play("backup.yml")
    print(f"backup made, proven and fetched: {time.monotonic() - began:.0f} s")
    newest = max((BACKUPS / old.name).glob("*.age"))
    assert newest.stem in text and b"SQLite" not in newest.read_bytes()
    assert (BACKUPS / "backup.key").stat().st_mode & 0o777 == 0o600
    private = (BACKUPS / "backup.key").read_text().strip()
    assert old.do("grep -rlF -f - /etc/bot /var/lib/bot", text=private).stdout == "", "it is on no disk there"
    told = old.do("systemd-analyze security --no-pager bot-backup.service").stdout
    exposure = float(re.search(r"Overall exposure level for .*: ([\d.]+)", told)[1])
    print(f"exposure of bot-backup.service: {exposure}")
    assert exposure <= 2.0 and "bot-backup.timer" in old.do("systemctl list-timers --no-pager").stdout


def test_backup_of_a_host_that_was_changed_is_noticed_by_the_same_nights_run(hosts):
    old, _ = hosts
    path = old.do("ls /var/lib/bot/backup/*.age | tail -1").stdout.strip()
    assert old.do(f"printf X | dd of={path} bs=1 seek=300 conv=notrunc").returncode == 0
    assert old.do("systemctl start bot-backup").returncode != 0
    assert Path(path).stem in old.do("botctl backup list | grep damaged").stdout
    wait_until(lambda: "backup_failed" in old.do("botctl health").stdout, 10)
    assert old.status()["state"] == "RUNNING" and not old.status()["backup"]["is_good"]
    _, text = old.play("backup.yml", is_good=False)
    assert "the host says no" in text
    assert old.do(f"rm {path} {Path(path).with_suffix('.json')}; systemctl start bot-backup").returncode == 0
    old.play("backup.yml")


def test_host_that_is_destroyed_is_restored_on_another_and_trades_on(hosts):
    old, new = hosts
    saved = old.status()["counters"]["fills"]
    wait_until(lambda: old.status()["counters"]["fills"] > saved
               and any(float(p["qty"]) for p in old.status()["positions"]), 120)
    # Destroyed while it trades. What the exchange knows by then goes on in the other's place.
    old.do("systemctl mask --runtime bot; systemctl kill -s KILL bot; sleep 1")
    ledger = old.do("tar -C /var/lib/bot -c paper | base64").stdout
    old.do("systemctl poweroff")
    wait_until(lambda: old.do("true").returncode == 255, 30)
    new.vars |= {"restore_old": old.name, "restore_on": new.name}
    all_of_it = f"localhost,{old.name},{new.name}"
    assert "may trade" in new.play("restore.yml", is_good=False, limit=all_of_it)[1]
    assert new.do("test -e /opt/bot").returncode != 0, "nothing was touched"
    carried = new.do("mkdir -p /var/lib/bot && base64 -d | tar -C /var/lib/bot -x --no-same-owner && "
                     "chmod 666 /var/lib/bot/paper/*", text=ledger)
    assert carried.returncode == 0, carried.stderr
    began = time.monotonic()
    new.vars["restore_old_is_gone"] = True
    _, text = new.play("restore.yml", limit=all_of_it)
    print(f"restored on a bare host, compared with the exchange: {time.monotonic() - began:.0f} s")
    assert "books and exchange agree" in text and "restored from" in text
    status = new.status()
    assert status["state"] == "HALTED"
    assert not status["locked_symbols"] and not status["unknown_orders"]
    assert [h["scope"] for h in status["halted"]] == ["all"] and ask(new, "journal verify")["is_whole"]
    # A person has looked.
    assert new.do("botctl resume").returncode == 0
    fills = new.wait_running()["counters"]["fills"]
    wait_until(lambda: new.status()["counters"]["fills"] > fills, 120)
    assert "agree" in new.do("botctl reconcile").stdout and not new.status()["halted"]


def test_host_that_is_fenced_does_not_trade_whoever_starts_it(hosts):
    _, new = hosts
    new.vars["why"] = "drill"
    new.play("fence.yml")
    new.do("systemctl start bot; supervisorctl start all")
    time.sleep(3)
    assert new.do("systemctl is-active bot").stdout.strip() == "inactive"
    assert new.do("pgrep -f 'bot[.]executor'").returncode == 1
    assert "was fenced" in new.play("site.yml", is_good=False)[1]
    assert new.do("ls /etc/bot/keys").stdout == "" and "drill" in new.do("cat /etc/bot/fenced").stdout
    shutil.rmtree(BACKUPS)
