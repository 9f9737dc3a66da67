"""The model and the words of a demo: made on the spot, or a checkpoint of your own."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from examples.checkpoint import make_model, make_tokenizer
from examples.processes import DemoFailed
from examples.shared_prompt import documentation


@dataclass(frozen=True, slots=True)
class SmallModel:
    """A model, its tokenizer, and a text to read.

    words: of the text, as tokens.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    words: list[int]

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text, without the ones that begin or end a prompt."""
        tokens: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return tokens

    def passage(self, number: int, length: int) -> list[int]:
        """Return the ``number``-th passage of ``length`` tokens of the text. Raises DemoFailed."""
        start = number * length
        if start + length > len(self.words):
            raise DemoFailed(
                f"the text has {len(self.words):,} tokens, {number + 1} passages of {length:,}"
                f" need {start + length:,}; give more --text or shorter prompts"
            )
        return self.words[start : start + length]

    def describe(self) -> str:
        """Say what the model is, in one line."""
        config = self.model.config.get_text_config()
        count = sum(weight.numel() for weight in self.model.parameters())
        return (
            f"{type(self.model).__name__}, {config.num_hidden_layers} layers of"
            f" {config.hidden_size}, {count / 1e6:.0f} million weights in"
            f" {str(self.model.dtype).removeprefix('torch.')}, {torch.get_num_threads()} thread(s)"
        )


def add_options(parser: argparse.ArgumentParser, *, layers: int = 6, hidden: int = 384) -> None:
    """Add what every demo can be told about its model."""
    add = parser.add_argument
    add("--model", type=Path, help="a local transformers checkpoint with its tokenizer.json")
    add("--text", type=Path, nargs="+", help="files to read instead of this project's docs")
    add("--layers", type=int, default=layers, help="of the model with random weights (%(default)s)")
    add("--hidden", type=int, default=hidden, help="of the model with random weights (%(default)s)")
    add("--threads", type=int, default=1, help="that the model computes in (%(default)s)")
    add("--url", help="of a server; without it the engine runs in this process")
    add("--plot", type=Path, metavar="FOLDER", help="where to write the plot, as SVG")


def load(options: argparse.Namespace) -> SmallModel:
    """Load or make the model that was asked for. Raises DemoFailed."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.set_num_threads(options.threads)
    text = "\n\n".join(path.read_text() for path in options.text or documentation())
    if options.model is None:
        return made(text, layers=options.layers, hidden=options.hidden)
    path: Path = options.model
    for name in ("config.json", "tokenizer.json"):
        if not (path / name).exists():
            raise DemoFailed(f"{path} has no {name}")
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(path, local_files_only=True)
    model.train(False)
    return _with_words(model, tokenizer, text)


def made(text: str, *, layers: int, hidden: int) -> SmallModel:
    """Make a Llama with random weights and a tokenizer that has learnt from ``text``."""
    tokenizer = make_tokenizer(text)
    model = make_model(vocabulary=tokenizer.get_vocab_size(), layers=layers, hidden=hidden)
    model.train(False)
    # Noise has no end: every answer is to be as long as it was asked for.
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    model.generation_config.bos_token_id = None
    return _with_words(model, tokenizer, text)


def prompt_tensor(tokens: list[int], model: PreTrainedModel) -> Tensor:
    """Return a prompt as ``generate`` takes it, [1, n] on the model's device."""
    return torch.tensor([tokens], device=model.device)


def _with_words(model: PreTrainedModel, tokenizer: Tokenizer, text: str) -> SmallModel:
    words: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return SmallModel(model, tokenizer, words)
