"""The address that the web page listens on: reading it, checking it, asking whether the page answers."""

from __future__ import annotations

import contextlib
import errno
import http.client
import socket

import msgspec

from kohya_mps.core.errors import UsageError

LOOPBACK = "127.0.0.1"

_HIGHEST_PORT = 65535
_ANSWER_SECONDS = 60
_CONNECT_SECONDS = 2


class Address(msgspec.Struct, frozen=True):
    """The host and port that the page listens on."""

    host: str
    port: int

    @property
    def local_host(self) -> str:
        """The host under which this machine reaches the page."""
        return {"0.0.0.0": LOOPBACK, "::": "::1"}.get(self.host, self.host)  # noqa: S104

    @property
    def url(self) -> str:
        """The URL for this machine's browser."""
        host = f"[{self.local_host}]" if ":" in self.local_host else self.local_host
        return f"http://{host}:{self.port}"

    def answers(self) -> bool:
        """Whether a web server returns its first page there."""
        # Not urllib: it would ask a proxy, which cannot reach this machine's own addresses. The
        # timeout is long because each request is a second of work for a page with 3,000 fields:
        # many short attempts would keep it from starting.
        connection = http.client.HTTPConnection(self.local_host, self.port, timeout=_ANSWER_SECONDS)
        try:
            connection.request("GET", "/")
            return connection.getresponse().status == http.client.OK
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()


def parse_port(text: str, default: int) -> int:
    """Read a port as it was typed; an empty text means the default.

    Raises:
        UsageError: it is not a port.
    """
    if not text:
        return default
    if not (text.isascii() and text.isdecimal()) or not 0 < int(text) <= _HIGHEST_PORT:
        raise UsageError(f"--port: {text!r} is not a port", f"accepted: 1 to {_HIGHEST_PORT}")
    return int(text)


def check_free(address: Address) -> None:
    """Make sure that the page can listen there.

    Raises:
        UsageError: another program listens there, or the address is not one of this machine.
    """
    other_port = f"`invoke gui --port {address.port + 1 if address.port < _HIGHEST_PORT else 7860}`"
    in_use = UsageError(f"port {address.port} is in use by another program", other_port)
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    # Connect first: macOS lets a program bind 127.0.0.1 while another one listens on all addresses.
    with socket.socket(family) as client:
        client.settimeout(_CONNECT_SECONDS)
        with contextlib.suppress(OSError):
            if client.connect_ex((address.local_host, address.port)) == 0:
                raise in_use
    try:
        socket.create_server((address.host, address.port), family=family).close()
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise in_use from None
        if error.errno == errno.EACCES:
            raise UsageError(f"you may not listen on port {address.port}", other_port) from None
        raise UsageError(
            f"--listen: this machine has no address {address.host!r} ({error.strerror})",
            f"leave it out for {LOOPBACK}, or give one of this machine's addresses",
        ) from None
