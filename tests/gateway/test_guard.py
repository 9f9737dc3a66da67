"""What comes before any route: tokens, bodies, names of requests, and what is logged."""

import http.client
import json
import logging
import socket
import time
import tracemalloc

import pytest

from respkv.gateway.settings import GatewaySettings
from tests.gateway.conftest import Serve
from tests.gateway.running import Running

TOKEN = "a-secret-token"
SAYS = "Hello"
MIB = 1 << 20
USER = {"role": "user", "content": "x"}
HEAD = b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"


def raw_answer(raw: socket.socket) -> http.client.HTTPResponse:
    answer = http.client.HTTPResponse(raw)
    answer.begin()
    return answer


def test_without_the_token_only_health_answers(serve: Serve) -> None:
    running = serve(SAYS, GatewaySettings(token=TOKEN))
    for headers in (
        {},
        {"authorization": TOKEN},
        {"authorization": f"Basic {TOKEN}"},
        {"authorization": f"Bearer {TOKEN}x"},
        {"authorization": "Bearer "},
        {"authorization": "Bearer \xff"},
    ):
        for path in ("/cache/stats", "/v1/models", "/metrics", "/openapi.json", "/nothing"):
            reply = running.get(path, headers)
            assert (reply.status, reply.error["code"]) == (401, "unauthorized")
            assert reply.headers["www-authenticate"] == "Bearer"
        assert running.post("/generate", {"prompt": "x"}, **headers).status == 401
    assert running.get("/healthz").status == running.get("/readyz").status == 200
    assert running.get("/v1/models", {"authorization": f"bearer  {TOKEN}"}).status == 200
    right = {"authorization": f"Bearer {TOKEN}"}
    assert running.post("/generate", {"prompt": "x", "max_new_tokens": 1}, **right).status == 200
    document = running.get("/openapi.json", right).json
    assert document["components"]["securitySchemes"]
    assert "security" in document["paths"]["/generate"]["post"]
    assert "security" not in document["paths"]["/healthz"]["get"]


def test_neither_tokens_nor_prompts_are_logged(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    running = serve("an-answer-that-is-not-logged", GatewaySettings(token=TOKEN))
    right = {"authorization": f"Bearer {TOKEN}"}
    reply = running.post("/generate", {"prompt": "a-secret-prompt"}, **right)
    running.post("/generate", {"prompt": "a-secret-prompt", "temperature": 7}, **right)
    running.get("/v1/models?secret-query", {"authorization": "Bearer a-wrong-token"})
    assert reply.headers["x-request-id"] in caplog.text
    assert "POST /generate 200" in caplog.text
    for word in ("secret", "a-wrong-token", "not-logged"):
        assert word not in caplog.text


def test_a_body_over_the_limit_is_413_whether_announced_or_not(serve: Serve) -> None:
    running = serve(SAYS, GatewaySettings(max_body_bytes=1000))
    reply = running.post("/generate", b"x" * 1001)
    assert (reply.status, reply.error["code"]) == (413, "body_too_long")
    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    connection.request(
        "POST",
        "/generate",
        iter([b"x" * 600] * 3),
        encode_chunked=True,
        headers={"transfer-encoding": "chunked", "content-type": "application/json"},
    )
    assert connection.getresponse().status == 413
    connection.close()
    body = b'{"prompt": "x", "max_new_tokens": 1}'
    assert running.post("/generate", body.ljust(1000)).status == 200


def test_a_client_that_asks_first_is_told_before_it_sends(serve: Serve) -> None:
    running = serve(SAYS, GatewaySettings(max_body_bytes=1000))
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as raw:
        raw.sendall(
            b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"expect: 100-continue\r\ncontent-length: 5000\r\n\r\n"
        )
        assert raw_answer(raw).status == 413


def test_a_body_that_does_not_come_is_408(serve: Serve) -> None:
    running = serve(SAYS, GatewaySettings(body_timeout_s=0.2))
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as raw:
        raw.sendall(
            b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
            b"content-length: 500\r\n\r\n{"
        )
        answer = raw_answer(raw)
        assert (answer.status, answer.getheader("connection")) == (408, "close")


def test_bodies_of_all_requests_share_one_budget_and_give_it_back(serve: Serve) -> None:
    settings = GatewaySettings(max_body_bytes=1000, bodies_bytes=1500)
    running = serve(SAYS, settings)
    body = b'{"prompt": "x", "max_new_tokens": 1}'.ljust(900)
    with socket.create_connection(("127.0.0.1", running.port), timeout=60) as raw:
        raw.sendall(HEAD + b"content-length: 900\r\n\r\n" + body[:800])
        while (reply := running.post("/generate", body)).status == 200:
            pass  # what was sent first has not come yet
        assert (reply.status, reply.error["code"]) == (503, "busy")
        assert reply.headers["retry-after"] == "1"
        raw.sendall(body[800:])
        assert raw_answer(raw).status == 200
    for _ in range(3):
        assert running.post("/generate", body).status == 200


@pytest.mark.parametrize("stream", [b"false", b"true"])
def test_a_body_that_has_been_read_holds_no_room_while_its_answer_is_made(
    serve: Serve, stream: bytes
) -> None:
    running = serve(SAYS, GatewaySettings(max_body_bytes=1000, bodies_bytes=1500))
    body = b'{"prompt": "x", "max_new_tokens": 1, "stream": ' + stream + b"}"
    running.runner.gate.clear()
    held = []
    for count in range(1, 5):
        held.append(socket.create_connection(("127.0.0.1", running.port), timeout=60))
        held[-1].sendall(HEAD + b"content-length: 900\r\n\r\n" + body.ljust(900))
        deadline = time.monotonic() + 60
        while count != under_way(running):
            assert time.monotonic() < deadline
    running.runner.gate.set()
    for raw in held:
        assert raw_answer(raw).status == 200
        raw.close()


@pytest.mark.parametrize("stream", [False, True])
def test_nothing_of_a_body_is_kept_while_its_answer_is_made(serve: Serve, stream: bool) -> None:
    running = serve(SAYS)
    # Of much that nobody needs: spaces, and a field that is ignored.
    asked = {"messages": [USER], "stream": stream, "prediction": {"x": "y" * MIB}}
    body = json.dumps(asked).encode() + b" " * MIB
    running.runner.gate.clear()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        held = []
        for count in range(1, 5):
            held.append(socket.create_connection(("127.0.0.1", running.port), timeout=60))
            path = b"/v1/chat/completions"
            length = b"content-length: %d\r\n\r\n" % len(body)
            held[-1].sendall(HEAD.replace(b"/generate", path) + length + body)
            while count != under_way(running):
                pass
        after, most = tracemalloc.get_traced_memory()
        assert most - before > 2 * MIB
        assert after - before < MIB
    finally:
        tracemalloc.stop()
    running.runner.gate.set()
    for raw in held:
        assert raw_answer(raw).status == 200
        raw.close()


def under_way(running: Running) -> int:
    stats = running.get("/cache/stats").json
    return int(stats["running"] + stats["waiting"])


def test_a_client_that_leaves_before_its_body_is_there_leaves_nothing(serve: Serve) -> None:
    running = serve(SAYS, GatewaySettings(max_body_bytes=1000, bodies_bytes=1000))
    for _ in range(3):
        with socket.create_connection(("127.0.0.1", running.port), timeout=60) as raw:
            raw.sendall(b"POST /generate HTTP/1.1\r\nhost: x\r\ncontent-length: 990\r\n\r\n")
            raw.sendall(b"x" * 900)
            time.sleep(0.02)
    body = b'{"prompt": "x", "max_new_tokens": 1}'.ljust(1000)
    deadline = time.monotonic() + 60
    while running.post("/generate", body).status != 200:
        assert time.monotonic() < deadline


@pytest.mark.parametrize(
    "garbage", [b"\x16\x03\x01\x02\x00", b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\r\n" * 9]
)
def test_what_is_no_http_closes_the_connection_and_nothing_else(
    llama: Running, garbage: bytes
) -> None:
    with socket.create_connection(("127.0.0.1", llama.port), timeout=60) as raw:
        raw.sendall(garbage + b"x" * 100 + b"\r\n\r\n")
        raw.shutdown(socket.SHUT_WR)
        assert b"HTTP/1.1 2" not in raw.recv(1000)
    assert llama.get("/healthz").status == 200
