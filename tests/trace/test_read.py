"""Both formats, read."""

import json
from pathlib import Path
from typing import Any

import pytest

from respkv.errors import ConfigError
from respkv.trace.format import Request, mooncake_line
from respkv.trace.generate import Plan, generate
from respkv.trace.read import find_trace, read_trace

HEAD = {"format": "respkv-trace", "version": 1}


def written(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def line(cmd: str, chain: str, *, t: float = 1.0, **more: object) -> dict[str, object]:
    base = {"t": t, "conn": 1, "cmd": cmd, "chain": list(chain), "page_tokens": 8, "reply": "ok"}
    return {**base, **more}


def test_the_public_format_is_read_as_it_was_written(tmp_path: Path) -> None:
    trace = generate(Plan(sessions=20))
    path = tmp_path / "trace"
    path.write_text("".join(mooncake_line(request) + "\n" for request in trace.requests))
    found = read_trace(path)
    assert found.requests == trace.requests
    assert found.block_tokens == trace.block_tokens == 512


def test_the_public_trace_is_what_its_notice_says() -> None:
    path = find_trace()
    if path is None:
        pytest.skip("no trace: set RESPKV_TRACE to Mooncake's conversation_trace.jsonl")
    trace = read_trace(path)
    assert len(trace.requests) == 12_031
    assert all(len(each.blocks) == -(-each.num_tokens // 512) for each in trace.requests)
    assert len(trace.first(10).requests) == 10


def test_a_match_is_a_request_and_the_puts_after_it_are_not(tmp_path: Path) -> None:
    path = written(
        tmp_path / "t",
        HEAD,
        {"t": 0.5, "conn": 1, "cmd": "ping", "num_keys": 0, "reply": "ok"},
        line("kv.match", "abc", t=1.0, matched=1),
        line("kv.put", "b", parent="a"),
        line("kv.put", "c", parent="b"),
        line("kv.match", "abcd", t=9.0, matched=3),
    )
    trace = read_trace(path)
    assert trace.block_tokens == 8
    assert trace.requests == (
        Request(1.0, 24, (0, 1, 2)),
        Request(9.0, 32, (0, 1, 2, 3)),
    )


def test_what_is_put_behind_a_prompt_is_its_answer(tmp_path: Path) -> None:
    path = written(
        tmp_path / "t",
        HEAD,
        line("kv.match", "ab"),
        line("kv.put", "c", parent="b"),
        line("kv.put", "d", parent="c"),
        line("kv.seq.match", "xy", tokens=13),
        line("kv.seq.put", "xyz", tokens=20),
    )
    assert read_trace(path).requests == (
        Request(1.0, 16, (0, 1), 16, (2, 3)),
        Request(1.0, 13, (4, 5), 8, (6,)),
    )


def test_prompts_that_are_only_put_or_got_are_requests_each_time_they_are_asked_for(
    tmp_path: Path,
) -> None:
    path = written(
        tmp_path / "t",
        HEAD,
        line("kv.seq.put", "ab"),
        line("kv.seq.get", "ab", t=2.0),  # fetches what was put: the same request
        line("kv.seq.get", "ab", t=3.0),
        line("kv.match", "abc", t=4.0),
        line("kv.seq.get", "abc", t=5.0),  # the get that follows a match
        line("kv.seq.get", "abc", t=6.0),
    )
    assert [request.at_s for request in read_trace(path).requests] == [1.0, 3.0, 4.0, 6.0]


def asked(chain: str, tokens: int, **more: Any) -> dict[str, object]:
    return line("kv.seq.match", chain, tokens=tokens, **{"matched": 0, **more})


def stored(chain: str, **more: Any) -> dict[str, object]:
    return line("kv.seq.put", chain, **more)


@pytest.mark.parametrize("conn", [1, 2])
def test_the_question_before_a_put_is_no_request(conn: int, tmp_path: Path) -> None:
    path = written(
        tmp_path / "t",
        HEAD,
        asked("ab", 13),
        asked("ab", 13, t=2.0, conn=conn),
        stored("ab", t=2.1, conn=conn),
        asked("abx", 20, t=9.0, matched=13),
        asked("abcd", 30, t=19.0, matched=13, conn=conn),  # with the answer behind the prompt
        stored("abcd", t=19.1, conn=conn),
        line("kv.match", "pq", t=30.0),
        stored("pq", t=31.0),
    )
    assert read_trace(path).requests == (
        Request(1.0, 13, (0, 1)),
        Request(9.0, 20, (0, 1, 2), 16, (3, 4)),
        Request(30.0, 16, (5, 6)),
    )


def test_a_question_after_which_nothing_was_left_to_put_is_none_either(tmp_path: Path) -> None:
    path = written(
        tmp_path / "t",
        HEAD,
        asked("ab", 13, t=1.0),
        stored("ab", t=1.1),
        asked("ab", 13, t=2.0, matched=13),
        asked("ab", 13, t=2.1, matched=13),
        asked("ab", 13, t=3.0, matched=13),
        asked("abc", 20, t=3.1, matched=20),
        asked("ab", 13, t=4.0, matched=13, conn=2),  # somebody else
        asked("ab", 13, t=90.0, matched=13, conn=2),  # much later
    )
    times = [request.at_s for request in read_trace(path).requests]
    assert times == [1.0, 2.0, 3.0, 4.0, 90.0]


def test_a_conversation_of_the_hugging_face_cache_is_a_request_a_turn(tmp_path: Path) -> None:
    path = written(
        tmp_path / "t",
        HEAD,
        asked("abx", 20),
        asked("abc", 24),
        stored("abc"),
        asked("abx", 20, matched=20),  # are its logits there?
        stored("abx"),
        asked("abcdy", 36, t=2.0, matched=24),
        line("kv.seq.get", "abc", tokens=24, t=2.0),  # of what was found
        asked("abcdey", 41, t=2.1, matched=24),
        stored("abcdey", t=2.1),
        asked("abcdy", 36, t=2.1, matched=36),
        stored("abcdy", t=2.1),
        asked("abcdy", 36, t=3.0, matched=36),  # once more: all of it
        line("kv.seq.get", "abcdy", tokens=36, t=3.0),
        asked("abcdey", 41, t=3.1, matched=41),
    )
    requests = read_trace(path).requests
    assert [(each.at_s, each.num_tokens) for each in requests] == [(1.0, 20), (2.0, 36), (3.0, 36)]


def test_the_next_turn_is_a_request_though_its_client_puts_it_without_asking(
    tmp_path: Path,
) -> None:
    path = written(
        tmp_path / "t",
        HEAD,
        asked("ab", 16),
        stored("ab", t=1.1),
        asked("abc", 24, t=2.0, matched=16),
        stored("abc", t=2.1),
        asked("abcd", 32, t=50.0, matched=32),  # all there: nothing to put
        asked("abcde", 40, t=60.0, matched=32),
        stored("abcde", t=60.1),
    )
    times = [request.at_s for request in read_trace(path).requests]
    assert times == [1.0, 2.0, 50.0, 60.0]


def test_two_who_store_the_same_prompt_at_once_are_two_requests(tmp_path: Path) -> None:
    first, second = {"conn": 1}, {"conn": 2}
    without = (
        *(asked("ab", 16, **first), asked("ab", 16, **second)),
        *(stored("ab", **first), stored("ab", **second)),
    )
    having = (
        *(asked("ab", 16, **first), asked("ab", 16, **second)),
        *(asked("ab", 16, **first), stored("ab", **first)),
        asked("ab", 16, matched=16, **second),
    )
    for number, lines in enumerate((without, having)):
        path = written(tmp_path / f"t{number}", HEAD, *lines)
        assert len(read_trace(path).requests) == 2


def test_refused_commands_asked_for_nothing(tmp_path: Path) -> None:
    path = written(tmp_path / "t", HEAD, line("kv.match", "ab", reply="error"))
    assert read_trace(path).requests == ()


def test_pages_of_unknown_size_have_that_of_the_puts_or_the_one_given(tmp_path: Path) -> None:
    unknown = written(tmp_path / "t", HEAD, line("kv.match", "ab", page_tokens=0))
    assert read_trace(unknown, page_tokens=4).requests[0].num_tokens == 8
    put = line("kv.put", "a", page_tokens=32)
    known = written(tmp_path / "t", HEAD, line("kv.match", "ab", page_tokens=0), put)
    assert read_trace(known, page_tokens=4).requests[0].num_tokens == 64


def test_requests_of_other_page_sizes_are_left_out_and_counted(tmp_path: Path) -> None:
    path = written(
        tmp_path / "t",
        HEAD,
        line("kv.match", "ab"),
        line("kv.match", "cd", page_tokens=16),
        line("kv.match", "ef"),
    )
    trace = read_trace(path)
    assert (len(trace.requests), trace.num_left_out, trace.block_tokens) == (2, 1, 8)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not json\n", ":1 is no request"),
        ('{"timestamp": 1}\n', ":1 is no request"),
        ("[1]\n", ":1 is no request"),
        (json.dumps(HEAD) + "\nnot json\n", ":2 is no line of a recording"),
        (json.dumps(HEAD) + '\n{"chain": ["a"]}\n', ":2 is no line of a recording"),
        (json.dumps(HEAD) + "\n[1]\n", ":2 is no line of a recording"),
        ('{"format": "respkv-trace", "version": 9}\n', "of version 9; this respkv reads 1"),
    ],
)
def test_a_file_that_is_no_trace_is_refused_with_the_line(
    tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "t"
    path.write_text(text)
    with pytest.raises(ConfigError, match=words):
        read_trace(path)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"{tmp_path} cannot be read"):
        read_trace(tmp_path)
    (tmp_path / "t").write_bytes(b"\xff\xfe\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_trace(tmp_path / "t")
