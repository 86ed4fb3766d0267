"""The export for pytorch.org/memory_viz: torch's own structure, the viewer's opcodes, and the same totals when read back."""

from __future__ import annotations

import pickle
import pickletools
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from wanvram.analysis.replay import Frame, Segment, TraceEntry
from wanvram.analysis.snapshot import read_snapshot
from wanvram.config import Request, RunConfig, Strategy
from wanvram.errors import OutputError
from wanvram.predict.simulate import simulate
from wanvram.report.memory_viz import allocator_segments, write_memory_viz
from wanvram.simulate.allocator import AllocatorSettings, CachingAllocator
from wanvram.units import MIB

# `case` labels of unpickleData in torch/utils/viz/MemoryViz.js, by the names of pickletools.
VIEWER_OPCODES = {
    "PROTO", "APPEND", "APPENDS", "LIST", "TUPLE", "NEWFALSE", "NEWTRUE", "NONE", "BINGET", "BININT", "BININT1",
    "BININT2", "EMPTY_DICT", "EMPTY_LIST", "FRAME", "LONG1", "LONG_BINGET", "MARK", "MEMOIZE", "BINPUT",
    "LONG_BINPUT", "SETITEMS", "SETITEM", "DICT", "SHORT_BINUNICODE", "BINUNICODE", "STOP", "EMPTY_TUPLE",
    "TUPLE1", "TUPLE2", "TUPLE3", "BINFLOAT",
}  # fmt: skip
LAYERS = [(Frame("dit/blocks", i, "linear"), Frame("pipeline", 1, "denoise")) for i in range(5)]


class Run:
    """A random run of the simulated allocator, recorded as the viewer wants it."""

    def __init__(self, settings: AllocatorSettings, seed: int) -> None:
        self.allocator = CachingAllocator(settings, on_segment=self._segment)
        self.entries: list[TraceEntry] = []
        self.requested: dict[int, int] = {}
        self.frames: dict[int, tuple[Frame, ...]] = {}
        rng = random.Random(seed)
        for step in range(400):
            if self.requested and rng.random() < 0.45:
                self.free(rng.choice(list(self.requested)))
            self.malloc(int(2 ** rng.uniform(6, 26)), rng.randrange(2), LAYERS[step % 5])
            if step % 150 == 149:
                self.allocator.empty_cache()

    def segments(self) -> list[Segment]:
        return allocator_segments(self.allocator.segments(), self.requested, self.frames)

    def malloc(self, size: int, stream: int, frames: tuple[Frame, ...]) -> None:
        address = self.allocator.malloc(size, stream)
        self._event("alloc", address, size, stream, frames)
        self.requested[address], self.frames[address] = size, frames

    def free(self, address: int) -> None:
        size = self.requested.pop(address)
        self.allocator.free(address)
        for action in ("free_requested", "free_completed"):
            self._event(action, address, size, 0, self.frames[address])

    def _segment(self, action: str, address: int, size: int, stream: int) -> None:
        self._event(action, address, size, stream, ())

    def _event(self, action: str, address: int, size: int, stream: int, frames: tuple[Frame, ...]) -> None:
        self.entries.append(TraceEntry(action, address, size, stream, 10 * len(self.entries), frames))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "settings", [AllocatorSettings(), AllocatorSettings(expandable_segments=True)], ids=["default", "expandable"]
)
def test_a_simulated_run_read_back_has_the_same_totals(settings: AllocatorSettings, seed: int, tmp_path: Path) -> None:
    run, path = Run(settings, seed), tmp_path / "run.pickle"
    write_memory_viz(path, run.entries, run.segments())
    snapshot = read_snapshot(path)
    found, model = snapshot.main, run.allocator
    assert snapshot.notes == ()
    assert (found.peak_allocated_bytes, found.peak_reserved_bytes) == (
        model.peak_allocated_bytes,
        model.peak_reserved_bytes,
    )
    assert (found.allocated_bytes, found.reserved_bytes) == (model.allocated_bytes, model.reserved_bytes)
    assert (found.complete, found.events) == (True, len(run.entries))
    assert sum(group.bytes for group in found.peak.alive) == model.peak_allocated_bytes
    assert {group.operation for group in found.peak.alive} <= {frames[0].where for frames in LAYERS}


def test_the_map_at_a_peak_that_is_the_end_is_the_allocators_own(tmp_path: Path) -> None:
    run = Run(AllocatorSettings(), 7)
    for step in range(60):
        run.malloc(40 * MIB, 0, LAYERS[step % 5])
    write_memory_viz(tmp_path / "run.pickle", run.entries, run.segments())
    peak = read_snapshot(tmp_path / "run.pickle").main.peak
    assert peak.allocated_bytes == run.allocator.allocated_bytes
    moved = run.segments()[0].address - peak.segments[0].address
    assert [(s.address + moved, s.size, s.small) for s in peak.segments] == [
        (v.address, v.size, v.small) for v in run.allocator.segments()
    ]
    assert [(b.address + moved, b.size, b.requested_size, b.state) for s in peak.segments for b in s.blocks] == [
        (b.address, b.size, b.requested_size, b.state) for s in run.segments() for b in s.blocks
    ]


def test_every_address_is_a_number_the_viewer_can_hold_and_small_ones_stay(tmp_path: Path) -> None:
    """JavaScript adds sizes to addresses in doubles: beyond 2**53 neighbours of 512 bytes would become one."""
    run, path = Run(AllocatorSettings(), 3), tmp_path / "run.pickle"
    assert run.entries[0].addr > 1 << 60
    write_memory_viz(path, [*run.entries, TraceEntry("snapshot", 0, 0, 0, 1 << 50)], run.segments())
    trace = pickle.loads(path.read_bytes())["device_traces"][0]
    assert all(0 < entry["addr"] < 1 << 53 for entry in trace[:-1])
    assert trace[-1]["addr"] == 0
    real = [TraceEntry("segment_alloc", 0x7F00_0000_0000, 2 * MIB, 0, 0)]
    write_memory_viz(path, real, [])
    assert pickle.loads(path.read_bytes())["device_traces"][0][0]["addr"] == 0x7F00_0000_0000


def test_the_viewer_knows_every_opcode_of_the_file(tmp_path: Path) -> None:
    run, path = Run(AllocatorSettings(), 0), tmp_path / "run.pickle"
    write_memory_viz(path, [*run.entries, TraceEntry("oom", 5, 1 << 40, 0, 1 << 50)], run.segments())
    used = {opcode.name for opcode, _, _ in pickletools.genops(path.read_bytes())}
    assert used <= VIEWER_OPCODES
    assert path.read_bytes()[:2] == b"\x80\x04"


def _keys(items: list[dict[str, Any]]) -> set[str]:
    return {key for item in items for key in item}


def test_the_structure_is_the_one_torch_documents(tmp_path: Path) -> None:
    """torch.cuda.memory._snapshot's docstring, and what annotate_snapshot of the viewer reads."""
    run, path = Run(AllocatorSettings(expandable_segments=True), 1), tmp_path / "run.pickle"
    write_memory_viz(path, [*run.entries, TraceEntry("oom", 5, 1 << 40, 0, 1 << 50)], run.segments())
    content = pickle.loads(path.read_bytes())
    assert set(content) == {"segments", "device_traces", "allocator_settings", "external_annotations"}
    (trace,) = content["device_traces"]
    assert _keys(trace[:-1]) == {"action", "addr", "size", "stream", "time_us", "frames"}
    assert (trace[-1]["action"], trace[-1]["device_free"]) == ("oom", 5)
    assert _keys(content["segments"]) >= {
        "device", "address", "total_size", "stream", "segment_type", "segment_pool_id", "allocated_size", "active_size",
        "is_expandable", "frames", "blocks",
    }  # fmt: skip
    for segment in content["segments"]:
        assert segment["device"] == 0
        ends = [block["address"] + block["size"] for block in segment["blocks"]]
        assert [block["address"] for block in segment["blocks"]] == [segment["address"], *ends[:-1]]
        assert ends[-1] == segment["address"] + segment["total_size"]
        assert _keys(segment["blocks"]) == {"address", "size", "requested_size", "state", "frames"}
    frames = [frame for entry in trace for frame in entry["frames"]]
    assert _keys(frames) == {"filename", "line", "name"}
    assert len({id(frame) for frame in frames}) == 6, "equal frames are stored once"


def test_torchs_own_reader_accepts_the_file(tmp_path: Path) -> None:
    from torch.cuda import _memory_viz

    run, path = Run(AllocatorSettings(), 2), tmp_path / "run.pickle"
    write_memory_viz(path, run.entries, run.segments())
    content = pickle.loads(path.read_bytes())
    assert f"{len(run.entries)} entries" in _memory_viz.trace(content)
    assert "linear" in _memory_viz.memory(content, format_flamegraph=lambda lines: lines)
    assert f"total_reserved: {_memory_viz.Bytes(run.allocator.reserved_bytes)}" in _memory_viz.segsum(content)


def test_a_file_that_cannot_be_written_is_named_and_leaves_nothing(tmp_path: Path) -> None:
    run = Run(AllocatorSettings(), 0)
    with pytest.raises(OutputError, match=r"cannot write .*none/run\.pickle: No such file"):
        write_memory_viz(tmp_path / "none" / "run.pickle", run.entries, run.segments())
    (tmp_path / "taken").mkdir()
    with pytest.raises(OutputError, match="cannot write"):
        write_memory_viz(tmp_path / "taken", run.entries, run.segments())
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_predicted_run_exports_what_its_record_says(tmp_path: Path) -> None:
    """Through the command: the snapshot's peak is the prediction's, and every block has somebody who asked for it."""
    from wanvram.cli.main import main

    path = tmp_path / "run.pickle"
    flags = ["--task", "t2v-1.3B", "--size", "832*480", "--frame_num", "5", "--sample_steps", "2"]
    assert main(["estimate", *flags, "--memory_viz", str(path)]) == 0
    assert main(["estimate", *flags, "--memory_viz", str(path)]) == 2
    history = read_snapshot(path).main
    config = RunConfig("x", "", "simulated", Request.for_task("t2v-1.3B", size="832*480", frame_num=5, sample_steps=2))
    strategy = Strategy(precision="fp16", load_strategy="block", offload=True)
    record, _ = simulate(replace(config, strategy=strategy))
    peak = record.peak()
    assert peak is not None
    assert (history.peak_allocated_bytes, history.peak_reserved_bytes) == (peak.allocated_bytes, peak.reserved_bytes)
    assert sum(group.bytes for group in history.peak.alive) == peak.allocated_bytes
    named = [group for group in history.peak.alive if group.operation.startswith(("vae", "residency", "dit"))]
    assert sum(group.bytes for group in named) > 0.9 * peak.allocated_bytes, "by who asked, not by operation"
