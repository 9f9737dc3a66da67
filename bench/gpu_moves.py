"""KV out of a GPU's memory and back, with and without codecs, against plain copies.

As a worker that evicts by itself does it: pages are encoded out of its paged cache and only what is
encoded crosses to pinned host memory. Then the gpu tier, into which a server copies raw pages from
its arena to encode them there: it saves the device's memory, not the way.
"""

from collections.abc import Callable, Iterator
from typing import Final

import anyio
import torch
from torch import Tensor

from bench.gpu_cache import DTYPE
from bench.gpu_clock import Work
from bench.gpu_kernels import Bench
from bench.gpu_table import Row, times_as_fast
from bench.result import size
from respkv.kernels.layout import Codec
from respkv.kernels.page_form import PageForm
from respkv.kernels.paged import gather_pages_paged, scatter_pages_paged
from respkv.kernels.paged_coding import decode_paged, encode_paged
from respkv.page import Geometry
from respkv.tiers.gpu import GpuTier

CODECS: Final = tuple(codec for codec in Codec if not codec.is_lossless)
TIER_CODECS: Final = (Codec.RAW, Codec.F8, Codec.I8, Codec.I4, Codec.RH4)
AT_ONCE: Final = 8  # pages on their way to or from the tier
SLACK_BYTES: Final = 1 << 20


class _Moves:
    """Some pages of the cache, where they are encoded on the device, and where on the host."""

    def __init__(self, bench: Bench, codec: Codec) -> None:
        sizes = bench.caches.sizes
        self._codec, self._tokens = codec, sizes.page_tokens
        self._cache = bench.caches.nhd
        self._slots = bench.caches.slots[: sizes.moved_pages * sizes.page_tokens]
        self._there = self._encode(None)
        self._here = [_pinned(each) for each in self._there]
        self.nbytes = sum(each.nbytes for each in self._there)

    def evict(self) -> None:
        """Encode the pages, have them on the host, and know that they fit."""
        self._encode(self._there)
        for there, here in zip(self._there, self._here, strict=True):
            here.copy_(there, non_blocking=True)
        _finish(self._there[0].device)

    def restore(self) -> None:
        """Bring the pages back into the cache."""
        for there, here in zip(self._there, self._here, strict=True):
            there.copy_(here, non_blocking=True)
        if self._codec == Codec.RAW:
            pages = self._there[0]
            scatter_pages_paged(pages, self._cache, self._slots, page_tokens=self._tokens)
        else:
            keys, values = self._there
            decode_paged(
                self._codec, self._codec, self._cache, self._slots, keys, values,
                page_tokens=self._tokens,
            )  # fmt: skip
        _finish(self._there[0].device)

    def _encode(self, out: list[Tensor] | None) -> list[Tensor]:
        cache, slots, tokens = self._cache, self._slots, self._tokens
        if self._codec == Codec.RAW:
            target = out[0] if out else None
            return [gather_pages_paged(cache, slots, page_tokens=tokens, out=target)]
        into = (out[0], out[1]) if out else None
        keys, values, fits = encode_paged(
            self._codec, self._codec, cache, slots, page_tokens=tokens, out=into
        )
        assert bool(fits.all()), "the numbers of the benchmark do not fit"
        return [keys, values]


def moves(bench: Bench) -> Iterator[Row]:
    """Measure eviction to the host and the way back."""
    plain_out, plain_in, nbytes = _plain(bench)
    made = {codec: _Moves(bench, codec) for codec in (Codec.RAW, *CODECS)}
    works = {
        codec: (
            Work(f"evict {size(nbytes)}, {codec.name.lower()}", each.evict, waits=True),
            Work(f"restore {size(nbytes)}, {codec.name.lower()}", each.restore, waits=True),
        )
        for codec, each in made.items()
    }
    order = [plain_out, plain_in, *(work for pair in works.values() for work in pair)]
    bench.measure("evict and restore", order)
    for codec, pair in works.items():
        note = f"{nbytes / made[codec].nbytes:.2f} times fewer bytes cross"
        for work, plain in zip(pair, (plain_out, plain_in), strict=True):
            yield times_as_fast("moves", work, plain, note=f"{note}, {_rate(nbytes, work)}")


def tier(bench: Bench) -> Iterator[Row]:
    """Measure the gpu tier, from and to the arena of a server."""
    plain_out, plain_in, nbytes = _plain(bench)
    sizes = bench.caches.sizes
    shape = Geometry(sizes.layers, sizes.heads, sizes.dim, sizes.page_tokens, "bfloat16")
    arena = memoryview(bytearray(nbytes))
    _filled(bench, arena)
    payloads = [arena[at : at + shape.page_bytes] for at in range(0, nbytes, shape.page_bytes)]
    opened = GpuTier.open(str(bench.device), nbytes + SLACK_BYTES, arena)
    try:
        for codec in TIER_CODECS:
            yield from _tier(
                bench, opened, PageForm.of(shape, codec, codec), payloads, plain_in, plain_out
            )
    finally:
        opened.close()


def _tier(
    bench: Bench,
    opened: GpuTier,
    form: PageForm,
    payloads: list[memoryview],
    plain_in: Work,
    plain_out: Work,
) -> Iterator[Row]:
    slots = [opened.take(form.nbytes) for _ in payloads]
    held = [slot for slot in slots if slot is not None]
    assert len(held) == len(payloads), "the tier has no room"
    pairs = list(zip(held, payloads, strict=True))

    async def write() -> None:
        for at in range(0, len(pairs), AT_ONCE):
            async with anyio.create_task_group() as group:
                for slot, payload in pairs[at : at + AT_ONCE]:
                    group.start_soon(opened.write, slot, payload, form)

    async def read() -> None:
        for at in range(0, len(pairs), AT_ONCE):
            async with anyio.create_task_group() as group:
                for slot, payload in pairs[at : at + AT_ONCE]:
                    group.start_soon(opened.read, slot, payload, form)

    nbytes = sum(each.nbytes for each in payloads)
    works = [
        Work(f"gpu tier write {size(nbytes)}, {form.name}", lambda: anyio.run(write), waits=True),
        Work(f"gpu tier read {size(nbytes)}, {form.name}", lambda: anyio.run(read), waits=True),
    ]
    for work in (plain_in, plain_out):
        work.samples.clear()
    bench.measure(f"gpu tier, {form.name}", [plain_in, plain_out, *works])
    write_work, read_work = works
    yield times_as_fast("moves", write_work, plain_in, note=_rate(nbytes, write_work))
    note = f"{_rate(nbytes, read_work)}, checksums included"
    yield times_as_fast("moves", read_work, plain_out, note=note)
    for slot in held:
        opened.slots.give_back(slot)


def _plain(bench: Bench) -> tuple[Work, Work, int]:
    """Return copies of the same pages, raw and in one piece, to the host and back."""
    sizes = bench.caches.sizes
    nbytes = 2 * sizes.side_bytes * sizes.moved_pages // sizes.num_pages
    there = torch.zeros(nbytes, dtype=torch.uint8, device=bench.device)
    here = _pinned(there)

    def copy(source: Tensor, target: Tensor) -> Callable[[], None]:
        def run() -> None:
            target.copy_(source, non_blocking=True)
            _finish(bench.device)

        return run

    return (
        Work("plain copy to the host", copy(there, here), waits=True),
        Work("plain copy from the host", copy(here, there), waits=True),
        nbytes,
    )


def _filled(bench: Bench, arena: memoryview) -> None:
    # With the pages of the cache: what the codecs of the tier are given.
    sizes = bench.caches.sizes
    slots = bench.caches.slots[: sizes.moved_pages * sizes.page_tokens]
    pages = gather_pages_paged(bench.caches.nhd, slots, page_tokens=sizes.page_tokens)
    assert pages.dtype == DTYPE
    torch.frombuffer(arena, dtype=torch.uint8).copy_(pages.view(torch.uint8).flatten())


def _pinned(like: Tensor) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, pin_memory=like.device.type == "cuda")


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


def _rate(nbytes: int, work: Work) -> str:
    return f"{nbytes / work.seconds / 1e9:.2f} GB/s of bf16"
