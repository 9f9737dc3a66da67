"""How a file tier is, and when that changes.

``ok`` serves everything, ``read-only`` serves what it has, ``off`` has nothing. A tier gets worse by
errors in a row, because one alone may concern one place only, and better by a probe alone. Each
change is one line in the log, however many requests meet the fault.
"""

import errno
import logging
from typing import Literal

import anyio

logger = logging.getLogger(__name__)

State = Literal["ok", "read-only", "off"]

WRITE_ERRORS_MAX = 3
READ_ERRORS_MAX = 8
PROBE_S = 1.0  # between two probes of a tier that is not ok
NO_SPACE = frozenset({errno.ENOSPC, errno.EDQUOT})
# What one error proves: the next write would meet it too.
_LASTING = frozenset(
    {errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.ESTALE, errno.EACCES, errno.ENODEV}
)
_ORDER: dict[State, int] = {"ok": 0, "read-only": 1, "off": 2}


class Health:
    """The state of one tier.

    reason: why it is not ok, for INFO; empty while it is.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: State = "ok"
        self.reason = ""
        self._write_errors = 0  # in a row
        self._read_errors = 0
        self._changed = anyio.Event()

    @property
    def can_write(self) -> bool:
        return self.state == "ok"

    @property
    def can_read(self) -> bool:
        return self.state != "off"

    async def change(self) -> None:
        """Wait for the next change of state."""
        await self._changed.wait()

    def worsen(self, state: State, reason: str) -> None:
        """Become ``state``, unless it is as bad already."""
        if _ORDER[state] <= _ORDER[self.state]:
            return
        logger.error("tier %s is %s: %s", self.name, state, reason)
        self._become(state, reason)

    def recover(self) -> None:
        """Be ok again: a probe went through."""
        self._write_errors = self._read_errors = 0
        if self.state != "ok":
            logger.warning("tier %s is ok again; it was %s: %s", self.name, self.state, self.reason)
            self._become("ok", "")

    def write_failed(self, error: OSError) -> None:
        """Count an error of a write, a sync or a new file."""
        self._write_errors += 1
        if error.errno in _LASTING:
            self.worsen("read-only", why(error))
        elif self._write_errors >= WRITE_ERRORS_MAX:
            self.worsen("read-only", f"{self._write_errors} writes in a row failed: {why(error)}")

    def write_succeeded(self) -> None:
        self._write_errors = 0

    def read_failed(self, error: OSError) -> None:
        self._read_errors += 1
        if self._read_errors >= READ_ERRORS_MAX:
            self.worsen("off", f"{self._read_errors} reads in a row failed: {why(error)}")

    def read_succeeded(self) -> None:
        self._read_errors = 0

    def _become(self, state: State, reason: str) -> None:
        self.state, self.reason = state, reason
        self._changed.set()
        self._changed = anyio.Event()


def why(error: OSError) -> str:
    """Return what the system says of an error."""
    return error.strerror or str(error) or type(error).__name__
