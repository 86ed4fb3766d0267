"""Who of a foreign program owns the memory: its own functions and those of its libraries, not PyTorch's, by file and line."""

from __future__ import annotations

from types import CodeType
from typing import Any

from wanvram.record import WHOLE_RUN
from wanvram.simulate.timeline import Interval, Places, Timeline, function_of
from wanvram.spans import Memory
from wanvram.timeline_record import TimelineRecord

__all__ = ["ForeignTimeline"]

_OURS = (
    *("wanvram", "torch", "contextlib", "functools", "runpy", "importlib"),
    *("accelerate.hooks", "diffusers.hooks.hooks"),
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

    file_once = False  # `where` needs that of the inner one

    def _describe(self, code: CodeType, names: dict[str, Any]) -> tuple[str, bool] | tuple[()]:
        """(`file.Class.function`, always two of them); nothing for code that asks on behalf of others."""
        module = names.get("__name__") or ""
        if code.co_name.startswith("<") and code.co_name != "<module>":
            return ()
        path = code.co_filename.replace("\\", "/")
        if module.partition(".")[0] in _OURS or module in _OURS or path.startswith(_HERE):
            return ()
        file, function = path.rpartition("/")[2].removesuffix(".py"), function_of(code)
        return file if function == "<module>" else f"{file}.{function}", True
