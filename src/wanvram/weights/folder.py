"""The checkpoint folder of `--ckpt_dir`: is there one? Without torch, so that a mistyped name is told at once."""

from __future__ import annotations

import os
from pathlib import Path

from wanvram.errors import CheckpointError

__all__ = ["GENERATED", "existing_folder", "existing_path"]

GENERATED = ("random", "tiny")  # in place of a folder: weights that are made, not read


def existing_path(weights: str) -> Path:
    """Raises CheckpointError."""
    if not os.path.exists(weights):
        raise CheckpointError(f"--ckpt_dir {weights} does not exist; give a checkpoint directory, random or tiny")
    return Path(weights)


def existing_folder(weights: str) -> Path:
    """Raises CheckpointError."""
    path = existing_path(weights)
    if not os.path.isdir(weights):  # Path.is_dir raises for a name that is too long
        raise CheckpointError(f"--ckpt_dir {weights} is not a directory; give a checkpoint directory, random or tiny")
    return path
