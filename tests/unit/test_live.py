"""`--live`: a picture on a terminal, one line per stage elsewhere; both from what the recorder knows."""

from __future__ import annotations

import errno
import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from wanvram.cli.main import main
from wanvram.recorder.recorder import Recorder
from wanvram.report.live import LiveView
from wanvram.run_events import StageAdvanced
from wanvram.spans import Memory
from wanvram.units import GIB, MIB

BASELINE = Path(__file__).parents[1] / "configs" / "baseline.yaml"


class Meter:
    """Figures that the test sets, MiB; the driver sees 600 MiB more."""

    device_name = "cpu"
    caches = True

    def __init__(self) -> None:
        self.allocated, self.highest = 0, 0

    def set(self, allocated: int) -> None:
        self.allocated, self.highest = allocated, max(self.highest, allocated)

    def read(self) -> Memory:
        return Memory(self.allocated * MIB, (self.highest + 50) * MIB, None)

    def peak(self) -> Memory:
        return Memory(self.highest * MIB, (self.highest + 50) * MIB, None)

    def reset_peak(self) -> None:
        self.highest = self.allocated

    def device_memory(self) -> int:
        return (self.allocated + 600) * MIB

    def synchronize(self) -> None: ...

    def now(self, kind: str) -> float:
        return 0.0

    def host(self) -> tuple[int, int]:
        return 0, 0


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_stages(view: LiveView) -> Recorder:
    """Loads 1000 MiB, then is inside step 1 of denoise, whose first step took 700 MiB more."""
    meter = Meter()
    recorder = Recorder(meter, None, view.told)
    watching = view.watch(recorder)
    watching.__enter__()
    with recorder.span("load dit", kind="load", component="dit"):
        meter.set(1000)
    recorder._kept = (watching,)  # type: ignore[attr-defined]
    stage = recorder.span("denoise", kind="stage", component="dit")
    stage.__enter__()
    for index in range(2):
        with recorder.span(f"step {index}", kind="step", component="dit"):
            meter.set(1700)
            meter.set(1000)
    inner = recorder.span("step 2", kind="step", component="dit")
    inner.__enter__()
    recorder._kept = (watching, stage, inner)  # type: ignore[attr-defined]
    return recorder


def close(recorder: Recorder) -> None:
    watching, stage, inner = recorder._kept  # type: ignore[attr-defined]
    inner.__exit__(None, None, None)
    stage.__exit__(None, None, None)
    watching.__exit__(None, None, None)


def drawn(view: LiveView, width: int = 120) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(view.picture())
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_the_picture_shows_stages_with_their_peaks_and_memory_against_the_budget() -> None:
    view = LiveView("mine", 4 * GIB, stream=Terminal())
    recorder = run_stages(view)
    view.told(StageAdvanced("denoise", 2, 50, "steps", 1.2, 58.0))
    rows = drawn(view).splitlines()
    assert rows[0].startswith("mine")
    assert rows[1].split("  ")[0] == "stage"
    assert rows[1].split()[1:] == ["peak", "MiB", "reserved", "MiB", "device", "MiB", "time"]
    assert rows[2].split() == ["load", "dit", "1,000.0", "1,050.0", "1,600.0", "0.00", "s"]
    assert rows[3].split()[:5] == ["denoise", "(2", "parts", "done)", "1,700.0"]
    assert rows[4].split()[:2] == ["step", "2"]
    allocated = next(row for row in rows if row.startswith("allocated"))
    assert "1,000.0 MiB of 4.00 GiB, peak 1,700.0 MiB" in allocated
    assert any(row.startswith("device") and "1,600.0 MiB of 4.00 GiB" in row for row in rows)
    assert rows[-1].rstrip() == "denoise: 2 of 50 steps, 1.20 s each, 58.0 s left"
    close(recorder)


def test_the_device_never_shows_less_than_what_is_reserved_in_it() -> None:
    view = LiveView("mine", None, stream=Terminal())
    recorder = run_stages(view)
    recorder.meter.device_memory = lambda: 10 * MIB  # type: ignore[method-assign]  # read after memory was given back
    row = next(row for row in drawn(view).splitlines() if row.startswith("device"))
    assert "1,050.0 MiB, peak 2,300.0 MiB" in row
    close(recorder)


def test_at_80_columns_every_row_is_one_line_and_only_names_are_cut() -> None:
    name = "a name that is much too long for the title of a view in so narrow a terminal as this one"
    view = LiveView(name, 80 * GIB, stream=Terminal())
    recorder = run_stages(view)
    view.told(StageAdvanced("denoise" + " and more" * 9, 2, 50, "steps", 1.2, 58.0))
    recorder.meter.device_memory = lambda: 9_999 * MIB  # type: ignore[method-assign]
    peak = Memory(24_000 * MIB, 25_000 * MIB, 26_000 * MIB)
    recorder.spans[0] = replace(
        recorder.spans[0], name="load a component of a name that is long", peak=peak, seconds=1859.0
    )
    rows = drawn(view, 80).splitlines()
    assert len(rows) == 1 + 1 + 3 + 3 + 1, "title, heads, stages, bars, time left"
    assert max(map(len, rows)) <= 80
    assert rows[0].endswith("…")
    assert "…" in rows[2]
    assert rows[2].split()[-7:] == ["24,000.0", "25,000.0", "26,000.0", "30", "min", "59", "s"]
    assert rows[-2].endswith("9,999.0 MiB of 80.00 GiB, peak 25.39 GiB")
    close(recorder)


def test_over_the_budget_the_bar_is_red() -> None:
    view = LiveView("mine", GIB, stream=Terminal())
    recorder = run_stages(view)
    table = view._bars(recorder.meter, recorder.open_spans)
    styles = [bar.complete_style for bar in table.columns[1]._cells]  # type: ignore[union-attr]
    assert styles == ["red", "red", "red"]
    close(recorder)


def test_without_a_terminal_every_stage_is_a_line_when_it_ends() -> None:
    stream = io.StringIO()
    recorder = run_stages(LiveView("mine", 4 * GIB, stream=stream))
    close(recorder)
    lines = [line.partition("] ")[2] for line in stream.getvalue().splitlines()]
    assert lines == [
        "load dit",
        "load dit: peak 1,000.0 MiB allocated, 1,050.0 MiB reserved, 1,600.0 MiB device (39 % of 4.00 GiB), 0.00 s",
        "denoise",
        "denoise: peak 1,700.0 MiB allocated, 1,750.0 MiB reserved, 2,300.0 MiB device (56 % of 4.00 GiB), 0.00 s",
    ]


class GoneTerminal(Terminal):
    """A session of ssh that was closed."""

    def write(self, text: str) -> int:
        raise OSError(errno.EIO, "Input/output error")


def test_a_terminal_that_has_gone_does_not_end_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    recorder = run_stages(LiveView("mine", None, stream=GoneTerminal()))
    close(recorder)
    assert [span.name for span in recorder.spans] == ["load dit", "denoise"]
    assert "Traceback" not in capsys.readouterr().err


def test_a_name_with_markup_is_text() -> None:
    view = LiveView("[red]x[/red] [bold", None, stream=Terminal())
    assert drawn(view).startswith("[red]x[/red] [bold")
    recorder = run_stages(view)
    assert "[red]x[/red] [bold" in drawn(view)
    close(recorder)


def test_profile_live_shows_a_run_and_refuses_several(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device", "simulated", "--weights", "tiny", "-o", str(tmp_path / "run"), "--live", "--vram", "4GiB"]
    assert main(["profile", str(BASELINE), *flags, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.out.startswith("{")
    assert "] decode: peak " in captured.err
    assert "% of 4.00 GiB)" in captured.err
    assert main(["profile", str(BASELINE), str(BASELINE.with_name("offload.yaml")), "--live"]) == 2
    assert "--live shows one run" in capsys.readouterr().err
    assert main(["profile", str(BASELINE), *flags, "--retry"]) == 2
