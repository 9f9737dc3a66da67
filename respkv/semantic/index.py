"""Nearest neighbours among the embeddings of one tenant.

``ExactIndex`` looks at all of them: one product of a matrix and a vector, in float32, finds those
that could be the nearest, given how far float32 may be off, and float64 decides among them. So what
it answers is what comparing all of them in float64 would answer. Up to some ten thousand entries
that takes a millisecond or two, less than a round trip to most models.

``open_index`` chooses; the approximate one is in hnsw.py and needs usearch.
"""

from typing import Literal, Protocol

import numpy
from numpy.typing import NDArray

from respkv.semantic.embeddings import Metric, Vector, scaled, scores

Kind = Literal["exact", "hnsw"]
KINDS: tuple[Kind, ...] = ("exact", "hnsw")
ROWS_MIN = 64


class Index(Protocol):
    """Embeddings by the hashes of their entries."""

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Bytes of memory that it takes, about."""
        ...

    def put(self, entry: bytes, vector: Vector) -> None:
        """Add an embedding, or replace it."""
        ...

    def drop(self, entry: bytes) -> None:
        """Forget an embedding, if it is there."""
        ...

    def nearest(self, query: Vector, count: int) -> list[tuple[bytes, float]]:
        """Return the nearest entries with their scores, nearest first, ``count`` at most."""
        ...


def open_index(kind: Kind, dim: int, metric: Metric) -> Index:
    """Return an empty index."""
    if kind == "hnsw":
        from respkv.semantic.hnsw import HnswIndex

        return HnswIndex(dim, metric)
    return ExactIndex(dim, metric)


def ranked(
    entries: list[bytes], rows: NDArray[numpy.float32], query: Vector, metric: Metric, count: int
) -> list[tuple[bytes, float]]:
    """Return the nearest of some entries by float64; of equal scores, the smaller hash first."""
    found = zip(entries, scores(rows, query, metric).tolist(), strict=True)
    return sorted(found, key=lambda each: (-each[1], each[0]))[:count]


class ExactIndex:
    """A matrix of embeddings, searched as a whole. It grows by doubling and shrinks by halves."""

    def __init__(self, dim: int, metric: Metric) -> None:
        self._metric: Metric = metric
        self._rows = numpy.empty((ROWS_MIN, dim), numpy.float32)
        self._norms = numpy.empty(ROWS_MIN, numpy.float32)  # Euclidean, of each row
        self._entries: list[bytes] = []  # of each row
        self._row_of: dict[bytes, int] = {}
        self._slack = 4 * dim * float(numpy.finfo(numpy.float32).eps)

    def __len__(self) -> int:
        return len(self._entries)

    @property
    def nbytes(self) -> int:
        """Bytes of the matrix."""
        return self._rows.nbytes + self._norms.nbytes

    def put(self, entry: bytes, vector: Vector) -> None:
        """Add an embedding, or replace it."""
        row = self._row_of.get(entry)
        if row is None:
            row = len(self._entries)
            if row == len(self._rows):
                self._resize(2 * row)
            self._entries.append(entry)
            self._row_of[entry] = row
        kept = scaled(vector, self._metric)
        self._rows[row] = kept
        self._norms[row] = numpy.sqrt(numpy.square(kept, dtype=numpy.float64).sum())

    def drop(self, entry: bytes) -> None:
        """Forget an embedding, if it is there; the last row takes its place."""
        row = self._row_of.pop(entry, None)
        if row is None:
            return
        last = self._entries.pop()
        if last != entry:
            end = len(self._entries)
            self._entries[row] = last
            self._row_of[last] = row
            self._rows[row], self._norms[row] = self._rows[end], self._norms[end]
        if len(self._rows) > ROWS_MIN and len(self._entries) < len(self._rows) // 4:
            self._resize(len(self._rows) // 2)

    def nearest(self, query: Vector, count: int) -> list[tuple[bytes, float]]:
        """Return the nearest entries with their scores, nearest first, ``count`` at most."""
        total = len(self._entries)
        if not total or count < 1:
            return []
        one = scaled(query, self._metric)
        if count >= total:
            return ranked(self._entries, self._rows[:total], one, self._metric, count)
        rough, slack = self._rough(one)
        # Whatever could be among the first when each of two values is off by as much as it may be.
        least = numpy.partition(rough - slack, total - count)[total - count]
        chosen = numpy.flatnonzero(rough + slack >= least)
        entries = [self._entries[row] for row in chosen.tolist()]
        return ranked(entries, self._rows[chosen], one, self._metric, count)

    def _rough(self, one: Vector) -> tuple[NDArray[numpy.float64], NDArray[numpy.float64]]:
        """Return a score in float32 that ranks as the metric does, and how far off it may be."""
        total = len(self._entries)
        products = self._rows[:total] @ one
        norms = self._norms[:total].astype(numpy.float64)
        length = float(numpy.sqrt(numpy.square(one, dtype=numpy.float64).sum()))
        wide = products.astype(numpy.float64)
        # Below the smallest normal number, errors are absolute.
        slack = self._slack * norms * length + 1e-36
        if self._metric == "cosine":
            return wide / norms, slack / norms
        if self._metric == "ip":
            return wide, slack
        squares = numpy.square(norms)
        # Where rows differ by less than float64 tells of their distances, it makes them equal.
        blur = self._slack * 2.0**-29 * length * length
        return 2 * wide - squares, 2 * slack + self._slack * squares + blur

    def _resize(self, rows: int) -> None:
        kept = len(self._entries)
        matrix = numpy.empty((rows, self._rows.shape[1]), numpy.float32)
        norms = numpy.empty(rows, numpy.float32)
        matrix[:kept], norms[:kept] = self._rows[:kept], self._norms[:kept]
        self._rows, self._norms = matrix, norms
