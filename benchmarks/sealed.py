"""Seals of the committed results: a prediction that is overwritten, a figure that is changed, or a miss that is taken off the list shows.

seals.json holds the SHA-256 of every result file and of known_misses.json. New files are sealed by `evidence.py --seal`; until
then they are listed and nothing fails. A sealed file that changed or went is broken, until it is sealed again by its name and with
a reason, which stays in seals.json: `evidence.py --seal FILE --because "..."`.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path
from typing import Any

__all__ = ["broken", "seal", "unsealed"]

SEALS = "seals.json"


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _seals(folder: Path) -> dict[str, dict[str, Any]]:
    path = folder / SEALS
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _results(folder: Path) -> dict[str, Path]:
    """Without files that are empty still: a benchmark runs, or was killed."""
    found = (path for path in sorted(folder.glob("*.json")) if path.name != SEALS)
    return {path.name: path for path in found if path.stat().st_size}


def broken(folder: Path) -> list[str]:
    """A sentence for each sealed file that changed or is gone."""
    files = _results(folder)
    sentences = []
    for name, entry in _seals(folder).items():
        if name not in files:
            sentences.append(f"{name} was sealed and is gone")
        elif _digest(files[name]) != entry["sha256"]:
            sentences.append(
                f'{name} is not what was sealed; put it back, or say why: evidence.py --seal {name} --because "..."'
            )
    return sentences


def unsealed(folder: Path) -> list[str]:
    return sorted(_results(folder).keys() - _seals(folder).keys())


def seal(folder: Path, names: list[str], because: str) -> int:
    """All new files, and of the sealed ones those that are named, with the reason."""
    files, seals = _results(folder), _seals(folder)
    for name in (Path(name).name for name in names):
        if name in seals and not because:
            sys.exit(f"{name} is sealed; say why it changes: --because")
        if name not in files:
            if name not in seals:
                sys.exit(f"{name} is no result here")
            print(f"{name} is gone: {because}")
            del seals[name]
            continue
        earlier = seals.get(name)
        seals[name] = {"sha256": _digest(files[name])}
        if earlier is not None and earlier["sha256"] != seals[name]["sha256"]:
            seals[name]["changed"] = [*earlier.get("changed", ()), {"was": earlier["sha256"], "because": because}]
        elif earlier is not None:
            seals[name] = earlier
    for name in unsealed(folder):
        seals.setdefault(name, {"sha256": _digest(files[name])})
    text = json.dumps(dict(sorted(seals.items())), indent=1, ensure_ascii=False) + "\n"
    (folder / SEALS).write_text(text, encoding="utf-8")
    print(f"{len(seals)} files sealed")
    return 0
