"""The composition root: a RunConfig becomes a RunRecord in a run directory. Simulated runs come from predict.simulate."""

from __future__ import annotations

import json
import secrets
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
import yaml

from wanvram.config import RunConfig
from wanvram.engine.cuda import CudaDevice
from wanvram.engine.devices import CpuDevice, Device
from wanvram.engine.pipeline import FrameSink, OpenSink, Pipeline
from wanvram.errors import InputError, OutOfMemory, OutputError, WanvramError, require
from wanvram.foreign_text import unforeseen
from wanvram.kept_state import KEPT_NAME
from wanvram.knobs import EXPANDABLE_SEGMENTS, PARALLEL_DEGREE, WEIGHTS_IN
from wanvram.machine.allocator_settings import put_in_force
from wanvram.machine.attention_choice import require_package
from wanvram.machine.checks import run_checks
from wanvram.machine.environment import describe_environment
from wanvram.machine.garbage import settled
from wanvram.machine.host import since_process_start
from wanvram.machine.launched import launched
from wanvram.media.inputs import prepare_inputs
from wanvram.output_files import writing
from wanvram.progress_stream import ProgressStream
from wanvram.prompt.extension import prompt_extension
from wanvram.record import ComponentRecord, Failure, Predicted, RunRecord, Times, write_atomically, write_json
from wanvram.recorder.events import EventLog
from wanvram.recorder.interrupts import INTERRUPTED, deferred, forget
from wanvram.recorder.recorder import Recorder
from wanvram.run.attention import attention_of, card_here
from wanvram.run.beside import Beside, Predict
from wanvram.run.bulletin import Ending
from wanvram.run.directory import run_directory
from wanvram.run.in_force import check_in_force, in_force
from wanvram.run.keep import follow, keep_in, kept_before
from wanvram.run.outputs import Outputs
from wanvram.run.post_mortem import largest_alive
from wanvram.run.products import check_products
from wanvram.run.progress import StageProgress
from wanvram.run.resume import Resumption
from wanvram.run.tracing import observed, traced_config, traced_pass
from wanvram.run.weights import choose_weights
from wanvram.run.world import World, together
from wanvram.run_events import TellRun
from wanvram.simulate.timeline import Timeline
from wanvram.weights.folder import GENERATED

__all__ = ["Around", "Output", "assembled", "check_measurement", "device_kind", "execute", "make_device", "run_on"]


@dataclass(frozen=True)
class Output:
    """Where results go: directory None keeps everything in memory. `video` asks for the video or picture, too, in
    `save_file` if that is given."""

    directory: Path | None
    force: bool = False
    video: bool = False
    save_file: Path | None = None
    predicted: Predicted | None = None  # what the plan said, to stand beside what is measured
    debug: bool = False  # the traceback of an error is shown on stderr
    resume: Resumption | None = None  # the interrupted run that goes on in the directory
    keep_defects: bool = True  # what nobody foresaw is a failure in the record; False: it is raised
    world: World | None = None  # the processes of a run on several GPUs

    @property
    def is_first(self) -> bool:
        """Of the run's processes: it writes what is made."""
        return self.world is None or self.world.me.is_first

    def file(self, name: str) -> Path:
        """One that every process writes, in the directory, which there is."""
        assert self.directory is not None
        return self.directory / (name if self.world is None else self.world.file(name))


def execute(
    config: RunConfig,
    output: Output,
    progress: TellRun | None = None,
    watch: Callable[[Recorder], AbstractContextManager[object]] | None = None,
    predict: Predict | None = None,
) -> RunRecord:
    """Runs the pipeline on a real device. A run that fails on the way is returned as a record with a `failure`.

    watch: entered with the recorder for the time of the run, to show it while it goes on. predict: predicts a video that has no
    prediction yet, in a process beside the run. Raises InputError, CheckpointError or DeviceError before anything is loaded.
    """
    check_measurement(config)
    require(
        config.gpus == 1 or output.world is not None,
        f"{config.gpus} GPUs need a process each: start them with torchrun, or with --gpus of wanvram generate or profile",
    )
    config = _seeded(config)
    beside = _beside(config, output, predict)
    # Before the device: its CUDA context would look like somebody else's where the driver does not tell processes apart.
    checks = {"checks": run_checks(output.directory)}
    device = make_device(config)
    environment = describe_environment() | checks
    if isinstance(device, CudaDevice):
        environment["in_force"] = in_force(config, device)
        check_in_force(config, environment["in_force"], device)
    linked = None
    if output.world is not None:
        device.place = config.place(output.world.me.rank)
        linked = output.world.connect(device, config.strategy)
    start = since_process_start()

    def complete(record: RunRecord) -> None:
        record.predicted = output.predicted or (beside.result() if beside else None)
        record.times = Times(start, since_process_start())
        record.notes += [linked] if linked else []

    return run_on(device, config, output, Around(environment, complete, progress, watch))


@dataclass(frozen=True)
class Around:
    """What is around a run. complete: adds to the record what only the caller knows, before it is written."""

    environment: dict[str, object]
    complete: Callable[[RunRecord], None]
    progress: TellRun | None = None
    watch: Callable[[Recorder], AbstractContextManager[object]] | None = None
    timeline: Timeline | None = None


@dataclass(frozen=True)
class Assembled:
    """A pipeline ready to run, and what is to be noted of its inputs."""

    pipeline: Pipeline
    notes: list[str]


def assembled(device: Device, config: RunConfig, recorder: Recorder) -> Assembled:
    """Weights, inputs and prompt extension of a configuration, checked before anything is loaded."""
    simulated = device.kind == "simulated"
    request = config.request
    weights = choose_weights(config.weights, simulated=simulated, task=request.task, seed=request.base_seed)
    real = config.weights not in GENERATED and not simulated
    inputs, notes = prepare_inputs(request, simulated=simulated, real_weights=real)
    extend = prompt_extension(request, simulated=simulated)
    return Assembled(Pipeline(config, device, recorder, weights, inputs, extend=extend), notes)


def run_on(device: Device, config: RunConfig, output: Output, around: Around) -> RunRecord:
    """The pipeline on this device, under the recorder, into the run directory if there is one."""
    recorder = Recorder(device.meter, None, around.progress, around.timeline)
    made = assembled(device, config, recorder)
    pipeline = made.pipeline
    if around.progress:
        pipeline.tell = StageProgress(around.progress, simulated=device.kind == "simulated")
    outputs = _outputs(config, device, output)
    # The run directory is held until the results are written; a signal that comes before or after the run itself waits for its record.
    with deferred(), ExitStack() as held:
        directory = held.enter_context(_directory(output)) if output.directory else None
        resumed = keep_in(directory, pipeline, outputs, output.resume) if directory and outputs else None
        if directory and output.resume and not output.is_first:
            follow(directory, pipeline, output.resume)
        if directory and output.is_first:
            _write_circumstances(directory, config, around.environment)
        if output.world is not None:
            output.world.shared("directory", lambda: True)  # the first one has made it, on its machine
            if directory:
                directory.mkdir(parents=True, exist_ok=True)
            pipeline.trace_step = output.world.step_made  # a run of several is not traced
            output.world.watchdog.last_words = partial(_last_words, config, output, pipeline, around)
        failure, lost = _played(config, output, pipeline, outputs, around)
        record = _record(config, device, pipeline, failure, around.environment)
        record.notes += made.notes + (pipeline.extend.notes if pipeline.extend else []) + lost
        record.notes += [pipeline.keeper.lost] if pipeline.keeper.lost else []
        record.notes += [kept_before(resumed, config.request.sample_steps)] if resumed else []
        record.resumed = resumed
        around.complete(record)
        if output.world is not None:
            together(record, output.world, device.exchanged())
        record.fits = _fits(record)
        if directory:
            _write_results(directory, record, output, around.timeline)
            forget()
        del made, pipeline, outputs
        if directory and config.measurement.is_traced:
            traced = "no trace was written: the run failed"
            if failure is None or failure.kind == "oom":
                traced = _trace(device, config, directory, around, output)
            record.notes.append(traced)
            record.write(directory / "record.json")
    return record


def _played(
    config: RunConfig, output: Output, pipeline: Pipeline, outputs: Outputs | None, around: Around
) -> tuple[Failure | None, list[str]]:
    """The run itself: what ended it early, and what could not be written."""
    unwritten: list[str] = []
    recorder = pipeline.recorder
    with ExitStack() as stack:
        if output.directory:
            recorder.events = stack.enter_context(_event_log(output, unwritten))
        if around.watch:
            stack.enter_context(around.watch(recorder))
        lost = stack.enter_context(
            observed(config.measurement, output.file("snapshot.pickle") if output.directory else None)
        )
        play = _run_recorded if output.keep_defects else _run
        failure = play(pipeline, _sinks(pipeline, outputs, video=output.video and output.is_first), output)
    if unwritten and failure is None:
        failure = Failure("error", unwritten[0])
    return failure, lost


def _last_words(config: RunConfig, output: Output, pipeline: Pipeline, around: Around, ending: Ending) -> None:
    """The record of a process whose main thread hangs, as the watchdog's thread writes it."""
    pipeline.recorder.abandon_open()
    record = _record(config, pipeline.device, pipeline, ending.failure, around.environment)
    record.fits = _fits(record)
    if output.directory:
        record.write(output.file("record.json"))


def _directory(output: Output) -> AbstractContextManager[Path]:
    """Held for this run; that of a run that goes on is held already, and that of several processes by the first of them."""
    assert output.directory is not None
    if output.resume or not output.is_first:
        return nullcontext(output.directory)
    return run_directory(output.directory, force=output.force)


def _trace(device: Device, config: RunConfig, directory: Path, around: Around, output: Output) -> str:
    """In a pass of its own, when what was measured is written: what became of it."""
    if device.kind == "simulated":
        return "no trace was written: nothing runs on the simulated device; --device cuda or cpu traces"
    device.empty_cache()
    pipeline = assembled(device, traced_config(config), Recorder(device.meter, None, None)).pipeline

    def play(pipeline: Pipeline) -> Failure | None:
        return _run_recorded(pipeline, lambda _: nullcontext(), output)

    return traced_pass(config, pipeline, directory, around.progress, play)


def _beside(config: RunConfig, output: Output, predict: Predict | None) -> Beside | None:
    """Only of a whole video: a run that is measured for its own sake has the machine for itself."""
    known = output.resume or output.predicted or output.world
    if predict is None or known or not output.video or config.weights == "tiny" or device_kind(config) != "cuda":
        return None
    return Beside(config, predict)


def _seeded(config: RunConfig) -> RunConfig:
    if config.request.base_seed >= 0:
        return config
    return replace(config, request=replace(config.request, base_seed=secrets.randbelow(2**31)))


def _write_circumstances(directory: Path, config: RunConfig, environment: dict[str, object]) -> None:
    text = yaml.safe_dump(config.to_dict(), allow_unicode=True, sort_keys=False)
    write_atomically(directory / "config.yaml", text)
    write_json(directory / "environment.json", environment)


def _write_results(directory: Path, record: RunRecord, output: Output, timeline: Timeline | None) -> None:
    """What was kept of a run that ended well goes last."""
    record.write(output.file("record.json"))
    if not output.is_first:
        return
    if timeline:
        write_atomically(
            directory / "timeline.json", json.dumps(timeline.record().to_json(), ensure_ascii=False) + "\n"
        )
    if record.failure is None:
        with writing(directory / KEPT_NAME):
            (directory / KEPT_NAME).unlink(missing_ok=True)


def _outputs(config: RunConfig, device: Device, output: Output) -> Outputs | None:
    """Checked before the run directory is made, so that a refused run leaves nothing behind."""
    if not output.video or output.directory is None or not output.is_first:
        return None
    if device.kind != "simulated":
        force = output.force or output.resume is not None
        return Outputs(config, output.directory, device.name, output.save_file, force)
    if output.save_file is not None:
        raise InputError(f"--save_file {output.save_file}: nothing is generated on the simulated device")
    return None


def check_measurement(config: RunConfig) -> None:
    """InputError where the device cannot give what is to be recorded."""
    if config.measurement.snapshot and device_kind(config) != "cuda":
        raise InputError(
            "logging.snapshot: an allocator snapshot exists on CUDA only; set it to false or use --device cuda "
            "(of a predicted run: wanvram estimate --config FILE.yaml --memory_viz FILE.pickle)"
        )
    require(
        PARALLEL_DEGREE.of(config.strategy) in (1, config.gpus),
        f"{PARALLEL_DEGREE.name}: {PARALLEL_DEGREE.of(config.strategy)} GPUs, and no sizes are chosen for them; give "
        "cfg_size, ring_size and ulysses_size, whose product it is",
    )
    require(
        config.gpus == 1 or not config.measurement.is_traced,
        "logging.trace: a run on several GPUs is not traced; set it to false, or trace the same run on one GPU",
    )


def device_kind(config: RunConfig) -> str:
    """cuda, cpu or simulated; `auto` is CUDA when there is one, else simulated."""
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "simulated"
    return config.device


def make_device(config: RunConfig) -> Device:
    """The real device a configuration asks for: of several GPUs this process's own."""
    kind = device_kind(config)
    if kind == "cuda":
        # The commands did it before importing torch; a program may not have.
        put_in_force(EXPANDABLE_SEGMENTS.of(config.strategy))
        device = CudaDevice(launched().local_rank, limit_bytes=config.memory_limit_bytes)
        card = card_here(config, device)
        check_products(config, card.name, card.capability)
        device.attention = attention_of(config, card, running=True)
        require_package(device.attention)
        return device
    if kind == "cpu":
        if config.weights == "random":
            raise InputError(
                "full-size random weights on the CPU would take hours; use --weights tiny, or --device simulated"
            )
        return CpuDevice()
    raise AssertionError("simulated runs come from predict.simulate")


def _sinks(pipeline: Pipeline, outputs: Outputs | None, *, video: bool) -> OpenSink:
    """What takes the frames: files, what stands for them where nothing is written, or nothing."""

    def open_sink(index: int) -> AbstractContextManager[FrameSink | None]:
        if outputs is not None:
            return outputs.open(index, pipeline.prompts[outputs.videos[index].prompt])
        return nullcontext(pipeline.device.video_sink() if video else None)

    return open_sink


@contextmanager
def _event_log(output: Output, unwritten: list[str]) -> Iterator[EventLog]:
    """What cannot be written at the end is told in `unwritten`: the record must not be lost for it."""
    events = EventLog(output.file("memory_events.json"), goes_on=output.resume is not None)
    try:
        yield events
    finally:
        try:
            events.close()
        except OutputError as error:
            unwritten.append(str(error))


def _run_recorded(pipeline: Pipeline, open_sink: OpenSink, output: Output) -> Failure | None:
    """As `_run`, and what nobody foresaw (PyTorch, the disk, the machine's memory) is a failure that is recorded, too."""
    try:
        return _run(pipeline, open_sink, output)
    except WanvramError:
        raise
    except Exception as error:
        if output.debug:
            ProgressStream(sys.stderr).write(traceback.format_exc())
        return _ended(pipeline, Failure("error", unforeseen(error, "the run", "--debug")), error, output.world)


def _run(pipeline: Pipeline, open_sink: OpenSink, output: Output) -> Failure | None:
    """Runs to the end, or says what stopped it and keeps what was recorded."""
    cause: BaseException
    try:
        with deferred(), settled(), pipeline.device.session():
            pipeline.run(open_sink)
        return None
    except OutOfMemory as error:
        cause = error
        failure = Failure(
            "oom",
            str(error),
            requested_bytes=error.requested_bytes,
            allocated_bytes=error.allocated_bytes,
            reserved_bytes=error.reserved_bytes,
            alive=largest_alive(pipeline),
        )
    except KeyboardInterrupt as error:
        cause = error
        failure = Failure("interrupted", str(error) or INTERRUPTED)
    except WanvramError as error:
        if error.exit_code == 2:
            raise
        if output.debug:
            ProgressStream(sys.stderr).write(traceback.format_exc())
        cause = error
        failure = Failure("error", str(error))
    return _ended(pipeline, failure, cause, output.world)


def _ended(pipeline: Pipeline, failure: Failure, cause: BaseException, world: World | None) -> Failure:
    """Of several processes the others hear of it before this one asks its device for anything, which may hang now."""
    if world is not None:
        failure = world.failed(pipeline.recorder.located(failure), cause)
    return pipeline.recorder.finish_open(failure)


def _record(
    config: RunConfig, device: Device, pipeline: Pipeline, failure: Failure | None, environment: dict[str, object]
) -> RunRecord:
    spans = [span for stage in pipeline.recorder.spans for span in stage.walk()]
    rss = max((span.host_rss_bytes or 0 for span in spans), default=0)
    pinned = max((span.pinned_bytes for span in spans), default=0)
    return RunRecord(
        device=device.name,
        simulated=device.kind == "simulated",
        config=config.to_dict(),
        fits=None,
        budget_bytes=config.memory_limit_bytes,
        components=_components(pipeline),
        stages=pipeline.recorder.spans,
        attention=device.attention,
        environment=environment,
        host={"peak_rss_bytes": rss, "pinned_bytes": pinned},
        failure=failure,
        notes=_notes(config, pipeline)
        + ([device.attention.note] if device.attention and device.attention.note else []),
    )


def _components(pipeline: Pipeline) -> list[ComponentRecord]:
    """Those of the pipeline, after the prompt extender, which came and went before them."""
    extender = pipeline.extend.record if pipeline.extend else None
    if extender is None:
        return pipeline.records()
    stages = [s for s in pipeline.recorder.spans if s.component == extender.name and s.kind == "stage"]
    activation = max((stage.activation_bytes for stage in stages), default=0)
    return [replace(extender, activation_bytes=activation), *pipeline.records()]


def _fits(record: RunRecord) -> bool | None:
    """Against the budget given, in device bytes, on every GPU; None when there was none."""
    if record.budget_bytes is None:
        return None
    if record.failure is not None:
        return False if record.failure.kind == "oom" else None
    return all((s.peak.device_bytes or s.peak.reserved_bytes) <= record.budget_bytes for s in record.all_stages())


def _notes(config: RunConfig, pipeline: Pipeline) -> list[str]:
    notes = config.notes()
    generated, simulated = config.weights in GENERATED, pipeline.device.kind == "simulated"
    if generated:
        notes.append(f"{config.weights} weights know no language: text went through a byte-level stand-in tokenizer")
    elif simulated:
        notes.append(
            f"the checkpoint {config.weights} is not read on the simulated device; text is tokenised byte by byte"
        )
    if generated and not simulated and WEIGHTS_IN.of(config.strategy) == "disk":
        notes.append("generated weights are on no disk: they are made again in every pass, so times mean nothing")
    if config.gpu and not simulated:
        notes.append(f"gpu: {config.gpu} has no effect on {pipeline.device.name}; it names the card to simulate")
    return notes
