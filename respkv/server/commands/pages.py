"""KV.PUT, KV.GET, KV.MATCH and what else works on pages.

A page that is already there is not written again: when its key ends with a page id, equal keys mean
equal bytes, so the session drops the payload as it arrives and only the options take effect.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Final

from respkv.engine.entry import Entry, Put
from respkv.engine.landing import Landing
from respkv.engine.namespaces import check_part, check_payload
from respkv.errors import CommandError, SchemaMismatch
from respkv.page import KEY_BYTES_MAX, part_of
from respkv.server.arguments import Words, count, count_ms, shown, value_of
from respkv.server.body import Refused
from respkv.server.commands.keyspace import mark_used
from respkv.server.commands.strings import send_entry, use_loaded
from respkv.server.forms import Form, form_of, layer_range, send_many, send_one, shape_for
from respkv.server.gpu import check_gpu
from respkv.server.keeping import LEVELS, expires_ms, level_of, pinned_until
from respkv.server.loads import cold_entries
from respkv.server.places import letters_of, load_us
from respkv.server.registry import Later, command
from respkv.server.session import Session
from respkv.server.streams import Span, stream_values, whole
from respkv.tiers.record import Level
from respkv.wire import reply
from respkv.wire.parser import Args

DEADLINE_S_MAX = 86_400.0
NAME_BYTES_MAX: Final = {b"SESSION": 256, b"TENANT": 1024}


def put_options(session: Session, key: bytes, nbytes: int, words: Words) -> tuple[Put, bool]:
    """Read the options of KV.PUT and KV.COMMIT; return them and whether NX was given.

    Raises CommandError, and PinRefused when too much is pinned already.
    """
    check_key(key)
    schema = session.cache.namespaces.of_key(key)
    ttl_ms = 0 if schema is None else schema.ttl_ms
    parent: bytes | None = None
    tokens = priority = pin_ms = 0
    level: Level | None = None
    names = {b"SESSION": b"", b"TENANT": b""}
    seen: set[bytes] = set()
    while words:
        word = words.word()
        if word in seen:  # a second PARENT would be a key that nobody checked
            raise words.unexpected()
        seen.add(word)
        if word == b"PARENT":
            parent = words.take()
            check_key(parent)
            if part_of(parent) is not None:
                raise CommandError("PARENT names a part of a page; pages stand behind pages")
        elif word == b"TOKENS":
            tokens = words.count("TOKENS", 1)
        elif word == b"PX":
            ttl_ms = count_ms(words.take(), "PX")
        elif word == b"PRIORITY":
            priority = words.integer()
        elif word == b"PIN":
            pin_ms = count_ms(words.take(), "PIN")
        elif word in names:
            names[word] = _name(words, word)
        elif word in LEVELS and not seen & (LEVELS.keys() - {word}):
            level = level_of(session, word)
        elif word != b"NX":
            raise words.unexpected()
    entry = session.cache.find(key)
    if parent == key or (entry and parent and session.cache.index.is_circle(entry, parent)):
        raise CommandError("PARENT would make the page stand behind itself")
    how = Put(
        "kvpage",
        expires_ms(session, ttl_ms),
        priority,
        tokens,
        parent,
        level,
        tenant=names[b"TENANT"],
        session=names[b"SESSION"],
        pinned_until=pinned_until(session, pin_ms, nbytes, entry),
    )
    return how, b"NX" in seen


def _name(words: Words, word: bytes) -> bytes:
    name = words.take()
    most = NAME_BYTES_MAX[word]
    if not 0 < len(name) <= most:
        raise CommandError(f"{word.decode()} has 1 to {most} bytes, not {len(name)}")
    if name.upper() == b"PARENT":  # what follows it would be taken for a key
        raise CommandError(f"{word.decode()} {shown(name)}: that is a word of the command")
    return name


def check_key(key: bytes) -> None:
    """Raise CommandError when a page key, or a parent's, is too long."""
    if len(key) > KEY_BYTES_MAX:
        raise CommandError(f"a page key has at most {KEY_BYTES_MAX} bytes, not {len(key)}")


@command("kv.put")
def kv_put(session: Session, args: Args) -> None:
    """Store a page."""
    key = args[1]
    nbytes = args[2].nbytes if isinstance(args[2], Landing | Refused) else len(args[2])
    how, is_new_only = put_options(session, key, nbytes, Words(args, 3))
    value = value_of(args[2])
    cache = session.cache
    check_fits(session, key, nbytes)
    there = cache.find(key)
    if is_new_only and there is not None:
        session.send_nil()
        return
    same = cache.has_page(key, nbytes)
    if same is not None:
        cache.describe(same, how)
        cache.stats.pages_skipped += 1
    elif isinstance(value, Refused):
        raise CommandError("the page left while its copy arrived; put it again", "BUSY")
    else:
        store_page(session, key, value, how)
    session.out.append(reply.OK)


def store_page(session: Session, key: bytes, value: Any, how: Put) -> None:
    """Make bytes or a full landing a page."""
    cache = session.cache
    if isinstance(value, Landing):
        cache.commit(key, value, how)
    else:
        cache.put(key, value, how)
    cache.stats.pages_put += 1


def check_fits(session: Session, key: bytes, nbytes: int) -> None:
    """Raise SchemaMismatch when a page has the wrong size, and CommandError when it is empty."""
    if not nbytes:
        raise CommandError("a page has at least 1 byte")
    schema = session.cache.namespaces.of_key(key)
    if schema is not None:
        try:
            if part_of(key) is None:
                check_payload(schema, nbytes)
            else:
                check_part(schema, key, nbytes)
        except SchemaMismatch:
            session.cache.history.note(key, "schema")
            raise


def _within(args: Args) -> float | None:
    """Return the seconds of a KV.GET's DEADLINE."""
    try:
        return _form(Words(args, 2)).seconds
    except CommandError:
        return 0.0  # the handler says what is wrong


def _key_unless_as(args: Args) -> Sequence[bytes]:
    """Return the key; none when AS is asked for, which brings it itself."""
    if len(args) == 2:
        return args[1:]
    words = [word.upper() for word in args[2:] if isinstance(word, bytes)]
    return () if b"AS" in words else args[1:2]


@command("kv.get", _key_unless_as, within=_within)
def kv_get(session: Session, args: Args) -> "Later | None":
    """Answer with a page, or some of its layers."""
    form = _form(Words(args, 2))
    if form.dtype:
        return send_one(session, args[1], form)
    entry = use_loaded(session, args[1])
    if entry is None:
        session.cache.stats.page_misses += 1
        session.send_nil()
        return None
    session.cache.stats.page_hits += 1
    if form.layers is None:
        send_entry(session, entry)
        return None
    span = layer_bytes(session, entry, *form.layers)
    assert entry.slot is not None
    session.send_slot(entry.slot, *span)
    return None


def keys_asked(args: Args) -> Sequence[bytes]:
    """Return the keys of ``CMD n key...``, none when the handler will say what is wrong."""
    try:
        return counted_keys(args)[0]
    except CommandError:
        return ()


@command("kv.mget", keys_asked, streams="always")
def kv_mget(session: Session, args: Args) -> Later:
    """Answer with pages in order, each sent when the one before has room."""
    keys, rest = counted_keys(args)
    form = _form(Words(args, rest))
    if form.dtype:
        return send_many(session, keys, form)

    def span_of(entry: Entry) -> Span:
        return whole(entry) if form.layers is None else layer_bytes(session, entry, *form.layers)

    return stream_values(session, keys, span_of=span_of, are_pages=True, seconds=form.seconds)


def layer_bytes(session: Session, entry: Entry, first: int, count: int) -> tuple[int, int]:
    """Return the byte range of some layers of a page. Raises CommandError when it has none."""
    return layer_range(shape_for(session, entry, "LAYERS"), first, count)


def _form(words: Words) -> Form:
    """Read the options of KV.GET and KV.MGET."""
    form = Form()
    seen: set[bytes] = set()
    while words:
        word = words.word()
        if word in seen:  # which of the two was meant?
            raise words.unexpected()
        seen.add(word)
        if word == b"LAYERS":
            layers = (words.count("first layer"), words.count("layer count", 1))
            form = replace(form, layers=layers)
        elif word == b"DEADLINE":
            seconds = min(words.count("DEADLINE") / 1000, DEADLINE_S_MAX)
            form = replace(form, seconds=seconds)
        elif word == b"AS":
            form = replace(form, dtype=form_of(words.take()))
        else:
            raise words.unexpected()
    return form


def counted_keys(args: Args) -> tuple[list[bytes], int]:
    """Return the keys of ``CMD n key...`` and the position of what follows them."""
    number = count(args[1], "numkeys", 1)
    if number > len(args) - 2:
        raise CommandError("Number of keys can't be greater than number of args")
    return args[2 : 2 + number], 2 + number


@command("kv.match")
def kv_match(session: Session, args: Args) -> None:
    """Answer with the longest run of present pages, their tiers, and how long loading takes.

    What was found is used, and promised to stay for ``answer-lease``.
    """
    keys, rest = counted_keys(args)
    words, name = Words(args, rest), b""
    while words:
        if words.word() != b"SESSION" or name:
            raise words.unexpected()
        name = _name(words, b"SESSION")
    cache = session.cache
    until = cache.clock.now + session.server.config.answer_lease / 1000
    run = cache.match(keys, until, session=name)
    session.send([len(run), letters_of(session, run), load_us(session, run)])


@command("kv.prefetch")
def kv_prefetch(session: Session, args: Args) -> None:
    """Have pages brought into memory; answer with how many are on their way.

    They are promised to stay for ``answer-lease``, as a match's are.
    """
    keys, rest = counted_keys(args)
    words = Words(args, rest)
    is_to_gpu = False
    while words:
        if words.word() != b"TO":
            raise words.unexpected()
        is_to_gpu = _is_gpu(session, words.take())
    cache, mover = session.cache, session.server.mover
    cold = cold_entries(cache, keys) if cache.copies.num_cold else []
    until = cache.clock.now + session.server.config.answer_lease / 1000
    for entry in cold:
        cache.promise(entry, until)
    if is_to_gpu:
        found = {entry for entry in map(cache.find, keys) if entry is not None}
        wanted = {entry for entry in found if cache.gpu.want(entry)}
        cold = [entry for entry in cold if entry in wanted]
        session.out.append(reply.integer(len(wanted)))
    raised = mover.advise_prefetch(cold) if mover is not None and cold else 0
    if not is_to_gpu:
        session.out.append(reply.integer(raised))


def _is_gpu(session: Session, tier: bytes) -> bool:
    """Whether TO names the gpu tier and not memory. Raises CommandError for what is no such tier."""
    if tier.lower() == b"gpu":
        check_gpu(session)
        return True
    if tier.lower() != b"cpu":
        raise CommandError(f"TO {shown(tier)}: pages can be brought to the cpu and gpu tiers")
    return False


@command("kv.touch")
def kv_touch(session: Session, args: Args) -> None:
    """Mark pages as used; answer with how many are there."""
    keys, rest = counted_keys(args)
    if rest != len(args):
        raise CommandError("syntax error")
    mark_used(session, keys)


@command("kv.pin")
def kv_pin(session: Session, args: Args) -> None:
    """Keep a page from eviction for some milliseconds, whoever asks and whoever leaves.

    More than ``pin-max`` is cut to that. Raises PinRefused when too much is pinned already.
    """
    entry = session.cache.find(args[1])
    ms = count_ms(args[2], "ms")
    if entry is not None:
        session.cache.pin(entry, pinned_until(session, ms, entry.nbytes, entry))
    session.out.append(reply.integer(entry is not None))


@command("kv.unpin")
def kv_unpin(session: Session, args: Args) -> None:
    """Let a page be evicted again."""
    entry = session.cache.find(args[1])
    was_pinned = entry is not None and entry.pinned_until > session.cache.clock.now
    if entry is not None and entry.pinned_until:
        session.cache.pin(entry, 0.0)
    session.out.append(reply.integer(was_pinned))
