"""Crash points: the steps of a signal and of an order at which a test kills or freezes a process.

Off unless the environment names a plan file, and refused in mode live. The plan is one line: the
point, at which pass from now, `kill` or `stop`. It is gone once it is carried out.
"""

import os
import signal

POINTS = (
    # Strategy: a signal from the decision to its acknowledgement.
    "runner.decided", "runner.appended", "runner.pushed", "runner.synced", "runner.ack_heard",
    "runner.ack_written",
    # Executor: start, a signal, an order, its answer, fills, cancels; every commit and every comparison.
    "executor.epoch_begun", "executor.signal_received", "executor.signal_recorded", "executor.cycle_recorded",
    "executor.cycle_committed", "sender.built", "sender.first_byte", "sender.answered",
    "sender.answer_recorded", "sender.cancel_first_byte", "sender.cancel_answered", "keeper.before_commit",
    "keeper.committed", "keeper.reported", "reconciler.fill_recorded", "reconciler.compared",
    # Paper exchange: a command from its arrival to its answer and its stream event.
    "paper.before_commit", "paper.committed", "paper.told", "paper.before_answer")
PLAN = os.environ.get("TRADEHOST_CRASH", "")


def point(name: str) -> None:
    """Die or freeze here if the plan says so; otherwise do nothing."""
    if PLAN:
        _carry_out(name)


def _carry_out(name: str) -> None:
    try:
        with open(PLAN, encoding="ascii") as file:
            wanted, passes, action = file.read().split()
        if wanted == name and int(passes) > 1:
            with open(PLAN, "w", encoding="ascii") as file:
                file.write(f"{wanted} {int(passes) - 1} {action}")
        elif wanted == name:
            os.unlink(PLAN)
            os.kill(os.getpid(), signal.SIGSTOP if action == "stop" else signal.SIGKILL)
    except (FileNotFoundError, ValueError):
        return  # no plan now, or one that is just being written
