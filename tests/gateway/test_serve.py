"""A gateway in a process of its own, from its start to its end."""

import contextlib
import resource
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from respkv.errors import ConfigError
from respkv.gateway.model import Model
from respkv.gateway.serve import Process
from respkv.gateway.settings import GatewaySettings
from tests.conftest import StartServer
from tests.gateway.crowd import gather, settled
from tests.gateway.process import GatewayProcess

PROMPT = "a page of a prompt that is long enough for some pages. " * 6


@pytest.fixture(scope="module")
def gateway(checkpoint: Path) -> Iterator[GatewayProcess]:
    """A gateway with an engine of its own; at the end it stops as it should."""
    options = ["--page-tokens", "16", "--max-prompt-tokens", "512", "--max-waiting", "8"]
    options += ["--always-load", "--max-recompute-tokens", "600"]
    process = GatewayProcess(checkpoint, *options, RESPKV_GATEWAY_TOKEN="")
    yield process
    assert process.stop() == 0, process.log
    assert "respkv gateway: stopping" in process.log
    assert "Traceback" not in process.log
    process.close()


def test_a_repeated_prompt_is_found_and_after_a_clear_it_is_not(gateway: GatewayProcess) -> None:
    ask = {"prompt": PROMPT, "max_new_tokens": 4}
    first = gateway.post("/generate", ask).json
    again = gateway.post("/generate", ask).json
    assert again["text"] == first["text"]
    assert first["timings"]["prefix_tokens_saved"] == 0
    assert again["timings"]["prefix_tokens_saved"] == again["prompt_tokens"]
    stats = gateway.get("/cache/stats").json
    assert (stats["hits"], stats["misses"], stats["hit_rate"]) == (1, 1, 0.5)
    assert stats["cached_tokens_reused"] == again["prompt_tokens"]
    assert stats["store_reachable"]
    cleared = gateway.post("/cache/clear")
    assert (cleared.status, cleared.json["status"]) == (200, "cleared"), cleared.body
    assert cleared.json["store_pages"] > 0
    assert gateway.get("/cache/stats").json["cache_size"] == 0
    assert gateway.post("/generate", ask).json["timings"]["prefix_tokens_saved"] == 0


def test_a_salt_shares_with_nobody_else(gateway: GatewayProcess) -> None:
    ask = {"prompt": PROMPT[5:], "max_new_tokens": 2, "cache_salt": "mine"}
    gateway.post("/generate", ask)
    other = gateway.post("/generate", {**ask, "cache_salt": "yours"}).json
    assert other["timings"]["prefix_tokens_saved"] == 0
    mine = gateway.post("/generate", ask).json
    assert mine["timings"]["prefix_tokens_saved"] > 0


def test_cached_tokens_are_told_as_openai_tells_them(gateway: GatewayProcess) -> None:
    ask = {"prompt": PROMPT[9:], "max_tokens": 2, "n": 2, "temperature": 0}
    first = gateway.post("/v1/completions", ask).json["usage"]
    assert first["prompt_tokens_details"] == {"cached_tokens": 0}
    again = gateway.post("/v1/completions", ask).json["usage"]
    assert again["prompt_tokens_details"]["cached_tokens"] == again["prompt_tokens"]


def test_a_crowd_is_served_and_leaves_nothing(gateway: GatewayProcess) -> None:
    gateway.get("/healthz")
    num_descriptors = gateway.num_descriptors
    tally = gather(gateway.port, num_clients=30, seconds=2.0, seed=1)
    assert tally.problems == []
    assert set(tally.statuses) <= {200, 400, 422, 503}
    assert tally.statuses[200] > 10
    assert settled(gateway, num_descriptors) == ""


# In the gate test_loading.py has two lives in this process, and test_streaming.py their end.
@pytest.mark.long
def test_two_lives_share_a_server_and_end_well(checkpoint: Path, start_server: StartServer) -> None:
    server = start_server()
    ask = {"prompt": PROMPT, "max_new_tokens": 3}
    options = ("--url", server.url, "--page-tokens", "16", "--max-new-tokens", "30000")
    gateway = GatewayProcess(checkpoint, *options, "--stop-timeout", "60")
    try:
        first = gateway.post("/generate", ask).json
        streamed = _streamed_into_the_end(gateway, 200)
        assert b"event: done" in streamed
        assert b"event: error" not in streamed
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", gateway.port), timeout=5)
    finally:
        gateway.close()
    # This one has not the time to finish what is in flight.
    gateway = GatewayProcess(checkpoint, *options, "--stop-timeout", "2")
    try:
        stats = gateway.get("/cache/stats").json
        assert stats["store_pages"] > 0
        assert gateway.post("/generate", ask).json["text"] == first["text"]
        streamed = _streamed_into_the_end(gateway, 30_000)
        assert b"event: error" in streamed
        assert b'"stopping"' in streamed
    finally:
        gateway.close()


@pytest.mark.long
def test_a_second_signal_ends_it_at_once(checkpoint: Path) -> None:
    gateway = GatewayProcess(checkpoint, "--max-new-tokens", "30000", "--stop-timeout", "100")
    try:
        body = {"prompt": "x", "max_new_tokens": 30_000, "stream": True}
        with gateway.open("POST", "/generate", body) as raw:
            assert raw.recv(4096).startswith(b"HTTP/1.1 200")
            gateway.process.send_signal(signal.SIGTERM)
            raw.recv(4096)
            assert _is_refused(gateway.port)
            received = b""
            gateway.process.send_signal(signal.SIGTERM)
            with contextlib.suppress(ConnectionResetError):
                while part := raw.recv(65536):
                    received += part
        assert b"event: done" not in received
        assert gateway.wait() == 0, gateway.log
        assert "Traceback" not in gateway.log
    finally:
        gateway.close()


def _is_refused(port: int) -> bool:
    """Wait until nobody listens at a port."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except OSError:
            return True
    return False


def _streamed_into_the_end(gateway: GatewayProcess, count: int) -> bytes:
    """Stop a gateway while it streams; return what came, all of it."""
    body = {"prompt": "x", "max_new_tokens": count, "stream": True}
    with gateway.open("POST", "/generate", body) as raw:
        received = raw.recv(4096)
        assert received.startswith(b"HTTP/1.1 200")
        gateway.process.send_signal(signal.SIGTERM)
        while part := raw.recv(65536):
            received += part
    assert gateway.wait() == 0, gateway.log
    assert "Traceback" not in gateway.log
    return received


def test_a_model_that_cannot_be_loaded_ends_the_process(checkpoint: Path) -> None:
    def fail() -> Model:
        raise ConfigError("no such weights")

    lines: list[str] = []
    with pytest.raises(ConfigError, match="no such weights"):
        Process(GatewaySettings(port=0), fail).run(lines.append)
    assert len(lines) == 1
    assert lines[0].startswith("listening on http://127.0.0.1:")


def test_as_many_files_may_be_open_as_the_system_allows() -> None:
    def fail() -> Model:
        raise ConfigError("no such weights")

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, hard))
    try:
        with pytest.raises(ConfigError, match="no such weights"):
            Process(GatewaySettings(port=0), fail).run(print)
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_an_address_that_is_taken_is_named(checkpoint: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"cannot listen on 127.0.0.1:{port}: .*in use"):
            Process(GatewaySettings(port=port), never).run(print)
    with pytest.raises(ConfigError, match=r"cannot listen on no\.such\.host\.invalid"):
        Process(GatewaySettings(host="no.such.host.invalid"), never).run(print)


def never() -> Model:
    raise AssertionError("there is nothing to load it for")
