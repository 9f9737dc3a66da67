"""Lanes whose copies happen when a test says so; until then their memory has to stay as it is."""

from collections.abc import Callable

import anyio

from respkv.tiers.gpu_lanes import Ending, Way


class LateEnding:
    """An event that the test sets off."""

    def __init__(self) -> None:
        self.is_over = False
        self.error: RuntimeError | None = None
        self.num_looks = 0

    def query(self) -> bool:
        self.num_looks += 1
        if self.error is not None:
            raise self.error
        return self.is_over


class LateLanes:
    """One lane each way, done in order.

    todo:   what was launched and has not been done, by way.
    error:  raised by the next launch.
    """

    is_quick = True

    def __init__(self) -> None:
        self.todo: dict[Way, list[tuple[Callable[[], None], LateEnding]]] = {"in": [], "out": []}
        self.error: RuntimeError | None = None
        self.num_waits_for_users = 0

    def launch(self, way: Way, work: Callable[[], None]) -> Ending:
        error, self.error = self.error, None
        if error is not None:
            raise error
        ending = LateEnding()
        self.todo[way].append((work, ending))
        return ending

    def wait_for_users(self) -> None:
        self.num_waits_for_users += 1

    async def launched(self, way: Way) -> None:
        """Wait until something is on its way."""
        with anyio.fail_after(60):
            while not self.todo[way]:  # noqa: ASYNC110 (who launches does not say so)
                await anyio.sleep(0.001)

    def finish(self, way: Way) -> bool:
        """Do the oldest work of a lane; False when there is none."""
        if not self.todo[way]:
            return False
        work, ending = self.todo[way].pop(0)
        work()
        ending.is_over = True
        return True

    def fail(self, way: Way, error: RuntimeError) -> None:
        """Have the oldest work of a lane fail."""
        _, ending = self.todo[way].pop(0)
        ending.error = error

    def finish_all(self) -> None:
        """Do everything that was launched."""
        while self.finish("in") or self.finish("out"):
            pass
