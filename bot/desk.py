"""The operator's desk: takes commands up, has them journaled with name and reason, and answers them."""

from collections.abc import Callable
from decimal import Decimal

from bot.bookkeeper import Bookkeeper
from bot.books import FLATTENED
from bot.clock import Clock
from bot.commands import LATE, Answered, Command, CommandFiles
from bot.config import Config
from bot.errors import ExchangeError
from bot.events import Adopted, Commanded
from bot.exchange import Exchange
from bot.log import Log, Tally
from bot.orders import TABLE, Order
from bot.protection import as_held
from bot.reconciler import Reconciler

# Locks that an operator's adoption takes away; the others end when the exchange shows that they may.
ADOPTABLE = ("books_differ", "foreign_fill", "liquidation", "adl", "settlement", "late_fill", FLATTENED)

FLATTEN_NS, FLATTEN_TURN_S = 15_000_000_000, 0.2  # botctl waits 20 s for an answer
FLATTEN_AGAIN_NS = 3_000_000_000  # before a close whose end nobody knows is sent again


class Desk:
    """Works commands off, one after the other."""

    def __init__(self, config: Config, clock: Clock, log: Log, *, files: CommandFiles, exchange: Exchange,
                 keeper: Bookkeeper, reconciler: Reconciler, dropped: Tally,
                 close: Callable[[str, str], None], cancel: Callable[[Order], None]) -> None:
        self._config, self._clock, self._log = config, clock, log
        self._files, self._exchange = files, exchange
        self._keeper, self._reconciler, self._dropped = keeper, reconciler, dropped
        self._close, self._cancel = close, cancel

    async def work(self) -> None:
        """Answer every command that waits."""
        commands, damaged = self._files.waiting()
        for text in damaged:
            self._dropped.add("command", channel="commands", text=text)
        for command in commands:
            try:
                answered = LATE if command.is_late(self._clock.wall_ns()) else await self._do(command)
            except ExchangeError as error:
                answered = Answered(False, f"the exchange could not be asked, nothing was changed: {error}")
            self._log.warning("commanded", verb=command.verb, symbol=command.symbol, who=command.who,
                              why=command.why, is_done=answered.is_done, answer=answered.text)
            self._files.answer(command, answered, self._log)
        for symbol, book in list(self._keeper.books.symbols.items()):
            if FLATTENED in book.locks and symbol in self._reconciler.read:
                self._is_flat(symbol)

    async def _do(self, command: Command) -> Answered:
        self._keeper.record(Commanded(id=command.id, verb=command.verb, symbol=command.symbol,
                                      strategy=command.strategy, who=command.who, why=command.why))
        self._keeper.commit()
        known = self._exchange.instruments.keys() | self._keeper.books.symbols.keys()
        if command.verb == "adopt" and command.symbol not in known:
            return Answered(False, f"there is no symbol {command.symbol}")
        if command.verb in ("cancel", "flatten"):
            return await (self._cancel_entries if command.verb == "cancel" else self._flatten)(command)
        differences = await self._reconciler.reconcile(f"{command.verb} by {command.who}")
        if command.verb == "adopt":
            return await self._adopt(command)
        return Answered(True, "; ".join(differences) or "books and exchange agree")

    def _symbols(self, command: Command) -> tuple[str, ...]:
        owned = self._config.strategy
        if command.strategy:
            return owned[command.strategy].symbols if command.strategy in owned else ()
        return (command.symbol,) if command.symbol else self._reconciler.traded

    async def _cancel_entries(self, command: Command) -> Answered:
        books = self._keeper.books
        entries = [o for symbol in self._symbols(command) for o in books.book(symbol).working()
                   if "request_cancel" in TABLE[o.state] and o.id not in self._reconciler.sending]
        for order in entries:
            self._keeper.change(order, "request_cancel")
        self._keeper.commit()
        for order in entries:
            self._cancel(order)
        unknown = [o.id for symbol in self._symbols(command) for o in books.book(symbol).unknown()]
        sent = ", ".join(o.id for o in entries)
        return Answered(True, "; ".join(filter(None, (
            f"cancels sent: {sent}" if sent else "no order of ours rests but exits",
            f"unknown, and not to be canceled before the exchange shows them: {', '.join(unknown)}"
            if unknown else ""))))

    async def _flatten(self, command: Command) -> Answered:
        # An operator's target of 0: reduce-only, past the halt that botctl has set. Its exits follow.
        symbols, began_ns = self._symbols(command), self._clock.mono_ns()
        unlisted = [s for s in symbols if s not in self._exchange.instruments]
        if unlisted:
            return Answered(False, f"the exchange does not list {', '.join(unlisted)}: close it in its app")
        if not symbols or not (command.strategy or command.symbol):
            return Answered(False, "the executor flattens one strategy or symbol; everything is guard's")
        evidence = f"flatten by {command.who} ({command.why}): what is held, or fills yet, is closed"
        for symbol in symbols:
            self._keeper.lock(symbol, FLATTENED, evidence)
        self._keeper.commit()
        while True:
            left = [s for s in symbols if not self._is_flat(s)]
            if not left:
                held = ", ".join(symbols)
                scope = f"--strategy {command.strategy}" if command.strategy else f"--symbol {command.symbol}"
                return Answered(True, f"flat: {held}; it stays halted until botctl resume {scope}")
            if self._clock.mono_ns() - began_ns > FLATTEN_NS:
                orders = ", ".join(o.id for s in left for o in self._keeper.books.book(s).working())
                return Answered(False, f"not flat yet: {', '.join(left)} (orders {orders or 'none'}); it "
                                "stays halted; what arrives is closed. All, in any case: botctl flatten")
            await self._clock.sleep(FLATTEN_TURN_S)

    def _is_flat(self, symbol: str) -> bool:
        book, now_ns = self._keeper.books.book(symbol), self._clock.wall_ns()
        if any(o.state != "UNKNOWN" for o in book.working()):
            return False  # its fills, a moment away, decide how much there is to close
        if as_held(book).position_qty:  # what a person has closed in the app is not there to close
            # Reduce-only, it may be sent again, yet not without end.
            if not any(o.leg == "flatten" and not (o.is_settled and o.filled_qty)
                       and 0 <= now_ns - o.intended_ns < FLATTEN_AGAIN_NS for o in book.orders.values()):
                self._close(symbol, book.locks.get(FLATTENED, "flatten"))
        elif not (book.position_qty or any(o.leg == "open" for o in book.working())):  # unknown, it may fill
            self._keeper.unlock(symbol, FLATTENED, "nothing is held")
            self._keeper.commit()
            return True
        return False

    async def _adopt(self, command: Command) -> Answered:
        symbol, books = command.symbol, self._keeper.books
        unknown = books.book(symbol).unknown()
        for order in unknown:
            await self._reconciler.declare_absent(order, command.who)
        declared = [o.id for o in unknown if o.state == "ABSENT"]
        before = books.book(symbol).position_qty
        there = (await self._exchange.positions()).get(symbol)
        cursor = await self._reconciler.fetch_fills(symbol, is_adopted=True)  # ours are booked as fills
        book = books.book(symbol)
        moving = [o.id for o in book.live_orders() if not o.request.is_conditional
                  or o.is_in_flight or o.id in self._reconciler.sending]
        if moving or book.position_qty != before:
            return Answered(False, f"{symbol} is moving (orders {', '.join(moving) or 'just filled'}); "
                            "try again")
        held = there.qty if there else Decimal(0)
        causes = tuple(cause for cause in ADOPTABLE if cause in book.locks)
        if held == before and not causes and not declared:
            return Answered(False, f"nothing to adopt: books and exchange both say {held}"
                            + "".join(f"; still locked, {c}: {text}" for c, text in book.locks.items()))
        self._keeper.record(Adopted(
            symbol=symbol, qty=held - before, entry_price=there.entry_price if there else None,
            who=command.who, why=command.why, causes=causes, cursor=cursor), symbol)
        self._keeper.commit()
        self._log.warning("adopted", symbol=symbol, qty=held - before, position_qty=held, who=command.who,
                          why=command.why, causes=causes)
        await self._reconciler.reconcile(f"adopted by {command.who}")
        locks = "; ".join(f"still locked, {c}: {text}" for c, text in books.book(symbol).locks.items())
        told_absent = f"declared absent: {', '.join(declared)}" if declared else ""
        return Answered(True, "; ".join(filter(None, (
            f"adopted {held - before}: the position in {symbol} is {held}", told_absent, locks))))
