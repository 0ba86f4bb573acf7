"""botctl's way to the Alertmanager: a test of the whole way to a person, and silence for planned work."""

import argparse
import asyncio
import os
import re
from collections import Counter
from typing import Any

import msgspec

from bot.alert import ask, message, read_url, time_text
from bot.clock import Clock
from bot.config import Config
from bot.errors import EXIT_NO, EXIT_OK, ConfigError, RefusedError
from bot.halt import user
from bot.views import print_json, say

DELIVERED_NS = 12_000_000_000  # the Alertmanager gives a receiver ten seconds
TEST_NS = 30_000_000_000  # then it is over, which is told too
REQUESTS = re.compile(
    r'^alertmanager_notification_requests_(failed_)?total\{integration="(\w+)"\} (\S+)$', re.M)

Row = tuple[str, bool, str]  # the way, whether it was taken, in words


def test(args: argparse.Namespace, config: Config) -> int:
    """Send an alert the whole way, and say who took it."""
    base, clock = config.health.alertmanager_url, Clock()
    name, text = ("AlertTest", "all"), f"a test by {user()}; nothing is wrong"
    body, rows = message(config, clock, "firing", name, text), list[Row]()
    try:
        before = _requests(base)
        ask(f"{base}/api/v2/alerts", [{
            "labels": body["alerts"][0]["labels"] | {"process": "botctl"},
            "annotations": body["alerts"][0]["annotations"],
            "endsAt": time_text(clock.wall_ns() + TEST_NS)}])
        rows += asyncio.run(_wait_delivered(base, before, clock)) or [
            ("Alertmanager", False, "took it, and told nobody: name a receiver in alertmanager.yml")]
    except (OSError, msgspec.MsgspecError) as error:
        rows.append(("Alertmanager", False, f"{base} does not take it: {error}"))
    rows.append(_test_direct(config, body))
    if args.json:
        return print_json([{"way": way, "is_taken": is_taken, "text": text} for way, is_taken, text in rows],
                          all(row[1] for row in rows))
    for way, is_taken, told in rows:
        say(args, f"{'taken' if is_taken else 'NOT TAKEN'}  {way}: {told}")
    return EXIT_OK if all(row[1] for row in rows) else EXIT_NO


def _test_direct(config: Config, body: dict[str, Any]) -> Row:
    path = config.path(config.health.alert_url_file)
    try:
        if not path.exists():
            return "health", True, f"there is no {path}: health tells nobody directly"
        if not os.access(path, os.R_OK):
            return "health", True, f"{path} is health's alone: not tried; root can"
        ask(read_url(path), body)
    except (OSError, ConfigError) as error:
        return "health", False, str(error)
    return "health", True, "the receiver of what cannot wait answers"


def _requests(base: str) -> Counter[tuple[str, bool]]:
    # To receivers so far, by integration and whether they failed; all counts those that failed too.
    told: Counter[tuple[str, bool]] = Counter()
    for failed, integration, count in REQUESTS.findall(ask(f"{base}/metrics").decode(errors="replace")):
        told[integration, bool(failed)] += int(float(count))
    return told


def _wanted(base: str) -> set[str]:
    # What the receiver "people" is told by: webhook, telegram, ...; its secrets come blotted out.
    told = msgspec.json.decode(ask(f"{base}/api/v2/status"))["config"]["original"]
    people = told.partition("- name: people\n")[2].partition("- name: ")[0]
    return set(re.findall(r"^  (\w+)_configs:", people, re.MULTILINE))


async def _wait_delivered(base: str, before: Counter[tuple[str, bool]], clock: Clock) -> list[Row]:
    end_ns, wanted = clock.mono_ns() + DELIVERED_NS, _wanted(base)
    while True:
        new = _requests(base) - before
        rows = [(name, new[name, False] > new[name, True],
                 f"{new[name, False]} requests, {new[name, True]} failed") for name in sorted(wanted)]
        if all(is_taken for _, is_taken, _ in rows) or clock.mono_ns() > end_ns:
            return rows
        await clock.sleep(0.2)


def silence(args: argparse.Namespace, config: Config) -> int:
    """Keep the Alertmanager from telling for a while: everything but the Watchdog, or one alert."""
    clock = Clock()
    end = time_text(clock.wall_ns() + args.span)
    matcher = {"name": "alertname", "value": args.alert or "Watchdog", "isRegex": False,
               "isEqual": bool(args.alert)}
    made = _alertmanager(config, "silences", {
        "matchers": [matcher], "startsAt": time_text(clock.wall_ns()), "endsAt": end,
        "createdBy": f"botctl {user()}", "comment": args.reason})
    if args.json:
        return print_json({"id": made["silenceID"], "until": end}, True)
    say(args, f"silent until {end[:19]} UTC: {args.alert or 'every alert'}; what health tells directly comes "
              "all the same. To end it: botctl alert unsilence")
    return EXIT_OK


def unsilence(args: argparse.Namespace, config: Config) -> int:
    """End the silences that botctl began, or those of one reason."""
    ended = [row["id"] for row in _alertmanager(config, "silences")
             if row["status"]["state"] != "expired" and row["createdBy"].startswith("botctl ")
             and args.reason in (None, row["comment"])]
    for name in ended:
        _alertmanager(config, f"silence/{name}", method="DELETE")
    if args.json:
        return print_json({"ended": ended}, bool(ended))
    say(args, f"{len(ended)} silences ended" if ended else "nothing was silenced")
    return EXIT_OK if ended else EXIT_NO


def _alertmanager(config: Config, path: str, body: Any = None, method: str = "") -> Any:
    base = config.health.alertmanager_url
    try:
        return msgspec.json.decode(ask(f"{base}/api/v2/{path}", body, method=method) or b"null")
    except (OSError, msgspec.MsgspecError) as error:
        raise RefusedError(f"the Alertmanager does not do it: {error}. health.alertmanager_url says where it "
                           f"is: {base}") from None
