"""What it costs to compute the KV of some tokens again, so that a hit deep in a prompt counts more.

A token at position p costs two operations for each parameter that is not an embedding, and four for
each position that it attends to, in each layer and for each element of the attention's width: one
multiplication and one addition for the scores and as many for the weighted sum.

Source: Kaplan et al., Scaling Laws for Neural Language Models, 2020, section 2.1.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Model:
    """A dense decoder. width: of the attention, query heads times head dimension.

    The defaults are those of a model of 8 billion parameters as Llama 3.1.
    """

    name: str = "8B dense (32 layers, width 4096)"
    num_params: float = 6.98e9
    layers: int = 32
    width: int = 4096

    def flops(self, first: int, last: int) -> float:
        """Return the operations that computing the tokens from ``first`` up to ``last`` takes."""
        linear = 2.0 * self.num_params * (last - first)
        return linear + 2.0 * self.layers * self.width * (last * last - first * first)


DEFAULT_MODEL = Model()
