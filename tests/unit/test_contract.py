"""The account's settings and the symbols' rules, read back and compared."""

import asyncio
from types import SimpleNamespace

import pytest

from bot.books import Books
from bot.config import AccountConfig
from bot.contract import Contract
from bot.errors import ConfigError, ExchangeError
from bot.rows import AccountSettings, KeyRights, SymbolSettings
from tests.factory import BTC, ETH, HandClock, instrument


def set_to(margin_mode="cross", leverage=20):
    return SymbolSettings(margin_mode=margin_mode, leverage=leverage)


class Bench:
    def __init__(self, **account):
        self.clock, self.locks, self.refreshed = HandClock(), {}, []
        self.instruments = {BTC: instrument(), ETH: instrument(symbol=ETH)}
        self.rights = KeyRights(can_withdraw=False, can_trade_futures=True, is_ip_restricted=True)
        self.settings = {symbol: set_to() for symbol in (BTC, ETH)}
        self.account = {"is_hedge_mode": False, "is_multi_asset": False, "can_trade": True}
        timer = SimpleNamespace(instruments_s=300)
        config = SimpleNamespace(account=AccountConfig(**account), exchange=timer)
        self.contract = Contract(config, self.clock, exchange=self, books=Books(), lock=self.lock,
                                 unlock=self.unlock)

    async def key_rights(self):
        if isinstance(self.rights, Exception):
            raise self.rights
        return self.rights

    async def symbol_settings(self):
        return self.settings

    async def refresh(self, symbols):
        self.refreshed.append(tuple(symbols))

    def lock(self, symbol, cause, evidence):
        self.locks[symbol, cause] = evidence

    def unlock(self, symbol, cause, evidence):
        self.locks.pop((symbol, cause), None)

    def check(self, **account):
        modes = self.account | account
        told = AccountSettings(wallet_balance=1, **modes)
        return asyncio.run(self.contract.check(told, [BTC, ETH]))


def test_check_with_all_as_it_should_be_finds_nothing():
    bench = Bench()
    assert bench.check() == [] and bench.locks == {} and bench.contract.trouble == ""


@pytest.mark.parametrize(("cause", "spoil", "word"), [
    ("leverage", lambda b: b.settings.update({BTC: set_to(leverage=50)}), "is 50"),
    ("leverage", lambda b: b.settings.pop(BTC), "not told"),
    ("not_trading", lambda b: b.settings.pop(BTC) and b.instruments.pop(BTC), "not listed"),
    ("margin_mode", lambda b: b.settings.update({BTC: set_to("isolated")}), "is isolated"),
    ("not_trading", lambda b: b.instruments.update({BTC: instrument(status="SETTLING")}), "SETTLING"),
    ("not_trading", lambda b: b.instruments.pop(BTC), "not listed"),
])
def test_check_with_a_changed_symbol_locks_only_it_and_unlocks_when_mended(cause, spoil, word):
    bench = Bench()
    bench.check()
    spoil(bench)
    assert any(word in text and cause in text for text in bench.check())
    assert {key[0] for key in bench.locks} == {BTC} and word in bench.locks[BTC, cause]
    bench.settings[BTC], bench.instruments[BTC] = bench.settings[ETH], instrument()
    assert bench.check() == [] and bench.locks == {}


def test_check_with_a_leverage_of_its_own_wants_that_one():
    bench = Bench(symbol_leverage={ETH: 5})
    assert bench.check() == [f"{ETH} leverage: must be 5, is 20 at the exchange"]


@pytest.mark.parametrize(("account", "word"), [
    ({"can_trade": False}, "may not trade"), ({"is_multi_asset": True}, "multi-asset"),
    ({"is_hedge_mode": True}, "hedge mode")])
def test_check_with_another_account_setting_lets_nothing_open_until_it_is_mended(account, word):
    bench = Bench()
    bench.check()
    assert word in bench.check(**account)[0] and word in bench.contract.trouble
    bench.check()
    assert bench.contract.trouble == ""


def test_check_with_hedge_mode_at_the_start_refuses():
    with pytest.raises(ConfigError, match="one-way mode"):
        Bench().check(is_hedge_mode=True)


def test_check_reads_the_rules_again_on_the_timer_and_after_doubt():
    bench = Bench()
    bench.check()
    assert bench.refreshed == []  # just loaded
    bench.clock.step(300)
    bench.check()
    bench.check()
    assert bench.refreshed == [(BTC, ETH)]
    bench.contract.doubt()
    bench.check()
    assert len(bench.refreshed) == 2


def test_check_with_a_key_that_may_withdraw_lets_nothing_open_until_it_is_mended():
    bench = Bench()
    bench.rights = KeyRights(can_withdraw=True, can_trade_futures=True, is_ip_restricted=False)
    assert "may withdraw" in bench.check()[0] and "any address" in bench.contract.trouble
    bench.rights = KeyRights(can_withdraw=False, can_trade_futures=True, is_ip_restricted=True)
    bench.clock.step(299)
    assert bench.check(), "asked again each instruments_s only"
    bench.clock.step(1)
    assert bench.check() == [] and bench.contract.trouble == ""


def test_check_with_rights_that_cannot_be_read_keeps_what_was_known():
    bench = Bench()
    bench.rights = ExchangeError("away")
    assert "not known: away" in bench.check()[0]
    bench.rights = None  # nobody is asked
    assert bench.check() == []
    bench.rights = ExchangeError("away")
    bench.clock.step(301)
    assert bench.check() == [] and bench.contract.trouble == ""
