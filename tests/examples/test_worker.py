"""What makes the demo's comparison honest: equal KV gives equal bits, other KV other tokens."""

from collections.abc import Sequence

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM, MistralConfig

from examples.checkpoint import make_model, make_tokenizer
from examples.worker import Worker, fingerprint, layers

PAGE_TOKENS = 16
PROMPT = list(range(1, 3 * PAGE_TOKENS + 6))


def ignore(done: int, of: int) -> None:
    """Take a report of progress and do nothing."""


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return make_model(vocabulary=256, layers=2, hidden=128)


@pytest.fixture(scope="module")
def worker(model: LlamaForCausalLM) -> Worker:
    with torch.inference_mode():
        return Worker(model, page_tokens=PAGE_TOKENS)


def computed(worker: Worker, tokens: Sequence[int]) -> DynamicCache:
    cache = DynamicCache(config=worker.model.config)
    worker.prefill(tokens, cache, ignore)
    return cache


def with_prefix(worker: Worker, source: DynamicCache, tokens: int, factor: float) -> DynamicCache:
    """Return a cache with the first tokens of another one, multiplied."""
    cache = DynamicCache(config=worker.model.config)
    for index, (key, value) in enumerate(layers(source)):
        cache.update(key[:, :, :tokens] * factor, value[:, :, :tokens] * factor, index)
    return cache


@pytest.mark.parametrize("pages", [0, 1, 2, 3])
def test_a_prefill_from_cached_pages_gives_the_bits_of_a_full_one(
    worker: Worker, pages: int
) -> None:
    with torch.inference_mode():
        full = computed(worker, PROMPT)
        # Another prompt with the same beginning made the pages.
        other = computed(worker, [*PROMPT[: pages * PAGE_TOKENS], *reversed(PROMPT)])
        cache = with_prefix(worker, other, pages * PAGE_TOKENS, 1.0)
        logits = worker.prefill(PROMPT, cache, ignore)
        expected = worker.prefill(PROMPT, DynamicCache(config=worker.model.config), ignore)
    assert torch.equal(logits, expected)
    for (key, value), (full_key, full_value) in zip(layers(cache), layers(full), strict=True):
        assert torch.equal(key, full_key)
        assert torch.equal(value, full_value)


def test_other_kv_gives_other_tokens(worker: Worker) -> None:
    """Else equal tokens would prove nothing."""
    answers = []
    with torch.inference_mode():
        for factor in (1.0, 0.0):
            cache = with_prefix(worker, computed(worker, PROMPT), 2 * PAGE_TOKENS, factor)
            first = int(worker.prefill(PROMPT, cache, ignore).argmax())
            answers.append(worker.decode(first, cache, 8))
    assert answers[0] != answers[1]


def test_the_geometry_is_read_off_the_model(worker: Worker) -> None:
    page = worker.geometry
    assert (page.layers, page.heads, page.dim, page.tokens) == (2, 1, 64, PAGE_TOKENS)
    assert page.dtype == "float32"


def test_one_changed_weight_changes_the_fingerprint() -> None:
    model = make_model(vocabulary=256, layers=1, hidden=64)
    again = make_model(vocabulary=256, layers=1, hidden=64)
    assert fingerprint(model) == fingerprint(again)
    with torch.no_grad():
        again.lm_head.weight[3, 5] += 1
    assert fingerprint(model) != fingerprint(again)


def test_a_model_with_a_sliding_window_is_refused() -> None:
    config = MistralConfig(num_hidden_layers=1, sliding_window=8)
    cache = DynamicCache(config=config)
    cache.update(torch.zeros(1, 1, 4, 8), torch.zeros(1, 1, 4, 8), 0)
    with pytest.raises(ValueError, match="full attention"):
        layers(cache)


def test_the_tokenizer_encodes_what_it_never_saw_and_gives_it_back() -> None:
    tokenizer = make_tokenizer("a page is a page is a page")
    text = "Größe: 3 µs\n\tünseen \x00 🙂"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
