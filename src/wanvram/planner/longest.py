"""The most frames of a request that a budget holds, found with forecasts of the leanest strategies. No torch."""

from __future__ import annotations

from collections.abc import Callable

from wanvram.config import Strategy
from wanvram.planner.forecasts import ENCODERS, Trials, components_of
from wanvram.planner.refusal import least_peak
from wanvram.request import MAX_FRAMES

__all__ = ["most_frames"]


def most_frames(trials: Trials, base: Strategy) -> int | None:
    """4n+1, at most 4093; None if not even the fewest fit the device. The first guess is the request's own number."""
    geometry = trials.request.geometry
    least = geometry.latent_frames(trials.request.facts.least_frames) - 1
    names = components_of(trials.request)
    limit = trials.budget.device_limit
    fewest = trials.for_request(frame_num=geometry.video_frames(least + 1))
    if any(least_peak(fewest, base, name) > limit for name in names if name in ENCODERS):
        return None
    growing = [name for name in names if name not in ENCODERS]
    known: dict[int, tuple[int, ...]] = {}

    def rooms(n: int) -> tuple[int, ...]:
        """Bytes that each component of 4n+1 frames leaves of the limit, negative if it does not fit."""
        if n not in known:
            other = trials.for_request(frame_num=geometry.video_frames(n + 1))
            known[n] = tuple(limit - least_peak(other, base, name) for name in growing)
        return known[n]

    if min(rooms(least)) < 0:
        return None
    most = geometry.latent_frames(MAX_FRAMES) - 1
    first = min(most, max(least + 1, geometry.latent_frames(trials.request.frame_num) - 1))
    return geometry.video_frames(_last(rooms, least, first, most) + 1)


def _last(rooms: Callable[[int], tuple[int, ...]], fitting: int, guess: int, most: int) -> int:
    """The last n with room: where the first of the lines through two known points ends.

    Room falls linearly once activations own a peak, which those of the fewest frames do not. Long videos are slow to
    simulate, so the search ends where the lines leave no room for one more, without trying that.
    """
    least, too_many = fitting, most + 1
    while too_many - fitting > 1:
        guess = min(max(guess, fitting + 1), too_many - 1)
        there, left = rooms(fitting), rooms(guess)
        falls = [max(1.0, (a - b) / (guess - fitting)) for a, b in zip(there, left, strict=True)]
        reach = min(int(room / fall) for room, fall in zip(there, falls, strict=True))  # from `fitting` on
        if min(left) < 0:
            too_many, guess = guess, fitting + reach
        else:
            if reach <= guess - fitting and fitting != least:
                return guess
            fitting, guess = guess, min(2 * guess, fitting + reach) if fitting == least else fitting + reach
    return fitting
