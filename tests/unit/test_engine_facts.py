"""Facts about components on their way to the device: what is read or made, what stays, what follows when, and whose RAM it takes."""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from integration.test_strategies import PLAIN, _Latent, build
from mapping_source import MappingSource
from toy_component import CountingDevice, Model, on_meta, padded_bytes
from wanvram.config import Request, RunConfig, Strategy
from wanvram.engine.components import Parts
from wanvram.engine.devices import CpuDevice
from wanvram.engine.residency import Component
from wanvram.errors import DeviceError
from wanvram.predict.simulate import simulated_device
from wanvram.run.weights import NoWeights
from wanvram.sharing import Place
from wanvram.simulate.host import HOST
from wanvram.specs import T5

# --- components --------------------------------------------------------------------------------------------------------------


def parts(weights: str, task: str = "t2v-1.3B", **strategy: Any) -> Parts:
    image = {"image": "x.png"} if task == "i2v-14B" else {}
    request = Request.for_task(task, size="832*480", frame_num=5, **image)
    run = RunConfig("x", "", "simulated", request, Strategy(**strategy), weights=weights)
    return Parts(run, simulated_device(run), NoWeights(tiny=False))


@pytest.mark.parametrize(("weights", "reads"), [("random", False), ("tiny", False), ("/checkpoint", True)])
def test_a_checkpoint_is_read_where_generated_weights_are_made_on_the_device(weights: str, reads: bool) -> None:
    made = parts(weights)
    device: Any = made.device
    with device.session():
        vae = made.load("vae_decoder")
        assert (device.clock.now() > vae.weight_bytes / HOST.disk_bytes) is reads
        assert (vae.host_bytes, device.memory.read().allocated_bytes >= vae.weight_bytes) == (0, True)


def test_what_other_ranks_hold_in_place_of_texts_and_pictures_has_their_size() -> None:
    made = parts("random", "i2v-14B")
    with made.device.session():
        (context,) = made.stand_in_contexts(["a cat"])
        assert tuple(context.shape) == (len(made.tokenizer.encode("a cat")), T5["umt5-xxl"].dim)
        features = made.stand_in_features(2)
        assert tuple(features.shape) == (2, 257, 1280)
        assert (context.dtype, features.dtype) == (torch.bfloat16, torch.float16)


def test_blocks_are_streamed_and_some_of_the_transformer_s_stay_and_of_the_text_encoder_all_may_be_in_ram() -> None:
    for strategy, text_on_device in (({}, True), ({"t5_cpu": True}, False)):
        made = parts("random", load_strategy="block", resident_blocks=2, **strategy)
        with made.device.session():
            text = made.load("text_encoder")
            assert (made.device.meter.read().allocated_bytes > 0) is text_on_device
            assert text.host_bytes > 0.9 * text.weight_bytes
            assert sum(part.flat is not None for part in text._units.values()) == (0 if text_on_device else 24)
            dit = made.load("dit")
            assert sum(part.flat is not None for part in dit._units.values()) == 2 * 3
            text.release()
            dit.release()


@pytest.mark.parametrize(
    "strategy", [{"t5_cpu": True}, {"load_strategy": "block", "resident_blocks": 1, "offload": True}]
)
def test_wherever_the_weights_are_a_video_from_a_picture_has_the_latent_of_the_plain_run(
    strategy: dict[str, Any],
) -> None:
    latents = []
    for how in (PLAIN, PLAIN | strategy):
        pipeline = build(_Latent, "i2v-14B", 1, how)
        with pipeline.device.session():
            pipeline.run(lambda index: nullcontext())
        assert isinstance(pipeline, _Latent)
        latents.append(pipeline.latent)
    assert torch.equal(*latents)


# --- weights on their way ----------------------------------------------------------------------------------------------------


class Sent(CpuDevice):
    """Bytes of every copy beside the computation."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[int] = []

    def prefetch(self, destination: torch.Tensor, source: torch.Tensor, *after: Any) -> Any:
        self.sent.append(destination.nbytes)
        return super().prefetch(destination, source, *after)


def test_between_chunks_of_rows_the_next_unit_follows_in_parts_that_are_there_before_the_last() -> None:
    device = Sent()
    model, component = on_meta(device)
    component.load_streamed(MappingSource(Model().state_dict()), lanes=[0, 1] * 4)
    sizes = [padded_bytes(unit) for unit in model.units()]
    walk = component.walk(model.units())
    next(walk)
    assert device.sent == sizes[:1], "needed now"
    for _ in range(3):
        component.between_rows(4)
    part = math.ceil(sizes[1] / 3)
    assert device.sent[1:] == [part, part, sizes[1] - 2 * part]
    next(walk)
    component.between_rows(1)
    assert device.sent[4:] == [sizes[2]], "a single chunk: all at once"
    walk.close()  # type: ignore[attr-defined]
    component.release()


def test_without_lanes_nothing_waits_for_chunks_of_rows() -> None:
    device = Sent()
    model, component = on_meta(device)
    component.load_streamed(MappingSource(Model().state_dict()))
    walk = component.walk(model.units())
    next(walk)
    before = list(device.sent)
    component.between_rows(4)
    assert device.sent == before == [padded_bytes(unit) for unit in model.units()[:2]]
    component.release()


class Shared(CountingDevice):
    """One of two ranks on a machine with little RAM."""

    room = 0

    def __init__(self) -> None:
        super().__init__()
        self.place, self.met = Place(0, ulysses=2), 0

    def peers(self, axis: str) -> Any:
        return self

    def meet(self) -> None:
        self.met += 1

    def host_room(self) -> int:
        return self.room


def test_ram_that_holds_the_weights_to_the_byte_is_enough_and_ranks_of_one_machine_need_it_each() -> None:
    source = MappingSource(Model().state_dict())
    needed = sum(padded_bytes(module) for module in (*Model().units(), *Model().embedders()))
    for room, everyone, fits in (
        *((needed, False, True), (needed - 1, False, False)),
        *((2 * needed, True, True), (2 * needed - 1, True, False)),
    ):
        device = Shared()
        device.room = room
        _, component = on_meta(device)
        if fits:
            component.load_streamed(source, everyone=everyone)
            assert component.host_bytes == needed
        else:
            with pytest.raises(DeviceError, match=r"use --dit_fsdp" if everyone else r"available; use --weights_in"):
                component.load_streamed(source, everyone=everyone)
        assert device.met == (0 if not everyone else 2 if fits else 1), (
            "looked before anybody takes, and after all have"
        )
        component.release()


class Booked(CpuDevice):
    def __init__(self) -> None:
        super().__init__()
        self.booked: list[str] = []

    def generated_weights(self) -> None:
        self.booked.append("made")

    def loaded_weights(self, destination: torch.Tensor, component: str, *, readers: int = 1) -> None:
        self.booked.append(f"read by {readers}")

    def read_from_disk(self, nbytes: int, component: str, kept_bytes: int | None, *, readers: int = 1) -> None:
        self.booked.append(f"{nbytes} of {kept_bytes} by {readers}")


def test_without_a_source_a_simulation_books_weights_as_made_or_read() -> None:
    for generated, word in ((True, "made"), (False, "read by 1")):
        device = Booked()
        model, _ = on_meta(device)
        component = Component("toy", model, model.units(), device, model.embedders(), generated=generated)
        component.load_resident(None)
        assert device.booked == [word] * (1 + 2 + 8), "the shell, the embedders, the units"
        component.release()


def test_what_was_read_from_disk_once_is_read_again_from_what_the_page_cache_holds() -> None:
    device = Booked()
    model, _ = on_meta(device)
    component = Component("toy", model, model.units(), device, model.embedders(), generated=False)
    component.load_streamed(None, home="disk")
    device.booked.clear()
    for _ in range(2):
        for _ in component.walk(model.units()):
            pass
    sizes = [padded_bytes(unit) for unit in model.units()]
    first = [f"{size} of None by 1" for size in sizes]
    again = [f"{size} of {component.weight_bytes} by 1" for size in sizes]
    assert device.booked == [*first, *again, *again[:2]]
    component.release()
