"""The video file: what the encoder refuses is a sentence, and nothing is left behind."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from wanvram.errors import OutputError
from wanvram.media.video import VideoWriter


def test_frames_the_encoder_refuses_are_a_sentence_and_leave_no_file(tmp_path: Path) -> None:
    odd = torch.zeros((1, 31, 33, 3), dtype=torch.uint8)  # yuv420p needs even sizes
    with pytest.raises(OutputError, match=r"cannot write .*video\.mp4"), VideoWriter(tmp_path / "video.mp4") as video:
        video.write(odd)
    assert list(tmp_path.iterdir()) == []
