"""The transformer's part of the search: how it is sliced, and how many of its blocks stay on the device. No torch.

Where the weights of a streamed block come from (`weights_in`) is given; the caller tries pinned, pageable and disk in turn.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from wanvram.config import Request, Strategy
from wanvram.planner.forecasts import Trial, Trials
from wanvram.specs import DIT
from wanvram.tasks import TASKS, latent_shape

__all__ = ["NEGLIGIBLE", "block_count", "fastest_streamed", "variants"]

NEGLIGIBLE = 0.01  # of a step: what the time model cannot tell apart; within it the search stops looking for faster ways
ROWS = (4096, 2048, 1024)  # below about 8192 rows (chosen by size) the matrix units begin to idle
VERIFICATIONS = 4  # forecasts spent on the number of resident blocks; blocks of one size need one


def block_count(request: Request) -> int:
    """Blocks that can stay on the device: the main ones, and those of VACE."""
    spec = DIT[TASKS[request.task].dit]
    return spec.num_layers + len(spec.vace_layers)


def variants(request: Request) -> list[dict[str, Any]]:
    """Lossless ways to hold fewer activations, the fastest and largest first; chunks of more rows than there are change nothing."""
    _, frames, height, width = latent_shape(request.frame_num, request.height, request.width)
    tokens = frames * height * width // 4
    sliced: dict[str, Any] = {"attention_slicing": True}
    return [{}, sliced, *(sliced | {"rows_per_chunk": rows} for rows in ROWS if rows < tokens)]


def fastest_streamed(trials: Trials, base: Strategy) -> Strategy | None:
    """The fastest block-streamed strategy that fits, `base` (load_strategy block) with more knobs set; None: none fits.

    Nothing streamed is faster than the resident transformer, so the search ends once a step is within 1 % of that. Unknown
    times: the first variant that fits, with as many resident blocks as fit.
    """
    whole = trials.of("dit", _resident(base))
    if not _host_can_hold(trials, base, whole.base_bytes):
        return None
    best: Strategy | None = None
    on_device = False
    for number, knobs in enumerate(variants(trials.request)):
        if on_device and (number > 1 or (best and not _copy_bound(trials, best))):
            break  # chunks of few rows cost more than the little that they leave for resident blocks
        found = _most_resident(trials, replace(base, **knobs))
        on_device = on_device or found is not None
        if found is not None and trials.fits_host("dit", found):
            best = _faster(trials, best, found)
    if best is not None and _copy_bound(trials, best):
        # Half the copies, for a second residual stream: slicing makes the room for that.
        joint = _most_resident(trials, replace(best, cfg="joint", attention_slicing=True, resident_blocks=0))
        if joint is not None and trials.fits_host("dit", joint):
            best = _faster(trials, best, joint)
    return best


def _resident(base: Strategy) -> Strategy:
    return replace(base, load_strategy="full", weights_in="pinned", resident_blocks=0)


def _host_can_hold(trials: Trials, base: Strategy, weight_bytes: int) -> bool:
    """False, without a simulation, if the weights that cannot be on the device do not go into host RAM either."""
    budget = trials.budget
    least, limit = weight_bytes - budget.device_limit, budget.host_limit(base.weights_in)
    if base.weights_in == "disk" or least <= limit:
        return True
    trials.failed.append(Trial("dit", base, "host", least, int(limit), None))
    return False


def _most_resident(trials: Trials, start: Strategy) -> Strategy | None:
    """`start` with as many resident blocks as fit. Memory is linear in them: interpolated, then verified by a forecast."""
    blocks, limit = block_count(trials.request), trials.budget.device_limit
    everything = replace(start, resident_blocks=blocks)
    whole = trials.of("dit", _resident(start)) if not _lean(start) else None
    if whole is not None and whole.peak_device_bytes <= limit and trials.fits_device("dit", everything):
        return everything
    if not trials.fits_device("dit", start):
        return None
    least = trials.of("dit", start).peak_device_bytes
    # Two blocks' worth of buffers are there without any resident one.
    plain = trials.of("dit", replace(start, attention_slicing=False, rows_per_chunk=None, cfg="sequential"))
    resident = trials.of("dit", _plain(start)).peak_device_bytes
    per_block = max(1.0, (resident - plain.peak_device_bytes) / max(1, blocks - 2))
    fitting, too_many = 0, blocks + 1
    for _ in range(VERIFICATIONS):
        count = min(int((limit - least) / per_block), too_many - 1)
        if count <= fitting:
            break
        tried = trials.of("dit", replace(start, resident_blocks=count)).peak_device_bytes
        fitting, too_many = (count, too_many) if tried <= limit else (fitting, count)
        per_block = max(1.0, (tried - least) / count)
    return replace(start, resident_blocks=fitting)
