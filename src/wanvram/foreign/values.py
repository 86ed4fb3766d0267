"""Values of small device tensors: control flow, schedulers and indices read them, so operations on them are done on the CPU as well."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch

__all__ = ["MOST_ELEMENTS", "Values"]

MOST_ELEMENTS = 32_768  # of a storage whose values are kept; a vocabulary of logits is the largest that code looks into


class Values:
    """The bytes of a meta storage as a CPU storage, by the meta storage's key; views share them as they share the storage."""

    def __init__(self) -> None:
        self._known: dict[int, torch.UntypedStorage] = {}
        self._assumed: set[int] = set()  # keys of those that are zeros for want of better, or follow from such

    def forget(self, key: int) -> None:
        if self._known.pop(key, None) is not None:
            self._assumed.discard(key)

    def of(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """The tensor's values as a CPU tensor that shares them; None where they are not known."""
        if not tensor.is_meta:
            return tensor
        known = self._known.get(tensor.untyped_storage()._cdata)
        if known is None:
            return None
        shared = torch.empty(0, dtype=tensor.dtype)
        return shared.set_(known, tensor.storage_offset(), tensor.shape, tensor.stride())

    def sure(self, tensor: torch.Tensor) -> torch.Tensor | None:
        """As `of`; None also where they were assumed."""
        return None if self.assumed(tensor) else self.of(tensor)

    def assumed(self, tensor: torch.Tensor) -> bool:
        return tensor.is_meta and tensor.untyped_storage()._cdata in self._assumed

    def keep(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """`value` [the shape of tensor] is what the meta tensor holds; its storage must be the tensor's alone."""
        if not _small(tensor):
            return
        own = torch.zeros(tensor.untyped_storage().nbytes(), dtype=torch.uint8).untyped_storage()
        key = tensor.untyped_storage()._cdata
        self._known[key] = own
        shared = self.of(tensor)
        assert shared is not None
        shared.copy_(value)

    def follow(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any], result: Any) -> bool:
        """The operation on the values, in place or into `result`'s. False where an argument's values are not known.

        Of whole numbers and truth values that follow from unknown ones zeros are assumed: a program may go on with the first token.
        """
        results = list(tensors_in((result,)))
        if not all(map(_small, results)):
            return False
        given = [*tensors_in(args), *tensors_in(kwargs.values())]
        if any(t.is_meta and t.untyped_storage()._cdata not in self._known for t in given):
            return self._assume(results)
        real_args, real_kwargs = self._real(args), {k: self._real(v) for k, v in kwargs.items()}
        try:
            if "device" in real_kwargs:
                real_kwargs["device"] = torch.device("cpu")
            real_kwargs.pop("pin_memory", None)
            found = func(*real_args, **real_kwargs)
        except NotImplementedError:  # a GPU's own operation: attention by its backend's name
            return self._assume(results)
        assumed = any(map(self.assumed, given))
        for meta, real in zip(results, tensors_in((found,)), strict=True):
            if meta.untyped_storage()._cdata not in self._known:
                self.keep(meta, real)
            if assumed and meta.is_meta:
                self._assumed.add(meta.untyped_storage()._cdata)
        return True

    def _assume(self, results: list[torch.Tensor]) -> bool:
        """False where one of them is a fraction, lies in memory that was there before, or is real."""
        for tensor in results:
            if tensor.is_floating_point() or tensor.is_complex() or not tensor.is_meta or self.of(tensor) is not None:
                return False
        for tensor in results:
            self.keep(tensor, torch.zeros(tensor.shape, dtype=tensor.dtype))
            self._assumed.add(tensor.untyped_storage()._cdata)
        return bool(results)

    def _real(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.of(value)
        if isinstance(value, (list, tuple)):
            return type(value)(self._real(part) for part in value)
        return value


def _small(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().nbytes() <= MOST_ELEMENTS * tensor.itemsize


def tensors_in(values: Iterable[Any]) -> Iterable[torch.Tensor]:
    """The tensors among an operation's arguments or results, which nest at most in lists."""
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from tensors_in(value)
