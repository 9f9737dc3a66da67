"""Which sequences compute which of their tokens in the next step: a state machine without I/O.

Every sequence has tokens and a count of those computed; a step computes some more. So a decode is a
chunk of one token, a prefill a few chunks of many, and a sequence that had to give its memory away
is a prefill again, whose prompt includes what it has generated. Decodes go first: they are small and
somebody waits for each. What the step's budget leaves goes to prefills, oldest first, so that a long
prompt is cut into chunks that each step's decodes ride along with.

When memory runs out, the sequence that was admitted last gives its own away and goes back to the
front of the waiting line. The oldest is never asked to, and one sequence alone always fits, so there
is always one that advances. Nobody is admitted in a step in which someone had to leave.

What is cached of a sequence may take its time to come. Until then it has its memory and is in no
step, so that the others do not wait for it.

Source: Yu et al., Orca, OSDI 2022 (iterations); Agrawal et al., Sarathi-Serve, OSDI 2024,
        arXiv:2403.02310 (chunks); Kwon et al., PagedAttention, SOSP 2023, arXiv:2309.06180 (preemption).
"""

from collections import deque
from collections.abc import Iterator

from respkv.batching.runner import Admission, Loading, Refusal, Room
from respkv.batching.sequence import Chunk, Sequence


class Scheduler:
    """Sequences that wait and sequences that run, and what the next step is.

    sequences_max:   so many run at once.
    step_tokens_max: a step computes so many tokens, one at least for each that runs. Sequences
                     without a cache are in every step with all their tokens, and do not count.
    """

    def __init__(self, *, sequences_max: int, step_tokens_max: int) -> None:
        assert 0 < sequences_max <= step_tokens_max
        self._sequences_max = sequences_max
        self._step_tokens_max = step_tokens_max
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # the one admitted first comes first
        self.loading: list[Sequence] = []  # admitted, and what is cached of it is on its way
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence at the end of the waiting line."""
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> bool:
        """Take a sequence out, wherever it is; returns whether it had been admitted."""
        for admitted in (self.running, self.loading):
            if sequence in admitted:
                admitted.remove(sequence)
                return True
        self.waiting.remove(sequence)
        return False

    def clear(self) -> None:
        """Forget all sequences; what they have in memory is for others to give back."""
        for sequences in (self.waiting, self.running, self.loading):
            sequences.clear()

    def admit(self, room: Room) -> Iterator[tuple[Sequence, Admission]]:
        """Let waiting sequences in, in their order, while there is room; tells what each brings.

        One for which the logits are known has nothing to compute: it must get its next token, by
        ``chosen``, or be removed, before ``plan`` is called. With nothing else to do this waits a
        moment for what is loading.
        """
        yield from self._arrived(room, wait=False)
        for sequence in list(self.waiting):
            if len(self.running) + len(self.loading) >= self._sequences_max:
                break
            found: Admission | Loading | Refusal = Admission()
            if sequence.request.use_cache:
                found = room.begin(sequence)
            if found is Refusal.NO_ROOM:
                break
            if isinstance(found, Refusal):
                continue
            self.waiting.remove(sequence)
            if isinstance(found, Admission):
                yield self._admitted(sequence, found)
            else:
                self.loading.append(sequence)
        if not self.running:
            yield from self._arrived(room, wait=True)

    def _arrived(self, room: Room, *, wait: bool) -> Iterator[tuple[Sequence, Admission]]:
        if self.loading:
            for sequence, admission in room.arrived(wait=wait):
                self.loading.remove(sequence)
                yield self._admitted(sequence, admission)

    def _admitted(self, sequence: Sequence, admission: Admission) -> tuple[Sequence, Admission]:
        sequence.computed = admission.computed
        self.running.append(sequence)
        return sequence, admission

    def plan(self, room: Room) -> list[Chunk]:
        """Choose the chunks of the next step, and make room for them; empty when nothing runs."""
        chunks: dict[Sequence, Chunk] = {}
        gone: set[Sequence] = set()
        budget = self._step_tokens_max
        decodes = [each for each in self.running if each.pending == 1]
        prefills = [each for each in self.running if each.pending > 1]
        for sequence in decodes + prefills:
            if sequence in gone:  # it left for one before it
                continue
            if not sequence.request.use_cache:
                chunks[sequence] = Chunk(sequence, 0, len(sequence.tokens), is_last=True)
                continue
            stop = sequence.computed + min(sequence.pending, budget)
            if stop == sequence.computed:
                continue
            left = self._grow(room, sequence, stop)
            for each in left:
                chunks.pop(each, None)
            gone.update(left)
            if sequence not in gone:
                is_last = stop == len(sequence.tokens)
                chunks[sequence] = Chunk(sequence, sequence.computed, stop, is_last)
                budget -= stop - sequence.computed
        return list(chunks.values())

    def computed(self, chunk: Chunk) -> None:
        """Record that a chunk of the plan was computed."""
        if chunk.sequence.request.use_cache:
            assert chunk.start == chunk.sequence.computed
            chunk.sequence.computed = chunk.stop

    def chosen(self, sequence: Sequence, token: int) -> None:
        """Record the next token of a sequence, all of whose tokens were computed."""
        assert sequence.pending == 0 or not sequence.request.use_cache
        sequence.tokens.append(token)

    def _grow(self, room: Room, sequence: Sequence, stop: int) -> list[Sequence]:
        """Make room, if need be at the expense of those admitted later, or of itself.

        Returns: who had to leave.
        """
        left: list[Sequence] = []
        while sequence not in left and not room.grow(sequence, stop):
            left.append(next(each for each in reversed(self.running) if each.request.use_cache))
            self._preempt(room, left[-1])
        return left

    def _preempt(self, room: Room, victim: Sequence) -> None:
        room.drop(victim)
        self.running.remove(victim)
        victim.computed = 0
        victim.preemptions += 1
        self.preemptions += 1
        self.waiting.appendleft(victim)
