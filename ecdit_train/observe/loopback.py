"""A web server for one person on this machine: bound to 127.0.0.1, reading only, and deaf to other people's pages."""

from __future__ import annotations

import errno
import getpass
import gzip
import json
import logging
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from ecdit_train.errors import EcditError

ADDRESS = "127.0.0.1"
NAMES = ("127.0.0.1", "localhost", "[::1]")
"""Hosts that a browser may ask for. A page elsewhere that points its own name at 127.0.0.1 (DNS rebinding) sends that name. Ports
are free: `ssh -L` may have another one at its end."""
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""A served page asks nobody but this server, whatever is in it."""
MIN_GZIP = 10_000

logger = logging.getLogger("ecdit.observe")


@dataclass(frozen=True, kw_only=True)
class Reply:
    body: str
    kind: str = "text/html; charset=utf-8"

    @classmethod
    def of(cls, value: Mapping[str, Any]) -> Reply:
        return cls(body=json.dumps(value, allow_nan=False), kind="application/json")


Answer = Callable[[str, Mapping[str, str]], Reply | None]
"""(path, query) -> the reply; None where there is no such page."""


class Server(ThreadingHTTPServer):
    """Answers GET on a port of 127.0.0.1; `serve_forever` until it is interrupted."""

    daemon_threads = True

    def __init__(self, answer: Answer, *, port: int = 0) -> None:
        """`port` 0: a free one.

        Raises:
            EcditError: the port cannot be had.
        """
        self.answer = answer
        try:
            super().__init__((ADDRESS, port), _Handler)
        except OverflowError as error:
            raise EcditError(f"port {port}: a port is 0 (a free one) to 65535") from error
        except OSError as error:
            if error.errno not in (errno.EADDRINUSE, errno.EACCES):
                raise
            why = "is taken" if error.errno == errno.EADDRINUSE else "is not for users"
            raise EcditError(f"port {port} of {ADDRESS} {why}; name another, or none for a free one") from error

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    @property
    def url(self) -> str:
        return f"http://{ADDRESS}:{self.port}/"

    def tunnel(self) -> str:
        """What to type on one's own machine if this one is far away."""
        try:
            user = f"{getpass.getuser()}@"
        except (KeyError, OSError, ImportError):  # a number without a name, as in containers
            user = ""
        return f"ssh -N -L {self.port}:{ADDRESS}:{self.port} {user}{socket.gethostname()}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that went away in the middle is nobody's fault."""
        logger.debug("a request of %s ended early", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "ecdit", ""
    timeout = 30

    def do_GET(self) -> None:
        host = self.headers.get("Host", "")
        name = host if host.endswith("]") else host.rpartition(":")[0] or host
        if name.lower() not in NAMES:
            return self._send(HTTPStatus.FORBIDDEN, Reply(body="This page is for 127.0.0.1 only.", kind="text/plain"))
        parts = urlsplit(self.path)
        try:
            reply = self.server.answer(parts.path, dict(parse_qsl(parts.query)))
        except Exception:
            logger.exception("%s could not be answered", parts.path)
            return self._send(HTTPStatus.INTERNAL_SERVER_ERROR, Reply(body="See the terminal.", kind="text/plain"))
        if reply is None:
            return self._send(HTTPStatus.NOT_FOUND, Reply(body="There is no such page.", kind="text/plain"))
        return self._send(HTTPStatus.OK, reply)

    def _refuse(self) -> None:
        self.close_connection = True  # whatever it sent with it stays unread
        self._send(HTTPStatus.METHOD_NOT_ALLOWED, Reply(body="Only GET.", kind="text/plain"))

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = _refuse

    def _send(self, status: HTTPStatus, reply: Reply) -> None:
        body = reply.body.encode()
        self.send_response(status)
        if len(body) >= MIN_GZIP and "gzip" in self.headers.get("Accept-Encoding", ""):
            body = gzip.compress(body, compresslevel=1)
            self.send_header("Content-Encoding", "gzip")
        for header, value in (
            ("Content-Type", reply.kind),
            ("Content-Length", str(len(body))),
            ("Cache-Control", "no-store"),
            ("Content-Security-Policy", POLICY),
            ("Cross-Origin-Resource-Policy", "same-origin"),
            ("Referrer-Policy", "no-referrer"),
            ("X-Content-Type-Options", "nosniff"),
        ):
            self.send_header(header, value)
        if status == HTTPStatus.METHOD_NOT_ALLOWED:
            self.send_header("Allow", "GET")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)
