"""The server itself: INFO, CONFIG, TIME, SHUTDOWN."""

import time

from respkv.config import FIXED, OF_SOCKETS, RUNTIME
from respkv.errors import CommandError, ConfigError
from respkv.server.arguments import Words, shown
from respkv.server.info import info_text
from respkv.server.registry import command
from respkv.server.session import Session
from respkv.wire import reply
from respkv.wire.glob import compile_glob
from respkv.wire.parser import Args


@command("info")
def info(session: Session, args: Args) -> None:
    """Answer with the sections asked for, or those that are shown by default."""
    wanted = [arg.decode(errors="replace").lower() for arg in args[1:]]
    session.send(reply.Verbatim(info_text(session.server, wanted)))


@command("config|get")
def config_get(session: Session, args: Args) -> None:
    """Answer with the settings whose names match a pattern."""
    globs = [compile_glob(arg, ignore_case=True) for arg in args[2:]]
    config = session.server.config
    known = {**FIXED, **{name: config.text(name) for name in config.names()}}
    session.send(
        {
            name: value
            for name, value in known.items()
            if any(glob.match(name.encode()) for glob in globs)
        }
    )


@command("config|set")
def config_set(session: Session, args: Args) -> None:
    """Change settings, all or none."""
    if len(args) % 2:
        raise CommandError("wrong number of arguments for 'config|set' command")
    changes: dict[str, str] = {}
    for position in range(2, len(args), 2):
        name = args[position].decode(errors="replace").lower()
        if name in changes:
            raise CommandError(f"CONFIG SET failed - duplicate parameter '{shown(args[position])}'")
        if name in session.server.config.names() and name not in RUNTIME:
            raise CommandError(
                f"CONFIG SET failed (possibly related to argument '{name}') - "
                "can't set immutable config: restart the server with it"
            )
        if session.server.is_embedded and name in OF_SOCKETS:
            raise CommandError(f"CONFIG SET failed - an embedded engine has no {name}")
        changes[name] = args[position + 1].decode(errors="replace")
    server = session.server
    try:
        config = server.config.with_values(changes)
    except ConfigError as error:
        raise CommandError(f"CONFIG SET failed - {error}") from None
    if config.maxmemory - config.small_value_bytes() > server.arena.nbytes:
        raise CommandError(
            f"CONFIG SET failed - maxmemory {config.maxmemory} is more than the arena was made "
            f"for; restart the server with it, or stay at {server.maxmemory_at_start} or less"
        )
    server.configure(config)
    session.out.append(reply.OK)


@command("config|resetstat")
def config_resetstat(session: Session, args: Args) -> None:
    """Set the counters to zero."""
    session.server.reset_counters()
    session.out.append(reply.OK)


@command("time")
def time_(session: Session, args: Args) -> None:
    """Answer with seconds and microseconds since the epoch."""
    seconds, ns = divmod(time.time_ns(), 1_000_000_000)
    session.send([str(seconds), str(ns // 1000)])


@command("module|list")
def module_list(session: Session, args: Args) -> None:
    """Answer that there are none to load or unload."""
    session.send([])


@command("shutdown")
def shutdown(session: Session, args: Args) -> None:
    """Let answers leave, then end the server. With file tiers it always saves."""
    words = Words(args, 1)
    while words:
        word = words.word()
        if word == b"ABORT":
            raise CommandError("No shutdown in progress.")
        if word not in (b"NOSAVE", b"SAVE", b"NOW", b"FORCE"):
            raise CommandError("syntax error")
    if session.server.is_embedded:
        raise CommandError("an embedded engine ends when it is closed")
    session.is_closing = True
    session.server.stopping.set()
