"""The keys under which pairs of tensors are kept: ``<namespace>:<hash of the prefix>-<layer>``."""

from hashlib import blake2b

from respkv.errors import ConfigError

NAMESPACE_BYTES_MAX = 256
_DIGITS = 40  # of a prefix's hash


def check_namespace(namespace: object) -> None:
    """Raise ConfigError when a namespace cannot be part of a key."""
    if not namespace:
        raise ConfigError("namespace is empty; it must have a name")
    text = namespace if isinstance(namespace, str) and namespace.isprintable() else ""
    if not 0 < len(text.encode()) <= NAMESPACE_BYTES_MAX:
        raise ConfigError(
            f"namespace is {namespace!r}; it must be printable text of 1 to"
            f" {NAMESPACE_BYTES_MAX} bytes"
        )


def name_of(prefix: str) -> bytes:
    """Return a name for a prefix, which may be a whole prompt, that is short enough for a key."""
    if not isinstance(prefix, str):
        raise TypeError(f"prefix is a {type(prefix).__name__}; a str is needed")
    encoded = prefix.encode("utf-8", "surrogatepass")
    return blake2b(encoded, digest_size=_DIGITS // 2).hexdigest().encode()


def key_of(namespace: str, name: bytes, layer: int) -> bytes:
    """Return the key of a layer."""
    return b"%b:%b-%d" % (namespace.encode(), name, layer)


def prefix_of(namespace: str, key: bytes) -> bytes:
    """Return the name of a key's prefix; empty when the key is none of this namespace's."""
    front = namespace.encode() + b":"
    name, dash, layer = key.removeprefix(front).partition(b"-")
    is_own = key.startswith(front) and len(name) == _DIGITS and name.isalnum()
    return name if is_own and dash and layer.isdigit() else b""
