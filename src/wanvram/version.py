"""The version, where everything can import it: `wanvram` itself reaches torch through its profiler."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

__version__ = "0.2.0"


@cache
def commit() -> str | None:
    """Of the checkout that runs, with `-dirty` where files differ from it, or that a wheel was built from; None: nobody knows."""
    here = Path(__file__).parent
    if not (here.parents[1] / ".git").exists():
        written = here / "commit.txt"  # by setup.py
        return (written.read_text(encoding="ascii").strip() or None) if written.exists() else None
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(command, cwd=here, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return found.stdout.strip() or None if found.returncode == 0 else None


def described() -> str:
    """`0.2.0 (commit 661afa1d3e2b)`."""
    known = commit()
    return f"{__version__} (commit {known})" if known else f"{__version__} (of no known commit)"
