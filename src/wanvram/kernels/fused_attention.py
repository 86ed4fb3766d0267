"""The functions behind kernels.attention_backends: each calls one kernel and allocates what the registry says, nothing else.

q [Lq,H,D], k and v [Lk,H,D] on CUDA (`reference`: anywhere), D a multiple of 8, not causal, scaled by D^-0.5. Each returns
[Lq,H,D] and, where sums are wanted, the natural logarithm of every row's sum of exponentials, float32 [H,Lq]: what it takes to join
attention over parts of the keys.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from importlib import import_module, metadata
from importlib.util import find_spec, module_from_spec
from typing import Any
from warnings import catch_warnings, filterwarnings, simplefilter

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from wanvram.errors import InputError
from wanvram.foreign_text import shown
from wanvram.kernels.attention_backends import FA4, Backend

__all__ = [
    "Attended",
    "cudnn",
    "efficient",
    "fa4",
    "flash",
    "heads_first",
    "reference",
    "rows_first",
    "usable",
    "why_broken",
]

Attended = tuple[Tensor, Tensor | None]

_QUACK, _QUACK_KNOWN = "quack", "0.6."
_CUDNN = torch.ops.aten._scaled_dot_product_cudnn_attention.default
_FLASH = torch.ops.aten._scaled_dot_product_flash_attention.default
_EFFICIENT = torch.ops.aten._scaled_dot_product_efficient_attention.default


def cudnn(q: Tensor, k: Tensor, v: Tensor, sums: bool = False) -> Attended:
    out, lse = _CUDNN(heads_first(q), heads_first(k), heads_first(v), None, sums)[:2]
    return rows_first(out), lse[0].flatten(1) if sums else None


def flash(q: Tensor, k: Tensor, v: Tensor, sums: bool = False) -> Attended:
    """PyTorch's FlashAttention-2, which makes the sums either way."""
    out, lse = _FLASH(heads_first(q), heads_first(k), heads_first(v))[:2]
    return rows_first(out), lse[0] if sums else None


def efficient(q: Tensor, k: Tensor, v: Tensor, sums: bool = False) -> Attended:
    """PyTorch's memory-efficient attention; its sums are padded to multiples of 32 rows."""
    out, lse = _EFFICIENT(heads_first(q), heads_first(k), heads_first(v), None, sums)[:2]
    return rows_first(out), lse[0, :, : q.shape[0]] if sums else None


def fa4(q: Tensor, k: Tensor, v: Tensor, sums: bool = False) -> Attended:
    """FlashAttention-4. Raises InputError where its package cannot be imported."""
    found = _flash_attn_4()(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), return_lse=sums)
    out, lse = found if isinstance(found, tuple) else (found, None)
    return out[0], lse[0] if sums and lse is not None else None


def reference(q: Tensor, k: Tensor, v: Tensor, sums: bool = False) -> Attended:
    """In float32 with the whole matrix of scores; [Lq,H,D] in q's dtype."""
    qf, kf, vf = (t.transpose(0, 1).float() for t in (q, k, v))
    scores = qf @ kf.transpose(1, 2) * q.shape[2] ** -0.5
    out = (scores.softmax(-1) @ vf).transpose(0, 1).to(q.dtype).contiguous()
    return out, scores.logsumexp(-1) if sums else None


def usable(backend: Backend, like: Tensor) -> bool:
    """Whether it computes numbers and heads such as `like` [Lq,H,D] here, without computing. InputError: its package is broken."""
    if backend.sdp_choice is None:
        return backend.version() is not None and _flash_attn_4() is not None
    choose: Any = getattr(torch, "_fused_sdp_choice", None)
    if choose is None:
        return True
    heads = heads_first(like)
    try:
        with sdpa_kernel([SDPBackend(backend.sdp_choice)]), catch_warnings():
            simplefilter("ignore")  # one for each reason
            return int(choose(heads, heads, heads)) == backend.sdp_choice
    except RuntimeError:  # no backend is left
        return False


def why_broken(backend: Backend) -> str | None:
    """Why its package, which is installed, cannot be imported (1 s where it can); None where it can, or none is needed."""
    found = _imported() if backend.package is not None and backend.version() is not None else None
    return f"{backend.package} cannot be imported ({shown(found, 200)})" if isinstance(found, Exception) else None


def _flash_attn_4() -> Callable[..., Any]:
    found = _imported()
    if isinstance(found, Exception):
        raise InputError(
            f"{FA4} needs the package flash-attn-4, which cannot be imported here ({shown(found, 200)}); "
            "pip install 'wanvram[fa4]', or use auto"
        ) from found
    return found


@cache
def _imported() -> Callable[..., Any] | Exception:
    """flash-attn-4's function, or why there is none: a plan asks many times."""
    # Read when the package is imported: compiled kernels are then kept on disk, 3 s of every later process.
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    try:
        with catch_warnings():  # of what its compiler will no longer have: nothing that a user of ours could mend
            simplefilter("ignore")
            found: Callable[..., Any] = _without_other_kernels() or import_module("flash_attn.cute").flash_attn_func
    except Exception as error:  # of its compiler, too
        return error
    filterwarnings("ignore", module=r"cutlass(\.|$)")  # when it compiles a kernel
    return found


def _without_other_kernels() -> Callable[..., Any] | None:
    """flash-attn-4's function; None where it has to be imported as usual.

    It takes a few modules of quack, whose own `__init__` imports its norms besides and with them PyTorch's compiler: 3.4 of 4.0 s
    (H200's machine). Of what that `__init__` does only `quack.dsl` matters to attention, which asks for `quack.rounding` when it
    compiles (0.6.5). A later `import quack` executes it.
    """
    if _QUACK in sys.modules or "CUTE_DSL_PTXAS_PATH" in os.environ:  # which it heeds, too
        return None
    try:
        spec, version = find_spec(_QUACK), metadata.version("quack-kernels")
        if spec is None or not (version or "").startswith(_QUACK_KNOWN):
            return None
        sys.modules[_QUACK] = module_from_spec(spec)
        for part in ("dsl", "rounding"):
            import_module(f"{_QUACK}.{part}")
        found: Callable[..., Any] = import_module("flash_attn.cute").flash_attn_func
        return found
    except Exception:  # whatever it is, importing as usual says it
        return None
    finally:
        sys.modules.pop(_QUACK, None)


def heads_first(x: Tensor) -> Tensor:
    """View [L,H,D] as [1,H,L,D]."""
    return x.transpose(0, 1).unsqueeze(0)


def rows_first(out: Tensor) -> Tensor:
    """[1,H,L,D] -> contiguous [L,H,D], which is how PyTorch's kernels lay it out: no copy."""
    return out.squeeze(0).transpose(0, 1).contiguous()
