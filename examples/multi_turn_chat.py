"""A conversation that grows: every turn sends all turns before it again.

    python -m examples.multi_turn_chat

After each turn the KV of the whole conversation is stored, the answer's included. The next turn
finds all of it and computes what the user added, so the first token takes as long in the tenth turn
as in the second; without the cache it takes longer every time. The exit code is 1 when any token
came out different with the cache.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from examples.comparison import Comparison
from examples.demo import options_of, run_demo
from examples.readers import CachedReader, PlainReader, compare
from examples.small_model import SmallModel

MESSAGES = (
    "Hello! I run eight inference workers, and they all read the same long system prompt.",
    "How do I let them share what one of them has computed?",
    "And when the workers are on different hosts?",
    "The prompts are longer than memory holds. What then?",
    "One of my workers was updated to other weights. Can it read wrong pages?",
    "Thank you. What should I look at first when the hit rate falls?",
)


@dataclass(frozen=True, slots=True)
class Workload:
    """A conversation of ``turns`` turns, after a system prompt of ``system_tokens`` tokens."""

    system_tokens: int = 400
    turns: int = 6
    new_tokens: int = 24


def run(subject: SmallModel, cached: CachedReader, workload: Workload) -> Comparison:
    """Have the conversation without the cache and with it."""
    comparison = Comparison("Multi-turn chat")
    plain = PlainReader(subject.model)
    history = subject.passage(0, workload.system_tokens)
    for turn in range(workload.turns):
        message = MESSAGES[turn % len(MESSAGES)]
        history = history + subject.encode(f"\nUser: {message}\nAssistant:")
        pair = compare(
            comparison,
            f"turn {turn + 1}",
            history,
            workload.new_tokens,
            plain=plain,
            cached=cached,
            is_first=turn == 0,
        )
        # As tokens: the text of an answer does not always give the same tokens again.
        history = history + pair.plain.new_tokens
    return comparison


def main(argv: Sequence[str] | None = None) -> int:
    options = options_of(argparse.ArgumentParser(), __doc__, Workload(), argv)
    workload = Workload(options.system_tokens, options.turns, options.new_tokens)
    return run_demo(
        "multi_turn_chat", options, lambda subject, cached: run(subject, cached, workload)
    )


if __name__ == "__main__":
    sys.exit(main())
