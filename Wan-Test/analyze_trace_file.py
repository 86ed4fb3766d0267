"""`python Wan-Test/analyze_trace_file.py profiler_logs/NAME/trace.json` is `wanvram analyze`: any file or directory it reads."""

import sys

from wanvram.cli.main import main

sys.exit(main(["analyze", *sys.argv[1:]]))
