"""Which frame of a recorded stack names the place of an allocation: the innermost of the user's own, else what C++ was doing. No torch.

Backward passes run in threads of the autograd engine, whose stacks hold no Python frame.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from wanvram.analysis.replay import Frame

__all__ = ["is_own", "place_of"]

# PyTorch's own files, compiled code, and the operations that report.memory_viz writes as innermost frames.
_NOT_OWN = re.compile(r"(^|[/\\])torch[/\\]|^(aten|prims|wanvram)\.|\.(c|cc|cpp|cu|cuh|h|hpp|so|pyx)$|^\?\?$|^$")
# What every stack holds: the recorder of stacks, the allocator, the C library, threads.
_PLUMBING = re.compile(
    r"^(torch::(unwind|CapturedTraceback|autograd::(Engine|python::PythonEngine|Node))\b|c10::|std::|void c10::|operator new"
    r"|(cuda)?malloc\b|_?_?(libc_start|clone|start_thread|pthread)|_start$|execute_native_thread_routine|\?*$)|CachingAllocator"
)
_BACKWARD = re.compile(
    r"\b(\w+Backward\w*)\b|\btorch::autograd::(?:generated::)?(?!Engine|Node\b|PyNode)(\w+)::apply\b"
)
_OPERATION = re.compile(r"\bat::_ops::(\w+)::(?:call|redispatch)\b")
NOTHING_OWN = "(inside PyTorch, no Python frame)"


def is_own(filename: str) -> bool:
    """Whether a frame is in Python code outside of PyTorch."""
    return _NOT_OWN.search(filename) is None


def place_of(frames: Sequence[Frame]) -> Frame:
    """Of a stack without an own frame, innermost first: the step of the backward pass, the operation, or the first frame
    that is neither the allocator nor the recorder of stacks.
    """
    for pattern, prefix in ((_BACKWARD, ""), (_OPERATION, "aten::")):
        for frame in frames:
            found = pattern.search(frame.name)
            if found:
                return Frame(prefix + (found[1] or found[2]), 0, "")
    for frame in frames:
        if not _PLUMBING.search(frame.name) and "CachingAllocator" not in frame.filename:
            known = frame.line > 0 and frame.filename not in ("??", "")
            return frame if known else Frame(_called(frame.name), 0, "")
    return Frame(NOTHING_OWN, 0, "")


def _called(name: str) -> str:
    """`at::native::addmm` of `at::Tensor at::native::addmm<float>(at::Tensor const&)`."""
    bare = re.split(r"[(<]", name.replace("(anonymous namespace)::", ""), maxsplit=1)[0]
    return bare.split(" ")[-1] or name[:80] or NOTHING_OWN
