"""A server on this machine that answers the prompt extension as no service should: it sends a plan of bytes and pauses."""

# ruff: noqa: E501  # tables of odd values
from __future__ import annotations

import json
import random
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path

from fuzz.judge import CONTROLS, Trial, sentence
from fuzz.mutations import mutated
from wanvram.errors import WanvramError
from wanvram.prompt import dashscope
from wanvram.prompt.dashscope import Endpoint, extend_by_dashscope

__all__ = ["try_service"]

KEY = "sk-SECRETKEY0123456789"
TIMEOUT_S = 0.2  # in place of a minute
SLACK_S = 2.0  # of a machine that does something else
CHAT = {
    "choices": [{"message": {"role": "assistant", "content": "a fluffy cat"}}],
    "error": {"message": f"no, {KEY[:9]}"},
}
DRIP_S = 0.005

ODD_HEADERS = [
    *(b"Location: http://[::1", b"Location: /x", b"Location: file:///etc/passwd", b"Connection: close", b"X" * 70_000, b": x", b"X"),
    *(b"\xff: \xff", b" folded", b"Content-Encoding: gzip", b"Content-Length: 5", b"Content-Length: x", b"WWW-Authenticate: Basic", b"A: \x00"),
]  # fmt: skip

Plan = list[tuple[bytes, float]]  # sent, then waited; a pause below 0 resets the connection


class _Server:
    def __init__(self) -> None:
        self.plan: Plan = []
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listening.getsockname()[1]}/v1"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            connected, _ = self._listening.accept()
            threading.Thread(target=self._answer, args=(connected, self.plan), daemon=True).start()

    def _answer(self, connected: socket.socket, plan: Plan) -> None:
        with connected, suppress(OSError):
            connected.settimeout(5)
            connected.recv(1 << 16)
            for data, pause in plan:
                connected.sendall(data)
                if pause < 0:
                    connected.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    return
                time.sleep(pause)


@cache
def _server() -> _Server:
    dashscope.BACKOFF_S = 0.0
    return _Server()


def try_service(rng: random.Random, _sources: Path, now: Path) -> list[Trial]:
    plan = list(_plan(rng))
    (now / "answer").write_bytes(b"".join(data for data, _ in plan)[:100_000])
    retries = rng.choice([0, 0, 1])
    return [sentence(f"{len(plan)} pieces, {retries} retries", lambda: _asked(plan, retries))]


def _asked(plan: Plan, retries: int) -> None:
    server = _server()
    server.plan = plan
    start = time.monotonic()
    endpoint = Endpoint(KEY, server.url, TIMEOUT_S, retries)
    try:
        answer = extend_by_dashscope("a cat", endpoint, model="m", target_lang="en")
    except WanvramError as error:
        if KEY[:8].casefold() in str(error).casefold():
            raise AssertionError("the key is told") from error
        raise
    finally:
        took = time.monotonic() - start
        assert took < TIMEOUT_S * (retries + 1) + SLACK_S, f"{took:.1f} s"
    assert answer.strip(), "an empty answer was taken"
    assert len(answer) <= 20_000, "a long answer was taken"
    assert not CONTROLS.search(answer.replace("\r", "").replace("\x85", "")) or "\u202e" in answer, (
        "controls were taken"
    )


def _plan(rng: random.Random) -> Iterator[tuple[bytes, float]]:
    whole = _reply(rng)
    how = rng.random()
    if how < 0.5:
        yield whole, 0.0
    elif how < 0.65:
        at = rng.randrange(len(whole) + 1)
        for byte in whole[at : at + 400]:
            yield bytes([byte]), DRIP_S
    elif how < 0.75:
        yield whole[: rng.randrange(len(whole) + 1)], rng.choice([0.0, -1.0, 1.0])
    elif how < 0.8:
        yield b"", rng.choice([0.0, -1.0, 1.0])
    else:
        start, again = rng.choice([
            (b"", b"HTTP/1.1 100 Continue\r\n\r\n"), (b"HTTP/1.1 200 OK\r\n", b"X: y\r\n"), (b"HTTP/1.1 ", b"2"), (b"HTTP/1.1 200 OK\r\nX", b"x" * 4096),
            (b"HTTP/1.1 200 OK\r\n\r\n", b" " * 65_536), (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\na\r\n"),
            (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"0"), (b"HTTP/1.1 500 x\r\n\r\n", b"[" * 65_536),
        ])  # fmt: skip
        yield start, 0.0
        for _ in range(rng.choice([3, 60, 300])):
            yield again, rng.choice([0.0, DRIP_S])


def _reply(rng: random.Random) -> bytes:
    body = json.dumps(CHAT).encode()
    if rng.random() < 0.7:
        body = mutated("chat.json", body, rng)
    body = rng.choice([body, body, body, body, b"", b"\xff" * 50, b" " * (2 << 20), b"[" * 100_000, body + b"x"])
    if rng.random() < 0.1:
        content = rng.choice(
            ["x" * 20_001, "\ud800", "\x1b]0;t\x07", " ", "a\x00b", "<b>", "\u202ea", "a\u2028b", "%s", KEY]
        )
        body = json.dumps({"choices": [{"message": {"content": content}}]}).encode()
    status = rng.choice(
        [
            200,
            200,
            200,
            200,
            100,
            199,
            204,
            206,
            301,
            302,
            304,
            307,
            400,
            401,
            403,
            404,
            418,
            429,
            500,
            503,
            599,
            999,
            0,
        ]
    )
    line = rng.choice([b"HTTP/1.1 %d OK"] * 6 + [b"HTTP/1.0 %d OK", b"HTTP/9.9 %d", b"HTTP/1.1  %d ", b"ICY %d OK", b"HTTP/1.1 %dx", b"%d", b"HTTP/1.1 -%d x",
                      b"HTTP/1.1 %d " + b"x" * 70_000, b"HTTP/1.1 %d \x1b]0;t\x07"]) % status  # fmt: skip
    headers = [b"Content-Type: application/json"]
    lengths = [len(body), len(body), len(body), len(body) - 1, len(body) + 1, 0, -1, 1 << 40, 10**400]
    how = rng.random()
    if how < 0.6:
        headers.append(b"Content-Length: %d" % rng.choice(lengths))
    elif how < 0.85:
        headers.append(
            b"Transfer-Encoding: " + rng.choice([b"chunked", b"chunked", b"chunked", b"gzip", b"Chunked, x"])
        )
        body = _chunks(body, rng)
    headers += rng.choices(ODD_HEADERS, k=rng.choice([0, 0, 1, 2, 120]))
    return line + b"\r\n" + b"\r\n".join(headers) + rng.choice([b"\r\n\r\n"] * 8 + [b"\n\n", b"\r\n"]) + body


def _chunks(body: bytes, rng: random.Random) -> bytes:
    result = b""
    for start in range(0, min(len(body), 4000), 50):
        part = body[start : start + 50]
        size = b"%x" % rng.choice([len(part)] * 30 + [0, len(part) + 1, 1 << 62])
        result += (
            rng.choice([size] * 30 + [b"-1", b"", b"g", size + b";x=y", b"0" * 70_000 + size])
            + b"\r\n"
            + part
            + b"\r\n"
        )
    return result + rng.choice([b"0\r\n\r\n"] * 4 + [b"", b"0\r\nX: y\r\n\r\n", b"0\r\n"])
