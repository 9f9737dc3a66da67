"""The ladder of codecs: every rung behind the same four functions.

A batch of planes, ``[N, T, H, D]``, becomes ``[N, plane_bytes]``, each row as ``layout`` has it.
Tensors on a GPU go through the Triton kernels, others through the references, which are the
specification of the bytes; both give the same ones.

On a CPU the planes are worked on in blocks of what a cache holds, so each pass over them after the
first reads from there. Blocks are of whole groups of tokens, which no codec looks across.
"""

import importlib
from collections.abc import Iterator
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from respkv.kernels import f8, i4, i8, rotated, xs
from respkv.kernels.layout import (
    GROUP_DIM_I4,
    GROUP_TOKENS_I4,
    GROUP_TOKENS_I8,
    GROUP_TOKENS_MEAN,
    ROTATED_BITS,
    Codec,
    PlaneLayout,
    Side,
    num_groups,
    plane_layout,
    rotated_dim,
)

DTYPES: Final = (torch.bfloat16, torch.float16, torch.float32)
SIDES: Final[tuple[Side, ...]] = ("key", "value")
FP16_MAX: Final = 65504.0
_CONTIGUOUS: Final = torch.contiguous_format
# A multiple of every size of a group of tokens.
_BLOCK_TOKENS = 256
_BLOCK_NUMBERS = 1 << 18


class _Field(NamedTuple):
    """A section as numbers: its name, dtype, tokens per entry and shape per plane."""

    name: str
    dtype: torch.dtype
    tokens: int
    shape: tuple[int, ...]


def encode_planes(
    codec: Codec,
    planes: Tensor,
    *,
    side: Side,
    out: Tensor | None = None,
    unbiased: bool = False,
    reference: bool = False,
) -> tuple[Tensor, Tensor]:
    """Encode planes in a codec whose size is fixed: ``F8`` to ``RHZ2``.

    planes:    [N, T, H, D] bfloat16, float16 or float32, any strides; any of N, T, H may be 0.
    out:       [N, plane_bytes] uint8, rows contiguous, on the same device; made when not given.
    unbiased:  of the rotated codecs: the gain that keeps products with queries, see ``rotated``;
               of the reference alone, on a GPU as well.
    reference: take the reference on a GPU as well.
    Returns:   out, and [N] bool: which planes fit. One that does not (NaN, infinity, numbers that
               the codec's parameters cannot hold) must be stored raw; its row holds anything.
    Raises ValueError when shapes, dtypes or the codec do not fit.
    """
    _check_planes(codec, planes, side)
    num_planes, tokens, heads, dim = planes.shape
    layout = plane_layout(codec, side, tokens, heads, dim, planes.element_size())
    if out is None:
        out = torch.empty((num_planes, layout.nbytes), dtype=torch.uint8, device=planes.device)
    _check_encoded(out, (num_planes, layout.nbytes), planes.device)
    fits = torch.ones(num_planes, dtype=torch.bool, device=planes.device)
    if not planes.numel():
        return out.zero_(), fits
    if planes.is_cuda and not (reference or unbiased):
        _, fits = _device().encode_planes_on_device(codec, planes, side=side, out=out)
        return out, fits
    _clear_padding(out, layout)
    fields = _fields(codec, side, tokens, heads, dim)
    sections = _sections(out, layout, fields)
    for some, span in _blocks(planes.shape):
        good = _encode_block(
            codec, side, planes[some, span], _cut(sections, fields, some, span), unbiased
        )
        fits[some] &= good
    return out, fits


def decode_planes(
    codec: Codec, encoded: Tensor, *, side: Side, out: Tensor, reference: bool = False
) -> Tensor:
    """Decode planes of a codec whose size is fixed.

    encoded: [N, plane_bytes] uint8, rows contiguous, as ``encode_planes`` gave them.
    out:     [N, T, H, D] bfloat16, float16 or float32, any strides, written: rounded to the
             nearest even; in float16 clamped to what it can hold.
    Returns: out.
    Raises ValueError when shapes, dtypes or the codec do not fit.
    """
    _check_planes(codec, out, side)
    num_planes, tokens, heads, dim = out.shape
    layout = plane_layout(codec, side, tokens, heads, dim, out.element_size())
    _check_encoded(encoded, (num_planes, layout.nbytes), out.device)
    if not out.numel():
        return out
    if out.is_cuda and not reference:
        target = out if out.stride(3) == 1 else torch.empty_like(out, memory_format=_CONTIGUOUS)
        _device().decode_planes_on_device(codec, encoded, side=side, out=target)
        return out if target is out else out.copy_(target)
    fields = _fields(codec, side, tokens, heads, dim)
    sections = _sections(encoded, layout, fields)
    for some, span in _blocks(out.shape):
        numbers = _decode_block(codec, side, dim, _cut(sections, fields, some, span))
        if out.dtype == torch.float16:
            numbers.clamp_(-FP16_MAX, FP16_MAX)
        out[some, span] = numbers
    return out


def encode_xs(planes: Tensor, *, reference: bool = False) -> list[Tensor | None]:
    """Encode planes without loss.

    planes:  [N, T, H, D] bfloat16, any strides.
    Returns: for each plane [bytes] uint8, or None where that would not be smaller than raw.
    Raises ValueError when it is not bfloat16.
    """
    if planes.dim() != 4 or planes.dtype != torch.bfloat16:
        raise ValueError(f"planes must be [N, T, H, D] bfloat16, not {_kind(planes)}")
    if planes.is_cuda and not reference:
        encoded: list[Tensor | None] = _exponents().encode(planes)
        return encoded
    return [xs.encode(plane) for plane in planes]


def decode_xs(encoded: Tensor, out: Tensor, *, reference: bool = False) -> Tensor:
    """Decode a plane that ``encode_xs`` gave.

    encoded: [bytes] uint8, contiguous.
    out:     [T, H, D] bfloat16, any strides, written.
    Returns: out.
    Raises ValueError when the tensors do not fit, and PageCorrupt when the bytes do not.
    """
    if out.dim() != 3 or out.dtype != torch.bfloat16:
        raise ValueError(f"a plane must be [T, H, D] bfloat16, not {_kind(out)}")
    if encoded.dim() != 1 or encoded.dtype != torch.uint8 or not encoded.is_contiguous():
        raise ValueError(f"an xs plane must be [bytes] uint8, not {_kind(encoded)}")
    if out.is_cuda and not reference:
        _exponents().decode(encoded, out)
    else:
        xs.decode(encoded, out)
    return out


def _device() -> Any:
    # These modules import triton, which a machine without a GPU need not have.
    return importlib.import_module("respkv.kernels.paged_coding")


def _exponents() -> Any:
    return importlib.import_module("respkv.kernels.exponent_triton")


def _encode_block(
    codec: Codec, side: Side, planes: Tensor, sections: dict[str, Tensor], unbiased: bool
) -> Tensor:
    if codec == Codec.F8:
        return f8.encode(planes, **sections)
    if codec == Codec.I8:
        return (i8.encode_keys if side == "key" else i8.encode_values)(planes, **sections)
    if codec == Codec.I4:
        return i4.encode(planes, side=side, **sections)
    means = sections.pop("means", None)
    return rotated.encode(codec, planes, means=means, unbiased=unbiased, **sections)


def _decode_block(codec: Codec, side: Side, dim: int, sections: dict[str, Tensor]) -> Tensor:
    if codec == Codec.F8:
        return f8.decode(**sections)
    if codec == Codec.I8:
        return (i8.decode_keys if side == "key" else i8.decode_values)(**sections)
    if codec == Codec.I4:
        return i4.decode(dim, side=side, **sections)
    means = sections.pop("means", None)
    return rotated.decode(codec, dim, means=means, **sections)


def _fields(codec: Codec, side: Side, tokens: int, heads: int, dim: int) -> list[_Field]:
    def of_groups(name: str, size: int) -> _Field:
        return _Field(name, torch.float16, size, (num_groups(tokens, size), heads, dim))

    rows, octets = (tokens, heads), torch.uint8
    if codec == Codec.F8:
        return [_Field("scales", torch.float32, 1, rows), _Field("codes", octets, 1, (*rows, dim))]
    if codec == Codec.I8:
        params = [_Field("steps", torch.float16, 1, rows)]
        if side == "key":
            params = [of_groups(name, GROUP_TOKENS_I8) for name in ("lows", "steps")]
        return [*params, _Field("codes", octets, 1, (*rows, dim))]
    if codec == Codec.I4:
        shape = (*rows, num_groups(dim, GROUP_DIM_I4))
        params = [_Field(name, torch.float16, 1, shape) for name in ("lows", "steps")]
        if side == "key":
            params = [of_groups(name, GROUP_TOKENS_I4) for name in ("lows", "steps")]
        return [*params, _Field("codes", octets, 1, (*rows, num_groups(dim, 2)))]
    params = [of_groups("means", GROUP_TOKENS_MEAN)] if side == "key" else []
    width = rotated_dim(dim) * ROTATED_BITS[codec] // 8
    gains = _Field("gains", torch.float16, 1, rows)
    return [*params, gains, _Field("codes", octets, 1, (*rows, width))]


def _sections(encoded: Tensor, layout: PlaneLayout, fields: list[_Field]) -> dict[str, Tensor]:
    sections = {}
    for name, dtype, _, shape in fields:
        _, offset, nbytes = layout[name]
        sections[name] = torch.unflatten(encoded[:, offset : offset + nbytes].view(dtype), 1, shape)
    return sections


def _cut(
    sections: dict[str, Tensor], fields: list[_Field], some: slice, span: slice
) -> dict[str, Tensor]:
    return {
        field.name: sections[field.name][
            some, span.start // field.tokens : num_groups(span.stop, field.tokens)
        ]
        for field in fields
    }


def _blocks(shape: torch.Size) -> Iterator[tuple[slice, slice]]:
    # Yields which planes, and which tokens of them.
    num_planes, tokens, heads, dim = shape
    span = max(_BLOCK_NUMBERS // (heads * dim) // _BLOCK_TOKENS, 1) * _BLOCK_TOKENS
    count = max(_BLOCK_NUMBERS // (tokens * heads * dim), 1)
    for plane in range(0, num_planes, count):
        for token in range(0, tokens, span):
            yield slice(plane, plane + count), slice(token, min(token + span, tokens))


def _clear_padding(out: Tensor, layout: PlaneLayout) -> None:
    stops = [section.offset for section in layout.sections[1:]] + [layout.nbytes]
    for (_, offset, nbytes), stop in zip(layout.sections, stops, strict=True):
        out[:, offset + nbytes : stop] = 0


def _check_planes(codec: Codec, planes: Tensor, side: Side) -> None:
    if not Codec.F8 <= codec <= Codec.RHZ2:
        raise ValueError(f"{codec!r} has no fixed size, or stores planes as they are")
    if side not in SIDES:
        raise ValueError(f"side must be key or value, not {side!r}")
    if planes.dim() != 4 or planes.dtype not in DTYPES or not planes.shape[3]:
        raise ValueError(f"planes must be [N, T, H, D] of floats, not {_kind(planes)}")


def _check_encoded(encoded: Tensor, shape: tuple[int, int], device: torch.device) -> None:
    if tuple(encoded.shape) != shape or encoded.dtype != torch.uint8:
        raise ValueError(f"encoded planes must be {list(shape)} uint8, not {_kind(encoded)}")
    if encoded.device != device:
        raise ValueError(f"encoded planes are on {encoded.device}, the others on {device}")
    # Sections are looked at as numbers of up to 4 bytes.
    if encoded.numel() and (
        encoded.stride(1) != 1 or encoded.stride(0) % 4 or encoded.storage_offset() % 4
    ):
        raise ValueError("rows of encoded planes must be contiguous and start at multiples of 4")


def _kind(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {tensor.dtype}"
