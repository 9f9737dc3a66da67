"""Prompts of late, so that what is named again is not hashed again.

A prompt is named several times: it is matched, then loaded or put, and the next turn of its conversation
begins with it. Its ids follow from the chain, the extras and the tokens, and nothing else. So a prompt
is known again by all of that and not by a digest of it, and one that begins as a known one does takes over
the ids of the pages that both have.
"""

from collections import OrderedDict
from typing import TypeAlias

from respkv.chain import NO_EXTRAS, TOKEN_BYTES, Chain, Extras, Prompt

ID_BYTES = 80  # of an id and its place in a list
PROMPT_BYTES = 1024  # of a prompt without its tokens, and of what finds it
MEDIUM_BYTES = 200  # of a medium without its digest

_Key: TypeAlias = tuple[Chain, bytes, bytes, Extras, bytes]


class RecentPrompts:
    """The prompts that were named last. One thread at a time may call it.

    bytes_max: of their tokens and ids; those named longest ago go when there are more. A prompt that
               would take more than half of it is not kept.
    num_bytes: of those that are kept.
    """

    def __init__(self, bytes_max: int) -> None:
        self.bytes_max = bytes_max
        self.num_bytes = 0
        self._prompts: OrderedDict[_Key, Prompt] = OrderedDict()
        # By its first page, the one named last of those that begin with it.
        self._beginnings: dict[_Key, Prompt] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    def prompt(
        self,
        chain: Chain,
        namespace: bytes,
        tokens: bytes,
        extras: Extras = NO_EXTRAS,
        tag: bytes = b"",
    ) -> Prompt:
        """Return a prompt as ``Chain.prompt`` does, with the ids that are known already."""
        key = chain, namespace, tag, extras, tokens
        found = self._prompts.get(key)
        if found is not None:
            self._prompts.move_to_end(key)
            self._begin(found)
            return found
        made = chain.prompt(namespace, tokens, extras, tag)
        if made.num_pages:
            before = self._beginnings.get(_beginning(made))
            if before is not None:
                made.take_ids(before)
        self._keep(key, made)
        return made

    def clear(self) -> None:
        """Forget all."""
        self._prompts.clear()
        self._beginnings.clear()
        self.num_bytes = 0

    def _keep(self, key: _Key, prompt: Prompt) -> None:
        nbytes = _nbytes(prompt)
        if 2 * nbytes > self.bytes_max:
            return
        self._prompts[key] = prompt
        self.num_bytes += nbytes
        self._begin(prompt)
        while self.num_bytes > self.bytes_max:
            _, oldest = self._prompts.popitem(last=False)
            self.num_bytes -= _nbytes(oldest)
            if oldest.num_pages and self._beginnings.get(_beginning(oldest)) is oldest:
                del self._beginnings[_beginning(oldest)]

    def _begin(self, prompt: Prompt) -> None:
        if prompt.num_pages:
            self._beginnings[_beginning(prompt)] = prompt


def _beginning(prompt: Prompt) -> _Key:
    first = prompt.tokens[: prompt.page_tokens * TOKEN_BYTES]
    return prompt.chain, prompt.namespace, prompt.tag, prompt.extras, first


def _nbytes(prompt: Prompt) -> int:
    """Return what a prompt takes once all its ids are made."""
    words = prompt.extras
    names = (words.salt, words.tenant, words.lora, words.lora_path)
    extra = sum(map(len, names)) + sum(MEDIUM_BYTES + len(each.digest) for each in words.media)
    first = prompt.page_tokens * TOKEN_BYTES
    made = len(prompt.namespace) + first + ID_BYTES * prompt.num_pages
    return PROMPT_BYTES + len(prompt.tokens) + made + extra
