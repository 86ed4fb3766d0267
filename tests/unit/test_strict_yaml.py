"""Files written by hand: YAML and prompt files are regular files, read to a limit, and every refusal is a sentence."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import pytest

from wanvram.cli.flags import MAX_PROMPT_FILE_BYTES, add_request_flags, config_from_flags
from wanvram.config import load_config
from wanvram.errors import InputError
from wanvram.matrix.grid import expand, is_matrix, load_configurations
from wanvram.simulate.card import read_card
from wanvram.strict_yaml import MAX_BYTES, MAX_WRITTEN_BYTES, read_strict_yaml


def read(text: str, tmp_path: Path) -> Any:
    path = tmp_path / "case.yaml"
    path.write_text(text, encoding="utf-8")
    return read_strict_yaml(path)


@pytest.mark.parametrize(
    "reader", [load_config, is_matrix, expand, lambda path: load_configurations([path]), read_card]
)
@pytest.mark.parametrize("kind", ["fifo", "endless", "folder", "absent", "long"])
def test_what_is_no_regular_file_of_64_kib_is_refused_and_never_waited_for(
    reader: Any, kind: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"case\.yaml.* (cannot be read|has over 65,536 bytes)") as caught:
        reader(made(kind, tmp_path / "case.yaml", MAX_BYTES))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["fifo", "endless", "folder", "absent", "long"])
def test_a_prompt_file_is_a_regular_one_of_8_mib(kind: str, tmp_path: Path) -> None:
    path = made(kind, tmp_path / "prompts.txt", MAX_PROMPT_FILE_BYTES)
    with pytest.raises(InputError, match=r"^--prompt_file \S+prompts\.txt (cannot be read|has over 8,388,608 bytes)"):
        flags("--prompt_file", str(path))


def test_a_prompt_file_may_have_a_mark_in_front_and_empty_lines(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_bytes("\ufeffa cat\r\n\r\n 一只狗 \r\n".encode())
    assert flags("--prompt_file", str(tmp_path / "prompts.txt")).request.prompts == ("a cat", "一只狗")


def flags(*given: str) -> Any:
    parser = argparse.ArgumentParser()
    add_request_flags(parser)
    args = parser.parse_args(given)
    return config_from_flags(args, device=None, weights=None, gpu=None, memory_limit_bytes=None)


def made(kind: str, path: Path, limit: int) -> Path:
    if kind == "fifo":
        os.mkfifo(path)
    elif kind == "endless":
        path.symlink_to("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "long":
        path.write_bytes(b"#" * (limit + 1))
    return path


def test_a_configuration_that_a_run_wrote_may_have_the_prompts_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("name: x\nrequest: {prompts: [" + ", ".join(["a" * 20_000] * 5) + "]}")
    assert len(load_config(path, MAX_WRITTEN_BYTES).request.prompts) == 5
    with pytest.raises(InputError, match="has over 65,536 bytes"):
        load_config(path)


@pytest.mark.parametrize("value", ["1:1", "-10:30", "1:1.5", "1" + ":1" * 30_000, "!!int 1:1", "!!float 1:1"])
def test_a_number_of_base_60_is_refused_before_it_is_computed(value: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"line 1: a text like 10:30 would be a number of base 60; put it in quotes$"):
        read(f"name: {value}", tmp_path)


def test_a_text_with_a_colon_in_quotes_and_a_date_are_read(tmp_path: Path) -> None:
    assert read("name: '10:30'\nratio: 16:90x", tmp_path) == {"name": "10:30", "ratio": "16:90x"}


@pytest.mark.parametrize(
    "value",
    ["!!bool foo", "!!bool", '!!int ""', '!!float ""', "!!int _", "!!int", "!!int [1]", "!!float [1]", "!!timestamp foo",
     "!!set [a]", "!!map [a]", "!!set a", "!!omap a", "!!pairs [a]", "!!binary é", "!!str [a]", "!!seq {a: 1}"],
)  # fmt: skip
def test_a_value_that_is_not_what_its_tag_says_is_a_sentence(value: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"case\.yaml: is not valid YAML") as caught:
        read(f"name: {value}", tmp_path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("depth", [9, 40])
def test_an_alias_is_refused_before_it_is_expanded(depth: int, tmp_path: Path) -> None:
    lines = ["a0: &a0 [x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, depth)]
    with pytest.raises(InputError, match="line 2: aliases are not allowed"):
        read("\n".join(lines), tmp_path)


@pytest.mark.parametrize("value", ["\U0010ffff", "abc", "a"])
def test_a_binary_value_that_is_none_is_a_sentence_without_words_of_python(tmp_path: Path, value: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(f'a: !!binary "{value}"\n', encoding="utf-8")
    with pytest.raises(InputError, match="at line 1: a value is not what its tag says"):
        read_strict_yaml(path)


def test_a_key_that_is_a_list_inside_a_merge_is_a_sentence_without_words_of_python(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("request: {<<: {a: 1}, ? [a]: -1}\n", encoding="utf-8")
    with pytest.raises(InputError, match="key") as caught:
        read_strict_yaml(tmp_path / "a.yaml")
    assert "hashable" not in str(caught.value)
