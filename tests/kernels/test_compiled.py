"""The compiler's report: that it would show what the tests of kernels look for."""

import pytest
import torch

from respkv.kernels import copy_triton, rounding_triton
from tests.kernels.caches import cache
from tests.kernels.compiled import Compiled, compile_for

TYPES = {
    "source": "*i64:16",
    "target": "*i64:16",
    "like": "*i16:16",
    "source_slots": "*i64:16",
    "tokens": "i32",
}


def compile_copy(layout: str, **options: object) -> Compiled:
    buffer = cache(layout, (1, 1, 4, 2, 128), torch.bfloat16, torch.device("cpu"))
    constexprs = {"target_slots": None, "FIRST_SIDE": 0, "SIDES": 2}
    shape = copy_triton.tile_shape(buffer, buffer)
    return compile_for(copy_triton.copy_kernel, TYPES, {**constexprs, **shape}, 90, **options)


def test_rows_that_are_not_aligned_show_as_narrow_accesses() -> None:
    assert compile_copy("nhd", num_warps=8).store_bits == {128}
    assert compile_copy("padded", num_warps=8).store_bits == {16}


def test_registers_that_do_not_suffice_show_as_spills() -> None:
    starved = compile_copy("nhd", num_warps=8, maxnreg=16)
    assert starved.registers <= 24
    assert starved.spill_bytes > 0


def test_what_does_not_compile_says_why_and_the_next_does() -> None:
    with pytest.raises(AssertionError, match=r"unknown or have no type.*target"):
        compile_for(copy_triton.copy_kernel, {}, {}, 90)
    with pytest.raises(AssertionError, match="CompilationError"):
        compile_for(rounding_triton.is_finite, {"x": "*fp32"}, {}, 90)
    assert compile_copy("nhd", num_warps=8).registers > 0
