"""What Python code asks of PyTorch about devices, answered for the simulated card: a TorchFunctionMode over plain meta tensors.

Owns: device arguments, `x.device` and its like, transfers, host tensors, which are real below 1 MiB and meta above.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors

from wanvram.foreign.memory import CPU, CUDA, META, ForeignMemory
from wanvram.foreign.values import tensors_in

__all__ = ["LARGE_BYTES", "Facade"]

LARGE_BYTES = 1 << 20  # host tensors from here on have no bytes: a 14B model would need 27 GiB
_FROM_DATA = ("tensor", "as_tensor", "asarray", "nested_tensor")
_META = torch.device("meta")
T: Any = torch.Tensor


class Facade(TorchFunctionMode):
    def __init__(self, memory: ForeignMemory) -> None:
        super().__init__()
        self.memory = memory
        self._place = memory.place_of
        self.cuda = torch.device("cuda", 0)
        self.cpu = torch.device("cpu")
        self._handlers: dict[Any, Callable[..., Any]] = {
            **{f: partial(self._factory, f) for f in _device_constructors() if f.__name__ not in _FROM_DATA},
            torch.device: _numbered,
            T.device.__get__: self._device,
            T.is_cuda.__get__: lambda t: self._place(t) == CUDA,
            T.is_cpu.__get__: lambda t: self._place(t) == CPU,
            T.is_meta.__get__: lambda t: self._place(t) == META,
            T.get_device: lambda t: 0 if self._place(t) == CUDA else -1,
            T.data.__set__: self._set_data,
            T.to: self._to,
            T.cuda: lambda t, device=None, non_blocking=False, memory_format=None: self.moved(
                t, CUDA, t.dtype, memory_format=memory_format, non_blocking=non_blocking
            ),
            T.cpu: lambda t, memory_format=None: self.moved(t, CPU, t.dtype, memory_format=memory_format),
            T.numpy: self._numpy,
            T.tolist: lambda t: self.real(t).tolist(),
            T.__array__: self._array,
            T.data_ptr: self._data_ptr,
            T.pin_memory: self._pin,
            T.is_pinned: lambda t, device=None: self.memory.pinned(t),
            T.type: self._type,
            T.new_tensor: self._new_tensor,
            T.__repr__: self._repr,
            torch.Tensor.__reduce_ex__: self._reduce,
            torch.from_numpy: torch.from_numpy,
        }
        for name in _FROM_DATA[:3]:
            self._handlers[getattr(torch, name)] = self._from_data(getattr(torch, name))

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self.memory.shared:
            return self._call(func, args, kwargs or {})
        with self.memory.lock:
            return self._call(func, args, kwargs or {})

    def _call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        handler = self._handlers.get(func)
        if handler is not None:
            return handler(*args, **kwargs)
        if kwargs.get("device") is not None:
            return self._placed(func, args, dict(kwargs))
        return func(*args, **kwargs)

    # --- devices ---------------------------------------------------------------------------------------------------------

    def _device(self, tensor: torch.Tensor) -> torch.device:
        if not tensor.is_meta:
            return tensor.device
        place = self.memory.place_of(tensor)
        return self.cuda if place == CUDA else self.cpu if place == CPU else _META

    def place_named(self, device: Any) -> str:
        """cuda, cpu or meta, of what PyTorch takes for a device. Raises RuntimeError for a GPU that is not there."""
        found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
        if found.type == "cuda" and found.index not in (None, self.cuda.index):
            raise RuntimeError(f"CUDA error: invalid device ordinal {found.index}: one GPU is simulated")
        return found.type

    def _factory(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        place = CPU if device is None else self.place_named(device)
        if place != CPU:
            return self._placed(func, args, kwargs)
        pinned = kwargs.pop("pin_memory", False)
        if func in (torch.scalar_tensor, torch.empty_strided, torch.arange, torch.randperm) or "out" in kwargs:
            return func(*args, **kwargs)
        return self._on_host(func, args, kwargs, pinned)

    def _on_host(self, func: Any, args: Any, kwargs: dict[str, Any], pinned: bool = False) -> Any:
        """Real below LARGE_BYTES, else without bytes."""
        with self.memory.putting(META):  # it is asked for its size and stands for nothing
            probe = func(*args, **{k: v for k, v in kwargs.items() if k != "generator"} | {"device": _META})
        if probe.untyped_storage().nbytes() >= LARGE_BYTES:
            with self.memory.putting(CPU, pinned):
                return func(*args, **kwargs | {"device": _META})
        result = func(*args, **kwargs)
        if pinned:
            self.memory.pin_real(result)
        return result

    def _placed(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """With the device that is meant, where the storages of the result are put."""
        place = self.place_named(kwargs["device"])
        if place not in (CUDA, META, CPU):
            return func(*args, **kwargs)
        kwargs.pop("pin_memory", None)
        if place == CPU:
            return self._on_host(func, args, kwargs)
        with self.memory.putting(place):
            return func(*args, **kwargs | {"device": _META})

    def _from_data(self, func: Any) -> Callable[..., Any]:
        def made(*args: Any, **kwargs: Any) -> Any:
            device = kwargs.pop("device", None)
            if args and isinstance(args[0], torch.Tensor):
                if func is torch.tensor:
                    args = (args[0].detach().clone(), *args[1:])
                dtype = kwargs.get("dtype") or args[0].dtype
                place = self._place(args[0]) if device is None else self.place_named(device)
                return self.moved(args[0], place, dtype)
            parts = args[0] if args else kwargs.get("data")
            if isinstance(parts, (list, tuple)) and any(t.is_meta for t in tensors_in(parts)):
                args = (self._plain(parts), *args[1:])
            value = func(*args, **kwargs)
            return value if device is None else self.moved(value, self.place_named(device), value.dtype)

        return made

    def _plain(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.real(value).tolist()
        return [self._plain(part) for part in value] if isinstance(value, (list, tuple)) else value

    def _new_tensor(self, tensor: torch.Tensor, data: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("dtype", tensor.dtype)
        kwargs.setdefault("device", self._device(tensor))
        return self._handlers[torch.tensor](data, **kwargs)

    # --- transfers -------------------------------------------------------------------------------------------------------

    def _to(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], torch.dtype):
            return T.to(tensor, args[0])
        copy = kwargs.pop("copy", False)
        other = args[0] if args else kwargs.get("other")
        if isinstance(other, torch.Tensor):
            rest = dict(zip(("non_blocking", "copy"), args[1:], strict=False)) | kwargs
            args, kwargs = (self._device(other), other.dtype), {"non_blocking": rest.get("non_blocking", False)}
        if len(args) > 3 or (len(args) > 2 and isinstance(args[0], torch.dtype)):
            args, copy = args[:-1], args[-1]
        args = tuple(torch.device("cuda", a) if type(a) is int else a for a in args)
        if type(kwargs.get("device")) is int:
            kwargs["device"] = torch.device("cuda", kwargs["device"])
        device, dtype, waits_not, layout = torch._C._nn._parse_to(*args, **kwargs)
        place = self._place(tensor) if device is None else self.place_named(device)
        options = {"copy": copy, "memory_format": layout, "non_blocking": waits_not}
        return self.moved(tensor, place, dtype or tensor.dtype, **options)

    def moved(
        self,
        tensor: torch.Tensor,
        place: str,
        dtype: torch.dtype,
        *,
        copy: bool = False,
        memory_format: Any = None,
        non_blocking: bool = False,
    ) -> Any:
        """As Tensor.to: the same object where there is nothing to do."""
        layout = torch.preserve_format if memory_format is None else memory_format
        of = self._place(tensor)
        if of == place and dtype == tensor.dtype and not copy and layout is torch.preserve_format:
            return tensor
        if of == place or place not in (CUDA, CPU, META) or of not in (CUDA, CPU, META):
            return T.to(tensor, dtype, copy=copy, memory_format=layout)
        if of == META:
            raise NotImplementedError("Cannot copy out of meta tensor; no data! (simulated)")
        if place == CPU:
            return self._to_host(tensor, dtype, layout)
        with self.memory.putting(place):
            moved = torch.empty_like(tensor, dtype=dtype, device=_META, memory_format=layout, requires_grad=False)
        if place == CUDA:
            with torch.no_grad():
                moved.copy_(tensor, non_blocking=non_blocking)
        return moved

    def _to_host(self, tensor: torch.Tensor, dtype: torch.dtype, layout: Any) -> torch.Tensor:
        """Real where the values are known, which they are of small tensors only."""
        self.memory.synchronize()
        value = self.memory.values.of(tensor)
        if value is not None:
            moved: torch.Tensor = T.to(value.detach(), dtype, copy=True, memory_format=layout)
            return moved
        with self.memory.putting(CPU):
            moved = torch.empty_like(tensor, dtype=dtype, device=_META, memory_format=layout, requires_grad=False)
        with torch.no_grad():
            moved.copy_(tensor)
        return moved

    def real(self, tensor: torch.Tensor) -> torch.Tensor:
        """On the CPU with values; zeros, said so in the gaps, where they are not known."""
        if not tensor.is_meta:
            return tensor
        value = self.memory.values.of(tensor)
        if value is None or self.memory.values.assumed(tensor):
            self.memory.assume("values read by the host")
        if value is not None:
            return value
        return torch.zeros(tensor.shape, dtype=tensor.dtype)

    def _numpy(self, tensor: torch.Tensor, *, force: bool = False) -> Any:
        if self._place(tensor) == CUDA and not force:
            raise TypeError(
                "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
            )
        if not tensor.is_meta:
            return tensor.numpy(force=force)
        if self.memory.values.of(tensor) is None:  # no page of it is touched
            self.memory.assume("Tensor.numpy")
            dtype = torch.empty(0, dtype=tensor.dtype).numpy().dtype
            return np.zeros(tuple(tensor.shape), dtype)
        return self.real(tensor).numpy(force=force)

    def _array(self, tensor: torch.Tensor, dtype: Any = None, **_: Any) -> Any:
        found = self._numpy(tensor)
        return found if dtype is None else found.astype(dtype, copy=False)

    def _type(self, tensor: torch.Tensor, dtype: Any = None, non_blocking: bool = False, **_: Any) -> Any:
        if isinstance(dtype, torch.dtype):
            return self.moved(tensor, self._place(tensor), dtype)
        if dtype is None:
            name = tensor.new_empty(0, device="cpu").type() if tensor.is_meta else tensor.type()
            return name.replace("torch.", "torch.cuda.") if self._place(tensor) == CUDA else name
        name = dtype if isinstance(dtype, str) else f"{dtype.__module__}.{dtype.__name__}"
        place = CUDA if ".cuda." in name else CPU
        kind = torch.empty(0).type(name.replace(".cuda", "")).dtype
        return self.moved(tensor, place, kind)

    def _set_data(self, tensor: torch.Tensor, value: torch.Tensor) -> None:
        """Between real and meta tensors PyTorch refuses: there the insides are swapped, and the object stays the same."""
        if tensor.is_meta == value.is_meta:
            T.data.__set__(tensor, value)
            return
        new = value.detach()
        new.requires_grad_(tensor.requires_grad)
        torch._C._swap_tensor_impl(tensor, new)

    def _data_ptr(self, tensor: torch.Tensor) -> int:
        """Different for different memory, which is all that code without kernels of its own makes of it."""
        if not tensor.is_meta:
            return int(tensor.data_ptr())
        return int(tensor.untyped_storage()._cdata * 64 + tensor.storage_offset() * tensor.itemsize)

    def _pin(self, tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
        if self.memory.pinned(tensor):
            return tensor
        if not tensor.is_meta:
            pinned = tensor.clone()
            self.memory.pin_real(pinned)
            return pinned
        with self.memory.putting(CPU, True):
            return torch.empty_like(tensor)

    def _repr(self, tensor: torch.Tensor, **kwargs: Any) -> str:
        if not tensor.is_meta or self._place(tensor) == META:
            return str(T.__repr__(tensor, **kwargs))
        device = "" if self._place(tensor) == CPU else ", device='cuda:0'"
        value = self.memory.values.of(tensor)
        if value is not None and value.numel() < 1000:
            return str(T.__repr__(value))[:-1] + f"{device})"
        return f"tensor(..., size={tuple(tensor.shape)}, dtype={tensor.dtype}{device})"

    def _reduce(self, tensor: torch.Tensor, protocol: int) -> Any:
        return T.__reduce_ex__(self.real(tensor) if tensor.is_meta else tensor, protocol)


def _numbered(*args: Any, **kwargs: Any) -> torch.device:
    """torch.device, of which a number alone means a GPU."""
    return torch.device("cuda", args[0]) if args and type(args[0]) is int else torch.device(*args, **kwargs)
