"""Tokens become text piece by piece, and what is joined is the text of all of them."""

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models

from examples.checkpoint import make_tokenizer
from respkv.gateway.text import Detokenizer, StopStrings

# Byte by byte: every string has tokens, and any tokens in any order are bytes.
BYTE_LEVEL = make_tokenizer("some words, and some more words: not many of them")
# As SentencePiece: words bring their space, but for the first of a text.
WORDS = ["▁one", "▁two", "three", "▁", *(f"<0x{byte:02X}>" for byte in range(256))]
METASPACE = Tokenizer(models.BPE(vocab={word: at for at, word in enumerate(WORDS)}, merges=[]))
METASPACE.decoder = decoders.Sequence(
    [
        decoders.Replace("▁", " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
)


def decode(tokens: Sequence[int]) -> str:
    return str(BYTE_LEVEL.decode(list(tokens)))


def decode_words(tokens: Sequence[int]) -> str:
    return str(METASPACE.decode(list(tokens)))


def pieces_of(tokens: Sequence[int], context: Sequence[int] = ()) -> list[str]:
    detokenizer = Detokenizer(decode, context)
    return [*(detokenizer.push(token) for token in tokens), detokenizer.finish()]


@given(text=st.text(max_size=60))
def test_pieces_of_a_text_join_to_it_and_are_whole_characters(text: str) -> None:
    pieces = pieces_of(BYTE_LEVEL.encode(text).ids)
    assert "".join(pieces) == text
    assert "\ufffd" in text or not any("\ufffd" in piece for piece in pieces)


@given(tokens=st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=80))
def test_pieces_of_any_tokens_join_to_what_all_of_them_decode_to(tokens: list[int]) -> None:
    assert "".join(pieces_of(tokens)) == decode(tokens)


def test_a_piece_is_sent_as_soon_as_its_character_is_whole() -> None:
    assert pieces_of(BYTE_LEVEL.encode("a€b").ids) == ["a", "", "", "€", "b", ""]


def test_the_context_in_front_is_no_part_of_the_text() -> None:
    front, back = BYTE_LEVEL.encode("in front ").ids, BYTE_LEVEL.encode("€ behind").ids
    assert "".join(pieces_of(back, front)) == "€ behind"


def test_a_long_noise_is_decoded_in_short_windows() -> None:
    lengths: list[int] = []

    def noted(tokens: Sequence[int]) -> str:
        lengths.append(len(tokens))
        return decode(tokens)

    half = BYTE_LEVEL.encode("€").ids[1]  # a byte that begins nothing
    detokenizer = Detokenizer(noted)
    pieces = [detokenizer.push(half) for _ in range(500)]
    assert "".join([*pieces, detokenizer.finish()]) == "\ufffd" * 500
    assert max(lengths) < 80


def test_words_keep_their_spaces_but_for_the_first_of_a_text() -> None:
    one, two, three = (WORDS.index(word) for word in ("▁one", "▁two", "three"))
    for context, expected in (([], ["one", " two", "three"]), ([two], [" one", " two", "three"])):
        detokenizer = Detokenizer(decode_words, context)
        assert [detokenizer.push(token) for token in (one, two, three)] == expected


def test_bytes_among_words_become_one_character() -> None:
    detokenizer = Detokenizer(decode_words)
    tokens = [WORDS.index("▁one"), *(WORDS.index(f"<0x{byte:02X}>") for byte in "€".encode())]
    assert [detokenizer.push(token) for token in tokens] == ["one", "", "", "€"]


@pytest.mark.parametrize(
    ("stops", "pieces", "shown"),
    [
        (["END"], ["one E", "ND two"], "one "),
        (["END"], ["E", "E", "N", "N"], "EENN"),
        (["END", "two"], ["one two E", "ND"], "one "),
        (["wo", "two"], ["one t", "wo"], "one "),
        (["\n\n"], ["a\n", "b\n", "\nc"], "a\nb"),
        (["aab"], ["aaa", "ab"], "aa"),
        ([], ["END"], "END"),
    ],
)
def test_text_is_shown_up_to_the_first_stop_string(
    stops: list[str], pieces: list[str], shown: str
) -> None:
    finder = StopStrings(stops)
    text = "".join(finder.push(piece) for piece in pieces)
    assert text + finder.finish() == shown


@given(
    text=st.text("ab", max_size=30),
    stops=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 30), max_size=6),
)
def test_stop_strings_are_found_however_the_text_is_cut(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    finder = StopStrings(stops)
    edges = [0, *sorted(cuts), len(text)]
    shown = "".join(finder.push(text[a:b]) for a, b in itertools.pairwise(edges))
    shown += finder.finish()
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    assert finder.is_found == bool(found)
    # Pieces may show a stop string's end before another that began earlier is whole: never more
    # than what stands before the first one that is whole.
    assert text.startswith(shown)
    assert not any(stop in shown for stop in stops)
    assert found or shown == text
