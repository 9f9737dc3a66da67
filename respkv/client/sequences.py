"""Prompts as tokens: what is stored of them, storing it, getting it layer by layer.

The server makes the ids and finds the pages. What is left to do here is to ask first, so that no
page is sent that is there; to cut the KV of a whole prompt into its pages, which are gathered from
where they lie; and to send long prompts in several commands, one behind the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict, Unpack

from respkv.client.commands import Command, Key, list_of, option, unexpected
from respkv.client.core import Core
from respkv.client.effects import Operation
from respkv.client.replies import Reply
from respkv.client.requests import Arg, Buffer, Gathered, view_of
from respkv.client.schemas import schema_get
from respkv.client.views import as_bytes
from respkv.errors import ConfigError, SequenceGap, ServerError
from respkv.page import DTYPE_BYTES

COMMAND_BYTES = 32 << 20  # of pages in one command: they wait in the server's memory for its end
COMMAND_PAGES = 16_384
TRIES = 3  # pages may be evicted between the question and the put

Tokens: TypeAlias = Any  # list[int], bytes of int32 little-endian, an array or a tensor of integers
Range: TypeAlias = tuple[int, int]


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
    matched last one too. has_logits: those of the prompt's end are stored.
    """

    tokens: int
    pages: int
    tiers: str
    load_us: int
    has_logits: bool


class SequencePut(NamedTuple):
    """What a put came to.

    stored: pages that can be found by it. there: pages that were sent and were there by then.
    skipped: pages that were not sent, because the question said that they are there.
    """

    stored: int
    there: int
    skipped: int


@dataclass(frozen=True, slots=True)
class Shape:
    """The pages of a namespace: ``[layers, planes, tokens, heads, dim]``, of ``itemsize`` bytes."""

    layers: int
    planes: int
    tokens: int
    heads: int
    dim: int
    itemsize: int

    def row_bytes(self, heads: int) -> int:
        """Return the bytes of one token in one plane."""
        return heads * self.dim * self.itemsize


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


def chain_words(args: list[Arg], options: ChainOptions) -> None:
    """Append the words of a chain."""
    option(args, "SALT", options.get("salt"))
    option(args, "TENANT", options.get("tenant"))
    option(args, "LORA", options.get("lora"))
    option(args, "LORAPATH", options.get("lora_path"))
    for first, count, digest in options.get("media", ()):
        args += ("MM", first, count, digest)
    option(args, "SESSION", options.get("session"))


def keep_words(args: list[Arg], options: KeepOptions) -> None:
    """Append the words of a chain and those that say how its pages are kept."""
    chain_words(args, options)
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
    namespace: Key, tokens: Tokens, **options: Unpack[ChainOptions]
) -> Command[SequenceMatch]:
    """Find how many tokens of a prompt are stored; they then stay for a few seconds.

    tokens:  a list, an array or a tensor of integers, or bytes of int32.
    options: salt, tenant, lora, lora_path, media, session; see ChainOptions.
    """
    args: list[Arg] = ["KV.SEQ.MATCH", namespace, token_bytes(tokens)]
    chain_words(args, options)
    return Command(args, _match)


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
    kv:      ``[layers, 2, n, heads, dim]`` of tokens[first:], contiguous: an array, a CPU tensor or
             a buffer. Or a list with a buffer for each page. It must not change until the call
             has returned. None: only logits or hidden are stored.
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
    parts: list[Arg] = []
    option(parts, "LOGITS", None if logits is None else _bytes_of(logits))
    option(parts, "HIDDEN", None if hidden is None else _bytes_of(hidden))
    shape = yield from find_shape(core, namespace, group)
    pages = _Pages(shape, len(data) // 4, first, kv, layers, heads)
    for attempt in range(TRIES):
        if match is None:
            match = yield from core.call(_match_again(namespace, data, options))
        start = _first_to_send(match, pages, group)
        commands: list[list[Arg]] = []
        for begin, end, payloads in pages.commands(start):
            args: list[Arg] = ["KV.SEQ.PUT", namespace, data[: 4 * end], len(payloads), *payloads]
            args += ("FROM", begin)
            portion_words(args, layers, heads, group)
            commands.append(args)
        if parts:
            if not commands:
                commands.append(["KV.SEQ.PUT", namespace, data, 0])
            commands[-1] += parts
        for args in commands:
            keep_words(args, options)
        replies = yield from core.call_all(commands, raise_on_error=False)
        failure = next((each for each in replies if isinstance(each, ServerError)), None)
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


def _first_to_send(match: SequenceMatch, pages: "_Pages", group: Key | None) -> int:
    """Return the first token whose page is to be sent; past the end: none is."""
    if group is not None:
        return pages.first  # a match says nothing of one group alone
    if match.tokens >= pages.num_tokens:
        return pages.num_tokens
    return max(pages.first, match.pages * pages.shape.tokens)


def _match_again(namespace: Key, data: bytes, options: KeepOptions) -> Command[SequenceMatch]:
    args: list[Arg] = ["KV.SEQ.MATCH", namespace, data]
    chain_words(args, options)
    return Command(args, _match)


def find_shape(core: Core[Any], namespace: Key, group: Key | None = None) -> Operation[Shape]:
    """Return the shape of a namespace's pages, asking once. Raises ConfigError: it has no schema."""
    name = namespace.encode() if isinstance(namespace, str) else namespace
    label = group.encode() if isinstance(group, str) else group
    known = core.shapes.get((name, label))
    if known is None:
        schema = yield from core.call(schema_get(namespace))
        if schema is None:
            raise ConfigError(
                f"namespace {namespace!r} has no schema, which says how long a page is: schema_set"
            )
        known = core.shapes[name, label] = _shape_of(schema, label)
    found: Shape = known
    return found


def _shape_of(schema: dict[str, Any], group: bytes | None) -> Shape:
    found = schema
    if group:
        name = group.decode(errors="replace")
        groups = [dict(each) if not isinstance(each, dict) else each for each in schema["groups"]]
        found = {**schema, **next((each for each in groups if each.get("name") == name), {})}
        if found.get("name") != name:
            raise ConfigError(f"namespace {schema['namespace']!r} has no group {name!r}")
    return Shape(
        found["layers"],
        1 if found.get("kind") == "mla" else 2,
        schema["tokens"],
        found["heads"],
        found["dim"],
        DTYPE_BYTES[found["dtype"]],
    )


class _Pages:
    """The KV of a prompt, cut into pages."""

    def __init__(
        self,
        shape: Shape,
        num_tokens: int,
        first: int,
        kv: Any,
        layers: Range | None,
        heads: Range | None,
    ) -> None:
        self.shape = shape
        self.num_tokens = num_tokens
        self.first = first
        self._rows = (layers[1] if layers else shape.layers) * shape.planes
        num_heads = heads[1] if heads else shape.heads
        self._row_bytes = shape.row_bytes(num_heads)
        if not num_tokens:
            raise ValueError("a put needs at least 1 token")
        if first % shape.tokens or not 0 <= first <= num_tokens:
            raise ValueError(
                f"first = {first}: accepted are multiples of {shape.tokens}, the tokens of a page,"
                f" up to {num_tokens}"
            )
        self._listed: list[Any] | None = None
        self._plane: list[memoryview] = []
        if kv is None:
            self.first = num_tokens
        elif isinstance(kv, list | tuple):
            self._listed = [_bytes_of(page) for page in kv]
            self._check_list(self._listed)
        else:
            wanted = (self._rows // shape.planes, shape.planes, num_tokens - first, num_heads)
            self._plane = self._planes(kv, (*wanted, shape.dim))

    def count_before(self, token: int) -> int:
        """Return how many pages of kv end before a token."""
        return -(-(token - self.first) // self.shape.tokens) if token > self.first else 0

    def commands(self, start: int) -> "list[tuple[int, int, list[Arg]]]":
        """Return first token, end and payloads of each command, from the token ``start`` on."""
        size, found = self.shape.tokens, []
        page_bytes = max(1, self._rows * self._row_bytes * size)
        step = size * min(COMMAND_PAGES, max(1, COMMAND_BYTES // page_bytes))
        while start < self.num_tokens:
            end = min(start + step, self.num_tokens)
            payloads = [
                self._payload(token, min(token + size, end)) for token in range(start, end, size)
            ]
            found.append((start, end, payloads))
            start = end
        return found

    def _payload(self, start: int, stop: int) -> Arg:
        if self._listed is not None:
            page: Arg = self._listed[(start - self.first) // self.shape.tokens]
            return page
        row, first = self._row_bytes, self.first
        begin, end = (start - first) * row, (stop - first) * row
        return Gathered([plane[begin:end] for plane in self._plane])

    def _planes(self, kv: Any, wanted: tuple[int, ...]) -> list[memoryview]:
        shape = tuple(getattr(kv, "shape", ()))
        if len(shape) > 1 and shape not in (wanted, wanted[1:] if wanted[0] == 1 else wanted):
            raise ValueError(f"kv has shape {shape}; tokens {self.first} on take {wanted}")
        view = _bytes_of(kv)
        plane_bytes = (self.num_tokens - self.first) * self._row_bytes
        if view.nbytes != self._rows * plane_bytes:
            raise ValueError(
                f"kv has {view.nbytes} bytes; {wanted} of {self.shape.itemsize} bytes each take"
                f" {self._rows * plane_bytes}"
            )
        return [view[n * plane_bytes : (n + 1) * plane_bytes] for n in range(self._rows)]

    def _check_list(self, pages: list[Any]) -> None:
        size = self.shape.tokens
        count = -(-(self.num_tokens - self.first) // size)
        if len(pages) != count:
            raise ValueError(
                f"kv has {len(pages)} pages; tokens {self.first} to {self.num_tokens - 1} are {count}"
            )
        for number, page in enumerate(pages):
            tokens = min(size, self.num_tokens - self.first - number * size)
            if page.nbytes != tokens * self._rows * self._row_bytes:
                raise ValueError(
                    f"page {number} of kv has {page.nbytes} bytes; its {tokens} tokens take"
                    f" {tokens * self._rows * self._row_bytes}"
                )


def _bytes_of(buffer: Any) -> memoryview:
    """Return a buffer, an array or a CPU tensor as bytes. Raises ValueError: not contiguous."""
    if hasattr(buffer, "untyped_storage") or hasattr(buffer, "__array_interface__"):
        return as_bytes(buffer)
    view = view_of(buffer)
    if not view.c_contiguous:
        raise ValueError("a payload must be contiguous in memory")
    return view.cast("B") if view.nbytes else memoryview(b"")


def _match(reply: Reply) -> SequenceMatch:
    match reply:
        case [int(tokens), int(pages), bytes(tiers), int(load_us), int(has_logits), *_]:
            return SequenceMatch(tokens, pages, tiers.decode(), load_us, bool(has_logits))
        case _:
            raise unexpected("a match", reply)


def _counts(reply: Reply) -> tuple[int, int]:
    match list_of(reply):
        case [int(stored), int(there), *_]:
            return stored, there
        case _:
            raise unexpected("two counts", reply)
