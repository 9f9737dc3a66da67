"""Logits as bytes."""

import pytest
import torch

from respkv.integrations.huggingface.logits import pack_logits, unpack_logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_they_come_back_bit_for_bit(dtype: torch.dtype) -> None:
    logits = torch.tensor([0.1, -0.0, torch.inf, -torch.inf, 3e-5], dtype=dtype)
    strided = torch.stack([logits, logits], dim=1)[:, 0]
    for each in (logits, strided, logits.clone().requires_grad_()):
        found = unpack_logits(pack_logits(each))
        assert found is not None
        assert found.dtype == dtype
        assert found.view(torch.uint8).equal(logits.view(torch.uint8))


def test_what_was_unpacked_may_be_written_to() -> None:
    packed = pack_logits(torch.ones(3))
    found = unpack_logits(packed)
    assert found is not None
    found.zero_()
    assert unpack_logits(packed) is not found
    assert pack_logits(torch.ones(3)) == packed


@pytest.mark.parametrize("wrong", [torch.ones(2, 3), torch.tensor(1.0), torch.ones(3).long()])
def test_what_is_no_row_of_floats_is_refused(wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match=r"logits are \[V\] floats, not"):
        pack_logits(wrong)


@pytest.mark.parametrize(
    "packed",
    [
        b"",
        b"float32",
        b"float32".ljust(16, b"\0"),
        b"float32".ljust(16, b"\0") + b"123",
        b"float33".ljust(16, b"\0") + bytes(8),
        b"nn".ljust(16, b"\0") + bytes(8),
        b"int64".ljust(16, b"\0") + bytes(8),
        b"\xff" * 40,
    ],
)
def test_bytes_of_something_else_are_no_logits(packed: bytes) -> None:
    assert unpack_logits(packed) is None
