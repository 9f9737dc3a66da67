"""A model that says what a test wants it to say, behind the real model loop."""

import threading
from collections.abc import Callable
from collections.abc import Sequence as Several

import torch
from torch import Tensor

from respkv.batching.runner import Admission, Loading, Refusal
from respkv.batching.sequence import Chunk, Sequence

Script = Callable[[Several[int]], Several[int]]


class ScriptedRunner:
    """Answers each prompt with the tokens that a script gives for it, then with its last one again.

    gate: closed, the model computes nothing until it is opened.
    """

    def __init__(self, script: Script, *, vocab_size: int, tokens_max: int = 4096) -> None:
        self.tokens_max = tokens_max
        self.vocab_size = vocab_size
        self.gate = threading.Event()
        self.gate.set()
        self.steps = 0
        self.num_sequences = 0
        self._script = script

    def begin(self, sequence: Sequence) -> Admission | Loading | Refusal:
        self.num_sequences += 1
        return Admission()

    def arrived(self, *, wait: bool) -> Several[tuple[Sequence, Admission]]:
        return ()

    def grow(self, sequence: Sequence, num_tokens: int) -> bool:
        return True

    def drop(self, sequence: Sequence) -> None:
        raise AssertionError("there is always room")

    def end(self, sequence: Sequence, *, is_good: bool) -> None:
        self.num_sequences -= 1

    def step(self, chunks: Several[Chunk]) -> Tensor:
        self.gate.wait()
        self.steps += 1
        wanted = [each.sequence for each in chunks if each.is_last]
        logits = torch.zeros(len(wanted), self.vocab_size)
        for row, sequence in enumerate(wanted):
            says = self._script(sequence.tokens[: sequence.num_prompt])
            logits[row, says[min(sequence.num_generated, len(says) - 1)]] = 100.0
        return logits

    def clear(self) -> int:
        return 0

    def close(self, *, is_good: bool) -> None:
        self.gate.set()
