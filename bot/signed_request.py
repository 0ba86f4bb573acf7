"""An order as it leaves: signed bytes, read back and held against what was asked. Pure."""

from decimal import Decimal
from urllib.parse import parse_qsl, urlsplit

import msgspec

from bot.errors import InvariantError
from bot.orders import OrderRequest

TYPES = {"market": "MARKET", "stop": "STOP_MARKET", "take_profit": "TAKE_PROFIT_MARKET"}


class SignedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """An order ready to leave. Its repr and sent_text hold no secret.

    timestamp_ms: server time of the signature. fence_ns: server time after which it can no longer be
    delivered for the first time.
    """

    client_order_id: str
    url: str
    headers: dict[str, str]
    body: bytes
    timestamp_ms: int
    fence_ns: int

    @property
    def sent_text(self) -> str:
        """Return what leaves, without the signature: for the journal and `explain`."""
        return f"POST {urlsplit(self.url).path} {self.body.decode().split('&signature=')[0]}"

    def __repr__(self) -> str:
        return f"SignedRequest({self.sent_text})"


def check_built(request: OrderRequest, exchange_symbol: str, built: SignedRequest, window_ms: int) -> None:
    """Raise InvariantError unless what leaves, read back from its bytes, is what was asked and no more."""
    name, resting = f"order {request.client_order_id}", request.is_conditional
    if resting and not (request.reduce_only and request.trigger_price):
        raise InvariantError(f"{name}: must be reduce-only and have a trigger price; was {request}")
    wanted: dict[str, str | Decimal | None] = {
        "symbol": exchange_symbol, "side": request.side.upper(), "type": TYPES[request.type],
        "quantity": request.qty, "timestamp": str(built.timestamp_ms), "recvWindow": str(window_ms),
        "newOrderRespType": "RESULT", "reduceOnly": "true" if request.reduce_only else None,
        "clientAlgoId" if resting else "newClientOrderId": request.client_order_id}
    if resting:
        wanted |= {"algoType": "CONDITIONAL", "workingType": "MARK_PRICE",
                   "triggerPrice": request.trigger_price}
    sent = dict(parse_qsl(built.body.decode(), keep_blank_values=True))
    for key in wanted.keys() | sent.keys() - {"signature"}:
        want, was = wanted.get(key), sent.get(key)
        if (Decimal(was) if isinstance(want, Decimal) and was else was) != want:
            raise InvariantError(f"{name}: {key} must be {want}; was {was}")
    if urlsplit(built.url).path != ("/fapi/v1/algoOrder" if resting else "/fapi/v1/order"):
        raise InvariantError(f"{name}: would go to {urlsplit(built.url).path}")
