"""What files keep of a page beside its value: its place in its prompt, and whose it is, as bytes.

Without it a page could be found by its id after a restart, but no prompt could be matched inside it.
"""

import struct

from respkv.engine.entry import Entry

_HEAD = struct.Struct("<QBH")  # tokens in front, bytes of the branch, bytes of the tenant


def pack_lineage(entry: Entry) -> bytes:
    """Return what ``take_lineage`` reads; empty for what has none."""
    if entry.kind != "kvpage" or not (entry.branch or entry.tenant or entry.depth):
        return b""
    head = _HEAD.pack(entry.depth, len(entry.branch), len(entry.tenant))
    return b"".join((head, entry.branch, entry.tenant, entry.token_ids))


def take_lineage(entry: Entry, packed: bytes) -> None:
    """Give an entry the place that it had. Nothing that is cut short is believed."""
    entry.depth, entry.branch, entry.tenant, entry.token_ids = 0, b"", b"", b""
    if len(packed) < _HEAD.size:
        return
    depth, branch_bytes, tenant_bytes = _HEAD.unpack_from(packed)
    middle = _HEAD.size + branch_bytes
    end = middle + tenant_bytes
    if len(packed) < end:
        return
    entry.depth, entry.branch = depth, packed[_HEAD.size : middle]
    entry.tenant, entry.token_ids = packed[middle:end], packed[end:]
