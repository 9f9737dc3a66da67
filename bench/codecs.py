"""Measure the codecs against blosc2, zstd and lz4: ``python -m bench.codecs``.

Every line is one codec on one sample: its ratio (bytes before to bytes after, everything counted),
what one thread encodes and decodes in GB/s of bytes before, and the relative L2 error of what comes
back. Times are medians of ``--rounds`` passes over all pages of the sample, the codecs taking turns
in each round. Ours go the way of a tier: from the bytes of a page to what is written in a file.
"""

import argparse
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import blosc2  # pyright: ignore[reportMissingImports]
import lz4.block
import torch
import zstandard

from bench.machine import describe
from bench.tensors import Sample, samples
from respkv.kernels import lossless
from respkv.tiers.codec import PageSpec, decode_stored, encode_page, parse_codec

RESULTS = Path(__file__).parent / "results" / "codecs.json"
LADDER = ("xs", "f8", "i8", "i4", "rh4", "rh3", "rh2", "rhz4", "rhz3", "rhz2")


@dataclass(slots=True)
class Coder:
    """A way to store a page. decode fills memory of the page's size."""

    name: str
    encode: Callable[[memoryview], bytes | memoryview]
    decode: Callable[[bytes | memoryview, memoryview], None]
    encode_s: list[float] = field(default_factory=list[float])
    decode_s: list[float] = field(default_factory=list[float])


@dataclass(frozen=True, slots=True)
class Line:
    """How one coder did on one sample."""

    sample: str
    codec: str
    ratio: float
    bits: float
    encode_gb_s: float
    decode_gb_s: float
    relative_l2: float


def peers() -> Iterator[Coder]:
    """Yield what others offer for the same bytes."""
    zstd, unzstd = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()

    def from_bytes(decompress: Callable[[bytes | memoryview], bytes]) -> Callable[..., None]:
        def decode(stored: bytes | memoryview, into: memoryview) -> None:
            into[:] = decompress(stored)

        return decode

    yield Coder("zstd-1", zstd.compress, from_bytes(unzstd.decompress))
    yield Coder("lz4", lz4.block.compress, from_bytes(lz4.block.decompress))
    for name, codec, how in (
        ("blosc2 lz4 bitshuffle", blosc2.Codec.LZ4, blosc2.Filter.BITSHUFFLE),
        ("blosc2 zstd-1 shuffle", blosc2.Codec.ZSTD, blosc2.Filter.SHUFFLE),
    ):
        decompress: Any = blosc2.decompress2
        yield Coder(name, _blosc2(codec, how), from_bytes(decompress))


def _blosc2(codec: Any, how: Any) -> Callable[[memoryview], bytes]:
    compress: Any = blosc2.compress2

    def encode(page: memoryview) -> bytes:
        return bytes(compress(page, codec=codec, clevel=1, filters=[how], typesize=2, nthreads=1))

    return encode


def ours(sample: Sample) -> Iterator[Coder]:
    """Yield the byte planes of the disk tier, then the ladder."""
    for name in ("zstd", "lz4"):
        yield Coder(f"respkv planes {name}", _Planes(name).encode, _Planes(name).decode)
    for name in LADDER:
        spec = PageSpec.of(sample.geometry, *parse_codec(name))
        pages = _Pages(spec)
        yield Coder(f"respkv {name}", pages.encode, pages.decode)


class _Planes:
    """The lossless codec of values of which nothing is known but the size of a number."""

    def __init__(self, name: str) -> None:
        self._name = name

    def encode(self, page: memoryview) -> memoryview:
        codec, stored = lossless.encode(page, element_bytes=2, codec=self._name)
        return memoryview(bytes([codec]) + bytes(stored))

    def decode(self, stored: bytes | memoryview, into: memoryview) -> None:
        lossless.decode(stored[0], memoryview(stored)[1:], into)


class _Pages:
    """The codecs of pages; the first byte says which one it became."""

    def __init__(self, spec: PageSpec) -> None:
        self._spec = spec

    def encode(self, page: memoryview) -> memoryview:
        codec, stored = encode_page(page, self._spec, has_parent=True)
        self._codec = codec
        return memoryview(stored)

    def decode(self, stored: bytes | memoryview, into: memoryview) -> None:
        decode_stored(self._codec, memoryview(stored), into)


def measure(sample: Sample, coders: list[Coder], rounds: int) -> Iterator[Line]:
    """Measure coders on one sample, in turns."""
    payloads = sample.payloads
    nbytes = sum(page.nbytes for page in payloads)
    places = [memoryview(bytearray(page.nbytes)) for page in payloads]
    stored: dict[str, list[bytes | memoryview]] = {}
    for number in range(rounds + 1):
        for coder in coders:
            start = perf_counter()
            stored[coder.name] = [coder.encode(page) for page in payloads]
            middle = perf_counter()
            for each, place in zip(stored[coder.name], places, strict=True):
                coder.decode(each, place)
            if number:  # the first round warms up
                coder.encode_s.append(middle - start)
                coder.decode_s.append(perf_counter() - middle)
    for coder in coders:
        for each, place in zip(stored[coder.name], places, strict=True):
            coder.decode(each, place)
        stored_bytes = sum(len(each) for each in stored[coder.name])
        yield Line(
            sample.name,
            coder.name,
            nbytes / stored_bytes,
            16 * stored_bytes / nbytes,
            nbytes / median(coder.encode_s) / 1e9,
            nbytes / median(coder.decode_s) / 1e9,
            _error(payloads, places),
        )


def _error(exact: list[memoryview], other: list[memoryview]) -> float:
    pairs = [
        (_numbers(before), _numbers(after)) for before, after in zip(exact, other, strict=True)
    ]
    difference = sum(float((after - before).square().sum()) for before, after in pairs)
    norm = sum(float(before.square().sum()) for before, _ in pairs)
    return math.sqrt(difference / norm)


def _numbers(page: memoryview) -> torch.Tensor:
    return torch.frombuffer(bytearray(page), dtype=torch.bfloat16).double()


def markdown(lines: list[Line], machine: dict[str, str]) -> str:
    """Return a table of all lines and under it what they were measured on."""
    rows = ["| sample | codec | ratio | bits | encode GB/s | decode GB/s | relative L2 |"]
    rows.append("|---|---|---|---|---|---|---|")
    for line in lines:
        error = f"{line.relative_l2:.4f}" if line.relative_l2 else "0"
        rows.append(
            f"| {line.sample} | {line.codec} | {line.ratio:.3f} | {line.bits:.2f} "
            f"| {line.encode_gb_s:.2f} | {line.decode_gb_s:.2f} | {error} |"
        )
    facts = "; ".join(f"{name} {value}" for name, value in machine.items())
    return "\n".join([*rows, "", f"{facts}."]) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Print the table and write it to bench/results/."""
    parser = argparse.ArgumentParser(description="Measure the codecs against others on a CPU.")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    lines: list[Line] = []
    for sample in samples():
        for line in measure(sample, [*peers(), *ours(sample)], options.rounds):
            lines.append(line)
            print(f"{line.sample}: {line.codec}: {line.ratio:.3f}", flush=True)
    machine = describe(Path.cwd()) | {"blosc2": blosc2.__version__}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    body = {"machine": machine, "lines": [asdict(line) for line in lines]}
    options.out.write_text(json.dumps(body, indent=1) + "\n")
    text = markdown(lines, machine)
    options.out.with_suffix(".md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
