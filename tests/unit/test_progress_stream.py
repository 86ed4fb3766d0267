"""Progress on a stream that takes nothing: dropped, whatever the reason, and shown again when there is room."""

from __future__ import annotations

import errno
import io

import pytest

from wanvram.matrix.progress import Lines
from wanvram.progress_stream import ProgressStream
from wanvram.report.live import LiveView
from wanvram.run_events import StageBegan


class Refusing(io.StringIO):
    """Raises `error` at every write, as long as there is one."""

    def __init__(self, error: Exception | None) -> None:
        super().__init__()
        self.error = error

    def write(self, text: str) -> int:
        if self.error is not None:
            raise self.error
        return super().write(text)


ERRORS = [BrokenPipeError(), OSError(errno.ENOSPC, "No space left on device"), OSError(errno.EIO, "Input/output error")]


@pytest.mark.parametrize("error", [*ERRORS, BlockingIOError(), ValueError("I/O operation on closed file")])
def test_what_cannot_be_shown_is_dropped_and_later_lines_are_tried(error: Exception) -> None:
    stream = Refusing(error)
    progress = ProgressStream(stream)
    progress.line("lost")
    stream.error = None
    progress.line("seen")
    assert stream.getvalue().endswith(" s] seen\n")
    assert "lost" not in stream.getvalue()


def test_a_closed_stream_and_none_take_everything_and_are_no_terminal() -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        progress = ProgressStream(stream)
        progress.line("lost")
        assert not progress.isatty()


def test_a_series_and_a_live_view_go_on_without_their_stream() -> None:
    lines = Lines(Refusing(BrokenPipeError()))
    lines.started(1, 2, "a")
    lines.message("a", "decode")
    LiveView("a", None, Refusing(BrokenPipeError())).told(StageBegan("decode"))
