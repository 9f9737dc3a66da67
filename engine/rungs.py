"""Choosing codecs: the cheapest rung of the ladder that keeps a promise, plane by plane.

Somebody measured what each codec costs and how far it is off, for the keys and the values of each
layer. A bound on the error is kept by every plane on its own, so that a layer with outliers gets the
bits that it needs and the others do not pay for it. A wanted ratio is turned into the smallest bound
that reaches it: then the error is spread evenly, as reverse water-filling would have it.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from respkv.kernels.layout import Codec

Plane = tuple[int, int]  # layer, and 0 for keys or 1 for values


class Rung(NamedTuple):
    """What a codec was measured to do to a plane: stored bits per element, relative L2 error."""

    codec: Codec
    bits: float
    error: float


def choose_within(measured: Mapping[Plane, Sequence[Rung]], error_max: float) -> dict[Plane, Codec]:
    """Return for each plane the cheapest codec whose error is at most ``error_max``.

    Of two that cost the same the more exact one is taken. A plane for which none is exact enough
    stays raw.
    """
    return {plane: _cheapest(rungs, error_max).codec for plane, rungs in measured.items()}


def choose_ratio(
    measured: Mapping[Plane, Sequence[Rung]], ratio_min: float, raw_bits: float
) -> dict[Plane, Codec]:
    """Return the codecs with the smallest common bound on the error that save enough.

    ratio_min: bits of a raw element over the mean of the stored ones.
    When no choice saves so much, the one that saves most is returned.
    """
    bounds = sorted({rung.error for rungs in measured.values() for rung in rungs})
    low, high = 0, len(bounds) - 1
    while low < high:
        middle = (low + high) // 2
        if _ratio(measured, bounds[middle], raw_bits) >= ratio_min:
            high = middle
        else:
            low = middle + 1
    return choose_within(measured, bounds[low]) if bounds else {}


def _cheapest(rungs: Sequence[Rung], error_max: float) -> Rung:
    exact_enough = [rung for rung in rungs if rung.error <= error_max]
    raw = Rung(Codec.RAW, 0.0, 0.0)
    return min(exact_enough, key=lambda rung: (rung.bits, rung.error), default=raw)


def _ratio(measured: Mapping[Plane, Sequence[Rung]], error_max: float, raw_bits: float) -> float:
    bits = [_cheapest(rungs, error_max).bits or raw_bits for rungs in measured.values()]
    return raw_bits * len(bits) / sum(bits)
