"""CLIENT: who is connected, and how each wants to be treated."""

from collections.abc import Callable

from respkv.errors import CommandError
from respkv.server.arguments import Words, integer, shown
from respkv.server.commands.connection import check_name
from respkv.server.registry import command
from respkv.server.session import Session
from respkv.wire import reply
from respkv.wire.parser import Args

_WRONG_ID = "client-id should be greater than 0"


@command("client|id")
def client_id(session: Session, args: Args) -> None:
    """Answer with the number of this connection."""
    session.out.append(reply.integer(session.number))


@command("client|getname")
def client_getname(session: Session, args: Args) -> None:
    """Answer with the name of this connection."""
    if session.name:
        session.send_value(session.name)
    else:
        session.send_nil()


@command("client|setname")
def client_setname(session: Session, args: Args) -> None:
    """Name this connection."""
    check_name(args[2])
    session.name = args[2]
    session.out.append(reply.OK)


@command("client|setinfo")
def client_setinfo(session: Session, args: Args) -> None:
    """Note the client library's name or version."""
    name, version = session.library
    option = args[2].upper()
    if option not in (b"LIB-NAME", b"LIB-VER"):
        raise CommandError(f"Unrecognized option '{shown(args[2])}'")
    if not frozenset(range(0x21, 0x7F)).issuperset(args[3]):
        raise CommandError(
            f"{option.decode().lower()} cannot contain spaces, newlines or special characters."
        )
    session.library = (args[3], version) if option == b"LIB-NAME" else (name, args[3])
    session.out.append(reply.OK)


@command("client|info")
def client_info(session: Session, args: Args) -> None:
    """Describe this connection."""
    session.send(reply.Verbatim(describe(session) + "\n"))


@command("client|list")
def client_list(session: Session, args: Args) -> None:
    """Describe all connections, or those of a type or with given numbers."""
    sessions = list(session.server.sessions.values())
    words = Words(args, 2)
    if words:
        word = words.word()
        if word == b"TYPE":
            kind = _kind(words.take())
            sessions = [each for each in sessions if kind == _kind_of(each)]
        elif word == b"ID" and words:
            wanted = set()
            while words:
                wanted.add(integer(words.take(), "Invalid client ID"))
            sessions = [each for each in sessions if each.number in wanted]
        else:
            raise words.unexpected()
    if words:
        raise CommandError("syntax error")
    lines = "".join(describe(each) + "\n" for each in sessions)
    session.send(reply.Verbatim(lines))


def _kind(word: bytes) -> bytes:
    """Return a client type in lower case. Raises CommandError when it is none."""
    if word.lower() not in (b"normal", b"master", b"replica", b"slave", b"pubsub"):
        raise CommandError(f"Unknown client type '{shown(word)}'")
    return word.lower()


def _kind_of(session: Session) -> bytes:
    return b"normal" if session.subscriptions is None else b"pubsub"


def describe(session: Session) -> str:
    """Return a connection's line of CLIENT LIST; no argument or value of a command is in it."""
    now = session.server.clock.now
    name, library = session.name.decode(), [part.decode() for part in session.library]
    own = session.subscriptions
    channels, patterns = (0, 0) if own is None else (len(own.channels), len(own.patterns))
    flags = "P" * (own is not None) + "b" * session.is_draining or "N"
    output = session.out_bytes + session.push_bytes
    return (
        f"id={session.number} addr={session.address} laddr={session.local} fd=-1 "
        f"name={name} age={int(now - session.created)} idle={int(now - session.last_active)} "
        f"flags={flags} db=0 sub={channels} psub={patterns} ssub=0 multi=-1 "
        f"qbuf={session.held_bytes} qbuf-free=0 argv-mem=0 multi-mem=0 rbs=0 rbp=0 "
        f"obl=0 oll=0 omem={output} tot-mem={session.held_bytes + output} "
        f"events={'r' if session.wants_input else ''} cmd={session.last_command or 'NULL'} "
        f"user=default redir=-1 resp={session.protocol} lib-name={library[0]} lib-ver={library[1]}"
    )


@command("client|kill")
def client_kill(session: Session, args: Args) -> None:
    """Close connections by address (old form) or by filters."""
    if len(args) == 3:
        address = args[2].decode(errors="replace")
        if not _kill(session, lambda each: each.address == address, skip_me=False):
            raise CommandError("No such client")
        session.out.append(reply.OK)
        return
    tests, skip_me = _filters(session, args)
    killed = _kill(session, lambda each: all(test(each) for test in tests), skip_me=skip_me)
    session.out.append(reply.integer(killed))


def _filters(session: Session, args: Args) -> tuple[list[Callable[[Session], bool]], bool]:
    tests: list[Callable[[Session], bool]] = []
    skip_me = True
    words = Words(args, 2)
    while words:
        word, value = words.word(), words.take()
        text = value.decode(errors="replace")
        if word == b"ID":
            number = integer(value, _WRONG_ID)
            if number < 1:
                raise CommandError(_WRONG_ID)
            tests.append(lambda each, number=number: each.number == number)  # type: ignore[misc]
        elif word == b"ADDR":
            tests.append(lambda each, text=text: each.address == text)  # type: ignore[misc]
        elif word == b"LADDR":
            tests.append(lambda each, text=text: each.local == text)  # type: ignore[misc]
        elif word == b"USER":
            if value != b"default":
                raise CommandError(f"No such user '{shown(value)}'")
        elif word == b"TYPE":
            kind = _kind(value)
            tests.append(lambda each, kind=kind: kind == _kind_of(each))  # type: ignore[misc]
        elif word == b"MAXAGE":
            oldest = session.server.clock.now - integer(value)
            tests.append(lambda each, oldest=oldest: each.created <= oldest)  # type: ignore[misc]
        elif word == b"SKIPME" and text.lower() in ("yes", "no"):
            skip_me = text.lower() == "yes"
        else:
            raise words.unexpected()
    return tests, skip_me


def _kill(session: Session, is_wanted: Callable[[Session], bool], *, skip_me: bool) -> int:
    doomed = [
        each
        for each in session.server.sessions.values()
        if is_wanted(each) and not (skip_me and each is session)
    ]
    for each in doomed:
        if each is session:
            session.is_closing = True  # after the answer
        else:
            each.wire.abort()
    return len(doomed)


@command("client|reply")
def client_reply(session: Session, args: Args) -> None:
    """Answer commands, or not: ON, OFF, or SKIP for the next one only."""
    word = args[2].upper()
    if word not in (b"ON", b"OFF", b"SKIP"):
        raise CommandError("syntax error")
    session.mute(word)


@command("client|no-evict")
def client_no_evict(session: Session, args: Args) -> None:
    """Accept ON and OFF: connections are never evicted here."""
    _on_or_off(session, args)


@command("client|no-touch")
def client_no_touch(session: Session, args: Args) -> None:
    """Accept ON and OFF."""
    _on_or_off(session, args)


def _on_or_off(session: Session, args: Args) -> None:
    if args[2].upper() not in (b"ON", b"OFF"):
        raise CommandError("syntax error")
    session.out.append(reply.OK)


@command("client|maint_notifications")
def client_maint_notifications(session: Session, args: Args) -> None:
    """Refuse: there is no maintenance that clients would be told of."""
    raise CommandError("maintenance notifications are not available on this server")
