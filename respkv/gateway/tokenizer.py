"""Text to tokens and back, with the tokenizer of a checkpoint.

Most tokenizers are ones of the `tokenizers` library, which threads may share; they are asked
directly, because transformers' face sets truncation and padding on the shared object with each call.
Others are guarded by a lock.
"""

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from respkv.gateway.failures import Refused

Message = dict[str, str]  # role, content, perhaps name

# Where a checkpoint has no template: a transcript, which ends when the user's turn would begin.
_PLAIN = {"system": "System", "user": "User", "assistant": "Assistant"}
PLAIN_STOP = "\nUser:"
# A text of more characters a token is looked at in pieces, in case it is far too long.
USUAL_CHARS = 8
PIECE_CHARS = 1 << 14
# A template is a program that came with the checkpoint, and messages are what it runs on: whatever
# an expression of it can raise, such as KeyError, ZeroDivisionError or RecursionError.
_TEMPLATE_ERRORS = (
    *(TemplateError, ArithmeticError, AssertionError, AttributeError, LookupError),
    *(NameError, RuntimeError, TypeError, ValueError),
)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint. Raises OSError or ValueError when there is none."""
    # Without its configuration transformers would guess the class from the model's, and change
    # what tokenizer.json says.
    if (folder / "tokenizer.json").exists() and not (folder / "tokenizer_config.json").exists():
        made: PreTrainedTokenizerBase = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
            tokenizer_file=str(folder / "tokenizer.json")
        )
        template = folder / "chat_template.jinja"
        if template.exists():
            made.chat_template = template.read_text(encoding="utf-8")
        return made
    found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(folder))
    return found


class TextCoder:
    """A tokenizer as the gateway uses it; any thread may call anything."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        self._fast: Any = getattr(tokenizer, "backend_tokenizer", None)
        self._lock = threading.Lock()
        if self._fast is not None:
            self._fast.no_truncation()
            self._fast.no_padding()

    @property
    def has_template(self) -> bool:
        """Whether the checkpoint says what a conversation looks like."""
        return bool(self.tokenizer.chat_template)

    @property
    def stop_tokens(self) -> frozenset[int]:
        """The token that ends a text, if the tokenizer knows one."""
        end = self.tokenizer.eos_token_id
        return frozenset([end] if isinstance(end, int) else [])

    def encode(self, text: str, *, specials: bool = True, most: int | None = None) -> list[int]:
        """Return a text's tokens. specials: with what the model wants in front, such as BOS.

        Raises Refused when they are more than twice as many as ``most``, without counting them all:
        that would take seconds for megabytes.
        """
        if most is not None and len(text) > most * USUAL_CHARS and self._is_long(text, most):
            message = f"the prompt has far more tokens than the {most} allowed"
            raise Refused(400, "context_length_exceeded", message)
        if self._fast is not None:
            return list(self._fast.encode(text, add_special_tokens=specials).ids)
        with self._lock:
            return list(self.tokenizer.encode(text, add_special_tokens=specials))

    def _is_long(self, text: str, most: int) -> bool:
        """Whether a text has more than twice as many tokens as ``most``.

        It is cut in pieces, which have a token or two more than the whole where they were cut.
        """
        count = 0
        for at in range(0, len(text), PIECE_CHARS):
            count += len(self.encode(text[at : at + PIECE_CHARS], specials=False))
            if count > 2 * most:
                return True
        return False

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of tokens, without special ones; U+FFFD where bytes are no character."""
        if self._fast is not None:
            return str(self._fast.decode(list(tokens), skip_special_tokens=True))
        with self._lock:
            return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def encode_chat(self, messages: Sequence[Message], *, most: int | None = None) -> list[int]:
        """Return the tokens of a conversation, up to where the assistant's turn begins.

        Raises Refused when the checkpoint's template does not take it, and as ``encode``.
        """
        if not self.has_template:
            return self.encode(plain_chat(messages), most=most)
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages], tokenize=False, add_generation_prompt=True
            )
        except _TEMPLATE_ERRORS as error:
            reason = f"{type(error).__name__}: {error}"[:200]
            raise Refused(
                400, "chat_template", f"the model's chat template refuses this: {reason}"
            ) from error
        return self.encode(str(text), specials=False, most=most)


def plain_chat(messages: Sequence[Message]) -> str:
    """Write a conversation as a transcript."""
    turns = [f"{_PLAIN[message['role']]}: {message['content']}\n" for message in messages]
    return "".join(turns) + "Assistant:"
