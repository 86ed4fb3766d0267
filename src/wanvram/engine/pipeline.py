"""A request as a sequence of stages: load, encode_text, encode_image (CLIP), encode_video (VAE), denoise (step by step), decode.

A component enters the device in a `load` stage and, with `offload`, leaves it after its last use; without, all components are loaded
first and stay, as the official script does with `--offload_model False`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import groupby
from typing import Any, Protocol, cast

import torch

from wanvram.config import RunConfig
from wanvram.engine.components import Parts, Weights
from wanvram.engine.conditions import Frames, Inputs, clip_features, image_condition, vace_context
from wanvram.engine.denoising import Guide, Sampling, Turn, TurnPlan, advance, asked_of, transformer, velocities_of
from wanvram.engine.devices import Device
from wanvram.engine.first_use import use_libraries
from wanvram.engine.keeping import Keeper
from wanvram.engine.residency import Component
from wanvram.engine.shared_stages import SharedStages
from wanvram.engine.stage_progress import Count, Done, Tell, counted, counted_walk
from wanvram.engine.vae_stages import FrameSink, decode, encode
from wanvram.knobs import BATCH_SIZE, PRECISION, T5_FSDP, videos_per_pass
from wanvram.models.dit import Condition
from wanvram.models.precision import PRECISIONS
from wanvram.models.vae_tiles import grid
from wanvram.record import ComponentRecord
from wanvram.recorder.recorder import Recorder
from wanvram.request import Request, Video
from wanvram.sampling import Solver, solve, timesteps_and_sigmas
from wanvram.spans import Copies

__all__ = ["FrameSink", "OpenSink", "Pipeline"]

SIMULATED_STEPS = 4  # first, second, one of the steady state, last: all others repeat the last but one
# What denoising leaves in the allocator, and so what decoding reserves, mostly repeats every 4 steps (UniPC; 2 for DPM++): with
# 6 steps instead of 4, decoding of 832x480 reserves 12 MiB more. Not always: after 11 steps all of them give 12 MiB less than
# the 7 that are simulated (docs/evidence.md).
STEPS_PERIOD = 4

OpenSink = Callable[[int], AbstractContextManager["FrameSink | None"]]


class PromptExtension(Protocol):
    """Rewrites the prompts before anything is loaded; `record` describes the component it used on the device, if any."""

    record: ComponentRecord | None
    notes: list[str]

    def __call__(self, device: Device, recorder: Recorder) -> Sequence[str]: ...


@dataclass
class _Loaded:
    component: Component
    base_bytes: int


_Extra = dict[str, Any]  # what every forward is conditioned on besides text: fields of models.dit.Condition


@dataclass
class Pipeline:
    """One run of one request, with one or several prompts. What it learned is in the recorder and `records()`.

    keeper: knows what an earlier process made of it. whole: numbers of the videos whose files are whole already.
    """

    config: RunConfig
    device: Device
    recorder: Recorder
    weights: Weights
    inputs: Inputs
    tell: Tell | None = None  # hears how far each stage is
    trace_step: Callable[[], None] | None = None
    extend: PromptExtension | None = None
    keeper: Keeper = field(default_factory=Keeper)
    whole: Collection[int] = ()
    prompts: list[str] = field(default_factory=list)
    _loaded: dict[str, _Loaded] = field(default_factory=dict)
    _finished: list[ComponentRecord] = field(default_factory=list)
    _streamed: dict[str, Copies] = field(default_factory=dict)
    _copied: Copies = field(default_factory=Copies)
    # Videos, by the first of those made together, that wait for the next transformer.
    _waiting: dict[int, list[Sampling]] = field(default_factory=dict)

    @cached_property
    def ranks(self) -> SharedStages:
        return SharedStages(self.device)

    def run(self, open_sink: OpenSink) -> None:
        """`open_sink(i)` opens what takes the frames of the i-th video of `config.videos()`."""
        self.prompts = self._prompts()
        parts = Parts(self.config, self.device, self.weights)
        if self.config.memory_limit_bytes is not None:
            self._start()
        latents = self._kept_latents()
        if not latents:
            try:
                latents = self._denoised(parts)
            except BaseException:
                with suppress(Exception):  # of a device that has failed
                    self.keeper.interrupted(self.device)
                raise
        self.decode_all(parts, latents, open_sink)

    def _prompts(self) -> list[str]:
        """As an earlier process extended them, else extended now, else as they are."""
        if not self.keeper.prompts:
            extended = self.extend(self.device, self.recorder) if self.extend and self.ranks.is_first else None
            self.keeper.prompts = self.ranks.told(tuple(extended or self.config.request.all_prompts()))
        return list(self.keeper.prompts)

    def _kept_latents(self) -> list[torch.Tensor]:
        """Of a run that ended in decoding; nothing where a step is left."""
        kept = self.keeper.take_finished(len(self.config.videos()), self.config.request.sample_steps)
        return [self.device.upload(kept.pop())] if len(kept) == 1 else kept

    def _denoised(self, parts: Parts) -> list[torch.Tensor]:
        """From texts and pictures to one latent per prompt."""
        if not self.config.strategy.offload:
            for name in self._components():
                if self._makes(name):
                    self._load(name, parts)
        contexts = self.encode_text(parts)
        extra = self._encode_pictures(parts)
        for turn in self._turns_left():
            plan = self.prepare(parts, contexts if turn.is_last else list(contexts), extra, turn)
            if turn.is_last:
                del contexts, extra
            latents = self.denoise_all(parts, plan)
            del plan
        self.keeper.finish_all()
        return latents

    def _start(self) -> None:
        """Under a limit the libraries come first, so that what they leave of it is known before weights are loaded."""
        with self.recorder.span("start", kind="load"):
            use_libraries(self.device, self.config.strategy, asked_of(self.device))
            self.device.empty_cache()
            self.device.hold_to_limit()

    def _components(self) -> list[str]:
        """As they are loaded where all stay: the transformers last, and of the VAE only the half that is used alone."""
        facts = self.config.request.facts
        names = []
        for model in sorted(facts.components(), key=lambda model: model.kind == "dit"):
            parts = [part.name for part in facts.parts() if part.component == model.name]
            names.append(parts[0] if len(parts) == 1 else model.name)
        return names

    def _name(self, which: str) -> str:
        """What records call a component or the half of one."""
        return self.config.request.facts.family.component_of(which).name

    def records(self) -> list[ComponentRecord]:
        """One record per component: parameters, base memory at loading, activation peak over its stages.

        The halves of the VAE, when loaded one after the other, are one component: parameters of both, the larger base.
        """
        activation: dict[str, int] = {}
        for span in self.recorder.spans:
            if span.component and span.kind == "stage":
                activation[span.component] = max(activation.get(span.component, 0), span.activation_bytes)
        records: dict[str, ComponentRecord] = {}
        for c in self._finished:
            copies = self._streamed.get(c.name, Copies())
            before = records.get(c.name, ComponentRecord(c.name, 0, 0, 0, activation.get(c.name, 0)))
            records[c.name] = replace(
                before,
                parameters=before.parameters + c.parameters,
                base_bytes=max(before.base_bytes, c.base_bytes),
                host_bytes=max(before.host_bytes, c.host_bytes),
                streamed_bytes=copies.nbytes,
                copy_seconds=copies.seconds,
                hidden_share=copies.hidden_share,
            )
        return list(records.values())

    def resident(self) -> list[tuple[str, int]]:
        """Components on the device now, with their base memory."""
        return [(f"weights of {name}", loaded.base_bytes) for name, loaded in self._loaded.items()]

    # --- components ----------------------------------------------------------------------------------------------------------

    def _load(self, which: str, parts: Parts) -> None:
        name = self._name(which)
        with self.recorder.span(f"load {name}", kind="load", component=name, part=which) as span:
            component = parts.load(which)
        base = span.end.allocated_bytes - span.start.allocated_bytes
        self._loaded[name] = _Loaded(component, base)
        self._finished.append(ComponentRecord(name, component.parameters, base, component.host_bytes, 0))

    def _use(self, which: str, parts: Parts) -> Component:
        name = self._name(which)
        if name not in self._loaded:
            self._load(which, parts)
        return self._loaded[name].component

    def _done_with(self, name: str) -> None:
        total = self.device.copies()  # since the last component, which came before: this one's
        self._streamed[name] = self._streamed.get(name, Copies()) + (total - self._copied)
        self._copied = total
        if self.config.strategy.offload:
            self._loaded.pop(name).component.release()
            self.device.empty_cache()

    # --- stages --------------------------------------------------------------------------------------------------------------

    def encode_text(self, parts: Parts) -> list[torch.Tensor]:
        """`texts()` -> contexts [L, text_dim] on the device."""

        def make(component: Component) -> list[torch.Tensor]:
            walk = counted_walk(component.walk, self.tell, "encode_text")
            return parts.encode(component, self.texts(), walk)

        return self._handed("encode_text", "text_encoder", parts, make, lambda: parts.stand_in_contexts(self.texts()))

    def _makes(self, which: str) -> bool:
        """Whether a component is used by this rank."""
        if which in ("vae", "vae_decoder"):
            return self.ranks.decodes(self._tiles())
        is_dit = self.config.request.facts.family.component_of(which).kind == "dit"
        return self.ranks.is_first or is_dit or self._is_everyones(which)

    def _is_everyones(self, which: str) -> bool:
        """Whether every rank has a share of a component that it needs all shares of."""
        return which == "text_encoder" and T5_FSDP.of(self.config.strategy)

    def _handed(
        self,
        stage: str,
        which: str,
        parts: Parts,
        make: Callable[[Component], list[torch.Tensor]],
        like: Callable[[], list[torch.Tensor]],
    ) -> list[torch.Tensor]:
        """A stage's results: made here, and handed to the other ranks, or received from the first."""
        component = self._use(which, parts) if self._makes(which) else None
        name = self._name(which)
        with self.recorder.span(stage, kind="stage", component=name):
            made = self.ranks.handed(lambda: make(cast(Component, component)), like, everyone=self._is_everyones(which))
        if component is not None:
            self._done_with(name)
        return made

    def texts(self) -> list[str]:
        """Every prompt, and the negative prompt last where it guides."""
        request = self.config.request
        return [*self.prompts, request.negative_prompt] if request.guided else list(self.prompts)

    def _encode_pictures(self, parts: Parts) -> _Extra:
        """Pictures and source frames -> what the transformer reads of them, in the dtype it would round them to."""
        facts = self.config.request.facts
        if facts.pictures:
            clip = self.encode_image(parts)
            return {"y": self.encode_video(parts), "clip_fea": clip}
        return {"vace_context": self.encode_video(parts)} if facts.takes_source else {}

    def stand_in_pictures(self, parts: Parts) -> _Extra:
        """Uninitialised tensors in place of what `_encode_pictures` gives."""
        facts = self.config.request.facts
        if facts.pictures:
            y = self._stand_in_video(parts)
            return {"y": y, "clip_fea": parts.stand_in_features(len(self.inputs.pictures))}
        return {"vace_context": self._stand_in_video(parts)} if facts.takes_source else {}

    def _stand_in_video(self, parts: Parts) -> torch.Tensor:
        geometry, takes_source = self.inputs.geometry, self.config.request.facts.takes_source
        channels = parts.specs.dit.vace_in_dim if takes_source else geometry.image_channels
        return self.device.empty((channels, *self.inputs.noise_shape[1:]), self._matmul())

    def _matmul(self) -> torch.dtype:
        return PRECISIONS[PRECISION.of(self.config.strategy)].matmul

    def encode_image(self, parts: Parts) -> torch.Tensor:
        def make(component: Component) -> list[torch.Tensor]:
            walk = counted_walk(component.walk, self.tell, "encode_image")
            return [clip_features(component.module, self.device, self.inputs, walk)]  # type: ignore[arg-type]

        like = lambda: [parts.stand_in_features(len(self.inputs.pictures))]  # noqa: E731
        return self._handed("encode_image", "image_encoder", parts, make, like).pop()

    def encode_video(self, parts: Parts) -> torch.Tensor:
        condition = vace_context if self.config.request.facts.takes_source else image_condition

        def make(component: Component) -> list[torch.Tensor]:
            count = Count(self.tell, "encode_video", self._frames_to_encode(), "frames")
            encode_frames = partial(self._encode_frames, component, count)
            return [condition(encode_frames, self.device, self.inputs, self._matmul())]

        return self._handed("encode_video", "vae_encoder", parts, make, lambda: [self._stand_in_video(parts)]).pop()

    def _frames_to_encode(self) -> int:
        """Every tile reads all frames; VACE reads a source twice."""
        inputs = self.inputs
        frames = len(inputs.references) + inputs.frames * (1 if inputs.source is None else 2)
        return frames * (self._tiles() or 1)

    def _tiles(self) -> int | None:
        """Of a picture; None: it is taken whole."""
        tile = self.config.strategy.vae_tile
        return None if tile is None else len(list(grid(*self.inputs.noise_shape[2:], (tile, tile))))

    def _encode_frames(self, component: Component, count: Count, make_chunks: Frames) -> torch.Tensor:
        pieces = lambda: counted(make_chunks(), count, lambda piece: piece.shape[1])  # noqa: E731
        return encode(component, self.device, pieces, self.config.strategy.vae_tile)

    def _turns(self) -> list[Turn]:
        """Which transformer makes which steps; of a single one only those are run that differ."""
        request, family = self.config.request, self.config.request.facts.family
        if len(family.transformers) == 1:
            return [Turn(family.transformers[0].name, 0, self._steps_to_run(), True)]
        owners = [family.turn(t).name for t in self._timesteps()]
        turns, start = [], 0
        for name, steps in groupby(owners):
            stop = start + len(list(steps))
            turns.append(Turn(name, start, stop, stop == request.sample_steps))
            start = stop
        return turns

    def _turns_left(self) -> list[Turn]:
        """Without those whose steps an earlier process made."""
        made = min(self.keeper.steps_kept(index) for index in range(len(self.config.videos())))
        return [turn for turn in self._turns() if made < turn.stop]

    def _timesteps(self) -> list[int]:
        request = self.config.request
        schedule = timesteps_and_sigmas(_solver(request), request.sample_steps, request.sample_shift)
        return [int(t) for t in schedule.timesteps]

    def prepare(self, parts: Parts, contexts: list[torch.Tensor], extra: _Extra, turn: Turn | None = None) -> TurnPlan:
        """Embeds time, text and pictures for a turn's steps and every prompt, and drops the weights that did it."""
        turn = turn or self._turns()[0]
        component, timesteps = self._use(turn.model, parts), self._timesteps()
        timesteps = timesteps if turn.start == 0 and turn.is_last else timesteps[turn.start : turn.stop]
        with self.recorder.span("prepare", kind="stage", component=turn.model):
            conditions = [Condition(context, **extra) for context in contexts]
            times, prepared = transformer(component).prepare(timesteps, conditions, walk=component.walk_embedders)
            contexts.clear()
            del conditions
            self.device.empty_cache()
        negative = prepared.pop() if self.config.request.guided else None
        return TurnPlan(turn, times, prepared, negative)

    def denoise_all(self, parts: Parts, plan: TurnPlan) -> list[torch.Tensor]:
        """One latent per video after the last turn; between several of them a finished one waits on the host."""
        videos, together = self.config.videos(), BATCH_SIZE.of(self.config.strategy)
        latents: list[torch.Tensor] = []
        for first in range(0, len(videos), together):
            numbers = range(first, min(first + together, len(videos)))
            if all(self.keeper.steps_kept(number) >= plan.turn.stop for number in numbers):
                latents += [self.keeper.finished(number) for number in numbers] if plan.turn.is_last else []
                continue
            finished = self._denoise(parts, first, videos[first : first + together], plan)
            while finished:
                latent = finished.pop(0)
                latents.append(latent if len(videos) == 1 else self.device.download(latent))
                del latent
            if plan.turn.is_last:
                self.keeper.finish(dict(zip(numbers, latents[first:], strict=True)), plan.turn.stop, self.device)
        self._done_with(plan.turn.model)
        return latents

    def _denoise(self, parts: Parts, first: int, videos: Sequence[Video], plan: TurnPlan) -> list[torch.Tensor]:
        """From noise, or where the transformer before left off, through the turn's steps -> latents after the last turn.

        first: the number of the first of these videos, which are denoised together.
        """
        component = self._use(plan.turn.model, parts)
        name = _numbered("denoise", first // BATCH_SIZE.of(self.config.strategy))
        with self.recorder.span(name, kind="stage", component=component.name, part="denoise") as span:
            span.videos = len(videos)
            batch = self._waiting.pop(first, None) or [self._begun(first + n, video) for n, video in enumerate(videos)]
            self._steps(batch, component, plan, name)
            latents = [sampling.latent for sampling in batch] if plan.turn.is_last else []
            if plan.turn.is_last:
                self.keeper.leave(range(first, first + len(videos)))
            else:
                self._waiting[first] = batch
            # Its solvers, before the weights go: close() alone keeps their tensors until later on Python 3.12.
            del batch
        return latents

    def _begun(self, number: int, video: Video) -> Sampling:
        request, guide, noise = self.config.request, Guide(), self._noise(video.seed)
        schedule = timesteps_and_sigmas(_solver(request), self._steps_to_run(), request.sample_shift)
        state = self.keeper.begin(number, noise, self.device)
        return Sampling(video, guide, state, solve(_solver(request), guide, noise, schedule, state), state.latent)

    def _steps_to_run(self) -> int:
        steps, in_turn = self.config.request.sample_steps, len(self.config.request.facts.family.transformers) > 1
        if not self.device.repeats_itself or in_turn or steps <= SIMULATED_STEPS:
            return steps
        return SIMULATED_STEPS + (steps - SIMULATED_STEPS) % STEPS_PERIOD

    def _noise(self, seed: int) -> torch.Tensor:
        shape = self.inputs.noise_shape

        def drawn() -> list[torch.Tensor]:
            generator = self.device.generator(seed)
            return [torch.randn(shape, dtype=torch.float32, device=self.device.torch_device, generator=generator)]

        return self.ranks.handed(drawn, lambda: [self.device.empty(shape, torch.float32)]).pop()

    def _steps(self, batch: list[Sampling], component: Component, plan: TurnPlan, stage: str) -> None:
        """Advances videos through a turn, a span for each step; block spans on every `log_interval`-th."""
        interval, total, turn = self.config.measurement.log_interval, self.config.request.sample_steps, plan.turn
        skipped = total - self._steps_to_run()
        together = videos_per_pass(self.config.strategy)
        self.keeper.begin_steps()
        with velocities_of(self.config, self.device, self.inputs, component, plan.negative) as velocities:
            for index in range(min(sampling.state.made for sampling in batch), turn.stop):
                detailed = self.config.measurement.profile_memory and index % interval == 0
                component.observe(partial(self._block_span, component.name) if detailed else None)
                number = index if index < turn.stop - 1 else index + skipped
                before = replace(self.device.exchanged())
                with self.recorder.span(f"step {number}", kind="step", component=component.name) as span:
                    advance([s for s in batch if s.state.made == index], velocities, plan, together)
                if skipped and index == turn.stop - 2:
                    span.repeats = skipped + 1
                    self.device.repeated(skipped, before)
                if self.tell:
                    self.tell(Done(stage, number + 1, total, "steps", turn.stop - 1 - index))
                self.keeper.after_step(index + 1, self.device)
                if self.trace_step:  # where several processes stop together: after what was made is kept
                    self.trace_step()
        component.observe(None)

    def _block_span(self, component: str, group: str) -> AbstractContextManager[object]:
        """`blocks.3` and `vace_blocks.3`, whose projection comes after its main block, as `block 3` and `vace block 3`."""
        name = group.replace("_", " ").replace("blocks.", "block ")
        return self.recorder.span(name, kind="block", component=component)

    def decode_all(self, parts: Parts, latents: list[torch.Tensor], open_sink: OpenSink) -> None:
        count = len(latents)
        left = self.ranks.told([index for index in range(count) if index not in self.whole])
        if not left:
            return
        if not self._makes("vae_decoder"):
            latents.clear()
            self.device.empty_cache()
            return
        component = self._use("vae_decoder", parts)
        for index in range(count):
            if index not in left:
                latents.pop(0)
                continue
            with open_sink(index) if self.ranks.is_first else nullcontext() as sink:
                name = _numbered("decode", index)
                with self.recorder.span(name, kind="stage", component="vae", part="decode"):
                    latent = latents.pop(0)
                    latent = latent if count == 1 else self.device.upload(latent)
                    self._decode(component, latent, sink, name)
                    del latent
                if index == left[-1]:
                    self._done_with("vae")
                if sink is not None:
                    with self.recorder.span(_numbered("save", index), kind="stage", part="save"):
                        sink.finish()

    def _decode(self, component: Component, latent: torch.Tensor, sink: FrameSink | None, stage: str) -> None:
        """Latent -> frames, handed to the sink as they are finished; those of reference pictures are not part of the video."""
        latent = latent[:, len(self.inputs.references) :]
        count, tile = partial(Count, self.tell, stage), self.config.strategy.vae_tile
        for frames in decode(component, self.ranks, self.recorder, latent, tile, count):
            if sink is not None:
                sink.write(frames)


def _solver(request: Request) -> Solver:
    return cast(Solver, request.sample_solver)  # which Request has checked


def _numbered(stage: str, index: int) -> str:
    """`denoise`, `denoise 2`, ...: the first keeps the plain name, so that runs of one prompt compare with all others."""
    return stage if index == 0 else f"{stage} {index + 1}"
