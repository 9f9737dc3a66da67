"""KV.SEQ.PUT: what a call says, which pages it is for, and what becomes of those that are there.

Pages that come whole are stored by storing.py, rectangles of them by assembling.py.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from respkv.chain import Prompt
from respkv.engine.entry import Entry, Put
from respkv.engine.groups import bound_key, has_page, state_options
from respkv.engine.history import History
from respkv.engine.landing import Landing
from respkv.engine.namespaces import Group, Kind, Schema
from respkv.engine.sequences import Piece, Sequences
from respkv.errors import CommandError, SchemaMismatch
from respkv.page import Geometry
from respkv.server.arguments import Words, count, count_ms, shown
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
TURN_S = 1e-6  # in a turn the clock stands still


@dataclass(slots=True)
class SequencePut:
    """One call of KV.SEQ.PUT.

    payloads: bytes, full landings, or what stands for those that found no room.
    group:    of layers, whose pages they are; its name is empty for the namespace's own.
    pin_ms:   for how long its pages are to be pinned, as it was asked for.
    parts:    what belongs to the prompt's end: logits, hidden state, the state of a group.
    seen:     pages in front that were seen to be there: the payloads are a slice of a longer put.
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
    seen: int = 0


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


def check_payloads(put: SequencePut, history: History) -> None:
    """Raise unless there is a payload of the right size for each page, and no part is empty.

    It looks at nothing that is stored, so it is done before all pages are hashed.
    """
    prompt, first = put.prompt, put.first
    if put.payloads:
        Sequences.check_first(prompt, first)
    number = -(-(prompt.num_tokens - first) // prompt.page_tokens)
    if put.payloads and not number:
        raise CommandError(f"no tokens are left from {first} on, and payloads came")
    if put.payloads and len(put.payloads) != number:
        raise CommandError(
            f"tokens {first} to {prompt.num_tokens - 1} are {number} pages of"
            f" {prompt.page_tokens} tokens, and {len(put.payloads)} payloads came"
        )
    full_bytes = payload_bytes(put, prompt.page_tokens) if put.payloads else 0
    for begin, payload in zip(
        range(first, prompt.num_tokens, prompt.page_tokens), put.payloads, strict=False
    ):
        end = min(begin + prompt.page_tokens, prompt.num_tokens)
        is_full = end - begin == prompt.page_tokens
        nbytes = full_bytes if is_full else payload_bytes(put, end - begin)
        if size_of(payload) != nbytes:
            key = prompt.position_key(end)
            history.note(bound_key(key, put.group.name) if put.group.name else key, "schema")
            raise SchemaMismatch(
                f"tokens {begin} to {end - 1} of namespace {shown(put.schema.namespace)!r} have"
                f" {nbytes} bytes, their payload has {size_of(payload)}"
            )
    for what, payload in put.parts.items():
        if not size_of(payload):
            raise CommandError(f"{shown(what).upper()} has at least 1 byte")


def payload_bytes(put: SequencePut, num_tokens: int) -> int:
    """Return the bytes of the payload for a page of so many tokens."""
    if put.rectangle is None:
        return put.group.piece_bytes(num_tokens)
    shape = put.group.piece_geometry(num_tokens)
    assert shape is not None
    return put.rectangle.shape(shape).page_bytes


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


def plan(
    session: "Session", put: SequencePut, is_coming: Callable[[bytes], bool] | None = None
) -> list[Piece]:
    """Return the pages of a put, and keep what is there of them, and in front, for a while.

    What an earlier slice stored is kept until this one has ended: nobody was told of it, and all that
    it stands behind could not go for the next prompt.
    """
    cache, until, front_until = session.cache, kept_until(session), 0.0
    if put.seen:
        front_until = cache.clock.now + (TURN_S if put.rectangle is None else KEPT_S_MIN)
    pieces = session.server.sequences.plan(
        put.prompt,
        put.first,
        until=front_until or until,
        is_coming=is_coming,
        num_pieces=len(put.payloads),
        seen=put.seen,
    )
    for piece in pieces if put.seen else ():
        if piece.there is not None:
            cache.promise(piece.there, until)
    return pieces


def refresh(session: "Session", put: SequencePut, target: Target, there: Entry) -> None:
    """Have a page that is there kept as a put says; but for the pin, which the caller sets."""
    if not put.group.name:
        target.piece.there = there
        session.server.sequences.describe(target.piece, put.how)
    elif there.key == target.key:
        session.cache.describe(there, target.how)


def store_part(
    session: "Session", put: SequencePut, what: bytes, value: Any, page: Entry | None = None
) -> None:
    """Store logits, a hidden state or the state of a group. Raises SequenceGap: its page is absent.

    value: a full landing; of what is there already, anything of its size.
    page:  that it hangs on; None: it is looked for.
    """
    cache, sequences = session.cache, session.server.sequences
    key = sequences.part_key(put.prompt, what)
    how = sequences.part_options(put.prompt, put.how, page)
    if what.startswith(STATE):
        how = state_options(put.prompt, how)
    there = cache.has_page(key, size_of(value))
    if there is not None:
        cache.describe(there, how)
    elif isinstance(value, Landing):
        cache.commit(key, value, how)
    else:
        raise CommandError("a part left while its copy arrived; put it again", "BUSY")


def send_counts(
    session: "Session", counts: Sequence[int], noted: Sequence[tuple[int, int]]
) -> None:
    """Answer with counts, once all holds that was noted in the turns of a command.

    noted: the tickets before and after each turn; what others noted in between is no business of
           this answer.
    """
    start = len(session.out)
    session.send(list(counts))
    for since, ticket in noted:
        if ticket > since:
            session.promise(since, start, ticket)
