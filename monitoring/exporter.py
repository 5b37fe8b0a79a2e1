"""The Prometheus exporter of one process: serves its metrics over HTTP."""

import errno
import logging
import socket
import sys
import threading
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server

ALL_INTERFACES = ("0.0.0.0", "::")
log = logging.getLogger("ddetr")


class Exporter:
    """A running exporter. `address` is the host:port to scrape; `close` ends it and may be called twice."""

    def __init__(self, address: str, server: WSGIServer, thread: threading.Thread):
        self.address = address
        self._server = server
        self._thread = thread

    @property
    def url(self) -> str:
        return f"http://{self.address}/metrics"

    def close(self) -> None:
        """Stop serving and free the port."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()

    def __enter__(self) -> "Exporter":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def serve(registry: CollectorRegistry, host: str, port: int) -> Exporter:
    """Serve `registry` at http://host:port/metrics from a daemon thread; port 0 takes a free one.

    Where `host` means all interfaces, the exporter's address has this machine's name instead.
    Raises OSError naming host, port and the fix when it cannot listen there.
    """
    try:
        server, thread = start_http_server(port, host, registry)
    except socket.gaierror as error:
        raise OSError(f"monitor.host={host} is not an address of this machine ({error.strerror})") from error
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OSError(
                f"cannot serve metrics: port {port} of {host} is taken by another process; "
                f"set monitor.port to another number, or monitor.port=0 for any free port"
            ) from error
        raise OSError(f"cannot serve metrics on {host} port {port}: {error.strerror}; set monitor.host") from error
    server.handle_error = _tell_failure  # wsgiref would print a traceback into the run's output
    name = socket.gethostname() if host in ALL_INTERFACES else host
    return Exporter(f"[{name}]:{server.server_port}" if ":" in name else f"{name}:{server.server_port}", server, thread)


def _tell_failure(request: object, client_address: object) -> None:
    """The error of a request. A client that hangs up, as probes of ports do, is not one."""
    error = sys.exception()
    if not isinstance(error, ConnectionError):
        log.warning("a request for metrics from %s failed: %r", client_address, error)
