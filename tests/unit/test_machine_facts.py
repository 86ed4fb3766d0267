"""Limits by their last good value, defaults as the help says them, warnings from their first bad value, and Ctrl-C within a unit."""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from checkpoints import tiny_models, write_official
from mapping_source import MappingSource
from toy_component import Model, load, on_meta
from unit.test_check import FakeNvml
from wanvram.cli import generate
from wanvram.cli.flags import config_from_flags
from wanvram.config import Measurement, Request, RunConfig
from wanvram.engine.components import Parts
from wanvram.engine.devices import CpuDevice
from wanvram.engine.residency import Component
from wanvram.errors import InputError
from wanvram.machine import checks as module
from wanvram.machine.checks import own_gpu_process, run_checks
from wanvram.recorder.interrupts import deferred
from wanvram.run.weights import choose_weights
from wanvram.units import GIB, parse_bytes

# --- the last value that is allowed ------------------------------------------------------------------------------------------


def request(**given: object) -> Request:
    return Request.for_task("t2v-1.3B", size="832*480", **given)


@pytest.mark.parametrize(
    ("key", "most", "beyond"),
    [
        ("sample_steps", 1000, 1001),
        ("sample_steps", 1, 0),
        ("sample_shift", 100.0, 100.1),
        ("prompts", ("a",) * 64, ("a",) * 65),
        ("frame_num", 4093, 4097),
        ("base_seed", 2**63 - 1, 2**63),
    ],
)
def test_the_last_value_is_allowed_and_the_first_beyond_it_is_not(key: str, most: object, beyond: object) -> None:
    assert getattr(request(**{key: most}), key) == most
    with pytest.raises(InputError):
        request(**{key: beyond})


def test_a_name_may_have_as_many_bytes_and_not_characters() -> None:
    def named(name: str) -> RunConfig:
        return RunConfig(name, "", "simulated", request())

    assert named("a" * 200)
    assert named("ü" * 100).name == "ü" * 100
    with pytest.raises(InputError, match="at most 200 bytes"):
        named("ü" * 101)


def test_amounts_of_memory_have_units_up_to_tebibytes() -> None:
    assert [parse_bytes(text) for text in ("1T", "1.5TiB", "2k", "3B", "1GiB", "1MB")] == [
        2**40,
        3 * 2**39,
        2048,
        3,
        2**30,
        2**20,
    ]


# --- the command line --------------------------------------------------------------------------------------------------------


def typed(*flags: str, weights: str = "random", device: str | None = None) -> RunConfig:
    parser = ArgumentParser()
    generate.prepare_parser(parser)
    return config_from_flags(
        parser.parse_args(flags), device=device, weights=weights, gpu=None, memory_limit_bytes=None
    )


def test_what_is_not_typed_is_what_the_help_and_the_official_script_say() -> None:
    config = typed()
    assert config.strategy.precision == "fp16"
    assert typed(device="cpu").strategy.precision == "fp32"
    r = config.request
    assert (r.task, r.size, r.frame_num, r.sample_steps, r.sample_shift) == ("t2v-14B", "1280*720", 81, 50, 5.0)
    assert (r.sample_guide_scale, r.sample_solver, r.base_seed) == (5.0, "unipc", -1)
    assert config.strategy.offload is True, "as --offload_model of the official script on one GPU"


def test_bad_weights_are_named_by_the_flag_that_was_typed() -> None:
    with pytest.raises(InputError, match=r"^--ckpt_dir: is empty"):
        typed(weights="")


def test_another_size_than_the_files_brings_its_own_shift(tmp_path: Path) -> None:
    path = tmp_path / "i2v.yaml"
    path.write_text("name: x\ndescription: d\nrequest: {task: i2v-14B, size: 832*480}\n")
    assert typed("--config", str(path)).request.sample_shift == 3.0
    assert typed("--config", str(path), "--size", "1280*720").request.sample_shift == 5.0
    assert typed("--config", str(path), "--size", "832x480").request.sample_shift == 3.0
    path.write_text("name: x\ndescription: d\nrequest: {task: i2v-14B, size: 832*480, sample_shift: 4.5}\n")
    assert typed("--config", str(path), "--size", "1280*720").request.sample_shift == 4.5, "it was no default"


def test_a_prompt_file_is_lines_without_the_spaces_around_them_and_at_most_8_mib(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text("  a cat \n\n\ta dog\n")
    assert typed("--prompt_file", str(path)).request.prompts == ("a cat", "a dog")
    path.write_text("a cat\n" + " " * (8 * 1024 * 1024))
    with pytest.raises(InputError, match="--prompt_file"):
        typed("--prompt_file", str(path))


# --- what is warned of -------------------------------------------------------------------------------------------------------


class Nvml(FakeNvml):
    cards = 1

    def nvmlDeviceGetCount(self) -> int:
        return self.cards


@pytest.fixture(autouse=True)
def idle(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in module._VARIABLES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(module.psutil, "getloadavg", lambda: (0.1, 0.1, 0.1))
    monkeypatch.setattr(module, "operation_us", lambda: 2.0)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _: type("Disk", (), {"free": 100 * GIB}))
    ram(monkeypatch, 0.5)


def ram(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    total = module.psutil.virtual_memory().total
    monkeypatch.setattr(module, "available_ram_bytes", lambda: int(total * free))


def warnings(*processes: tuple[int, int | None], cards: int = 1, **more: int) -> str:
    nvml = Nvml(*processes, **more)
    nvml.cards = cards
    return "\n".join(run_checks(nvml=nvml)["warnings"])


@pytest.mark.parametrize(("free", "warned"), [(0.11, False), (0.09, True)])
def test_less_than_a_tenth_of_the_ram_is_warned_of(free: float, warned: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    ram(monkeypatch, free)
    assert ("of host RAM are free" in warnings()) is warned


@pytest.mark.parametrize(("percent", "warned"), [(10, False), (11, True)])
def test_a_gpu_over_ten_per_cent_busy_with_others_is_warned_of(percent: int, warned: bool) -> None:
    assert ("is busy" in warnings((1, GIB), busy=percent)) is warned


def test_a_gpu_that_only_we_keep_busy_is_not() -> None:
    assert "is busy" not in warnings((os.getpid(), GIB), busy=99)


def test_each_reason_to_be_slow_is_called_by_its_name() -> None:
    names = {
        0x04: "power cap",
        0x08: "hardware slowdown",
        0x20: "temperature",
        0x40: "temperature",
        0x80: "power brake",
    }
    for bit, name in names.items():
        assert f"slowed down by {name}:" in warnings(reasons=bit)
    assert "slowed" not in warnings(reasons=0x01 | 0x02), "idle, or clocks that somebody chose"


def test_memory_beside_a_process_that_is_seen_is_not_called_invisible() -> None:
    assert "not visible from here" not in warnings((os.getpid(), GIB), used=20 * GIB)
    assert "not visible from here" in warnings(used=20 * GIB)


def test_two_gpus_are_enough_for_the_note_on_which_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "2 GPUs are visible; the first of CUDA is measured" in warnings(cards=2)
    assert "are visible" not in warnings(cards=1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert "are visible" not in warnings(cards=2)


def test_what_started_this_command_is_never_ended() -> None:
    for pid in (os.getppid(), os.getpid()):
        with pytest.raises(InputError, match="this command itself or what started it; nothing was ended"):
            own_gpu_process(pid, run_checks(nvml=Nvml((pid, GIB))))


# --- Ctrl-C within one unit of weights ---------------------------------------------------------------------------------------


def interrupt() -> None:
    import signal

    os.kill(os.getpid(), signal.SIGINT)


def units_until_the_end(component: Component, units: list[nn.Module]) -> int:
    seen = 0
    try:
        with deferred():
            for number, _ in enumerate(component.walk(units)):
                seen = number + 1
                if number == 1:
                    interrupt()
    except KeyboardInterrupt:
        return seen
    raise AssertionError("the walk went on to its end")


@pytest.mark.parametrize("how", ["resident", "pinned", "disk"])
def test_an_interrupt_inside_a_pass_ends_it_before_the_next_unit(how: str) -> None:
    plain = Model()
    model, component = on_meta(CpuDevice())
    load(component, how, MappingSource(plain.state_dict()))
    assert units_until_the_end(component, model.units()) == 2
    component.release()


class InterruptedSource(MappingSource):
    """Interrupted while the third tensor is read."""

    reads = 0

    def fill(self, key: str, dest: torch.Tensor) -> None:
        self.reads += 1
        if self.reads == 3:
            interrupt()
        super().fill(key, dest)


@pytest.mark.parametrize("how", ["resident", "pinned", "pageable", "host"])
def test_an_interrupt_while_weights_are_loaded_ends_with_the_part_that_is_being_read(how: str) -> None:
    source = InterruptedSource(Model().state_dict())
    _, component = on_meta(CpuDevice())
    with pytest.raises(KeyboardInterrupt), deferred():
        load(component, how, source)
    assert source.reads <= 6, "a part has at most four tensors"


# --- where weights are -------------------------------------------------------------------------------------------------------


@contextmanager
def parts(folder: Path, **optimization: object) -> Iterator[Parts]:
    from wanvram.config import Strategy

    with tiny_models():
        asked = Request.for_task("i2v-14B", size="832*480", frame_num=5, image="x.png")
        strategy = Strategy(precision="fp32", load_strategy="block", resident_blocks=1, **optimization)  # type: ignore[arg-type]
        config = RunConfig("x", "", "cpu", asked, strategy, Measurement(), weights=str(folder))
        weights = choose_weights(str(folder), simulated=False, task="i2v-14B", seed=0)
        yield Parts(config, CpuDevice(), weights)


def test_resident_blocks_are_the_transformers_and_clip_is_float32_where_half_does_not_compute(tmp_path: Path) -> None:
    write_official(tmp_path, "tiny-i2v")
    with parts(tmp_path) as made:
        resident = {}
        for name in ("text_encoder", "dit"):
            component = made.load(name)
            resident[name] = sum(part.flat is not None for part in component._units.values())
            component.release()
        assert resident["text_encoder"] == 0
        assert resident["dit"] > 0
        clip = made.load("image_encoder")
        assert {p.dtype for p in clip.module.parameters()} == {torch.float32}
        clip.release()
