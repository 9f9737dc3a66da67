"""The figures of the four demos: the same workloads, with the same seeds, as examples/ runs them."""

from collections.abc import Iterator
from statistics import median
from typing import Final

from bench.inference_hits import REPEAT_MAX_S
from bench.inference_setup import Bench
from bench.inference_table import Row
from bench.result import duration
from examples import (
    agentic_workflow,
    multi_turn_chat,
    repeated_prompts,
    shared_document,
)
from examples.comparison import Comparison
from examples.readers import PlainReader, cached_reader
from respkv.simple import SimpleKVCache

PART: Final = "demos"
REPEATED_MIN, AGENTIC_MIN = 5.7, 10.0
HITS_MIN, CONTEXT_MIN = 0.973, 0.984
COMPUTED: Final = "each prompt computed in full, the KV of an answer kept while it is made"


def demos(bench: Bench) -> Iterator[Row]:
    """Run all four, and a prompt without any KV cache."""
    yield from _repeated(bench)
    yield from _agentic(bench)
    yield from _document(bench)
    yield from _chat(bench)
    yield _without_kv(bench)


def _repeated(bench: Bench) -> Iterator[Row]:
    workload = bench.sizes.repeated
    bench.progress("repeated prompts")
    with cached_reader(bench.subject.model, None) as cached:
        comparison = repeated_prompts.run(bench.subject, cached, workload)
        comparison.store_s = cached.store_s
    what = (
        f"{workload.prompts} prompts of {workload.prompt_tokens:,} tokens, each"
        f" {workload.times} times, answers of {workload.new_tokens}"
    )
    repeats = [pair.cached.first_token_s for pair in comparison.later]
    plain = [pair.plain.first_token_s for pair in comparison.later]
    yield _answers("repeated prompts: a repeat", comparison, f"{what}; {COMPUTED}", REPEATED_MIN)
    yield Row(
        PART,
        "repeated prompts: first token of an exact repeat",
        duration(median(plain)),
        duration(median(repeats)),
        median(repeats),
        "ms",
        REPEAT_MAX_S,
        is_at_most=True,
        note="on the CPU, all of transformers' generate up to the first token",
        plain_samples=plain,
        cached_samples=repeats,
    )
    yield _everything("repeated prompts: first reads and stores included", comparison)


def _agentic(bench: Bench) -> Iterator[Row]:
    workload = bench.sizes.agentic
    bench.progress("agentic workflow")
    with SimpleKVCache(max_size_gb=0.25) as cache:
        comparison = agentic_workflow.run(bench.subject, cache, workload)
    what = (
        f"{workload.steps} steps from {workload.instruction_tokens:,} tokens on, each observes"
        f" {workload.observation_tokens} and says {workload.new_tokens}; SimpleKVCache"
    )
    yield Row(
        PART,
        "agentic workflow: layers looked up that were there",
        cached=f"{comparison.lookup_hits:,} of {comparison.lookups:,}",
        figure=comparison.lookup_hits / comparison.lookups,
        unit="%",
        goal=HITS_MIN,
        note=f"the first step, which can find nothing, is counted; {what}",
    )
    yield _tokens("agentic workflow: prompt tokens reused", comparison)
    yield _answers("agentic workflow: a step", comparison, f"{what}; {COMPUTED}", AGENTIC_MIN)
    yield _everything("agentic workflow: first step and stores included", comparison)


def _document(bench: Bench) -> Iterator[Row]:
    workload = bench.sizes.document
    bench.progress("shared document")
    with cached_reader(bench.subject.model, None) as cached:
        comparison = shared_document.run(bench.subject, cached, workload)
        comparison.store_s = cached.store_s
    what = f"{workload.questions} questions about {workload.document_tokens:,} tokens"
    yield Row(
        PART,
        "shared document: context tokens reused",
        cached=f"{comparison.tokens_reused:,} prompt tokens",
        figure=comparison.context_reused,
        unit="%",
        goal=CONTEXT_MIN,
        note=f"{what}, which were stored once before; that read is not counted",
    )
    yield _answers("shared document: a question", comparison, f"{what}; {COMPUTED}")


def _chat(bench: Bench) -> Iterator[Row]:
    workload = bench.sizes.chat
    bench.progress("multi-turn chat")
    with cached_reader(bench.subject.model, None) as cached:
        comparison = multi_turn_chat.run(bench.subject, cached, workload)
        comparison.store_s = cached.store_s
    what = f"{workload.turns} turns after {workload.system_tokens:,} tokens"
    yield _answers(
        f"multi-turn chat: an answer of {workload.new_tokens}", comparison, f"{what}; {COMPUTED}"
    )
    yield _tokens("multi-turn chat: prompt tokens reused", comparison)


def _without_kv(bench: Bench) -> Row:
    workload = bench.sizes.repeated
    bench.progress("no KV cache at all")
    prompt = bench.subject.passage(0, workload.prompt_tokens)
    none = PlainReader(bench.subject.model, use_cache=False).answer(prompt, workload.new_tokens)
    with cached_reader(bench.subject.model, None) as cached:
        cached.answer(prompt, workload.new_tokens)
        repeats = [cached.answer(prompt, workload.new_tokens) for _ in range(3)]
    took = median(each.total_s for each in repeats)
    return Row(
        PART,
        f"a prompt of {workload.prompt_tokens:,} tokens, answer of {workload.new_tokens}, repeated",
        duration(none.total_s),
        duration(took),
        none.total_s / took,
        note="against no KV cache at all: the whole sequence is computed for every new token",
    )


def _answers(work: str, comparison: Comparison, note: str, goal: float | None = None) -> Row:
    """Return the row of whole answers: those that could hit, first token to last."""
    plain = [pair.plain.total_s for pair in comparison.later]
    cached = [pair.cached.total_s for pair in comparison.later]
    first = f"first token alone {comparison.first_token_speed_up:.1f} x"
    return Row(
        PART,
        f"{work}, all of its answer",
        duration(median(plain)),
        duration(median(cached)),
        comparison.answer_speed_up,
        goal=goal,
        note="; ".join(filter(None, [comparison.failure(), first, note])),
        plain_samples=plain,
        cached_samples=cached,
    )


def _everything(work: str, comparison: Comparison) -> Row:
    plain = sum(pair.plain.total_s for pair in comparison.pairs)
    cached = sum(pair.cached.total_s for pair in comparison.pairs) + comparison.store_s
    return Row(
        PART, work, duration(plain), duration(cached), plain / cached, note="the sum of all answers"
    )


def _tokens(work: str, comparison: Comparison) -> Row:
    return Row(
        PART,
        work,
        cached=f"{comparison.tokens_reused:,}",
        figure=comparison.reused,
        unit="%",
        note="of all prompt tokens, the first prompt's included",
    )
