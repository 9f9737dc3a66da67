"""The commands on retention: quotas, hints, how long pages are kept, and why they were not."""

from respkv.wire.commands.command import Command, KeySpec
from respkv.wire.commands.sequences import CHAIN

_OPTIONS = (
    "[PX milliseconds] [PIN milliseconds] [PRIORITY priority] [WRITTEN|DURABLE] [SESSION session]"
)
_ANSWERS = (
    "an array of the word, `accepted`, `clipped` or `rejected`, the value in force, and why it is "
    "that one"
)

RETENTION: tuple[Command, ...] = (
    Command(
        name="kv.quota",
        arity=-2,
        flags=("write",),
        categories=("kv",),
        summary="Get or set how many bytes a namespace or a tenant in it may keep",
        since="0.1.0",
        group="kv",
        complexity=(
            "O(1); when a first quota is set O(N) where N is the number of keys in the server"
        ),
        syntax=("KV.QUOTA namespace [TENANT tenant] [MAXBYTES bytes|DEFAULT] [TENANTBYTES bytes]"),
        notes=(
            "Answers a map: `max_bytes` (0 is no limit), `bytes` and `pages` kept now, and of a "
            "namespace `tenant_bytes`, the limit of each tenant that has none of its own, and "
            "`tenants`, how many keep pages or have a limit. MAXBYTES DEFAULT gives a tenant the "
            "namespace's TENANTBYTES again, MAXBYTES 0 frees it from that. A page counts once with "
            "its payload's bytes, in memory or in files, from when it can be found. What is over a "
            "new quota is evicted at once, and if it may not go the answer is a `KVQUOTA` error and "
            "the quota is as it was. With file tiers quotas survive a restart."
        ),
    ),
    Command(
        name="kv.hint",
        arity=-4,
        flags=("write", "fast"),
        categories=("kv",),
        summary="Say what will become of a session, so that its pages are kept accordingly",
        since="0.1.0",
        group="kv",
        complexity="O(N) where N is the number of pages of the session",
        syntax="KV.HINT namespace session END|EXPECT milliseconds|DEMOTE",
        notes=(
            "A session is named by SESSION in a put or a match. END: it will not go on; the pages "
            "that no other session used since are the first to be evicted. EXPECT: it goes on in so "
            "many milliseconds. DEMOTE: its pages leave memory as soon as they are in a file. "
            "Answers an array: `accepted`, `clipped` or `rejected`; the value in force, which is the "
            "number of pages meant for END and DEMOTE and milliseconds for EXPECT; and why it is "
            "that one. The next match of the session voids a hint."
        ),
    ),
    Command(
        name="kv.retain",
        arity=-4,
        flags=("write", "fast"),
        categories=("kv",),
        key_specs=(KeySpec(("RW", "update")),),
        summary="Change how a page that is there is kept",
        since="0.1.0",
        group="kv",
        complexity="O(1)",
        syntax=f"KV.RETAIN key {_OPTIONS}",
        notes=(
            f"Answers null when there is no such page, else for each option {_ANSWERS}. PX 0 takes "
            "the TTL away, PIN 0 the pin."
        ),
    ),
    Command(
        name="kv.seq.retain",
        arity=-5,
        flags=("write",),
        categories=("kv",),
        summary="Change how the stored pages of a prompt are kept",
        since="0.1.0",
        group="kv",
        complexity="O(N) where N is the number of tokens",
        syntax=f"KV.SEQ.RETAIN namespace tokens {_OPTIONS} {CHAIN}",
        notes=(
            f"Answers an array: the tokens matched, and for each option {_ANSWERS}. A pin is for all "
            "of the pages or for none. PX 0 takes TTLs away, PIN 0 pins."
        ),
    ),
    Command(
        name="kv.seq.explain",
        arity=-3,
        flags=("readonly",),
        categories=("kv",),
        summary="Say why a prompt is stored only so far",
        since="0.1.0",
        group="kv",
        complexity="O(N) where N is the number of tokens; see `explain-across-salts`",
        syntax=f"KV.SEQ.EXPLAIN namespace tokens {CHAIN}",
        notes=(
            "Answers an array: a reason, a text that names the first page that is missing and its "
            "key, and the tokens matched. The reasons are those of KV.EXPLAIN, and `hash` when the "
            "namespace's ids are made in a way that the server does not know, `group` when a group "
            "of layers lacks what it needs there, `incomplete` when only some layers and heads of the "
            "page have come, and, only if `explain-across-salts` is on, `salt` when the first page is "
            "stored under another salt, tenant or LoRA adapter."
        ),
    ),
)
