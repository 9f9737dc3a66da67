"""Prompts as tokens: what is stored of them, storing it, getting it layer by layer.

The server makes the ids and finds the pages. What is left to do here is to ask first, so that no
page is sent that is there; to cut the KV of a whole prompt into its pages, which are gathered from
where they lie; and to send long prompts in several commands, one behind the other.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict, Unpack

from respkv.client.commands import Command, Key, check_options, list_of, option, unexpected
from respkv.client.core import Core
from respkv.client.effects import Operation
from respkv.client.kv import Pages, Range, Shape, bytes_of, shape_of
from respkv.client.replies import Reply
from respkv.client.requests import Arg, Buffer
from respkv.client.schemas import schema_get
from respkv.errors import ConfigError, SequenceGap, ServerError

PIPELINED = 4  # commands at a time: those behind one that fails were sent in vain
_LOGITS = "KV.SEQ.MATCH LOGITS"
TRIES = 3  # pages may be evicted between the question and the put

Tokens: TypeAlias = Any  # list[int], bytes of int32 little-endian, an array or a tensor of integers


class ChainOptions(TypedDict, total=False):
    """What is mixed into a chain, and whose it is.

    salt, tenant: keep prompts apart that must not share pages; lora, lora_path: the adapter;
    media: (first token, count, digest) of each image or the like that stands in for tokens;
    session: the conversation, which tells the server what will be used again.
    """

    salt: Key | None
    tenant: Key | None
    lora: Key | None
    lora_path: Key | None
    media: Sequence[tuple[int, int, bytes]]
    session: Key | None


class KeepOptions(ChainOptions, total=False):
    """How pages are kept: as PutOptions says; pin_ms: not evicted for so long."""

    px_ms: int | None
    priority: int | None
    pin_ms: int | None
    durability: Literal["written", "durable"] | None


class SequenceMatch(NamedTuple):
    """What is stored of a prompt.

    tokens: to the token. pages: full ones among them. tiers: a letter for each page, the partly
    matched last one too. has_logits: those of the prompt's end are stored. logits: these, where they
    were asked for and are in the server's memory; ``get`` brings them from wherever they are.
    """

    tokens: int
    pages: int
    tiers: str
    load_us: int
    has_logits: bool
    logits: bytes | memoryview | None = None


class SequencePut(NamedTuple):
    """What a put came to.

    stored: pages that can be found by it. there: pages that were sent and were there by then.
    skipped: pages that were not sent, because the question said that they are there.
    """

    stored: int
    there: int
    skipped: int


def token_bytes(tokens: Tokens) -> bytes:
    """Return tokens as the server takes them.

    Raises: ValueError naming the token or the shape that cannot be.
    """
    if isinstance(tokens, bytes | bytearray):
        if len(tokens) % 4:
            raise ValueError(f"tokens as bytes are int32: {len(tokens)} is no multiple of 4")
        return bytes(tokens)
    if hasattr(tokens, "untyped_storage"):  # a tensor, told without importing torch
        tokens = tokens.detach().cpu().numpy()
    if hasattr(tokens, "__array_interface__"):
        if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
            raise ValueError(
                f"tokens are one row of integers, not {tokens.dtype} of shape {tokens.shape}"
            )
        if not tokens.size or (tokens.min() >= 0 and tokens.max() < 1 << 31):
            packed: bytes = tokens.astype("<i4").tobytes()
            return packed
        tokens = tokens.tolist()  # its error names the token
    from respkv.chain import pack_tokens

    return pack_tokens(list(tokens))


def chain_words(
    args: list[Arg],
    options: ChainOptions,
    accepted: frozenset[str] = ChainOptions.__optional_keys__,
) -> None:
    """Append the words of a chain. Raises TypeError for an option that is not among the accepted."""
    check_options(options, accepted)
    option(args, "SALT", options.get("salt"))
    option(args, "TENANT", options.get("tenant"))
    option(args, "LORA", options.get("lora"))
    option(args, "LORAPATH", options.get("lora_path"))
    for first, count, digest in options.get("media", ()):
        args += ("MM", first, count, digest)
    option(args, "SESSION", options.get("session"))


def keep_words(args: list[Arg], options: KeepOptions) -> None:
    """Append the words of a chain and those that say how its pages are kept."""
    chain_words(args, options, KeepOptions.__optional_keys__)
    option(args, "PX", options.get("px_ms"))
    option(args, "PRIORITY", options.get("priority"))
    option(args, "PIN", options.get("pin_ms"))
    durability = options.get("durability")
    if durability is not None:
        args.append(durability.upper())


def portion_words(
    args: list[Arg], layers: Range | None, heads: Range | None, group: Key | None
) -> None:
    """Append which part of the model is meant."""
    if layers is not None:
        args += ("LAYERS", *layers)
    if heads is not None:
        args += ("HEADS", *heads)
    option(args, "GROUP", group)


def match(
    core: Core[Any],
    namespace: Key,
    tokens: Tokens,
    *,
    logits: bool = False,
    **options: Unpack[ChainOptions],
) -> Operation[SequenceMatch]:
    """Find how many tokens of a prompt are stored; they then stay for a few seconds.

    tokens:  a list, an array or a tensor of integers, or bytes of int32.
    logits:  answer with those of the prompt's end, too, if all of it is stored and they are in memory.
             A server that is too old for that answers without.
    options: salt, tenant, lora, lora_path, media, session; see ChainOptions.
    """
    args: list[Arg] = ["KV.SEQ.MATCH", namespace, token_bytes(tokens)]
    chain_words(args, options)
    if logits and _LOGITS not in core.unknown:
        try:
            return (yield from core.call(Command([*args, "LOGITS"], _match)))
        except ServerError as error:
            if error.word != "ERR" or "option 'LOGITS'" not in error.message:
                raise
            core.unknown.add(_LOGITS)
    return (yield from core.call(Command(args, _match)))


def put(
    core: Core[Any],
    namespace: Key,
    tokens: Tokens,
    kv: Any,
    *,
    first: int = 0,
    match: SequenceMatch | None = None,
    layers: Range | None = None,
    heads: Range | None = None,
    group: Key | None = None,
    logits: Buffer | None = None,
    hidden: Buffer | None = None,
    **options: Unpack[KeepOptions],
) -> Operation[SequencePut]:
    """Store the KV of a prompt; pages that are there are not sent.

    tokens:  of the whole prompt, as for ``match``.
    kv:      ``[layers, 2, n, heads, dim]`` of tokens[first:], of latents ``[layers, n, dim]``: a
             contiguous array, CPU tensor or buffer. Or a list with a buffer for each page. It must
             not change until the call has returned. None: only logits or hidden are stored.
    first:   the token that kv begins with, a multiple of the tokens of a page; those before it
             must be stored.
    match:   what ``match`` said of this prompt, if that was asked before.
    layers, heads: (first, count): kv has only these. A page can be found once all have come.
    group:   of layers, in a hybrid model.
    logits, hidden: stored beside the end of the prompt, any bytes.
    options: those of ``match``, px_ms, priority, pin_ms, durability; see KeepOptions.
    Raises:  ValueError when kv has not the bytes or the shape that the namespace asks for;
             SequenceGap when pages in front of ``first`` are not there; ServerError OOM.
    Cancelled: any number of the pages may have been stored, from the first on.
    """
    data = token_bytes(tokens)
    parts = _parts(logits, hidden)
    shape = yield from find_shape(core, namespace, group)
    if not shape.tokens:
        return (yield from _put_state(core, namespace, data, kv, shape, group, options))
    try:
        pages = Pages(shape, len(data) // 4, first, kv, layers, heads)
    except ValueError:
        core.shapes.clear()  # the namespace may have another schema by now
        now = yield from find_shape(core, namespace, group)
        if now == shape:
            raise
        pages = Pages(now, len(data) // 4, first, kv, layers, heads)
    for attempt in range(TRIES):
        if match is None:
            match = yield from core.call(_match_again(namespace, data, options))
        start = _first_to_send(match, pages, group)
        commands = _commands(namespace, data, pages, start)
        for args in commands:
            portion_words(args, layers, heads, group)
        if parts:
            if not commands:
                commands.append(["KV.SEQ.PUT", namespace, data, 0])
            commands[-1] += parts
        for args in commands:
            keep_words(args, options)
        replies, failure = yield from _send_all(core, commands)
        if failure is None:
            counts = [_counts(each) for each in replies]
            skipped = pages.count_before(start)
            return SequencePut(sum(a for a, _ in counts), sum(b for _, b in counts), skipped)
        if failure.word != SequenceGap.code:
            core.shapes.clear()  # the schema may be another one by now
            raise failure
        if attempt == TRIES - 1 or kv is None:
            raise SequenceGap(failure.message) from failure
        match = None
    raise AssertionError("unreachable")


def _parts(logits: Buffer | None, hidden: Buffer | None) -> list[Arg]:
    """Return the words for what belongs to the prompt's end."""
    parts: list[Arg] = []
    option(parts, "LOGITS", None if logits is None else bytes_of(logits))
    option(parts, "HIDDEN", None if hidden is None else bytes_of(hidden))
    return parts


def _commands(namespace: Key, data: bytes, pages: Pages, start: int) -> list[list[Arg]]:
    """Return the puts of the pages from a token on."""
    return [
        ["KV.SEQ.PUT", namespace, data[: 4 * end], len(payloads), *payloads, "FROM", begin]
        for begin, end, payloads in pages.commands(start)
    ]


def _send_all(
    core: Core[Any], commands: Sequence[Sequence[Arg]]
) -> Operation[tuple[list[Reply], ServerError | None]]:
    """Send commands, some at a time, up to the first that fails; return replies, and its error."""
    replies: list[Reply] = []
    for first in range(0, len(commands), PIPELINED):
        some = yield from core.call_all(commands[first : first + PIPELINED], raise_on_error=False)
        for reply in some:
            if isinstance(reply, ServerError):
                return replies, reply
        replies += some
    return replies, None


def _put_state(
    core: Core[Any],
    namespace: Key,
    data: bytes,
    kv: Any,
    shape: Shape,
    group: Key | None,
    options: KeepOptions,
) -> Operation[SequencePut]:
    """Store the state that a group has at the end of a prompt."""
    state = bytes_of(kv)
    if state.nbytes != shape.dim:
        raise ValueError(f"a state of group {group!r} has {shape.dim} bytes, not {state.nbytes}")
    args: list[Arg] = ["KV.SEQ.PUT", namespace, data, 1, state]
    portion_words(args, None, None, group)
    keep_words(args, options)
    reply = yield from core.call(Command(args, _counts))
    return SequencePut(*reply, skipped=0)


def put_layer(
    core: Core[Any],
    namespace: Key,
    tokens: Tokens,
    layer: int,
    kv: Any,
    *,
    first: int = 0,
    match: SequenceMatch | None = None,
    heads: Range | None = None,
    **options: Unpack[KeepOptions],
) -> Operation[SequencePut]:
    """Store one layer, ``[2, n, heads, dim]``; pages can be found once all layers have come.

    As ``put`` otherwise. A ``match`` that is given saves the question before each layer.
    """
    return put(
        core,
        namespace,
        tokens,
        kv,
        first=first,
        match=match,
        layers=(layer, 1),
        heads=heads,
        **options,
    )


def _first_to_send(match: SequenceMatch, pages: Pages, group: Key | None) -> int:
    """Return the first token whose page is to be sent; past the end: none is."""
    if group is not None:
        return pages.first  # a match says nothing of one group alone
    if match.tokens >= pages.num_tokens:
        return pages.num_tokens
    return max(pages.first, match.pages * pages.shape.tokens)


def _match_again(namespace: Key, data: bytes, options: KeepOptions) -> Command[SequenceMatch]:
    args: list[Arg] = ["KV.SEQ.MATCH", namespace, data]
    chain_words(args, options, KeepOptions.__optional_keys__)
    return Command(args, _match)


def find_shape(
    core: Core[Any], namespace: Key, group: Key | None = None, *, is_seated: bool = False
) -> Operation[Shape]:
    """Return the shape of a namespace's pages, asking once. Raises ConfigError: it has no schema.

    is_seated: the caller holds a connection of the pool, and must not wait for another.
    """
    name = namespace.encode() if isinstance(namespace, str) else namespace
    label = group.encode() if isinstance(group, str) else group
    known = core.shapes.get((name, label))
    if known is None:
        ask = core.call_apart if is_seated else core.call
        schema = yield from ask(schema_get(namespace))
        if schema is None:
            raise ConfigError(
                f"namespace {namespace!r} has no schema, which says how long a page is: schema_set"
            )
        known = core.shapes[name, label] = shape_of(schema, label)
    found: Shape = known
    return found


def _match(reply: Reply) -> SequenceMatch:
    match reply:
        case [int(tokens), int(pages), bytes(tiers), int(load_us), int(has_logits), *more]:
            logits = more[0] if more and isinstance(more[0], bytes | memoryview) else None
            return SequenceMatch(tokens, pages, tiers.decode(), load_us, bool(has_logits), logits)
        case _:
            raise unexpected("a match", reply)


def _counts(reply: Reply) -> tuple[int, int]:
    match list_of(reply):
        case [int(stored), int(there), *_]:
            return stored, there
        case _:
            raise unexpected("two counts", reply)
