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

from typing import Final

import torch
from torch import Tensor

from respkv.kernels.paged_kv import CODE_DTYPES, NUMBER_DTYPES, PLAIN, PagedKV, Scoring
from respkv.kernels.splits import DecodeWorkspace, decode_workspace, num_splits

HEAD_DIM_MAX: Final = 256
GROUP_MAX: Final = 64  # query heads of one kv head


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
    Error:     2e-3 relative L2 in bfloat16 and float16, 1e-5 in float32, of attention in float64,
               before the output is rounded to its type.
    Raises ValueError when shapes, types or strides do not fit.
    """
    out = torch.empty_like(query) if out is None else out
    check_pages(pages, query, batch=query.shape[0])
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
    check_pages(pages, query, batch=cu_seqlens.shape[0] - 1)
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
    rows = torch.unflatten(query, 1, (key.shape[1], -1))
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


def check_pages(pages: PagedKV, query: Tensor, *, batch: int) -> None:
    """Raise ValueError when pages and queries do not fit, or are not what kernels take."""
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
        steps = (keys.shape[3], *keys.stride()[:3], *values.stride()[:3])
        if any(step % 2 for step in steps):
            raise ValueError(f"rows of codes must begin at even bytes, not {_described(keys)}")
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
