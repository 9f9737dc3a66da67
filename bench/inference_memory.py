"""Measure what a cached token costs: ``python -m bench.inference_memory``.

The KV of prompts is computed by a model with random weights and kept in three ways: in transformers'
DynamicCache, in files by torch.save, and in respkv, by tier and codec. Everything is counted that is
kept for it: heads, alignment, what a slot is larger than its page; not what a server needs when it is
empty. Two workloads: one long prompt, and many prompts that begin alike, as behind one system prompt,
where the other ways keep the beginning once for each.

No figure depends on what the model says, but how far a lossless codec gets depends on its weights:
those of trained models have more order than random ones.
"""

import argparse
import io
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, TypeAlias

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from bench.machine import hardware, load, software
from bench.result import MIB
from bench.servers import BenchError, Server, respkv_server
from respkv.client import Client

RESULTS: Final = Path(__file__).parent / "results" / "inference-memory.json"
PACKAGES: Final = ("torch", "transformers", "numpy", "zstandard")
FILE_CODECS: Final = ("raw", "xs", "f8", "i8", "i4", "rh4", "rhz4", "rhz3", "rhz2")
GPU_CODECS: Final = ("raw", "i8", "i4", "rh4")
PAGE_TOKENS: Final = 64
MEMORY_BYTES: Final = 128 * MIB  # of each tier: several times what is put
SHARE_S: Final = 60.0  # for the server to have written all


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured. tokens: of the long prompt; prompts: that share ``shared`` tokens."""

    layers: int = 8
    hidden: int = 512
    heads: int = 8
    kv_heads: int = 4
    tokens: int = 2048
    prompts: int = 16
    shared: int = 1000
    own: int = 24  # to whole pages: the gpu tier takes no shorter ones


QUICK: Final = Sizes(2, 64, 4, 2, 256, 4, 100, 28)


@dataclass(frozen=True, slots=True)
class Line:
    """What a way to keep KV takes.

    nbytes:   of all that is kept; tokens: of all prompts together, as often as they were kept for.
    ratio:    of a DynamicCache's tensors for the same prompts.
    error:    relative L2 of what comes back, of the worst layer, keys and values; 0: the same bits;
              None: not measured.
    """

    work: str
    kept: str
    nbytes: int
    tokens: int
    ratio: float
    error: float | None

    @property
    def bytes_per_token(self) -> float:
        """Bytes for each token of each prompt."""
        return self.nbytes / self.tokens


@dataclass(frozen=True, slots=True)
class Prompt:
    """A prompt and its KV, [L, 2, tokens, H, D] bfloat16."""

    tokens: list[int]
    kv: Tensor

    def cache(self) -> DynamicCache:
        """Return it as transformers keeps it: a tensor [1, H, tokens, D] for keys and for values."""
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(self.kv):
            parts = [each.transpose(0, 1)[None].clone() for each in (keys, values)]
            cache.update(parts[0], parts[1], layer)
        return cache


def make_model(sizes: Sizes) -> LlamaForCausalLM:
    """Return a Llama with random weights in bfloat16."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=sizes.hidden,
        intermediate_size=2 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        max_position_embeddings=max(sizes.tokens, sizes.shared + sizes.own) + 1,
    )
    made: Any = LlamaForCausalLM(config)
    model: LlamaForCausalLM = made.to(torch.bfloat16).eval()
    return model


def read(model: LlamaForCausalLM, prompts: Sequence[list[int]]) -> Iterator[Prompt]:
    """Compute the KV of prompts."""
    for tokens in prompts:
        cache = DynamicCache()
        with torch.inference_mode():
            model(input_ids=torch.tensor([tokens]), past_key_values=cache, logits_to_keep=1)
        layers = [
            torch.stack([keys[0].transpose(0, 1), values[0].transpose(0, 1)])
            for keys, values in tensors(cache)
        ]
        yield Prompt(tokens, torch.stack(layers).contiguous())


def tensors(cache: DynamicCache) -> list[tuple[Tensor, Tensor]]:
    """Return keys and values of each layer, each [1, H, tokens, D]."""
    found: list[tuple[Tensor, Tensor]] = []
    for layer in cache.layers:
        assert isinstance(layer, DynamicLayer)
        assert layer.keys is not None
        assert layer.values is not None
        found.append((layer.keys, layer.values))
    return found


def workloads(sizes: Sizes) -> dict[str, list[Prompt]]:
    """Return the prompts of each workload, with their KV."""
    model = make_model(sizes)
    random = torch.Generator().manual_seed(1)

    def tokens(count: int) -> list[int]:
        drawn: list[int] = torch.randint(0, 1000, (count,), generator=random).tolist()
        return drawn

    shared = tokens(sizes.shared)
    many = [shared + tokens(sizes.own) for _ in range(sizes.prompts)]
    return {
        f"one prompt of {sizes.tokens:,} tokens": list(read(model, [tokens(sizes.tokens)])),
        f"{sizes.prompts} prompts that share {sizes.shared:,} of {sizes.shared + sizes.own:,} tokens": (
            list(read(model, many))
        ),
    }


def in_dynamic_caches(prompts: Sequence[Prompt]) -> int:
    """Return the bytes of the tensors of a DynamicCache for each prompt."""
    caches = [prompt.cache() for prompt in prompts]
    return sum(keys.nbytes + values.nbytes for cache in caches for keys, values in tensors(cache))


def saved_by_torch(prompts: Sequence[Prompt]) -> int:
    """Return the bytes that torch.save writes for the keys and values of each prompt."""
    total = 0
    for prompt in prompts:
        into = io.BytesIO()
        torch.save(tensors(prompt.cache()), into)
        total += into.getbuffer().nbytes
    return total


def in_respkv(
    prompts: Sequence[Prompt], tier: str, codec: str, *, with_error: bool
) -> tuple[int, float | None]:
    """Return the bytes of a tier that holds the prompts, and the error of what comes back."""
    error: float | None = None
    with TemporaryDirectory(prefix="bench-memory-") as folder:
        settings = _settings(tier, folder)
        with respkv_server(MEMORY_BYTES, **settings) as server, Client(server.url) as client:
            _put(client, prompts, tier, codec)
            nbytes = _used(client, tier, server)
            if with_error and tier == "gpu" and codec != "raw":
                said = client.quality("bench", codec)
                error = max(float(said["key_relative_l2"]), float(said["value_relative_l2"]))
            elif with_error and tier == "cpu":
                error = _error(client, prompts)
        if with_error and tier in ("nvme", "disk"):
            # A new process has nothing but the files.
            with respkv_server(MEMORY_BYTES, **settings) as again, Client(again.url) as client:
                error = _error(client, prompts)
    return nbytes, error


def _put(client: Client, prompts: Sequence[Prompt], tier: str, codec: str) -> None:
    first = prompts[0].kv
    client.schema_set(
        "bench",
        layers=first.shape[0],
        heads=first.shape[3],
        dim=first.shape[4],
        tokens=PAGE_TOKENS,
        dtype="bfloat16",
        codecs={} if tier == "cpu" or codec == "default" else {tier: codec},
        durability="written" if tier in ("nvme", "disk") else None,
    )
    for prompt in prompts:
        client.seq.put("bench", prompt.tokens, prompt.kv)


def _error(client: Client, prompts: Sequence[Prompt]) -> float:
    """Return the relative L2 error of the worst layer of all prompts, as they come back."""
    worst = 0.0
    for prompt in prompts:
        layers = client.seq.get("bench", prompt.tokens)
        if layers.matched != len(prompt.tokens):
            raise BenchError(f"{layers.matched} of {len(prompt.tokens)} tokens came back")
        for page, kv in zip(layers, prompt.kv, strict=True):
            back = torch.frombuffer(bytearray(page), dtype=torch.bfloat16).view(kv.shape).double()
            difference, norm = (back - kv.double()).norm(), kv.double().norm()
            worst = max(worst, float(difference / norm))
    return worst


def _settings(tier: str, folder: str) -> dict[str, str | int]:
    if tier == "gpu":
        return {"gpu_bytes": MEMORY_BYTES, "gpu_device": "cpu"}
    if tier == "cpu":
        return {}
    return {f"{tier}_path": f"{folder}/tier", f"{tier}_bytes": MEMORY_BYTES}


def _used(client: Client, tier: str, server: Server) -> int:
    """Return the bytes that a tier takes for its pages, once all of them are there."""
    keys = client.command("KEYS", "bench:*")
    if not isinstance(keys, list):
        raise BenchError(f"KEYS answered {keys!r}")
    names = [key for key in keys if isinstance(key, bytes)]
    if tier == "gpu":
        client.prefetch(names, to="gpu")
    deadline = time.monotonic() + SHARE_S
    while time.monotonic() < deadline:
        found = _tier(client, tier)
        if found["pages"] == len(names):
            used: int = found["live_bytes" if tier in ("nvme", "disk") else "used_bytes"]
            return used
        time.sleep(0.05)
    raise BenchError(
        f"of {len(names)} pages, {server.name}'s {tier} tier has {_tier(client, tier)}"
    )


def _tier(client: Client, name: str) -> dict[str, Any]:
    tiers = client.command("KV.TIERS")
    if not isinstance(tiers, list):
        raise BenchError(f"KV.TIERS answered {tiers!r}")
    for tier in tiers:
        if isinstance(tier, dict) and tier.get(b"name") == name.encode():
            return {
                bytes(key).decode(): value for key, value in tier.items() if isinstance(key, bytes)
            }
    raise BenchError(f"there is no tier {name}")


Way: TypeAlias = Callable[[Sequence[Prompt]], tuple[int, float | None]]


def ways(*, is_full: bool) -> Iterator[tuple[str, Way]]:
    """Yield ways to keep prompts, by what they are called; is_full: all codecs, and their errors."""
    yield "transformers DynamicCache", lambda prompts: (in_dynamic_caches(prompts), 0.0)
    yield "torch.save, a file for each prompt", lambda prompts: (saved_by_torch(prompts), 0.0)

    def way(tier: str, codec: str) -> Way:
        return lambda prompts: in_respkv(prompts, tier, codec, with_error=is_full)

    yield "respkv cpu tier (raw, lent in place)", way("cpu", "raw")
    for codec in GPU_CODECS if is_full else ("raw", "rh4"):
        yield f"respkv gpu tier, {codec}", way("gpu", codec)
    for codec in FILE_CODECS if is_full else ("raw", "xs", "rh4"):
        yield f"respkv nvme tier, {codec}", way("nvme", codec)
    yield "respkv disk tier, as it comes (lossless)", way("disk", "default")


def measure(sizes: Sizes, progress: Callable[[str], None]) -> Iterator[Line]:
    """Measure every way to keep each workload."""
    for number, (work, prompts) in enumerate(workloads(sizes).items()):
        tokens = sum(len(prompt.tokens) for prompt in prompts)
        dynamic = in_dynamic_caches(prompts)
        for kept, way in ways(is_full=number == 0):
            progress(f"{work}: {kept}")
            nbytes, error = way(prompts)
            yield Line(work, kept, nbytes, tokens, nbytes / dynamic, error)


def markdown(lines: Sequence[Line], machine: dict[str, str]) -> str:
    """Return a table of all lines and under it what they were measured on."""
    rows = ["| prompts | kept in | bytes a token | of DynamicCache | relative L2 |"]
    rows.append("|---|---|---|---|---|")
    for line in lines:
        error = "" if line.error is None else f"{line.error:.4f}" if line.error else "0"
        rows.append(
            f"| {line.work} | {line.kept} | {line.bytes_per_token:,.0f} | {line.ratio:.3f} | {error} |"
        )
    facts = "; ".join(f"{name} {value}" for name, value in machine.items())
    notes = (
        "The error is that of the worst layer, of what came back: of files, in a new process; of the"
        " gpu tier, as KV.QUALITY measures it. Where none stands it was not measured. The gpu tier is"
        " one in the memory of a processor here, with the slots and codecs of one on a GPU."
    )
    return "\n".join([*rows, "", notes, "", f"{facts}."]) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Print the table, and write it to bench/results/."""
    parser = argparse.ArgumentParser(
        "python -m bench.inference_memory",
        description="what a cached token costs, by tier and codec",
    )
    parser.add_argument("--quick", action="store_true", help="tiny sizes: shows that it works")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="of the JSON; the table is beside it"
    )
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    sizes = QUICK if options.quick else Sizes()
    machine = hardware() | load() | software(PACKAGES)
    machine["model"] = (
        f"Llama, {sizes.layers} layers, {sizes.kv_heads} KV heads of {sizes.hidden // sizes.heads},"
        " bfloat16, random weights"
    )
    machine["page_tokens"] = str(PAGE_TOKENS)
    start = time.monotonic()
    lines = list(measure(sizes, lambda text: print(text, file=sys.stderr, flush=True)))
    machine["took"] = f"{time.monotonic() - start:.0f} s"
    options.out.parent.mkdir(parents=True, exist_ok=True)
    body = {
        "machine": machine,
        "lines": [asdict(line) | {"bytes_per_token": line.bytes_per_token} for line in lines],
    }
    options.out.write_text(json.dumps(body, indent=1) + "\n")
    text = markdown(lines, machine)
    options.out.with_suffix(".md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
