"""The contract of the gpu tier, on the processor: the same code that a GPU runs."""

import os
import random
import threading
from collections.abc import Callable, Iterator

import anyio
import anyio.lowlevel
import pytest
import torch

from respkv.errors import TierError
from respkv.kernels.layout import Codec
from respkv.kernels.page_coding import as_page, decode_page
from respkv.kernels.page_form import PageForm
from respkv.page import Geometry
from respkv.tiers.format import hash64
from respkv.tiers.gpu import GpuTier
from respkv.tiers.gpu_lanes import Ending, Way
from respkv.tiers.slab import Slot
from tests.tiers.late_lanes import LateLanes

pytestmark = pytest.mark.anyio

MIB = 1 << 20
SHAPE = Geometry(layers=2, heads=2, dim=64, tokens=32, dtype="bfloat16")
RAW = PageForm(SHAPE)
NBYTES = SHAPE.page_bytes
LOSSY = [codec for codec in Codec if not codec.is_lossless]

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.gpu,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]


@pytest.fixture(params=DEVICES)
def tier(request: pytest.FixtureRequest) -> Iterator[GpuTier]:
    """Return a tier of 4 MiB, and on a GPU one whose arena is pinned."""
    arena = memoryview(bytearray(4096))
    opened = GpuTier.open(request.param, 4 * MIB, arena)
    yield opened
    opened.slots.check()
    opened.close()


@pytest.fixture
def lanes() -> LateLanes:
    return LateLanes()


@pytest.fixture
def late(lanes: LateLanes) -> GpuTier:
    """Return a tier whose copies happen when the test says."""
    return GpuTier(torch.zeros(MIB, dtype=torch.uint8), lanes)


def page_of(number: int, shape: Geometry = SHAPE) -> memoryview:
    """Return a page of numbers that every codec holds."""
    numbers = torch.randn(shape.page_bytes // 2, generator=torch.Generator().manual_seed(number))
    return memoryview(bytearray(numbers.to(torch.bfloat16).view(torch.uint8).numpy().tobytes()))


def taken(tier: GpuTier, form: PageForm) -> Slot:
    slot = tier.take(form.nbytes)
    assert slot is not None
    return slot


async def read(tier: GpuTier, slot: Slot, form: PageForm = RAW) -> bytes:
    into = memoryview(bytearray(form.geometry.page_bytes))
    assert await tier.read(slot, into, form) == hash64(into)
    return bytes(into)


# -- bytes ------------------------------------------------------------------------------------


async def test_a_raw_page_comes_back_to_the_bit(tier: GpuTier) -> None:
    pages = [memoryview(bytearray(os.urandom(NBYTES))) for _ in range(5)]
    slots = [taken(tier, RAW) for _ in pages]
    for slot, page in zip(slots, pages, strict=True):
        assert await tier.write(slot, page, RAW)
    for slot, page in zip(slots, pages, strict=True):
        assert await read(tier, slot) == page
        assert bytes(tier.view(slot, RAW).cpu().view(torch.uint8).flatten().tolist()) == page
        tier.slots.give_back(slot)
    assert tier.slots.used_bytes == 0
    assert (tier.stats.writes, tier.stats.reads) == (5, 5)


@pytest.mark.parametrize("codec", LOSSY)
async def test_an_encoded_page_takes_less_and_comes_back_as_decoded(
    codec: Codec, tier: GpuTier
) -> None:
    page, form = page_of(1), PageForm.of(SHAPE, codec, codec, exact_last=4)
    slot = taken(tier, form)
    assert await tier.write(slot, page, form)
    back = await read(tier, slot, form)
    assert form.nbytes < NBYTES
    expected = as_page(torch.empty(NBYTES, dtype=torch.uint8), RAW)
    decode_page(tier.view(slot, form).cpu(), form, out=expected)
    assert back == bytes(expected.view(torch.uint8).flatten().tolist())
    exact = as_page(torch.frombuffer(page, dtype=torch.uint8), RAW)
    assert torch.equal(expected[:, :, 28:], exact[:, :, 28:])


async def test_a_page_that_does_not_fit_its_codec_is_told(tier: GpuTier) -> None:
    page = page_of(2)
    as_page(torch.frombuffer(page, dtype=torch.uint8), RAW)[0, 1, 3, 0, 9] = float("nan")
    form = PageForm.of(SHAPE, Codec.I8, Codec.I8)
    slot = taken(tier, form)
    assert not await tier.write(slot, page, form)
    assert tier.stats.unfit == 1
    assert tier.stats.writes == 0


async def test_more_than_a_mebibyte_is_hashed_in_a_thread(tier: GpuTier) -> None:
    shape = Geometry(layers=12, heads=8, dim=64, tokens=64, dtype="bfloat16")
    form, page = PageForm(shape), memoryview(bytearray(os.urandom(shape.page_bytes)))
    assert page.nbytes > MIB
    slot = taken(tier, form)
    assert await tier.write(slot, page, form)
    assert await read(tier, slot, form) == page


async def test_a_view_is_the_slot_itself_in_the_shape_of_a_page(tier: GpuTier) -> None:
    slot = taken(tier, RAW)
    await tier.write(slot, page_of(3), RAW)
    view = tier.view(slot, RAW)
    assert view.shape == (2, 2, 32, 2, 64)
    assert view.dtype == torch.bfloat16
    assert view.data_ptr() == tier.memory.data_ptr() + slot.offset
    assert view.device.type == tier.device.type


async def test_the_estimate_follows_what_reads_take(tier: GpuTier) -> None:
    slot = taken(tier, RAW)
    await tier.write(slot, page_of(1), RAW)
    before = tier.load_us(NBYTES)
    for _ in range(20):
        await read(tier, slot)
    assert tier.load_us(NBYTES) != before
    assert tier.latency_us > 0
    assert tier.bytes_per_s > 0


# -- slots ------------------------------------------------------------------------------------


async def test_capacity_is_never_exceeded(tier: GpuTier) -> None:
    slots = []
    while (slot := tier.take(RAW.nbytes)) is not None:
        slots.append(slot)
    assert len(slots) == 4 * MIB // NBYTES
    assert tier.memory.nbytes == 4 * MIB
    assert tier.slots.used_bytes <= tier.capacity_bytes == 4 * MIB


async def test_a_slot_that_is_lent_is_not_taken_again(late: GpuTier, lanes: LateLanes) -> None:
    slots = [taken(late, RAW) for _ in range(MIB // NBYTES)]
    with late.lent(slots[0], RAW) as view:
        late.slots.give_back(slots[0])  # the one who took it lets go
        assert late.take(RAW.nbytes) is None
        assert view.shape == (2, 2, 32, 2, 64)
        assert lanes.num_waits_for_users == 0
    assert lanes.num_waits_for_users == 1, "its next copy comes after the work of the block"
    assert late.take(RAW.nbytes) is slots[0]


async def test_a_slot_is_not_taken_again_under_a_copy_into_it(
    late: GpuTier, lanes: LateLanes
) -> None:
    slots = [taken(late, RAW) for _ in range(MIB // NBYTES)]
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(late.write, slots[0], page_of(1), RAW)
        await lanes.launched("in")
        late.slots.give_back(slots[0])
        assert late.take(RAW.nbytes) is None
        lanes.finish_all()
    assert late.take(RAW.nbytes) is slots[0]


@pytest.mark.parametrize("way", ["in", "out"])
async def test_a_copy_that_is_cancelled_ends_before_its_asker(
    way: str, late: GpuTier, lanes: LateLanes
) -> None:
    slot = taken(late, RAW)
    ended_when_done: list[bool] = []
    memory = page_of(1)

    async def copy() -> None:
        try:
            if way == "in":
                await late.write(slot, memory, RAW)
            else:
                await late.read(slot, memory, RAW)
        finally:
            ended_when_done.append(not lanes.todo["in"] and not lanes.todo["out"])

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(copy)
        await lanes.launched("in" if way == "in" else "out")
        tasks.cancel_scope.cancel()
        with anyio.CancelScope(shield=True):
            await anyio.sleep(0.01)
            assert not ended_when_done, "its memory is still lent"
            lanes.finish_all()
    assert ended_when_done == [True]
    assert slot.holders == 1


async def test_a_kernel_is_launched_in_a_thread_and_a_copy_is_not(
    late: GpuTier, lanes: LateLanes
) -> None:
    """The first launch of a kernel compiles it, which takes seconds."""
    threads: list[bool] = []
    launch = lanes.launch

    def noting(way: Way, work: Callable[[], None]) -> Ending:
        threads.append(threading.current_thread() is threading.main_thread())
        ending = launch(way, work)
        lanes.finish_all()
        return ending

    lanes.launch = noting  # type: ignore[method-assign]
    for form in (RAW, PageForm.of(SHAPE, Codec.I8, Codec.I8)):
        slot = taken(late, form)
        await late.write(slot, page_of(1), form)
        await read(late, slot, form)
    assert threads == [True, True, False, False]


# -- failures ---------------------------------------------------------------------------------


async def test_a_failed_device_is_off_for_good(late: GpuTier, lanes: LateLanes) -> None:
    slot = taken(late, RAW)
    lanes.error = RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
    with pytest.raises(TierError, match=r"illegal memory access was encountered$"):
        await late.write(slot, page_of(1), RAW)
    assert late.state == "off"
    assert late.reason == "CUDA error: an illegal memory access was encountered"
    assert slot.holders == 1
    with pytest.raises(TierError, match="off"):
        await late.read(slot, page_of(1), RAW)
    assert late.take(RAW.nbytes) is None


async def test_a_device_that_fails_while_it_copies_is_off(late: GpuTier, lanes: LateLanes) -> None:
    slot = taken(late, RAW)

    async def read_late() -> None:
        with pytest.raises(TierError, match="uncorrectable"):
            await late.read(slot, page_of(1), RAW)

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(read_late)
        await lanes.launched("out")
        lanes.fail("out", RuntimeError("CUDA error: uncorrectable ECC error encountered"))
    assert late.state == "off"
    assert late.stats.errors == 1


async def test_no_memory_to_encode_with_costs_that_page_alone(
    late: GpuTier, lanes: LateLanes
) -> None:
    slot = taken(late, RAW)
    lanes.error = torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(TierError, match="out of memory"):
        await late.write(slot, page_of(1), RAW)
    assert late.state == "ok"
    assert late.stats.errors == 1


async def test_what_is_no_fault_of_the_device_is_a_bug(late: GpuTier, lanes: LateLanes) -> None:
    slot = taken(late, RAW)
    lanes.error = RuntimeError("shape '[2]' is invalid for input of size 3")
    with pytest.raises(RuntimeError, match="shape"):
        await late.write(slot, page_of(1), RAW)
    assert slot.holders == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_start_says_what_to_do() -> None:
    with pytest.raises(TierError, match=r"gpu-device cuda:0: .*respkv\[torch\].*gpu-bytes at 0"):
        GpuTier.open("cuda:0", MIB, memoryview(bytearray(4096)))


def test_more_memory_than_there_is_is_said() -> None:
    with pytest.raises(TierError, match="gpu-bytes 1125899906842624: cpu has not so much memory"):
        GpuTier.open("cpu", 1 << 50, memoryview(bytearray(4096)))


def test_the_processors_memory_has_no_handle(late: GpuTier) -> None:
    with pytest.raises(TierError, match="cannot be shared: it is on the cpu"):
        late.handle()


# -- all together -----------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
async def test_no_slot_is_used_under_a_reader_whatever_is_cancelled(
    seed: int, late: GpuTier, lanes: LateLanes
) -> None:
    """Tasks write, read and view slots, are cancelled anywhere, and copies end in any order."""
    rng = random.Random(seed)
    forms = [RAW, PageForm.of(SHAPE, Codec.I8, Codec.F8)]
    right: dict[Slot, tuple[PageForm, bytes]] = {}  # what is in a slot that is held

    async def live(number: int) -> None:
        form = rng.choice(forms)
        slot = late.take(form.nbytes)
        if slot is None:
            return
        assert slot not in right
        try:
            page = page_of(number)
            await late.write(slot, page, form)
            right[slot] = form, bytes(late.view(slot, form).view(torch.uint8).flatten().tolist())
            into = memoryview(bytearray(NBYTES))
            await late.read(slot, into, form)
            if form is RAW:
                assert into == page
            await anyio.sleep(rng.random() / 100)
            seen = bytes(late.view(slot, form).view(torch.uint8).flatten().tolist())
            assert seen == right[slot][1], "somebody wrote into it"
        finally:
            right.pop(slot, None)
            late.slots.give_back(slot)

    async def life(number: int) -> None:
        with anyio.move_on_after(rng.random() / 30):
            await live(number)

    async with anyio.create_task_group() as tasks:
        for number in range(60):
            tasks.start_soon(life, number)
            for _ in range(rng.randrange(4)):
                lanes.finish(rng.choice(["in", "out"]))
            await anyio.lowlevel.checkpoint()
            late.slots.check()
        while late.slots.used_bytes:
            lanes.finish(rng.choice(["in", "out"]))
            await anyio.lowlevel.checkpoint()
    assert late.slots.used_bytes == 0
