"""Have the kernel refuse a system call to this process and its children, as containers do.

Cannot be undone, so it is for processes that a test starts.
"""

import ctypes
import struct

_SET_NO_NEW_PRIVS, _SET_SECCOMP, _FILTER = 38, 22, 2
_LOAD, _IF_EQUAL, _IF_ANY_BIT, _RETURN = 0x20, 0x15, 0x45, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_libc = ctypes.CDLL(None, use_errno=True)


def refuse(number: int, error: int, *, argument: int = 0, bits: int = 0) -> None:
    """Let a system call fail; with ``bits``, only where that argument has one of them."""
    _refuse(number, error, (_IF_ANY_BIT, argument, bits) if bits else None)


def refuse_equal(number: int, error: int, *, argument: int, value: int) -> None:
    """Let a system call fail where that argument is ``value``."""
    _refuse(number, error, (_IF_EQUAL, argument, value))


def _refuse(number: int, error: int, only: tuple[int, int, int] | None) -> None:
    steps = [(_LOAD, 0, 0, 0), (_IF_EQUAL, 0, 3 if only else 1, number)]
    if only:
        test, argument, value = only
        steps += [(_LOAD, 0, 0, 16 + 8 * argument), (test, 0, 1, value)]
    steps += [(_RETURN, 0, 0, _ERRNO | error), (_RETURN, 0, 0, _ALLOW)]
    code = b"".join(struct.pack("=HBBI", *step) for step in steps)
    memory = ctypes.create_string_buffer(code)
    program = ctypes.create_string_buffer(struct.pack("@HP", len(steps), ctypes.addressof(memory)))
    assert _libc.prctl(_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert _libc.prctl(_SET_SECCOMP, _FILTER, program) == 0
