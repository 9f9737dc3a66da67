"""Copying: small and large, within the bounds that were given."""

import pytest

from respkv.embedded.copying import FREE_BYTES, copy
from tests.client.pages import payload


@pytest.mark.parametrize("nbytes", [0, 1, FREE_BYTES - 1, FREE_BYTES, FREE_BYTES + 1])
@pytest.mark.parametrize("kind", [bytes, memoryview])
def test_just_these_bytes_are_copied(nbytes: int, kind: type) -> None:
    source = payload(1, nbytes + 20)
    target = bytearray(nbytes + 7)
    copy(memoryview(target), kind(source), 3, nbytes)
    assert target == source[3 : 3 + nbytes] + bytes(7)
