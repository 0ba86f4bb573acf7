"""The paper exchange's books: what is open, who owns what, matching against depth, fees.

Pure: the time is told (`now_ms`, before each command), prices and depth are the market's. Every command
either raises Refused and changes nothing, or leaves books that balance (always checked) and events.
"""

from collections.abc import Iterable, Mapping
from decimal import Decimal

from msgspec.structs import replace

from bot import paper_model as model
from bot.errors import InvariantError
from bot.paper_feed import FUNDING_MS, FUNDING_RATE, Feed
from bot.paper_model import OPEN, ZERO, Account, Levels, Order, Position, Refused, money, refuse_if

LEVERAGE = 20  # of a symbol whose leverage was never set, as on a fresh account
LIQUIDATION_FEE = Decimal("0.0125")  # liquidationFee of exchangeInfo; it goes to the insurance fund
# Orders of the exchange itself: how their client ids begin, and what their fills are called.
FORCED = model.table("forced", dict[str, tuple[str, str]])


class Ledger:
    """All accounts and what is open. What is closed leaves with its last event (the store keeps it)."""

    def __init__(self, feeds: Mapping[str, Feed], *, taker_fee: Decimal, maker_fee: Decimal) -> None:
        self.feeds, self.taker_fee, self.maker_fee = feeds, taker_fee, maker_fee
        self.contracts = {symbol: feed.contract for symbol, feed in feeds.items()}
        self.now_ms = 0
        self.accounts: dict[str, Account] = {}
        self.open: dict[int, Order] = {}  # ids of the two kinds never meet
        # Ids exceed 32 bits, as the real ones do.
        self.last_ids = {"order": 10_000_000_000, "algo": 1_000_000_000_000_000, "income": 0}
        self._events: list[model.Event] = []

    def events(self) -> list[model.Event]:
        """Return what happened since the last call, in order."""
        events, self._events = self._events, []
        return events

    def deposit(self, name: str, amount: Decimal) -> None:
        """Open the account when it is new, and put money in."""
        account = self.accounts.setdefault(name, Account(name))
        account.deposited += amount
        self._credit(account, "TRANSFER", "", amount)

    def position(self, name: str, symbol: str) -> Position:
        return self.accounts[name].positions.get(symbol) or Position()

    def leverage(self, name: str, symbol: str) -> int:
        return self.accounts[name].leverage.get(symbol, LEVERAGE)

    def set_leverage(self, name: str, symbol: str, leverage: int) -> None:
        account, before = self.accounts[name], self.leverage(name, symbol)
        notional = abs(self.held(name).get(symbol, ZERO))
        refuse_if((not 1 <= leverage <= model.BRACKETS[0].initial_leverage, -4028, leverage))
        more = notional / leverage - notional / before
        refuse_if((notional > model.notional_max(leverage), -2027),
                  (leverage < before and more > self.sums(name)["free"], -2028))
        account.leverage[symbol] = leverage
        self._account_event(account, "CONFIG", symbol)

    def held(self, name: str) -> dict[str, Decimal]:
        """Return the signed notional of each position that is not zero, at marks."""
        return {symbol: position.qty * self.feeds[symbol].mark()
                for symbol, position in self.accounts[name].positions.items() if position.qty}

    def sums(self, name: str) -> dict[str, Decimal]:
        """Return an account's money by name, at marks; `spare` below zero: it is due for liquidation."""
        account, held = self.accounts[name], self.held(name)
        bound = sum((abs(value) / self.leverage(name, symbol) for symbol, value in held.items()), ZERO)
        resting = sum((self._margin_of(order, order.price) for order in self.mine(name, "order")), ZERO)
        unrealized = sum(held.values(), ZERO) - sum(p.cost for p in account.positions.values())
        maintained, margin = sum(map(model.maintenance, held.values()), ZERO), account.wallet + unrealized
        return {"wallet": account.wallet, "unrealized": unrealized, "margin": margin, "bound": bound,
                "resting": resting, "initial": bound + resting, "free": margin - bound - resting,
                "maintained": maintained, "spare": margin - maintained}

    def is_due_for_liquidation(self, name: str) -> bool:
        """Say whether the wallet and unrealized profit no longer cover the maintenance margin."""
        return bool(self.held(name)) and self.sums(name)["spare"] < 0

    def liquidation_price(self, name: str, symbol: str) -> Decimal:
        """Return the mark of a symbol at which its account is due for liquidation."""
        qty, mark = self.position(name, symbol).qty, self.feeds[symbol].mark()
        relief = qty - abs(qty) * model.bracket(qty * mark).maint_margin_ratio
        return max(ZERO, mark - self.sums(name)["spare"] / relief) if qty else ZERO

    def mine(self, name: str, kind: str, symbol: str | None = None) -> list[Order]:
        return [o for o in self.open.values()
                if o.account == name and o.kind == kind and symbol in (None, o.symbol)]

    def place(self, order: Order) -> Order:
        """Take an order of either kind in (its id is given here), and match a plain one. Raises Refused."""
        order.time_ms = order.update_ms = self.now_ms
        depth = [] if order.kind == "algo" else self._depth(order)
        refuse_if((self.contracts[order.symbol].status != "TRADING", -4108),
                  (self.accounts[order.account].is_hedged, -4061),
                  (not order.ref and any(o.client_id == order.client_id
                                         for o in self.mine(order.account, order.kind)), -4116))
        if order.kind == "algo":
            self._check_algo(order)
        else:
            self._check_order(order, depth)
        self._admit(order)
        if order.tif != "FOK" or sum(qty for _, qty in depth) >= order.qty:
            self._fill(order, depth, is_maker=False)
        if order.kind == "order" and order.status in OPEN and (
                order.type == "MARKET" or order.tif in ("IOC", "FOK")):
            self._become(order, "EXPIRED")
        self.check(order.account)
        return order

    def cancel(self, order: Order) -> None:
        self._become(order, "CANCELED")

    def cancel_all(self, name: str, symbol: str | None, kinds: Iterable[str] = ("order", "algo")) -> None:
        for order in [order for kind in kinds for order in self.mine(name, kind, symbol)]:
            self.cancel(order)

    def fund(self, name: str, rate: Decimal) -> None:
        """Settle the funding of all positions: longs pay a positive rate, at the mark."""
        refuse_if((abs(rate) > 1, -1130, "rate"))
        for symbol, notional in self.held(name).items():
            amount = money(-notional * rate)
            self.position(name, symbol).funding += amount
            self._credit(self.accounts[name], "FUNDING_FEE", symbol, amount)
            self.check(name)

    def care(self, name: str) -> None:
        """Settle funding by market time; liquidate: first the orders go, then the largest positions."""
        account, settled_ms = self.accounts[name], self.now_ms // FUNDING_MS * FUNDING_MS
        for _ in range(account.funded_ms or settled_ms, settled_ms, FUNDING_MS):
            self.fund(name, FUNDING_RATE)
        account.funded_ms = max(account.funded_ms, settled_ms)
        if self.is_due_for_liquidation(name):
            self.cancel_all(name, None)
        while self.is_due_for_liquidation(name):
            held = self.held(name)
            self.force("liquidation", name, max(held, key=lambda symbol: abs(held[symbol])))

    def force(self, kind: str, name: str, symbol: str, qty: Decimal | None = None) -> None:
        """Close a position, or so much of it, without its owner: liquidation, adl, settlement.

        Liquidation goes into the book; what the book lacks, and all else, goes at the mark. The insurance
        fund takes its fee of it, and pays what is missing. As recorded: LIMIT, IOC, the taker's fee.
        """
        account, mark = self.accounts[name], self.feeds[symbol].mark()
        held, (prefix, execution) = self.position(name, symbol).qty, FORCED[kind]
        qty = abs(held) if qty is None else qty
        refuse_if((not 0 < qty <= abs(held), -4003),
                  (qty != abs(held) and qty % self.contracts[symbol].step, -1111))
        order = Order(account=name, symbol=symbol, client_id=f"{prefix}{self.last_ids['order'] + 1}", qty=qty,
                      side="SELL" if held > 0 else "BUY", type="LIMIT", tif="IOC", reduce_only=True,
                      execution=execution, time_ms=self.now_ms)
        depth = self._depth(order) if kind == "liquidation" else []
        order.price = mark - mark % self.contracts[symbol].tick
        self._admit(order)
        self._fill(order, [*depth, (order.price, qty)], is_maker=False)
        if kind == "liquidation":
            change = -min(money(order.spent * LIQUIDATION_FEE), max(ZERO, account.wallet))
            if account.wallet < 0 and not self.held(name):
                change = -account.wallet
            if change:
                account.deposited += change
                self._credit(account, "INSURANCE_CLEAR", symbol, change)
        self.check(name)

    def meet(self, symbol: str) -> None:
        """Let open orders meet the market: what rests fills at its own price, and triggers are reached."""
        for order in [o for o in self.open.values() if o.symbol == symbol]:
            if order.id not in self.open:  # the one before may have ended it
                continue
            if order.kind == "order":
                if depth := self._depth(order):
                    self._fill(order, depth, is_maker=True)
                    self.check(order.account)
            elif order.is_due(self._working_price(order)):
                self._trigger(order)

    def _trigger(self, algo: Order) -> None:
        # It becomes the market order it stands for, which keeps its client id. Source: recorded ALGO_UPDATE
        # events: TRIGGERING, TRIGGERED (with the order's id), the order's own events, FINISHED.
        algo.trigger_ms = self.now_ms
        self._become(algo, "TRIGGERING")
        try:
            order = self.place(replace(
                algo, kind="order", type="MARKET", tif="GTC", status="NEW", orig_type=algo.type, ref=algo.id,
                qty=algo.qty or abs(self.position(algo.account, algo.symbol).qty), trigger_ms=0,
                reduce_only=algo.reduce_only or algo.close_position))
        except Refused as refusal:
            algo.reason = "Reduce Only reject" if refusal.code == -2022 else refusal.text
            self._become(algo, "REJECTED")
        else:
            algo.filled, algo.spent = order.filled, order.spent
            self._become(algo, "FINISHED")

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

    def _working_price(self, algo: Order) -> Decimal:
        feed = self.feeds[algo.symbol]
        return feed.mark() if algo.working_type == "MARK_PRICE" else feed.last()

    def _check_algo(self, algo: Order) -> None:
        contract, others = self.contracts[algo.symbol], self.mine(algo.account, "algo", algo.symbol)
        contract.check_price(algo.trigger)
        if not algo.close_position:
            contract.check_qty(algo.qty, "MARKET_LOT_SIZE")
        refuse_if(
            (len(others) >= contract.numbers["MAX_NUM_ALGO_ORDERS.limit"], -4045),
            (algo.close_position and any(o.close_position and (o.side, o.type) == (algo.side, algo.type)
                                         for o in others), -4130),
            (algo.is_due(self._working_price(algo)), -2021))

    def _check_order(self, order: Order, depth: Levels) -> None:
        contract, mark, name = self.contracts[order.symbol], self.feeds[order.symbol].mark(), order.account
        closable, is_buy, is_limit = self._closable(order), order.side == "BUY", order.type == "LIMIT"
        refuse_if((order.reduce_only and not closable, -2022))
        if order.reduce_only:
            order.qty = min(order.qty, closable)
        contract.check_qty(order.qty, "LOT_SIZE" if is_limit else "MARKET_LOT_SIZE")
        if is_limit:
            contract.check_price(order.price)
            bound = mark * contract.numbers[f"PERCENT_PRICE.multiplier{'Up' if is_buy else 'Down'}"]
            bound -= bound % contract.tick
            refuse_if((is_buy and order.price > bound, -4016, bound),
                      (not is_buy and order.price < bound, -4024, bound))
        least, notional = contract.numbers["MIN_NOTIONAL.notional"], order.qty * (order.price or mark)
        price = order.price or (depth[0][0] if depth else mark)
        need = self._margin_of(order, price)
        size = self.position(name, order.symbol).qty + order.sign * order.qty
        refuse_if(
            (not order.reduce_only and notional < least, -4164, f"{least.normalize():f}"),
            (len(self.mine(name, "order", order.symbol)) >= contract.numbers["MAX_NUM_ORDERS.limit"], -2025),
            (need and abs(size) * price > model.notional_max(self.leverage(name, order.symbol)), -2027),
            (order.tif == "GTX" and depth, -5022),
            (need and need + order.qty * price * self.taker_fee > self.sums(name)["free"], -2019))

    def _depth(self, order: Order) -> Levels:
        # What it may trade with.
        bids, asks, _ = self.feeds[order.symbol].book()
        return [level for level in (asks if order.side == "BUY" else bids) if order.crosses(level[0])]

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
            self._become(self.open[order.ref], "TRIGGERED")
        self._become(order, "NEW")

    def _fill(self, order: Order, depth: Levels, *, is_maker: bool) -> None:
        left, taken = order.qty - order.filled, list[tuple[Decimal, Decimal]]()
        if order.reduce_only:
            left = min(left, self._closable(order))
        for price, qty in depth:
            if left > 0:
                taken.append((price, min(qty, left)))
                left -= taken[-1][1]
        if taken:
            trade_ids = self.feeds[order.symbol].consume(order.side, taken, order.price if is_maker else ZERO)
            for trade_id, (price, qty) in zip(trade_ids, taken, strict=True):
                self._book(order, trade_id, order.price if is_maker else price, qty, is_maker)
            self._sweep(order.account, order.symbol)

    def _book(self, order: Order, trade_id: int, price: Decimal, qty: Decimal, is_maker: bool) -> None:
        account = self.accounts[order.account]
        position = account.positions.setdefault(order.symbol, Position())
        fee = money(qty * price * (self.maker_fee if is_maker else self.taker_fee))
        realized = position.apply(order.sign * qty, price)
        position.fees += fee
        position.update_ms = account.update_ms = order.update_ms = self.now_ms
        account.wallet += realized - fee
        order.filled += qty
        order.spent += qty * price
        order.status = "FILLED" if order.filled == order.qty else "PARTIALLY_FILLED"
        if order.status == "FILLED":
            del self.open[order.id]
        self._income(account.name, order.symbol, "COMMISSION", -fee, trade_id)
        if realized:
            self._income(account.name, order.symbol, "REALIZED_PNL", realized, trade_id)
        self._account_event(account, "ORDER", order.symbol)
        self._order_event(order.execution, order, model.Fill(
            id=trade_id, account=account.name, symbol=order.symbol, order_id=order.id, side=order.side,
            price=price, qty=qty, fee=fee, realized=realized, is_maker=is_maker, time_ms=self.now_ms))

    def _sweep(self, name: str, symbol: str) -> None:
        # What can only reduce a position does not outlive it.
        for order in self.mine(name, "order", symbol) + self.mine(name, "algo", symbol):
            is_tied = order.reduce_only if order.kind == "order" else (
                order.tif == "GTE_GTC" and order.status == "NEW")
            if is_tied and not self._closable(order):
                self._become(order, "EXPIRED")

    def _become(self, order: Order, status: str) -> None:
        order.status, order.update_ms = status, self.now_ms
        if status not in OPEN:
            del self.open[order.id]
        self._order_event(status, order)

    def _order_event(self, execution: str, order: Order, fill: model.Fill | None = None) -> None:
        self._events.append(model.OrderEvent(order.account, execution, replace(order), fill))

    def _account_event(self, account: Account, reason: str, symbol: str, change: Decimal = ZERO) -> None:
        self._events.append(model.AccountEvent(account.name, reason, symbol, account.wallet, change,
                                               replace(self.position(account.name, symbol))))

    def _credit(self, account: Account, reason: str, symbol: str, amount: Decimal) -> None:
        account.wallet += amount
        account.update_ms = self.now_ms
        self._income(account.name, symbol, reason, amount)
        self._account_event(account, "DEPOSIT" if reason == "TRANSFER" else reason, "", amount)

    def _income(self, name: str, symbol: str, reason: str, amount: Decimal, trade_id: int = 0) -> None:
        self.last_ids["income"] += 1
        self._events.append(model.Income(
            id=self.last_ids["income"], account=name, symbol=symbol, reason=reason, amount=amount,
            trade_id=trade_id, time_ms=self.now_ms))
