"""The gpu tier of a server, on the processor: what clients see of it, through real sockets."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.conftest import StartServer
from tests.server.conftest import Connect
from tests.server.raw import Raw, error_of
from tests.server.watching import number_of, wait_for
from tests.server_process import ServerProcess

MIB = 1 << 20
SCHEMA = ("LAYERS", 2, "HEADS", 4, "DIM", 64, "TOKENS", 64, "DTYPE", "bfloat16")
NBYTES = 2 * 2 * 4 * 64 * 64 * 2


@pytest.fixture(scope="module")
def own() -> Iterator[ServerProcess]:
    """A server with a gpu tier on the processor, that the tests here share."""
    running = ServerProcess(gpu_bytes="4mb", gpu_device="cpu", maxmemory="64mb", shm="ro")
    yield running
    assert running.stop() == 0


@pytest.fixture
def gpu(own: ServerProcess, connect: Connect) -> Raw:
    raw = connect(own)
    assert raw.ask("FLUSHALL") == b"OK"
    assert raw.ask("CONFIG", "SET", "gpu-promote", "second") == b"OK"
    assert raw.ask("KV.SCHEMA", "SET", "ns", *SCHEMA) == b"OK"
    return raw


def page() -> bytes:
    return torch.randn(NBYTES // 2).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()


def put(raw: Raw, count: int = 1) -> dict[str, bytes]:
    pages = {f"ns:{number}": page() for number in range(count)}
    for key, payload in pages.items():
        assert raw.ask("KV.PUT", key, payload) == b"OK"
    return pages


def letters(raw: Raw, *keys: str) -> str:
    return str(raw.ask("KV.MATCH", len(keys), *keys)[1].decode())


def wait_for_letters(raw: Raw, wanted: str, *keys: str) -> None:
    give_up = time.monotonic() + 60
    while letters(raw, *keys) != wanted:
        assert time.monotonic() < give_up, letters(raw, *keys)
        time.sleep(0.005)


def tier_of(raw: Raw) -> dict[str, Any]:
    row = raw.ask("KV.TIERS")[0]
    return {name.decode(): value for name, value in zip(row[::2], row[1::2], strict=True)}


def test_a_page_that_is_read_twice_is_on_the_gpu_and_reads_the_same(
    gpu: Raw, own: ServerProcess
) -> None:
    (key, payload), *_ = put(gpu).items()
    assert letters(gpu, key) == "c"
    assert gpu.ask("KV.GET", key) == payload
    assert gpu.ask("KV.GET", key) == payload
    wait_for_letters(gpu, "g", key)
    assert gpu.ask("KV.GET", key) == payload
    info = dict(zip(*[iter(gpu.ask("KV.INFO", key))] * 2, strict=True))
    assert info[b"tier"] == b"gpu"
    assert info[b"tiers"] == [b"gpu", b"cpu"]
    assert number_of(own, "kv_gpu_pages") == 1
    assert number_of(own, "kv_gpu_payload_bytes") == NBYTES
    assert own.info()["kv_gpu_device"] == "cpu"


def test_the_tier_is_the_first_row(gpu: Raw) -> None:
    row = tier_of(gpu)
    assert (row["name"], row["letter"], row["state"]) == (b"gpu", b"g", b"ok")
    assert row["capacity_bytes"] == 4 * MIB
    assert row["pages"] == 0
    assert [each[1] for each in gpu.ask("KV.TIERS")] == [b"gpu", b"cpu"]


@pytest.mark.parametrize(
    "ending",
    [("SET", "ns:0", "x"), ("DEL", "ns:0"), ("PEXPIRE", "ns:0", 1), ("FLUSHALL",)],
    ids=lambda words: words[0],
)
def test_no_copy_outlives_its_value(ending: tuple[Any, ...], gpu: Raw, own: ServerProcess) -> None:
    put(gpu)
    assert gpu.ask("KV.PREFETCH", 1, "ns:0", "TO", "gpu") == 1
    wait_for_letters(gpu, "g", "ns:0")
    gpu.ask(*ending)
    wait_for(own, "kv_gpu_pages", 0)
    assert number_of(own, "kv_gpu_used_bytes") == 0
    new = page()
    assert gpu.ask("KV.PUT", "ns:0", new) == b"OK"
    assert gpu.ask("KV.GET", "ns:0") == new


def test_the_pages_read_last_stay_and_capacity_holds(gpu: Raw, own: ServerProcess) -> None:
    pages = put(gpu, 40)
    for key in pages:
        gpu.ask("KV.GET", key)
        gpu.ask("KV.GET", key)
        assert number_of(own, "kv_gpu_used_bytes") <= 4 * MIB
    wait_for(own, "kv_gpu_pages", 4 * MIB // NBYTES)
    wait_for_letters(gpu, "g", list(pages)[-1])
    assert letters(gpu, "ns:0") == "c"
    for key, payload in pages.items():
        assert gpu.ask("KV.GET", key) == payload


def test_a_prefetch_counts_what_is_on_its_way(gpu: Raw) -> None:
    put(gpu, 3)
    gpu.ask("SET", "plain", "value")
    assert gpu.ask("KV.PREFETCH", 5, "ns:0", "ns:1", "ns:2", "plain", "absent", "TO", "gpu") == 3
    wait_for_letters(gpu, "ggg", "ns:0", "ns:1", "ns:2")
    assert gpu.ask("KV.PREFETCH", 3, "ns:0", "ns:1", "ns:2", "TO", "GPU") == 0


def test_promotion_can_be_changed_while_it_runs(gpu: Raw) -> None:
    assert gpu.ask("CONFIG", "SET", "gpu-promote", "never") == b"OK"
    put(gpu)
    for _ in range(5):
        gpu.ask("KV.GET", "ns:0")
    time.sleep(0.05)
    assert letters(gpu, "ns:0") == "c"
    assert gpu.ask("CONFIG", "SET", "gpu-promote", "first") == b"OK"
    gpu.ask("KV.GET", "ns:0")
    wait_for_letters(gpu, "g", "ns:0")


def test_a_lease_on_the_processor_is_refused(gpu: Raw, own: ServerProcess) -> None:
    put(gpu)
    error = error_of(gpu.ask("KV.LEASE", 1, "ns:0", "TIER", "gpu"))
    assert error.startswith("KVTIER ")
    assert "on the cpu" in error
    assert number_of(own, "kv_gpu_leases") == 0
    assert gpu.ask("KV.LEASE", 1, "ns:0", "TIER", "cpu")[1][1] == NBYTES
    assert "TIER DISK" in error_of(gpu.ask("KV.LEASE", 1, "ns:0", "TIER", "disk"))


def test_without_the_tier_its_words_are_errors(raw: Raw, server: ServerProcess) -> None:
    raw.ask("KV.PUT", "p", b"x" * 1000)
    for words in (("KV.PREFETCH", 1, "p", "TO", "gpu"), ("KV.LEASE", 1, "p", "TIER", "gpu")):
        assert "no gpu tier; start it with --gpu-bytes" in error_of(raw.ask(*words))
    assert number_of(server, "kv_gpu_tiers") == 0
    assert "kv_gpu_state" not in server.info()


def test_a_cold_page_comes_back_from_the_gpu(
    start_server: StartServer, connect: Connect, tmp_path: Path
) -> None:
    server = start_server(
        gpu_bytes="8mb",
        gpu_device="cpu",
        gpu_promote="first",
        maxmemory="4mb",
        maxmemory_policy="lru",  # what is put last pushes out what was put first
        nvme_path=tmp_path / "nvme",
        nvme_bytes="64mb",
        promote="never",
    )
    raw = connect(server)
    raw.ask("KV.SCHEMA", "SET", "ns", *SCHEMA)
    pages = put(raw, 8)
    for key in pages:
        raw.ask("KV.GET", key)
    wait_for_letters(raw, "g" * 8, *pages)
    for number in range(60):  # push them out of memory
        raw.ask("SET", f"other:{number}", os.urandom(NBYTES))
    for key in pages:
        info = dict(zip(*[iter(raw.ask("KV.INFO", key))] * 2, strict=True))
        assert info[b"tiers"] == [b"gpu", b"nvme"]
    assert letters(raw, *pages) == "g" * 8
    for key, payload in pages.items():
        assert raw.ask("KV.GET", key) == payload
    assert number_of(server, "kv_gpu_raised") == 8
    assert number_of(server, "kv_gpu_corrupt") == 0


def test_pages_take_the_codec_of_their_namespace_there(gpu: Raw, own: ServerProcess) -> None:
    assert gpu.ask("KV.SCHEMA", "SET", "coded", *SCHEMA, "CODEC", "gpu", "i8") == b"OK"
    payload = page()
    gpu.ask("KV.PUT", "coded:1", payload)
    gpu.ask("KV.PREFETCH", 1, "coded:1", "TO", "gpu")
    wait_for_letters(gpu, "g", "coded:1")
    assert NBYTES // 2 < number_of(own, "kv_gpu_used_bytes") < 0.6 * NBYTES
    assert gpu.ask("KV.GET", "coded:1") == payload, "memory has it as it was put"


@pytest.mark.parametrize("codec", ["xs", "auto"])
def test_codecs_of_no_fixed_size_are_refused_there(codec: str, gpu: Raw) -> None:
    said = error_of(gpu.ask("KV.SCHEMA", "SET", "no", *SCHEMA, "CODEC", "gpu", codec))
    assert f"CODEC gpu {codec}: slots on a GPU have one size" in said


def test_the_server_stops_while_pages_are_copied(
    start_server: StartServer, connect: Connect
) -> None:
    server = start_server(
        gpu_bytes="16mb", gpu_device="cpu", gpu_promote="first", shutdown_timeout=1
    )
    raw = connect(server)
    raw.ask("KV.SCHEMA", "SET", "ns", *SCHEMA)
    for key in put(raw, 50):
        raw.send("KV.GET", key)
    assert server.stop(signal.SIGTERM) == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_server_without_the_device_does_not_start_and_says_why() -> None:
    server = ServerProcess(gpu_bytes="4mb", is_awaited=False)
    assert server.process.wait(120) == 2
    assert "respkv: gpu-device cuda:0: " in server.log
    assert "respkv[torch]" in server.log
    assert "Traceback" not in server.log
    server.stop()


def test_a_server_without_torch_does_not_start_and_says_why(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("raise ImportError('No module named torch')")
    server = ServerProcess(
        gpu_bytes="4mb",
        gpu_device="cpu",
        is_awaited=False,
        environment={"PYTHONPATH": str(tmp_path)},
    )
    assert server.process.wait(120) == 2
    assert "needs torch (No module named torch); install respkv[torch]" in server.log
    server.stop()
