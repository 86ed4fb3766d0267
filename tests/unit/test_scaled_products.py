"""Products of float8 numbers: their arithmetic, where a weight in float8 is put in place, and what they take, on the CPU and on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from wanvram.config import Request, RunConfig, Strategy
from wanvram.errors import InputError
from wanvram.kernels.elementwise import gelu_tanh_, layer_norm_modulate
from wanvram.kernels.scaled_products import (
    FP8,
    LARGEST,
    ScaledRows,
    gelu_rows,
    modulated_rows,
    quantise_rows,
    row_scales,
    scaled_product,
    scaled_rows,
    to_fp8,
)
from wanvram.models.linear import Linear
from wanvram.predict.simulate import simulate
from wanvram.record import RunRecord
from wanvram.run.products import check_products
from wanvram.spans import Span

ROWS, INPUTS, OUTPUTS = 33, 64, 48
BF16_ROUNDING = 2**-8


def drawn(*shape: int, seed: int = 0, device: str = "cpu") -> Tensor:
    """Rows of very different size, one of zeros."""
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    values *= torch.logspace(-3, 2, shape[0]).unsqueeze(1)
    values[1] = 0
    return values.bfloat16().to(device)


def operands(rows: int = ROWS, inputs: int = INPUTS, outputs: int = OUTPUTS, device: str = "cpu") -> tuple[Tensor, ...]:
    """x [rows, inputs], weight [outputs, inputs], bias [outputs]."""
    return (
        drawn(rows, inputs, device=device),
        drawn(outputs, inputs, seed=1, device=device),
        drawn(outputs, 1, seed=2, device=device)[:, 0],
    )


def wide(rows: ScaledRows) -> Tensor:
    return rows.values.double() * rows.scales.double()


def product64(x: ScaledRows, weight: ScaledRows, bias: Tensor) -> Tensor:
    return wide(x) @ wide(weight).t() + bias.double()


def same(rows: ScaledRows, expected: ScaledRows) -> None:
    assert torch.equal(rows.scales, expected.scales)
    assert torch.equal(rows.values.view(torch.uint8), expected.values.view(torch.uint8))


# --- arithmetic ----------------------------------------------------------------------------------------------------------


def test_a_row_is_scaled_so_that_its_largest_value_is_the_largest_number() -> None:
    x = drawn(ROWS, INPUTS)
    rows = scaled_rows(x)
    assert (rows.values.dtype, rows.scales.dtype, rows.scales.shape) == (FP8, torch.float32, (ROWS, 1))
    assert torch.equal(rows.scales, row_scales(x))
    assert torch.equal(rows.values.view(torch.uint8), to_fp8(x, rows.scales).view(torch.uint8))
    largest = rows.values.float().abs().amax(1)
    assert largest[1] == 0
    assert (largest[[0, *range(2, ROWS)]] == LARGEST).all()
    error = (wide(rows) - x.double()).abs()
    most = x.double().abs().amax(1, keepdim=True)
    assert (error <= torch.maximum(x.double().abs() * 2**-4, most * 2**-10)).all()


def test_norm_and_gelu_quantise_what_they_make() -> None:
    x, weight, _ = operands()
    scale, shift = weight[0].float(), weight[2].float()
    normed = layer_norm_modulate(x.float(), scale, shift, 1e-6, 1.0, torch.bfloat16)
    same(modulated_rows(x.float(), scale, shift, 1e-6, 1.0), scaled_rows(normed))
    bent = x.clone()
    gelu_tanh_(bent)
    same(gelu_rows(x), scaled_rows(bent))


def test_a_scaled_product_is_its_float64_formula() -> None:
    x, weight, bias = operands()
    rows, columns = scaled_rows(x), scaled_rows(weight)
    out = torch.empty(ROWS, OUTPUTS, dtype=torch.bfloat16)
    scaled_product(rows, columns.values, columns.scales, bias, out)
    expected = product64(rows, columns, bias)
    assert ((out.double() - expected).abs() <= BF16_ROUNDING * expected.abs() + 1e-6).all()


@pytest.mark.parametrize("name", ["quantise_rows", "modulated_rows", "gelu_rows", "scaled_product"])
def test_the_declared_schema_is_what_the_operation_does(name: str) -> None:
    x, weight, bias = operands()
    rows, columns, room = scaled_rows(x), scaled_rows(weight), (torch.zeros(ROWS, INPUTS).to(FP8), torch.empty(ROWS, 1))
    arguments = {
        "quantise_rows": (x, *room),
        "gelu_rows": (x.clone(), *room),
        "modulated_rows": (x.float(), weight[0].float(), weight[2].float(), 1e-6, 1.0, *room),
        "scaled_product": (
            *(rows.values, rows.scales, columns.values, columns.scales, bias),
            torch.empty(ROWS, OUTPUTS, dtype=torch.bfloat16),
        ),
    }[name]
    operation = getattr(torch.ops.wanvram, name).default
    torch.library.opcheck(operation, arguments, test_utils=("test_faketensor",))


# --- a layer -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def linear() -> Linear:
    """With its weight in float8."""
    _, weight, bias = operands()
    layer = Linear(INPUTS, OUTPUTS, torch.bfloat16)
    rows = scaled_rows(weight)
    layer._parameters |= {
        name: torch.nn.Parameter(value, requires_grad=False)
        for name, value in (("weight", rows.values), ("scale", rows.scales), ("bias", bias))
    }
    return layer


def test_a_layer_s_rows_may_be_quantised_before_and_its_columns_computed_apart(linear: Linear) -> None:
    x, weight, bias = operands()
    rows = linear.operand(x)
    assert isinstance(rows, ScaledRows)
    whole = linear(x)
    assert torch.equal(whole, linear(rows))
    expected = product64(rows, scaled_rows(weight), bias)
    assert ((whole.double() - expected).abs() <= BF16_ROUNDING * expected.abs() + 1e-6).all()
    parts = [torch.empty(ROWS, 16, dtype=torch.bfloat16) for _ in range(3)]
    for index, part in enumerate(parts):
        linear.columns_into(part, rows, slice(16 * index, 16 * (index + 1)))
    assert torch.equal(torch.cat(parts, 1), whole)


def test_a_layer_without_a_scale_multiplies_what_it_is_given() -> None:
    x, weight, bias = operands()
    layer = Linear(INPUTS, OUTPUTS, torch.bfloat16)
    layer.load_state_dict({"weight": weight, "bias": bias})
    assert layer.operand(x) is x
    assert torch.equal(layer(x), torch.addmm(bias, x, weight.t()))


# --- the card --------------------------------------------------------------------------------------------------------------


def config_of(**knobs: object) -> RunConfig:
    request = Request.for_task("t2v-1.3B", size="832*480", frame_num=17, sample_steps=1)
    return RunConfig("x", "", "simulated", request, Strategy(**knobs))  # type: ignore[arg-type]


@pytest.mark.parametrize(("capability", "fits"), [((8, 6), False), ((8, 9), True), ((9, 0), True), ((12, 0), True)])
def test_a_card_without_8_bit_products_is_refused_by_a_sentence(capability: tuple[int, int], fits: bool) -> None:
    asked = config_of(product_precision="fp8")
    check_products(config_of(), "some card", (7, 0))
    if fits:
        check_products(asked, "some card", capability)
        return
    with pytest.raises(InputError, match=r"product_precision: fp8 .* 8\.9 or newer; some card has 8\.6; use same"):
        check_products(asked, "some card", capability)


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_their_results_are_bf16_and_other_precisions_are_refused(precision: str) -> None:
    with pytest.raises(InputError, match="product_precision: fp8 gives its results in bf16"):
        Strategy(precision=precision, product_precision="fp8")


def stage_of(record: RunRecord, name: str) -> Span:
    return next(stage for stage in record.stages if stage.name == name)


def denoising(**knobs: object) -> tuple[RunRecord, int, float]:
    """The record, allocated bytes of denoising's peak, and seconds of its products."""
    record, memory = simulate(config_of(**knobs))
    assert record.failure is None
    return record, stage_of(record, "denoise").peak.allocated_bytes, memory.clock.busy["product"]


def test_resident_matrices_take_half_and_products_less_time_in_the_prediction() -> None:
    plain, bytes_before, seconds_before = denoising()
    scaled, bytes_after, seconds_after = denoising(product_precision="fp8")
    before, after = (next(c for c in r.components if c.name == "dit").base_bytes for r in (plain, scaled))
    assert 0.50 < after / before < 0.55
    assert bytes_before - bytes_after == pytest.approx(before - after, rel=0.05)
    assert 0.5 < seconds_after / seconds_before < 0.75
    assert any("product_precision fp8 is lossy" in note for note in scaled.notes)
    assert not any("lossy" in note for note in plain.notes)


def test_streamed_matrices_need_room_for_the_largest_unit_s_unless_they_are_stored_so() -> None:
    streamed = {"load_strategy": "block", "offload": True}
    _, plain, _ = denoising(**streamed)
    _, quantised, _ = denoising(**streamed, product_precision="fp8")
    _, stored, _ = denoising(**streamed, product_precision="fp8", weight_storage="fp8")
    _, unpacked, _ = denoising(**streamed, weight_storage="fp8")
    unit = 2 * 1536 * 8960  # numbers in the feed-forward's two matrices
    rows = 5 * 30 * 52 * (8960 - 2 * 1536)  # its activations, quantised, instead of its result: alive at the peak
    assert quantised - plain == pytest.approx(unit + rows, abs=2**20)
    assert stored - plain == pytest.approx(rows - 2 * unit, abs=2**20)
    assert unpacked - plain == pytest.approx(0, abs=2**20)


# --- on a GPU ----------------------------------------------------------------------------------------------------------------

GPU_SHAPES = [(7, 1536, 8960), (33, 5120, 5120), (512, 13824, 5120)]
needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9), reason="needs compute capability 8.9"
)


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("width", [64, 1536, 5120, 8960, 13824])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_triton_quantises_as_the_reference_does_to_the_bit(width: int, dtype: torch.dtype) -> None:
    """Weights quantised on the device must be those that were quantised in RAM."""
    pytest.importorskip("triton")
    x = drawn(40, width).to(dtype)
    rows, expected = scaled_rows(x.cuda()[3:]), scaled_rows(x[3:])
    assert torch.equal(rows.scales.cpu(), expected.scales)
    assert torch.equal(rows.values.cpu().view(torch.uint8), expected.values.view(torch.uint8))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("width", [64, 1536, 5120, 8960, 13824])
def test_norm_and_gelu_quantise_on_a_gpu_what_their_own_kernels_make(width: int) -> None:
    """GELU to the bit; the norm's sums may be added in another order, which moves a number here and there by one step."""
    pytest.importorskip("triton")
    x = drawn(40, width, device="cuda")[3:]
    scale, shift = drawn(2, width, seed=3, device="cuda").float() + 0.5
    normed = layer_norm_modulate(x.float(), scale, shift, 1e-6, 1.0, torch.bfloat16)
    rows, expected = modulated_rows(x.float(), scale, shift, 1e-6, 1.0), scaled_rows(normed)
    assert (rows.values.view(torch.uint8) != expected.values.view(torch.uint8)).float().mean() < 0.01
    assert torch.allclose(wide(rows), wide(expected), rtol=0.13, atol=1e-6 * float(normed.abs().max()))
    bent = x.clone()
    gelu_tanh_(bent)
    same(gelu_rows(x.clone()), scaled_rows(bent))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize(("rows", "inputs", "outputs"), GPU_SHAPES)
def test_scaled_mm_is_its_float64_formula_and_takes_columns_apart(rows: int, inputs: int, outputs: int) -> None:
    x, weight, bias = operands(rows, inputs, outputs, device="cuda")
    left, right = scaled_rows(x), scaled_rows(weight)
    expected = product64(left, right, bias)
    # Sums are kept in fewer bits than float32's: relative to the size of what is added.
    size = wide(left).abs() @ wide(right).abs().t() + bias.double().abs()
    allowed = BF16_ROUNDING * expected.abs() + 2**-11 * size + 1e-6
    for columns in (slice(None), slice(outputs // 2, outputs)):
        out = torch.empty(rows, len(range(outputs)[columns]), dtype=torch.bfloat16, device="cuda")
        scaled_product(left, right.values[columns], right.scales[columns], bias[columns], out)
        assert ((out.double() - expected[:, columns]).abs() <= allowed[:, columns]).all()


@pytest.mark.gpu
@needs_gpu
def test_quantising_and_multiplying_allocate_nothing_but_their_outputs() -> None:
    pytest.importorskip("triton")
    x, weight, bias = operands(512, 5120, 5120, device="cuda")
    left, right = scaled_rows(x), scaled_rows(weight)
    out = torch.empty(512, 5120, dtype=torch.bfloat16, device="cuda")
    float32 = x.float()
    calls: list[Callable[[], object]] = [
        lambda: quantise_rows(x, left.values, left.scales),
        lambda: torch.ops.wanvram.gelu_rows(x, left.values, left.scales),
        lambda: torch.ops.wanvram.modulated_rows(float32, bias, bias, 1e-6, 1.0, left.values, left.scales),
        lambda: scaled_product(left, right.values, right.scales, bias, out),
    ]
    for call in calls:
        call()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() == before
