"""What must hold at the exchange before risk is taken: the account's settings and the symbols' rules.

They are read back and compared, at the start and at each reconciliation, and never set from here. So is the
balance: what moved it has to be known.
"""

from collections.abc import Callable, Sequence
from decimal import Decimal

from bot.books import Books
from bot.clock import Clock
from bot.config import Config
from bot.errors import ConfigError, ExchangeError
from bot.exchange import Exchange
from bot.exposure import unexplained
from bot.rows import AccountSettings, SymbolSettings

LOOKS_MAX = 3  # at the balance and its income, until they agree
UNEXPLAINED_MIN = 3  # comparisons in a row before it is told: lists lag
TOLD_MAX = 4  # comparisons that tell of it: two minutes, enough for the alert BooksDiffer


class Contract:
    """Compares and tells. `lock` and `unlock` take symbol, cause and evidence."""

    def __init__(self, config: Config, clock: Clock, *, exchange: Exchange, books: Books,
                 lock: Callable[[str, str, str], None], unlock: Callable[[str, str, str], None]) -> None:
        self._account, self._reread_ns = config.account, config.exchange.instruments_s * 1_000_000_000
        self._clock, self._exchange, self._books = clock, exchange, books
        self._lock, self._unlock = lock, unlock
        self._read_ns = clock.mono_ns()
        self._has_held, self._rights_read_ns = False, -self._reread_ns
        self._key_troubles: list[str] = []
        self._has_rights, self._unexplained, self._is_whole = False, 0, True  # the last: the list of income
        self.trouble = ""  # of the whole account; while it lasts nothing opens

    def doubt(self) -> None:
        """Read the symbols' rules again at the next comparison: something was refused by them."""
        self._read_ns = -self._reread_ns

    def is_listed(self, symbol: str) -> bool:
        """Return whether the exchange answers for it: a question for another fails, and all with it."""
        instrument = self._exchange.instruments.get(symbol)
        return instrument is not None and instrument.status != "DELISTED"

    async def check(self, account: AccountSettings, symbols: Sequence[str]) -> list[str]:
        """Compare; return the differences. Raises ExchangeError, ConfigError for hedge mode at the start."""
        if account.is_hedge_mode and not self._has_held:
            raise ConfigError("exchange: the account is in hedge mode, tradehost needs one-way mode; switch "
                              "it in the exchange's settings (no open position or order may be left)")
        self._has_held = True
        await self._check_key()
        self.trouble = "; ".join(self._account_differences(account) + self._key_troubles)
        if self._clock.mono_ns() - self._read_ns >= self._reread_ns:
            await self._exchange.refresh(symbols)
            self._read_ns = self._clock.mono_ns()
        settings = await self._exchange.symbol_settings()
        differences = [f"account: {self.trouble}"] if self.trouble else []
        for symbol in symbols:
            for cause, evidence in self._symbol_differences(symbol, settings.get(symbol)).items():
                if evidence:
                    self._lock(symbol, cause, evidence)
                    differences.append(f"{symbol} {cause}: {evidence}")
                else:
                    self._unlock(symbol, cause, "as it should be")
        return differences

    async def money(self) -> tuple[AccountSettings, int, dict[str, Decimal], int]:
        """Return the balance and when it was told, the income since it was explained and the newest's time.

        Income is asked for only where the balance moved by more than our fills. A payment between the two
        answers would look like a loss or a gain: then both are asked again. Raises ExchangeError.
        """
        for _ in range(LOOKS_MAX):
            self._is_whole = True
            told_ns, income, newest_ns = self._exchange.server_ns(), self._books.income, self._books.income_ns
            account = await self._exchange.account()
            if unexplained(self._books, account.wallet_balance, income):
                income, newest_ns, self._is_whole = await self._exchange.income(self._books.explained[1])
            if not (self._is_whole and unexplained(self._books, account.wallet_balance, income)):
                break
        return account, told_ns, income, newest_ns

    def check_balance(self, balance: Decimal, income: dict[str, Decimal]) -> tuple[list[str], Decimal]:
        """Return what moved the balance and nothing explains: for a person, once it lasts, and in numbers.

        A fill or a payment may be listed late. What was told in some comparisons is taken as it is.
        """
        rest = unexplained(self._books, balance, income)
        self._unexplained = self._unexplained + 1 if rest else 0
        if self._unexplained < UNEXPLAINED_MIN and (self._is_whole or not rest):
            return [], rest
        paid = ", ".join(f"{kind} {amount}" for kind, amount in income.items())
        told = (f"account balance_differs: {rest} of {balance} is explained by no fill of ours and no income "
                f"({paid or 'none is listed'}): " + (
                    "somebody else trades or pays with this account" if self._is_whole else
                    "its list is too long to be read in full, what was paid behind it counts as the day's"))
        return [told], rest if self._unexplained < UNEXPLAINED_MIN + TOLD_MAX else Decimal(0)

    async def _check_key(self) -> None:
        # Asked elsewhere than all the rest: when that is away, what it said last goes on to count.
        if self._clock.mono_ns() - self._rights_read_ns < self._reread_ns:
            return
        try:
            rights = await self._exchange.key_rights()
        except ExchangeError as error:
            if not self._has_rights:
                self._key_troubles = [f"the key's rights are not known: {error}"]
            return
        self._has_rights, self._rights_read_ns = True, self._clock.mono_ns()
        self._key_troubles = rights.troubles() if rights is not None else []

    def _account_differences(self, account: AccountSettings) -> list[str]:
        wanted = self._account.is_multi_asset
        found = {"the account may not trade": not account.can_trade,
                 "the account is in hedge mode, must be one-way": account.is_hedge_mode,
                 f"multi-asset mode must be {'on' if wanted else 'off'}": account.is_multi_asset != wanted}
        return [text for text, is_wrong in found.items() if is_wrong]

    def _symbol_differences(self, symbol: str, told: SymbolSettings | None) -> dict[str, str]:
        # By cause; "" where all is well.
        leverage = self._account.symbol_leverage.get(symbol, self._account.leverage)
        instrument, mode = self._exchange.instruments.get(symbol), self._account.margin_mode
        if instrument is None:
            return {"not_trading": "it is not listed at the exchange: take it out of its strategy's symbols"}
        return {
            "leverage": "" if told and told.leverage == leverage else
                        f"must be {leverage}, is {told.leverage if told else 'not told'} at the exchange",
            "margin_mode": "" if told and told.margin_mode == mode else
                           f"must be {mode}, is {told.margin_mode if told else 'not told'} at the exchange",
            "not_trading": "" if instrument.status == "TRADING" else
                           f"its status at the exchange is {instrument.status}"}
