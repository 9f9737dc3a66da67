"""Draw the error of the codecs against what they cost: ``python -m bench.distortion``.

For Gaussian numbers no codec can be left of the line 2^-R: the rate-distortion bound of a Gaussian
source (Shannon 1959). Keys and values are not Gaussian, so their codecs may. Writes docs/codecs.svg and
bench/results/distortion.json.
"""

import argparse
import json
from pathlib import Path
from typing import Final

import matplotlib  # pyright: ignore[reportMissingImports]
from matplotlib import pyplot  # pyright: ignore[reportMissingImports]

from respkv.kernels.layout import Codec, Side
from respkv.kernels.quality import Quality, measure
from tests.kernels import data

ROOT = Path(__file__).parent.parent
PICTURE = ROOT / "docs" / "codecs.svg"
RESULTS = Path(__file__).parent / "results" / "distortion.json"
TOKENS: Final = 8192
DIM: Final = 128
CODECS: Final = tuple(codec for codec in Codec if not codec.is_lossless)
MARKS: Final = {"rh": "o", "rhz": "s", "": "^"}
# What is measured: a name, its numbers, and as what they are coded.
SOURCES: Final[tuple[tuple[str, data.Generate, Side], ...]] = (
    ("N(0,1)", data.gaussian, "value"),
    ("keys with outliers", data.keys, "key"),
    ("heavy-tailed values", data.values, "value"),
)


def measure_all(tokens: int) -> dict[str, dict[str, Quality]]:
    """Return for each source and codec what was measured, in pages of 256 tokens."""
    found: dict[str, dict[str, Quality]] = {}
    for name, generate, side in SOURCES:
        numbers = generate(tokens, 1, DIM, 1).view(-1, min(tokens, 256), 1, DIM)
        found[name] = {}
        for codec in CODECS:
            keys, values = measure(codec, numbers, numbers)
            found[name][codec.name.lower()] = keys if side == "key" else values
    return found


def draw(found: dict[str, dict[str, Quality]], picture: Path) -> None:
    """Draw one panel with all sources and the bound."""
    matplotlib.rcParams["svg.hashsalt"] = "respkv"  # the same picture has the same bytes
    figure, axes = pyplot.subplots(figsize=(8, 5))
    rates = [1.0 + step / 10 for step in range(80)]
    axes.plot(rates, [2**-rate for rate in rates], "k--", label="bound of a Gaussian source, 2^-R")
    for color, (source, codecs) in enumerate(found.items()):
        for index, (name, quality) in enumerate(codecs.items()):
            kind = name.rstrip("0123456789") if name.startswith("rh") else ""
            axes.plot(
                quality.bits,
                quality.relative_l2,
                MARKS[kind],
                color=f"C{color}",
                label=source if index == 0 else None,
            )
            if color == 0:
                axes.annotate(
                    name,
                    (quality.bits, quality.relative_l2),
                    textcoords="offset points",
                    xytext=(5, 5),
                    fontsize=8,
                )
    axes.set_yscale("log", base=2)
    axes.set_xlabel("stored bits per element, parameters included")
    axes.set_ylabel("relative L2 error")
    axes.set_title("What the codecs cost and how far they are off (circle rh, square rhz)")
    axes.grid(visible=True, which="both", alpha=0.3)
    axes.legend()
    figure.tight_layout()
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, metadata={"Date": None})


def main(argv: list[str] | None = None) -> int:
    """Measure, draw and write."""
    parser = argparse.ArgumentParser(description="Draw error against bits.")
    parser.add_argument("--tokens", type=int, default=TOKENS)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args(argv)
    found = measure_all(options.tokens)
    draw(found, options.picture)
    body = {
        source: {
            codec: {
                "bits": round(quality.bits, 4),
                "relative_l2": round(quality.relative_l2, 5),
                "attention_error": round(quality.attention_error, 5),
            }
            for codec, quality in codecs.items()
        }
        for source, codecs in found.items()
    }
    options.out.write_text(json.dumps(body, indent=1) + "\n")
    for source, codecs in body.items():
        for codec, figures in codecs.items():
            print(source, codec, *figures.values())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
