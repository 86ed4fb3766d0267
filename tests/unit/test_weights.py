"""Weight sources: what they copy, what they refuse, and the clear sentence each bad file gets."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from wanvram.errors import CheckpointError
from wanvram.models.t5 import T5Encoder
from wanvram.specs import T5
from wanvram.weights.official import CLIP_FILE, DIT_FILE, DIT_INDEX, T5_FILE, VAE_FILE, open_official
from wanvram.weights.random import CPU_PERIOD, STD, RandomSource
from wanvram.weights.sources import (
    FilteredSource,
    MappingSource,
    SafetensorsSource,
    TensorSource,
    TorchFileSource,
    check_keys,
)

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
    source.close()
    assert source.keys() == []


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


@pytest.mark.parametrize("content", [[torch.ones(2)], {"epoch": 3}])
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
    assert isinstance(image_encoder, FilteredSource)
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
