"""A wheel works outside the checkout: in a fresh environment, without network, with all its files and the commit it was built from."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from wanvram.version import __version__, described

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    os.name == "nt" or not (ROOT / ".git").exists(), reason="needs a checkout with its history, on a POSIX system"
)


def run(*command: object, cwd: Path) -> str:
    plain = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PIP_", "GIT_"))}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=plain, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what git knows, with its history, so that the checkout stays as it is."""
    folder = tmp_path_factory.mktemp("wheel")
    run("git", "clone", "-q", "--shared", ROOT, folder / "checkout", cwd=folder)
    for path in ("setup.py", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / path, folder / "checkout" / path)
    shutil.rmtree(folder / "checkout/src")
    shutil.copytree(ROOT / "src", folder / "checkout/src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    pip = (sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "--no-index")
    run(*pip, "-w", folder, folder / "checkout", cwd=folder)
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The bin folder of a new environment that has this wheel, and this environment's other packages in sight."""
    folder = tmp_path_factory.mktemp("fresh")
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin/python"
    purelib = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (purelib / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")  # whose own .pth files do not count then
    pip = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index")
    run(*pip, "--ignore-installed", wheel, cwd=folder)
    return folder / "bin"


def test_a_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    inside = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("wanvram/")}
    here = {
        path.relative_to(ROOT / "src").as_posix()
        for path in (ROOT / "src/wanvram").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    assert here - inside == set()
    assert inside - here <= {"wanvram/commit.txt"}


def test_the_version_says_the_commit_also_from_a_wheel(installed: Path, tmp_path: Path) -> None:
    assert __version__ in (ROOT / "pyproject.toml").read_text()
    said = run(installed / "wanvram", "--version", cwd=tmp_path)
    assert re.fullmatch(rf"wanvram {re.escape(__version__)} \(commit [0-9a-f]{{12}}(-dirty)?\)\n", said)
    assert said.split("(")[1][:19] == f"commit {run('git', 'rev-parse', 'HEAD', cwd=ROOT)[:12]}"
    assert described().startswith(f"{__version__} (commit ")


def test_an_installed_wanvram_predicts_and_reports_in_any_folder(installed: Path, tmp_path: Path) -> None:
    where = run(installed / "python", "-c", "import wanvram; print(wanvram.__file__)", cwd=tmp_path)
    assert ROOT not in Path(where.strip()).parents
    estimate = (installed / "wanvram", "estimate", "--task", "t2v-1.3B", "--size", "480p", "--frame_num", "5")
    assert "simulated:h200" in run(*estimate, "--sample_steps", "2", "--gpu", "h200", cwd=tmp_path)
    (tmp_path / "run.yaml").write_text(
        "name: tiny\ndescription: d\nmodel_config: {device: cpu, precision: fp32}\n"
        "request: {task: t2v-1.3B, size: 64*64, frame_num: 1, sample_steps: 1, weights: tiny}\n"
    )
    run(installed / "wanvram", "profile", "run.yaml", "-o", "made", cwd=tmp_path)
    run(installed / "wanvram", "report", "made", "-o", "report.html", cwd=tmp_path)
    assert (tmp_path / "report.html").stat().st_size > 10_000
    assert f"wanvram {__version__}" in run(installed / "python", "-m", "wanvram", "--version", cwd=tmp_path)
