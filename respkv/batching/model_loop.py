"""The thread that owns a model, and the queue in front of it.

Everything that touches the model, its cache and the scheduler happens in one thread, step after
step: take in what came, drop who cancelled, admit, plan, compute, choose tokens, tell them. Other
threads put requests into a bounded line and read tickets; they never wait for a step.
"""

import atexit
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import asdict, dataclass, fields
from functools import partial
from typing import Self

import torch
from torch import Tensor

from respkv.batching.job import Job
from respkv.batching.request import BadRequest, FinishReason, GenerationRequest, LoopClosed
from respkv.batching.runner import Admission, Runner
from respkv.batching.sampling import choose, new_generator
from respkv.batching.scheduler import Scheduler
from respkv.batching.sequence import Sequence
from respkv.batching.stats import Counts, LoopStats
from respkv.batching.ticket import Ticket
from respkv.errors import Busy

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is taken on at once.

    sequences_max:     requests that are computed together.
    waiting_max:       requests that wait for that; one more is refused with Busy.
    step_tokens_max:   tokens of one step: the smaller, the less a long prompt holds up the others.
    prompt_tokens_max, new_tokens_max: of one request; None for what the model and its memory take.
    """

    sequences_max: int = 32
    waiting_max: int = 256
    step_tokens_max: int = 512
    prompt_tokens_max: int | None = None
    new_tokens_max: int | None = None

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if value is not None and value < 1:
                raise ValueError(f"{each.name} {value} must be 1 or more")
        if self.step_tokens_max < self.sequences_max:
            raise ValueError(
                f"step_tokens_max {self.step_tokens_max} must be at least sequences_max "
                f"{self.sequences_max}: a step has one token of each"
            )


class ModelLoop:
    """Serves requests with one model, many at a time, from its construction until ``close``.

    runner: the model and its cache; the loop's thread owns it from now on, and closes it.
    A program that ends without ``close`` closes it then, and what is under way ends as cancelled.
    """

    def __init__(self, runner: Runner, *, limits: Limits | None = None) -> None:
        self.runner = runner
        self.limits = limits or Limits()
        self._scheduler = Scheduler(
            sequences_max=self.limits.sequences_max, step_tokens_max=self.limits.step_tokens_max
        )
        self._counts = Counts()
        self._jobs: dict[Sequence, Job] = {}
        self._by_ticket: dict[Ticket, Job] = {}
        # From here on shared with other threads, under the lock of ``_news``.
        self._news = threading.Condition()
        self._inbox: deque[Job] = deque()
        self._cancelled: deque[Ticket] = deque()
        self._errands: deque[tuple[Callable[[], int], Future[int]]] = deque()
        self._submitted = self._rejected = 0
        self._close_at: float | None = None
        self._process = os.getpid()
        self._crash: BaseException | None = None
        self._is_over = False
        self._thread = threading.Thread(target=self._run, name="respkv-model", daemon=True)
        # An interpreter that ends stops threads where they are, and torch aborts the process then.
        self._at_exit = partial(_close, weakref.ref(self))
        atexit.register(self._at_exit)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether requests are taken: it was neither closed, nor did the model crash.

        Nor is this a process that was forked from its own: no thread goes along there.
        """
        return not self._is_over and self._close_at is None and not self._is_forked

    def submit(self, request: GenerationRequest) -> Ticket:
        """Put a request into the waiting line, from any thread, without waiting.

        Raises BadRequest when it can never be served; Busy when the line is full; LoopClosed.
        """
        sequence = self._checked(request)
        ticket = Ticket(self._cancel)
        job = Job(sequence, ticket, time.perf_counter())
        self._check_process()
        with self._news:
            self._check_open()
            if self._num_waiting() >= self.limits.waiting_max:
                self._rejected += 1
                raise Busy(f"{self._num_waiting()} requests wait already; try again later")
            self._submitted += 1
            sequence.id = self._submitted
            self._inbox.append(job)
            self._news.notify()
        return ticket

    def stats(self) -> LoopStats:
        """Return what was done so far, and what is under way; from any thread.

        Raises LoopClosed in a process that was forked from the loop's.
        """
        self._check_process()
        with self._news:
            submitted, rejected, waiting = self._submitted, self._rejected, self._num_waiting()
        running = [*self._scheduler.running, *self._scheduler.loading]
        return LoopStats(
            running=len(running),
            waiting=waiting,
            tokens_in_flight=sum(len(each.tokens) for each in running),
            submitted=submitted,
            rejected=rejected,
            preemptions=self._scheduler.preemptions,
            **asdict(self._counts),
        )

    def clear(self) -> int:
        """Forget what is kept in the model's memory for later requests only; returns its bytes.

        It waits for the end of a step. Raises LoopClosed.
        """
        done: Future[int] = Future()
        self._check_process()
        with self._news:
            self._check_open()
            self._errands.append((self.runner.clear, done))
            self._news.notify()
        return done.result()

    def close(self, drain_s: float = 0.0) -> None:
        """Take no more requests, end those there are, and close the runner; idempotent.

        drain_s: so long they may take to finish; then they end as cancelled. Of several calls the
                 most impatient one counts.
        Returns when the loop's thread has ended; in a process that was forked, at once.
        """
        if self._is_forked:
            return
        close_at = time.perf_counter() + drain_s
        with self._news:
            self._close_at = min(close_at, self._close_at or close_at)
            self._news.notify()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _checked(self, request: GenerationRequest) -> Sequence:
        """Return the sequence of a request. Raises BadRequest when it can never be served."""
        limits, runner = self.limits, self.runner
        num_prompt, num_new = len(request.tokens), request.max_new_tokens
        for name, value, most in (
            ("a prompt", num_prompt, limits.prompt_tokens_max),
            ("max_new_tokens", num_new, limits.new_tokens_max),
            ("a prompt and its answer", num_prompt + num_new, runner.tokens_max),
        ):
            if most is not None and value > most:
                raise BadRequest(f"{name} of {value} tokens is more than the {most} allowed")
        try:
            sequence = Sequence(request)
        except (TypeError, ValueError) as error:
            raise BadRequest(f"tokens must be integers: {error}") from error
        for token in (min(sequence.tokens), max(sequence.tokens)):
            if not 0 <= token < runner.vocab_size:
                raise BadRequest(f"token {token} is not one of the model's {runner.vocab_size}")
        return sequence

    @property
    def _is_forked(self) -> bool:
        return os.getpid() != self._process

    def _check_process(self) -> None:
        """Raise where nobody would ever answer, and the lock may be held by a thread left behind."""
        if self._is_forked:
            raise LoopClosed(
                f"the model loop runs in process {self._process}, which this one was forked from;"
                " make a loop here"
            )

    def _num_waiting(self) -> int:
        """Return how many requests are computed when there is a place; the lock is held."""
        return len(self._inbox) + len(self._scheduler.waiting)

    def _check_open(self) -> None:
        if self._crash is not None:
            raise LoopClosed(f"the model crashed: {self._crash!r}") from self._crash
        if not self.is_alive:
            raise LoopClosed("the model loop is closed")

    def _cancel(self, ticket: Ticket) -> None:
        if self._is_forked:
            return
        with self._news:
            self._cancelled.append(ticket)
            self._news.notify()

    def _run(self) -> None:
        """Be the model's thread. Whatever ends it, every request is told."""
        try:
            with torch.inference_mode():
                while self._take_news():
                    self._advance()
        except BaseException as error:  # there is nobody above to tell: the requests are told
            logger.exception("the model loop crashed")
            self._crash = error
        with self._news:
            self._is_over = True
            left = [*self._jobs.values(), *self._inbox]
            errands = list(self._errands)
            for each in (self._inbox, self._jobs, self._by_ticket, self._scheduler):
                each.clear()
        for job in left:
            if self._crash is None:
                self._counts.cancelled += 1
                job.ticket.finish(None, "cancelled", job.timings(time.perf_counter()))
            else:
                self._counts.failed += 1
                job.ticket.fail(f"the model crashed: {self._crash!r}", self._crash)
        for _, done in errands:
            done.set_exception(LoopClosed("the model loop is closed"))
        self.runner.close(is_good=self._crash is None)
        atexit.unregister(self._at_exit)

    def _take_news(self) -> bool:
        """Take in what other threads want, waiting for it if there is nothing to do; False: end."""
        with self._news:
            while not (
                self._jobs or self._inbox or self._cancelled or self._errands or self._close_at
            ):
                self._news.wait()
            while self._inbox:  # as one step, for those who count who waits
                job = self._inbox.popleft()
                self._jobs[job.sequence] = self._by_ticket[job.ticket] = job
                self._scheduler.add(job.sequence)
            cancelled = list(self._cancelled)
            self._cancelled.clear()
            close_at = self._close_at
        for ticket in cancelled:
            if ticket in self._by_ticket:  # else it has finished meanwhile
                self._end(self._by_ticket[ticket], None, "cancelled")
        while self._errands:
            errand, done = self._errands[0]
            done.set_result(errand())
            self._errands.popleft()
        return close_at is None or (bool(self._jobs) and time.perf_counter() < close_at)

    def _advance(self) -> None:
        """Admit who can be, and compute one step."""
        for sequence, admission in self._scheduler.admit(self.runner):
            job = self._jobs[sequence]
            self._admitted(job, admission)
            if admission.logits is not None:
                self._choose(admission.logits[None], [job])
        chunks = self._scheduler.plan(self.runner)
        if not chunks:
            return
        logits = self.runner.step(chunks)
        self._counts.steps += 1
        for chunk in chunks:
            self._scheduler.computed(chunk)
            in_prompt = min(chunk.stop, chunk.sequence.num_prompt) - chunk.start
            self._counts.prompt_tokens_computed += max(in_prompt, 0)
        self._choose(logits, [self._jobs[each.sequence] for each in chunks if each.is_last])

    def _admitted(self, job: Job, admission: Admission) -> None:
        job.lookup_s += admission.lookup_s
        counts, request = self._counts, job.sequence.request
        counts.load_errors += admission.failures
        if job.admitted is not None:  # it was preempted, and is back
            return
        job.admitted = time.perf_counter() - job.lookup_s
        job.saved, job.local = admission.computed, admission.local
        counts.prompt_tokens += job.sequence.num_prompt
        counts.prefix_tokens_saved += job.saved
        counts.local_tokens_saved += job.local
        if request.shares:
            counts.prefix_hits += job.saved > 0
            counts.prefix_misses += job.saved == 0

    def _choose(self, logits: Tensor, jobs: list[Job]) -> None:
        """Give each of the jobs its next token, and tell its reader."""
        if not jobs:
            return
        for job in jobs:
            if job.first_token is None:
                job.generator = new_generator(job.sequence.request.sampling, logits.device)
        wishes = [(each.sequence.request.sampling, each.generator) for each in jobs]
        for job, token in zip(jobs, choose(logits, wishes), strict=True):
            sequence, request = job.sequence, job.sequence.request
            if token is None:
                self._fail(job, "the model's logits are no numbers")
                continue
            self._scheduler.chosen(sequence, token)
            self._counts.tokens_generated += 1
            if job.first_token is None:
                job.first_token = time.perf_counter()
            if token in request.stop_tokens:
                self._end(job, token, "stop")
            elif sequence.num_generated == request.max_new_tokens:
                self._end(job, token, "length")
            else:
                job.ticket.push(token)

    def _end(self, job: Job, token: int | None, reason: FinishReason) -> None:
        """Tell the last of a request, and let go of it."""
        if reason == "cancelled":
            self._counts.cancelled += 1
        else:
            self._counts.finished += 1
        timings = job.timings(time.perf_counter())
        was_running = self._forget(job)
        job.ticket.finish(token, reason, timings)
        if was_running:
            self.runner.end(job.sequence, is_good=True)

    def _fail(self, job: Job, message: str) -> None:
        self._counts.failed += 1
        was_running = self._forget(job)
        job.ticket.fail(message)
        if was_running:
            self.runner.end(job.sequence, is_good=False)

    def _forget(self, job: Job) -> bool:
        """Take a job out of the tables; returns whether its sequence has memory."""
        del self._jobs[job.sequence], self._by_ticket[job.ticket]
        return self._scheduler.remove(job.sequence) and job.sequence.request.use_cache


def _close(reference: "weakref.ref[ModelLoop]") -> None:
    loop = reference()
    if loop is not None:
        loop.close()
