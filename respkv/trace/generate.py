"""Make a trace: conversations with system prompts and documents in common.

A stand-in for a recorded trace, for tests and first looks; the same seed makes the same trace. Sessions
arrive at random; each starts with one of a few system prompts, some go on with one of many documents,
and both are drawn by a Zipf law, so a few are in nearly all prompts. A turn adds a question; the next
one repeats all of it with the answer. Whether a session goes on is a coin, the pause before it does is
log-normal, as are the lengths.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, count
from math import log

from respkv.trace.format import MOONCAKE_TOKENS, Request, Trace

Segment = tuple[int, int]  # which text, and how many tokens it has


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to make.

    seconds:      in which sessions begin; turns may come later.
    follow_up:    probability of one more turn. gap_s, gap_spread: median pause before it, and the
                  standard deviation of its logarithm.
    documents:    how many there are; document_share of the sessions have one.
    question_tokens, answer_tokens, document_tokens: medians.
    """

    seed: int = 0
    sessions: int = 1000
    seconds: float = 3600.0
    follow_up: float = 0.5
    gap_s: float = 66.0
    gap_spread: float = 1.0
    system_prompts: int = 4
    documents: int = 100
    document_share: float = 0.4
    zipf: float = 1.0
    question_tokens: int = 400
    answer_tokens: int = 250
    document_tokens: int = 4000
    block_tokens: int = MOONCAKE_TOKENS


@dataclass(slots=True)
class _Session:
    segments: list[Segment]
    answers: list[int] = field(default_factory=list)


class _Maker:
    """Draws sessions and cuts their prompts into blocks."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._random = random.Random(plan.seed)
        self._texts = count()
        self._ids: dict[tuple[int, tuple[Segment, ...]], int] = {}
        self._systems = [self._text(plan.question_tokens) for _ in range(plan.system_prompts)]
        self._documents = [self._text(plan.document_tokens) for _ in range(plan.documents)]
        self._system_weights = _zipf(plan.system_prompts, plan.zipf)
        self._document_weights = _zipf(plan.documents, plan.zipf)

    def requests(self) -> list[Request]:
        """Return all requests, in the order in which they come."""
        draw, plan = self._random, self._plan
        found: list[tuple[float, int, _Session, int]] = []
        for _ in range(plan.sessions):
            at_s = draw.uniform(0.0, plan.seconds)
            session = _Session(self._opening())
            turn = 0
            while True:
                session.segments.append(self._text(plan.question_tokens))
                answer = self._text(plan.answer_tokens)
                found.append((at_s, len(found), session, turn))
                session.segments.append(answer)
                session.answers.append(answer[1])
                if draw.random() >= plan.follow_up:
                    break
                at_s += draw.lognormvariate(log(plan.gap_s), plan.gap_spread)
                turn += 1
        found.sort(key=lambda each: each[:2])
        return [self._request(at_s, session, turn) for at_s, _, session, turn in found]

    def _opening(self) -> list[Segment]:
        draw = self._random
        opening: list[Segment] = []
        if self._systems:
            opening += draw.choices(self._systems, cum_weights=self._system_weights)
        if self._documents and draw.random() < self._plan.document_share:
            opening += draw.choices(self._documents, cum_weights=self._document_weights)
        return opening

    def _request(self, at_s: float, session: _Session, turn: int) -> Request:
        # A turn's question and answer are the last two; its prompt ends with its question.
        num_segments = len(session.segments) - 2 * (len(session.answers) - turn) + 1
        prompt = session.segments[:num_segments]
        num_tokens = sum(tokens for _, tokens in prompt)
        # Milliseconds, as the public format has them.
        return Request(
            round(at_s, 3), num_tokens, tuple(self._blocks(prompt)), session.answers[turn]
        )

    def _blocks(self, prompt: Sequence[Segment]) -> list[int]:
        """Name each block by what is in it and the block in front of it."""
        blocks: list[int] = []
        parent, held, room = -1, list[Segment](), self._plan.block_tokens
        for text, tokens in prompt:
            left = tokens
            while left:
                taken = min(left, room)
                left -= taken
                room -= taken
                held.append((text, tokens - left))
                if not room:
                    parent = self._ids.setdefault((parent, tuple(held)), len(self._ids))
                    blocks.append(parent)
                    held, room = [], self._plan.block_tokens
        if held:
            blocks.append(self._ids.setdefault((parent, tuple(held)), len(self._ids)))
        return blocks

    def _text(self, median_tokens: int) -> Segment:
        return next(self._texts), max(
            1, round(self._random.lognormvariate(log(median_tokens), 0.8))
        )


def generate(plan: Plan) -> Trace:
    """Make a trace. The same plan makes the same one."""
    return Trace(f"generated-{plan.seed}", plan.block_tokens, tuple(_Maker(plan).requests()))


def _zipf(count: int, exponent: float) -> list[float]:
    return list(accumulate(1.0 / rank**exponent for rank in range(1, count + 1)))
