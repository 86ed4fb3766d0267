"""`torch.autocast("cuda")`: which operations compute in the lower precision, which in float32. As in PyTorch's autocast_mode.h."""

from __future__ import annotations

from typing import Any

import torch

__all__ = ["CastLists"]

_LOWER = (
    *("convolution", "prelu", "addmm", "addmv", "addr", "mm", "mv", "linear", "addbmm", "baddbmm", "bmm", "matmul"),
    *("scaled_dot_product_attention", "_thnn_fused_lstm_cell", "linalg_vecdot"),
)
_FLOAT32 = (
    *("acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh"),
    *("tan", "pow", "softplus", "native_layer_norm", "native_group_norm", "norm", "linalg_vector_norm"),
    *("_softmax", "_log_softmax", "softmax", "cumprod", "cumsum", "dist", "_pdist_forward", "_cdist_forward"),
    *("renorm", "logsumexp", "prod", "sum"),
    *("nll_loss_forward", "mse_loss", "smooth_l1_loss", "huber_loss", "upsample_nearest1d", "upsample_nearest2d"),
    *("upsample_nearest3d", "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d", "upsample_bicubic2d"),
    *("_upsample_nearest_exact1d", "_upsample_nearest_exact2d", "_upsample_nearest_exact3d"),
    *("_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"),
)


_SET_ENABLED = torch.set_autocast_enabled


class CastLists:
    """Casts the arguments of an operation while the program's autocast is on; a leaf's cast is kept until it ends."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.enabled = False  # PyTorch's own answer is no below the autocast key, where operations arrive
        self._kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._names = dict.fromkeys(_LOWER, True) | dict.fromkeys(_FLOAT32, False)

    def set_enabled(self, *arguments: Any) -> None:
        """torch.set_autocast_enabled of ("cuda", on) or, as it was called before, of (on)."""
        if arguments[:-1] in ((), ("cuda",)):
            self.enabled = bool(arguments[-1])
        _SET_ENABLED(*arguments)

    def clear(self) -> None:
        self._kept.clear()

    def __call__(self, name: str, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """The arguments as they are computed with; None where autocast changes nothing."""
        if not self.enabled:
            return None
        lower = self._names.get(name.split(".")[1])
        if lower is None or name.endswith(".out"):
            return None
        dtype = torch.get_autocast_dtype("cuda") if lower else torch.float32
        self.enabled = False
        try:
            with self.memory:
                # The last first, as the compiler of PyTorch's wheels orders them (an H200's reserved memory agrees).
                cast = [self._cast(value, dtype) for value in reversed(args)][::-1]
                named = {key: self._cast(value, dtype) for key, value in kwargs.items()}
        finally:
            self.enabled = True
        return tuple(cast), named

    def _cast(self, value: Any, dtype: torch.dtype) -> Any:
        if isinstance(value, (list, tuple)) and any(isinstance(part, torch.Tensor) for part in value):
            return [self._cast(part, dtype) for part in value]
        if not isinstance(value, torch.Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if value.dtype == torch.float64 or (not value.is_meta and not value.dim()):
            return value
        keeps = value.dtype == torch.float32 and value.requires_grad and value.is_leaf and not value._is_view()
        if not (keeps and dtype != torch.float32 and torch.is_autocast_cache_enabled()):
            return value.to(dtype)
        kept = self._kept.get(id(value))
        if kept is None:
            kept = self._kept[id(value)] = (value, value.to(dtype))
        return kept[1]
