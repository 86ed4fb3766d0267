"""The official script's command line: `python generate.py --task t2v-14B --size 1280*720 --ckpt_dir DIR --prompt TEXT`."""

import sys

from wanvram.cli.main import main

sys.exit(main(["generate", *sys.argv[1:]]))
