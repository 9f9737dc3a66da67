"""Embeddings of any kind, and what is said about those that are none."""

import math
from typing import Any

import numpy
import pytest
import torch

from respkv.semantic.embeddings import as_vector, scaled, scores


@pytest.mark.parametrize(
    "embedding",
    [
        [1, 2.5, -3],
        (1, 2.5, -3),
        numpy.array([1, 2.5, -3], "float64"),
        numpy.array([[1, 2.5, -3]], "float16"),
        numpy.array([0, 1, 9, 2.5, 9, -3], "float32")[1::2],
        torch.tensor([1, 2.5, -3], dtype=torch.bfloat16),
        torch.tensor([1, 2.5, -3], requires_grad=True),
        torch.tensor([[1, 2.5, -3]], dtype=torch.float64),
    ],
    ids=str,
)
def test_lists_arrays_and_tensors_come_to_the_same(embedding: Any) -> None:
    vector = as_vector(embedding, 3, "cosine")
    assert vector.dtype == numpy.float32
    assert vector.tolist() == [1, 2.5, -3]


@pytest.mark.parametrize(
    ("tensor", "said"),
    [
        (torch.ones(3, dtype=torch.complex64), "torch.complex64 are no such numbers"),
        (torch.ones(3).to_sparse(), "not Tensor: can't convert Sparse"),
        (torch.ones(3, device="meta"), "not Tensor: Cannot copy out of meta tensor"),
    ],
    ids=["complex", "sparse", "meta"],
)
def test_a_tensor_that_would_lose_something_is_refused(tensor: torch.Tensor, said: str) -> None:
    with pytest.raises(TypeError, match=said):
        as_vector(tensor, 3, "cosine")


def test_a_vector_has_memory_of_its_own() -> None:
    mine = numpy.ones(3, "float32")
    vector = as_vector(mine, 3, "cosine")
    mine[:] = 7
    assert vector.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("embedding", "said"),
    [
        ([1, 2], r"shape \(2,\); this cache takes \(3,\)"),
        (5, r"shape \(\)"),
        ([[1, 2, 3], [4, 5, 6]], r"shape \(2, 3\)"),
        ([1, math.nan, 3], "has nan at 1"),
        ([1, 2, -math.inf], "has -inf at 2"),
        ([1e300, 0, 0], r"has 1e\+300 at 0; accepted are finite numbers up to 1e\+15"),
        ([0, 0, 0], "all zeros"),
        ([1e-60, 0, 0], "all zeros"),  # nothing is left of it in float32
        (torch.tensor([1, math.nan, 3], dtype=torch.bfloat16), "has nan at 1"),
    ],
    ids=str,
)
def test_what_cannot_be_compared_is_an_error_that_says_why(embedding: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        as_vector(embedding, 3, "cosine")


@pytest.mark.parametrize(
    "embedding",
    ["abc", {"a": 1}, ["1", "2", "3"], [1, 2, 10**400], [1, 2, 3j], [[1], [2, 3]]],
    ids=str,
)
def test_what_is_no_numbers_is_an_error(embedding: Any) -> None:
    with pytest.raises(
        TypeError, match="an embedding is a list, an array or a tensor of 3 numbers"
    ):
        as_vector(embedding, 3, "ip")


def test_scores_are_those_of_the_definitions() -> None:
    rows = numpy.array([[3, 4], [4, 3], [-3, -4], [3, 4.5]], "float32")
    query = numpy.array([3, 4], "float32")
    assert scores(rows, query, "cosine")[:3].tolist() == pytest.approx([1, 0.96, -1])
    assert scores(rows, query, "cosine")[0] == 1
    assert scores(rows, query, "ip").tolist() == [25, 24, -25, 27]
    assert scores(rows, query, "l2").tolist() == pytest.approx([0, -math.sqrt(2), -10, -0.5])


@pytest.mark.parametrize("factor", [1e-44, 1e-30, 1.0, 1e15], ids=str)
def test_the_cosine_survives_numbers_whose_squares_would_not(factor: float) -> None:
    vector = as_vector([factor, -factor / 2], 2, "cosine")
    kept = scaled(vector, "cosine")
    assert 0.5 <= abs(kept).max() < 1
    assert scores(kept[None], kept, "cosine").tolist() == [1]
    other = scaled(as_vector([1, -0.5], 2, "cosine"), "cosine")
    assert scores(kept[None], other, "cosine")[0] == pytest.approx(
        1, abs=0.2 if factor < 1e-40 else 1e-6
    )
