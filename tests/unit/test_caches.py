"""What this machine has at hand: compiled kernels, and a checkpoint's bytes in the page cache."""

from __future__ import annotations

import getpass
import os
import sys
from pathlib import Path

import pytest

from wanvram.machine.caches import cached_share, cold_libraries

MIB = 2**20


def test_kernels_are_cold_until_something_lies_in_their_cache(tmp_path: Path) -> None:
    kept = tmp_path / "fa4"
    environment = {"HOME": str(tmp_path), "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": str(kept)}
    assert cold_libraries(environment) == {"triton", "attention", "fa4"}
    (kept / "x").mkdir(parents=True)
    assert cold_libraries(environment) == {"triton", "attention"}
    (tmp_path / ".triton" / "cache" / "x").mkdir(parents=True)
    assert cold_libraries(environment) == {"attention"}
    (tmp_path / ".nv" / "ComputeCache" / "x").mkdir(parents=True)
    assert cold_libraries(environment) == frozenset()


def test_a_cache_elsewhere_counts_and_an_empty_one_does_not(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path), "TRITON_CACHE_DIR": str(tmp_path / "t"), "CUDA_CACHE_PATH": str(tmp_path)}
    (tmp_path / "t").mkdir()
    environment["TMPDIR"] = str(tmp_path)
    assert cold_libraries(environment) == {"triton", "fa4"}
    (tmp_path / getpass.getuser() / "flash_attention_cute_dsl_cache" / "x").mkdir(parents=True)
    assert cold_libraries(environment) == {"triton"}


@pytest.mark.skipif(sys.platform != "linux", reason="mincore is Linux's")
def test_the_share_in_the_page_cache_is_seen(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    with file.open("wb") as written:
        written.write(os.urandom(8 * MIB))
        written.flush()
        os.fsync(written.fileno())
        assert cached_share([file]) == 1.0
        os.posix_fadvise(written.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    assert (cached_share([file]) or 0.0) < 0.1


def test_no_file_and_no_answer_are_none(tmp_path: Path) -> None:
    assert cached_share([]) is None
    assert cached_share([tmp_path / "gone"]) is None
    (tmp_path / "empty").touch()
    assert cached_share([tmp_path / "empty"]) is None
