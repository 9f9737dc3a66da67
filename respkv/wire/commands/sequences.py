"""The commands on sequences: prompts as tokens, whose pages the server names and finds itself."""

from respkv.wire.commands.command import Command

CHAIN = "[SALT salt] [TENANT tenant] [LORA name [LORAPATH path]] [MM first count digest ...]"
_RANGES = "[LAYERS first count] [HEADS first count] [GROUP name]"

SEQUENCES: tuple[Command, ...] = (
    Command(
        name="kv.seq.match",
        arity=-3,
        flags=("readonly", "fast"),
        categories=("kv",),
        summary="Find how many tokens of a prompt are stored, and keep them for a while",
        since="0.1.0",
        group="kv",
        complexity="O(N) where N is the number of tokens",
        syntax=f"KV.SEQ.MATCH namespace tokens {CHAIN} [SESSION session] [LOGITS]",
        notes=(
            "Tokens are int32, little-endian. Answers an array: the tokens matched, to the token and "
            "not to the page; the full pages among them; one letter for the tier of each page, the "
            "partly matched last one too (`g` gpu, `c` memory, `n` nvme, `d` disk); the microseconds "
            "that loading them should take; and 1 when logits are stored for the end of the prompt, "
            "else 0. With LOGITS a sixth item follows: those logits, or null when there are none, or "
            "only in a file, for which a match does not wait. What matched stays for `answer-lease` "
            "milliseconds. The namespace must have a schema, whose HASH and SEED make the ids of the "
            "pages."
        ),
    ),
    Command(
        name="kv.seq.put",
        arity=-5,
        flags=("write", "denyoom"),
        categories=("kv",),
        summary="Store the pages of a prompt, and the partial one at its end",
        since="0.1.0",
        group="kv",
        complexity="O(N) where N is the number of tokens and of bytes",
        syntax=(
            "KV.SEQ.PUT namespace tokens numpayloads [payload ...] [FROM token] "
            f"{_RANGES} [LOGITS bytes] [HIDDEN bytes] {CHAIN} [SESSION session] "
            "[PX milliseconds] [PRIORITY priority] [PIN milliseconds] [WRITTEN|DURABLE]"
        ),
        payload=(4, 1),
        notes=(
            "One payload, `[layers, 2, tokens, heads, dim]`, for each page of the tokens from FROM "
            "on, a multiple of the tokens of a page; the last may be a partial page. Answers an "
            "array: how many pages were stored and how many were there. The pages before FROM must "
            "be there, else a `KVGAP` error says from which token to go on. Pages are stored in "
            "order, and others are served in between when there are many: after an error those before "
            "it may be there. Pages that are there are kept from then on as the options say, as if they "
            "had come now; a pin stays without PIN, and a level is never lowered. With LAYERS or HEADS "
            "the payloads are rectangles of the pages, `[count, 2, tokens, count, dim]`; a page can be "
            "found once all its rectangles have come, from whichever connections, in `assembly-timeout` "
            "milliseconds from each to the next. LOGITS and HIDDEN belong to the end of the tokens; "
            "with them numpayloads may be 0. With GROUP the payloads are those of its shape, for a "
            "STATE one, that of the end of the tokens. States, logits and hidden states are stored "
            "and not counted in the answer."
        ),
    ),
    Command(
        name="kv.seq.get",
        arity=-3,
        flags=("readonly",),
        categories=("kv",),
        summary="Get the stored tokens of a prompt, layer by layer",
        since="0.1.0",
        group="kv",
        complexity="O(N) where N is the number of bytes returned",
        syntax=(
            f"KV.SEQ.GET namespace tokens [FROM token] {_RANGES} [LOGITS] [HIDDEN] "
            f"[DEADLINE milliseconds] {CHAIN} [SESSION session]"
        ),
        notes=(
            "Answers an array: the tokens matched; the logits and the hidden state of the end of the "
            "prompt, each only if asked for, or null; then one bulk for each layer, "
            "`[2, n, heads, dim]` of the tokens from FROM to the last that matched, each sent when "
            "the one before has room. Pages in files are brought into memory first; the answer is "
            "an error, OOM, when memory never holds all at once. With a DEADLINE those that are not "
            "there in time, and what stands behind them, are not among the tokens matched."
        ),
    ),
)
