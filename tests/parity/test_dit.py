"""The transformer against the official code: goldens of all four kinds, full-size keys, invariance of the result."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from math import prod
from typing import Any

import pytest
import torch
from tests.parity.golden import Case, assert_close, load_case, load_json
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wanvram.errors import InputError
from wanvram.kernels import attention
from wanvram.models import dit_blocks
from wanvram.models.dit import Condition, WanDiT
from wanvram.models.dit_regrouped import RegroupedDiT
from wanvram.models.linear import Linear
from wanvram.models.precision import BF16, FP16, FP32, Precision
from wanvram.models.rotary import rotary_tables
from wanvram.specs import DIT, DiTSpec

STEMS = ("dit_t2v", "dit_i2v", "dit_flf2v", "dit_vace")
CASES = {stem: load_case(stem) for stem in STEMS}
CALLS = [(stem, call["name"]) for stem in STEMS for call in CASES[stem].calls()]
FULL_SIZE = [name for name in DIT if not name.startswith("tiny-")]


def spec_of(case: Case) -> DiTSpec:
    names = {field.name for field in fields(DiTSpec)}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in case.config.items() if k in names}
    return DiTSpec(**{"clip_dim": 1280, "vace_layers": (), "vace_in_dim": 96, **given})


def model_of(stem: str, precision: Precision = FP32) -> WanDiT:
    model = WanDiT(spec_of(CASES[stem]), precision)
    model.load_state_dict(CASES[stem].weights(), strict=True)
    return model


def call_of(stem: str, name: str) -> dict[str, Any]:
    return next(call for call in CASES[stem].calls() if call["name"] == name)


def sample_of(stem: str, name: str, i: int) -> tuple[Tensor, int, Condition]:
    """Latent, timestep and condition of sample i of a golden call."""
    case, call = CASES[stem], call_of(stem, name)

    def optional(key: str) -> Tensor | None:
        full = f"input.{name}.{key}"
        return case.tensors.get(full)

    clip = optional("clip_fea")
    if clip is not None:
        per_sample = clip.shape[0] // call["batch"]
        clip = clip[i * per_sample : (i + 1) * per_sample]
    condition = Condition(
        context=case[f"input.{name}.context{i}"],
        y=optional(f"y{i}"),
        clip_fea=clip,
        vace_context=optional(f"vace_context{i}"),
        vace_scale=call.get("vace_context_scale", 1.0),
    )
    return case[f"input.{name}.x{i}"], int(case[f"input.{name}.t"][i]), condition


class Recorder:
    """Values of a forward under the names of the goldens' `mid` tensors."""

    def __init__(self, model: WanDiT) -> None:
        self.mids: dict[str, Tensor] = {}
        self.stream = torch.empty(0)
        self.keep("e", model.time_embedding)
        self.keep("e0", model.time_projection)
        self.keep("head", model.head)
        self.keep("context", model.text_embedding)
        if model.spec.has_image_branch:
            self.keep("img_emb", model.img_emb)
        model.blocks[0].self_attn.register_forward_pre_hook(self.on_first_block)
        self.names = {id(module): name for name, module in model.named_modules()}
        self.vace = torch.empty(0)
        if model.spec.vace_layers:
            model.vace_blocks[0].self_attn.register_forward_pre_hook(self.on_first_vace_block)
        for n in range(len(model.spec.vace_layers)):
            self.keep(f"vace_hint{n}", model.vace_blocks[n].after_proj)

    def keep(self, name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda _module, _args, out: self.mids.update({name: out.clone()}))

    def on_first_block(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.stream = args[0]  # updated in place by all later blocks
        self.mids["tokens"] = self.stream.clone()

    def on_first_vace_block(self, _module: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.vace = args[0]

    def walk(self, units: Sequence[nn.Module]) -> Iterator[nn.Module]:
        """A block's state is that after its last unit; a hint is part of its main block."""
        main = ""
        for unit in units:
            yield unit
            group, number, *rest = self.names[id(unit)].split(".")
            if rest == ["ffn"]:
                self.mids[f"vace_c{number}" if group == "vace_blocks" else f"block{number}"] = (
                    self.vace if group == "vace_blocks" else self.stream
                ).clone()
                main = number if group == "blocks" else main
            elif rest == ["after_proj"]:
                self.mids[f"block{main}"] = self.stream.clone()


class PeakOfNewStorage(TorchDispatchMode):
    """Largest sum of bytes of storages that were born inside and still lived."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            storage = tensor.untyped_storage() if isinstance(tensor, Tensor) else None
            if storage is not None and storage._cdata not in known | self.live.keys():
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata, None)
                self.peak = max(self.peak, sum(self.live.values()))
        return out


@pytest.mark.parametrize(("stem", "name"), CALLS)
def test_outputs_match_the_official_transformer(stem: str, name: str) -> None:
    model = model_of(stem)
    for i in range(call_of(stem, name)["batch"]):
        latent, timestep, condition = sample_of(stem, name, i)
        (velocity,) = model(latent, timestep, [condition])
        assert velocity.is_contiguous()
        assert_close(velocity, CASES[stem][f"output.{name}.{i}"], f"{stem} {name} sample {i}")


@pytest.mark.parametrize(("stem", "name"), CALLS)
def test_intermediate_values_match_the_official_transformer(stem: str, name: str) -> None:
    case, call = CASES[stem], call_of(stem, name)
    prefix = f"mid.{name}."
    wanted = [key[len(prefix) :] for key in case.tensors if key.startswith(prefix)]
    model = model_of(stem)
    recorder = Recorder(model)
    for i in range(call["batch"]):
        latent, timestep, condition = sample_of(stem, name, i)
        model(latent, timestep, [condition], walk=recorder.walk)
        for key in wanted:
            width = case[prefix + key].shape[-1]
            golden = case[prefix + key][i].reshape(-1, width)
            if key not in ("e", "e0", "context", "img_emb"):
                golden = golden[: call["tokens"][i]]
            actual = recorder.mids[key].reshape(-1, width)
            assert_close(actual, golden, f"{stem} {name} sample {i} {key}")


@pytest.mark.parametrize("name", FULL_SIZE)
def test_full_size_parameters_have_the_official_names_shapes_and_count(name: str) -> None:
    official = load_json("full_size_keys")[name.replace("t2i", "t2v")]
    with torch.device("meta"):
        state = WanDiT(DIT[name], BF16).state_dict()
    assert {key: list(value.shape) for key, value in state.items()} == official["keys"]
    assert sum(value.numel() for value in state.values()) == official["num_params"]


def test_only_norms_modulation_time_head_and_positions_stay_in_float32() -> None:
    small = ("norm", "modulation", "time_", "head.", "emb_pos", "img_emb.proj.0", "img_emb.proj.4")
    for name in ("tiny-flf2v", "tiny-vace"):
        for key, value in WanDiT(DIT[name], BF16).state_dict().items():
            expected = torch.float32 if any(part in key for part in small) else torch.bfloat16
            assert value.dtype == expected, key


@pytest.fixture
def exact_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products and attention in float64: in float32 the CPU's kernels for 1 row and for 18 differ by up to 3.3e-6."""

    def exact_attention(q: Tensor, k: Tensor, v: Tensor, asked: str) -> Tensor:
        return attention(q.double(), k.double(), v.double(), asked).to(q.dtype)

    def forward(self: Linear, h: Tensor) -> Tensor:
        return torch.addmm(self.bias.double(), h.double(), self.weight.double().t()).to(h.dtype)

    monkeypatch.setattr(dit_blocks, "attention", exact_attention)
    monkeypatch.setattr(Linear, "forward", forward)
    monkeypatch.setattr(Linear, "into", lambda self, out, h: out.copy_(forward(self, h)))
    monkeypatch.setattr(Linear, "columns_into", lambda self, out, h, columns: out.copy_(forward(self, h)[:, columns]))


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize("rows", [1, 7, 16])
def test_the_result_does_not_depend_on_the_row_chunk(stem: str, rows: int) -> None:
    model = model_of(stem)
    latent, timestep, condition = sample_of(stem, CASES[stem].calls()[0]["name"], 0)
    (whole,) = model(latent, timestep, [condition])
    (chunked,) = model(latent, timestep, [condition], rows_per_chunk=rows)
    assert (whole - chunked).abs().max() <= 1e-6 * whole.abs().max()


@pytest.mark.usefixtures("exact_products")
@pytest.mark.parametrize("stem", STEMS)
@pytest.mark.parametrize(("heads", "rows"), [(1, None), (2, 7), (3, 5)])
def test_the_result_does_not_depend_on_the_head_group(stem: str, heads: int, rows: int | None) -> None:
    model = model_of(stem)
    latent, timestep, condition = sample_of(stem, CASES[stem].calls()[0]["name"], 0)
    (whole,) = model(latent, timestep, [condition])
    (sliced,) = model(latent, timestep, [condition], rows_per_chunk=rows, heads_per_group=heads)
    assert (whole - sliced).abs().max() <= 1e-6 * whole.abs().max()


class InPlace:
    """A stream all of whose rows are there, in chunks; counts how often it comes by."""

    def __init__(self, length: int, dim: int, rows: int) -> None:
        self.x, self.per_chunk = torch.full((length, dim), float("nan")), rows
        self.reads = self.writes = 0

    def rows(self, *, reads: bool = True, writes: bool = True) -> Iterator[tuple[slice, Tensor]]:
        self.reads, self.writes = self.reads + reads, self.writes + writes
        return ((c, self.x[c]) for c in dit_blocks.chunks(self.x.shape[0], self.per_chunk))


@pytest.mark.parametrize("precision", [FP32, BF16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("stem", ["dit_t2v", "dit_i2v", "dit_flf2v"])
@pytest.mark.parametrize("rows", [1, 7, 16, 1000])
def test_regrouped_loops_give_the_same_velocity_bit_for_bit_and_read_and_write_the_stream_twice_a_block(
    stem: str, rows: int, precision: Precision
) -> None:
    latent, timestep, condition = sample_of(stem, CASES[stem].calls()[0]["name"], 0)
    model, spec = model_of(stem, precision), spec_of(CASES[stem])
    (plain,) = model(latent, timestep, [condition], rows_per_chunk=rows)
    regrouped = RegroupedDiT(spec, precision)
    regrouped.load_state_dict(model.state_dict(), strict=True)
    (time,), prepared = regrouped.prepare([timestep], [condition])
    length = latent[0].numel() // prod(spec.patch_size)
    stream = InPlace(length, spec.dim, rows)
    (velocity,) = regrouped.velocity([latent], time, prepared, stream=stream)
    assert torch.equal(velocity, plain)
    assert (stream.reads, stream.writes) == (2 * spec.num_layers, 2 * spec.num_layers)


@pytest.mark.parametrize("name", ["t2v-14B", "i2v-14B"])
def test_regrouped_units_hold_every_matrix_of_the_blocks_once_and_slots_of_both_sizes_one_block(name: str) -> None:
    with torch.device("meta"):
        model, plain = RegroupedDiT(DIT[name], BF16), WanDiT(DIT[name], BF16)
    assert list(dict(model.named_parameters())) == list(dict(plain.named_parameters()))
    units, lanes = model.walk_order(), model.lanes()
    held = [id(p) for unit in units for p in unit.parameters()]
    assert len(held) == len(set(held)) == sum(1 for unit in plain.walk_order() for _ in unit.parameters())
    sizes = [sum(p.nbytes for p in unit.parameters()) for unit in units]
    largest = [max(s for s, lane in zip(sizes, lanes, strict=True) if lane == slot) for slot in (0, 1)]
    assert sum(largest) == sum(p.nbytes for unit in plain.blocks[0].units() for p in unit.parameters())  # type: ignore[operator, union-attr]


@pytest.mark.parametrize("stem", STEMS)
def test_many_steps_prepared_at_once_give_what_each_gives_alone(stem: str) -> None:
    model = model_of(stem)
    latent, _, condition = sample_of(stem, CASES[stem].calls()[0]["name"], 0)
    times, prepared = model.prepare([999, 500, 3], [condition])
    for timestep, time in zip([999, 500, 3], times, strict=True):
        (together,) = model.velocity([latent], time, prepared)
        (alone,) = model(latent, timestep, [condition])
        assert torch.equal(together, alone)


@pytest.mark.parametrize("stem", STEMS)
def test_conditions_walked_together_give_what_each_gives_alone(stem: str) -> None:
    model = model_of(stem)
    latent, timestep, first = sample_of(stem, CASES[stem].calls()[0]["name"], 0)
    second = replace(first, context=first.context[:2] * 0.5)
    together = model(latent, timestep, [first, second], rows_per_chunk=7)
    for velocity, condition in zip(together, (first, second), strict=True):
        (alone,) = model(latent, timestep, [condition], rows_per_chunk=7)
        assert torch.equal(velocity, alone)
    assert not torch.equal(*together)


@pytest.mark.parametrize("precision", [BF16, FP16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("stem", STEMS)
def test_reduced_precision_stays_near_float32(stem: str, precision: Precision) -> None:
    name = CASES[stem].calls()[-1]["name"]
    latent, timestep, condition = sample_of(stem, name, 0)
    (velocity,) = model_of(stem, precision)(latent, timestep, [condition])
    golden = CASES[stem][f"output.{name}.0"]
    assert velocity.dtype == torch.float32
    assert 0 < (velocity - golden).abs().max() < 0.05 * golden.abs().max()


@pytest.mark.parametrize("stem", STEMS)
def test_the_walk_is_called_once_and_no_block_is_used_after_the_next_is_requested(stem: str) -> None:
    """As streaming does it: the weights of a block are gone when the next one is requested."""
    model = model_of(stem)
    latent, timestep, condition = sample_of(stem, CASES[stem].calls()[0]["name"], 0)
    (expected,) = model(latent, timestep, [condition])
    visits: list[list[nn.Module]] = []

    def streamed(modules: Sequence[nn.Module]) -> Iterator[nn.Module]:
        visits.append(list(modules))
        for module in modules:
            yield module
            for parameter in module.parameters():
                parameter.fill_(float("nan"))

    (velocity,) = model(latent, timestep, [condition], walk=streamed)
    assert torch.equal(velocity, expected)
    assert visits == [model.walk_order()]
    assert all(parameter.isnan().all() for block in model.walk_order() for parameter in block.parameters())


def test_a_vace_block_comes_before_the_main_block_that_takes_its_hint_and_its_projection_after() -> None:
    with torch.device("meta"):
        model = WanDiT(DIT["vace-14B"], BF16)
    names = {id(module): name for name, module in model.named_modules()}
    order = [names[id(unit)] for unit in model.walk_order()]
    assert order[:8] == [
        "vace_blocks.0.before_proj",
        "vace_blocks.0.self_attn",
        "vace_blocks.0.cross_attn",
        "vace_blocks.0.ffn",
        "blocks.0.self_attn",
        "blocks.0.cross_attn",
        "blocks.0.ffn",
        "vace_blocks.0.after_proj",
    ]
    assert len(order) == 3 * (40 + 8) + 8 + 1
    for n, layer in enumerate(DIT["vace-14B"].vace_layers):
        position = order.index(f"vace_blocks.{n}.self_attn")
        assert order[position + 3 : position + 7] == [
            *(f"blocks.{layer}.{unit}" for unit in ("self_attn", "cross_attn", "ffn")),
            f"vace_blocks.{n}.after_proj",
        ]


@pytest.mark.parametrize("name", ["t2v-1.3B", "flf2v-14B", "vace-1.3B"])
def test_a_full_size_forward_runs_on_meta_tensors(name: str) -> None:
    spec = replace(DIT[name], num_layers=2, vace_layers=(0,) if name.startswith("vace") else ())
    with torch.device("meta"):
        model = WanDiT(spec, BF16)
        condition = Condition(
            torch.empty(20, 4096),
            y=torch.empty(20, 21, 60, 104) if spec.has_image_branch else None,
            clip_fea=torch.empty(2, 257, 1280) if spec.has_image_branch else None,
            vace_context=torch.empty(96, 21, 60, 104) if spec.vace_layers else None,
        )
        outputs = model(torch.empty(16, 21, 60, 104), 999, [condition, condition], rows_per_chunk=4096)
    assert [tuple(out.shape) for out in outputs] == [(16, 21, 60, 104)] * 2
    assert all(out.device.type == "meta" and out.dtype == torch.float32 for out in outputs)


def test_inference_mode_gives_the_same_result() -> None:
    model = model_of("dit_t2v")
    latent, timestep, condition = sample_of("dit_t2v", CASES["dit_t2v"].calls()[0]["name"], 0)
    (plain,) = model(latent, timestep, [condition])
    with torch.inference_mode():
        (inference,) = model(latent, timestep, [condition])
    assert torch.equal(plain, inference)


def test_rotary_tables_turn_frames_rows_and_columns_by_their_own_frequencies() -> None:
    cos, sin = rotary_tables((3, 2, 5), 16, "cpu")
    assert cos.shape == (30, 8)
    assert cos.dtype == torch.float32
    token = (2 * 2 + 1) * 5 + 3  # frame 2, row 1, column 3; of 8 pairs 4 are frames, 2 rows, 2 columns
    angles = [2.0, 2 * 10000**-0.25, 2 * 10000**-0.5, 2 * 10000**-0.75, 1.0, 0.01, 3.0, 0.03]
    expected = torch.tensor(angles, dtype=torch.float64)
    torch.testing.assert_close(cos[token].double(), expected.cos(), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin[token].double(), expected.sin(), rtol=0, atol=1e-7)


def test_only_the_residual_stream_keys_and_values_exist_for_the_whole_sequence() -> None:
    """14B at 720P in chunks of 9450 rows: x + K + V and 8 % more."""
    length, dim, rows = 75600, 5120, 9450
    with torch.device("meta"):
        model = WanDiT(replace(DIT["t2v-14B"], num_layers=2), BF16)
        latent, condition = torch.empty(16, 21, 90, 160), Condition(torch.empty(20, 4096))
        with PeakOfNewStorage() as meter:
            model(latent, 999, [condition], rows_per_chunk=rows)
    stream, keys_and_values = length * dim * 4, 2 * length * dim * 2
    chunk, tables = rows * dim * 2, 2 * length * 64 * 4
    assert meter.peak <= stream + keys_and_values + tables + 2 * chunk + 8 * 2**20


def test_missing_or_misshapen_inputs_are_named() -> None:
    latent, context = torch.zeros(16, 1, 4, 4), torch.zeros(3, 32)
    with pytest.raises(InputError, match="clip_fea"):
        WanDiT(DIT["tiny-i2v"], FP32)(latent, 1, [Condition(context)])
    with pytest.raises(InputError, match="vace_context"):
        WanDiT(DIT["tiny-vace"], FP32)(latent, 1, [Condition(context)])
    tiny = WanDiT(DIT["tiny-t2v"], FP32)
    with pytest.raises(InputError, match="513 tokens"):
        tiny(latent, 1, [Condition(torch.zeros(513, 32))])
    with pytest.raises(InputError, match="patches"):
        tiny(torch.zeros(16, 1, 3, 4), 1, [Condition(context)])
    with pytest.raises(InputError, match="at least 1"):
        tiny(latent, 1, [Condition(context)], rows_per_chunk=0)
