"""What a model loop has done and is doing, as numbers."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoopStats:
    """Counts since the start, and ``running``, ``waiting`` and ``tokens_in_flight`` of now.

    running:                     requests that have memory, those whose KV is being loaded included.
    waiting:                     all others: new ones, and those that had to leave and will come back.
    prefix_hits, prefix_misses:  admitted requests that were spared a token of their prompt, or none.
    prefix_tokens_saved:         those tokens; ``local_tokens_saved`` lay in the model's own blocks.
    prompt_tokens_computed:      tokens of prompts that a step computed, again after a preemption too.
    load_errors:                 times that something cached could not be loaded.
    """

    running: int
    waiting: int
    tokens_in_flight: int
    submitted: int
    finished: int
    cancelled: int
    failed: int
    rejected: int
    preemptions: int
    steps: int
    tokens_generated: int
    prompt_tokens: int
    prompt_tokens_computed: int
    prefix_hits: int
    prefix_misses: int
    prefix_tokens_saved: int
    local_tokens_saved: int
    load_errors: int


@dataclass(slots=True)
class Counts:
    """The counts of LoopStats that the model's thread alone changes."""

    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    steps: int = 0
    tokens_generated: int = 0
    prompt_tokens: int = 0
    prompt_tokens_computed: int = 0
    prefix_hits: int = 0
    prefix_misses: int = 0
    prefix_tokens_saved: int = 0
    local_tokens_saved: int = 0
    load_errors: int = 0
