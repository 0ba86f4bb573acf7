"""What each start leaves in its beat, and what SIGHUP does: with health, the smallest process."""

import json
import signal

import pytest

from tests.harness import start_process, stop_process, wait_until, write_config


@pytest.fixture
def path(tmp_path):
    return write_config(tmp_path)


def beat(path) -> dict:
    file = path.parent / "var" / "run" / "health.json"
    return json.loads(file.read_text()) if file.exists() else {"run": 0, "ended": True}


def start(path):
    before = beat(path)["run"]
    process = start_process("bot.health", path)
    wait_until(lambda: beat(path)["run"] > before and not beat(path)["ended"], 15)
    return process


def test_daemon_with_clean_ends_counts_no_crash_and_with_kills_counts_each(path):
    for _ in range(2):
        assert stop_process(start(path)) == 0
        assert beat(path)["ended"] and beat(path)["crash_starts"] == []
    for crashes in range(3):
        process = start(path)
        assert len(beat(path)["crash_starts"]) == crashes
        process.kill()
        process.wait()
    process = start(path)
    marks = beat(path)["crash_starts"]
    assert len(marks) == 3 and marks == sorted(marks)
    assert stop_process(process) == 0


def test_daemon_with_sighup_reads_strategies_again_and_bears_a_wrong_file(path):
    process = start(path)
    log = path.parent / "bot.health.log"
    good = path.read_text()
    try:
        path.write_text("mode = 7")
        process.send_signal(signal.SIGHUP)
        wait_until(lambda: '"event": "config_refused"' in log.read_text(), 10)
        path.write_text(good.replace("[paper]", '[strategy.new]\nclass = "a:B"\nsymbols = ["ETH/USDT:USDT"]\n'
                                     "[paper]").replace("order_notional_max = 20000",
                                                        "order_notional_max = 20001"))
        process.send_signal(signal.SIGHUP)
        line = wait_until(lambda: next((json.loads(text) for text in log.read_text().splitlines()
                                        if '"config_reread"' in text), None), 10)
        assert line["strategies"] == ["levels", "new"]
        assert line["waits_for_restart"] == ["limits that became looser"]
        wait_until(lambda: "strategy-new" in json.dumps(beat(path).get("findings")), 10)
    finally:
        assert stop_process(process) == 0
