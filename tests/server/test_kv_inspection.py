"""KV.SEQ.EXPLAIN and KV.SEQ.RETAIN: why a prompt is stored only so far, and how it is kept."""

from typing import Any

import pytest

from respkv.chain import Chain, Extras, pack_tokens
from tests.conftest import StartServer
from tests.server.prompts import PAGE_BYTES, TOKENS, Text, text
from tests.server.raw import Raw, Word, error_of
from tests.server.test_kv_retention import info_of
from tests.server.test_kv_schemas import as_map
from tests.server.test_sequences import SHAPE, match, pages, put

NS = "x"


@pytest.fixture
def own(raw: Raw) -> Raw:
    """A connection to the shared server, which has the namespace x."""
    raw.ask("KV.SCHEMA", "DEL", NS)
    assert raw.ask("KV.SCHEMA", "SET", NS, *SHAPE) == b"OK"
    return raw


def explain(raw: Raw, prompt: Text, *options: Word, namespace: str = NS) -> tuple[str, str, int]:
    reply = raw.ask("KV.SEQ.EXPLAIN", namespace, pack_tokens(prompt.tokens), *options)
    reason, words, tokens = reply
    return reason.decode(), words.decode(), tokens


def key_of(prompt: Text, index: int, extras: Extras | None = None) -> bytes:
    chain = Chain("blake3", b"", TOKENS)
    data = pack_tokens(prompt.tokens)
    return chain.prompt(NS.encode(), data, extras or Extras()).key(index)


def stored(raw: Raw, num_tokens: int, seed: int, *options: Word) -> Text:
    prompt = text(num_tokens, seed)
    assert raw.ask(*put(prompt, *options, namespace=NS))[0] >= 1
    return prompt


def test_a_prompt_that_is_all_there_is_present(own: Raw) -> None:
    prompt = stored(own, 2 * TOKENS + 3, 1)
    assert explain(own, prompt) == ("present", "all 35 tokens are stored, in 3 pages", 35)
    assert explain(own, prompt.head(20))[::2] == ("present", 20)


def test_the_first_page_that_is_missing_is_named_with_its_reason(own: Raw) -> None:
    prompt = stored(own, 3 * TOKENS, 2)
    own.ask("DEL", key_of(prompt, 1))
    reason, words, tokens = explain(own, prompt)
    assert (reason, tokens) == ("deleted", TOKENS)
    assert words.startswith("16 of 48 tokens are stored; tokens 16 to 31, page 1, x:")
    assert key_of(prompt, 1).decode() in words
    longer = prompt.head(TOKENS).followed_by(text(TOKENS, 77))
    assert explain(own, longer)[::2] == ("never", TOKENS)


def test_pages_that_expired_were_flushed_or_went_for_a_quota_say_so(own: Raw) -> None:
    prompt = stored(own, 2 * TOKENS, 3)
    own.ask("PEXPIREAT", key_of(prompt, 1), 1)
    assert explain(own, prompt)[0] in ("expired", "deleted")
    own.ask("KV.QUOTA", NS, "MAXBYTES", 2 * PAGE_BYTES)
    first = stored(own, TOKENS, 4)
    stored(own, 2 * TOKENS, 5)
    reason, words, tokens = explain(own, first)
    assert (reason, tokens) == ("quota", 0)
    assert "KV.QUOTA" in words
    own.ask("KV.QUOTA", NS, "MAXBYTES", 0)
    last = stored(own, TOKENS, 6)
    own.ask("FLUSHALL")
    assert explain(own, last)[0] == "flushed"


def test_a_namespace_without_a_schema_or_with_ids_of_its_own_says_so(own: Raw) -> None:
    prompt = text(TOKENS, 7)
    reason, words, tokens = explain(own, prompt, namespace="nowhere")
    assert (reason, tokens) == ("schema", 0)
    assert "KV.SCHEMA SET" in words
    own.ask("KV.SCHEMA", "SET", "opaque", *SHAPE, "HASH", "md5", "SEED", "")
    reason, words, _ = explain(own, prompt, namespace="opaque")
    assert reason == "hash"
    assert "md5" in words
    own.ask("KV.SCHEMA", "DEL", "opaque")


def test_tokens_that_cannot_be_are_an_error(own: Raw) -> None:
    assert "3 bytes are no multiple" in error_of(own.ask("KV.SEQ.EXPLAIN", NS, b"abc"))
    assert "BOGUS" in error_of(own.ask("KV.SEQ.EXPLAIN", NS, pack_tokens([1]), "BOGUS"))


def test_another_salt_is_told_of_only_where_that_is_allowed(start_server: StartServer) -> None:
    with Raw(start_server().connect()) as raw:
        raw.ask("KV.SCHEMA", "SET", NS, *SHAPE)
        prompt = stored(raw, TOKENS, 8, "SALT", "theirs")
        assert explain(raw, prompt, "SALT", "mine")[::2] == ("never", 0)
        assert raw.ask("CONFIG", "SET", "explain-across-salts", "yes") == b"OK"
        reason, words, tokens = explain(raw, prompt, "SALT", "mine")
        assert (reason, tokens) == ("salt", 0)
        assert "under another salt" in words
        assert explain(raw, text(TOKENS, 9), "SALT", "mine")[0] == "never"
        assert explain(raw, prompt, "SALT", "theirs")[0] == "present"


def test_a_group_that_lacks_something_is_told(own: Raw) -> None:
    own.ask("KV.SCHEMA", "DEL", "h")
    assert own.ask("KV.SCHEMA", "SET", "h", *SHAPE, "GROUP", "state", "STATE", "BYTES", 64) == b"OK"
    prompt = text(TOKENS, 10)
    payloads = pages(prompt)
    data = pack_tokens(prompt.tokens)
    assert own.ask("KV.SEQ.PUT", "h", data, 1, *payloads) == [1, 0]
    reason, words, tokens = explain(own, prompt, namespace="h")
    assert (reason, tokens) == ("group", 0)
    assert words.endswith("group state serves 0")
    assert own.ask("KV.SEQ.PUT", "h", data, 1, b"s" * 64, "GROUP", "state")[1] == 0
    assert explain(own, prompt, namespace="h")[::2] == ("present", TOKENS)


# -- KV.SEQ.RETAIN ----------------------------------------------------------------------------


def test_the_pages_of_a_prompt_are_kept_as_is_asked(own: Raw) -> None:
    prompt = stored(own, 2 * TOKENS + 4, 11, "SALT", "s")
    data = pack_tokens(prompt.tokens)
    words: list[Any] = ["KV.SEQ.RETAIN", NS, data, "SALT", "s", "PIN", 60_000, "PRIORITY", 7]
    matched, answers = own.ask(*words, "PX", 90_000, "SESSION", "talk")
    assert matched == 36
    assert [row[:3] for row in answers] == [
        [b"PIN", b"accepted", 60_000],
        [b"PRIORITY", b"accepted", 7],
        [b"PX", b"accepted", 90_000],
        [b"SESSION", b"accepted", 3],
    ]
    for index in range(2):
        info = as_map(own.ask("KV.INFO", key_of(prompt, index, Extras(salt=b"s"))))
        assert 30_000 < info[b"pinned_ms"] <= 60_000
        assert 60_000 < info[b"ttl_ms"] <= 90_000
        assert (info[b"priority"], info[b"session"], info[b"depth"]) == (7, b"talk", 16 * index)
    status, value, _ = own.ask("KV.HINT", NS, "talk", "END")
    assert (status, value) == (b"accepted", 3)
    matched, [answer] = own.ask("KV.SEQ.RETAIN", NS, data, "SALT", "s", "PIN", 0)
    assert (matched, answer[:3]) == (36, [b"PIN", b"accepted", 0])


def test_logits_are_kept_and_given_up_with_their_prompt(own: Raw) -> None:
    prompt = stored(own, TOKENS + 4, 21, "SESSION", "chat", "LOGITS", b"l" * 3000)
    data = pack_tokens(prompt.tokens)
    matched, [pin, talk] = own.ask("KV.SEQ.RETAIN", NS, data, "PIN", 60_000, "SESSION", "chat")
    assert (matched, pin[1], talk[2]) == (20, b"accepted", 2)
    assert int(info_of(own, "kv")["kv_pinned"]) == 3
    assert own.ask("KV.HINT", NS, "chat", "END")[:2] == [b"accepted", 2]


def test_a_prompt_that_is_not_there_is_kept_by_nobody(own: Raw) -> None:
    data = pack_tokens(text(TOKENS, 12).tokens)
    assert own.ask("KV.SEQ.RETAIN", NS, data, "PIN", 1000)[0] == 0
    assert "accepted are PX" in error_of(own.ask("KV.SEQ.RETAIN", NS, data, "SALT", "s"))


def test_a_tenant_of_prompts_pays_for_them(own: Raw) -> None:
    own.ask("KV.QUOTA", NS, "TENANTBYTES", 2 * PAGE_BYTES)
    prompt = stored(own, 2 * TOKENS, 13, "TENANT", "t")
    other = stored(own, TOKENS, 14, "TENANT", "u")
    account = as_map(own.ask("KV.QUOTA", NS, "TENANT", "t"))
    assert account[b"bytes"] == 2 * PAGE_BYTES
    newer = stored(own, TOKENS, 15, "TENANT", "t")
    account = as_map(own.ask("KV.QUOTA", NS, "TENANT", "t"))
    assert account[b"bytes"] == 2 * PAGE_BYTES
    assert own.ask(*match(prompt, "TENANT", "t", namespace=NS))[0] == TOKENS
    assert own.ask(*match(other, "TENANT", "u", namespace=NS))[0] == TOKENS
    assert own.ask(*match(newer, "TENANT", "t", namespace=NS))[0] == TOKENS
    too_long = text(3 * TOKENS, 16)
    refused = error_of(own.ask(*put(too_long, "TENANT", "t", namespace=NS)))
    assert refused.startswith("KVQUOTA")
    own.ask("KV.QUOTA", NS, "TENANTBYTES", 0)


def test_a_page_in_rectangles_is_refused_when_it_is_whole(own: Raw) -> None:
    own.ask("KV.QUOTA", NS, "MAXBYTES", PAGE_BYTES // 2)
    prompt = text(TOKENS, 22)
    halves = [Text(prompt.tokens, prompt.part((0, 4), (4 * half, 4))) for half in range(2)]
    assert own.ask(*put(halves[0], "HEADS", 0, 4, namespace=NS)) == [0, 0]
    refused = error_of(own.ask(*put(halves[1], "HEADS", 4, 4, namespace=NS)))
    assert refused.startswith("KVQUOTA")
    fields = info_of(own, "kv")
    assert (fields["kv_assemblies"], fields["kv_landings"]) == ("0", "0")
    own.ask("KV.QUOTA", NS, "MAXBYTES", 0)
