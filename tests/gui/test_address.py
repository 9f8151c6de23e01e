"""The address of the web page: which ports are read, which are free, and whether the page answers."""

from __future__ import annotations

import http.server
import socket
import threading
from collections.abc import Iterator

import pytest

from kohya_mps.core.errors import UsageError
from kohya_mps.gui.address import LOOPBACK, Address, check_free, parse_port
from tests.support.web_pages import free_port


class Page(http.server.BaseHTTPRequestHandler):
    """Answers with the status that its server has."""

    def do_GET(self) -> None:
        assert isinstance(self.server, Server)
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Print nothing."""


class Server(http.server.ThreadingHTTPServer):
    """A web server with a status to answer with."""

    status = 200


@pytest.fixture
def server() -> Iterator[Server]:
    with Server((LOOPBACK, 0), Page) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:7860"),
        ("0.0.0.0", "http://127.0.0.1:7860"),
        ("::", "http://[::1]:7860"),
        ("192.0.2.7", "http://192.0.2.7:7860"),
    ],
)
def test_the_url_is_one_that_this_machine_reaches(host: str, url: str) -> None:
    assert Address(host, 7860).url == url


def test_a_page_answers_when_its_first_page_is_returned(server: Server) -> None:
    address = Address(LOOPBACK, server.server_address[1])
    assert address.answers()

    server.status = 503
    assert not address.answers()


def test_where_nothing_listens_nothing_answers() -> None:
    assert not Address(LOOPBACK, free_port()).answers()


@pytest.mark.parametrize(("text", "port"), [("", 7860), ("1", 1), ("65535", 65535)])
def test_a_port_is_read(text: str, port: int) -> None:
    assert parse_port(text, 7860) == port


@pytest.mark.parametrize("text", ["0", "65536", "web", "-1", "٣", " 80"])
def test_what_is_not_a_port_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a port"):
        parse_port(text, 7860)


def test_a_port_that_is_taken_is_an_error_that_names_another(server: Server) -> None:
    port = server.server_address[1]

    for host in (LOOPBACK, "0.0.0.0"):
        with pytest.raises(UsageError, match=f"port {port} is in use") as caught:
            check_free(Address(host, port))
        assert "invoke gui --port" in caught.value.fix


def test_after_the_last_port_the_default_is_offered() -> None:
    try:
        taken = socket.create_server((LOOPBACK, 65535))
    except OSError:
        taken = None  # another program has it: as good

    with pytest.raises(UsageError) as caught:
        check_free(Address(LOOPBACK, 65535))

    assert "--port 7860" in caught.value.fix
    if taken:
        taken.close()


def test_a_free_port_is_left_free() -> None:
    address = Address(LOOPBACK, free_port())

    check_free(address)

    socket.create_server((address.host, address.port)).close()
