"""Interpret Triton's kernels where there is no GPU; give tests the device that they run on.

The variable must be set before Triton is imported at all: its own library is made of ``triton.jit``
functions as well. tests/conftest.py does so for whole runs, in which others may import it first.
"""

import os
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    assert "triton" not in sys.modules or os.environ.get("TRITON_INTERPRET") == "1", (
        "triton was imported before anything asked for its interpreter: set TRITON_INTERPRET=1"
    )
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where there is a GPU, ``-m gpu`` runs every test of a kernel on it."""
    for item in items:
        if HAS_GPU and "device" in getattr(item, "fixturenames", ()):
            item.add_marker("gpu")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """A GPU where there is one; otherwise kernels are interpreted on tensors in memory."""
    return torch.device("cuda" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def quiet_floats() -> Iterator[None]:
    """Let the interpreter, which is numpy, overflow and subtract infinities as a GPU does: silently."""
    with np.errstate(all="ignore"):
        yield
