"""A real HTTP server on loopback that serves a folder, with ranges, and can be told to fail."""

import socket
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from ddetr.data.files import write_whole

from tests.servers import LoopbackServer

Fault = Callable[[BaseHTTPRequestHandler, bytes, int], None]  # what would be sent, and its status


class FileServer:
    """`faults` are used up one by one by the requests for files whose name ends in `of`; `requests` counts by name."""

    def __init__(self, folder: Path, ranges: bool = True) -> None:
        self.folder, self.ranges = folder, ranges
        self.faults: list[Fault] = []
        self.of = ".tar"
        self.requests: list[tuple[str, str, str | None]] = []  # method, name, range
        self._lock = threading.Lock()
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                owner.answer(self)

            def do_HEAD(self) -> None:
                owner.answer(self)

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = LoopbackServer(Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self.close = self._server.close
        self._server.start()

    def answer(self, handler: BaseHTTPRequestHandler) -> None:
        name = handler.path.lstrip("/").partition("?")[0]
        wanted = handler.headers.get("Range")
        with self._lock:
            self.requests.append((handler.command, name, wanted))
            faulty = handler.command == "GET" and name.endswith(self.of) and self.faults
            fault = self.faults.pop(0) if faulty else None
        path = self.folder / name
        if not path.is_file():
            handler.send_error(404)
            return
        data, good = path.read_bytes(), 200
        if wanted and self.ranges:
            begin, _, last = wanted.removeprefix("bytes=").partition("-")
            data, good = data[int(begin) : int(last) + 1 if last else None], 206
        if fault is not None:
            fault(handler, data, good)
            return
        _begin(handler, len(data), good)
        if handler.command == "GET":
            handler.wfile.write(data)


def _begin(handler: BaseHTTPRequestHandler, length: int, status: int) -> None:
    handler.send_response(status)
    handler.send_header("Content-Length", str(length))
    handler.end_headers()


def status(code: int) -> Fault:
    return lambda handler, data, good: handler.send_error(code)


def cut(handler: BaseHTTPRequestHandler, data: bytes, good: int) -> None:
    """Half of it, then the connection is gone."""
    _begin(handler, len(data), good)
    handler.wfile.write(data[: len(data) // 2])
    handler.wfile.flush()
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def stall(handler: BaseHTTPRequestHandler, data: bytes, good: int) -> None:
    """A third of it, then silence."""
    _begin(handler, len(data), good)
    handler.wfile.write(data[: len(data) // 3])
    handler.wfile.flush()
    time.sleep(8)
    handler.close_connection = True


def damaged(handler: BaseHTTPRequestHandler, data: bytes, good: int) -> None:
    """The right number of wrong bytes."""
    _begin(handler, len(data), good)
    handler.wfile.write(bytes(len(data)))


if __name__ == "__main__":
    write_whole(Path(sys.argv[2]), FileServer(Path(sys.argv[1])).url.encode())
    threading.Event().wait()
