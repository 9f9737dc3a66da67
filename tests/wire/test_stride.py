"""Arguments of equal length are taken as strictly as one by one."""

from hypothesis import given
from hypothesis import strategies as st

from respkv.wire.stride import take_run


def bulks(*args: bytes) -> bytearray:
    return bytearray(b"".join(b"$%d\r\n%b\r\n" % (len(arg), arg) for arg in args))


def test_a_run_ends_with_the_last_whole_argument_of_its_length() -> None:
    keys = [b"%04d" % number for number in range(50)]
    data = bulks(*keys, b"longer")
    assert take_run(data, 0, 100) == (keys, 50 * 10)
    assert take_run(data, 0, 7) == (keys[:7], 70)
    assert take_run(data[:-13], 0, 100) == (keys[:49], 490)
    assert take_run(data, 490, 100) == ([], 490)


def test_what_is_no_run_of_bulks_is_left_alone() -> None:
    for data in (b"", b"$", b"$4", b"$4\r", b"$x\r\n", b"$0\r\n\r\n" * 9, b"$04\r\nabcd\r\n" * 9):
        assert take_run(bytearray(data), 0, 9) == ([], 0)
    assert take_run(bulks(*[b"abcd"] * 3), 0, 9) == ([], 0)


@given(
    st.lists(st.binary(min_size=3, max_size=3), min_size=4, max_size=20),
    st.integers(0, 200),
    st.integers(0, 255),
)
def test_one_wrong_byte_of_framing_ends_the_run(args: list[bytes], at: int, byte: int) -> None:
    data = bulks(*args)
    at %= len(data)
    column = at % 9
    data[at] = byte
    taken, stop = take_run(data, 0, len(args))
    framing = b"$3\r\n???\r\n"
    is_wrong = column not in (4, 5, 6) and framing[column] != byte
    whole = at // 9 if is_wrong else len(args)
    assert stop == len(taken) * 9
    if at >= 9 or not is_wrong:  # a wrong first head may be another right one
        assert len(taken) == (whole if whole >= 4 else 0)
