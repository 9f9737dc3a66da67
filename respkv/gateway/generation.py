"""From a prepared prompt to pieces of text: tickets of the model loop, read side by side.

Whatever ends a request (its last token, a stop string, an error, a client that went away) ends all
its tickets: they are submitted together and cancelled together.
"""

import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import anyio

from respkv.batching.model_loop import ModelLoop
from respkv.batching.request import (
    BadRequest,
    GenerationFailed,
    GenerationRequest,
    LoopClosed,
    TokenEvent,
)
from respkv.batching.ticket import Ticket
from respkv.errors import Busy
from respkv.gateway.failures import Refused, unavailable
from respkv.gateway.outputs import FinishReason
from respkv.gateway.text import Decode, Detokenizer, StopStrings

OnText = Callable[["Answer", str], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be generated: requests to the model loop, and where their text ends.

    requests:   one for each answer, in the order in which the client counts them: those to the first
                prompt, num_answers of them, then those to the second.
    started:    when the request came in, by time.perf_counter; tokenize_s: of it, for tokenizing.
    """

    requests: Sequence[GenerationRequest]
    stops: Sequence[str]
    started: float
    tokenize_s: float
    num_answers: int = 1

    @property
    def prompt_tokens(self) -> int:
        """The tokens of all prompts, each counted once."""
        return sum(len(each.tokens) for each in self.requests[:: self.num_answers])


@dataclass(slots=True)
class Answer:
    """One answer as far as it has come. finish_reason: None until its end."""

    index: int
    request: GenerationRequest
    text: str = ""
    num_tokens: int = 0
    finish_reason: FinishReason | None = None
    tokens_saved: int = 0
    queue_s: float = 0.0
    lookup_s: float = 0.0
    first_s: float = 0.0  # when the first token was there, by time.perf_counter
    last_s: float = 0.0


@dataclass(slots=True)
class Generation:
    """The answers to one request, while they come and afterwards."""

    loop: ModelLoop
    job: Job
    decode: Decode
    retry_after_s: int
    answers: list[Answer] = field(default_factory=list)

    @property
    def new_tokens(self) -> int:
        """The tokens of all answers so far."""
        return sum(each.num_tokens for each in self.answers)

    @property
    def tokens_saved(self) -> int:
        """The tokens of the prompts that were not computed, each counted once.

        The answers to one prompt share its KV: what the first of them computed is no hit.
        """
        step = self.job.num_answers
        groups = [self.answers[at : at + step] for at in range(0, len(self.answers), step)]
        return sum(min(each.tokens_saved for each in group) for group in groups)

    async def run(self, on_text: OnText) -> None:
        """Read all answers to their ends; each new piece of text goes to ``on_text``.

        The last call for an answer has its finish_reason set, and perhaps no text.
        Raises Refused when the loop does not take the request, or fails it.
        Cancelled: nothing of it is in the loop any more.
        """
        with self.submitted() as tickets:
            await self.read(tickets, on_text)

    @contextmanager
    def submitted(self) -> Iterator[list[Ticket]]:
        """Put the requests into the loop; whatever is left of them is cancelled at the end."""
        tickets: list[Ticket] = []
        try:
            for index, request in enumerate(self.job.requests):
                tickets.append(self._submit(request))
                self.answers.append(Answer(index, request))
            yield tickets
        finally:
            for ticket in tickets:
                ticket.cancel()

    async def read(self, tickets: Sequence[Ticket], on_text: OnText) -> None:
        """Read submitted tickets to their ends, as ``run`` does."""
        failures: list[Refused] = []

        async def read_one(answer: Answer, ticket: Ticket) -> None:
            try:
                await self._read(answer, ticket, on_text)
            except Refused as failure:
                failures.append(failure)
                group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            for answer, ticket in zip(self.answers, tickets, strict=True):
                group.start_soon(read_one, answer, ticket)
        if failures:
            raise failures[0]

    def _submit(self, request: GenerationRequest) -> Ticket:
        try:
            return self.loop.submit(request)
        except Busy as error:
            raise unavailable("busy", str(error), self.retry_after_s) from error
        except LoopClosed as error:
            raise unavailable(
                "stopping", "the model takes no requests", self.retry_after_s
            ) from error
        except BadRequest as error:
            raise Refused(400, "invalid_request", str(error)) from error

    async def _read(self, answer: Answer, ticket: Ticket, on_text: OnText) -> None:
        pieces = Detokenizer(self.decode, answer.request.tokens)
        stops = StopStrings(self.job.stops)
        try:
            async for event in ticket:
                piece = _text_of(answer, event, pieces, stops)
                if stops.is_found and event.finish_reason is None:
                    ticket.cancel()  # its last event comes soon, and has the timings
                answer.text += piece
                if event.finish_reason is not None:
                    self._note_end(answer, event, is_stopped=stops.is_found)
                if piece or answer.finish_reason is not None:
                    await on_text(answer, piece)
        except GenerationFailed as error:
            raise Refused(500, "generation_failed", str(error)) from error

    def _note_end(self, answer: Answer, event: TokenEvent, *, is_stopped: bool) -> None:
        assert event.timings is not None
        answer.tokens_saved = event.timings.prefix_tokens_saved
        answer.queue_s = event.timings.queue_s
        answer.lookup_s = event.timings.cache_lookup_s
        if is_stopped:
            answer.finish_reason = "stop"
        elif event.finish_reason == "stop" or event.finish_reason == "length":
            answer.finish_reason = event.finish_reason
        else:  # nobody here cancelled it
            raise unavailable("stopping", "the gateway is being stopped", self.retry_after_s)


def _text_of(answer: Answer, event: TokenEvent, pieces: Detokenizer, stops: StopStrings) -> str:
    """Return the text that an event makes certain, and count its token."""
    if stops.is_found:
        return ""
    piece = ""
    if event.token is not None:
        now = time.perf_counter()
        answer.first_s, answer.last_s = answer.first_s or now, now
        answer.num_tokens += 1
        if event.finish_reason != "stop":  # the text of a stop token is none of the answer's
            piece = stops.push(pieces.push(event.token))
    if event.finish_reason is not None and not stops.is_found:
        piece += stops.push(pieces.finish())
        if not stops.is_found:
            piece += stops.finish()
    return piece
