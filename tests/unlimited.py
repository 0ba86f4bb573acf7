"""The paper exchange without its limiter: a drill may ask far more than an exchange would answer."""

import sys

from bot.daemon import run
from bot.paper import main
from bot.paper_engine import Limiter

if __name__ == "__main__":
    Limiter._count = lambda *_: 0  # nothing is counted, nothing told in the headers
    sys.exit(run("paper", main))
