"""KV.SEQ.MATCH, KV.SEQ.PUT and KV.SEQ.GET: prompts in, pages found and stored by the server."""

from respkv.errors import CommandError
from respkv.server.arguments import DURATION_MS_MAX, Words
from respkv.server.assembling import put_rectangles
from respkv.server.commands.pages import DEADLINE_S_MAX
from respkv.server.layers import (
    Wanted,
    entries_needed,
    load_and_send,
    send_entry,
    send_layers,
)
from respkv.server.loads import is_cold
from respkv.server.places import letters_of, load_us
from respkv.server.prompts import ChainWords, Portion, prompt_of, schema_of
from respkv.server.puts import read_put
from respkv.server.registry import Later, command
from respkv.server.session import Session
from respkv.server.storing import put_pages
from respkv.wire import reply
from respkv.wire.parser import Args

PARTS = (b"logits", b"hidden")


@command("kv.seq.match")
def kv_seq_match(session: Session, args: Args) -> None:
    """Answer with how much of a prompt is stored, where, and how long loading it takes.

    What was found is used, and promised to stay for ``answer-lease``. With LOGITS those of the
    prompt's end are answered, too, if they are in memory: a match waits for no file.
    """
    words, chain, wants_logits = Words(args, 3), ChainWords(), False
    while words:
        word = words.word()
        if word == b"LOGITS" and not wants_logits:
            wants_logits = True
        elif not chain.take(word, words):
            raise words.unexpected()
    prompt = prompt_of(session, args[1], args[2], chain.extras())
    cache, sequences = session.cache, session.server.sequences
    until = cache.clock.now + session.server.config.answer_lease / 1000
    found = sequences.match(prompt, until, session=chain.session)
    entries = found.entries
    parts = session.server.groups.use(prompt, found, until)
    if parts and cache.copies.num_cold:
        cache.on_match(parts)
    logits = None
    if found.tokens and found.tokens == prompt.num_tokens:
        logits = sequences.find_part(prompt, b"logits")
        if logits is not None:
            cache.promise(logits, until)
    letters = letters_of(session, entries)
    us, has_logits = load_us(session, entries, parts), int(logits is not None)
    session.out.append(reply.array_header(6 if wants_logits else 5))
    for item in (found.tokens, len(found.pages), letters, us, has_logits):
        session.send(item)
    if wants_logits:
        send_entry(session, logits)


@command("kv.seq.put")
def kv_seq_put(session: Session, args: Args) -> "Later | None":
    """Store the pages of a prompt, or the part of them that one worker has."""
    put = read_put(session, args)
    if put.rectangle is None:
        return put_pages(session, put, args)
    return put_rectangles(session, put, put.rectangle)


@command("kv.seq.get", streams="always")
def kv_seq_get(session: Session, args: Args) -> Later:
    """Answer with the tokens of a prompt, layer by layer."""
    wanted = _wanted(session, args)
    found = session.server.sequences.find(wanted.prompt)
    if session.cache.copies.num_cold:
        needed = entries_needed(session, wanted, found)
        if any(is_cold(entry) for entry in needed):
            return load_and_send(session, wanted, needed)
    return send_layers(session, wanted, found)


def _wanted(session: Session, args: Args) -> Wanted:
    """Read a call of KV.SEQ.GET. Raises CommandError or SchemaMismatch."""
    words, chain, portion = Words(args, 3), ChainWords(), Portion()
    seen: set[bytes] = set()
    parts: list[bytes] = []
    first, seconds = 0, None
    while words:
        word = words.word()
        if chain.take(word, words) or portion.take(word, words):
            continue
        if word in seen:
            raise words.unexpected()
        seen.add(word)
        if word == b"FROM":
            first = words.count("FROM")
        elif word.lower() in PARTS:
            parts.append(word.lower())
        elif word == b"DEADLINE":
            ms = words.count("DEADLINE")
            seconds = min(min(ms, DURATION_MS_MAX) / 1000, DEADLINE_S_MAX)
        elif word == b"AS":  # one bulk is a layer of many pages: none has a stored form of its own
            raise CommandError(
                "KV.SEQ.GET answers numbers as they were put, and takes no AS: convert them where"
                " they are read, or get pages by their keys, KV.MGET ... AS"
            )
        else:
            raise words.unexpected()
    prompt = prompt_of(session, args[1], args[2], chain.extras())
    schema = schema_of(session, prompt.namespace)
    parts.sort(key=PARTS.index)  # logits first, however they were asked for
    group = schema.group(portion.group)
    return Wanted(prompt, first, group, portion.rectangle(schema), parts, seconds)
