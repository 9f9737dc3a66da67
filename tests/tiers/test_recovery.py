"""Recovery: what was promised is there, what is damaged is not, nothing old comes back."""

import errno
import random
from collections.abc import Callable
from dataclasses import replace

import anyio
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from respkv.errors import TierError
from respkv.tiers.batch import Bury, Change
from respkv.tiers.checkpoint import CHECKPOINT_NAMES
from respkv.tiers.record import Level
from respkv.tiers.recovery import Recovered
from respkv.tiers.segment_head import SEGMENT_HEAD_BYTES, segment_name
from tests.tiers.memory_device import MemoryDevice
from tests.tiers.small_log import (
    BOOT,
    Given,
    SmallLog,
    metas,
    page,
    page_key,
    recover_files,
    string,
)

LAYOUTS = [pytest.param(4096, id="nvme"), pytest.param(64, id="disk")]


def payload(number: int, nbytes: int = 1500) -> bytes:
    return random.Random(number).randbytes(nbytes)


def filled(alignment: int = 4096, *, acked_all: bool = True) -> SmallLog:
    """A log with pages 1..8 and keys k0..k3, one of them written twice and one deleted."""
    log = SmallLog(alignment=alignment, acked_all=acked_all)
    for first in (1, 5):
        log.batch([page(number, payload(number), number) for number in range(first, first + 4)])
    log.batch([string(b"k%d" % number, payload(number, 90), 10 + number) for number in range(4)])
    log.batch([string(b"k0", payload(20, 90), 20)], [Bury(b"k0", 10)])
    log.batch(notes=[Bury(b"k1", 11)])
    return log


def same(recovered: Recovered, log: SmallLog) -> bool:
    recovered.segments.check([record for _, record in recovered.found])
    records = {meta.key: record for meta, record in recovered.found}
    for meta, record in recovered.found:
        assert log.read(record) == log.read(log.live[meta.key][1])
    assert all(
        (records[key].offset, records[key].segment) == (record.offset, record.segment)
        for key, (_, record) in log.live.items()
        if key in records
    )
    return metas(recovered.found) == {key: meta for key, (meta, _) in log.live.items()}


def test_an_empty_directory_is_new() -> None:
    log = SmallLog()
    recovered = log.recover(files={})
    assert recovered.is_new
    assert recovered.superblock is None
    assert not recovered.found
    assert (recovered.next_sequence, recovered.next_generation) == (1, 1)


@pytest.mark.parametrize("alignment", LAYOUTS)
def test_after_a_clean_stop_the_checkpoint_says_all(alignment: int) -> None:
    log = filled(alignment)
    log.batch([string(b"m", b"in memory", 30, Level.MEMORY)])
    log.stop()
    recovered = log.recover(boot_id="another")
    assert same(recovered, log)
    assert recovered.counts.records == len(log.live)
    assert recovered.counts.replayed == 0
    assert recovered.next_sequence == log.sequence
    assert not recovered.messages
    states = {segment.state for segment in recovered.segments.segments.values()}
    assert "open" in states


@pytest.mark.parametrize("alignment", LAYOUTS)
def test_without_a_checkpoint_all_is_replayed(alignment: int) -> None:
    log = filled(alignment)
    recovered = log.recover()
    assert same(recovered, log)
    assert recovered.counts.replayed > 8
    assert (recovered.counts.damaged, recovered.counts.torn) == (0, 0)
    assert recovered.next_sequence > log.sequence
    assert recovered.next_generation > 20
    assert [note for _, _, note in recovered.notes] == [Bury(b"k0", 10), Bury(b"k1", 11)]
    assert all(segment.state != "open" for segment in recovered.segments.segments.values())


@pytest.mark.parametrize("alignment", LAYOUTS)
def test_what_is_newer_than_the_checkpoint_is_replayed(alignment: int) -> None:
    log = filled(alignment)
    log.checkpoint()
    log.batch([page(9, payload(9), 30)], [Bury(b"k2", 12)])
    change = log.live[b"k3"][0]._replace(expires_ms=1_800_000_000_000, parent=b"p")
    log.batch(notes=[Change(change)])
    recovered = log.recover()
    assert same(recovered, log)
    assert recovered.counts.replayed == 1
    assert metas(recovered.found)[b"k3"].expires_ms == 1_800_000_000_000
    assert b"k2" not in metas(recovered.found)


def test_the_newer_checkpoint_is_used_and_the_other_when_it_is_damaged() -> None:
    log = filled()
    log.checkpoint("checkpoint.b")
    log.batch([page(9, payload(9), 30)])
    log.checkpoint("checkpoint.a")
    log.batch([page(10, payload(10), 31)])
    assert log.recover().checkpoint == "checkpoint.a"
    log.files["checkpoint.a"][100] ^= 1
    recovered = log.recover()
    assert recovered.checkpoint == "checkpoint.b"
    assert recovered.counts.replayed == 2
    assert same(recovered, log)


def test_without_any_whole_checkpoint_only_pages_are_kept() -> None:
    log = filled()
    for name in CHECKPOINT_NAMES:
        log.checkpoint(name)
        log.files[name][-4000] ^= 255
        log.files[name][100] ^= 1
    recovered = log.recover()
    assert set(metas(recovered.found)) == {page_key(number) for number in range(1, 9)}
    assert recovered.counts.dropped_mutable == 3
    assert any("dropped" in message for message in recovered.messages)


def test_a_damaged_final_checkpoint_is_an_unclean_stop() -> None:
    log = filled()
    log.checkpoint("checkpoint.b", is_clean=True)
    log.batch([string(b"k3", b"newer", 40, Level.MEMORY)])
    log.batch([string(b"k2", b"newer", 41)], [Bury(b"k2", 40)])
    log.stop()
    log.files["checkpoint.a"][60] ^= 4
    recovered = log.recover()
    found = metas(recovered.found)
    assert found[b"k2"].generation == 41
    assert b"k3" not in found
    assert recovered.counts.dropped_mutable == 1


KEPT = [
    # level, same boot, kept
    (Level.MEMORY, True, False),
    (Level.MEMORY, False, False),
    (Level.WRITTEN, True, True),
    (Level.WRITTEN, False, False),
    (Level.DURABLE, True, True),
    (Level.DURABLE, False, True),
]


@pytest.mark.parametrize("in_checkpoint", [True, False])
@pytest.mark.parametrize(("level", "same_boot", "kept"), KEPT)
def test_after_a_crash_only_promised_values_are_kept(
    level: Level, same_boot: bool, kept: bool, in_checkpoint: bool
) -> None:
    log = SmallLog()
    log.batch([string(b"k", b"value", 1, level), page(1, b"page", 2)])
    if in_checkpoint:
        log.checkpoint()
    recovered = log.recover(boot_id=BOOT if same_boot else "another")
    assert set(metas(recovered.found)) == {page_key(1), *([b"k"] if kept else [])}
    assert recovered.counts.dropped_mutable == (not kept)


def test_an_unknown_boot_counts_as_another_one() -> None:
    log = SmallLog()
    log.batch([string(b"k", b"value", 1, Level.WRITTEN)])
    assert not log.recover(boot_id="").found


def test_what_was_flushed_is_void() -> None:
    log = filled()
    log.checkpoint()
    log.batch([page(9, payload(9), 30)])
    log.void_below = log.sequence
    log.superblock(is_clean=False)
    log.batch([page(10, payload(10), 31)])
    recovered = log.recover()
    assert set(metas(recovered.found)) == {page_key(10)}
    assert recovered.void_below == log.void_below
    recovered.segments.check([record for _, record in recovered.found])


def test_a_copy_that_was_moved_is_found_where_it_went() -> None:
    log = filled()
    log.checkpoint()
    old = log.live[page_key(1)][1]
    before = (old.segment, old.offset)
    log.batch([page(1, payload(1), 1)])
    recovered = log.recover()
    assert same(recovered, log)
    record = {meta.key: record for meta, record in recovered.found}[page_key(1)]
    assert (record.segment, record.offset) != before


def test_a_bury_holds_for_a_copy_that_is_written_behind_it() -> None:
    log = SmallLog()
    log.batch([string(b"k", b"value", 5)])
    log.batch(notes=[Bury(b"k", 5)])
    log.batch([string(b"k", b"value", 5)])
    assert not log.recover().found


def test_an_older_generation_written_later_does_not_win() -> None:
    log = SmallLog()
    log.batch([string(b"k", b"newer", 6)])
    log.batch([string(b"k", b"older", 5)])
    assert metas(log.recover().found)[b"k"].generation == 6


def test_batches_of_an_earlier_use_of_a_segment_are_not_seen() -> None:
    log = SmallLog(segment_bytes=16384)
    segment = log.open_segment()
    log.batch([page(1, payload(1), 1)])
    log.batch([page(2, payload(2), 2)])
    log.checkpoint()
    for _, record in log.live.values():
        log.table.discard(record)
    log.live.clear()
    log.table.seal(segment)
    log.table.release(segment)
    log.open_segment(segment)
    log.batch([page(3, payload(3), 3)])
    recovered = log.recover()
    assert set(metas(recovered.found)) == {page_key(3)}
    assert recovered.counts.stale == 2


@pytest.mark.parametrize("alignment", LAYOUTS)
def test_a_batch_inside_a_payload_is_not_seen(alignment: int) -> None:
    log = SmallLog(alignment=alignment)
    log.batch([string(b"k", b"value", 1)])
    file = bytes(log.files[segment_name(0)])
    copied = file[SEGMENT_HEAD_BYTES : SEGMENT_HEAD_BYTES + 8192]
    forged = copied.replace(b"value", b"other")
    start = log.table.segments[0].offset
    # The payload stands where a batch could start, and the batch it is in cannot be read.
    log.batch([page(2, bytes(alignment - (64 + 256) % alignment) + forged, 2)])
    log.batch([page(3, payload(3), 3)])
    for at in (0, 64, 128):
        log.files[segment_name(0)][start + at] ^= 1
    recovered = log.recover()
    assert set(metas(recovered.found)) == {b"k", page_key(3)}
    assert recovered.counts.damaged == 1
    assert log.read(recovered.found[0][1]) == b"value"


@pytest.mark.parametrize("alignment", LAYOUTS)
def test_a_damaged_value_costs_no_other(alignment: int) -> None:
    log = filled(alignment)
    record = log.live[page_key(2)][1]
    log.files[segment_name(record.segment)][record.offset + 700] ^= 8
    recovered = log.recover()
    assert set(metas(recovered.found)) == set(log.live) - {page_key(2)}
    assert (recovered.counts.damaged, recovered.counts.torn) == (1, 0)


def test_a_damaged_value_does_not_bring_back_the_one_it_replaced() -> None:
    log = SmallLog()
    log.batch([string(b"k", b"older", 5)])
    log.batch([string(b"k", b"newer", 6)])
    log.batch([page(1, b"", 7)])
    record = log.live[b"k"][1]
    log.files[segment_name(0)][record.offset + 64] ^= 1
    assert set(metas(log.recover().found)) == {page_key(1)}


def test_a_torn_value_leaves_the_one_it_was_to_replace() -> None:
    log = SmallLog()
    log.batch([string(b"k", b"older", 5)])
    log.batch([string(b"k", b"newer", 6)])
    record = log.live[b"k"][1]
    log.files[segment_name(0)][record.offset + 64] ^= 1
    recovered = log.recover()
    assert metas(recovered.found)[b"k"].generation == 5
    assert (recovered.counts.damaged, recovered.counts.torn) == (0, 1)


@pytest.mark.parametrize("at", [0, 8, 16, 30, 60, 70, 100])
@pytest.mark.parametrize("alignment", LAYOUTS)
def test_a_flipped_bit_in_a_head_loses_no_note(alignment: int, at: int) -> None:
    log = filled(alignment)
    starts = [log.table.segments[0].offset]
    log.batch(notes=[Bury(b"k2", 12)])
    log.files[segment_name(0)][starts[0] + at] ^= 2
    recovered = log.recover()
    assert same(recovered, log)
    assert recovered.counts.damaged == 0


def test_where_notes_were_lost_older_mutable_records_go() -> None:
    log = filled()
    start = log.table.segments[0].offset
    log.batch(notes=[Bury(b"k2", 12)])
    end = log.table.segments[0].offset
    log.batch([string(b"later", b"kept", 50)])
    log.batch([string(b"last", b"kept", 51)])
    log.files[segment_name(0)][start:end] = bytes(end - start)
    recovered = log.recover()
    kept = {page_key(number) for number in range(1, 9)} | {b"later", b"last"}
    assert set(metas(recovered.found)) == kept
    assert recovered.counts.damaged == 1
    # After a power cut it may as well have been lost before anyone relied on it.
    assert b"k3" in metas(log.recover(boot_id="another").found)


def test_what_was_lost_before_it_was_acknowledged_costs_nothing() -> None:
    log = filled(acked_all=False)
    start = log.table.segments[0].offset
    log.batch(notes=[Bury(b"k2", 12)])
    end = log.table.segments[0].offset
    log.batch([string(b"later", b"kept", 50)])
    log.files[segment_name(0)][start:end] = bytes(end - start)
    recovered = log.recover()
    assert {b"k2", b"k3", b"later"} <= set(metas(recovered.found))
    assert recovered.counts.torn == 1


@pytest.mark.parametrize("copy", [0, 2048])
def test_one_copy_of_the_head_of_a_segment_is_enough(copy: int) -> None:
    log = filled()
    log.files[segment_name(0)][copy : copy + 64] = b"x" * 64
    assert same(log.recover(), log)


def test_a_segment_without_a_head_costs_its_records_only() -> None:
    log = filled()
    log.open_segment()
    log.batch([page(20, b"there", 60)])
    log.stop()
    log.files[segment_name(0)][:4096] = b"x" * 4096
    recovered = log.recover()
    assert set(metas(recovered.found)) == {page_key(20)}
    assert recovered.counts.lost == len(log.live) - 1


def test_a_segment_that_was_just_made_is_free() -> None:
    log = filled()
    log.files[segment_name(1)] = bytearray(log.segment_bytes)
    log.files[segment_name(2)] = bytearray()
    recovered = log.recover()
    assert same(recovered, log)
    assert [each.state for each in recovered.segments.segments.values()] == [
        "sealed",
        "free",
        "free",
    ]


@pytest.mark.parametrize("alignment", LAYOUTS)
def test_any_truncation_costs_only_what_is_behind_it(alignment: int) -> None:
    log = filled(alignment)
    whole = bytes(log.files[segment_name(0)])
    last, recovered = 0, log.recover()
    for cut in range(0, log.table.segments[0].offset + 4096, 4096):
        files = {name: bytes(data) for name, data in log.files.items()}
        files[segment_name(0)] = whole[:cut]
        recovered = log.recover(files=files)
        assert len(recovered.found) >= min(last, 10)
        last = len(recovered.found)
        for meta, record in recovered.found:
            assert log.read(record)[: meta.payload_bytes]
            assert record.offset + record.stored_bytes <= cut
    assert same(recovered, log)


def test_a_file_that_was_cut_after_a_clean_stop_costs_what_was_behind_the_cut() -> None:
    log = filled()
    log.stop()
    record = log.live[page_key(5)][1]
    del log.files[segment_name(0)][record.offset :]
    recovered = log.recover()
    assert set(metas(recovered.found)) == {page_key(number) for number in range(1, 5)}
    assert recovered.counts.lost == len(log.live) - 4


class Unreadable(MemoryDevice):
    """Some files fail to be read from some byte on."""

    bad: dict[str, int] = {}  # noqa: RUF012 - replaced, not changed

    async def read(self, name: str, offset: int, into: memoryview) -> None:
        await super().read(name, offset, into)
        if offset + into.nbytes > self.bad.get(name, 1 << 60):
            raise OSError(errno.EIO, "unreadable", name)


@pytest.mark.parametrize("readable_bytes", [0, 4096, 8192])
def test_an_unreadable_segment_costs_its_records_and_is_fenced(readable_bytes: int) -> None:
    log = filled()
    log.open_segment()
    log.batch([page(20, b"there", 60), string(b"later", b"value", 61)])
    device = Unreadable({name: bytes(data) for name, data in log.files.items()})
    device.bad = {segment_name(0): readable_bytes}
    recovered = anyio.run(recover_files, device, log, BOOT)
    assert set(metas(recovered.found)) == {page_key(20)}
    assert recovered.segments.segments[0].state == "fenced"
    assert recovered.counts.dropped_mutable == 1
    assert any("cannot be read" in message for message in recovered.messages)


def test_an_unreadable_checkpoint_is_a_damaged_one() -> None:
    log = filled()
    log.checkpoint("checkpoint.a")
    log.batch([page(9, payload(9), 30)])
    log.checkpoint("checkpoint.b")
    device = Unreadable({name: bytes(data) for name, data in log.files.items()})
    device.bad = {"checkpoint.b": 0}
    recovered = anyio.run(recover_files, device, log, BOOT)
    assert same(recovered, log)
    assert recovered.checkpoint == "checkpoint.a"


def test_an_unreadable_directory_is_an_error() -> None:
    class Gone(MemoryDevice):
        async def names(self) -> list[str]:
            raise OSError(errno.EIO, "gone")

    with pytest.raises(TierError, match="cannot be read"):
        anyio.run(recover_files, Gone(), SmallLog(), BOOT)


CHECKPOINTS = [name.encode() for name in CHECKPOINT_NAMES]
KEYS = [page_key(1), page_key(2), b"k1", b"k2", b"k3"]
steps = st.lists(
    st.one_of(
        st.tuples(st.just("put"), st.sampled_from(KEYS), st.integers(0, 6000)),
        st.tuples(st.just("bury"), st.sampled_from(KEYS), st.just(0)),
        st.tuples(st.just("change"), st.sampled_from(KEYS), st.integers(1, 9)),
        st.tuples(st.just("move"), st.sampled_from(KEYS), st.just(0)),
        st.tuples(st.just("checkpoint"), st.sampled_from(CHECKPOINTS), st.just(0)),
        st.tuples(st.just("reuse"), st.just(b""), st.just(0)),
    ),
    max_size=40,
)


def take_step(log: SmallLog, payloads: dict[bytes, bytes], step: tuple[str, bytes, int]) -> None:
    kind, key, number = step
    there = log.live.get(key)
    if kind == "put":
        payloads[key] = payload(log.sequence, number)
        made = string(key, payloads[key], log.sequence)
        if key.startswith(b"llama"):
            made = Given(made.meta._replace(kind="kvpage"), made.payload)
        log.batch([made], [Bury(key, there[0].generation)] if there else [])
    elif kind == "bury":
        log.batch(notes=[Bury(key, there[0].generation if there else log.sequence - 1)])
    elif kind == "change" and there:
        log.batch(notes=[Change(there[0]._replace(priority=number, hits=number))])
    elif kind == "move" and there:
        log.batch([Given(there[0], payloads[key])])
    elif kind == "checkpoint":
        log.checkpoint(key.decode())
    elif kind == "reuse":
        reuse(log)


def reuse(log: SmallLog) -> None:
    """Use an empty segment again, if its notes are older than both checkpoints."""
    covered = [log.checkpoints.get(name, 0) for name in CHECKPOINT_NAMES]
    victim = log.table.choose_victim(log.now, may=lambda each: each.noted <= min(covered))
    if victim is not None and not victim.live_records:
        log.table.release(victim)
        log.open_segment(victim)


@settings(max_examples=200, deadline=None)
@given(steps=steps, alignment=st.sampled_from([64, 4096]), damaged=st.integers(0, 2))
def test_any_history_is_recovered(
    steps: list[tuple[str, bytes, int]], alignment: int, damaged: int
) -> None:
    log = SmallLog(alignment=alignment, segment_bytes=16384)
    payloads: dict[bytes, bytes] = {}
    for step in steps:
        take_step(log, payloads, step)
    if damaged < 2 and len(log.checkpoints) == 2:
        log.files[CHECKPOINT_NAMES[damaged]][100] ^= 1
    recovered = log.recover()
    assert same(recovered, log)
    assert recovered.counts.damaged == recovered.counts.torn == recovered.counts.lost == 0
    generations = [meta.generation for meta, _ in log.live.values()]
    assert recovered.next_generation > max([0, *generations])
    assert recovered.next_sequence >= log.sequence
    log.stop()
    assert same(log.recover(), log)


def flips(log: SmallLog) -> st.SearchStrategy[tuple[str, int, int]]:
    def places(name: str) -> st.SearchStrategy[tuple[str, int, int]]:
        size = len(log.files[name])
        if name.startswith("segment"):
            size = log.table.segments[0].offset
        return st.tuples(st.just(name), st.integers(0, size - 1), st.integers(0, 7))

    return st.sampled_from(sorted(log.files)).flatmap(places)


def checked_flip(make: Callable[[], SmallLog], data: st.DataObject) -> None:
    """Flip a bit anywhere: what is found is what was last acknowledged, or is not found."""
    log = make()
    name, at, bit = data.draw(flips(log))
    files = {name: bytearray(content) for name, content in log.files.items()}
    files[name][at] ^= 1 << bit
    recovered = log.recover(files={name: bytes(content) for name, content in files.items()})
    recovered.segments.check([record for _, record in recovered.found])
    for meta, record in recovered.found:
        expected, where = log.live[meta.key]
        assert meta == expected
        assert (record.segment, record.offset) == (where.segment, where.offset)
    lost = set(log.live) - set(metas(recovered.found))
    mutable = {key for key in log.live if key.startswith(b"k")}
    assert len(lost) <= 1 or lost <= mutable or (name.startswith("segment") and len(lost) <= 4)


def acked(log: SmallLog) -> SmallLog:
    """Write what says that all before was acknowledged, as an idle runtime does."""
    log.batch()
    return log


def with_checkpoint() -> SmallLog:
    log = filled()
    log.checkpoint("checkpoint.a")
    log.batch([string(b"k2", payload(33), 33)], [Bury(b"k2", 32)])
    log.checkpoint("checkpoint.b")
    log.batch([string(b"k3", payload(34), 34)], [Bury(b"k3", 33)])
    return acked(log)


def stopped() -> SmallLog:
    log = with_checkpoint()
    log.stop()
    return log


MAKERS = [
    pytest.param(lambda: acked(filled(4096)), id="nvme"),
    pytest.param(lambda: acked(filled(64)), id="disk"),
    pytest.param(with_checkpoint, id="with a checkpoint"),
    pytest.param(stopped, id="stopped"),
]


@pytest.mark.parametrize("make", MAKERS)
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_flipped_bit_is_detected_or_harmless(
    make: Callable[[], SmallLog], data: st.DataObject
) -> None:
    checked_flip(make, data)


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_garbage_anywhere_never_raises(data: st.DataObject) -> None:
    log = with_checkpoint()
    files = {name: bytearray(content) for name, content in log.files.items()}
    for _ in range(data.draw(st.integers(1, 4))):
        name = data.draw(st.sampled_from(sorted(set(files) - {"superblock"})))
        start = data.draw(st.integers(0, len(files[name]) - 1))
        nbytes = data.draw(st.integers(1, 6000))
        stop = min(start + nbytes, len(files[name]))
        files[name][start:stop] = random.Random(start).randbytes(stop - start)
    recovered = log.recover(files={name: bytes(content) for name, content in files.items()})
    recovered.segments.check([record for _, record in recovered.found])


@given(garbage=st.binary(max_size=9000))
@settings(max_examples=60, deadline=None)
def test_files_that_are_garbage_are_refused_or_empty(garbage: bytes) -> None:
    assume(not garbage.startswith(b"respkv"))
    log = filled()
    names = [segment_name(0), *CHECKPOINT_NAMES]
    recovered = log.recover(
        files={**dict.fromkeys(names, garbage), "superblock": bytes(log.files["superblock"])}
    )
    assert not recovered.found
    with pytest.raises(TierError, match="not one of respkv"):
        log.recover(files=dict.fromkeys([*names, "superblock"], garbage))


def test_a_damaged_superblock_keeps_the_pages() -> None:
    log = filled()
    for copy in (40, 4096 + 40):
        log.files["superblock"][copy] ^= 1
    recovered = log.recover()
    assert set(metas(recovered.found)) == {page_key(number) for number in range(1, 9)}
    assert recovered.superblock is None
    assert not recovered.is_new


def test_a_large_value_is_checked_through_a_small_window() -> None:
    big = payload(1, 5_000_000)
    log = SmallLog(segment_bytes=16 << 20)
    log.batch([page(1, big, 1)])
    log.batch([page(2, big, 2)])
    assert same(log.recover(), log)
    log.files[segment_name(0)][4_500_000] ^= 1
    assert set(metas(log.recover().found)) == {page_key(2)}


def test_values_that_were_encoded_are_checked_as_stored() -> None:
    log = SmallLog(alignment=64)
    given_ = page(1, payload(1), 1)
    log.batch([Given(given_.meta, given_.payload, 1, b"encoded")])
    log.batch([page(2, payload(2), 2)])
    recovered = log.recover()
    assert same(recovered, log)
    record = {meta.key: record for meta, record in recovered.found}[page_key(1)]
    assert (record.codec, record.stored_bytes) == (1, 71)
    log.files[segment_name(0)][record.offset + 66] ^= 1
    assert set(metas(log.recover().found)) == {page_key(2)}


def test_a_lost_write_takes_the_copy_that_was_made_of_an_older_value_behind_it() -> None:
    log = SmallLog()
    old = string(b"k", b"old", 1)
    log.batch([old, string(b"other", b"there", 2), page(1, payload(1), 3)])
    before = {name: bytes(data) for name, data in log.files.items()}
    log.batch([string(b"k", b"new", 4)])
    for name, data in before.items():
        log.files[name][:] = data
    # The new value waits for its sync, so reclaim copies the old one.
    log.batch([replace(old, is_copy=True)])
    log.batch([string(b"later", b"there", 5), replace(page(1, payload(1), 3), is_copy=True)])
    recovered = log.recover()
    assert set(metas(recovered.found)) == {page_key(1), b"later"}
    assert recovered.counts.dropped_mutable == 2


@pytest.mark.parametrize("was_used", [False, True])
def test_a_lost_head_of_a_segment_takes_what_may_have_been_replaced_there(was_used: bool) -> None:
    log = SmallLog()
    segment = log.open_segment()
    if was_used:
        log.batch([page(1, payload(1), 1)])
        log.table.discard(log.live.pop(page_key(1))[1])
    log.open_segment()
    log.batch([string(b"k", b"old", 2), page(2, payload(2), 3)])
    file = log.files[segment_name(segment.id)]
    before = bytes(file[:4096]) if was_used else bytes(4096)
    log.table.release(segment)
    log.open_segment(segment)
    log.batch([string(b"k", b"new", 4)])
    file[:4096] = before
    recovered = log.recover()
    assert set(metas(recovered.found)) == {page_key(2)}
    assert recovered.counts.dropped_mutable == 1
    # The machine may have gone down before the head was anywhere, and before anyone relied on it.
    assert set(metas(log.recover(boot_id="another").found)) == {page_key(2), b"k"}


@pytest.mark.parametrize("is_segment_full", [False, True])
def test_a_lost_write_takes_what_it_may_have_replaced_with_it(is_segment_full: bool) -> None:
    """A disk that says a write is done, and never does it, leaves nothing that is damaged."""
    log = SmallLog()
    log.batch([string(b"k", b"old", 1), page(1, payload(1), 2)])
    before = {name: bytes(data) for name, data in log.files.items()}
    log.batch([string(b"k", b"new", 3)])
    for name, data in before.items():
        log.files[name][:] = data
    if is_segment_full:
        log.open_segment()
    log.batch([page(2, payload(2), 4)])
    log.batch([page(3, payload(3), 5)])
    recovered = log.recover()
    assert set(metas(recovered.found)) == {page_key(1), page_key(2), page_key(3)}
    assert recovered.counts.dropped_mutable == 1
