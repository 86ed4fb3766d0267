"""The most frames of a request that a budget holds, found with forecasts of the leanest strategies. No torch."""

from __future__ import annotations

from collections.abc import Callable

from wanvram.config import Strategy
from wanvram.planner.forecasts import Trials, components_of
from wanvram.planner.refusal import least_peak
from wanvram.request import MAX_FRAMES

__all__ = ["most_frames"]

ENCODERS = ("text_encoder", "image_encoder")  # their memory does not depend on the number of frames


def most_frames(trials: Trials, base: Strategy) -> int | None:
    """4n+1, at most 4093; None if not even the fewest fit the device. The first guess is the request's own number."""
    least = 1 if trials.request.kind == "flf2v" else 0  # flf2v has at least 5 frames
    known: dict[int, int] = {}

    def room(n: int) -> int:
        """Bytes that 4n+1 frames leave of the limit, negative if they do not fit."""
        if n not in known:
            other = trials.for_request(frame_num=4 * n + 1)
            names = [c for c in components_of(other.request) if n == least or c not in ENCODERS]
            known[n] = trials.budget.device_limit - max(least_peak(other, base, name) for name in names)
        return known[n]

    if room(least) < 0:
        return None
    most = (MAX_FRAMES - 1) // 4
    first = min(most, max(least + 1, (trials.request.frame_num - 1) // 4))
    return 4 * _last(room, least, first, most) + 1


def _last(room: Callable[[int], int], fitting: int, guess: int, most: int) -> int:
    """The last n with room, which falls about linearly: where the line through two known points ends, then what is beside."""
    too_many = most + 1
    while too_many - fitting > 1:
        guess = min(max(guess, fitting + 1), too_many - 1)
        before, left = (fitting, room(fitting)), room(guess)
        fell = max(1.0, (before[1] - left) / (guess - before[0]))
        if left >= 0:
            fitting, guess = guess, guess + int(left / fell)
            # At least one further, so that the next guess also closes the range from above.
            guess = max(guess, fitting + 1)
        else:
            too_many, guess = guess, before[0] + int(before[1] / fell)
    return fitting
