"""Sequences that begin, fork, are cut short, evicted and freed at random, over a model with a window.

Whatever happened, the logits of a step are those of a model that reads the whole sequence at once.
"""

from random import Random

import pytest
import torch

from respkv.integrations.huggingface.paged_attention import PagedModel, paged_config
from respkv.paged import Chunk, OutOfBlocks, PagedAttentionCache
from tests.integrations.huggingface.models import prompt, tiny_model

STARTS = [prompt(30, seed=each) for each in range(3)]


class Lives:
    """Some sequences over one model, and what may happen to them."""

    def __init__(self, random: Random, paged: PagedModel) -> None:
        self.random, self.paged, self.cache = random, paged, paged.cache
        self.live: list[int] = []
        self.checked = self.refused = 0

    def begin(self) -> None:
        shared = self.random.choice(STARTS)[: self.random.randint(1, 30)]
        tokens = prompt(self.random.randint(0, 10), seed=self.random.randint(0, 3), like=shared)
        share, salt = self.random.random() < 0.8, self.random.choice(["", "a"])
        if len(self.live) < 6:
            self.live.append(self.cache.allocate_sequence(tokens, share=share, salt=salt))

    def fork(self) -> None:
        self.live.append(self.cache.fork(self.random.choice(self.live)))

    def cut(self) -> None:
        sequence = self.random.choice(self.live)
        self.cache.truncate(sequence, self.random.randint(1, self.cache.length(sequence)))

    def end(self) -> None:
        sequence = self.live.pop(self.random.randrange(len(self.live)))
        self.cache.free_sequence(sequence, keep=self.random.random() < 0.8)

    def step(self) -> None:
        chunks: list[Chunk] = []
        for each in self.random.sample(self.live, self.random.randint(1, len(self.live))):
            if self.random.random() < 0.5:
                self.cache.extend(each, prompt(self.random.randint(1, 4)))
            if left := self.cache.length(each) - self.cache.computed(each):
                count = self.random.choice((1, left, self.random.randint(1, left)))
                chunks.append(Chunk(each, count, self.random.random() < 0.8))
        try:
            rows = self.paged.step(chunks) if chunks else torch.empty(0)
        except OutOfBlocks:
            self.refused += 1
            return self.end()
        wanted = [chunk.sequence for chunk in chunks if chunk.logits]
        for each, row in zip(wanted, rows, strict=True):
            tokens = self.cache.tokens(each)
            assert tokens is not None
            ids = torch.tensor([tokens[: self.cache.computed(each)]])
            with torch.inference_mode():
                want = self.paged.model(ids, use_cache=False).logits[0, -1]
            torch.testing.assert_close(row, want, atol=2e-5, rtol=2e-5)
            self.checked += 1


@pytest.mark.parametrize("seed", [0, 3])
def test_logits_are_those_of_the_whole_sequence_whatever_happened(seed: int) -> None:
    random, model = Random(seed), tiny_model("mistral", seed=seed)
    config = paged_config(model, num_blocks=random.choice((12, 20)), block_tokens=8)
    with PagedModel(model, PagedAttentionCache(config)) as paged:
        lives = Lives(random, paged)
        for _ in range(80):
            chances = {lives.begin: 5, lives.step: 10, lives.fork: 2, lives.cut: 2, lives.end: 2}
            happening = random.choices(list(chances), list(chances.values()))[0]
            if lives.live or happening == lives.begin:
                happening()
            paged.cache.blocks.check()
        assert lives.checked > 20, f"seed {seed}"
        for each in lives.live:
            paged.cache.free_sequence(each)
        paged.cache.clear()
        assert paged.cache.stats().blocks_free == config.num_blocks
