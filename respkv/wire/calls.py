"""Calls of one command that came together, and reads whose framing is known from an earlier one.

The client of a cache says the same again and again with other keys of the same length. So a read
has nearly always the framing of another one of its size, and can be taken apart in two steps: one
unpack at known places, and one comparison of all that stands between the arguments. It is exact,
because what stands there has to be, byte for byte, what announces arguments of these lengths; a
read that is anything else is parsed as if there had been none before.
"""

from collections.abc import Iterator, Sequence
from struct import Struct
from typing import Any, overload

# Of a read whose framing is kept, and of all that are, names included; one takes about 100 bytes.
ARGS_MAX, ARGS_MAX_OF_ALL = 512, 32 * 1024
NAME_BYTES_MAX = 64  # of a command; longer ones are no command's, and would be kept in full
SIZES_MAX = 512  # that are known at a time
_FIRST, _FOURTH = 8, 11  # letters of the name, if it is short and there are less than ten arguments
_BETWEEN, _ARGS = slice(0, None, 2), slice(1, None, 2)  # of the parts of a read, by turns


class Calls(Sequence[list[Any]]):
    """Calls of one command with as many arguments each: a sequence of commands, if need be.

    number: of the calls. width: arguments of one, without the name.
    args:   of all calls, one after the other; each is bytes.
    """

    __slots__ = ("args", "name", "number", "width")

    def __init__(self, name: bytes, width: int, number: int, args: Sequence[bytes]) -> None:
        self.name = name
        self.width = width
        self.number = number
        self.args = args

    def __len__(self) -> int:
        return self.number

    def __iter__(self) -> Iterator[list[Any]]:
        # Of a list, which says how many are left (``operator.length_hint``): loads count by that.
        return iter(list(map(self._call, range(self.number))))

    @overload
    def __getitem__(self, at: int) -> list[Any]: ...
    @overload
    def __getitem__(self, at: slice) -> list[list[Any]]: ...
    def __getitem__(self, at: int | slice) -> list[Any] | list[list[Any]]:
        places = range(self.number)[at]
        return self._call(places) if isinstance(places, int) else list(map(self._call, places))

    def _call(self, at: int) -> list[Any]:
        return [self.name, *self.args[at * self.width : (at + 1) * self.width]]


class _Framing:
    """A read of so many calls whose arguments have these lengths.

    unpack:  returns by turns what stands between two arguments, and an argument.
    between: what has to stand there, before the first and behind the last argument as well.
    """

    __slots__ = ("between", "name", "nbytes", "number", "unpack", "width")

    def __init__(self, name: bytes, lengths: tuple[int, ...], number: int) -> None:
        head = b"*%d\r\n$%d\r\n%b\r\n" % (len(lengths) + 1, len(name), name)
        between, places = [b""], ""
        for _ in range(number):
            between[-1] += head
            for length in lengths:
                between[-1] += b"$%d\r\n" % length
                places += f"{len(between[-1])}s{length}s"
                between.append(b"\r\n")
        struct = Struct(f"{places}{len(between[-1])}s")
        self.nbytes = struct.size
        self.unpack = struct.unpack_from
        self.between = tuple(between)
        self.name = name
        self.width = len(lengths)
        self.number = number


class Framings:
    """What reads looked like, by two letters of their first command's name and their size.

    All connections of an event loop share it. A framing is learnt when its size comes again, so
    that sizes which do not come again cost next to nothing.
    """

    def __init__(self) -> None:
        self._forget()

    def take(self, data: bytes | bytearray, nbytes: int) -> Calls | None:
        """Return the calls that ``data[:nbytes]`` is; None: it is something else, or new."""
        if nbytes <= _FOURTH:
            return None
        framing = self._known[data[_FIRST] ^ data[_FOURTH]].get(nbytes)
        if framing is None:
            return None
        parts = framing.unpack(data)
        if parts[_BETWEEN] != framing.between:
            return None
        return Calls(framing.name, framing.width, framing.number, parts[_ARGS])

    def learn(self, data: bytes | bytearray, nbytes: int, commands: Sequence[list[bytes]]) -> None:
        """Note that ``data[:nbytes]`` was these commands, whatever bytes stood between them."""
        if nbytes <= _FOURTH:
            return
        letters = data[_FIRST] ^ data[_FOURTH]
        if nbytes not in self._known[letters]:
            if self._num_sizes == SIZES_MAX:
                self._forget()
            self._num_sizes += 1
            self._known[letters][nbytes] = None
            return
        self._known[letters][nbytes] = None
        framing = _framing_of(commands)
        if framing is None or framing.nbytes != nbytes:  # such as a length with a zero in front
            return
        self._num_args += framing.number * (framing.width + 1)
        if self._num_args > ARGS_MAX_OF_ALL:
            self._forget()
        self._known[letters][nbytes] = framing

    def _forget(self) -> None:
        self._known: list[dict[int, _Framing | None]] = [{} for _ in range(256)]
        self._num_sizes = self._num_args = 0


def _framing_of(commands: Sequence[list[bytes]]) -> _Framing | None:
    """Return the framing of these commands; None: they are not calls of one, or too many."""
    first, number = commands[0], len(commands)
    if number * len(first) > ARGS_MAX or len(commands[-1]) != len(first):
        return None
    if len(first[0]) > NAME_BYTES_MAX:
        return None
    lengths = list(map(len, first))
    for each in commands[1:]:
        if each[0] != first[0] or list(map(len, each)) != lengths:
            return None
    return _Framing(first[0], tuple(lengths[1:]), number)
