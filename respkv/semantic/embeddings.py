"""Embeddings as they come from models, and how near two of them are.

What an index ranks by is float32 and quick; what a caller is told is worked out here in float64,
from the embeddings as they are stored. So a score does not depend on which index found the entry,
nor on what else is in it.
"""

from typing import Any, Literal, TypeAlias

import numpy
from numpy.typing import NDArray

Vector: TypeAlias = NDArray[numpy.float32]
Metric = Literal["cosine", "ip", "l2"]

METRICS: tuple[Metric, ...] = ("cosine", "ip", "l2")
# Squares of larger numbers, summed, would leave float32.
LARGEST = 1e15


def as_vector(embedding: Any, dim: int, metric: Metric) -> Vector:
    """Return an embedding as float32 of shape [dim], in memory of its own.

    embedding: a list, an array or a tensor of numbers, [dim] or [1, dim], of any float or integer
               dtype and on any device.
    Raises ValueError naming what is wrong: the shape, a number that is not finite or too large, or
    nothing but zeros where the metric needs a direction; TypeError for what is no numbers.
    """
    try:
        given = numpy.asarray(_on_host(embedding))
        if given.dtype.kind in "cmMSU":  # complex numbers, times, text: they convert, and lie
            raise TypeError(f"{given.dtype} are no such numbers")
        wide = given.astype(numpy.float64)
    except (TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise TypeError(
            f"an embedding is a list, an array or a tensor of {dim} numbers,"
            f" not {type(embedding).__name__}: {error}"
        ) from error
    if wide.shape == (1, dim):
        wide = wide[0]
    if wide.shape != (dim,):
        raise ValueError(f"the embedding has shape {wide.shape}; this cache takes ({dim},)")
    is_bad = ~(numpy.abs(wide) <= LARGEST)
    if is_bad.any():
        first = int(numpy.argmax(is_bad))
        raise ValueError(
            f"the embedding has {wide[first]} at {first}; accepted are finite numbers up to"
            f" {LARGEST:g}"
        )
    vector = wide.astype(numpy.float32)
    if metric == "cosine" and not vector.any():
        raise ValueError(
            "the embedding is all zeros as float32: it has no direction to compare by cosine"
        )
    return vector


def _on_host(embedding: Any) -> Any:
    """Return a tensor as an array, anything else as it is. Raises TypeError or RuntimeError."""
    if not hasattr(embedding, "untyped_storage"):  # a tensor, told without importing torch
        return embedding
    if embedding.is_complex():  # its imaginary part would be left out
        raise TypeError(f"{embedding.dtype} are no such numbers")
    return embedding.detach().cpu().double().numpy()


def scaled(vector: Vector, metric: Metric) -> Vector:
    """Return what an index keeps: for cosine the same direction with numbers near 1.

    A power of two is the factor, so nothing is rounded and no square under- or overflows.
    """
    if metric != "cosine":
        return vector
    _, exponent = numpy.frexp(numpy.abs(vector).max())
    return numpy.ldexp(vector, -int(exponent)).astype(numpy.float32)


def scores(rows: NDArray[Any], query: NDArray[Any], metric: Metric) -> NDArray[numpy.float64]:
    """Return how near each row is to the query; more is nearer.

    rows:    [n, dim]; query: [dim].
    Returns: [n] float64: the cosine, 1 for the same embedding; the inner product; or for l2 the
             Euclidean distance, negative. Equal rows have equal scores, to the last bit.
    """
    wide, one = rows.astype(numpy.float64), query.astype(numpy.float64)
    if metric == "l2":
        return numpy.asarray(-numpy.sqrt(numpy.square(wide - one).sum(axis=1)), numpy.float64)
    # Not a matrix product, whose rounding depends on where a row stands.
    products = (wide * one).sum(axis=1)
    if metric == "ip":
        return numpy.asarray(products, numpy.float64)
    norms = numpy.sqrt(numpy.square(wide).sum(axis=1)) * numpy.sqrt(numpy.square(one).sum())
    cosines = numpy.clip(products / norms, -1.0, 1.0)
    return numpy.where((rows == query).all(axis=1), 1.0, cosines)
