"""The operations `wanvram::*` that models call: exact output memory, one definition for CPU, CUDA and meta tensors.

Which backend computes attention is in `kernels.attention_backends`, readable without torch; so nothing is imported here at once.
"""

from __future__ import annotations

from typing import Any

MEMORY_IS = "the caller's"  # read by simulate.timeline


def __getattr__(name: str) -> Any:
    if name != "attention":
        raise AttributeError(name)
    from wanvram.kernels.scaled_attention import attention

    return attention
