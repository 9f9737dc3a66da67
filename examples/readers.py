"""Those who read a prompt and answer it: a plain transformers model, and one with its KV in respkv."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

import respkv
from examples.comparison import Comparison, Generation, Pair
from examples.small_model import prompt_tensor
from respkv.integrations.huggingface import CacheConfig, KVCacheAdapter

MAXMEMORY = "256mb"
PAGE_TOKENS = 64


class Reader(Protocol):
    """Reads prompts."""

    def answer(self, tokens: list[int], new_tokens: int) -> Generation:
        """Generate greedily, and say what it took."""
        ...


class FirstToken(BaseStreamer):
    """Notes when ``generate`` has the first token: it hands over the prompt, then each token."""

    def __init__(self) -> None:
        self.calls = 0
        self.at = 0.0

    def put(self, value: Tensor) -> None:
        self.calls += 1
        if self.calls == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        """Nothing is kept."""


class PlainReader:
    """A model as transformers runs it.

    use_cache: False for a model that keeps no KV at all, and computes the whole sequence for each
    new token.
    """

    def __init__(self, model: PreTrainedModel, *, use_cache: bool = True) -> None:
        self.model = model
        self.use_cache = use_cache

    def answer(self, tokens: list[int], new_tokens: int) -> Generation:
        return timed_generate(
            self.model.generate, self.model, tokens, new_tokens, use_cache=self.use_cache
        )


def timed_generate(
    generate: Any,
    model: PreTrainedModel,
    tokens: list[int],
    new_tokens: int,
    *,
    past: Cache | None = None,
    since: float | None = None,
    use_cache: bool = True,
) -> Generation:
    """Call a ``generate``, the model's or an adapter's, greedily for ``new_tokens``.

    past:  KV of a prefix, found by the caller. since: when the caller began to look for it.
    use_cache: whether the model keeps KV while it answers.
    """
    streamer = FirstToken()
    reused = past.get_seq_length() if past is not None else 0
    prompt = prompt_tensor(tokens, model)
    start = time.perf_counter() if since is None else since
    with torch.inference_mode():
        output = generate(
            input_ids=prompt,
            attention_mask=torch.ones_like(prompt),
            generation_config=greedy(new_tokens, use_cache=use_cache),
            streamer=streamer,
            **({} if past is None else {"past_key_values": past}),
        )
    total_s = time.perf_counter() - start
    new = output[0, len(tokens) :].tolist()
    return Generation(len(tokens), reused, streamer.at - start, total_s, new)


def greedy(new_tokens: int, *, use_cache: bool) -> GenerationConfig:
    """Return the configuration of a greedy answer of exactly so many tokens."""
    return GenerationConfig(  # type: ignore[no-untyped-call]
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=0,
        use_cache=use_cache,
    )


def compare(
    comparison: Comparison,
    label: str,
    tokens: list[int],
    new_tokens: int,
    *,
    plain: Reader,
    cached: Reader,
    is_first: bool = False,
) -> Pair:
    """Let both read the same prompt, one after the other, and note it."""
    pair = Pair(
        label,
        plain.answer(tokens, new_tokens),
        cached.answer(tokens, new_tokens),
        is_first=is_first,
    )
    comparison.pairs.append(pair)
    return pair


class CachedReader:
    """A model with its KV in respkv, through the adapter."""

    def __init__(self, adapter: KVCacheAdapter, model: PreTrainedModel) -> None:
        self.adapter = adapter
        self.model = model
        self.store_s = 0.0

    def answer(self, tokens: list[int], new_tokens: int) -> Generation:
        """Generate greedily, then wait until everything is stored: that time is apart."""
        generation = timed_generate(self.adapter.generate, self.model, tokens, new_tokens)
        start = time.perf_counter()
        self.adapter.flush()
        self.store_s += time.perf_counter() - start
        reused = self.adapter.last.reused_tokens
        return replace(generation, tokens_reused=reused)


@contextmanager
def cached_reader(model: PreTrainedModel, url: str | None) -> Iterator[CachedReader]:
    """Open the cache of a demo: a server's, or one in this process, and a reader over it."""
    with ExitStack() as cleanup:
        engine = url or cleanup.enter_context(respkv.open_sync(maxmemory=MAXMEMORY, prefault=False))
        # How long loading may take is learnt, and a demo is over before much is: it always loads.
        config = CacheConfig(cache=engine, page_tokens=PAGE_TOKENS, never_slower=False)
        adapter = cleanup.enter_context(KVCacheAdapter(model, cache_config=config))
        yield CachedReader(adapter, model)
