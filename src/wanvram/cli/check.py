"""Look at the machine before measuring: GPUs, who else uses them, versions, settings, RAM and disk.

examples:
  wanvram check
  wanvram check --json
  wanvram check --terminate 4711       asks first, and only for a process of yours that uses the GPU
  wanvram check --attention            how fast each backend of attention is here, in seconds; `--attention auto` of a run uses it
  wanvram check --cards                the cards that --gpu knows, without a GPU; --json: every figure and its source

Warms the GPU up where there is one. Ends no process by itself; every measuring run stores the same checks in its record.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from typing import Any

from wanvram.errors import DeviceError, InputError, WanvramError
from wanvram.kernels.attention_backends import BACKENDS
from wanvram.machine.attention_cache import HEAD_DIM
from wanvram.report.check import attention_text, cards_text, check_text
from wanvram.simulate.card import EFFICIENCY, card_to_json
from wanvram.simulate.gpus import GPU, GPUS
from wanvram.simulate.host import HOST
from wanvram.simulate.links import links_of
from wanvram.units import human

__all__ = ["prepare_parser", "run", "terminate"]

WAIT_SECONDS = 10.0


def prepare_parser(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--terminate", type=int, metavar="PID", help="end this process of yours on the GPU, after asking")
    add("--cards", action="store_true", help="list the cards that can be simulated, and look at nothing here")
    add("--attention", action="store_true", help="measure the backends of attention and keep the result for later runs")
    add("--json", action="store_true", help="print one JSON document on stdout, nothing else")


def run(args: argparse.Namespace) -> int:
    if args.cards + args.attention + (args.terminate is not None) > 1:
        raise InputError("--cards, --attention and --terminate: give one of them")
    if args.cards:
        return _list_cards(args)
    if args.attention:
        return _check_attention(args)
    from wanvram.machine.checks import run_checks, warm_up

    checks = run_checks()
    ended = None
    if args.terminate is not None:
        ended = terminate(args.terminate, checks, _ask, _end)
        checks = run_checks()
    checks["warm_up"] = warm_up()
    if args.json:
        print(json.dumps({"schema": 1, **checks, "terminated": ended}, ensure_ascii=False))
    else:
        print(check_text(checks), end="")
    return 0


def _list_cards(args: argparse.Namespace) -> int:
    if not args.json:
        print(cards_text(list(GPUS.values())), end="")
        return 0
    document = {
        "schema": 1,
        "efficiency": dataclasses.asdict(EFFICIENCY),
        "host": dataclasses.asdict(HOST),
        "attention": {card.key: _attention_of(card) for card in GPUS.values()},
        "links": {card.key: [dataclasses.asdict(link) for link in links_of(card)] for card in GPUS.values()},
        "cards": [card_to_json(card) for card in GPUS.values()],
    }
    print(json.dumps(document, ensure_ascii=False))
    return 0


def _attention_of(card: GPU) -> list[dict[str, Any]]:
    """What can attend in 16 bits on the card, PyTorch's own choice first; pace: of the share `efficiency.attention`."""
    able = [backend for backend in BACKENDS if backend.takes(card.compute_capability, 2, HEAD_DIM)]
    rates = [backend.rate(card.compute_capability) for backend in able]
    return [{"backend": b.name, "pace": r.pace, "source": r.source} for b, r in zip(able, rates, strict=True)]


def _check_attention(args: argparse.Namespace) -> int:
    from wanvram.machine.attention_cache import keep
    from wanvram.machine.attention_choice import fastest
    from wanvram.machine.attention_speed import conditions_here, measure
    from wanvram.machine.usable_gpu import require_gpu

    require_gpu("attention was not measured")
    conditions = conditions_here()
    if conditions is None:
        raise DeviceError("attention was not measured: the driver (NVML) does not say which GPU this is")
    measured, missing = measure(conditions)
    path, best = keep(measured), fastest(measured)
    if args.json:
        document = {"schema": 1, **dataclasses.asdict(measured), "missing": missing, "fastest": best, "file": str(path)}
        print(json.dumps(document, ensure_ascii=False))
    else:
        print(attention_text(measured, missing, best), end="")
        print(f"Wrote {path}")
    return 0


def terminate(pid: int, checks: dict[str, Any], ask: Callable[[str], bool], end: Callable[[int], None]) -> bool:
    """Ends the process if it is the user's, uses a GPU and the answer is yes. Raises InputError if it may not be ended."""
    from wanvram.machine.checks import own_gpu_process

    process = own_gpu_process(pid, checks)
    used = "" if process["used_bytes"] is None else f", {human(process['used_bytes'])}"
    if not ask(f"End process {pid} ({process['name']}{used} on GPU {process['gpu']})? [y/N] "):
        print(f"Process {pid} goes on.", file=sys.stderr)
        return False
    end(pid)
    return True


def _ask(question: str) -> bool:
    print(question, end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip().lower() in ("y", "yes")


def _end(pid: int) -> None:
    """SIGTERM, which a program may use to save its work; never SIGKILL."""
    import psutil

    try:
        process = psutil.Process(pid)
        process.terminate()
        process.wait(WAIT_SECONDS)
    except psutil.NoSuchProcess:
        return
    except psutil.AccessDenied as error:
        raise InputError(f"--terminate {pid}: the system does not allow it") from error
    except psutil.TimeoutExpired as error:
        raise WanvramError(f"process {pid} was asked to end and has not after {WAIT_SECONDS:g} s") from error
