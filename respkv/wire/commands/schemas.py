"""The commands on namespaces: what their pages look like, and how they are stored."""

from respkv.wire.commands.command import Command, subcommands

_SCHEMA = subcommands(
    Command(
        name="kv.schema|set",
        arity=-12,
        flags=("write", "denyoom"),
        categories=("kv",),
        summary="Give a namespace the shape that all its pages must have",
        since="0.1.0",
        group="kv",
        complexity="O(1)",
        syntax=(
            "KV.SCHEMA SET namespace [MLA] LAYERS n HEADS n DIM n TOKENS n DTYPE dtype "
            "[GROUP name FULL|SLIDING window|MLA|STATE "
            "LAYERS n HEADS n DIM n [DTYPE dtype]|BYTES n ...] "
            "[FINGERPRINT fingerprint] [HASH algorithm] [SEED seed] "
            "[CODEC tier codec [CODEC tier codec ...]] [EXACT first last] "
            "[MAXERROR error|MINRATIO ratio] [TTL milliseconds] "
            "[DURABILITY MEMORY|WRITTEN|DURABLE] [MAXBYTES bytes] [TENANTBYTES bytes]"
        ),
        notes=(
            "Answers `OK`, or a `KVSCHEMA` error when the namespace has another schema. "
            "A page is `[LAYERS, 2, TOKENS, HEADS, DIM]`, or with MLA, of latents, "
            "`[LAYERS, TOKENS, DIM]` and without HEADS. "
            "Each GROUP is of the layers of a hybrid model that keep something else, and what stands "
            "behind it is of that group until the next one: FULL and SLIDING keep keys and values in "
            "pages of a shape of their own, with as many tokens; of a SLIDING group a position needs "
            "only those of the last `window` tokens; MLA keeps latents, STATE one object of BYTES at "
            "a position. KV.SEQ.MATCH answers with the last position that every group can serve. "
            "HASH is what chains are made with: `blake3` when left out, `sha256`, `sha256_cbor`, or "
            "another name, whose pages KV.SEQ cannot name. "
            "CODEC says how pages are stored in a tier: `raw`, `xs`, `f8`, `i8`, `i4`, `rh4`, "
            "`rh3`, `rh2`, `rhz4`, `rhz3`, `rhz2`, or two of them, of keys and of values, as in "
            "`rh4/rh3`, or `auto`: the cheapest of them, for keys and for values of each layer, "
            "with which the relative L2 error is at most MAXERROR, or, with the smallest error, "
            "pages get smaller MINRATIO times. EXACT keeps so many tokens of a page as they are: "
            "the first ones, of pages without PARENT, and the last ones. Set again, a schema of the "
            "same shape has the codecs and all other policies that are said now, and no others. "
            "DURABILITY is what the pages of the namespace survive once their put is answered, "
            "`durability` when left out. MAXBYTES and TENANTBYTES are the quotas of KV.QUOTA, which "
            "stay as they are when left out. With file tiers the schema survives a restart."
        ),
    ),
    Command(
        name="kv.schema|get",
        arity=3,
        flags=("readonly", "fast"),
        categories=("kv",),
        summary="Get the schema of a namespace",
        since="0.1.0",
        group="kv",
        complexity="O(1)",
        syntax="KV.SCHEMA GET namespace",
        notes="Answers a map, or null.",
    ),
    Command(
        name="kv.schema|list",
        arity=2,
        flags=("readonly",),
        categories=("kv",),
        summary="List the namespaces that have a schema",
        since="0.1.0",
        group="kv",
        complexity="O(N) where N is the number of namespaces",
        syntax="KV.SCHEMA LIST",
        notes="Answers an array of names.",
    ),
    Command(
        name="kv.schema|del",
        arity=3,
        flags=("write",),
        categories=("kv",),
        summary="Delete the pages of a namespace and its schema",
        since="0.1.0",
        group="kv",
        complexity="O(N) where N is the number of keys in the server; others are served meanwhile",
        syntax="KV.SCHEMA DEL namespace",
        notes="Answers 1, or 0 when there was none.",
    ),
    Command(
        name="kv.schema|help",
        arity=2,
        flags=("loading", "stale"),
        categories=("kv",),
        summary="Show helpful text about the different subcommands",
        since="0.1.0",
        group="kv",
        complexity="O(1)",
        syntax="KV.SCHEMA HELP",
    ),
)

SCHEMAS: tuple[Command, ...] = (
    Command(
        name="kv.schema",
        arity=-2,
        categories=("kv",),
        summary="A container for commands on the schemas of namespaces",
        since="0.1.0",
        group="kv",
        complexity="Depends on subcommand.",
        syntax="KV.SCHEMA",
        subcommands=_SCHEMA,
    ),
    Command(
        name="kv.quality",
        arity=3,
        flags=("readonly",),
        categories=("kv",),
        summary="Measure what a codec does to the pages of a namespace",
        since="0.1.0",
        group="kv",
        complexity="O(N) where N is the number of bytes measured, 32 MiB or one page at most",
        syntax="KV.QUALITY namespace codec",
        notes=(
            "Answers a map: codec, pages and tokens measured; for `key_` and `value_` the stored "
            "`bits` of an element, and of the worst layer the `relative_l2` error, the `max_error` "
            "and the `attention_error`, that of attention's outputs; and for each layer the "
            "relative L2 errors of keys and of values. Takes seconds; needs `respkv[torch]`."
        ),
    ),
)
