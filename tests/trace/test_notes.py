"""What is written of a command: enough to simulate it, and nothing that a prompt is in."""

import struct
from typing import Any

import pytest

from respkv.trace.notes import Notes, Skipped, describe, is_tokens
from respkv.trace.scan import Answer
from respkv.wire.commands.table import look_up


def tokens(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}i", *numbers)


def fields(notes: Notes, *args: object) -> dict[str, Any]:
    return notes.command(list(args)).fields


def test_keys_are_hashed_with_a_salt_of_the_recording() -> None:
    one, other = Notes(), Notes()
    first = fields(one, b"GET", b"secret")
    assert first == {"cmd": "get", "in_bytes": 0, "num_keys": 1, "keys": first["keys"]}
    assert first["keys"] == fields(one, b"get", b"secret")["keys"]
    assert first["keys"] != fields(one, b"GET", b"secret2")["keys"]
    assert first["keys"] != fields(other, b"GET", b"secret")["keys"]


def test_a_match_is_a_chain_with_the_tokens_of_its_namespace() -> None:
    notes = Notes()
    notes.command([b"KV.SCHEMA", b"SET", b"ns", b"LAYERS", b"1", b"tokens", b"32"])
    found = fields(notes, b"KV.MATCH", b"2", b"ns:a", b"ns:b")
    assert (len(found["chain"]), found["page_tokens"]) == (2, 32)
    assert fields(notes, b"KV.MATCH", b"1", b"other:a")["page_tokens"] == 0
    assert fields(Notes(16), b"KV.MATCH", b"1", b"other:a")["page_tokens"] == 16


def test_a_put_says_what_it_stands_behind_its_tokens_and_its_bytes() -> None:
    notes = Notes()
    chain = fields(notes, b"KV.MATCH", b"2", b"ns:a", b"ns:b")["chain"]
    found = fields(notes, b"KV.PUT", b"ns:b", b"12345", b"PARENT", b"ns:a", b"TOKENS", b"64")
    assert (found["chain"], found["parent"]) == (chain[1:], chain[0])
    assert (found["page_tokens"], found["in_bytes"]) == (64, 5)
    assert fields(notes, b"KV.PUT", b"ns:b", Skipped(1 << 20))["in_bytes"] == 1 << 20


@pytest.fixture
def notes() -> Notes:
    notes = Notes()
    notes.learn(b"ns", 2)
    return notes


def test_prompts_with_a_common_front_have_a_common_front_of_ids(notes: Notes) -> None:
    one = fields(notes, b"KV.SEQ.MATCH", b"ns", tokens(1, 2, 3, 4, 5))
    other = fields(notes, b"KV.SEQ.GET", b"ns", tokens(1, 2, 3, 9))
    assert (one["tokens"], one["page_tokens"], len(one["chain"])) == (5, 2, 3)
    assert one["chain"][0] == other["chain"][0]
    assert one["chain"][1] != other["chain"][1]
    moved = fields(notes, b"KV.SEQ.MATCH", b"ns", tokens(3, 4))
    assert moved["chain"][0] not in one["chain"]


def test_what_goes_into_the_chain_beside_tokens_makes_other_ids(notes: Notes) -> None:
    prompt = tokens(1, 2)
    ways: list[tuple[bytes, ...]] = [
        (),
        (b"SALT", b"s"),
        (b"TENANT", b"s"),
        (b"LORA", b"s"),
        (b"MM", b"0", b"2", b"d"),
        (b"SALT", b"s", b"TENANT", b"t"),
    ]
    ids = [fields(notes, b"KV.SEQ.MATCH", b"ns", prompt, *way)["chain"][0] for way in ways]
    assert len(set(ids)) == len(ways)
    after = fields(notes, b"KV.SEQ.MATCH", b"ns", prompt, b"SESSION", b"x", b"salt", b"s")
    assert after["chain"][0] == ids[1]
    assert len(after["session"]) == 16


def test_a_put_of_a_sequence_has_its_payloads_counted_and_not_looked_at(notes: Notes) -> None:
    payloads = (b"SALT", Skipped(1000))  # bytes that look like a word are a payload all the same
    plain = fields(notes, b"KV.SEQ.MATCH", b"ns", tokens(1, 2, 3))
    found = fields(notes, b"KV.SEQ.PUT", b"ns", tokens(1, 2, 3), b"2", *payloads, b"SESSION", b"x")
    assert found["in_bytes"] == 1004
    assert found["chain"] == plain["chain"]
    assert "session" in found


def test_a_hint_is_written_with_the_session_that_it_is_about(notes: Notes) -> None:
    asked = fields(notes, b"KV.SEQ.MATCH", b"ns", tokens(1, 2), b"SESSION", b"x")
    hint = fields(notes, b"KV.HINT", b"ns", b"x", b"end")
    assert (hint["hint"], hint["session"]) == ("end", asked["session"])
    assert "hint" not in fields(notes, b"KV.HINT", b"ns", b"x", b"hunter2")


def test_without_a_schema_a_sequence_has_tokens_and_no_chain(notes: Notes) -> None:
    found = fields(notes, b"KV.SEQ.MATCH", b"unknown", tokens(1, 2, 3))
    assert (found["tokens"], found["page_tokens"], "chain" in found) == (3, 0, False)


def test_a_schema_that_the_server_refused_is_not_believed(notes: Notes) -> None:
    def page_tokens() -> int:
        found: int = fields(notes, b"KV.SEQ.MATCH", b"new", tokens(1, 2, 3))["page_tokens"]
        return found

    first = notes.command([b"KV.SCHEMA", b"SET", b"new", b"TOKENS", b"4"])
    assert page_tokens() == 4, "a sequence may come in the same packet"
    notes.answered(first, is_error=False)
    other = notes.command([b"KV.SCHEMA", b"SET", b"new", b"TOKENS", b"8"])
    notes.answered(other, is_error=True)
    assert page_tokens() == 4
    notes.answered(other, is_error=False)
    assert page_tokens() == 8


def test_nothing_that_a_client_sent_is_in_what_is_written(notes: Notes) -> None:
    secret = b"hunter2"
    commands: list[list[object]] = [
        [b"AUTH", secret],
        [b"HELLO", b"3", b"AUTH", b"default", secret],
        [secret, b"x"],
        [b"SET", secret, secret],
        [b"CONFIG", secret, secret],
        [b"CLIENT", b"SETNAME", secret],
        [b"KV.SEQ.MATCH", b"ns", secret + b"8", b"SESSION", secret, b"TENANT", secret],
        [b"KV.SEQ.PUT", b"ns", secret, secret, secret],
        [b"KV.MATCH", secret, secret],
        [b"KV.PUT", secret, secret, b"PARENT", secret, b"TOKENS", secret],
    ]
    for args in commands:
        assert "hunter2" not in repr(notes.command(args).fields)
    assert fields(notes, secret) == {"cmd": "other", "num_keys": 0, "in_bytes": 0}


@pytest.mark.parametrize(
    ("command", "answer", "said"),
    [
        ("get", Answer("$", nbytes=3), {"reply": "hit", "out_bytes": 3}),
        ("get", Answer("_"), {"reply": "miss", "out_bytes": 0}),
        ("set", Answer("+"), {"reply": "ok", "out_bytes": 0}),
        (
            "kv.match",
            Answer("*", number=2, items=3, nbytes=2),
            {"reply": "hit", "matched": 2, "out_bytes": 2},
        ),
        ("kv.match", Answer("*", number=0), {"reply": "miss", "matched": 0, "out_bytes": 0}),
        (
            "kv.mget",
            Answer("*", items=3, nils=1, nbytes=9),
            {"reply": "partial", "matched": 2, "out_bytes": 9},
        ),
        ("mget", Answer("*", items=2, nils=2), {"reply": "miss", "matched": 0, "out_bytes": 0}),
        ("exists", Answer(":", number=2), {"reply": "hit", "matched": 2, "out_bytes": 0}),
        (
            "kv.put",
            Answer("-", word="OOM"),
            {"reply": "error", "error": "OOM", "out_bytes": 0},
        ),
        # The word of an error is a server's own, or it is not written.
        ("get", Answer("-", word="hunter2"), {"reply": "error", "error": "ERR", "out_bytes": 0}),
        (None, Answer("$", nbytes=3), {"reply": "ok", "out_bytes": 3}),
    ],
)
def test_a_reply_is_a_hit_a_miss_a_count_or_an_error(
    command: str | None, answer: Answer, said: dict[str, object]
) -> None:
    found = None if command is None else look_up(command.encode())
    assert describe(found, answer) == said


def test_only_the_tokens_of_a_sequence_are_collected() -> None:
    assert is_tokens([b"kv.seq.match", b"ns"], 1 << 20)
    assert not is_tokens([b"KV.SEQ.PUT", b"ns", b"tokens", b"1"], 1 << 20)
    assert not is_tokens([b"KV.PUT", b"key"], 1 << 20)
    assert not is_tokens([b"KV.SEQ.MATCH", b"ns"], 7)
    assert not is_tokens([Skipped(3), b"ns"], 8)


def test_commands_whose_replies_cannot_be_counted_end_the_order() -> None:
    notes = Notes()
    for word in (b"MONITOR", b"subscribe", b"PSUBSCRIBE"):
        assert notes.command([word, b"x"]).ends_order
    assert not notes.command([b"PING"]).ends_order
