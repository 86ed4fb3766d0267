"""Run directories whose every text, key and number may come from somebody who means harm. Seeded: a seed is always the same report."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from report_runs import Recipe, write_run
from wanvram.errors import InputError
from wanvram.report.runs import Run, find_runs

__all__ = ["TEXTS", "hostile_runs"]

RUN = "window.broken=1"
TEXTS = (
    f'</script><img src=x onerror="{RUN}">',
    f"<script>{RUN}</script>",
    f"<!--<script>{RUN}//-->",
    f"<svg/onload={RUN}>",
    f'"><iframe srcdoc="<script>parent.{RUN}</script>">',
    f"' onmouseover='{RUN}' x='",
    f"javascript:{RUN}",
    f"`${{{RUN}}}`",
    f"'); {RUN}; ('",
    f"\\u003cscript>{RUN}\\u003c/script>",
    f"&lt;script&gt;{RUN}&lt;/script&gt;",
    f"]]><script>{RUN}</script>",
    f"</style><script>{RUN}</script>",
    f"</title><script>{RUN}</script>",
    f"</noscript><script>{RUN}</script>",
    f"}}body{{display:none}} url(javascript:{RUN})",
    f"{{{{constructor.constructor('{RUN}')()}}}}",
    f'=HYPERLINK("javascript:{RUN}")',
    "%%DATA%%%%SCRIPT%%%%POLICY%%",
    "{label}{bytes}{run}$&$1$`",
    "__proto__",
    "constructor",
    "toString",
    "hasOwnProperty",
    "\u2028\u2029\u202e\u0000\u001b[31m",
    "(other)",
    "weights",
    "step",
    "",
    " ",
    "-" * 3000,
    "\U0001f4a9" * 300,
    "unbroken" * 200,
)
NUMBERS = (0, 1, -1, 2**31, 2**53 + 1, 2**63, 10**30, -(10**20), 5e-324, 1e308, -0.0, 0.1)
KEPT = {"schema", "axis", "kind", "state", "device", "part"}  # other values of these are refused, or tested elsewhere


def hostile_runs(directory: Path, seed: int) -> list[Run]:
    """One to four runs. Numbers that their reader refuses are put back; the texts stay."""
    chance = random.Random(seed)
    paths = []
    for i in range(chance.randint(1, 4)):
        recipe = Recipe(
            f"run {i}", simulated=chance.random() < 0.7, timeline=chance.random() < 0.8, steps=chance.randint(1, 5)
        )
        paths.append(write_run(directory / f"{i}", recipe))
        _spoil(paths[-1], chance)
    return find_runs(paths)


def _spoil(path: Path, chance: random.Random) -> None:
    share = chance.choice((0.05, 0.3, 1.0))
    for file in sorted(path.glob("*.json")):
        data = json.loads(file.read_text(encoding="utf-8"))
        plain = _mutated(data, chance, share, numbers=0.0)
        if file.name == "record.json":
            plain["environment"] |= {text: chance.choice(TEXTS) for text in chance.sample(TEXTS, 5)}
            plain["config"] |= {"given": {text: chance.choice(TEXTS) for text in chance.sample(TEXTS, 5)}}
            plain["notes"] += chance.sample(TEXTS, 4)
        for tries in range(4):
            numbers = chance.choice((0.02, 0.2)) if tries < 3 else 0.0
            file.write_text(json.dumps(_mutated(plain, chance, 0.0, numbers)), encoding="utf-8")
            try:
                find_runs([path])
                break
            except InputError:
                continue


def _mutated(value: Any, chance: random.Random, texts: float, numbers: float) -> Any:
    if isinstance(value, dict):
        return {k: v if k in KEPT else _mutated(v, chance, texts, numbers) for k, v in value.items()}
    if isinstance(value, list):
        if len(value) == 3 and value[2] in ("active", "inactive"):
            return [*(_mutated(v, chance, texts, numbers) for v in value[:2]), value[2]]
        return [_mutated(v, chance, texts, numbers) for v in value]
    if isinstance(value, str):
        return chance.choice(TEXTS) if chance.random() < texts else value
    if isinstance(value, bool) or value is None or chance.random() >= numbers:
        return value
    return chance.choice([n for n in NUMBERS if isinstance(n, int)] if isinstance(value, int) else NUMBERS)
