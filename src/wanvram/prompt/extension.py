"""Prompt extension as a step of a run: a local language model that has left the device before T5 enters it, or DashScope."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from wanvram.engine.devices import Device
from wanvram.errors import OutOfMemory, WanvramError
from wanvram.prompt import dashscope
from wanvram.prompt.local_model import check_extender, default_model, load_extender
from wanvram.record import ComponentRecord
from wanvram.recorder.recorder import Recorder
from wanvram.request import Request

__all__ = ["Extension", "prompt_extension"]

NAME = "prompt_extender"


@dataclass
class Extension:
    """Called by the pipeline before anything else: returns the prompts to use. `record` is the local model's, once loaded.

    endpoint: the service that is asked; None: a local model.
    """

    request: Request
    pictures: list[Path]
    endpoint: dashscope.Endpoint | None
    notes: list[str] = field(default_factory=list)
    record: ComponentRecord | None = None

    def __call__(self, device: Device, recorder: Recorder) -> Sequence[str]:
        request = self.request
        options: dict[str, Any] = {"target_lang": request.prompt_extend_target_lang, "seed": request.base_seed}
        if self.endpoint is None:
            return self._locally(device, recorder, options)
        options["model"] = request.prompt_extend_model or dashscope.default_model(vision=bool(self.pictures))
        options["pictures"] = [_upload(path) for path in self.pictures]
        return self._extended(recorder, partial(dashscope.extend_by_dashscope, endpoint=self.endpoint, **options))

    def _locally(self, device: Device, recorder: Recorder, options: dict[str, Any]) -> list[str]:
        with recorder.span(f"load {NAME}", kind="load", component=NAME) as span:
            extender = load_extender(_local_model(self.request, self.pictures), device, vision=bool(self.pictures))
        base = span.end.allocated_bytes - span.start.allocated_bytes
        self.record = ComponentRecord(NAME, extender.parameters, base, 0, 0)
        try:
            return self._extended(recorder, partial(extender.extend, pictures=self.pictures, **options))
        finally:
            extender.release()
            device.empty_cache()

    def _extended(self, recorder: Recorder, extend: Callable[[str], str]) -> list[str]:
        with recorder.span("extend_prompt", kind="stage", component=NAME):
            return [self._one(prompt, extend) for prompt in self.request.all_prompts()]

    def _one(self, prompt: str, extend: Callable[[str], str]) -> str:
        """Where it fails the prompt as it is, if the user allowed that."""
        try:
            return extend(prompt)
        except WanvramError as error:
            if not self.request.prompt_extend_optional or isinstance(error, OutOfMemory):
                raise
            self.notes.append(f"the prompt was used as it is: {error}")
            return prompt


def prompt_extension(request: Request, *, simulated: bool) -> Extension | None:
    """What extends the prompts of a request, if it asks for that. Raises InputError for a missing key or model."""
    if not request.use_prompt_extend:
        return None
    pictures = [Path(path) for path in (request.image, request.first_frame, request.last_frame) if path]
    if request.prompt_extend_method == "dashscope":
        if simulated:
            return None  # it takes nothing of the card, and a prediction asks no service
        endpoint = dashscope.Endpoint(dashscope.api_key(os.environ), dashscope.api_url(os.environ))
        return Extension(request, pictures, endpoint)
    check_extender(_local_model(request, pictures), simulated=simulated)
    return Extension(request, pictures, None)


def _local_model(request: Request, pictures: list[Path]) -> str:
    return request.prompt_extend_model or default_model(vision=bool(pictures))


def _upload(path: Path) -> tuple[bytes, str]:
    from PIL import Image

    with Image.open(path) as picture:
        return dashscope.encode_picture(picture)
