"""The commands of pub/sub, with Redis 7.0's own figures. Shard channels belong to clusters: none here."""

from respkv.wire.commands.command import Command, subcommands

_LISTENING = ("pubsub", "noscript", "loading", "stale")
_ASKING = ("pubsub", "loading", "stale")

PUBSUB: tuple[Command, ...] = (
    Command(
        name="subscribe",
        arity=-2,
        flags=_LISTENING,
        summary="Listen for messages published to the given channels",
        since="2.0.0",
        group="pubsub",
        complexity="O(N) where N is the number of channels to subscribe to.",
        syntax="SUBSCRIBE channel [channel ...]",
        notes="Channels `kv:events:<namespace>` tell what becomes of pages: docs/events.md.",
    ),
    Command(
        name="unsubscribe",
        arity=-1,
        flags=_LISTENING,
        summary="Stop listening for messages posted to the given channels",
        since="2.0.0",
        group="pubsub",
        complexity="O(N) where N is the number of clients already subscribed to a channel.",
        syntax="UNSUBSCRIBE [channel [channel ...]]",
    ),
    Command(
        name="psubscribe",
        arity=-2,
        flags=_LISTENING,
        summary="Listen for messages published to channels matching the given patterns",
        since="2.0.0",
        group="pubsub",
        complexity="O(N) where N is the number of patterns the client is already subscribed to.",
        syntax="PSUBSCRIBE pattern [pattern ...]",
    ),
    Command(
        name="punsubscribe",
        arity=-1,
        flags=_LISTENING,
        summary="Stop listening for messages posted to channels matching the given patterns",
        since="2.0.0",
        group="pubsub",
        complexity=(
            "O(N+M) where N is the number of patterns the client is already subscribed and M is "
            "the number of total patterns subscribed in the system (by any client)."
        ),
        syntax="PUNSUBSCRIBE [pattern [pattern ...]]",
    ),
    Command(
        name="publish",
        arity=3,
        flags=("pubsub", "loading", "stale", "fast"),
        summary="Post a message to a channel",
        since="2.0.0",
        group="pubsub",
        complexity=(
            "O(N+M) where N is the number of clients subscribed to the receiving channel and M is "
            "the total number of subscribed patterns (by any client)."
        ),
        syntax="PUBLISH channel message",
        notes="Channels that begin with `kv:events:` are the server's own: an error.",
    ),
    Command(
        name="pubsub",
        arity=-2,
        summary="A container for Pub/Sub commands",
        since="2.8.0",
        group="pubsub",
        complexity="Depends on subcommand.",
        syntax="PUBSUB",
        subcommands=subcommands(
            Command(
                name="pubsub|channels",
                arity=-2,
                flags=_ASKING,
                summary="List active channels",
                since="2.8.0",
                group="pubsub",
                complexity=(
                    "O(N) where N is the number of active channels, and assuming constant time "
                    "pattern matching (relatively short channels and patterns)"
                ),
                syntax="PUBSUB CHANNELS [pattern]",
            ),
            Command(
                name="pubsub|numsub",
                arity=-2,
                flags=_ASKING,
                summary="Get the count of subscribers for channels",
                since="2.8.0",
                group="pubsub",
                complexity="O(N) for the NUMSUB subcommand, where N is the number of requested channels",
                syntax="PUBSUB NUMSUB [channel [channel ...]]",
            ),
            Command(
                name="pubsub|numpat",
                arity=2,
                flags=_ASKING,
                summary="Get the count of unique patterns pattern subscriptions",
                since="2.8.0",
                group="pubsub",
                complexity="O(1)",
                syntax="PUBSUB NUMPAT",
            ),
            Command(
                name="pubsub|help",
                arity=2,
                flags=("loading", "stale"),
                summary="Show helpful text about the different subcommands",
                since="6.2.0",
                group="pubsub",
                complexity="O(1)",
                syntax="PUBSUB HELP",
            ),
        ),
    ),
)
