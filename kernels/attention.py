"""Attention over KV in pages: plain torch references, and the functions that workers call.

A worker's cache of one layer is two tensors of blocks, ``[num_blocks, T, H, D]`` by their strides,
whatever the order in memory; a block table says which blocks hold a sequence. ``paged_decode`` is
the step that makes one token per sequence; ``paged_prefill`` computes new tokens after a prefix that
the cache already holds, which is what a hit in this cache is for. Tensors on a GPU go to the Triton
kernels, all others to the references here, which say in few lines what the kernels must compute.

Pages hold numbers of the query's type, or codes, int8 or e4m3, with a float32 scale per token and
head. Other codecs are decoded into pages when these are loaded: reading them here would cost more
than the bandwidth that they save.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

CODE_DTYPES: Final = (torch.int8, torch.float8_e4m3fn)
NUMBER_DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIM_MAX: Final = 256
GROUP_MAX: Final = 64  # query heads of one kv head
SPLIT_TOKENS_MIN: Final = 256  # a split of fewer costs more to merge than it saves
SPLITS_MAX: Final = 256
PROGRAMS_PER_SM: Final = 2  # of the decode kernel; see decode_triton.decode_tile


@dataclass(frozen=True, slots=True)
class PagedKV:
    """One layer's pages, and which of them hold which sequence.

    keys, values:             [num_blocks, T, H, D], any strides with D contiguous.
    block_tables:             [B, blocks] int32: the block of tokens T * i to T * i + T - 1.
    context_lens:             [B] int32: how many tokens of a sequence are in its pages; 0 is allowed.
    key_scales, value_scales: [num_blocks, T, H] float32, any strides, when pages hold codes.

    Nothing is read beyond a sequence's tokens, or a window's: what is there need not be a number,
    and entries of the table for it need not be blocks.
    """

    keys: Tensor
    values: Tensor
    block_tables: Tensor
    context_lens: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Scoring:
    """How scores come from products of queries and keys.

    sm_scale: factor of the products; 1 / sqrt(D) when None.
    window:   how many keys a token sees, its own included; all when None.
    soft_cap: scores become soft_cap * tanh(score / soft_cap); no cap when None.
    """

    sm_scale: float | None = None
    window: int | None = None
    soft_cap: float | None = None

    def scale(self, head_dim: int) -> float:
        """Return the factor of the products."""
        return head_dim**-0.5 if self.sm_scale is None else self.sm_scale


@dataclass(frozen=True, slots=True)
class DecodeWorkspace:
    """Where splits of a sequence leave their parts: made once, also for captured graphs.

    partial: [B, Q, num_splits, D] float32. lse: [B, Q, num_splits] float32. Contiguous; need not be
    cleared. One launch at a time may use them.
    """

    partial: Tensor
    lse: Tensor

    @property
    def num_splits(self) -> int:
        """Programs that share a sequence and kv head."""
        return self.lse.shape[2]


PLAIN: Final = Scoring()


def num_splits(*, programs: int, context_max: int, sm_count: int) -> int:
    """Choose among how many programs to split each sequence.

    programs:    without splits: sequences times kv heads.
    context_max: tokens of the longest sequence that will come.
    Returns:     the fewest splits whose last wave of programs leaves the GPU at most 15 % less busy
                 than the best number of splits does.
    Source:      the rule of FlashAttention's decoding (Dao et al., Flash-Decoding, 2023).
    """
    most = max(1, min(SPLITS_MAX, context_max // SPLIT_TOKENS_MIN))
    slots = sm_count * PROGRAMS_PER_SM

    def busy(splits: int) -> float:
        waves = max(1, programs) * splits / slots
        return waves / -(-max(1, programs) * splits // slots)

    best = max(busy(splits) for splits in range(1, most + 1))
    return next(splits for splits in range(1, most + 1) if busy(splits) >= 0.85 * best)


def decode_workspace(
    batch: int, query_heads: int, head_dim: int, splits: int, device: torch.device
) -> DecodeWorkspace:
    """Make a workspace for so many sequences and splits."""
    sizes = (batch, query_heads, splits)
    return DecodeWorkspace(
        partial=torch.empty((*sizes, head_dim), dtype=torch.float32, device=device),
        lse=torch.empty(sizes, dtype=torch.float32, device=device),
    )


def paged_decode(
    query: Tensor,
    pages: PagedKV,
    *,
    out: Tensor | None = None,
    scoring: Scoring = PLAIN,
    workspace: DecodeWorkspace | None = None,
) -> Tensor:
    """Attend with the newest token of each sequence to its pages, which hold that token already.

    query:     [B, Q, D], D contiguous; query head q reads kv head q // (Q / H).
    out:       [B, Q, D], D contiguous, of the query's type; made when not given. Zeros for
               a sequence of no tokens.
    workspace: on a GPU decides how sequences are split; made for the width of the block table when
               not given. Give it, and ``out``, to capture the step in a graph.
    Error:     2e-3 relative L2 in bfloat16 and float16, 1e-5 in float32, of attention in float64.
    Raises ValueError when shapes, types or strides do not fit.
    """
    out = torch.empty_like(query) if out is None else out
    _check_pages(pages, query, batch=query.shape[0])
    _check_like(out, query)
    if not query.is_cuda:
        return paged_decode_reference(query, pages, out=out, scoring=scoring)
    from respkv.kernels import decode_triton

    batch, query_heads, dim = query.shape
    if workspace is None:
        context_max = pages.block_tables.shape[1] * pages.keys.shape[1]
        splits = num_splits(
            programs=batch * pages.keys.shape[2],
            context_max=min(context_max, scoring.window or context_max),
            sm_count=torch.cuda.get_device_properties(query.device).multi_processor_count,
        )
        workspace = decode_workspace(batch, query_heads, dim, splits, query.device)
    decode_triton.decode(query, pages, scoring=scoring, out=out, workspace=workspace)
    return out


def paged_prefill(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: PagedKV,
    cu_seqlens: Tensor,
    *,
    new_max: int,
    out: Tensor | None = None,
    scoring: Scoring = PLAIN,
) -> Tensor:
    """Attend with new tokens to the prefix that is in pages, and causally to one another.

    query:      [S, Q, D], the new tokens of all sequences one after the other; D contiguous.
    key, value: [S, H, D], of the new tokens, of the query's type; D contiguous.
    pages:      the prefixes; ``context_lens`` does not count the new tokens.
    cu_seqlens: [B + 1] int32: new tokens of sequence b are cu_seqlens[b] to cu_seqlens[b + 1] - 1.
    new_max:    the most new tokens of a sequence; the launch grid is made of it.
    out:        [S, Q, D], D contiguous, of the query's type; made when not given.
    Error:      as ``paged_decode``.
    Raises ValueError when shapes, types or strides do not fit.
    """
    out = torch.empty_like(query) if out is None else out
    _check_pages(pages, query, batch=cu_seqlens.shape[0] - 1)
    _check_like(out, query)
    heads = pages.keys.shape[2]
    for tensor in (key, value):
        _check_like(tensor, query[:, :1].expand(-1, heads, -1))
    if not query.is_cuda:
        return paged_prefill_reference(
            query, key, value, pages, cu_seqlens, out=out, scoring=scoring
        )
    from respkv.kernels import prefill_triton

    prefill_triton.prefill(
        query, key, value, pages, cu_seqlens, new_max=new_max, out=out, scoring=scoring
    )
    return out


def paged_decode_reference(
    query: Tensor,
    pages: PagedKV,
    *,
    out: Tensor,
    scoring: Scoring = PLAIN,
    precision: torch.dtype = torch.float32,
) -> Tensor:
    """Do what ``paged_decode`` does, computing in ``precision``."""
    for sequence, context in enumerate(pages.context_lens.tolist()):
        oldest = max(0, context - (scoring.window or context))
        key, value = _gather(pages, sequence, oldest, context, precision)
        row = query[sequence : sequence + 1].to(precision)
        visible = torch.ones(1, key.shape[0], dtype=torch.bool, device=query.device)
        out[sequence : sequence + 1] = _attend(row, key, value, visible, scoring)
    return out


def paged_prefill_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    pages: PagedKV,
    cu_seqlens: Tensor,
    *,
    out: Tensor,
    scoring: Scoring = PLAIN,
    precision: torch.dtype = torch.float32,
) -> Tensor:
    """Do what ``paged_prefill`` does, computing in ``precision``."""
    bounds = cu_seqlens.tolist()
    for sequence, context in enumerate(pages.context_lens.tolist()):
        new = slice(bounds[sequence], bounds[sequence + 1])
        oldest = max(0, context + 1 - (scoring.window or context + 1))
        old_key, old_value = _gather(pages, sequence, oldest, context, precision)
        all_keys = torch.cat([old_key, key[new].to(precision)])
        all_values = torch.cat([old_value, value[new].to(precision)])
        position = torch.arange(oldest, oldest + all_keys.shape[0], device=query.device)
        own = position[context - oldest :, None]
        visible = position <= own
        if scoring.window is not None:
            visible &= position > own - scoring.window
        out[new] = _attend(query[new].to(precision), all_keys, all_values, visible, scoring)
    return out


def _attend(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scoring: Scoring) -> Tensor:
    """Return [N, Q, D] of query [N, Q, D], key and value [M, H, D], visible [N, M]."""
    if key.shape[0] == 0:
        return torch.zeros_like(query)
    rows = query.unflatten(1, (key.shape[1], -1))
    scores = torch.einsum("nhgd,mhd->nhgm", rows, key) * scoring.scale(query.shape[-1])
    if scoring.soft_cap is not None:
        scores = scoring.soft_cap * torch.tanh(scores / scoring.soft_cap)
    scores = scores.masked_fill(~visible[:, None, None], float("-inf"))
    return torch.einsum("nhgm,mhd->nhgd", scores.softmax(-1), value).flatten(1, 2)


def _gather(
    pages: PagedKV, sequence: int, first: int, stop: int, precision: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return keys and values [tokens, H, D] of tokens ``first`` to ``stop`` - 1 of a sequence."""
    page_tokens = pages.keys.shape[1]
    token = torch.arange(first, stop, device=pages.keys.device)
    block, slot = pages.block_tables[sequence].long()[token // page_tokens], token % page_tokens
    key, value = pages.keys[block, slot].to(precision), pages.values[block, slot].to(precision)
    if pages.key_scales is not None and pages.value_scales is not None:
        key = key * pages.key_scales[block, slot].to(precision)[..., None]
        value = value * pages.value_scales[block, slot].to(precision)[..., None]
    return key, value


def _check_pages(pages: PagedKV, query: Tensor, *, batch: int) -> None:
    keys, values, scales = pages.keys, pages.values, (pages.key_scales, pages.value_scales)
    if query.dim() != 3 or query.dtype not in NUMBER_DTYPES or query.stride(-1) != 1:
        raise ValueError(f"query must be [tokens, Q, D] numbers, not {_described(query)}")
    if keys.dim() != 4 or keys.stride(-1) != 1 or keys.shape[-1] != query.shape[-1]:
        raise ValueError(f"keys must be [blocks, T, H, D], not {_described(keys)}")
    if values.shape != keys.shape or values.dtype != keys.dtype or values.stride(-1) != 1:
        raise ValueError(f"values {_described(values)} do not match keys {_described(keys)}")
    if query.shape[2] > HEAD_DIM_MAX or query.shape[1] % keys.shape[2]:
        raise ValueError(
            f"query heads {list(query.shape)} do not share heads of {list(keys.shape)}"
        )
    if query.shape[1] // keys.shape[2] > GROUP_MAX:
        raise ValueError(f"{query.shape[1]} query heads are too many for {keys.shape[2]} kv heads")
    if keys.dtype in CODE_DTYPES:
        for each in scales:
            if each is None or each.shape != keys.shape[:3] or each.dtype != torch.float32:
                raise ValueError(f"scales of codes must be {list(keys.shape[:3])} float32")
    elif keys.dtype != query.dtype or scales != (None, None):
        raise ValueError(f"pages of {keys.dtype} do not fit queries of {query.dtype}")
    for name, tensor, shape in (
        ("block_tables", pages.block_tables, (batch, pages.block_tables.shape[-1])),
        ("context_lens", pages.context_lens, (batch,)),
    ):
        if tuple(tensor.shape) != shape or tensor.dtype != torch.int32 or tensor.stride(-1) != 1:
            raise ValueError(f"{name} must be {list(shape)} int32, not {_described(tensor)}")


def _check_like(tensor: Tensor, model: Tensor) -> None:
    if tensor.shape != model.shape or tensor.dtype != model.dtype or tensor.stride(-1) != 1:
        raise ValueError(f"{_described(tensor)} does not fit {_described(model)}")


def _described(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype} of strides {tensor.stride()}"
