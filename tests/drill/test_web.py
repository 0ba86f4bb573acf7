"""The status page in a real browser, on a running appliance: each state is seen, heard, and without error."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

from bot.clock import Clock
from bot.halt import HaltFiles
from tests.appliance import BTC, Appliance
from tests.harness import free_port, wait_until

# Without the last five Chromium looks for its maker's hosts at each start.
FLAGS = ("--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-quic", "--disable-sync",
         "--disable-background-networking", "--disable-component-update", "--window-size=1300,1500")
# The browser holds up everybody on a small machine: nobody is stuck for that.
SLOW, SLOW_GUARD = {"stuck_ms": 40_000}, {"cancel_after_s": 180}


def program(name: str, package: str) -> str:
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is missing: Debian's package {package} has it")
    return path


@pytest.fixture
def browser() -> Iterator[webdriver.Chrome]:
    options = Options()
    options.binary_location = program("chromium", "chromium")
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(program("chromedriver", "chromium-driver")))
    yield driver
    driver.quit()


def heard(browser: webdriver.Chrome) -> str:
    """Return what a screen reader finds as the page's status."""
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    status = next(n for n in nodes if n.get("role", {}).get("value") == "status")
    below = [n for n in nodes if n["nodeId"] in status["childIds"]]
    return " ".join(n["name"]["value"] for n in below)


def text_of(browser: webdriver.Chrome, name: str) -> str:
    return browser.find_element("id", name).text


def wait_state(browser: webdriver.Chrome, state: str, reason: str = "") -> None:
    try:
        wait_until(lambda: text_of(browser, "state") == state and reason in text_of(browser, "reason"), 30)
    except AssertionError:
        raise AssertionError(f"not {state}: {browser.find_element('tag name', 'body').text}") from None
    assert heard(browser) == state
    assert browser.title.startswith(state)


def wait_text(browser: webdriver.Chrome, name: str, *words: str, timeout: float = 30) -> None:
    wait_until(lambda: all(word in text_of(browser, name) for word in words), timeout)


def drawn_colours(browser: webdriver.Chrome, name: str) -> int:
    """Return how many colours a chart shows: a blank one has one."""
    return browser.execute_script("""
        const seen = new Set();
        for (const canvas of document.querySelectorAll(`#${arguments[0]} canvas`)) {
          if (!canvas.width || !canvas.height) continue;
          const data = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data;
          for (let i = 0; i < data.length; i += 4) if (data[i + 3]) seen.add(data.slice(i, i + 3).join());
        }
        return seen.size;""", name)


def shoot(browser: webdriver.Chrome, folder: Path, name: str) -> None:
    """Keep how it looks, light and dark, for people's eyes: pytest keeps the folders of the last runs."""
    for look in ("light", "dark"):
        features = [{"name": "prefers-color-scheme", "value": look}]
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        browser.save_screenshot(str(folder / f"{name}-{look}.png"))


def test_page_with_each_state_of_a_running_appliance_shows_it(tmp_path, browser):
    port = free_port()
    with Appliance(
        tmp_path, health={"page_port": port} | SLOW, guard=SLOW_GUARD, executor={"reconcile_s": 2}
    ) as it:
        it.start("paper", "gateway", "executor", "strategy-levels", "health", "guard")
        it.wait_running(60)
        browser.get(f"http://127.0.0.1:{port}/")
        wait_state(browser, "RUNNING")
        wait_text(browser, "mode", "PAPER")
        wait_text(browser, "alerts", "nothing is wrong")
        wait_text(browser, "price-text", BTC, "RUNNING", "resistance", "support")
        wait_text(browser, "processes", "gateway UP", "strategy-levels UP")
        for chart in ("price", "equity"):
            wait_until(lambda chart=chart: drawn_colours(browser, chart) > 3, 20)
        clock = text_of(browser, "clock")
        wait_until(lambda: text_of(browser, "clock") != clock, 10)  # live, without reloading
        shoot(browser, tmp_path, "running")

        it.stop("strategy-levels")
        wait_text(browser, "processes", "strategy-levels DOWN")

        it.control("POST", "/paper/trade", {"account": "main", "symbol": "BTCUSDT", "side": "BUY",
                                            "qty": "0.010"})
        wait_text(browser, "alerts", f"SymbolLocked {BTC}")
        wait_text(browser, "price-text", "LOCKED")

        halts = HaltFiles(it.config.path("halt"))
        halts.set("all", who="op", why="<b>a test</b>", clock=Clock())
        wait_state(browser, "HALTED", "op: <b>a test</b>")
        shoot(browser, tmp_path, "halted")
        browser.find_element("link text", "what to do").click()
        wait_until(lambda: "/runbook#" in browser.current_url, 10)
        browser.back()
        halts.clear("all", clock=Clock())

        it.kill("gateway")
        wait_state(browser, "REDUCING", "the gateway is silent")
        it.stop("executor")
        wait_text(browser, "price-text", "(old)")
        wait_state(browser, "DOWN", "the executor does not run")
        wait_until(lambda: "RECONCILING" not in text_of(browser, "price-text"), 10)
        shoot(browser, tmp_path, "down")
        it.stop("paper")
        it.start("executor")
        wait_state(browser, "RECONCILING")
        assert [line for line in browser.get_log("browser") if line["level"] == "SEVERE"] == []

        it.stop("health")
        wait_state(browser, "NO CONTACT", "botctl status")


def test_page_with_a_frozen_feed_on_a_phone_shows_stale(tmp_path, browser):
    port = free_port()
    with Appliance(tmp_path, health={"page_port": port} | SLOW, guard=SLOW_GUARD) as it:
        it.start("paper", "gateway", "executor", "health")
        it.wait_running(60)
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride",
                                {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True})
        browser.get(f"http://127.0.0.1:{port}/")
        wait_state(browser, "RUNNING")
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 390

        def freeze() -> None:  # again and again: a gateway that connects anew gets no Tick either
            for stream in ("trade", "bookTicker", "markPrice@1s"):
                it.control("POST", "/paper/stream", {"match": f"btcusdt@{stream}", "do": "freeze",
                                                     "duration_ms": 120_000})

        wait_until(lambda: freeze() or (text_of(browser, "state") == "REDUCING"
                   and f"FeedStale {BTC}" in text_of(browser, "alerts")), 60, step=0.5)
        shoot(browser, tmp_path, "stale")
