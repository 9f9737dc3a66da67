"""Keys of pairs: what belongs to a namespace is told from what only looks so."""

import pytest

from respkv.errors import ConfigError
from respkv.simple.names import check_namespace, key_of, name_of, prefix_of


@pytest.mark.parametrize("namespace", ["a", "a:b", "a:", ":", "é *[?]", "x" * 256])
def test_a_key_is_of_its_own_namespace_and_of_no_other(namespace: str) -> None:
    check_namespace(namespace)
    name = name_of("a:prefix\0\ud800")
    key = key_of(namespace, name, 12)
    assert prefix_of(namespace, key) == name
    for other in ("b", namespace + ":", namespace[:-1] or "c", namespace + ":a"):
        assert prefix_of(other, key) == b""


@pytest.mark.parametrize("key", [b"a:b", b"a:" + b"0" * 40, b"a:" + b"0" * 40 + b"-x", b"a", b""])
def test_other_keys_of_the_namespace_are_none(key: bytes) -> None:
    assert prefix_of("a", key) == b""


@pytest.mark.parametrize("namespace", ["", "a\n", "\ud800", "é" * 129, 5, None])
def test_a_namespace_that_cannot_be_part_of_a_key_is_refused(namespace: object) -> None:
    with pytest.raises(ConfigError, match="namespace is"):
        check_namespace(namespace)
