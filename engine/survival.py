"""How likely a request is to be continued, learned while it runs.

For each kind of request (survival says class: turn and length) this keeps two histograms over ages,
of requests that were continued at that age and of those that were lost sight of. An age is the idle
time since the request was last touched. The Kaplan-Meier estimate of the hazard at an age is the
share of those still waiting then that were continued then; it needs no request to be followed to
its end, which is why it is right for a cache, that forgets. Ages are log-spaced: seconds matter
after a few of them, minutes after an hour.

A kind of which little was seen borrows the shape from all kinds: its prior is the pooled hazard times
one ratio, of what was continued of the kind to what the pooled hazard says of it (proportional
hazards), and counts as PSEUDO_COUNT observations in each bin. One ratio is known long before 64 bins
are. Where nothing at all was seen odds fall as 1 / age, the same for all, under which the oldest is
always the least likely one: a cache that has learned nothing is an lru.

Those that wait still count as lost sight of at the age they have now. Without them the first to be
counted would be those that came back, and what never does would be known only CENSOR_S later.

Source: Kaplan and Meier, Nonparametric Estimation from Incomplete Observations, JASA 1958; Cox,
Regression Models and Life-Tables, JRSS B 1972 (proportional hazards); that
the reuse of a prompt's KV follows its turn and its age: Wang et al., KVCache Cache in the Wild,
USENIX ATC 2025, arXiv:2506.02634.
"""

from bisect import bisect_right
from collections import deque
from functools import lru_cache
from itertools import accumulate
from math import exp, inf, log
from operator import add, mul
from typing import Any

FIRST_BIN_S = 4.0
BIN_RATIO = 1.18
NUM_BINS = 64
PSEUDO_COUNT = 64.0  # observations that a prior counts as in each bin
RATIO_COUNT = 4.0  # and that a ratio of 1 counts as
CENSOR_S = 900.0
TURN_MAX = 4
LENGTHS = (1024, 8192)  # borders between short, middle and long prompts, in tokens
NUM_LENGTHS = len(LENGTHS) + 1
NUM_KINDS = (TURN_MAX + 1) * NUM_LENGTHS
SINGLE = NUM_KINDS  # of an entry that belongs to no request
TAIL = NUM_KINDS + 1  # of the partial page at the end of a request
LEFT = NUM_KINDS + 2  # of what a request that was continued left behind
NOTICES_MAX = 4096
TICK_S = 16.0
LEARN_EVERY = 64  # observations after which the hazards are worked out anew, more as there are more
_PRIOR_SHARE = 0.25  # of requests, continued in the first bin, before anything was learned
_RATE_MAX = 0.999
_STEP_MAX = -log(1.0 - _RATE_MAX)
_PER_LOG = 1.0 / log(BIN_RATIO)


def kind_of(turn: int, num_tokens: int) -> int:
    """Return the kind of a request by its turn and the length of its prompt."""
    return turn * NUM_LENGTHS + bisect_right(LENGTHS, num_tokens)


def turn_of(kind: int) -> int:
    """Return the turn of a kind."""
    return kind // NUM_LENGTHS


class Curve:
    """What was observed of one kind, and the cumulated hazard that follows from it."""

    __slots__ = ("continued", "hazard", "lost", "waiting")

    def __init__(self) -> None:
        self.continued = [0.0] * NUM_BINS
        self.lost = [0.0] * NUM_BINS
        self.waiting: dict[int, int] = {}  # how many wait still, by the tick of their last touch
        self.hazard: list[float] = []

    def lost_by(self, now: float) -> list[float]:
        """Return how many were lost sight of at each age, those that wait still included."""
        lost = self.lost.copy()
        for tick, number in self.waiting.items():
            lost[_bin(now - tick * TICK_S)] += number
        return lost

    def rates(self, lost: list[float], prior: list[float] | None) -> list[float]:
        """Return the share continued in each bin.

        prior: counts as PSEUDO_COUNT observations; None: each bin is like the one before. As bins
               are equally long in logarithms, odds go on falling as 1 / age where nothing was seen.
        """
        steps = [*map(add, self.continued, lost)]
        waiting = [*accumulate(reversed(steps))]
        # Those lost sight of within a bin waited for half of it.
        seen = [number - gone / 2 for number, gone in zip(reversed(waiting), lost, strict=True)]
        if prior is not None:
            ratio = sum(self.continued) + RATIO_COUNT
            ratio /= sum(map(mul, prior, seen)) + RATIO_COUNT
            scaled = [rate if rate < 1.0 else 1.0 for rate in (each * ratio for each in prior)]
            rows = zip(self.continued, scaled, seen, strict=True)
            return [
                (done + PSEUDO_COUNT * rate) / (all_ + PSEUDO_COUNT) for done, rate, all_ in rows
            ]
        rates: list[float] = []
        before = _PRIOR_SHARE
        for at in range(NUM_BINS):
            before = (self.continued[at] + PSEUDO_COUNT * before) / (seen[at] + PSEUDO_COUNT)
            rates.append(before)
            if at == 0:
                before *= BIN_RATIO - 1.0  # the second bin is so much shorter than the first
        return rates

    def cumulated(self, age: float) -> float:
        """Return the hazard cumulated up to an age, linear within a bin."""
        hazard = self.hazard
        if age < FIRST_BIN_S:
            return hazard[1] * age / FIRST_BIN_S
        at = int(log(age / FIRST_BIN_S) * _PER_LOG) + 1
        if at >= NUM_BINS:
            return hazard[NUM_BINS]
        start = _EDGES[at]
        return hazard[at] + (hazard[at + 1] - hazard[at]) * (age - start) / (_EDGES[at + 1] - start)


class Survival:
    """The model of one cache: what is likely to be continued, and when."""

    def __init__(self) -> None:
        self.curves = [Curve() for _ in range(LEFT + 1)]
        self.learn(0.0)
        self.num_observed = 0
        self.notices: deque[Any] = deque(maxlen=NOTICES_MAX)
        self.num_notices = 0
        self._num_new = 0

    def notice(self, request: Any) -> None:
        """Tell the queues that something is different with a request now."""
        self.notices.append(request)
        self.num_notices += 1

    def begin(self, kind: int, touched: float) -> None:
        """Wait for a request of a kind that was touched then."""
        waiting = self.curves[kind].waiting
        tick = int(touched / TICK_S)
        waiting[tick] = waiting.get(tick, 0) + 1

    def forget(self, kind: int, touched: float) -> None:
        """Wait no more for a request, and learn nothing from it."""
        waiting = self.curves[kind].waiting
        tick = int(touched / TICK_S)
        waiting[tick] -= 1
        if not waiting[tick]:
            del waiting[tick]

    def moved(self, kind: int, before: float, touched: float) -> None:
        """Go on waiting for a request from when it was touched again."""
        if int(before / TICK_S) != int(touched / TICK_S):
            self.forget(kind, before)
            self.begin(kind, touched)

    def continued(self, kind: int, age: float, now: float) -> None:
        """Learn that a request of a kind was continued after ``age`` seconds."""
        self.curves[kind].continued[_bin(age)] += 1.0
        self._observed(now)

    def lost(self, kind: int, age: float, now: float) -> None:
        """Learn that a request waited for ``age`` seconds, and no more is known."""
        self.curves[kind].lost[_bin(age)] += 1.0
        self._observed(now)

    def hazard(self, kind: int, age: float, within_s: float) -> float:
        """Return the expected number of continuations in the next ``within_s``, given the age."""
        curve = self.curves[kind]
        return curve.cumulated(age + within_s) - curve.cumulated(age)

    def chance(self, kind: int, age: float, within_s: float) -> float:
        """Return the probability of being continued in the next ``within_s``, given the age."""
        return 1.0 - exp(-self.hazard(kind, age, within_s))

    def age_by(self, kind: int, age: float, share: float) -> float:
        """Return the age by which ``share`` of those that will still come back have done so."""
        curve = self.curves[kind]
        before = curve.cumulated(age)
        ever = 1.0 - exp(before - curve.hazard[NUM_BINS])
        if ever <= 0.0:
            return inf
        target = before - log(1.0 - share * ever)
        for at in range(NUM_BINS):
            if curve.hazard[at + 1] >= target:
                step = curve.hazard[at + 1] - curve.hazard[at]
                part = (target - curve.hazard[at]) / step if step else 1.0
                return max(age, _EDGES[at] + part * (_EDGES[at + 1] - _EDGES[at]))
        return inf

    def learn(self, now: float) -> None:
        """Work the hazards out of what was observed."""
        self._num_new = 0
        lost = [curve.lost_by(now) for curve in self.curves]
        pooled = Curve()
        kinds = [curve.continued for curve in self.curves[:NUM_KINDS]]
        pooled.continued = _sums(kinds)
        prior = pooled.rates(_sums(lost[:NUM_KINDS]), None)
        for curve, lost_of_it in zip(self.curves, lost, strict=True):
            curve.hazard = _cumulated(curve.rates(lost_of_it, prior))

    def _observed(self, now: float) -> None:
        self.num_observed += 1
        self._num_new += 1
        if self._num_new >= LEARN_EVERY + self.num_observed // LEARN_EVERY:
            self.learn(now)


def _sums(rows: list[list[float]]) -> list[float]:
    return [sum(column, 0.0) for column in zip(*rows, strict=True)]


@lru_cache(maxsize=256)  # all kinds that wait are asked about the same ages, one after another
def _bin(age: float) -> int:
    if age < FIRST_BIN_S:
        return 0
    return min(int(log(age / FIRST_BIN_S) * _PER_LOG) + 1, NUM_BINS - 1)


def _cumulated(rates: list[float]) -> list[float]:
    steps = [-log(1.0 - rate) if rate < _RATE_MAX else _STEP_MAX for rate in rates]
    return [*accumulate(steps, initial=0.0)]


_EDGES = [0.0, *(FIRST_BIN_S * BIN_RATIO**number for number in range(NUM_BINS))]
