"""The butterfly is compared with the matrix, and its order of additions with plain Python."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from respkv.kernels.hadamard import SIGN_SEED, _splitmix64, butterfly, signs, tree_sum
from tests.kernels import data


def sylvester(width: int) -> torch.Tensor:
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < width:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


@pytest.mark.parametrize("width", [1, 2, 16, 64, 128, 256])
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("num_rows", [0, 1, 7])
def test_the_butterfly_is_the_matrix_of_sylvester(width: int, blocks: int, num_rows: int) -> None:
    rows = torch.randn(width * blocks, num_rows, generator=data.seeded(width))
    exact = torch.einsum("ij,bjr->bir", sylvester(width), rows.double().view(blocks, width, -1))
    ours = butterfly(rows.clone(), width).view(blocks, width, -1)
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=1e-5 * width**0.5)


def test_the_butterfly_of_small_integers_is_exact_and_its_own_inverse() -> None:
    rows = torch.randint(-99, 99, (128, 50), generator=data.seeded(1)).float()
    assert torch.equal(butterfly(butterfly(rows.clone(), 128), 128), rows * 128)


def test_stages_go_from_neighbours_outwards() -> None:
    """The order shows where a small number is lost beside a large one, or is not."""
    rows = torch.tensor([1.0, 2.0**25, 0.0, -(2.0**25)]).unsqueeze(1)
    expected = [0.0, 0.0, 2.0**26, -(2.0**26)]
    assert butterfly(rows, 4).flatten().tolist() == expected


@given(st.integers(1, 70), st.integers(0, 3))
def test_sums_pair_neighbours_as_if_padded_with_zeros(count: int, columns: int) -> None:
    terms = torch.randn(count, columns, generator=data.seeded(count))
    level = [*terms.numpy()]
    level += [np.zeros(columns, np.float32)] * ((1 << (count - 1).bit_length()) - count)
    while len(level) > 1:
        level = [level[i] + level[i + 1] for i in range(0, len(level), 2)]
    assert torch.equal(tree_sum(terms), torch.from_numpy(level[0]))


def test_signs_are_those_of_splitmix64_and_keep_their_meaning() -> None:
    assert _splitmix64(0) == 0xE220_A839_7B1D_CDAF  # published with the generator
    assert SIGN_SEED == 0x7265_7370_6B76
    of_128 = signs(128)
    assert of_128.dtype == torch.float32
    assert torch.equal(signs(96), of_128[:96])
    negative = sum(int(sign < 0) << channel for channel, sign in enumerate(of_128.tolist()))
    assert f"{negative:032x}" == SIGNS_OF_128


SIGNS_OF_128 = "7b57495140d949ebea6b865da904ac75"
