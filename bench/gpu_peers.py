"""Others' kernels for the same decode step, where they are installed."""

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Final

import torch
from torch import Tensor

from bench.gpu_clock import Work
from respkv.kernels.paged_kv import PagedKV

# What a package that is there, but of another version than these calls are for, may raise.
UNUSABLE: Final = (ImportError, AttributeError, TypeError, ValueError, RuntimeError, AssertionError)
WORKSPACE_BYTES: Final = 256 << 20
ERROR_MAX: Final = 0.02


def peers(query: Tensor, pages: PagedKV, expected: Tensor, suffix: str) -> list[Work | str]:
    """Return the works of others that agree with ``expected``, and for each other one why not."""
    found: list[Work | str] = []
    for name, package, make in (
        ("FlashInfer", "flashinfer", _flashinfer),
        ("vLLM", "vllm", _vllm),
    ):
        if find_spec(package) is None:
            found.append(f"{name}: not installed")
            continue
        try:
            run = make(query, pages)
            error = relative_error(run(), expected)
        except UNUSABLE as problem:
            found.append(f"{name}: {type(problem).__name__}: {str(problem).partition(chr(10))[0]}")
        else:
            is_right = error <= ERROR_MAX
            found.append(
                Work(f"{name}, {suffix}", run) if is_right else f"{name}: is off by {error:.2g}"
            )
    return found


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Return the L2 norm of the difference as a part of what is expected."""
    exact = expected.double()
    return float((found.double().reshape(exact.shape) - exact).norm() / exact.norm())


def _flashinfer(query: Tensor, pages: PagedKV) -> Callable[[], Tensor]:
    flashinfer = import_module("flashinfer")

    _, page_tokens, heads, dim = pages.keys.shape
    batch, blocks = pages.block_tables.shape
    workspace = torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=query.device)
    wrapper: Any = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=True
    )
    starts = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * blocks
    wrapper.plan(
        starts,
        pages.block_tables.flatten(),
        torch.full((batch,), page_tokens, dtype=torch.int32, device=query.device),
        query.shape[1],
        heads,
        dim,
        page_tokens,
        q_data_type=query.dtype,
        kv_data_type=pages.keys.dtype,
    )
    kv = (pages.keys, pages.values)
    return lambda: wrapper.run(query, kv)


def _vllm(query: Tensor, pages: PagedKV) -> Callable[[], Tensor]:
    kernels = import_module("vllm.vllm_flash_attn")  # what vLLM takes on NVIDIA's GPUs

    batch, blocks = pages.block_tables.shape
    starts = torch.arange(batch + 1, dtype=torch.int32, device=query.device)
    is_hopper = torch.cuda.get_device_capability(query.device)[0] == 9
    return lambda: kernels.flash_attn_varlen_func(
        query,
        pages.keys,
        pages.values,
        max_seqlen_q=1,
        cu_seqlens_q=starts,
        max_seqlen_k=blocks * pages.keys.shape[1],
        seqused_k=pages.context_lens,
        block_table=pages.block_tables,
        softmax_scale=query.shape[2] ** -0.5,
        causal=True,
        fa_version=3 if is_hopper else 2,
    )
