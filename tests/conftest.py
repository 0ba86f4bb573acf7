"""Skips in CI: there everything can be installed, so only absent recordings may skip a test."""

import os
import re
import signal

import pytest
import zmq
from hypothesis import settings

# A context that a failing test left open must not be waited for by whoever collects it: a socket with unsent
# messages would hold it, and all tests after it, for ever.
zmq.Context.__del__ = lambda self: None

# A shell without job control starts what it runs in the background deaf to Ctrl-C, and what that starts, too.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Promises hold however slow the machine is: a deadline of 200 ms on a shared one proves nothing.
settings.register_profile("tradehost", deadline=None)
settings.load_profile("tradehost")

ALLOWED = re.compile("recording|recorded|TRADEHOST_DATA", re.IGNORECASE)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    return _forbidden((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    return _forbidden((yield))


def _forbidden(report):
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("TRADEHOST_FORBID_SKIPS"):
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if not ALLOWED.search(reason):
            report.outcome = "failed"
            report.longrepr = f"skipped where nothing may be missing: {reason}"
    return report
