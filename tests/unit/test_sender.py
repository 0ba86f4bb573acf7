"""The last step before the exchange: what a halt keeps back, asked when the first byte is about to leave."""

import asyncio
from types import SimpleNamespace

import pytest

from bot.halt import HaltFiles
from bot.sender import OrderSender
from tests.factory import BTC, ETH, HandClock

SCOPES = ["all", "strategy:levels", f"symbol:{BTC}", "strategy:other", f"symbol:{ETH}"]
LEGS = {"open": True, "reduce": True, "stop": False, "take_profit": False, "close": False, "flatten": False}


def send(exchange, halts, leg, changed):
    """Send an order; return why the books are to be compared."""
    asked = []
    order = SimpleNamespace(id="th1", leg=leg, strategy="levels", signal="", state="INTENDED",
                            request=SimpleNamespace(symbol=BTC))
    keeper = SimpleNamespace(books=SimpleNamespace(book=lambda _: SimpleNamespace(signals=[])),
                             record=lambda *_: None, change=lambda *args, **_: changed.append(args[1]))
    sender = OrderSender(SimpleNamespace(info=lambda *_, **__: None), exchange=exchange, keeper=keeper,
                         halts=halts, wake=lambda: None, halt=lambda *_: None,
                         reconciler=SimpleNamespace(sending={"th1"}, fences={}, request=asked.append))
    asyncio.run(sender.send_market_order(order))
    return asked


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize(("leg", "is_haltable"), LEGS.items())
def test_order_about_to_leave_meets_the_halt_that_was_set_just_now(tmp_path, scope, leg, is_haltable):
    halts, said, changed = HaltFiles(tmp_path), [], []

    class Exchange:
        def build(self, request):
            return SimpleNamespace(fence_ns=0, sent_text="")

        async def submit(self, signed, may_send):
            said.append(may_send())
            halts.set(scope, who="anna", why="odd fills", clock=HandClock())
            said.append(may_send())
            return SimpleNamespace(is_sent=False, sent_ns=0, status=0, body=b"", error=said[-1],
                                   received_ns=0, headers={})

    send(Exchange(), halts, leg, changed)
    is_covered = is_haltable and "other" not in scope and ETH not in scope
    assert said == ["", "halted by anna: odd fills" if is_covered else ""]
    assert changed == ["not_sent"], "what never left is absent at once"


def test_close_of_what_the_exchange_does_not_hold_has_the_books_compared(tmp_path):
    class Exchange:
        def build(self, request):
            return SimpleNamespace(fence_ns=0, sent_text="")

        async def submit(self, signed, may_send):
            return SimpleNamespace(is_sent=True, sent_ns=0, status=400, error="", received_ns=0, headers={},
                                   body=b'{"code": -2022, "msg": "ReduceOnly Order is rejected."}')
    changed = []
    assert send(Exchange(), HaltFiles(tmp_path), "stop", changed) == ["nothing to reduce"]
    assert changed == ["reject"]
