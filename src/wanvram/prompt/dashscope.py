"""Prompt extension by Alibaba's DashScope, through its OpenAI-compatible HTTP interface. Standard library only.

The key travels in one header and nowhere else: no message contains it, a redirect is refused rather than followed with it, and
plain http is allowed to this machine only.
"""

from __future__ import annotations

import base64
import io
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.client import HTTPException, IncompleteRead
from typing import Any
from urllib.parse import urlsplit

from PIL import Image

from wanvram.errors import InputError, WanvramError
from wanvram.prompt.deadline import Cutter, handler, within
from wanvram.prompt.instructions import checked_answer, system_prompt

__all__ = ["DEFAULT_URL", "Endpoint", "api_key", "api_url", "default_model", "encode_picture", "extend_by_dashscope"]

DEFAULT_URL = "https://dashscope.aliyuncs.com/compatible-mode/v1"
KEY_NAMES = ("DASH_API_KEY", "DASHSCOPE_API_KEY")
LARGEST_REPLY = 2**20  # bytes read of a reply
LARGEST_PICTURE = 7 * 2**20  # bytes: the service takes 10 MB of base64
PICTURE_PIXELS = 512 * 512  # the official script shrinks to this before it uploads
MEDIA_TYPES = ("image/png", "image/jpeg", "image/webp")
BACKOFF_S = 1.0  # before the first retry, doubled before each further one
LARGEST_SEED = 2**31 - 1
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
KEY_PART = 4  # characters of the key in a row, in any case, that no message repeats
LONGEST_EXPLANATION = 200  # characters shown of the service's own words


def api_key(environment: Mapping[str, str]) -> str:
    """DASH_API_KEY (the official script's name) or DASHSCOPE_API_KEY. Raises InputError if neither is set."""
    for name in KEY_NAMES:
        key = environment.get(name, "").strip()
        if key:
            return key
    raise InputError("prompt extension by DashScope needs an API key: set DASH_API_KEY or DASHSCOPE_API_KEY")


def api_url(environment: Mapping[str, str]) -> str:
    """DASH_API_URL or the default. The native address the official script takes (.../api/v1) becomes its compatible one."""
    url = environment.get("DASH_API_URL", "").strip().rstrip("/") or DEFAULT_URL
    return url.removesuffix("/api/v1") + "/compatible-mode/v1" if url.endswith("/api/v1") else url


def default_model(*, vision: bool) -> str:
    """The official script's choice of service model."""
    return "qwen-vl-max" if vision else "qwen-plus"


def encode_picture(picture: Image.Image) -> tuple[bytes, str]:
    """(PNG bytes, media type) of at most 512 x 512 pixels' area, the aspect ratio kept, as the official script uploads it.

    Upright, as the transformer sees it: see media.sources.read_picture.
    """
    from PIL import ImageOps

    picture = ImageOps.exif_transpose(picture)
    scale = min(1.0, (PICTURE_PIXELS / (picture.width * picture.height)) ** 0.5)
    size = max(1, round(picture.width * scale)), max(1, round(picture.height * scale))
    buffer = io.BytesIO()
    picture.convert("RGB").resize(size).save(buffer, "PNG")
    return buffer.getvalue(), "image/png"


@dataclass(frozen=True)
class Endpoint:
    """Where and how the service is asked. timeout_s bounds each attempt as a whole; retries: attempts after the first."""

    key: str = field(repr=False)
    url: str = DEFAULT_URL
    timeout_s: float = 60.0
    retries: int = 2


def extend_by_dashscope(
    prompt: str,
    endpoint: Endpoint,
    *,
    model: str,
    target_lang: str,
    pictures: Sequence[tuple[bytes, str]] = (),
    seed: int | None = None,
) -> str:
    """The service's rewriting of `prompt`. `pictures` are (bytes, media type): none, the first frame, or first and last.

    Busy servers and lost connections are tried again. Raises InputError for a refused or malformed key, url, language or
    picture, WanvramError for everything the service or the network does.
    """
    _check_key(endpoint.key)
    body: dict[str, Any] = {"model": model, "messages": _messages(prompt, target_lang, pictures)}
    if seed is not None:
        body["seed"] = seed % (LARGEST_SEED + 1)
    url = endpoint.url.rstrip("/") + "/chat/completions"
    call = _Call(_host(endpoint.url), url, endpoint.key, json.dumps(body).encode(), endpoint.timeout_s)
    for attempt in range(endpoint.retries + 1):
        try:
            return _answer(call.send(), call)
        except _Passing as error:
            if attempt == endpoint.retries:
                times = f" ({attempt + 1} attempts)" if attempt else ""
                raise WanvramError(f"prompt extension failed: {error}{times}") from None
            time.sleep(BACKOFF_S * 2**attempt)
    raise ValueError(f"retries must not be negative, got {endpoint.retries}")


# --- request ---------------------------------------------------------------------------------------------------------


def _check_key(key: str) -> None:
    """http.client would quote a key it cannot send, so it is refused before."""
    if not key or not all("!" <= c <= "~" for c in key):
        raise InputError(
            "the DashScope API key is empty or has a character no key has; check DASH_API_KEY or DASHSCOPE_API_KEY"
        )


def _host(base_url: str) -> str:
    """Host name of a usable base url."""
    try:
        parts = urlsplit(base_url)
        host, port = parts.hostname or "", parts.port
        host.encode("idna")  # as the look-up of the name does
    except ValueError:
        host = ""
    plain = all("!" <= c <= "~" for c in base_url)
    if not host or not plain or parts.username is not None or parts.query or parts.fragment:
        raise InputError(f"the DashScope url must look like {DEFAULT_URL}; check DASH_API_URL")
    if parts.scheme != "https" and not (parts.scheme == "http" and host in LOCAL_HOSTS):
        raise InputError(
            f"the DashScope url starts with {parts.scheme}://{host}, which would send the key unencrypted; use https"
        )
    return f"{host}:{port}" if port else host


def _messages(prompt: str, target_lang: str, pictures: Sequence[tuple[bytes, str]]) -> list[dict[str, Any]]:
    system = {"role": "system", "content": system_prompt(target_lang, len(pictures))}
    if not pictures:
        return [system, {"role": "user", "content": prompt}]
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": _data_url(*p)}} for p in pictures]
    return [system, {"role": "user", "content": [*parts, {"type": "text", "text": prompt}]}]


def _data_url(data: bytes, media_type: str) -> str:
    if media_type not in MEDIA_TYPES:
        raise InputError(f"DashScope takes no picture of type {media_type!r}; allowed: {', '.join(MEDIA_TYPES)}")
    if len(data) > LARGEST_PICTURE:
        raise InputError(f"DashScope takes pictures of at most {LARGEST_PICTURE:,} bytes, not {len(data):,}")
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


class _Passing(Exception):
    """A failure that another attempt may not meet; the text says what happened."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Leaves every redirect an error, its address unread: one that is none would end in a ValueError."""

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> None:
        return None

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


@dataclass(frozen=True)
class _Call:
    host: str
    url: str
    key: str = field(repr=False)
    body: bytes = field(repr=False)
    timeout_s: float

    def send(self) -> bytes:
        """The reply to one POST, at most LARGEST_REPLY + 1 bytes, within timeout_s from the look-up of the name on.

        Raises _Passing for what may pass, InputError and WanvramError for what will not.
        """
        try:
            return within(self.timeout_s, self._exchange)
        except TimeoutError:
            raise self._late() from None

    def _exchange(self, cutter: Cutter) -> bytes:
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.url, self.body, headers, method="POST")
        opener = urllib.request.build_opener(_NoRedirect(), *self._proxies(), handler(cutter))
        try:
            with opener.open(request, timeout=self.timeout_s) as response:
                return bytes(response.read(LARGEST_REPLY + 1))
        except urllib.error.HTTPError as error:
            with error:
                raise self._refusal(error) from None
        except TimeoutError:
            raise self._late() from None
        except urllib.error.URLError as error:
            if isinstance(error.reason, TimeoutError):
                raise self._late() from None
            raise _Passing(f"{self.host} cannot be reached ({_reason(error.reason)})") from None
        except (OSError, HTTPException) as error:
            raise _Passing(f"the connection to {self.host} broke ({_reason(error)})") from None

    def _proxies(self) -> list[urllib.request.BaseHandler]:
        """None for this machine, else those of the environment."""
        is_local = self.host.rpartition(":")[0] in LOCAL_HOSTS or self.host in LOCAL_HOSTS
        return [urllib.request.ProxyHandler({})] if is_local else []

    def _late(self) -> _Passing:
        return _Passing(f"{self.host} gave no complete answer within {self.timeout_s:g} s")

    def _refusal(self, error: urllib.error.HTTPError) -> Exception:
        code = error.code
        if code in (401, 403):
            return InputError(f"{self.host} refused the API key ({code}); check DASH_API_KEY or DASHSCOPE_API_KEY")
        if 300 <= code < 400:
            return WanvramError(
                f"prompt extension failed: {self.host} redirects ({code}), which is not followed with a key; check DASH_API_URL"
            )
        said = f"{self.host} answered {code}{self._explanation(error)}"
        if code == 429 or code >= 500:
            return _Passing(said)
        return WanvramError(f"prompt extension failed: {said}")

    def _explanation(self, error: urllib.error.HTTPError) -> str:
        """` (the service's own words)`, without those that repeat the key or a part of it."""
        try:
            message = json.loads(error.read(LARGEST_REPLY))["error"]["message"]
        except (ValueError, KeyError, TypeError, RecursionError, OSError, HTTPException):
            return ""
        words = "".join(c if c.isprintable() else " " for c in str(message)).split()
        key = self.key.casefold()
        parts = [key[start : start + KEY_PART] for start in range(max(1, len(key) - KEY_PART + 1))]
        kept = [
            "***" if any(part in word.casefold() for part in parts) else word for word in words[:LONGEST_EXPLANATION]
        ]
        text = " ".join(kept)[:LONGEST_EXPLANATION]
        return f" ({text})" if text else ""


def _reason(error: object) -> str:
    """The system's short text of an error, or what it means: never a text that could repeat the request."""
    if isinstance(error, IncompleteRead):
        return "its answer stopped half-way"
    if isinstance(error, HTTPException) and not isinstance(error, OSError):
        return "its answer is no HTTP"
    return str(getattr(error, "strerror", None) or "it was closed without an answer")


# --- answer ----------------------------------------------------------------------------------------------------------


def _answer(reply: bytes, call: _Call) -> str:
    """The text of a chat completion."""
    try:
        if len(reply) > LARGEST_REPLY:
            raise ValueError
        content = json.loads(reply)["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        content = None
    if content is None:
        raise WanvramError(
            f"prompt extension failed: {call.host} sent {len(reply):,} bytes that are not a chat completion; check DASH_API_URL"
        )
    return checked_answer(content, call.host)
