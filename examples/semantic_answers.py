"""Answers to questions that were asked before in other words, and an agent that remembers its steps.

Run it:  python -m examples.semantic_answers [--url respkv://host:port] [--questions 200]

Without a URL it opens an engine of its own in this process. A stream of questions comes in, most of
them paraphrases of earlier ones, as at a help desk. Each is turned into an embedding; if an answer
to a question near enough is kept, it is given, else a "model" is asked, which takes its time. The
same stream is answered without the cache, and every answer is compared with the right one.

The embeddings here are counts of letter groups, hashed: no model has to be downloaded, and
paraphrases that share most words come out near each other. With a real embedding model nothing
else changes.
"""

import argparse
import random
import re
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from zlib import crc32

import numpy

import respkv
from respkv.agents import WorkingMemory
from respkv.client import Client
from respkv.semantic import SemanticCache

DIM = 512
THRESHOLD = 0.5
MODEL_MS = 20.0  # what one answer of the model takes: a real one takes seconds

# Answers, and the ways to ask for each.
TOPICS = {
    "Use the link on the sign-in page.": [
        "how do I reset my password",
        "please reset my password",
        "password reset: how do I do it",
    ],
    "Under Account, Billing.": [
        "where can I download my invoice",
        "download of my invoice, where",
        "my invoice: where to download it",
    ],
    "Until the parcel is packed.": [
        "can I change my delivery address",
        "change the delivery address of my order",
        "my delivery address has to change",
    ],
    "Nine a month.": [
        "what does the premium plan cost",
        "cost of the premium plan",
        "the premium plan: what is the cost",
    ],
    "Four to six days.": [
        "how long does shipping to Norway take",
        "shipping to Norway takes how long",
        "how long is shipping to Norway",
    ],
    "A third off, with a card.": [
        "do you offer student discounts",
        "discounts for a student, do you offer them",
        "student discounts on offer",
    ],
    "Clean the contacts first.": [
        "my headphones do not charge",
        "the headphones will not charge",
        "headphones that do not charge",
    ],
    "Under Account, Plan.": [
        "how do I cancel the subscription",
        "cancel my subscription please",
        "subscription: how to cancel",
    ],
}


@dataclass
class Report:
    """What a run came to. wrong: answers that were another question's."""

    questions: int
    hits: int
    wrong: int
    seconds_with: float
    seconds_without: float
    memory: list[str]

    @property
    def speed_up(self) -> float:
        """How many times quicker the stream was answered with the cache."""
        return self.seconds_without / self.seconds_with


def embed(text: str) -> numpy.ndarray[tuple[int], numpy.dtype[numpy.float32]]:
    """Return an embedding: hashed counts of words and of groups of four letters."""
    vector = numpy.zeros(DIM, numpy.float32)
    for word in re.findall(r"[a-z]+", text.lower()):
        if len(word) > 3:  # what all questions share says nothing
            padded = f" {word} "
            groups = [padded[at : at + 4] for at in range(len(padded) - 3)]
            for group in groups:
                vector[crc32(group.encode()) % DIM] += 1 / len(groups)
            vector[crc32(word.encode()) % DIM] += 1
    return vector


def ask_model(question: str, model_ms: float) -> str:
    """Answer as a model would: slowly, and right."""
    time.sleep(model_ms / 1000)
    return next(answer for answer, ways in TOPICS.items() if question in ways)


def stream(count: int, seed: int) -> list[str]:
    """Return questions as they come in."""
    source = random.Random(seed)
    topics = list(TOPICS.values())
    return [source.choice(source.choice(topics)) for _ in range(count)]


def answer_all(
    questions: Sequence[str], cache: Client, model_ms: float
) -> tuple[int, int, float, list[str]]:
    """Answer a stream with the cache; return hits, wrong answers, seconds, and the agent's memory."""
    hits = wrong = 0
    with (
        SemanticCache(cache, "questions", dim=DIM, threshold=THRESHOLD, ttl_s=3600) as answers,
        WorkingMemory(cache, "help desk", "this morning", ttl_s=3600, max_items=3) as memory,
    ):
        answers.clear()
        memory.clear()
        start = time.perf_counter()
        for question in questions:
            embedding = embed(question)
            hit = answers.get(embedding)
            if hit is None:
                answer = ask_model(question, model_ms)
                answers.put(embedding, answer, metadata={"question": question})
                memory.append("asked the model", question)
            else:
                answer = str(hit.payload)
                hits += 1
            wrong += question not in TOPICS[answer]
        return hits, wrong, time.perf_counter() - start, memory.list("asked the model")


def run(questions: int, url: str = "", *, model_ms: float = MODEL_MS, seed: int = 1) -> Report:
    """Answer a stream of questions with the cache and without."""
    asked = stream(questions, seed)
    start = time.perf_counter()
    for question in asked:
        ask_model(question, model_ms)
    without = time.perf_counter() - start
    with opened(url) as cache:
        hits, wrong, seconds, memory = answer_all(asked, cache, model_ms)
    return Report(questions, hits, wrong, seconds, without, memory)


@contextmanager
def opened(url: str) -> Iterator[Client]:
    """Open a client of a server, or an engine in this process."""
    with Client(url) if url else respkv.open_sync(maxmemory="64mb", prefault=False) as cache:
        yield cache


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the example; return 1 when an answer was another question's."""
    parser = argparse.ArgumentParser(
        prog="semantic_answers", description="Answers kept by meaning."
    )
    parser.add_argument(
        "--url", default="", help="of a server; without it, an engine in this process"
    )
    parser.add_argument("--questions", type=int, default=200)
    parser.add_argument("--model-ms", type=float, default=MODEL_MS, help="of one answer")
    options = parser.parse_args(arguments)
    report = run(options.questions, options.url, model_ms=options.model_ms)
    print(f"questions               {report.questions}")
    print(f"answered from the cache {report.hits} ({report.hits / report.questions:.0%})")
    print(f"wrong answers           {report.wrong}")
    print(f"without the cache       {report.seconds_without:.2f} s")
    print(f"with it                 {report.seconds_with:.2f} s, {report.speed_up:.1f} x")
    print("the agent remembers     " + "; ".join(report.memory))
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
