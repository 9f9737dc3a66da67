"""A model that is arithmetic, with a cache that counts its blocks: to see what a loop does to it.

The next token is a hash of all tokens before it. What a sequence has computed is a running hash,
so that a token that is computed twice, left out or out of order changes every token after it.
"""

from collections.abc import Sequence as Several

import torch
from torch import Tensor

from respkv.batching.runner import Admission, Loading, Refusal
from respkv.batching.sequence import Chunk, Sequence

VOCAB = 50


def mix(state: int, tokens: Several[int]) -> int:
    for token in tokens:
        state = (state * 1_000_003 + token + 1) % (1 << 61)
    return state


def next_token(state: int) -> int:
    return (state >> 7) % VOCAB


def expected(prompt: Several[int], count: int, stop: frozenset[int] = frozenset()) -> list[int]:
    """Return what must be generated after a prompt, whoever else is served."""
    state = mix(0, prompt)
    answer: list[int] = []
    while len(answer) < count and not (answer and answer[-1] in stop):
        answer.append(next_token(state))
        state = mix(state, answer[-1:])
    return answer


class ToyRunner:
    """Blocks of ``block_tokens`` tokens each; prompts that ended here once are remembered.

    is_slow: what is remembered takes a few steps to come, and prompts wait for others like them.
    """

    vocab_size = VOCAB

    def __init__(
        self, *, num_blocks: int = 100, block_tokens: int = 4, is_slow: bool = False
    ) -> None:
        self.num_blocks = num_blocks
        self.block_tokens = block_tokens
        self.tokens_max = num_blocks * block_tokens
        self.held: dict[Sequence, int] = {}  # blocks
        self.state: dict[Sequence, tuple[int, int]] = {}  # tokens computed, and their hash
        self.remembered: dict[tuple[int, ...], int] = {}
        self.is_slow = is_slow
        self.coming: dict[Sequence, int] = {}  # asks until it has come
        self.steps: list[list[tuple[int, int]]] = []  # of each chunk: sequence, tokens
        self.is_closed = self.was_good = False

    @property
    def num_free(self) -> int:
        return self.num_blocks - sum(self.held.values())

    def begin(self, sequence: Sequence) -> Admission | Loading | Refusal:
        assert sequence not in self.held
        for other in self.held if self.is_slow and sequence.request.shares else ():
            if other.request.shares and other.tokens[0] == sequence.tokens[0] and other.pending > 1:
                return Refusal.SOON
        if self._blocks(len(sequence.tokens) + 1) > self.num_free:
            return Refusal.NO_ROOM
        is_alone = not self.held
        self.held[sequence] = 0
        assert self.grow(sequence, len(sequence.tokens))
        known = 0
        if sequence.request.shares:
            cuts = range(len(sequence.tokens), 0, -1)
            known = next((c for c in cuts if tuple(sequence.tokens[:c]) in self.remembered), 0)
        self.state[sequence] = known, mix(0, sequence.tokens[:known])
        if known and self.is_slow and not is_alone:
            self.coming[sequence] = 2
            return Loading.LOADING
        return self._admission(sequence, known)

    def arrived(self, *, wait: bool) -> Several[tuple[Sequence, Admission]]:
        assert self.coming
        self.coming = {each: asks - 1 for each, asks in self.coming.items()}
        come = [each for each, asks in self.coming.items() if not asks]
        if wait and not come:
            come = list(self.coming)[:1]
        for each in come:
            del self.coming[each]
        return [(each, self._admission(each, self.state[each][0])) for each in come]

    def _admission(self, sequence: Sequence, known: int) -> Admission:
        if known < len(sequence.tokens):
            return Admission(known, known)
        return Admission(known, 0, self._logits(sequence))

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        more = self._blocks(num_tokens) - self.held[sequence]
        if more > self.num_free:
            return False
        self.held[sequence] += max(more, 0)
        return True

    def drop(self, sequence: Sequence) -> None:
        assert sequence not in self.coming
        del self.held[sequence], self.state[sequence]

    def end(self, sequence: Sequence, *, is_good: bool) -> None:
        self.coming.pop(sequence, None)
        if sequence.request.shares and is_good:
            self.remembered[tuple(sequence.request.tokens)] = 0
        self.drop(sequence)

    def step(self, chunks: Several[Chunk]) -> Tensor:
        assert len({chunk.sequence for chunk in chunks}) == len(chunks) > 0
        self.steps.append([(chunk.sequence.id, chunk.stop - chunk.start) for chunk in chunks])
        rows = []
        for chunk in chunks:
            sequence = chunk.sequence
            if not sequence.request.use_cache:
                assert (chunk.start, chunk.stop) == (0, len(sequence.tokens))
                rows.append(self._row(mix(0, sequence.tokens)))
                continue
            computed, state = self.state[sequence]
            assert chunk.start == computed < chunk.stop
            assert self._blocks(chunk.stop) <= self.held[sequence]
            self.state[sequence] = chunk.stop, mix(state, chunk.tokens)
            if chunk.is_last:
                rows.append(self._logits(sequence))
        return torch.stack(rows) if rows else torch.empty(0, VOCAB)

    def clear(self) -> int:
        self.remembered.clear()
        return 0

    def close(self, *, is_good: bool) -> None:
        self.is_closed, self.was_good = True, is_good

    def _logits(self, sequence: Sequence) -> Tensor:
        return self._row(self.state[sequence][1])

    def _row(self, state: int) -> Tensor:
        logits = torch.zeros(VOCAB)
        logits[next_token(state)] = 10.0
        return logits

    def _blocks(self, tokens: int) -> int:
        return -(-tokens // self.block_tokens)
