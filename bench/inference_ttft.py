"""Time to first token and tokens a second, by length of the prompt and by how much of it is stored.

Without and with the cache take turns over the same prompts, so that what disturbs the machine for a
while disturbs both; the figures are medians of the rounds. The prompts of a ratio begin alike, with what
was stored before, and each round has an end of its own that nobody has seen. "Without" is the same model with
transformers' own cache: the whole prompt is computed, the tokens of the answer use its KV. Of a prompt that
is stored to its end the logits are, too: its first token comes of them alone.
"""

import gc
from collections.abc import Iterator
from statistics import median
from typing import Final

from bench.inference_setup import Bench, Prompts, reader
from bench.inference_table import Row
from bench.result import duration
from examples.comparison import Generation
from examples.readers import CachedReader, PlainReader

SLOWER_MAX: Final = 1.05
PART: Final = "first token"
WARM_TOKENS: Final = 192


def first_tokens(bench: Bench) -> Iterator[Row]:
    """Measure every length and ratio."""
    subject, sizes = bench.grid_subject, bench.sizes
    prompts = Prompts(subject)
    for length in sizes.lengths:
        # An engine for each length: no prompt is evicted for those of another.
        with reader(subject, sizes) as cached:
            plain = PlainReader(subject.model)
            _warm(plain, cached, prompts)
            for ratio in sizes.ratios:
                known = prompts.fresh(round(length * ratio))
                if known:
                    cached.answer(known, 1)
                rounds = []
                for number in range(sizes.rounds(length)):
                    bench.progress(f"{length:,} tokens, {ratio:.0%} stored, round {number + 1}")
                    prompt = known + prompts.fresh(length - len(known))
                    rounds.append(_round(plain, cached, prompt, sizes.new_tokens, number))
                yield _row(length, ratio, rounds)


def _warm(plain: PlainReader, cached: CachedReader, prompts: Prompts) -> None:
    """Take what comes once out of the figures, and let the adapter learn how quick the model is."""
    for _ in range(2):
        prompt = prompts.fresh(WARM_TOKENS)
        for _ in range(2):
            plain.answer(prompt, 2)
            cached.answer(prompt, 2)


def _round(
    plain: PlainReader,
    cached: CachedReader,
    prompt: list[int],
    new_tokens: int,
    number: int,
) -> tuple[Generation, Generation]:
    gc.collect()
    # Whoever comes second finds the weights in the processor's cache: they change places.
    if number % 2:
        with_cache = cached.answer(prompt, new_tokens)
        return plain.answer(prompt, new_tokens), with_cache
    return plain.answer(prompt, new_tokens), cached.answer(prompt, new_tokens)


def _row(length: int, ratio: float, rounds: list[tuple[Generation, Generation]]) -> Row:
    plain = [each.first_token_s for each, _ in rounds]
    cached = [each.first_token_s for _, each in rounds]
    rates = [
        f"{len(each[0].new_tokens) / median(one.total_s for one in each):.1f}"
        for each in zip(*rounds, strict=True)
    ]
    differing = sum(one.new_tokens != other.new_tokens for one, other in rounds)
    reused = median(each.tokens_reused for _, each in rounds)
    note = (
        f"{reused:,.0f} tokens reused; {rates[0]} and {rates[1]} tokens/s of"
        f" {len(rounds[0][0].new_tokens)}; {len(rounds)} rounds; all computed by transformers"
    )
    if differing:
        note += f"; the tokens of {differing} rounds DIFFER"
    return Row(
        PART,
        f"{length:,} tokens, {ratio:.0%} stored",
        duration(median(plain)),
        duration(median(cached)),
        median(cached) / median(plain),
        goal=SLOWER_MAX,
        is_at_most=True,
        note=note,
        plain_samples=plain,
        cached_samples=cached,
    )
