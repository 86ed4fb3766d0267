"""The good inputs that are damaged: one folder for each kind, written anew (10 MiB, 2 s). Needs no pytest."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from checkpoints import as_diffusers, tensors, write_diffusers, write_download, write_tokenizer
from given_files import write_video
from report_runs import Recipe, write_run
from wanvram.recorder.events import EventLog
from wanvram.simulate.card import card_to_json
from wanvram.simulate.gpus import GPUS
from wanvram.spans import Memory
from wanvram.units import MIB
from wanvram.weights.convert import Conversion, convert
from wanvram.weights.official import DIT_FILE, TOKENIZER_FILE

__all__ = ["write_sources"]

HERE = Path(__file__).parent
ADVICE = {"schema": 1, "advice": [{"change": "offload: true", "saved_bytes": 5 << 20, "seconds": 1.5}]}
TINY = """
name: tiny
model_config: {precision: fp32, device: cpu}
request: {task: t2v-1.3B, size: 128*80, frame_num: 5, sample_steps: 1, base_seed: 1, weights: tiny}
"""
MATRIX = """
base:
  name: tiny
  model_config: {device: simulated, load_strategy: block}
  request: {task: t2v-1.3B, size: 832*480, frame_num: 5, sample_steps: 2, base_seed: 1, weights: tiny}
axes:
  model_config.offload: [false, true]
include:
  - {name: tiny-long, request.frame_num: 9}
exclude:
  - {model_config.offload: false}
"""


def write_sources(folder: Path) -> None:
    """run: a run's files; file: what stands alone; yaml: what is written by hand; media; checkpoints: a folder each."""
    run = write_run(folder / "run", Recipe(steps=2, events=3))
    (run / "advice.json").write_text(json.dumps(ADVICE))
    shutil.copytree(HERE.parent / "data" / "field", folder / "file")
    with EventLog(folder / "file" / "memory_events.json") as log:
        log.log("load dit", Memory(300 * MIB, 320 * MIB, 900 * MIB), {"base_memory": 100 * MIB})
        log.log("denoise", Memory(500 * MIB, 640 * MIB, 1200 * MIB))
    shutil.copytree(HERE.parent / "configs", folder / "yaml")
    (folder / "yaml" / "tiny.yaml").write_text(TINY)
    (folder / "yaml" / "tiny_matrix.yaml").write_text(MATRIX)
    (folder / "card").mkdir()
    card = card_to_json(GPUS["rtx4090"]) | {"key": "mine", "measured": False}
    (folder / "card" / "card.yaml").write_text(yaml.safe_dump(card))
    _write_media(folder / "media")
    _write_checkpoints(folder / "checkpoints")


def _write_media(folder: Path) -> None:
    folder.mkdir()
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)) for _ in range(3)]
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a picture"
    for name in ("a.png", "a.jpg", "a.webp", "a.tiff", "a.bmp"):
        told: dict[str, Any] = {} if name == "a.bmp" else {"exif": exif}
        pictures[0].save(folder / name, **told)
    pictures[0].convert("P").save(folder / "a.gif", save_all=True, append_images=pictures[1:])
    pictures[0].convert("RGBA").save(folder / "alpha.png")
    write_video(folder / "a.mp4")
    write_video(folder / "long.mp4", 21, 64, 64)
    write_video(folder / "a.mkv")
    write_video(folder / "a.avi")


def _write_checkpoints(folder: Path) -> None:
    for name in ("official", "sharded", "image", "diffusers", "comfy", "lora", "gguf", "hub", "scaled"):
        (folder / name).mkdir(parents=True)
    write_download(folder / "official", "tiny-t2v")
    write_download(folder / "sharded", "tiny-vace", sharded=True)
    write_download(folder / "image", "tiny-i2v")
    write_diffusers(folder / "diffusers", "tiny-t2v", sharded=True)
    dit = {"model.diffusion_model." + key: value for key, value in tensors("dit", "tiny-t2v").items()}
    save_file(dit, folder / "comfy/wan2.1_t2v_fp16.safetensors")
    save_file(as_diffusers("text_encoder", ""), folder / "comfy/umt5_xxl_fp16.safetensors")
    save_file(tensors("vae", ""), folder / "comfy/wan_2.1_vae.safetensors")
    write_tokenizer(folder / "comfy" / TOKENIZER_FILE)
    some = load_file(folder / "official" / DIT_FILE)
    few = {key: some[key] for key in sorted(some)[:4]}
    save_file({f"diffusion_model.{k}.lora_A.weight": v for k, v in few.items()}, folder / "lora/style.safetensors")
    save_file(some | {"blocks.0.ffn.0.scale_weight": some["head.modulation"].clone()}, folder / "scaled" / DIT_FILE)
    (folder / "gguf/wan2.1-t2v-14b-Q4_K_M.gguf").write_bytes(b"GGUF\x03\0\0\0" + bytes(64))
    snapshot = folder / "hub/models--Wan-AI--Wan2.1-T2V-1.3B/snapshots/37ec512624d61f7aa208f7ea8140a131f93afc9a"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text('{"model_type": "t2v"}')
    convert(Conversion(folder / "official", "bf16"), folder / "converted")
