"""The operator's desk: takes commands up, has them journaled with name and reason, and answers them."""

from decimal import Decimal

from bot.bookkeeper import Bookkeeper
from bot.commands import Answered, Command, CommandFiles
from bot.errors import ExchangeError
from bot.events import Adopted, Commanded
from bot.exchange import Exchange
from bot.log import Log, Tally
from bot.reconciler import Reconciler

# Locks that an operator's adoption takes away; the others end when the exchange shows that they may.
ADOPTABLE = ("books_differ", "foreign_fill", "liquidation", "adl", "late_fill")


class Desk:
    """Works commands off, one after the other."""

    def __init__(self, log: Log, *, files: CommandFiles, exchange: Exchange, keeper: Bookkeeper,
                 reconciler: Reconciler, dropped: Tally) -> None:
        self._log, self._files, self._exchange = log, files, exchange
        self._keeper, self._reconciler, self._dropped = keeper, reconciler, dropped

    async def work(self) -> None:
        """Answer every command that waits."""
        commands, damaged = self._files.waiting()
        for text in damaged:
            self._dropped.add("command", channel="commands", text=text)
        for command in commands:
            self._keeper.record(Commanded(id=command.id, verb=command.verb, symbol=command.symbol,
                                          who=command.who, why=command.why))
            self._keeper.commit()
            try:
                answered = await self._do(command)
            except ExchangeError as error:
                answered = Answered(False, f"the exchange could not be asked, nothing was changed: {error}")
            self._log.warning("commanded", verb=command.verb, symbol=command.symbol, who=command.who,
                              why=command.why, is_done=answered.is_done, answer=answered.text)
            self._files.answer(command, answered)

    async def _do(self, command: Command) -> Answered:
        if command.verb == "adopt" and command.symbol not in self._exchange.instruments:
            return Answered(False, f"there is no symbol {command.symbol}")
        differences = await self._reconciler.reconcile(f"{command.verb} by {command.who}")
        if command.verb == "adopt":
            return await self._adopt(command)
        return Answered(True, "; ".join(differences) or "books and exchange agree")

    async def _adopt(self, command: Command) -> Answered:
        symbol, books = command.symbol, self._keeper.books
        unknown = books.book(symbol).unknown()
        for order in unknown:
            await self._reconciler.declare_absent(order, command.who)
        declared = [o.id for o in unknown if o.state == "ABSENT"]
        before = books.book(symbol).position_qty
        there = (await self._exchange.positions()).get(symbol)
        await self._reconciler.fetch_fills(symbol)  # what is ours is booked as a fill, never adopted
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
            who=command.who, why=command.why, causes=causes), symbol)
        self._keeper.commit()
        self._log.warning("adopted", symbol=symbol, qty=held - before, position_qty=held, who=command.who,
                          why=command.why, causes=causes)
        await self._reconciler.reconcile(f"adopted by {command.who}")
        locks = "; ".join(f"still locked, {c}: {text}" for c, text in books.book(symbol).locks.items())
        told_absent = f"declared absent: {', '.join(declared)}" if declared else ""
        return Answered(True, "; ".join(filter(None, (
            f"adopted {held - before}: the position in {symbol} is {held}", told_absent, locks))))
