"""Settles what holds before any request is parsed: the address, who may ask, and how many files may be open."""

import base64
import contextlib
import hmac
import ipaddress
import os
import pathlib
import resource
import socket
import ssl
import struct
from typing import Any

from densenet_jax.errors import UserError, first_line
from densenet_jax.predict.images import ImageLimits
from densenet_jax.serve.requests import MAX_PICTURE_PIXELS, RequestError, shorten

MAX_CONNECTIONS = 1000  # per protocol, or fewer if the process may not open that many files
SPARE_FILES = 128  # kept free of connections for everything else
MAX_BODY_BYTES = 32 * 2**20  # per request
SMALL_BODY_BYTES = 2**20  # bodies up to this size always have room
NEEDED = ("uvicorn", "httptools", "uvloop", "orjson", "grpc", "tritonclient", "prometheus_client")
LIMITS = ImageLimits(max_bytes=MAX_BODY_BYTES, max_pixels=MAX_PICTURE_PIXELS)  # per picture
GREETING_BYTES = 256  # that a client of gRPC sends before its first request, at most
LOOPBACK = ("localhost", "127.0.0.1", "::1")


class Access:
    """Decides who may send requests."""

    def __init__(self, config: Any, host: str):
        """Reads the files that `config.serve` names; raises UserError if one of them can't be used."""
        self.host, self.shown_host = host, f"[{host}]" if ":" in host else host
        self.is_loopback = host in LOOPBACK or host.startswith("127.")
        # Allowed in Host headers, besides IP addresses if not on loopback.
        self.hosts = {*LOOPBACK, host.lower(), *map(str.lower, config.serve.hosts)}
        self.token = _read_token(config.serve.token_file) if config.serve.token_file else ""
        self.tls: ssl.SSLContext | None = None
        self.pem: list[tuple[bytes, bytes]] = []  # key and certificate
        certificate, key = config.serve.tls_certificate, config.serve.tls_key
        if bool(certificate) != bool(key):
            raise UserError("config.serve.tls_certificate and config.serve.tls_key belong together; set both or none.")
        try:
            if certificate:
                self.tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
                self.tls.load_cert_chain(certificate, key, password=lambda: "")
                self.pem = [(pathlib.Path(key).read_bytes(), pathlib.Path(certificate).read_bytes())]
        except (OSError, ValueError) as error:  # also OpenSSL's errors
            raise UserError(
                f"config.serve.tls_certificate {certificate} and config.serve.tls_key {key} can't be used "
                f"({first_line(error)}); expected a certificate and its key without a password, in PEM."
            ) from error

    def check_host(self, host: str) -> None:
        """Raises RequestError (421) unless a Host header is ours: a page of another name must not reach us."""
        name = host.lower()
        name = name[1:].partition("]")[0] if name.startswith("[") else name.partition(":")[0]
        if name in self.hosts:
            return
        with contextlib.suppress(ValueError):
            if not self.is_loopback and ipaddress.ip_address(name):
                return
        raise RequestError(f"the host {shorten(name)} is not served here; config.serve.hosts adds names", 421)

    def check_token(self, authorization: str) -> None:
        """Raises RequestError (401) unless the token is sent as `Bearer TOKEN` or, by browsers, as `Basic` password."""
        if not self.token:
            return
        scheme, _, given = authorization.partition(" ")
        if scheme.lower() == "basic":
            try:
                given = base64.b64decode(given, validate=True).decode().partition(":")[2]
            except ValueError:
                given = ""
        if scheme.lower() not in ("bearer", "basic") or not hmac.compare_digest(given.encode(), self.token.encode()):
            raise RequestError("the token is missing or wrong; expected Authorization: Bearer TOKEN", 401)


def _read_token(path: str) -> str:
    try:
        with open(path, encoding="ascii") as file:
            token = file.read(10_000).strip()
    except (OSError, ValueError) as error:
        raise UserError(f"config.serve.token_file {path} can't be read ({first_line(error)}).") from error
    if not token or not token.isprintable() or " " in token:
        raise UserError(f"config.serve.token_file {path} has no token; expected one line of printable ASCII.")
    return token


def listen(host: str, port: int, grpc_port: int) -> socket.socket:
    """Takes the REST address; port 0 is any free one. Raises UserError if it or the gRPC address can't be used."""
    _bind("--grpc_port", host, grpc_port).close()
    return _bind("--port", host, port)


def _bind(flag: str, host: str, port: int) -> socket.socket:
    bound = None
    try:
        family, *_, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(where)
    except (OSError, OverflowError) as error:
        if bound is not None:
            bound.close()
        raise UserError(
            f"{flag} {port} of {host} can't be used ({getattr(error, 'strerror', None) or error}); "
            "give another port, 0 for any free one, or another --host."
        ) from error
    return bound


def allow_connections() -> tuple[int, int]:
    """Raises the limit of open files as far as possible; returns how many connections REST and gRPC may have.

    gRPC gets more of them: REST makes room for a newcomer at once. Raises UserError if the limit is too low.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * MAX_CONNECTIONS + 4 * SPARE_FILES
    soft = max(soft, wanted if hard == resource.RLIM_INFINITY else min(hard, wanted))
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    opened = len(open_files())
    left = soft - opened - SPARE_FILES
    if left < 96:
        raise UserError(f"at most {soft} files may be open, {opened} are; run ulimit -n 1024 first.")
    return min(MAX_CONNECTIONS, left // 3), min(MAX_CONNECTIONS, left - left // 3)


def open_files() -> list[int]:
    """Returns the numbers of this process's open files; none if there is no /proc."""
    return list(map(int, os.listdir("/proc/self/fd"))) if os.path.isdir("/proc/self/fd") else []


def shed_quiet(port: int, most: int) -> None:
    """Shuts down the quietest connections to `port` if more than half of `most` are open.

    gRPC closes silent connections only by a clock, and rejects new ones meanwhile. The kernel knows how long each has
    been quiet. Does nothing if there is no /proc.
    """
    with contextlib.ExitStack() as stack:
        quiet = []
        for number in open_files():
            with contextlib.suppress(OSError):  # closed meanwhile, no socket, or listening
                # Left open afterwards. A copy would keep gRPC's poller from noticing that it is closed.
                given = socket.socket(fileno=number)
                stack.callback(given.detach)
                peer = given.getpeername()
                if isinstance(peer, tuple) and given.getsockname()[1] == port:
                    # From struct tcp_info: milliseconds since the last data in either direction, bytes received.
                    information = given.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
                    sent, received, count = struct.unpack("=44xI4xI72xQ", information)
                    quiet.append((count > GREETING_BYTES, -min(sent, received), number, peer, given))
        for _, _, _, peer, given in sorted(quiet)[: len(quiet) - most // 4] if len(quiet) > most // 2 else []:
            with contextlib.suppress(OSError):
                if given.getpeername() == peer:  # the number may stand for another connection by now
                    given.shutdown(socket.SHUT_RDWR)
