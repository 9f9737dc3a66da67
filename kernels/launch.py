"""Launch Triton kernels: on the device of the tensors, and with the arithmetic that codecs agree on."""

import os
from contextlib import nullcontext
from typing import Any, Final

import torch

# Triton decides when a kernel's module is imported, by the same variable.
INTERPRETED: Final = os.environ.get("TRITON_INTERPRET", "0").lower() in {"1", "true", "on", "yes"}


def run(
    kernel: Any,
    programs: int | tuple[int, ...],
    device: torch.device,
    /,
    *args: object,
    fuse: bool = False,
    **named: Any,
) -> None:
    """Launch so many programs of a kernel on the current stream of ``device``.

    fuse:  let a multiplication and an addition be rounded once. Codecs do not: their codes must be
           those of the reference.
    named: constexprs, and options such as num_warps.
    """
    grid = (programs,) if isinstance(programs, int) else programs
    if 0 in grid:
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, enable_fp_fusion=fuse, **named)
