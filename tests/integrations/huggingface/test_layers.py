"""Layers show attention what those of transformers show it, whatever is done to them."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from respkv.integrations.huggingface.buffers import BufferPool
from respkv.integrations.huggingface.layers import SlidingTokenMajorLayer, TokenMajorLayer

POOL = BufferPool(0)
STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("update"), st.integers(1, 70)),
        st.tuples(st.just("crop"), st.integers(0, 9)),
        st.tuples(st.just("reorder"), st.integers(0, 5)),
        st.tuples(st.just("lend"), st.integers(1, 9)),
    ),
    max_size=8,
)


def layers_of(window: int) -> tuple[Any, Any]:
    if not window:
        plain: Any = DynamicLayer
        return TokenMajorLayer(POOL), plain()
    theirs: Any = DynamicSlidingWindowLayer(window)
    theirs.activate_past_recording()
    return SlidingTokenMajorLayer(POOL, window), theirs


class Calls(TorchFunctionMode):
    """Counts what is done with tensors; what they are asked for, as their shapes, left out."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ != "__get__":
            self.names.append(func.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("window", [0, 4])
def test_a_step_cuts_no_more_views_than_it_writes_and_shows(window: int) -> None:
    ours, _ = layers_of(window)
    ours.update(*torch.zeros(2, 1, 2, 9, 4).unbind())
    one, two = torch.zeros(2, 1, 2, 1, 4).unbind()
    with Calls() as calls:
        ours.update(one, two)
    # Two to write into, two to show, and two more where the next token sees fewer.
    assert calls.names.count("narrow") == (6 if window else 4)
    assert set(calls.names) <= {"dim", "narrow", "copy_"}


def test_tokens_are_written_in_inference_mode_and_out_of_it() -> None:
    ours, theirs = layers_of(0)
    states = torch.arange(120.0).reshape(2, 1, 2, 3, 10)
    for layer in (ours, theirs):
        with torch.inference_mode():
            layer.update(*states)
        layer.update(*states.clone().requires_grad_())  # a model's, outside of no_grad
        with torch.no_grad():
            layer.update(*states)
    assert torch.equal(ours.keys, theirs.keys)
    assert torch.equal(ours.values, theirs.values)
    assert not ours.keys.requires_grad


@settings(max_examples=60, deadline=None)
@given(STEPS, st.sampled_from([0, 4, 33]))
def test_they_show_what_those_of_transformers_show(
    steps: list[tuple[str, int]], window: int
) -> None:
    ours, theirs = layers_of(window)
    lent: list[tuple[Tensor, Tensor]] = []
    for number, (step, size) in enumerate(steps):
        torch.manual_seed(number)
        length = ours.get_seq_length()
        if step == "update":
            states = torch.randn(2, 2, 3, size, 4).unbind()
            assert ours.get_mask_sizes(size) == theirs.get_mask_sizes(size)
            for mine, other in zip(ours.update(*states), theirs.update(*states), strict=True):
                assert torch.equal(mine, other)
            theirs.crop(0)
        elif step == "crop" and length and size < length and (not window or length < window):
            ours.crop(-size)
            theirs.crop(-size)
        elif step == "reorder" and length:
            rows = torch.tensor([size % 2, 1 - size // 3])
            ours.reorder_cache(rows)
            theirs.reorder_cache(rows)
        elif step == "lend" and length:
            for part in ours.kv_of(0, 0, length):
                lent.append((part, part.clone()))
        assert ours.get_seq_length() == theirs.get_seq_length()
        if ours.get_seq_length():
            assert torch.equal(ours.keys, theirs.keys)
            assert torch.equal(ours.values, theirs.values)
        for part, before in lent:  # nobody writes over what is being stored
            assert torch.equal(part, before)


def test_repeated_and_selected_rows() -> None:
    ours, theirs = layers_of(0)
    states = torch.randn(2, 2, 3, 5, 4).unbind()
    for layer in (ours, theirs):
        layer.update(*states)
        layer.batch_repeat_interleave(3)
        layer.batch_select_indices(torch.tensor([5, 0, 2]))
    assert torch.equal(ours.keys, theirs.keys)
    ours.reset()
    assert (ours.get_seq_length(), ours.keys) == (0, None)
    ours.update(*states)
    assert torch.equal(ours.keys, states[0])


def test_what_is_outside_of_a_window_that_was_loaded_cannot_come_back() -> None:
    layer = SlidingTokenMajorLayer(POOL, 8)
    layer.adopt(torch.randn(2, 1, 40, 3, 4), 30, base=16)
    assert (layer.get_seq_length(), layer.get_mask_sizes(2)) == (30, (9, 23))
    layer.crop(-7)
    assert layer.get_seq_length() == 23
    with pytest.raises(RuntimeError, match="tokens from 16 to 23 are kept, with a window of 8"):
        layer.crop(-1)
    with pytest.raises(ValueError, match="negative count"):
        layer.crop(3)


def test_states_of_another_shape_are_an_error() -> None:
    layer = TokenMajorLayer(POOL)
    layer.update(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4))
    with pytest.raises(ValueError, match=r"1 sequences of 2 heads of 4 torch.float32"):
        layer.update(torch.randn(2, 2, 1, 4), torch.randn(2, 2, 1, 4))
    with pytest.raises(ValueError, match=r"the model gave \[1, 2, 1, 4\] torch.float16"):
        layer.update(torch.randn(1, 2, 1, 4).half(), torch.randn(1, 2, 1, 4).half())
    with pytest.raises(NotImplementedError, match="cannot be offloaded"):
        layer.offload()


def test_a_cache_made_in_inference_mode_is_used_outside_of_it() -> None:
    layer = TokenMajorLayer(POOL)
    with torch.inference_mode():
        layer.update(torch.randn(1, 2, 3, 4), torch.randn(1, 2, 3, 4))
    states = torch.randn(1, 2, 3, 4, requires_grad=True)
    keys, _ = layer.update(states, states)
    assert keys.shape == (1, 2, 6, 4)
    assert not keys.requires_grad


def test_what_was_to_be_loaded_is_not_made_up() -> None:
    layer = TokenMajorLayer(POOL)
    layer.set_length(5)
    states = torch.zeros(1, 2, 1, 4)
    with pytest.raises(RuntimeError, match="5 tokens of this layer were to be loaded"):
        layer.update(states, states)
