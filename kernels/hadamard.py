"""The randomized Hadamard rotation: it spreads what is in a few channels over all of them.

A row of D numbers is padded with zeros to ``rotated_dim(D)``, multiplied by a fixed vector of +-1
and then, in blocks of ``hadamard_dim(D)``, by the Hadamard matrix in Sylvester's order. With the
factor 1/sqrt(width) this is orthogonal and its own inverse but for the signs.

Everything here has channels first, ``[W, R]``: then each stage of the butterfly and each level of a
sum works on whole rows of memory, which on a CPU is faster than a product with the matrix. The
order of additions is part of the specification, since codes are decided by the last bit: stages
of distance 1, 2, 4 and so on, sums as a binary tree of neighbours.

Source: Ailon and Chazelle, The fast Johnson-Lindenstrauss transform, SIAM J. Comput. 39, 2009.
"""

from functools import lru_cache
from typing import Final

import torch
from torch import Tensor

SIGN_SEED: Final = 0x7265_7370_6B76
_MASK = (1 << 64) - 1


@lru_cache(maxsize=64)
def signs(width: int) -> Tensor:
    """Return the +-1 that channels are multiplied by: [width] float32, on the CPU; do not write.

    Channel i is negated when the highest bit of splitmix64(``SIGN_SEED`` + i) is set.
    """
    negative = [_splitmix64(SIGN_SEED + channel) >> 63 for channel in range(width)]
    return 1.0 - 2.0 * torch.tensor(negative, dtype=torch.float32)


def butterfly(rows: Tensor, width: int) -> Tensor:
    """Multiply each block of ``width`` channels by the Hadamard matrix, not scaled.

    rows:    [W, R] float32, W a multiple of ``width``, a power of two; overwritten.
    Returns: [W, R], ``rows`` itself or new memory.
    """
    spare = torch.empty_like(rows)
    distance = 1
    while distance < width:
        pairs, results = (
            torch.unflatten(each, 0, (-1, 2, distance)).unbind(1) for each in (rows, spare)
        )
        torch.add(*pairs, out=results[0])
        torch.sub(*pairs, out=results[1])
        rows, spare = spare, rows
        distance *= 2
    return rows


def tree_sum(terms: Tensor) -> Tensor:
    """Sum over the first axis: neighbours, then neighbours of those sums, and so on.

    Where a level has no neighbour for its last one it adds zero, as if the axis were padded with
    zeros to a power of two.

    terms:   [W, ...] float32, W >= 1; not written.
    Returns: [...]
    """
    while (count := terms.shape[0]) > 1:
        level = terms[0 : count - 1 : 2] + terms[1:count:2]
        terms = torch.cat((level, terms[-1:] + 0.0)) if count % 2 else level
    return terms[0]


def _splitmix64(state: int) -> int:
    mixed = (state + 0x9E37_79B9_7F4A_7C15) & _MASK
    mixed = ((mixed ^ mixed >> 30) * 0xBF58_476D_1CE4_E5B9) & _MASK
    mixed = ((mixed ^ mixed >> 27) * 0x94D0_49BB_1331_11EB) & _MASK
    return mixed ^ mixed >> 31
