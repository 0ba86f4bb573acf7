"""TradingState: what may pass just now, for all and for each symbol, and why."""

from collections.abc import Callable
from decimal import Decimal
from typing import Any

from bot import __version__
from bot.books import FLATTENED, Books
from bot.clock import Clock
from bot.config import Config
from bot.exchange import Exchange
from bot.exposure import Exposure, day_pnl, distance_pct, entries_since, equity, gross_notional
from bot.halt import HaltFiles
from bot.limits import MS, Prices
from bot.model import Tick
from bot.reconciler import Reconciler

# What health finds on the host that must end before anything opens (DESIGN 5).
REDUCING_RULES = frozenset({"disk_low", "host_memory_low", "clock_offset"})
OF_ONE_MIND = frozenset({"gateway", "guard", "health"})  # they run our code and this very config
SECOND_NS, MINUTE_NS = 1_000_000_000, 60_000_000_000
LISTED_NS = 5_000_000_000  # until then a transfer may be in the balance and not in the list of transfers


class TradingState:
    """Derives RUNNING, REDUCING, HALTED, RECONCILING, LOCKED from what is known.

    Remembers prices, and when it last saw a cause of REDUCING: that has to be over for recover_s.
    canary: its trouble in words, and whether it has flown.
    """

    def __init__(self, config: Config, clock: Clock, *, exchange: Exchange, halts: HaltFiles, books: Books,
                 reconciler: Reconciler, canary: Callable[[], tuple[str, bool]]) -> None:
        self._config, self._clock, self._exchange = config, clock, exchange
        self._halts, self._books, self._reconciler, self._canary = halts, books, reconciler, canary
        self._prices: dict[str, Prices] = {}
        self._expected: dict[str, int] = {}
        self._gateway_ns = 0  # monotonic time of the last sign of life on the ticks channel
        self._findings: list[str] = []
        self._shared = (__version__, config.fingerprint(is_shared=True))
        self._jumps: dict[str, tuple[int, str]] = {}  # symbol -> monotonic time, what
        self._trouble, self._trouble_ns = "", 0
        self._has_run = self.is_ending = False
        self._lost_ns: int | None = None  # monotonic; since when the day's loss is at its limit
        self._fine_ns = -1  # of the last comparison by which it was not

    def hear_beats(self, beats: dict[str, dict[str, Any]]) -> None:
        """Take in what health finds, and who runs another version or config; old beats say nothing."""
        now_ns = self._clock.mono_ns()
        oldest_ns = now_ns - self._config.health.stuck_ms * MS
        fresh = {name: beat for name, beat in beats.items()
                 if beat.get("mono_ns", -1) >= oldest_ns and not beat.get("ended")}
        found = fresh.get("health", {}).get("findings", [])
        self._findings = [f"{f['rule']}: {f['text']}" for f in found if f.get("rule") in REDUCING_RULES]
        seen = {name: beats[name].get("mono_ns", -1) for name in ("health", "guard") if name in beats}
        watchers, unwatched_s = (self._expected | seen).values(), self._config.guard.cancel_after_s
        if watchers and not any(now_ns - unwatched_s * SECOND_NS <= ns <= now_ns for ns in watchers):
            self._findings.append(f"unwatched: neither health nor guard for {unwatched_s} s: nobody would "
                                  "end what hangs, halt what loops, or cancel when the executor is gone")
        for name in fresh.keys() & OF_ONE_MIND:
            told = (fresh[name].get("version"), fresh[name].get("shared_config"))
            if told != self._shared:  # Knight Capital, 2012: old code on one of eight servers
                self._findings.append(f"start_gate: {name} runs version and config {told}, the executor "
                                      f"{self._shared}: restart what is older")

    def expect_watchers(self) -> None:
        """Miss health and guard from now on, though they have never beaten: they belong beside us."""
        self._expected = dict.fromkeys(("health", "guard"), self._clock.mono_ns())

    def hear_gateway(self) -> None:
        """Take a sign of life on the ticks channel."""
        self._gateway_ns = self._clock.mono_ns()

    def prices(self, symbol: str) -> Prices:
        """Return the newest prices seen."""
        return self._prices.get(symbol, Prices())

    def see_price(self, tick: Tick) -> None:
        """Take a mark or a quote in."""
        old = self.prices(tick.symbol)
        if tick.kind == "mark":
            self._check_jump(tick, old.mark)
            self._prices[tick.symbol] = Prices(
                mark=Decimal(repr(tick.price)), mark_ns=tick.exchange_ns, bid=old.bid, ask=old.ask,
                quote_ns=old.quote_ns)
        elif tick.kind == "quote" and tick.bid is not None and tick.ask is not None:
            self._prices[tick.symbol] = Prices(
                mark=old.mark, mark_ns=old.mark_ns, bid=Decimal(repr(tick.bid)), ask=Decimal(repr(tick.ask)),
                quote_ns=tick.exchange_ns)

    def of_all(self) -> tuple[str, str]:
        """Return the state of the whole, and why."""
        halt = next((h for h in self._halts.list() if h.scope == "all"), None)
        if halt is not None:
            return "HALTED", f"{halt.who}: {halt.why}"
        if self.is_ending:
            return "RECONCILING", "the executor ends: it begins nothing more"
        if not self._reconciler.is_ready:
            return "RECONCILING", "the books are not compared with the exchange yet"
        trouble, has_flown = self._find_trouble(), self._canary()[1]
        now_ns = self._clock.mono_ns()
        if trouble:
            # Before it ran once there is nothing to recover from: a start waits for its first price.
            self._trouble, self._trouble_ns = (trouble, now_ns) if self._has_run else ("", 0)
            return "REDUCING", trouble
        if self._trouble and self._recovers(now_ns):
            return "REDUCING", f"recovering from: {self._trouble}"
        if not has_flown:
            return "RECONCILING", "it is not proven yet that the exchange takes a stop"
        self._trouble, self._has_run = "", True
        return "RUNNING", ""

    def _find_trouble(self) -> str:
        offset_ms, most_ms = self._exchange.clock_offset_ns // MS, self._config.health.clock_offset_ms_max
        if self._clock.mono_ns() - self._gateway_ns > self._config.bus.silence_ms * MS:
            return "the gateway is silent"
        if abs(offset_ms) > most_ms:
            return f"clock_offset: {offset_ms} ms from the exchange's, limit {most_ms}"
        if self._lost_ns is not None:
            return "day_loss: at its limit, as far as one comparison tells; another one is awaited"
        told = self._reconciler.contract.trouble or self._exchange.refusal("rest") or self._canary()[0]
        if told or self._findings:
            return told or self._findings[0]
        is_stale = not any(map(self._is_fresh, self._reconciler.traded))
        return "no symbol has a fresh mark price" if is_stale else ""

    def _recovers(self, now_ns: int) -> bool:
        healthy_ns = now_ns - self._trouble_ns
        if self._reconciler.last_mono_ns <= self._trouble_ns:
            self._reconciler.request("recovered")
            return True
        return healthy_ns < self._config.executor.recover_s * SECOND_NS

    def of_symbol(self, symbol: str) -> tuple[str, str]:
        """Return the state that counts for one symbol, and why."""
        halt = self._halts.covering(strategy=self._config.owner_of(symbol) or "", symbol=symbol)
        if halt is not None:
            return "HALTED", f"{halt.who}: {halt.why}"
        state, why = self.of_all()
        locks = self._books.book(symbol).locks
        unknown = self._books.book(symbol).unknown()
        if state == "RUNNING" and (locks or unknown):
            causes = [f"{cause}: {text}" for cause, text in locks.items()]
            return "LOCKED", "; ".join(causes + [f"order {o.id} is unknown" for o in unknown])
        if state == "RUNNING" and symbol not in self._reconciler.read:
            return "RECONCILING", "its books are not compared with the exchange yet"
        if state == "RUNNING" and not self._is_fresh(symbol):
            return "REDUCING", "stale_mark: its mark price makes no progress"
        if state == "RUNNING" and self._jump(symbol):
            return "REDUCING", f"mark_jump: {self._jump(symbol)}"
        return state, why

    def exposure(self, symbol: str) -> Exposure:
        """Return what an entry in the symbol has to look at beside its own book."""
        books = self._books.symbols.values()
        now_ns = self._clock.wall_ns()
        return Exposure(
            others_notional=gross_notional(
                (b for b in books if b.symbol != symbol),
                {s: p for s, p in self._reconciler.told.items() if s != symbol},
                self.mark_of, self._exchange.instruments),
            equity=self.equity(), open_orders=sum(len(b.live_orders()) for b in books),
            entries_last_minute=len(entries_since(books, now_ns - MINUTE_NS, now_ns)),
            liquidation_distance_pct=self._liquidation_distance_pct(symbol))

    def _liquidation_distance_pct(self, symbol: str) -> Decimal | None:
        return distance_pct(self.mark_of(symbol), self._reconciler.told.get(symbol))

    def told_of(self, symbol: str) -> dict[str, Any]:
        """Return what the executor's beat tells of one symbol."""
        book = self._books.book(symbol)
        return {"state": self.of_symbol(symbol)[0], "position_qty": book.position_qty,
                "liquidation_distance_pct": self._liquidation_distance_pct(symbol),
                "unknown_orders": len(book.unknown()), "locks": len(book.locks.keys() - {FLATTENED})}

    def money(self) -> dict[str, Any]:
        """Return what the executor's beat tells of the account."""
        day_pnl, most = self.day_pnl(), self._config.limits.day_loss_max
        lost = None if day_pnl is None else round(max(-day_pnl, Decimal(0)) / most, 4)
        return {"wallet_balance": self._books.wallet_balance, "equity": self.equity(), "day_pnl": day_pnl,
                "day_loss_ratio": lost}

    def mark_of(self, symbol: str) -> Decimal | None:
        """Return the newest mark price, None when there was none."""
        return self.prices(symbol).mark

    def equity(self) -> Decimal | None:
        """Return what the account is worth at the newest marks; None before the first comparison."""
        return equity(self._books, self._reconciler.told, self.mark_of, self._exchange.instruments)

    def day_pnl(self) -> Decimal | None:
        """Return what the UTC day has brought, transfers left out; None before it is known.

        None too while a position's mark has just jumped: one wrong price must not halt for good.
        """
        held = [b.symbol for b in self._books.symbols.values() if b.position_qty]
        if not self._reconciler.is_ready or any(map(self._jump, held)):
            return None
        return day_pnl(self._books, self.equity())

    def day_loss(self) -> str:
        """Return why the day's loss has to halt everything, "" while it need not.

        What fills and marks add up to counts at once; what a comparison told needs another one, some time
        later: a withdrawal that is not listed yet looks like a loss.
        """
        pnl, most = self.day_pnl(), self._config.limits.day_loss_max
        now_ns, compared_ns = self._clock.mono_ns(), self._reconciler.last_mono_ns
        if pnl is None:
            return ""
        if -pnl < most:
            self._lost_ns, self._fine_ns = None, compared_ns
            return ""
        if self._lost_ns is None:
            self._lost_ns = now_ns if compared_ns != self._fine_ns else compared_ns - LISTED_NS
        if compared_ns < self._lost_ns + LISTED_NS:
            if now_ns >= self._lost_ns + LISTED_NS:
                self._reconciler.request("day loss")
            return ""
        return (f"day_loss: limit {most}, was {-pnl:.2f} since 00:00 UTC, unrealized included; the positions "
                "keep their stops")

    def _jump(self, symbol: str) -> str:
        # What moved the mark further at once than it may, while that is fresh.
        jumped_ns, jump = self._jumps.get(symbol, (0, ""))
        is_over = self._clock.mono_ns() - jumped_ns >= self._config.executor.recover_s * SECOND_NS
        return "" if is_over else jump

    def _check_jump(self, tick: Tick, old: Decimal | None) -> None:
        limit_pct, new = self._config.limits.mark_jump_pct_max, Decimal(repr(tick.price))
        if old is None or not (old.is_finite() and new.is_finite() and old > 0):
            return  # no price at all: check_prices says no to it
        if abs(new / old - 1) * 100 > limit_pct:
            self._jumps[tick.symbol] = (self._clock.mono_ns(), f"from {old} to {new}, limit {limit_pct} %")

    def _is_fresh(self, symbol: str) -> bool:
        now_ns = self._clock.wall_ns() + self._exchange.clock_offset_ns
        age_ns = now_ns - self.prices(symbol).mark_ns
        return age_ns <= self._config.limits.tick_age_ms_max * MS
