"""An agent with long instructions works in many short steps, its KV kept by name, layer by layer.

    python -m examples.agentic_workflow

Each step sends everything again: instructions, tools, all steps so far and the last observation.
Here the worker keeps the KV itself, through ``SimpleKVCache``: all layers under one name when a step
ends, all layers by that name when the next begins. Nothing is matched, so the worker has to know
which prefix it goes on from, as an agent does. The exit code is 1 when any token came out different
with the cache.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache, DynamicLayer, PreTrainedModel

from examples import small_model
from examples.comparison import Comparison, Generation
from examples.demo import conclude, options_of
from examples.processes import DemoFailed
from examples.readers import PlainReader, compare, timed_generate
from examples.small_model import SmallModel
from respkv.errors import CacheError
from respkv.simple import SimpleKVCache


@dataclass(frozen=True, slots=True)
class Workload:
    """Steps of an agent: what it was told at first, what it observes and says in each step."""

    instruction_tokens: int = 1500
    steps: int = 40
    observation_tokens: int = 16
    new_tokens: int = 4


class AgentReader:
    """A model whose KV after each step lies under the agent's name and the step's number."""

    def __init__(self, model: PreTrainedModel, cache: SimpleKVCache, name: str) -> None:
        self.model = model
        self.cache = cache
        self.name = name
        self.step = 0
        self.store_s = 0.0
        self.lookups = 0
        self.lookup_hits = 0

    def answer(self, tokens: list[int], new_tokens: int) -> Generation:
        start = time.perf_counter()
        past = DynamicCache(config=self.model.config)
        layers = self.cache.get_all_layers(f"{self.name}/{self.step}")
        self.lookups += len(past.layers)
        for layer, (keys, values) in enumerate(layers or []):
            past.update(keys, values, layer)
            self.lookup_hits += 1
        generation = timed_generate(
            self.model.generate, self.model, tokens, new_tokens, past=past, since=start
        )
        self._store(past)
        return generation

    def _store(self, past: DynamicCache) -> None:
        """Keep what the next step goes on from, in place of what this one went on from."""
        start = time.perf_counter()
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = []
        for layer in past.layers:
            if type(layer) is not DynamicLayer or layer.keys is None or layer.values is None:
                raise DemoFailed("only models with full attention in every layer fit in this demo")
            pairs.append((layer.keys, layer.values))
        self.cache.cache_all_layers(f"{self.name}/{self.step + 1}", pairs)
        self.cache.evict(f"{self.name}/{self.step}")
        self.step += 1
        self.store_s += time.perf_counter() - start


def run(subject: SmallModel, cache: SimpleKVCache, workload: Workload) -> Comparison:
    """Let the agent take all its steps without the cache and with it."""
    comparison = Comparison("Agentic workflow")
    plain, agent = PlainReader(subject.model), AgentReader(subject.model, cache, "agent")
    prompt = subject.passage(0, workload.instruction_tokens)
    read = len(prompt)
    for step in range(workload.steps):
        observation = subject.words[read : read + workload.observation_tokens]
        read += len(observation)
        prompt = prompt + observation
        pair = compare(
            comparison,
            f"step {step + 1}",
            prompt,
            workload.new_tokens,
            plain=plain,
            cached=agent,
            is_first=step == 0,
        )
        prompt = prompt + pair.plain.new_tokens
    comparison.store_s = agent.store_s
    comparison.lookups, comparison.lookup_hits = agent.lookups, agent.lookup_hits
    comparison.facts["layers"] = (
        f"{agent.lookup_hits:,} of {agent.lookups:,} looked up were there:"
        f" {agent.lookup_hits / agent.lookups:.1%}"
    )
    return comparison


def main(argv: Sequence[str] | None = None) -> int:
    options = options_of(argparse.ArgumentParser(), __doc__, Workload(), argv)
    workload = Workload(
        options.instruction_tokens, options.steps, options.observation_tokens, options.new_tokens
    )
    try:
        subject = small_model.load(options)
        print(f"{subject.describe()}\n", flush=True)
        with SimpleKVCache(max_size_gb=0.25, url=options.url) as cache:
            comparison = run(subject, cache, workload)
            cache.print_stats()
            print()
    except (DemoFailed, CacheError) as error:
        print(f"agentic_workflow: {error}", file=sys.stderr)
        return 1
    return conclude("agentic_workflow", options, comparison)


if __name__ == "__main__":
    sys.exit(main())
