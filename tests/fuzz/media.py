"""Pictures and videos: bytes changed, cut, of stated sizes that are not true, with any EXIF, without frames, of other kinds."""

from __future__ import annotations

import io
import random
import struct
import zlib
from itertools import islice
from pathlib import Path

import av
from PIL import Image

from fuzz.judge import Trial, sentence
from fuzz.mutations import mutated
from fuzz.places import odd_kind, write_odd
from wanvram.media.inputs import prepare_inputs
from wanvram.request import Request

__all__ = ["try_media"]

SIDES = [0, 1, 2, 15, 16, 17, 80, 8000, 8192, 8193, 65_535, 65_536, 1 << 31, (1 << 32) - 1]


def try_media(rng: random.Random, sources: Path, now: Path) -> list[Trial]:
    source = rng.choice(sorted((sources / "media").iterdir()))
    place = now / rng.choice(
        [source.name, source.name, "x" + rng.choice([".png", ".jpg", ".webp", ".gif", ".mp4", ".mkv"])]
    )
    how = rng.random()
    if how < 0.04:
        write_odd(place, odd_kind(rng))
    elif how < 0.2:
        place.write_bytes(_png(rng))
    elif how < 0.3:
        place.write_bytes(_with_exif(rng))
    elif how < 0.4:
        place.write_bytes(_video(rng))
    elif how < 0.55 and source.suffix == ".mp4":
        place.write_bytes(_boxes(source.read_bytes(), rng))
    else:
        place.write_bytes(mutated(source.name, source.read_bytes(), rng))
    other = str(sources / "media" / "a.png")
    requests = [
        ("i2v-14B", {"image": str(place)}),
        ("flf2v-14B", rng.choice([{"first_frame": str(place), "last_frame": other}, {"first_frame": other, "last_frame": str(place)}])),
        ("vace-1.3B", {"src_video": str(place)}),
        ("vace-1.3B", {"src_video": str(sources / "media" / "a.mp4"), "src_mask": str(place)}),
        ("vace-1.3B", {"src_ref_images": (str(place),)}),
    ]  # fmt: skip
    is_video = place.suffix in (".mp4", ".mkv", ".avi")
    task, given = rng.choice(requests[2:4] if is_video and rng.random() < 0.8 else requests)
    return [
        sentence(f"{task} {given} simulated={simulated}", lambda s=simulated: _prepared(task, given, s))
        for simulated in (True, False)
    ]


def _prepared(task: str, given: dict[str, object], simulated: bool) -> None:
    request = Request.for_task(task, size="832*480" if task != "flf2v-14B" else "1280*720", frame_num=5, **given)
    inputs, _ = prepare_inputs(request, simulated=simulated, real_weights=True)
    for pieces in (inputs.source, inputs.mask):
        if pieces is not None:
            for _ in islice(pieces(), 6):
                pass


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(rng: random.Random) -> bytes:
    """Any size, depth and colour type, before few pixels or ones that unpack to many."""
    width, height = rng.choice(SIDES), rng.choice(SIDES)
    head = struct.pack(
        ">IIBBBBB",
        width,
        height,
        rng.choice([1, 2, 4, 8, 16, 3]),
        rng.choice([0, 2, 3, 4, 6, 7]),
        0,
        0,
        rng.choice([0, 0, 1, 2]),
    )
    pixels = zlib.compress(bytes(rng.choice([0, 1, 1000, 3 * 80 * 81, 5_000_000])))
    chunks = [_chunk(b"IHDR", head), _chunk(b"PLTE", bytes(rng.choice([0, 3, 768, 5])))]
    chunks += [
        _chunk(
            rng.choice([b"tEXt", b"iCCP", b"eXIf", b"acTL", b"fcTL", b"zTXt"]), rng.randbytes(rng.choice([0, 4, 40]))
        )
    ]
    chunks += [_chunk(b"IDAT", pixels[: rng.choice([10**9, 5])]), _chunk(b"IEND", b"")]
    rng.shuffle(chunks) if rng.random() < 0.1 else None
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks[: rng.choice([9, 9, 9, 3, 1])])


def _with_exif(rng: random.Random) -> bytes:
    exif, out = Image.Exif(), io.BytesIO()
    exif[0x0112] = rng.choice([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 255, 65_535])
    size = rng.choice([(80, 60), (16, 16), (15, 400), (1, 1), (400, 3), (3000, 20)])
    kind = rng.choice(["JPEG", "PNG", "WEBP"])
    Image.new("RGB", size, (1, 2, 3)).save(out, kind, exif=exif)
    return out.getvalue() if rng.random() < 0.4 else mutated("x", out.getvalue(), rng)


def _video(rng: random.Random) -> bytes:
    """Of no frame, of sound only, of a strange rate or size."""
    out = io.BytesIO()
    what = rng.choice(["none", "sound", "rate", "size"])
    with av.open(out, "w", format=rng.choice(["mp4", "matroska"])) as container:
        if what == "sound":
            container.add_stream("aac", rate=44100)
        stream = container.add_stream("libx264", rate=rng.choice([1, 16, 1000]) if what == "rate" else 16)
        stream.width, stream.height = (
            rng.choice([(64, 64), (16, 16), (14, 64), (640, 16)]) if what == "size" else (64, 64)
        )
        stream.pix_fmt = "yuv420p"
        frame = av.VideoFrame(stream.width, stream.height, "yuv420p")
        for _ in range(0 if what in ("none", "sound") else rng.choice([1, 2, 5])):
            container.mux(stream.encode(frame))
        if what != "none":
            container.mux(stream.encode())
    return out.getvalue()


def _boxes(whole: bytes, rng: random.Random) -> bytes:
    """One to three numbers after the name of a box changed, or the box's size."""
    data = bytearray(whole)
    for _ in range(rng.randint(1, 3)):
        names = [
            n
            for n in (
                b"tkhd",
                b"mvhd",
                b"mdhd",
                b"stsz",
                b"stco",
                b"stts",
                b"stsc",
                b"elst",
                b"avcC",
                b"stsd",
                b"avc1",
                b"moov",
            )
            if n in data
        ]
        if names:
            at = data.index(rng.choice(names)) + rng.choice([-4, 4, 8, 12, 16, 20, 24, 28, 32, 80])
            data[at : at + 4] = struct.pack(
                ">I", rng.choice([0, 1, 7, 255, 65_536, 1 << 30, (1 << 32) - 1, rng.getrandbits(32)])
            )
    return bytes(data)
