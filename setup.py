"""pyproject.toml says everything; this only writes into a wheel or a source archive which commit it was built from."""

import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py
from setuptools.command.sdist import sdist

HERE = Path(__file__).parent
NAME = Path("wanvram") / "commit.txt"


def commit() -> str:
    """Of the checkout; of a source archive what it was made from; empty where nobody knows."""
    kept = HERE / "src" / NAME
    if (HERE / ".git").exists():
        command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        found = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
        return found.stdout.strip() if found.returncode == 0 else ""
    return kept.read_text(encoding="ascii").strip() if kept.exists() else ""


class Build(build_py):
    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            (Path(self.build_lib) / NAME).write_text(commit() + "\n", encoding="ascii")


class Archive(sdist):
    def make_release_tree(self, base_dir: str, files: list) -> None:  # type: ignore[type-arg]
        super().make_release_tree(base_dir, files)
        (Path(base_dir) / "src" / NAME).write_text(commit() + "\n", encoding="ascii")


setup(cmdclass={"build_py": Build, "sdist": Archive})
