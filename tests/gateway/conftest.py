"""A small checkpoint, models on it, and gateways in this process and in others."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from examples.checkpoint import make_model, make_tokenizer
from respkv.batching.model_loop import Limits, ModelLoop
from respkv.batching.runner import Runner
from respkv.gateway.model import Model
from respkv.gateway.settings import GatewaySettings
from respkv.gateway.tokenizer import TextCoder, load_tokenizer
from respkv.integrations.huggingface.dynamic_runner import DynamicRunner
from tests.gateway.running import Running
from tests.gateway.scripted import Script, ScriptedRunner

TEXT = Path(__file__).read_text() * 4
SMALL = GatewaySettings(max_prompt_tokens=200, max_new_tokens=24)

Serve = Callable[..., Running]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of two layers with random weights, and its tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-llama"
    tokenizer = make_tokenizer(TEXT)
    model = make_model(vocabulary=tokenizer.get_vocab_size(), layers=2, hidden=64)
    model.save_pretrained(folder)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="session")
def coder(checkpoint: Path) -> TextCoder:
    return TextCoder(load_tokenizer(checkpoint))


@pytest.fixture
def serve(coder: TextCoder) -> Iterator[Serve]:
    """Serve answers that a script gives, from a text or tokens; over a socket, in this process."""
    opened: list[Running] = []

    def start(says: str | Script, settings: GatewaySettings = SMALL) -> Running:
        tokens = coder.encode(says) if isinstance(says, str) else []
        script: Script = (lambda prompt: tokens) if isinstance(says, str) else says
        runner = ScriptedRunner(script, vocab_size=5000)
        opened.append(Running(model_on(runner, coder, settings), settings, runner))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


@pytest.fixture(scope="module")
def llama(checkpoint: Path, coder: TextCoder) -> Iterator[Running]:
    """The checkpoint, served over a socket, in this process."""
    weights = AutoModelForCausalLM.from_pretrained(checkpoint)
    weights.train(False)
    running = Running(model_on(DynamicRunner(weights), coder, SMALL), SMALL)
    yield running
    running.close()


def model_on(runner: Runner, coder: TextCoder, settings: GatewaySettings) -> Model:
    """Return a model around a runner, without a store."""
    limits = Limits(sequences_max=settings.max_concurrency, waiting_max=settings.max_waiting)
    return Model(
        name="tiny-llama",
        coder=coder,
        loop=ModelLoop(runner, limits=limits),
        stop_tokens=frozenset([0]),
    )
