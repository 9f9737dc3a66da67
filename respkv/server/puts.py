"""KV.SEQ.PUT: what a call says, and the pages of a prompt when they come whole.

By the time the command runs all payloads are there, most of them in slots of their own. So a put of
whole pages is one step: room is found for the small ones first, and then nothing is evicted any more,
so the pages are published in order, each behind its parent. When a payload had no room, those before
it are stored all the same: they are a prefix, and the client goes on from there. Rectangles are in
assembling.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from respkv.chain import Prompt
from respkv.engine.entry import Entry, Put
from respkv.engine.groups import bound_key, has_page, state_options
from respkv.engine.landing import Landing
from respkv.engine.namespaces import Group, Kind, Schema
from respkv.engine.sequences import Piece
from respkv.errors import CacheError, CommandError, SchemaMismatch, SequenceGap
from respkv.page import Geometry
from respkv.server.arguments import Words, count, count_ms, shown, value_of
from respkv.server.body import Refused
from respkv.server.keeping import LEVELS, expires_ms, level_of, pinned_until
from respkv.server.prompts import ChainWords, Portion, prompt_of, schema_of
from respkv.tiers.rectangles import Rectangle
from respkv.wire.parser import Args

if TYPE_CHECKING:
    from respkv.server.session import Session

FIRST_PAYLOAD = 4
STATE = b"s."
KEPT_S_MIN = 0.1  # longer than a turn


@dataclass(slots=True)
class SequencePut:
    """One call of KV.SEQ.PUT.

    payloads: bytes, full landings, or what stands for those that found no room.
    group:    of layers, whose pages they are; its name is empty for the namespace's own.
    pin_ms:   for how long its pages are to be pinned, as it was asked for.
    parts:    what belongs to the prompt's end: logits, hidden state, the state of a group.
    """

    prompt: Prompt
    schema: Schema
    group: Group
    payloads: Sequence[Any]
    first: int
    rectangle: Rectangle | None
    how: Put
    pin_ms: int
    parts: dict[bytes, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Target:
    """One page that a payload is for.

    shape: of the whole page, with the tokens that it has. there: what has it already.
    piece: of the prompt; also when the page is one of a group, which hangs on that one.
    """

    key: bytes
    parent_key: bytes
    shape: Geometry
    how: Put
    there: Entry | None
    piece: Piece


def read_put(session: "Session", args: Args) -> SequencePut:
    """Read a call of KV.SEQ.PUT. Raises CommandError or SchemaMismatch."""
    number = count(args[3], "numpayloads")
    if number > len(args) - FIRST_PAYLOAD:
        raise CommandError("Number of payloads can't be greater than number of args")
    words = Words(args, FIRST_PAYLOAD + number)
    chain, portion = ChainWords(), Portion()
    parts: dict[bytes, Any] = {}
    values: dict[bytes, int] = {}
    level = None
    seen: set[bytes] = set()
    while words:
        word = words.word()
        if chain.take(word, words) or portion.take(word, words):
            continue
        if word in seen:
            raise words.unexpected()
        seen.add(word)
        if word in (b"LOGITS", b"HIDDEN"):
            parts[word.lower()] = words.payload()
        elif word == b"FROM":
            values[word] = words.count("FROM")
        elif word in (b"PX", b"PIN"):
            values[word] = count_ms(words.take(), word.decode())
        elif word == b"PRIORITY":
            values[word] = words.integer()
        elif word in LEVELS and not seen & (LEVELS.keys() - {word}):
            level = level_of(session, word)
        else:
            raise words.unexpected()
    prompt = prompt_of(session, args[1], args[2], chain.extras())
    schema = schema_of(session, prompt.namespace)
    ttl_ms = values.get(b"PX", schema.ttl_ms)
    how = Put(
        "kvpage",
        expires_ms=expires_ms(session, ttl_ms),
        priority=values.get(b"PRIORITY", 0),
        level=level,
        tenant=chain.tenant,
        session=chain.session,
    )
    payloads = args[FIRST_PAYLOAD : FIRST_PAYLOAD + number]
    group = schema.group(portion.group)
    rectangle = portion.rectangle(schema)
    first, pin_ms = values.get(b"FROM", 0), values.get(b"PIN", 0)
    put = SequencePut(prompt, schema, group, payloads, first, rectangle, how, pin_ms, parts)
    _check_put(put)
    return put


def _check_put(put: SequencePut) -> None:
    """Raise CommandError for what no prompt is put as; make a part of a state."""
    if not put.prompt.num_tokens:
        raise CommandError("a put needs at least 1 token")
    if not put.payloads and not put.parts:
        raise CommandError("numpayloads 0 needs LOGITS or HIDDEN")
    if put.group.kind is not Kind.STATE:
        return
    if len(put.payloads) != 1:
        name = shown(put.group.name)
        raise CommandError(
            f"group {name} has one payload, its state at the end of the tokens,"
            f" and {len(put.payloads)} came"
        )
    state = put.payloads[0]
    put.group.check_piece(0, size_of(state))
    put.parts = {STATE + put.group.name: state, **put.parts}
    put.payloads = []


def targets_of(put: SequencePut, pieces: Sequence[Piece], session: "Session") -> list[Target]:
    """Return what the payloads of a put are for."""
    return [_target(put, piece, session) for piece in pieces]


def _target(put: SequencePut, piece: Piece, session: "Session") -> Target:
    shape = put.group.piece_geometry(piece.num_tokens)
    assert shape is not None
    if not put.group.name:
        how = session.server.sequences.put_options(piece, put.how)
        return Target(piece.key, piece.parent_key, shape, how, piece.there, piece)
    page, key = piece.there, bound_key(piece.key, put.group.name)
    # Parts have no TTL of their own: they go with their page.
    how = replace(
        put.how,
        expires_ms=0,
        tokens=piece.num_tokens,
        parent=piece.key,
        depth=piece.first_token,
    )
    there = None
    if page is not None and page.key != piece.key:
        there = page  # what is longer has, or will get, a longer page of the group too
    elif page is not None and has_page(page, put.group, session.cache.find):
        there = session.cache.find(key)
    return Target(key, piece.key, shape, how, there, piece)


def check_number(put: SequencePut) -> None:
    """Raise CommandError unless there is a payload for each page: before all of them are hashed."""
    number = -(-(put.prompt.num_tokens - put.first) // put.prompt.page_tokens)
    if put.payloads and len(put.payloads) != number > 0:
        raise CommandError(
            f"tokens {put.first} to {put.prompt.num_tokens - 1} are {number} pages of"
            f" {put.prompt.page_tokens} tokens, and {len(put.payloads)} payloads came"
        )


def check_payloads(session: "Session", put: SequencePut, targets: Sequence[Target]) -> None:
    """Raise unless each payload is of the right size for its page, and no part is empty."""
    if put.payloads and not targets:
        raise CommandError(f"no tokens are left from {put.first} on, and payloads came")
    for target, payload in zip(targets, put.payloads, strict=True):
        shape = target.shape if put.rectangle is None else put.rectangle.shape(target.shape)
        if size_of(payload) != shape.page_bytes:
            piece = target.piece
            session.cache.history.note(target.key, "schema")
            raise SchemaMismatch(
                f"tokens {piece.first_token} to {piece.first_token + piece.num_tokens - 1} of"
                f" namespace {shown(put.schema.namespace)!r} have {shape.page_bytes} bytes, their"
                f" payload has {size_of(payload)}"
            )
    for what, payload in put.parts.items():
        if not size_of(payload):
            raise CommandError(f"{shown(what).upper()} has at least 1 byte")


def pin_end(session: "Session", put: SequencePut, targets: Sequence[Target]) -> float:
    """Return until when the pages of a put are to be pinned; 0.0: they are not.

    Raises PinRefused when more would be pinned than may be; what is pinned already counts once.
    """
    sizes = [
        target.shape.page_bytes if target.there is None else target.there.nbytes
        for target in targets
    ]
    # Pages of another schema under their keys are replaced.
    there = (target.there or session.cache.find(target.key) for target in targets)
    return pinned_until(session, put.pin_ms, sum(sizes), *there)


def size_of(payload: Any) -> int:
    """Return the bytes of a payload, whatever stands for them."""
    return payload.nbytes if isinstance(payload, Landing | Refused) else len(payload)


def kept_until(session: "Session") -> float:
    """Return until when what a put stands behind is kept, so that it makes no room for the put."""
    lease_s = session.server.config.answer_lease / 1000
    return session.cache.clock.now + max(lease_s, KEPT_S_MIN)


# -- whole pages ------------------------------------------------------------------------------


def put_pages(session: "Session", put: SequencePut) -> None:
    """Store pages, then what belongs to the end of the prompt; answer with how many.

    Raises OutOfMemory, QuotaExceeded; the pages before the one without room are stored.
    """
    cache, sequences = session.cache, session.server.sequences
    targets: list[Target] = []
    check_number(put)
    if put.payloads:
        pieces = sequences.plan(put.prompt, put.first, until=kept_until(session))
        targets = targets_of(put, pieces, session)
    elif (holder := sequences.holder(put.prompt)) is not None:
        cache.promise(holder, kept_until(session))
    check_payloads(session, put, targets)
    for target in targets if put.group.name else ():
        _check_page(target)
    pinned = pin_end(session, put, targets)
    theres = [*(target.there for target in targets), *_parts_there(session, put)]
    _make_room(session, put, targets, theres)
    made: list[Landing] = []
    stored = 0
    try:
        values, failure = _find_room(session, put, theres, made)
        for target, value in zip(targets, values, strict=False):
            stored += _store(session, put, target, value, pinned)
        if failure is None:
            for what, value in zip(put.parts, values[len(targets) :], strict=True):
                store_part(session, put, what, value)
    finally:
        for landing in made:
            cache.abandon(landing)
        sequences.tidy()
    if failure is not None:
        raise failure
    session.send([stored, len(targets) - stored])


def _check_page(target: Target) -> None:
    """Raise SequenceGap unless the page is there that one of a group hangs on."""
    if target.piece.there is None:
        raise SequenceGap(
            f"the page from token {target.piece.first_token} on is not here, and its groups hang on"
            f" it; put it first, FROM {target.piece.first_token}"
        )


def _parts_there(session: "Session", put: SequencePut) -> list[Entry | None]:
    """Return which of the parts of a put are there, and keep them while there is room made for it."""
    cache, theres = session.cache, list[Entry | None]()
    for what, payload in put.parts.items():
        key = session.server.sequences.part_key(put.prompt, what)
        theres.append(there := cache.has_page(key, size_of(payload)))
        if there is not None:
            cache.promise(there, kept_until(session))
    return theres


def _make_room(
    session: "Session",
    put: SequencePut,
    targets: Sequence[Target],
    theres: Sequence[Entry | None],
) -> None:
    """Evict for what is new so that its owner may keep all of it. Raises QuotaExceeded.

    theres: what is there already of the pages, and then of the parts.
    """
    pairs = zip([*put.payloads, *put.parts.values()], theres, strict=True)
    nbytes = sum(size_of(payload) for payload, there in pairs if there is None)
    keep = {there for there in theres if there is not None}
    cache = session.cache
    before = cache.find(targets[0].how.parent or b"") if targets else None
    for entry in (before, session.server.sequences.holder(put.prompt)):
        if entry is not None:
            keep.add(entry)
    cache.accounts.make_room(put.schema.namespace, put.how.tenant, nbytes, keep)


def _find_room(
    session: "Session", put: SequencePut, theres: Sequence[Entry | None], made: list[Landing]
) -> tuple[list[Any], CacheError | None]:
    """Return a landing for all that is not there, as far as there is room, and why not.

    Afterwards nothing is evicted any more. theres: what is there already of the pages, and then of
    the parts. made: what was reserved here is added to it.
    """
    values: list[Any] = []
    for payload, there in zip([*put.payloads, *put.parts.values()], theres, strict=True):
        if there is not None or isinstance(payload, Landing):
            values.append(payload)
            continue
        try:
            landing = session.cache.reserve(len(value_of(payload)))  # or raises why there is none
        except CacheError as error:
            return values, error
        made.append(landing)
        landing.write(payload)
        values.append(landing)
    return values, None


def _store(session: "Session", put: SequencePut, target: Target, value: Any, pinned: float) -> bool:
    """Store a page, pinned until then if that is not 0.0; return whether it is new."""
    cache, there = session.cache, target.there
    if there is None:
        entry = cache.commit(target.key, value, target.how)
        cache.stats.pages_put += 1
    elif there.position < 0:
        raise CommandError("a page left while its copy arrived; put it again", "BUSY")
    else:
        entry = there
        cache.stats.pages_skipped += 1
        if not put.group.name:
            session.server.sequences.describe(target.piece, put.how)
    if pinned:
        cache.pin(entry, pinned)
    return there is None


def store_part(session: "Session", put: SequencePut, what: bytes, value: Any) -> None:
    """Store logits, a hidden state or the state of a group. Raises SequenceGap: its page is absent.

    value: a full landing; of what is there already, anything of its size.
    """
    cache, sequences = session.cache, session.server.sequences
    key = sequences.part_key(put.prompt, what)
    how = sequences.part_options(put.prompt, put.how)
    if what.startswith(STATE):
        how = state_options(put.prompt, how)
    there = cache.has_page(key, size_of(value))
    if there is not None:
        cache.describe(there, how)
    elif isinstance(value, Landing):
        cache.commit(key, value, how)
    else:
        raise CommandError("a part left while its copy arrived; put it again", "BUSY")
