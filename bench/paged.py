"""Measure the paged cache against DynamicCache: ``python -m bench.paged``.

Memory is that of the sequences' keys and values at their most, counted; and the resident memory of a
process of its own, at its most, less that of the process with the model and one step done. The peer
reads the prefix once as well, so what is compared is what the sequences keep, and what a step takes
beside it. Tokens of both are compared; they have to be equal.

Rates are of decodes alone: so many sequences in one step over the paged cache, against one sequence
after the other with a DynamicCache each. The model has random weights; ``--quick`` takes every row at
tiny sizes, which shows that the rows work and nothing else.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, Final, cast

# The model is made here; nothing may be asked of a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from bench.machine import hardware, load, software
from bench.result import MIB, Line, Result, compare, duration, rate
from bench.table import markdown, write
from respkv.integrations.huggingface.paged_attention import PagedModel, paged_config
from respkv.kernels.attention import paged_decode
from respkv.kernels.paged_kv import PagedKV
from respkv.paged import Chunk, PagedAttentionCache, PagedCacheConfig
from respkv.paged.host_attention import host_decode

RESULTS: Final = Path(__file__).parent / "results" / "paged.json"
PACKAGES: Final = ("torch", "transformers")
MEMORY_MAX: Final = 0.6  # of DynamicCache's
RATE_MIN: Final = 1.5  # times one sequence after the other


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured.

    shared, own, made: tokens of the prefix, of each prompt after it, and made for each.
    layers, heads, dim, hidden: of the model; query heads are twice the heads.
    batch, context, turn: sequences that decode, their tokens, and tokens of each in a measurement.
    """

    sequences: int = 16
    shared: int = 1000
    own: int = 8
    made: int = 24
    layers: int = 8
    heads: int = 4
    dim: int = 64
    hidden: int = 512
    batch: tuple[int, ...] = (1, 8, 16)
    context: int = 256
    turn: int = 8
    rounds: int = 7


QUICK: Final = Sizes(2, 40, 3, 3, 2, 2, 8, 32, (2,), 20, 2, 1)


@dataclass(frozen=True, slots=True)
class Use:
    """What sequences took at their most: bytes of keys and values, and of the process."""

    counted: int
    resident: int
    tokens: list[list[int]]


def new_model(sizes: Sizes) -> LlamaForCausalLM:
    """Return a Llama with random weights, the same each time."""
    torch.manual_seed(6)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=sizes.hidden,
        intermediate_size=2 * sizes.hidden,
        num_hidden_layers=sizes.layers,
        num_attention_heads=2 * sizes.heads,
        num_key_value_heads=sizes.heads,
        head_dim=sizes.dim,
        max_position_embeddings=4096,
    )
    model = LlamaForCausalLM(config)
    torch.nn.Module.eval(model)  # the override has no types
    return model


def prompts(sizes: Sizes) -> list[list[int]]:
    """Return prompts that share a prefix and then differ."""
    generator = torch.Generator().manual_seed(1)
    shared = torch.randint(3, 999, (sizes.shared,), generator=generator).tolist()
    own = torch.randint(3, 999, (sizes.sequences, sizes.own), generator=generator).tolist()
    return [[*shared, *each] for each in own]


@torch.inference_mode()
def with_dynamic_cache(sizes: Sizes) -> Use:
    """Read the prefix, repeat its cache for all sequences, and go on with them as one batch."""
    model, asked = new_model(sizes), prompts(sizes)
    model(torch.tensor([asked[0][: sizes.shared]]), use_cache=False, logits_to_keep=1)
    empty = reset_peak()
    cache = DynamicCache(config=model.config)
    prefix = torch.tensor([asked[0][: sizes.shared]])
    model(prefix, past_key_values=cache, logits_to_keep=1)
    cache.batch_repeat_interleave(sizes.sequences)
    ids = torch.tensor([each[sizes.shared :] for each in asked])
    made = list[Tensor]()
    while len(made) < sizes.made:
        output = model(ids, past_key_values=cache, logits_to_keep=1)
        made.append(cast(Tensor, output.logits)[:, -1].argmax(-1))
        ids = made[-1][:, None]
    layers: list[Any] = cache.layers
    counted = sum(layer.keys.nbytes + layer.values.nbytes for layer in layers)
    return Use(counted, peak_bytes() - empty, torch.stack(made, 1).tolist())


def with_paged_cache(sizes: Sizes) -> Use:
    """Read the prefix as a sequence; the others find it."""
    model, asked = new_model(sizes), prompts(sizes)
    with torch.inference_mode():
        model(torch.tensor([asked[0][: sizes.shared]]), use_cache=False, logits_to_keep=1)
    blocks = (sizes.shared + sizes.sequences * (sizes.own + sizes.made + 32)) // 16 + 1
    config = paged_config(model, num_blocks=blocks)
    empty = reset_peak()
    with PagedModel(model, PagedAttentionCache(config)) as paged:
        cache = paged.cache
        prefix = cache.allocate_sequence(asked[0][: sizes.shared])
        paged.step([Chunk(prefix, sizes.shared, logits=False)])
        sequences = [cache.allocate_sequence(each) for each in asked]
        chunks = [Chunk(each, cache.length(each) - cache.computed(each)) for each in sequences]
        made = [paged.step(chunks).argmax(-1).tolist()]
        while len(made) < sizes.made:
            for each, token in zip(sequences, made[-1], strict=True):
                cache.extend(each, [token])
            made.append(paged.step([Chunk(each) for each in sequences]).argmax(-1).tolist())
        counted = cache.stats().peak_used * config.block_bytes
    tokens = [list(each) for each in zip(*made, strict=True)]
    return Use(counted, peak_bytes() - empty, tokens)


def reset_peak() -> int:
    """Begin to measure the most memory of this process; return what it has now."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak_bytes() -> int:
    """Return the most resident memory since ``reset_peak``."""
    return _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


WORK: Final[dict[str, Callable[[Sizes], Use]]] = {
    "dynamic": with_dynamic_cache,
    "paged": with_paged_cache,
}


def memory(sizes: Sizes, quick: bool) -> Iterator[Result]:
    """Rows 1 and 2: what sequences that share a prefix take, each cache in a process of its own."""
    peer, ours = (_in_a_process(name, quick) for name in WORK)
    if peer.tokens != ours.tokens:
        raise RuntimeError(f"tokens differ: {peer.tokens} and {ours.tokens}")
    work = f"{sizes.sequences} sequences share {sizes.shared:,} tokens, {sizes.own} + {sizes.made} each"
    for row, what in ((1, "counted"), (2, "resident")):
        theirs, mine = int(getattr(peer, what)), int(getattr(ours, what))
        ratio = mine / max(1, theirs)
        yield Result(
            row=row,
            work=f"{work}: bytes {what}",
            peer=f"{theirs / MIB:,.1f} MiB",
            ours=f"{mine / MIB:,.1f} MiB",
            ratio=ratio,
            ratios=[ratio],
            target=MEMORY_MAX,
            at_least=False,
            unit="bytes",
            peer_samples=[theirs],
            ours_samples=[mine],
        )


def _in_a_process(name: str, quick: bool) -> Use:
    command = [sys.executable, "-m", "bench.paged", "--use", name, *["--quick"][: int(quick)]]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return Use(**json.loads(done.stdout))


def decodes(sizes: Sizes, progress: Callable[[str], None]) -> Iterator[Result]:
    """Row 3: seconds of a token, sequences together and one after the other."""
    model = new_model(sizes)
    generator = torch.Generator().manual_seed(2)
    for batch in sizes.batch:
        asked = torch.randint(3, 999, (batch, sizes.context), generator=generator).tolist()
        needed = sizes.context + (sizes.rounds + 2) * sizes.turn + 16
        config = paged_config(model, num_blocks=batch * (needed // 16 + 1))
        paged = PagedModel(model, PagedAttentionCache(config))
        sequences = [paged.cache.allocate_sequence(each) for each in asked]
        caches = [DynamicCache(config=model.config) for _ in asked]
        for each in sequences:
            paged.step([Chunk(each, sizes.context)])
        paged.close()
        with torch.inference_mode():
            for cache, each in zip(caches, asked, strict=True):
                model(torch.tensor([each]), past_key_values=cache, logits_to_keep=1)
        line = Line(
            3,
            f"{batch} decode of {sizes.context:,} tokens each",
            RATE_MIN if batch >= 8 else None,
            rate,
            _one_by_one(model, caches, sizes.turn),
            _together(paged, sequences, sizes.turn),
        )
        yield compare(line, sizes.rounds, progress)


def _one_by_one(
    model: LlamaForCausalLM, caches: list[DynamicCache], turn: int
) -> Callable[[], float]:
    @torch.inference_mode()
    def run() -> float:
        start = perf_counter()
        for cache in caches:
            token = torch.tensor([[7]])
            for _ in range(turn):
                output = model(token, past_key_values=cache, logits_to_keep=1)
                token = cast(Tensor, output.logits)[:, -1].argmax(-1)[None]
        return (perf_counter() - start) / (turn * len(caches))

    return run


def _together(paged: PagedModel, sequences: list[int], turn: int) -> Callable[[], float]:
    def run() -> float:
        opened = PagedModel(paged.model, paged.cache)
        start, tokens = perf_counter(), [7] * len(sequences)
        for _ in range(turn):
            for sequence, token in zip(sequences, tokens, strict=True):
                opened.cache.extend(sequence, [token])
            tokens = opened.step([Chunk(each) for each in sequences]).argmax(-1).tolist()
        seconds = perf_counter() - start
        opened.close()
        return seconds / (turn * len(sequences))

    return run


def attention(sizes: Sizes, progress: Callable[[str], None]) -> Iterator[Result]:
    """Row 4: one layer's attention of a step, against the reference of kernels/."""
    for batch in sizes.batch:
        config = PagedCacheConfig(1, sizes.heads, sizes.dim, batch * (sizes.shared // 16 + 1))
        cache = PagedAttentionCache(config)
        sequences = [cache.allocate_sequence(sizes.shared) for _ in range(batch)]
        for each in sequences:
            key, value = torch.randn(2, sizes.shared, sizes.heads, sizes.dim)
            cache.append(each, 0, key, value)
        query = torch.randn(batch, 2 * sizes.heads, sizes.dim)
        tables, lengths = cache.block_tables(sequences), cache.context_lens(sequences)
        pages = PagedKV(cache.keys[0], cache.values[0], tables, lengths)
        line = Line(
            4,
            f"attention of {batch} tokens to {sizes.shared:,} each, one layer",
            None,
            duration,
            _timed(paged_decode, query, pages),
            _timed(host_decode, query, pages),
        )
        yield compare(line, sizes.rounds, progress)


def _timed(attend: Callable[..., Tensor], query: Tensor, pages: PagedKV) -> Callable[[], float]:
    def run() -> float:
        start = perf_counter()
        for _ in range(5):
            attend(query, pages)
        return (perf_counter() - start) / 5

    return run


def _progress(text: str) -> None:
    print(f"bench-paged: {text}", file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    """Measure all rows; return 0 also when targets are missed."""
    parser = argparse.ArgumentParser("python -m bench.paged", description="the paged cache")
    parser.add_argument("--threads", type=int, default=1, help="of torch (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: do the rows work?")
    parser.add_argument("--use", choices=WORK, help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path, default=None, help=f"where to write; {RESULTS.name}")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    sizes = QUICK if options.quick else Sizes()
    if options.use is not None:
        print(json.dumps(asdict(WORK[options.use](sizes))))
        return 0
    machine = hardware() | load() | software(PACKAGES)
    results = [
        *memory(sizes, options.quick),
        *decodes(sizes, _progress),
        *attention(sizes, _progress),
    ]
    weights = sum(each.numel() for each in new_model(sizes).parameters()) / 1e6
    machine["model"] = (
        f"Llama, {sizes.layers} layers, hidden {sizes.hidden}, {weights:.0f} M, float32"
    )
    machine["threads of torch"] = str(options.threads)
    machine["rows"] = (
        "1, 2: peer is DynamicCache; 3: tokens/s, peer one at a time; 4: peer is the reference"
    )
    print(markdown(results, machine))
    path = options.json or (None if options.quick else RESULTS)
    if path is not None:
        write(path, results, machine)
    return 0


if __name__ == "__main__":
    sys.exit(main())
