"""What a full hit costs, against a copy of its bytes.

The copy is between two buffers that are in memory already, by one thread. A hit looks up the prompt
in the engine of this process, copies the KV of all its tokens to where the model works on it, and
fetches the logits of its end: ``match``, ``load`` and ``logits`` of ``PromptPages``, into buffers that
are there. That is what the goal is about.

The whole way of ``generate`` is shown beside it, with all that transformers does. Its first token comes of
the logits alone; the KV is loaded when the second one is computed, so both are shown.
"""

from collections.abc import Iterator
from statistics import median
from time import perf_counter
from typing import Final

import torch

from bench.inference_setup import MIB, Bench, Prompts, reader
from bench.inference_table import Row
from bench.result import duration
from examples.comparison import Generation
from examples.readers import CachedReader, PlainReader
from respkv.client.sequences import token_bytes

PART: Final = "full hit"
COPIES, MORE_S = 1.3, 0.002
COMPUTED: Final = 3  # rounds of what is so much slower
REPEAT_MAX_S: Final = 0.003


def full_hits(bench: Bench) -> Iterator[Row]:
    """Measure full hits of several lengths."""
    subject, sizes = bench.grid_subject, bench.sizes
    prompts = Prompts(subject)
    for length in sizes.hit_lengths:
        with reader(subject, sizes) as cached:
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
    copies, hits = list[float](), list[float]()
    answers, computed = list[Generation](), list[Generation]()
    cached.answer(prompt, 2)
    for number in range(bench.sizes.hit_rounds):
        bench.progress(f"full hit of {len(prompt):,} tokens, round {number + 1}")
        start = perf_counter()
        target.copy_(source)
        copied = perf_counter()
        tokens = token_bytes(prompt)
        match = pages.match(tokens, logits=True)
        loaded = pages.load(tokens, into, match=match)
        logits = pages.logits(tokens, match=match)
        done = perf_counter()
        assert loaded == len(prompt), f"{loaded} of {len(prompt)} tokens were loaded"
        assert logits is not None, "the logits of the prompt's end were not there"
        copies.append(copied - start)
        hits.append(done - copied)
        answers.append(cached.answer(prompt, 2))
        if number < COMPUTED:
            computed.append(plain.answer(prompt, 2))
    goal = COPIES * median(copies) + MORE_S
    what = f"{len(prompt):,} tokens, {nbytes / MIB:.0f} MiB"
    plain_first = [each.first_token_s for each in computed]
    yield Row(
        PART,
        f"match, load, logits: {what}",
        f"{duration(median(plain_first))} computed",
        duration(median(hits)),
        median(hits),
        "ms",
        goal,
        is_at_most=True,
        note=f"the goal is {COPIES} x a copy ({duration(median(copies))}) + 2 ms",
        plain_samples=copies,
        cached_samples=hits,
    )
    both = {
        "first": (plain_first, [each.first_token_s for each in answers]),
        "second": ([each.total_s for each in computed], [each.total_s for each in answers]),
    }
    for name, (without, with_cache) in both.items():
        yield Row(
            PART,
            f"generate to the {name} token: {what}",
            duration(median(without)),
            duration(median(with_cache)),
            median(without) / median(with_cache),
            note="against computing the prompt",
            plain_samples=without,
            cached_samples=with_cache,
        )
