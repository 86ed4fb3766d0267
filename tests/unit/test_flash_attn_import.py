"""flash-attn-4 is imported without what else its dependency brings, and as usual where that is not known to be the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FILES = {
    "quack/__init__.py": "import quack.dsl as _dsl\nfrom quack.rmsnorm import norm\n",
    "quack/dsl.py": "ready = True\n",
    "quack/rounding.py": "import quack.dsl\n",
    "quack/cache/__init__.py": "from quack.cache.jit import jit\n",
    "quack/cache/jit.py": "import quack.cache as _state\njit = 1\n",
    "quack/rmsnorm.py": "from quack.cache import jit\nnorm = 'a norm'\n",
    "flash_attn/__init__.py": "",
}
FUNCTION = "import quack.dsl\ndef flash_attn_func(): return 'attends'\n"
SAY = """
import sys
from wanvram.kernels import fused_attention
found = fused_attention._imported()
print(found() if callable(found) else f"{type(found).__name__}: {found}", "quack.rmsnorm" in sys.modules)
from quack.rmsnorm import norm
from quack import dsl
import quack
print(norm, quack.norm, dsl.ready)
"""


def said(site: Path, version: str = "0.6.5", before: str = "", flash_attn_cute: str = FUNCTION) -> list[str]:
    """What a fresh process says with these packages."""
    for name, text in (FILES | {"flash_attn/cute/__init__.py": flash_attn_cute}).items():
        (site / name).parent.mkdir(parents=True, exist_ok=True)
        (site / name).write_text(text, encoding="utf-8")
    info = site / f"quack_kernels-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: quack-kernels\nVersion: {version}\n", encoding="utf-8"
    )
    path = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    env = {name: value for name, value in os.environ.items() if name != "CUTE_DSL_PTXAS_PATH"} | {"PYTHONPATH": path}
    run = subprocess.run([sys.executable, "-c", before + SAY], env=env, capture_output=True, text=True, check=True)
    return run.stdout.splitlines()


def test_its_dependencys_norms_are_not_imported_and_who_wants_them_later_gets_them(tmp_path: Path) -> None:
    assert said(tmp_path) == ["attends False", "a norm a norm True"]


@pytest.mark.parametrize(
    ("version", "before"),
    [("0.7.0", ""), ("0.6.5", "import quack\n"), ("0.6.5", "import os\nos.environ['CUTE_DSL_PTXAS_PATH'] = 'x'\n")],
    ids=["another version", "imported before", "another assembler is asked for"],
)
def test_otherwise_it_is_imported_as_usual(version: str, before: str, tmp_path: Path) -> None:
    assert said(tmp_path, version, before) == ["attends True", "a norm a norm True"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("import quack\ndef flash_attn_func(): return quack.norm\nflash_attn_func()\n", "a norm True"),
        ("raise RuntimeError('no driver')\n", "RuntimeError: no driver False"),
    ],
    ids=["it needs more of the dependency", "it is broken"],
)
def test_where_that_fails_importing_as_usual_decides(text: str, expected: str, tmp_path: Path) -> None:
    assert said(tmp_path, flash_attn_cute=text) == [expected, "a norm a norm True"]
