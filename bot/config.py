"""The one TOML file: its tables, and every default with its reason. docs/config.md is made of this.

Units end the names. Relative paths are below `state_dir`; a relative `state_dir` is below the
folder that holds the virtual environment (the checkout), wherever the command is typed.
"""

import hashlib
import sys
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, field

Name = Annotated[str, Meta(pattern=r"^[a-z][a-z0-9_-]{0,30}$")]
Count = Annotated[int, Meta(ge=1, le=10_000_000)]
Milliseconds = Annotated[int, Meta(ge=1, le=86_400_000)]
Linger = Annotated[int, Meta(ge=0, le=10_000)]
Seconds = Annotated[int, Meta(ge=1, le=86_400)]
Timeframe = Literal["1m", "3m", "5m", "15m", "30m", "1h", "2h", "4h", "1d"]


class Table(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """Base of all tables: an unknown key is an error."""


class Channel(Table, kw_only=True):
    """One ZeroMQ channel. Endpoints are tcp on loopback or ipc in a folder of mode 0700."""

    endpoint: Annotated[str, Meta(description="where the receiving or publishing side binds")]
    hwm: Annotated[Count, Meta(description="messages queued per peer before PUB drops or PUSH refuses")]
    linger_ms: Annotated[Linger, Meta(description="how long a closing socket may keep the process")]


class BusConfig(Table, kw_only=True):
    """The three channels between the processes."""

    ticks: Annotated[
        Channel,
        Meta(description="gateway -> strategies, executor. 100,000 Ticks (about 10 MB) hold 8 s of the "
             "worst burst recorded (1,131 frames in 100 ms); lingering over old prices helps nobody"),
    ] = Channel(endpoint="tcp://127.0.0.1:5555", hwm=100_000, linger_ms=0)
    signals: Annotated[
        Channel,
        Meta(description="strategies -> executor. The outbox keeps what the socket loses, so the queue "
             "is short (a long one only holds expired signals) and nothing lingers. `{strategy}` in an "
             "ipc endpoint gives each strategy an endpoint of its own, which is then its identity"),
    ] = Channel(endpoint="tcp://127.0.0.1:5556", hwm=1_000, linger_ms=0)
    reports: Annotated[
        Channel,
        Meta(description="executor -> strategies. The position snapshot each second makes good what is "
             "dropped; 200 ms let the last outcomes of a clean stop leave"),
    ] = Channel(endpoint="tcp://127.0.0.1:5557", hwm=10_000, linger_ms=200)
    zmtp_heartbeat_ms: Annotated[
        Milliseconds, Meta(description="ZMTP ping interval: finds dead peers, not hung ones")] = 1_000
    zmtp_timeout_ms: Annotated[
        Milliseconds, Meta(description="a peer silent for three pings is disconnected")] = 3_000
    message_bytes_max: Annotated[
        Annotated[int, Meta(ge=1_024, le=16_777_216)],
        Meta(description="larger messages close their sender's connection; 1,500 candles take 90 kB")] = 262_144
    heartbeat_ms: Annotated[
        Milliseconds, Meta(description="publishers beat each second, so silence shows within three")] = 1_000
    silence_ms: Annotated[
        Milliseconds, Meta(description="a publisher that sent nothing for three beats counts as dead")] = 3_000


class ExchangeConfig(Table, kw_only=True):
    """The exchange and the account. Overriding the URLs overrides every endpoint."""

    id: Annotated[str, Meta(description="ccxt's name of the exchange")] = "binanceusdm"
    rest_url: Annotated[str, Meta(description="base of every REST endpoint, without a path")]
    ws_url: Annotated[str, Meta(description="base of every websocket endpoint, without a path")]
    account: Annotated[Name, Meta(description="a name of yours; the journal is stamped with it")] = "main"
    api_key_file: Annotated[str, Meta(description="file of mode 0400 or 0600 that holds the API key")]
    api_secret_file: Annotated[str, Meta(description="file of mode 0400 or 0600 that holds the secret")]
    recv_window_ms: Annotated[
        Annotated[int, Meta(ge=500, le=60_000)],
        Meta(description="the exchange refuses an order older than this: the fence after which no first "
             "delivery is possible; the exchange's own default is 5,000")] = 3_000
    connect_timeout_ms: Annotated[Milliseconds, Meta(description="to open a connection, TLS included")] = 3_000
    request_timeout_ms: Annotated[
        Milliseconds, Meta(description="without an answer for this long an outcome is unknown")] = 5_000


class GatewayConfig(Table, kw_only=True):
    """Market data in, Ticks out."""

    symbols: Annotated[
        tuple[str, ...], Meta(description="feed these too, beside the symbols of the strategies")] = ()
    reconnect_ms_min: Annotated[Milliseconds, Meta(description="first wait after a lost connection")] = 250
    reconnect_ms_max: Annotated[
        Milliseconds, Meta(description="waits double up to this: 300 connections per 5 min are allowed")] = 15_000
    stale_ms: Annotated[
        Milliseconds, Meta(description="no progress of a symbol's mark price for this long is a dead feed; "
             "the exchange sends one each second even in a quiet market")] = 5_000
    clock_check_s: Annotated[Seconds, Meta(description="how often the exchange's clock is measured")] = 30
    snapshot_s: Annotated[Seconds, Meta(description="how often Snapshots are repeated for late joiners")] = 30
    history_count_max: Annotated[
        Annotated[int, Meta(ge=1, le=1_500)],
        Meta(description="candles a strategy may ask for; 1,500 is the exchange's limit of one request")] = 1_500


class StrategyConfig(Table, kw_only=True):
    """One strategy: a process of its own. The table's name is the strategy's name."""

    class_path: Annotated[str, Meta(description="`package.module:ClassName` on the Python path",
                                    pattern=r"^[\w.]+:\w+$")] = field(name="class")
    symbols: Annotated[tuple[str, ...], Meta(min_length=1, description="it trades these, alone")]
    listen: Annotated[tuple[str, ...], Meta(description="it sees these symbols' Ticks too")] = ()
    settings: Annotated[dict[str, Any], Meta(description="handed to the class as they are")] = {}
    signal_ttl_ms: Annotated[
        Milliseconds, Meta(description="a signal not acted on by then is `expired`")] = 5_000
    resend_ms: Annotated[
        Milliseconds, Meta(description="an unacknowledged signal is sent again after this")] = 500
    signals_per_s_max: Annotated[
        Count, Meta(description="a looping strategy is held back here; the newest target waits")] = 2
    outbox_max: Annotated[
        Count, Meta(description="unacknowledged signals kept; one more is refused, counted and logged")] = 1_000


class ExecutorConfig(Table, kw_only=True):
    """Signals in, orders out."""

    reconcile_s: Annotated[Seconds, Meta(description="books are compared with the exchange this often")] = 30
    resolve_ms: Annotated[
        Milliseconds, Meta(description="first wait between queries for an unknown order; doubles")] = 250
    fence_margin_ms: Annotated[
        Milliseconds, Meta(description="added to recv_window_ms before an order can count as absent")] = 1_000
    absent_after_s: Annotated[
        Seconds, Meta(description="an unknown order must be missed over this span; the exchange's query "
             "side was seen lagging for minutes")] = 300
    unprotected_s_max: Annotated[
        Seconds, Meta(description="a position that should have a stop and has none is closed after this")] = 10
    snapshot_ms: Annotated[Milliseconds, Meta(description="positions are reported this often")] = 1_000
    clock_check_s: Annotated[Seconds, Meta(description="how often the exchange's clock is measured")] = 30


class LimitsConfig(Table, kw_only=True):
    """Hard limits, per order and per symbol. None has an unlimited default: four must be given."""

    order_notional_max: Annotated[Decimal, Meta(description="of one order, in the settlement currency")]
    position_notional_max: Annotated[
        Decimal, Meta(description="of one symbol's position with all open and unknown orders, likewise")]
    price_collar_pct: Annotated[
        Decimal, Meta(description="refuse when the best price is further from the mark than this")]
    orders_per_minute_max: Annotated[
        Annotated[int, Meta(ge=1, le=1_200)],
        Meta(description="entries per minute over all symbols; the exchange allows 1,200 orders")]
    signal_age_ms_max: Annotated[
        Milliseconds, Meta(description="since the signal was made; a healthy path takes a few")] = 2_000
    tick_age_ms_max: Annotated[
        Milliseconds, Meta(description="of the Tick decided on, and of the mark, by the exchange's clock")] = 3_000


class JournalConfig(Table, kw_only=True):
    """The executor's memory."""

    path: Annotated[str, Meta(description="SQLite file; its folder also holds the lock")] = "journal.db"
    checkpoint_events: Annotated[
        Count, Meta(description="events between checkpoints: a start folds at most this many (about 0.3 s)")] = 20_000


class LogConfig(Table, kw_only=True):
    """JSON lines on stdout."""

    level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], Meta(description="least severe kept")] = "INFO"


class PaperAccount(Table, kw_only=True):
    """One account of the paper exchange."""

    api_key_file: str
    api_secret_file: str
    balance: Annotated[Decimal, Meta(description="USDT at its first start")] = Decimal(10_000)


class PaperConfig(Table, kw_only=True):
    """The local paper exchange (paper mode only)."""

    bind: Annotated[str, Meta(description="host:port, loopback only")] = "127.0.0.1:5560"
    state: Annotated[str, Meta(description="its ledger, which survives kill -9")] = "paper.db"
    symbols: Annotated[tuple[str, ...], Meta(min_length=1, description="contracts it lists")] = (
        "BTC/USDT:USDT", "ETH/USDT:USDT")
    market: Annotated[Literal["synthetic", "recording"], Meta(description="where prices come from")] = "synthetic"
    seed: Annotated[int, Meta(description="same seed, same synthetic market")] = 1
    recording: Annotated[str, Meta(description="file of raw frames, for `market = \"recording\"`")] = ""
    playback: Annotated[
        Literal["raw", "rebased"],
        Meta(description="raw: bytes as recorded, no trading; rebased: times and ids shifted, loops")] = "rebased"
    speed: Annotated[
        Decimal, Meta(description="of raw playback: 1 as recorded, 0 as fast as it goes")] = Decimal(1)
    latency_ms: Annotated[int, Meta(ge=0, le=10_000, description="from request to matching engine")] = 5
    taker_fee: Annotated[Decimal, Meta(description="of the notional")] = Decimal("0.0005")
    maker_fee: Annotated[Decimal, Meta(description="of the notional")] = Decimal("0.0002")
    accounts: Annotated[dict[str, PaperAccount], Meta(description="by name")] = {}


class Config(Table, kw_only=True):
    """The whole file."""

    mode: Annotated[
        Literal["paper", "testnet", "live"],
        Meta(description="stands in every status; paper must be loopback, live must not")]
    state_dir: Annotated[str, Meta(description="journal, outboxes, halt file, logs")] = "var"
    exchange: ExchangeConfig
    limits: LimitsConfig
    strategy: Annotated[dict[str, StrategyConfig], Meta(min_length=1)]
    bus: BusConfig = BusConfig()
    gateway: GatewayConfig = GatewayConfig()
    executor: ExecutorConfig = ExecutorConfig()
    journal: JournalConfig = JournalConfig()
    log: LogConfig = LogConfig()
    paper: PaperConfig | None = None

    @property
    def state_path(self) -> Path:
        return (Path(sys.prefix).parent / self.state_dir).resolve()

    def path(self, name: str) -> Path:
        """Return a configured path made absolute."""
        return self.state_path / name

    def symbols(self) -> tuple[str, ...]:
        """Return every symbol that is fed, sorted."""
        wanted = set(self.gateway.symbols)
        for strategy in self.strategy.values():
            wanted.update(strategy.symbols, strategy.listen)
        return tuple(sorted(wanted))

    def owner_of(self, symbol: str) -> str | None:
        """Return the strategy that trades the symbol; there is at most one."""
        return next((n for n, s in self.strategy.items() if symbol in s.symbols), None)

    def fingerprint(self) -> str:
        """Return a short hash of the whole configuration, equal for equal meaning."""
        return hashlib.sha256(msgspec.json.encode(self, order="sorted")).hexdigest()[:12]
