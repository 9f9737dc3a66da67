"""Rounding in Triton against torch's: every 16-bit number, and what lies between them."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: ANN001, ANN201

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from respkv.kernels import launch
from respkv.kernels.rounding_triton import (
    code_of,
    from_e4m3,
    number_of,
    reciprocal,
    round_even,
    to_e4m3,
    to_element,
)
from tests.kernels.data import every_pattern, poisoned, seeded

BLOCK = 4096


@triton.jit
def integers_kernel(x_ptr, rounded, codes, numbers, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    code = code_of(tl.minimum(tl.maximum(x, 0.0), 255.0))
    tl.store(rounded + at, round_even(x))
    tl.store(codes + at, code)
    tl.store(numbers + at, number_of(code))


@triton.jit
def e4m3_kernel(x_ptr, codes, numbers, inverses, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    code = to_e4m3(tl.minimum(tl.maximum(x, -448.0), 448.0))
    tl.store(codes + at, code)
    tl.store(numbers + at, from_e4m3(code))
    tl.store(inverses + at, reciprocal(x))


@triton.jit
def element_kernel(x_ptr, out, INTERPRETED: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + at)
    tl.store(out + at, to_element(x, out.dtype.element_ty, INTERPRETED))


def between(dtype: torch.dtype) -> Tensor:
    """Return every finite 16-bit number, what is half way to the next one, and next to that."""
    words = every_pattern(dtype).flatten()
    exact = words[words.isfinite()].float()
    half = 0x8000 if dtype == torch.bfloat16 else 0x1000  # of the last bit, in float32
    steps = torch.tensor([0, half - 1, half, half + 1], dtype=torch.int32)
    numbers = (exact.view(torch.int32)[:, None] + steps).view(torch.float32).flatten()
    return padded(numbers[numbers.isfinite()])


def padded(numbers: Tensor) -> Tensor:
    return torch.nn.functional.pad(numbers, (0, -numbers.numel() % BLOCK), value=1.0)


def run(kernel: object, x: Tensor, *out: Tensor, **named: bool) -> None:
    launch.run(kernel, x.numel() // BLOCK, x.device, x, *out, BLOCK=BLOCK, **named)


def test_integers_are_rounded_half_to_even(device: torch.device) -> None:
    x = torch.cat([torch.arange(-1024, 1024) / 4, torch.arange(-1024, 1024) / 4 + 1e-4]).to(device)
    rounded, numbers = (poisoned(x.shape, torch.float32).to(device) for _ in range(2))
    codes = poisoned(x.shape).to(device)
    run(integers_kernel, x, rounded, codes, numbers)
    assert torch.equal(rounded, x.round())
    assert torch.equal(codes.float(), x.clamp(0, 255).round())
    assert torch.equal(numbers, codes.float())


def test_e4m3_is_rounded_half_to_even_also_where_it_is_subnormal(device: torch.device) -> None:
    grid = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    grid = grid[grid.isfinite()].sort().values
    middle = (grid[1:] + grid[:-1]) / 2
    steps = torch.tensor([-1, 0, 1], dtype=torch.int32)
    beside = (middle.view(torch.int32)[:, None] + steps).view(torch.float32).flatten()
    tiny = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 2.0**-126, 2.0**-11])
    spread = torch.randn(2048, generator=seeded(1)).exp2() * 2.0**-6
    numbers = torch.cat([grid, beside, tiny, spread])
    x = padded(numbers[numbers.isfinite()]).to(device)
    codes = poisoned(x.shape).to(device)
    numbers, inverses = (poisoned(x.shape, torch.float32).to(device) for _ in range(2))
    run(e4m3_kernel, x, codes, numbers, inverses)
    expected = x.clamp(-448, 448).cpu().to(torch.float8_e4m3fn)
    assert torch.equal(codes.cpu(), expected.view(torch.uint8))
    assert torch.equal(numbers.cpu().view(torch.int32), expected.float().view(torch.int32))
    assert torch.equal(inverses.cpu(), 1.0 / x.cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_numbers_of_a_page_are_rounded_half_to_even(
    dtype: torch.dtype, device: torch.device
) -> None:
    x = between(dtype).to(device)
    out = poisoned(x.shape, dtype).to(device)
    run(element_kernel, x, out, INTERPRETED=launch.INTERPRETED)
    limit = 65504.0 if dtype == torch.float16 else torch.inf
    expected = x.clamp(-limit, limit).to(dtype)
    assert torch.equal(out.view(torch.int16), expected.view(torch.int16))
