"""An HTTP server on loopback for tests."""

import socket
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class LoopbackServer(ThreadingHTTPServer):
    """Serves from a free port on until `close`. A client that hangs up is no error: no traceback is printed for it."""

    daemon_threads = True
    request_queue_size = 256  # connections of many processes at once

    def __init__(self, handler: type[BaseHTTPRequestHandler]) -> None:
        super().__init__(("127.0.0.1", 0), handler)

    def start(self) -> None:
        threading.Thread(target=self.serve_forever, args=(0.02,), daemon=True).start()  # seconds until `close` is seen

    def close(self) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: socket.socket | Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)
