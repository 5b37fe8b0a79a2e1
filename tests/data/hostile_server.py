"""A real HTTP server, with or without TLS, whose answers are whatever a function of the request makes them."""

import shutil
import ssl
import subprocess
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path

from tests.servers import LoopbackServer


class HostileServer:
    """`answer` gets the handler of each GET and HEAD. requests: method, path, headers of each."""

    def __init__(self, answer: Callable[[BaseHTTPRequestHandler], None], certificate: Path | None = None) -> None:
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        owner = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                owner.requests.append((self.command, self.path, {k.lower(): v for k, v in self.headers.items()}))
                answer(self)

            do_HEAD = do_GET

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = LoopbackServer(Handler)
        if certificate is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.host = f"127.0.0.1:{self._server.server_port}"
        self.url = f"http{'s' if certificate else ''}://{self.host}"
        self.close = self._server.close
        self._server.start()

    def logins(self) -> set[str | None]:
        return {headers.get("authorization") for _, _, headers in self.requests}


def reply(handler: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(body)


def files(folder: Path) -> Callable[[BaseHTTPRequestHandler], None]:
    """Serves a folder, with ranges."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        path = folder / Path(handler.path.partition("?")[0]).name
        data, wanted = path.read_bytes() if path.is_file() else None, handler.headers.get("Range")
        if data is None:
            reply(handler, 404)
        elif wanted:
            begin, _, last = wanted.removeprefix("bytes=").partition("-")
            reply(handler, 206, data[int(begin) : int(last) + 1 if last else None])
        else:
            reply(handler, 200, data)

    return answer


def certificate_in(folder: Path) -> Path:
    """A certificate for 127.0.0.1 and its key, in one file that is also the only authority to trust."""
    openssl = shutil.which("openssl")
    assert openssl is not None
    file = folder / "certificate.pem"
    command = [openssl, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(file), "-out", str(folder / "public.pem")]
    subprocess.run(command, check=True, capture_output=True)
    file.write_bytes(file.read_bytes() + (folder / "public.pem").read_bytes())
    return file
