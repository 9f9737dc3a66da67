"""The settings of the file tiers, and the rules between them."""

import os
from collections.abc import Iterator
from typing import Annotated

import msgspec

from respkv.config.kinds import KIB, MIB, Choice, Count, Kind, Size, size_text
from respkv.errors import ConfigError

TIER_BYTES_MIN = 8 * MIB  # a few segments and two checkpoints
SEGMENTS_MIN = 4


class FileSettings(
    msgspec.Struct,
    kw_only=True,
    frozen=True,
    forbid_unknown_fields=True,
    rename=lambda name: name.replace("_", "-"),
):
    """What is kept in files below memory, where, and when it gets there."""

    nvme_path: Annotated[
        str, Kind(about="Directory of the nvme tier, on a fast local device; empty means none.")
    ] = ""
    nvme_bytes: Annotated[
        int,
        Size(about="Most bytes that all files of the nvme tier may take together; from 8mb on."),
    ] = 0
    nvme_depth: Annotated[
        int, Count(about="Reads and writes that the nvme tier has in flight.", least=1, most=1024)
    ] = 32
    nvme_engine: Annotated[
        str,
        Choice(
            about="How the nvme tier does its I/O; auto is io_uring where the system lets it.",
            words=("auto", "io_uring", "threads"),
        ),
    ] = "auto"
    disk_path: Annotated[
        str, Kind(about="Directory of the disk tier, on any file system; empty means none.")
    ] = ""
    disk_bytes: Annotated[
        int,
        Size(about="Most bytes that all files of the disk tier may take together; from 8mb on."),
    ] = 0
    disk_codec: Annotated[
        str,
        Choice(
            about="Lossless codec of the disk tier; what it does not shrink is stored raw.",
            words=("zstd", "lz4", "raw"),
        ),
    ] = "zstd"
    segment_bytes: Annotated[
        int,
        Size(
            about=(
                "Bytes of one log segment, from 1mb to a quarter of the tier;"
                " 0 means a 16th of the tier, 1mb to 256mb."
            )
        ),
    ] = 0
    durability: Annotated[
        str,
        Choice(
            about=(
                "What an answered put survives unless it or its namespace says otherwise: nothing"
                " for sure, a crash of the server, or a power cut."
            ),
            words=("memory", "written", "durable"),
            runtime=True,
        ),
    ] = "memory"
    promote: Annotated[
        str,
        Choice(
            about="Which read brings a value of a file tier back into memory to stay.",
            words=("second", "first", "never"),
            runtime=True,
        ),
    ] = "second"
    dirty_high: Annotated[
        int,
        Count(
            about="Share of memory in values that no file has, above which large puts wait.",
            unit="%",
            least=1,
            most=100,
            runtime=True,
        ),
    ] = 50
    dirty_low: Annotated[
        int,
        Count(
            about="Share of memory in values that no file has, down to which they are written.",
            unit="%",
            most=100,
            runtime=True,
        ),
    ] = 40
    move_bytes_max: Annotated[
        int, Size(about="Most bytes on their way between the tiers at once.", least=64 * KIB)
    ] = 64 * MIB
    checkpoint_interval: Annotated[
        int,
        Count(
            about="Longest time between two checkpoints of a file tier's index.",
            unit="seconds",
            least=1,
            most=86_400,
        ),
    ] = 30

    @property
    def has_files(self) -> bool:
        """Whether there is a file tier."""
        return bool(self.nvme_path or self.disk_path)

    def file_tiers(self) -> Iterator[tuple[str, str, int]]:
        """Yield name, directory and bytes of each file tier, the fastest first."""
        for name, path, nbytes in (
            ("nvme", self.nvme_path, self.nvme_bytes),
            ("disk", self.disk_path, self.disk_bytes),
        ):
            if path:
                yield name, path, nbytes

    def check_files(self) -> None:
        """Raise ConfigError when these settings do not go together."""
        _check_pair("nvme", self.nvme_path, self.nvme_bytes)
        _check_pair("disk", self.disk_path, self.disk_bytes)
        if self.nvme_path and self.disk_path:
            nvme, disk = os.path.realpath(self.nvme_path), os.path.realpath(self.disk_path)
            if nvme == disk:
                raise ConfigError(
                    f"disk-path = {self.disk_path!r}: it is nvme-path, too;"
                    " every tier needs a directory of its own"
                )
        for name, _, nbytes in self.file_tiers():
            if self.segment_bytes * SEGMENTS_MIN > nbytes:
                raise ConfigError(
                    f"segment-bytes = {self.segment_bytes}: accepted are values"
                    f" up to a quarter of {name}-bytes, {nbytes // SEGMENTS_MIN}"
                )
        if 0 < self.segment_bytes < MIB:
            raise ConfigError(
                f"segment-bytes = {self.segment_bytes}: accepted are 0, and values from 1mb on"
            )
        if self.dirty_low > self.dirty_high:
            raise ConfigError(
                f"dirty-low = {self.dirty_low}: accepted are values"
                f" up to dirty-high, {self.dirty_high}"
            )
        if self.durability != "memory" and not self.has_files:
            raise ConfigError(
                f"durability = {self.durability!r}: it needs a file tier; set nvme-path or disk-path"
            )


def _check_pair(name: str, path: str, nbytes: int) -> None:
    if path and not nbytes:
        raise ConfigError(f"{name}-path = {path!r}: it needs {name}-bytes, the most it may take")
    if nbytes and not path:
        raise ConfigError(f"{name}-bytes = {nbytes}: it needs {name}-path, a directory")
    if path and nbytes < TIER_BYTES_MIN:
        raise ConfigError(
            f"{name}-bytes = {nbytes}: accepted are values from {size_text(TIER_BYTES_MIN)} on"
        )
