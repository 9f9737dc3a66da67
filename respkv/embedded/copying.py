"""Copying memory: large stretches without the interpreter, which other threads then may have."""

import numpy

# Below this, letting go of the interpreter and taking it again costs more than the copy.
FREE_BYTES = 256 * 1024


def copy(into: memoryview, source: bytes | memoryview, start: int, nbytes: int) -> None:
    """Copy ``nbytes`` from ``start`` on into the beginning of ``into``. Both are bytes."""
    if nbytes < FREE_BYTES:
        into[:nbytes] = source[start : start + nbytes]
        return
    target = numpy.frombuffer(into, numpy.uint8, nbytes)
    numpy.copyto(target, numpy.frombuffer(source, numpy.uint8, nbytes, start))
