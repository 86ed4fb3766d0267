"""Weight sources: what they copy, what they refuse, and the clear sentence each bad file gets."""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mapping_source import MappingSource
from wanvram.errors import CheckpointError
from wanvram.models.t5 import T5Encoder
from wanvram.specs import T5
from wanvram.weights.diffusers import RenamedSource
from wanvram.weights.official import CLIP_FILE, DIT_FILE, DIT_INDEX, T5_FILE, VAE_FILE, open_official
from wanvram.weights.random import CPU_PERIOD, STD, RandomSource
from wanvram.weights.reading_speed import largest_matrices, reading_speed
from wanvram.weights.sources import (
    SafetensorsSource,
    TensorSource,
    check_keys,
)
from wanvram.weights.stored import PIECE_BYTES, memory_order
from wanvram.weights.torch_files import TorchFileSource

TENSORS = {"a.weight": torch.arange(12.0).view(3, 4), "b.bias": torch.ones(5, dtype=torch.bfloat16)}
SHAPES = {key: tuple(t.shape) for key, t in TENSORS.items()}


@pytest.fixture
def safetensors_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.safetensors"
    save_file(TENSORS, path)
    return path


@pytest.fixture
def torch_file(tmp_path: Path) -> Path:
    path = tmp_path / "model.pth"
    torch.save(TENSORS, path)
    return path


def _open(path: Path) -> TensorSource:
    return TorchFileSource(path) if path.suffix == ".pth" else SafetensorsSource([path])


def _filled(source: TensorSource, key: str, dtype: torch.dtype = torch.float32) -> Tensor:
    dest = torch.full(source.shape(key), torch.nan, dtype=dtype)
    source.fill(key, dest)
    return dest


@pytest.mark.parametrize("kind", ["safetensors_file", "torch_file"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_file_fills_given_storage_in_its_dtype(kind: str, dtype: torch.dtype, request: pytest.FixtureRequest) -> None:
    source = _open(request.getfixturevalue(kind))
    assert sorted(source.keys()) == sorted(TENSORS)
    for key, tensor in TENSORS.items():
        assert source.shape(key) == tuple(tensor.shape)
        assert torch.equal(_filled(source, key, dtype), tensor.to(dtype))


@pytest.mark.parametrize("save", [torch.save, save_file])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_of_several_chunks_arrives_whole_in_any_strides(tmp_path: Path, save: Any, dtype: torch.dtype) -> None:
    tensors = {
        "matrix": torch.randn(700, 4001),  # 10.7 MiB, chunks that end within no row
        "wide": torch.randn(2, PIECE_BYTES // 4 + 3),  # one row is more than a chunk
        "kernel": torch.randn(160, 96, 3, 3, 3),
        "scalar": torch.randn(()),
        "empty": torch.empty(0, 5),
    }
    path = tmp_path / "model.pth"
    save(tensors, path)
    source = TorchFileSource(path) if save is torch.save else SafetensorsSource([path])
    for key, tensor in tensors.items():
        assert torch.equal(_filled(source, key, dtype), tensor.to(dtype))
    channels_last = torch.empty(160, 96, 3, 3, 3, dtype=dtype, memory_format=torch.channels_last_3d)
    source.fill("kernel", channels_last)
    assert torch.equal(channels_last, tensors["kernel"].to(dtype))
    assert channels_last.is_contiguous(memory_format=torch.channels_last_3d)


def test_shared_strided_and_swapped_tensors_of_a_torch_file_keep_their_values(tmp_path: Path) -> None:
    whole = torch.arange(1.0, 13.0).view(3, 4)
    torch.save({"whole": whole, "row": whole[1], "column": whole[:, 1], "turned": whole.t()}, tmp_path / "shared.pth")
    source = TorchFileSource(tmp_path / "shared.pth")
    assert torch.equal(_filled(source, "row"), whole[1])
    assert torch.equal(_filled(source, "column"), whole[:, 1])
    assert torch.equal(_filled(source, "turned"), whole.t())
    assert torch.equal(source.rows("turned", [3, 0]), whole.t()[[3, 0]])


def test_a_torch_file_of_the_other_byte_order_is_read_as_torch_reads_it(tmp_path: Path) -> None:
    tensors = {"zero": torch.zeros(40), "ramp": torch.arange(40.0)}
    torch.save(tensors, tmp_path / "little.pth")
    with (
        zipfile.ZipFile(tmp_path / "little.pth") as little,
        zipfile.ZipFile(tmp_path / "big.pth", "w", zipfile.ZIP_STORED) as big,
    ):
        for name in little.namelist():
            content = little.read(name)
            if "/data/" in name:
                content = b"".join(content[n : n + 4][::-1] for n in range(0, len(content), 4))
            big.writestr(name, b"big" if name.endswith("/byteorder") else content)
    source = TorchFileSource(tmp_path / "big.pth")
    for key, tensor in tensors.items():
        assert torch.equal(_filled(source, key), tensor)


# In a process of its own, whose memory is nobody else's: peak above what was there before, and the bytes loaded.
MEASURE = """
import json, sys, torch
from pathlib import Path
from wanvram.weights.sources import SafetensorsSource
from wanvram.weights.stored import PIECE_BYTES, memory_order
from wanvram.weights.torch_files import TorchFileSource

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name + ":"))

path, what = Path(sys.argv[1]), sys.argv[2]
Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here
before = status("VmRSS")
source = TorchFileSource(path) if path.suffix == ".pth" else SafetensorsSource([path])
if what == "rows":
    loaded = source.rows("table", [0, 2**20 - 3, 2**20 - 1])
else:
    shapes = [source.shape(key) for key in source.keys()]
    loaded = torch.empty((len(shapes), *shapes[0]), dtype=getattr(torch, what))
    for key, view in zip(source.keys(), loaded, strict=True):
        source.fill(key, view)
print(json.dumps([status("VmHWM") - before, loaded.nbytes, loaded.flatten(1).double().mean(1).tolist()]))
"""


def _measured(path: Path, what: str) -> tuple[int, int, list[float]]:
    command = [sys.executable, "-c", MEASURE, str(path), what]
    return tuple(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout))


def _sparse_safetensors(path: Path, shapes: dict[str, list[int]]) -> None:
    """Zeros of float32 that take no space on the disk."""
    header, end = {}, 0
    for key, shape in shapes.items():
        header[key] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end := end + 4 * math.prod(shape)]}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)
    os.truncate(path, path.stat().st_size + end)


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_needs_the_memory_of_the_destination_and_of_less_than_one_tensor(
    tmp_path: Path, kind: str, dtype: str
) -> None:
    shapes = {f"w{n}": [1024, 4096] for n in range(8)}  # 8 x 16 MiB in float32
    path = tmp_path / f"model.{kind}"
    if kind == "pth":
        torch.save({key: torch.ones(shape) for key, shape in shapes.items()}, path)
    else:
        _sparse_safetensors(path, shapes)
    peak, target, means = _measured(path, dtype)
    assert means == [float(kind == "pth")] * 8
    assert target == 8 * 1024 * 4096 * (4 if dtype == "float32" else 2)
    assert target - 2**20 <= peak <= target + 16 * 2**20


def test_rows_are_read_without_the_rest_of_the_table(tmp_path: Path) -> None:
    _sparse_safetensors(tmp_path / "table.safetensors", {"table": [2**20, 4096]})  # 16 GiB
    with (tmp_path / "table.safetensors").open("r+b") as file:
        file.seek(-4096 * 4 * 3, os.SEEK_END)
        file.write(np.full(4096, 7.0, dtype=np.float32).tobytes())
    peak, _, means = _measured(tmp_path / "table.safetensors", "rows")
    assert means == [0.0, 7.0, 0.0]
    assert peak < 4 * 2**20


@pytest.mark.parametrize("index", [-1, 3])
def test_a_row_that_the_table_has_not_is_named(safetensors_file: Path, torch_file: Path, index: int) -> None:
    for source in (_open(safetensors_file), _open(torch_file), MappingSource(TENSORS)):
        with pytest.raises(CheckpointError, match=rf"a\.weight has 3 rows; row {index} was asked for"):
            source.rows("a.weight", [0, index])


@pytest.mark.parametrize("kind", ["safetensors_file", "torch_file"])
def test_a_file_that_shrinks_or_goes_while_it_is_used_is_named(kind: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(kind)
    source = _open(path)
    os.truncate(path, 8)
    with pytest.raises(CheckpointError, match=r"became shorter while it was read"):
        _filled(source, "a.weight")
    path.unlink()
    with pytest.raises(CheckpointError, match=r"cannot be read any more"):
        _filled(source, "a.weight")


GOOD_ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ({"dtype": "F4"}, "unknown dtype"),
        ({"shape": [3]}, r"8 bytes for the shape \[3\] of F32"),
        ({"shape": [-1, -2]}, "not a natural number"),
        ({"shape": [True, 2]}, "not a natural number"),
        ({"shape": [2.0]}, "not a natural number"),
        ({"data_offsets": [4, 12]}, "gap or overlap"),
        ({"data_offsets": [-8, 0]}, "not a natural number"),
        ({"data_offsets": [0]}, "no dtype, shape and two data_offsets for a"),
        ({"shape": [1], "data_offsets": [0, 4]}, "its header tells of"),
        ({"shape": None}, "no dtype, shape and two data_offsets for a"),
        ({"shape": [1] * 65}, "65 dimensions"),
        ({"dtype": []}, "no dtype, shape"),
        ({"dtype": "x" * 9999}, r"unknown dtype x+\.\.\. \(9,999 characters\)"),
    ],
)
def test_a_safetensors_header_that_does_not_fit_its_file_is_refused(
    tmp_path: Path, entry: dict[str, object], reason: str
) -> None:
    text = json.dumps({"a": GOOD_ENTRY | entry}).encode()
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(8))
    with pytest.raises(CheckpointError, match=rf"a\.safetensors is truncated or damaged.*{reason}.*expected a"):
        SafetensorsSource([tmp_path / "a.safetensors"])


@pytest.mark.parametrize("text", [b"[]", b"{", b"\xff\xfe", b'{"a": 3}', b"[" * 5000])
def test_a_safetensors_header_that_is_no_table_is_refused(tmp_path: Path, text: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(len(text).to_bytes(8, "little") + text)
    with pytest.raises(CheckpointError, match=r"a\.safetensors is truncated or damaged"):
        SafetensorsSource([tmp_path / "a.safetensors"])


def test_a_parameter_can_be_filled_in_place(safetensors_file: Path) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3, 4))
    SafetensorsSource([safetensors_file]).fill("a.weight", parameter)
    assert torch.equal(parameter.data, TENSORS["a.weight"])


def test_a_torch_file_of_the_old_format_is_read_too(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(_filled(TorchFileSource(tmp_path / "old.pth"), "a.weight"), TENSORS["a.weight"])


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_a_missing_file_is_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=rf"{name} does not exist; expected a"):
        _open(tmp_path / name)


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_an_empty_file_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(CheckpointError, match=rf"{name} is empty; expected a"):
        _open(tmp_path / name)


@pytest.mark.parametrize("kind", ["safetensors_file", "torch_file"])
@pytest.mark.parametrize("kept", [0.01, 0.5, 0.95])
def test_a_truncated_file_is_named(kind: str, kept: float, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(kind)
    os.truncate(path, max(1, int(path.stat().st_size * kept)))
    with pytest.raises(CheckpointError, match=rf"{path.name} (is truncated|was refused).*expected a"):
        _open(path)


@pytest.mark.parametrize("name", ["model.pth", "model.safetensors"])
def test_a_file_of_other_content_is_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"<html>404 not found</html>" * 20)
    with pytest.raises(CheckpointError, match=name):
        _open(tmp_path / name)


def test_a_git_lfs_pointer_is_recognised(tmp_path: Path) -> None:
    (tmp_path / "model.pth").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        _open(tmp_path / "model.pth")


class _Attack:
    def __init__(self, target: Path) -> None:
        self._target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self._target),)


@pytest.mark.parametrize("container", ["zip", "legacy", "bare"])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path: Path, container: str) -> None:
    path, target = tmp_path / "evil.pth", tmp_path / "made_by_the_attack"
    if container == "bare":
        path.write_bytes(pickle.dumps({"a.weight": _Attack(target)}))
    else:
        torch.save({"a.weight": _Attack(target)}, path, _use_new_zipfile_serialization=container == "zip")
    with pytest.raises(CheckpointError, match=r"evil\.pth (was refused|is truncated or damaged)"):
        TorchFileSource(path)
    assert not target.exists()


@pytest.mark.parametrize(
    "content",
    [[torch.ones(2)], {"epoch": 3}, {"a": torch.empty(2, device="meta")}, {"a": torch.eye(2).to_sparse()}],
)
def test_a_torch_file_without_a_state_dict_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match="does not hold a state dict"):
        TorchFileSource(tmp_path / "other.pth")


def test_a_destination_of_another_shape_is_refused(safetensors_file: Path) -> None:
    for source in (SafetensorsSource([safetensors_file]), MappingSource(TENSORS), RandomSource(SHAPES, 0)):
        with pytest.raises(CheckpointError, match=r"a\.weight has shape \[3, 4\] instead of \[4, 3\]"):
            source.fill("a.weight", torch.empty(4, 3))


def test_a_key_that_is_not_there_is_named(safetensors_file: Path) -> None:
    for source in (SafetensorsSource([safetensors_file]), MappingSource(TENSORS), RandomSource(SHAPES, 0)):
        with pytest.raises(CheckpointError, match=r"no tensor c\.weight"):
            source.shape("c.weight")


def test_matching_keys_pass_and_ignored_ones_may_be_there() -> None:
    check_keys(SHAPES, MappingSource(TENSORS), "the model")
    check_keys({"a.weight": [3, 4]}, MappingSource(TENSORS), "the model", ignored=["b.bias", "c.bias"])


def test_wrong_keys_are_counted_and_the_first_three_named() -> None:
    expected = {"a.weight": (4, 4)} | {f"m{i}": (1,) for i in range(5)}
    with pytest.raises(CheckpointError) as caught:
        check_keys(expected, MappingSource(TENSORS), "t2v-1.3B")
    message = str(caught.value)
    assert "not those of t2v-1.3B, which has 6 tensors" in message
    assert "5 missing: m0, m1, m2, ..." in message
    assert "1 unexpected: b.bias" in message
    assert "1 of another shape: a.weight [3, 4] instead of [4, 4]" in message


def _write_shards(folder: Path, weight_map: dict[str, object]) -> Path:
    for number, (key, tensor) in enumerate(TENSORS.items()):
        save_file({key: tensor}, folder / f"shard-{number}.safetensors")
    index = folder / DIT_INDEX
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return index


def test_shards_are_one_source(tmp_path: Path) -> None:
    index = _write_shards(tmp_path, {"a.weight": "shard-0.safetensors", "b.bias": "shard-1.safetensors"})
    source = SafetensorsSource.from_index(index)
    check_keys(SHAPES, source, "the model")
    assert torch.equal(_filled(source, "a.weight"), TENSORS["a.weight"])


def test_an_index_with_a_tensor_its_files_lack_is_refused(tmp_path: Path) -> None:
    index = _write_shards(tmp_path, {"a.weight": "shard-0.safetensors", "c": "shard-0.safetensors"})
    with pytest.raises(CheckpointError, match="names 1 tensors that its files lack, first c"):
        SafetensorsSource.from_index(index)


@pytest.mark.parametrize(
    "name", ["../out.safetensors", "/etc/x.safetensors", "a\\b.safetensors", "c:x.safetensors", "..", "", "passwd", 3]
)
def test_an_index_cannot_reach_outside_its_folder(tmp_path: Path, name: object) -> None:
    index = _write_shards(tmp_path, {"a.weight": name})
    with pytest.raises(CheckpointError, match="beside the index only"):
        SafetensorsSource.from_index(index)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": []}}', "\udcff"])
def test_a_damaged_index_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / DIT_INDEX).write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        SafetensorsSource.from_index(tmp_path / DIT_INDEX)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    index = _write_shards(tmp_path, {"a.weight": "shard-0.safetensors", "b.bias": "shard-9.safetensors"})
    with pytest.raises(CheckpointError, match=r"shard-9\.safetensors does not exist"):
        SafetensorsSource.from_index(index)


def test_one_tensor_in_two_files_is_refused(safetensors_file: Path) -> None:
    with pytest.raises(CheckpointError, match="is in both"):
        SafetensorsSource([safetensors_file, safetensors_file])


def test_official_components_are_found_under_their_names(tmp_path: Path) -> None:
    torch.save(TENSORS, tmp_path / T5_FILE)
    torch.save(TENSORS, tmp_path / VAE_FILE)
    torch.save(
        {"visual.head": torch.ones(2), "textual.head": torch.ones(3), "log_scale": torch.ones(())}, tmp_path / CLIP_FILE
    )
    save_file(TENSORS, tmp_path / DIT_FILE)
    for component in ("text_encoder", "vae", "dit"):
        check_keys(SHAPES, open_official(tmp_path, component), component)
    image_encoder = open_official(tmp_path, "image_encoder")
    assert isinstance(image_encoder, RenamedSource)
    check_keys({"visual.head": (2,)}, image_encoder, "image_encoder")
    assert torch.equal(_filled(image_encoder, "visual.head"), torch.ones(2))


def test_official_shards_are_found_through_their_index(tmp_path: Path) -> None:
    _write_shards(tmp_path, {"a.weight": "shard-0.safetensors", "b.bias": "shard-1.safetensors"})
    check_keys(SHAPES, open_official(tmp_path, "dit"), "dit")


def test_a_missing_folder_or_transformer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"checkpoint folder .*nowhere does not exist"):
        open_official(tmp_path / "nowhere", "dit")
    with pytest.raises(CheckpointError, match=f"no transformer weights; expected {DIT_FILE}"):
        open_official(tmp_path, "dit")


def test_random_weights_depend_on_seed_and_key_only() -> None:
    shapes = {"a.weight": (64, 64), "b.weight": (64, 64)}
    first = _filled(RandomSource(shapes, 1), "a.weight")
    assert torch.equal(first, _filled(RandomSource(shapes, 1), "a.weight"))
    assert not torch.equal(first, _filled(RandomSource(shapes, 1), "b.weight"))
    assert not torch.equal(first, _filled(RandomSource(shapes, 2), "a.weight"))
    assert first.std().item() == pytest.approx(STD, rel=0.1)


def test_random_norms_are_one_and_biases_zero() -> None:
    source = RandomSource(
        {"x.norm_q.weight": (8,), "r.0.gamma": (8, 1, 1, 1), "c.bias": (8,), "modulation": (1, 6, 8)}, 3
    )
    assert (_filled(source, "x.norm_q.weight") == 1).all()
    assert (_filled(source, "r.0.gamma") == 1).all()
    assert (_filled(source, "c.bias") == 0).all()
    assert 0 < _filled(source, "modulation").abs().max() < 0.2


def test_a_large_random_matrix_repeats_with_a_period_that_no_row_length_divides() -> None:
    shape = (1200, 1000)
    matrix = _filled(RandomSource({"a.weight": shape}, 1), "a.weight", torch.bfloat16).flatten()
    assert torch.isfinite(matrix).all()
    assert torch.equal(matrix[CPU_PERIOD:], matrix[: matrix.numel() - CPU_PERIOD])
    assert all(CPU_PERIOD % length for length in range(2, 1025))


def test_random_weights_make_a_finite_encoder() -> None:
    model = T5Encoder(T5["tiny"], torch.bfloat16).requires_grad_(False)
    state = model.state_dict()
    source = RandomSource({key: t.shape for key, t in state.items()}, 7)
    for key, dest in state.items():
        source.fill(key, dest)
    features = model(model.token_embedding(torch.tensor([3, 70, 1])))
    assert torch.isfinite(features).all()
    assert features.std() > 0.1


@pytest.mark.parametrize("where", [slice(None), slice(1, 3), 2])
def test_in_memory_order_channels_last_tensors_and_their_rows_are_contiguous(where: slice | int) -> None:
    """So that a copy from host to device needs no second tensor on the device."""
    weight = torch.empty(4, 6, 3, 5, 2).contiguous(memory_format=torch.channels_last_3d)
    rows = weight[where]
    assert not rows.is_contiguous()
    assert rows.permute(memory_order(rows)).is_contiguous()
    assert memory_order(torch.empty(4, 6)) == [0, 1]


def test_a_sample_of_the_files_tells_how_fast_they_are_read_and_converted(tmp_path: Path) -> None:
    save_file(
        {f"{i}.weight": torch.randn(256, 1024) for i in range(8)} | {"bias": torch.ones(4)}, tmp_path / "m.safetensors"
    )
    matrices = largest_matrices(SafetensorsSource([tmp_path / "m.safetensors"]))
    assert len(matrices) == 8
    room = torch.zeros(16 * 2**20, dtype=torch.uint8)
    for dtype in (torch.float16, torch.float32):
        speed = reading_speed(matrices, dtype, room, sample_bytes=4 * 2**20)
        assert speed is not None
        assert min(speed.first, speed.taken, speed.used) > 0.0
    assert torch.equal(
        room[: 2**20].view(torch.float32).view(256, 1024), load_file(tmp_path / "m.safetensors")["0.weight"]
    )
    assert reading_speed(matrices, torch.float16, room) is None, "8 MiB are too little to tell anything of"


def test_what_a_reading_thread_meets_is_raised_once_no_thread_writes_any_more(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    save_file({"w": torch.randn(64, PIECE_BYTES // 16)}, path)
    source = SafetensorsSource([path])
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)
    with pytest.raises(CheckpointError, match="became shorter"):
        _filled(source, "w")
    assert torch.get_num_threads() == 1, "the suite's own setting, which the reading threads leave alone"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_forked_child_reads_with_threads_of_its_own(safetensors_file: Path) -> None:
    source = SafetensorsSource([safetensors_file])
    _filled(source, "a.weight")
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(_filled(source, "a.weight"), TENSORS["a.weight"]) else 1)
    deadline = time.monotonic() + 20.0
    while (ended := os.waitpid(child, os.WNOHANG))[0] == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    if ended[0] == 0:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 0)
