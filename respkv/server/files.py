"""The file tiers of a server: made from its settings, recovered before it listens."""

import logging
import resource
import shutil
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Literal, cast

import anyio
import anyio.to_thread

from respkv.config import Config
from respkv.config.kinds import size_text
from respkv.engine.files import open_files
from respkv.engine.mover import Mover
from respkv.engine.prefetcher import prefetching
from respkv.errors import CacheError
from respkv.server import run_marks
from respkv.server.page_specs import PageSpecs, make_ready
from respkv.server.schema_files import SchemaFiles
from respkv.server.state import Server, admission_of, moves_of, prefetch_of
from respkv.tiers.file_tier import FileTier
from respkv.tiers.nvme import open_nvme
from respkv.tiers.record import Level

logger = logging.getLogger(__name__)

NOTICE = 20


def check_directories(config: Config) -> None:
    """Raise CacheError unless every tier's directory is there, or its parent is."""
    for name, text, _ in config.file_tiers():
        path = Path(text)
        if path.exists() and not path.is_dir():
            raise CacheError(f"{name}-path {path}: it is a file; a directory is needed")
        if not path.exists() and not path.absolute().parent.is_dir():
            raise CacheError(
                f"{name}-path {path}: there is no {path.absolute().parent} to make it in"
            )


@asynccontextmanager
async def using_files(server: Server) -> AsyncIterator[None]:
    """Keep values in files, too, while the block runs; without file tiers, do nothing.

    What files hold is recovered before the block; after it what only memory holds is written to
    them, within ``shutdown-timeout``.
    Raises TierError when a directory is in use, or cannot be used.
    """
    config = server.config
    if not config.has_files:
        yield
        return
    if not server.is_embedded:
        _allow_files()
    tiers = _make_tiers(config, PageSpecs(server.cache.namespaces))
    schema_files = SchemaFiles(server.cache.namespaces, tiers, server.cache.accounts)
    began_s = anyio.current_time()
    places = [(name, path) for name, path, _ in config.file_tiers()]
    marks = await anyio.to_thread.run_sync(run_marks.read_marks, places)
    stale = run_marks.stale(marks)

    async def started(mover: Mover) -> None:
        for tier in tiers:
            # It pins the memory, which takes 0.1 s for each GiB of small pages. Nothing is in
            # flight now, as has to be.
            await anyio.to_thread.run_sync(tier.device.register, server.arena.view)
        schemas = await schema_files.load()
        await make_ready(schemas)
        for schema in schemas:
            for page_bytes in schema.piece_sizes:
                if page_bytes <= server.cache.slabs.payload_bytes_max:
                    server.cache.slabs.add_class(page_bytes)
                else:
                    logger.warning(
                        "pages of namespace %r have %d bytes and never fit; raise maxmemory",
                        schema.namespace.decode(errors="replace"),
                        page_bytes,
                    )

    server.cache.default_level = Level[config.durability.upper()]
    server.cache.copies.admission.mode = admission_of(config)
    async with open_files(
        server.cache, tiers, moves_of(config), started=started, stale=stale
    ) as mover:
        server.mover, server.schema_files, server.file_tiers = mover, schema_files, tiers
        server.events.file_tiers = tuple(tier.name for tier in tiers)
        mark = run_marks.next_mark(marks, server.clock.wall_ms)
        await run_marks.put_mark(server.cache.copies, tiers, stale, mark)
        _tell(server, anyio.current_time() - began_s)
        async with prefetching(server.cache, mover, prefetch_of(config)) as server.prefetcher:
            yield
        num_before, began_s = _num_written(tiers), anyio.current_time()
    num_written, seconds = _num_written(tiers) - num_before, anyio.current_time() - began_s
    logger.log(NOTICE, "stopped: %d values written in %.2f s", num_written, seconds)


def _num_written(tiers: Sequence[FileTier]) -> int:
    return sum(tier.stats.writes for tier in tiers)


def _allow_files() -> None:
    """Raise the limit of open files: a tier of a terabyte has 4,000 segments."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _make_tiers(config: Config, specs: PageSpecs) -> list[FileTier]:
    tiers: list[FileTier] = []
    if config.nvme_path:
        engine = cast(Literal["auto", "io_uring", "threads"], config.nvme_engine)
        nvme = open_nvme(
            config.nvme_path,
            capacity_bytes=config.nvme_bytes,
            segment_bytes=config.segment_bytes,
            depth=config.nvme_depth,
            engine=engine,
            checkpoint_interval_s=config.checkpoint_interval,
            spec_of=partial(specs.of, "nvme"),
        )
        tiers.append(nvme)
    if config.disk_path:
        codec = cast(Literal["zstd", "lz4", "raw"], config.disk_codec)
        # Its codec needs numpy, which a server without this tier is spared.
        from respkv.tiers.disk import open_disk

        disk = open_disk(
            config.disk_path,
            capacity_bytes=config.disk_bytes,
            segment_bytes=config.segment_bytes,
            codec=codec,
            checkpoint_interval_s=config.checkpoint_interval,
            spec_of=partial(specs.of, "disk"),
        )
        tiers.append(disk)
    return tiers


def _tell(server: Server, seconds: float) -> None:
    """Log what there is and what was found."""
    for (_, path, nbytes), tier in zip(server.config.file_tiers(), server.file_tiers, strict=True):
        stats = tier.stats
        logger.log(
            NOTICE,
            "tier %s in %s (%s%s), up to %s: recovered %d values, %d bytes%s",
            tier.name,
            path,
            tier.device.engine,
            ", direct" if tier.device.is_direct else "",
            size_text(nbytes),
            stats.recovered,
            stats.live_bytes,
            f"; skipped {stats.skipped_damaged} damaged" if stats.skipped_damaged else "",
        )
        total = shutil.disk_usage(path).total
        if total < nbytes:
            logger.warning(
                "%s-bytes is %s, but the file system of %s has %d bytes: it will be full before",
                tier.name,
                size_text(nbytes),
                path,
                total,
            )
    logger.log(NOTICE, "recovered %d keys in %.2f s", len(server.cache.entries), seconds)
