"""Prompt text -> token ids: the official umT5 tokenizer, and a byte-level one for weights that know no language."""

from __future__ import annotations

import html
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any, Protocol

import ftfy
import psutil
import tokenizers

from wanvram.errors import CheckpointError
from wanvram.units import GIB, MIB, human
from wanvram.weights.sources import check_file, shown

__all__ = [
    "EOS",
    "LIMITED",
    "MAX_TOKENS",
    "ByteTokenizer",
    "Tokenizer",
    "UMT5Tokenizer",
    "clean_text",
    "try_tokenizer",
    "what_is_wrong",
]

MAX_TOKENS = 512
EOS = 1
FIRST_BYTE = 3  # 0 is padding, 1 the end, 2 the unknown token
EXPECTED = "the umt5-xxl tokenizer (google/umt5-xxl/tokenizer.json)"
MAX_FILE = 64 * MIB  # the official one has 16 MiB
MAX_MEMORY = 2 * GIB  # the official one takes 0.3 GiB
MAX_SECONDS = 60.0  # the official one takes 1 to 2 s
# What the trial encodes: every printable ASCII character, other scripts, a character of no vocabulary, nothing, and a long text.
SAMPLES = ("", "".join(map(chr, range(32, 127))), "一只猫 кот قطة 😀 \ue000 \U0010ffff", "a cat. " * 500)


class Tokenizer(Protocol):
    """encode: at most MAX_TOKENS ids, the last of which is EOS; no padding."""

    def encode(self, text: str) -> list[int]: ...


def clean_text(text: str) -> str:
    """Official 'whitespace' cleaning: repaired Unicode, HTML entities resolved twice, runs of space made one."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text.strip()).strip()


# Begins what is run by -c in a process of its own. The current folder is not searched; `limited` comes after the imports.
LIMITED = """
import json, sys
sys.path[:] = [entry for entry in sys.path if entry]
path, memory, samples, given = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3]), sys.argv[4:]
def limited():
    try:
        import resource
        with open("/proc/self/statm") as file:
            held = int(file.read().split()[5]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_DATA, (held + memory, held + memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    except (ImportError, AttributeError, OSError, ValueError):
        pass  # the parent watches the memory, too
def tried(encoder):
    try:
        encode = encoder()
        print(json.dumps({"lengths": [len(encode(sample)) for sample in samples]}))
    except BaseException as error:
        print(json.dumps({"error": str(error)[:300]}))
"""
_TRIAL = f"""{LIMITED}
import tokenizers
def encoder():
    tokenizer = tokenizers.Tokenizer.from_file(path)
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return lambda sample: tokenizer.encode(sample, add_special_tokens=False).ids
limited()
tried(encoder)
"""


def try_tokenizer(path: Path) -> None:
    """CheckpointError unless the file is read and encodes some texts in a process with limits of memory and time.

    The library behind it panics, aborts or fills the memory for some files. Where the platform cannot limit the memory of a
    process, it is ended when it is seen to exceed it.
    """
    check_file(path, EXPECTED)
    status = path.stat()
    if status.st_size > MAX_FILE:
        raise CheckpointError(
            f"{path} has {human(status.st_size)}, at most {human(MAX_FILE)} is read; expected {EXPECTED}"
        )
    problem = what_is_wrong(_TRIAL, path, status.st_size, status.st_mtime_ns)
    if problem:
        raise CheckpointError(f"{path} is damaged ({problem}); expected the umt5-xxl tokenizer")


@cache
def what_is_wrong(program: str, path: Path, *_state: Any, given: tuple[str, ...] = ()) -> str:
    """Of the tokenizer at `path` in this state, by the program, which is told what is `given`; empty if nothing is."""
    command = [sys.executable, "-c", program, str(path.absolute()), str(MAX_MEMORY), json.dumps(SAMPLES), *given]
    environment = os.environ | {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile() as output:
        child = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.DEVNULL
        )
        try:
            ended = _watched(child)
        finally:
            if child.poll() is None:
                child.kill()
                child.wait()
        output.seek(0)
        said = _answer(output.read(MIB))
    if ended or said is None:
        return ended or "reading it ends the process"
    if "error" in said:
        return shown(said["error"]) or "it cannot be read"
    if sum(said["lengths"]) == 0:
        return "it makes no tokens of any text"
    return ""


def _watched(child: subprocess.Popen[bytes]) -> str:
    """Waits for the child's end; why it was not waited for any longer, else empty."""
    end = time.monotonic() + MAX_SECONDS
    while True:
        try:
            child.wait(0.02)
            return ""
        except subprocess.TimeoutExpired:
            pass
        if time.monotonic() > end:
            return f"reading it takes more than {MAX_SECONDS:.0f} s"
        try:
            if psutil.Process(child.pid).memory_info().rss > MAX_MEMORY:
                return f"reading it takes more than {human(MAX_MEMORY)} of memory"
        except psutil.Error:  # it has just ended
            pass


def _answer(text: bytes) -> dict[str, Any] | None:
    try:
        answer = json.loads(text)
    except ValueError:
        return None
    return answer if isinstance(answer, dict) else None


class UMT5Tokenizer:
    """google/umt5-xxl, from the `tokenizer.json` of the checkpoint folder, which was tried in another process first."""

    def __init__(self, path: Path) -> None:
        try_tokenizer(path)
        self._path = path
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the tokenizers library raises bare Exception
            raise CheckpointError(f"{path} is damaged ({error}); expected the umt5-xxl tokenizer") from error
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()

    def encode(self, text: str) -> list[int]:
        """CheckpointError when the file has no token for a part of the text."""
        try:
            ids = self._tokenizer.encode(clean_text(text), add_special_tokens=False).ids
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # the library's panics are no Exception
            raise CheckpointError(
                f"{self._path} cannot encode the prompt ({shown(str(error))}); expected the umt5-xxl tokenizer"
            ) from error
        return [*ids[: MAX_TOKENS - 1], EOS]


class ByteTokenizer:
    """One id per UTF-8 byte of the cleaned text."""

    def __init__(self, vocab_size: int) -> None:
        if vocab_size < FIRST_BYTE + 256:
            raise ValueError(f"a vocabulary of {vocab_size} cannot hold {FIRST_BYTE} special tokens and 256 bytes")

    def encode(self, text: str) -> list[int]:
        return [*(FIRST_BYTE + byte for byte in clean_text(text).encode()[: MAX_TOKENS - 1]), EOS]
