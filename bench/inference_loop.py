"""Requests that come together: one model loop for all of them.

Everything goes through the same loop, which computes a batch of all that are under way. What differs is
said in each row: whether prefixes are looked up and stored, whether a KV cache is kept at all, and
whether the next request is sent before the last one is answered.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Final

import respkv
from bench.inference_setup import Bench, Prompts
from bench.inference_table import Row
from bench.result import duration
from respkv.batching.model_loop import Limits, ModelLoop
from respkv.batching.request import Generation, GenerationRequest
from respkv.batching.ticket import Ticket
from respkv.integrations.huggingface import PromptPages
from respkv.integrations.huggingface.paged_runner import PagedRunner

PART: Final = "concurrent"
BATCH, BATCH_MIN = 8, 1.5
CONCURRENT, CONCURRENT_MIN = 10, 2.73
QUESTION_TOKENS: Final = 16
BLOCK_BYTES: Final = 256 << 20


@dataclass(frozen=True, slots=True)
class Answers:
    """What a number of requests came to, in ``took_s`` all together."""

    generations: list[Generation]
    took_s: float

    @property
    def tokens_per_s(self) -> float:
        return sum(len(each.tokens) for each in self.generations) / self.took_s


def concurrent(bench: Bench) -> Iterator[Row]:
    """Latencies under load, then the batch against one at a time and against no KV cache."""
    for concurrency, count in bench.sizes.concurrencies:
        yield from _latencies(bench, concurrency, count)
    yield _batching(bench)
    yield from _against_no_cache(bench)


@contextmanager
def running_loop(bench: Bench) -> Iterator[ModelLoop]:
    """Run a model loop over an engine in this process."""
    with (
        respkv.open_sync(maxmemory=bench.sizes.memory, prefault=bench.sizes.prefault) as engine,
        PromptPages(engine, model=bench.subject.model) as pages,
        ModelLoop(
            PagedRunner(bench.subject.model, pages=pages, memory_bytes=BLOCK_BYTES),
            limits=Limits(sequences_max=32, waiting_max=256),
        ) as loop,
    ):
        yield loop


def _latencies(bench: Bench, concurrency: int, count: int) -> Iterator[Row]:
    """Keep so many requests under way, all about one context, without prefixes and with them."""
    requests = _requests(bench, count, shared=True)
    answers = {}
    for is_cached in (False, True):
        with running_loop(bench) as loop:
            name = "with" if is_cached else "without"
            bench.progress(f"{concurrency} requests at a time, {count} in all, {name} prefixes")
            ask(loop, _requests(bench, 1, shared=True), 1, prefixes=is_cached)
            answers[is_cached] = ask(loop, requests, concurrency, prefixes=is_cached)
    same = [each.tokens for each in answers[False].generations] == [
        each.tokens for each in answers[True].generations
    ]
    for what in ("ttft_s", "total_s"):
        plain, cached = (
            [float(getattr(each.timings, what)) for each in answers[is_cached].generations]
            for is_cached in (False, True)
        )
        words = "first token" if what == "ttft_s" else "last token"
        yield Row(
            PART,
            f"{concurrency} at a time: {words}, p50 / p95 / p99",
            _percentiles(plain),
            _percentiles(cached),
            median(plain) / median(cached),
            note=f"{answers[False].tokens_per_s:.1f} and {answers[True].tokens_per_s:.1f} tokens/s;"
            f" {count} requests about {bench.sizes.context_tokens} tokens; the same loop, nothing"
            f" looked up or shared{'' if same else '; some tokens DIFFER'}",
            plain_samples=plain,
            cached_samples=cached,
        )


def _batching(bench: Bench) -> Row:
    """Compare requests sent together with each sent when the one before it is answered."""
    single, batched = list[float](), list[float]()
    with running_loop(bench) as loop:
        prompts = _requests(bench, BATCH, shared=False)
        ask(loop, prompts, BATCH, prefixes=False)
        for number in range(bench.sizes.batch_rounds):
            bench.progress(f"{BATCH} requests together and one by one, round {number + 1}")
            one_by_one = ask(loop, prompts, 1, prefixes=False)
            together = ask(loop, prompts, BATCH, prefixes=False)
            single.append(1 / one_by_one.tokens_per_s)
            batched.append(1 / together.tokens_per_s)
    new_tokens = bench.sizes.new_tokens * 2
    return Row(
        PART,
        f"{BATCH} requests together",
        f"{1 / median(single):.1f} tokens/s",
        f"{1 / median(batched):.1f} tokens/s",
        median(single) / median(batched),
        goal=BATCH_MIN,
        note=f"against one at a time in the same loop; prompts of {QUESTION_TOKENS * 2} tokens,"
        f" answers of {new_tokens}, no prefix cache in either",
        plain_samples=single,
        cached_samples=batched,
    )


def _against_no_cache(bench: Bench) -> Iterator[Row]:
    """Compare with a model that keeps nothing: long prompts about one context, and short ones."""
    for shared, prompt_tokens in (
        (True, bench.sizes.context_tokens + QUESTION_TOKENS),
        (False, 2 * QUESTION_TOKENS),
    ):
        requests = _requests(bench, CONCURRENT, shared=shared)
        answers = dict[str, Answers]()
        with running_loop(bench) as loop:
            bench.progress(f"{CONCURRENT} requests of {prompt_tokens} tokens, no KV cache")
            none = ask(loop, requests, CONCURRENT, use_cache=False, prefixes=False)
            bench.progress(f"{CONCURRENT} requests of {prompt_tokens} tokens, KV cache")
            answers["nothing looked up"] = ask(loop, requests, CONCURRENT, prefixes=False)
            if shared:
                ask(loop, _requests(bench, 1, shared=True), 1, prefixes=True)
                answers["prefixes from the cache"] = ask(loop, requests, CONCURRENT, prefixes=True)
        new_tokens = requests[0][1]
        for words, each in answers.items():
            yield Row(
                PART,
                f"{CONCURRENT} requests of {prompt_tokens} tokens at once, {words}",
                f"{none.tokens_per_s:.2f} tokens/s",
                f"{each.tokens_per_s:.2f} tokens/s",
                each.tokens_per_s / none.tokens_per_s,
                goal=CONCURRENT_MIN,
                note="against no KV cache at all (use_cache=False: the whole sequence is computed"
                f" for every new token) in the same loop; answers of {new_tokens}",
            )


def ask(
    loop: ModelLoop,
    prompts: Sequence[tuple[list[int], int]],
    concurrency: int,
    *,
    prefixes: bool,
    use_cache: bool = True,
) -> Answers:
    """Send prompts, never more than so many at a time; return all answers, in their order."""
    start = time.perf_counter()
    generations, tickets = list[Generation](), list[Ticket]()
    for tokens, new_tokens in prompts:
        if len(tickets) - len(generations) == concurrency:
            generations.append(tickets[len(generations)].result())
        request = GenerationRequest(
            tokens=tokens,
            max_new_tokens=new_tokens,
            use_cache=use_cache,
            use_prefix_cache=prefixes,
        )
        tickets.append(loop.submit(request))
    for ticket in tickets[len(generations) :]:
        generations.append(ticket.result())
    return Answers(generations, time.perf_counter() - start)


def _requests(bench: Bench, count: int, *, shared: bool) -> list[tuple[list[int], int]]:
    """Return prompts and how long their answers are to be: about one context, or about nothing."""
    prompts, new_tokens = Prompts(bench.subject), bench.sizes.new_tokens
    if not shared:
        return [(prompts.fresh(2 * QUESTION_TOKENS), 2 * new_tokens) for _ in range(count)]
    context = bench.subject.passage(0, bench.sizes.context_tokens)
    return [(context + prompts.fresh(QUESTION_TOKENS), new_tokens) for _ in range(count)]


def _percentiles(samples: list[float]) -> str:
    cuts = quantiles(samples, n=100, method="inclusive")
    return " / ".join(duration(cuts[number - 1]) for number in (50, 95, 99))
