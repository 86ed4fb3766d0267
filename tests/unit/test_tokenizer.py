"""Prompt cleaning, the byte-level tokenizer, and the official one on a small stand-in file."""

from __future__ import annotations

from pathlib import Path

import pytest
import tokenizers
from tokenizers import models, pre_tokenizers, processors

from wanvram.errors import CheckpointError
from wanvram.weights.tokenizer import EOS, MAX_TOKENS, ByteTokenizer, UMT5Tokenizer, clean_text


@pytest.fixture
def tokenizer_file(tmp_path: Path) -> Path:
    vocabulary = {"<pad>": 0, "</s>": EOS, "<unk>": 2, "a": 3, "cat": 4}
    tokenizer = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", EOS)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=8)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(str(path))
    return path


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("  a\t\n cat  ", "a cat"),
        ("a\u00a0\u3000cat", "a cat"),
        ("&amp;lt;b&amp;gt;", "<b>"),
        ("schÃ¶n", "schön"),
        ("“a” cat", '"a" cat'),
        ("两只猫", "两只猫"),
        ("", ""),
        (" \n", ""),
    ],
)
def test_text_is_cleaned_as_official_does(text: str, cleaned: str) -> None:
    assert clean_text(text) == cleaned


def test_the_official_tokenizer_cleans_and_ends_with_eos(tokenizer_file: Path) -> None:
    assert UMT5Tokenizer(tokenizer_file).encode("  a   cat dog ") == [3, 4, 2, EOS]


def test_the_official_tokenizer_truncates_to_512_whatever_the_file_says(tokenizer_file: Path) -> None:
    ids = UMT5Tokenizer(tokenizer_file).encode("cat " * 600)
    assert ids == [4] * (MAX_TOKENS - 1) + [EOS]


def test_an_empty_prompt_is_one_token(tokenizer_file: Path) -> None:
    assert UMT5Tokenizer(tokenizer_file).encode("") == [EOS]
    assert ByteTokenizer(300).encode("") == [EOS]


def test_a_missing_or_damaged_tokenizer_is_named(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(CheckpointError, match=r"tokenizer\.json does not exist; expected the umt5-xxl tokenizer"):
        UMT5Tokenizer(path)
    path.write_text('{"model": 3}')
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged"):
        UMT5Tokenizer(path)


def test_bytes_become_ids_that_fit_the_vocabulary() -> None:
    assert ByteTokenizer(259).encode("aÿ") == [3 + 0x61, 3 + 0xC3, 3 + 0xBF, EOS]
    assert len(ByteTokenizer(300).encode("x" * 900)) == MAX_TOKENS
    with pytest.raises(ValueError, match="cannot hold"):
        ByteTokenizer(258)


def test_a_lone_surrogate_from_the_command_line_is_no_crash(tokenizer_file: Path) -> None:
    assert ByteTokenizer(300).encode("\udcff")[-1] == EOS
    assert UMT5Tokenizer(tokenizer_file).encode("\udcff")[-1] == EOS
