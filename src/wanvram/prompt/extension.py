"""Prompt extension as a step of a run: a local language model that has left the device before T5 enters it, or DashScope."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from wanvram.engine.devices import Device
from wanvram.errors import OutOfMemory, WanvramError
from wanvram.prompt import dashscope
from wanvram.prompt.local_model import LocalExtender, check_extender, default_model, load_extender
from wanvram.record import ComponentRecord
from wanvram.recorder.recorder import Recorder
from wanvram.request import Request

__all__ = ["Extension", "prompt_extension"]

NAME = "prompt_extender"


class Extension:
    """Called by the pipeline before anything else: returns the prompts to use. `record` is the local model's, once loaded."""

    def __init__(self, request: Request, extend: Callable[[Extension, Device, Recorder], list[str]]) -> None:
        self.request = request
        self.notes: list[str] = []
        self.record: ComponentRecord | None = None
        self._extend = extend

    def __call__(self, device: Device, recorder: Recorder) -> Sequence[str]:
        return self._extend(self, device, recorder)

    def unextended(self, prompt: str, error: WanvramError) -> str:
        """The prompt as it is, if the user allowed that; else the error."""
        if not self.request.prompt_extend_optional or isinstance(error, OutOfMemory):
            raise error
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
        return Extension(request, lambda e, device, recorder: _by_dashscope(e, recorder, pictures, endpoint))
    check_extender(request.prompt_extend_model or default_model(vision=bool(pictures)), simulated=simulated)
    return Extension(request, lambda e, device, recorder: _locally(e, device, recorder, pictures))


def _by_dashscope(
    extension: Extension, recorder: Recorder, pictures: Sequence[Path], endpoint: dashscope.Endpoint
) -> list[str]:
    request = extension.request
    options: dict[str, Any] = {
        "model": request.prompt_extend_model or dashscope.default_model(vision=bool(pictures)),
        "target_lang": request.prompt_extend_target_lang,
        "pictures": [_upload(path) for path in pictures],
        "seed": request.base_seed,
    }
    extended = []
    with recorder.span("extend_prompt", kind="stage", component=NAME):
        for prompt in request.all_prompts():
            try:
                extended.append(dashscope.extend_by_dashscope(prompt, endpoint, **options))
            except WanvramError as error:
                extended.append(extension.unextended(prompt, error))
    return extended


def _upload(path: Path) -> tuple[bytes, str]:
    from PIL import Image

    with Image.open(path) as picture:
        return dashscope.encode_picture(picture)


def _locally(extension: Extension, device: Device, recorder: Recorder, pictures: Sequence[Path]) -> list[str]:
    request = extension.request
    model = request.prompt_extend_model or default_model(vision=bool(pictures))
    with recorder.span(f"load {NAME}", kind="load", component=NAME) as span:
        extender = load_extender(model, device, vision=bool(pictures))
    base = span.end.allocated_bytes - span.start.allocated_bytes
    extension.record = ComponentRecord(NAME, extender.parameters, base, 0, 0)
    options = {"target_lang": request.prompt_extend_target_lang, "seed": request.base_seed, "pictures": pictures}
    try:
        with recorder.span("extend_prompt", kind="stage", component=NAME):
            return [_extended(extension, extender, prompt, options) for prompt in request.all_prompts()]
    finally:
        extender.release()
        device.empty_cache()


def _extended(extension: Extension, extender: LocalExtender, prompt: str, options: dict[str, Any]) -> str:
    try:
        return extender.extend(prompt, **options)
    except WanvramError as error:
        return extension.unextended(prompt, error)
