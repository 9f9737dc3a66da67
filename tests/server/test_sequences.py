"""KV.SEQ.MATCH, PUT and GET over sockets: answers, errors, and what a broken connection leaves."""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy
import pytest
import redis as redis_py

from respkv.chain import Chain, Extras, pack_tokens
from tests.conftest import StartServer
from tests.fakes import FakeWire
from tests.server.cold import cold_server as chilled_server
from tests.server.cold import replies
from tests.server.prompts import PAGE_BYTES, TOKENS, Text, text
from tests.server.raw import Raw, Word, error_of, parsed, pipeline, request
from tests.server.watching import number_of, wait_for, wait_until
from tests.server_process import ServerProcess

MIB = 1 << 20
Connect = Callable[..., Raw]
SHAPE = ("LAYERS", 4, "HEADS", 8, "DIM", 16, "TOKENS", TOKENS, "DTYPE", "bfloat16")
# Pages of 256 KiB, which land in their slots, and planes of 32 KiB, which are sent from there.
WIDE = ("LAYERS", 4, "HEADS", 8, "DIM", 128, "TOKENS", TOKENS, "DTYPE", "bfloat16")
WIDE_BYTES = 256 * 1024


@pytest.fixture
def own(raw: Raw) -> Raw:
    """A connection to the shared server, which has the namespaces s and w."""
    for name, shape in (("s", SHAPE), ("w", WIDE)):
        raw.ask("KV.SCHEMA", "DEL", name)
        assert raw.ask("KV.SCHEMA", "SET", name, *shape) == b"OK"
    return raw


def wide(num_tokens: int, seed: int) -> Text:
    """Return a prompt of the namespace w."""
    random = numpy.random.default_rng(seed)
    kv = random.integers(0, 1 << 16, (4, 2, num_tokens, 8, 128), dtype=numpy.uint16)
    return Text([int(each) for each in random.integers(0, 1 << 20, num_tokens)], kv)


def pages(prompt: Text, first: int = 0) -> list[bytes]:
    """Return the pages of the tokens from ``first`` on."""
    starts = range(first, len(prompt.tokens), TOKENS)
    return [
        numpy.ascontiguousarray(prompt.kv[:, :, start : start + TOKENS]).tobytes()
        for start in starts
    ]


def put(prompt: Text, *options: Word, namespace: str = "s", first: int = 0) -> list[Word]:
    """Return the words of a put of the tokens from ``first`` on."""
    payloads = pages(prompt, first)
    tokens = pack_tokens(prompt.tokens)
    front: list[Word] = ["KV.SEQ.PUT", namespace, tokens, len(payloads), *payloads]
    return [*front, "FROM", first, *options] if first else [*front, *options]


def match(prompt: Text, *options: Word, namespace: str = "s") -> list[Word]:
    return ["KV.SEQ.MATCH", namespace, pack_tokens(prompt.tokens), *options]


def get(prompt: Text, *options: Word, namespace: str = "s") -> list[Word]:
    return ["KV.SEQ.GET", namespace, pack_tokens(prompt.tokens), *options]


def layers(prompt: Text, first: int = 0) -> list[bytes]:
    """Return what a get answers behind the number of tokens."""
    return [numpy.ascontiguousarray(layer[:, first:]).tobytes() for layer in prompt.kv]


def test_a_prompt_is_put_matched_and_got(own: Raw) -> None:
    prompt = text(2 * TOKENS + 5, 1)
    assert own.ask(*match(prompt)) == [0, 0, b"", 0, 0]
    assert own.ask(*get(prompt)) == [0, b"", b"", b"", b""]
    assert own.ask(*put(prompt)) == [3, 0]
    tokens, full, letters, load_us, has_logits = own.ask(*match(prompt))
    assert (tokens, full, letters, has_logits) == (37, 2, b"ccc", 0)
    assert load_us > 0
    assert own.ask(*get(prompt)) == [37, *layers(prompt)]
    assert own.ask(*put(prompt)) == [0, 3]


def test_a_match_is_to_the_token(own: Raw) -> None:
    prompt = text(2 * TOKENS + 5, 2)
    own.ask(*put(prompt))
    for num_tokens in range(1, len(prompt.tokens) + 1):
        other = prompt.head(num_tokens).followed_by(text(TOKENS, 3))
        count, full, letters, _, _ = own.ask(*match(other))
        assert (count, full) == (num_tokens, num_tokens // TOKENS)
        assert len(letters) == -(-num_tokens // TOKENS)
        got = own.ask(*get(other))
        assert got == [num_tokens, *layers(prompt.head(num_tokens))], num_tokens


def test_any_range_of_tokens_layers_and_heads_comes(own: Raw) -> None:
    prompt = text(3 * TOKENS + 4, 4)
    own.ask(*put(prompt))
    for first in (0, 1, TOKENS - 1, TOKENS, TOKENS + 7, 3 * TOKENS, 3 * TOKENS + 3):
        got = own.ask(*get(prompt, "FROM", first, "LAYERS", 1, 2, "HEADS", 3, 4))
        part = prompt.part((1, 2), (3, 4), first)
        assert got == [len(prompt.tokens), *(layer.tobytes() for layer in part)], first
    assert own.ask(*get(prompt, "FROM", 52)) == [52, b"", b"", b"", b""]
    assert own.ask(*get(prompt, "FROM", 9999)) == [52, b"", b"", b"", b""]


def test_pages_land_in_their_slots_and_leave_from_there(own: Raw, server: ServerProcess) -> None:
    prompt = wide(5 * TOKENS + 7, 5)
    before = server.info()
    assert own.ask(*put(prompt, namespace="w")) == [6, 0]
    assert own.ask(*get(prompt, namespace="w")) == [87, *layers(prompt)]
    after = server.info()
    landed = int(after["kv_bytes_landed"]) - int(before["kv_bytes_landed"])
    in_place = int(after["kv_bytes_sent_in_place"]) - int(before["kv_bytes_sent_in_place"])
    assert landed > 4.8 * WIDE_BYTES
    assert in_place == prompt.kv.nbytes
    wait_for(server, "kv_sending", 0)
    assert (after["kv_landings"], after["kv_sending"]) == ("0", "0")


def test_pages_are_named_as_the_chain_says(own: Raw) -> None:
    prompt = text(2 * TOKENS, 6)
    own.ask(*put(prompt, "SALT", "x", "LORA", "a", "LORAPATH", "/a", "MM", 3, 20, "digest"))
    assert own.ask(*match(prompt))[0] == 0
    assert own.ask(*match(prompt, "SALT", "x"))[0] == 0
    words = ("lora", "a", "salt", "x", "lorapath", "/a", "mm", 3, 20, "digest")
    assert own.ask(*match(prompt, *words))[0] == 32
    assert own.ask(*get(prompt, *words)) == [32, *layers(prompt)]
    plain = text(2 * TOKENS, 7)
    own.ask(*put(plain, "TENANT", "t"))
    ids = Chain("blake3", b"", TOKENS).ids(pack_tokens(plain.tokens), Extras(tenant=b"t"))
    keys = [b"s:" + each.hex().encode() for each in ids]
    assert own.ask("KV.MATCH", 2, *keys)[0] == 2
    assert own.ask("KV.GET", keys[1]) == pages(plain)[1]


def test_logits_and_hidden_state_come_with_a_full_hit_only(own: Raw) -> None:
    prompt = text(TOKENS + 3, 8)
    logits, hidden = b"l" * (200 * 1024), b"h" * 100
    assert own.ask(*put(prompt, "LOGITS", logits)) == [2, 0]
    assert own.ask(*match(prompt))[4] == 1
    tokens = pack_tokens(prompt.tokens)
    assert own.ask("KV.SEQ.PUT", "s", tokens, 0, "HIDDEN", hidden) == [0, 0]
    got = own.ask(*get(prompt, "HIDDEN", "LOGITS"))
    assert got == [19, logits, hidden, *layers(prompt)]
    assert own.ask(*get(prompt, "LOGITS", "FROM", 19)) == [19, logits, b"", b"", b"", b""]
    longer = prompt.followed_by(text(3, 9))
    assert own.ask(*get(longer, "LOGITS"))[:2] == [19, None]
    assert own.ask(*match(longer))[4] == 0
    assert own.ask(*get(prompt.head(7), "LOGITS", "HIDDEN"))[:3] == [7, None, None]
    own.ask("KV.SEQ.PUT", "s", pack_tokens(prompt.tokens[:7]), 0, "LOGITS", "inside a page")
    assert own.ask(*get(prompt.head(7), "LOGITS"))[:2] == [7, b"inside a page"]
    error = error_of(own.ask("KV.SEQ.PUT", "s", pack_tokens(longer.tokens), 0, "LOGITS", "x"))
    assert error.startswith("KVGAP")


def test_a_prompt_goes_on_where_it_ended(own: Raw) -> None:
    whole = text(4 * TOKENS + 2, 10)
    own.ask(*put(whole.head(TOKENS + 9)))
    assert own.ask(*match(whole))[:2] == [25, 1]
    assert own.ask(*put(whole, first=TOKENS)) == [4, 0]
    assert own.ask(*get(whole)) == [66, *layers(whole)]
    assert own.ask("DBSIZE") == 5, "the tail that became a part of a page has gone"


def test_a_gap_is_refused_and_says_where_to_go_on(own: Raw) -> None:
    prompt = text(4 * TOKENS, 11)
    own.ask(*put(prompt.head(TOKENS)))
    error = error_of(own.ask(*put(prompt, first=3 * TOKENS)))
    assert error.startswith("KVGAP")
    assert "FROM 16" in error
    assert own.ask("DBSIZE") == 1
    assert own.ask(*put(prompt, first=TOKENS)) == [3, 0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["KV.SEQ.MATCH", "s", b"123"], "3 bytes are no multiple"),
        (["KV.SEQ.MATCH", "s", b"\xff\xff\xff\xff"], "-1"),
        (["KV.SEQ.MATCH", "none", b"1234"], "KVSCHEMA"),
        (["KV.SEQ.MATCH", "s", b"1234", "BOGUS"], "'BOGUS'"),
        (["KV.SEQ.MATCH", "s", b"1234", "SALT"], "a value is missing"),
        (["KV.SEQ.MATCH", "s", b"1234", "SALT", "a", "SALT", "b"], "syntax error"),
        (["KV.SEQ.MATCH", "s", b"1234", "LORAPATH", "b"], "LORAPATH needs the LORA"),
        (["KV.SEQ.MATCH", "s", b"1234", "SESSION", ""], "SESSION has 1 to 256 bytes"),
        (["KV.SEQ.MATCH", "s", b"1234", "MM", 0, 0, "d"], "MM count must be at least 1"),
        (["KV.SEQ.MATCH", "s", b"1234", "MM", 0, 1, ""], "1 to 1024 bytes, not 0"),
        (["KV.SEQ.MATCH", "s", b"1234", "MM", 1 << 31, 1, "d"], "from 2147483648"),
        (["KV.SEQ.MATCH", "s"], "wrong number of arguments"),
        (["KV.SEQ.PUT", "s", b"1234", 0], "wrong number of arguments"),
        (["KV.SEQ.PUT", "s", b"1234", 0, "PX", 5], "numpayloads 0 needs LOGITS"),
        (["KV.SEQ.PUT", "s", b"1234", 5, "a", "b"], "greater than number of args"),
        (["KV.SEQ.PUT", "s", b"1234", -1, "a", "b"], "at least 0, not -1"),
        (["KV.SEQ.PUT", "s", b"", 1, "a"], "at least 1 token"),
        (["KV.SEQ.PUT", "s", b"1234", 1, "a"], "have 2048 bytes, their payload has 1"),
        (["KV.SEQ.PUT", "s", b"1234", 2, "a", "b"], "1 pages of 16 tokens, and 2 payloads came"),
        (["KV.SEQ.PUT", "s", b"1234", 1, bytes(2048), "FROM", 1], "multiple of 16"),
        (["KV.SEQ.PUT", "s", b"1234", 1, bytes(2048), "FROM", 16], "up to 1"),
        (["KV.SEQ.PUT", "s", b"1234", 1, bytes(2048), "LOGITS", b""], "LOGITS has at least 1 byte"),
        (["KV.SEQ.PUT", "s", b"1234", 1, bytes(2048), "DURABLE"], "this server has none"),
        (
            ["KV.SEQ.PUT", "s", b"1234", 1, "a", "LAYERS", 3, 2],
            "layers 3 to 4 are not within 0 to 3",
        ),
        (["KV.SEQ.PUT", "s", b"1234", 1, "a", "HEADS", 8, 1], "heads 8 to 8 are not within 0 to 7"),
        (
            ["KV.SEQ.PUT", "s", b"1234", 1, "a", "HEADS", 0, 4],
            "have 1024 bytes, their payload has 1",
        ),
        (["KV.SEQ.PUT", "s", b"1234", 1, "a", "GROUP", "g"], "no group 'g'"),
        (["KV.SEQ.GET", "s", b"1234", "LAYERS", 0, 0], "layer count must be at least 1"),
        (["KV.SEQ.GET", "s", b"1234", "LAYERS", 0, 5], "not within 0 to 3"),
        (["KV.SEQ.GET", "s", b"1234", "FROM", -1], "FROM must be at least 0"),
        (["KV.SEQ.GET", "s", b"1234", "LOGITS", "LOGITS"], "syntax error"),
        (
            ["KV.SEQ.GET", "s", b"1234", "AS", "raw"],
            "takes no AS: convert them where they are read",
        ),
    ],
    ids=lambda each: "" if isinstance(each, list) else each,
)
def test_what_cannot_be_is_refused_by_name(own: Raw, words: list[Word], expected: str) -> None:
    assert expected in error_of(own.ask(*words))
    assert own.ask("DBSIZE") == 0


def test_a_namespace_of_other_hashes_takes_no_tokens(own: Raw) -> None:
    own.ask("KV.SCHEMA", "DEL", "o")
    assert own.ask("KV.SCHEMA", "SET", "o", *SHAPE, "HASH", "xxhash", "SEED", "1") == b"OK"
    assert error_of(own.ask("KV.SEQ.MATCH", "o", b"1234")).startswith("KVSCHEMA")


@pytest.mark.parametrize("protocol", [2, 3])
def test_redis_py_needs_no_client_of_ours(own: Raw, server: ServerProcess, protocol: int) -> None:
    prompt = wide(2 * TOKENS + 1, 20 + protocol)
    with redis_py.Redis(port=server.port, protocol=protocol) as client:
        words: list[Any] = put(prompt, "LOGITS", b"l", namespace="w")
        assert client.execute_command(*words) == [3, 0]
        pipe = client.pipeline(transaction=False)
        words = match(prompt, namespace="w")
        pipe.execute_command(*words)
        words = get(prompt, "LOGITS", "HIDDEN", namespace="w")
        pipe.execute_command(*words)
        pipe.ping()
        found, got, pong = pipe.execute()
        assert found[0] == 33
        assert got == [33, b"l", None, *layers(prompt)]
        assert pong is True


def test_a_pipeline_of_puts_and_gets_is_answered_in_order(own: Raw) -> None:
    prompts = [wide(2 * TOKENS + each, 30 + each) for each in range(6)]
    requests: list[list[Word]] = []
    for prompt in prompts:
        half = prompt.part((0, 4), (0, 4)), prompt.part((0, 4), (4, 4))
        tokens = pack_tokens(prompt.tokens)
        for number, part in enumerate(half):
            cut = [
                numpy.ascontiguousarray(part[:, :, start : start + TOKENS]).tobytes()
                for start in range(0, len(prompt.tokens), TOKENS)
            ]
            requests.append(["KV.SEQ.PUT", "w", tokens, len(cut), *cut, "HEADS", 4 * number, 4])
        requests += [match(prompt, namespace="w"), get(prompt, namespace="w"), ["ECHO", "x"]]
    replies = own.ask_all(requests)
    for number, prompt in enumerate(prompts):
        first, second, found, got, echo = replies[5 * number : 5 * number + 5]
        count = len(pages(prompt))
        assert (first, second) == ([0, 0], [count, 0])
        assert found[0] == len(prompt.tokens)
        assert got == [len(prompt.tokens), *layers(prompt)]
        assert echo == b"x"


def test_a_muted_client_is_told_nothing(own: Raw) -> None:
    prompt = wide(2 * TOKENS, 40)
    own.ask(*put(prompt, namespace="w"))
    own.send("CLIENT", "REPLY", "SKIP")
    own.send(*get(prompt, namespace="w"))
    assert own.ask("PING") == b"PONG"
    own.send("CLIENT", "REPLY", "SKIP")
    own.send(*put(text(1, 41), "HEADS", 0, 8))
    assert own.ask("ECHO", "y") == b"y"


def test_a_client_that_leaves_in_the_middle_of_a_put_leaves_nothing(
    own: Raw, connect: Connect, server: ServerProcess
) -> None:
    prompt = wide(4 * TOKENS, 50)
    used = number_of(server, "kv_arena_used_bytes")  # slots of writers that others had cut off
    portions: list[list[Word]] = [[], ["HEADS", 0, 8]]
    for portion in portions:
        data = request(*put(prompt, *portion, namespace="w"))
        for cut in (WIDE_BYTES // 2, WIDE_BYTES + 5000, 3 * WIDE_BYTES + 100_000, len(data) - 1):
            broken = connect()
            broken.socket.sendall(data[:cut])
            wait_until(server, "kv_landings", lambda number: number > 0)
            broken.close()
            wait_for(server, "kv_landings", 0)
            wait_until(server, "kv_arena_used_bytes", lambda number: number <= used)
            assert own.ask(*match(prompt, namespace="w"))[0] == 0
    assert own.ask("DBSIZE") == 0


def test_a_client_that_leaves_in_the_middle_of_a_get_holds_nothing(
    own: Raw, connect: Connect, server: ServerProcess
) -> None:
    prompt = wide(40 * TOKENS, 51)
    used = number_of(server, "kv_arena_used_bytes")  # slots of writers that others had cut off
    assert own.ask(*put(prompt, namespace="w")) == [40, 0]
    broken = connect()
    broken.send(*get(prompt, namespace="w"))
    broken.socket.recv(100_000)
    wait_for(server, "kv_sending", 40)
    broken.close()
    wait_for(server, "kv_sending", 0)
    assert own.ask("FLUSHALL") == b"OK"
    wait_until(server, "kv_arena_used_bytes", lambda number: number <= used)


def test_a_slow_reader_gets_what_was_there_when_it_asked(
    own: Raw, connect: Connect, server: ServerProcess
) -> None:
    prompt = wide(40 * TOKENS + 3, 52)
    own.ask(*put(prompt, namespace="w"))
    slow = connect()
    before = server.resident_bytes
    slow.send(*get(prompt, namespace="w"))
    wait_for(server, "kv_sending", 41)
    assert own.ask("FLUSHALL") == b"OK"
    other = wide(40 * TOKENS + 3, 53)
    assert own.ask(*put(other, namespace="w")) == [41, 0]
    assert server.resident_bytes - before < 32 * MIB
    assert slow.next() == [len(prompt.tokens), *layers(prompt)]
    wait_for(server, "kv_sending", 0)


def test_two_clients_put_the_same_prompt_at_once(own: Raw, connect: Connect) -> None:
    prompts = [wide(3 * TOKENS + 5, 60 + each) for each in range(5)]
    answers: list[list[Any]] = []

    def put_all(client: Raw) -> None:
        answers.extend(client.ask(*put(prompt, namespace="w")) for prompt in prompts)

    threads = [threading.Thread(target=put_all, args=(connect(),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(stored for stored, _ in answers) == 4 * len(prompts)
    assert all(stored + there == 4 for stored, there in answers)
    for prompt in prompts:
        assert own.ask(*get(prompt, namespace="w"))[1:] == layers(prompt)


def test_a_put_that_finds_no_room_keeps_what_came_before(start_server: StartServer) -> None:
    server = start_server(maxmemory="8mb", reserve_timeout=50)
    with Raw(server.connect()) as raw:
        raw.ask("KV.SCHEMA", "SET", "w", *WIDE)
        prompt = wide(60 * TOKENS, 70)
        error = error_of(raw.ask(*put(prompt, namespace="w")))
        assert error.startswith("OOM")
        count, full, _, _, _ = raw.ask(*match(prompt, namespace="w"))
        assert count == full * TOKENS
        assert 0 < full < 60
        assert raw.ask(*get(prompt, namespace="w")) == [count, *layers(prompt.head(count))]
        assert server.info()["kv_landings"] == "0"
        raw.ask("FLUSHALL")
        small = prompt.head(10 * TOKENS)
        assert raw.ask(*put(small, namespace="w")) == [10, 0]
        wait_for(server, "kv_landings", 0)


def test_pages_of_a_small_put_do_not_push_out_each_other(start_server: StartServer) -> None:
    server = start_server(maxmemory="4mb", answer_lease=0)
    with Raw(server.connect()) as raw:
        raw.ask("KV.SCHEMA", "SET", "s", *SHAPE)
        for seed in range(8):
            prompt = text(80 * TOKENS, 80 + seed)
            assert raw.ask(*put(prompt)) == [80, 0]
            assert raw.ask(*get(prompt)) == [len(prompt.tokens), *layers(prompt)]
        error = error_of(raw.ask(*put(text(300 * TOKENS, 90))))
        assert error.startswith("OOM")


def test_a_put_makes_no_room_out_of_the_pages_in_front(start_server: StartServer) -> None:
    server = start_server(maxmemory="4mb", answer_lease=0)
    with Raw(server.connect()) as raw:
        raw.ask("KV.SCHEMA", "SET", "s", *SHAPE)
        prompt = text(140 * TOKENS, 91)
        for start in range(0, 140, 10):
            reply = raw.ask(*put(prompt.head((start + 10) * TOKENS), first=start * TOKENS))
            if isinstance(reply, Exception):
                assert error_of(reply).startswith(("OOM", "KVGAP"))
                break
            assert reply == [10, 0]
            count, *got = raw.ask(*get(prompt))
            assert count == (start + 10) * TOKENS
            assert got == layers(prompt.head(count))
        assert raw.ask("DBSIZE") * TOKENS == raw.ask(*match(prompt))[0], "there is no hole"


def test_options_of_a_put_are_those_of_its_pages(own: Raw) -> None:
    prompt = text(TOKENS + 2, 100)
    own.ask(*put(prompt, "PX", 60_000, "PRIORITY", 3, "PIN", 50_000, "SESSION", "chat"))
    key = b"s:" + Chain("blake3", b"", TOKENS).ids(pack_tokens(prompt.tokens))[0].hex().encode()
    found = own.ask("KV.INFO", key)
    info = dict(zip(found[::2], found[1::2], strict=True))
    assert info[b"priority"] == 3
    assert 0 < info[b"ttl_ms"] <= 60_000
    assert 0 < info[b"pinned_ms"] <= 50_000
    assert info[b"tokens"] == TOKENS
    assert info[b"children"] == 1


def test_a_pin_is_renewed_and_counts_once(start_server: StartServer) -> None:
    # Nearly 2 MiB may be pinned, and 5 of these pages have 1.25.
    with Raw(start_server(maxmemory="8mb", pinned_share_max=25).connect()) as raw:
        raw.ask("KV.SCHEMA", "SET", "w", *WIDE)
        prompt = wide(5 * TOKENS, 120)
        words = put(prompt, "PIN", 60_000, namespace="w")
        assert raw.ask(*words) == [5, 0]
        assert raw.ask(*words) == [0, 5]
        longer = prompt.followed_by(wide(2 * TOKENS, 121))
        assert raw.ask(*put(longer, "PIN", 60_000, namespace="w")) == [2, 5]
        refused = error_of(raw.ask(*put(wide(2 * TOKENS, 122), "PIN", 60_000, namespace="w")))
        assert refused.startswith(f"KVPIN {7 * WIDE_BYTES} bytes are pinned")
        assert raw.ask("DBSIZE") == 7, "nothing of what was refused is stored"


@pytest.mark.parametrize("nbytes", [1000, 100_000])
def test_an_end_that_is_there_needs_no_room_in_a_quota(own: Raw, nbytes: int) -> None:
    # Large ones land in slots of their own before the command runs, small ones do not.
    prompt = text(TOKENS, 123)
    words = put(prompt, "LOGITS", b"l" * nbytes, "HIDDEN", b"h" * nbytes)
    other = text(TOKENS, 124)
    own.ask("KV.QUOTA", "s", "MAXBYTES", 2 * PAGE_BYTES + 2 * nbytes)
    try:
        assert own.ask(*put(other)) == [1, 0]
        assert own.ask(*words) == [1, 0]
        assert own.ask(*words) == [0, 1]
        assert own.ask(*match(other))[0] == TOKENS, "nothing had to go for what is there"
        assert own.ask(*get(prompt, "LOGITS", "HIDDEN"))[1:3] == [b"l" * nbytes, b"h" * nbytes]
        assert own.ask(*match(prompt))[4] == 1
    finally:
        own.ask("KV.QUOTA", "s", "MAXBYTES", 0)


# -- pages that are put together --------------------------------------------------------------


def half(prompt: Text, number: int) -> list[Word]:
    """Return the put of the half of the heads."""
    part = Text(prompt.tokens, prompt.part((0, 4), (4 * number, 4)))
    return put(part, "HEADS", 4 * number, 4)


def test_a_page_that_is_not_completed_is_dropped_and_counted(start_server: StartServer) -> None:
    server = start_server(assembly_timeout=300)
    with Raw(server.connect()) as raw:
        raw.ask("KV.SCHEMA", "SET", "s", *SHAPE)
        prompt = text(2 * TOKENS, 110)
        assert raw.ask(*half(prompt, 0)) == [0, 0]
        wait_for(server, "kv_assemblies_dropped", 2)
        info = server.info()
        assert (info["kv_assemblies_dropped"], info["kv_assembly_bytes"]) == ("2", "0")
        wait_for(server, "kv_arena_used_bytes", 0)
        raw.ask("CONFIG", "SET", "assembly-timeout", 60_000)
        assert raw.ask(*half(prompt, 1)) == [0, 0]
        assert raw.ask(*half(prompt, 0)) == [2, 0]


def test_a_flush_and_a_deleted_schema_drop_what_is_put_together(own: Raw) -> None:
    prompt = text(2 * TOKENS, 111)
    for end in (["FLUSHALL"], ["KV.SCHEMA", "DEL", "s"]):
        own.ask(*half(prompt, 0))
        own.ask(*end)
        own.ask("KV.SCHEMA", "SET", "s", *SHAPE)
        assert own.ask(*half(prompt, 1)) == [0, 0]
        assert own.ask(*half(prompt, 0)) == [2, 0]
        own.ask("FLUSHALL")


def test_a_page_is_put_together_where_a_string_has_its_key(own: Raw) -> None:
    prompt = text(TOKENS + 5, 30)
    for page_id in Chain("blake3", b"", TOKENS).ids(pack_tokens(prompt.tokens)):
        own.ask("SET", b"s:" + page_id.hex().encode(), "a string")
    upper, lower = Text(prompt.tokens, prompt.kv[:2]), Text(prompt.tokens, prompt.kv[2:])
    assert own.ask(*put(upper, "LAYERS", 0, 2)) == [0, 0]
    assert own.ask(*put(lower, "LAYERS", 2, 2)) == [2, 0]
    assert own.ask(*get(prompt)) == [TOKENS + 5, *layers(prompt)]


def test_a_worker_that_waited_while_its_schema_went_is_told(
    start_server: StartServer, connect: Connect
) -> None:
    server = start_server(assembly_memory=str(3 * PAGE_BYTES), reserve_timeout=120_000)
    ahead, other = connect(server), connect(server)
    ahead.ask("KV.SCHEMA", "SET", "s", *SHAPE)
    ahead.send(*half(text(20 * TOKENS, 116), 0))
    wait_for(server, "kv_assemblies", 3)
    other.ask("KV.SCHEMA", "DEL", "s")
    assert error_of(ahead.next()).startswith("KVSCHEMA")
    assert server.info()["kv_assemblies"] == "0"


def test_the_tokens_of_pages_are_memory_in_use(own: Raw, server: ServerProcess) -> None:
    own.ask("KV.SCHEMA", "DEL", "long")
    shape = ("LAYERS", 1, "HEADS", 1, "DIM", 1, "TOKENS", 4096, "DTYPE", "uint8")
    assert own.ask("KV.SCHEMA", "SET", "long", *shape) == b"OK"
    pages = 8
    before = int(server.info()["used_memory"])
    tokens = pack_tokens([7] * 4096 * pages)
    assert own.ask("KV.SEQ.PUT", "long", tokens, pages, *[bytes(8192)] * pages) == [pages, 0]
    assert int(server.info()["used_memory"]) - before >= pages * (8192 + 4 * 4096)
    assert own.ask("FLUSHALL") == b"OK"
    assert int(server.info()["used_memory"]) <= before


def test_pages_put_together_are_bounded(start_server: StartServer) -> None:
    server = start_server(assembly_memory="64kb", reserve_timeout=100)
    with Raw(server.connect()) as raw:
        raw.ask("KV.SCHEMA", "SET", "s", *SHAPE)
        prompt = text(10 * TOKENS, 112)
        error = error_of(raw.ask(*half(prompt, 0)))
        assert error.startswith("OOM")
        assert "assembly-memory" in error
        assert int(server.info()["kv_assembly_bytes"]) <= 64 * 1024
        raw.ask("CONFIG", "SET", "assembly-memory", "1mb")
        raw.ask(*half(prompt, 0))
        assert raw.ask(*half(prompt, 1)) == [10, 0]


def test_a_worker_that_is_ahead_waits_for_the_others(
    start_server: StartServer, connect: Connect
) -> None:
    server = start_server(assembly_memory=str(3 * PAGE_BYTES), reserve_timeout=120_000)
    ahead, behind = connect(server), connect(server)
    ahead.ask("KV.SCHEMA", "SET", "s", *SHAPE)
    prompt = text(20 * TOKENS, 115)
    ahead.send(*half(prompt, 0))
    wait_for(server, "kv_assemblies", 3)
    for count in range(1, 21):
        part = Text(prompt.tokens[: count * TOKENS], prompt.part((0, 4), (4, 4)))
        part.kv = part.kv[:, :, : count * TOKENS]
        words = put(part, "HEADS", 4, 4, first=(count - 1) * TOKENS)
        assert sum(behind.ask(*words)) <= 1
    assert sum(ahead.next()) <= 20
    assert behind.ask(*get(prompt)) == [320, *layers(prompt)]
    assert server.info()["kv_assemblies"] == "0"


def test_a_page_waits_for_the_one_in_front(own: Raw) -> None:
    prompt = text(2 * TOKENS, 113)
    both = [*half(prompt, 0)], [*half(prompt, 1)]
    assert own.ask(*half(prompt.head(TOKENS), 0)) == [0, 0]
    rest = Text(prompt.tokens, prompt.part((0, 4), (0, 4)))
    for number in (0, 1):
        rest = Text(prompt.tokens, prompt.part((0, 4), (4 * number, 4)))
        words = put(rest, "HEADS", 4 * number, 4, first=TOKENS)
        assert own.ask(*words) == [0, 0], "the first page is not whole"
    assert own.ask("DBSIZE") == 0
    assert own.ask(*half(prompt.head(TOKENS), 1)) == [1, 0]
    assert own.ask(*get(prompt)) == [32, *layers(prompt)]
    assert own.ask(*both[1]) == [0, 2]


def test_who_put_a_page_that_its_owner_may_not_keep_is_told(own: Raw) -> None:
    theirs, ours = text(TOKENS, 125), text(2 * TOKENS, 126)
    assert own.ask(*put(theirs, "PIN", 60_000)) == [1, 0]
    own.ask("KV.QUOTA", "s", "MAXBYTES", 2 * PAGE_BYTES)
    try:
        assert own.ask(*half(ours, 0)) == [0, 0]
        assert error_of(own.ask(*half(ours, 1), "PIN", 60_000)).startswith("KVQUOTA ")
        assert own.ask(*match(ours))[0] == TOKENS, "the page before it is stored"
    finally:
        own.ask("KV.QUOTA", "s", "MAXBYTES", 0)


def test_pages_put_together_pin_no_more_than_one_may(start_server: StartServer) -> None:
    with Raw(start_server(maxmemory="4mb", pinned_share_max=1).connect()) as raw:
        raw.ask("KV.SCHEMA", "SET", "s", *SHAPE)
        prompts = [text(TOKENS, 130 + number) for number in range(3)]
        for prompt in prompts:
            assert raw.ask(*half(prompt, 0), "PIN", 60_000) == [0, 0], "nothing is pinned yet"
        assert raw.ask(*half(prompts[0], 1)) == [1, 0]
        refused = error_of(raw.ask(*half(prompts[1], 1)))
        assert refused.startswith(f"KVPIN {PAGE_BYTES} bytes are pinned")
        assert raw.ask(*get(prompts[1])) == [TOKENS, *layers(prompts[1])], "it is stored unpinned"
        assert error_of(raw.ask(*half(text(TOKENS, 133), 0), "PIN", 60_000)).startswith("KVPIN ")


@pytest.mark.parametrize("nbytes", [1, 300 * 1024])
def test_a_match_brings_the_logits_of_a_full_hit_if_asked(nbytes: int, own: Raw) -> None:
    prompt, logits = text(2 * TOKENS + 5, 61), bytes([nbytes % 251]) * nbytes
    own.ask(*put(prompt, "LOGITS", logits))
    *found, got = own.ask(*match(prompt, "LOGITS", "SESSION", "talk"))
    assert (found[0], found[4], got) == (37, 1, logits)
    assert own.ask(*match(prompt)) == found, "five items as ever"
    longer = prompt.followed_by(text(3, 62))
    assert own.ask(*match(longer, "logits"))[4:] == [0, None]
    assert own.ask(*match(text(20, 63), "LOGITS")) == [0, 0, b"", 0, 0, None]
    assert "LOGITS" in error_of(own.ask(*match(prompt, "LOGITS", "LOGITS")))
    assert own.ask("DEL", key_of(prompt) + b".logits") == 1
    assert own.ask(*match(prompt, "LOGITS"))[4:] == [0, None]


@pytest.mark.anyio
async def test_a_match_does_not_wait_for_logits_in_a_file() -> None:
    prompt = text(2 * TOKENS, 64)
    async with chilled_server() as cold:
        wire = FakeWire(cold.server)
        wire.feed(request("KV.SCHEMA", "SET", "s", *SHAPE))
        wire.feed(request(*put(prompt, "LOGITS", b"warm")))
        await replies(wire, 2)
        await cold.chill()
        cold.tier.reads.shut()
        wire.feed(request(*match(prompt, "LOGITS")))
        ((tokens, _, letters, _, has_logits, logits),) = await replies(wire, 1)
        assert (tokens, letters, has_logits, logits) == (2 * TOKENS, b"nn", 1, None)
        cold.tier.reads.open()
        wire.feed(request("KV.GET", key_of(prompt) + b".logits"))
        assert await replies(wire, 1) == [b"warm"]
        wire.lose()


def key_of(prompt: Text, namespace: bytes = b"s") -> bytes:
    """Return the key of the page or tail that ends with a prompt."""
    made = Chain("blake3", b"", TOKENS).prompt(namespace, pack_tokens(prompt.tokens))
    return made.position_key(made.num_tokens)


def test_logits_of_a_rank_appear_with_the_page(own: Raw) -> None:
    prompt = text(TOKENS + 4, 114)
    own.ask(*half(prompt, 0), "LOGITS", b"x" * 1000)
    assert own.ask(*match(prompt))[4] == 0
    own.ask(*half(prompt, 1))
    assert own.ask(*get(prompt, "LOGITS"))[:2] == [20, b"x" * 1000]


def test_a_page_that_waits_for_the_rest_is_incomplete(own: Raw) -> None:
    prompt = text(TOKENS + 3, 139)
    assert own.ask(*half(prompt, 0)) == [0, 0]
    words = "KV.SEQ.EXPLAIN", "s", pack_tokens(prompt.tokens)
    reason, why, num_tokens = own.ask(*words)
    assert (reason, num_tokens) == (b"incomplete", 0)
    assert b"page 0" in why
    assert b"all its layers and heads" in why
    assert own.ask(*half(prompt.head(TOKENS), 1)) == [1, 0]
    reason, why, num_tokens = own.ask(*words)
    assert (reason, num_tokens) == (b"incomplete", TOKENS)
    assert own.ask(*half(prompt, 1)) == [1, 1]
    assert own.ask(*words)[0] == b"present"


def kept(client: Raw, key: bytes) -> dict[bytes, Any]:
    """Return what KV.INFO says of how a page is kept."""
    found = client.ask("KV.INFO", key)
    return dict(zip(found[::2], found[1::2], strict=True))


@pytest.mark.parametrize("portion", [[], ["HEADS", 0, 8], ["LAYERS", 0, 4]], ids=str)
def test_a_put_of_what_is_there_keeps_it_as_it_says(own: Raw, portion: list[Word]) -> None:
    prompt = text(TOKENS + 2, 140)
    keys = key_of(prompt.head(TOKENS)), key_of(prompt)
    assert own.ask(*put(prompt)) == [2, 0]
    words = "PX", 60_000, "PIN", 50_000, "PRIORITY", 7, "SESSION", "chat"
    assert own.ask(*put(prompt, *portion, *words)) == [0, 2]
    for info in (kept(own, key) for key in keys):
        assert info[b"priority"] == 7
        assert 0 < info[b"ttl_ms"] <= 60_000
        assert 0 < info[b"pinned_ms"] <= 50_000
    assert own.ask("KV.HINT", "s", "chat", "EXPECT", 1000)[0] == b"accepted"
    assert own.ask(*put(prompt, *portion, "PRIORITY", 1)) == [0, 2]
    assert [kept(own, key)[b"priority"] for key in keys] == [1, 1]
    assert kept(own, keys[0])[b"ttl_ms"] == -1, "without PX there is none, as for a new page"
    assert kept(own, keys[0])[b"pinned_ms"] > 0, "a put without PIN ends no pin"


@pytest.mark.parametrize("portion", [[], ["HEADS", 0, 8]], ids=str)
def test_a_tail_that_a_longer_page_has_loses_nothing_of_that(own: Raw, portion: list[Word]) -> None:
    whole = text(TOKENS, 141)
    assert own.ask(*put(whole, "PRIORITY", 5, "PX", 80_000)) == [1, 0]
    assert own.ask(*put(whole.head(7), *portion, "PRIORITY", 2, "PX", 10, "PIN", 50_000)) == [0, 1]
    info = kept(own, key_of(whole))
    assert (info[b"priority"], info[b"pinned_ms"] > 0) == (5, True)
    assert info[b"ttl_ms"] > 10


def test_a_rectangle_of_what_is_there_pins_no_more_than_one_may(start_server: StartServer) -> None:
    with Raw(start_server(maxmemory="4mb", pinned_share_max=1).connect()) as raw:
        raw.ask("KV.SCHEMA", "SET", "s", *SHAPE)
        first, second = text(TOKENS, 142), text(2 * TOKENS, 143)
        assert raw.ask(*put(first, "PIN", 60_000)) == [1, 0]
        assert raw.ask(*put(second)) == [2, 0]
        assert error_of(raw.ask(*half(second, 0), "PIN", 60_000)).startswith("KVPIN ")
        assert kept(raw, key_of(second))[b"pinned_ms"] == 0
        assert raw.ask(*half(first, 0), "PIN", 60_000) == [0, 1], "its own pin counts once"


@pytest.mark.anyio
@pytest.mark.parametrize("portion", [[], ["HEADS", 0, 8]], ids=str)
async def test_a_put_of_what_is_there_waits_until_it_is_written(portion: list[Word]) -> None:
    prompt = text(2 * TOKENS, 144)
    async with chilled_server(durability="memory") as cold:
        cold.tier.writes.shut()
        wire = FakeWire(cold.server)
        wire.feed(request("KV.SCHEMA", "SET", "s", *SHAPE))
        wire.feed(request(*put(prompt)))
        await replies(wire, 2)
        wire.feed(request(*put(prompt, *portion, "WRITTEN")))
        assert await replies(wire, 0) == []
        cold.tier.writes.open()
        assert await replies(wire, 1) == [[0, 2]]
        wire.lose()


# -- pages in files ---------------------------------------------------------------------------


def cold_server(start_server: StartServer, folder: Path, **settings: object) -> ServerProcess:
    """Return a server whose memory holds 16 MiB, a quarter of what its files do."""
    return start_server(
        maxmemory="16mb", promote="never", nvme_path=folder, nvme_bytes="256mb", **settings
    )


def test_pages_in_files_are_loaded_for_a_get(start_server: StartServer, tmp_path: Path) -> None:
    server = cold_server(start_server, tmp_path, reserve_timeout=120_000)
    prompts = [wide(20 * TOKENS + 5, 120 + each) for each in range(6)]
    with Raw(server.connect()) as raw:
        raw.ask("KV.SCHEMA", "SET", "w", *WIDE)
        for prompt in prompts:
            assert raw.ask(*put(prompt, "WRITTEN", namespace="w")) == [21, 0]
        found = raw.ask(*match(prompts[0], namespace="w"))
        assert found[0] == 325
        assert b"n" in found[2]
        for prompt in prompts:
            assert raw.ask(*get(prompt, namespace="w")) == [325, *layers(prompt)]
            got = raw.ask(*get(prompt, "FROM", 100, "HEADS", 1, 2, namespace="w"))
            assert got[1:] == [each.tobytes() for each in prompt.part((0, 4), (1, 2), 100)]
        requests = [get(prompt, namespace="w") for prompt in prompts]
        for prompt, got in zip(prompts, raw.ask_all(requests), strict=True):
            assert got == [325, *layers(prompt)]
        wait_for(server, "kv_sending", 0)


def test_more_than_memory_holds_is_refused_and_parts_of_it_are_not(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = cold_server(start_server, tmp_path)
    prompt = wide(100 * TOKENS, 130)
    with Raw(server.connect()) as raw:
        raw.ask("KV.SCHEMA", "SET", "w", *WIDE)
        for start in range(0, 1600, 160):
            words = put(prompt.head(start + 160), "WRITTEN", namespace="w", first=start)
            assert raw.ask(*words) == [10, 0]
        assert raw.ask(*match(prompt, namespace="w"))[0] == 1600
        error = error_of(raw.ask(*get(prompt, namespace="w")))
        assert error.startswith("OOM")
        assert "FROM" in error
        for start in range(0, 1600, 400):
            head = prompt.head(start + 400)
            got = raw.ask(*get(head, "FROM", start, namespace="w"))
            assert got == [start + 400, *layers(head, start)]


def test_after_the_deadline_the_prefix_that_is_there_is_answered(
    start_server: StartServer, tmp_path: Path
) -> None:
    server = cold_server(start_server, tmp_path)
    prompt = wide(30 * TOKENS, 131)
    with Raw(server.connect()) as raw:
        raw.ask("KV.SCHEMA", "SET", "w", *WIDE)
        raw.ask(*put(prompt, "WRITTEN", namespace="w"))
        for seed in range(3):
            raw.ask(*put(wide(30 * TOKENS, 140 + seed), "WRITTEN", namespace="w"))
        got = raw.ask(*get(prompt, "DEADLINE", 0, namespace="w"))
        assert got[0] % TOKENS == 0
        assert got[1:] == layers(prompt.head(got[0]))
        assert raw.ask(*get(prompt, "DEADLINE", 60_000, namespace="w")) == [480, *layers(prompt)]


def test_many_clients_get_cold_prompts_at_once(start_server: StartServer, tmp_path: Path) -> None:
    server = cold_server(start_server, tmp_path, reserve_timeout=120_000)
    prompts = [wide(10 * TOKENS + each, 150 + each) for each in range(12)]
    with ExitStack() as stack:
        raw = stack.enter_context(Raw(server.connect()))
        raw.ask("KV.SCHEMA", "SET", "w", *WIDE)
        for prompt in prompts:
            raw.ask(*put(prompt, "WRITTEN", namespace="w"))
        clients = [stack.enter_context(Raw(server.connect())) for _ in prompts]
        for client, prompt in zip(clients, prompts, strict=True):
            client.socket.sendall(pipeline([get(prompt, namespace="w")] * 2))
        for client, prompt in zip(clients, prompts, strict=True):
            for _ in range(2):
                assert parsed(client.next_raw()) == [len(prompt.tokens), *layers(prompt)]
        clients[0].socket.sendall(pipeline([get(each, namespace="w") for each in prompts]))
        clients[0].close()
        wait_for(server, "kv_sending", 0)
        wait_for(server, "kv_landings", 0)
