"""Leases of pages on a GPU, with a peer that answers as a server and memory that stands for the device's.

What needs a device, two processes on one GPU, is marked ``gpu``.
"""

import gc
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from respkv.client import AsyncClient, Client
from respkv.client.core import Core
from respkv.client.gpu import GpuMemories, GpuPage
from respkv.errors import ConfigError, LeaseGone, ProtocolError, ServerError
from respkv.kernels.layout import Codec
from respkv.kernels.page_coding import decode_page, encode_page
from respkv.kernels.page_form import PageForm
from respkv.page import Geometry
from tests.client.faces import Blocking
from tests.client.peer import Peer
from tests.server_process import ServerProcess

Connect = Callable[..., Any]

SHAPE = Geometry(layers=2, heads=2, dim=32, tokens=16, dtype="bfloat16")
NBYTES = SHAPE.page_bytes
HANDLE = bytes(range(64))


class Device:
    """Memory of a device, and how often it was mapped."""

    def __init__(self) -> None:
        self.memory = torch.arange(4 * NBYTES, dtype=torch.int32).to(torch.uint8)
        self.opened: list[tuple[str, bytes]] = []

    def open(self, device: str, handle: bytes) -> torch.Tensor:
        self.opened.append((device, handle))
        return self.memory


@pytest.fixture
def device() -> Device:
    return Device()


def bulk(data: bytes) -> bytes:
    return b"$%d\r\n%b\r\n" % (len(data), data)


def place(offset: int, nbytes: int, form: bytes = b"raw") -> bytes:
    return b"*3\r\n:%d\r\n:%d\r\n%b" % (offset, nbytes, bulk(form))


def answer(*places: bytes, handle: bytes = HANDLE) -> bytes:
    return b"*4\r\n:9\r\n*%d\r\n%b%b%b" % (
        len(places),
        b"".join(places),
        bulk(b"uuid"),
        bulk(handle),
    )


@pytest.fixture
def peer(tmp_path: Path) -> Iterator[Callable[[bytes, bytes], Peer]]:
    """Return what makes a peer that answers KV.LEASE and KV.RELEASE."""
    made: list[Peer] = []

    def make(lease: bytes, release: bytes = b":1\r\n") -> Peer:
        answers = {b"KV.LEASE": lease, b"KV.RELEASE": release, b"PING": b"+PONG\r\n"}
        made.append(Peer(tmp_path / "s", lambda args: answers[args[0]]))
        return made[-1]

    yield make
    for each in made:
        each.__exit__()


def using(client: Any, device: Device) -> Any:
    """Have a client of any face map this memory."""
    core: Core[Any] = (client.target if isinstance(client, Blocking) else client)._core
    core.gpus = GpuMemories(device.open)
    return client


def lease_gpu(client: Any, *args: Any, **options: Any) -> Any:
    """Enter ``lease_gpu`` of any face in blocking code."""
    if isinstance(client, Blocking):
        return client._entered(client.target.lease_gpu(*args, **options))
    return client.lease_gpu(*args, **options)


def test_pages_are_views_of_the_devices_memory(
    connect: Connect, peer: Callable[..., Peer], device: Device
) -> None:
    server = peer(answer(place(NBYTES, NBYTES), b"*-1\r\n", place(0, NBYTES)))
    client = using(connect(server.url), device)
    with lease_gpu(client, ["a", "b", "c"], ms=500) as lease:
        first, missing, second = lease.pages
        assert missing is None
        assert first.form == "raw"
        assert first.stored.data_ptr() == device.memory.data_ptr() + NBYTES
        page = second.tensor(SHAPE)
        assert page.shape == (2, 2, 16, 2, 32)
        assert page.dtype == torch.bfloat16
        assert page.data_ptr() == device.memory.data_ptr()
    assert lease.pages == []
    client.close()
    assert server.seen == [b"KV.LEASE", b"KV.RELEASE"]


def test_the_memory_is_mapped_once(
    connect: Connect, peer: Callable[..., Peer], device: Device
) -> None:
    server = peer(answer(place(0, NBYTES)))
    client = using(connect(server.url), device)
    for _ in range(3):
        with lease_gpu(client, ["a"]):
            pass
    client.close()
    assert device.opened == [("uuid", HANDLE)]


def test_another_servers_memory_is_mapped_anew_and_the_old_one_let_go() -> None:
    made: list[weakref.ref[torch.Tensor]] = []

    def open_memory(device: str, handle: bytes) -> torch.Tensor:
        memory = torch.zeros(16, dtype=torch.uint8)
        made.append(weakref.ref(memory))
        return memory

    memories = GpuMemories(open_memory)
    memories.find("uuid", b"one")
    memories.find("uuid", b"two")
    gc.collect()
    assert [each() is None for each in made] == [True, False]


def test_a_lease_that_lapsed_is_told_on_leaving(
    connect: Connect, peer: Callable[..., Peer], device: Device
) -> None:
    client = using(connect(peer(answer(place(0, NBYTES)), b":0\r\n").url), device)
    with pytest.raises(LeaseGone, match="void"), lease_gpu(client, ["a"]):
        pass
    client.ping()
    client.close()


@pytest.mark.parametrize(
    ("reply", "raised", "named"),
    [
        (answer(place(-1, 5)), ProtocolError, "not within the server's memory"),
        (answer(place(3 * NBYTES, NBYTES + 1)), ProtocolError, "not within"),
        (answer(b":5\r\n"), ProtocolError, "not a place on a device"),
        (answer(), ProtocolError, "answered with list"),
        (answer(place(0, 5), place(0, 5)), ProtocolError, "answered with list"),
        (b"*2\r\n:1\r\n*2\r\n:0\r\n:5\r\n", ProtocolError, "answered with list"),
        (b"+OK\r\n", ProtocolError, "answered with bytes"),
        (b"-KVTIER the device fell off\r\n", ServerError, "fell off"),
    ],
    ids=["before", "behind", "no place", "none", "too many", "of the arena", "no array", "refused"],
)
def test_a_lease_that_is_answered_wrongly_is_not_held(
    reply: bytes,
    raised: type[Exception],
    named: str,
    connect: Connect,
    peer: Callable[..., Peer],
    device: Device,
) -> None:
    client = using(connect(peer(reply).url), device)
    with pytest.raises(raised, match=named), lease_gpu(client, ["a"]):
        pass
    client.ping()
    client.close()


def test_memory_that_cannot_be_mapped_ends_the_lease(
    connect: Connect, peer: Callable[..., Peer]
) -> None:
    class Locked(Device):
        def open(self, device: str, handle: bytes) -> torch.Tensor:
            raise ConfigError("another machine")

    server = peer(answer(place(0, NBYTES)))
    client = using(connect(server.url), Locked())
    with pytest.raises(ConfigError, match="another machine"), lease_gpu(client, ["a"]):
        pass
    client.ping()
    client.close()
    assert server.seen == [b"KV.LEASE", b"PING"], "its connection was closed, which ends it"


def test_an_encoded_page_is_decoded_into_memory_of_its_own() -> None:
    form = PageForm.of(SHAPE, Codec.I8, Codec.RH4, exact_last=2)
    page = torch.randn(2, 2, 16, 2, 32).to(torch.bfloat16)
    stored = torch.zeros(form.nbytes, dtype=torch.uint8)
    assert encode_page(page, form, out=stored)
    leased = GpuPage(stored, form.name)
    expected = decode_page(stored, form, out=torch.zeros_like(page))
    assert torch.equal(leased.tensor(SHAPE), expected)
    with pytest.raises(ValueError, match="bytes; i8/rh4"):
        GpuPage(stored[:-1], form.name).tensor(SHAPE)


def test_a_raw_page_of_another_geometry_is_refused() -> None:
    with pytest.raises(ValueError, match="raw pages have"):
        GpuPage(torch.zeros(NBYTES - 2, dtype=torch.uint8), "raw").tensor(SHAPE)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_error_says_so() -> None:
    with pytest.raises(ConfigError, match="here it sees none"):
        GpuMemories().find("uuid", HANDLE)


@pytest.fixture
def on_gpu() -> Iterator[ServerProcess]:
    server = ServerProcess(gpu_bytes="64mb", gpu_device="cuda:0", maxmemory="64mb")
    yield server
    assert server.stop() == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("codec", ["raw", "i8"])
def test_a_worker_reads_pages_in_the_servers_gpu_memory(codec: str, on_gpu: ServerProcess) -> None:
    page = torch.randn(2, 2, 16, 2, 32).to(torch.bfloat16)
    expected = page
    if codec != "raw":
        form = PageForm.of(SHAPE, Codec.I8, Codec.I8)
        stored = torch.zeros(form.nbytes, dtype=torch.uint8)
        encode_page(page, form, out=stored)
        expected = decode_page(stored, form, out=torch.zeros_like(page))
    with Client(on_gpu.url) as client:
        words = ("LAYERS", 2, "HEADS", 2, "DIM", 32, "TOKENS", 16, "DTYPE", "bfloat16")
        client.command("KV.SCHEMA", "SET", "ns", *words, "CODEC", "gpu", codec)
        client.put("ns:1", page.view(torch.uint8).numpy())
        for _ in range(2):
            with client.lease_gpu(["ns:1", "ns:2"]) as lease:
                found, missing = lease.pages
                assert missing is None
                assert found is not None
                assert found.stored.is_cuda
                assert torch.equal(found.tensor(SHAPE).cpu(), expected)
        assert client.match(["ns:1"]).tiers == "g"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.anyio
async def test_the_device_is_read_asynchronously_and_its_mapping_ends_with_its_tensors(
    on_gpu: ServerProcess, anyio_backend: str
) -> None:
    async with AsyncClient(on_gpu.url) as client:
        words = ("LAYERS", 2, "HEADS", 2, "DIM", 32, "TOKENS", 16, "DTYPE", "bfloat16")
        await client.command("KV.SCHEMA", "SET", "ns", *words)
        await client.put("ns:1", bytes(NBYTES))
        async with client.lease_gpu(["ns:1"]) as lease:
            (page,) = lease.pages
            assert page is not None
            zeros = page.tensor(SHAPE)
            total = zeros.sum()
            began_s = time.monotonic()
        assert time.monotonic() - began_s < 5
        assert float(total) == 0
    free = torch.cuda.mem_get_info()[0]
    del lease, page, zeros, client
    gc.collect()
    assert torch.cuda.mem_get_info()[0] >= free
