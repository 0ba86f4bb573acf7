"""tradehost: gateway, strategies and executor for one trading host."""

import os
import signal

if "SUPERVISOR_ENABLED" in os.environ:  # "config apply" may signal what still imports: it waits
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})

__version__ = "0.1.0"
