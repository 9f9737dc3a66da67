"""What to raise before somebody asks: the bets, and which kinds of them pay. No I/O, no clock.

There are four reasons to believe that a cold page will be asked for, the ``Source``s:

* match:   it was just matched, and a match is nearly always followed by a get.
* chain:   it stands behind the last page that was matched, and most of those who came so far went
           on to it: hits of a page by hits of the page in front say how many.
* hint:    a client said when the conversation it belongs to goes on.
* session: so many of the requests like the one it belongs to were continued at such an age
           (survival.py) that this one is likely to be, within AHEAD_S.

Each page that is raised is a ``Bet``: won when it is used, lost when it leaves memory before that or
is still unused after the source's ``horizon_s``. What is bet at a time is bounded in bytes.

The rule, for each source by itself (``Gate``). It is *on* while at least OFF_SHARE of its bets are
won, the last WINDOW of them weighing most. Below that, once there are EVIDENCE of them, it is *off*
for a rest. Then comes a *trial*: TRIAL pages are noted as if they were raised, which costs nothing,
and if ON_SHARE of them are used in time the source is on again, else off for twice the rest. Between
the two shares is the hysteresis, so that a source on the border does not change all the time. WINDOW
bets won since it is on make the next rest the shortest again. That is a bandit whose arms are raising
and leaving it, which explores by looking: what a page would have done is seen without raising it.
"""

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Literal, NamedTuple

from respkv.engine.entry import Entry

Mode = Literal["auto", "on", "off"]

OFF_SHARE, ON_SHARE = 0.3, 0.5
EVIDENCE, WINDOW, TRIAL = 16, 64, 24
REST_S, REST_S_MAX = 10.0, 1280.0
AHEAD_S = 10.0  # a session that comes back within this is one to be raised for
CHANCE_MIN = 0.2  # below that nothing is raised
SUCCESSORS_MAX = 16  # pages behind the last that was matched
FAN_OUT_MAX = 16  # behind a page with more pages behind it, none is likely
WAIT_S = 0.1  # until a bet is won, while nothing is known
WAIT_WEIGHT = 1 / 16
IDLE_S_MIN = 0.5
BETS_MAX = 16_384


class Source(Enum):
    """Why a page is raised ahead; see the module. The value is its name in INFO."""

    MATCH = "match"
    CHAIN = "chain"
    HINT = "hint"
    SESSION = "session"

    @property
    def horizon_s(self) -> float:
        """How long a page may go unused before the bet is lost."""
        return _HORIZONS_S[self]


_HORIZONS_S = {Source.MATCH: 20.0, Source.CHAIN: 60.0, Source.HINT: 60.0, Source.SESSION: 60.0}
_TRUSTED = (Source.MATCH, Source.HINT)  # from the start; the others have to prove themselves first


class State(Enum):
    """Of a gate."""

    ON = auto()
    OFF = auto()
    TRIAL = auto()


@dataclass(frozen=True, slots=True)
class Limits:
    """How much is raised ahead.

    mode:      ``on`` follows every source whatever its gate says.
    bytes_max: of pages that were raised, or are on their way, and nobody has used yet.
    """

    mode: Mode = "auto"
    bytes_max: int = 32 << 20


class Tally:
    """What a source has done so far."""

    __slots__ = ("num_lost", "num_missed", "num_raised", "num_won", "raised_bytes", "wasted_bytes")

    def __init__(self) -> None:
        self.num_raised = 0
        self.num_won = 0
        self.num_lost = 0
        self.num_missed = 0  # there was no room, no time, or no need any more
        self.raised_bytes = 0
        self.wasted_bytes = 0


class Gate:
    """Whether bets of one source are made; the rule is in the module.

    wait_s: the running mean of the time from a bet until it was won.
    """

    def __init__(self, *, is_trusted: bool) -> None:
        self.state = State.ON if is_trusted else State.TRIAL
        self.wait_s = WAIT_S
        self.rest_s = REST_S
        self.num_switched = 0
        self._until = 0.0  # of a rest
        self._won = self._settled = 0.0  # weighted; of a trial plain counts
        self._num_tried = 0  # bets of this trial
        self._num_settled = self._num_won_since = 0  # since it is in this state

    @property
    def share(self) -> float:
        """The share of bets won lately; a half while nothing is known."""
        return (self._won + 1.0) / (self._settled + 2.0)

    def look(self, now: float) -> State:
        """Return the state it is in by now."""
        if self.state is State.OFF and now >= self._until:
            self._become(State.TRIAL)
        return self.state

    def tried(self) -> bool:
        """Count one more bet of a trial; False: it has enough."""
        assert self.state is State.TRIAL
        self._num_tried += 1
        return self._num_tried <= TRIAL

    def forget_tried(self) -> None:
        """Note that the open bets of a trial will never end."""
        self._num_tried = self._num_settled

    def settle(self, *, is_won: bool, is_trial: bool, now: float) -> None:
        """Learn how a bet ended. One of before the state changed does not count."""
        if is_trial != (self.state is State.TRIAL) or self.state is State.OFF:
            return
        if self.state is State.ON:
            self._won *= 1.0 - 1.0 / WINDOW
            self._settled *= 1.0 - 1.0 / WINDOW
        self._won += is_won
        self._settled += 1.0
        self._num_settled += 1
        if is_trial:
            if self._num_settled >= TRIAL:
                self._end_trial(now)
            return
        self._num_won_since += is_won
        if self._num_won_since >= WINDOW:
            self.rest_s = REST_S
        if self._num_settled >= EVIDENCE and self._won < OFF_SHARE * self._settled:
            self._rest(now)

    def _end_trial(self, now: float) -> None:
        if self._won >= ON_SHARE * self._settled:
            self._become(State.ON)
        else:
            self._rest(now)

    def _rest(self, now: float) -> None:
        self._until = now + self.rest_s
        self.rest_s = min(2 * self.rest_s, REST_S_MAX)
        self._become(State.OFF)

    def _become(self, state: State) -> None:
        self.state = state
        self.num_switched += 1
        self._won = self._settled = 0.0
        self._num_tried = self._num_settled = self._num_won_since = 0


class Bet:
    """A page that was raised ahead, or of a trial: only noted.

    hits:  of the entry when the bet was made.
    until: when it is lost.
    """

    __slots__ = ("entry", "hits", "is_trial", "made_at", "nbytes", "source", "until")

    def __init__(self, entry: Entry, source: Source, now: float, until: float, trial: bool) -> None:
        self.entry = entry
        self.source = source
        self.nbytes = entry.nbytes
        self.hits = entry.hits
        self.made_at = now
        self.until = until
        self.is_trial = trial

    @property
    def is_won(self) -> bool:
        """Whether its page was used since."""
        return self.entry.hits > self.hits


class Book:
    """The bets that are open, and what became of the others.

    nbytes: of the pages of open bets, trials not counted; never more than ``limits.bytes_max``
            when a bet is made.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.nbytes = 0
        self.gates = {each: Gate(is_trusted=each in _TRUSTED) for each in Source}
        self.tallies = {each: Tally() for each in Source}
        self._open: OrderedDict[Entry, Bet] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def __contains__(self, entry: Entry) -> bool:
        return entry in self._open

    @property
    def bets(self) -> Collection[Bet]:
        """Those that are open."""
        return self._open.values()

    def find(self, entry: Entry) -> Bet | None:
        """Return the open bet on a page."""
        return self._open.get(entry)

    def is_on(self, source: Source, now: float) -> bool:
        """Whether pages are raised, or looked at for a trial, for this source now."""
        if self.limits.mode == "auto":
            return self.gates[source].look(now) is not State.OFF
        return self.limits.mode == "on"

    def fits(self, nbytes: int) -> bool:
        """Whether the budget has room for one more page."""
        return self.nbytes + nbytes <= self.limits.bytes_max and len(self._open) < BETS_MAX

    def chance(self, source: Source) -> float:
        """Return the share of a source's bets that are won."""
        return self.gates[source].share

    def idle_s(self, source: Source, chance: float, wait_s: float = 0.0) -> float:
        """Return for how long a page in memory must have been unused to make room for one.

        What was not used for a time will most likely not be for as long again; so it has to give
        when the page that comes is expected sooner, in proportion to its chance.

        wait_s: until the page is expected, beyond what is usual for the source.
        """
        wait = self.gates[source].wait_s + wait_s
        return max(IDLE_S_MIN, wait / max(chance, CHANCE_MIN))

    def begin(self, entry: Entry, source: Source, now: float, *, wait_s: float = 0.0) -> Bet | None:
        """Make a bet on a cold page. Returns None when there is none to make.

        wait_s: until it is expected. The bet may be one of a trial: nothing is raised then.
        """
        if entry in self._open or not self.is_on(source, now):
            return None
        gate = self.gates[source]
        is_trial = self.limits.mode == "auto" and gate.state is State.TRIAL
        if is_trial:
            if len(self._open) >= BETS_MAX or not gate.tried():
                return None
        elif not self.fits(entry.nbytes):
            self.tallies[source].num_missed += 1
            return None
        bet = Bet(entry, source, now, now + wait_s + source.horizon_s, is_trial)
        self._open[entry] = bet
        if not is_trial:
            tally = self.tallies[source]
            tally.num_raised += 1
            tally.raised_bytes += bet.nbytes
            self.nbytes += bet.nbytes
        return bet

    def cancel(self, bet: Bet) -> None:
        """Take a bet back: its page could not be raised, which says nothing about the source."""
        if self.put_off(bet):
            self.tallies[bet.source].num_missed += not bet.is_trial

    def put_off(self, bet: Bet) -> bool:
        """Take a bet back that will be made again later; False: it is not open any more."""
        if not self._close(bet):
            return False
        if not bet.is_trial:
            self.tallies[bet.source].num_raised -= 1
            self.tallies[bet.source].raised_bytes -= bet.nbytes
        return True

    def left(self, entry: Entry, now: float) -> None:
        """A page has left memory, or has gone: its bet is won or lost by now.

        One of a trial goes on: the page was not raised, or not for this.
        """
        bet = self._open.get(entry)
        if bet is not None and (not bet.is_trial or entry.position < 0 or bet.is_won):
            self.settle(bet, now)

    def settle(self, bet: Bet, now: float) -> None:
        """Close a bet: won if its page was used, else lost."""
        if not self._close(bet):
            return
        gate, tally = self.gates[bet.source], self.tallies[bet.source]
        if bet.is_won:
            gate.wait_s += (max(0.0, now - bet.made_at) - gate.wait_s) * WAIT_WEIGHT
        if not bet.is_trial:
            tally.num_won += bet.is_won
            tally.num_lost += not bet.is_won
            tally.wasted_bytes += 0 if bet.is_won else bet.nbytes
        gate.settle(is_won=bet.is_won, is_trial=bet.is_trial, now=now)

    def sweep(self, now: float) -> None:
        """Close all bets that are won, and those whose time is over."""
        for bet in [bet for bet in self._open.values() if bet.is_won or now >= bet.until]:
            self.settle(bet, now)

    def used(self, run: Iterable[Entry], now: float) -> None:
        """Close the bets on pages that were just matched."""
        if self._open:
            for entry in run:
                bet = self._open.get(entry)
                if bet is not None and bet.is_won:
                    self.settle(bet, now)

    def clear(self) -> None:
        """Forget all open bets: everything has gone."""
        for bet in list(self._open.values()):
            self.cancel(bet)
        for gate in self.gates.values():
            if gate.state is State.TRIAL:
                gate.forget_tried()

    def check(self) -> None:
        """Assert that the bytes add up."""
        bets = self._open.values()
        assert self.nbytes == sum(bet.nbytes for bet in bets if not bet.is_trial)
        assert all(entry is bet.entry for entry, bet in self._open.items())
        for tally in self.tallies.values():
            assert min(tally.num_raised, tally.raised_bytes) >= 0
        for source, tally in self.tallies.items():
            num_open = sum(bet.source is source and not bet.is_trial for bet in bets)
            assert tally.num_raised == tally.num_won + tally.num_lost + num_open

    def _close(self, bet: Bet) -> bool:
        if self._open.get(bet.entry) is not bet:
            return False
        del self._open[bet.entry]
        self.nbytes -= 0 if bet.is_trial else bet.nbytes
        return True


class Successor(NamedTuple):
    """A page, and the chance that it is used."""

    entry: Entry
    chance: float


def successors(last: Entry) -> Iterator[Successor]:
    """Yield the cold pages that most of those who came to a page went on to, nearest first.

    A page's chance is the share of the hits in front of it that came to it as well.
    """
    chance = 1.0
    for _ in range(SUCCESSORS_MAX):
        children = last.children
        if not children or len(children) > FAN_OUT_MAX:
            return
        following = max(children, key=_hits)
        chance *= min(1.0, (following.hits + 0.5) / (last.hits + 1.0))
        if chance < CHANCE_MIN:
            return
        if following.is_cold:
            yield Successor(following, chance)
        last = following


def chain_of(last: Entry | None, pages_max: int) -> list[Entry]:
    """Return a page and the pages in front of it, first to last, the last ``pages_max`` of them."""
    pages: list[Entry] = []
    while last is not None and len(pages) < pages_max:
        pages.append(last)
        last = last.parent
    return pages[::-1]


def _hits(entry: Entry) -> int:
    return entry.hits
