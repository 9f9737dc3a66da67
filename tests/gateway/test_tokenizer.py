"""Text to tokens and back, and conversations."""

from pathlib import Path

import pytest

from respkv.gateway.failures import Refused
from respkv.gateway.tokenizer import TextCoder, load_tokenizer, plain_chat

TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "<{{ message.role }}>{{ message.content }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def with_template(checkpoint: Path) -> TextCoder:
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.chat_template = TEMPLATE
    return TextCoder(tokenizer)


@pytest.mark.parametrize("text", ["a", "wörld € \U0001f600\n\t", "  two  spaces ", "\0", "<s>"])
def test_text_comes_back_as_it_was(coder: TextCoder, text: str) -> None:
    assert coder.decode(coder.encode(text)) == text


def test_a_chat_is_written_as_the_checkpoint_says(with_template: TextCoder) -> None:
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "So"}]
    tokens = with_template.encode_chat(messages)
    assert with_template.decode(tokens) == "<user>Hi<assistant>So<assistant>"


def test_what_the_template_refuses_is_the_clients_error(with_template: TextCoder) -> None:
    with pytest.raises(Refused, match="no system here") as caught:
        with_template.encode_chat([{"role": "system", "content": "x"}])
    assert caught.value.status == 400


@pytest.mark.parametrize(
    ("template", "word"),
    [
        ("{{ messages[0].content / 2 }}", "TypeError"),
        ("{{ 1 / (messages | length - 1) }}", "ZeroDivisionError"),
        ("{{ messages[0].content.encode('ascii') }}", "UnicodeEncodeError"),
        ("{{ messages[7].content }}", "UndefinedError"),
        ("{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}", "RecursionError"),
        ("{{ messages[0].content.index('no such') }}", "ValueError"),
        ("{% for message in messages", "TemplateSyntaxError"),
    ],
)
def test_whatever_a_template_raises_is_told_with_its_cause(
    checkpoint: Path, template: str, word: str
) -> None:
    tokenizer = load_tokenizer(checkpoint)
    tokenizer.chat_template = template
    with pytest.raises(Refused, match=word) as caught:
        TextCoder(tokenizer).encode_chat([{"role": "user", "content": "w\u00f6rld"}])
    assert (caught.value.status, caught.value.code) == (400, "chat_template")


def test_a_chat_without_a_template_is_a_transcript(coder: TextCoder) -> None:
    roles = ("system", "user", "assistant", "user")
    messages = [{"role": role, "content": f"{at}"} for at, role in enumerate(roles)]
    expected = "System: 0\nUser: 1\nAssistant: 2\nUser: 3\nAssistant:"
    assert plain_chat(messages) == expected
    assert coder.decode(coder.encode_chat(messages)) == expected
    assert not coder.has_template


def test_a_text_that_is_far_too_long_is_not_tokenized_to_its_end(coder: TextCoder) -> None:
    # Counted by the bytes that are left when it is refused: none but those of a few pieces are read.
    seen: list[int] = []

    class Noted(TextCoder):
        def encode(self, text: str, *, specials: bool = True, most: int | None = None) -> list[int]:
            seen.append(len(text))
            return super().encode(text, specials=specials, most=most)

    noted = Noted(coder.tokenizer)
    long = "one two " * 200_000
    with pytest.raises(Refused, match="far more tokens than the 1000 allowed"):
        noted.encode(long, most=1000)
    assert sum(seen[1:]) < len(long) / 50
    with pytest.raises(Refused, match="far more tokens"):
        noted.encode_chat([{"role": "user", "content": long}], most=1000)
    assert len(noted.encode("one two " * 1000, most=1000)) > 1000  # told with its length, elsewhere


def test_a_folder_without_a_tokenizer_is_an_error(tmp_path: Path) -> None:
    with pytest.raises((OSError, ValueError)):
        load_tokenizer(tmp_path)
