"""What a kernel is bound by, as far as its registers and shared memory tell; launches, repeated."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch

from respkv.kernels import launch

WARP: Final = 32
REGISTERS_STEP: Final = 8  # registers of a thread are given in steps of so many
PROGRAM_SHARED_BYTES: Final = 1024  # of shared memory, which the system takes for each program
PROGRAMS_MAX: Final = 32  # on a multiprocessor


class _Watched:
    """A kernel that notes what Triton made of it for a launch."""

    def __init__(self, kernel: Any, made: list[Any]) -> None:
        self._kernel, self._made = kernel, made

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        launched = self._kernel[grid]

        def call(*args: object, **named: object) -> None:
            self._made.append(launched(*args, **named))

        return call


@contextmanager
def _in_place_of_run(other: Callable[..., None]) -> Iterator[None]:
    run = launch.run
    launch.run = other
    try:
        yield
    finally:
        launch.run = run


def launches_of(call: Callable[[], object]) -> Callable[[], None]:
    """Make a call, and return one that repeats its launches, on the same tensors, and nothing else.

    So what the processor does before a launch, such as listing thousands of tensors, is left out.
    """
    run, launches = launch.run, list[tuple[Any, ...]]()
    # What the call holds is held as long as its launches: kernels find tensors by address, too.
    held = call, launches

    def note(*args: Any, **named: Any) -> None:
        launches.append((args, named))
        run(*args, **named)

    def again() -> None:
        for args, named in held[1]:
            launch.run(*args, **named)

    with _in_place_of_run(note):
        call()
    return again


def limits(call: Callable[[], object], device: torch.device) -> str:
    """Say what bounds the kernels that a call launches; "" where they are not compiled ones."""
    if device.type != "cuda":
        return ""
    run, made = launch.run, list[Any]()

    def watch(kernel: Any, *args: Any, **named: Any) -> None:
        run(_Watched(kernel, made), *args, **named)

    with _in_place_of_run(watch):
        call()
    gpu = torch.cuda.get_device_properties(device)
    return "; ".join(dict.fromkeys(_describe(kernel, gpu) for kernel in made))


def _describe(kernel: Any, gpu: Any) -> str:
    registers = getattr(kernel, "n_regs", None)
    if not registers:
        return f"{kernel.metadata.name}: registers unknown"
    shared, warps = kernel.metadata.shared, kernel.metadata.num_warps
    programs, bound = occupancy(
        registers=registers,
        shared_bytes=shared,
        warps=warps,
        registers_max=getattr(gpu, "regs_per_multiprocessor", 65536),
        shared_bytes_max=getattr(gpu, "shared_memory_per_multiprocessor", 232448),
        warps_max=gpu.max_threads_per_multi_processor // WARP,
    )
    share = 100 * programs * warps * WARP // gpu.max_threads_per_multi_processor
    spills = getattr(kernel, "n_spills", 0)
    return (
        f"{kernel.metadata.name}: {registers} registers, {warps} warps, {shared} B shared"
        f"{f', {spills} spills' if spills else ''}: {programs} programs an SM, {share} % of its"
        f" warps, bound by {bound}"
    )


def occupancy(
    *,
    registers: int,
    shared_bytes: int,
    warps: int,
    registers_max: int,
    shared_bytes_max: int,
    warps_max: int,
) -> tuple[int, str]:
    """Return how many programs a multiprocessor holds at once, and what holds no more of them."""
    each = -(-registers // REGISTERS_STEP) * REGISTERS_STEP * WARP * warps
    room = {
        "warps": warps_max // warps,
        "registers": registers_max // each,
        "shared memory": shared_bytes_max // (shared_bytes + PROGRAM_SHARED_BYTES),
        "programs": PROGRAMS_MAX,
    }
    bound = min(room, key=lambda name: room[name])
    return room[bound], bound
