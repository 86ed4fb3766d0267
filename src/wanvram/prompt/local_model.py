"""Prompt extension by a local Qwen2.5 or Qwen2.5-VL model through transformers, an optional dependency.

On the simulated device the same model is built on `meta` from its configuration, and one answer of the greatest length is
played through: weights, prefill and the growing key-value cache are booked, nothing is computed.
"""

from __future__ import annotations

import gc
import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from wanvram.engine.devices import Device
from wanvram.errors import CheckpointError, InputError
from wanvram.kernels.scaled_attention import attention
from wanvram.prompt.instructions import checked_answer, system_prompt, without_controls
from wanvram.weights.sources import SafetensorsSource, check_file

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["OFFICIAL_MODELS", "LocalExtender", "check_extender", "default_model", "load_extender"]

# The short names of the official script (wan/utils/prompt_extend.py).
OFFICIAL_MODELS = {
    "Qwen2.5_3B": "Qwen/Qwen2.5-3B-Instruct",
    "Qwen2.5_7B": "Qwen/Qwen2.5-7B-Instruct",
    "Qwen2.5_14B": "Qwen/Qwen2.5-14B-Instruct",
    "QwenVL2.5_3B": "Qwen/Qwen2.5-VL-3B-Instruct",
    "QwenVL2.5_7B": "Qwen/Qwen2.5-VL-7B-Instruct",
}
MAX_NEW_TOKENS = 512
PICTURE_PIXELS = (256 * 28 * 28, 1280 * 28 * 28)  # official limits: 256 to 1280 tokens of 28 x 28 pixels a picture
SIMULATED_PROMPT_TOKENS = 512
SIMULATED_STEPS = 4
TOKENS_PER_CHARACTER = {"zh": 0.7, "en": 0.25}  # of Qwen2.5's vocabulary, rounded up
VISION_TYPE = "qwen2_5_vl"
IMAGE_TOKEN = "<|image_pad|>"
IMAGE_PLACE = "<|vision_start|><|image_pad|><|vision_end|>"


def _text(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, vocab: int) -> dict[str, Any]:
    """What decides the memory of a language model, with the names of its published config.json."""
    return {
        "model_type": "qwen2",
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocab,
        "tie_word_embeddings": hidden == 2048,  # only the 3B models share input and output embedding
        "max_position_embeddings": 32768,
    }


def _vision(text: dict[str, Any]) -> dict[str, Any]:
    """The text model's numbers with the vision tower that both Qwen2.5-VL models have."""
    tower: dict[str, Any] = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    tower |= {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
    tower |= {"model_type": VISION_TYPE, "out_hidden_size": text["hidden_size"]}
    return text | {"model_type": VISION_TYPE, "vision_config": tower}


_3B = _text(2048, 11008, 36, 16, 2, 151936)
_7B = _text(3584, 18944, 28, 28, 4, 152064)
_14B = _text(5120, 13824, 48, 40, 8, 152064)
_PUBLISHED = dict(zip(OFFICIAL_MODELS.values(), (_3B, _7B, _14B, _vision(_3B), _vision(_7B)), strict=True))


def default_model(*, vision: bool) -> str:
    """The official script's choice of local model."""
    return "QwenVL2.5_7B" if vision else "Qwen2.5_14B"


def check_extender(model: str, *, simulated: bool) -> None:
    """InputError, before anything is loaded, without transformers or the model's files."""
    _transformers()
    _locate(model, simulated=simulated)


def load_extender(model: str, device: Device, *, vision: bool) -> LocalExtender:
    """The model in bfloat16 (float32 on the CPU) with its weights on `device`.

    `model` is a directory, a short official name or a Hugging Face name; a name must be in the local Hugging Face cache, nothing is
    ever downloaded. The simulated device needs no files for the official names. Host memory holds the model once while it loads.
    Raises InputError without transformers or the model, CheckpointError for files that are damaged or not Qwen2.5's.
    """
    transformers = _transformers()
    where = _locate(model, simulated=device.kind == "simulated")
    with _quiet(transformers):
        config = _config(transformers, where, vision=vision)
        if device.kind == "simulated":
            with device.building(), torch.device("meta"):
                module = _auto_class(transformers, config).from_config(config, dtype=torch.bfloat16)
            _place(module, device)
            device.generated_weights()
            return LocalExtender(module, device, _Simulation(transformers, module, device))
        assert isinstance(where, Path)
        module = _read_weights(transformers, where, config, device)
        _place(module, device)
        return LocalExtender(module, device, _Generation(transformers, module, device, where, vision=vision))


class LocalExtender:
    """A loaded model; call `extend`, then `release`. `parameters` counts shared weights once."""

    def __init__(self, module: Any, device: Device, answer: Callable[..., str]) -> None:
        self.parameters: int = sum(p.numel() for p in module.parameters())
        self._answer: Callable[..., str] | None = answer

    def extend(self, prompt: str, *, target_lang: str, seed: int, pictures: Sequence[Path | Image.Image] = ()) -> str:
        """The rewritten prompt, the same for the same seed; on the simulated device `prompt` itself.

        `pictures` are files or PIL images: the first frame, or the first and the last. Raises InputError for a bad language, an
        unreadable picture or pictures without a vision model, WanvramError if the model answers nothing.
        """
        if self._answer is None:
            raise AssertionError("extend after release")
        system = system_prompt(target_lang, len(pictures))
        return self._answer(prompt, system, target_lang, seed, [_picture(p) for p in pictures])

    def release(self) -> None:
        """Drops the weights; modules refer to each other, so only the collector frees them."""
        self._answer = None
        gc.collect()


def _picture(picture: Path | Image.Image) -> Image.Image:
    if not isinstance(picture, Path):
        return picture
    from PIL import Image, ImageOps

    try:
        with Image.open(picture) as file:
            return ImageOps.exif_transpose(file).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{picture} cannot be read as a picture ({type(error).__name__})") from error


# --- files -----------------------------------------------------------------------------------------------------------


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise InputError(
            "prompt extension with a local model needs transformers: pip install 'wanvram[prompt]'; "
            "or use --prompt_extend_method dashscope"
        ) from error
    return transformers


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the library's progress bars and advice, which would mix with this program's own progress."""
    logging = transformers.utils.logging
    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _locate(model: str, *, simulated: bool) -> Path | dict[str, Any]:
    """The model's directory; for an official name that is not here, on the simulated device, its published numbers."""
    if model and Path(model).is_dir():
        return Path(model)
    name = OFFICIAL_MODELS.get(model, model)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise InputError(f"prompt_extend_model {model} is no directory; names are {', '.join(OFFICIAL_MODELS)}")
    cached = _cached(name)
    if cached is not None:
        return cached
    if simulated and name in _PUBLISHED:
        return dict(_PUBLISHED[name])
    raise InputError(
        f"{name} is not in the Hugging Face cache, and nothing is downloaded by itself: "
        f"run `hf download {name}`, or give the directory that holds it"
    )


def _cached(name: str) -> Path | None:
    """Newest snapshot of a model in the Hugging Face cache (transformers brings huggingface_hub)."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, local_files_only=True))
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _config(transformers: Any, where: Path | dict[str, Any], *, vision: bool) -> Any:
    """Configuration of a Qwen2.5 model, with PyTorch's fused attention chosen."""
    if isinstance(where, dict):
        config = transformers.AutoConfig.for_model(**where)
    else:
        check_file(where / "config.json", "the configuration of a Qwen2.5 model")
        with _checked(where):
            config = transformers.AutoConfig.from_pretrained(where, local_files_only=True, trust_remote_code=False)
    kind = getattr(config, "model_type", "")
    if kind not in ("qwen2", VISION_TYPE):
        raise CheckpointError(f"{where} holds a model of type {kind!r}; prompt extension takes Qwen2.5 and Qwen2.5-VL")
    if vision and kind != VISION_TYPE:
        raise InputError(f"{where} cannot see pictures; image tasks need a Qwen2.5-VL model such as QwenVL2.5_7B")
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{where} is quantised, which prompt extension does not load; take the bfloat16 model")
    config._attn_implementation = "sdpa"
    return config


def _auto_class(transformers: Any, config: Any) -> Any:
    vision = config.model_type == VISION_TYPE
    return transformers.AutoModelForImageTextToText if vision else transformers.AutoModelForCausalLM


def _read_weights(transformers: Any, where: Path, config: Any, device: Device) -> Any:
    """The model in host memory, from safetensors only: other formats can run code when they are read."""
    index = where / "model.safetensors.index.json"
    # Headers are checked here, with sentences of our own.
    SafetensorsSource.from_index(index) if index.exists() else SafetensorsSource([where / "model.safetensors"])
    with _checked(where):
        module, report = _auto_class(transformers, config).from_pretrained(
            where,
            config=config,
            dtype=torch.float32 if device.kind == "cpu" else torch.bfloat16,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    missing = sorted(report["missing_keys"])
    if missing:
        raise CheckpointError(f"{where} lacks {len(missing)} of the model's tensors, first {missing[0]}")
    return module.eval()


@contextmanager
def _checked(where: Path) -> Iterator[None]:
    """transformers reports damaged files by several classes, some with advice of many lines."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, ImportError) as error:
        first = next(iter(str(error).splitlines()), type(error).__name__)[:300]
        raise CheckpointError(f"{where} cannot be loaded as a Qwen2.5 model: {first}") from error


def _place(module: Any, device: Device) -> None:
    """Moves every parameter and buffer to the device, one at a time; shared ones stay shared."""
    for tensor in [*module.parameters(), *module.buffers()]:
        tensor.data = device.upload(tensor.data)
    module.requires_grad_(False)


# --- generation ------------------------------------------------------------------------------------------------------


class _Generation:
    """Answers with real tensors, sampling as the model's own generation_config.json says."""

    def __init__(self, transformers: Any, module: Any, device: Device, where: Path, *, vision: bool) -> None:
        self._module = module
        self._device = device
        self._transformers = transformers
        with _checked(where):
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(
                where, local_files_only=True, trust_remote_code=False
            )
            self._images = None
            if vision:
                size = {"shortest_edge": PICTURE_PIXELS[0], "longest_edge": PICTURE_PIXELS[1]}
                self._images = transformers.AutoImageProcessor.from_pretrained(
                    where, size=size, local_files_only=True, trust_remote_code=False
                )
        if self._tokenizer.chat_template is None:
            raise CheckpointError(f"{where} has no chat template; prompt extension needs an Instruct model")

    def __call__(self, prompt: str, system: str, target_lang: str, seed: int, pictures: list[Image.Image]) -> str:
        inputs = self._inputs(prompt, system, pictures)
        length = inputs["input_ids"].shape[1]
        limit = self._module.config.get_text_config().max_position_embeddings
        if length + MAX_NEW_TOKENS > limit:
            raise InputError(
                f"the prompt to extend has {length:,} tokens with its instruction; the model takes {limit - MAX_NEW_TOKENS:,}"
            )
        inputs = {name: self._device.upload(tensor) for name, tensor in inputs.items()}
        index = self._device.torch_device.index or 0
        with torch.random.fork_rng([index] if self._device.kind == "cuda" else []), _quiet(self._transformers):
            torch.manual_seed(seed % 2**63)
            output = self._module.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)
        new = self._device.download(output)[0, length:].tolist()
        answer = without_controls(str(self._tokenizer.decode(new, skip_special_tokens=True)))
        return checked_answer(answer, "the local model (another seed gives another)")

    def _inputs(self, prompt: str, system: str, pictures: list[Image.Image]) -> dict[str, torch.Tensor]:
        """input_ids, attention_mask [1, L]; with pictures also their patches and grids, and where they are among the tokens."""
        if not pictures:
            return self._tokens(prompt, system)
        if self._images is None:
            raise InputError("the prompt extender was loaded without vision, but pictures were given")
        seen = self._images(images=[p.convert("RGB") for p in pictures], return_tensors="pt")
        counts = (seen["image_grid_thw"].prod(-1) // self._images.merge_size**2).tolist()
        places = "".join(IMAGE_PLACE.replace(IMAGE_TOKEN, IMAGE_TOKEN * count) for count in counts)
        tokens = self._tokens(places + prompt, system)
        is_image = tokens["input_ids"] == self._module.config.image_token_id
        if int(is_image.sum()) != sum(counts):
            raise InputError(f"the prompt must not contain the model's own marker {IMAGE_TOKEN}")
        return {**tokens, **seen, "mm_token_type_ids": is_image.int()}

    def _tokens(self, said: str, system: str) -> dict[str, torch.Tensor]:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": said}]
        text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        return dict(self._tokenizer([str(text)], return_tensors="pt"))


# --- simulation ------------------------------------------------------------------------------------------------------


class _Simulation:
    """Books one answer of MAX_NEW_TOKENS tokens to a prompt of SIMULATED_PROMPT_TOKENS tokens after the instruction.

    The prefill and SIMULATED_STEPS decoding steps run, then the last step on a cache of its final length, set at once: so
    allocated memory is exact, reserved memory lacks what growing token by token fragments. The few MiB of sampling and the
    workspace of the vision tower's first convolution are not booked.
    """

    def __init__(self, transformers: Any, module: Any, device: Device) -> None:
        self._module = module
        self._device = device
        self._transformers = transformers
        # Its name changed between transformers 5.20 and 5.24.
        self._cache_name = "cache" if "cache" in inspect.signature(module.forward).parameters else "past_key_values"

    def __call__(self, prompt: str, system: str, target_lang: str, seed: int, pictures: list[Image.Image]) -> str:
        tokens = int(len(system) * TOKENS_PER_CHARACTER[target_lang]) + SIMULATED_PROMPT_TOKENS
        with _FusedAttention():
            seen = self._see(pictures)
            length = tokens + sum(features.shape[0] for features in seen.get("pooler_output", ()))
            cache = self._new_cache()
            self._forward(self._embeddings(length, bool(seen)), cache)
            for step in range(1, SIMULATED_STEPS + 1):
                self._forward(self._embeddings(1), cache)
                assert cache.get_seq_length() == length + step
            del cache, seen
            self._forward(self._embeddings(1), self._cache_of(length + MAX_NEW_TOKENS - 2))
        return prompt

    def _new_cache(self) -> Any:
        return self._transformers.DynamicCache(config=self._module.config)

    def _forward(self, embeddings: torch.Tensor, cache: Any) -> None:
        self._module(inputs_embeds=embeddings, use_cache=True, logits_to_keep=1, **{self._cache_name: cache})

    def _embeddings(self, length: int, with_pictures: bool = False) -> torch.Tensor:
        """[1, length, dim] of token ids; pictures are written into a copy."""
        ids = self._device.empty((1, length), torch.long)
        embeddings: torch.Tensor = self._module.get_input_embeddings()(ids)
        return embeddings.clone() if with_pictures else embeddings

    def _cache_of(self, length: int) -> Any:
        config = self._module.config.get_text_config()
        width = config.hidden_size // config.num_attention_heads
        cache = self._new_cache()
        for layer in range(config.num_hidden_layers):
            shape = (1, config.num_key_value_heads, length, width)
            cache.update(*(self._device.empty(shape, self._module.dtype) for _ in "kv"), layer)
        return cache

    def _see(self, pictures: list[Image.Image]) -> dict[str, Any]:
        """What stays of the vision tower's run: its outputs and the patches, float32 as the image processor makes them."""
        if not pictures:
            return {}
        if self._module.config.model_type != VISION_TYPE:
            raise InputError("the prompt extender was loaded without vision, but pictures were given")
        tower = self._module.config.vision_config
        grids = [_grid(p.width, p.height, tower.patch_size * tower.spatial_merge_size) for p in pictures]
        grid = torch.tensor([[1, *(n * tower.spatial_merge_size for n in merged)] for merged in grids])
        width = tower.in_channels * tower.temporal_patch_size * tower.patch_size**2
        patches = self._device.empty((int(grid.prod(-1).sum()), width), torch.float32)
        # Positions are computed from the grid, which has values; all that meets the tower's tensors has to be on meta.
        rotary = self._module.get_submodule("model.visual.rotary_pos_emb")
        hook = rotary.register_forward_pre_hook(lambda module, args: tuple(map(_on_meta, args)))
        try:
            outputs = self._module.get_image_features(patches, grid, return_dict=True)
        finally:
            hook.remove()
        return {**outputs, "patches": patches}


def _on_meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def _grid(width: int, height: int, cell: int) -> tuple[int, int]:
    """(rows, columns) of cells after scaling into PICTURE_PIXELS, the aspect ratio kept as whole cells allow."""
    rows, columns = max(1, round(height / cell)), max(1, round(width / cell))
    smallest, largest = PICTURE_PIXELS
    if rows * columns * cell**2 > largest:
        scale = (height * width / largest) ** 0.5
        return max(1, int(height / scale / cell)), max(1, int(width / scale / cell))
    if rows * columns * cell**2 < smallest:
        scale = (smallest / (height * width)) ** 0.5
        return -int(-height * scale // cell), -int(-width * scale // cell)
    return rows, columns


class _FusedAttention(TorchFunctionMode):
    """On meta, PyTorch would take attention apart into its N x N matrix; the GPU's kernels never hold one."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not F.scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = (x[0].transpose(0, 1) for x in args[:3])
        return attention(q, k, v).transpose(0, 1).unsqueeze(0)
