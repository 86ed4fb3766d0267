"""`wanvram VERB`: one file per verb, each with `prepare_parser` and `run`; errors become one sentence and an exit code."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Sequence

from wanvram.cli import analyze, check, compare, convert, estimate, generate, plan, profile, report
from wanvram.errors import WanvramError
from wanvram.version import __version__

__all__ = ["main"]

VERBS = (generate, plan, estimate, profile, analyze, compare, report, check, convert)


class _Parser(argparse.ArgumentParser):
    """Bad flags exit with 2 and one sentence instead of a usage dump."""

    def error(self, message: str) -> None:  # type: ignore[override]
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="wanvram", description="GPU memory of Wan2.1 video generation: predicted, planned, measured.")
    parser.add_argument("--version", action="version", version=f"wanvram {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", parser_class=_Parser)
    for module in VERBS:
        name = module.__name__.rpartition(".")[2]
        summary, _, details = (module.__doc__ or "").partition("\n")
        verb = verbs.add_parser(
            name,
            help=summary,
            description=summary,
            epilog=details,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        verb.add_argument("--debug", action="store_true", help="show the traceback of an error")
        module.prepare_parser(verb)
        verb.set_defaults(run=module.run)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    _print_any_text()
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.verb is None:
        parser.print_help()
        return 0
    try:
        return int(args.run(args))
    except WanvramError as error:
        if args.debug:
            raise
        print(f"wanvram: {error}", file=sys.stderr)
        return error.exit_code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the reader has gone: nothing more to say to it
        return 1
    except KeyboardInterrupt:
        print("wanvram: interrupted; what was recorded is kept", file=sys.stderr)
        return 1


def _print_any_text() -> None:
    """A console or a pipe that is not Unicode, as on Windows, gets \\u4e2d for a character it lacks, not an exception."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
