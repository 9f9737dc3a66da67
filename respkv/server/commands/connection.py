"""HELLO, AUTH and what else belongs to one connection."""

import hmac

import respkv
from respkv.errors import CommandError
from respkv.server.arguments import integer, shown
from respkv.server.registry import command
from respkv.server.session import Session
from respkv.wire import reply
from respkv.wire.parser import Args

NAME_BYTES = frozenset(range(0x21, 0x7F))


@command("ping")
def ping(session: Session, args: Args) -> None:
    """Answer with PONG or the argument."""
    if len(args) > 2:
        raise CommandError("wrong number of arguments for 'ping' command")
    if session.subscriptions is not None and session.protocol == 2:
        session.send([b"pong", args[1] if len(args) == 2 else b""])
    elif len(args) == 2:
        session.send_value(args[1])
    else:
        session.out.append(reply.PONG)


@command("echo")
def echo(session: Session, args: Args) -> None:
    """Answer with the argument."""
    session.send_value(args[1])


@command("quit")
def quit_(session: Session, args: Args) -> None:
    """Answer with OK and close."""
    session.out.append(reply.OK)
    session.is_closing = True


@command("select")
def select(session: Session, args: Args) -> None:
    """Accept database 0, the only one."""
    if integer(args[1]) != 0:
        raise CommandError("DB index is out of range")
    session.out.append(reply.OK)


@command("reset")
def reset(session: Session, args: Args) -> None:
    """Make the connection as it was when it was new, authentication included."""
    session.reset()
    session.out.append(reply.RESET)


@command("auth")
def auth(session: Session, args: Args) -> None:
    """Check a password."""
    if len(args) > 3:
        raise CommandError("syntax error")
    user, password = args[1:] if len(args) == 3 else (b"default", args[1])
    if len(args) == 2 and not session.server.config.requirepass:
        raise CommandError(
            "AUTH <password> called without any password configured for the default user. "
            "Are you sure your configuration is correct?"
        )
    _authenticate(session, user, password)
    session.out.append(reply.OK)


def _authenticate(session: Session, user: bytes, password: bytes) -> None:
    expected = session.server.config.requirepass.encode()
    is_right = hmac.compare_digest(password, expected) or not expected
    if user != b"default" or not is_right:
        raise CommandError("invalid username-password pair or user is disabled.", "WRONGPASS")
    session.demand_password(False)


@command("hello")
def hello(session: Session, args: Args) -> None:
    """Choose the protocol, authenticate and name the connection in one step."""
    protocol = session.protocol
    if len(args) > 1:
        protocol = integer(args[1], "Protocol version is not an integer or out of range")
        if protocol not in (2, 3):
            raise CommandError("unsupported protocol version", "NOPROTO")
    name = None
    position = 2
    while position < len(args):
        word = args[position].upper()
        if word == b"AUTH" and position + 2 < len(args):
            _authenticate(session, args[position + 1], args[position + 2])
            position += 3
        elif word == b"SETNAME" and position + 1 < len(args):
            name = args[position + 1]
            check_name(name)
            position += 2
        else:
            raise CommandError(f"Syntax error in HELLO option '{shown(args[position])}'")
    if not session.is_authenticated:
        raise CommandError(
            "HELLO must be called with the client already authenticated, otherwise the HELLO "
            "<proto> AUTH <user> <pass> option can be used to authenticate the client and "
            "select the RESP protocol version at the same time",
            "NOAUTH",
        )
    session.put_pushes()  # those that wait are written in the protocol of before
    session.protocol = protocol
    session.choose_handlers()
    if name is not None:
        session.name = name
    session.send(
        {
            "server": "redis",
            "version": REDIS_VERSION,
            "proto": protocol,
            "id": session.number,
            "mode": "standalone",
            "role": "master",
            "modules": [{"name": "respkv", "ver": version_number(), "path": "", "args": []}],
        }
    )


# The version of Redis whose behaviour the shared commands have; clients switch features on it.
REDIS_VERSION = "7.0.15"


def version_number() -> int:
    """Return respkv's version as a module's: 10203 for 1.2.3."""
    major, minor, patch = map(int, respkv.__version__.split(".")[:3])
    return (major * 100 + minor) * 100 + patch


def check_name(name: bytes) -> None:
    """Raise CommandError unless a name can stand in one column of CLIENT LIST."""
    if not NAME_BYTES.issuperset(name):
        raise CommandError("Client names cannot contain spaces, newlines or special characters.")
