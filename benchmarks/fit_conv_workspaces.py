"""From measured workspaces to src/wanvram/simulate/conv_workspaces.json: which kernel of simulate/convolutions.py is taken where.

    python benchmarks/fit_conv_workspaces.py [measured.json.gz ...]    adds these to tests/data/conv_workspaces.json.gz

Along the area H x W of the input of each kind of convolution, the ranges are chosen that need the fewest changes of kernel
and exceptions. Prints how many measured shapes the rules give, and how many of those left out of a fit on the other half.
"""

from __future__ import annotations

import gzip
import json
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from wanvram.simulate.convolutions import SAME_BYTES, Convolution, Regimes, Table, kernel_names, kernel_workspace

MEASURED = Path("tests/data/conv_workspaces.json.gz")
TARGET = Path("src/wanvram/simulate/conv_workspaces.json")
CHANGE_COST = 4  # exceptions that a new range has to spare
QUIET = 12  # different areas in a row without exception make a range of one kernel
CONSTANTS = ("0", "131", "272", "400", "656")


def shape(key: str) -> Convolution:
    dtype, *parts = key.split()
    x, weight, stride, padding = (tuple(map(int, part.split("x"))) for part in parts)
    return Convolution(dtype, x, weight, stride, padding)


class Sample:
    """One measured convolution and the kernels whose rule gives its workspace."""

    def __init__(self, conv: Convolution, size: int) -> None:
        self.conv, self.size, self.area = conv, size, conv.area
        names = (*kernel_names(conv.dtype), *CONSTANTS)
        self.kernels = [name for name in names if kernel_workspace(name, conv) == size]
        if not self.kernels:
            raise SystemExit(f"{conv.key}: {size} bytes follow no rule")


def candidates(samples: list[Sample]) -> list[str]:
    """Kernels that explain some of the samples, the most first, and pairs of one that copies with another."""
    counts = Counter(name for sample in samples for name in sample.kernels)
    names = [name for name, _ in counts.most_common()]
    copying = [name for name in names if name == "in-out"]
    return names + [f"{a}|{b}" for a in copying for b in names if a != b]


def explains(name: str, sample: Sample) -> bool:
    if "|" in name:
        name = name.split("|")[sample.conv.positions % 4 != 0]
    return name in sample.kernels


def path(samples: list[Sample], names: list[str]) -> list[str]:
    """The kernel of each sample on the cheapest way along the area (Viterbi). Those of one area keep one kernel."""
    costs = dict.fromkeys(names, 0)
    steps: list[dict[str, str]] = []
    groups = [list(group) for _, group in groupby(samples, key=lambda sample: sample.area)]
    for group in groups:
        cheapest = min(names, key=lambda name: costs[name])
        before, misses = {}, {}
        for name in names:
            changed = costs[cheapest] + CHANGE_COST
            before[name] = name if costs[name] <= changed else cheapest
            misses[name] = min(costs[name], changed) + sum(not explains(name, sample) for sample in group)
        costs = misses
        steps.append(before)
    name = min(names, key=lambda name: costs[name])
    chosen: list[str] = []
    for group, before in zip(reversed(groups), reversed(steps), strict=True):
        chosen += [name] * len(group)
        name = before[name]
    return chosen[::-1]


class Range(NamedTuple):
    """areas: how many different ones were measured in it. kernels: one, or where they are mixed all."""

    first: int
    last: int
    areas: int
    kernels: tuple[str, ...]


def ranges(samples: list[Sample]) -> list[Range]:
    """In rising order. Where shapes of several kernels lie among each other, a range has all of them."""
    samples = sorted(samples, key=lambda sample: sample.area)
    names = candidates(samples)
    found: list[Range] = []
    for kernel, part in groupby(zip(path(samples, names), samples, strict=True), key=lambda pair: pair[0]):
        for piece in pieces(kernel, [sample for _, sample in part], names):
            while found and is_doubtful(found[-1], piece):
                before = found.pop()
                kernels = tuple(dict.fromkeys(before.kernels + piece.kernels))
                piece = Range(before.first, piece.last, before.areas + piece.areas, kernels)
            found.append(piece)
    return found


def is_doubtful(before: Range, after: Range) -> bool:
    """A mixed range and a short one beside it that happens to have no exception, or two mixed ones."""
    mixed = [len(part.kernels) > 1 for part in (before, after)]
    if all(mixed):
        return True
    return any(mixed) and (after if mixed[0] else before).areas < QUIET


def pieces(kernel: str, samples: list[Sample], names: list[str]) -> Iterator[Range]:
    """One kernel's part of the path, cut where exceptions begin and end."""
    groups = [list(group) for _, group in groupby(samples, key=lambda sample: sample.area)]
    odd = [index for index, group in enumerate(groups) if not all(explains(kernel, sample) for sample in group)]
    clusters: list[list[int]] = []
    for index in odd:
        if clusters and index - clusters[-1][-1] <= QUIET:
            clusters[-1].append(index)
        else:
            clusters.append([index])
    start = 0
    for cluster in clusters:
        first, last = max(cluster[0] - 1, start), min(cluster[-1] + 1, len(groups) - 1)
        if first > start:
            yield piece_of(groups[start:first], (kernel,))
        others = [s for group in groups[first : last + 1] for s in group if not explains(kernel, s)]
        yield piece_of(groups[first : last + 1], (kernel, *cover(others, names)))
        start = last + 1
    if start < len(groups):
        yield piece_of(groups[start:], (kernel,))


def piece_of(groups: list[list[Sample]], kernels: tuple[str, ...]) -> Range:
    return Range(groups[0][0].area, groups[-1][0].area, len(groups), kernels)


def cover(samples: list[Sample], names: list[str]) -> list[str]:
    """Few kernels that explain all of them."""
    chosen: list[str] = []
    while samples:
        best = max((n for n in names if "|" not in n), key=lambda name: sum(explains(name, s) for s in samples))
        chosen.append(best)
        samples = [sample for sample in samples if not explains(best, sample)]
    return chosen


def fit(measured: Mapping[str, int]) -> Table:
    kinds: dict[str, list[Sample]] = defaultdict(list)
    for key, size in measured.items():
        sample = Sample(shape(key), size)
        kinds[sample.conv.kind].append(sample)
    regimes: dict[str, Regimes] = {
        kind: [[part.first, part.last, *part.kernels] for part in ranges(samples)]
        for kind, samples in sorted(kinds.items())
    }
    ruled = Table(regimes, {})
    exceptions = {}
    for key, size in sorted(measured.items()):
        found = ruled.workspace(shape(key))
        if (found.size, found.basis) != (size, "rule"):
            exceptions[key] = size
    return Table(regimes, exceptions)


def judge(table: Table, measured: Mapping[str, int]) -> None:
    """Prints how far the table is from what was measured, by basis; MiB."""
    misses: dict[str, list[int]] = defaultdict(list)
    for key, size in measured.items():
        found = table.workspace(shape(key))
        misses[found.basis].append(found.size - size)
    for basis, off in sorted(misses.items()):
        exact = sum(abs(miss) < SAME_BYTES for miss in off)
        text = (
            f"{basis}: {exact} of {len(off)} right, the others {min(off) / 2**20:+.1f} to {max(off) / 2**20:+.1f} MiB"
        )
        print(f"  {text}, {sum(off) / len(off) / 2**20:+.2f} on average")


def gather(files: Iterable[Path]) -> tuple[list[dict[str, object]], dict[str, int]]:
    """Devices, and bytes by key. The files have to agree."""
    devices: list[dict[str, object]] = []
    measured: dict[str, int] = {}
    for file in files:
        content = json.loads(gzip.decompress(file.read_bytes()))
        devices += content["devices"] if "devices" in content else [content["device"]]
        for key, size in content["workspaces"].items():
            canonical = shape(key).key
            if measured.setdefault(canonical, size) != size:
                raise SystemExit(f"{canonical}: {size} and {measured[canonical]} bytes were measured")
    return devices, measured


def main(files: list[Path]) -> None:
    devices, measured = gather([MEASURED, *files] if MEASURED.exists() else files)
    content = json.dumps({"devices": devices, "workspaces": dict(sorted(measured.items()))}, indent=0)
    MEASURED.write_bytes(gzip.compress(content.encode(), mtime=0))
    table = fit(measured)
    lines = [f"{json.dumps(kind)}: {json.dumps(regimes)}" for kind, regimes in table.regimes.items()]
    rows = [f"{json.dumps(key)}: {size}" for key, size in table.exceptions.items()]
    text = ",\n".join(lines), ",\n".join(rows)
    TARGET.write_text(f'{{"regimes": {{\n{text[0]}\n}}, "exceptions": {{\n{text[1]}\n}}}}\n')
    print(f"{len(measured)} measured shapes, {sum(map(len, table.regimes.values()))} ranges, {len(rows)} exceptions")
    for dtype in ("float32", "bfloat16", "float16"):
        keys = sorted(key for key in measured if key.startswith(dtype))
        random.Random(0).shuffle(keys)
        half = set(keys[: len(keys) // 2])
        print(f"{dtype}: {len(half)} shapes fitted, {len(keys) - len(half)} others predicted")
        judge(fit({key: measured[key] for key in half}), {key: measured[key] for key in keys if key not in half})


if __name__ == "__main__":
    main([Path(name) for name in sys.argv[1:]])
