"""Batches of sequences in paged caches, for tests of attention; what nobody may read is poisoned."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from respkv.kernels.paged_kv import CODE_DTYPES, PagedKV
from tests.kernels.data import poisoned, seeded

NO_BLOCK = 1 << 28  # far outside any cache


@dataclass(frozen=True)
class Batch:
    """Pages of some sequences, and new tokens of each; ``new`` is also the query of a decode."""

    query: Tensor  # [S, Q, D]
    key: Tensor  # [S, H, D]
    value: Tensor  # [S, H, D]
    cu_seqlens: Tensor  # [B + 1]
    pages: PagedKV


def make_batch(
    contexts: Sequence[int],
    *,
    new: Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    dim: int = 64,
    heads: int = 2,
    group: int = 4,
    page: int = 16,
    layout: str = "nhd",
    spread: float = 1.0,
    device: torch.device,
    seed: int = 0,
) -> Batch:
    """Make a batch of such contexts, each with so many new tokens: one each when not given.

    dtype:  of the pages; queries and new tokens are bfloat16 when these are codes.
    spread: standard deviation of the logarithm of the size of values, token by token.

    Blocks in use are scattered. Blocks that are not, the ends of last blocks and scales of both are
    NaN, and of int8 127; the block table is no block where a sequence has none.
    """
    generator = seeded(seed)
    widest = max(1, *(-(-context // page) for context in contexts))
    used = len(contexts) * widest
    tables = torch.randperm(used + 1, generator=generator)[:used].view(len(contexts), widest)
    planes = []
    for size in (0.0, spread):
        numbers = poisoned((used + 1, page, heads, dim), torch.float32)
        for table, context in zip(tables, contexts, strict=True):
            tokens = torch.randn(context, heads, dim, generator=generator)
            tokens *= (size * torch.randn(context, heads, 1, generator=generator)).exp()
            token = torch.arange(context)
            numbers[table[token // page], token % page] = tokens
        planes.append(_stored(numbers, dtype, layout, device))
    for table, context in zip(tables, contexts, strict=True):
        table[-(-context // page) :] = NO_BLOCK
    (keys, key_scales), (values, value_scales) = planes
    lengths = torch.tensor([1] * len(contexts) if new is None else list(new))
    count = int(lengths.sum())
    own = torch.bfloat16 if dtype in CODE_DTYPES else dtype
    query, key, value = (
        torch.randn(count, heads * rows, dim, generator=generator).to(device, own)
        for rows in (group, 1, 1)
    )
    return Batch(
        query,
        key,
        value,
        torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).to(device, torch.int32),
        PagedKV(
            keys,
            values,
            tables.to(device, torch.int32),
            torch.tensor(contexts, dtype=torch.int32, device=device),
            key_scales,
            value_scales,
        ),
    )


def error_max(query: Tensor) -> float:
    """Return the bound of the error before rounding: the interpreter computes in float32."""
    return 2e-3 if query.is_cuda and query.dtype != torch.float32 else 1e-5


def error_of(ours: Tensor, theirs: Tensor) -> float:
    """Return the relative L2 error, infinite when anything is not finite."""
    if not ours.isfinite().all():
        return float("inf")
    error = (ours.double() - theirs).norm() / theirs.norm().clamp(min=1e-30)
    return float(error)


def _stored(
    numbers: Tensor, dtype: torch.dtype, layout: str, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    scales = None
    if dtype in CODE_DTYPES:
        most = 127 if dtype == torch.int8 else 448
        scales = numbers.abs().amax(-1) / most
        numbers = numbers / scales[..., None]
        if dtype == torch.int8:
            numbers = numbers.round().nan_to_num(127)
        scales = scales.to(device)
    return laid_out(numbers.to(dtype).to(device), layout), scales


def laid_out(numbers: Tensor, layout: str) -> Tensor:
    """Return [num_blocks, T, H, D] of the same numbers, in such an order in memory."""
    if layout == "hnd":
        return numbers.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "interleaved":
        return torch.stack([numbers, numbers], 1)[:, 0]
    return numbers
