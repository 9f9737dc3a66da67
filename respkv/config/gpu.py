"""The settings of the gpu tier."""

import re
from dataclasses import dataclass
from typing import Annotated, Any

from respkv.config.files import FileSettings
from respkv.config.kinds import MIB, Choice, Kind, Size, size_text
from respkv.errors import ConfigError

GPU_BYTES_MIN = MIB
_DEVICE = re.compile(r"cpu|cuda(:[0-9]{1,2})?", re.ASCII)


@dataclass(frozen=True, kw_only=True)
class Device(Kind):
    """A device as torch names it."""

    @property
    def accepted(self) -> str:
        """What may be written."""
        return "cuda, cuda:0 and so on, cpu"

    def read(self, value: object) -> Any:
        """Return the name in lower case."""
        name = value.lower() if isinstance(value, str) else ""
        return name if _DEVICE.fullmatch(name) else None


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
    gpu_device: Annotated[str, Device(about="Device of the gpu tier; cpu is for tests.")] = "cuda:0"
    gpu_promote: Annotated[
        str,
        Choice(
            about="Which read of a page, since it was put, copies it to the gpu tier.",
            words=("second", "first", "never"),
            runtime=True,
        ),
    ] = "second"

    def check_gpu(self) -> None:
        """Raise ConfigError when the tier is too small to be one."""
        if 0 < self.gpu_bytes < GPU_BYTES_MIN:
            raise ConfigError(
                f"gpu-bytes = {self.gpu_bytes}: accepted are 0, and values"
                f" from {size_text(GPU_BYTES_MIN)} on"
            )
