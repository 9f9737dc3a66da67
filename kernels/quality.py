"""What a codec does to KV: its error, its error where it matters, and what it costs.

A codec is judged on the pages that a namespace really has. The relative L2 error says how far the
numbers are off; the largest error shows outliers that were cut; the attention error says what of it
reaches the model: queries are drawn so that their logits spread as those of trained models do, and
the outputs of attention over the exact and the decoded pages are compared. Keys and values are
judged apart, each beside exact ones of the other side.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from respkv.kernels import entropy
from respkv.kernels.ladder import decode_planes, encode_planes, encode_xs
from respkv.kernels.layout import Codec, Side, plane_layout
from respkv.page import Geometry

NUM_QUERIES: Final = 64
LOGITS_STD: Final = 2.5
LOGITS_MAX: Final = 1 << 24  # numbers, whatever the shape of the pages
_SEED: Final = 0x7265_7370


@dataclass(frozen=True, slots=True)
class Quality:
    """What a codec does to some planes of one side.

    bits:            stored bits per element, parameters included.
    relative_l2:     L2 norm of the differences, as a part of the norm of the planes.
    max_error:       the largest difference of one number.
    attention_error: L2 norm of the differences of attention's outputs, as a part of theirs.
    """

    bits: float
    relative_l2: float
    max_error: float
    attention_error: float


def measure_pages(
    payloads: Sequence[memoryview], geometry: Geometry, codecs: Sequence[Codec]
) -> list[list[tuple[Quality, Quality]]]:
    """Measure codecs on every layer of some pages.

    payloads: of whole pages of this geometry, at least one. They are read only.
    Returns:  for each codec, for each layer, what it does to the keys and to the values.
    It takes seconds for tens of MiB: it belongs into a thread.
    """
    dtype: torch.dtype = getattr(torch, geometry.dtype)
    sizes = (geometry.layers, 2, geometry.tokens, geometry.heads, geometry.dim)
    # A copy: the bytes of a page in memory are read-only, which tensors cannot be.
    pages = [torch.frombuffer(bytearray(each), dtype=dtype).view(sizes) for each in payloads]
    measured: list[list[tuple[Quality, Quality]]] = [[] for _ in codecs]
    for layer in range(geometry.layers):
        keys = torch.stack([page[layer, 0] for page in pages])
        values = torch.stack([page[layer, 1] for page in pages])
        for codec, of_codec in zip(codecs, measured, strict=True):
            of_codec.append(measure(codec, keys, values))
    return measured


def measure(codec: Codec, keys: Tensor, values: Tensor) -> tuple[Quality, Quality]:
    """Measure a codec on the keys and the values of one layer.

    keys, values: [N, T, H, D] of N pages, bfloat16, float16 or float32, on one device; at least one
                  number. Attention goes over all N * T tokens, or some where they are very many.
    Returns: of the keys, and of the values. Planes that do not fit the codec are stored raw, and
             count as that; those with NaN or infinity, which never do, are in no error.
    """
    bits_keys, decoded_keys = _round_trip(codec, keys, "key")
    bits_values, decoded_values = _round_trip(codec, values, "value")
    if codec.is_lossless:
        return Quality(bits_keys, 0.0, 0.0, 0.0), Quality(bits_values, 0.0, 0.0, 0.0)
    good_keys, good_values = _finite(keys), _finite(values)
    good = good_keys & good_values
    exact_keys, exact_values = _heads(keys[good]), _heads(values[good])
    queries = _queries(exact_keys)
    exact = _attend(queries, exact_keys, exact_values)
    with_keys = _attend(queries, _heads(decoded_keys[good]), exact_values)
    with_values = _attend(queries, exact_keys, _heads(decoded_values[good]))
    errors_keys = _errors(keys[good_keys], decoded_keys[good_keys])
    errors_values = _errors(values[good_values], decoded_values[good_values])
    return (
        Quality(bits_keys, *errors_keys, relative_l2(exact, with_keys)),
        Quality(bits_values, *errors_values, relative_l2(exact, with_values)),
    )


def relative_l2(exact: Tensor, other: Tensor) -> float:
    """Return the L2 norm of the difference as a part of the norm of ``exact``; 0 for no difference."""
    norm = float(exact.float().norm(dtype=torch.float64))
    difference = float((other.float() - exact.float()).norm(dtype=torch.float64))
    return difference / norm if norm else difference


def _finite(planes: Tensor) -> Tensor:
    """[N, T, H, D] -> [N]"""
    return planes.isfinite().flatten(1).all(1)


def _round_trip(codec: Codec, planes: Tensor, side: Side) -> tuple[float, Tensor]:
    """Return the bits of an element as stored, and the planes after decoding."""
    if codec == Codec.RAW:
        return 8.0 * planes.element_size(), planes
    if codec == Codec.XS:
        stored = [8 * planes[0].nbytes if each is None else 8 * each.nbytes for each in _xs(planes)]
        return sum(stored) / planes.numel(), planes
    encoded, fits = encode_planes(codec, planes, side=side)
    decoded = decode_planes(codec, encoded, side=side, out=torch.empty_like(planes))
    decoded[~fits] = planes[~fits]
    layout = plane_layout(codec, side, *planes.shape[1:], planes.element_size())
    num_bytes = 0
    for plane, is_fitting in zip(encoded, fits.tolist(), strict=True):
        if not is_fitting:
            num_bytes += planes[0].nbytes
        elif codec.is_entropy_coded:
            num_bytes += len(entropy.pack(memoryview(plane.cpu().numpy().data), layout))
        else:
            num_bytes += layout.nbytes
    return 8 * num_bytes / planes.numel(), decoded


def _xs(planes: Tensor) -> list[Tensor | None]:
    if planes.dtype == torch.bfloat16:
        return encode_xs(planes)
    return [None] * planes.shape[0]


def _errors(exact: Tensor, decoded: Tensor) -> tuple[float, float]:
    if not exact.numel():
        return 0.0, 0.0
    difference = (decoded.float() - exact.float()).abs()
    return relative_l2(exact, decoded), float(difference.max())


def _heads(planes: Tensor) -> Tensor:
    """[N, T, H, D] -> [H, N * T, D] in float32; of so many tokens that the logits stay few."""
    count, tokens, heads, dim = planes.shape
    step = max(1, -(-count * tokens * heads * NUM_QUERIES // LOGITS_MAX))
    some = planes.reshape(count * tokens, heads, dim)[::step]
    return some.float().permute(1, 0, 2)


def _queries(keys: Tensor) -> Tensor:
    """Draw [H, NUM_QUERIES, D] Gaussian queries, scaled to the spread of logits of each head."""
    generator = torch.Generator().manual_seed(_SEED)
    heads, _, dim = keys.shape
    drawn = torch.randn(heads, NUM_QUERIES, dim, generator=generator).to(keys.device)
    if not keys.shape[1]:
        return drawn
    spread = (drawn @ keys.mT).flatten(1).std(1, correction=0).clamp_min(1e-20)
    return drawn * (LOGITS_STD / spread)[:, None, None]


def _attend(queries: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return torch.softmax(queries @ keys.mT, -1) @ values
