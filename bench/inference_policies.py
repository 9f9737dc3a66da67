"""Eviction policies, one against the other, over the same prompts and too little memory for them.

Documents are asked about again and again, some more often than others, as Zipf's law says, and between
them come prompts that nobody repeats. The engine holds a quarter of what the documents take.
docs/retention.md compares the policies on a trace of production; this is the same question with a
model behind it, so that there are times to first token.
"""

from collections.abc import Iterator
from random import Random
from statistics import mean
from typing import Final

from bench.inference_setup import MIB, SEED, Bench, Prompts, reader
from bench.inference_table import Row
from bench.result import duration

PART: Final = "eviction"
SKEW, ONCE_SHARE, ROOM = 0.9, 0.3, 0.25
QUESTION_TOKENS: Final = 8
ANSWER_LEASE_MS: Final = 50  # what a match found is held only so long: memory is short


def policies(bench: Bench) -> Iterator[Row]:
    """Run the same prompts under every policy."""
    sizes = bench.sizes
    base: tuple[str, float] | None = None
    for name in sizes.policies:
        bench.progress(f"eviction by {name}")
        share, seconds = _run(bench, name)
        base = base or (name, seconds)
        yield Row(
            PART,
            f"policy {name}",
            duration(base[1]),
            duration(seconds),
            share,
            "%",
            note=f"figure: prompt tokens reused; times: the mean first token, without: under"
            f" {base[0]}; {sizes.asked} prompts, {sizes.documents} documents, room for {ROOM:.0%}",
        )


def _run(bench: Bench, policy: str) -> tuple[float, float]:
    """Return the share of prompt tokens reused, and the mean time to first token."""
    sizes, subject = bench.sizes, bench.grid_subject
    config = subject.model.config.get_text_config()
    token_bytes = sizes.grid_layers * 2 * config.num_key_value_heads * config.head_dim * 4
    memory = int(sizes.documents * sizes.document_tokens * token_bytes * ROOM)
    settings = {
        "maxmemory": str(max(memory, 2 * MIB)),
        "maxmemory_policy": policy,
        "answer_lease": ANSWER_LEASE_MS,
    }
    with reader(subject, sizes, **settings) as cached:
        answers = [cached.answer(prompt, 1) for prompt in _prompts(bench)]
    reused = sum(each.tokens_reused for each in answers)
    return (
        reused / sum(each.prompt_tokens for each in answers),
        mean(each.first_token_s for each in answers),
    )


def _prompts(bench: Bench) -> Iterator[list[int]]:
    """Yield the prompts in the order in which they are asked, the same for every policy."""
    sizes, prompts, random = bench.sizes, Prompts(bench.grid_subject), Random(SEED)
    documents = [prompts.fresh(sizes.document_tokens) for _ in range(sizes.documents)]
    weights = [1 / (rank + 1) ** SKEW for rank in range(sizes.documents)]
    for _ in range(sizes.asked):
        if random.random() < ONCE_SHARE:
            yield prompts.fresh(sizes.document_tokens)
        else:
            (document,) = random.choices(documents, weights)
            yield document + prompts.fresh(QUESTION_TOKENS)
