"""The HTML report: one file that opens from disk, without network, under 2 MB. No torch.

Data reaches the page as JSON in a <script type="application/json">; the page's own scripts (assets/) show it through
textContent only. Scripts and styles are allowed by their SHA-256, everything else is forbidden by the content policy.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from typing import Any

from wanvram.analysis.compare import working_seconds
from wanvram.errors import InputError
from wanvram.record import RunRecord
from wanvram.report.findings import CARDS_GIB, advice_first, alike, answer, best_first, card_of, ranked, ranks, together
from wanvram.report.gpus import gpu_rows
from wanvram.report.runs import Run, asked, pairs
from wanvram.report.timeline import thinned
from wanvram.report.translations import GLOSSARY, TEXTS, Texts, shortened
from wanvram.simulate.gpus import card_of_run
from wanvram.spans import Memory, Span
from wanvram.timeline_record import TimelineRecord
from wanvram.version import __version__

__all__ = ["MAX_BYTES", "html_report"]

MAX_BYTES = 2_000_000
MAX_STEPS = 2000  # of a stage, whose times the page gets
MAX_TEXT = 600  # characters of a prompt or a note that the page shows

_SCRIPTS = ("base.js", "tables.js", "clock.js", "timeline.js", "alive.js", "report.js")
_STYLES = ("uplot.min.css", "report.css")

# (points, alive groups, segment blocks) per run and moment, from everything to the least that still shows the peak.
_LEVELS = (
    (4000, 200, 6000),
    (2000, 100, 2000),
    (1000, 60, 1000),
    (500, 40, 400),
    (250, 20, 0),
    (100, 8, 0),
    (40, 1, 0),
)


def html_report(runs: Sequence[Run], language: str = "en") -> str:
    """The whole page. Timelines are thinned until it is under 2 MB; raises InputError where even that does not help."""
    texts = Texts(language)
    bodies = [_run(run, texts) for run in runs]
    for level, (points, groups, blocks) in enumerate(_LEVELS):
        for body, run in zip(bodies, runs, strict=True):
            body["timeline"] = _packed(thinned(run.timeline, points=points, groups=groups, blocks=blocks))
            body["shortened"] = level > 0
        page = _page(runs, bodies, texts)
        if len(page.encode()) < MAX_BYTES:
            return page
    raise InputError(f"{len(runs)} runs do not fit a page of {MAX_BYTES} bytes; give fewer")


def _page(runs: Sequence[Run], bodies: list[dict[str, Any]], texts: Texts) -> str:
    groups = alike(runs)
    kinds = [{"asked": _asked(group[0].record, texts), "said": ranked(group, texts)} for group in groups]
    order = [runs.index(run) for _, run in best_first(groups[0])]
    headline = together(runs, texts) if len(runs) > 1 else bodies[0]["answer"]["headline"]
    data = {
        "texts": TEXTS[texts.language],
        "glossary": GLOSSARY[texts.language],
        "version": __version__,
        "cards": CARDS_GIB,
        "headline": headline,
        "kinds": kinds if len(kinds) > 1 else [],
        "ranks": ranks(runs),
        "runs": bodies,
        "shown": order[0] if order else 0,
        "pinned": [order[-1], order[0]] if len(order) > 1 else [],
        "pairs": pairs(runs),
    }
    style, library = "\n".join(map(_asset, _STYLES)), _asset("uplot.min.js")
    script = "\n".join(["(() => {", '"use strict";', *map(_asset, _SCRIPTS), "})();"])  # in one scope of their own
    allowed = f"script-src {_hash(library)} {_hash(script)}; style-src {_hash(style)}"
    values = {
        "LANG": "zh-CN" if texts.language == "zh" else "en",
        "POLICY": f"default-src 'none'; {allowed}; base-uri 'none'; form-action 'none'",
        "TITLE": html.escape(f"{texts('title')}: {', '.join(run.label for run in runs)}"[:200]),
        "STYLE": style,
        "NOSCRIPT": html.escape(f"{headline} {texts('no_script')}"),
        "DATA": _json(data),
        "LIBRARY": library,
        "SCRIPT": script,
    }
    first, *rest = _asset("template.html").split("%%")
    # Alternately a name and the text after it; nothing inside a value is looked at again.
    return first + "".join(values[part] if i % 2 == 0 else part for i, part in enumerate(rest))


def _asset(name: str) -> str:
    return (resources.files("wanvram.report") / "assets" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _json(value: object) -> str:
    """JSON that cannot leave its script element, whatever text is in it."""
    try:
        text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError as error:
        raise InputError(f"a run has a number that is none ({error})") from error
    for sign in "<>&\u2028\u2029":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text.encode("utf-8", "replace").decode()  # a lone surrogate in a name is no text


def _run(run: Run, texts: Texts) -> dict[str, Any]:
    record = run.record
    peak, where = record.peak(), record.peak_span()
    return {
        "label": run.label,
        "asked": _asked(record, texts),
        "device": record.device,
        "simulated": record.simulated,
        "fits": record.fits,
        "budget": record.budget_bytes,
        "limit": _limit(record),
        "failure": record.failure.kind if record.failure else None,
        "answer": asdict(answer(run, texts)),
        "peak": _memory(peak, record.cached) if peak else None,
        "cached": record.cached,
        "stage": where.name if where else None,
        "component": where.component if where else None,
        "fragmentation": where.peak.fragmentation if where and record.cached else None,
        "card": card_of(record),
        "seconds": working_seconds(record),
        "step_seconds": record.step_seconds(),
        "settings": {key: shortened(value, MAX_TEXT) for key, value in run.settings().items()},
        "environment": {key: shortened(value, MAX_TEXT) for key, value in record.environment.items()},
        "notes": [shortened(note, MAX_TEXT) for note in record.notes],
        "advice": [
            asdict(advice) | {"change": shortened(advice.label, MAX_TEXT)} for advice in advice_first(run.advice)
        ],
        "components": [asdict(component) for component in record.components],
        "stages": [_stage(span, record.cached) for span in record.stages],
        "ranks": list(gpu_rows(record)),
        "exact": run.exact,
        "borrowed": run.borrowed,
    }


def _asked(record: RunRecord, texts: Texts) -> str:
    if record.foreign:
        return shortened(record.config.get("description") or "-", MAX_TEXT)
    task, size, frames = asked(record)
    return texts("asked", task=task, size=size, frames=frames)


def _limit(record: RunRecord) -> dict[str, Any] | None:
    """The line above the curve: the budget, or what the card has where a run without budget found it full. No name: the budget."""
    if record.budget_bytes is not None:
        return {"name": None, "bytes": record.budget_bytes}
    if record.failure is None or record.failure.kind != "oom":
        return None
    if not record.simulated:
        total = record.environment.get("gpu_total_bytes")
        return {"name": record.device.partition(":")[2], "bytes": total} if type(total) is int else None
    gpu = card_of_run(record.device, record.config.get("request", {}).get("gpu"))
    return {"name": gpu.name, "bytes": gpu.total_bytes} if gpu else None


def _memory(memory: Memory, cached: bool) -> dict[str, int | None]:
    reserved = memory.reserved_bytes if cached else None
    return {"allocated": memory.allocated_bytes, "reserved": reserved, "device": memory.device_bytes}


def _stage(span: Span, cached: bool) -> dict[str, Any]:
    return {
        "name": span.name,
        "component": span.component,
        "start": span.start.allocated_bytes,
        "peak": _memory(span.peak, cached),
        "activation": None if span.kind == "load" else span.activation_bytes,
        "fragmentation": span.peak.fragmentation if cached else None,
        "fluctuation": span.fluctuation_bytes,
        "seconds": span.seconds,
        "steps": _step_seconds(span),
    }


def _step_seconds(span: Span) -> list[float]:
    """Of every step in order; nothing where one is unknown."""
    steps = [child for child in span.children if child.kind == "step"]
    if sum(step.repeats for step in steps) > MAX_STEPS:
        return []
    times = [step.seconds for step in steps for _ in range(step.repeats)]
    return [time for time in times if time is not None] if None not in times else []


def _packed(timeline: TimelineRecord) -> dict[str, Any]:
    """Columns instead of rows, and every alive group as a list: half the size."""
    columns = [list(column) for column in zip(*timeline.points, strict=True)] or [[], [], [], []]
    moments = [
        vars(moment)
        | {
            "alive": [list(vars(group).values()) for group in moment.alive],
            "segments": [
                [segment.bytes, [[o, size, int(state == "active")] for o, size, state in segment.blocks]]
                for segment in moment.segments
            ],
        }
        for moment in timeline.moments
    ]
    document = timeline.to_json()
    del document["schema"]
    return document | {"points": columns, "moments": moments}
