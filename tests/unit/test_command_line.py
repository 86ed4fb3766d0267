"""A configuration as a command: parsed again it is the same configuration, whatever it holds."""

from __future__ import annotations

import shlex
from argparse import ArgumentParser
from dataclasses import replace

from hypothesis import assume, given
from hypothesis import strategies as st

from wanvram.cli import generate, plan
from wanvram.cli.common import memory_limit
from wanvram.cli.flags import config_from_flags
from wanvram.command_line import generate_command, plan_command
from wanvram.config import Request, RunConfig, Strategy
from wanvram.specs import DIT
from wanvram.tasks import TASKS
from wanvram.units import GIB, MIB, exact, parse_memory

TEXT = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), min_size=1, max_size=20)
FILES = st.text(st.sampled_from("abc -'\"$*é."), min_size=1, max_size=12)


def parsed(command: str) -> RunConfig:
    """As `wanvram generate` reads it."""
    words = shlex.split(command)
    assert words[:2] == ["wanvram", "generate"]
    parser = ArgumentParser(allow_abbrev=False)
    generate.prepare_parser(parser)
    args = parser.parse_args(words[2:])
    limit = memory_limit(args)
    return config_from_flags(args, device=args.device, weights=args.weights, gpu=args.gpu, memory_limit_bytes=limit)


@st.composite
def requests(draw: st.DrawFn) -> Request:
    task = draw(st.sampled_from(sorted(TASKS)))
    kind = TASKS[task].kind
    frames = 1 if kind == "t2i" else 4 * draw(st.integers(1, 60)) + 1
    given_: dict[str, object] = {"size": draw(st.sampled_from(TASKS[task].sizes)), "frame_num": frames}
    optional = {
        "sample_steps": st.integers(1, 99),
        "sample_shift": st.floats(0.5, 20),
        "sample_guide_scale": st.floats(-9, 9),
        "sample_solver": st.sampled_from(("unipc", "dpm++")),
        "base_seed": st.integers(-1, 2**40),
        "negative_prompt": st.just("") | TEXT,
        "use_prompt_extend": st.booleans(),
        "prompt_extend_target_lang": st.sampled_from(("zh", "en")),
    }
    media: dict[str, st.SearchStrategy[object]] = {"prompt": TEXT}
    if kind == "i2v":
        media["image"] = FILES
    if kind == "flf2v":
        media |= {"first_frame": FILES, "last_frame": FILES}
    for name, values in (optional if draw(st.booleans()) else {}).items():
        given_[name] = draw(values)
    for name, values in media.items():
        given_[name] = draw(values)
    if kind == "vace":
        given_ |= {"src_video": draw(FILES), "src_ref_images": tuple(draw(st.lists(FILES, max_size=3)))}
    # A text that is -- and nothing else is refused at the command line; several names are joined by commas.
    assume("--" not in given_.values() and given_.get("src_ref_images") != ("--",))
    return Request.for_task(task, **given_)


@st.composite
def strategies(draw: st.DrawFn, request: Request) -> Strategy:
    streamed = draw(st.booleans())
    precision = draw(st.sampled_from(("fp16", "bf16", "fp32")))
    blocks = DIT[TASKS[request.task].dit].block_count
    flags = ("offload", "t5_cpu", "attention_slicing", "expandable_segments", "gradient_checkpointing")
    return Strategy(
        precision=precision,
        load_strategy="block" if streamed else "full",
        rows_per_chunk=draw(st.none() | st.integers(1, 9999)),
        cfg=draw(st.sampled_from(("sequential", "joint"))),
        weights_in=draw(st.sampled_from(("pinned", "pageable", "disk"))) if streamed else "pinned",
        resident_blocks=draw(st.integers(0, blocks)) if streamed else 0,
        weight_storage=draw(st.sampled_from(("same", "fp8"))) if precision != "fp32" else "same",
        product_precision=draw(st.sampled_from(("same", "fp8"))) if precision == "bf16" else "same",
        vae_tile=draw(st.none() | st.integers(8, 90)),
        vae_precision=draw(st.sampled_from(("fp32", "bf16", "fp16"))),
        **{name: draw(st.booleans()) for name in flags},
    )


@st.composite
def configs(draw: st.DrawFn) -> RunConfig:
    request = draw(requests())
    return RunConfig(
        "x",
        "",
        draw(st.sampled_from(("auto", "cuda", "simulated"))),
        request,
        draw(strategies(request)),
        weights=draw(st.just("tiny") | FILES),
        gpu=draw(st.none() | st.sampled_from(("h200", "rtx4060"))),
        memory_limit_bytes=draw(st.none() | st.integers(MIB, 200 * GIB) | st.integers(1, 80).map(lambda n: n * GIB)),
    )


@given(config=configs())
def test_the_command_of_a_configuration_means_that_configuration(config: RunConfig) -> None:
    read = parsed(generate_command(config))
    assert replace(read, name="x", description="") == config


def test_what_is_not_given_is_a_placeholder() -> None:
    config = RunConfig("x", "", "auto", Request.for_task("flf2v-14B"))
    words = shlex.split(generate_command(config))
    for flag, placeholder in (
        ("--ckpt_dir", "DIR"),
        ("--prompt", "PROMPT"),
        ("--first_frame", "FIRST_FRAME"),
        ("--last_frame", "LAST_FRAME"),
    ):
        assert words[words.index(flag) + 1] == placeholder


@given(request=requests(), precision=st.sampled_from(("fp16", "bf16")), storage=st.sampled_from(("same", "fp8")))
def test_the_command_that_plans_a_request_means_that_request(request: Request, precision: str, storage: str) -> None:
    strategy = Strategy(precision=precision, weight_storage=storage, load_strategy="block", resident_blocks=3)
    words = shlex.split(plan_command(request, strategy, vram="8GiB", ram=None, gpu="rtx4060"))
    parser = ArgumentParser(allow_abbrev=False)
    plan.prepare_parser(parser)
    args = parser.parse_args(words[2:])
    config = config_from_flags(args, device=None, weights=None, gpu=args.gpu, memory_limit_bytes=None)
    assert (config.request, config.strategy.precision, config.strategy.weight_storage) == (request, precision, storage)
    assert (args.vram, args.ram, args.gpu) == ("8GiB", None, "rtx4060")


@given(count=st.integers(MIB, 2**50))
def test_an_exact_amount_is_read_as_exactly_that(count: int) -> None:
    assert parse_memory(exact(count)) == count
