"""An S3 server on loopback, behind a proxy that delays answers and spoils some of them."""

from __future__ import annotations

import hashlib
import http.client
import logging
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

KINDS = ("busy", "reset", "cut")  # 503, the connection reset, half of the body


@dataclass
class Faults:
    """What the proxy does to the answers of GET requests; may be changed while it runs.

    `share` of them are spoiled in one of `kinds`, chosen by the request's number; each comes `latency` seconds late.
    `asked` holds what was asked for: path and range.
    """

    share: float = 0.0
    latency: float = 0.0
    kinds: tuple[str, ...] = KINDS
    seed: int = 0
    asked: list[tuple[str, str]] = field(default_factory=list)
    spoiled: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def next(self, path: str, span: str) -> str:
        """Return how the next answer is spoiled; empty for not at all."""
        with self._lock:
            number = len(self.asked)
            self.asked.append((path, span))
            digest = hashlib.sha256(f"{self.seed} {number}".encode()).digest()
            if int.from_bytes(digest[:4], "little") >= self.share * 2**32:
                return ""
            self.spoiled += 1
            return self.kinds[digest[4] % len(self.kinds)]

    @property
    def ranges(self) -> list[tuple[str, str]]:
        """What was asked for of token files."""
        return [(path, span) for path, span in self.asked if path.endswith(".bin")]


@contextmanager
def object_storage(faults: Faults) -> Iterator[str]:
    """Run the server and the proxy; yield the proxy's address, which is an S3 endpoint with the bucket ``bucket``."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        connection = http.client.HTTPConnection(host, port)
        connection.request("PUT", "/bucket", headers={"Host": "127.0.0.1"})
        connection.getresponse().read()
        connection.close()
        with _Proxy(("127.0.0.1", 0), _Handler) as proxy:
            proxy.faults, proxy.upstream = faults, (host, port)
            thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
            thread.start()
            try:
                yield f"http://127.0.0.1:{proxy.server_address[1]}"
            finally:
                proxy.shutdown()
                thread.join()
    finally:
        server.stop()


class _Proxy(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    faults: Faults
    upstream: tuple[str, int]

    def handle_error(self, request: object, address: object) -> None:
        """A client that has gone is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Proxy

    def log_message(self, format: str, *arguments: object) -> None: ...

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        how = ""
        if self.command == "GET":
            how = self.server.faults.next(self.path.partition("?")[0], self.headers.get("Range", ""))
            time.sleep(self.server.faults.latency)
        if how == "busy":
            self._answer(503, {"Content-Type": "application/xml"}, b"<Error><Code>SlowDown</Code></Error>")
            return
        if how == "denied":
            self._answer(403, {"Content-Type": "application/xml"}, b"<Error><Code>AccessDenied</Code></Error>")
            return
        if how == "reset":
            self._reset()
            return
        connection = http.client.HTTPConnection(*self.server.upstream)
        connection.request(self.command, self.path, body, dict(self.headers.items()))
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        left_out = _LEFT_OUT if self.command == "HEAD" else {*_LEFT_OUT, "content-length"}
        headers = {name: value for name, value in answer.getheaders() if name.lower() not in left_out}
        if how == "flip" and content:
            middle = len(content) // 2
            content = content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]
        self._answer(answer.status, headers, content, cut=how == "cut")

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _pass_on

    def _answer(self, status: int, headers: dict[str, str], content: bytes, *, cut: bool = False) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(content[: len(content) // 2] if cut else content)
        if cut:
            self.wfile.flush()
            self._reset()

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


_LEFT_OUT = {"transfer-encoding", "connection", "server", "date"}
