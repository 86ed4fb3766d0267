"""cuDNN's workspaces: rules and exceptions against everything that was measured (tests/data/conv_workspaces.json.gz)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from wanvram.config import Request, RunConfig, Strategy
from wanvram.predict.simulate import simulate
from wanvram.simulate.convolutions import Convolution, Table, kernel_names, kernel_workspace, workspace
from wanvram.simulate.gpus import GPUS
from wanvram.simulate.libraries import Libraries
from wanvram.units import MIB

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "tests" / "data" / "conv_workspaces.json.gz"
UNIT = (1, 1, 1)
SAME = (0, 1, 1)


def measured() -> dict[str, int]:
    return dict(json.loads(gzip.decompress(MEASURED.read_bytes()))["workspaces"])


def from_key(key: str) -> Convolution:
    dtype, *parts = key.split()
    x, weight, stride, padding = (tuple(map(int, part.split("x"))) for part in parts)
    return Convolution(dtype, x, weight, stride, padding)


def of_384(height: int, width: int) -> Convolution:
    return Convolution("float32", (384, 3, height, width), (384, 384, 3, 3, 3), UNIT, SAME)


def test_every_measured_workspace_is_predicted_to_the_byte() -> None:
    wrong = {key: size for key, size in measured().items() if workspace(from_key(key)).size != size}
    assert wrong == {}


def test_few_measured_shapes_need_an_exception() -> None:
    found = [workspace(from_key(key)) for key in measured()]
    assert sum(size.basis == "rule" for size in found) > 0.9 * len(found)
    assert {size.basis for size in found} == {"rule", "measured"}


@pytest.mark.parametrize("backend", ["cudnn", "fa4"])
def test_the_first_use_of_libraries_takes_what_was_measured(backend: str) -> None:
    """Its smallest convolution decides the stage's peak with cuDNN's attention, which has nothing larger beside it."""
    rows = json.loads((ROOT / "benchmarks" / "2026-11-29_h200_attention_pairs.json").read_text(encoding="utf-8"))[
        "rows"
    ]
    mine = [row for row in rows if row["part"] == "1.3B-480P" and row.get("backend") == backend]
    predicted = next(row["peaks"]["start"][0] for row in mine if row["kind"] == "predicted")
    off = {s["allocated"] for row in mine if row["kind"] == "run" for s in row["stages"] if s["stage"] == "start"}
    request = Request.for_task("t2v-1.3B", size="832*480", frame_num=1, sample_steps=1)
    strategy = Strategy(load_strategy="block", offload=True, attention_backend=backend, expandable_segments=True)
    record, _ = simulate(RunConfig("x", "", "simulated", request, strategy, memory_limit_bytes=2048 * MIB))
    start = next(stage for stage in record.stages if stage.name == "start")
    assert {start.peak.allocated_bytes} == {predicted - each for each in off}


def test_keys_say_everything_about_a_convolution() -> None:
    for key in list(measured())[::100]:
        assert from_key(key).key == key


def test_a_float32_picture_and_its_transpose_take_the_same() -> None:
    assert of_384(60, 104).key == of_384(104, 60).key
    one_side = Convolution("float32", (384, 3, 60, 104), (384, 384, 3, 3, 3), UNIT, (0, 1, 0))
    other_side = Convolution("float32", (384, 3, 104, 60), (384, 384, 3, 3, 3), UNIT, (0, 0, 1))
    assert one_side.key == other_side.key


def test_full_waves_of_tiles_take_nothing_and_the_tiles_left_over_are_split() -> None:
    # 33 x 128 positions and 4 x 128 columns (384 padded to pairs of tiles) are 132 tiles: one for each multiprocessor.
    assert kernel_workspace("128x128x32", of_384(64, 66)) == 0
    # One row of tiles more: 4 tiles in 33 parts each, and 37 counters for the additions in pairs of 33.
    assert kernel_workspace("128x128x32", of_384(65, 66)) == 4 * 33 * 128 * 128 * 4 + 4 * 37 * 4 + 159


def test_a_kernel_in_another_layout_copies_input_and_weight() -> None:
    conv = Convolution("float32", (3, 3, 480, 832), (96, 3, 3, 3, 3), UNIT, SAME)
    assert workspace(conv).size == 4 * (3 * 3 * 480 * 832 + 96 * 3 * 27) + 16


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_kernel_has_a_rule(dtype: str) -> None:
    conv = Convolution(dtype, (96, 3, 60, 104), (192, 96, 3, 3, 3), UNIT, SAME)
    assert all(kernel_workspace(name, conv) >= 0 for name in kernel_names(dtype))


TABLE = Table(
    {
        "float32 384x384x3x3x3 1x1x1": [
            [3000, 4000, "64x64x32"],
            [5000, 6000, "128x128x32", "in-out"],
            [6100, 9000, "0"],
        ]
    },
    {of_384(70, 80).key: 77},
)


@pytest.mark.parametrize(
    ("height", "width", "basis"),
    [
        (50, 70, "rule"),
        (70, 80, "measured"),
        (80, 70, "measured"),
        (68, 80, "bound"),
        (63, 72, "bound"),
        (20, 20, "outside"),
        (80, 100, "rule"),
        (100, 100, "outside"),
    ],
)
def test_a_shape_is_known_only_among_measured_shapes_of_one_kernel(height: int, width: int, basis: str) -> None:
    found = TABLE.workspace(of_384(height, width))
    assert found.basis == basis
    assert found.lowest <= found.size


def test_among_kernels_the_largest_workspace_counts() -> None:
    conv = of_384(68, 80)
    found = TABLE.workspace(conv)
    assert found.size == kernel_workspace("in-out", conv)
    assert found.lowest == kernel_workspace("128x128x32", conv)


def test_between_two_ranges_both_kernels_are_possible() -> None:
    conv = of_384(60, 75)
    assert TABLE.workspace(conv).size == max(
        kernel_workspace(name, conv) for name in ("64x64x32", "128x128x32", "in-out")
    )


def test_a_weight_never_measured_takes_less_than_one_block_and_says_so() -> None:
    libraries = Libraries(GPUS["h200"])
    assert libraries.conv_workspace(Convolution("float32", (7, 1, 9, 9), (7, 7, 1, 1, 1), UNIT, (0, 0, 0))) <= 512
    assert libraries.gaps == (
        "of 1 shapes of convolutions 1 have weights never measured: 131 bytes of workspace are counted"
    )


def test_gaps_name_how_much_too_much_is_counted() -> None:
    libraries = Libraries(GPUS["h200"])
    libraries.conv_workspace(of_384(60, 104))
    assert libraries.gaps is None
    conv = Convolution("float32", (192, 3, 45, 46), (384, 192, 3, 3, 3), UNIT, (0, 0, 0))
    bound = workspace(conv)
    assert bound.basis == "bound"
    libraries.conv_workspace(conv)
    assert libraries.gaps is not None
    assert f"up to {(bound.size - bound.lowest) / MIB:.1f} MiB too much" in libraries.gaps


def test_on_other_architectures_everything_is_an_estimate_already() -> None:
    libraries = Libraries(GPUS["rtx4090"])
    libraries.conv_workspace(Convolution("float32", (7, 1, 9, 9), (7, 7, 1, 1, 1), UNIT, (0, 0, 0)))
    assert libraries.gaps is None
