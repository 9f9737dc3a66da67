"""Tokens stay equal when pages move: evicted in between, over restarts, in every tier, encoded."""

from pathlib import Path
from typing import Any

import pytest
import torch

import respkv
from respkv.client import Client
from respkv.integrations.huggingface import CacheConfig, KVCacheAdapter, RespKVCache
from tests.conftest import StartServer
from tests.integrations.huggingface.generation import QUIET, assert_equal
from tests.integrations.huggingface.models import FAMILIES, prompt, shared_model

TEXTS = [prompt(50, seed=seed) for seed in range(3)]


def file_tiers(folder: Path) -> dict[str, Any]:
    return {
        "nvme_path": folder / "nvme",
        "nvme_bytes": "64mb",
        "disk_path": folder / "disk",
        "disk_bytes": "64mb",
    }


def test_every_family_over_two_restarts_of_a_server_with_file_tiers(
    tmp_path: Path, start_server: StartServer
) -> None:
    for number in range(3):
        server = start_server(maxmemory="16mb", shm="ro", **file_tiers(tmp_path))
        config = CacheConfig(cache=server.url, codecs={"nvme": "xs", "disk": "xs"}, **QUIET)
        for family in FAMILIES:
            with KVCacheAdapter(shared_model(family), config) as adapter:
                assert_equal(adapter, torch.tensor([TEXTS[0]]), max_new_tokens=4)
                assert adapter.last.is_full_hit == bool(number)
                other = prompt(5, seed=5 + number, like=TEXTS[0])
                assert_equal(adapter, torch.tensor([other]), max_new_tokens=4)
                assert adapter.last.reused_tokens >= 50
        assert server.stop() == 0


@pytest.mark.parametrize("tier", ["gpu", "cpu", "nvme", "disk"])
def test_lossless_codecs_on_every_tier(tier: str, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"maxmemory": "16mb", "prefault": False}
    if tier == "gpu":
        settings |= {"gpu_bytes": "4mb", "gpu_device": "cpu"}
    elif tier != "cpu":
        files = file_tiers(tmp_path)
        settings |= {name: value for name, value in files.items() if name.startswith(tier)}
    codecs = {tier: "xs" if tier in ("nvme", "disk") else "raw"}  # slots elsewhere have one size
    config: dict[str, Any] = {"codecs": codecs, **QUIET}
    ids = torch.tensor([TEXTS[0]])
    longer = torch.tensor([prompt(9, seed=5, like=TEXTS[0])])
    model = shared_model("qwen3")
    with respkv.open_sync(**settings) as engine:
        with KVCacheAdapter(model, CacheConfig(cache=engine, **config)) as adapter:
            assert_equal(adapter, ids)
            if tier == "gpu":
                bring_to_gpu(engine)
                assert adapter.pages.match(TEXTS[0]).tiers == "gggc"  # tails are never there
                for each in (ids, longer):
                    assert_equal(adapter, each)
                assert adapter.pages.stats().gpu_bytes == 2 * 48 * adapter.pages.token_bytes
    # A new engine has what is in files there alone, encoded; the GPU tier and memory begin anew.
    with respkv.open_sync(**settings) as engine:
        with KVCacheAdapter(model, CacheConfig(cache=engine, **config)) as adapter:
            if tier in ("nvme", "disk"):
                assert set(adapter.pages.match(TEXTS[0]).tiers) == {tier[0]}
            else:
                assert_equal(adapter, ids)
            for each in (ids, longer):
                assert_equal(adapter, each)
                assert adapter.last.reused_tokens >= len(TEXTS[0])
            assert adapter.pages.stats().stores_dropped == 0


def bring_to_gpu(engine: Client) -> None:
    """Lease all full pages on the device, where they then have copies."""
    names: Any = engine.command("KEYS", "*")
    with engine.lease_gpu([bytes(key) for key in names if b"." not in bytes(key)]) as lease:
        assert sum(page is not None for page in lease.pages) == 3


def test_every_family_with_eviction_in_between(start_server: StartServer) -> None:
    server = start_server(maxmemory="2mb", shm="ro", small_value_memory="128kb")
    config = CacheConfig(cache=server.url, **QUIET)
    with Client(server.url) as client:
        for family in FAMILIES:
            with KVCacheAdapter(shared_model(family), config) as adapter:
                for text in TEXTS[:2]:
                    assert_equal(adapter, torch.tensor([text]), max_new_tokens=4)
                evicted = int(client.info()["evicted_keys"])
                for number in range(25):
                    client.put(f"{family}:{number}", bytes(64 << 10))
                assert int(client.info()["evicted_keys"]) > evicted
                longer = prompt(5, seed=5, like=TEXTS[0])
                for text in (*TEXTS[:2], longer):
                    assert_equal(adapter, torch.tensor([text]), max_new_tokens=4)


def test_pages_that_go_between_the_first_token_and_the_second_are_computed(engine: Client) -> None:
    ids = torch.tensor([prompt(50, seed=11)])
    with KVCacheAdapter(shared_model("llama"), CacheConfig(cache=engine, **QUIET)) as adapter:
        assert_equal(adapter, ids)

        class Drop:
            """A streamer that drops the pages once the first token is there."""

            seen = 0

            def put(self, tokens: Any) -> None:
                Drop.seen += 1
                if Drop.seen == 2:
                    engine.command("FLUSHALL")

            def end(self) -> None:
                pass

        model: Any = adapter.model
        plain = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        cached = adapter.generate(input_ids=ids, max_new_tokens=6, do_sample=False, streamer=Drop())
        assert adapter.last.is_full_hit
        assert cached.tolist() == plain.tolist()


def test_a_server_that_dies_in_between(start_server: StartServer) -> None:
    server = start_server()
    ids = torch.tensor([prompt(50, seed=12)])
    model = shared_model("llama")
    with KVCacheAdapter(model, CacheConfig(cache=server.url, **QUIET)) as adapter:
        assert_equal(adapter, ids)
        server.stop()
        plain: Any = model.generate(input_ids=ids, max_new_tokens=6, do_sample=False)  # type: ignore[operator]
        cached = adapter.generate(input_ids=ids, max_new_tokens=6, do_sample=False)
        assert cached.tolist() == plain.tolist()
        assert adapter.pages.stats().errors
        cache = RespKVCache(adapter.pages, ids[0].tolist())
        assert cache.loaded_tokens == 0
