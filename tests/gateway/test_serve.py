"""A gateway in a process of its own, from its start to its end."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conftest import StartServer
from tests.gateway.crowd import gather, settled
from tests.gateway.process import GatewayProcess
from tests.gateway.running import Reply

PROMPT = "a page of a prompt that is long enough for some pages. " * 6


@pytest.fixture(scope="module")
def gateway(checkpoint: Path) -> Iterator[GatewayProcess]:
    """A gateway with an engine of its own; at the end it stops as it should."""
    options = ("--page-tokens", "16", "--max-prompt-tokens", "512", "--max-waiting", "8")
    process = GatewayProcess(checkpoint, *options, RESPKV_GATEWAY_TOKEN="")
    yield process
    assert process.stop() == 0, process.log
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


def test_pages_outlive_the_gateway_in_a_server(checkpoint: Path, start_server: StartServer) -> None:
    server = start_server()
    ask = {"prompt": PROMPT, "max_new_tokens": 3}
    replies: list[Reply] = []
    for _ in range(2):
        gateway = GatewayProcess(checkpoint, "--url", server.url, "--page-tokens", "16")
        replies.append(gateway.post("/generate", ask))
        stats = gateway.get("/cache/stats").json
        assert stats["store_reachable"]
        assert gateway.stop() == 0, gateway.log
        gateway.close()
    first, second = (reply.json for reply in replies)
    assert first["text"] == second["text"]
    assert first["timings"]["prefix_tokens_saved"] == 0


def test_what_is_in_flight_is_finished_after_sigterm(checkpoint: Path) -> None:
    gateway = GatewayProcess(checkpoint, "--max-new-tokens", "5000", "--stop-timeout", "30")
    try:
        body = {"prompt": "x", "max_new_tokens": 300, "stream": True}
        raw = gateway.open("POST", "/generate", body)
        received = raw.recv(4096)
        assert received.startswith(b"HTTP/1.1 200")
        gateway.process.send_signal(signal.SIGTERM)
        while part := raw.recv(65536):
            received += part
        raw.close()
        assert b"event: done" in received
        assert b"event: error" not in received
        assert gateway.stop() == 0
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", gateway.port), timeout=5)
    finally:
        gateway.close()


def test_what_takes_too_long_after_sigterm_is_told_so(checkpoint: Path) -> None:
    gateway = GatewayProcess(checkpoint, "--max-new-tokens", "30000", "--stop-timeout", "2")
    try:
        body = {"prompt": "x", "max_new_tokens": 30000, "stream": True}
        raw = gateway.open("POST", "/generate", body)
        received = raw.recv(4096)
        start = time.monotonic()
        gateway.process.send_signal(signal.SIGTERM)
        while part := raw.recv(65536):
            received += part
        raw.close()
        assert b"event: error" in received
        assert b'"stopping"' in received
        assert gateway.stop() == 0, gateway.log
        assert time.monotonic() < start + 30
    finally:
        gateway.close()


def run(*options: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "respkv", "gateway", "--port", "0", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_a_checkpoint_that_cannot_be_read_ends_the_process(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    done = run("--model", str(tmp_path))
    assert done.returncode == 2
    assert f"--model {str(tmp_path)!r}" in done.stderr
    assert "Traceback" not in done.stderr
