"""Measure the lossless codecs against zstd and lz4 as they come: ``python -m bench.lossless``.

Each tensor is coded in pages of ``--page`` bytes by one thread. A ratio is bytes before to bytes
after; speeds count the bytes before, MB/s, the best of ``--rounds``. The keys and values are those of
a small random Llama (6 layers, 8 heads, Zipf tokens): its exponents are like those of a trained one,
its exact repeats, which come from layer 0, are more than a trained one has.
"""

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import lz4.block
import ml_dtypes
import numpy as np
import zstandard

from respkv.tiers.lossless import decode, encode

TENSOR_BYTES = 16 << 20
LLAMA_TOKENS = 1024


class Tensor(NamedTuple):
    """What is coded: a name, the bytes of an element, and the bytes."""

    name: str
    element_bytes: int
    data: bytes


class Speed(NamedTuple):
    """How one coder did on one tensor."""

    ratio: float
    encode_mb_s: float
    decode_mb_s: float


def gaussian(kind: str) -> Tensor:
    """Return N(0, 1) as bfloat16, float16 or float32."""
    dtype = np.dtype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)
    numbers = np.random.default_rng(0).standard_normal(
        TENSOR_BYTES // dtype.itemsize, dtype=np.float32
    )
    return Tensor(f"N(0,1) {kind}", dtype.itemsize, numbers.astype(dtype).tobytes())


def llama() -> Iterator[Tensor]:
    """Yield the K and the V of a small random Llama, as [layer, token, head, dim] bfloat16."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=1024,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=128,
    )
    model = LlamaForCausalLM(config).bfloat16()
    tokens = np.minimum(np.random.default_rng(0).zipf(1.2, LLAMA_TOKENS), config.vocab_size) - 1
    with torch.no_grad():
        layers = model(torch.from_numpy(tokens)[None], use_cache=True).past_key_values.layers
    for name, parts in (("K", [x.keys for x in layers]), ("V", [x.values for x in layers])):
        stacked = torch.cat(parts).transpose(1, 2).contiguous()
        yield Tensor(f"small Llama, {name}", 2, stacked.view(torch.int16).numpy().tobytes())


def text() -> Tensor:
    """Return source code: the standard library's."""
    folder = Path(argparse.__file__).parent
    parts = b"".join(path.read_bytes() for path in sorted(folder.rglob("*.py")))
    return Tensor("source code", 1, parts[:TENSOR_BYTES])


def tensors() -> Iterator[Tensor]:
    """Yield everything that is measured."""
    for kind in ("bfloat16", "float16", "float32"):
        yield gaussian(kind)
    yield from llama()
    yield text()
    yield Tensor("random bytes", 2, np.random.default_rng(0).bytes(TENSOR_BYTES))


def best_s(work: Callable[[], object], rounds: int) -> float:
    """Return the shortest time of ``work``."""
    times = []
    for _ in range(rounds):
        start = perf_counter()
        work()
        times.append(perf_counter() - start)
    return min(times)


def ours(tensor: Tensor, pages: list[memoryview], codec: str, rounds: int) -> Speed:
    """Measure encode and decode."""

    def write() -> list[tuple[int, bytes | memoryview]]:
        return [encode(page, element_bytes=tensor.element_bytes, codec=codec) for page in pages]

    stored = write()
    places = [memoryview(bytearray(page.nbytes)) for page in pages]

    def read() -> None:
        for (codec_id, data), place in zip(stored, places, strict=True):
            decode(codec_id, memoryview(data), place)

    write_s, read_s = best_s(write, rounds), best_s(read, rounds)
    assert all(page == place for page, place in zip(pages, places, strict=True))
    return _speed(tensor, sum(len(data) for _, data in stored), write_s, read_s)


def plain(tensor: Tensor, pages: list[memoryview], codec: str, rounds: int) -> Speed:
    """Measure the library by itself."""
    if codec == "zstd":
        compress = zstandard.ZstdCompressor(level=1).compress
        decompress = zstandard.ZstdDecompressor().decompress
    else:
        compress, decompress = lz4.block.compress, lz4.block.decompress
    stored = [compress(page) for page in pages]
    write_s = best_s(lambda: [compress(page) for page in pages], rounds)
    read_s = best_s(lambda: [decompress(data) for data in stored], rounds)
    return _speed(tensor, sum(map(len, stored)), write_s, read_s)


def _speed(tensor: Tensor, stored_bytes: int, write_s: float, read_s: float) -> Speed:
    nbytes = len(tensor.data)
    return Speed(nbytes / stored_bytes, nbytes / write_s / 1e6, nbytes / read_s / 1e6)


def main(argv: list[str] | None = None) -> None:
    """Print a line for each tensor and codec."""
    parser = argparse.ArgumentParser(description="Measure the lossless codecs.")
    parser.add_argument("--page", type=int, default=2 << 20, help="bytes of a page")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(argv)
    print(
        f"{'':18} {'':4}  {'respkv':>6} {'enc':>7} {'dec':>6}   {'plain':>6} {'enc':>7} {'dec':>6}"
    )
    for tensor in tensors():
        view = memoryview(tensor.data)
        pages = [view[at : at + options.page] for at in range(0, view.nbytes, options.page)]
        for codec in ("zstd", "lz4"):
            figures = [each(tensor, pages, codec, options.rounds) for each in (ours, plain)]
            columns = "   ".join(
                f"{s.ratio:6.3f} {s.encode_mb_s:7.0f} {s.decode_mb_s:6.0f}" for s in figures
            )
            print(f"{tensor.name:18} {codec:4}  {columns}", flush=True)


if __name__ == "__main__":
    main()
