"""Draw what was simulated: capacity against hit rate, a line for each policy.

matplotlib comes with the extra ``plot`` and is imported when something is drawn.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from respkv.errors import ConfigError
from respkv.trace.simulate import BELADY, Outcome

_WIDTHS = {BELADY: 1.5, "survival": 2.5}


def draw(outcomes: Sequence[Outcome], path: Path, title: str) -> None:
    """Draw outcomes into a file whose suffix says its format; the same ones make the same bytes.

    Raises ConfigError when matplotlib is absent, or the file cannot be written.
    """
    matplotlib, pyplot = _matplotlib()
    with matplotlib.rc_context({"svg.hashsalt": "respkv", "svg.fonttype": "none"}):
        figure, axes = pyplot.subplots(figsize=(8, 5))
        try:
            _lines(axes, outcomes)
            axes.set_xscale("log")
            capacities = sorted({outcome.cell.blocks_max for outcome in outcomes})
            axes.set_xticks(capacities, [f"{capacity:,}" for capacity in capacities], rotation=30)
            axes.minorticks_off()
            axes.set_xlabel("capacity, blocks")
            axes.set_ylabel("tokens hit, of all")
            axes.set_ylim(bottom=0.0)
            axes.set_title(title)
            axes.grid(visible=True, alpha=0.3)
            axes.legend()
            figure.tight_layout()
            figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
        except (OSError, ValueError) as error:  # ValueError: a suffix that it does not know
            raise ConfigError(f"the plot cannot be written to {path}: {error}") from error
        finally:
            pyplot.close(figure)


def check_can_draw() -> None:
    """Raise ConfigError, which names the extra, when matplotlib is absent."""
    _matplotlib()


def _lines(axes: Any, outcomes: Sequence[Outcome]) -> None:
    by_name: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_name.setdefault(outcome.cell.label, []).append(outcome)
    for name, each in by_name.items():
        each.sort(key=lambda outcome: outcome.cell.blocks_max)
        policy = each[0].cell.policy
        axes.plot(
            [outcome.cell.blocks_max for outcome in each],
            [outcome.hit_rate for outcome in each],
            "k--" if policy == BELADY else ("o-" if name == policy else "s:"),
            label=name,
            linewidth=_WIDTHS.get(policy, 1.0),
            markersize=3,
        )


def _matplotlib() -> tuple[Any, Any]:
    try:
        import matplotlib  # pyright: ignore[reportMissingImports]

        matplotlib.use("agg")
        from matplotlib import pyplot  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ConfigError(
            "--plot needs matplotlib, which is not installed: pip install 'respkv[plot]'"
        ) from error
    return matplotlib, pyplot
