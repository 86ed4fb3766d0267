"""A card made by hand: forecasts as pure functions of the strategy, with the sizes of the real models."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from wanvram.config import Request, RunConfig, Strategy
from wanvram.knobs import gpus, videos_per_pass, weight_passes
from wanvram.planner.budget import Budget
from wanvram.planner.forecasts import Forecast, StageForecast
from wanvram.planner.result import Plan
from wanvram.planner.search import Options, search
from wanvram.planner.transformer import block_count
from wanvram.specs import DIT
from wanvram.units import MIB

__all__ = ["Card", "plan"]

CONTEXT = 760 * MIB  # CUDA context and libraries on the H200
DISK_RATE = 3e9
MOST_GPUS = 8
FORWARDS = 2  # per step: with the prompt and without


def plan(request: Request, budget: Budget, options: Options, forecast: Forecast) -> Plan:
    """As `search`, where something fits."""
    result = search(request, budget, options, forecast)
    assert isinstance(result, Plan), result.message
    return result


@dataclass
class Card:
    """Sizes of the real models and a time of max(compute, copies) per block; remembers what it was asked."""

    copy_rate: float = 55e9
    flops: float = 500e12
    timed: bool = True
    calls: list[tuple[str, Strategy, Request]] = field(default_factory=list)
    configs: list[RunConfig] = field(default_factory=list)

    def __call__(self, config: RunConfig, component: str) -> StageForecast:
        assert config.memory_limit_bytes is None
        self.calls.append((component, config.strategy, config.request))
        self.configs.append(config)
        part = "vae" if component.startswith("vae") else component
        assert config.gpus <= MOST_GPUS
        base, extra, host, seconds = getattr(self, part)(config.request, config.strategy)
        step = self.step_seconds(config.request, config.strategy) if component == "dit" else None
        peak = base + extra
        return StageForecast(
            component,
            CONTEXT + peak,
            peak,
            peak - 2 * MIB,
            base,
            host,
            step if self.timed else None,
            seconds if self.timed else None,
            config.strategy.batch_size,
        )

    def rate(self, home: str) -> float:
        return {"pinned": self.copy_rate, "pageable": min(self.copy_rate, 9.1e9), "disk": DISK_RATE}[home]

    def text_encoder(self, request: Request, s: Strategy) -> tuple[int, int, int, float]:
        whole, layer = 10600 * MIB, 390 * MIB
        if s.t5_cpu:
            return 0, 20 * MIB, whole, 40.0
        if s.load_strategy == "full":
            return whole, 60 * MIB, 0, 5.0
        host = 2 * layer if s.weights_in == "disk" else whole
        return 2 * layer, 60 * MIB, host, 5.0 + 2 * whole / self.rate(s.weights_in)

    def image_encoder(self, request: Request, s: Strategy) -> tuple[int, int, int, float]:
        if s.load_strategy == "full":
            return 1200 * MIB, 40 * MIB, 0, 1.0
        return 80 * MIB, 40 * MIB, 1200 * MIB, 1.1

    def vae(self, request: Request, s: Strategy) -> tuple[int, int, int, float]:
        """Activations follow the area of a tile with its halo of 8 latent pixels on every side."""
        rows, columns = request.height // 8, request.width // 8
        if s.vae_tile is None:
            covered = area = rows * columns
        else:
            area = min(rows, s.vae_tile + 16) * min(columns, s.vae_tile + 16)
            covered = math.ceil(rows / s.vae_tile) * math.ceil(columns / s.vae_tile) * area
        if s.vae_tile is not None:
            covered = math.ceil(covered / gpus(s))  # tiles are shared
        element = 4 if s.vae_precision == "fp32" else 2
        frames = (request.frame_num + 3) // 4
        return 250 * MIB, int(area * 0.5 * element * MIB) // 4 + 60 * MIB, 0, covered * frames * 2e-5

    def block_bytes(self, request: Request, s: Strategy) -> int:
        spec = DIT[request.task]
        parameters = 8 * spec.dim**2 + 2 * spec.dim * spec.ffn_dim
        return parameters * (1 if s.weight_storage == "fp8" else 4 if s.precision == "fp32" else 2)

    def dit(self, request: Request, s: Strategy) -> tuple[int, int, int, float]:
        block, blocks = self.block_bytes(request, s), block_count(request)
        streams = (2 if s.cfg == "joint" else 1) * videos_per_pass(s)
        tokens, dim = self.tokens(request), DIT[request.task].dim
        rows = min(tokens, s.rows_per_chunk or 8192)
        shares = s.ulysses_size * s.ring_size
        in_ram = s.residual_in == "pinned"
        kept = min(tokens, 3 * rows) if in_ram else tokens * streams
        attending = tokens * (4 if s.attention_slicing or in_ram else 8)
        extra = dim * (4 * kept + attending) // shares + rows * dim * 24
        extra += tokens * dim * 6 if s.ring_size > 1 else 0
        keepers = gpus(s) if s.dit_fsdp else 1
        if s.load_strategy == "full":
            return blocks * block // keepers + (2 * block if s.dit_fsdp else 0), extra, tokens * dim * 4 * in_ram, 8.0
        resident = min(s.resident_blocks, blocks)
        host = 2 * block if s.weights_in == "disk" else (blocks - resident) * block * gpus(s) // keepers
        host += tokens * dim * 4 * in_ram
        return (resident + min(2, blocks - resident)) * block, extra, host, 8.0

    def tokens(self, request: Request) -> int:
        return ((request.frame_num + 3) // 4) * request.height * request.width // 256

    def step_seconds(self, request: Request, s: Strategy) -> float:
        tokens, dim, blocks = self.tokens(request), DIT[request.task].dim, block_count(request)
        in_ram = s.residual_in == "pinned"
        slower = (1.005 if s.attention_slicing or in_ram else 1.0) * (1.03 if s.rows_per_chunk else 1.0)
        forwards = (FORWARDS if request.guided else 1) / (s.cfg_size * s.ulysses_size * s.ring_size)
        exchanged = 1.05 if s.ulysses_size > 1 else 1.02 if s.ring_size > 1 else 1.0
        forwards *= exchanged
        compute = (
            s.batch_size
            * forwards
            * (2 * tokens * self.block_bytes(request, Strategy()) / 2 + 4 * tokens**2 * dim)
            / self.flops
        )
        streamed = 0 if s.load_strategy == "full" else blocks - min(s.resident_blocks, blocks)
        copies = weight_passes(s, guided=request.guided) * self.block_bytes(request, s) / self.rate(s.weights_in)
        copies /= gpus(s) if s.dit_fsdp else 1
        copies += forwards * s.batch_size * 2 * tokens * dim * 4 / self.copy_rate if in_ram else 0
        return (blocks - streamed) * compute * slower + streamed * max(compute * slower, copies)
