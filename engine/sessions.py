"""Hints: what a client knows of a session and no policy can guess, and what became of each.

A hint is an offer, not an order: the answer says whether it is in force, with which value, and why
not. Sessions are known by the SESSION that came with a put or a match (requests.py).
"""

from typing import Literal, NamedTuple

from respkv.engine.cache import Cache
from respkv.engine.demotions import Demotions
from respkv.engine.entry import Entry

Status = Literal["accepted", "clipped", "rejected"]


class Answer(NamedTuple):
    """What became of a wish: the value in force, in the unit of the wish, and why it is that one."""

    status: Status
    value: int
    reason: str


class Hints:
    """The hints that a cache was given. counts: how many were answered in which way."""

    def __init__(self, cache: Cache) -> None:
        self._cache = cache
        self.counts: dict[Status, int] = {}
        self.reset_counters()

    def reset_counters(self) -> None:
        """Count answers from zero."""
        self.counts = {"accepted": 0, "clipped": 0, "rejected": 0}

    def count(self, answer: Answer) -> Answer:
        """Count an answer and return it."""
        self.counts[answer.status] += 1
        return answer

    def end(self, namespace: bytes, session: bytes) -> Answer:
        """Let the pages that only this session used go before all others.

        Returns how many these are.
        """
        requests, accounts = self._cache.requests, self._cache.accounts
        if requests.find(namespace, session) is None:
            return self._unknown(namespace, session)
        pages = self._pages(namespace, session)
        requests.end(session, namespace)
        for page in pages:
            for entry in (page, *(page.parts or ())):
                accounts.requeue(entry)
        reason = self._effect("pages of this session alone go first")
        return self.count(Answer("accepted", len(pages), reason))

    def expect(self, namespace: bytes, session: bytes, ms: int, ms_max: int) -> Answer:
        """Keep a session's pages for its return in ``ms``, or bring them back ahead of it."""
        if self._cache.requests.find(namespace, session) is None:
            return self._unknown(namespace, session)
        in_force = min(ms, ms_max)
        at = self._cache.clock.now + in_force / 1000
        self._cache.requests.expect(session, namespace, at)
        if in_force < ms:
            return self.count(Answer("clipped", in_force, f"expect-max is {ms_max} ms"))
        return self.count(Answer("accepted", ms, self._effect("the session is expected back then")))

    def demote(self, namespace: bytes, session: bytes, demotions: Demotions | None) -> Answer:
        """Take the pages that only this session used out of memory; they stay in files.

        demotions: None without file tiers.
        Returns how many these are.
        """
        if self._cache.requests.find(namespace, session) is None:
            return self._unknown(namespace, session)
        if demotions is None:
            return self.count(Answer("rejected", 0, "this server has no file tier to demote to"))
        if not self._cache.copies.can_write:
            return self.count(Answer("rejected", 0, "no file tier takes values now"))
        pages = self._pages(namespace, session)
        for page in pages:
            demotions.ask(page.parts or ())
        number = demotions.ask(pages)
        return self.count(Answer("accepted", number, "pages of this session alone leave memory"))

    def _effect(self, effect: str) -> str:
        """Say what a hint does, and what does not look at it."""
        policy = self._cache.room.policy
        if policy == "survival":
            return effect
        return f"{effect}; maxmemory-policy {policy} does not look at it, survival does"

    def _pages(self, namespace: bytes, session: bytes) -> list[Entry]:
        """Return the pages that a session used last, without what hangs on them."""
        entries = self._cache.requests.entries_of(session, namespace)
        return [entry for entry in entries if entry.part is None]

    def _unknown(self, namespace: bytes, session: bytes) -> Answer:
        shown, where = (name[:64].decode(errors="replace") for name in (session, namespace))
        reason = (
            f"no page of namespace {where!r} was put or matched with SESSION {shown!r}, or all of "
            "them have gone"
        )
        return self.count(Answer("rejected", 0, reason))
