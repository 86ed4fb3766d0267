"""What `wanvram check` found, and the cards that it lists, as plain text. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from wanvram.machine.attention_cache import HEAD_DIM, Measured
from wanvram.report.terminal import listed, table
from wanvram.simulate.card import GPU
from wanvram.units import GIB, human

__all__ = ["attention_text", "cards_text", "check_text"]


def check_text(checks: dict[str, Any]) -> str:
    """Versions, GPUs, who uses them, host, and what would falsify a measurement. `checks` is what run_checks returns."""
    cuda = checks["cuda"] or "none (CPU build)"
    versions = f"torch {checks['torch']}, CUDA {cuda}, driver {checks['driver'] or 'none'}"
    parts = [versions, _gpus(checks["gpus"]), _processes(checks["gpus"]), _host(checks["host"])]
    variables = "\n".join(f"{name}={value}" for name, value in checks["variables"].items())
    parts.append(variables or "No allocator setting in the environment.")
    if checks.get("warm_up"):
        warm = checks["warm_up"]
        parts.append(f"Warmed up: SM clock {warm['sm_clock_before_mhz']} -> {warm['sm_clock_after_mhz']} MHz.")
    if checks["warnings"]:
        parts.append("\n  ".join(["What would falsify a measurement:", *checks["warnings"]]))
    else:
        parts.append("Nothing here would falsify a measurement.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _gpus(gpus: list[dict[str, Any]]) -> str:
    rows = []
    for gpu in gpus:
        sizes = [human(gpu[f"{key}_bytes"]) for key in ("free", "used", "total")]
        busy = "-" if gpu["utilization_percent"] is None else f"{gpu['utilization_percent']} %"
        heat = "-" if gpu["temperature_c"] is None else f"{gpu['temperature_c']} C"
        clock = "-" if gpu["sm_clock_mhz"] is None else f"{gpu['sm_clock_mhz']} of {gpu['max_sm_clock_mhz']} MHz"
        rows.append([f"{gpu['index']} {gpu['name']}", *sizes, busy, heat, clock])
    return listed(["GPU", "free", "in use", "total", "busy", "temperature", "SM clock"], rows)


def _processes(gpus: list[dict[str, Any]]) -> str:
    rows = []
    for process in (process for gpu in gpus for process in gpu["processes"]):
        used = "-" if process["used_bytes"] is None else human(process["used_bytes"])
        name, own = f"{process['pid']} {process['name']}", "yes" if process["own"] else "no"
        rows.append([name, str(process["gpu"]), process["user"] or "-", used, own])
    return listed(["process on the GPU", "GPU", "user", "memory", "yours"], rows)


def _host(host: dict[str, Any]) -> str:
    return (
        f"Host RAM {human(host['ram_available_bytes'])} free of {human(host['ram_total_bytes'])}; "
        f"disk of {host['disk']} {human(host['disk_free_bytes'])} free; "
        f"load {host['load_average']:.1f} on {host['cpu_count']} cores; an operation is issued in {host['operation_us']:.1f} us"
    )


def attention_text(measured: Measured, missing: Mapping[str, str], best: str | None) -> str:
    """Milliseconds and TFLOP/s of each backend, why others are missing, and what `auto` makes of it. No torch."""
    rows = [["use", "heads x queries x keys", "backend", "ms", "TFLOP/s"]]
    for shape in measured.shapes:
        size = f"{shape.heads} x {shape.queries} x {shape.keys}"
        flops = 4 * shape.heads * shape.queries * shape.keys * HEAD_DIM
        for name, time in sorted(shape.seconds.items(), key=lambda item: float(item[1])):
            rows.append([shape.use, size, name, f"{1e3 * time:.2f}", f"{flops / time / 1e12:.1f}"])
    said = measured.conditions
    lines = [f"{said.card}, driver {said.driver}, torch {said.torch}, cuDNN {said.cudnn}", "", table(rows)]
    lines += ["", *(f"{name}: {why}" for name, why in missing.items())] if missing else []
    taken = "" if best is None else f"fastest for self- and cross-attention together: {best}"
    where = "on cards that wanvram's own table was not measured on"
    return "\n".join([*lines, "", f"{taken}; --attention auto takes it {where}.", ""])


def cards_text(cards: Sequence[GPU]) -> str:
    """One line a card; what the columns mean below."""
    width = max(len(card.key) for card in cards)
    rows = [["card".ljust(width) + "  name", "memory", "16-bit", "float32", "bandwidth", "link", "figures"]]
    rows += [
        [
            f"{card.key.ljust(width)}  {card.name}",
            f"{card.memory_bytes // GIB} GB",
            f"{card.product_flops / 1e12:,.1f}",
            f"{card.fp32_flops / 1e12:,.1f}",
            f"{card.bandwidth_bytes / 1e9:,.0f}",
            f"{card.pcie_bytes / 1e9:,.1f}",
            "measured" if card.measured else "estimated",
        ]
        for card in cards
    ]
    return (
        f"{table(rows)}\n\n"
        "16-bit: TFLOP/s that large products reach under sustained load; float32: published TFLOP/s without matrix units;\n"
        "bandwidth: published GB/s of the memory; link: GB/s from pinned host memory.\n"
        "Any name of a card that fits one does for --gpu; `--cards --json` prints every figure with its source, and one such row,\n"
        "changed and saved as FILE.yaml, describes a card that is not here: --gpu FILE.yaml.\n"
    )
