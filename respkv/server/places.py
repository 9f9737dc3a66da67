"""Where a page is, in which tiers, and how long bringing it takes."""

from typing import TYPE_CHECKING, Final, NamedTuple

from respkv.engine.entry import Entry
from respkv.kernels.container import codec_name
from respkv.server.loads import is_cold
from respkv.tiers.format import HEADER_BYTES

if TYPE_CHECKING:
    from respkv.engine.gpu_copies import GpuCopy
    from respkv.server.session import Session

CPU_LETTER: Final = "c"
# Loading estimate of the CPU tier until a measurement replaces it: one get, then memory speed.
LOAD_US_FIXED: Final = 20
LOAD_BYTES_PER_US: Final = 3000


def gpu_copy(session: "Session", entry: Entry) -> "GpuCopy | None":
    """Return an entry's copy in the gpu tier, or None."""
    gpu = session.cache.gpu
    return gpu.find(entry) if gpu.is_on else None


def tier_of(session: "Session", entry: Entry) -> tuple[str, str]:
    """Return name and letter of the fastest tier that has an entry's bytes."""
    mover, copy = session.server.mover, gpu_copy(session, entry)
    if copy is not None:
        tier = session.cache.gpu.tier
        return tier.name, tier.letter
    if mover is None or not is_cold(entry):
        return "cpu", CPU_LETTER
    file_tier = mover.tier_of(entry.records[0])
    return file_tier.name, file_tier.letter


def letters_of(session: "Session", entries: list[Entry]) -> str:
    """Return a letter for the fastest tier of each entry."""
    cache = session.cache
    if not cache.gpu.is_on and not cache.copies.num_cold:
        return CPU_LETTER * len(entries)
    return "".join([tier_of(session, entry)[1] for entry in entries])


def tiers_of(session: "Session", entry: Entry) -> list[str]:
    """Return the names of all tiers that have an entry's bytes, the fastest first."""
    mover = session.server.mover
    names = [] if gpu_copy(session, entry) is None else [session.cache.gpu.tier.name]
    names += [] if is_cold(entry) else ["cpu"]
    return names + [mover.tier_of(record).name for record in entry.records if mover is not None]


class Stored(NamedTuple):
    """How a tier has an entry's bytes: the name of the codec, and how many they are there."""

    codec: str
    nbytes: int


def stored_in(session: "Session", entry: Entry) -> dict[str, Stored]:
    """Return how each tier that has an entry's bytes stores them, the fastest first."""
    places: dict[str, Stored] = {}
    if (copy := gpu_copy(session, entry)) is not None:
        places[session.cache.gpu.tier.name] = Stored(copy.form.name, copy.form.nbytes)
    if not is_cold(entry):
        places["cpu"] = Stored("raw", entry.nbytes)
    if (mover := session.server.mover) is not None:
        for record in entry.records:
            nbytes = record.stored_bytes - HEADER_BYTES
            places[mover.tier_of(record).name] = Stored(codec_name(record.codec), nbytes)
    return places


def load_us(session: "Session", run: list[Entry], parts: list[Entry] | None = None) -> int:
    """Estimate how long it takes to bring entries and send them.

    run: pages of one prompt; all but the last are taken to be as long as the first.
    """
    if not run:
        return 0
    nbytes = (len(run) - 1) * run[0].nbytes + run[-1].nbytes
    if parts:
        nbytes += sum([part.nbytes for part in parts])
        run = run + parts
    sending_us = LOAD_US_FIXED + nbytes // LOAD_BYTES_PER_US
    cold = [entry for entry in run if is_cold(entry)] if session.cache.copies.num_cold else []
    return sending_us + (_raise_us(session, cold) if cold else 0)


def _raise_us(session: "Session", cold: list[Entry]) -> int:
    """Estimate how long reading cold entries takes, those from the gpu tier beside the others."""
    mover = session.server.mover
    assert mover is not None
    near = {entry for entry in cold if _is_near(session, entry)}
    gpu = session.cache.gpu
    gpu_us = gpu.tier.load_us(sum(entry.nbytes for entry in near)) if near else 0
    return max(gpu_us, mover.load_us([entry for entry in cold if entry not in near]))


def _is_near(session: "Session", entry: Entry) -> bool:
    copy = gpu_copy(session, entry)
    return copy is not None and copy.form.is_lossless
