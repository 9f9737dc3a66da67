"""What a demo measured without the cache and with it, in words, bars and one SVG.

Every demo gives the same model the same prompts twice, in turns. What "without" means is said in
the report: the whole prompt is computed anew, while the tokens of one answer use the model's
own KV cache as always. Nothing else is compared with, unless the line says so.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import median

BAR_WIDTH = 40
SHOWN_MAX = 12  # prompts in the table and the bars; the plot has all of them
ROW_HEIGHT, LABEL_WIDTH, PLOT_WIDTH = 14, 200, 420


@dataclass(frozen=True, slots=True)
class Generation:
    """One prompt and its answer.

    tokens_reused: how many tokens of the prompt came out of the cache.
    first_token_s: until the first token of the answer; total_s: until the last.
    """

    prompt_tokens: int
    tokens_reused: int
    first_token_s: float
    total_s: float
    new_tokens: list[int]


@dataclass(frozen=True, slots=True)
class Pair:
    """The same prompt without the cache and with it.

    label: what is asked. is_first: whether nothing of it could be stored before.
    """

    label: str
    plain: Generation
    cached: Generation
    is_first: bool = False

    @property
    def is_identical(self) -> bool:
        return self.plain.new_tokens == self.cached.new_tokens


@dataclass(slots=True)
class Comparison:
    """All prompts of a demo.

    facts: what else there is to tell, a line each. store_s: what the demo waited for pages to be
    stored, which an inference worker would do while it answers the next one. lookups, lookup_hits:
    where something smaller than a prompt is looked up. context_reused: the share of a context that
    was known before that was reused.
    """

    title: str
    pairs: list[Pair] = field(default_factory=list[Pair])
    facts: dict[str, str] = field(default_factory=dict[str, str])
    store_s: float = 0.0
    lookups: int = 0
    lookup_hits: int = 0
    context_reused: float | None = None

    @property
    def later(self) -> list[Pair]:
        """The prompts of which something could have been stored."""
        return [pair for pair in self.pairs if not pair.is_first] or self.pairs

    @property
    def hits(self) -> int:
        """How many prompts found anything."""
        return sum(pair.cached.tokens_reused > 0 for pair in self.pairs)

    @property
    def hit_rate(self) -> float:
        """The share of all prompts that found anything, first ones included."""
        return self.hits / len(self.pairs)

    @property
    def tokens_reused(self) -> int:
        return sum(pair.cached.tokens_reused for pair in self.pairs)

    @property
    def reused(self) -> float:
        """The share of all prompt tokens that came out of the cache, first prompts included."""
        return self.tokens_reused / sum(pair.cached.prompt_tokens for pair in self.pairs)

    @property
    def first_token_speed_up(self) -> float:
        """How much sooner the first token comes, by medians of the later prompts."""
        plain = median(pair.plain.first_token_s for pair in self.later)
        return plain / median(pair.cached.first_token_s for pair in self.later)

    @property
    def answer_speed_up(self) -> float:
        """How much sooner a later prompt's whole answer is there, by medians."""
        plain = median(pair.plain.total_s for pair in self.later)
        return plain / median(pair.cached.total_s for pair in self.later)

    @property
    def whole_speed_up(self) -> float:
        """How much sooner everything was done, first prompts and waits for stores included."""
        cached = sum(pair.cached.total_s for pair in self.pairs) + self.store_s
        return sum(pair.plain.total_s for pair in self.pairs) / cached

    @property
    def shown(self) -> list[Pair]:
        """Those of the table: where there are too many, the first and the last ones."""
        if len(self.pairs) <= SHOWN_MAX:
            return self.pairs
        return [*self.pairs[: SHOWN_MAX // 2], *self.pairs[-SHOWN_MAX // 2 :]]

    def failure(self) -> str | None:
        """Say what must not be: tokens that differ, or a cache that never had anything."""
        if differing := [pair.label for pair in self.pairs if not pair.is_identical]:
            return f"tokens differ with the cache: {', '.join(differing)}"
        if not any(pair.cached.tokens_reused for pair in self.later):
            return "nothing was found in the cache"
        return None

    def report(self) -> str:
        """Return the whole report."""
        return "\n\n".join([self.title, self._table(), self._bars(), self._summary()])

    def svg(self) -> str:
        """Return a drawing: a pair of bars for each prompt, as long as its first token took."""
        longest = max(pair.plain.first_token_s for pair in self.pairs)
        longest = max(longest, *(pair.cached.first_token_s for pair in self.pairs))
        lines, y = list[str](), 40
        for pair in self.pairs:
            lines.append(_text(LABEL_WIDTH - 8, y + ROW_HEIGHT + 3, pair.label[:30], "end"))
            for colour, each in (("#b0b0b0", pair.plain), ("#2a7ab0", pair.cached)):
                width = max(each.first_token_s / longest * PLOT_WIDTH, 1)
                lines.append(
                    f'<rect x="{LABEL_WIDTH}" y="{y}" width="{width:.1f}"'
                    f' height="{ROW_HEIGHT - 2}" fill="{colour}"/>'
                )
                words = milliseconds(each.first_token_s)
                lines.append(_text(LABEL_WIDTH + width + 5, y + ROW_HEIGHT - 4, words))
                y += ROW_HEIGHT
            y += 6
        head = _text(8, 22, f"{self.title}: time to first token, without (grey) and with (blue)")
        size = f'width="{LABEL_WIDTH + PLOT_WIDTH + 90}" height="{y + 8}"'
        style = 'font-family="sans-serif" font-size="11"'
        start = f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>'
        ground = '<rect width="100%" height="100%" fill="white"/>'
        return "\n".join([start, ground, head, *lines, "</svg>"]) + "\n"

    def _table(self) -> str:
        rows = [["", "prompt", "reused", "first token", "with cache", "speed-up", "answer"]]
        for pair in self.shown:
            plain, cached = pair.plain, pair.cached
            rows.append(
                [
                    pair.label,
                    f"{cached.prompt_tokens:,}",
                    f"{cached.tokens_reused:,}",
                    milliseconds(plain.first_token_s),
                    milliseconds(cached.first_token_s),
                    f"{plain.first_token_s / cached.first_token_s:.1f} x",
                    "identical" if pair.is_identical else "DIFFERS",
                ]
            )
        table = columns(rows)
        if left_out := len(self.pairs) - len(self.shown):
            table += f"\n({left_out} between them are not shown)"
        return table

    def _bars(self) -> str:
        longest = max(
            max(pair.plain.first_token_s, pair.cached.first_token_s) for pair in self.shown
        )
        width = max(len(pair.label) for pair in self.shown)
        lines = ["time to first token, without (-) and with the cache (#)"]
        for pair in self.shown:
            for mark, each in (("-", pair.plain), ("#", pair.cached)):
                bar = mark * max(round(each.first_token_s / longest * BAR_WIDTH), 1)
                label = pair.label if mark == "-" else ""
                lines.append(f"{label:<{width}}  {bar} {milliseconds(each.first_token_s)}")
        return "\n".join(lines)

    def _summary(self) -> str:
        later = self.later
        facts = {
            "hit rate": f"{self.hit_rate:.1%} ({self.hits} of {len(self.pairs)} prompts)",
            "tokens reused": f"{self.tokens_reused:,}, {self.reused:.1%} of all prompt tokens",
            "first token": _against(
                median(pair.plain.first_token_s for pair in later),
                median(pair.cached.first_token_s for pair in later),
            ),
            "whole answer": _against(
                median(pair.plain.total_s for pair in later),
                median(pair.cached.total_s for pair in later),
            ),
            "everything": f"{self.whole_speed_up:.1f} x, first reads and stores included",
            **self.facts,
            "without the cache": "each prompt is computed from its first token; the tokens of an"
            " answer use the KV of those before them",
            "figures": "first token and whole answer are medians of the prompts that could hit",
        }
        width = max(map(len, facts))
        return "\n".join(f"{name:<{width}}  {words}" for name, words in facts.items())


def save(comparison: Comparison, folder: Path, name: str) -> Path:
    """Write the drawing to ``folder`` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.svg"
    path.write_text(comparison.svg())
    return path


def columns(rows: Sequence[Sequence[str]]) -> str:
    """Set cells in columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [first.ljust(widths[0]), *map(str.rjust, others, widths[1:])]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def milliseconds(seconds: float) -> str:
    """Show a time in milliseconds, with a digit more where it is short."""
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.1 else f"{seconds * 1e3:.1f} ms"


def _against(plain: float, cached: float) -> str:
    return (
        f"{milliseconds(plain)} without, {milliseconds(cached)} with the cache:"
        f" {plain / cached:.1f} x"
    )


def _text(x: float, y: float, words: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y}" text-anchor="{anchor}">{escape(words)}</text>'
