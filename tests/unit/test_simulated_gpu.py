"""Other people's PyTorch code on the simulated device: what it is told, what it takes, and that everything is as before."""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from wanvram import MemoryProfiler, simulated_gpu
from wanvram.errors import InputError
from wanvram.foreign.errors import SimulatedOutOfMemory, UnknownOperation, Unsupported
from wanvram.foreign.session import register_operation
from wanvram.recorder.tracing import trace_settings
from wanvram.simulate.gpus import find_gpu

MIB = 1 << 20


def allocated() -> int:
    return torch.cuda.memory_allocated()


# --- devices -----------------------------------------------------------------------------------------------------------------


def test_a_module_moved_to_cuda_is_there_and_its_weights_are_counted() -> None:
    with simulated_gpu("rtx4090") as gpu:
        model = nn.Linear(1024, 1024, bias=False).to("cuda", torch.bfloat16)
        assert (model.weight.device, model.weight.is_cuda, model.weight.dtype) == (
            torch.device("cuda", 0),
            True,
            torch.bfloat16,
        )
        assert isinstance(model.weight, nn.Parameter)
        assert allocated() == 2 * MIB == gpu.peak.allocated_bytes
        model.cpu()
        assert model.weight.device.type == "cpu"
        assert allocated() == 0


def test_a_small_parameter_stays_the_same_object_on_its_way_to_the_card_and_back() -> None:
    with simulated_gpu("rtx4090"):
        model = nn.LayerNorm(8)
        weight = model.weight
        model.cuda()
        assert model.weight is weight
        assert weight.is_cuda
        weight.data = weight.data.cpu()
        assert weight.device.type == "cpu"
        assert torch.equal(weight, torch.ones(8))


def test_a_host_tensor_of_a_mebibyte_takes_no_memory_of_the_host_and_none_of_the_card() -> None:
    with simulated_gpu("rtx4090") as gpu:
        big = torch.zeros(1 << 40)
        assert big.device.type == "cpu"
        assert not big.is_cuda
        assert allocated() == 0
        assert gpu.memory.host_bytes == 4 << 40


def test_meta_stays_meta_and_takes_nothing() -> None:
    with simulated_gpu("rtx4090"):
        with torch.device("meta"):
            model = nn.Linear(4096, 4096)
        assert model.weight.is_meta
        assert allocated() == 0
        with pytest.raises(NotImplementedError, match="Cannot copy out of meta tensor"):
            model.cuda()


def test_tied_weights_stay_tied_on_their_way_to_the_card_and_part_when_meta_becomes_empty() -> None:
    """Module._apply makes new parameters where `.data` cannot be set: Wan's text encoder had its table twice on an H200."""
    with simulated_gpu("rtx4090"):
        for tied, copies in ((torch.device("cpu"), 1), (torch.device("meta"), 2)):
            with tied:
                model = nn.Sequential(nn.Embedding(4096, 64), nn.Linear(64, 4096, bias=False))
                model[1].weight = model[0].weight
            model = model.cuda() if copies == 1 else model.to_empty(device="cuda")
            assert (model[1].weight is model[0].weight) == (copies == 1)
            assert allocated() == copies * MIB
            del model


def test_the_default_device_decides_where_a_module_is_built() -> None:
    with simulated_gpu("rtx4090"):
        with torch.device("cuda"):
            model = nn.Linear(512, 512, bias=False)
        assert model.weight.is_cuda
        assert allocated() == MIB


def test_no_op_moves_return_the_same_object() -> None:
    with simulated_gpu("rtx4090"):
        x = torch.zeros(3, device="cuda")
        assert x.to("cuda") is x
        assert x.to(x) is x
        assert x.cuda() is x
        assert x.to("cuda", copy=True) is not x


def test_a_second_card_is_not_there() -> None:
    with simulated_gpu("rtx4090"):
        assert torch.cuda.device_count() == 1
        with pytest.raises(RuntimeError, match="invalid device ordinal"):
            torch.zeros(1, device="cuda:1")


def test_tensors_of_host_and_card_do_not_meet_in_one_operation() -> None:
    with simulated_gpu("rtx4090"), pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        torch.zeros(4, device="cuda") + torch.zeros(4)


def test_the_card_says_its_name_memory_and_capability() -> None:
    card = find_gpu("rtx4090")
    with simulated_gpu("rtx4090", vram="20GiB"):
        assert torch.cuda.is_available()
        assert torch.cuda.get_device_name() == card.name
        assert torch.cuda.get_device_capability() == (8, 9)
        assert torch.cuda.get_device_properties(0).total_memory == 20 << 30
        assert torch.cuda.mem_get_info()[1] == 20 << 30
        assert torch.accelerator.current_accelerator() == torch.device("cuda")
        assert torch.accelerator.memory_allocated() == 0


# --- values ------------------------------------------------------------------------------------------------------------------


def test_small_values_are_computed_and_steer_the_program() -> None:
    with simulated_gpu("rtx4090"):
        steps = torch.arange(5, device="cuda") * 2
        assert steps.tolist() == [0, 2, 4, 6, 8]
        assert steps.sum().item() == 20
        assert bool(steps[3] > 5)
        assert [int(step) for step in steps[1:3]] == [2, 4]
        assert (steps > 3).nonzero().flatten().cpu().tolist() == [2, 3, 4]
        assert steps[steps > 3].shape == (3,)
        assert steps.cpu().numpy().tolist() == [0, 2, 4, 6, 8]


def test_views_and_changes_in_place_share_their_values() -> None:
    with simulated_gpu("rtx4090"):
        x = torch.zeros(2, 3, device="cuda")
        x[1, 2:] = 7
        x.t()[0].add_(1)
        assert x.tolist() == [[1, 0, 0], [1, 0, 7]]


def test_a_value_that_only_a_gpu_knows_is_zero_and_named_with_its_line() -> None:
    with simulated_gpu("rtx4090") as gpu:
        total = torch.randn(1000, 1000, device="cuda").sum()
        assert total.item() == 0
        assert len(gpu.gaps) == 2
        assert "test_simulated_gpu.test_a_value_that_only_a_gpu_knows" in gpu.gaps[0]
        assert "zeros were taken" in gpu.gaps[0]


def test_a_shape_that_hangs_on_unknown_values_is_refused_by_name() -> None:
    with simulated_gpu("rtx4090"):
        x = torch.randn(1000, 1000, device="cuda")
        with pytest.raises(UnknownOperation, match=r"aten\.nonzero"):
            x.nonzero()
        with pytest.raises(UnknownOperation, match=r"aten\.index"):
            x[x > 0]
        x[x > 0] = 1  # only writes: nothing hangs on it


def test_a_generator_of_the_card_gives_the_same_numbers_twice() -> None:
    with simulated_gpu("rtx4090"):
        first, second = (
            torch.randn(4, device="cuda", generator=torch.Generator("cuda").manual_seed(3)) for _ in range(2)
        )
        assert first.tolist() == second.tolist()


# --- memory ------------------------------------------------------------------------------------------------------------------


def test_a_chain_of_operations_peaks_where_cuda_does() -> None:
    """Two 4 MiB blocks live beside the result while it is made; freed ones stay reserved until the cache is emptied."""
    with simulated_gpu("h200") as gpu, torch.no_grad():
        x = torch.zeros(1024, 1024, device="cuda")
        with gpu.stage("double"):
            y = x + 1
            y = y * 2
        assert torch.cuda.max_memory_allocated() == 12 * MIB
        assert allocated() == 8 * MIB
        assert gpu.stages[0].peak_allocated_bytes == 12 * MIB
        assert gpu.stages[0].start_allocated_bytes == 4 * MIB
        del x, y
        assert allocated() == 0
        assert torch.cuda.memory_reserved() == 20 * MIB
        torch.cuda.empty_cache()
        assert torch.cuda.memory_reserved() == 0
        torch.cuda.reset_peak_memory_stats()
        assert torch.cuda.max_memory_allocated() == 0
        assert gpu.peak.allocated_bytes == 12 * MIB


def test_out_of_memory_is_torchs_own_and_a_program_goes_on_with_tiles() -> None:
    with simulated_gpu("rtx4060", vram="2GiB") as gpu:
        with pytest.raises(torch.OutOfMemoryError, match=r"CUDA out of memory. Tried to allocate 4.00 GiB"):
            torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
        parts: list[torch.Tensor] = []
        try:
            torch.empty(4 << 30, dtype=torch.uint8, device="cuda")
        except torch.cuda.OutOfMemoryError:
            parts = [torch.empty(16 * MIB, dtype=torch.uint8, device="cuda") for _ in range(4)]
        assert allocated() == 64 * MIB
        assert len(parts) == 4
        assert gpu.fits


def test_the_fraction_of_a_process_is_a_cap() -> None:
    with simulated_gpu("rtx4090"):
        torch.cuda.set_per_process_memory_fraction(64 * MIB / torch.cuda.mem_get_info()[1])
        with pytest.raises(SimulatedOutOfMemory):
            torch.empty(100 * MIB, dtype=torch.uint8, device="cuda")


@pytest.mark.parametrize(("given", "copied"), [("contiguous", 1), ("channels_last", 0)])
def test_a_convolution_of_channels_last_weights_copies_an_input_that_lies_otherwise(given: str, copied: int) -> None:
    """GroupNorm gives contiguous tensors: Flux's VAE in channels_last took 256 MiB more on an H200 than without the copy."""
    layout = getattr(torch, f"{given}_format" if given == "contiguous" else given)
    with simulated_gpu("h200") as gpu, torch.no_grad():
        model = nn.Conv2d(64, 64, 1, bias=False).cuda().half().to(memory_format=torch.channels_last)
        x = torch.empty(1, 64, 128, 128, device="cuda", dtype=torch.half).to(memory_format=layout)
        before = allocated()
        y = model(x)
        assert y.stride() == (1 << 20, 1, 64 * 128, 64)
        assert gpu.peak.allocated_bytes - before == (1 + copied) * 2 * MIB + 512


def test_attention_takes_no_square_of_its_length() -> None:
    with simulated_gpu("rtx4090"), torch.no_grad():
        q = torch.zeros(1, 8, 8192, 64, dtype=torch.float16, device="cuda")
        before = allocated()
        nn.functional.scaled_dot_product_attention(q, q, q)
        assert torch.cuda.max_memory_allocated() - before < q.nbytes + 2 * MIB


def test_attention_inside_multihead_attention_is_seen_too() -> None:
    with simulated_gpu("rtx4090"), torch.no_grad():
        layer = nn.MultiheadAttention(256, 4, batch_first=True, device="cuda", dtype=torch.float16).eval()
        x = torch.zeros(1, 8192, 256, dtype=torch.float16, device="cuda")
        layer(x, x, x, need_weights=False)
        assert torch.cuda.max_memory_allocated() < 64 * MIB  # the scores alone would be 512 MiB


@pytest.mark.parametrize("batch_first", [True, False])
def test_an_encoder_layer_takes_its_fast_path_where_pytorch_takes_it(batch_first: bool) -> None:
    """Fast: input, residual, the wide result and the narrow one. Else ReLU has a tensor of its own."""
    with simulated_gpu("h200") as gpu, torch.no_grad():
        layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=batch_first, device="cuda", dtype=torch.float16)
        layer.eval()
        x = torch.zeros(8, 512, 512, dtype=torch.float16, device="cuda")
        layer(x)
        with gpu.stage("again"):
            layer(x)
        stage = gpu.stages[0]
        taken = (stage.peak_allocated_bytes - stage.start_allocated_bytes) / x.nbytes
        assert taken == (6 if batch_first else 9)


def test_multihead_attention_returns_its_weights_on_the_fast_path() -> None:
    with simulated_gpu("h200"), torch.no_grad():
        layer = nn.MultiheadAttention(256, 4, batch_first=True, device="cuda").eval()
        x = torch.zeros(2, 100, 256, device="cuda")
        y, weights = layer(x, x, x)
        assert (y.shape, weights.shape) == ((2, 100, 256), (2, 100, 100))
        assert layer(x, x[:, :50].repeat(1, 2, 1), x, need_weights=False)[1] is None


def test_a_linear_layer_of_a_transposed_input_adds_its_bias_in_place() -> None:
    with simulated_gpu("h200"), torch.no_grad():
        layer = nn.Linear(512, 512, device="cuda", dtype=torch.float16)
        x = torch.zeros(1024, 4, 512, dtype=torch.float16, device="cuda").transpose(0, 1)
        layer(x)
        torch.cuda.reset_peak_memory_stats()
        before = allocated()
        layer(x)
        assert torch.cuda.max_memory_allocated() - before == x.nbytes  # the product alone


def test_gradients_that_are_recorded_keep_activations_alive() -> None:
    with simulated_gpu("rtx4090"):
        layers = nn.Sequential(*(nn.Sequential(nn.Linear(256, 256), nn.GELU()) for _ in range(4))).cuda()
        x = torch.zeros(4096, 256, device="cuda")
        with torch.no_grad():
            y = layers(x)
            without = allocated()
        y = layers(x)
        assert y.requires_grad
        assert allocated() > without + 6 * x.nbytes


@pytest.mark.parametrize("device", ["cuda", "cpu", "meta"])
def test_gradients_of_operations_that_arrive_whole_are_recorded_wherever_they_are(device: str) -> None:
    with simulated_gpu("rtx4090"):
        layer = nn.Linear(1024, 1024, device=device)
        assert layer(torch.zeros(8, 1024, 1024, device=device)).requires_grad


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_inference_mode_takes_what_no_grad_takes(guard: Any) -> None:
    with simulated_gpu("h200"), guard():
        layer = nn.Sequential(nn.Linear(256, 1024), nn.GELU(), nn.Linear(1024, 256)).cuda()
        layer(torch.zeros(2, 512, 256, device="cuda"))
        assert torch.cuda.max_memory_allocated() == 46_142_464


def test_autocast_computes_in_the_lower_precision_and_keeps_the_weights_cast_until_it_ends() -> None:
    with simulated_gpu("rtx4090"), torch.no_grad():
        layer = nn.Linear(1024, 1024, device="cuda")
        norm = nn.LayerNorm(1024, device="cuda")
        x = torch.zeros(1024, 1024, device="cuda")
        layer(x)  # cuBLAS takes its workspace
        before = allocated()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            y = layer(x)
            assert y.dtype == torch.bfloat16
            assert norm(y).dtype == torch.float32
            assert nn.functional.softmax(y, dim=-1).dtype == torch.float32
            assert allocated() - before - y.nbytes == 2 * MIB + 2048  # the cast weight and bias
        assert allocated() - before == y.nbytes
        assert layer(x).dtype == torch.float32


def test_a_stream_has_a_pool_of_its_own() -> None:
    with simulated_gpu("rtx4090"):
        torch.empty(4 * MIB, dtype=torch.uint8, device="cuda")
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.empty(4 * MIB, dtype=torch.uint8, device="cuda")
        assert torch.cuda.memory_reserved() == 40 * MIB


# --- programs ----------------------------------------------------------------------------------------------------------------


def test_hooks_and_weights_swapped_through_data_are_followed() -> None:
    with simulated_gpu("rtx4090"), torch.no_grad():
        layer = nn.Linear(1024, 1024, bias=False)
        seen: list[int] = []

        def onload(module: nn.Module, _: Any) -> None:
            module.weight.data = module.weight.data.to("cuda")

        def offload(module: nn.Module, *_: Any) -> None:
            seen.append(allocated())
            module.weight.data = module.weight.data.to("cpu")

        layer.register_forward_pre_hook(onload)
        layer.register_forward_hook(offload)
        x = torch.zeros(1, 1024, device="cuda")
        before = allocated()
        layer(x)
        assert seen[0] >= 4 * MIB
        assert layer.weight.device.type == "cpu"
        assert allocated() < before + 4 * MIB + 9 * MIB


def test_a_thread_of_the_program_is_simulated_too() -> None:
    with simulated_gpu("rtx4090"):
        kept = []
        thread = threading.Thread(target=lambda: kept.append(torch.zeros(MIB, device="cuda")))
        thread.start()
        thread.join()
        assert kept[0].is_cuda
        assert allocated() == 4 * MIB


def test_threads_that_run_at_once_leave_every_call_its_own_place() -> None:
    def work() -> None:
        for _ in range(60):
            kept.append(torch.zeros(1024, device="cuda"))
            assert torch.arange(3, device="cuda").cpu().tolist() == [0, 1, 2]
            assert not torch.ones(2).is_cuda

    kept: list[torch.Tensor] = []
    before, interval = threading.excepthook, sys.getswitchinterval()
    failures: list[object] = []
    threading.excepthook = failures.append
    sys.setswitchinterval(1e-5)
    try:
        with simulated_gpu("rtx4090"):
            threads = [threading.Thread(target=work) for _ in range(4)]
            for step in ("start", "join"):
                for thread in threads:
                    getattr(thread, step)()
            assert allocated() == 240 * 4096
    finally:
        threading.excepthook = before
        sys.setswitchinterval(interval)
    assert failures == []


def test_wanvrams_own_profiler_reads_the_simulated_card(tmp_path: Path) -> None:
    with simulated_gpu("rtx4090"):
        with MemoryProfiler("m", tmp_path, trace=False) as profiler:
            base = profiler.allocated_bytes()
            kept = torch.zeros(MIB, device="cuda")
            profiler.log_event("load", {"base_memory": base})
            del kept
            profiler.log_event("after")
        events = json.loads((tmp_path / "memory_events.json").read_text(encoding="utf-8"))
    assert [event["memory_log"] for event in events] == [
        "load: incremental_memory=4.00 MB",
        "after: peak_memory=4.00 MB",
    ]


def test_a_simulated_card_is_not_traced_where_there_is_no_real_one(tmp_path: Path) -> None:
    with simulated_gpu("rtx4090"):
        activities = trace_settings(str(tmp_path))["activities"]
    assert set(activities) <= torch.profiler.supported_activities()


def test_weights_come_from_files_onto_the_card_and_go_back(tmp_path: Path) -> None:
    safetensors = pytest.importorskip("safetensors.torch")
    torch.save({"w": torch.ones(3)}, tmp_path / "w.pt")
    safetensors.save_file({"w": torch.ones(1024, 1024)}, tmp_path / "w.safetensors")
    with simulated_gpu("rtx4090"):
        small = torch.load(tmp_path / "w.pt", map_location="cuda")["w"]
        large = safetensors.load_file(tmp_path / "w.safetensors", device="cuda")["w"]
        assert small.is_cuda
        assert large.is_cuda
        assert allocated() == 4 * MIB + 512
        torch.save([small * 2], tmp_path / "again.pt")
        assert torch.load(tmp_path / "again.pt")[0].tolist() == [2, 2, 2]


def test_a_program_goes_on_with_the_first_token_and_stops_by_its_own_rule() -> None:
    """What argmax finds hangs on unknown values; that the length is reached does not."""
    with simulated_gpu("rtx4090") as gpu, torch.no_grad():
        table = torch.randn(1000, 1000, device="cuda")
        ids = torch.zeros(1, 1, dtype=torch.long, device="cuda")
        for length in range(2, 100):
            token = table[ids[:, -1]].argmax(-1)
            ids = torch.cat([ids, token[:, None]], -1)
            done = torch.full((1,), length >= 8, device="cuda") | torch.isin(ids[:, -1], torch.tensor([7]).cuda())
            if done.all():
                break
        assert ids.shape == (1, 8)
        assert any("zeros were taken" in gap for gap in gpu.gaps)
        with pytest.raises(UnknownOperation, match=r"aten\.nonzero"):
            (ids == 0).nonzero()


def test_operations_with_temporary_memory_of_unknown_size_are_listed() -> None:
    with simulated_gpu("h200") as gpu:
        torch.randn(100_000, device="cuda").sort()
        assert gpu.gaps[0].startswith("aten.sort")
        assert gpu.peak.basis == "estimated"


def test_a_custom_operation_is_listed_and_can_be_stated() -> None:
    @torch.library.custom_op("wanvram_test::grow", mutates_args=())
    def grow(x: torch.Tensor) -> torch.Tensor:
        return x.repeat(2)

    with simulated_gpu("rtx4090"), pytest.raises(UnknownOperation, match=r"wanvram_test\.grow.*register_operation"):
        grow(torch.zeros(4, device="cuda"))
    grow.register_fake(lambda x: x.new_empty(2 * x.shape[0]))
    with simulated_gpu("rtx4090") as gpu:
        assert grow(torch.zeros(MIB, device="cuda")).shape == (2 * MIB,)
        assert any("wanvram_test.grow" in gap for gap in gpu.gaps)
    register_operation("wanvram_test.grow.default", taken=lambda x: 64 * MIB)
    with simulated_gpu("rtx4090") as gpu:
        grow(torch.zeros(MIB, device="cuda"))
        assert torch.cuda.max_memory_allocated() == (4 + 8 + 64) * MIB
        assert not any("wanvram_test.grow" in gap for gap in gpu.gaps)


def test_compilers_and_graphs_are_refused_by_name() -> None:
    with simulated_gpu("rtx4090"):
        with pytest.raises(Unsupported, match=r"torch\.compile is not simulated"):
            torch.compile(nn.Linear(2, 2))
        with pytest.raises(Unsupported, match="a CUDA graph is not simulated"):
            torch.cuda.CUDAGraph()
    with simulated_gpu("rtx4090", compile_eagerly=True) as gpu:
        assert torch.compile(nn.Linear(2, 2).cuda())(torch.zeros(1, 2, device="cuda")).shape == (1, 2)
        assert any("torch.compile was run eagerly" in gap for gap in gpu.gaps)


def test_a_module_that_stays_on_the_host_is_no_silent_zero() -> None:
    class Stubborn(nn.Linear):
        def _apply(self, fn: Any, recurse: bool = True) -> Any:
            return self

    with simulated_gpu("rtx4090"), pytest.raises(InputError, match="2 of 2 tensors are not on cuda: weight, bias"):
        Stubborn(2, 2).to("cuda")


def test_a_run_that_never_touches_the_card_says_so() -> None:
    with simulated_gpu("rtx4090") as gpu:
        torch.zeros(3).sum()
    assert "nothing was put on the card" in gpu.gaps


# --- before and after --------------------------------------------------------------------------------------------------------


def surface() -> dict[str, Any]:
    owners = {
        "torch": torch,
        "cuda": torch.cuda,
        "memory": torch.cuda.memory,
        "accelerator": torch.accelerator,
        "Module": nn.Module,
        "Tensor": torch.Tensor,
        "Thread": threading.Thread,
    }
    return {f"{name}.{key}": value for name, owner in owners.items() for key, value in vars(owner).items()}


def test_everything_is_as_before_also_after_an_exception() -> None:
    with simulated_gpu("rtx4090"):
        pass  # what PyTorch itself imports lazily is there now
    before = surface()
    with pytest.raises(ZeroDivisionError), simulated_gpu("rtx4090"):
        nn.Linear(1 // 0, 4).cuda()
    after = surface()
    assert after.keys() == before.keys()
    assert not [name for name, value in before.items() if after[name] is not value]
    assert torch.zeros(2).device.type == "cpu"
    meta = torch.zeros(2, 3, device="meta")
    assert meta.is_meta
    assert nn.functional.linear(meta, torch.zeros(5, 3, device="meta")).shape == (2, 5)
    with (
        pytest.raises(InputError, match="one GPU is simulated at a time"),
        simulated_gpu("rtx4090"),
        simulated_gpu("rtx4090"),
    ):
        pass


def test_an_unknown_card_is_refused() -> None:
    with pytest.raises(InputError, match="GPU 'rtx1' is unknown"), simulated_gpu("rtx1"):
        pass


def test_the_report_names_peak_owner_and_gaps() -> None:
    with simulated_gpu("rtx4090", vram="1GiB") as gpu:
        kept = torch.zeros(64 * MIB, dtype=torch.uint8, device="cuda")
    text = gpu.report()
    assert kept.shape
    assert "simulated NVIDIA GeForce RTX 4090: fits in 1.00 GiB" in text
    assert "test_simulated_gpu.test_the_report_names_peak_owner_and_gaps" in text
    assert gpu.timeline().moments[0].allocated_bytes == 64 * MIB
