"""What a full hit costs, against a copy of its bytes.

The copy is between two buffers that are in memory already, by one thread. A hit looks up the prompt
in the engine of this process, copies the KV of all its tokens to where the model works on it, and
fetches the logits of its end: ``match``, ``load`` and ``logits`` of ``PromptPages``, into buffers that
are there, and then the whole way of ``generate`` to its first token, with all that transformers does.
"""

from collections.abc import Iterator
from statistics import median
from time import perf_counter
from typing import Final

import torch

from bench.inference_setup import MIB, Bench, Prompts, reader
from bench.inference_table import Row
from bench.result import duration
from examples.readers import CachedReader, PlainReader

PART: Final = "full hit"
COPIES, MORE_S = 1.3, 0.002
REPEAT_MAX_S: Final = 0.003


def full_hits(bench: Bench) -> Iterator[Row]:
    """Measure full hits of several lengths."""
    subject, sizes = bench.grid_subject, bench.sizes
    prompts = Prompts(subject)
    for length in sizes.hit_lengths:
        with reader(subject, sizes.memory) as cached:
            prompt = prompts.fresh(length)
            cached.answer(prompt, 1)
            yield from _hits(bench, cached, PlainReader(subject.model), prompt)


def _hits(
    bench: Bench, cached: CachedReader, plain: PlainReader, prompt: list[int]
) -> Iterator[Row]:
    pages = cached.adapter.pages
    page = pages.geometry
    shape = (page.layers, 2, len(prompt), page.heads, page.dim)
    kv = torch.zeros(shape, dtype=getattr(torch, page.dtype))
    into = [(keys, values) for keys, values in kv]
    nbytes = kv.nbytes
    source, target = torch.ones(nbytes, dtype=torch.uint8), torch.ones(nbytes, dtype=torch.uint8)
    copies, hits, firsts, computed = list[float](), list[float](), list[float](), list[float]()
    cached.answer(prompt, 1)
    for number in range(bench.sizes.hit_rounds):
        bench.progress(f"full hit of {len(prompt):,} tokens, round {number + 1}")
        start = perf_counter()
        target.copy_(source)
        copied = perf_counter()
        match = pages.match(prompt)
        loaded = pages.load(prompt, into, match=match)
        logits = pages.logits(prompt)
        done = perf_counter()
        assert loaded == len(prompt), f"{loaded} of {len(prompt)} tokens were loaded"
        assert logits is not None, "the logits of the prompt's end were not there"
        copies.append(copied - start)
        hits.append(done - copied)
        firsts.append(cached.answer(prompt, 1).first_token_s)
        if number < 3:
            computed.append(plain.answer(prompt, 1).first_token_s)
    goal = COPIES * median(copies) + MORE_S
    what = f"{len(prompt):,} tokens, {nbytes / MIB:.0f} MiB"
    note = f"the goal is {COPIES} x a copy ({duration(median(copies))}) + 2 ms"
    for work, samples in (("match, load, logits", hits), ("generate to first token", firsts)):
        yield Row(
            PART,
            f"{work}: {what}",
            f"{duration(median(computed))} computed",
            duration(median(samples)),
            median(samples),
            "ms",
            goal,
            is_at_most=True,
            note=note,
            plain_samples=copies,
            cached_samples=samples,
        )
