"""`python -m wanvram` is the `wanvram` command."""

import sys

from wanvram.cli.main import main

sys.exit(main())
