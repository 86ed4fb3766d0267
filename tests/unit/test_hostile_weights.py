"""Weight files of strangers: every kind that could take the memory, the time or the terminal ends in one sentence."""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from checkpoints import tensors, tiny_models, write_official, write_tokenizer
from wanvram.cli.main import main
from wanvram.errors import CheckpointError, InputError
from wanvram.weights import tokenizer, torch_files
from wanvram.weights.convert import Conversion, convert
from wanvram.weights.official import (
    COMPONENTS,
    DIT_FILE,
    DIT_INDEX,
    T5_FILE,
    TOKENIZER_FILE,
    check_checkpoint,
    identify,
)
from wanvram.weights.sources import SafetensorsSource, check_keys, shown
from wanvram.weights.tokenizer import UMT5Tokenizer, try_tokenizer
from wanvram.weights.torch_files import TorchFileSource


def safetensors_bytes(header: bytes, data: bytes = b"") -> bytes:
    return len(header).to_bytes(8, "little") + header + data


def rss_growth(call: Callable[[], Any]) -> int:
    before = psutil.Process().memory_info().rss
    call()
    return int(psutil.Process().memory_info().rss) - before


# --- .pth -------------------------------------------------------------------------------------------------------------


def repacked(path: Path, target: Path, **changed: Any) -> Path:
    """The archive again; data.pkl as `pickle`, all members in `compression`."""
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(target, "w", changed.get("compression", 0)) as new:
        for name in old.namelist():
            new.writestr(
                name, changed.get("pickle", b"") if name.endswith(".pkl") and "pickle" in changed else old.read(name)
            )
    return target


@pytest.fixture
def pth(tmp_path: Path) -> Path:
    torch.save({"a": torch.ones(3)}, tmp_path / "a.pth")
    return tmp_path / "a.pth"


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_an_archive_with_compressed_members_is_refused_before_they_are_read(
    pth: Path, tmp_path: Path, compression: int
) -> None:
    bomb = repacked(pth, tmp_path / "bomb.pth", compression=compression, pickle=b"\x80\x02" + b"N0" * (2 << 20) + b"N.")
    assert bomb.stat().st_size < 2**20

    def read() -> None:
        with pytest.raises(CheckpointError, match=r"bomb\.pth was refused: its member .* is compressed, which torch"):
            TorchFileSource(bomb)

    assert rss_growth(read) < 2 << 20


def test_an_archive_whose_members_are_said_to_be_larger_than_the_file_is_refused(pth: Path, tmp_path: Path) -> None:
    data = bytearray(pth.read_bytes())
    at = data.find(b"PK\x01\x02")
    while at >= 0:
        name = data[at + 46 : at + 46 + int.from_bytes(data[at + 28 : at + 30], "little")]
        if name.endswith(b"data/0"):
            data[at + 20 : at + 28] = (3 << 30).to_bytes(4, "little") * 2
        at = data.find(b"PK\x01\x02", at + 4)
    (tmp_path / "large.pth").write_bytes(data)
    with pytest.raises(
        CheckpointError, match=r"large\.pth was refused: its member .*data/0 is said to have 3,221,225,472"
    ):
        TorchFileSource(tmp_path / "large.pth")


def test_an_archive_of_too_many_members_or_too_large_a_pickle_is_refused(
    pth: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_files, "MAX_PICKLE", 8)
    with pytest.raises(CheckpointError, match=r"a\.pth was refused: its member .*data\.pkl is said to have"):
        TorchFileSource(pth)
    monkeypatch.setattr(torch_files, "MAX_MEMBERS", 2)
    with pytest.raises(CheckpointError, match=r"a\.pth was refused: it has more than 2 members"):
        TorchFileSource(pth)


@pytest.mark.parametrize("cut", [30, 60, 200, 400])
def test_an_archive_with_a_damaged_table_is_damaged(pth: Path, cut: int) -> None:
    data = bytearray(pth.read_bytes())
    data[-cut : -cut + 20] = b"\xff" * 20
    pth.write_bytes(data)
    with suppress(CheckpointError):
        TorchFileSource(pth)


@pytest.mark.parametrize("key", [3, (1, 2), 1.5, b"a", None, True, frozenset({1})])
def test_a_state_dict_with_a_key_that_is_no_text_is_refused(tmp_path: Path, key: Any) -> None:
    torch.save({"a": torch.ones(1), key: torch.ones(1)}, tmp_path / "k.pth")
    with pytest.raises(CheckpointError, match=r"k\.pth (does not hold a state dict|was refused)"):
        TorchFileSource(tmp_path / "k.pth")


@pytest.mark.parametrize(
    "value",
    [
        torch.ones(2, dtype=torch.complex64).conj(),
        torch.ones(2, dtype=torch.complex64).conj().imag,
        torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
        torch.ones(2).to_sparse(),
        torch.ones(2, device="meta"),
        {"nested": torch.ones(1)},
        3,
        "text",
        None,
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore")
def test_a_state_dict_with_what_is_no_plain_tensor_is_refused_also_where_nothing_needs_it(
    tmp_path: Path, value: Any
) -> None:
    torch.save({"a": torch.ones(1), "b": value}, tmp_path / "v.pth")
    with pytest.raises(
        CheckpointError, match=r"v\.pth (does not hold a state dict|was refused|is truncated or damaged)"
    ):
        TorchFileSource(tmp_path / "v.pth")


@pytest.mark.parametrize(
    "value", [torch.ones(1).expand(10**6, 10**6), torch.ones(2, dtype=torch.complex64), torch.ones(())]
)
def test_an_unusual_plain_tensor_is_of_another_shape(tmp_path: Path, value: Tensor) -> None:
    torch.save({"a": value}, tmp_path / "v.pth")
    with pytest.raises(CheckpointError, match="of another shape: a"):
        check_keys({"a": (3,)}, TorchFileSource(tmp_path / "v.pth"), "x")


def test_a_file_of_another_format_under_the_name_of_a_state_dict_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.ones(1)}, tmp_path / "s.pth")
    with pytest.raises(CheckpointError, match=r"s\.pth is a safetensors file; give it the ending"):
        TorchFileSource(tmp_path / "s.pth")
    for start, said in (
        (b"GGUF\x03\0\0\0", "is a GGUF file"),
        (b"<!DOCTYPE html>", "is a web page"),
        (b"\n<html>", "page"),
    ):
        (tmp_path / "s.pth").write_bytes(start)
        with pytest.raises(CheckpointError, match=said):
            TorchFileSource(tmp_path / "s.pth")


# --- safetensors ------------------------------------------------------------------------------------------------------


def test_numbers_of_thousands_of_digits_are_refused_at_once(tmp_path: Path) -> None:
    header = b'{"a":{"dtype":"F32","shape":[' + b",".join([b"9" * 4000] * 3000) + b'],"data_offsets":[0,4]}}'
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header))
    with pytest.raises(CheckpointError, match=r"a\.safetensors is truncated or damaged \(.*a header that is no JSON"):
        SafetensorsSource([tmp_path / "a.safetensors"])


@pytest.mark.parametrize("header", [b"null", b"3", b'"a"', b"[1]", b'{"a": null}', b'{"a": {"dtype": null}}'])
def test_a_header_of_any_json_is_refused_in_words_of_its_own(tmp_path: Path, header: bytes) -> None:
    (tmp_path / "a.safetensors").write_bytes(safetensors_bytes(header))
    with pytest.raises(CheckpointError, match=r"a\.safetensors is truncated or damaged") as caught:
        SafetensorsSource([tmp_path / "a.safetensors"])
    assert not any(word in str(caught.value) for word in ("NoneType", "object", "codec", "unpack"))


@pytest.mark.parametrize("shape", [[], [4], [2, 2], [0], [1, 1, 1]])
def test_a_transformer_whose_patch_embedding_has_any_shape_is_described(tmp_path: Path, shape: list[int]) -> None:
    save_file({"patch_embedding.weight": torch.ones(shape)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match=r"the transformer is none of .*: it has 0 blocks of width"):
        identify("dit", SafetensorsSource([tmp_path / "a.safetensors"]))


@pytest.mark.parametrize("name", ["\x1b]0;title\x07", "a\nb", "x" * 100_000, "\u202egnp", "é\x00"])
def test_odd_names_and_long_ones_are_shown_in_one_short_printable_line(tmp_path: Path, name: str) -> None:
    save_file({name: torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(CheckpointError, match="1 unexpected") as caught:
        check_keys({"a": (1,)}, SafetensorsSource([tmp_path / "a.safetensors"]), "x")
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


def test_a_name_as_usual_is_shown_as_it_is() -> None:
    assert shown("blocks.0.self_attn.q.weight") == "blocks.0.self_attn.q.weight"
    assert shown([3, 4]) == "[3, 4]"


# --- folders ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x" * 300 + ".safetensors", "\x1b[31m.safetensors", "é" * 200 + ".safetensors"])
def test_an_index_that_names_a_file_no_disk_can_have_ends_in_a_sentence(tmp_path: Path, name: str) -> None:
    write_official(tmp_path, sharded=True)
    (tmp_path / DIT_INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(CheckpointError) as caught:
        check_checkpoint(tmp_path, ["dit"])
    assert len(str(caught.value)) < 800


def test_links_to_nowhere_loops_folders_and_pipes_end_in_a_sentence(tmp_path: Path) -> None:
    write_official(tmp_path)
    path = tmp_path / T5_FILE
    for make, said in (
        (
            lambda: path.symlink_to("nowhere.pth"),
            "is a link to nowhere.pth, which does not exist; .* download it again",
        ),
        (lambda: path.symlink_to(path.name), "cannot be read|is a link to"),
        (lambda: path.symlink_to("/dev/zero"), "is no file"),
        (lambda: os.mkfifo(path), "is no file"),
        (path.mkdir, "is a folder"),
    ):
        path.unlink()
        make()
        with pytest.raises(CheckpointError, match=said):
            check_checkpoint(tmp_path, COMPONENTS)
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
            path.touch()


def test_links_to_nowhere_beside_a_whole_checkpoint_are_no_hindrance(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_official(source)
    (source / "x.pth").symlink_to("nowhere")
    (source / "loop.safetensors").symlink_to("loop.safetensors")
    (source / os.fsdecode(b"\xff.pth")).write_bytes(b"")
    manifest = convert(Conversion(source, "bf16"), tmp_path / "out")
    assert manifest["complete"]


# --- convert ----------------------------------------------------------------------------------------------------------


def test_a_resumed_conversion_hashes_what_it_takes_over(tmp_path: Path) -> None:
    source, output = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    write_official(source)
    first = convert(Conversion(source, "bf16"), output)
    whole = {name: (output / name).read_bytes() for name in first["files"]}
    changed = sorted(first["files"])[3]
    data = bytearray(whole[changed])
    data[-1] ^= 1
    (output / changed).write_bytes(data)
    again = convert(Conversion(source, "bf16"), output)
    assert {name: (output / name).read_bytes() for name in again["files"]} == whole
    assert again == first


def test_an_output_inside_the_checkpoint_is_refused(tmp_path: Path) -> None:
    write_official(tmp_path)
    with pytest.raises(InputError, match="lies in the checkpoint itself; name a folder outside"):
        convert(Conversion(tmp_path, "bf16"), tmp_path / "sub" / "deeper")


def test_a_tokenizer_that_is_none_is_not_converted(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    write_official(source)
    (source / TOKENIZER_FILE).write_text("hello")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged"):
        convert(Conversion(source, "bf16"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- tokenizers -------------------------------------------------------------------------------------------------------


def tokenizer_json(**changes: Any) -> str:
    whole = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": None,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": None, "decoder": None,
        "model": {"type": "WordLevel", "vocab": {"a": 0, "<unk>": 1}, "unk_token": "<unk>"},
    }  # fmt: skip
    return json.dumps(whole | changes)


HUNDREDFOLD = {"type": "Replace", "pattern": {"String": "."}, "content": "." * 100}
HOSTILE = {
    "precompiled": tokenizer_json(normalizer={"type": "Precompiled", "precompiled_charsmap": "AAAA"}),
    "fixed length": tokenizer_json(pre_tokenizer={"type": "FixedLength", "length": 0}),
    "no unknown": tokenizer_json(model={"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "<unk>"}),
    "no unknown of unigram": tokenizer_json(model={"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": None}),
    "no unknown of bpe": tokenizer_json(model={"type": "BPE", "vocab": {"a": 0}, "merges": [], "unk_token": "<unk>"}),
    "hello": "hello",
    "empty table": "{}",
    "makes nothing": tokenizer_json(normalizer={"type": "Replace", "pattern": {"Regex": "."}, "content": ""}),
    "grows": tokenizer_json(normalizer={"type": "Sequence", "normalizers": [HUNDREDFOLD] * 4}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_tokenizer_that_panics_aborts_or_fills_the_memory_is_refused_in_a_sentence(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenizer, "MAX_MEMORY", 512 << 20)
    (tmp_path / "tokenizer.json").write_text(HOSTILE[kind])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged \(.*\); expected the umt5-xxl tokenizer"):
        UMT5Tokenizer(tmp_path / "tokenizer.json")
    assert capfd.readouterr().err == "", "the lines of the library's panic reach nobody"


def test_a_tokenizer_that_takes_for_ever_or_is_too_large_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tokenizer(tmp_path / "tokenizer.json")
    monkeypatch.setattr(tokenizer, "_TRIAL", "import time; time.sleep(60)")
    monkeypatch.setattr(tokenizer, "MAX_SECONDS", 0.2)
    with pytest.raises(CheckpointError, match="reading it takes more than 0 s"):
        try_tokenizer(tmp_path / "tokenizer.json")
    monkeypatch.setattr(tokenizer, "MAX_FILE", 10)
    with pytest.raises(CheckpointError, match=r"at most .* is read"):
        try_tokenizer(tmp_path / "tokenizer.json")


def test_where_the_platform_sets_no_limit_the_memory_is_watched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_tokenizer(tmp_path / "tokenizer.json")
    monkeypatch.setattr(tokenizer, "_TRIAL", "import time; kept = b'x' * (200 << 20); time.sleep(60)")
    monkeypatch.setattr(tokenizer, "MAX_MEMORY", 100 << 20)
    with pytest.raises(CheckpointError, match=r"reading it takes more than 100\.0 MiB of memory"):
        try_tokenizer(tmp_path / "tokenizer.json")


def test_a_prompt_that_the_file_has_no_token_for_is_a_sentence(tmp_path: Path) -> None:
    samples = sorted({*"".join(tokenizer.SAMPLES)} - {" "})
    vocabulary = {letter: number for number, letter in enumerate(samples)}
    model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
    pieces = {"type": "Split", "pattern": {"Regex": "."}, "behavior": "Isolated", "invert": False}
    text = tokenizer_json(
        model=model, pre_tokenizer={"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, pieces]}
    )
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json cannot encode the prompt"):
        UMT5Tokenizer(tmp_path / "tokenizer.json").encode("ж")


def test_the_tokenizer_of_the_tests_is_accepted_and_tried_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_tokenizer(tmp_path / "tokenizer.json")
    try_tokenizer(tmp_path / "tokenizer.json")
    monkeypatch.setattr(tokenizer.subprocess, "Popen", None)
    assert UMT5Tokenizer(tmp_path / "tokenizer.json").encode("a cat")[-1] == 1


def test_links_in_a_circle_are_a_sentence_where_something_is_written_into_them(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "official").mkdir()
    write_official(tmp_path / "official")
    (tmp_path / "loop").symlink_to("loop")
    for command in (
        [
            "convert",
            str(tmp_path / "official"),
            "--task",
            "t2v-1.3B",
            "--precision",
            "bf16",
            "-o",
            str(tmp_path / "loop/x"),
        ],
        ["report", str(tmp_path / "loop"), str(tmp_path / "loop/x")],
    ):
        with tiny_models():
            assert main(command) in (1, 2)  # cannot be written, cannot be read
        assert "PyTorch" not in (said := capsys.readouterr().err)
        assert "symbolic links" in said


def test_a_name_that_turns_the_line_around_is_escaped_where_it_was_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "official").mkdir()
    write_official(tmp_path / "official")
    output = str(tmp_path / "\u202ex")
    with tiny_models():
        assert (
            main(["convert", str(tmp_path / "official"), "--task", "t2v-1.3B", "--precision", "bf16", "-o", output])
            == 0
        )
    assert "\u202e" not in capsys.readouterr().out


def test_what_pytorch_warns_of_in_a_damaged_file_is_not_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "model.pth")

    def warned(*_args: object, **_named: object) -> dict[str, torch.Tensor]:
        warnings.warn("Defining your `__torch_function__` as a plain method is deprecated", UserWarning, stacklevel=1)
        return {"a": torch.ones(1)}

    monkeypatch.setattr(torch, "load", warned)
    TorchFileSource(tmp_path / "model.pth")
    assert not recwarn.list


def test_whole_files_are_still_read(tmp_path: Path) -> None:
    write_official(tmp_path)
    check_checkpoint(tmp_path, COMPONENTS, "tiny-t2v")
    assert set(TorchFileSource(tmp_path / T5_FILE).keys()) == set(tensors("text_encoder", ""))
    assert (tmp_path / DIT_FILE).exists()
