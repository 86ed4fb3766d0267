"""What a promise run measured, predicted anew with today's code, beside what was predicted then. No GPU.

    python benchmarks/predict_promise_again.py benchmarks/DATE_CARD_keep_promise.json -o benchmarks/DATE_CARD_keep_promise_again.json
    python benchmarks/predict_promise_again.py FILE --only 1,8         some cases, printed only

Each case is drawn again from its seed, its pictures and videos are made again, and the strategy that ran is simulated whole under
its budget. Exit code 1 if a prediction is more than 0.5 % off NVML's figure or more than 8 MiB under it.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from keep_promise import MOST_ERROR, MOST_UNDER_BYTES
from promise_requests import draw, typed, write_media

from wanvram.cli.flags import config_from_flags
from wanvram.cli.main import build_parser
from wanvram.predict.simulate import simulate
from wanvram.simulate.gpus import find_gpu

MIB = 2**20


def predict(row: dict[str, Any], document: dict[str, Any], directory: Path) -> dict[str, Any]:
    case = draw(
        document["seed"],
        row["index"],
        document["card_bytes"],
        document["limit_seconds"],
        document.get("budget_gib"),  # not in files of before it could be given
    )
    write_media(case, directory)
    words, card = typed(case)[1:], find_gpu(document["card"]).key
    here = Path.cwd()
    os.chdir(directory)  # as it was typed: pictures are named without a folder
    try:
        args = build_parser().parse_args(words)
        config = config_from_flags(
            args, device="simulated", weights="random", gpu=card, memory_limit_bytes=row["own_budget_bytes"]
        )
        strategy = {name: value for name, value in row["strategy"].items() if name != "device"}
        record, _ = simulate(replace(config, strategy=replace(config.strategy, **strategy)), video=True)
    finally:
        os.chdir(here)
    peak, measured = record.peak(), row["watch"]["above_bytes"]
    assert peak is not None
    predicted = peak.device_bytes or 0
    return {
        "index": row["index"],
        "command": row["command"],
        "measured_bytes": measured,
        "predicted_then_bytes": row["predicted_device_bytes"],
        "predicted_bytes": predicted,
        "reserved": [peak.reserved_bytes, row["own_peak"]["reserved_bytes"]],
        "allocated": [peak.allocated_bytes, row["own_peak"]["allocated_bytes"]],
        "error": predicted / measured - 1,
        "within": abs(predicted - measured) <= MOST_ERROR * measured and measured - predicted <= MOST_UNDER_BYTES,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", default="", help="numbers of cases, comma separated")
    parser.add_argument("-o", "--out", type=Path)
    args = parser.parse_args()
    document = json.loads(args.file.read_text(encoding="utf-8"))
    only = {int(number) for number in args.only.split(",") if number}
    rows = []
    for row in document["rows"]:
        if row["rerun_of"] is not None or not row["recorded"] or (only and row["index"] not in only):
            continue
        with tempfile.TemporaryDirectory() as name:
            found = predict(row, document, Path(name))
        rows.append(found)
        print(
            f"{found['index']:3d} measured {found['measured_bytes'] / MIB:8.1f}, then {found['predicted_then_bytes'] / MIB:8.1f}, "
            f"now {found['predicted_bytes'] / MIB:8.1f} MiB ({found['error']:+.3%}){'' if found['within'] else '  MISSED'}",
            flush=True,
        )
    missed = [row["index"] for row in rows if not row["within"]]
    errors = [row["error"] for row in rows]
    print(f"{len(rows)} cases, {len(missed)} missed {missed}; error {min(errors):+.3%} to {max(errors):+.3%}")
    if args.out:
        text = {"benchmark": "predict_promise_again", "of": args.file.name, "missed": missed, "rows": rows}
        args.out.write_text(json.dumps(text, indent=1) + "\n", encoding="utf-8")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
