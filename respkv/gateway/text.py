"""Tokens to text, piece by piece: no half characters, and nothing of a stop string.

A token is not a text: a character may take several tokens, and some tokenizers write a space or none
depending on what stands in front. So new text is what decoding a short window of tokens gives beyond
what the window gave before, and characters that may still change are kept back. The window moves on
whenever the text ends with a whole character, so a step decodes a few tokens, not the whole answer.
"""

from collections.abc import Callable, Sequence

Decode = Callable[[Sequence[int]], str]

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"
# UTF-8 has at most 4 bytes a character: 3 that wait for another, each perhaps a token.
_WAITING_MAX = 3
# Tokens that may gather without a whole character at the end; noise, as no text is like that.
_WINDOW_MAX = 32


class Detokenizer:
    """Turns one answer's tokens into pieces of text, which joined are the text of all of them.

    decode:  ids to text, with U+FFFD for bytes that are no character.
    context: tokens in front of the answer, of which the last few say how it goes on.
    """

    def __init__(self, decode: Decode, context: Sequence[int] = ()) -> None:
        self._decode = decode
        self._window = list(context[-4:])
        self._read = len(self._window)  # tokens of the window whose text is all out
        self._base = self._decode(self._window) if self._window else ""
        self._sent = 0  # characters beyond the base that are out already

    def push(self, token: int) -> str:
        """Add a token; return the text that is certain now, often some, sometimes none."""
        self._window.append(token)
        text = self._text()
        fresh = text[self._sent :]
        tail = len(fresh) - len(fresh.rstrip(_UNKNOWN))
        if tail == 0:
            self._move()
            return fresh
        if len(self._window) - self._read >= _WINDOW_MAX:
            return self._cut(text)
        ready = fresh[: len(fresh) - min(tail, _WAITING_MAX)]
        self._sent += len(ready)
        return ready

    def finish(self) -> str:
        """Return what was kept back; nothing follows."""
        fresh = self._text()[self._sent :]
        self._move()
        return fresh

    def _text(self) -> str:
        return self._decode(self._window)[len(self._base) :]

    def _move(self) -> None:
        """Let the window begin with what has been read last."""
        del self._window[: self._read]
        self._read = len(self._window)
        self._base = self._decode(self._window)
        self._sent = 0

    def _cut(self, text: str) -> str:
        """Send what no later token changes and keep the last tokens, where that can be told."""
        whole = self._base + text
        for count in range(_WAITING_MAX, _WINDOW_MAX // 2):
            front, back = self._window[:-count], self._window[-count:]
            head, rest = self._decode(front), self._decode(back)
            if head + rest == whole:
                fresh = head[len(self._base) + self._sent :]
                early = max(len(self._base) + self._sent - len(head), 0)
                self._window, self._read, self._base, self._sent = back, 0, "", early
                return fresh
        self._move()
        return text[self._sent :]


class StopStrings:
    """Lets text pass up to the first of some strings, which may come in pieces.

    What could be the beginning of one is kept back until it is clear.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        assert all(stops)
        self._stops = tuple(stops)
        self._kept = ""
        self.is_found = False

    def push(self, piece: str) -> str:
        """Add text; return what may be shown. Once one was found, that is nothing."""
        if self.is_found or not self._stops:
            return "" if self.is_found else piece
        text = self._kept + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.is_found, self._kept = True, ""
            return text[: min(found)]
        keep = max(_overlap(text, stop) for stop in self._stops)
        self._kept = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """Return what was kept back: no stop string came of it."""
        kept, self._kept = self._kept, ""
        return kept


def _overlap(text: str, stop: str) -> int:
    """Return how many characters at the end of a text are a beginning of a stop string."""
    for count in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:count]):
            return count
    return 0
