"""THE table of knobs: one row for every choice of how to run. No torch.

A row says what a knob is called, which values it takes and why others are refused, what it changes, whether the result stays the
same, and what to try when memory is short. Flags, keys and types of the YAML, checks, what the planner asks for again, advice and
docs/strategy.md follow from it; `config.Strategy` has a field for each row. Code reads and changes a strategy by the row itself:
`VAE_TILE.of(strategy)`, `VAE_TILE.set(strategy, 52)`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from wanvram.errors import InputError, require

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")
S = TypeVar("S", bound="DataclassInstance")

# 8192 rows x 5120 already fill an H200's matrix units: 1.93 ms for 9450 rows against 1.86 expected from 75600.
TARGET_ROWS = 8192
# Latent pixels, those whose cuDNN workspaces were measured; smaller tiles have larger halos in proportion: less memory, more time.
TILES = (80, 52, 40, 30, 20)
MAX_VIDEOS = 64  # of one run: each is 5 MiB of embedded text on the device at 14B, for the whole of denoising
MAX_GPUS = 128  # more than any host has; one process each
WEIGHT_HOMES = ("pinned", "pageable", "disk")  # the fastest first
MODEL, OPTIMIZATION = "model_config", "optimization"  # sections of the YAML
RUN = "run"  # among what a knob touches: every component and what is between them


@dataclass(frozen=True)
class Situation:
    """What decides which smaller values there are. tokens: of the video. edge: the frame's longer side, in latent pixels.

    half: the 16-bit precision in which the card computes fast. streams: of one forward; a source video has its own.
    """

    tokens: int
    edge: int
    half: str = "bf16"
    streams: int = 1


@dataclass(frozen=True)
class Rule:
    """What must hold of (value, strategy), and why other values are refused: `{value}` stands for the one that was given."""

    holds: Callable[[Any, Any], bool]
    why: str


@dataclass(frozen=True, eq=False)
class Knob(Generic[T]):
    """One choice. name: Strategy's field, the key of the YAML and, unless other_flag says otherwise, the flag.

    choices: all values, of a knob that is text. touches: components whose memory or time it changes, the halves of the VAE
    apart, last the one it is for. lossless: the result is that of the plain resident run of the same precision, up to the
    rounding of reordered sums; a knob that is not is left to the user. official: what the official command line assumes
    where the flag is absent; a command always says such a knob. smaller: (value now, situation) -> values worth trying when
    memory is short. absent: what None means, in words. kept: loses nothing, but what the user says of it the planner keeps.
    """

    name: str
    default: T
    help: str
    section: str = OPTIMIZATION
    choices: tuple[str, ...] = ()
    touches: tuple[str, ...] = ()
    lossless: bool = True
    official: T | None = None
    smaller: Callable[[T, Situation], tuple[T, ...]] = lambda now, situation: ()
    rules: tuple[Rule, ...] = ()
    absent: str = ""
    other_flag: str = ""
    kept: bool = False

    @property
    def flag(self) -> str:
        return f"--{self.other_flag or self.name}"

    def of(self, strategy: object) -> T:
        value: T = getattr(strategy, self.name)
        return value

    def set(self, strategy: S, value: T) -> S:
        """The same strategy with that value. Raises InputError where it is refused."""
        return replace(strategy, **{self.name: value})

    def asked(self, value: T) -> str:
        """As flags."""
        return f"{self.flag} {value}"

    def shown(self, value: T) -> str:
        return self.absent if value is None else str(value)

    def differs(self, strategy: object) -> bool:
        """From the plain resident run."""
        return self.of(strategy) != self.default

    def is_said(self, strategy: object) -> bool:
        """Whether a command has to say it: where the command line assumes something else, and where it is not the default."""
        return self.official is not None or self.differs(strategy)

    def check(self, strategy: object) -> None:
        """Raises InputError that begins with the name and says why the strategy's value is refused."""
        value = self.of(strategy)
        if self.choices:
            allowed = f"{', '.join(self.choices[:-1])} or {self.choices[-1]}"
            require(value in self.choices, f"{self.name}: '{value}'; choose {allowed}")
        said = str(value).lower() if isinstance(value, bool) else value
        for rule in self.rules:
            require(rule.holds(value, strategy), f"{self.name}: {rule.why.format(value=said)}")


@dataclass(frozen=True)
class Change:
    """Values that are set together."""

    values: Mapping[Knob[Any], Any]

    def on(self, strategy: S) -> S:
        return replace(strategy, **{knob.name: value for knob, value in self.values.items()})


# --- why values are refused, and what is smaller -----------------------------------------------------------------------------


def _at_least(least: int, absent: str = "") -> Rule:
    return Rule(lambda value, _: value is None or value >= least, f"{{value}} must be at least {least}{absent}")


def _at_most(most: int, what: str) -> Rule:
    return Rule(lambda value, _: value <= most, f"{{value}}; at most {most} {what}")


def _streamed_only(plain: object) -> Rule:
    why = "has no meaning with load_strategy full; use load_strategy block"
    return Rule(lambda value, strategy: value == plain or is_streamed(strategy), why)


_AS_MANY = Rule(
    lambda value, strategy: value == 1 or sizes_together(strategy) in (1, value),
    "{value}, but cfg_size, ring_size and ulysses_size together are of another number; give one of them",
)
_ON_ONE_HOST = Rule(
    lambda _, strategy: sizes_together(strategy) <= MAX_GPUS,
    f"{{value}}, and cfg_size x ring_size x ulysses_size are more than {MAX_GPUS} GPUs; at most {MAX_GPUS} make a video together",
)
_AMONG_SEVERAL = Rule(
    lambda value, strategy: not value or gpus(strategy) > 1,
    "{value}; several GPUs share weights, and this run has one; give --gpus, ulysses_size, ring_size or cfg_size too",
)
_EXCHANGES = Rule(
    lambda value, strategy: value == "auto" or gpus(strategy) > 1,
    "{value} is how several GPUs exchange, and this run has one; use auto",
)
_NOT_ON_THE_CPU = Rule(
    lambda value, strategy: not (value and T5_CPU.of(strategy)),
    "{value}; GPUs share what they compute with, and t5_cpu has T5 on the CPU; choose one of them",
)
_WITHIN_THE_BATCH = Rule(
    lambda value, strategy: value is None or value <= BATCH_SIZE.of(strategy),
    "{value} videos cannot pass a block together where fewer are denoised together; give a batch_size of at least that many",
)
_TWO_PASSES = Rule(lambda value, _: value <= 2, "{value} GPUs cannot share two guidance passes; give 1 or 2")
_ONE_PASS_EACH = Rule(
    lambda value, strategy: value == 1 or CFG.of(strategy) == "sequential",
    "{value} GPUs make a guidance pass each, and cfg joint takes both through every block; use cfg sequential",
)
_WHOLE_HEADS = Rule(
    lambda value, strategy: value == 1 or not ATTENTION_SLICING.of(strategy),
    "{value} GPUs attend for all of their heads at once; attention_slicing must be false",
)
_NO_FP8_OF_FP32 = Rule(
    lambda value, strategy: value == "same" or PRECISION.of(strategy) != "fp32",
    "fp8 is for bf16 and fp16; precision fp32 asks for full precision",
)
_FP8_TO_BF16 = Rule(
    lambda value, strategy: value == "same" or PRECISION.of(strategy) == "bf16",
    "fp8 gives its results in bf16; use precision bf16, or product_precision same",
)

_ONE_STREAM_ALONE = (
    Rule(
        lambda value, strategy: value == "device" or not ATTENTION_SLICING.of(strategy),
        "{value} makes keys and values of all heads in one go, and attention_slicing those of some; use one of the two",
    ),
    Rule(
        lambda value, strategy: (
            value == "device" or (CFG.of(strategy) == "sequential" and videos_per_pass(strategy) == 1)
        ),
        "{value} takes one stream at a time through the blocks; use cfg sequential and a micro_batch_size of 1",
    ),
    Rule(
        lambda value, strategy: value == "device" or not any(knob.differs(strategy) for knob in _of_several_gpus()),
        "{value} is for one GPU; several share the rows of the stream already",
    ),
)

_HALF_ONLY = Rule(
    lambda value, strategy: value in ("auto", "efficient") or PRECISION.of(strategy) != "fp32",
    "{value} computes 16-bit numbers only, and precision is fp32; use auto or efficient",
)


def _only(value: T) -> Callable[[T, Situation], tuple[T, ...]]:
    return lambda now, situation: () if now == value else (value,)


def _half(now: str, situation: Situation) -> tuple[str, ...]:
    return (situation.half,) if now == "fp32" else ()


def _stream_elsewhere(now: str, situation: Situation) -> tuple[str, ...]:
    return ("pinned",) if now == "device" and situation.streams == 1 else ()


def _of_several_gpus() -> tuple[Knob[Any], ...]:
    return CFG_SIZE, PARALLEL_DEGREE, ULYSSES_SIZE, RING_SIZE, DIT_FSDP


def _half_as_many(now: int, _: Situation) -> tuple[int, ...]:
    return tuple(count for count in dict.fromkeys((0, now // 2)) if count < now)


def _fewer_streams(now: int | None, _: Situation) -> tuple[int, ...]:
    return tuple(dict.fromkeys(count for count in (1, (now or 1) // 2) if 1 <= count < (now or 1)))


def _half_the_rows(now: int | None, situation: Situation) -> tuple[int, ...]:
    rows = chunk_rows(situation.tokens, now)
    return (rows // 2,) if rows > 1 else ()


def _smaller_tiles(now: int | None, situation: Situation) -> tuple[int, ...]:
    return tuple(tile for tile in TILES if tile < min(now or situation.edge, situation.edge))


def chunk_rows(tokens: int, asked: int | None) -> int:
    """Rows of the sequence that go through a block's row-wise work at once: `asked`, or equal chunks near TARGET_ROWS."""
    if asked is not None:
        return asked
    return math.ceil(tokens / max(1, round(tokens / TARGET_ROWS)))


# --- the table: two lines a row ----------------------------------------------------------------------------------------------

_STREAMED_PARTS = ("text_encoder", "image_encoder", "dit")
_VAE = ("vae_encoder", "vae_decoder")

# fmt: off
PRECISION: Knob[str] = Knob(
    "precision", "bf16", "of the transformer's matrices (default: fp16, fp32 on the CPU)", MODEL, ("fp32", "fp16", "bf16"),
    touches=("vae_encoder", "dit"), lossless=False, official="fp16", smaller=_half)
LOAD_STRATEGY = Knob(
    "load_strategy", "full", "full: resident while in use; default: block (streamed)", MODEL, ("full", "block"),
    touches=_STREAMED_PARTS, official="block", smaller=_only("block"))
OFFLOAD = Knob(
    "offload", False, "components leave the GPU after use (default: True on one GPU)", MODEL,
    touches=(RUN,), official=True, smaller=_only(True), other_flag="offload_model")
T5_CPU: Knob[bool] = Knob(
    "t5_cpu", False, "keep T5 on the CPU (default: False)", MODEL,
    touches=("text_encoder",), smaller=_only(True))
ATTENTION_SLICING: Knob[bool] = Knob(
    "attention_slicing", False, "attend in groups of heads (default: False)",
    touches=("dit",), smaller=_only(True))
ATTENTION = Knob(
    "attention_backend", "auto", "what computes the transformer's attention (default: auto, the fastest that is known)",
    choices=("auto", "cudnn", "flash", "efficient", "fa4"), touches=("dit",), kept=True, rules=(_HALF_ONLY,),
    other_flag="attention")
ROWS_PER_CHUNK: Knob[int | None] = Knob(
    "rows_per_chunk", None, f"rows of the sequence per chunk (default: near {TARGET_ROWS})", absent="chosen by size",
    touches=("dit",), smaller=_half_the_rows, rules=(_at_least(1, " (or absent: chosen by size)"),))
CFG: Knob[str] = Knob(
    "cfg", "sequential", "how both guidance passes run (default: sequential)", choices=("sequential", "joint"),
    touches=("dit",), smaller=_only("sequential"))
WEIGHTS_IN = Knob(
    "weights_in", "pinned", "where streamed blocks wait (default: pinned)", choices=WEIGHT_HOMES,
    touches=_STREAMED_PARTS, rules=(_streamed_only("pinned"),))
RESIDENT_BLOCKS = Knob(
    "resident_blocks", 0, "blocks of the transformer that stay on the GPU (default: 0)",
    touches=("dit",), smaller=_half_as_many, rules=(_at_least(0), _streamed_only(0)))
RESIDUAL_IN = Knob(
    "residual_in", "device", "where the residual stream waits: device, or pinned RAM by row chunks (default: device)",
    choices=("device", "pinned"), touches=("dit",), smaller=_stream_elsewhere, rules=_ONE_STREAM_ALONE)
WEIGHT_STORAGE = Knob(
    "weight_storage", "same", "fp8: half the transformer's weights, lossy", choices=("same", "fp8"),
    touches=("dit",), lossless=False, smaller=_only("fp8"), rules=(_NO_FP8_OF_FP32,))
PRODUCT_PRECISION = Knob(
    "product_precision", "same", "fp8: the transformer's products in 8 bits, faster, lossy", choices=("same", "fp8"),
    touches=("dit",), lossless=False, rules=(_FP8_TO_BF16,))
VAE_TILE: Knob[int | None] = Knob(
    "vae_tile", None, "edge of the VAE's tiles in latent pixels, lossless (default: none)", absent="none (whole frames)",
    touches=_VAE, smaller=_smaller_tiles, rules=(_at_least(8, " (or absent)"),))
VAE_PRECISION = Knob(
    "vae_precision", "fp32", "default: fp32; others are lossy", choices=("fp32", "bf16", "fp16"),
    touches=_VAE, lossless=False, smaller=_half)
EXPANDABLE_SEGMENTS = Knob(
    "expandable_segments", False, "the allocator's expandable segments (default: False)",
    touches=(RUN,), smaller=_only(True))
GRADIENT_CHECKPOINTING = Knob("gradient_checkpointing", False, "accepted; has no effect without gradients")
BATCH_SIZE: Knob[int] = Knob(
    "batch_size", 1, "videos denoised together: prompts, or seeds of the one prompt (default: 1)",
    touches=("vae_decoder", "dit"), rules=(_at_least(1), _at_most(MAX_VIDEOS, "videos in one run")), kept=True)
MICRO_BATCH_SIZE: Knob[int | None] = Knob(
    "micro_batch_size", None, "of these, videos that pass a block before the next one comes (default: 1)", absent="1",
    touches=("dit",), smaller=_fewer_streams, rules=(_at_least(1), _WITHIN_THE_BATCH), kept=True)
CFG_SIZE = Knob(
    "cfg_size", 1, "GPUs that share the guidance passes: 1 or 2 (default: 1)", touches=("vae_decoder", "dit"),
    rules=(_at_least(1), _TWO_PASSES, _ONE_PASS_EACH), kept=True)
PARALLEL_DEGREE = Knob(
    "parallel_degree", 1, "GPUs that make the videos together, in sizes that are chosen (default: 1)",
    touches=("vae_decoder", "dit"), other_flag="gpus", kept=True,
    rules=(_at_least(1), _at_most(MAX_GPUS, "GPUs make a video together"), _AS_MANY))
ULYSSES_SIZE = Knob(
    "ulysses_size", 1, "GPUs that share rows, and heads while they attend (default: 1)", touches=("vae_decoder", "dit"),
    rules=(_at_least(1), _ON_ONE_HOST, _WHOLE_HEADS), kept=True)
RING_SIZE = Knob(
    "ring_size", 1, "GPUs that share rows, and pass keys and values round (default: 1)", touches=("vae_decoder", "dit"),
    rules=(_at_least(1), _ON_ONE_HOST, _WHOLE_HEADS), kept=True)
EXCHANGE = Knob(
    "exchange_by", "auto", "how GPUs exchange: by copies out of each other's memory, or nccl (default: auto, copies where they can)",
    choices=("auto", "copies", "nccl"), touches=(RUN,), rules=(_EXCHANGES,), kept=True)
T5_FSDP = Knob(
    "t5_fsdp", False, "each GPU keeps a share of T5 (default: False)",
    touches=("text_encoder",), smaller=_only(True), rules=(_AMONG_SEVERAL, _NOT_ON_THE_CPU), kept=True)
DIT_FSDP = Knob(
    "dit_fsdp", False, "each GPU keeps a share of the transformer (default: False)",
    touches=("dit",), smaller=_only(True), rules=(_AMONG_SEVERAL,), kept=True)

# In the order of Strategy's fields, which is that of flags, keys and commands.
TABLE: tuple[Knob[Any], ...] = (
    PRECISION, LOAD_STRATEGY, OFFLOAD, T5_CPU, ATTENTION_SLICING, ATTENTION, ROWS_PER_CHUNK, CFG, WEIGHTS_IN,
    RESIDENT_BLOCKS, RESIDUAL_IN, WEIGHT_STORAGE, PRODUCT_PRECISION, VAE_TILE, VAE_PRECISION, EXPANDABLE_SEGMENTS,
    GRADIENT_CHECKPOINTING, BATCH_SIZE, MICRO_BATCH_SIZE, CFG_SIZE, PARALLEL_DEGREE, ULYSSES_SIZE, RING_SIZE, EXCHANGE,
    T5_FSDP, DIT_FSDP)
# fmt: on

SIZES = (ULYSSES_SIZE, RING_SIZE, CFG_SIZE)  # whose product is the number of GPUs


def named(name: str) -> Knob[Any] | None:
    return next((knob for knob in TABLE if knob.name == name), None)


def touching(component: str) -> tuple[Knob[Any], ...]:
    """Which choices change a component's memory or time; everything else may differ without asking again."""
    return tuple(knob for knob in TABLE if component in knob.touches)


def planned() -> tuple[Knob[Any], ...]:
    """What the planner decides: all that loses nothing and is a component's. What touches the whole run costs nothing."""
    return tuple(knob for knob in TABLE if knob.lossless and knob.touches and RUN not in knob.touches and not knob.kept)


def lossy() -> tuple[Knob[Any], ...]:
    """What changes the result, and so only the user decides."""
    return tuple(knob for knob in TABLE if not knob.lossless)


def lossy_notes(strategy: object) -> list[str]:
    """What was asked for beside the precision and changes the result: to be shown wherever there is one."""
    found = [knob for knob in lossy() if knob.official is None and knob.differs(strategy)]
    return [f"{knob.name} {knob.of(strategy)} is lossy and was asked for" for knob in found]


def asked() -> tuple[Knob[Any], ...]:
    """What a plan is made for and never changes: what is lossy, how many videos are made together, and what attends."""
    return tuple(knob for knob in TABLE if not knob.lossless or knob.kept)


def smaller_values(strategy: S, situation: Situation) -> Iterator[tuple[Knob[Any], Any]]:
    """Every single change that can lower a peak, is not made yet and not refused."""
    for knob in TABLE:
        for value in knob.smaller(knob.of(strategy), situation):
            try:
                knob.set(strategy, value)
            except InputError:
                continue
            yield knob, value


# --- changes that are made together ------------------------------------------------------------------------------------------


def is_streamed(strategy: object) -> bool:
    return LOAD_STRATEGY.of(strategy) == "block"


def gpus(strategy: object) -> int:
    """That make the videos together."""
    return max(PARALLEL_DEGREE.of(strategy), sizes_together(strategy))


def sizes_together(strategy: object) -> int:
    """Of how many GPUs the sizes are."""
    return math.prod(knob.of(strategy) for knob in SIZES)


def shares_weights(strategy: object) -> bool:
    """Whether GPUs keep shares of some component's weights."""
    return DIT_FSDP.of(strategy) or T5_FSDP.of(strategy)


def videos_per_pass(strategy: object) -> int:
    """Whose streams pass a unit of weights before the next one comes."""
    return MICRO_BATCH_SIZE.of(strategy) or 1


def weight_passes(strategy: object, *, guided: bool) -> int:
    """How often a denoising step walks the transformer's weights. guided: with and without the prompt."""
    alone = CFG.of(strategy) == "sequential" and CFG_SIZE.of(strategy) == 1
    forwards = 2 if guided and alone else 1
    return forwards * math.ceil(BATCH_SIZE.of(strategy) / videos_per_pass(strategy))


def fewer_passes(strategy: object) -> list[Change]:
    """Ways to let more videos share a pass, the fewest first; none where the user said how many, or only one is made."""
    if MICRO_BATCH_SIZE.of(strategy) is not None:
        return []
    together = BATCH_SIZE.of(strategy)
    counts = {math.ceil(together / passes) for passes in range(1, together)}
    return [Change({MICRO_BATCH_SIZE: count, RESIDUAL_IN: "device"}) for count in sorted(counts)]


FROM = {home: Change({LOAD_STRATEGY: "block", WEIGHTS_IN: home}) for home in WEIGHT_HOMES}  # blocks streamed from there
# The transformer without any saving of activations, streamed or resident.
_ONE_STREAM: dict[Knob[Any], Any] = {CFG: "sequential", MICRO_BATCH_SIZE: None, RESIDUAL_IN: "device"}
UNSLICED = Change({ATTENTION_SLICING: False, ROWS_PER_CHUNK: None, RESIDENT_BLOCKS: 0, **_ONE_STREAM})
RESIDENT = Change({**UNSLICED.values, LOAD_STRATEGY: "full", WEIGHTS_IN: "pinned"})
# Half the copies, for a second residual stream: slicing makes the room for that.
JOINT = Change({CFG: "joint", ATTENTION_SLICING: True, RESIDENT_BLOCKS: 0, RESIDUAL_IN: "device"})


def allowed(change: Change, strategy: S) -> S | None:
    """`change` on the strategy, without slicing of attention where that is refused; None: it is refused all the same."""
    plain = {knob: value for knob, value in change.values.items() if knob is not ATTENTION_SLICING}
    for values in (change.values, plain):
        try:
            return Change(values).on(strategy)
        except InputError:
            continue
    return None


# Half the rows that are chosen by size; a quarter saves 1 % more memory at 14B 720P, idles the matrix units and is slow to simulate.
FEW_ROWS = TARGET_ROWS // 2
# Lossless ways to hold fewer activations, the fastest and largest first.
LEANER = (
    Change({}),
    Change({ATTENTION_SLICING: True}),
    Change({RESIDUAL_IN: "pinned", ROWS_PER_CHUNK: FEW_ROWS}),
    Change({RESIDUAL_IN: "pinned", ROWS_PER_CHUNK: FEW_ROWS // 2}),
    Change({ATTENTION_SLICING: True, ROWS_PER_CHUNK: FEW_ROWS}),  # larger than these, but for host RAM
)
# Tokens from which on the stream is larger than what its slots and the larger units take: 17,000 at 14B by arithmetic, 12,500 at 1.3B.
LONG_STREAM = 20_000


def leaner(situation: Situation) -> tuple[Change, ...]:
    """Those of `LEANER` that save memory there."""
    of_stream = situation.streams == 1 and situation.tokens >= LONG_STREAM
    return tuple(
        change
        for change in LEANER
        if change.values.get(ROWS_PER_CHUNK, 0) < situation.tokens and (of_stream or RESIDUAL_IN not in change.values)
    )
