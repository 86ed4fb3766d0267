"""Prompt extension by DashScope, against a server on this machine: requests, failures, and where the key never goes."""

from __future__ import annotations

import base64
import io
import json
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from PIL import Image

from wanvram.errors import InputError, WanvramError
from wanvram.prompt import dashscope
from wanvram.prompt.dashscope import DEFAULT_URL, Endpoint, api_key, api_url, encode_picture, extend_by_dashscope
from wanvram.prompt.instructions import system_prompt

MIB = 2**20
PICTURE = Image.new("RGB", (640, 480), (200, 30, 30))


def extend(
    prompt: str, *, key: str, base_url: str = DEFAULT_URL, timeout_s: float = 60.0, retries: int = 2, **options: Any
) -> str:
    return extend_by_dashscope(prompt, Endpoint(key, base_url, timeout_s, retries), **options)


KEY = "sk-0123456789abcdef"


class Service:
    """A server on this machine; each request is answered by the next of `replies` (status, body, headers), the last for ever."""

    def __init__(self) -> None:
        self.replies: list[tuple[int, bytes, dict[str, str]]] = []
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.released = threading.Event()
        service = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                service.requests.append((self.path, dict(self.headers), json.loads(body)))
                status, content, headers = service.replies[min(len(service.requests), len(service.replies)) - 1]
                if status == 0:  # never answers
                    service.released.wait(10)
                    return
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *args: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/compatible-mode/v1"

    def answers(self, status: int, content: Any = b"", **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.replies.append((status, body, {name.replace("_", "-"): value for name, value in headers.items()}))

    def says(self, text: Any) -> None:
        self.answers(200, {"choices": [{"message": {"role": "assistant", "content": text}}]})

    def extend(self, **changed: Any) -> str:
        given = {"model": "qwen-plus", "target_lang": "en", "key": KEY, "base_url": self.url, "timeout_s": 5.0}
        return extend("a cat", **(given | changed))


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    monkeypatch.setattr(dashscope, "BACKOFF_S", 0.0)
    service = Service()
    thread = threading.Thread(target=service.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield service
    service.released.set()
    service.server.shutdown()
    service.server.server_close()
    thread.join()


def test_a_request_has_the_instruction_the_prompt_and_the_key_where_they_belong(service: Service) -> None:
    service.says("  a fluffy cat \n")
    assert service.extend(seed=2**31 + 7) == "a fluffy cat"
    [(path, headers, body)] = service.requests
    assert path == "/compatible-mode/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body == {
        "model": "qwen-plus",
        "messages": [{"role": "system", "content": system_prompt("en")}, {"role": "user", "content": "a cat"}],
        "seed": 7,
    }


def test_pictures_travel_as_data_urls_of_at_most_512_by_512_pixels(service: Service) -> None:
    service.says("ok")
    service.extend(pictures=[encode_picture(Image.new("RGB", (2000, 1000))), (b"\xff\xd8", "image/jpeg")])
    system, user = service.requests[0][2]["messages"]
    assert system["content"] == system_prompt("en", 2)
    first, second, text = user["content"]
    head, _, data = first["image_url"]["url"].partition(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (724, 362)
    assert second["image_url"]["url"] == "data:image/jpeg;base64,/9g="
    assert text == {"type": "text", "text": "a cat"}


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_service_is_asked_again(service: Service, status: int) -> None:
    service.answers(status)
    service.answers(status)
    service.says("third time")
    assert service.extend() == "third time"
    assert len(service.requests) == 3


@pytest.mark.parametrize(
    ("reply", "message", "attempts"),
    [
        ((429, {"error": {"message": "slow down"}}), r"429 \(slow down\) \(3 attempts\)", 3),
        ((500, b"<html>"), r"500 \(3 attempts\)", 3),
        ((400, {"error": {"message": f"bad\nmodel for {KEY}"}}), r"400 \(bad model for \*\*\*\)", 1),
        ((400, {"error": {"message": f"Incorrect API key: {KEY[:9]}..."}}), r"400 \(Incorrect API key: \*\*\*\)$", 1),
        ((400, {"error": {"message": f"key={KEY.upper()}, no"}}), r"400 \(\*\*\* no\)$", 1),
        ((404, {"error": None}), "404", 1),
        ((200, b"{"), "1 bytes that are not a chat completion", 1),
        ((200, b"[" * 100_000), "not a chat completion", 1),
        ((200, b"\xff\xfe\xff"), "not a chat completion", 1),
        ((200, {"choices": []}), "not a chat completion", 1),
        ((200, {"choices": [{"message": {"content": 7}}]}), "answered with 7 in place of a text$", 1),
        ((200, {"choices": [{"message": {"content": ["a"]}}]}), "answered with a list of 1 in place of a text$", 1),
        ((200, {"choices": [{"message": {"content": "a \x00"}}]}), r"is no prompt \(has control characters\)$", 1),
        (
            (200, {"choices": [{"message": {"content": "\x1b]0;x\x07"}}]}),
            r"is no prompt \(has control characters\)$",
            1,
        ),
        ((200, {"choices": [{"message": {"content": "\ud800"}}]}), r"is no prompt \(is not UTF-8 text\)$", 1),
        ((200, {"choices": [{"message": {"content": " \n"}}]}), r"is no prompt \(is empty\)$", 1),
        ((200, {"choices": [{"message": {"content": "x" * 20_001}}]}), r"\(20001 characters; at most 20000 ", 1),
        ((200, b" " * (2**20 + 5)), "not a chat completion", 1),
        ((302, b""), r"redirects \(302\)", 1),
    ],
)
def test_a_failure_is_one_sentence_without_the_key(
    service: Service, reply: tuple[int, Any], message: str, attempts: int
) -> None:
    service.answers(*reply, Location=service.url + "/elsewhere")
    with pytest.raises(WanvramError, match=message) as caught:
        service.extend()
    assert caught.value.exit_code == 1
    assert len(service.requests) == attempts
    assert KEY not in repr(caught.value)
    assert "\n" not in str(caught.value)


def test_an_answer_may_have_lines_and_characters_of_any_script(service: Service) -> None:
    service.says("一只猫。\r\n\tA cat \U0001f408\u200d\u2b1b")
    assert service.extend() == "一只猫。\r\n\tA cat \U0001f408\u200d\u2b1b"


def test_a_redirect_to_what_is_no_address_is_refused_like_any(service: Service) -> None:
    service.answers(307, b"", Location="http://[::1")
    with pytest.raises(WanvramError, match=r"redirects \(307\)"):
        service.extend()


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_bad_input_and_not_tried_again(service: Service, status: int) -> None:
    service.answers(status, {"error": {"message": f"Incorrect API key {KEY}"}})
    with pytest.raises(InputError, match="DASH_API_KEY") as caught:
        service.extend()
    assert KEY not in repr(caught.value)
    assert len(service.requests) == 1


def test_a_silent_service_is_given_up_after_the_time_out(service: Service) -> None:
    service.answers(0)
    with pytest.raises(WanvramError, match=r"within 0\.1 s \(2 attempts\)"):
        service.extend(timeout_s=0.1, retries=1)
    assert len(service.requests) == 2


# --- a server that goes on for ever ----------------------------------------------------------------------------------

OK, CHUNKED = b"HTTP/1.1 200 OK\r\n", b"Transfer-Encoding: chunked\r\n\r\n"
LONG = b"Content-Length: 100000\r\n\r\n"
ENDLESS = {  # what is sent at once, and what is sent again and again
    "nothing": (b"", b""),
    "status line byte by byte": (b"HTTP/1.1 200 ", b"O"),
    "header bytes": (OK, b"X"),
    "header lines": (OK, b"X: y\r\n"),
    "chunk size": (OK + CHUNKED, b"0"),
    "chunk extension": (OK + CHUNKED + b"5;x=", b"y"),
    "chunk trailers": (OK + CHUNKED + b"0\r\n", b"X: y\r\n"),
    "endless 100 Continue": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "body of 200": (OK + LONG, b" "),
    "body of 200 without a length": (OK + b"\r\n", b" "),
    "body of 400": (b"HTTP/1.1 400 Bad Request\r\n" + LONG, b" "),
    "body of 500": (b"HTTP/1.1 500 Internal Server Error\r\n" + LONG, b" "),
}
LIMIT_S = 0.5
PIECE_S = 0.05


class Trickle:
    """Accepts `attempts` connections, one after another, and sends each its pieces for LIMIT_S + 1 s, unless cut off."""

    def __init__(self, head: bytes, piece: bytes, *, attempts: int = 1) -> None:
        self.head, self.piece, self.attempts, self.cut_off = head, piece, attempts, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.listener.settimeout(10)
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"
        self.thread = threading.Thread(target=self.serve)

    def __enter__(self) -> Trickle:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.join()
        self.listener.close()

    def extend(self, scheme: str, *, retries: int) -> None:
        url = f"{scheme}://{self.address}"
        extend("x", model="m", target_lang="en", key=KEY, base_url=url, timeout_s=LIMIT_S, retries=retries)

    def serve(self) -> None:
        for _ in range(self.attempts):
            connection, _ = self.listener.accept()
            with connection:
                connection.settimeout(PIECE_S)
                try:
                    self.trickle(connection)
                except ConnectionError:
                    self.cut_off += 1

    def trickle(self, connection: socket.socket) -> None:
        heard = connection.recv(2**16)
        connection.sendall(self.head)
        for _ in range(round((LIMIT_S + 1) / PIECE_S)):
            connection.sendall(self.piece)
            try:
                heard = connection.recv(2**16)
            except TimeoutError:
                continue
            if not heard:
                raise ConnectionResetError


@pytest.mark.parametrize("behaviour", ENDLESS)
def test_whatever_a_server_goes_on_with_the_attempt_ends_at_its_limit(behaviour: str) -> None:
    sentence = r"127\.0\.0\.1:\d+ gave no complete answer within 0\.5 s$"
    with Trickle(*ENDLESS[behaviour]) as server, pytest.raises(WanvramError, match=sentence):
        server.extend("http", retries=0)
    assert server.cut_off == 1  # the server was not done


def test_each_retry_has_the_limit_once_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashscope, "BACKOFF_S", 0.0)
    sentence = r"within 0\.5 s \(2 attempts\)"
    with Trickle(*ENDLESS["header bytes"], attempts=2) as server, pytest.raises(WanvramError, match=sentence):
        server.extend("http", retries=1)
    assert server.cut_off == 2


def test_an_encrypted_connection_that_never_comes_about_ends_at_the_limit() -> None:
    record = b"\x16\x03\x03\x40\x00"  # a handshake of 16 KiB, byte by byte
    sentence = r"within 0\.5 s$"
    with Trickle(record, b"\x02") as server, pytest.raises(WanvramError, match=sentence):
        server.extend("https", retries=0)
    assert server.cut_off == 1


def test_a_name_that_is_looked_up_for_ever_ends_at_the_limit_and_nothing_is_sent_later(
    service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, look_up = threading.Event(), socket.getaddrinfo

    def slow(*args: Any, **options: Any) -> Any:
        found.wait(10)
        return look_up(*args, **options)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    before = set(threading.enumerate())
    with pytest.raises(WanvramError, match=r"within 0\.1 s$"):
        service.extend(timeout_s=0.1, retries=0)
    [late] = [thread for thread in set(threading.enumerate()) - before if thread.name == "wanvram-http"]
    found.set()
    late.join(10)
    assert not late.is_alive()
    assert not service.requests


def test_a_service_that_is_not_there_or_hangs_up_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashscope, "BACKOFF_S", 0.0)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        thread = threading.Thread(target=lambda: listener.accept()[0].close())
        thread.start()
        given = {"model": "m", "target_lang": "zh", "key": KEY, "base_url": f"http://127.0.0.1:{port}"}
        with pytest.raises(WanvramError, match=rf"127.0.0.1:{port} (broke|cannot be reached)"):
            extend("x", **given, retries=0)
        thread.join()
    with pytest.raises(
        WanvramError, match=rf"127.0.0.1:{port} cannot be reached \(Connection refused\) \(3 attempts\)"
    ):
        extend("x", **given)


@pytest.mark.parametrize(
    "url",
    ["http://dashscope.aliyuncs.com/v1", "http://127.0.0.1.evil.example/v1", "ftp://localhost/", "file:///etc/passwd", "",
     "https://user:word@host/v1", "https://host/v1?x=1", "https://[::1", "https://host:99999/", "https://a b/", "https://a..b/v1"],
)  # fmt: skip
def test_a_url_that_would_not_keep_the_key_safe_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="DashScope url"):
        extend("x", model="m", target_lang="zh", key=KEY, base_url=url)


@pytest.mark.parametrize("key", ["", "sk-12 34", "sk-1\r\nX: y", "sk-é"])
def test_a_malformed_key_is_refused_without_being_shown(key: str) -> None:
    with pytest.raises(InputError, match="DASH_API_KEY") as caught:
        extend("x", model="m", target_lang="zh", key=key)
    assert not key or key not in str(caught.value)


def test_the_service_sees_a_phone_s_picture_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    buffer = io.BytesIO()
    Image.new("RGB", (40, 20)).save(buffer, "JPEG", exif=exif)
    sent, _ = encode_picture(Image.open(buffer))
    assert Image.open(io.BytesIO(sent)).size == (20, 40)


@pytest.mark.parametrize("picture", [(b"x", "image/gif"), (bytes(7 * MIB + 1), "image/png")])
def test_a_picture_the_service_does_not_take_is_refused(picture: tuple[bytes, str]) -> None:
    with pytest.raises(InputError, match="DashScope takes"):
        extend("x", model="m", target_lang="zh", key=KEY, pictures=[picture])


def test_key_and_address_come_from_the_official_variables() -> None:
    assert api_key({"DASH_API_KEY": " a ", "DASHSCOPE_API_KEY": "b"}) == "a"
    assert api_key({"DASH_API_KEY": "", "DASHSCOPE_API_KEY": "b"}) == "b"
    with pytest.raises(InputError, match="DASH_API_KEY or DASHSCOPE_API_KEY"):
        api_key({})
    assert api_url({}) == "https://dashscope.aliyuncs.com/compatible-mode/v1"
    assert api_url({"DASH_API_URL": "https://dashscope-intl.aliyuncs.com/api/v1/"}) == (
        "https://dashscope-intl.aliyuncs.com/compatible-mode/v1"
    )
    assert api_url({"DASH_API_URL": "https://proxy.example/v1"}) == "https://proxy.example/v1"
