"""Components of a diffusers pipeline from their configurations: classes of the installed diffusers and transformers, nothing else.

Weights are not read: parameters are made as from_pretrained makes them. A class is only ever looked up in these two packages, and
what a configuration says of other code (attention kernels of a hub, auto_map) is left out.
"""

from __future__ import annotations

import json
import os
import pkgutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from wanvram.errors import InputError, WanvramError
from wanvram.foreign.pipeline_folder import MAX_JSON_BYTES, PipelinePart, read_json
from wanvram.foreign_text import quoted, shown
from wanvram.input_files import read_text
from wanvram.weights.tokenizer import LIMITED, what_is_wrong

__all__ = ["DTYPES", "built_component", "diffusers_class", "offline"]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
MAX_MODULES = 20_000  # of one component; a 14B transformer has 1,500, and 20,000 take 18 s to make
MAX_NUMBER = 100_000_000  # of a configuration; vocabularies and positions have up to 10^7
MAX_TOKENIZER_BYTES = 64 << 20  # of one file; UMT5's has 16 MiB
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
_ELSEWHERE = {
    *("auto_map", "attn_implementation", "experts_implementation"),
    *("dtype", "torch_dtype", "transformers_version"),
}

_TRIAL = f"""{LIMITED}
import transformers
kind = getattr(transformers, given[0])
limited()
def encoder():
    tokenizer = kind.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    return lambda sample: tokenizer(sample).input_ids
tried(encoder)
"""


@contextmanager
def offline() -> Iterator[None]:
    """Nothing is fetched: a configuration may name what only a hub has."""
    before = os.environ.get("HF_HUB_OFFLINE")
    os.environ["HF_HUB_OFFLINE"] = "1"
    try:
        yield
    finally:
        os.environ.pop("HF_HUB_OFFLINE")
        if before is not None:
            os.environ["HF_HUB_OFFLINE"] = before


def diffusers_class(library: str, kind: str, what: str) -> Any:
    """The class of an installed package. library: diffusers, transformers, or a package of diffusers.pipelines.

    Raises InputError that says `what` cannot be built.
    """
    packages = {"diffusers", "transformers"}
    for package in packages:
        if find_spec(package) is None:
            raise InputError(f"--diffusers needs {package}, which is not installed: pip install diffusers transformers")
    if library in packages:
        module = import_module(library)
    else:
        pipelines = import_module("diffusers.pipelines")
        if library not in {found.name for found in pkgutil.iter_modules(pipelines.__path__) if found.ispkg}:
            raise InputError(f"{what}: {library} is neither diffusers nor transformers; other code is not imported")
        module = import_module(f"diffusers.pipelines.{library}")
    found = getattr(module, kind, None)
    if not isinstance(found, type) or found.__module__.partition(".")[0] not in packages:
        version = getattr(import_module(library if library in packages else "diffusers"), "__version__", "?")
        raise InputError(f"{what}: {library} {version}, which is installed here, has no class {kind}")
    return found


def built_component(component: PipelinePart, dtype: torch.dtype) -> Any:
    """On the host, in eval mode. Raises InputError that names the component and says why it cannot be built."""
    kind = diffusers_class(component.library, component.kind, f"component {component}")
    try:
        with _bounded():
            return _built(component, kind, dtype)
    except WanvramError:
        raise
    except Exception as error:
        said = shown(str(error).strip().partition("\n")[0] or type(error).__name__, 200)
        raise InputError(f"component {component} cannot be built from {shown(component.folder)}: {said}") from error


def _built(component: PipelinePart, kind: Any, dtype: torch.dtype) -> Any:
    folder = component.folder
    diffusers, transformers = import_module("diffusers"), import_module("transformers")
    if issubclass(kind, diffusers.ModelMixin):
        return _in_dtype(lambda: kind.from_config(_config(folder / "config.json")), kind, dtype)
    if issubclass(kind, transformers.PreTrainedModel):
        config = kind.config_class.from_dict(_plain(_config(folder / "config.json")))
        return _in_dtype(lambda: kind(config), kind, dtype)
    if issubclass(kind, diffusers.SchedulerMixin):
        return kind.from_config(_config(folder / "scheduler_config.json"))
    if issubclass(kind, transformers.PreTrainedTokenizerBase):
        return _tokenizer(folder, kind)
    if issubclass(kind, (transformers.ImageProcessingMixin, transformers.FeatureExtractionMixin)):
        return kind.from_dict(_plain(_config(folder / "preprocessor_config.json")))
    raise InputError(f"component {component}: {kind.__name__} is no model, scheduler, tokenizer or image processor")


def _in_dtype(make: Any, kind: Any, dtype: torch.dtype) -> Any:
    """As from_pretrained(torch_dtype=...): made in that type, but for what the class keeps in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = make().eval()
    finally:
        torch.set_default_dtype(before)
    kept = set(getattr(kind, "_keep_in_fp32_modules", None) or ())
    if kind.__module__.startswith("transformers."):  # there for float16 only, but for those that are strict
        strict = set(getattr(kind, "_keep_in_fp32_modules_strict", None) or ())
        kept = kept | strict if dtype == torch.float16 else strict
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point() and dtype != torch.float32 and kept & set(name.split(".")):
            parameter.data = parameter.data.float()
    return model


# --- configurations ----------------------------------------------------------------------------------------------------------


def _config(path: Path) -> dict[str, Any]:
    content = read_json(path)
    _check(content, path)
    return content


def _check(value: Any, path: Path) -> None:
    """Raises InputError for quantized weights and for numbers that no configuration has."""
    if isinstance(value, dict):
        if value.get("quantization_config") is not None:
            raise InputError(f"{shown(path)} has a quantization_config: quantized weights are not simulated")
        for part in value.values():
            _check(part, path)
    elif isinstance(value, list):
        for part in value:
            _check(part, path)
    elif isinstance(value, int) and abs(value) > MAX_NUMBER:
        raise InputError(f"{shown(path)}: {quoted(value)} is too large for a configuration")


def _plain(value: Any) -> Any:
    """Of transformers' configurations what describes the model, without what names other code."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if k not in _ELSEWHERE and not k.startswith("_")}
    return [_plain(part) for part in value] if isinstance(value, list) else value


@contextmanager
def _bounded() -> Iterator[None]:
    """No component has more modules than any real one: a number of layers may be anything."""
    count = 0

    def registered(*_: Any) -> None:
        nonlocal count
        count += 1
        if count > MAX_MODULES:
            raise InputError(f"a component's configuration asks for over {MAX_MODULES:,} modules")

    handle = torch.nn.modules.module.register_module_module_registration_hook(registered)
    try:
        yield
    finally:
        handle.remove()


# --- tokenizers --------------------------------------------------------------------------------------------------------------


def _tokenizer(folder: Path, kind: Any) -> Any:
    """The real one where its files are there and do no harm to a child, else one that gives as many tokens as are asked for."""
    files = [folder / name for name in _TOKENIZER_FILES if (folder / name).is_file()]
    for file in files:
        if file.stat().st_size > MAX_TOKENIZER_BYTES:
            raise InputError(f"{shown(file)} has over {MAX_TOKENIZER_BYTES >> 20} MiB, too many for a tokenizer")
    if files:
        state = tuple((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in sorted(folder.iterdir()))
        problem = what_is_wrong(_TRIAL, folder, state, given=(kind.__name__,))
        if problem:
            raise InputError(f"the tokenizer in {shown(folder)} is damaged: {problem}")
        return kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    clip = 77 if kind.__name__.startswith("CLIP") else 512
    return StandInTokenizer(_max_length(folder / "tokenizer_config.json") or clip)


def _max_length(path: Path) -> int | None:
    """None where it is not said, or said to have no end, as T5's is."""
    if not path.is_file():
        return None
    try:
        content = json.loads(read_text(path, MAX_JSON_BYTES), parse_int=lambda text: int(text[:20]))
        length = content.get("model_max_length")
    except (ValueError, RecursionError, AttributeError) as error:
        raise InputError(f"{shown(path)} is no readable JSON") from error
    return length if type(length) is int and 0 < length <= 100_000 else None


class StandInTokenizer:
    """As many ids as the pipeline asks for, else model_max_length, whatever the text: no vocabulary is needed."""

    def __init__(self, model_max_length: int) -> None:
        self.model_max_length = model_max_length
        self.added_tokens_encoder: dict[str, int] = {}
        self.pad_token_id = self.eos_token_id = self.bos_token_id = 0
        self.pad_token = self.eos_token = self.bos_token = ""
        self.padding_side = "right"

    def __call__(self, text: Any, max_length: int | None = None, **_: Any) -> Any:
        count = 1 if isinstance(text, str) else len(text)
        ids = torch.ones(count, max_length or self.model_max_length, dtype=torch.long)
        encoding = import_module("transformers").BatchEncoding
        return encoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def batch_decode(self, ids: Any, **_: Any) -> list[str]:
        return [""] * len(ids)

    def tokenize(self, text: str, **_: Any) -> list[str]:
        return []
