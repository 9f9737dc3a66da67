"""Approximate nearest neighbours by usearch's HNSW graph, for many entries.

It finds candidates; what they score is worked out in float64 as for the exact index, so a hit says
the same whichever index found it, and only a neighbour that the graph missed is missed.

Source: Malkov, Yashunin, Efficient and robust approximate nearest neighbor search using
hierarchical navigable small world graphs, 2016, arXiv:1603.09320.
"""

import numpy
from usearch.index import Index as Graph

from respkv.semantic.embeddings import Metric, Vector, scaled
from respkv.semantic.index import ranked

CONNECTIVITY = 16
# Candidates looked at when an embedding is added, and when one is looked for.
EXPANSION_ADD = 128
EXPANSION_SEARCH = 96
# A graph whose nodes were mostly replaced is made anew: what was removed still is in the way.
REMOVED_MIN = 1024
# Up to so many entries all are looked at, which takes no longer: in a small graph of which much was
# removed, some of what is left cannot be reached any more.
EXACT_MAX = 1024

_KINDS = {"cosine": "cos", "ip": "ip", "l2": "l2sq"}


class HnswIndex:
    """A graph over embeddings. Removed ones are left out of answers, and in time out of memory."""

    def __init__(self, dim: int, metric: Metric) -> None:
        self._dim = dim
        self._metric: Metric = metric
        self._graph = self._empty()
        self._labels: dict[bytes, int] = {}
        self._entries: dict[int, bytes] = {}
        self._next = 0
        self._removed = 0

    def __len__(self) -> int:
        return len(self._labels)

    @property
    def nbytes(self) -> int:
        """Bytes of the graph."""
        return int(self._graph.memory_usage)

    def put(self, entry: bytes, vector: Vector) -> None:
        """Add an embedding, or replace it."""
        self.drop(entry)
        label, self._next = self._next, self._next + 1
        self._graph.add(label, scaled(vector, self._metric), threads=1)
        self._labels[entry], self._entries[label] = label, entry

    def drop(self, entry: bytes) -> None:
        """Forget an embedding, if it is there."""
        label = self._labels.pop(entry, None)
        if label is None:
            return
        del self._entries[label]
        self._graph.remove(label, threads=1)
        self._removed += 1
        if self._removed > max(REMOVED_MIN, len(self._labels)):
            self._make_anew()

    def nearest(self, query: Vector, count: int) -> list[tuple[bytes, float]]:
        """Return near entries with their scores, nearest first, ``count`` at most."""
        wanted = min(count, len(self._labels))
        if wanted < 1:
            return []
        one = scaled(query, self._metric)
        found = self._graph.search(one, wanted, threads=1, exact=len(self._labels) <= EXACT_MAX)
        labels = [
            label for label in numpy.atleast_1d(found.keys).tolist() if label in self._entries
        ]
        entries = [self._entries[label] for label in labels]
        return ranked(entries, self._vectors(labels), one, self._metric, count)

    def _vectors(
        self, labels: list[int]
    ) -> numpy.ndarray[tuple[int, ...], numpy.dtype[numpy.float32]]:
        if not labels:
            return numpy.empty((0, self._dim), numpy.float32)
        kept = self._graph.get(numpy.array(labels, numpy.uint64))
        return numpy.asarray(kept, numpy.float32).reshape(len(labels), self._dim)

    def _make_anew(self) -> None:
        labels = list(self._entries)
        vectors = self._vectors(labels)
        self._graph, self._removed = self._empty(), 0
        if labels:
            self._graph.add(numpy.array(labels, numpy.uint64), vectors, threads=1)

    def _empty(self) -> Graph:
        return Graph(
            ndim=self._dim,
            metric=_KINDS[self._metric],
            dtype="f32",
            connectivity=CONNECTIVITY,
            expansion_add=EXPANSION_ADD,
            expansion_search=EXPANSION_SEARCH,
        )
