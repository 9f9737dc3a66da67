"""Copy whole blocks of a worker's paged cache, of all layers at once: a block that is shared and about
to be written gets a copy of its own.

The copy is the one of kernels/paged.py, one launch for every pair of blocks, layer, key and value.
What is here makes it a copy of memory: tokens and heads of a block that lies in one piece need not
be told apart, whatever their order, so such a block is seen as rows as wide as a program likes. One
that does not is copied by its tokens.
"""

from math import gcd
from typing import Final

import torch
from torch import Tensor

from respkv.kernels.paged import PagedBuffer, copy_tokens

ROW_NUMBERS_MAX: Final = 1024


def whole_blocks(buffer: PagedBuffer) -> PagedBuffer:
    """Return the cache with the numbers of a block in rows, for ``copy_blocks``: made once.

    Returns: views [num_blocks, rows, 1, numbers of a row]; the cache itself when its blocks do not
    lie in one piece.
    """
    blocks, *block = buffer.shape
    block_stride, *strides = buffer.keys[0].stride()
    numbers = 1
    for step, size in sorted(zip(strides, block, strict=True)):
        if size > 1 and step != numbers:
            return buffer
        numbers *= size
    width = gcd(numbers, ROW_NUMBERS_MAX)
    shape, stride = (blocks, numbers // width, 1, width), (block_stride, width, width, 1)
    return PagedBuffer(
        tuple(each.as_strided(shape, stride) for each in buffer.keys),
        tuple(each.as_strided(shape, stride) for each in buffer.values),
    )


def copy_blocks(buffer: PagedBuffer, sources: Tensor, targets: Tensor) -> None:
    """Copy block ``sources[i]`` to block ``targets[i]``, keys and values of all layers.

    buffer:           fastest as ``whole_blocks`` returns it.
    sources, targets: [N] int64 on the cache's device. No block is twice a target, or source and
                      target: blocks are copied in no order. On a GPU nobody looks.
    Raises ValueError when these do not fit.
    """
    for each in (sources, targets):
        if each.dim() != 1 or each.shape != sources.shape or each.dtype != torch.int64:
            raise ValueError(f"blocks must be two [N] int64, not {list(each.shape)} {each.dtype}")
    if targets.device.type == "cpu":
        _check_blocks(sources.tolist(), targets.tolist(), buffer.shape[0])
    rows = buffer.shape[1]
    row = torch.arange(rows, device=buffer.device)
    old, new = ((each[:, None] * rows + row).flatten() for each in (sources, targets))
    copy_tokens(buffer, old, buffer, new, tokens=old.numel())


def _check_blocks(sources: list[int], targets: list[int], num_blocks: int) -> None:
    if any(not 0 <= block < num_blocks for block in (*sources, *targets)):
        raise ValueError(f"blocks {sources}, {targets} are not within 0 to {num_blocks - 1}")
    if len(set(targets)) < len(targets) or set(targets) & set(sources):
        raise ValueError(f"blocks {targets} cannot be written while {sources} are read")
