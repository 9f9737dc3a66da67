"""Clients that go away, or do not read: nothing of theirs goes on, and nobody else notices."""

import socket
import time
from collections.abc import Callable

import pytest

from respkv.gateway.settings import GatewaySettings
from tests.gateway.conftest import SMALL, Serve
from tests.gateway.running import Running, events_of

WAIT_S = 60.0
ENDLESS = GatewaySettings(max_new_tokens=1_000_000, stop_timeout_s=2)


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def endless(serve: Serve, settings: GatewaySettings = ENDLESS) -> Running:
    running = serve("text without an end, over and over", settings)
    running.runner.tokens_max = 2_000_000
    return running


def num_cancelled(running: Running) -> int:
    assert running.model is not None
    return running.model.loop.stats().cancelled


@pytest.mark.parametrize("is_reset", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_is_not_generated_for(
    serve: Serve, stream: bool, is_reset: bool
) -> None:
    running = endless(serve)
    body = {"prompt": "x", "max_new_tokens": 1_000_000, "stream": stream}
    raw = running.open("POST", "/generate", body)
    wait_until(lambda: running.runner.steps > 20)
    if is_reset:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    raw.close()
    wait_until(lambda: running.runner.num_sequences == 0)
    wait_until(lambda: num_cancelled(running) == 1)


def test_all_answers_end_with_their_client(serve: Serve) -> None:
    running = endless(serve)
    body = {"prompt": "x", "max_tokens": 1_000_000, "n": 4, "stream": True}
    raw = running.open("POST", "/v1/completions", body)
    wait_until(lambda: running.runner.num_sequences == 4)
    raw.close()
    wait_until(lambda: running.runner.num_sequences == 0)


def test_a_client_in_the_queue_that_goes_away_leaves_it(serve: Serve) -> None:
    running = serve("text", GatewaySettings(max_concurrency=1, max_waiting=1))
    running.runner.gate.clear()
    first = running.open("POST", "/generate", {"prompt": "x"})
    wait_until(lambda: running.get("/cache/stats").json["running"] == 1)
    second = running.open("POST", "/generate", {"prompt": "y"})
    wait_until(lambda: running.get("/cache/stats").json["waiting"] == 1)
    assert running.post("/generate", {"prompt": "z"}).status == 503
    second.close()
    running.runner.gate.set()
    wait_until(lambda: running.get("/cache/stats").json["waiting"] == 0)
    assert running.post("/generate", {"prompt": "z"}).status == 200
    first.close()


def test_a_reader_that_takes_nothing_is_dropped(serve: Serve) -> None:
    settings = GatewaySettings(max_new_tokens=1_000_000, read_timeout_s=0.3)
    running = endless(serve, settings)
    body = {"prompt": "x", "max_tokens": 1_000_000, "stream": True, "n": 8}
    with running.open("POST", "/v1/completions", body):
        wait_until(lambda: num_cancelled(running) == 8)
        wait_until(lambda: running.runner.num_sequences == 0)
        assert running.get("/healthz").status == 200


def test_a_stream_without_news_says_that_it_lives(serve: Serve) -> None:
    running = serve("text", GatewaySettings(heartbeat_s=0.05))
    running.runner.gate.clear()
    body = {"prompt": "x", "max_new_tokens": 2, "stream": True}
    with running.open("POST", "/generate", body) as raw:
        received = b""
        while received.count(b": still here\n\n") < 2:
            received += raw.recv(4096)
        running.runner.gate.set()
        while b"event: done" not in received:
            received += raw.recv(4096)
    assert list(events_of(received.decode().replace("\r", "")))


@pytest.mark.parametrize(("tokens", "drain_s"), [(200, WAIT_S), (1_000_000, 0.0)])
def test_an_end_of_the_gateway_waits_for_streams_or_tells_them(
    serve: Serve, tokens: int, drain_s: float
) -> None:
    running = endless(serve, ENDLESS)
    body = {"prompt": "x", "max_new_tokens": tokens, "stream": True}
    with running.open("POST", "/generate", body) as raw:
        received = raw.recv(4096)
        model = running.gateway.stop()
        assert model is not None
        model.close(drain_s)
        while not received.endswith(b"0\r\n\r\n"):
            part = raw.recv(65536)
            assert part, received
            received += part
    assert (b"event: done" in received) == (drain_s > 0)
    assert (b'"stopping"' in received) == (b"event: error" in received) == (drain_s == 0)
    assert running.post("/generate", {"prompt": "x"}).error["code"] == "stopping"


def test_an_error_in_the_middle_of_a_stream_is_an_event(serve: Serve) -> None:
    steps: list[int] = []

    def crash(prompt: object) -> list[int]:
        steps.append(1)
        if len(steps) > 3:
            raise ZeroDivisionError
        return [40]

    reply = serve(crash).post("/generate", {"prompt": "x", "stream": True})
    assert reply.status == 200
    *_, (name, body) = reply.events
    assert name == "error"
    assert body["error"]["code"] == "generation_failed"


def test_openai_clients_get_the_error_as_a_chunk_and_done(serve: Serve) -> None:
    def crash(prompt: object) -> list[int]:
        raise ZeroDivisionError

    reply = serve(crash).post("/v1/completions", {"prompt": "x", "stream": True})
    (_, error), (_, done) = reply.events
    assert error["error"]["code"] == "generation_failed"
    assert done == "[DONE]"


def test_a_hundred_streams_at_once_are_all_whole(serve: Serve) -> None:
    running = serve("Hello, wörld: 5 € for all", SMALL)
    body = {"prompt": "x", "max_new_tokens": 8, "stream": True}
    sockets = [running.open("POST", "/generate", body) for _ in range(100)]
    for raw in sockets:
        received = b""
        while not received.endswith(b"0\r\n\r\n"):
            part = raw.recv(65536)
            assert part, received
            received += part
        assert b"event: done" in received
        raw.close()
