"""The paper exchange's faults, told to `/paper/...`; docs/paper.md says what each does, with an example."""

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
Status = Literal["PENDING_TRADING", "TRADING", "PRE_SETTLE", "SETTLING", "CLOSE"]


class Fault(msgspec.Struct, forbid_unknown_fields=True):
    """A fault of the next request, or after `skip` the n-th, that matches "METHOD path" (* is a wildcard)."""

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
    """A fault of the open websockets that carry a stream: match is "btcusdt@trade" or "user:NAME"."""

    match: str
    do: Literal["gap", "reorder", "freeze", "half_open", "close", "expire", "age"]
    count: Count = 1
    duration_ms: Milliseconds = 0


def told(*fields: Any) -> Any:
    """Make the type of what a control is told: (name, type), and a default where it need not be."""
    return msgspec.defstruct("Told", fields, forbid_unknown_fields=True)


ACCOUNT, SYMBOL = ("account", str), ("symbol", str)
CONTROLS = {
    "faults": Fault, "stream": StreamFault, "limits": Limits,
    "clock": told(("offset_ms", Annotated[int, Meta(ge=-86_400_000, le=86_400_000)])),
    "mark": told(SYMBOL, ("offset_pct", Annotated[float, Meta(ge=-99, le=1_000)])),
    "funding": told(ACCOUNT, ("rate", Decimal)), "liquidate": told(ACCOUNT, SYMBOL),
    "symbol": told(SYMBOL, ("status", Status, "TRADING"), ("filters", dict[str, dict[str, str]], {})),
    "adl": told(ACCOUNT, SYMBOL, ("qty", Decimal | None, None)),
    "trade": told(ACCOUNT, SYMBOL, ("side", Side), ("qty", Decimal), ("reduce_only", bool, False))}


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
        """Serve one control request: HTTP status and the value to send."""
        try:
            self.engine.wake()
            value = self._do(request, self._wish(request, body))
            self.engine.commit()
            return 200, value
        except (msgspec.MsgspecError, KeyError, ValueError, ArithmeticError) as error:
            return 400, {"code": -1102, "msg": str(error)}
        except Refused as refusal:
            return refusal.status, refusal.body

    def _wish(self, request: str, body: str) -> Any:
        type_ = CONTROLS.get(request.removeprefix("POST /paper/"))
        wish: Any = msgspec.json.decode(body, type=type_) if type_ else None
        ledger = self.engine.ledger
        for name, known in (("symbol", ledger.contracts), ("account", ledger.accounts)):
            if (value := getattr(wish, name, None)) is not None and value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}; was {value}")
        if abs(getattr(wish, "rate", 0)) > 1:
            raise ValueError(f"rate must be within -1 and 1; was {wish.rate}")
        return wish

    def _do(self, request: str, wish: Any) -> Any:
        engine, ledger = self.engine, self.engine.ledger
        match request:
            case "POST /paper/faults":
                self.waiting.append(wish)
            case "DELETE /paper/faults":
                self.waiting.clear()
            case "GET /paper/faults":
                return self.waiting
            case "POST /paper/stream":
                return {"connections": self.inject(wish)}
            case "POST /paper/limits":
                engine.limits = wish
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
                    side=wish.side, type="MARKET", qty=wish.qty, reduce_only=wish.reduce_only))
            case "GET /paper/state":
                return {name: {**account_json(ledger, name, 2), "orders": ledger.mine(name, "order"),
                               "algos": ledger.mine(name, "algo")} for name in ledger.accounts}
            case _:
                raise Refused(-5000, *request.partition(" ")[::-2])
        return {}
