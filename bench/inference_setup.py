"""What the parts of the benchmark of inference measure with: sizes, models, engines."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from random import Random
from typing import Any, Final

import respkv
from examples import (
    agentic_workflow,
    multi_turn_chat,
    repeated_prompts,
    shared_document,
)
from examples.readers import CachedReader
from examples.shared_prompt import documentation
from examples.small_model import SmallModel, made
from respkv.integrations.huggingface import CacheConfig, KVCacheAdapter

MIB: Final = 1 << 20
SEED: Final = 6


@dataclass(frozen=True, slots=True)
class Sizes:
    """How much is measured.

    layers, hidden: of the model of the demos and of concurrent requests; ``grid_`` of the one that
    reads prompts of all lengths. memory, prefault: of the engine in this process.
    lengths, ratios: of prompts, and of them stored before. rounds_max: of a prompt, the fewer the
    longer it is. new_tokens: of an answer.
    hit_lengths, hit_rounds: of full hits. concurrencies: requests at a time, and how many in all.
    """

    layers: int = 6
    hidden: int = 384
    grid_layers: int = 4
    grid_hidden: int = 256
    memory: str = "1gb"
    prefault: bool = True
    lengths: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192)
    ratios: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    rounds_max: int = 11
    rounds_min: int = 3
    new_tokens: int = 16
    hit_lengths: tuple[int, ...] = (512, 2048, 8192)
    hit_rounds: int = 25
    concurrencies: tuple[tuple[int, int], ...] = ((1, 20), (10, 60), (100, 200))
    context_tokens: int = 470
    batch_rounds: int = 5
    policies: tuple[str, ...] = ("lru", "lfu", "arc", "s3fifo", "survival")
    documents: int = 40
    asked: int = 160
    document_tokens: int = 256
    repeated: repeated_prompts.Workload = field(default_factory=repeated_prompts.Workload)
    agentic: agentic_workflow.Workload = field(default_factory=agentic_workflow.Workload)
    document: shared_document.Workload = field(default_factory=shared_document.Workload)
    chat: multi_turn_chat.Workload = field(default_factory=multi_turn_chat.Workload)

    def rounds(self, length: int) -> int:
        """Return how many rounds prompts of a length are measured in."""
        return max(self.rounds_min, min(self.rounds_max, self.rounds_max * 1024 // length))


QUICK: Final = Sizes(
    layers=2,
    hidden=64,
    grid_layers=2,
    grid_hidden=64,
    memory="64mb",
    prefault=False,
    lengths=(96,),
    ratios=(0.0, 0.5, 1.0),
    rounds_max=1,
    rounds_min=1,
    new_tokens=2,
    hit_lengths=(96,),
    hit_rounds=2,
    concurrencies=((4, 8),),
    context_tokens=40,
    batch_rounds=1,
    policies=("lru", "survival"),
    documents=4,
    asked=8,
    document_tokens=32,
    repeated=repeated_prompts.Workload(2, 2, 70, 2),
    agentic=agentic_workflow.Workload(70, 3, 8, 2),
    document=shared_document.Workload(70, 2, 2),
    chat=multi_turn_chat.Workload(32, 2, 4),
)


@dataclass(frozen=True)
class Bench:
    """One run of the benchmark."""

    sizes: Sizes
    progress: Callable[[str], None]

    @cached_property
    def subject(self) -> SmallModel:
        """The model of the demos and of concurrent requests."""
        return made(self._text, layers=self.sizes.layers, hidden=self.sizes.hidden)

    @cached_property
    def grid_subject(self) -> SmallModel:
        """The model that reads prompts of all lengths."""
        return made(self._text, layers=self.sizes.grid_layers, hidden=self.sizes.grid_hidden)

    @cached_property
    def _text(self) -> str:
        return "\n\n".join(path.read_text() for path in documentation())


class Prompts:
    """Prompts that nobody has seen before, unless they are to begin alike."""

    def __init__(self, subject: SmallModel) -> None:
        self._words = subject.words
        self._random = Random(SEED)

    def fresh(self, length: int) -> list[int]:
        """Return so many tokens of the text, each sentence of it out of place."""
        return self._random.choices(self._words, k=length)


@contextmanager
def reader(subject: SmallModel, sizes: Sizes, **settings: Any) -> Iterator[CachedReader]:
    """Open an engine in this process and a reader over it, as they come: with all defaults."""
    defaults: dict[str, Any] = {"maxmemory": sizes.memory, "prefault": sizes.prefault}
    with (
        respkv.open_sync(**(defaults | settings)) as engine,
        KVCacheAdapter(subject.model, cache_config=CacheConfig(cache=engine)) as adapter,
    ):
        yield CachedReader(adapter, subject.model)
