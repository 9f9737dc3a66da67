"""The commands on KV pages, which are respkv's own. docs/commands.md says what each answers."""

from respkv.wire.commands.command import Command, KeySpec
from respkv.wire.commands.schemas import SCHEMAS

_COUNTED = KeySpec(("RO", "access"), counted=True)
_PUT_OPTIONS = (
    "[PARENT key] [TOKENS n] [PX milliseconds] [PRIORITY n] [PIN milliseconds] [NX] "
    "[WRITTEN|DURABLE] [SESSION session] [TENANT tenant]"
)

_PAGES = (
    Command(
        name="kv.put",
        arity=-3,
        flags=("write", "denyoom", "movablekeys"),
        categories=("kv",),
        key_specs=(KeySpec(("OW", "update")), KeySpec(("RO",), begin="PARENT", start=3)),
        payload=(2, 0),
        summary="Store a page; its payload must be as long as the schema of its namespace says",
        since="0.1.0",
        group="kv",
        complexity="O(N) where N is the length of the payload",
        syntax=f"KV.PUT key payload {_PUT_OPTIONS}",
        notes=(
            "Answers `OK`, or null when NX was given and the page is there; a `KVSCHEMA` error "
            "with both sizes when the payload does not fit, an `OOM` error when no room can be "
            "made. With WRITTEN the answer comes when the page survives a crash of the server, with "
            "DURABLE when it survives a power cut; a `KVTIER` error says that it will not, and "
            "the page is in memory. PX is cut to `ttl-max` and PIN to `pin-max`; a `KVPIN` error "
            "says that too much is pinned, a `KVQUOTA` error that the namespace or the TENANT may "
            "keep no more and nothing of theirs may go; nothing is stored then. SESSION is what "
            "KV.HINT names."
        ),
    ),
    Command(
        name="kv.get",
        arity=-2,
        flags=("readonly",),
        categories=("kv",),
        key_specs=(KeySpec(("RO", "access")),),
        summary="Get the bytes of a page, or of some of its layers",
        since="0.1.0",
        group="kv",
        complexity="O(N) where N is the number of bytes returned",
        syntax="KV.GET key [LAYERS first count] [DEADLINE milliseconds] [AS raw|dtype]",
        notes=(
            "AS a dtype (`bfloat16`, `float16`, `float32`, `float8_e4m3fn`, `float8_e5m2`) answers "
            "the numbers in that type; AS `raw` an encoded page, whose head says how each plane is "
            "stored, as a file has it. Both need a schema. "
            "Answers the bytes, or null. Works on ordinary values too, without LAYERS. A page in a "
            "file that is not in memory by the DEADLINE is answered with null; it is loaded all the "
            "same, so the next get finds it."
        ),
    ),
    Command(
        name="kv.mget",
        arity=-3,
        flags=("readonly", "movablekeys"),
        categories=("kv",),
        key_specs=(_COUNTED,),
        summary="Get the bytes of many pages, or of some of their layers, streamed in order",
        since="0.1.0",
        group="kv",
        complexity="O(N) where N is the number of bytes returned",
        syntax=(
            "KV.MGET numkeys key [key ...] [LAYERS first count] [DEADLINE milliseconds] "
            "[AS raw|dtype]"
        ),
        notes=(
            "Answers an array with the bytes, or null, for each key; after the DEADLINE, null for "
            "those that are not in memory. Pages in files are loaded while those before them are "
            "sent, so they may be more than memory holds."
        ),
    ),
    Command(
        name="kv.match",
        arity=-3,
        flags=("readonly", "fast", "movablekeys"),
        categories=("kv",),
        key_specs=(_COUNTED,),
        summary="Find the longest run of present pages, and keep it for a while",
        since="0.1.0",
        group="kv",
        complexity="O(N) where N is the number of keys",
        syntax="KV.MATCH numkeys key [key ...] [SESSION session]",
        notes=(
            "Answers an array: how many pages from the first on are present, one letter for "
            "the tier of each (`g` gpu, `c` memory, `n` nvme, `d` disk), and the microseconds that loading "
            "them should take. The pages stay for `answer-lease` milliseconds."
        ),
    ),
    Command(
        name="kv.prefetch",
        arity=-3,
        flags=("readonly", "fast", "movablekeys"),
        categories=("kv",),
        key_specs=(KeySpec(("RO",), counted=True),),
        summary="Have pages brought from files into memory, ahead of use",
        since="0.1.0",
        group="kv",
        complexity="O(N) where N is the number of keys",
        syntax="KV.PREFETCH numkeys key [key ...] [TO cpu|gpu]",
        notes=(
            "Answers at once, with how many pages are on their way now; those that are there, "
            "are absent, or do not fit into what may be on its way are not counted. TO `gpu` has "
            "pages copied to the gpu tier, too, once they are in memory; their namespaces must have "
            "schemas."
        ),
    ),
    Command(
        name="kv.info",
        arity=2,
        flags=("readonly", "fast"),
        categories=("kv",),
        key_specs=(KeySpec(("RO",)),),
        summary="Describe a page: its size, tier, age, parent, pins and leases",
        since="0.1.0",
        group="kv",
        complexity="O(1)",
        syntax="KV.INFO key",
        notes=(
            "Answers a map, or null. Whose it is: `session`, `turn`, `request_tokens`, `request_class`, "
            "`is_ended` and `expected_ms` (-1: no hint) of the request that used it last; `tenant`, with the bytes "
            "kept and allowed of the tenant and of the namespace (0 is no limit). How it is kept: "
            "`level`, `priority`, `ttl_ms` (-1: none), `pinned_ms`, `held_ms`."
        ),
    ),
    Command(
        name="kv.touch",
        arity=-3,
        flags=("readonly", "fast", "movablekeys"),
        categories=("kv",),
        key_specs=(KeySpec(("RO",), counted=True),),
        summary="Count pages as used just now",
        since="0.1.0",
        group="kv",
        complexity="O(N) where N is the number of keys",
        syntax="KV.TOUCH numkeys key [key ...]",
        notes="Answers how many of the pages are present.",
    ),
    Command(
        name="kv.pin",
        arity=3,
        flags=("write", "fast"),
        categories=("kv",),
        key_specs=(KeySpec(("RW", "update")),),
        summary="Keep a page from eviction for some time",
        since="0.1.0",
        group="kv",
        complexity="O(1)",
        syntax="KV.PIN key milliseconds",
        notes=(
            "Answers 1, or 0 when the page is absent. More than `pin-max` is cut to that; KV.RETAIN "
            "says so and KV.INFO shows it. A `KVPIN` error when more than `pinned-share-max` of the "
            "arena would be pinned."
        ),
    ),
    Command(
        name="kv.unpin",
        arity=2,
        flags=("write", "fast"),
        categories=("kv",),
        key_specs=(KeySpec(("RW", "update")),),
        summary="Let a pinned page be evicted again",
        since="0.1.0",
        group="kv",
        complexity="O(1)",
        syntax="KV.UNPIN key",
        notes="Answers 1, or 0 when the page is absent or was not pinned.",
    ),
    Command(
        name="kv.explain",
        arity=2,
        flags=("readonly", "fast"),
        categories=("kv",),
        key_specs=(KeySpec(("RO",)),),
        summary="Say why a page is present or absent",
        since="0.1.0",
        group="kv",
        complexity="O(1)",
        syntax="KV.EXPLAIN key",
        notes=(
            "Answers an array of a reason (`present`, `cold` when it is in files alone, `never`, "
            "`evicted`, `quota` when it was evicted for one, `expired`, `deleted`, `flushed`, `schema`, `corrupt`, `lost`) and a text."
        ),
    ),
)

_SHARED_MEMORY = (
    Command(
        name="kv.attach",
        arity=1,
        flags=("readonly", "noscript", "fast"),
        categories=("kv",),
        summary="Get the path, size, layout version and mode of the shared arena",
        since="0.1.0",
        group="kv",
        complexity="O(1)",
        syntax="KV.ATTACH",
        notes=(
            "Answers an array: path, bytes, layout version, and `ro` or `rw`; which file of which "
            "boot that is; and `packed` where KV.LEASE takes PACKED. An error when shared memory is "
            "off."
        ),
    ),
    Command(
        name="kv.lease",
        arity=-3,
        flags=("readonly", "noscript", "movablekeys"),
        categories=("kv",),
        key_specs=(_COUNTED,),
        summary="Hold pages in place and get where in the shared arena their bytes are",
        since="0.1.0",
        group="kv",
        complexity="O(N) where N is the number of keys",
        syntax="KV.LEASE numkeys key [key ...] [MS milliseconds] [TIER cpu|gpu] [PACKED]",
        notes=(
            "Answers an array: the lease, then for each key its offset and length, or null when "
            "there is no such page. Pages in files alone are brought into memory first; when not "
            "all of them can be there at once, the answer is an error: OOM. "
            "The lease ends with its connection, or after its time. With PACKED the array has two "
            "items: the lease, and a bulk with the offset and the length of each key's page, int64 "
            "little-endian, -1 and -1 when there is none: quicker for many keys. TIER `gpu` answers "
            "an array of "
            "four: the lease; for each key an array of offset, length and form, or null when no "
            "copy of it can be made; the UUID of the device; and the CUDA IPC handle of the "
            "allocation that the offsets are in. Pages without a copy on the device get one first."
        ),
    ),
    Command(
        name="kv.release",
        arity=2,
        flags=("readonly", "noscript", "fast"),
        categories=("kv",),
        summary="End a lease",
        since="0.1.0",
        group="kv",
        complexity="O(N) where N is the number of pages leased",
        syntax="KV.RELEASE lease",
        notes="Answers 1, or 0 when the lease had lapsed: what was read must not be trusted.",
    ),
    Command(
        name="kv.reserve",
        arity=-3,
        flags=("write", "denyoom", "noscript"),
        categories=("kv",),
        key_specs=(KeySpec(("OW", "insert")),),
        summary="Take room in the shared arena for a page that the caller will write there",
        since="0.1.0",
        group="kv",
        complexity="O(1)",
        syntax="KV.RESERVE key nbytes [MS milliseconds]",
        notes=(
            "Answers an array: the lease, and the offset at which to write. The reservation "
            "ends with its connection, or after its time."
        ),
    ),
    Command(
        name="kv.commit",
        arity=-2,
        flags=("write", "noscript", "movablekeys", "no_mandatory_keys"),
        categories=("kv",),
        key_specs=(KeySpec(("RO",), begin="PARENT", start=2),),
        summary="Publish the page written under a reservation",
        since="0.1.0",
        group="kv",
        complexity="O(N) where N is the length of the page, which is checksummed",
        syntax=f"KV.COMMIT lease {_PUT_OPTIONS}",
        notes=(
            "Answers `OK`, or null when NX was given and the page is there; a `KVLEASE` error "
            "when the reservation had lapsed, and nothing is stored."
        ),
    ),
    Command(
        name="kv.abort",
        arity=2,
        flags=("write", "noscript", "fast"),
        categories=("kv",),
        summary="Give back a reservation",
        since="0.1.0",
        group="kv",
        complexity="O(1)",
        syntax="KV.ABORT lease",
        notes="Answers 1, or 0 when there was no such reservation.",
    ),
)

KV: tuple[Command, ...] = (
    *SCHEMAS,
    *_PAGES,
    *_SHARED_MEMORY,
    Command(
        name="kv.tiers",
        arity=1,
        flags=("readonly", "loading", "stale", "fast"),
        categories=("kv",),
        summary="Describe each tier: its capacity, what is used, its pages",
        since="0.1.0",
        group="kv",
        complexity="O(N) where N is the number of tiers",
        syntax="KV.TIERS",
        notes="Answers an array of maps.",
    ),
    Command(
        name="kv.stats",
        arity=1,
        flags=("readonly", "loading", "stale", "fast"),
        categories=("kv",),
        summary="Get the cache's counters: hits, misses, bytes, evictions, leases",
        since="0.1.0",
        group="kv",
        complexity="O(1)",
        syntax="KV.STATS",
        notes="Answers a map.",
    ),
)
