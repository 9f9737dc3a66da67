"""A device of aiofiles, through the page cache: for large, slow disks.

aiofiles' own file objects have one position each, which readers would have to share; so it is its
wrapped preadv and pwritev that run here, in the event loop's default executor. asyncio only.
"""

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple, cast

import aiofiles.os

from respkv.tiers.directory import Engine
from respkv.tiers.pool import PoolDevice

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class AioDevice(PoolDevice):
    """Files read and written through aiofiles; ``Device`` says what each method does."""

    engine: Engine = "aiofiles"
    alignment = 64

    async def _call(self, work: Callable[[*Ts], T], *arguments: *Ts) -> T:
        return cast("T", await aiofiles.os.wrap(work)(*arguments))
