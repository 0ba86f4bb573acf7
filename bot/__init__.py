"""tradehost: gateway, strategies and executor for one trading host."""

import os
import signal
import sys

if "SUPERVISOR_ENABLED" in os.environ:  # "config apply" may signal what still imports: it waits
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})

if "bot.run" in sys.orig_argv:  # Ctrl-C while it imports: nothing runs yet, and there is nothing to say
    signal.signal(signal.SIGINT, signal.SIG_DFL)

__version__ = "0.1.0"
