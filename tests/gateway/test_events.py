"""What a stream says, event by event."""

import json

import pytest

from respkv.gateway.events import event


@pytest.mark.parametrize("text", ["\x85", "\u2028", "\u2029", "\r\n", "\x0b\x0c\x1c", "\u20ac"])
def test_an_event_is_one_line_to_whoever_splits_lines(text: str) -> None:
    written = event({"text": text}, "token").decode()
    name, data, *rest = written.splitlines()
    assert name == "event: token"
    assert json.loads(data.removeprefix("data: ")) == {"text": text}
    assert rest == [""]
