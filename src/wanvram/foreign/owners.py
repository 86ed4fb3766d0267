"""Who of a foreign program owns the memory: its own functions and those of its libraries, not PyTorch's, by file and line."""

from __future__ import annotations

import sys
from types import CodeType, FrameType
from typing import Any

from wanvram.record import WHOLE_RUN
from wanvram.simulate.timeline import Interval, Places, Timeline
from wanvram.spans import Memory
from wanvram.timeline_record import TimelineRecord

__all__ = ["ForeignTimeline"]

_OURS = (
    "wanvram",
    "torch",
    "contextlib",
    "functools",
    "runpy",
    "importlib",
    "accelerate.hooks",
    "diffusers.hooks.hooks",
)
_HERE = __file__.replace("\\", "/").rpartition("/foreign/")[0]


class ForeignTimeline(Timeline):
    """A timeline whose owners are the program's functions."""

    def __init__(self, allocator: Any, outside_bytes: int | None = None) -> None:
        super().__init__(allocator, outside_bytes)
        self._places: Any = _ForeignPlaces()

    def record(self) -> TimelineRecord:
        """With the whole run as one more stage, the last: what a program does between the stages it names belongs to it."""
        self._entries.append(Interval(WHOLE_RUN, "stage", None, 0))
        try:
            return super().record()
        finally:
            self._entries.pop()

    def where(self) -> str:
        """The line of the program that is running."""
        return (self._places.of_caller() or "?").rpartition(" > ")[2]

    def begun(self) -> int:
        """The number of events so far."""
        return len(self._kinds)

    def peaks(self, first: int = 0) -> Memory:
        """The highest of each figure since the event of that number."""
        allocated, reserved, outside = self._series()[:, first:]
        device = None if self._outside is None else int((reserved + outside).max()) + self._outside
        return Memory(int(allocated.max()), int(reserved.max()), device)


class _ForeignPlaces(Places):
    """`attention.Attention.forward:120 > Linear...`: the innermost functions outside PyTorch."""

    def __init__(self) -> None:
        super().__init__()
        self._named: dict[int, str] = {}  # by the id of code, which is kept for it
        self._kept: list[CodeType] = []

    def of_caller(self) -> str | None:
        frame: FrameType | None = sys._getframe(4)  # those before are ours
        inner: str | None = None
        named = self._named
        while frame is not None:
            known = named.get(id(frame.f_code))
            if known is None:
                known = named[id(frame.f_code)] = _name(frame.f_code, frame.f_globals)
                self._kept.append(frame.f_code)
            if known:
                line = self._line(frame, known)
                if inner is not None:
                    return self._path(line, inner)
                inner = line
            frame = frame.f_back
        return inner

    def _path(self, outer: str, inner: str) -> str:
        """With the file of both, as `where` needs it."""
        path = self._paths.get((outer, inner))
        if path is None:
            path = self._paths[outer, inner] = f"{outer} > {inner}"
            self.names[path] = f"{self.names[outer]} > {self.names[inner]}"
        return path


def _name(code: CodeType, names: dict[str, Any]) -> str:
    """`file.Class.function`; nothing for code that asks on behalf of others."""
    module = names.get("__name__") or ""
    if code.co_name.startswith("<") and code.co_name != "<module>":
        return ""
    path = code.co_filename.replace("\\", "/")
    if module.partition(".")[0] in _OURS or module in _OURS or path.startswith(_HERE):
        return ""
    file = path.rpartition("/")[2].removesuffix(".py")
    function = getattr(code, "co_qualname", code.co_name).replace("<locals>.", "")
    return file if function == "<module>" else f"{file}.{function}"
