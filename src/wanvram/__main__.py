"""`python -m wanvram` is the `wanvram` command."""

import signal
import sys

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # while the rest is imported Ctrl-C ends it without a traceback

from wanvram.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
