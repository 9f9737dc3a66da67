"""Pages for tests: one geometry, random bytes, chained keys."""

from typing import Any

import numpy

from respkv.chain import page_ids
from respkv.page import Geometry, page_keys

GEOMETRY = Geometry(layers=4, heads=2, dim=16, tokens=256, dtype="float16")
SHAPE = (4, 2, 256, 2, 16)  # [L, 2, T, H, D]
NBYTES = GEOMETRY.page_bytes


def chain(namespace: str, count: int) -> list[bytes]:
    """Return the keys of ``count`` pages of one prompt."""
    return page_keys(namespace, page_ids(range(count * 4), page_tokens=4))


def payload(seed: int, nbytes: int = NBYTES) -> bytes:
    """Return random bytes, the same for the same seed."""
    return numpy.random.default_rng(seed).bytes(nbytes)


def declare(client: Any, namespace: str, **more: Any) -> None:
    """Declare GEOMETRY for a namespace."""
    client.schema_set(namespace, layers=4, heads=2, dim=16, tokens=256, dtype="float16", **more)
