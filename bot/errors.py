"""The errors of the appliance: each says who broke which rule, and what to do."""

EXIT_OK = 0
EXIT_NO = 1  # botctl: the answer is no
EXIT_USAGE = 2  # argparse's own
EXIT_PENDING = 3  # botctl: no answer yet
EXIT_SOFTWARE = 70  # sysexits.h EX_SOFTWARE: an invariant of ours was broken
EXIT_CONFIG = 78  # sysexits.h EX_CONFIG: nothing was started, mend the file


class TradehostError(Exception):
    """Base of all our errors."""


class ConfigError(TradehostError):
    """The configuration breaks a rule; the text holds the key's path, the rule and the value."""


class UsageError(TradehostError):
    """What an operator typed makes no sense here; the text says what would."""


class RefusedError(TradehostError):
    """What an operator asked for is not done; the text says why, and what to do instead."""


class WireError(TradehostError):
    """A message is malformed, oversized or of another version.

    reason: one of "malformed", "oversized", "version"; the label it is counted under.
    """

    def __init__(self, reason: str, text: str) -> None:
        super().__init__(text)
        self.reason = reason


class IllegalTransition(TradehostError):
    """An order event is not legal in the order's state; the state was not changed."""


class JournalError(TradehostError):
    """The journal is damaged, locked by another executor, or belongs to another account."""


class OutboxError(TradehostError):
    """A strategy's outbox file is damaged before its tail: signals may be missing from it."""


class InvariantError(TradehostError):
    """A statement about money that must hold does not: trading halts before the process dies."""


class ExchangeError(TradehostError):
    """The exchange refused or garbled something that is not an order (a query, a listing)."""

    def __init__(self, text: str, *, status: int = 0, code: int = 0) -> None:
        super().__init__(text)
        self.status = status
        self.code = code
