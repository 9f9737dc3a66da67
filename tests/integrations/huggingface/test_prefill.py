"""The steps at which the prompts of a batch begin to be computed."""

import pytest

from respkv.integrations.huggingface.prefill import plan


@pytest.mark.parametrize(
    ("starts", "planned"),
    [
        ([7], [7]),
        ([0, 0], [0, 0]),
        ([40, 0, 200], [40, 0, 200]),
        ([40, 30, 200, 45, 46], [30, 30, 200, 30, 46]),  # steps of less than 16 are not worth it
        ([15, 0, 31], [0, 0, 31]),
    ],
)
def test_low_steps_are_left_out(starts: list[int], planned: list[int]) -> None:
    assert plan(starts) == planned
