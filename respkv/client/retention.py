"""How much is kept, for whom and for how long: quotas, hints, and why something was not kept."""

from typing import Any, Literal, NamedTuple, TypeAlias, TypedDict, Unpack

from respkv.client.commands import (
    Command,
    Key,
    check_options,
    list_of,
    option,
    text_of,
    unexpected,
)
from respkv.client.replies import Reply
from respkv.client.requests import Arg
from respkv.client.schemas import map_of
from respkv.client.sequences import ChainOptions, Tokens, chain_words, token_bytes

Status: TypeAlias = Literal["accepted", "clipped", "rejected"]
_STATUSES: dict[str, Status] = {
    "accepted": "accepted",
    "clipped": "clipped",
    "rejected": "rejected",
}


class Answer(NamedTuple):
    """What became of a wish: the value in force, and why it is that one.

    status: accepted, clipped (the value is another one) or rejected.
    """

    status: Status
    value: int
    reason: str


class Explanation(NamedTuple):
    """Why something is or is not stored. tokens: of a prompt, how many are."""

    reason: str
    text: str
    tokens: int


class RetainOptions(TypedDict, total=False):
    """How pages that are there are kept from now on.

    px_ms: time to live, 0 for ever; pin_ms: not evicted for so long, 0 ends that; priority: higher
    stays longer; durability: what they survive; session: the conversation they belong to.
    """

    px_ms: int | None
    pin_ms: int | None
    priority: int | None
    durability: Literal["written", "durable"] | None
    session: Key | None


class RetainPromptOptions(RetainOptions, ChainOptions, total=False):
    """How the pages of a prompt are kept, and what is mixed into its chain."""


def quota(
    namespace: Key,
    *,
    tenant: Key | None = None,
    max_bytes: int | Literal["default"] | None = None,
    tenant_bytes: int | None = None,
) -> Command[dict[str, Any]]:
    """Read the quota of a namespace, or of a tenant in it; set it when bytes are given.

    max_bytes:    0 for no limit; of a tenant, ``"default"`` for the namespace's tenant_bytes.
    tenant_bytes: the limit of each tenant of the namespace that has none of its own.
    Returns: max_bytes, bytes and pages; of a namespace also tenant_bytes and tenants.
    Raises:  ServerError KVQUOTA when too much of what is over it may not go; nothing changes then.
    """
    args: list[Arg] = ["KV.QUOTA", namespace]
    option(args, "TENANT", tenant)
    option(args, "MAXBYTES", max_bytes)
    option(args, "TENANTBYTES", tenant_bytes)
    return Command(args, lambda reply: map_of(reply) or {})


def end_session(namespace: Key, session: Key) -> Command[Answer]:
    """Say that a session will not go on. The value: how many pages are the first to go now."""
    return Command(["KV.HINT", namespace, session, "END"], _answer)


def expect_session(namespace: Key, session: Key, ms: int) -> Command[Answer]:
    """Say that a session goes on in so many milliseconds, so that its pages are there then."""
    return Command(["KV.HINT", namespace, session, "EXPECT", ms], _answer)


def demote_session(namespace: Key, session: Key) -> Command[Answer]:
    """Have the pages of a session leave memory for files. The value: how many are meant."""
    return Command(["KV.HINT", namespace, session, "DEMOTE"], _answer)


def retain(key: Key, **options: Unpack[RetainOptions]) -> Command[dict[str, Answer] | None]:
    """Change how a page is kept. Returns what became of each wish; None when it is not there."""
    args: list[Arg] = ["KV.RETAIN", key]
    check_options(options, RetainOptions.__optional_keys__)
    names = _retain_words(args, options)

    def read(reply: Reply) -> dict[str, Answer] | None:
        return None if reply is None else _answers(names, reply)

    return Command(args, read)


def retain_prompt(
    namespace: Key, tokens: Tokens, **options: Unpack[RetainPromptOptions]
) -> Command[tuple[int, dict[str, Answer]]]:
    """Change how the stored pages of a prompt are kept.

    options: those of ``retain``, and of the chain as for ``match``.
    Returns: how many tokens are stored, and what became of each wish.
    """
    args: list[Arg] = ["KV.SEQ.RETAIN", namespace, token_bytes(tokens)]
    chain_words(args, options, RetainPromptOptions.__optional_keys__)  # SESSION is one of them
    names = ["session"] if options.get("session") is not None else []
    names += _retain_words(args, options, has_session=bool(names))

    def read(reply: Reply) -> tuple[int, dict[str, Answer]]:
        match list_of(reply):
            case [int(matched), answers]:
                return matched, _answers(names, answers)
            case _:
                raise unexpected("the tokens matched and what became of wishes", reply)

    return Command(args, read)


def page_info(key: Key) -> Command[dict[str, Any] | None]:
    """Describe a page: where it is, whose, and how it is kept. None when it is not there."""
    return Command(["KV.INFO", key], map_of)


def explain(key: Key) -> Command[Explanation]:
    """Say why a key is or is not there. Its tokens are 0."""
    return Command(["KV.EXPLAIN", key], _explanation)


def explain_prompt(
    namespace: Key, tokens: Tokens, **options: Unpack[ChainOptions]
) -> Command[Explanation]:
    """Say how many tokens of a prompt are stored, and why not more.

    options: as for ``match``.
    """
    args: list[Arg] = ["KV.SEQ.EXPLAIN", namespace, token_bytes(tokens)]
    chain_words(args, options)
    return Command(args, _explanation)


def _retain_words(
    args: list[Arg], options: RetainOptions, *, has_session: bool = False
) -> list[str]:
    """Append wishes; return their names in the order of the answers."""
    names: list[str] = []
    for name, word in (("px_ms", "PX"), ("pin_ms", "PIN"), ("priority", "PRIORITY")):
        value = options.get(name)
        if isinstance(value, int):
            args += (word, value)
            names.append(name)
    durability = options.get("durability")
    if durability is not None:
        args.append(durability.upper())
        names.append("durability")
    session = options.get("session")
    if session is not None and not has_session:
        args += ("SESSION", session)
        names.append("session")
    if not names and not has_session:
        raise TypeError("nothing to change: give px_ms, pin_ms, priority, durability or session")
    return names


def _answers(names: list[str], reply: Reply) -> dict[str, Answer]:
    rows = [list_of(row)[1:] for row in list_of(reply)]
    return {name: _answer(row) for name, row in zip(names, rows, strict=True)}


def _answer(reply: Reply) -> Answer:
    match list_of(reply):
        case [status, int(value), reason]:
            found = _STATUSES.get(text_of(status))
            if found is not None:
                return Answer(found, value, text_of(reason))
    raise unexpected("what became of a wish", reply)


def _explanation(reply: Reply) -> Explanation:
    match list_of(reply):
        case [reason, text]:
            return Explanation(text_of(reason), text_of(text), 0)
        case [reason, text, int(tokens)]:
            return Explanation(text_of(reason), text_of(text), tokens)
        case _:
            raise unexpected("a reason and a text", reply)
