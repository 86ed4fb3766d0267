"""Prompt extension: a tiny Qwen2.5 answers on the CPU, and the simulated device books the published ones."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from wanvram.engine.devices import CpuDevice, Device, SimulatedDevice
from wanvram.errors import CheckpointError, InputError
from wanvram.prompt import dashscope
from wanvram.prompt import local_model as prompt_extender
from wanvram.prompt.instructions import system_prompt
from wanvram.prompt.local_model import OFFICIAL_MODELS, load_extender
from wanvram.recorder.recorder import Recorder
from wanvram.simulate.allocator import CachingAllocator
from wanvram.simulate.gpus import GPUS
from wanvram.simulate.libraries import Libraries
from wanvram.simulate.memory import SimulatedMemory

transformers = pytest.importorskip("transformers")
MIB = 2**20
CUBLAS = 33 * MIB  # workspaces of cuBLAS and cuBLASLt, taken at the first product and kept
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "vocab_size": 256 + len(SPECIAL), "max_position_embeddings": 4096}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
TOWER = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 32}
PICTURE = Image.new("RGB", (640, 480), (200, 30, 30))


# --- tiny models -----------------------------------------------------------------------------------------------------


def save_tokenizer(directory: Path) -> None:
    """One token per byte, and the markers of Qwen2.5."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: number for number, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in SPECIAL])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=SPECIAL[1], pad_token=SPECIAL[1])
    fast.chat_template = TEMPLATE
    fast.save_pretrained(directory)


def save_model(directory: Path, config: Any) -> None:
    torch.manual_seed(0)
    automatic = transformers.AutoModelForCausalLM
    if config.model_type == "qwen2_5_vl":
        automatic = transformers.AutoModelForImageTextToText
    model = automatic.from_config(config, dtype=torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.5)  # large, so that answers depend on what is read
    model.generation_config.update(do_sample=True, top_k=20, top_p=0.8, eos_token_id=257, pad_token_id=257)
    model.save_pretrained(directory)
    save_tokenizer(directory)


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("text")
    save_model(directory, transformers.Qwen2Config(**TEXT, tie_word_embeddings=True))
    return directory


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("vision")
    ids = {"vision_start_token_id": 258, "vision_end_token_id": 259, "image_token_id": 260, "video_token_id": 261}
    save_model(
        directory,
        transformers.Qwen2_5_VLConfig(text_config=TEXT | {"rope_parameters": ROPE}, vision_config=TOWER, **ids),
    )
    (directory / "preprocessor_config.json").write_text('{"image_processor_type": "Qwen2VLImageProcessor"}')
    return directory


@pytest.fixture(autouse=True)
def short_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """24 tokens are enough to differ, and no test may find a model in this machine's cache."""
    import huggingface_hub.constants

    monkeypatch.setattr(prompt_extender, "MAX_NEW_TOKENS", 24)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "no-cache"))


def simulated() -> SimulatedDevice:
    gpu = GPUS["h200"]
    libraries = Libraries(gpu)
    return SimulatedDevice(SimulatedMemory(gpu, CachingAllocator(limit_bytes=gpu.total_bytes), libraries))


def extended(device: Device, model: Path | str, prompt: str = "a cat", seed: int = 1, lang: str = "en") -> str:
    with device.session():
        extender = load_extender(str(model), device, vision=False)
        try:
            return extender.extend(prompt, target_lang=lang, seed=seed)
        finally:
            extender.release()


# --- instructions ----------------------------------------------------------------------------------------------------


def test_every_language_and_number_of_pictures_has_its_own_instruction() -> None:
    texts = {system_prompt(lang, pictures) for lang in ("zh", "en") for pictures in (0, 1, 2)}
    assert len(texts) == 6
    assert "视频" in system_prompt("zh")
    assert system_prompt("en").isascii()


def test_an_unknown_language_and_a_third_picture_are_refused() -> None:
    with pytest.raises(InputError, match=r"'fr'.*zh, en"):
        system_prompt("fr")
    with pytest.raises(InputError, match="3 pictures"):
        system_prompt("zh", 3)


# --- the local model on the CPU --------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_text_and_another_seed_another(text_model: Path) -> None:
    first, again = (extended(CpuDevice(), text_model, seed=5) for _ in range(2))
    assert first == again
    assert extended(CpuDevice(), text_model, seed=6) != first


def test_prompt_and_language_reach_the_model(text_model: Path) -> None:
    texts = {extended(CpuDevice(), text_model, p, lang=lang) for p in ("a cat", "two dogs") for lang in ("zh", "en")}
    assert len(texts) == 4


def test_an_answer_holds_neither_the_question_nor_markers(text_model: Path) -> None:
    answer = extended(CpuDevice(), text_model, "a very particular sentence")
    assert "particular" not in answer
    assert "<|" not in answer
    assert 0 < len(answer) <= 24


def test_extending_leaves_the_callers_random_numbers_alone(text_model: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    extended(CpuDevice(), text_model)
    assert torch.equal(torch.rand(2), expected)


def test_weights_are_counted_once_where_shared_and_gone_after_release(text_model: Path) -> None:
    device = CpuDevice()
    with device.session():
        before = device.meter.read().allocated_bytes
        extender = load_extender(str(text_model), device, vision=False)
        table = TEXT["vocab_size"] * TEXT["hidden_size"]
        assert table < extender.parameters < 2 * table + 20_000
        booked = device.meter.read().allocated_bytes - before
        assert (
            4 * extender.parameters <= booked <= 4 * extender.parameters + 1024
        )  # float32, and the rotary frequencies
        extender.release()
        assert device.meter.read().allocated_bytes == before


def test_a_picture_changes_what_the_vision_model_answers(vision_model: Path, tmp_path: Path) -> None:
    device = CpuDevice()
    with device.session():
        extender = load_extender(str(vision_model), device, vision=True)
        blue = Image.new("RGB", (640, 480), (0, 0, 250))
        answers = {
            extender.extend("it moves", target_lang="en", seed=1, pictures=pictures)
            for pictures in ((), (PICTURE,), (blue,), (PICTURE, blue))
        }
        assert len(answers) == 4
        blue.save(tmp_path / "blue.png")
        assert extender.extend("it moves", target_lang="en", seed=1, pictures=(tmp_path / "blue.png",)) in answers
        (tmp_path / "blue.png").write_bytes(b"no picture")
        with pytest.raises(InputError, match=r"blue\.png cannot be read as a picture"):
            extender.extend("it moves", target_lang="en", seed=1, pictures=(tmp_path / "blue.png",))


def test_a_prompt_with_the_picture_marker_is_refused(vision_model: Path) -> None:
    with CpuDevice().session():
        extender = load_extender(str(vision_model), CpuDevice(), vision=True)
        with pytest.raises(InputError, match="image_pad"):
            extender.extend("<|image_pad|>", target_lang="en", seed=1, pictures=(PICTURE,))


def test_a_prompt_longer_than_the_model_reads_is_refused_with_both_numbers(text_model: Path) -> None:
    with pytest.raises(InputError, match=r"tokens.*takes 4,072"):
        extended(CpuDevice(), text_model, "x" * 5000)


# --- models that cannot be used --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Qwen2.5_14B", "Qwen/Qwen2.5-14B-Instruct"])
def test_a_model_that_is_not_cached_names_the_command_that_downloads_it(name: str) -> None:
    with pytest.raises(InputError, match=r"hf download Qwen/Qwen2.5-14B-Instruct"):
        load_extender(name, CpuDevice(), vision=False)


@pytest.mark.parametrize("name", ["nowhere", "/nowhere/at/all", "a/../b", ""])
def test_what_is_neither_a_directory_nor_a_name_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"is no directory; names are .*Qwen2\.5_14B"):
        load_extender(name, simulated(), vision=False)


def test_a_text_model_is_refused_where_pictures_come(text_model: Path) -> None:
    with pytest.raises(InputError, match=r"QwenVL2\.5_7B"):
        load_extender(str(text_model), CpuDevice(), vision=True)
    for device in (CpuDevice(), simulated()):
        with device.session():
            extender = load_extender(str(text_model), device, vision=False)
            with pytest.raises(InputError, match="without vision"):
                extender.extend("x", target_lang="en", seed=1, pictures=(PICTURE,))


def spoil(directory: Path, name: str, change: Callable[[bytes], bytes | None]) -> Path:
    """A copy of a model folder with one file changed, or removed for None."""
    copy = directory.parent / f"{directory.name}-{len(list(directory.parent.iterdir()))}"
    copy.mkdir()
    for file in directory.iterdir():
        content = change(file.read_bytes()) if file.name == name else file.read_bytes()
        if content is not None:
            (copy / file.name).write_bytes(content)
    return copy


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", lambda data: None, "config.json does not exist"),
        ("config.json", lambda data: b"{", "cannot be loaded"),
        ("config.json", lambda data: b'{"model_type": "llama"}', "'llama'"),
        ("config.json", lambda data: data.replace(b'"qwen2"', b'"qwen9"'), "cannot be loaded"),
        ("config.json", lambda data: data[:-2] + b', "auto_map": {"AutoConfig": "evil.C"}, "model_type": "evil"}', "loaded|evil"),
        ("model.safetensors", lambda data: None, "model.safetensors does not exist"),
        ("model.safetensors", lambda data: data[:-100], "truncated"),
        ("model.safetensors", lambda data: b"version https://git-lfs", "LFS"),
        ("model.safetensors", lambda data: data.replace(b"model.norm.weight", b"model.nono.weight"), "lacks 1 .*norm"),
        ("tokenizer.json", lambda data: b"{}", "cannot be loaded"),
        ("chat_template.jinja", lambda data: None, "chat template"),
    ],
)  # fmt: skip
def test_a_damaged_model_folder_is_named(
    text_model: Path, name: str, change: Callable[[bytes], bytes | None], message: str
) -> None:
    folder = spoil(text_model, name, change)
    with CpuDevice().session(), pytest.raises(CheckpointError, match=message) as caught:
        load_extender(str(folder), CpuDevice(), vision=False)
    assert folder.name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pickled_weights_are_not_read(text_model: Path) -> None:
    folder = spoil(text_model, "model.safetensors", lambda data: None)
    (folder / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(CheckpointError, match=r"model.safetensors"):
        load_extender(str(folder), CpuDevice(), vision=False)


def test_a_quantised_model_is_refused(text_model: Path) -> None:
    folder = spoil(
        text_model, "config.json", lambda d: d.rstrip()[:-1] + b', "quantization_config": {"quant_method": "awq"}}'
    )
    with pytest.raises(InputError, match="quantised"):
        load_extender(str(folder), simulated(), vision=False)


def test_without_transformers_the_pip_command_is_named(monkeypatch: pytest.MonkeyPatch, text_model: Path) -> None:
    monkeypatch.setitem(__import__("sys").modules, "transformers", None)
    with pytest.raises(InputError, match=r"pip install 'wanvram\[prompt\]'"):
        load_extender(str(text_model), CpuDevice(), vision=False)


# --- simulation ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),  # as Hugging Face counts them in the published files
    [
        ("Qwen2.5_3B", 3_085_938_688),
        ("Qwen2.5_7B", 7_615_616_512),
        ("Qwen2.5_14B", 14_770_033_664),
        ("QwenVL2.5_3B", 3_754_622_976),
        ("QwenVL2.5_7B", 8_292_166_656),
    ],
)
def test_official_models_have_their_published_size_without_a_file(name: str, parameters: int) -> None:
    device = simulated()
    with device.session():
        extender = load_extender(name, device, vision="VL" in name)
        assert extender.parameters == parameters
        booked = device.meter.read().allocated_bytes
        assert 2 * parameters < booked < 2.04 * parameters  # bfloat16; blocks are up to 1 MiB larger than a tensor
        extender.release()
        assert device.meter.read().allocated_bytes == 0


def test_short_names_are_those_of_the_official_script() -> None:
    assert {prompt_extender.default_model(vision=v) for v in (False, True)} == {"Qwen2.5_14B", "QwenVL2.5_7B"}
    assert OFFICIAL_MODELS["QwenVL2.5_7B"] == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert dashscope.default_model(vision=True) == "qwen-vl-max"


@pytest.mark.parametrize("vision", [False, True])
def test_the_extender_is_booked_used_and_freed_as_a_component(vision: bool) -> None:
    device = simulated()
    recorder = Recorder(device.meter, None, None)
    name = prompt_extender.default_model(vision=vision)
    with device.session():
        with recorder.span("load prompt_extender", kind="load", component="prompt_extender"):
            extender = load_extender(name, device, vision=vision)
        with recorder.span("extend_prompt", kind="stage", component="prompt_extender"):
            answer = extender.extend("a cat", target_lang="zh", seed=0, pictures=[PICTURE] * vision)
        extender.release()
        after = device.meter.read().allocated_bytes
    load, stage = recorder.spans
    assert load.end.allocated_bytes - load.start.allocated_bytes > 2 * extender.parameters
    assert stage.end.allocated_bytes == load.end.allocated_bytes + CUBLAS
    assert CUBLAS + 50 * MIB < stage.activation_bytes < 1000 * MIB
    assert after == load.start.allocated_bytes + CUBLAS
    assert answer == "a cat"


def test_the_cache_of_the_last_token_is_booked(text_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long answer outgrows the prefill: two layers, two heads of eight, keys and values, for every token."""
    peaks = []
    for tokens in (20_000, 40_000):
        monkeypatch.setattr(prompt_extender, "MAX_NEW_TOKENS", tokens)
        device = simulated()
        with device.session():
            extender = load_extender(str(text_model), device, vision=False)
            device.meter.reset_peak()
            extender.extend("x", target_lang="en", seed=0)
            peaks.append(device.meter.peak().allocated_bytes)
    per_token = 2 * 2 * 2 * 8 * 2
    growth = (peaks[1] - peaks[0]) / 20_000
    assert per_token <= growth <= 1.6 * per_token  # one layer's old cache lives beside its new one


def test_pictures_cost_memory_in_the_simulation(vision_model: Path) -> None:
    peaks = []
    for count in (0, 1, 2):
        device = simulated()
        with device.session():
            extender = load_extender(str(vision_model), device, vision=True)
            device.meter.reset_peak()
            extender.extend("x", target_lang="en", seed=0, pictures=[PICTURE] * count)
            peaks.append(device.meter.peak().allocated_bytes)
    assert peaks[0] + MIB < peaks[1] < peaks[2] - MIB


def test_the_simulation_scales_pictures_as_the_image_processor_does(vision_model: Path) -> None:
    device = CpuDevice()
    with device.session():
        images = load_extender(str(vision_model), device, vision=True)._answer._images  # type: ignore[union-attr]
        for size in ((640, 480), (1280, 720), (720, 1280), (100, 50), (3000, 1000)):
            seen = images(images=[Image.new("RGB", size)], return_tensors="pt")["image_grid_thw"]
            assert prompt_extender._grid(*size, 28) == tuple((seen[0, 1:] // 2).tolist()), size


def test_memory_does_not_depend_on_whether_the_config_is_built_in_or_a_file(tmp_path: Path) -> None:
    transformers.Qwen2Config(**prompt_extender._PUBLISHED["Qwen/Qwen2.5-3B-Instruct"]).save_pretrained(tmp_path)
    peaks = set()
    for model in ("Qwen2.5_3B", str(tmp_path)):
        device = simulated()
        with device.session():
            load_extender(model, device, vision=False).release()
        peaks.add(device.meter.peak())
    assert len(peaks) == 1
    assert peaks.pop().allocated_bytes > 6e9
