"""The exception tree; every error a user can cause is one of these, with the numbers in its message.

WanvramError            exit 1   a run failed
├── InputError          exit 2   bad flag, YAML, image, prompt, path
│   ├── CheckpointError exit 2   weights missing, truncated, of the wrong model
│   └── DamagedError    exit 2   a value in a file is not what belongs there; also a ValueError
├── DeviceError         exit 1   no CUDA, driver trouble
├── PeerLost            exit 1   another GPU's process of this run does not answer
├── OutOfMemory         exit 1   the device (or its cap) is full; carries what was asked for and what was alive
├── BudgetError         exit 3   nothing fits the memory the user has
└── OutputError         exit 1   the run directory or video cannot be written
"""

from __future__ import annotations

__all__ = [
    "BudgetError",
    "CheckpointError",
    "DamagedError",
    "DeviceError",
    "InputError",
    "OutOfMemory",
    "OutputError",
    "PeerLost",
    "WanvramError",
    "require",
]


class WanvramError(Exception):
    """Root of the tree: the message is one or two sentences for the user. commands: to copy, what would help."""

    exit_code = 1
    commands: tuple[str, ...] = ()


class InputError(WanvramError):
    """Something the user gave is wrong; the message names it and what is allowed."""

    exit_code = 2


class CheckpointError(InputError):
    """A weight file is missing, truncated or belongs to another model."""


class DamagedError(InputError, ValueError):
    """A value in a file is not what belongs there. Its message is ours, as no other ValueError's is: a reader may pass it on."""


class DeviceError(WanvramError):
    """The device asked for cannot be used."""


class PeerLost(WanvramError):
    """Another process of a run on several GPUs has ended or does not answer."""


class OutOfMemory(WanvramError):
    """The device, or the cap set on it, cannot give what was asked for.

    requested_bytes: the allocation that failed. allocated_bytes, reserved_bytes: the allocator at
    that moment. limit_bytes: what the process may use in total, None when unknown.
    """

    def __init__(
        self,
        message: str,
        *,
        requested_bytes: int,
        allocated_bytes: int,
        reserved_bytes: int,
        limit_bytes: int | None = None,
    ) -> None:
        super().__init__(message)
        self.requested_bytes = requested_bytes
        self.allocated_bytes = allocated_bytes
        self.reserved_bytes = reserved_bytes
        self.limit_bytes = limit_bytes


class BudgetError(WanvramError):
    """No strategy fits the budget; the message states the smallest budget that would."""

    exit_code = 3

    def __init__(self, message: str, commands: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.commands = commands


class OutputError(WanvramError):
    """The result cannot be written where the user wants it."""


def require(condition: bool, message: str) -> None:
    """InputError with `message` unless `condition`."""
    if not condition:
        raise InputError(message)
