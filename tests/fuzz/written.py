"""YAML as nobody would write it: made of every kind of node, and good files of ours changed."""

# ruff: noqa: E501  # tables of odd values
from __future__ import annotations

import gzip
import random
from pathlib import Path

from fuzz.judge import Trial, command
from fuzz.mutations import mutated
from fuzz.places import odd_kind, write_odd

__all__ = ["made", "try_card", "try_yaml"]

SCALARS = [
    "", "~", "null", "true", "yes", "off", "0", "-1", "1", "5", "07", "0o17", "0x1F", "0b11", "1_000", "1:30", "190:20:30.15", "1e400",
    "-.inf", ".nan", ".NaN", "1e-400", "1.0e+14", "9" * 30, "9" * 5000, "0x" + "f" * 300, "2026-11-28", "2026-11-28t21:59:43.10-05:00",
    "9999-99-99", "0000-00-00", "=", "<<", "'a'", '"\\ud800"', '"\\0"', '"\\x1b]0;t\\a"', '"\\U0010ffff"', '"\\U00110000"', '"\\', "|", ">-",
    "*a", "&a", "&a x", "!", "!!", "!a", "!!python/object:os.system [ls]", "!!python/name:os", "!<tag:x>", "@", "`", "%", "? a", "- a",
    "名字", "\u202e", "\x85", "\t", "a: b", "#", "t2v-1.3B", "i2v-14B", "832*480", "832x480", "bf16", "fp8", "block", "full", "tiny", "random",
    "simulated", "cuda", "h200", "8GiB", "-8GiB", "1e30GiB", "auto", "a" * 300, "x" * 70_000, "../x", "/dev/zero", "[a", "{a", "]", "}",
]  # fmt: skip
TAGS = [
    "int",
    "float",
    "bool",
    "null",
    "timestamp",
    "binary",
    "set",
    "map",
    "omap",
    "pairs",
    "seq",
    "str",
    "merge",
    "value",
]
KEYS = [
    "name", "description", "model_config", "precision", "device", "load_strategy", "offload", "t5_cpu", "optimization", "attention_slicing", "attention_backend",
    "rows_per_chunk", "cfg", "weights_in", "resident_blocks", "weight_storage", "product_precision", "vae_tile", "vae_precision", "request", "task", "size",
    "frame_num", "sample_steps", "sample_shift", "sample_guide_scale", "sample_solver", "base_seed", "prompt", "prompts", "weights", "gpu",
    "memory_limit_bytes", "image", "first_frame", "last_frame", "src_video", "src_mask", "src_ref_images", "profiling", "measurement",
    "base", "axes", "include", "exclude", "request.task", "model_config.offload", "schema", "<<", ".nan", "1", "~", "? [a]", "? {a: b}",
]  # fmt: skip
START = "name: x\nmodel_config: {precision: fp32, device: simulated}\nrequest: {task: t2v-1.3B, size: 832*480, frame_num: 5, "


def made(rng: random.Random) -> bytes:
    """A document of one to three sections, or a good configuration with one strange value."""
    how = rng.random()
    if how < 0.45:
        text = f"{START}{rng.choice(KEYS)}: {_node(rng, 2)}}}\n{rng.choice(KEYS)}: {_node(rng, 3)}\n"
    elif how < 0.6:
        text = "".join(f"{rng.choice(KEYS)}: {_node(rng, 3)}\n" for _ in range(rng.randint(1, 6)))
    elif how < 0.75:
        axes = ", ".join(f"{rng.choice(KEYS)}: {_node(rng, 1)}" for _ in range(rng.randint(1, 3)))
        text = f"base:\n  {START.replace(chr(10), chr(10) + '  ')}weights: tiny}}\naxes: {{{axes}}}\n{rng.choice(KEYS[-16:])}: {_node(rng, 2)}\n"
    else:
        text = _extreme(rng)
    return _encoded(text, rng)


def _node(rng: random.Random, depth: int) -> str:
    kind = rng.random() if depth else 1.0
    if kind < 0.2:
        text = "[" + ", ".join(_node(rng, depth - 1) for _ in range(rng.randint(0, 3))) + "]"
    elif kind < 0.4:
        pairs = [f"{rng.choice(KEYS)}: {_node(rng, depth - 1)}" for _ in range(rng.randint(0, 3))]
        text = "{" + ", ".join(pairs) + "}"
    else:
        text = rng.choice(SCALARS)
    decoration = rng.random()
    if decoration < 0.1:
        return f"!!{rng.choice(TAGS)} {text}"
    return f"&a {text}" if decoration < 0.15 else text


def _extreme(rng: random.Random) -> str:
    """Much of one thing: depth, width, repetition, references."""
    count = rng.choice([2, 50, 900, 3000, 20_000])
    return rng.choice([
        "[" * count,
        "name: " + "[" * count + "]" * count,
        "{a: " * count + "}" * count,
        "- " * count + "a",
        "? " * count + "a",
        "a: &a [x]\nb: [" + "*a, " * count + "]",
        "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, min(count, 900))),
        "name: x\n" * count,
        "".join(f"k{n}: {n}\n" for n in range(count)),
        "name: 1" + ":1" * count,
        "name: " + "9" * count,
        "name: " + "a" * count,
        "#" * count,
        "\n" * count,
        "--- a\n" * count,
        "%YAML 1.1\n%TAG ! x\n--- {name: x}",
        "%YAML " + "9" * count + ".1\n--- a",
        "axes: {" + ", ".join(f"k{n}: [1]" for n in range(count)) + "}\nbase: {}",
        "base: {name: x}\naxes: {request.base_seed: [" + ", ".join(map(str, range(count))) + "]}",
        "base: {name: x}\naxes: {}\ninclude: [" + "{name: a}, " * count + "]",
        "request: {prompts: [" + "a, " * count + "]}",
        "!!" + "a" * count + " x",
        "? !!set {" + "a, " * min(count, 900) + "}\n: b",
        "name: |\n" + " a\n" * count,
        "name: \"" + "\\x1b" * count + '"',
    ])  # fmt: skip


def _encoded(text: str, rng: random.Random) -> bytes:
    how = rng.random()
    if how < 0.85:
        return text.encode("utf-8", "surrogatepass")
    if how < 0.9:
        return gzip.compress(text.encode("utf-8", "surrogatepass"))[: rng.choice([10_000_000, 30])]
    code = rng.choice(["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "utf-7", "cp1252", "shift_jis"])
    return text.encode(code, "replace")


def _written(kind: str, rng: random.Random, sources: Path, now: Path) -> Path:
    place = now / "x.yaml"
    if rng.random() < 0.03:
        write_odd(place, odd_kind(rng))
    elif rng.random() < 0.6:
        place.write_bytes(made(rng))
    else:
        source = rng.choice(sorted((sources / kind).glob("*.yaml")))
        place.write_bytes(mutated(source.name, source.read_bytes(), rng))
    return place


def try_yaml(rng: random.Random, sources: Path, now: Path) -> list[Trial]:
    place = str(_written("yaml", rng, sources, now))
    commands = [
        ["profile", place, "-o", str(now / "out")],
        ["estimate", "--config", place],
        ["plan", "--config", place, "--gpu", "rtx4090"],
    ]
    return [command(rng.choice(commands), (0, 1, 2, 3)), command(commands[0])]


def try_card(rng: random.Random, sources: Path, now: Path) -> list[Trial]:
    place = str(_written("card", rng, sources, now))
    return [command(["plan", "--task", "t2v-1.3B", "--size", "480p", "--vram", "8GiB", "--gpu", place], (0, 2, 3))]
