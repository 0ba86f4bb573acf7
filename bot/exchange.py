"""The exchange: builds, signs and parses with ccxt; moves no byte itself. Edge to ccxt.

Requests leave through two connections that are passed in: one for orders and cancels, one for
queries. ccxt's own network code, rate limiter and exception classes are not used (exchange-facts 0).
"""

from decimal import Decimal
from typing import Any, Protocol

import msgspec

from bot.clock import Clock
from bot.config import ExchangeConfig
from bot.model import Candle, Instrument
from bot.orders import ExchangeFill, OrderRequest, OrderStatus
from bot.outcome import Answer


class Rest(Protocol):
    """One lane to the exchange; bot.connection.RestPool, or a simulator's."""

    async def request(self, method: str, url: str, headers: dict[str, str], body: bytes) -> Answer: ...


class SignedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """An order ready to leave. Its repr and `sent_text` hold no secret.

    timestamp_ms: server time of the signature. fence_ns: server time after which it can no longer be
    delivered for the first time.
    """

    client_order_id: str
    method: str
    url: str
    headers: dict[str, str]
    body: bytes
    timestamp_ms: int
    fence_ns: int

    @property
    def sent_text(self) -> str:
        """Return what leaves, without the signature: for the journal and `explain`."""
        raise NotImplementedError


class ExchangePosition(msgspec.Struct, frozen=True, kw_only=True):
    """A position as the exchange tells it. qty: signed contracts. leverage and margin_mode where told."""

    symbol: str
    qty: Decimal
    entry_price: Decimal
    mark_price: Decimal
    liquidation_price: Decimal | None
    leverage: Decimal | None
    margin_mode: str  # "cross", "isolated" or "" where the exchange does not say


class AccountSettings(msgspec.Struct, frozen=True, kw_only=True):
    """The account's modes and balances, in the settlement currency."""

    is_hedge_mode: bool
    is_multi_asset: bool
    can_trade: bool
    settle: str
    wallet_balance: Decimal
    available_balance: Decimal


class AccountChanged(msgspec.Struct, frozen=True, kw_only=True):
    """A private-stream word on balances and positions, or on settings (reason ACCOUNT_CONFIG_UPDATE).

    reason: the exchange's own (ORDER, FUNDING_FEE, ...). positions: signed contracts per symbol.
    """

    reason: str
    balances: dict[str, Decimal]
    positions: dict[str, Decimal]
    time_ns: int


class ListenKeyExpired(msgspec.Struct, frozen=True):
    """The private stream is dead although connected: a new listen key and connection are needed."""

    listen_key: str


class Unrecognized(msgspec.Struct, frozen=True):
    """A private frame, or part of one, that nobody here can read: log it, count it, go on."""

    reason: str
    raw: bytes


PrivateEvent = OrderStatus | ExchangeFill | AccountChanged | ListenKeyExpired | Unrecognized


class Exchange:
    """One account at one exchange. keys: (API key, secret), None for market data alone.

    Raises ConfigError for an exchange outside the tested table. Queries raise ExchangeError (status,
    code) on anything but a clean answer. banned_until_ns: by this host's wall clock, 0 when free.
    """

    instruments: dict[str, Instrument]  # by symbol, after load()
    used_weight_1m: int
    order_count_10s: int
    order_count_1m: int
    banned_until_ns: int

    def __init__(self, config: ExchangeConfig, clock: Clock, *, orders: Rest, queries: Rest,
                 keys: tuple[str, str] | None) -> None:
        raise NotImplementedError

    async def load(self) -> None:
        """Measure the clock and fetch the instruments."""
        raise NotImplementedError

    async def measure_clock(self, tries: int = 3) -> None:
        """Measure the exchange's clock; the fastest of a few round trips counts."""
        raise NotImplementedError

    @property
    def clock_offset_ns(self) -> int:
        """Return exchange clock minus this host's wall clock, now."""
        raise NotImplementedError

    def server_ns(self) -> int:
        """Return the exchange's time; does not step with the host's clock. Raises before measure_clock."""
        raise NotImplementedError

    async def candles(self, symbol: str, timeframe: str, count: int) -> list[Candle]:
        """Return the last closed candles, oldest first, at most 1,499."""
        raise NotImplementedError

    def build(self, request: OrderRequest, recv_window_ms: int | None = None) -> SignedRequest:
        """Build and sign an order; default window is the configured one.

        Raises InvariantError when what was built is not exactly what was asked, ExchangeError when
        ccxt refuses to build it (nothing has left in both cases).
        """
        raise NotImplementedError

    async def submit(self, signed: SignedRequest) -> Answer:
        """Send the order, once; bot.outcome.classify says what the answer proves."""
        raise NotImplementedError

    def answered_order(self, answer: Answer) -> OrderStatus | None:
        """Return the order an accepted answer describes, None when it cannot be read."""
        raise NotImplementedError

    async def cancel(self, symbol: str, client_order_id: str, *, is_conditional: bool) -> Answer:
        """Send a cancel, once; bot.outcome.classify_cancel says what the answer proves."""
        raise NotImplementedError

    async def order(self, symbol: str, client_order_id: str, *, is_conditional: bool) -> OrderStatus | None:
        """Return the order, or None when the exchange says that it does not know it.

        A conditional order that was triggered is told with the end of the order it turned into.
        """
        raise NotImplementedError

    async def open_orders(self, symbol: str | None = None) -> list[OrderStatus]:
        """Return open orders, plain and conditional."""
        raise NotImplementedError

    async def orders_since(self, symbol: str, start_ns: int) -> list[OrderStatus]:
        """Return all orders, plain and conditional, made since start_ns (exchange clock)."""
        raise NotImplementedError

    async def fills_since(self, symbol: str, *, from_trade_id: int | None = None,
                          start_ns: int | None = None) -> list[ExchangeFill]:
        """Return fills, oldest first, from a trade id on or since start_ns (exchange clock)."""
        raise NotImplementedError

    async def positions(self) -> dict[str, ExchangePosition]:
        """Return the positions that are not zero, by symbol. Raises ExchangeError in hedge mode."""
        raise NotImplementedError

    async def account(self, settle: str = "USDT") -> AccountSettings:
        """Return the account's modes and its balance in one currency."""
        raise NotImplementedError

    async def listen_key(self) -> str:
        """Return a key for the private stream, good for 60 minutes; extends one that lives."""
        raise NotImplementedError

    async def keep_listen_key(self) -> None:
        """Extend the key by 60 minutes. Raises ExchangeError; code -1125: take a new key."""
        raise NotImplementedError

    def private_url(self, listen_key: str) -> str:
        """Return the address of the private stream."""
        raise NotImplementedError

    def market_urls(self, streams: list[str]) -> list[str]:
        """Return the addresses that together carry the combined streams, one per class of data."""
        raise NotImplementedError

    def parse_private(self, raw: bytes) -> list[PrivateEvent]:
        """Return what a private frame says; never raises. A trade gives its order's status, then the fill."""
        raise NotImplementedError
