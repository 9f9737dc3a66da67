"""Many questions about one document, which is read once.

    python -m examples.shared_document

The document is stored when it arrives, before anyone asks. Each question then finds the whole of
it, to the token: also what does not fill a page. With ``--questions`` there are more of them, each
about the same document. The exit code is 1 when any token came out different with the cache.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from examples.comparison import Comparison, milliseconds
from examples.demo import options_of, run_demo
from examples.readers import CachedReader, PlainReader, compare
from examples.small_model import SmallModel

QUESTIONS = (
    "what is a page, and what is its key?",
    "what becomes of a page that nobody asks for?",
    "how does a worker on the same host read a page?",
    "what is there again after a restart?",
    "which codecs lose nothing?",
    "who may see the pages of a tenant?",
)


@dataclass(frozen=True, slots=True)
class Workload:
    """A document of ``document_tokens`` tokens, and how many questions are asked about it."""

    document_tokens: int = 470
    questions: int = 4
    new_tokens: int = 8


def run(subject: SmallModel, cached: CachedReader, workload: Workload) -> Comparison:
    """Store the document, then ask, without the cache and with it."""
    comparison = Comparison("Shared document")
    plain = PlainReader(subject.model)
    document = subject.passage(0, workload.document_tokens)
    arrival = cached.answer(document, 1)
    for number in range(workload.questions):
        question = QUESTIONS[number % len(QUESTIONS)]
        if number >= len(QUESTIONS):
            question += f" ({number // len(QUESTIONS) + 1})"
        compare(
            comparison,
            question,
            document + subject.encode(f"\n\nQuestion: {question}\nAnswer:"),
            workload.new_tokens,
            plain=plain,
            cached=cached,
        )
    # What a question shares with the one before it, its first words, is no part of the document.
    reused = sum(min(pair.cached.tokens_reused, len(document)) for pair in comparison.pairs)
    context = len(document) * len(comparison.pairs)
    comparison.context_reused = reused / context
    comparison.facts["document"] = (
        f"{len(document):,} tokens, stored in {milliseconds(arrival.total_s)} when it arrived;"
        f" of {context:,} asked for again, {reused:,} reused: {reused / context:.1%}"
    )
    return comparison


def main(argv: Sequence[str] | None = None) -> int:
    options = options_of(argparse.ArgumentParser(), __doc__, Workload(), argv)
    workload = Workload(options.document_tokens, options.questions, options.new_tokens)
    return run_demo(
        "shared_document", options, lambda subject, cached: run(subject, cached, workload)
    )


if __name__ == "__main__":
    sys.exit(main())
