"""KV as numbers of another type: what a page is when a worker asks for it AS a dtype.

numpy with the types of ml_dtypes does it, so a server without torch can. Numbers are rounded to the
nearest, ties to even; what is too large for an fp8 type becomes its largest number, as it does when
an engine quantizes its cache, and for the others infinity.
"""

from typing import Any, Final

import ml_dtypes
import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

BLOCK: Final = 1 << 18  # numbers at a time, so that what is between stays in the cache
_TYPES: Final[dict[str, Any]] = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float32": np.float32,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}
FLOATS: Final = frozenset(_TYPES)
# Casting beyond these gives NaN or infinity.
_LARGEST: Final = {"float8_e4m3fn": 448.0, "float8_e5m2": 57344.0}


def convert(payload: memoryview, source: str, target: str) -> memoryview:
    """Return the numbers of a payload as another type.

    source, target: of ``FLOATS``. The payload's size is a multiple of the source's element.
    It takes its time: a large one belongs into a thread.
    """
    numbers = np.frombuffer(payload, dtype=_TYPES[source])
    into = np.empty(numbers.size, dtype=_TYPES[target])
    limit = _LARGEST.get(target)
    with np.errstate(over="ignore", invalid="ignore"):  # infinity is the answer then
        for start in range(0, numbers.size, BLOCK):
            block: Array = numbers[start : start + BLOCK].astype(np.float32)
            if limit is not None:
                np.clip(block, -limit, limit, out=block)
            into[start : start + BLOCK] = block.astype(_TYPES[target])
    return memoryview(into.view(np.uint8).data)
