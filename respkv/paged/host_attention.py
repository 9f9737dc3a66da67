"""Attention over blocks in memory, for processors: as exact as kernels/attention.py, and quicker.

The reference there copies what a sequence sees, in float32, one sequence after the other. Here blocks
that lie side by side are attended to where they are, through a strided view; of a few such runs, a
prefix that is shared and what came after it, the products are put together. Short sequences that
make one token each are gathered and padded into one product, since for these a call costs more than
its work. What is gathered is a few MiB, or one long sequence of one layer whose blocks are apart, so
that no step takes the memory that pages were to save.

How tokens are grouped depends on the tables and on the window alone, so a step plans once for all
its layers of one kind.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from respkv.kernels.attention import check_pages
from respkv.kernels.paged_kv import PLAIN, PagedKV, Scoring

# Of keys, and of values, for one product. More than the allocator has at hand costs page faults, and
# is where copying takes longer than calling.
GATHERED_BYTES_MAX: Final = 512 << 10
PIECE_BYTES_MIN: Final = 64 << 10  # of keys, on average, for runs to be products of their own


@dataclass(frozen=True, slots=True)
class Span:
    """What one sequence brings to a step.

    blocks:  its table, for ``context`` tokens, the new ones included.
    new:     how many of its tokens are new; their keys and values are in the blocks already.
    """

    blocks: Sequence[int]
    context: int
    new: int


@dataclass(frozen=True, slots=True)
class Group:
    """Sequences that are attended to in one product.

    rows:  of the query, ``new`` for each of ``count`` sequences.
    slots: of the keys that they see: runs of one sequence, or [count, seen] int64. Whoever sees fewer
           keys than others has one of its own again, which ``mask`` hides: nothing else is read.
    mask:  [count, 1, 1, seen] or [new, seen], zero or -inf; None when all is seen.
    """

    rows: slice
    count: int
    new: int
    slots: tuple[slice, ...] | Tensor
    mask: Tensor | None = None
    is_causal: bool = False  # a whole prompt: the mask is the plain triangle


def plan(
    spans: Sequence[Span],
    *,
    block_tokens: int,
    token_bytes: int,
    dtype: torch.dtype,
    window: int | None = None,
    gathered_bytes_max: int = GATHERED_BYTES_MAX,
    piece_bytes_min: int = PIECE_BYTES_MIN,
) -> list[Group]:
    """Group the sequences of a step, whose query rows come one after the other.

    token_bytes: of the keys of one token in one layer.
    dtype:       of the query; masks have it.
    """
    groups, row, at = list[Group](), 0, 0
    while at < len(spans):
        first = spans[at]
        stop, seen = at + 1, _seen(first, window)
        if first.new == 1 and first.context:
            while stop < len(spans) and spans[stop].new == 1 and spans[stop].context:
                widest = max(seen, _seen(spans[stop], window))
                if (stop + 1 - at) * widest * token_bytes > gathered_bytes_max:
                    break
                seen, stop = widest, stop + 1
        rows = slice(row, row + first.new * (stop - at))
        # Products of small types are rounded before they are added up, so these go in one.
        is_in_pieces = first.new == 1 and dtype == torch.float32 and piece_bytes_min > 0
        runs_max = max(2, seen * token_bytes // piece_bytes_min) if is_in_pieces else 1
        if stop - at > 1:
            groups.append(_gathered(spans[at:stop], rows, seen, block_tokens, window, dtype))
        elif first.context and first.new:
            groups.append(_alone(first, rows, block_tokens, window, dtype, runs_max))
        row, at = rows.stop, stop
    return groups


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    groups: Sequence[Group],
    *,
    scoring: Scoring,
    out: Tensor,
) -> Tensor:
    """Attend with new tokens to blocks that hold these as well.

    query:        [S, Q, D], as planned; query head q reads kv head q // (Q / H).
    keys, values: [num_blocks, T, H, D] of the query's type, contiguous.
    scoring:      its window is the one that was planned with.
    out:          [S, Q, D]; rows of no group are left as they are.
    Error:        as ``kernels.attention.paged_decode``.
    """
    key_rows, value_rows = keys.flatten(0, 1), values.flatten(0, 1)
    for group in groups:
        mine = query[group.rows]
        if isinstance(group.slots, tuple) and len(group.slots) > 1:
            out[group.rows] = _in_pieces(mine, key_rows, value_rows, group.slots, scoring)
            continue
        key, value = (_select(each, group) for each in (key_rows, value_rows))
        if group.new == 1:
            heads = key.shape[1]
            shaped = mine.reshape(group.count, heads, -1, mine.shape[-1])
        else:
            shaped = mine.transpose(0, 1)[None]
        result = _product(shaped, key, value, group, scoring)
        if group.new == 1:
            out[group.rows] = result.reshape(mine.shape)
        else:
            out[group.rows] = result[0].transpose(0, 1)
    return out


def host_decode(query: Tensor, pages: PagedKV, *, scoring: Scoring = PLAIN) -> Tensor:
    """Do what ``kernels.attention.paged_decode`` does for pages of numbers in memory, quicker.

    Raises ValueError as that does, and for contexts longer than their tables and blocks that are none.
    """
    check_pages(pages, query, batch=query.shape[0])
    lengths = pages.context_lens.tolist()
    spans = [
        Span(table, n, 1) for table, n in zip(pages.block_tables.tolist(), lengths, strict=True)
    ]
    num_blocks, block_tokens, heads, dim = pages.keys.shape
    for span in spans:
        _check(span, num_blocks, block_tokens, scoring.window)
    groups = plan(
        spans,
        block_tokens=block_tokens,
        token_bytes=heads * dim * pages.keys.dtype.itemsize,
        dtype=query.dtype,
        window=scoring.window,
    )
    out = torch.zeros_like(query)
    return attend(query, pages.keys, pages.values, groups, scoring=scoring, out=out)


def _check(span: Span, num_blocks: int, block_tokens: int, window: int | None) -> None:
    """Raise ValueError where attention would read something else than the tokens of a sequence."""
    room = len(span.blocks) * block_tokens
    if not 0 <= span.context <= room:
        raise ValueError(f"context_lens must be 0 to the {room} of the tables, not {span.context}")
    oldest = span.context - _seen(span, window)
    read = span.blocks[oldest // block_tokens : -(-span.context // block_tokens)]
    if read and not 0 <= min(read) <= max(read) < num_blocks:
        [wrong, *_] = (each for each in read if not 0 <= each < num_blocks)
        raise ValueError(f"block {wrong} is not one of {num_blocks}")


def _seen(span: Span, window: int | None) -> int:
    """Return how many keys some of the new tokens see."""
    return span.context if window is None else min(span.context, window + span.new - 1)


def _alone(
    span: Span,
    rows: slice,
    block_tokens: int,
    window: int | None,
    dtype: torch.dtype,
    runs_max: int,
) -> Group:
    seen = _seen(span, window)
    oldest = span.context - seen
    slots: tuple[slice, ...] | Tensor = _runs(span, oldest, block_tokens)
    if len(slots) > runs_max:
        slots = slots_of(span.blocks, oldest, span.context, block_tokens)[None]
    if span.new == 1:
        return Group(rows, 1, 1, slots)
    if span.new == span.context and (window is None or window >= span.new):
        return Group(rows, 1, span.new, slots, is_causal=True)
    own = torch.arange(span.context - span.new, span.context)[:, None]
    position = torch.arange(oldest, span.context)
    hidden = position > own
    if window is not None:
        hidden |= position <= own - window
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
    return Group(rows, 1, span.new, slots, mask)


def _gathered(
    spans: Sequence[Span],
    rows: slice,
    seen: int,
    block_tokens: int,
    window: int | None,
    dtype: torch.dtype,
) -> Group:
    widths = [_seen(span, window) for span in spans]
    oldest = [span.context - width for span, width in zip(spans, widths, strict=True)]
    tables = [
        span.blocks[low // block_tokens : -(-span.context // block_tokens)]
        for span, low in zip(spans, oldest, strict=True)
    ]
    widest = max(map(len, tables))
    table = torch.tensor([[*each, *[0] * (widest - len(each))] for each in tables])
    slots = (table[..., None] * block_tokens + torch.arange(block_tokens)).flatten(1)
    if any(low % block_tokens for low in oldest):
        within = torch.tensor([low % block_tokens for low in oldest])[:, None]
        place = within + torch.arange(seen)
        slots = slots.gather(1, place.clamp_(max=slots.shape[1] - 1))
    slots = slots[:, :seen].contiguous()
    if min(widths) == seen:
        return Group(rows, len(spans), 1, slots)
    hidden = torch.arange(seen) >= torch.tensor(widths)[:, None]
    slots = slots.where(~hidden, slots[:, :1])
    mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))
    return Group(rows, len(spans), 1, slots, mask[:, None, None])


def _runs(span: Span, oldest: int, block_tokens: int) -> tuple[slice, ...]:
    """Return where tokens ``oldest`` to the last lie, blocks that lie side by side as one."""
    runs, at = list[slice](), oldest // block_tokens
    last = (span.context - 1) // block_tokens
    while at <= last:
        low = at
        while at < last and span.blocks[at + 1] == span.blocks[at] + 1:
            at += 1
        first = max(oldest, low * block_tokens)
        begin = span.blocks[low] * block_tokens + first % block_tokens
        stop = min(span.context, (at + 1) * block_tokens)
        runs.append(slice(begin, begin + stop - first))
        at += 1
    return tuple(runs)


def slots_of(blocks: Sequence[int], first: int, stop: int, block_tokens: int) -> Tensor:
    """Return where tokens ``first`` to ``stop`` - 1 lie, [tokens] int64: block * T + offset."""
    low = first // block_tokens
    table = torch.tensor(blocks[low : -(-stop // block_tokens)], dtype=torch.int64)
    slots = (table[:, None] * block_tokens + torch.arange(block_tokens)).flatten()
    return slots[first - low * block_tokens : stop - low * block_tokens]


def _select(rows: Tensor, group: Group) -> Tensor:
    """Return [count, H, seen, D] of keys or values [slots, H, D]."""
    if isinstance(group.slots, tuple):
        return rows[group.slots[0]].transpose(0, 1)[None]
    picked = rows.index_select(0, group.slots.view(-1))
    return picked.view(*group.slots.shape, *rows.shape[1:]).transpose(1, 2)


def _in_pieces(
    query: Tensor, keys: Tensor, values: Tensor, runs: tuple[slice, ...], scoring: Scoring
) -> Tensor:
    """Attend with one token [1, Q, D] to runs of keys and values [slots, H, D], where they lie."""
    shaped = query.reshape(keys.shape[1], -1, query.shape[-1])
    products = [torch.bmm(shaped, keys[run].permute(1, 2, 0)) for run in runs]
    scores = torch.cat(products, -1).mul_(scoring.scale(query.shape[-1]))
    if scoring.soft_cap is not None:
        scores = scores.div_(scoring.soft_cap).tanh_().mul_(scoring.soft_cap)
    weights = scores.softmax(-1)
    parts = torch.split(weights, [run.stop - run.start for run in runs], -1)
    out = torch.zeros_like(shaped)
    for part, run in zip(parts, runs, strict=True):
        out.baddbmm_(part, values[run].transpose(0, 1))
    return out.reshape(query.shape)


def _product(query: Tensor, key: Tensor, value: Tensor, group: Group, scoring: Scoring) -> Tensor:
    """Attend with [N, heads, rows, D] to [N, H, seen, D]; heads is H or a multiple."""
    scale = scoring.scale(query.shape[-1])
    if scoring.soft_cap is None:
        return scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=group.mask,
            is_causal=group.is_causal,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    # torch's own attention knows no caps.
    grouped = torch.unflatten(query, 1, (key.shape[1], -1))
    scores = grouped.float() @ key[:, :, None].transpose(-1, -2).float() * scale
    scores = scoring.soft_cap * torch.tanh(scores / scoring.soft_cap)
    if group.is_causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu_(1)
        scores = scores.masked_fill_(hidden, float("-inf"))
    elif group.mask is not None:
        scores += group.mask if group.mask.dim() == 2 else group.mask[:, None]
    return (scores.softmax(-1).to(value.dtype) @ value[:, :, None]).flatten(1, 2)
