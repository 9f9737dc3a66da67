"""Choose a token from logits, as transformers' ``generate`` does, one request at a time.

Greedy requests, which most are, are chosen together. The others draw from random numbers of their
own, so that what they get does not depend on who is computed with them.
"""

from collections.abc import Sequence
from typing import Final

import torch
from torch import Tensor

from respkv.batching.request import Sampling

# Below this the likeliest token has all the probability, and logits divided by it overflow.
TEMPERATURE_MIN: Final = 1e-5
TEMPERATURE_MAX: Final = 1e30


def new_generator(sampling: Sampling, device: torch.device) -> torch.Generator | None:
    """Return the random numbers of one request; None when it needs none."""
    if sampling.temperature < TEMPERATURE_MIN:
        return None
    generator = torch.Generator(device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    return generator


def choose(
    logits: Tensor, wishes: Sequence[tuple[Sampling, torch.Generator | None]]
) -> list[int | None]:
    """Choose a token for each row; None for a row whose logits are no numbers.

    logits: [N, V], float. wishes: how to, and the random numbers, of each row.
    """
    peaks, likeliest = logits.max(-1)  # a NaN is a maximum
    usable = torch.isfinite(peaks).tolist()
    tokens: list[int | None] = list(likeliest.tolist())
    for row, (sampling, generator) in enumerate(wishes):
        if not usable[row]:
            tokens[row] = None
        elif generator is not None:
            tokens[row] = _draw(logits[row], sampling, generator)
    return tokens


def _draw(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """Draw from the likeliest tokens of logits [V], as the request wants."""
    scores = logits.float() / min(sampling.temperature, TEMPERATURE_MAX)
    if sampling.top_k is not None and sampling.top_k < scores.shape[0]:
        least = scores.topk(sampling.top_k).values[-1]
        scores = scores.masked_fill(scores < least, float("-inf"))
    if sampling.top_p is not None and sampling.top_p < 1:
        ascending, order = scores.sort()
        unlikely = ascending.softmax(-1).cumsum(-1) <= 1 - sampling.top_p
        unlikely[-1] = False
        scores = scores.masked_fill(unlikely.scatter(0, order, unlikely), float("-inf"))
    probabilities = scores.softmax(-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
