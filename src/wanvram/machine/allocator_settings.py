"""PyTorch's allocator settings: put in force before PyTorch can read them, which it does once, at CUDA's start. No torch.

PyTorch knows two variables for them. With both set, 2.11 reads PYTORCH_CUDA_ALLOC_CONF and ignores the other (measured); the newer
name is PYTORCH_ALLOC_CONF. Here both are always given the same text, so that which one is read does not matter.
"""

from __future__ import annotations

import os
from collections.abc import MutableMapping

from wanvram.errors import InputError, require

__all__ = ["NAMES", "check_plain", "options_of", "put_in_force"]

NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
_EXPANDABLE = "expandable_segments"
_MARK = "WANVRAM_ALLOC_CONF"  # what this program itself has set, for its child processes


def options_of(text: str) -> dict[str, str]:
    """`expandable_segments:True,max_split_size_mb:64` -> its options. Raises InputError for what is no list of options."""
    options: dict[str, str] = {}
    depth, start = 0, 0
    for end, character in enumerate(text + ","):
        depth += (character == "[") - (character == "]")
        if character == "," and depth <= 0:
            name, colon, value = text[start:end].strip().partition(":")
            require(bool(colon) or not name, f"the allocator settings '{text}' are not a list like {_EXPANDABLE}:True")
            if name:
                options[name.strip()] = value.strip()
            start = end + 1
    return options


def _given(environment: MutableMapping[str, str]) -> tuple[str, str] | None:
    """(variable, text) that the user set; None if none. Raises InputError where two contradict each other."""
    own = environment.get(_MARK)
    given = [(name, environment[name]) for name in NAMES if environment.get(name, "").strip()]
    given = [(name, text) for name, text in given if text != own]
    if len(given) == 2 and options_of(given[0][1]) != options_of(given[1][1]):
        (old, old_text), (new, new_text) = given
        raise InputError(
            f"{old} is '{old_text}' and {new} is '{new_text}': PyTorch 2.11 would read {old} and ignore the other; unset one of them"
        )
    return given[0] if given else None


def put_in_force(expandable: bool, environment: MutableMapping[str, str] | None = None) -> None:
    """Sets both variables to the strategy's expandable segments and to whatever else the user asked for.

    To be called before torch is imported. Raises InputError where the user's settings contradict the strategy.
    """
    environment = os.environ if environment is None else environment
    given = _given(environment)
    options = options_of(given[1]) if given else {}
    if given and _EXPANDABLE in options and (options[_EXPANDABLE].lower() == "true") != expandable:
        raise InputError(
            f"{given[0]} is '{given[1]}' but the configuration says {_EXPANDABLE}: {expandable}; unset one of them"
        )
    text = ",".join(f"{name}:{value}" for name, value in (options | {_EXPANDABLE: str(expandable)}).items())
    environment[_MARK] = text
    for name in NAMES:
        environment[name] = text


def check_plain(environment: MutableMapping[str, str] | None = None) -> None:
    """Raises InputError where the user's settings are none that a plan knows: it is simulated with PyTorch's defaults."""
    given = _given(os.environ if environment is None else environment)
    others = [name for name in options_of(given[1]) if name != _EXPANDABLE] if given else []
    if given and others:
        raise InputError(
            f"{given[0]} sets {', '.join(others)}, which a plan does not know: it would promise what is not true; unset it, or run "
            "without --vram_budget"
        )
