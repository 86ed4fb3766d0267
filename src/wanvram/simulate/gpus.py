"""The cards the simulator knows, and finding one by any of its names or in a file of one's own. No torch."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

from wanvram.errors import InputError
from wanvram.simulate.card import EFFICIENCY, GPU, Efficiency, read_card
from wanvram.simulate.card_table import CARDS
from wanvram.units import GIB

__all__ = ["DEFAULT_GPU", "EFFICIENCY", "GPU", "GPUS", "Efficiency", "card_of_run", "cards_with_memory", "find_gpu"]

DEFAULT_GPU = "h200"
GPUS: dict[str, GPU] = {card.key: card for card in CARDS}

SAME_SIZE = 0.06  # a card sold as 8 GB has 8 GiB, of which drivers offer 7.8; the next sizes are 6 and 10
# Drivers say `NVIDIA A100-SXM4-80GB`, `Tesla T4`, `NVIDIA GeForce RTX 4090 Laptop GPU`, `NVIDIA RTX 6000 Ada Generation`,
# `NVIDIA RTX PRO 6000 Blackwell Workstation Edition`: what distinguishes no card from another is left out.
_MAKER = {
    *("nvidia", "geforce", "tesla", "gpu", "simulated"),
    *("generation", "blackwell", "workstation", "server", "edition"),
}
_FORM = {"sxm2", "sxm3", "sxm4", "sxm5", "sxm", "pcie", "hbm2", "hbm2e", "hbm3", "hbm3e"}
_SIZE = re.compile(r"(\d+)gb?")


def find_gpu(text: str, total_bytes: int | None = None) -> GPU:
    """By key, product name or the driver's name, whatever the case and separators; or the card that a YAML file describes.

    total_bytes: what the driver reports; it decides where a name fits several sizes. Raises InputError that lists those, or the
    nearest names of an unknown one, or says what is wrong in the file.
    """
    if _is_path(text):
        return _own(Path(text))
    fits = _fitting(text)
    if len(fits) > 1 and total_bytes is not None:
        return min(fits, key=lambda card: abs(card.memory_bytes - total_bytes))
    if len(fits) > 1:
        raise InputError(f"GPU '{text}' has several sizes; choose {' or '.join(card.key for card in fits)} (--gpu)")
    if not fits:
        close = _nearest(text)
        nearest = f"nearest: {', '.join(close)}; " if close else ""
        raise InputError(
            f"GPU '{text}' is unknown; {nearest}`wanvram check --cards` lists all, --gpu FILE.yaml describes another"
        )
    return fits[0]


def card_of_run(device: str, gpu: str | None) -> GPU | None:
    """The card of a simulated run by its record: `device` (simulated:KEY) and the configuration's `gpu`.

    None if this is no card of the table and its file is gone or describes another one by now.
    """
    kind, _, key = device.partition(":")
    if kind != "simulated" or key in GPUS or not _is_path(gpu or ""):
        return GPUS.get(key) if kind == "simulated" else None
    try:
        card = find_gpu(gpu or "")
    except InputError:
        return None
    return card if card.key == key else None


def cards_with_memory(nbytes: int) -> list[str]:
    """Keys of the cards whose nominal memory is within 6 % of nbytes, fastest first."""
    fits = [card for card in CARDS if abs(card.memory_bytes - nbytes) <= SAME_SIZE * nbytes]
    return [card.key for card in sorted(fits, key=lambda card: -card.product_flops)]


def _is_path(text: str) -> bool:
    return text.lower().endswith((".yaml", ".yml")) or "/" in text or "\\" in text


def _own(path: Path) -> GPU:
    card = read_card(path)
    if card.key in GPUS:
        raise InputError(f"{path}: key: '{card.key}' is a card of the table; give yours a key of its own")
    return card


def _fitting(text: str) -> list[GPU]:
    """Cards of exactly this name; else those whose name it is but for the memory's size, then but for the board's form."""
    whole = _words(text)
    for words in (whole, [word for word in whole if word not in _FORM]):
        if fits := [card for card in GPUS.values() if _spellings(words) & _names(card)]:
            return fits
        sizes = {int(found[1]) for word in words if (found := _SIZE.fullmatch(word))}
        plain = _spellings(_without_size(words))
        fits = [card for card in GPUS.values() if plain & _names(card, sized=False)]
        if fits := [card for card in fits if not sizes or round(card.memory_bytes / GIB) in sizes]:
            return fits
    return []


def _spellings(words: Iterable[str]) -> set[str]:
    """`4090` stands for `RTX 4090`."""
    joined = "".join(words)
    return {joined, f"rtx{joined}"}


def _names(card: GPU, *, sized: bool = True) -> set[str]:
    """Key and product name without what distinguishes no card, and without the memory's size unless `sized`."""
    names = (_words(card.key), _words(card.name))
    return {"".join(words if sized else _without_size(words)) for words in names}


def _without_size(words: Iterable[str]) -> list[str]:
    return [word for word in words if not _SIZE.fullmatch(word)]


def _words(text: str) -> list[str]:
    return [word for word in re.split(r"[^a-z0-9]+", text.lower()) if word and word not in _MAKER]


def _nearest(text: str) -> list[str]:
    """Keys of the cards whose names look most like it, at most four."""
    wanted = "".join(word for word in _without_size(_words(text)) if word not in _FORM)
    spelled = sorted({name for card in CARDS for name in _names(card, sized=False)})
    close = [name for w in (wanted, f"rtx{wanted}") for name in difflib.get_close_matches(w, spelled, n=6)]
    keys = [card.key for name in dict.fromkeys(close) for card in CARDS if name in _names(card, sized=False)]
    return list(dict.fromkeys(keys))[:4] if wanted else []
