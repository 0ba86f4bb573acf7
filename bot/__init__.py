"""tradehost: gateway, strategies and executor for one trading host."""

__version__ = "0.1.0"
