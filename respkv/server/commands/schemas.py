"""KV.SCHEMA: what the pages of a namespace look like."""

from collections.abc import Awaitable
from typing import Any

import anyio.lowlevel

from respkv.engine.cache import Cache
from respkv.engine.entry import Entry
from respkv.engine.namespaces import AUTO, Kind, Schema
from respkv.engine.spaces import Limits
from respkv.errors import CommandError, QuotaExceeded, TierError
from respkv.kernels.layout import Codec
from respkv.page import Latents, namespace_of
from respkv.server.arguments import Words, count_ms, shown
from respkv.server.keeping import LEVELS, level_of
from respkv.server.page_specs import make_ready
from respkv.server.registry import command
from respkv.server.schema_files import SchemaFiles
from respkv.server.schema_groups import SHAPE_WORDS, Draft, groups_of, read_group, words_of
from respkv.server.session import Session
from respkv.tiers.codec import check_available, parse_codec, takes_dtype
from respkv.tiers.record import Level
from respkv.wire import reply
from respkv.wire.parser import Args

STEP = 2000  # keys looked at before others are let in
NAMESPACE_BYTES_MAX = 256
NAMESPACES_MAX = 4096
IDENTITY_BYTES_MAX = 1024  # of a fingerprint, an algorithm's name and a seed
_QUOTAS = {b"MAXBYTES": "max_bytes", b"TENANTBYTES": "tenant_bytes"}
_TARGETS = {b"MAXERROR": "error_max", b"MINRATIO": "ratio_min"}


@command("kv.schema|set")
def kv_schema_set(session: Session, args: Args) -> Awaitable[None] | None:
    """Register the schema of a namespace, or check that it is the one in force."""
    schema, quotas = _parse(session, args)
    cache, files = session.cache, session.server.schema_files
    for nbytes in schema.piece_sizes:
        if nbytes > cache.slabs.payload_bytes_max:
            raise CommandError(
                f"a page of {nbytes} bytes never fits the arena, which takes at "
                f"most {cache.slabs.payload_bytes_max}; raise maxmemory"
            )
    known = cache.namespaces.find(schema.namespace)
    if known is None and len(cache.namespaces) >= NAMESPACES_MAX:
        raise CommandError(f"there are {NAMESPACES_MAX} namespaces; KV.SCHEMA DEL one first")
    cache.namespaces.put(schema)
    is_limited_anew = _limit(session, schema.namespace, known, quotas)
    is_same = known == schema and not is_limited_anew
    for nbytes in schema.piece_sizes:
        cache.slabs.add_class(nbytes)
    if files is not None and not (is_same and files.is_saved):
        return _save(session, files, schema)
    session.out.append(reply.OK)
    return None


def _limit(
    session: Session, namespace: bytes, known: Schema | None, quotas: dict[str, int]
) -> bool:
    """Put quotas in force; return whether they are others than before.

    known: the schema before, which is in force again when what is there does not fit them.
    Raises QuotaExceeded then.
    """
    accounts, namespaces = session.cache.accounts, session.cache.namespaces
    before = accounts.limits_of(namespace)
    limits = before.copy()
    limits.max_bytes = quotas.get("max_bytes", limits.max_bytes)
    limits.tenant_bytes = quotas.get("tenant_bytes", limits.tenant_bytes)
    if limits == before:
        return False
    try:
        accounts.set_limits(namespace, limits)
    except QuotaExceeded:
        if known is None:
            namespaces.drop(namespace)
        else:
            namespaces.put(known)
        raise
    return True


async def _save(session: Session, files: SchemaFiles, schema: Schema) -> None:
    """Answer once a restart would find the schema; at level memory, whether it does or not.

    Cancelled: it is in force, and may be saved.
    """
    await make_ready([schema])
    try:
        await files.save()
    except TierError:
        if schema.level:
            raise
    session.out.append(reply.OK)


def _parse(session: Session, args: Args) -> tuple[Schema, dict[str, int]]:
    """Read a schema, and the quotas that are said with it."""
    namespace = args[2]
    if not 0 < len(namespace) <= NAMESPACE_BYTES_MAX:
        raise CommandError(f"a namespace has 1 to {NAMESPACE_BYTES_MAX} bytes")
    drafts = [Draft()]
    tokens: int | None = None
    fingerprint = seed = b""
    algorithm = b"blake3"
    codecs: dict[bytes, bytes] = {}
    kept: dict[str, Any] = {}
    quotas: dict[str, int] = {}
    words = Words(args, 3)
    while words:
        word = words.word()
        if word in SHAPE_WORDS:
            drafts[-1].read(word, words)
        elif word == b"TOKENS":
            tokens = words.count("TOKENS", 1)
        elif word == b"MLA" and len(drafts) == 1:
            drafts[0].kind = Kind.MLA
        elif word == b"GROUP":
            drafts.append(read_group(words))
        elif word == b"FINGERPRINT":
            fingerprint = _identity(words)
        elif word == b"HASH":
            algorithm = _identity(words)
        elif word == b"SEED":
            seed = _identity(words)
        elif word == b"CODEC":
            tier, name = _codec(session, words)
            if tier in codecs:
                raise CommandError(f"CODEC {shown(tier)} is given twice")
            codecs[tier] = name
        elif word == b"EXACT":
            kept["exact_first"] = words.count("EXACT first")
            kept["exact_last"] = words.count("EXACT last")
        elif word in _TARGETS:
            kept[_TARGETS[word]] = words.fraction(word.decode())
        elif word in _QUOTAS:
            quotas[_QUOTAS[word]] = words.count(word.decode())
        elif word == b"TTL":
            kept["ttl_ms"] = count_ms(words.take(), "TTL")
        elif word == b"DURABILITY":
            kept["level"] = _level(session, words.take())
        else:
            raise words.unexpected()
    geometry = drafts[0].geometry(tokens)
    kept["groups"] = groups_of(drafts[1:], geometry)
    pairs = tuple(codecs.items())
    schema = Schema(namespace, geometry, fingerprint, algorithm, seed, pairs, **kept)
    _check_codecs(schema)
    return schema, quotas


def _check_codecs(schema: Schema) -> None:
    """Raise CommandError when pages of this shape cannot have these codecs."""
    shape = schema.geometry
    if schema.exact_first + schema.exact_last > shape.tokens:
        raise CommandError(
            f"EXACT {schema.exact_first} {schema.exact_last}: a page has {shape.tokens} tokens"
        )
    num_targets = bool(schema.error_max) + bool(schema.ratio_min)
    if schema.is_tuned and num_targets != 1:
        raise CommandError("CODEC auto needs either MAXERROR or MINRATIO, and not both")
    if num_targets and not schema.is_tuned:
        raise CommandError("MAXERROR and MINRATIO need CODEC auto for at least one tier")
    if schema.error_max >= 1:
        raise CommandError(f"MAXERROR {schema.error_max:g}: it is a part of 1, as 0.05 for 5 %")
    if 0 < schema.ratio_min <= 1:
        raise CommandError(f"MINRATIO {schema.ratio_min:g}: pages would not get smaller")
    for tier, names in schema.codecs:
        if isinstance(shape, Latents) and names not in (b"raw", b"xs"):
            raise CommandError(
                f"CODEC {shown(tier)} {shown(names)}: latents are stored without loss; accepted are "
                "raw and xs"
            )
        if names == AUTO:
            if not takes_dtype(Codec.RH4, shape.dtype):
                raise CommandError(f"CODEC auto measures floating-point pages, not {shape.dtype}")
            check_available(Codec.RH4, shape.dtype)
        else:
            for codec in parse_codec(names.decode()):
                check_available(codec, shape.dtype)


def _level(session: Session, word: bytes) -> Level:
    if word.upper() == b"MEMORY":
        return Level.MEMORY
    if word.upper() in LEVELS:
        return level_of(session, word.upper())
    raise CommandError(f"DURABILITY {shown(word)}: accepted are MEMORY, WRITTEN, DURABLE")


def _identity(words: Words) -> bytes:
    value = words.take()
    if len(value) > IDENTITY_BYTES_MAX:
        raise CommandError(
            f"FINGERPRINT, HASH and SEED have at most {IDENTITY_BYTES_MAX} bytes each"
        )
    return value


def _codec(session: Session, words: Words) -> tuple[bytes, bytes]:
    """Read what follows CODEC: a tier of this server, and the name of a codec."""
    tier, name = words.take().lower(), words.take().lower()
    tiers = {each.name.encode() for each in session.server.file_tiers} | {b"cpu"}
    if session.server.gpu is not None:
        tiers.add(b"gpu")
    if tier not in tiers:
        there = ", ".join(sorted(each.decode() for each in tiers))
        raise CommandError(f"CODEC {shown(tier)}: this server has the tiers {there}")
    if tier == b"cpu" and name != b"raw":
        raise CommandError(
            f"CODEC cpu {shown(name)}: pages in memory are raw, so that they are lent"
        )
    if tier == b"gpu" and name in (AUTO, b"xs"):
        raise CommandError(
            f"CODEC gpu {shown(name)}: slots on a GPU have one size; accepted are raw and the codecs"
            " of fixed size"
        )
    if name == AUTO:
        return tier, name
    try:
        codecs = parse_codec(name.decode(errors="replace"))
    except ValueError as error:
        raise CommandError(f"CODEC {shown(tier)} {shown(name)}: {error}, or auto") from None
    return tier, codec_text(codecs)


def codec_text(codecs: tuple[Codec, Codec]) -> bytes:
    """Return the name of a codec, or of that of keys and that of values."""
    key, value = (codec.name.lower() for codec in codecs)
    return (key if key == value else f"{key}/{value}").encode()


@command("kv.schema|get")
def kv_schema_get(session: Session, args: Args) -> None:
    """Describe the schema of a namespace."""
    schema = session.cache.namespaces.find(args[2])
    if schema is None:
        session.send_nil()
        return
    shape = schema.geometry
    level = session.cache.default_level if schema.level is None else schema.level
    limits = session.cache.accounts.limits_of(schema.namespace)
    session.send(
        {
            "namespace": schema.namespace,
            "kind": schema.group(b"").kind.value,
            "layers": shape.layers,
            "heads": shape.heads,
            "dim": shape.dim,
            "tokens": shape.tokens,
            "dtype": shape.dtype,
            "page_bytes": shape.page_bytes,
            "groups": [words_of(group) for group in schema.groups],
            "fingerprint": schema.fingerprint,
            "hash": schema.hash_algorithm,
            "seed": schema.seed,
            "codecs": [list(pair) for pair in schema.codecs],
            "ttl_ms": schema.ttl_ms,
            "max_bytes": limits.max_bytes,
            "tenant_bytes": limits.tenant_bytes,
            "durability": level.name.lower(),
            "exact_first": schema.exact_first,
            "exact_last": schema.exact_last,
            "max_error": str(schema.error_max),
            "min_ratio": str(schema.ratio_min),
            "chosen": [
                codec_text(pair).decode()
                for pair in session.cache.namespaces.chosen.get(schema.namespace, ())
            ],
        }
    )


@command("kv.schema|list")
def kv_schema_list(session: Session, args: Args) -> None:
    """Answer with the names of all namespaces that have a schema."""
    session.send(list(session.cache.namespaces.names()))


def _delete_for_good(cache: Cache, entry: Entry) -> None:
    """Delete a page, and note that files have to forget it before the schema is another one.

    A page whose key names its content may come back otherwise, and would be of the wrong shape.
    """
    for part in tuple(entry.parts or ()):  # else they would go with their page, for now
        _delete_for_good(cache, part)
    known = [*entry.records, *cache.copies.moving.get(entry, ())]
    tiers = {each.tier for each in known}
    generation = max([entry.generation, *(each.generation for each in known)])
    writing = cache.copies.writing.get(entry)
    if writing is not None:
        tiers.add(writing.tier)
    cache.delete(entry)
    if tiers:
        cache.copies.bury(entry.key, tiers, generation, Level.DURABLE, waits=True)


@command("kv.schema|del")
async def kv_schema_del(session: Session, args: Args) -> None:
    """Delete the pages of a namespace, then its schema, so that none is served under another one.

    It looks at every key, and lets others in between.
    Raises TierError when a file cannot be told; the schema is in force then, without those pages.
    Cancelled: the schema is in force and some pages have gone.
    """
    cache, namespace = session.cache, args[2]
    mover, files = session.server.mover, session.server.schema_files
    is_there = cache.namespaces.find(namespace) is not None
    deleted = is_there
    while deleted:  # again, until a whole pass meets none: others may put meanwhile
        deleted, cursor = False, -1
        owed: list[tuple[int, int]] = []
        while cursor:
            since = cache.copies.ticket
            cursor, found = cache.index.scan(max(cursor, 0), STEP)
            for entry in found:
                is_there_still = entry.position >= 0  # it may have gone with its page
                if not is_there_still or entry.kind != "kvpage":
                    continue
                if namespace_of(entry.key) == namespace:
                    _delete_for_good(cache, entry)
                    deleted = True
            if cache.copies.ticket != since:
                owed.append((cache.copies.ticket, since))
            if cursor:
                await anyio.lowlevel.checkpoint()
        for ticket, since in owed:
            assert mover is not None
            await mover.settle(ticket, since)
    was_there = cache.namespaces.drop(namespace) and is_there
    if was_there:
        cache.accounts.set_limits(namespace, Limits())
    session.server.assemblies.drop_namespace(namespace)
    if was_there and files is not None:
        await files.save()
    session.out.append(reply.integer(was_there))
