"""Size classes: spacing, alignment and what they waste."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from respkv.tiers.sizes import SizeClasses, class_bytes, slab_shape, slot_bytes

UNIT = 64 << 10
MIB = 1 << 20


@given(st.integers(0, 1 << 42))
def test_a_class_is_the_smallest_that_fits_and_wastes_at_most_a_sixteenth(payload: int) -> None:
    size = class_bytes(payload)
    assert size >= payload
    assert class_bytes(size) == size
    assert size - payload < max(64, payload / 16) or payload < 448
    assert payload <= 448 or class_bytes(payload - 1) <= size


@pytest.mark.parametrize("bits", range(9, 42))
def test_powers_of_two_are_classes(bits: int) -> None:
    assert class_bytes(1 << bits) == 1 << bits


def test_there_are_sixteen_classes_to_a_doubling() -> None:
    sizes = {class_bytes(payload) for payload in range(MIB + 1, 2 * MIB + 1, 1024)}
    assert len(sizes) == 16


@given(st.integers(0, 1 << 42))
def test_slots_are_aligned(payload: int) -> None:
    nbytes = slot_bytes(payload)
    assert nbytes >= payload + 64
    assert nbytes % (4096 if nbytes >= 65536 else 64) == 0


@given(st.integers(448, 1 << 30), st.integers(16, 1 << 20))
def test_slabs_keep_their_limits(payload: int, num_units: int) -> None:
    slot = slot_bytes(payload)
    units, slots = slab_shape(slot, unit_bytes=UNIT, num_units=num_units)
    assert slots >= 1
    assert slot * slots <= units * UNIT < slot * slots + UNIT
    assert slots == 1 or units * UNIT <= min(16 * MIB, num_units * UNIT // 16)


@pytest.mark.parametrize("arena", [256 * MIB, 1 << 30, 24 << 30, 1 << 40], ids=str)
@pytest.mark.parametrize("payload", [MIB, 4 * MIB, 32 * MIB], ids=str)
def test_pages_waste_at_most_two_percent(payload: int, arena: int) -> None:
    assert class_bytes(payload) == payload
    units, slots = slab_shape(slot_bytes(payload), unit_bytes=UNIT, num_units=arena // UNIT)
    assert 1 - slots * payload / (units * UNIT) <= 0.02


def test_sizes_remembered_are_bounded() -> None:
    classes = SizeClasses[object](unit_bytes=UNIT, num_units=1 << 20)
    for payload in range(20_000):
        assert classes.find(payload) is classes.by_size[payload]
    assert len(classes.by_size) <= 4096
