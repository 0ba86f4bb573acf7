"""The paper exchange's faults: what is to go wrong with which request or stream, told to `/paper/...`.

Deterministic: a fault is for the next, or after `skip` the n-th, request of a kind. Example, the
answer to the second order from now is lost although the order is executed:
curl -d '{"match": "POST /fapi/v1/order", "skip": 1, "do": "lose_answer"}' 127.0.0.1:5560/paper/faults
docs/paper.md has an example of each.
"""

from collections.abc import Callable
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from bot.paper_engine import Engine
from bot.paper_model import Limits, Order, Refused, Side
from bot.paper_shapes import account_json

Count = Annotated[int, Meta(ge=0, le=1_000_000)]
Milliseconds = Annotated[int, Meta(ge=0, le=86_400_000)]
# What each other control must be told, and may be.
FIELDS = {"clock": ("offset_ms", ""), "mark": ("symbol offset_pct", ""), "funding": ("account rate", ""),
          "symbol": ("symbol", "status filters"), "liquidate": ("account symbol", ""),
          "adl": ("account symbol", "qty"), "trade": ("account symbol side qty", "reduce_only")}


class Fault(msgspec.Struct, forbid_unknown_fields=True):
    """One fault (POST /paper/faults). match: "METHOD path", with * as wildcard.

    do: lose_request (closed, not executed), hang (neither executed nor answered), delay (executed
    delay_ms late), duplicate (executed twice, the first answer returned), lose_answer (executed,
    closed without an answer), delay_answer, truncate (half of the body, then closed), answer
    (status, body and headers as given; executed all the same with is_executed), limbo (-1007 at once;
    with is_executed executed delay_ms later, whatever its recvWindow said), lag (of a query: answered
    as if what is younger than delay_ms did not exist).
    """

    match: str
    do: Literal["lose_request", "hang", "delay", "duplicate", "lose_answer", "delay_answer", "truncate",
                "answer", "limbo", "lag"]
    skip: Count = 0
    times: Annotated[int, Meta(ge=1, le=1_000_000)] = 1
    delay_ms: Milliseconds = 0
    status: Annotated[int, Meta(ge=200, le=599)] = 200
    body: str = ""
    headers: dict[str, str] = {}
    is_executed: bool = False


class StreamFault(msgspec.Struct, forbid_unknown_fields=True):
    """One fault of the websocket connections that are open now (POST /paper/stream).

    match: a stream they carry, "btcusdt@trade" or "user:NAME". do: gap (the next `count` frames are
    lost), reorder (the next `count` frames are sent together, last first), freeze (nothing is sent for
    duration_ms, and is lost), half_open (nothing is sent, read or answered any more), close (the
    connection is reset), expire (listenKeyExpired is sent), age (it is older by duration_ms: after
    24 hours the exchange closes it).
    """

    match: str
    do: Literal["gap", "reorder", "freeze", "half_open", "close", "expire", "age"]
    count: Count = 1
    duration_ms: Milliseconds = 0


class Wish(msgspec.Struct):
    """What the other controls are told: FIELDS says which of it. The exchange's clock may go back a day."""

    account: str = ""
    symbol: str = ""
    side: Side = "BUY"
    qty: Decimal | None = None
    reduce_only: bool = False
    status: Literal["PENDING_TRADING", "TRADING", "PRE_SETTLE", "SETTLING", "CLOSE"] = "TRADING"
    filters: dict[str, dict[str, str]] = {}
    offset_pct: Annotated[float, Meta(ge=-99, le=1_000)] = 0
    offset_ms: Annotated[int, Meta(ge=-86_400_000, le=86_400_000)] = 0
    rate: Decimal = Decimal(0)


class Control:
    """What /paper/... answers: faults in, and the truth out. inject: see paper_stream's Hub."""

    def __init__(self, engine: Engine, inject: Callable[[StreamFault], int]) -> None:
        self.engine, self.inject = engine, inject
        self.waiting: list[Fault] = []  # first come first taken

    def take(self, request: str) -> Fault | None:
        """Return the fault of this request ("METHOD path"), counted down."""
        for fault in [fault for fault in self.waiting if fnmatchcase(request, fault.match)]:
            if fault.skip:
                fault.skip -= 1
                continue
            fault.times -= 1
            if not fault.times:
                self.waiting.remove(fault)
            return fault
        return None

    def answer(self, request: str, body: str) -> tuple[int, Any]:
        """Serve one control request; return HTTP status and the value to send."""
        try:
            self.engine.wake()
            value = self._do(request, body)
            self.engine.commit()
            return 200, value
        except (msgspec.MsgspecError, KeyError, ValueError, ArithmeticError) as error:
            return 400, {"code": -1102, "msg": str(error)}
        except Refused as refusal:
            return refusal.status, refusal.body

    def _do(self, request: str, body: str) -> Any:
        engine, ledger = self.engine, self.engine.ledger
        wish = self._wish(request.removeprefix("POST /paper/"), body)
        match request:
            case "POST /paper/faults":
                self.waiting.append(msgspec.json.decode(body, type=Fault))
            case "DELETE /paper/faults":
                self.waiting.clear()
            case "GET /paper/faults":
                return self.waiting
            case "POST /paper/stream":
                return {"connections": self.inject(msgspec.json.decode(body, type=StreamFault))}
            case "POST /paper/limits":
                engine.limits = msgspec.json.decode(body, type=Limits)
            case "POST /paper/clock":
                engine.offset_ms = wish.offset_ms
            case "POST /paper/mark":
                engine.feed(wish.symbol).mark_factor = 1 + Decimal(str(wish.offset_pct)) / 100
            case "POST /paper/funding":
                ledger.fund(wish.account, wish.rate)
            case "POST /paper/symbol":
                engine.change_symbol(wish.symbol, wish.status, wish.filters)
            case "POST /paper/liquidate":
                ledger.force("liquidation", wish.account, wish.symbol)
            case "POST /paper/adl":
                ledger.force("adl", wish.account, wish.symbol, wish.qty)
            case "POST /paper/trade":
                return engine.place(Order(
                    account=wish.account, symbol=wish.symbol, client_id=f"web_{engine.clock.token(20)}",
                    side=wish.side, type="MARKET", qty=wish.qty or Decimal(0), reduce_only=wish.reduce_only))
            case "GET /paper/state":
                return {name: {**account_json(ledger, name, 2), "orders": ledger.mine(name, "order"),
                               "algos": ledger.mine(name, "algo")} for name in ledger.accounts}
            case _:
                raise Refused(-5000, *request.partition(" ")[::-2])
        return {}

    def _wish(self, control: str, body: str) -> Wish:
        if control not in FIELDS:
            return Wish()
        told = msgspec.json.decode(body, type=dict[str, Any])
        must, may = (names.split() for names in FIELDS[control])
        if wrong := {*must} - told.keys() | told.keys() - {*must, *may}:
            raise ValueError(f"{control} must be told {must}, may be told {may}; was wrong: {sorted(wrong)}")
        wish = msgspec.convert(told, Wish)
        ledger = self.engine.ledger
        for name, known in (("symbol", ledger.contracts), ("account", ledger.accounts)):
            if name in must and getattr(wish, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; was {getattr(wish, name)}")
        if abs(wish.rate) > 1:
            raise ValueError(f"rate must be within -1 and 1; was {wish.rate}")
        return wish
