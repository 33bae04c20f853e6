"""The bytes of a file from where its address says: this machine, an object store, a web server.

Lists of addresses come from others, so a web address is only asked when the machine that it leads
to is a public one: the name is resolved once, each address is checked, and the connection is made
to the address that was checked. Redirects are followed by the same rule.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast
from urllib.parse import urljoin, urlsplit

from sbir_ray.config import WebConfig
from sbir_ray.data import photos
from sbir_ray.data.photos import PhotoError, PhotoLimits
from sbir_ray.errors import UserError
from sbir_ray.places import place

SCHEMES = ("s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "hdfs", "memory")
"""Object stores and other file systems whose files are read; not those that ask any host."""
_REDIRECTS = (301, 302, 303, 307, 308)
_MOST_REDIRECTS = 5
_AGAIN = (408, 425, 429, 500, 502, 503, 504)
_LONGEST_WAIT = 30.0
_CHUNK = 1 << 16
_AGENT = "sbir-ray"
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")

Wait = Callable[[str], None]
"""Waits until a host may be asked again."""


def is_web(uri: str) -> bool:
    """Whether ``uri`` is asked of a web server."""
    return uri.lower().startswith(("http://", "https://"))


def local_path(uri: str) -> str | None:
    """The path of a file of this machine; None for any other address."""
    if uri.startswith("file://"):
        return uri.removeprefix("file://")
    return None if _SCHEME.match(uri) else uri


def open_place(uri: str) -> Path:
    """The place of a file or folder that is not on the web.

    Raises:
        UserError: as :func:`sbir_ray.places.place`, and for schemes that are not read.
    """
    path = local_path(uri)
    if path is not None:
        return Path(path)
    scheme = uri.partition("://")[0].lower()
    if scheme not in SCHEMES or "::" in uri:
        raise UserError(f"{uri}: {scheme}:// is not read; use a path, http(s):// or s3://, gs://")
    return place(uri)


@dataclass
class Fetcher:
    """Reads files, whole and within limits."""

    web: WebConfig
    limits: PhotoLimits
    wait: Wait = field(default=lambda host: None)

    def read(self, uri: str) -> bytes:
        """The bytes of a file, at most ``limits.max_bytes``.

        Raises:
            PhotoError: by reason what stands in the way.
        """
        if is_web(uri):
            return self._web(uri)
        path = local_path(uri)
        if path is not None:
            return photos.read_bytes(path, self.limits)
        try:
            found = open_place(uri)
        except UserError as error:
            raise PhotoError("unsupported-address", str(error)) from error
        try:
            with found.open("rb") as file:
                data = file.read(self.limits.max_bytes + 1)
        except Exception as error:  # each store has faults of its own
            raise PhotoError("unreadable", _one_line(error)) from error
        photos.check_bytes(data, self.limits)
        return data

    # ------------------------------------------------------------------- web

    def _web(self, url: str) -> bytes:
        for attempt in range(self.web.retries + 1):
            try:
                return self._follow(url)
            except _AskAgainError as error:
                fault = error
            if attempt < self.web.retries:
                time.sleep(min(fault.after or 0.5 * 2**attempt, _LONGEST_WAIT))
        raise fault.fault

    def _follow(self, url: str) -> bytes:
        end = time.monotonic() + self.web.timeout
        for _ in range(_MOST_REDIRECTS + 1):
            answer = self._ask(url, end)
            if isinstance(answer, bytes):
                photos.check_bytes(answer, self.limits)
                return answer
            url = urljoin(url, answer)
            if not is_web(url):
                raise PhotoError("unsupported-address", "redirected to what is no web address")
        raise PhotoError("http-status", f"redirected more than {_MOST_REDIRECTS} times")

    def _ask(self, url: str, end: float) -> bytes | str:
        """The body, or where the server sends us."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
            host = host.encode("idna").decode("ascii")
            path = _quoted(parts.path or "/") + (f"?{_quoted(parts.query)}" if parts.query else "")
        except ValueError as error:
            raise PhotoError("unsupported-address", f"not a web address ({error})") from error
        secure = parts.scheme.lower() == "https"
        port = port or (443 if secure else 80)
        self.wait(host)
        try:
            stream = self._connect(host, port, end)
        except OSError as error:
            raise _AskAgainError(PhotoError("unreachable", _one_line(error))) from error
        # Every single wait has a limit; this one is for a server that sends byte by byte.
        live = [stream]
        clock = threading.Timer(max(0.0, end - time.monotonic()), _cut, [live])
        clock.daemon = True
        clock.start()
        try:
            if secure:
                safe = _tls().wrap_socket(
                    stream, server_hostname=host, do_handshake_on_connect=False
                )
                live[0] = safe
                safe.do_handshake()
            connection = http.client.HTTPConnection(host, port)
            connection.sock = live[0]
            connection.request(
                "GET",
                path,
                headers={"User-Agent": _AGENT, "Accept": "image/*", "Connection": "close"},
            )
            with connection.getresponse() as response:
                answer = self._answer(response)
            if time.monotonic() >= end:  # what was cut off may look whole
                raise TimeoutError(f"took more than {self.web.timeout:g} s")
            return answer
        except (OSError, http.client.HTTPException) as error:
            late = time.monotonic() >= end or isinstance(error, TimeoutError)
            reason = "timeout" if late else "unreachable"
            raise _AskAgainError(PhotoError(cast(Any, reason), _one_line(error))) from error
        finally:
            clock.cancel()
            live[0].close()

    def _answer(self, response: http.client.HTTPResponse) -> bytes | str:
        status = response.status
        where = response.getheader("Location")
        if status in _REDIRECTS and where:
            return where
        if status != 200:
            fault = PhotoError("http-status", f"the server answers {status}")
            if status not in _AGAIN:
                raise fault
            after = response.getheader("Retry-After", "")
            raise _AskAgainError(fault, float(after) if after.isdigit() else None)
        length = response.getheader("Content-Length", "")
        if length.isdigit() and int(length) > self.limits.max_bytes:
            raise PhotoError(
                "too-many-bytes", f"more than the limit of {self.limits.max_bytes} bytes"
            )
        data = bytearray()
        while len(data) <= self.limits.max_bytes:
            chunk = response.read(_CHUNK)
            if not chunk:
                break
            data += chunk
        if length.isdigit() and len(data) < int(length):
            raise http.client.IncompleteRead(bytes(data[:0]), int(length) - len(data))
        return bytes(data)

    def _connect(self, host: str, port: int, end: float) -> socket.socket:
        """A connection to one of the host's addresses, each of which is checked first."""
        fault: OSError = OSError("the name has no address")
        for family, kind, protocol, _, address in socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM
        ):
            if not self.web.allow_private and not is_public(str(address[0])):
                raise PhotoError(
                    "private-address",
                    f"{host} is {address[0]}, not a public address; "
                    "web.allow_private=true would allow it",
                )
            stream = socket.socket(family, kind, protocol)
            stream.settimeout(max(0.001, min(self.web.timeout, end - time.monotonic())))
            try:
                stream.connect(address)
            except OSError as error:
                stream.close()
                fault = error
                continue
            return stream
        raise fault


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet: not of this machine or network, nor
    of a cloud's metadata service, also in the IPv6 forms that carry an IPv4 address."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        inner = ip.ipv4_mapped or ip.sixtofour or (ip.teredo[1] if ip.teredo else None)
        if inner is None and ip in ipaddress.ip_network("64:ff9b::/96"):
            inner = ipaddress.ip_address(int(ip) & 0xFFFF_FFFF)  # type: ignore[assignment]
        if inner is not None:
            return inner.is_global and not inner.is_multicast
    return ip.is_global and not ip.is_multicast


class _AskAgainError(Exception):
    """A fault that may be gone at the next attempt."""

    def __init__(self, fault: PhotoError, after: float | None = None) -> None:
        super().__init__(str(fault))
        self.fault, self.after = fault, after


@functools.cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _cut(live: list[socket.socket]) -> None:
    with contextlib.suppress(OSError):  # it has ended
        live[0].shutdown(socket.SHUT_RDWR)


def _quoted(text: str) -> str:
    """As it may stand in a request: what is not ASCII, and what would end the line, escaped."""
    return "".join(
        char if "!" <= char <= "~" else "".join(f"%{byte:02X}" for byte in char.encode())
        for char in text
    )


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
