"""docs/dependencies.md tells the truth: the packages it names are those that pyproject.toml declares and the code imports."""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterable
from importlib.metadata import packages_distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "dependencies.md").read_text(encoding="utf-8")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
OF_THE_HOST = {"triton", "pytest"}  # the first comes with torch's CUDA builds, the second loads our plugin


def normal(names: Iterable[str]) -> set[str]:
    """Without versions, in the one spelling of a registry."""
    return {re.sub(r"[-_.]+", "-", re.split(r"[\s<>=!~\[;]", name)[0]).lower() for name in names}


def named(section: str) -> set[str]:
    """The first column of the table under a heading that begins so."""
    text = re.split(r"^## ", DOCUMENT, flags=re.MULTILINE)
    (part,) = (part for part in text if part.startswith(section))
    return normal(re.findall(r"^\| ([\w-]+) \|", part, flags=re.MULTILINE)) - {"package"}


def declared(key: str) -> set[str]:
    found = re.search(rf"^{key} = (\[.*?\])(?:  #.*)?$", PYPROJECT, flags=re.MULTILINE | re.DOTALL)
    assert found, f"pyproject.toml has no {key}"
    return normal(ast.literal_eval(found[1]))


def imported() -> set[str]:
    """The distributions that the source imports, anywhere in a file."""
    modules: set[str] = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                modules.add(node.module.partition(".")[0])
    known = packages_distributions()
    foreign = modules - set(sys.stdlib_module_names) - OF_THE_HOST - {"wanvram", "_typeshed"}
    return normal(known[module][0] for module in foreign)


def test_the_dependencies_named_are_those_declared() -> None:
    assert named("Runtime") == declared("dependencies")
    assert named("Optional") == declared("prompt")
    assert named("Faster attention") == declared("fa4")
    assert named("Development") == declared("dev") - {"wanvram"} | {"transformers"}


def test_the_dependencies_declared_are_those_imported() -> None:
    assert declared("dependencies") | declared("prompt") == imported()
