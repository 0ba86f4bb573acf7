"""The user's strategy class: found on the Python path, and held to what it must have."""

import importlib
from typing import get_args

from bot.config import Config, Timeframe
from bot.errors import ConfigError

# What importing a module with a mistake in it raises; anything else is a crash with a traceback.
IMPORT_ERRORS = (ImportError, SyntaxError, NameError, AttributeError, TypeError, ValueError, LookupError)


def load_class(config: Config, name: str) -> type:
    """Return the class of strategy NAME, from anywhere on the Python path. Raises ConfigError."""
    if name not in config.strategy:
        raise ConfigError(f"strategy.{name}: is not in the file; it has {', '.join(config.strategy)}")
    key, path = f"strategy.{name}.class", config.strategy[name].class_path
    module_name, _, class_name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except IMPORT_ERRORS as error:
        raise ConfigError(f"{key}: {module_name} cannot be imported: {type(error).__name__}: {error}; "
                          "is its folder in PYTHONPATH?") from error
    found = getattr(module, class_name, None)
    if not isinstance(found, type) or not callable(getattr(found, "on_tick", None)):
        raise ConfigError(f"{key}: must name a class with a method on_tick(tick); {class_name} in "
                          f"{module.__file__} is {'missing' if found is None else repr(found)}")
    return found


def history_of(strategy_class: type, config: Config, name: str) -> tuple[str, int] | None:
    """Return the (timeframe, count) of candles the class declares, if it does. Raises ConfigError."""
    declared, count_max = getattr(strategy_class, "history", None), config.gateway.history_count_max
    if not declared:
        return None
    key = f"strategy.{name}.class: {strategy_class.__name__}.history"
    if not isinstance(declared, dict) or len(declared) != 1:
        raise ConfigError(f'{key}: must name one timeframe, like {{"1m": 500}}; was {declared!r}')
    timeframe, count = next(iter(declared.items()))
    if timeframe not in get_args(Timeframe) or not isinstance(count, int) or not 1 <= count <= count_max:
        raise ConfigError(f"{key}: a timeframe is one of {', '.join(get_args(Timeframe))}, the count is 1 to "
                          f"{count_max} (gateway.history_count_max); was {declared!r}")
    if not callable(getattr(strategy_class, "on_history", None)):
        raise ConfigError(f"{key}: needs a method on_history(symbol, candles) to take the candles")
    return timeframe, count
