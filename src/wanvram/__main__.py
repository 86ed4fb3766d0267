"""The `wanvram` command, also as `python -m wanvram`. Its imports take up to 3 s, in which Ctrl-C ends it without a traceback."""

import signal
import sys

if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from wanvram.cli.main import main  # from here on the command takes the signals itself: `catching`

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(main())
