"""Tensors from files and into files: torch.load, torch.save and safetensors, whose own code knows nothing of a simulated card."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from wanvram.foreign.facade import Facade
from wanvram.foreign.memory import CUDA

__all__ = ["file_stand_ins"]


def file_stand_ins(facade: Facade) -> list[tuple[Any, str, Any]]:
    """(owner, name, stand-in): they read to the host and move what was meant for the card."""
    files = _Files(facade)
    changes: list[tuple[Any, str, Any]] = [
        (torch, "load", partial(files.load, torch.load)),
        (torch, "save", partial(files.save, torch.save)),
    ]
    if find_spec("safetensors") is not None:
        safetensors, of_torch = import_module("safetensors"), import_module("safetensors.torch")
        opening = partial(files.opened, safetensors.safe_open)
        changes += [(safetensors, "safe_open", opening), (of_torch, "safe_open", opening)]
    return changes


class _Files:
    def __init__(self, facade: Facade) -> None:
        self.facade = facade

    def to_card(self, value: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return _everywhere(value, lambda tensor: self.facade.moved(tensor, CUDA, tensor.dtype))

    def on_card(self, where: Any) -> bool:
        return isinstance(where, (str, int, torch.device)) and self.facade.place_named(where) == CUDA

    def load(self, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """torch.load: everything is read to the host, and moved to the card if that is where map_location points."""
        where = kwargs.pop("map_location", args[1] if len(args) > 1 else None)
        to_card = self.on_card(where)
        found = plain(args[0], map_location="cpu" if where is None or to_card else where, **kwargs)
        return self.to_card(found) if to_card else found

    def save(self, plain: Callable[..., Any], content: Any, *args: Any, **kwargs: Any) -> Any:
        """torch.save: what is on the card with its values, zeros where only a GPU would know them."""
        with torch._C.DisableTorchFunction():
            content = _everywhere(content, self.facade.real)
        plain(content, *args, **kwargs)

    def opened(self, plain: Any, filename: Any, framework: str = "pt", device: Any = "cpu", **kwargs: Any) -> Any:
        """safetensors.safe_open, on the card through the host."""
        if not self.on_card(device):
            return plain(filename, framework=framework, device=device, **kwargs)
        return _Opened(plain(filename, framework=framework, device="cpu", **kwargs), self)


class _Opened:
    """A file of safetensors whose tensors go to the card."""

    def __init__(self, file: Any, files: _Files) -> None:
        self._file, self._files = file, files

    def __enter__(self) -> _Opened:
        self._file.__enter__()
        return self

    def __exit__(self, *error: Any) -> Any:
        return self._file.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def get_tensors(self, *names: Any) -> Any:
        return self._files.to_card(self._file.get_tensors(*names))

    def get_tensor(self, name: str) -> Any:
        return self._files.to_card(self._file.get_tensor(name))


def _everywhere(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The tensors in dicts, lists and tuples, changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return type(value)((key, _everywhere(part, change)) for key, part in value.items())
    return type(value)(_everywhere(part, change) for part in value) if type(value) in (list, tuple) else value
