"""`wanvram VERB`: one file per verb, each with `prepare_parser` and `run`; errors become one sentence and an exit code."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from importlib.abc import SourceLoader
from importlib.util import find_spec
from typing import Any

from wanvram.cli import streams
from wanvram.errors import PeerLost, WanvramError
from wanvram.foreign_text import shown, unforeseen
from wanvram.machine.launched import launched
from wanvram.recorder.interrupts import INTERRUPTED, catching
from wanvram.version import described

__all__ = ["main"]

FIRST_SPEAKS_SECONDS = 3.0

VERBS = (
    "generate",
    "plan",
    "estimate",
    "profile",
    "simulate",
    "harvest",
    "analyze",
    "compare",
    "report",
    "check",
    "convert",
)


class _Parser(argparse.ArgumentParser):
    """Bad flags exit with 2 and one sentence instead of a usage dump."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"{self.prog}: {shown(message)} (see {self.prog} --help)\n")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """argparse drops the value of `--flag=--` and then looks for one."""
        for word in sys.argv[1:] if args is None else args:
            if word.startswith("--") and word.endswith("=--"):
                self.error(f"argument {word[:-3]}: expected a value, not --")
        return super().parse_known_args(args, namespace)

    def _print_message(self, message: str, file: Any = None) -> None:
        """argparse would say nothing of a stdout that is full."""
        if file is not None and file is sys.stdout:
            file.write(message)
        else:
            super()._print_message(message, file)


class _Version(argparse.Action):
    """Asks git only when the version is asked for."""

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(f"wanvram {described()}")
        parser.exit()


class _VerbParser(_Parser):
    """Of one verb, whose module is imported when the verb is meant: all of them would cost every command 0.3 s."""

    module = ""

    def fill(self) -> None:
        if not self.module:
            return
        module, self.module = import_module(self.module), ""
        self.description, _, self.epilog = (module.__doc__ or "").partition("\n")
        self.add_argument("--debug", action="store_true", help="show the traceback of an error")
        module.prepare_parser(self)
        self.set_defaults(run=module.run)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        self.fill()
        return super().parse_known_args(args, namespace)


def build_parser() -> argparse.ArgumentParser:
    """The flags of a verb come when it is parsed."""
    parser = _Parser(prog="wanvram", description="GPU memory of Wan2.1 video generation: predicted, planned, measured.")
    parser.add_argument("--version", action=_Version, nargs=0, help="version and commit")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_VerbParser)
    for name in VERBS:
        module = f"wanvram.cli.{name}"
        verb = verbs.add_parser(name, help=_summary(module), formatter_class=argparse.RawDescriptionHelpFormatter)
        verb.module = module
    return parser


def _summary(module: str) -> str:
    """The first line of its docstring, which is the first of its source: nothing is imported."""
    spec = find_spec(module)
    source = spec.loader.get_source(module) if spec and isinstance(spec.loader, SourceLoader) else None
    return (source or "").partition("\n")[0].strip('"')


def main(argv: Sequence[str] | None = None) -> int:
    streams.prepare()
    parser = build_parser()
    try:
        args = parser.parse_args(argv)
        args.words = list(sys.argv[1:] if argv is None else argv)  # for the processes of a run on several GPUs
        if args.verb is None:
            parser.print_help()
    except SystemExit:
        if streams.flushed():
            raise
        return 1
    except KeyboardInterrupt:
        streams.say(INTERRUPTED)
        return 1
    except OSError as error:  # the help could not be printed
        streams.abandon(sys.stdout)
        if not isinstance(error, BrokenPipeError):
            streams.say(error.strerror or "stdout cannot be written")
        return 1
    with catching():
        code = 0 if args.verb is None else _run(args)
    code = code if streams.flushed() else max(code, 1)
    streams.settle_stderr()
    if _is_rank():
        os._exit(code)  # a library's own end would wait for peers that may be gone
    return code


def _run(args: argparse.Namespace) -> int:
    """The verb's exit code. What no verb foresees ends here, in one sentence."""
    try:
        if not launched().is_first:
            streams.abandon(sys.stdout)  # one process of a run on several GPUs speaks for all
        return int(args.run(args))
    except KeyboardInterrupt as error:
        if launched().is_first:
            streams.say(f"{str(error) or INTERRUPTED}; what was recorded is kept")
        return 1
    except BrokenPipeError:
        streams.abandon(sys.stdout)  # the reader has gone: nothing more to say to it
        return 1
    except WanvramError as error:
        if args.debug:
            raise
        if not _is_said(error):
            streams.say(error, error.commands)
        return error.exit_code
    except Exception as error:
        if args.debug:
            raise
        streams.say(unforeseen(error, args.verb, f"`wanvram {args.verb} --debug`"))
        return 1


def _is_rank() -> bool:
    with suppress(WanvramError):
        return launched().is_one_of_several
    return False


def _is_said(error: WanvramError) -> bool:
    """By the first of several processes, which is waited for: the launcher ends the others when it has ended."""
    if not _is_rank() or launched().is_first:
        return False
    if not isinstance(error, PeerLost):
        time.sleep(FIRST_SPEAKS_SECONDS)
    return isinstance(error, PeerLost)
