"""File tiers whose namespaces ask for codecs: everything a tier does, with encoded pages."""

import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import anyio
import pytest
import torch

from respkv.errors import PageCorrupt, TierError
from respkv.kernels.container import codec_name, read_head
from respkv.kernels.layout import Codec
from respkv.page import Geometry
from respkv.tiers import codec as codecs
from respkv.tiers import lossy
from respkv.tiers.codec import PageSpec, decode_page
from respkv.tiers.disk import open_disk
from respkv.tiers.file_tier import FileTier
from respkv.tiers.format import HEADER_BYTES, hash64, read_header
from respkv.tiers.nvme import open_nvme
from respkv.tiers.record import Level, Meta, Record, Value
from respkv.tiers.segment_head import segment_name
from tests.tiers.shelf import Held, Shelf, check_books, make_image, page, running, until

pytestmark = pytest.mark.anyio

SHAPE = Geometry(layers=2, heads=2, dim=64, tokens=128, dtype="bfloat16")  # 128 KiB
# Relative L2 of Gaussian numbers.
BOUNDS = {Codec.XS: 0.0, Codec.I8: 0.0070, Codec.RH4: 0.112, Codec.RHZ3: 0.205}


def numbers_of(number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    return torch.randn(2 * 2 * 128 * 2 * 64, generator=generator).bfloat16()


def payload_of(number: int) -> bytes:
    return numbers_of(number).view(torch.uint8).numpy().tobytes()


def value_of(number: int, level: Level, *, has_image: bool = False) -> Value:
    body = payload_of(number)
    parent = page(number - 1) if number % 2 else b""
    meta = Meta(page(number), "kvpage", len(body), hash64(body), number, level, parent=parent)
    image = make_image(meta, body) if has_image else None
    payload = memoryview(body) if image is None else image[HEADER_BYTES:][: len(body)]
    return Value(meta, payload, image, Held(meta))


async def put(shelf: Shelf, number: int, *, level: Level = Level.MEMORY) -> Record | None:
    """Put a page whose number is its generation."""
    value = value_of(number, level, has_image=bool(number % 2))
    shelf.generation = max(shelf.generation, number)
    (record,) = await shelf.tier.write([value], level)
    if record is not None:
        value.owner.record = record
        shelf.held[value.meta.key] = value.owner
    return record


async def get(shelf: Shelf, number: int, *, has_image: bool = False) -> bytes | None:
    """Read a page; check header and checksum against what came."""
    held = shelf.held.get(page(number))
    if held is None or held.record is None:
        return None
    memory = make_image(held.meta, bytes(SHAPE.page_bytes))
    into = memory[HEADER_BYTES:][: SHAPE.page_bytes]
    checksum = await shelf.tier.read(held.record, page(number), into, memory if has_image else None)
    assert checksum == hash64(into)
    if has_image:
        header = read_header(memory)
        assert (header.codec, header.checksum) == (0, checksum)
        assert header.generation == number
    return bytes(into)


def error_of(number: int, got: bytes) -> float:
    exact = numbers_of(number).double()
    there = torch.frombuffer(bytearray(got), dtype=torch.bfloat16).double()
    return float((there - exact).norm() / exact.norm())


async def check(shelf: Shelf, codec: Codec) -> None:
    """Read all pages: each is as near to what was put as its codec is."""
    for key, held in list(shelf.held.items()):
        number, record = int(key[-64:], 16), held.record
        got = await get(shelf, number, has_image=bool(number % 3))
        if got is None or record is None:
            continue  # reclaim has dropped it
        assert error_of(number, got) <= BOUNDS[codec]
        assert codec_name(record.codec) == codec.name.lower()
    check_books(shelf.tier)


@dataclass
class Maker:
    """Makes the tier of one directory, again and again, whose pages have a codec."""

    codec: Codec
    make: Callable[..., FileTier]
    asked: list[Meta] = field(default_factory=list[Meta])
    spec: PageSpec | None = None

    def __post_init__(self) -> None:
        self.spec = PageSpec.of(SHAPE, self.codec, self.codec, exact_first=4)

    def __call__(self) -> FileTier:
        return self.make(spec_of=self.spec_of)

    def spec_of(self, meta: Meta) -> PageSpec | None:
        self.asked.append(meta)
        return self.spec


@pytest.fixture(params=["nvme xs", "nvme rh4", "disk xs", "disk i8", "disk rhz3"])
def maker(request: pytest.FixtureRequest, tmp_path: Path, anyio_backend: str) -> Maker:
    tier, name = request.param.split()
    if tier == "disk" and anyio_backend != "asyncio":
        pytest.skip("aiofiles is of asyncio")
    open_tier: Callable[..., FileTier] = open_nvme if tier == "nvme" else open_disk
    path = tmp_path / "tier"
    make = partial(open_tier, path, capacity_bytes=9 << 20, segment_bytes=1 << 20)
    return Maker(Codec[name.upper()], make)


async def test_pages_are_stored_in_their_codec_and_read_back(maker: Maker) -> None:
    async with running(maker()) as (shelf, _):
        for number in range(1, 5):
            assert await put(shelf, number)
        await check(shelf, maker.codec)
        assert {meta.key for meta in maker.asked} == {page(number) for number in range(1, 5)}
        stats = shelf.tier.stats
        assert stats.contents.payload_bytes == 4 * SHAPE.page_bytes
        assert stats.live_bytes < 4 * SHAPE.page_bytes / 1.35
        assert stats.contents.by_codec == {16 + maker.codec: 4}
        assert stats.encoded_bytes == stats.decoded_bytes == 4 * SHAPE.page_bytes
        assert min(stats.encode_us, stats.decode_us) > 0


async def test_what_is_no_page_of_the_spec_is_stored_as_ever(maker: Maker) -> None:
    async with running(maker()) as (shelf, _):
        await shelf.put(b"string", 40_000)
        await shelf.put(page(77), SHAPE.page_bytes - 2)  # of a schema that is no more
        await shelf.check()
        assert max(shelf.tier.stats.contents.by_codec) <= 1
    maker.spec = None
    async with running(maker()) as (shelf, _):
        await put(shelf, 500)
        assert await get(shelf, 500) == payload_of(500)
        assert max(shelf.tier.stats.contents.by_codec) <= 1


async def test_stored_bytes_are_handed_out_as_they_are(maker: Maker) -> None:
    async with running(maker()) as (shelf, _):
        for number in (1, 2):
            record = await put(shelf, number)
            assert record is not None
            codec, stored = await shelf.tier.read_stored(record, page(number))
            assert codec == record.codec == 16 + maker.codec
            assert len(stored) == record.stored_bytes - HEADER_BYTES
            head = read_head(stored)
            assert head.geometry == SHAPE
            # A page without a parent keeps its first tokens.
            assert head.exact_first == (0 if number == 1 else 4)
            into = bytearray(SHAPE.page_bytes)
            assert decode_page(memoryview(stored), memoryview(into)) == maker.codec.is_lossless
            assert bytes(into) == await get(shelf, number)
        assert record is not None
        with pytest.raises(PageCorrupt, match="another value"):
            await shelf.tier.read_stored(record, b"somebody else's")


@pytest.mark.parametrize("is_clean", [True, False], ids=["clean stop", "crash"])
async def test_encoded_pages_survive_a_restart(maker: Maker, is_clean: bool) -> None:
    async with running(maker(), is_clean=is_clean) as (shelf, _):
        for number in range(1, 6):
            await put(shelf, number, level=Level.DURABLE)
        before = [await get(shelf, number) for number in range(1, 6)]
    maker.spec = None  # what is stored says itself how
    async with running(maker()) as (shelf, recovery):
        assert recovery.records == 5
        assert [await get(shelf, number) for number in range(1, 6)] == before
        assert shelf.tier.stats.contents.by_codec == {16 + maker.codec: 5}
        await check(shelf, maker.codec)
        # The description is that of what was put, so that what is moved is known by it.
        assert shelf.held[page(3)].meta.checksum == hash64(payload_of(3))


async def test_reclaim_copies_encoded_pages_as_they_are(maker: Maker) -> None:
    async with running(maker()) as (shelf, _):
        first = await put(shelf, 1)
        assert first is not None
        before = await get(shelf, 1)
        place = (first.segment, first.offset)
        shelf.keeps = lambda record: record is first
        number = 2
        with anyio.fail_after(60):
            while (first.segment, first.offset) == place:
                await put(shelf, number)
                number += 1
        encoded = shelf.tier.stats.encoded_bytes
        assert encoded == (number - 1) * SHAPE.page_bytes, "nothing is encoded twice"
        assert await get(shelf, 1) == before
        await check(shelf, maker.codec)
        payload = shelf.tier.stats.contents.payload_bytes
        assert payload == len(shelf.held) * SHAPE.page_bytes


async def test_a_flipped_bit_is_found_before_anything_is_decoded(
    maker: Maker, tmp_path: Path
) -> None:
    async with running(maker()) as (shelf, _):
        record = await put(shelf, 1)
        assert record is not None
    file = tmp_path / "tier" / segment_name(record.segment)
    data = bytearray(file.read_bytes())
    data[record.offset + HEADER_BYTES + record.stored_bytes // 2] ^= 4
    file.write_bytes(data)
    async with running(maker()) as (shelf, _):
        with pytest.raises(PageCorrupt, match="its bytes were changed"):
            await get(shelf, 1)
        assert shelf.gone == [(page(1), 1, "corrupt")]
        assert shelf.tier.stats.decoded_bytes == 0


async def test_without_torch_lossy_pages_are_stored_without_loss(
    maker: Maker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(maker()) as (shelf, _):
        await put(shelf, 1)

        def missing() -> None:
            raise TierError(f"a codec {lossy.NEEDS_TORCH}")

        monkeypatch.setattr(lossy, "_torch", missing)
        with caplog.at_level(logging.WARNING):
            for number in (2, 3):
                record = await put(shelf, number)
                assert record is not None
                assert codec_name(record.codec) == "xs"
                assert await get(shelf, number) == payload_of(number)
        if maker.codec.is_lossless:
            assert not caplog.records
            assert await get(shelf, 1) == payload_of(1)
            return
        assert [each.message.partition(":")[2] for each in caplog.records] == [
            f" a codec {lossy.NEEDS_TORCH}"
        ], "it is said once"
        for _ in range(2):
            with pytest.raises(TierError, match=r"needs torch: install respkv\[torch\]"):
                await get(shelf, 1)
        assert len(caplog.records) == 2
        assert not shelf.gone, "the copy is good; somebody else can read it"


async def test_many_pages_at_a_time_share_the_threads(maker: Maker) -> None:
    async with running(maker()) as (shelf, _):
        async with anyio.create_task_group() as group:
            for number in range(1, 25):
                group.start_soon(put, shelf, number)
        await until(lambda: shelf.tier.stats.contents.by_codec == {16 + maker.codec: 24})
        async with anyio.create_task_group() as group:
            for number in range(1, 25):
                group.start_soon(get, shelf, number)
        await check(shelf, maker.codec)


def test_torch_is_found_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert codecs.has_torch()
    monkeypatch.setitem(sys.modules, "torch", None)
    assert not codecs.has_torch()
