"""Pub/sub: SUBSCRIBE and its kin, PUBLISH, PUBSUB.

What a client is told about its own subscriptions is a push, as the messages are. In RESP2 both look
like replies, and a client that listens may send little else (registry.py).
"""

from respkv.errors import CommandError
from respkv.server.arguments import shown
from respkv.server.event_channels import PREFIX
from respkv.server.registry import command
from respkv.server.session import Session
from respkv.wire import reply
from respkv.wire.glob import compile_glob
from respkv.wire.parser import Args


@command("subscribe")
def subscribe(session: Session, args: Args) -> None:
    """Listen to channels."""
    session.put_pushes()
    for channel in args[1:]:
        session.server.pubsub.subscribe(session, channel)
        _confirm(session, b"subscribe", channel)


@command("psubscribe")
def psubscribe(session: Session, args: Args) -> None:
    """Listen to the channels that patterns cover."""
    session.put_pushes()
    for pattern in args[1:]:
        session.server.pubsub.subscribe_pattern(session, pattern)
        _confirm(session, b"psubscribe", pattern)


@command("unsubscribe")
def unsubscribe(session: Session, args: Args) -> None:
    """Listen to channels no more: to those that are named, or to all."""
    session.put_pushes()
    own = session.subscriptions
    named = args[1:] or list(() if own is None else own.channels)
    for channel in named:
        session.server.pubsub.unsubscribe(session, channel)
        _confirm(session, b"unsubscribe", channel)
    if not named:
        _confirm(session, b"unsubscribe", None)


@command("punsubscribe")
def punsubscribe(session: Session, args: Args) -> None:
    """Listen to patterns no more: to those that are named, or to all."""
    session.put_pushes()
    own = session.subscriptions
    named = args[1:] or list(() if own is None else own.patterns)
    for pattern in named:
        session.server.pubsub.unsubscribe_pattern(session, pattern)
        _confirm(session, b"punsubscribe", pattern)
    if not named:
        _confirm(session, b"punsubscribe", None)


def _confirm(session: Session, word: bytes, name: bytes | None) -> None:
    """Say to how many channels and patterns the client listens now."""
    own = session.subscriptions
    count = 0 if own is None else len(own)
    session.send_push(reply.encode(reply.Push((word, name, count)), session.protocol))


@command("publish")
def publish(session: Session, args: Args) -> None:
    """Send a message to all who listen to a channel; answer with their number."""
    if args[1].startswith(PREFIX):  # who listens there believes what it hears
        raise CommandError(
            f"{shown(args[1])}: channels that begin with {PREFIX.decode()} are the server's own"
        )
    count = session.server.pubsub.publish(args[1], args[2])
    session.put_pushes()  # its own copy goes before the answer
    session.out.append(reply.integer(count))


@command("pubsub|channels")
def pubsub_channels(session: Session, args: Args) -> None:
    """Answer with the channels that have listeners, or those of them that a pattern covers."""
    if len(args) > 3:
        # Redis checks this one by hand, in words of its own.
        word = args[1].decode("utf-8", "surrogateescape")
        raise CommandError(
            f"unknown subcommand or wrong number of arguments for '{word}'. Try PUBSUB HELP."
        )
    channels = session.server.pubsub.channels()
    if len(args) == 3:
        glob = compile_glob(args[2])
        channels = filter(glob.match, channels)
    session.send(list(channels))


@command("pubsub|numsub")
def pubsub_numsub(session: Session, args: Args) -> None:
    """Answer with channels and how many listen to each, patterns aside."""
    pubsub = session.server.pubsub
    session.send([part for name in args[2:] for part in (name, pubsub.num_listeners(name))])


@command("pubsub|numpat")
def pubsub_numpat(session: Session, args: Args) -> None:
    """Answer with the number of different patterns that are listened to."""
    session.out.append(reply.integer(session.server.pubsub.num_patterns))
