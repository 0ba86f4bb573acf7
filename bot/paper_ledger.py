"""The paper exchange's books: what is open, who owns what, matching against depth, fees.

Pure: time, prices and depth are arguments; nothing here does I/O, so the server and a simulator use
it alike. Money is Decimal. Every command either raises Refused and changes nothing, or leaves books
that balance (checked after each one) and events that say what happened.
"""

from collections.abc import Callable
from decimal import Decimal
from typing import Any, Literal

import msgspec

from bot.errors import InvariantError
from bot.paper_model import (
    OPEN,
    OPEN_ALGO,
    ZERO,
    Account,
    AccountEvent,
    Algo,
    AlgoEvent,
    Event,
    Fill,
    Levels,
    Order,
    OrderEvent,
    Position,
    Refused,
    Rules,
    Side,
    money,
)

LEVERAGE = 20  # of a symbol whose leverage was never set, as on a fresh account


class Ledger:
    """All accounts and what is open. What is closed leaves with its last event (the store keeps it).

    take: called with (symbol, side, [(price, qty)]) when depth was used; returns the trade ids.
    """

    def __init__(self, rules: dict[str, Rules], *, taker_fee: Decimal, maker_fee: Decimal,
                 take: Callable[[str, Side, Levels], list[int]]) -> None:
        self.rules, self.taker_fee, self.maker_fee, self._take = rules, taker_fee, maker_fee, take
        self.accounts: dict[str, Account] = {}
        self.orders: dict[int, Order] = {}
        self.algos: dict[int, Algo] = {}
        self.marks: dict[str, Decimal] = {}
        self.last_order_id = 10_000_000_000  # ids exceed 32 bits, as the real ones do
        self.last_algo_id = 1_000_000_000_000_000
        self._events: list[Event] = []

    def events(self) -> list[Event]:
        """Return what happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    # Accounts

    def deposit(self, name: str, amount: Decimal, now_ms: int) -> None:
        """Open the account when it is new, and put money in."""
        account = self.accounts.setdefault(name, Account(name))
        account.wallet += amount
        account.deposited += amount
        self._account_event(account, "DEPOSIT", "", amount, now_ms)

    def position(self, name: str, symbol: str) -> Position:
        return self.accounts[name].positions.get(symbol) or Position()

    def leverage(self, name: str, symbol: str) -> int:
        return self.accounts[name].leverage.get(symbol, LEVERAGE)

    def set_leverage(self, name: str, symbol: str, leverage: int, now_ms: int) -> None:
        account = self.accounts[name]
        account.leverage[symbol] = leverage
        self._account_event(account, "CONFIG", symbol, ZERO, now_ms)

    def margin(self, name: str) -> tuple[Decimal, Decimal, Decimal]:
        """Return what positions and what open orders bind, and the unrealized profit, at marks."""
        account, bound, unrealized = self.accounts[name], ZERO, ZERO
        for symbol, position in account.positions.items():
            if position.qty:
                mark = self.marks[symbol]
                bound += abs(position.qty) * mark / self.leverage(name, symbol)
                unrealized += position.unrealized(mark)
        resting = sum((self._order_margin(order) for order in self.open_orders(name)), ZERO)
        return bound, resting, unrealized

    def available(self, name: str) -> Decimal:
        bound, resting, unrealized = self.margin(name)
        return self.accounts[name].wallet + unrealized - bound - resting

    def open_orders(self, name: str, symbol: str | None = None) -> list[Order]:
        return [o for o in self.orders.values() if o.account == name and symbol in (None, o.symbol)]

    def open_algos(self, name: str, symbol: str | None = None) -> list[Algo]:
        return [a for a in self.algos.values() if a.account == name and symbol in (None, a.symbol)]

    def find(self, name: str, symbol: str, order_id: int | None, client_id: str | None) -> Order | None:
        return next((o for o in self.open_orders(name, symbol)
                     if (o.id == order_id if order_id else o.client_id == client_id)), None)

    def find_algo(self, name: str, algo_id: int | None, client_id: str | None) -> Algo | None:
        return next((a for a in self.open_algos(name)
                     if (a.id == algo_id if algo_id else a.client_id == client_id)), None)

    # Orders

    def place(self, order: Order, bids: Levels, asks: Levels) -> Order:
        """Take an order in (its id is given here) and match it. Raises Refused."""
        self._check_order(order)
        depth = [level for level in (asks if order.side == "BUY" else bids) if _crosses(order, level[0])]
        reachable = sum((qty for _, qty in depth), ZERO)
        if order.tif == "GTX" and depth:
            raise Refused(-5022, "Due to the order could not be executed as maker, the Post Only order "
                                 "will be rejected. The order will not be recorded in the order history")
        best = depth[0][0] if depth else self.marks[order.symbol]
        self._check_margin(order, order.price or best)
        self._admit(order)
        if order.tif != "FOK" or reachable >= order.qty:
            self._fill(order, depth, is_maker=False)
        if order.status in OPEN and (order.type == "MARKET" or order.tif in ("IOC", "FOK")):
            self._close(order, "EXPIRED", order.update_ms)
        self.check(order.account)
        return order

    def cancel(self, order: Order, now_ms: int) -> Order:
        """Cancel an open order."""
        self._close(order, "CANCELED", now_ms)
        self.check(order.account)
        return order

    def place_algo(self, algo: Algo, price: Decimal) -> Algo:
        """Take a conditional order in; price: of its working type. Raises Refused."""
        rules, mine = self.rules[algo.symbol], self.open_algos(algo.account)
        if any(other.client_id == algo.client_id for other in mine):
            raise Refused(-4116, "ClientOrderId is duplicated.")
        if len([other for other in mine if other.symbol == algo.symbol]) >= rules.algos_max:
            raise Refused(-4045, "Reach max stop order limit.")
        rules.check_price(algo.trigger)
        if algo.close_position:
            if any(o.close_position and o.symbol == algo.symbol and o.side == algo.side
                   and o.type == algo.type for o in mine):
                raise Refused(-4130, "An open stop or take profit order with GTE and closePosition in "
                                     "the direction is existing.")
        else:
            rules.check_qty(algo.qty, rules.market_qty_max)
        if algo.is_due(price):
            raise Refused(-2021, "Order would immediately trigger.")
        self.last_algo_id += 1
        algo.id = self.last_algo_id
        self.algos[algo.id] = algo
        self._algo_event(algo, "NEW", algo.time_ms)
        return algo

    def cancel_algo(self, algo: Algo, now_ms: int) -> Algo:
        """Cancel a conditional order that waits."""
        self._algo_event(algo, "CANCELED", now_ms)
        return algo

    # The market moved

    def match(self, symbol: str, bids: Levels, asks: Levels, now_ms: int) -> None:
        """Fill resting orders that the market crosses, at their own price."""
        for order in [o for o in self.orders.values() if o.symbol == symbol]:
            depth = [level for level in (asks if order.side == "BUY" else bids) if _crosses(order, level[0])]
            if depth and order.status in OPEN:
                order.update_ms = now_ms
                self._fill(order, depth, is_maker=True)
                self.check(order.account)

    def due_algos(self, symbol: str, last: Decimal, mark: Decimal) -> list[Algo]:
        """Return the conditional orders these prices trigger."""
        return [a for a in self.algos.values() if a.symbol == symbol and a.status == "NEW"
                and a.is_due(mark if a.working_type == "MARK_PRICE" else last)]

    def trigger(self, algo: Algo, bids: Levels, asks: Levels, now_ms: int) -> None:
        """Turn a conditional order into the market order it stands for, which keeps its client id.

        Source: recorded ALGO_UPDATE events: TRIGGERING, TRIGGERED (with the order's id), the
        order's own events, FINISHED with what was filled.
        """
        algo.trigger_ms = now_ms
        self._algo_event(algo, "TRIGGERING", now_ms)
        held = self.position(algo.account, algo.symbol).qty
        order = Order(
            id=0, account=algo.account, symbol=algo.symbol, client_id=algo.client_id, side=algo.side,
            type="MARKET", tif="GTC", qty=algo.qty or abs(held), price=ZERO, time_ms=now_ms,
            reduce_only=algo.reduce_only or algo.close_position, close_position=algo.close_position,
            orig_type=algo.type, stop_price=algo.trigger, working_type=algo.working_type,
            update_ms=now_ms, algo_id=algo.id)
        try:
            self.place(order, bids, asks)
        except Refused as refusal:
            algo.reason = "Reduce Only reject" if refusal.code == -2022 else refusal.text
            self._algo_event(algo, "REJECTED", now_ms)
            return
        algo.filled, algo.quote = order.filled, order.quote
        self._algo_event(algo, "FINISHED", now_ms)

    # Invariants

    def check(self, name: str) -> None:
        """Check that an account's books balance. Raises InvariantError."""
        account = self.accounts[name]
        total = account.deposited
        for symbol, position in account.positions.items():
            total += position.realized - position.fees
            if position.realized != position.cost - position.flow or position.qty != position.traded:
                raise InvariantError(f"{name} {symbol}: realized {position.realized} must be cost - flow "
                                     f"and qty the sum of fills; was {position}")
            if not position.qty and position.cost:
                raise InvariantError(f"{name} {symbol}: no position must cost nothing; was {position.cost}")
        if account.wallet != total:
            raise InvariantError(f"{name}: the wallet must be {total}; was {account.wallet}")

    # Inside

    def _check_order(self, order: Order) -> None:
        rules, account = self.rules[order.symbol], self.accounts[order.account]
        if account.is_hedged:
            raise Refused(-4061, "Order's position side does not match user's setting.")
        if not order.algo_id and any(o.client_id == order.client_id for o in self.open_orders(account.name)):
            raise Refused(-4116, "ClientOrderId is duplicated.")
        if order.reduce_only:
            held = self.position(order.account, order.symbol).qty
            if held * order.sign >= 0:
                raise Refused(-2022, "ReduceOnly Order is rejected.")
            order.qty = min(order.qty, abs(held))
        is_market = order.type == "MARKET"
        rules.check_qty(order.qty, rules.market_qty_max if is_market else rules.qty_max)
        mark = self.marks[order.symbol]
        if not is_market:
            rules.check_price(order.price)
            bound = mark * (rules.price_up if order.side == "BUY" else rules.price_down)
            bound -= bound % rules.price_step
            if order.side == "BUY" and order.price > bound:
                raise Refused(-4016, f"Limit price can't be higher than {bound}.")
            if order.side == "SELL" and order.price < bound:
                raise Refused(-4024, f"Limit price can't be lower than {bound}.")
        if not order.reduce_only and order.qty * (order.price or mark) < rules.notional_min:
            raise Refused(-4164, "Order's notional must be no smaller than "
                                 f"{rules.notional_min.normalize():f} (unless you choose reduce only).")
        if len(self.open_orders(order.account, order.symbol)) >= rules.orders_max:
            raise Refused(-2025, "Reach max open order limit.")

    def _check_margin(self, order: Order, price: Decimal) -> None:
        need = self._order_margin(order, price)
        if need and need + order.qty * price * self.taker_fee > self.available(order.account):
            raise Refused(-2019, "Margin is insufficient.")

    def _order_margin(self, order: Order, price: Decimal = ZERO) -> Decimal:
        # Only what would open counts; what closes the position needs no margin.
        if order.reduce_only:
            return ZERO
        closes = max(ZERO, -order.sign * self.position(order.account, order.symbol).qty)
        opens = max(ZERO, order.qty - order.filled - closes)
        return opens * (price or order.price) / self.leverage(order.account, order.symbol)

    def _admit(self, order: Order) -> None:
        self.last_order_id += 1
        order.id = self.last_order_id
        order.orig_type = order.orig_type or order.type
        self.orders[order.id] = order
        if order.algo_id:
            algo = self.algos[order.algo_id]
            algo.order_id = order.id
            self._algo_event(algo, "TRIGGERED", order.time_ms)
        self._order_event("NEW", order)

    def _fill(self, order: Order, depth: Levels, *, is_maker: bool) -> None:
        taken: Levels = []
        left = order.qty - order.filled
        if order.reduce_only:
            left = min(left, max(ZERO, -order.sign * self.position(order.account, order.symbol).qty))
        for price, qty in depth:
            if left <= 0:
                break
            taken.append((price, min(qty, left)))
            left -= taken[-1][1]
        if not taken:
            return
        for trade_id, (price, qty) in zip(self._take(order.symbol, order.side, taken), taken, strict=True):
            self._book(order, trade_id, order.price if is_maker else price, qty, is_maker)
        self._sweep(order.account, order.symbol, order.update_ms)

    def _book(self, order: Order, trade_id: int, price: Decimal, qty: Decimal, is_maker: bool) -> None:
        account = self.accounts[order.account]
        position = account.positions.setdefault(order.symbol, Position())
        fee = money(qty * price * (self.maker_fee if is_maker else self.taker_fee))
        realized = position.apply(order.sign * qty, price)
        position.fees += fee
        position.update_ms = account.update_ms = order.update_ms
        account.wallet += realized - fee
        order.filled += qty
        order.quote += qty * price
        order.status = "FILLED" if order.filled == order.qty else "PARTIALLY_FILLED"
        if order.status == "FILLED":
            del self.orders[order.id]
        fill = Fill(trade_id, account.name, order.symbol, order.id, order.client_id, order.side, price, qty,
                    fee, realized, is_maker, order.update_ms)
        self._account_event(account, "ORDER", order.symbol, ZERO, order.update_ms)
        self._order_event("TRADE", order, fill)

    def _sweep(self, name: str, symbol: str, now_ms: int) -> None:
        # What can only reduce a position does not outlive it.
        held = self.position(name, symbol).qty
        for order in self.open_orders(name, symbol):
            if order.reduce_only and held * order.sign >= 0:
                self._close(order, "EXPIRED", now_ms)
        for algo in self.open_algos(name, symbol):
            if algo.tif == "GTE_GTC" and not held and algo.status == "NEW":
                self._algo_event(algo, "EXPIRED", now_ms)

    def _close(self, order: Order, status: Literal["CANCELED", "EXPIRED"], now_ms: int) -> None:
        del self.orders[order.id]
        order.status, order.update_ms = status, now_ms
        self._order_event(status, order)

    def _order_event(self, execution: Any, order: Order, fill: Fill | None = None) -> None:
        self._events.append(OrderEvent(execution, msgspec.structs.replace(order), fill))

    def _algo_event(self, algo: Algo, status: str, now_ms: int) -> None:
        algo.status, algo.update_ms = status, now_ms
        if status not in OPEN_ALGO:
            del self.algos[algo.id]
        self._events.append(AlgoEvent(msgspec.structs.replace(algo)))

    def _account_event(self, account: Account, reason: str, symbol: str, change: Decimal,
                       now_ms: int) -> None:
        position = account.positions.get(symbol) or Position()
        self._events.append(AccountEvent(account.name, reason, symbol, account.wallet, change,
                                         msgspec.structs.replace(position), now_ms))


def _crosses(order: Order, price: Decimal) -> bool:
    return not order.price or (price <= order.price if order.side == "BUY" else price >= order.price)
