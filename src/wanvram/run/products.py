"""Whether a card can multiply as a configuration asks, the same for a simulated card and for the one that is there. No torch."""

from __future__ import annotations

from wanvram.config import RunConfig
from wanvram.errors import require
from wanvram.knobs import PRODUCT_PRECISION

__all__ = ["check_products"]

FP8_FROM = (8, 9)  # Ada; Hopper and Blackwell follow


def check_products(config: RunConfig, name: str, capability: tuple[int, int]) -> None:
    """Raises InputError where the card `name` has no products of 8-bit numbers and they are asked for."""
    asked = PRODUCT_PRECISION.of(config.strategy)
    require(
        asked == PRODUCT_PRECISION.default or capability >= FP8_FROM,
        f"{PRODUCT_PRECISION.name}: {asked} is computed on cards of compute capability {_said(FP8_FROM)} or newer; "
        f"{name} has {_said(capability)}; use {PRODUCT_PRECISION.default}",
    )


def _said(capability: tuple[int, int]) -> str:
    return "{}.{}".format(*capability)
