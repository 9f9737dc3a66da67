"""The exact index answers what comparing all in float64 answers; of the other, recall is measured."""

from typing import Any

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from respkv.semantic.embeddings import METRICS, Metric, as_vector, scaled, scores
from respkv.semantic.index import ExactIndex, open_index

DIM = 3
# Few different numbers, so that ties and equal embeddings are common; far apart, so that float32 has
# trouble.
numbers = st.sampled_from([-2.0, -1.0, -0.0, 0.0, 1.0, 1.0000001, 3.0, 1e-20, 1e6, 1e15])
vectors = st.lists(numbers, min_size=DIM, max_size=DIM).filter(any)


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


def brute_force(kept: dict[bytes, Any], query: Any, metric: Metric) -> list[tuple[float, bytes]]:
    one = scaled(as_vector(query, DIM, metric), metric)
    rows = {entry: scaled(as_vector(each, DIM, metric), metric) for entry, each in kept.items()}
    found = [(-float(scores(row[None], one, metric)[0]), entry) for entry, row in rows.items()]
    return sorted(found)


class Life(RuleBasedStateMachine):
    """An index that grows, shrinks and is asked, beside a dict that is compared as a whole."""

    metric: Metric = "cosine"

    def __init__(self) -> None:
        super().__init__()
        self.index = ExactIndex(DIM, self.metric)
        self.kept: dict[bytes, Any] = {}

    @rule(numbers=st.lists(st.tuples(st.integers(0, 300), vectors), max_size=100))
    def put(self, numbers: list[tuple[int, list[float]]]) -> None:
        for number, vector in numbers:
            self.index.put(name(number), as_vector(vector, DIM, self.metric))
            self.kept[name(number)] = vector

    @rule(numbers=st.lists(st.integers(0, 300), max_size=200))
    def drop(self, numbers: list[int]) -> None:
        for number in numbers:
            self.index.drop(name(number))
            self.kept.pop(name(number), None)

    @rule(query=vectors, count=st.integers(0, 12))
    def ask(self, query: list[float], count: int) -> None:
        found = self.index.nearest(as_vector(query, DIM, self.metric), count)
        best = brute_force(self.kept, query, self.metric)[:count]
        assert [(-score, entry) for entry, score in found] == best

    @invariant()
    def it_is_as_large_as_it_should(self) -> None:
        assert len(self.index) == len(self.kept)
        assert self.index.nbytes <= (DIM + 1) * 4 * max(64, 4 * len(self.kept) + 4)


class InnerProductLife(Life):
    metric: Metric = "ip"


class DistanceLife(Life):
    metric: Metric = "l2"


for each in (Life, InnerProductLife, DistanceLife):
    each.TestCase.settings = settings(max_examples=15, stateful_step_count=12, deadline=None)
TestCosine = Life.TestCase
TestInnerProduct = InnerProductLife.TestCase
TestDistance = DistanceLife.TestCase


@pytest.mark.parametrize("metric", METRICS)
@given(seed=st.integers(0, 1 << 30), rows=st.integers(1, 300), dim=st.sampled_from([1, 5, 64, 384]))
@settings(max_examples=15, deadline=None)
def test_the_exact_index_finds_what_float64_finds(
    metric: Metric, seed: int, rows: int, dim: int
) -> None:
    random = numpy.random.default_rng(seed)
    matrix = random.standard_normal((rows, dim)).astype("float32")
    matrix[rows // 2 :] = matrix[: rows - rows // 2] * numpy.float32(1 + 2e-7)  # nearly equal
    index = open_index("exact", dim, metric)
    for number, row in enumerate(matrix):
        index.put(name(number), row)
    query = random.standard_normal(dim).astype("float32")
    kept = numpy.stack([scaled(row, metric) for row in matrix])
    exact = scores(kept, scaled(query, metric), metric).tolist()
    best = sorted((-score, name(number)) for number, score in enumerate(exact))[:10]
    assert [(-score, entry) for entry, score in index.nearest(query, 10)] == best


def test_rows_that_float64_cannot_tell_apart_come_in_the_order_of_their_names() -> None:
    """Tiny rows and a far query: all distances are equal in float64, and not the rough ones."""
    random = numpy.random.default_rng(2)
    index = open_index("exact", 8, "l2")
    rows = random.standard_normal((30, 8)) * 10.0 ** random.integers(-40, -12, (30, 1))
    for number, row in enumerate(rows):
        index.put(name(number), as_vector(row, 8, "l2"))
    found = index.nearest(as_vector(random.standard_normal(8) * 1e6, 8, "l2"), 3)
    assert [entry for entry, _ in found] == [name(0), name(1), name(2)]


@pytest.mark.parametrize("metric", METRICS)
def test_the_approximate_index_finds_nearly_all_and_scores_them_exactly(metric: Metric) -> None:
    random = numpy.random.default_rng(7)
    # Paraphrases around topics, as questions are, rather than noise, which no graph can order.
    topics = random.standard_normal((60, 48))
    matrix = (topics.repeat(25, axis=0) + 0.4 * random.standard_normal((1500, 48))).astype("f4")
    exact, graph = open_index("exact", 48, metric), open_index("hnsw", 48, metric)
    for number, row in enumerate(matrix):
        exact.put(name(number), row)
        graph.put(name(number), row)
    for number in range(0, 1500, 3):
        exact.drop(name(number))
        graph.drop(name(number))
    assert len(graph) == 1000
    found = firsts = 0
    for row in matrix[:200]:
        query = row + 0.1 * random.standard_normal(48).astype("f4")
        best, near = exact.nearest(query, 10), graph.nearest(query, 10)
        assert dict(near).items() <= dict(exact.nearest(query, 1000)).items()
        found += len(dict(best).keys() & dict(near).keys())
        firsts += best[0] == near[0]
    assert found / 2000 >= 0.95
    assert firsts / 200 >= 0.98


def test_the_approximate_index_stays_as_small_as_what_is_in_it() -> None:
    random = numpy.random.default_rng(8)
    graph = open_index("hnsw", 8, "l2")
    sizes = []
    for _ in range(4):
        for number, row in enumerate(random.standard_normal((1100, 8)).astype("f4")):
            graph.put(name(number), row)
        sizes.append(graph.nbytes)
    assert len(graph) == 1100
    assert sizes[-1] <= 2 * sizes[0]
    for number in range(1100):
        graph.drop(name(number))
    assert graph.nearest(numpy.ones(8, "f4"), 3) == []


@pytest.mark.parametrize("metric", METRICS)
def test_the_approximate_index_loses_nothing_while_it_is_small(metric: Metric) -> None:
    random = numpy.random.default_rng(5)
    exact, graph = open_index("exact", 8, metric), open_index("hnsw", 8, metric)
    for step in range(3000):
        entry, chance = name(int(random.integers(40))), random.random()
        if chance < 0.55:
            row = random.standard_normal(8).astype("f4")
            exact.put(entry, row)
            graph.put(entry, row)
        for gone in [entry] if chance < 0.97 else map(name, range(40)):
            if chance >= 0.55:
                exact.drop(gone)
                graph.drop(gone)
        query = random.standard_normal(8).astype("f4")
        assert graph.nearest(query, 100) == exact.nearest(query, 100), f"step {step}"
