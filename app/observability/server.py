"""The HTTP server of all that serves `/health`, `/health/live`, `/health/ready` and `/metrics`."""

import contextlib
import errno
import json
import logging
import os
import socket
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import Any, Protocol

from prometheus_client import CollectorRegistry

from app.core.config import EX_CONFIG
from app.observability.exposition import CONTENT_TYPE, exposition

logger = logging.getLogger(__name__)


class Answers(Protocol):
    """What the server wants to know of the process it belongs to (`app.observability.health.Health`)."""

    @property
    def live(self) -> bool:
        """Whether it must not be restarted."""

    @property
    def ready(self) -> bool:
        """Whether it does its work."""

    @property
    def reason(self) -> str:
        """Why it isn't ready, for people; asked for only then."""

    def report(self) -> dict[str, Any]:
        """The detail; healthy when its `status` is `ok`."""


_MOST_CLIENTS = 16
_TEXT = "text/plain; charset=utf-8"


class _Handler(BaseHTTPRequestHandler):
    server: "Server"
    server_version, sys_version = "skeldir", ""
    timeout = 5  # seconds for each read and write

    def _show(self) -> None:
        status, content_type, body = self._answer()
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _refuse(self) -> None:
        self.send_response(HTTPStatus.METHOD_NOT_ALLOWED)
        self.send_header("Allow", "GET, HEAD")
        self.send_header("Content-Length", "0")
        self.end_headers()

    # Names that BaseHTTPRequestHandler prescribes
    do_GET = do_HEAD = _show  # noqa: N815
    do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse  # noqa: N815

    def _answer(self) -> tuple[HTTPStatus, str, bytes]:
        health = self.server.health
        match self.path.partition("?")[0]:
            case "/health":
                report = health.report()
                body = json.dumps(report).encode() + b"\n"
                return _status(report["status"] == "ok"), "application/json", body
            case "/health/live":
                return _status(health.live), _TEXT, b"live\n" if health.live else b"stalled\n"
            case "/health/ready":
                ready = health.ready
                said = "ready" if ready else f"not ready: {health.reason}"
                return _status(ready), _TEXT, f"{said}\n".encode()
            case "/metrics":
                return HTTPStatus.OK, CONTENT_TYPE, exposition(self.server.registry)
            case _:
                return HTTPStatus.NOT_FOUND, _TEXT, b"/health /health/live /health/ready /metrics\n"

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)


def _status(good: bool) -> HTTPStatus:
    return HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE


class Server(ThreadingMixIn, TCPServer):
    """Answers each client in a thread; a client more than `_MOST_CLIENTS` costs the oldest its connection.

    So clients that dawdle can neither block the server nor fill the process with threads.

    Raises:
        OSError: the address can't be listened on.
    """

    # (http.server.HTTPServer would look its own name up in DNS, which can hang.)
    allow_reuse_address = True
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, address: str, port: int, health: Answers, registry: CollectorRegistry) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.health = health
        self.registry = registry
        self._clients: dict[Any, None] = {}
        self._lock = threading.Lock()
        super().__init__((address, port), _Handler)
        # A child of the pool may outlive this process; it must not keep the port from the next worker.
        os.register_at_fork(after_in_child=self.socket.close)

    def start(self) -> None:
        """Serve in a thread, until the process ends."""
        threading.Thread(target=self.serve_forever, name="http-server", daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a client that was accepted."""
        with self._lock:
            while len(self._clients) >= _MOST_CLIENTS:
                oldest = next(iter(self._clients))
                del self._clients[oldest]
                with contextlib.suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)
            self._clients[request] = None
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        """Let go of a client that was answered."""
        with self._lock:
            self._clients.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, _request: Any, _client_address: Any) -> None:
        """A client that went away is no news; anything else is a mistake in this module."""
        if not isinstance(error := sys.exception(), OSError):
            logger.error("A request could not be answered: %s", type(error).__name__)


def listen(address: str, port: int, health: Answers, registry: CollectorRegistry, *, remedy: str) -> Server:
    """The server of a process that is nothing without it: where it can't listen, the process ends.

    With EX_CONFIG, but for an address that this host hasn't: it may only be late at boot, so units try again.

    Args:
        address: as `CELERY_METRICS_ADDR` has it.
        port: of that address.
        health: what it answers.
        registry: what it shows.
        remedy: what a person should do, a sentence.
    """
    try:
        return Server(address, port, health, registry)
    except OSError as error:
        print(
            f"Can't listen on {address}:{port} for /health and /metrics: {error.strerror}. {remedy}",
            file=sys.stderr,
        )
        sys.exit(1 if error.errno == errno.EADDRNOTAVAIL else EX_CONFIG)
