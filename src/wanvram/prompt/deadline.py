"""One HTTP request within one deadline, whatever the server does. Standard library only.

The time-out of a socket starts anew with every byte it brings, and a name is looked up without any. So the request runs in a
thread of its own, whose connection is shut down at the deadline.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import urllib.request
from collections.abc import Callable
from concurrent.futures import Future
from http.client import HTTPConnection, HTTPResponse, HTTPSConnection
from typing import TypeVar

__all__ = ["Cutter", "handler", "within"]

T = TypeVar("T")


class Cutter:
    """Ends the connections of one request from another thread; those made afterwards end before anything is sent."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._sockets: list[socket.socket] = []
        self._is_over = False

    def keep(self, connected: socket.socket) -> None:
        """Notes a connection to be ended. Raises TimeoutError if that time has come."""
        with self._lock:
            if self._is_over:
                raise TimeoutError
            self._sockets.append(connected.dup())  # urllib closes its own before the reply is read

    def end(self) -> None:
        with self._lock:
            self._is_over = True
            for connected in self._sockets:
                with contextlib.suppress(OSError):  # the server may have gone
                    connected.shutdown(socket.SHUT_RDWR)
                connected.close()
            self._sockets.clear()


def within(timeout_s: float, request: Callable[[Cutter], T]) -> T:
    """What `request` returns or raises; TimeoutError after `timeout_s` seconds, its connections ended.

    Its thread is not waited for: looking a name up cannot be ended, and a daemon does not keep the program from its end.
    """
    cutter = Cutter()
    outcome: Future[T] = Future()

    def work() -> None:
        try:
            outcome.set_result(request(cutter))
        except BaseException as error:  # raised again where the result is asked for
            outcome.set_exception(error)

    thread = threading.Thread(target=work, name="wanvram-http", daemon=True)
    thread.start()
    try:
        thread.join(timeout_s)
        if not outcome.done():
            raise TimeoutError
        return outcome.result()
    finally:
        cutter.end()


def handler(cutter: Cutter) -> urllib.request.BaseHandler:
    """For urllib's opener: plain and encrypted connections that `cutter` can end, from the TCP connection on."""

    class Plain(HTTPConnection):
        def connect(self) -> None:
            super().connect()
            cutter.keep(self.sock)

    class Encrypted(HTTPSConnection, Plain):
        """HTTPSConnection.connect calls Plain's before its handshake, which a server can draw out as well."""

    class Handler(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
        def http_open(self, req: urllib.request.Request) -> HTTPResponse:
            return self.do_open(Plain, req)

        def https_open(self, req: urllib.request.Request) -> HTTPResponse:
            return self.do_open(Encrypted, req)

    return Handler()
