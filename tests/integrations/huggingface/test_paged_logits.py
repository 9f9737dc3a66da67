"""Logits of late prompts: found by the whole prompt and its salt, in bounded memory."""

import torch

from respkv.integrations.huggingface.paged_logits import LastLogits


def row(number: int) -> torch.Tensor:
    return torch.full((10,), float(number))  # 40 bytes


def test_logits_are_found_by_the_whole_prompt_and_its_salt() -> None:
    last = LastLogits(1000)
    last.keep("a", [1, 2], row(1))
    last.keep("b", [1, 2], row(2))
    for salt, tokens, want in (
        ("a", [1, 2], 1),
        ("b", [1, 2], 2),
        ("a", [1], None),
        ("a", [1, 2, 3], None),
        ("c", [1, 2], None),
    ):
        found = last.find(salt, tokens)
        assert (None if found is None else int(found[0])) == want


def test_those_used_longest_ago_go_when_there_are_too_many() -> None:
    last = LastLogits(3 * (40 + 8))
    for number in range(3):
        last.keep("", [number], row(number))
    assert last.find("", [0]) is not None
    last.keep("", [3], row(3))
    assert [last.find("", [number]) is not None for number in range(4)] == [True, False, True, True]
    last.keep("", [3], row(4))
    assert last.num_bytes == 3 * 48
    assert last.clear() == 3 * 48
    assert last.num_bytes == 0
    assert last.find("", [0]) is None


def test_none_are_kept_without_memory() -> None:
    last = LastLogits(0)
    last.keep("", [1], row(1))
    assert last.find("", [1]) is None
    assert last.num_bytes == 0
