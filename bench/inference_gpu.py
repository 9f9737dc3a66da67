"""Time to first token of a model as large as the ones people serve, by the tier its KV comes from.

A Llama with the shape of one of 8 billion weights, random ones, in bfloat16, on a GPU. Its prompts are
computed, and then answered with KV whose pages lie in the gpu tier, in memory or in files. Stored logits
are left out, or the first token would come before any KV is loaded: all of the prompt but its last
token is loaded, and that one is computed.
The engine is in the model's process, as a worker would have it, and each tier has an engine of its own.
The figures of files are of the first read after the engine was opened: later ones find the pages in
memory. That is the system's page cache only where the file system refuses O_DIRECT.

Without a GPU nothing is measured and the reason is said. At quick sizes the same code runs on the
processor, which shows that it runs and nothing else.
"""

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any, Final

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import respkv
from bench.gpu import missing_gpu
from bench.inference_setup import MIB, QUICK, SEED, Bench
from bench.inference_table import Row
from bench.result import duration
from examples.comparison import Generation
from examples.readers import CachedReader, PlainReader
from respkv.integrations.huggingface import CacheConfig, KVCacheAdapter

PART: Final = "gpu"
GIB: Final = 1 << 30


@dataclass(frozen=True, slots=True)
class Shape:
    """The model and the prompts that are measured.

    memory: of the engine, and as much for each tier that is measured: the longest prompt has to fit.
    rounds: a tier and a length.
    """

    hidden: int = 4096
    intermediate: int = 14336
    layers: int = 32
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256
    lengths: tuple[int, ...] = (1024, 4096, 16384, 32768)
    memory: int = 16 * GIB
    page_tokens: int = 256
    rounds: int = 5
    dtype: torch.dtype = torch.bfloat16


LLAMA_8B: Final = Shape()
TINY: Final = Shape(64, 128, 2, 4, 2, 128, (96,), 32 * MIB, 32, 2)
TIERS: Final = {"gpu": "g", "cpu": "c", "nvme": "n"}


def gpu_tiers(bench: Bench) -> Iterator[Row]:
    """Measure each tier against computing, or say why not."""
    is_quick = bench.sizes is QUICK
    if not is_quick and (reason := missing_gpu()):
        bench.progress(f"the part of the GPU was not measured: {reason}")
        yield Row(PART, "a Llama of 8B, prompts of 1,024 to 32,768", note=f"not measured: {reason}")
        return
    device = torch.device("cpu" if is_quick else "cuda")
    shape = TINY if is_quick else LLAMA_8B
    bench.progress("making the model")
    model = make_model(shape, device)
    for length in shape.lengths:
        generator = torch.Generator().manual_seed(SEED + length)
        prompt = torch.randint(shape.vocabulary, (length,), generator=generator).tolist()
        bench.progress(f"{length:,} tokens computed")
        plain = PlainReader(model)
        plain.answer(prompt, 1)
        computed = [_timed(plain.answer, prompt, device) for _ in range(shape.rounds)]
        for tier in TIERS:
            bench.progress(f"{length:,} tokens from {tier}")
            yield _row(shape, model, prompt, tier, computed)


def make_model(shape: Shape, device: torch.device) -> PreTrainedModel:
    """Make the model on its device, with random weights."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2 * max(shape.lengths),
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        eos_token_id=None,
        bos_token_id=None,
        dtype=shape.dtype,
    )
    before = torch.get_default_dtype()
    torch.set_default_dtype(shape.dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(before)
    model.train(False)
    return model


def _row(
    shape: Shape, model: PreTrainedModel, prompt: list[int], tier: str, computed: list[Generation]
) -> Row:
    with tempfile.TemporaryDirectory(prefix="respkv-bench-") as folder:
        if tier == "nvme":
            answers, found = _from_files(shape, model, prompt, Path(folder))
        else:
            answers, found = _from_memory(shape, model, prompt, tier)
    plain = [each.first_token_s for each in computed]
    cached = [each.first_token_s for each in answers]
    reused = min(each.tokens_reused for each in answers)
    note = f"{reused:,} tokens reused, found in {found!r}; against computing the prompt"
    if found.strip(TIERS[tier]):
        note += f"; NOT all of it was in the {tier} tier"
    if any(each.new_tokens != computed[0].new_tokens for each in answers):
        note += "; the token DIFFERS"
    return Row(
        PART,
        f"{len(prompt):,} tokens from the {tier} tier",
        duration(median(plain)),
        duration(median(cached)),
        median(plain) / median(cached),
        note=note,
        plain_samples=plain,
        cached_samples=cached,
    )


def _from_memory(
    shape: Shape, model: PreTrainedModel, prompt: list[int], tier: str
) -> tuple[list[Generation], str]:
    """Answer out of an engine that has the prompt in memory, or has copied it to the gpu tier."""
    settings: dict[str, Any] = {"maxmemory": str(shape.memory), "prefault": shape is not TINY}
    if tier == "gpu":
        device = "cpu" if model.device.type == "cpu" else "cuda:0"
        settings |= {"gpu_bytes": str(shape.memory), "gpu_device": device, "gpu_promote": "first"}
    with _reader(shape, model, settings) as cached:
        cached.answer(prompt, 1)
        for _ in range(3):  # those that are read are copied upwards, in the background
            cached.answer(prompt, 1)
            _wait_for(lambda: set(_found(cached, prompt)) == {TIERS[tier]})
        answers = [_timed(cached.answer, prompt, model.device) for _ in range(shape.rounds)]
        return answers, _found(cached, prompt)


def _from_files(
    shape: Shape, model: PreTrainedModel, prompt: list[int], folder: Path
) -> tuple[list[Generation], str]:
    """Answer out of an engine that was just opened on the files of another."""
    settings: dict[str, Any] = {
        "maxmemory": str(shape.memory),
        "prefault": shape is not TINY,
        "nvme_path": str(folder),
        "nvme_bytes": str(2 * shape.memory),
    }
    with _reader(shape, model, settings) as cached:
        cached.answer(prompt, 1)
    answers, found = [], set[str]()
    for _ in range(shape.rounds):
        with _reader(shape, model, settings) as cached:
            found |= set(_found(cached, prompt))
            answers.append(_timed(cached.answer, prompt, model.device))
    return answers, "".join(sorted(found))


@contextmanager
def _reader(
    shape: Shape, model: PreTrainedModel, settings: dict[str, Any]
) -> Iterator[CachedReader]:
    with ExitStack() as cleanup:
        engine = cleanup.enter_context(respkv.open_sync(**settings))
        config = CacheConfig(
            cache=engine,
            namespace="bench",
            # To hash 16 GB of weights takes longer than all the rest, and there is but one model.
            fingerprint=b"bench",
            page_tokens=shape.page_tokens,
            use_logits=False,
            never_slower=False,
        )
        yield CachedReader(cleanup.enter_context(KVCacheAdapter(model, cache_config=config)), model)


def _found(cached: CachedReader, prompt: list[int]) -> str:
    """Return the letters of the tiers that have the prompt."""
    return "".join(sorted(set(cached.adapter.pages.match(prompt).tiers)))


def _wait_for(is_so: Callable[[], bool], seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not is_so() and time.monotonic() < deadline:
        time.sleep(0.02)


def _timed(
    answer: Callable[[list[int], int], Generation], prompt: list[int], device: torch.device
) -> Generation:
    """Answer with nothing else under way on the device.

    ``generate`` gives its streamer tokens that are on the host: the copy waits for the device.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return answer(prompt, 1)
