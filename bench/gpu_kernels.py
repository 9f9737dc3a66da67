"""How near the kernels of codecs and pages come to a copy of the device's memory.

Goals are shares of the bandwidth of that copy, reads and writes counted alike. They are those that
comparable kernels have reached, of codecs with few instructions a number nearly all of it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from bench.gpu_cache import DTYPE, Caches, Order, copy_of
from bench.gpu_clock import Clock, Work, measure
from bench.gpu_limits import launches_of, limits
from bench.gpu_table import Row, share_of_copy
from respkv.kernels import ladder, launch
from respkv.kernels.layout import Codec, Side, plane_layout
from respkv.kernels.paged import (
    SIDES,
    PagedBuffer,
    copy_tokens,
    gather_pages_paged,
    scatter_pages_paged,
)
from respkv.kernels.paged_coding import decode_paged, encode_paged

# Encode and decode; None: no goal is set.
GOALS: Final[dict[Codec, tuple[float, float]]] = {
    Codec.F8: (0.80, 0.80),
    Codec.I8: (0.80, 0.80),
    Codec.I4: (0.75, 0.75),
    Codec.RH4: (0.60, 0.65),
    Codec.RH3: (0.60, 0.65),
    Codec.RH2: (0.60, 0.65),
    Codec.RHZ3: (0.60, 0.65),
    Codec.XS: (0.45, 0.65),
}
Call = Callable[[], object]
PAGE_GOAL: Final = 0.85
PAGE_TOKENS: Final = 16
ORDERS: Final[tuple[Order, Order]] = ("NHD", "HND")


@dataclass(frozen=True, slots=True)
class Bench:
    """What all parts share: how to time, how often, on what."""

    clock: Clock
    caches: Caches
    rounds: int
    progress: Callable[[str], None]

    @property
    def device(self) -> torch.device:
        """Where everything is."""
        return self.caches.device

    def copy(self) -> Work:
        """Return the copy that shares of bandwidth are of."""
        source, target = copy_of(self.caches.sizes.copy_bytes, self.device)
        return Work("device copy", lambda: target.copy_(source), 2 * source.nbytes)

    def kernels(self, call: Callable[[], object]) -> Callable[[], object]:
        """Return the launches of a call alone: without the tables of addresses that come first.

        On a processor, where nothing is launched, the call itself.
        """
        return launches_of(call) if self.device.type == "cuda" else call

    def measure(self, what: str, works: list[Work]) -> None:
        """Measure works in turns."""
        self.progress(what)
        measure(self.clock, works, self.rounds)

    def row(self, part: str, work: Work, copy: Work, goal: float | None, note: str = "") -> Row:
        """Return the row of a kernel; one that misses its goal says what bounds it."""
        row = share_of_copy(part, work, copy, goal=goal, note=note)
        if row.is_met is False and (why := limits(work.run, self.device)):
            note = f"{note}; {why}" if note else why
            row = share_of_copy(part, work, copy, goal=goal, note=note)
        return row


def device_copy(bench: Bench) -> Iterator[Row]:
    """Measure what all other rows are compared with."""
    copy = bench.copy()
    bench.measure("device copy", [copy])
    rate = copy.bytes_per_s / 1e9
    yield Row(
        "copy", copy.name, copy.seconds, rate, note="bytes read and written", samples=copy.samples
    )


def codecs(bench: Bench) -> Iterator[Row]:
    """Measure the codecs of fixed size: planes that lie together, then straight from paged caches."""
    for codec, goals in GOALS.items():
        if codec == Codec.XS:
            continue
        name = codec.name.lower()
        works, notes = [], []
        for side in SIDES:
            works += _plain(bench, codec, side)
            notes += [_agreement(bench, codec, side), ""]
        for order in ORDERS:
            works += _fused(bench, codec, order)
            notes += ["", ""]
        copy = bench.copy()
        bench.measure(f"{name}: codec", [copy, *works])
        for index, (work, note) in enumerate(zip(works, notes, strict=True)):
            yield bench.row("codec", work, copy, goals[index % 2], note)


def _plain(bench: Bench, codec: Codec, side: Side) -> list[Work]:
    planes = bench.caches.planes(side)
    encoded, _ = ladder.encode_planes(codec, planes, side=side)
    target = torch.empty_like(planes)
    nbytes, name = planes.nbytes + encoded.nbytes, f"{codec.name.lower()} {side}s"

    def encode() -> None:
        ladder.encode_planes(codec, planes, side=side, out=encoded)

    def decode() -> None:
        ladder.decode_planes(codec, encoded, side=side, out=target)

    return [
        Work(f"{name} encode", bench.kernels(encode), nbytes),
        Work(f"{name} decode", bench.kernels(decode), nbytes),
    ]


def _agreement(bench: Bench, codec: Codec, side: Side) -> str:
    """Say whether a plane's bytes are those of the reference: a fast kernel must be right as well."""
    plane = bench.caches.planes(side)[:1]
    ours, _ = ladder.encode_planes(codec, plane, side=side)
    theirs, _ = ladder.encode_planes(codec, plane, side=side, reference=True)
    differing = int((ours != theirs).sum())
    return (
        "bytes as the reference's"
        if not differing
        else (f"{differing} of {ours.numel()} bytes not the reference's")
    )


def _fused(bench: Bench, codec: Codec, order: Order) -> list[Work]:
    sizes, slots = bench.caches.sizes, bench.caches.slots
    cache, tokens = bench.caches.cache(order), sizes.page_tokens
    out = encode_paged(codec, codec, cache, slots, page_tokens=tokens)[:2]
    nbytes = 2 * sizes.side_bytes + encoded_bytes(bench, codec) * sizes.num_pages

    def encode() -> None:
        encode_paged(codec, codec, cache, slots, page_tokens=tokens, out=out)

    def decode() -> None:
        decode_paged(codec, codec, cache, slots, *out, page_tokens=tokens)

    name = f"{codec.name.lower()} from {order} blocks"
    return [
        Work(f"{name} encode", bench.kernels(encode), nbytes),
        Work(f"{codec.name.lower()} to {order} blocks decode", bench.kernels(decode), nbytes),
    ]


def encoded_bytes(bench: Bench, codec: Codec) -> int:
    """Return the bytes of an encoded page, keys and values of all layers."""
    sizes = bench.caches.sizes
    shape = (sizes.page_tokens, sizes.heads, sizes.dim, DTYPE.itemsize)
    return sizes.layers * sum(plane_layout(codec, side, *shape).nbytes for side in SIDES)


def lossless(bench: Bench) -> Iterator[Row]:
    """Measure ``xs``, whose bytes are those that it came to."""
    goals = GOALS[Codec.XS]
    for side in SIDES:
        works = _xs(bench, side)
        copy = bench.copy()
        bench.measure(f"xs {side}s", [copy, *works])
        for work, goal in zip(works, goals, strict=True):
            note = f"{work.nbytes / bench.caches.sizes.side_bytes - 1:.3f} of the bytes stored"
            yield bench.row("codec", work, copy, goal, note)


def _xs(bench: Bench, side: Side) -> list[Work]:
    planes = bench.caches.planes(side)
    target = torch.empty_like(planes)
    is_launched = bench.device.type == "cuda" or launch.INTERPRETED
    make = _xs_kernels if is_launched else _xs_references
    encode, decode, stored = make(planes, target)
    nbytes = planes.nbytes + stored
    return [Work(f"xs {side}s encode", encode, nbytes), Work(f"xs {side}s decode", decode, nbytes)]


def _xs_references(planes: Tensor, target: Tensor) -> tuple[Call, Call, int]:
    made = ladder.encode_xs(planes)
    kept = [(each, out) for each, out in zip(made, target, strict=True) if each is not None]

    def decode() -> None:
        for each, out in kept:
            ladder.decode_xs(each, out)

    return lambda: ladder.encode_xs(planes), decode, sum(each.nbytes for each, _ in kept)


def _xs_kernels(planes: Tensor, target: Tensor) -> tuple[Call, Call, int]:
    from respkv.kernels import exponent_triton as xs

    count, tokens = planes.shape[:2]
    source, into = PagedBuffer.from_planes(planes), PagedBuffer.from_planes(target)

    def encode() -> tuple[Tensor, Tensor]:
        return xs.encode_paged(source, "key", None, page_tokens=tokens, num_pages=count)

    encoded, sizes = encode()
    lengths: list[int] = sizes.flatten().tolist()
    assert all(lengths), "xs: not every plane became smaller"
    kept = [encoded[i, 0, :length] for i, length in enumerate(lengths)]
    good: list[Tensor] = []

    def decode() -> None:
        good.append(xs.decode_paged(kept, into, "key", None, page_tokens=tokens))

    again = launches_of(decode)
    assert bool(good[0].all()), "xs: no plane"
    assert torch.equal(planes.view(torch.int16), target.view(torch.int16)), "xs: not what it was"
    return launches_of(encode), again, sum(lengths)


def pages(bench: Bench) -> Iterator[Row]:
    """Measure pages of 16 tokens, gathered and scattered as they are, and blocks copied in place."""
    sizes, slots = bench.caches.sizes, bench.caches.slots
    half = sizes.tokens // 2
    for order in ORDERS:
        cache = bench.caches.cache(order)
        made = gather_pages_paged(cache, slots, page_tokens=PAGE_TOKENS)
        works = [
            Work(
                f"gather pages of {PAGE_TOKENS} from {order}",
                bench.kernels(_gather(cache, slots, made)),
            ),
            Work(
                f"scatter pages of {PAGE_TOKENS} to {order}",
                bench.kernels(_scatter(cache, slots, made)),
            ),
            Work(
                f"copy blocks in {order}",
                bench.kernels(_copy_blocks(cache, slots[:half], slots[half:])),
            ),
        ]
        for work in works:
            work.nbytes = 4 * sizes.side_bytes
        works[2].nbytes //= 2
        copy = bench.copy()
        bench.measure(f"pages, {order}", [copy, *works])
        for work in works:
            yield bench.row("pages", work, copy, PAGE_GOAL)


def _gather(cache: PagedBuffer, slots: Tensor, out: Tensor) -> Callable[[], object]:
    return lambda: gather_pages_paged(cache, slots, page_tokens=PAGE_TOKENS, out=out)


def _scatter(cache: PagedBuffer, slots: Tensor, made: Tensor) -> Callable[[], object]:
    return lambda: scatter_pages_paged(made, cache, slots, page_tokens=PAGE_TOKENS)


def _copy_blocks(cache: PagedBuffer, source: Tensor, target: Tensor) -> Callable[[], object]:
    return lambda: copy_tokens(cache, source, cache, target, tokens=source.numel())
