"""Blocks and pages: what is loaded is what was stored, when it is worth it, and nothing leaks."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from respkv.client import Client
from respkv.integrations.huggingface.paged_pages import PagedPages
from respkv.integrations.huggingface.prompt_pages import PromptPages
from respkv.integrations.huggingface.rates import Rates
from respkv.page import Geometry
from respkv.paged import PagedAttentionCache, PagedCacheConfig

TOKENS = list(range(100, 150))
LOGITS = torch.arange(7.0)


@pytest.fixture
def pages(engine: Client) -> Iterator[PromptPages]:
    engine.command("FLUSHALL")
    shape = Geometry(layers=2, heads=1, dim=4, tokens=8, dtype="float32")
    with PromptPages(engine, geometry=shape, fingerprint=b"x") as running:
        yield running


def new_cache(num_blocks: int = 20) -> PagedAttentionCache:
    return PagedAttentionCache(PagedCacheConfig(2, 1, 4, num_blocks, block_tokens=4))


def numbers(count: int) -> Tensor:
    """Return [2, 2, count, 1, 4]: keys and values of each layer, all different."""
    return torch.arange(2 * 2 * count * 4.0).view(2, 2, count, 1, 4)


def fill(cache: PagedAttentionCache, kv: Tensor) -> int:
    number = cache.allocate_sequence(TOKENS[: kv.shape[2]], limit=0)
    for layer, (key, value) in enumerate(kv):
        cache.append(number, layer, key, value)
    return number


def read(cache: PagedAttentionCache, number: int) -> Tensor:
    runs = cache.runs(number, 0, cache.computed(number))
    sides = [
        torch.stack(
            [torch.cat([run.keys[n] for run in runs]), torch.cat([run.values[n] for run in runs])]
        )
        for n in range(2)
    ]
    return torch.stack(sides)


def stored(pages: PromptPages, *, scattered: bool = False) -> Tensor:
    """Store 50 tokens and their last logits, and return their KV."""
    cache = new_cache()
    if scattered:  # so that its blocks lie in several runs
        others = [cache.allocate_sequence(4) for _ in range(10)]
        for each in others:
            cache.reserve(each, 4)
        for each in others[::2]:
            cache.free_sequence(each)
    traffic = PagedPages(cache, pages, None, 0)
    kv = numbers(50)
    number = fill(cache, kv)
    assert len(cache.runs(number, 0, 50)) > 1 or not scattered
    traffic.store(number, TOKENS, {}, LOGITS)
    cache.free_sequence(number)
    assert traffic.wait()
    assert not traffic.wait()
    cache.clear()
    assert cache.num_free_blocks == (15 if scattered else 20)
    return kv


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize("local", [0, 4, 7, 49])
def test_what_is_stored_is_loaded_behind_what_is_there(
    pages: PromptPages, scattered: bool, local: int
) -> None:
    kv = stored(pages, scattered=scattered)
    cache = new_cache()
    if local:
        cache.free_sequence(fill(cache, kv[:, :, :local]))
    traffic = PagedPages(cache, pages, None, 0)
    number = cache.allocate_sequence(TOKENS)
    assert cache.computed(number) == local
    load = traffic.begin_load(number, TOKENS, {})
    assert load is not None
    assert load.is_whole
    load.run()
    traffic.end_load(number, load)
    assert (load.end, load.has_failed) == (50, False)
    assert load.logits is not None
    assert torch.equal(load.logits, LOGITS)
    assert torch.equal(read(cache, number), kv)


def test_a_prompt_that_goes_on_leaves_a_token_to_compute(pages: PromptPages) -> None:
    stored(pages)
    for tokens, end in (([*TOKENS, 1, 2], 50), (TOKENS[:30], 29)):
        cache = new_cache()
        traffic = PagedPages(cache, pages, None, 0)
        load = traffic.begin_load(cache.allocate_sequence(tokens), tokens, {})
        assert load is not None
        load.run()
        assert (load.end, load.logits) == (end, None)


@pytest.mark.parametrize("were_in_memory", [True, False])
def test_logits_that_are_gone_leave_the_last_token_to_compute_unless_they_came_with_the_match(
    pages: PromptPages, engine: Client, were_in_memory: bool
) -> None:
    kv = stored(pages)
    cache = new_cache()
    traffic = PagedPages(cache, pages, None, 0)
    number = cache.allocate_sequence(TOKENS)
    load = traffic.begin_load(number, TOKENS, {})
    assert load is not None
    assert load.match.logits is not None
    if not were_in_memory:
        load.match = load.match._replace(logits=None)
    engine.command("FLUSHALL")
    pages.store(TOKENS, list(kv.unbind(0)))  # type: ignore[arg-type]
    pages.flush()
    load.run()
    traffic.end_load(number, load)
    assert (load.end, load.has_failed) == (50 if were_in_memory else 49, False)
    assert (load.logits is not None) == were_in_memory


def test_what_is_evicted_after_the_match_has_failed_and_loses_nothing(
    pages: PromptPages, engine: Client
) -> None:
    stored(pages)
    cache = new_cache()
    traffic = PagedPages(cache, pages, None, 0)
    number = cache.allocate_sequence(TOKENS)
    load = traffic.begin_load(number, TOKENS, {})
    assert load is not None
    engine.command("FLUSHALL")
    load.run()
    traffic.end_load(number, load)
    assert (load.end, load.logits, load.has_failed) == (0, None, True)
    assert cache.computed(number) == 0


def test_what_is_computed_faster_is_not_loaded(pages: PromptPages) -> None:
    stored(pages)
    rates = Rates()
    cache = new_cache()
    traffic = PagedPages(cache, pages, rates, 0)
    rates.computed(1000, 1e-4)
    rates.loaded(1, 1.0)
    number = cache.allocate_sequence(TOKENS)
    assert traffic.begin_load(number, TOKENS, {}) is None
    rates.computed(1000, 1e9)
    assert traffic.begin_load(number, TOKENS, {}) is not None


def test_without_blocks_nothing_is_loaded(pages: PromptPages) -> None:
    stored(pages)
    cache = new_cache(num_blocks=5)
    traffic = PagedPages(cache, pages, None, 0)
    assert traffic.begin_load(cache.allocate_sequence(TOKENS), TOKENS, {}) is None
    assert cache.num_free_blocks == 5


def test_a_store_that_is_refused_holds_nothing(pages: PromptPages) -> None:
    cache = new_cache()
    number = fill(cache, numbers(50))
    pages.close()
    traffic = PagedPages(cache, pages, None, 0)
    traffic.store(number, TOKENS, {}, None)
    cache.free_sequence(number)
    assert not traffic.wait()
    cache.clear()
    assert cache.num_free_blocks == 20
