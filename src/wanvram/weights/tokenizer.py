"""Prompt text -> token ids: the official umT5 tokenizer, and a byte-level one for weights that know no language."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Protocol

import ftfy
import tokenizers

from wanvram.errors import CheckpointError
from wanvram.weights.sources import check_file

__all__ = ["EOS", "MAX_TOKENS", "ByteTokenizer", "Tokenizer", "UMT5Tokenizer", "clean_text"]

MAX_TOKENS = 512
EOS = 1
FIRST_BYTE = 3  # 0 is padding, 1 the end, 2 the unknown token


class Tokenizer(Protocol):
    """encode: at most MAX_TOKENS ids, the last of which is EOS; no padding."""

    def encode(self, text: str) -> list[int]: ...


def clean_text(text: str) -> str:
    """Official 'whitespace' cleaning: repaired Unicode, HTML entities resolved twice, runs of space made one."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text.strip()).strip()


class UMT5Tokenizer:
    """google/umt5-xxl, from the `tokenizer.json` of the checkpoint folder."""

    def __init__(self, path: Path) -> None:
        check_file(path, "the umt5-xxl tokenizer (google/umt5-xxl/tokenizer.json)")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers library raises bare Exception
            raise CheckpointError(f"{path} is damaged ({error}); expected the umt5-xxl tokenizer") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode(self, text: str) -> list[int]:
        ids = self._tokenizer.encode(clean_text(text), add_special_tokens=False).ids
        return [*ids[: MAX_TOKENS - 1], EOS]


class ByteTokenizer:
    """One id per UTF-8 byte of the cleaned text."""

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < FIRST_BYTE + 256:
            raise ValueError(f"a vocabulary of {vocab_size} cannot hold {FIRST_BYTE} special tokens and 256 bytes")

    def encode(self, text: str) -> list[int]:
        return [*(FIRST_BYTE + byte for byte in clean_text(text).encode()[: MAX_TOKENS - 1]), EOS]
