"""The settings of the gpu tier."""

import re
from typing import Annotated

from respkv.config.files import FileSettings
from respkv.config.kinds import MIB, Choice, Kind, Size, size_text
from respkv.errors import ConfigError

GPU_BYTES_MIN = MIB
_DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,3})?")


class GpuSettings(FileSettings, kw_only=True, frozen=True, forbid_unknown_fields=True):
    """What is kept on a GPU above memory."""

    gpu_bytes: Annotated[
        int,
        Size(
            about=(
                "Memory of the gpu tier, taken from the device at start; from 1mb on, 0 means no"
                " such tier."
            )
        ),
    ] = 0
    gpu_device: Annotated[
        str, Kind(about="Device of the gpu tier: cuda:0 and so on; cpu is for tests.")
    ] = "cuda:0"
    gpu_promote: Annotated[
        str,
        Choice(
            about="Which read of a page, since it was put, copies it to the gpu tier.",
            words=("second", "first", "never"),
            runtime=True,
        ),
    ] = "second"

    def check_gpu(self) -> None:
        """Raise ConfigError when these settings cannot be."""
        if 0 < self.gpu_bytes < GPU_BYTES_MIN:
            raise ConfigError(
                f"gpu-bytes = {self.gpu_bytes}: accepted are 0, and values"
                f" from {size_text(GPU_BYTES_MIN)} on"
            )
        if not _DEVICE.fullmatch(self.gpu_device):
            raise ConfigError(
                f"gpu-device = {self.gpu_device!r}: accepted are cuda, cuda:0 and so on, and cpu"
            )
