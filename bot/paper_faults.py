"""The paper exchange's faults: what is to go wrong with which request or stream, told to `/paper/...`.

Deterministic: a fault is for the next, or after `skip` the n-th, request of a kind. Example, the
answer to the second order from now is lost although the order is executed:
curl -d '{"match": "POST /fapi/v1/order", "skip": 1, "do": "lose_answer"}' 127.0.0.1:5560/paper/faults
"""

from collections.abc import Callable
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from msgspec import Meta

from bot.paper_engine import Engine
from bot.paper_model import Limits, Order, Refused, Side, refuse_if
from bot.paper_shapes import account_json

T = TypeVar("T")
Count = Annotated[int, Meta(ge=0, le=1_000_000)]
Milliseconds = Annotated[int, Meta(ge=0, le=86_400_000)]


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


class ManualTrade(msgspec.Struct, forbid_unknown_fields=True):
    """A person trades on the account, behind the bot's back (POST /paper/trade)."""

    account: str
    symbol: str
    side: Side
    qty: Decimal
    reduce_only: bool = False


class Forced(msgspec.Struct, forbid_unknown_fields=True):
    """The exchange closes a position (POST /paper/liquidate), or qty of it (POST /paper/adl)."""

    account: str
    symbol: str
    qty: Decimal | None = None


class Listing(msgspec.Struct, forbid_unknown_fields=True):
    """A listing changes (POST /paper/symbol). filters: {"LOT_SIZE": {"stepSize": "0.01"}}.

    A status other than TRADING refuses orders; SETTLING and CLOSE end orders and positions too, and what is
    closed is not listed any more.
    """

    symbol: str
    status: Literal["PENDING_TRADING", "TRADING", "PRE_SETTLE", "SETTLING", "CLOSE"] = "TRADING"
    filters: dict[str, dict[str, str]] = {}


class Mark(msgspec.Struct, forbid_unknown_fields=True):
    """The mark price leaves the market by so much, until told otherwise (POST /paper/mark)."""

    symbol: str
    offset_pct: Annotated[float, Meta(ge=-99, le=1_000)]


class Funding(msgspec.Struct, forbid_unknown_fields=True):
    """Funding is settled now, at this rate (POST /paper/funding)."""

    account: str
    rate: Decimal


class ClockFault(msgspec.Struct, forbid_unknown_fields=True):
    """The exchange's clock is off by this much (POST /paper/clock)."""

    offset_ms: Annotated[int, Meta(ge=-86_400_000, le=86_400_000)]


class Faults:
    """The faults that wait, first come first taken."""

    def __init__(self) -> None:
        self.waiting: list[Fault] = []

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


class Control:
    """What /paper/... answers: faults in, and the truth out."""

    def __init__(self, engine: Engine, faults: Faults, inject: Callable[[StreamFault], int]) -> None:
        self.engine, self.faults, self.inject = engine, faults, inject

    def answer(self, request: str, body: str) -> tuple[int, Any]:
        """Serve one control request; return HTTP status and the value to send."""
        try:
            return 200, self._do(request, body)
        except (msgspec.MsgspecError, KeyError, ValueError, ArithmeticError) as error:
            return 400, {"code": -1102, "msg": str(error)}
        except Refused as refusal:
            return refusal.status, {"code": refusal.code, "msg": refusal.text}

    def _do(self, request: str, body: str) -> Any:
        engine, ledger = self.engine, self.engine.ledger
        match request:
            case "POST /paper/faults":
                self.faults.waiting.append(msgspec.json.decode(body, type=Fault))
            case "DELETE /paper/faults":
                self.faults.waiting.clear()
            case "GET /paper/faults":
                return self.faults.waiting
            case "POST /paper/stream":
                return {"connections": self.inject(msgspec.json.decode(body, type=StreamFault))}
            case "POST /paper/clock":
                engine.offset_ms = msgspec.json.decode(body, type=ClockFault).offset_ms
            case "POST /paper/limits":
                engine.limits = msgspec.json.decode(body, type=Limits)
            case "POST /paper/liquidate" | "POST /paper/adl":
                forced = self._known(body, Forced)
                kind = "adl" if request.endswith("adl") else "liquidation"
                engine.force(kind, forced.account, forced.symbol, forced.qty)
            case "POST /paper/symbol":
                listing = self._known(body, Listing)
                engine.change_symbol(listing.symbol, listing.status, listing.filters)
            case "POST /paper/mark":
                mark = self._known(body, Mark)
                engine.feed(mark.symbol).mark_factor = 1 + mark.offset_pct / 100
            case "POST /paper/funding":
                funding = self._known(body, Funding)
                refuse_if((not -1 <= funding.rate <= 1, -1130, "The rate must be within -1 and 1."))
                engine.see_prices()
                engine.fund(funding.account, funding.rate)
            case "POST /paper/trade":
                wish = self._known(body, ManualTrade)
                return engine.place(Order(
                    account=wish.account, symbol=wish.symbol, client_id=f"web_{engine.clock.token(20)}",
                    side=wish.side, type="MARKET", qty=wish.qty, reduce_only=wish.reduce_only))
            case "GET /paper/levels":
                return {symbol: engine.market.levels(symbol) for symbol in ledger.rules}
            case "GET /paper/state":
                engine.see_prices()
                return {name: {**account_json(ledger, name, 2), "orders": ledger.mine(name, "order"),
                               "algos": ledger.mine(name, "algo")} for name in ledger.accounts}
            case _:
                raise Refused(-5000, f"{request} is no control of the paper exchange", 404)
        return {}

    def _known(self, body: str, type_: type[T]) -> T:
        wish, ledger = msgspec.json.decode(body, type=type_), self.engine.ledger
        for name, known in (("symbol", ledger.rules), ("account", ledger.accounts)):
            if getattr(wish, name, None) not in (None, *known):
                raise Refused(-1121, f"Invalid {name}; known are {', '.join(known)}.")
        return wish
