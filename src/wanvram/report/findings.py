"""The answer a report opens with: how much, does it fit, who owns the peak, what to change. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from wanvram.advice import Advice
from wanvram.analysis.peak import component_of, module_of, owners, shape_of
from wanvram.record import RunRecord
from wanvram.report.runs import Run, asked, pairs
from wanvram.report.timeline import peak_moment
from wanvram.report.translations import Texts
from wanvram.spans import Memory, Span
from wanvram.timeline_record import OTHER, WEIGHTS, AliveBlocks
from wanvram.units import GIB, human, seconds

__all__ = [
    "CARDS_GIB",
    "Answer",
    "advice_first",
    "alike",
    "answer",
    "best_first",
    "card_of",
    "ranked",
    "ranks",
    "smallest_card",
    "together",
    "unlimited_base",
]

CARDS_GIB = (4, 6, 8, 10, 12, 16, 24, 32, 48, 80)
LEAST_SECONDS = 0.005  # what is shown as 0.00 s costs no time
USABLE_SHARE = 0.98  # of a card's nominal memory a process gets about this much: RTX 4090 24,082 of 24,576 MiB


@dataclass(frozen=True)
class Answer:
    """headline: how much and whether it fits. owner: who owns the peak. change: what lowers it."""

    headline: str
    owner: str
    change: str


def smallest_card(used_bytes: int) -> int | None:
    """Nominal GiB of the smallest standard card with that much usable memory; None above 80 GB."""
    return next((card for card in CARDS_GIB if used_bytes <= card * GIB * USABLE_SHARE), None)


def card_of(record: RunRecord) -> int | None:
    """`smallest_card` of a run that came to its end on a card; None also for one that failed: its peak was still to come."""
    peak = record.peak()
    if peak is None or record.device == "cpu" or record.failure is not None:
        return None
    return smallest_card(peak.deciding_bytes)


def answer(run: Run, texts: Texts) -> Answer:
    """Three sentences for one run, in the language of `texts`."""
    span, peak = run.record.peak_span(), run.record.peak()
    if span is None or peak is None:
        return Answer(_failure(run.record, texts) or texts("nothing_recorded"), "", "")
    return Answer(_headline(run.record, peak, texts), _owner(run, span, texts), _advised(run, texts))


def _headline(record: RunRecord, peak: Memory, texts: Texts) -> str:
    figure = "device" if peak.device_bytes is not None else "reserved" if record.cached else "allocated"
    used = peak.deciding_bytes
    parts = [texts(f"peak_{figure}_{'predicted' if record.simulated else 'measured'}", bytes=human(used))]
    failure = _failure(record, texts)
    if failure:
        return texts.join(failure, texts(f"until_then_{figure}", bytes=human(used)))
    if record.budget_bytes is not None:
        key = "fits_budget" if record.fits else "exceeds_budget"
        spare = human(abs(record.budget_bytes - used))
        parts.append(texts(key, budget=human(record.budget_bytes), spare=spare))
    if record.device != "cpu":
        parts.append(_holding(used, texts))
    return texts.sentence(parts)


def _holding(used_bytes: int, texts: Texts) -> str:
    card = smallest_card(used_bytes)
    return texts("smallest_card", card=card) if card else texts("no_card", card=CARDS_GIB[-1])


def _failure(record: RunRecord, texts: Texts) -> str | None:
    if record.failure is None:
        return None
    where = record.failure.stage or texts("no_stage")
    sentence = texts(f"failed_{record.failure.kind}", stage=where, message=record.failure.message.rstrip())
    return sentence if sentence.endswith((".", "!", "?", "。")) else texts.sentence([sentence])


def _owner(run: Run, span: Span, texts: Texts) -> str:
    component = span.component or texts("no_component")
    there, activation = span.start.allocated_bytes, span.activation_bytes
    key = "owner_activation" if activation > there else "owner_weights"
    if span.kind == "load":  # what loading adds are weights, though they were not there when it began
        key = "owner_loading"
    sentence = texts(key, stage=span.name, component=component, there=human(there), activation=human(activation))
    moment = peak_moment(run.timeline)
    groups = [g for g in moment.alive if g.operation != OTHER] if moment else []
    if not groups or span.kind == "load":
        return sentence
    top = owners(groups, lambda group: _group_name(group, texts))[0]
    return texts.join(sentence, texts("largest_group", bytes=human(top.bytes), count=top.count, what=top.name))


def _group_name(group: AliveBlocks, texts: Texts) -> str:
    """What was asked for and where: shape and module, not the operation, which for most is one that makes an empty tensor."""
    if group.operation == WEIGHTS:
        return texts("weights_of", component=group.component) if group.component else component_of(group)
    if group.shape is None:
        return shape_of(group) if group.operation else texts("unknown")
    return texts("group_of", shape=shape_of(group), module=module_of(group))


def _advised(run: Run, texts: Texts) -> str:
    """The best lossless change, then the best lossy one if it saves more; without advice, how it is had."""
    if not run.advice:
        return "" if run.record.foreign else texts("no_advice")
    best, *others = advice_first(run.advice)
    sentences = [_advice(run, best, texts)]
    lossy = next((a for a in others if not a.lossless and a.saved_bytes > best.saved_bytes), None)
    if lossy is not None and best.lossless:
        sentences.append(_advice(run, lossy, texts))
    return texts.join(*sentences)


def advice_first(advice: Sequence[Advice]) -> list[Advice]:
    """Lossless changes first, then by what they save."""
    return sorted(advice, key=lambda a: (not a.lossless, -a.saved_bytes))


def _advice(run: Run, advice: Advice, texts: Texts) -> str:
    lossy = "" if advice.lossless else "_lossy"
    values = {
        "change": advice.change,
        "saved": human(advice.saved_bytes),
        "share": _share(run.record, advice),
        "cost": _cost(advice.seconds, texts),
    }
    base = unlimited_base(run.record, advice)
    if base is None:
        return texts(f"advice{lossy}", **values)
    fits = "" if advice.fits is None else texts("advice_fits" if advice.fits else "advice_exceeds")
    left = human(base - advice.saved_bytes)
    return texts(f"advice_unlimited{lossy}", base=human(base), left=left, fits=fits, **values)


def unlimited_base(record: RunRecord, advice: Advice) -> int | None:
    """The peak that the advice lowers, of a run that ran out of memory: on a card without limit, since its own was still to come."""
    return advice.base_device_bytes if record.failure is not None and record.failure.kind == "oom" else None


def _share(record: RunRecord, advice: Advice) -> str:
    peak, base = record.peak(), advice.base_device_bytes
    if base is None and record.failure is None and peak is not None:
        base = peak.deciding_bytes
    return f"{advice.saved_bytes / base:.0%}".replace("%", " %") if base else "-"


def _cost(added: float | None, texts: Texts) -> str:
    if added is None:
        return texts("cost_unknown")
    if added >= LEAST_SECONDS:
        return texts("cost_slower", time=seconds(added))
    return texts("cost_faster", time=seconds(-added)) if added <= -LEAST_SECONDS else texts("cost_none")


def alike(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs by what was asked for, the largest group first: a peak says nothing beside that of another task, size or length."""
    groups: dict[tuple[str, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(asked(run.record), []).append(run)
    return sorted(groups.values(), key=len, reverse=True)


def best_first(runs: Sequence[Run]) -> list[tuple[int, Run]]:
    """Deciding bytes and run of those that came to their end: the lowest peak first, of equal ones the fastest step.

    Meant for runs that are `alike`.

    A prediction that was measured is left out: the measurement stands for it.
    """
    judged = [run for run in _judged(runs) if not run.record.failure]
    ended = [(peak.deciding_bytes, run) for run in judged if (peak := run.record.peak())]
    return sorted(ended, key=lambda item: (item[0], item[1].record.step_seconds() or math.inf))


def _judged(runs: Sequence[Run]) -> list[Run]:
    measured = {predicted for predicted, _ in pairs(runs)}
    return [run for index, run in enumerate(runs) if index not in measured]


def ranks(runs: Sequence[Run]) -> list[int | None]:
    """Of each run its place by `best_first` among those that were asked the same; None: it failed, or its measurement counts."""
    places: dict[int, int] = {}
    for group in alike(runs):
        keys = [(used, run.record.step_seconds() or math.inf, id(run)) for used, run in best_first(group)]
        order = [key[:2] for key in keys]
        places |= {key[2]: 1 + order.index(key[:2]) for key in keys}
    return [places.get(id(run)) for run in runs]


def together(runs: Sequence[Run], texts: Texts) -> str:
    """What runs have in common, without their names, which the table has: the lowest and the highest peak, or that they are unlike."""
    groups, judged = alike(runs), _judged(runs)
    if len(groups) == 1:
        return ranked(runs, texts)
    return texts.join(texts("unlike", count=len(judged), kinds=len(groups)), _failed(judged, texts))


def _failed(judged: Sequence[Run], texts: Texts) -> str:
    failed = sum(1 for run in judged if run.record.failure)
    return texts("some_failed", count=failed) if failed else ""


def ranked(runs: Sequence[Run], texts: Texts) -> str:
    """One sentence over runs that were asked the same: the lowest and the highest peak, and how many share them."""
    ended, judged = best_first(runs), _judged(runs)
    if not ended:
        return texts("all_failed", count=len(judged))
    (least, _), (most, _) = ended[0], ended[-1]
    sharing, highest = (sum(1 for used, _ in ended if used == peak) for peak in (least, most))
    key = "one_run" if len(judged) == 1 else "best_of" if sharing == 1 else "best_shared"
    parts = [texts(key, count=len(judged), shared=sharing, least=human(least))]
    if any(run.record.device != "cpu" for _, run in ended):
        parts.append(_holding(least, texts))
    sentences = [texts.sentence(parts)]
    if most > least:
        sentences.append(texts("worst_shared" if highest > 1 else "worst_of", shared=highest, most=human(most)))
    return texts.join(*sentences, _failed(judged, texts))
