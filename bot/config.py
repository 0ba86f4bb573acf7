"""The one TOML file: its tables, and every default with its reason. docs/config.md is made of this.

Units end the names. Relative paths are below `state_dir`; a relative `state_dir` is below the
folder that holds the virtual environment (the checkout), wherever the command is typed.
"""

import hashlib
import sys
import zlib
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
Leverage = Annotated[int, Meta(ge=1, le=125)]
Timeframe = Literal["1m", "3m", "5m", "15m", "30m", "1h", "2h", "4h", "1d"]


SETTLE = "USDT"  # the one currency that balances, limits and the day's loss are in


class Table(msgspec.Struct, forbid_unknown_fields=True, kw_only=True, frozen=True):
    """Base of all tables: an unknown key is an error."""


class Channel(Table, kw_only=True, frozen=True):
    """One ZeroMQ channel. Endpoints are tcp on loopback or ipc in a folder of mode 0700."""

    endpoint: Annotated[str, Meta(description="where the publishing or pulling side binds, loopback only")]
    hwm: Annotated[Count, Meta(description="messages queued per peer; beyond it PUB drops and PUSH refuses")]
    linger_ms: Annotated[Linger, Meta(description="how long unsent messages may delay a process's end")]


class BusConfig(Table, kw_only=True, frozen=True):
    """The three channels between the processes."""

    ticks: Annotated[
        Channel, Meta(description="gateway -> strategies, executor. 100,000 Ticks (about 10 MB) hold 8 s of "
                      "the worst burst recorded (1,131 frames in 100 ms); nobody waits for old prices"),
    ] = Channel(endpoint="tcp://127.0.0.1:5555", hwm=100_000, linger_ms=0)
    signals: Annotated[
        Channel, Meta(description="strategies -> executor. The outbox keeps what the socket loses, so the "
                      "queue is short (a long one only holds expired signals) and nothing lingers. "
                      "`{strategy}` in an ipc endpoint gives each strategy an endpoint of its own, which is "
                      "then its identity"),
    ] = Channel(endpoint="tcp://127.0.0.1:5556", hwm=1_000, linger_ms=0)
    reports: Annotated[
        Channel, Meta(description="executor -> strategies. The position snapshot each second makes good what "
                      "is dropped; 200 ms let the last outcomes of a clean stop leave"),
    ] = Channel(endpoint="tcp://127.0.0.1:5557", hwm=10_000, linger_ms=200)
    zmtp_heartbeat_ms: Annotated[
        Milliseconds, Meta(description="peers are pinged this often: finds dead ones, not hung ones")] = 1_000
    zmtp_timeout_ms: Annotated[
        Milliseconds, Meta(description="a peer silent for three pings is disconnected")] = 3_000
    heartbeat_ms: Annotated[
        Milliseconds, Meta(description="each process beats this often: silence shows within seconds")] = 1_000
    silence_ms: Annotated[
        Milliseconds, Meta(description="a publisher that sent nothing for three beats is dead")] = 3_000


class ExchangeConfig(Table, kw_only=True, frozen=True):
    """The exchange and the account. Overriding the URLs overrides every endpoint."""

    id: Annotated[
        str, Meta(description="ccxt's name of the exchange; orders go to tested ones only")] = "binanceusdm"
    rest_url: Annotated[str, Meta(description="base of every REST endpoint, without a path: the exchange, "
                                  "its testnet, a proxy, or the paper exchange")]
    ws_url: Annotated[str, Meta(description="base of every websocket endpoint, without a path")]
    sapi_url: Annotated[str, Meta(description="base of the spot API, the only one that tells a key's rights: "
                                  "https://api.binance.com in live; empty: they are not looked at")] = ""
    account: Annotated[
        Name, Meta(description="a name of yours; the journal is stamped with exchange, URL and account, and "
                   "refuses another")] = "main"
    api_key_file: Annotated[str, Meta(description="file of mode 0400 or 0600 that holds the API key; never "
                                      "the key itself")]
    api_secret_file: Annotated[str, Meta(description="file of mode 0400 or 0600 that holds the secret")]
    recv_window_ms: Annotated[
        Annotated[int, Meta(ge=500, le=60_000)],
        Meta(description="the exchange refuses an order older than this: the fence after which no first "
             "delivery is possible; the exchange's own default is 5,000")] = 3_000
    instruments_s: Annotated[
        Seconds, Meta(description="how often the symbols' rules and status are read again; an order that "
                      "they refuse does it at once")] = 300
    connect_timeout_ms: Annotated[
        Milliseconds, Meta(description="to open a connection, TLS included: ten round trips around the "
                           "globe")] = 3_000
    request_timeout_ms: Annotated[
        Milliseconds, Meta(description="without an answer for this long an outcome is unknown; healthy ones "
                           "take less than 1,000")] = 5_000


class AccountConfig(Table, kw_only=True, frozen=True):
    """What the account must be set to at the exchange: read back and compared, never set from here."""

    margin_mode: Annotated[
        Literal["cross", "isolated"], Meta(description="of every traded symbol; another one locks it")
    ] = "cross"
    leverage: Annotated[
        Leverage, Meta(description="of every traded symbol; another one locks it. 20 is the exchange's "
                       "default")] = 20
    symbol_leverage: Annotated[dict[str, Leverage], Meta(description="of symbols that differ from it")] = {}
    is_multi_asset: Annotated[
        bool, Meta(description="whether all assets are margin for all positions; otherwise nothing "
                   "opens")] = False


class GatewayConfig(Table, kw_only=True, frozen=True):
    """Market data in, Ticks out."""

    symbols: Annotated[
        tuple[str, ...], Meta(description="feed these too, beside the symbols of the strategies")] = ()
    reconnect_ms_min: Annotated[
        Milliseconds, Meta(description="first wait after a lost connection: most are back at once")] = 250
    reconnect_ms_max: Annotated[
        Milliseconds, Meta(description="waits double up to this: the exchange allows 300 connections per "
                           "5 min")] = 15_000
    stale_ms: Annotated[
        Milliseconds, Meta(description="no progress of a symbol's mark price for this long is a dead feed; "
                           "the exchange sends one each second even in a quiet market")] = 5_000
    clock_check_s: Annotated[
        Seconds, Meta(description="how often the exchange's clock is measured; a free-running quartz "
                      "(100 ppm) drifts 3 ms in this time")] = 30
    snapshot_s: Annotated[
        Seconds, Meta(description="how often Snapshots are repeated, for those who missed theirs")] = 30
    history_count_max: Annotated[
        int, Meta(ge=1, le=1_500, description="candles a strategy may ask for; 1,500 is the exchange's "
                  "limit of one request")] = 1_500


class StrategyConfig(Table, kw_only=True, frozen=True):
    """One strategy: a process of its own. The table's name is the strategy's name."""

    class_path: Annotated[str, Meta(description="`package.module:ClassName` on the Python path",
                                    pattern=r"^[\w.]+:\w+$")] = field(name="class")
    symbols: Annotated[
        tuple[str, ...], Meta(min_length=1, description="it trades these; a symbol has one strategy")]
    listen: Annotated[tuple[str, ...], Meta(description="it sees these symbols' Ticks too")] = ()
    settings: Annotated[
        dict[str, Any], Meta(description="handed to the class; numbers with a point are Decimal")] = {}
    signal_ttl_ms: Annotated[
        Milliseconds, Meta(description="a signal not acted on by then is `expired`; it outlives a restart of "
                           "the executor, not the price it was made at")] = 5_000
    resend_ms: Annotated[
        Milliseconds, Meta(description="an unacknowledged signal is sent again after this, then ever less "
                           "often, and at once to an executor that is new; a healthy acknowledgement takes "
                           "a few ms")] = 500
    signals_per_s_max: Annotated[
        Count, Meta(description="a looping strategy is held back here, before the journal sees it; the "
                    "newest target waits")] = 2
    metrics_port: Annotated[
        int, Meta(ge=0, le=65_535, description="where its metrics are; 0: `base_port` + 10 + a number made "
                  "of the name, so that none moves when another strategy comes or goes")] = 0
    outbox_max: Annotated[
        Count, Meta(description="unacknowledged signals kept, 8 min at the full rate without executor; one "
                    "more is refused, counted and logged")] = 1_000


class ExecutorConfig(Table, kw_only=True, frozen=True):
    """Signals in, orders out."""

    reconcile_s: Annotated[
        Annotated[int, Meta(ge=1, le=1_200)],
        Meta(description="books are compared with the exchange this often: a manual trade shows within a "
             "minute; the key of the private stream, which lives 60 minutes, is kept each time")] = 30
    resolve_ms: Annotated[
        Milliseconds, Meta(description="first wait between queries for an unknown order; it doubles, to "
                           "spare the request limit")] = 250
    fence_margin_ms: Annotated[
        Milliseconds, Meta(description="added to recv_window_ms before an order can count as absent, for the "
                           "error of the measured clock offset")] = 1_000
    absent_after_s: Annotated[
        Seconds, Meta(description="an unknown order must be missed over this span; the exchange's query "
             "side was seen lagging for minutes")] = 300
    unprotected_s_max: Annotated[
        Seconds, Meta(description="a position that should have a stop and has none is closed after "
                      "this; where that is later than the fence, a lost stop is placed again first")] = 10
    recover_s: Annotated[
        Seconds, Meta(description="after the last sign of a cause of REDUCING nothing opens for this long, "
                      "nor before the books were compared once more")] = 5
    canary_s: Annotated[
        Seconds, Meta(description="how often it is proven that the exchange takes a stop: an order far away, "
                      "canceled at once; while it is refused nothing opens")] = 300
    snapshot_ms: Annotated[
        Milliseconds, Meta(description="positions are reported this often, for late joiners")] = 1_000
    clock_check_s: Annotated[
        Seconds, Meta(description="how often the exchange's clock is measured; orders carry its time")] = 30


class LimitsConfig(Table, kw_only=True, frozen=True):
    """Hard limits, per order, per symbol and of all. None is unlimited by default: six must be given.

    SIGHUP takes in what became tighter at once; what became looser waits for the next start.
    """

    order_notional_max: Annotated[
        Decimal, Meta(description="size of one order at the mark price, in the settlement currency")]
    position_notional_max: Annotated[
        Decimal, Meta(description="size of a symbol's position with all open and unknown orders, likewise")]
    exposure_notional_max: Annotated[
        Decimal, Meta(description="size of all symbols' positions together, with all open and unknown "
                      "orders, long and short added up")]
    day_loss_max: Annotated[
        Decimal, Meta(description="loss of the UTC day that halts everything: realized, unrealized, fees and "
                      "funding, without what was paid in or out; a resume does not forget it")]
    leverage_max: Annotated[
        Decimal, Meta(description="all positions, counted like exposure_notional_max, over the account's "
                      "equity; at 5 a move of some 19 % against them all is the end")] = Decimal(5)
    liquidation_distance_pct_min: Annotated[
        Decimal, Meta(description="no entry while the exchange would liquidate the symbol's position at a "
                      "price nearer to the mark than this, in percent; the worst day moved BTC by 40")
    ] = Decimal(10)
    price_collar_pct: Annotated[
        Decimal, Meta(description="no entry when the best price is further from the mark than this, in "
                      "percent: then one of the two is wrong")]
    orders_per_minute_max: Annotated[
        Annotated[int, Meta(ge=1, le=1_200)],
        Meta(description="entries per minute over all symbols; the exchange allows 1,200 orders")]
    repeats_per_minute_max: Annotated[
        int, Meta(ge=1, le=1_200, description="entries of one symbol in the same direction per minute: a "
                  "strategy that repeats itself is held up before it adds up")] = 10
    open_orders_max: Annotated[
        int, Meta(ge=1, le=200, description="orders of ours that are not settled, exits included; a symbol "
                  "needs up to four, the exchange bears 200")] = 40
    mark_jump_pct_max: Annotated[
        Decimal, Meta(description="a mark price further than this from the one before, in percent, lets "
                      "nothing open in its symbol for recover_s: one of the two is wrong")] = Decimal(3)
    signal_age_ms_max: Annotated[
        Milliseconds, Meta(description="since the signal was made; a healthy path takes a few ms")] = 2_000
    tick_age_ms_max: Annotated[
        Milliseconds, Meta(description="of the Tick decided on, and of the mark, by the exchange's clock; "
                           "the mark comes once a second")] = 3_000


class JournalConfig(Table, kw_only=True, frozen=True):
    """The executor's memory."""

    path: Annotated[str, Meta(description="SQLite file, below state_dir")] = "journal.db"
    checkpoint_events: Annotated[
        Count, Meta(description="events between checkpoints: a start folds at most so many, 0.3 s")] = 20_000


class BackupConfig(Table, kw_only=True, frozen=True):
    """Encrypted copies of the journal (`botctl backup`). Neither keys nor this file are in them."""

    recipient: Annotated[
        str, Meta(pattern=r"^(age1[0-9a-z]{58})?$", description="age public key, of `botctl backup key`; its "
                  "private half stays off this host; empty: no backups are made")] = ""
    folder: Annotated[str, Meta(description="where they are, below state_dir")] = "backup"
    kept: Annotated[Count, Meta(description="how many stay; an older one goes only after a newer one was "
                                "restored and folded")] = 14
    size_mb_max: Annotated[
        Count, Meta(description="of all together; the oldest go first, the newest always stays")] = 2_000
    age_h_max: Annotated[
        Count, Meta(description="older, the newest good one is told of: one night and two hours")] = 26


class HealthConfig(Table, kw_only=True, frozen=True):
    """What health finds, kills and halts for. It looks at everything each second."""

    stuck_ms: Annotated[
        Milliseconds, Meta(description="a process that lives and has not beaten for so long is killed and "
                           "started again, at its start after three times this; healthy is 3,000")] = 10_000
    restarts_max: Annotated[
        Count, Meta(description="more crashes than this within restart_window_s are a loop: a strategy's "
                    "halts the strategy, any other's halts all; an operator's restarts do not count")] = 5
    restart_window_s: Annotated[Seconds, Meta(description="the window of restarts_max")] = 300
    restarts_per_day_max: Annotated[
        int, Meta(ge=1, le=49, description="likewise within 24 h: a loop too slow for restarts_max")] = 20
    memory_mb_max: Annotated[
        Count, Meta(description="a process that holds more is killed and started again; healthy ones hold "
                    "60 to 200")] = 1_000
    memory_growth_mb_per_h_max: Annotated[
        Count, Meta(description="growth over half an hour or more that is told of: at this rate "
                    "memory_mb_max is reached within a night")] = 100
    cpu_pct_max: Annotated[
        Count, Meta(description="of one core over half a minute; more is told of: ticks will be lost")] = 90
    descriptors_pct_max: Annotated[
        Count, Meta(description="of the process's limit of file descriptors; more is told of")] = 80
    disk_free_mb_min: Annotated[
        Count, Meta(description="free space where state_dir is; less is told of: logs and journal take at "
                    "most about this much")] = 1_000
    host_memory_mb_min: Annotated[
        Count, Meta(description="memory available on the host; less is told of: the kernel ends processes "
                    "when there is none")] = 200
    clock_offset_ms_max: Annotated[
        Count, Meta(description="between the host's clock and the exchange's; more is told of: orders carry "
                    "the exchange's time, but records do not")] = 500
    alert_url_file: Annotated[
        str, Meta(description="file of mode 0400 or 0600, below state_dir: the URL of a webhook that health "
                  "tells what cannot wait, without Prometheus; without the file nobody")] = "alert.url"
    alertmanager_url: Annotated[
        str, Meta(description="where `botctl alert` and the status page find the Alertmanager",
                  pattern=r"^http://(127\.0\.0\.1|localhost):\d+$")] = "http://127.0.0.1:9093"
    page_port: Annotated[
        int, Meta(ge=0, le=65_535, description="the status page, on loopback; 0: none. From elsewhere: "
                  "`ssh -L 9550:127.0.0.1:9550 host`")] = 9_550


class GuardConfig(Table, kw_only=True, frozen=True):
    """The dead-man's switch. Times count from the executor's last beat, in a crash loop from its start."""

    cancel_after_s: Annotated[
        Seconds, Meta(description="an executor silent for longer: guard cancels our orders that are not "
                      "reduce-only, stops stay; longer than the worst healthy restart, which is four times "
                      "stuck_ms and 20 s")] = 60
    flatten_after_s: Annotated[
        int, Meta(ge=0, le=86_400, description="silent for longer still: guard halts and flattens; 0: never, "
                  "the stops at the exchange are what protects")] = 0


class MetricsConfig(Table, kw_only=True, frozen=True):
    """Prometheus metrics: one loopback port per process. docs/metrics.md lists them."""

    base_port: Annotated[
        int, Meta(ge=0, le=65_000, description="gateway here, then executor, guard, health and paper; "
                  "strategies from 10 above on; 0: none")] = 9_560


class LogConfig(Table, kw_only=True, frozen=True):
    """JSON lines on stdout."""

    level: Annotated[
        Literal["DEBUG", "INFO", "WARNING", "ERROR"], Meta(description="the least severe kept")] = "INFO"


class UsersConfig(Table, kw_only=True, frozen=True):
    """Who runs what, on a host where supervisord is root. Empty: the one who starts it."""

    feed: Annotated[str, Meta(description="gateway and health: no keys")] = ""
    trade: Annotated[str, Meta(description="executor, guard and paper: they alone can read the keys")] = ""
    strategy: Annotated[
        str, Meta(description="`{strategy}` stands for the name: each strategy is a user of its own")] = ""


class PaperAccount(Table, kw_only=True, frozen=True):
    """One account of the paper exchange."""

    api_key_file: Annotated[str, Meta(description="file, 0400 or 0600; `make run` makes missing ones")]
    api_secret_file: Annotated[str, Meta(description="likewise")]
    balance: Annotated[Decimal, Meta(description="USDT at its first start")] = Decimal(10_000)


class PaperConfig(Table, kw_only=True, frozen=True):
    """The local paper exchange (paper mode only)."""

    bind: Annotated[str, Meta(description="host:port, loopback only")] = "127.0.0.1:5560"
    state: Annotated[str, Meta(description="its ledger, which survives kill -9")] = "paper.db"
    symbols: Annotated[tuple[str, ...], Meta(min_length=1, description="contracts it lists")] = (
        "BTC/USDT:USDT", "ETH/USDT:USDT")
    market: Annotated[
        Literal["synthetic", "recording"], Meta(description="where prices come from")] = "synthetic"
    seed: Annotated[int, Meta(ge=0, description="same seed, same synthetic market")] = 1
    recording: Annotated[str, Meta(description="file of raw frames, for `market = \"recording\"`")] = ""
    playback: Annotated[
        Literal["raw", "rebased"], Meta(description="raw: bytes as recorded, no trading; rebased: times and "
                                        "ids shifted, loops, trading at 1x")] = "rebased"
    speed: Annotated[
        Decimal, Meta(description="of raw playback: 1 as recorded, 0 as fast as it goes")] = Decimal(1)
    latency_ms: Annotated[int, Meta(ge=0, le=10_000, description="from request to matching engine; a host "
                                        "near the exchange sees about this")] = 5
    taker_fee: Annotated[
        Decimal, Meta(description="share of the notional; the exchange's first tier")] = Decimal("0.0005")
    maker_fee: Annotated[Decimal, Meta(description="likewise")] = Decimal("0.0002")
    accounts: Annotated[dict[str, PaperAccount], Meta(description="accounts by name, each with keys")] = {}


class Config(Table, kw_only=True, frozen=True):
    """The whole file."""

    mode: Annotated[
        Literal["paper", "testnet", "live"],
        Meta(description="stands in every status; paper must be on loopback, live must not")]
    state_dir: Annotated[
        str, Meta(description="journal, outboxes, halt files, logs; relative to the checkout")] = "var"
    exchange: ExchangeConfig
    limits: LimitsConfig
    strategy: Annotated[dict[str, StrategyConfig], Meta(min_length=1, max_length=50, description="by name")]
    account: AccountConfig = AccountConfig()
    bus: BusConfig = BusConfig()
    gateway: GatewayConfig = GatewayConfig()
    executor: ExecutorConfig = ExecutorConfig()
    journal: JournalConfig = JournalConfig()
    backup: BackupConfig = BackupConfig()
    health: HealthConfig = HealthConfig()
    guard: GuardConfig = GuardConfig()
    metrics: MetricsConfig = MetricsConfig()
    log: LogConfig = LogConfig()
    users: UsersConfig = UsersConfig()
    paper: PaperConfig | None = None

    @property
    def state_path(self) -> Path:
        return (Path(sys.prefix).parent / self.state_dir).resolve()

    def path(self, name: str) -> Path:
        """Return a configured path made absolute."""
        return self.state_path / name

    def run_path(self, process: str) -> Path:
        """Return the folder of a process's beat and lock. A strategy's is its own, with its outbox."""
        kind, _, name = process.partition("-")
        return self.state_path / "strategy" / name if kind == "strategy" else self.state_path / "run"

    def symbols(self) -> tuple[str, ...]:
        """Return every symbol that is fed, sorted."""
        wanted = set(self.gateway.symbols)
        for strategy in self.strategy.values():
            wanted.update(strategy.symbols, strategy.listen)
        return tuple(sorted(wanted))

    def owner_of(self, symbol: str) -> str | None:
        """Return the strategy that trades the symbol; there is at most one."""
        return next((n for n, s in self.strategy.items() if symbol in s.symbols), None)

    def metrics_port(self, process: str) -> int:
        """Return the port of a process's metrics, 0 for none."""
        base, fixed = self.metrics.base_port, ("gateway", "executor", "guard", "health", "paper")
        if not base:
            return 0
        if process in fixed:
            return base + fixed.index(process)
        name = process.partition("-")[2]
        return self.strategy[name].metrics_port or base + 10 + zlib.crc32(name.encode()) % 500

    def identity(self) -> dict[str, str]:
        """Return what a journal belongs to for life."""
        return {"exchange": self.exchange.id, "url": self.exchange.rest_url,
                "account": self.exchange.account, "mode": self.mode}

    def fingerprint(self, *, is_shared: bool = False) -> str:
        """Return a short hash of the configuration, equal for equal meaning.

        is_shared: of what all processes must have alike; strategies and limits may change while they run.
        """
        config = msgspec.structs.replace(self, strategy={}, limits=None) if is_shared else self
        return hashlib.sha256(msgspec.json.encode(config, order="sorted")).hexdigest()[:12]
