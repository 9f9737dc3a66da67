"""The same few prompts again and again, as a batch job or a popular question asks them.

    python -m examples.repeated_prompts

Each prompt is asked several times. The first time it is computed, and its KV and the logits of its
end are stored; from then on the first token comes without any forward pass of the model. What an
answer takes after that is the same with and without the cache, so the shorter the answers, the more
there is to be gained. The exit code is 1 when any token came out different with the cache.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from examples.comparison import Comparison
from examples.demo import options_of, run_demo
from examples.readers import CachedReader, PlainReader, compare
from examples.small_model import SmallModel

SEED = 6


@dataclass(frozen=True, slots=True)
class Workload:
    """Prompts, each of ``prompt_tokens`` tokens and asked ``times`` times, in a mixed order."""

    prompts: int = 3
    times: int = 5
    prompt_tokens: int = 1000
    new_tokens: int = 8

    def order(self) -> list[int]:
        """Return the numbers of the prompts in the order in which they are asked."""
        order = [number for number in range(self.prompts) for _ in range(self.times)]
        random.Random(SEED).shuffle(order)
        return order


def run(subject: SmallModel, cached: CachedReader, workload: Workload) -> Comparison:
    """Ask every prompt as often as the workload says, without the cache and with it."""
    comparison = Comparison("Repeated prompts")
    plain = PlainReader(subject.model)
    asked = set[int]()
    for number in workload.order():
        compare(
            comparison,
            f"prompt {number + 1}, {'again' if number in asked else 'first'}",
            subject.passage(number, workload.prompt_tokens),
            workload.new_tokens,
            plain=plain,
            cached=cached,
            is_first=number not in asked,
        )
        asked.add(number)
    return comparison


def main(argv: Sequence[str] | None = None) -> int:
    options = options_of(argparse.ArgumentParser(), __doc__, Workload(), argv)
    workload = Workload(options.prompts, options.times, options.prompt_tokens, options.new_tokens)
    return run_demo(
        "repeated_prompts", options, lambda subject, cached: run(subject, cached, workload)
    )


if __name__ == "__main__":
    sys.exit(main())
