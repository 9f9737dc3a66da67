"""Limits of time and number on connections."""

import http.client
import socket
import time

import pytest

from respkv.gateway.settings import GatewaySettings
from tests.gateway.conftest import Serve
from tests.gateway.running import Reply, Running

GET = b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"


def connect(running: Running) -> socket.socket:
    return socket.create_connection(("127.0.0.1", running.port), timeout=60)


def is_closed(raw: socket.socket) -> bool:
    """Read until the other side closes; within the socket's timeout it does."""
    try:
        while raw.recv(4096):
            pass
    except ConnectionResetError:
        pass
    except TimeoutError:
        return False
    return True


def test_a_head_that_does_not_come_closes_the_connection(serve: Serve) -> None:
    running = serve("x", GatewaySettings(head_timeout_s=0.2))
    with connect(running) as silent, connect(running) as slow:
        slow.sendall(GET[:10])
        assert is_closed(silent)
        assert is_closed(slow)


def test_a_head_byte_by_byte_gets_no_more_time(serve: Serve) -> None:
    running = serve("x", GatewaySettings(head_timeout_s=0.3))
    with connect(running) as slow:
        start = time.monotonic()
        try:
            while True:
                slow.sendall(b"x" if time.monotonic() > start else b"GET /")
                time.sleep(0.02)
                assert time.monotonic() < start + 60
        except (BrokenPipeError, ConnectionResetError):
            pass


def test_the_next_head_of_a_connection_has_a_limit_too(serve: Serve) -> None:
    running = serve("x", GatewaySettings(head_timeout_s=1, keep_alive_s=60))
    with connect(running) as raw:
        raw.sendall(GET)
        assert raw.recv(4096).startswith(b"HTTP/1.1 200")
        time.sleep(1.2)  # idle is not slow
        raw.sendall(GET)
        assert raw.recv(4096).startswith(b"HTTP/1.1 200")
        raw.sendall(GET[:10])
        assert is_closed(raw)


def test_an_answer_that_takes_longer_than_a_head_is_not_cut(serve: Serve) -> None:
    running = serve("x", GatewaySettings(head_timeout_s=1))
    running.runner.gate.clear()
    with running.open("POST", "/generate", {"prompt": "x"}) as raw:
        time.sleep(1.2)
        running.runner.gate.set()
        assert raw.recv(4096).startswith(b"HTTP/1.1 200")


def test_what_is_no_http_is_refused_in_the_form_of_all_errors(serve: Serve) -> None:
    running = serve("x")
    with connect(running) as raw:
        raw.sendall(b"GET /healthz HTTP/1.1\r\n\r\n")  # without a host
        answer = http.client.HTTPResponse(raw)
        answer.begin()
        reply = Reply(answer.status, {}, answer.read())
        assert (reply.status, reply.error["code"]) == (400, "invalid_http")
        assert is_closed(raw)


def test_garbage_behind_an_answer_ends_the_connection_without_a_fuss(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    running = serve("x", GatewaySettings(token="a-token"))
    head = b"POST /generate HTTP/1.1\r\nhost: x\r\ntransfer-encoding: chunked\r\n\r\n"
    with connect(running) as raw:
        raw.sendall(head)
        assert raw.recv(4096).startswith(b"HTTP/1.1 401")
        raw.sendall(b"no number of a chunk\r\n")
        assert is_closed(raw)
    assert "Traceback" not in caplog.text
    assert "LocalProtocolError" not in caplog.text


def test_a_head_request_gets_what_a_get_gets_but_the_body(serve: Serve) -> None:
    running = serve("x")
    for path, status in (("/healthz", 200), ("/v1/models", 200), ("/nothing", 404)):
        asked, told = running.ask("HEAD", path, None, {}), running.get(path)
        assert (asked.status, asked.body) == (status, b"")
        assert asked.headers["content-length"] == told.headers["content-length"]
    assert running.ask("HEAD", "/generate", None, {}).status == 405


def test_an_idle_connection_is_closed(serve: Serve) -> None:
    running = serve("x", GatewaySettings(keep_alive_s=1))
    with connect(running) as raw:
        raw.sendall(GET)
        assert raw.recv(4096).startswith(b"HTTP/1.1 200")
        assert is_closed(raw)


def test_requests_in_one_piece_are_answered_in_order(serve: Serve) -> None:
    running = serve("x")
    with connect(running) as raw:
        raw.sendall(GET * 3 + GET.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
        received = b""
        while part := raw.recv(4096):
            received += part
    assert received.count(b"HTTP/1.1 200") == 4


def test_connections_beyond_the_limit_are_refused_and_come_back(serve: Serve) -> None:
    running = serve("x", GatewaySettings(max_connections=4))
    held = [connect(running) for _ in range(4)]
    for raw in held:
        raw.sendall(GET)
        assert raw.recv(4096).startswith(b"HTTP/1.1 200")
    reply = running.get("/healthz")
    assert (reply.status, reply.error["code"]) == (503, "busy")
    assert reply.headers["connection"] == "close"
    more = [connect(running) for _ in range(20)]  # beyond twice as many: dropped
    assert any(is_closed(raw) for raw in more[8:])
    for raw in (*held, *more):
        raw.close()
    deadline = time.monotonic() + 60
    while running.get("/healthz").status != 200:
        assert time.monotonic() < deadline
