"""The paper exchange's books: what is open, who owns what, matching against depth, fees.

Pure: time, prices and depth are arguments; nothing here does I/O, so the server and a simulator use
it alike. Money is Decimal. Every command either raises Refused and changes nothing, or leaves books
that balance (checked after each one) and events that say what happened.
"""

from collections.abc import Callable
from decimal import Decimal

import msgspec

from bot import paper_model as model
from bot.errors import InvariantError
from bot.paper_model import OPEN, ZERO, Account, Levels, Order, Position, Refused, money, refuse_if

LEVERAGE = 20  # of a symbol whose leverage was never set, as on a fresh account
LIQUIDATION_FEE = Decimal("0.0125")  # liquidationFee of exchangeInfo; it goes to the insurance fund
# Orders of the exchange itself: how their client ids begin, and what their fills are called.
FORCED = {"liquidation": ("autoclose-", "CALCULATED"), "adl": ("adl_autoclose-", "CALCULATED"),
          "settlement": ("settlement_autoclose-", "TRADE")}


class Ledger:
    """All accounts and what is open. What is closed leaves with its last event (the store keeps it).

    take: called with (symbol, side, [(price, qty)]) when depth was used; returns the trade ids.
    """

    def __init__(self, rules: dict[str, model.Rules], *, taker_fee: Decimal, maker_fee: Decimal,
                 take: Callable[[str, model.Side, Levels], list[int]]) -> None:
        self.rules, self.taker_fee, self.maker_fee, self._take = rules, taker_fee, maker_fee, take
        self.accounts: dict[str, Account] = {}
        self.open: dict[int, Order] = {}  # ids of the two kinds never meet
        self.marks: dict[str, Decimal] = {}
        # Ids exceed 32 bits, as the real ones do.
        self.last_ids = {"order": 10_000_000_000, "algo": 1_000_000_000_000_000, "income": 0}
        self._events: list[model.Event] = []

    def events(self) -> list[model.Event]:
        """Return what happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    def deposit(self, name: str, amount: Decimal, now_ms: int) -> None:
        """Open the account when it is new, and put money in."""
        account = self.accounts.setdefault(name, Account(name))
        account.deposited += amount
        self._credit(account, "TRANSFER", "", amount, now_ms)

    def position(self, name: str, symbol: str) -> Position:
        return self.accounts[name].positions.get(symbol) or Position()

    def leverage(self, name: str, symbol: str) -> int:
        return self.accounts[name].leverage.get(symbol, LEVERAGE)

    def set_leverage(self, name: str, symbol: str, leverage: int, now_ms: int) -> None:
        account, before = self.accounts[name], self.leverage(name, symbol)
        notional = abs(self.position(name, symbol).qty) * self.marks[symbol]
        refuse_if((not 1 <= leverage <= model.BRACKETS[0][1], -4028, leverage))
        refuse_if((notional > model.notional_max(leverage), -2027),
                  (leverage < before and notional / leverage - notional / before > self.available(name),
                   -2028))
        account.leverage[symbol] = leverage
        self._account_event(account, "CONFIG", symbol, ZERO, now_ms)

    def held(self, name: str) -> dict[str, Decimal]:
        """Return the signed notional of each position that is not zero, at marks."""
        return {symbol: position.qty * self.marks[symbol]
                for symbol, position in self.accounts[name].positions.items() if position.qty}

    def margin(self, name: str) -> tuple[Decimal, Decimal, Decimal]:
        """Return what positions and what open orders bind, and the unrealized profit, at marks."""
        held = self.held(name)
        bound = sum((abs(value) / self.leverage(name, symbol) for symbol, value in held.items()), ZERO)
        resting = sum((self._margin_of(order, order.price) for order in self.mine(name, "order")), ZERO)
        return bound, resting, sum((value - self.position(name, symbol).cost
                                    for symbol, value in held.items()), ZERO)

    def available(self, name: str) -> Decimal:
        bound, resting, unrealized = self.margin(name)
        return self.accounts[name].wallet + unrealized - bound - resting

    def mine(self, name: str, kind: str, symbol: str | None = None) -> list[Order]:
        """Return an account's open orders of a kind."""
        return [o for o in self.open.values()
                if o.account == name and o.kind == kind and symbol in (None, o.symbol)]

    def place(self, order: Order, bids: Levels, asks: Levels) -> None:
        """Take an order in (its id is given here) and match it. Raises Refused."""
        self._check_order(order)
        depth = [level for level in (asks if order.side == "BUY" else bids) if order.crosses(level[0])]
        price = order.price or (depth[0][0] if depth else self.marks[order.symbol])
        need, held = self._margin_of(order, price), self.position(order.account, order.symbol).qty
        most = model.notional_max(self.leverage(order.account, order.symbol))
        refuse_if(
            (need and abs(held + order.sign * order.qty) * price > most, -2027),
            (order.tif == "GTX" and depth, -5022),
            (need and need + order.qty * price * self.taker_fee > self.available(order.account), -2019))
        self._admit(order)
        if order.tif != "FOK" or sum(qty for _, qty in depth) >= order.qty:
            self._fill(order, depth, is_maker=False)
        if order.status in OPEN and (order.type == "MARKET" or order.tif in ("IOC", "FOK")):
            self._become(order, "EXPIRED", order.update_ms)
        self.check(order.account)

    def place_algo(self, algo: Order, price: Decimal) -> None:
        """Take a conditional order in; price: of its working type. Raises Refused."""
        rules, others = self.rules[algo.symbol], self.mine(algo.account, "algo", algo.symbol)
        rules.check_price(algo.trigger)
        if not algo.close_position:
            rules.check_qty(algo.qty, "MARKET_LOT_SIZE")
        refuse_if(
            (rules.status != "TRADING", -4108), (self._is_named_twice(algo), -4116),
            (len(others) >= rules.numbers["MAX_NUM_ALGO_ORDERS.limit"], -4045),
            (algo.close_position and any(o.close_position and (o.side, o.type) == (algo.side, algo.type)
                                         for o in others), -4130),
            (algo.is_due(price), -2021))
        self._admit(algo)

    def cancel(self, order: Order, now_ms: int) -> None:
        """Cancel what is open, of either kind."""
        self._become(order, "CANCELED", now_ms)

    def fund(self, name: str, symbol: str, rate: Decimal, now_ms: int) -> None:
        """Settle the funding of a position: longs pay a positive rate, at the mark."""
        if notional := self.held(name).get(symbol):
            amount = money(-notional * rate)
            self.position(name, symbol).funding += amount
            self._credit(self.accounts[name], "FUNDING_FEE", symbol, amount, now_ms)
            self.check(name)

    def maintained(self, name: str) -> Decimal:
        """Return the maintenance margin of all positions, at marks."""
        return sum(map(model.maintenance, self.held(name).values()), ZERO)

    def is_due_for_liquidation(self, name: str) -> bool:
        """Say whether the wallet and unrealized profit no longer cover the maintenance margin."""
        return bool(self.held(name)) and self._spare(name) < 0

    def liquidation_price(self, name: str, symbol: str) -> Decimal:
        """Return the mark of a symbol at which its account is due for liquidation."""
        qty, mark = self.position(name, symbol).qty, self.marks[symbol]
        relief = qty - abs(qty) * model.bracket(qty * mark)[2]
        return max(ZERO, mark - self._spare(name) / relief) if qty else ZERO

    def _spare(self, name: str) -> Decimal:
        return self.accounts[name].wallet + self.margin(name)[2] - self.maintained(name)

    def liquidate(self, name: str, symbol: str, depth: Levels, now_ms: int) -> None:
        """Close all of a position by force; the insurance fund takes its fee, and pays what is missing."""
        order = self.force("liquidation", name, symbol, abs(self.position(name, symbol).qty), depth, now_ms)
        account = self.accounts[name]
        change = -min(money(order.spent * LIQUIDATION_FEE), max(ZERO, account.wallet))
        if account.wallet < 0 and not self.held(name):
            change = -account.wallet
        if change:
            account.deposited += change
            self._credit(account, "INSURANCE_CLEAR", symbol, change, now_ms)
            self.check(name)

    def force(self, kind: str, name: str, symbol: str, qty: Decimal, depth: Levels, now_ms: int) -> Order:
        """Close (a part of) a position without its owner; what the depth lacks goes at the mark.

        Source: recorded events of liquidation, ADL and settlement: LIMIT, IOC, the taker's fee.
        """
        held, (prefix, execution) = self.position(name, symbol).qty, FORCED[kind]
        refuse_if((not 0 < qty <= abs(held), -4003))
        mark = self.marks[symbol] - self.marks[symbol] % self.rules[symbol].price_step
        order = Order(account=name, symbol=symbol, client_id=f"{prefix}{self.last_ids['order'] + 1}", qty=qty,
                      side="SELL" if held > 0 else "BUY", type="LIMIT", tif="IOC", price=mark,
                      reduce_only=True, execution=execution, time_ms=now_ms, update_ms=now_ms)
        self._admit(order)
        self._fill(order, [*depth, (mark, qty)], is_maker=False)
        self.check(name)
        return order

    def match(self, symbol: str, bids: Levels, asks: Levels, now_ms: int) -> None:
        """Fill resting orders that the market crosses, at their own price."""
        for order in [o for o in self.open.values() if o.symbol == symbol and o.kind == "order"]:
            depth = [level for level in (asks if order.side == "BUY" else bids) if order.crosses(level[0])]
            if depth and order.status in OPEN:
                order.update_ms = now_ms
                self._fill(order, depth, is_maker=True)
                self.check(order.account)

    def due(self, symbol: str, last: Decimal, mark: Decimal) -> list[Order]:
        """Return the conditional orders these prices trigger."""
        return [o for o in self.open.values() if o.symbol == symbol and o.kind == "algo"
                and o.is_due(mark if o.working_type == "MARK_PRICE" else last)]

    def trigger(self, algo: Order, bids: Levels, asks: Levels, now_ms: int) -> None:
        """Turn a conditional order into the market order it stands for, which keeps its client id.

        Source: recorded ALGO_UPDATE events: TRIGGERING, TRIGGERED (with the order's id), the
        order's own events, FINISHED with what was filled.
        """
        algo.trigger_ms = now_ms
        self._become(algo, "TRIGGERING", now_ms)
        order = Order(
            account=algo.account, symbol=algo.symbol, client_id=algo.client_id, side=algo.side,
            type="MARKET", qty=algo.qty or abs(self.position(algo.account, algo.symbol).qty),
            trigger=algo.trigger, working_type=algo.working_type, orig_type=algo.type, ref=algo.id,
            reduce_only=algo.reduce_only or algo.close_position, close_position=algo.close_position,
            time_ms=now_ms, update_ms=now_ms)
        try:
            self.place(order, bids, asks)
        except Refused as refusal:
            algo.reason = "Reduce Only reject" if refusal.code == -2022 else refusal.text
            self._become(algo, "REJECTED", now_ms)
            return
        algo.filled, algo.spent = order.filled, order.spent
        self._become(algo, "FINISHED", now_ms)

    def check(self, name: str) -> None:
        """Check that an account's books balance. Raises InvariantError."""
        account = self.accounts[name]
        total = account.deposited
        for symbol, p in account.positions.items():
            total += p.realized - p.fees + p.funding
            if p.realized != p.cost - p.flow or p.qty != p.traded or (p.cost and not p.qty):
                raise InvariantError(f"{name} {symbol}: realized must be cost - flow, qty the sum of fills, "
                                     f"and nothing cost nothing; was {p}")
        if account.wallet != total:
            raise InvariantError(f"{name}: the wallet must be {total}; was {account.wallet}")

    def _is_named_twice(self, order: Order) -> bool:
        return any(o.client_id == order.client_id for o in self.mine(order.account, order.kind))

    def _check_order(self, order: Order) -> None:
        rules, mark = self.rules[order.symbol], self.marks[order.symbol]
        closable, is_buy = self._closable(order), order.side == "BUY"
        refuse_if(
            (rules.status != "TRADING", -4108), (self.accounts[order.account].is_hedged, -4061),
            (not order.ref and self._is_named_twice(order), -4116),
            (order.reduce_only and not closable, -2022))
        if order.reduce_only:
            order.qty = min(order.qty, closable)
        is_limit = order.type == "LIMIT"
        rules.check_qty(order.qty, "LOT_SIZE" if is_limit else "MARKET_LOT_SIZE")
        if is_limit:
            rules.check_price(order.price)
            bound = mark * rules.numbers[f"PERCENT_PRICE.multiplier{'Up' if is_buy else 'Down'}"]
            bound -= bound % rules.price_step
            refuse_if((is_buy and order.price > bound, -4016, bound),
                      (not is_buy and order.price < bound, -4024, bound))
        notional, least = order.qty * (order.price or mark), rules.numbers["MIN_NOTIONAL.notional"]
        refuse_if((not order.reduce_only and notional < least, -4164, f"{least.normalize():f}"),
                  (len(self.mine(order.account, "order", order.symbol))
                   >= rules.numbers["MAX_NUM_ORDERS.limit"], -2025))

    def _closable(self, order: Order) -> Decimal:
        return max(ZERO, -order.sign * self.position(order.account, order.symbol).qty)

    def _margin_of(self, order: Order, price: Decimal) -> Decimal:
        # Only what would open counts; what closes the position needs no margin.
        opens = max(ZERO, order.qty - order.filled - self._closable(order))
        return ZERO if order.reduce_only else opens * price / self.leverage(order.account, order.symbol)

    def _admit(self, order: Order) -> None:
        self.last_ids[order.kind] += 1
        order.id = self.last_ids[order.kind]
        order.orig_type = order.orig_type or order.type
        self.open[order.id] = order
        if order.ref:
            self.open[order.ref].ref = order.id
            self._become(self.open[order.ref], "TRIGGERED", order.time_ms)
        self._order_event("NEW", order)

    def _fill(self, order: Order, depth: Levels, *, is_maker: bool) -> None:
        left = order.qty - order.filled
        if order.reduce_only:
            left = min(left, self._closable(order))
        taken: Levels = []
        for price, qty in depth:
            if left > 0:
                taken.append((price, min(qty, left)))
                left -= taken[-1][1]
        if taken:
            trade_ids = self._take(order.symbol, order.side, taken)
            for trade_id, (price, qty) in zip(trade_ids, taken, strict=True):
                self._book(order, trade_id, order.price if is_maker else price, qty, is_maker)
            self._sweep(order.account, order.symbol, order.update_ms)

    def _book(self, order: Order, trade_id: int, price: Decimal, qty: Decimal, is_maker: bool) -> None:
        account, now_ms = self.accounts[order.account], order.update_ms
        position = account.positions.setdefault(order.symbol, Position())
        fee = money(qty * price * (self.maker_fee if is_maker else self.taker_fee))
        realized = position.apply(order.sign * qty, price)
        position.fees += fee
        position.update_ms = account.update_ms = now_ms
        account.wallet += realized - fee
        order.filled += qty
        order.spent += qty * price
        order.status = "FILLED" if order.filled == order.qty else "PARTIALLY_FILLED"
        if order.status == "FILLED":
            del self.open[order.id]
        self._income(account.name, order.symbol, "COMMISSION", -fee, trade_id, now_ms)
        if realized:
            self._income(account.name, order.symbol, "REALIZED_PNL", realized, trade_id, now_ms)
        self._account_event(account, "ORDER", order.symbol, ZERO, now_ms)
        self._order_event(order.execution, order, model.Fill(
            id=trade_id, account=account.name, symbol=order.symbol, order_id=order.id, side=order.side,
            price=price, qty=qty, fee=fee, realized=realized, is_maker=is_maker, time_ms=now_ms))

    def _sweep(self, name: str, symbol: str, now_ms: int) -> None:
        # What can only reduce a position does not outlive it.
        for order in self.mine(name, "order", symbol):
            if order.reduce_only and not self._closable(order):
                self._become(order, "EXPIRED", now_ms)
        for algo in self.mine(name, "algo", symbol):
            if algo.tif == "GTE_GTC" and algo.status == "NEW" and not self.position(name, symbol).qty:
                self._become(algo, "EXPIRED", now_ms)

    def _become(self, order: Order, status: str, now_ms: int) -> None:
        order.status, order.update_ms = status, now_ms
        if status not in OPEN:
            del self.open[order.id]
        self._order_event(status, order)

    def _order_event(self, execution: str, order: Order, fill: model.Fill | None = None) -> None:
        self._events.append(model.OrderEvent(order.account, execution, msgspec.structs.replace(order), fill))

    def _account_event(self, account: Account, reason: str, symbol: str, change: Decimal,
                       now_ms: int) -> None:
        position = msgspec.structs.replace(account.positions.get(symbol) or Position())
        self._events.append(model.AccountEvent(account.name, reason, symbol, account.wallet, change,
                                               position, now_ms))

    def _credit(self, account: Account, reason: str, symbol: str, amount: Decimal, now_ms: int) -> None:
        account.wallet += amount
        account.update_ms = now_ms
        self._income(account.name, symbol, reason, amount, 0, now_ms)
        self._account_event(account, "DEPOSIT" if reason == "TRANSFER" else reason, "", amount, now_ms)

    def _income(self, name: str, symbol: str, reason: str, amount: Decimal, trade_id: int,
                now_ms: int) -> None:
        self.last_ids["income"] += 1
        self._events.append(model.Income(self.last_ids["income"], name, symbol, reason, amount, trade_id,
                                         now_ms))
