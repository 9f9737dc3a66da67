"""Leases in the process that has the memory: of the arena, and of the gpu tier on the device cpu."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import respkv
from respkv.client import as_torch
from respkv.embedded import EmbeddedCache
from respkv.errors import LeaseGone, ProtocolError, ServerError
from respkv.page import Geometry, page_keys
from tests.client.pages import GEOMETRY, NBYTES, SHAPE, chain, declare, payload


@pytest.fixture(scope="module")
def on_device() -> Iterator[EmbeddedCache]:
    with respkv.open_sync(
        maxmemory="64mb", prefault=False, gpu_bytes="16mb", gpu_device="cpu", gpu_promote="first"
    ) as cache:
        yield cache


def test_leased_pages_lie_in_the_engines_memory(cache: EmbeddedCache) -> None:
    (key,) = chain("leases", 1)
    with cache.reserve(key, NBYTES) as slot:
        slot.view[:] = payload(1)
        slot.commit()
    with cache.lease([key, "nothing"]) as lease:
        page, missing = lease.pages
        assert page is not None
        assert page.readonly
        assert missing is None
        assert page == payload(1)
        again = cache.lease([key])
        with again:
            first, second = (numpy.frombuffer(each, "u1") for each in (page, again.pages[0] or b""))
            assert first.ctypes.data == second.ctypes.data


def test_leased_memory_can_be_read_after_the_end() -> None:
    own = respkv.open_sync(maxmemory="16mb", prefault=False)
    own.put("page", payload(1))
    lease = own.lease(["page"])
    lease.__enter__()
    tensor = as_torch(lease.pages[0] or b"", "float16", SHAPE)
    own.close()
    assert tensor.numpy().tobytes() == payload(1), "late, but never a fault"
    with pytest.raises(LeaseGone):
        lease.__exit__(None, None, None)


def test_places_outside_of_the_arena_are_refused(cache: EmbeddedCache) -> None:
    arena = cache._core.arenas.find(None)
    for offset, nbytes in ((-1, 1), (0, 1 << 40), (1 << 40, 1)):
        with pytest.raises(ProtocolError, match="not within the arena"):
            arena.view_to_read(offset, nbytes)


def test_pages_are_leased_on_the_device_as_its_own_tensors(on_device: EmbeddedCache) -> None:
    declare(on_device, "gpu")
    keys = page_keys("gpu", [bytes([n]) * 32 for n in range(3)])
    for number, key in enumerate(keys):
        on_device.put(key, payload(number))
    with on_device.lease_gpu([*keys, "gpu:" + "f" * 64]) as lease:
        assert lease.pages[3] is None
        server = on_device._runner.engine.server
        assert server is not None
        assert server.gpu_tier is not None
        memory = server.gpu_tier.memory
        for number, page in enumerate(lease.pages[:3]):
            assert page is not None
            tensor = page.tensor(GEOMETRY)
            assert tensor.shape == SHAPE
            assert tensor.numpy().tobytes() == payload(number)
            assert memory.data_ptr() <= tensor.data_ptr() < memory.data_ptr() + memory.nbytes
    assert int(on_device.info()["kv_leases"]) == 0


def test_without_a_gpu_tier_there_is_nothing_to_lease(cache: EmbeddedCache) -> None:
    with pytest.raises(ServerError, match="no gpu tier"):
        cache.lease_gpu(["key"]).__enter__()


def test_tensors_go_in_and_come_out(cache: EmbeddedCache) -> None:
    shape = Geometry(layers=3, heads=2, dim=8, tokens=16, dtype="bfloat16")
    cache.schema_set("t", layers=3, heads=2, dim=8, tokens=16, dtype="bfloat16")
    kv = torch.randn(3, 2, 40, 2, 8).to(torch.bfloat16)
    prompt = torch.arange(40)
    assert cache.seq.put("t", prompt, kv).stored == 3
    got = [as_torch(layer, shape.dtype, (2, 40, 2, 8)) for layer in cache.seq.get("t", prompt)]
    assert torch.equal(torch.stack(got), kv)
    got = list(cache.seq.get("t", prompt).tensors())
    assert torch.equal(torch.stack(got), kv)
    some = cache.seq.get("t", prompt, first=16, layers=(1, 2), heads=(1, 1)).tensors()
    assert torch.equal(torch.stack(list(some)), kv[1:, :, 16:, 1:])
    none = list(cache.seq.get("t", [7, 7]).tensors())
    assert [tensor.shape for tensor in none] == [(2, 0, 2, 8)] * 3


def test_tensors_need_one_connection_though_the_schema_is_not_known(tmp_path: Path) -> None:
    files: dict[str, Any] = {"nvme_path": tmp_path, "nvme_bytes": "16mb"}
    kv, ids = torch.randn(2, 2, 20, 2, 16), range(20)
    with respkv.open_sync(maxmemory="16mb", prefault=False, **files) as first:
        first.schema_set("m", layers=2, heads=2, dim=16, tokens=4, dtype="float32")
        first.seq.put("m", ids, kv)
    with respkv.open_sync(
        maxmemory="16mb", prefault=False, pool_max=1, timeout_s=20, **files
    ) as again:
        found = list(again.seq.get("m", ids).tensors())
        assert torch.equal(torch.stack(found), kv)
        again.ping()
