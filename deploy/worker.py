"""A worker beside the cache: store pages in place, find them again, read them in place.

python worker.py unix:///run/respkv/respkv.sock [store|find]

Stands for an inference engine in compose.yaml and `make image-test`. Both ways the page's bytes lie
in the arena that this process shares with the server; the socket carries only commands.
"""

import hashlib
import sys

from respkv.client import Client

NAMESPACE = "deploy-worker"
LAYERS, HEADS, DIM, TOKENS = 8, 4, 64, 16
PAGE_BYTES = LAYERS * 2 * TOKENS * HEADS * DIM * 2


def page_of(seed: bytes) -> bytes:
    """Return the bytes of a page that only this seed gives."""
    return hashlib.shake_256(seed).digest(PAGE_BYTES)


def store(cache: Client, keys: list[bytes]) -> None:
    """Write the pages into memory that the server lends."""
    for index, key in enumerate(keys):
        with cache.reserve(key, PAGE_BYTES) as reservation:
            reservation.view[:] = page_of(key)
            reservation.commit(parent=keys[index - 1] if index else None, tokens=TOKENS)


def main(url: str, job: str = "store") -> str | None:
    """Share a chain of two pages with the server and check every byte.

    job: "find" stores nothing: another worker has, before this server was started.
    Returns: what went wrong, if something did.
    """
    prompt = [hashlib.sha256(b"page %d" % index).hexdigest() for index in range(2)]
    keys = [f"{NAMESPACE}:{page_id}".encode() for page_id in prompt]
    with Client(url) as cache:
        cache.schema_set(
            NAMESPACE, layers=LAYERS, heads=HEADS, dim=DIM, tokens=TOKENS, dtype="bfloat16"
        )
        if job == "store":
            store(cache, keys)
        found = cache.match([*keys, NAMESPACE.encode() + b":" + b"00" * 32])
        if found.pages != len(keys):
            return f"{len(keys)} pages were stored, {found.pages} found"
        with cache.lease(keys) as lease:
            for key, view in zip(keys, lease.pages, strict=True):
                if view is None or bytes(view) != page_of(key):
                    return f"wrong bytes for {key!r}"
        how = "written and read" if job == "store" else f"found in {found.tiers!r} and read"
        print(f"{len(keys)} pages of {PAGE_BYTES} bytes, {how} in shared memory")
    return None


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
