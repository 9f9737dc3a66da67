"""Zero copy on one host: clients read and write pages in the shared arena.

KV.ATTACH says where the arena is; KV.LEASE pins pages to read in place; KV.RESERVE gives a slot to
write in place, and KV.COMMIT makes it a page once the server has checksummed it. Leases end with
their connection, at their deadline, or when their owner says so.
"""

import os
import struct
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Final

import anyio.to_thread

from respkv.engine.leases import Lease, Mode
from respkv.errors import CommandError, LeaseGone
from respkv.server.arguments import Words, count, integer, shown
from respkv.server.commands.pages import (
    check_fits,
    check_key,
    counted_keys,
    put_options,
)
from respkv.server.commands.strings import use_loaded
from respkv.server.gpu import check_gpu, lease_on_gpu
from respkv.server.registry import Later, command
from respkv.server.session import Session
from respkv.tiers.format import HEADER_BYTES, hash64
from respkv.wire import reply
from respkv.wire.parser import Args

LAYOUT_VERSION: Final = 1
HASH_ON_LOOP_MAX: Final = 1 << 20
_ABSENT: Final = (-1, -1)


@command("kv.attach")
def kv_attach(session: Session, args: Args) -> None:
    """Answer with the arena's path, size, layout version and what clients may do with it.

    Behind that which file it is, and the ways in which a lease can be answered beside the plain one.
    """
    check_shared(session)
    arena = session.server.arena
    mode = session.server.config.shm
    session.send([arena.path, arena.nbytes, LAYOUT_VERSION, mode, _identity(arena.fd), "packed"])


def _identity(fd: int) -> str:
    """Name the arena's file beyond its path, which the arena of another host or container shares."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    found = os.fstat(fd)
    return f"{boot}:{found.st_dev}:{found.st_ino}"


def check_shared(session: Session, *, writing: bool = False) -> None:
    """Raise CommandError unless the arena is shared, and for writing if that is asked."""
    if session.server.is_embedded:
        return
    mode = session.server.config.shm
    if mode == "off":
        raise CommandError("shared memory is off; start the server with --shm ro or --shm rw")
    if writing and mode != "rw":
        raise CommandError("shared memory is read-only; start the server with --shm rw")


def _deadline(session: Session, ms: int | None) -> float:
    config = session.server.config
    ms = config.lease_default if ms is None else ms
    if ms > config.lease_max:
        raise CommandError(f"MS {ms} is more than lease-max, {config.lease_max}")
    return session.cache.clock.now + ms / 1000


def _keys_for_memory(args: Args) -> Sequence[bytes]:
    """Return the keys of a lease in the arena; on a GPU, bringing them is the handler's affair."""
    try:
        keys, rest = counted_keys(args)
    except CommandError:
        return ()
    words = [word.upper() for word in args[rest:] if isinstance(word, bytes)]
    return () if b"GPU" in words else keys


@command("kv.lease", _keys_for_memory, is_strict=True)
def kv_lease(session: Session, args: Args) -> "Later | None":
    """Pin pages for reading in place; answer with the lease and where each page is.

    Pages in files alone have been brought into memory, all of them or the answer is an error.
    """
    keys, rest = counted_keys(args)
    words = Words(args, rest)
    ms, tier, is_packed = None, b"CPU", False
    while words:
        word = words.word()
        if word == b"MS":
            ms = words.count("MS", 1)
        elif word == b"TIER":
            tier = words.word()
        elif word == b"PACKED" and not is_packed:
            is_packed = True
        else:
            raise words.unexpected()
    deadline = _deadline(session, ms)
    if tier == b"GPU":
        if is_packed:
            raise CommandError("PACKED is for TIER cpu, not TIER gpu: leave out one of them")
        check_gpu(session)
        return lease_on_gpu(session, keys, deadline)
    if tier != b"CPU":
        raise CommandError(f"TIER {shown(tier)}: pages are leased in the cpu and gpu tiers")
    check_shared(session)
    _lease_in_arena(session, keys, deadline, is_packed=is_packed)
    return None


def _lease_in_arena(
    session: Session, keys: list[bytes], deadline: float, *, is_packed: bool
) -> None:
    cache = session.cache
    found = [use_loaded(session, key) for key in keys]
    leased = [entry for entry in found if entry is not None and entry.slot is not None]
    lease = cache.lease(session.number, leased, deadline)
    places = [
        None
        if entry is None or entry.slot is None
        else (entry.slot.offset + HEADER_BYTES, entry.nbytes)
        for entry in found
    ]
    cache.stats.bytes_out += sum(entry.nbytes for entry in leased)
    cache.stats.bytes_sent_in_place += sum(entry.nbytes for entry in leased)
    if not is_packed:
        session.send([lease.number, *places])
        return
    numbers = chain.from_iterable(_ABSENT if place is None else place for place in places)
    session.send([lease.number, struct.pack(f"<{2 * len(places)}q", *numbers)])


@command("kv.release")
def kv_release(session: Session, args: Args) -> None:
    """End a read lease; 0 says that it had lapsed and what was read must not be trusted."""
    number = integer(args[1])
    cache = session.cache
    tables = (cache.leases, cache.gpu.leases)
    is_ended = any(leases.end(session.number, number) for leases in tables)
    session.out.append(reply.integer(is_ended))


@command("kv.reserve")
async def kv_reserve(session: Session, args: Args) -> None:
    """Give a slot to write a page into; answer with the lease and its place.

    Waits for room as a put does. Cancelled: nothing is held.
    """
    check_shared(session, writing=True)
    key, nbytes = args[1], count(args[2], "nbytes", 1)
    check_key(key)
    words = Words(args, 3)
    ms = None
    while words:
        if words.word() != b"MS":
            raise words.unexpected()
        ms = words.count("MS", 1)
    _deadline(session, ms)
    if nbytes > session.server.config.proto_max_bulk_len:
        raise CommandError(f"nbytes {nbytes} is more than proto-max-bulk-len")
    check_fits(session, key, nbytes)
    lease = await _reserved(session, key, nbytes, ms)
    session.send([lease.number, lease.slots[0].offset + HEADER_BYTES])


async def _reserved(session: Session, key: bytes, nbytes: int, ms: int | None) -> Lease:
    cache, server = session.cache, session.server
    if session.is_lost:  # before this task began: nobody would ever end the lease
        raise LeaseGone("the connection has gone")
    landing = server.find_room(nbytes)
    if landing is None:
        landing = await server.wait_for_room(nbytes, lambda: session.is_lost)
    if landing is not None:
        cache.abandon(landing)  # it only showed that there is room now; no await until it is taken
    if session.is_lost:
        raise LeaseGone("the connection has gone")
    return cache.lease_room(session.number, key, nbytes, _deadline(session, ms))


@command("kv.commit")
async def kv_commit(session: Session, args: Args) -> None:
    """Make a reserved slot a page, once its bytes are checksummed.

    The slot is taken over before the first await: from then on neither a deadline nor a broken
    connection gives it to anybody else while it is being read.
    Cancelled: the slot is given back, the page is not published.
    """
    cache = session.cache
    lease = cache.leases.get(session.number, integer(args[1]))
    if lease.mode is not Mode.WRITE:
        raise LeaseGone(f"lease {lease.number} is for reading")
    nbytes = lease.slots[0].payload_bytes
    put_options(session, lease.key, nbytes, Words(args, 2))  # if it raises, the lease stays
    slot = cache.leases.take_over(lease)
    landing = cache.adopt(slot)
    try:
        if slot.payload_bytes <= HASH_ON_LOOP_MAX:
            checksum = hash64(landing.memory)
        else:
            checksum = await anyio.to_thread.run_sync(hash64, landing.memory)
        # Not before: all may have changed since the reservation, and while the bytes were hashed,
        # as what others have pinned by now.
        how, is_new_only = put_options(session, lease.key, nbytes, Words(args, 2))
        check_fits(session, lease.key, slot.payload_bytes)
        if is_new_only and cache.find(lease.key) is not None:
            session.send_nil()
            return
        with session.promising():
            cache.seal(lease.key, landing, checksum, how)
            session.out.append(reply.OK)
    finally:
        cache.abandon(landing)
    cache.stats.pages_put += 1
    cache.stats.commits += 1
    cache.stats.bytes_landed += slot.payload_bytes


@command("kv.abort")
def kv_abort(session: Session, args: Args) -> None:
    """Give a reserved slot back unwritten; 0 says that it had lapsed."""
    number = integer(args[1])
    session.out.append(reply.integer(session.cache.leases.end(session.number, number)))
