"""What is read off a model, and the name of its weights."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from respkv.integrations.huggingface.model_kv import (
    UnsupportedModel,
    WeightsNote,
    fingerprint_of,
    read_model,
    text_max_of,
)
from tests.integrations.huggingface.models import (
    FAMILIES,
    OTHERS,
    REFUSED,
    WINDOW,
    shared_model,
    tiny_model,
)

# Layers, heads, dim and the windows.
EXPECTED: dict[str, tuple[int, int, int, list[int]]] = {
    "llama": (3, 2, 8, [0, 0, 0]),
    "tinyllama": (2, 1, 4, [0, 0]),
    "qwen2": (2, 2, 8, [0, 0]),
    "qwen3": (2, 2, 16, [0, 0]),
    "phi": (2, 4, 8, [0, 0]),
    "phi3": (2, 2, 8, [0, 0]),
    "gpt2": (2, 4, 8, [0, 0]),
    "mistral": (2, 2, 8, [WINDOW, WINDOW]),
    "gemma2": (2, 2, 16, [WINDOW, 0]),
    "gemma3": (3, 2, 16, [WINDOW, 0, WINDOW]),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_shape_is_read_off_a_forward_pass(family: str) -> None:
    kv = read_model(shared_model(family))
    windows = [layer.window for layer in kv.layers]
    assert (len(kv.layers), kv.heads, kv.dim, windows) == EXPECTED[family]
    assert kv.window_max == (WINDOW if family == "mistral" else 0)
    assert kv.geometry(64).page_bytes == 64 * kv.token_bytes
    assert kv.geometry(64).dtype == "float32"


@pytest.mark.parametrize("family", REFUSED)
def test_a_prefix_that_is_not_in_its_keys_alone_is_refused(family: str) -> None:
    with pytest.raises(UnsupportedModel, match=REFUSED[family][2]):
        read_model(tiny_model(family))


def test_padding_counts_where_positions_are_columns() -> None:
    found = {family for family in OTHERS if read_model(shared_model(family)).counts_padding}
    assert found == {"roformer"}


def test_half_precision_is_kept() -> None:
    model: Any = tiny_model("llama")
    assert read_model(model.to(torch.bfloat16)).geometry(16).dtype == "bfloat16"


def test_the_fingerprint_names_weights_and_what_they_mean() -> None:
    model: Any = tiny_model("llama")
    name = fingerprint_of(model)
    assert fingerprint_of(tiny_model("llama")) == name
    assert fingerprint_of(tiny_model("llama", attention="eager")) == name
    model.config._name_or_path = "elsewhere"
    assert fingerprint_of(model) == name
    assert fingerprint_of(tiny_model("llama", seed=1)) != name
    assert fingerprint_of(tiny_model("llama", rms_norm_eps=1e-5)) != name
    assert fingerprint_of(tiny_model("llama", rope_theta=5000.0)) != name
    halved: Any = tiny_model("llama")
    assert fingerprint_of(halved.to(torch.bfloat16)) != name
    with torch.no_grad():
        model.lm_head.weight[3, 4] += 1e-3
    assert fingerprint_of(model) != name


def test_ropes_that_depend_on_the_length_have_a_limit() -> None:
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    long = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    for parameters, limit in (
        ({"rope_type": "default", "rope_theta": 1e4}, 0),
        (dynamic, 2048),
        (long, 64),
        ({"full_attention": dynamic, "sliding_attention": long}, 64),
        ({"rope_type": "longrope"}, 1),
        (None, 0),
    ):
        config = SimpleNamespace(rope_parameters=parameters, max_position_embeddings=2048)
        assert text_max_of(config) == limit
    assert {read_model(shared_model(family)).text_max for family in FAMILIES} == {0}


def test_weights_that_change_are_noticed() -> None:
    model: Any = tiny_model("llama")
    note = WeightsNote(model)
    model(torch.tensor([[5]]))
    assert note.is_right
    model.load_state_dict(model.state_dict())
    assert not note.is_right
    halved: Any = tiny_model("llama")
    note = WeightsNote(halved)
    halved.to(torch.bfloat16)
    assert not note.is_right
    note = WeightsNote(halved)
    halved.train()
    assert not note.is_right
    halved.eval()
    assert note.is_right


class LowRank(torch.nn.Module):
    """A linear layer with something added to it, as PEFT puts them into models."""

    merged_adapters: tuple[str, ...] = ()
    _disable_adapters = False
    _active_adapter = "default"

    def __init__(self, base: torch.nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.base(states)
        return found if self._disable_adapters else found * 1.5


def test_weights_that_are_replaced_are_noticed() -> None:
    model: Any = tiny_model("llama")
    attention = model.model.layers[0].self_attn
    old = attention.k_proj.weight
    note = WeightsNote(model)
    attention.k_proj.weight = torch.nn.Parameter(old.clone(), requires_grad=False)
    assert not note.is_right
    attention.k_proj.weight = old
    assert note.is_right
    attention.k_proj = LowRank(attention.k_proj)
    assert not note.is_right
    note = WeightsNote(model)
    del attention.k_proj.base.weight, old
    attention.k_proj.base.weight = torch.nn.Parameter(torch.zeros(16, 32), requires_grad=False)
    assert not note.is_right, "also where another one has the place of the old one"


def test_adapters_that_are_switched_are_noticed_and_have_names_of_their_own() -> None:
    model: Any = tiny_model("llama")
    tuned = model.model.layers[1].self_attn.v_proj = LowRank(model.model.layers[1].self_attn.v_proj)
    names = [fingerprint_of(model)]
    for change in (
        {"_disable_adapters": True},
        {"_active_adapter": "b"},
        {"merged_adapters": ("b",)},
    ):
        note = WeightsNote(model)
        assert note.is_right
        vars(tuned).update(change)
        assert not note.is_right
        names.append(fingerprint_of(model))
    assert len(set(names)) == 4


def test_weights_that_cannot_be_read_want_a_fingerprint() -> None:
    model: Any = tiny_model("llama")
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.to("meta"), requires_grad=False)
    with pytest.raises(UnsupportedModel, match=r"lm_head\.weight of Llama\w+ is offloaded"):
        fingerprint_of(model)
    note = WeightsNote(model)
    model.lm_head.weight = torch.nn.Parameter(torch.zeros(101, 32), requires_grad=False)
    assert note.is_right, "what is brought for a forward pass is another tensor each time"

    class Packed(torch.nn.Module):
        def get_extra_state(self) -> tuple[int, ...]:
            return (1, 2)

        def set_extra_state(self, state: Any) -> None:
            pass

    packed: Any = tiny_model("llama")
    packed.lm_head = Packed()
    with pytest.raises(UnsupportedModel, match=r"lm_head\._extra_state of .* is packed"):
        fingerprint_of(packed)
