"""What `attention` comes to on a card: the backend asked for, or for `auto` the fastest that is known. No torch.

`auto` is PyTorch's own order, but flash-attn-4 for long attention where the package is installed, on cards whose architecture it has a
kernel of its own for; and on cards that were never measured in the registry, what `wanvram check --attention` found fastest on this
machine. A plan names what it came to, so a run of that plan asks nothing again.
"""

from __future__ import annotations

from dataclasses import dataclass

from wanvram.errors import InputError
from wanvram.kernels.attention_backends import AUTO, BACKENDS, FA4, LONG_KEYS, Backend, Capability, chosen
from wanvram.knobs import ATTENTION
from wanvram.machine.attention_cache import CROSS, SELF, Measured
from wanvram.record import BASES, AttentionChoice, AttentionUse

__all__ = ["BY_NAME", "Card", "Heads", "choose", "fastest", "require_package"]

ASKED, TABLE, CHECK = BASES
BY_NAME = {backend.name: backend for backend in BACKENDS}
PROMPT_KEYS = 512


@dataclass(frozen=True)
class Card:
    """measured: the registry's figures are its own. checked: what was measured with it on this machine. note: see AttentionChoice.

    refused: backends that this machine does not have; `auto` leaves them out. here: in this machine.
    """

    name: str
    capability: Capability
    measured: bool = False
    checked: Measured | None = None
    note: str = ""
    refused: frozenset[str] = frozenset()
    here: bool = False


@dataclass(frozen=True)
class Heads:
    """What attends: bytes of a number, numbers of a head, keys of self-attention."""

    dtype_bytes: int
    head_dim: int
    keys: int = LONG_KEYS + 1


def choose(asked: str, card: Card, heads: Heads) -> AttentionChoice:
    """What attends on this card. Raises InputError where it cannot compute what was asked for."""
    if asked == AUTO:
        taken, basis = _auto(card, heads)
    else:
        taken, basis = _given(asked, card, heads), ASKED
    uses = [
        chosen(card.capability, heads.dtype_bytes, heads.head_dim, n, taken.name) for n in (heads.keys, PROMPT_KEYS)
    ]
    own, cross = (AttentionUse(use.name, _source(use, card, heads)) for use in uses)
    return AttentionChoice(asked, taken.name, basis, own, cross, card.note)


def _given(asked: str, card: Card, heads: Heads) -> Backend:
    backend = BY_NAME[asked]
    first, last = (None if c is None else f"{c[0]}.{c[1]}" for c in backend.cards)
    has = "{}.{}".format(*card.capability)
    if not backend.on(card.capability):
        until = f" and older than {last}" if last else ""
        raise InputError(
            f"{ATTENTION.name}: {asked} computes on cards of compute capability {first} or newer{until}; {card.name} has {has}; use {AUTO}"
        )
    if not backend.takes(card.capability, heads.dtype_bytes, heads.head_dim):
        raise InputError(
            f"{ATTENTION.name}: {asked} does not compute heads of {heads.head_dim} numbers of {heads.dtype_bytes} bytes; use {AUTO}"
        )
    return backend


def _auto(card: Card, heads: Heads) -> tuple[Backend, str]:
    able = [backend for backend in BACKENDS if backend.takes(card.capability, heads.dtype_bytes, heads.head_dim)]
    there = [backend for backend in able if backend.name not in card.refused]
    ready = [backend for backend in there if backend.package is None or backend.version() is not None] or able[:1]
    if card.checked is not None and not card.measured and heads.dtype_bytes == 2:
        quickest = fastest(card.checked)
        named = next((backend for backend in ready if backend.name == quickest), None)
        if named is not None:
            return named, CHECK
    return next((backend for backend in ready if backend.is_taken_on(card.capability)), ready[0]), TABLE


def fastest(measured: Measured) -> str | None:
    """The backend with which self- and cross-attention of as many rows take least; None where nothing was measured."""
    own, cross = measured.seconds(SELF), measured.seconds(CROSS)
    short = {name: time for name, time in cross.items() if name in BY_NAME and not BY_NAME[name].more_keys_than}
    whole = {
        name: time + (min(short.values()) if BY_NAME[name].more_keys_than else short[name])
        for name, time in own.items()
        if name in BY_NAME and (name in short or (short and BY_NAME[name].more_keys_than))
    }
    return min(whole, key=lambda name: whole[name]) if whole else None


def _source(backend: Backend, card: Card, heads: Heads) -> str:
    if heads.dtype_bytes != 2:
        return "measured on an H200" if card.measured else "assumption: the share of the H200"
    return backend.rate(card.capability).source


def require_package(attention: AttentionChoice) -> None:
    """InputError that names both sides where what was chosen needs a package that is not installed here."""
    backend = BY_NAME[attention.taken]
    if backend.package is not None and backend.version() is None:
        raise InputError(
            f"{ATTENTION.name}: {backend.name} is asked for, by the configuration or the plan that it comes from, but the package "
            f"{backend.package} is not installed here; pip install 'wanvram[{FA4}]', or plan again here, or use {AUTO}"
        )
