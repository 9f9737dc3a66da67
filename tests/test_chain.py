"""Chains: ids, what is mixed into them, and what of a page can be compared."""

import hashlib
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import pairwise

import cbor2
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from respkv.chain import (
    ALGORITHMS,
    NO_EXTRAS,
    TOKEN_MAX,
    Chain,
    Extras,
    Media,
    check_tokens,
    common_tokens,
    pack_tokens,
    page_ids,
    tokens_of,
)
from respkv.page import page_key

SEED = b"vllm-none-hash"
TOKENS = (0, 23, 24, 255, 256, 65535, 65536, 128_000, TOKEN_MAX, 7)
EXTRAS = {
    "plain": NO_EXTRAS,
    "salted": Extras(salt=b"pepper"),
    "tenant": Extras(tenant=b"acme"),
    "lora": Extras(lora=b"sql", lora_path=b"/adapters/sql"),
    "media": Extras(media=(Media(1, 4, b"cat"), Media(5, 2, b"dog"))),
    "all": Extras(b"pepper", b"acme", b"sql", b"", (Media(3, 1, b"cat"),)),
}
# The first 8 bytes of the ids of TOKENS in pages of four under SEED, and of all ten tokens.
VECTORS = {
    ("blake3", "plain"): ["e8e933d66a78b05b", "9fe33b4099eb86c9", "10f447f2e03fa812"],
    ("blake3", "salted"): ["c325c49bba1ebfc8", "3955a99dae37e477", "0e2fa508a4aa05a5"],
    ("blake3", "tenant"): ["068906a262d93fd8", "e642a41d6f099dfe", "bbad7dc765ce9d97"],
    ("blake3", "lora"): ["7995bf138723f04a", "47758c01da4cc890", "d55810eb22555c7f"],
    ("blake3", "media"): ["2cc54d4f11784b99", "b854a38e6e857430", "3bd24f700b1e32ae"],
    ("blake3", "all"): ["2523c3572bc4b02e", "1a42e13605cb6fb1", "fa031780f83804be"],
    ("sha256", "plain"): ["a6c4382a36d05533", "3de555ee7c21c1b2", "a83c1d070bc2346a"],
    ("sha256", "salted"): ["c7617479388317f9", "0980eb24bd454a27", "2f02d45ab37665b2"],
    ("sha256", "tenant"): ["06e01a52d032cfe0", "9da091ba90f7474c", "cb6d35bde6ba7bbc"],
    ("sha256", "lora"): ["66ba0fe41c153ca1", "6982bedc3ddda8ed", "a9f73ff50702adfa"],
    ("sha256", "media"): ["8bf233d76aec2fee", "a0e89eda244eca61", "636fc4474135860d"],
    ("sha256", "all"): ["5c55027fa03bd9b1", "1f8096e6db2b47ba", "91b3c651590c7054"],
    ("sha256_cbor", "plain"): ["dc7fbfd287fac7b6", "bef2f648334b792d", "79dfd2f7162cc396"],
    ("sha256_cbor", "salted"): ["696590c839ccff61", "1681c494f07eda51", "0c8a4d1e3b83ae05"],
    ("sha256_cbor", "tenant"): ["242ed2d6d1ae2bbb", "88706e670280de49", "479708ba5f80b394"],
    ("sha256_cbor", "lora"): ["71dcb0ac400c1767", "eca7c7c5a85ddcee", "6ea054503635dde3"],
    ("sha256_cbor", "media"): ["d3f888831c3ef179", "717a13a1e99e06b0", "1ace26f273aac435"],
    ("sha256_cbor", "all"): ["4ba80873dd5828f6", "ffb78284a3312892", "b32a7e669b656717"],
}
prompts = st.lists(st.integers(0, 3), max_size=24)
algorithms = pytest.mark.parametrize("algorithm", ALGORITHMS)


def ids(
    tokens: list[int] | tuple[int, ...],
    extras: Extras = NO_EXTRAS,
    *,
    algorithm: str = "blake3",
    seed: bytes = b"",
    page_tokens: int = 4,
) -> list[bytes]:
    return Chain(algorithm, seed, page_tokens).ids(pack_tokens(tokens), extras)


@pytest.mark.parametrize(("algorithm", "name"), VECTORS, ids="-".join)
def test_ids_never_change(algorithm: str, name: str) -> None:
    prompt = Chain(algorithm, SEED, 4).prompt(b"ns", pack_tokens(TOKENS), EXTRAS[name])
    made = [prompt.id(0), prompt.id(1), prompt.position_id(10)]
    assert [each[:8].hex() for each in made] == VECTORS[algorithm, name]


@pytest.mark.parametrize(
    ("algorithm", "function"), [("blake3", blake3), ("sha256", hashlib.sha256)]
)
def test_an_id_is_the_hash_of_the_id_before_and_of_the_tokens(
    algorithm: str, function: type
) -> None:
    start = function(b"respkv chain 1 %b 2 seed" % algorithm.encode()).digest()
    first = function(start + pack_tokens([1, 2])).digest()
    second = function(first + pack_tokens([3, TOKEN_MAX])).digest()
    made = ids([1, 2, 3, TOKEN_MAX, 5], algorithm=algorithm, seed=b"seed", page_tokens=2)
    assert made == [first, second]


def vllm_hash(value: object) -> bytes:
    return hashlib.sha256(cbor2.dumps(value, canonical=True)).digest()


def test_ids_of_sha256_cbor_are_those_of_vllm() -> None:
    none = vllm_hash("vllm-none-hash")
    first = vllm_hash((none, TOKENS[:4], None))
    second = vllm_hash((first, TOKENS[4:8], None))
    assert ids(TOKENS, algorithm="sha256_cbor", seed=SEED) == [first, second]


def test_extra_keys_of_sha256_cbor_are_those_of_vllm_in_its_order() -> None:
    extras = Extras(b"pepper", b"", b"sql", b"/sql", (Media(3, 2, b"cat"), Media(6, 1, b"dog")))
    none, lora = vllm_hash("vllm-none-hash"), ("lora", "sql", "/sql")
    first_keys = (lora, ("mm", "cat", 3), ("cache_salt", "pepper"))
    second_keys = (lora, ("mm", "cat", -1), ("mm", "dog", 2))
    first = vllm_hash((none, TOKENS[:4], first_keys))
    second = vllm_hash((first, TOKENS[4:8], second_keys))
    assert ids(TOKENS, extras, algorithm="sha256_cbor", seed=SEED) == [first, second]


def test_a_name_that_vllm_cannot_have_is_refused() -> None:
    for extras in (Extras(salt=b"\xff"), Extras(media=(Media(0, 1, b"\xff"),))):
        with pytest.raises(ValueError, match=r"has to be UTF-8, not b'\\xff'"):
            ids(TOKENS, extras, algorithm="sha256_cbor")
        assert ids(TOKENS, extras)
    with pytest.raises(ValueError, match="seed has to be UTF-8"):
        Chain("sha256_cbor", b"\xff", 4)


@algorithms
@given(one=prompts, other=prompts)
def test_ids_are_equal_exactly_as_far_as_the_prompts_are(
    algorithm: str, one: list[int], other: list[int]
) -> None:
    pairs = zip(
        ids(one, algorithm=algorithm, page_tokens=3),
        ids(other, algorithm=algorithm, page_tokens=3),
        strict=False,
    )
    for number, (mine, theirs) in enumerate(pairs, start=1):
        assert (mine == theirs) == (one[: 3 * number] == other[: 3 * number])


@algorithms
@pytest.mark.parametrize("name", EXTRAS)
def test_ids_do_not_depend_on_how_they_are_asked_for(algorithm: str, name: str) -> None:
    chain, tokens = Chain(algorithm, SEED, 2), pack_tokens([*TOKENS, *TOKENS])
    whole = chain.ids(tokens, EXTRAS[name])
    prompt = chain.prompt(b"ns", tokens, EXTRAS[name])
    assert [prompt.id(at) for at in range(10)] == whole
    prompt = chain.prompt(b"ns", tokens, EXTRAS[name])
    assert prompt.keys(0, 3) + prompt.keys(3, 3) + prompt.keys(3, 10) == [
        page_key(b"ns", each) for each in whole
    ]
    assert [prompt.position_id(2 * number) for number in range(1, 11)] == whole
    # The first tokens of a page have the id that a prompt of just them would have.
    short = chain.prompt(b"ns", tokens[: 4 * 7], EXTRAS[name])
    assert short.position_id(7) == prompt.position_id(7)
    assert short.position_key(7) == page_key("ns", prompt.position_id(7))
    assert prompt.parent_key(0) == b""
    assert prompt.parent_key(3) == prompt.key(2)


def test_threads_that_ask_together_get_the_id_of_each_page_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chain = Chain("sha256", b"", 2)
    expected = chain.ids(pack_tokens(range(16)))
    meeting = threading.Barrier(4)

    def hash_together(data: bytes) -> "hashlib._Hash":
        with suppress(threading.BrokenBarrierError):
            meeting.wait(1)
        return hashlib.sha256(data)

    monkeypatch.setattr(chain.scheme, "_hash", hash_together)
    prompt = chain.prompt(b"", pack_tokens(range(16)))
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: list(prompt.ids(8)), range(4)))
    assert found == [expected] * 4
    assert prompt.ids(8) == expected


@algorithms
def test_whatever_is_mixed_in_separates(algorithm: str) -> None:
    variants = [
        NO_EXTRAS,
        Extras(salt=b"a"),
        Extras(tenant=b"a"),
        Extras(lora=b"a"),
        Extras(lora=b"a", lora_path=b"b"),
        Extras(lora=b"ab"),
        Extras(salt=b"a", tenant=b"b"),
        Extras(salt=b"ab"),
        Extras(salt=b"b", tenant=b"a"),
        Extras(media=(Media(0, 1, b"a"),)),
        Extras(media=(Media(1, 1, b"a"),)),
        Extras(media=(Media(0, 1, b"a"), Media(1, 1, b"a"))),
    ]
    found = [ids([1, 2, 3, 4, 5, 6, 7, 8], each, algorithm=algorithm) for each in variants]
    for page in range(2):
        assert len({each[page] for each in found}) == len(variants)
    seeds = [ids([1, 2, 3, 4], algorithm=algorithm, seed=seed)[0] for seed in (b"", b"a", b"b")]
    assert len(set(seeds)) == 3


def test_the_algorithms_have_no_id_in_common() -> None:
    assert len({ids([1, 2, 3, 4], algorithm=each)[0] for each in ALGORITHMS}) == len(ALGORITHMS)


@algorithms
def test_a_medium_changes_only_the_pages_that_it_reaches_and_those_behind(algorithm: str) -> None:
    tokens = list(range(16))
    plain = ids(tokens, algorithm=algorithm)
    shown = ids(tokens, Extras(media=(Media(5, 2, b"cat"),)), algorithm=algorithm)
    assert shown[0] == plain[0]
    assert set(shown[1:]).isdisjoint(plain)
    other = ids(tokens, Extras(media=(Media(5, 2, b"dog"),)), algorithm=algorithm)
    assert other[0] == plain[0]
    assert set(other[1:]).isdisjoint(shown)


def test_media_that_overlap_a_range_are_found() -> None:
    extras = Extras(media=tuple(Media(first, 2, b"x") for first in (0, 2, 5, 9)))
    for first in range(12):
        for stop in range(first + 1, 13):
            expected = [
                each
                for each in extras.media
                if each.first < stop and each.first + each.count > first
            ]
            assert list(extras.overlapping(first, stop)) == expected


# -- comparing ------------------------------------------------------------------------------------


def test_a_branch_is_the_parent_and_the_extras_that_all_of_the_page_has() -> None:
    chain = Chain("blake3", b"", 2)

    def branch(
        tokens: list[int], index: int, extras: Extras = NO_EXTRAS, tag: bytes = b""
    ) -> bytes:
        return chain.prompt(b"ns", pack_tokens(tokens), extras, tag).branch(index)

    assert branch([1, 2, 3, 4], 1) == branch([1, 2, 9], 1)
    assert branch([1, 2, 3, 4], 1) != branch([1, 9, 3, 4], 1)
    assert branch([1, 2], 0) != branch([1, 2], 0, Extras(salt=b"a"))
    assert branch([1, 2], 0) != branch([1, 2], 0, Extras(lora=b"a"))
    assert branch([1, 2], 0) == branch([1, 2], 0, Extras(media=(Media(1, 1, b"cat"),)))
    assert branch([1, 2], 0, tag=b"12345678") == b"12345678" + branch([1, 2], 0)
    assert len(branch([1, 2], 0)) == 16


def naive_common(one: list[object], other: list[object]) -> int:
    count = 0
    for mine, theirs in zip(one, other, strict=False):
        if mine != theirs:
            break
        count += 1
    return count


@given(prompts, prompts)
def test_common_tokens_are_counted_to_the_token(one: list[int], other: list[int]) -> None:
    expected = naive_common([*one], [*other])
    assert common_tokens(pack_tokens(one), pack_tokens(other)) == expected


big = st.lists(st.sampled_from([0, 1, 255, 256, 65536, 1 << 24, TOKEN_MAX]), max_size=9)


@st.composite
def shown_pages(draw: st.DrawFn) -> tuple[list[int], tuple[Media, ...]]:
    tokens = draw(big)
    media, at = [], 0
    while at < len(tokens):
        count = draw(st.integers(1, 3))
        if draw(st.booleans()):
            media.append(Media(at, count, draw(st.sampled_from([b"cat", b"dog"]))))
        at += count
    return tokens, tuple(media)


def described(tokens: list[int], media: tuple[Media, ...]) -> list[object]:
    """Each token with the media that begin at it."""
    return [
        (token, [each for each in media if each.first == at]) for at, token in enumerate(tokens)
    ]


@given(shown_pages(), shown_pages())
def test_tokens_are_common_only_as_far_as_the_media_are(
    one: tuple[list[int], tuple[Media, ...]], other: tuple[list[int], tuple[Media, ...]]
) -> None:
    chain = Chain("blake3", b"", 16)

    def token_ids(tokens: list[int], media: tuple[Media, ...]) -> bytes:
        return chain.prompt(b"ns", pack_tokens(tokens), Extras(media=media)).token_ids(0)

    expected = naive_common(described(*one), described(*other))
    assert common_tokens(token_ids(*one), token_ids(*other)) == expected
    assert tokens_of(token_ids(*one)) == pack_tokens(one[0])


def test_a_medium_that_began_in_an_earlier_page_is_marked_in_the_next_one() -> None:
    chain = Chain("blake3", b"", 2)
    tokens = pack_tokens([1, 2, 3, 4])
    pages = [
        chain.prompt(b"ns", tokens, Extras(media=(Media(1, 2, digest),))).token_ids(1)
        for digest in (b"cat", b"dog")
    ]
    assert common_tokens(*pages) == 0
    assert [tokens_of(page) for page in pages] == [tokens[8:]] * 2


def test_too_many_media_in_a_page_are_refused() -> None:
    media = tuple(Media(at, 1, b"x") for at in range(129))
    prompt = Chain("blake3", b"", 256).prompt(b"ns", pack_tokens(range(200)), Extras(media=media))
    with pytest.raises(ValueError, match="at most 128 media, not 129"):
        prompt.token_ids(0)


# -- what is refused ------------------------------------------------------------------------------


def test_a_last_partial_page_has_no_id() -> None:
    assert page_ids([], page_tokens=4) == []
    assert page_ids([1, 2, 3], page_tokens=4) == []
    assert len(page_ids(range(9), page_tokens=4)) == 2
    prompt = Chain("blake3", b"", 4).prompt(b"", pack_tokens(range(9)))
    assert (prompt.num_tokens, prompt.num_pages, prompt.tail_tokens) == (9, 2, 1)


def test_page_ids_are_those_of_a_chain() -> None:
    assert page_ids([1, 2, 3], page_tokens=2, seed=b"s") == ids([1, 2], seed=b"s", page_tokens=2)
    salted = page_ids([1, 2], page_tokens=2, salt=b"x", algorithm="sha256")
    assert salted == ids([1, 2], Extras(salt=b"x"), algorithm="sha256", page_tokens=2)


@pytest.mark.parametrize("token", [-1, TOKEN_MAX + 1, 1.5, None])
def test_a_token_that_no_vocabulary_has_is_named(token: int) -> None:
    with pytest.raises(ValueError, match=f"a token id is 0 to 2147483647, not {token}"):
        page_ids([1, token], page_tokens=1)


def test_bytes_that_are_no_tokens_are_named() -> None:
    with pytest.raises(ValueError, match="7 bytes are no multiple"):
        check_tokens(bytes(7))
    with pytest.raises(ValueError, match=r"not -5 \(at position 2\)"):
        check_tokens(pack_tokens([1, 2]) + (-5).to_bytes(4, "little", signed=True))
    check_tokens(b"")


BAD = [
    (lambda: Chain("md5", b"", 4), "one of blake3, sha256, sha256_cbor, not with 'md5'"),
    (lambda: Chain("blake3", b"", 0), "at least 1, not 0"),
    (lambda: Media(-1, 1, b"x"), "at least one token of the prompt, not for 1 from -1"),
    (lambda: Media(0, 0, b"x"), "not for 0 from 0"),
    (lambda: Media(0, 1, b""), "1 to 1024 bytes, not 0"),
    (lambda: Extras(salt=b"x" * 1025), "salt has at most 1024 bytes, not 1025"),
    (lambda: Extras(lora_path=b"x"), "needs a LoRA name"),
    (
        lambda: Extras(media=(Media(0, 3, b"x"), Media(2, 1, b"y"))),
        "the medium at token 2 begins before",
    ),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_what_cannot_be_chained_is_named(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()


def test_media_stand_in_order() -> None:
    media = [Media(0, 2, b"a"), Media(2, 3, b"b"), Media(9, 1, b"c")]
    assert Extras(media=tuple(media)).media == tuple(media)
    for one, other in pairwise(media):
        with pytest.raises(ValueError, match="begins before"):
            Extras(media=(other, one))
