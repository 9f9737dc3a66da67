"""Compile Triton kernels for GPUs that are not here, and say what came out.

Under TRITON_INTERPRET everything that ``triton.jit`` touches, Triton's own library included, becomes
an interpreted function that cannot be compiled; so a child process without that variable does the
compiling. One child serves the whole test session: it imports torch once, takes a request a line
and answers with a line. It writes nothing but Triton's own cache.

What is read: the PTX for the widths of loads and stores of global memory, and what cuobjdump, which
comes with Triton, says of the cubin: registers, shared memory, and the stack, which Triton's
kernels use for nothing but spilled registers.
"""

import atexit
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parent.parent.parent
# A100; H100 and H200; B200.
ARCHES: Final = (80, 90, 100)
ACCESS: Final = re.compile(
    r"\b(ld|st)\.(?:relaxed\.|volatile\.|weak\.)*global(?:\.[A-Za-z_]\w*(?:::\w+)*)*?"
    r"(?:\.v(\d))?\.[bfsu](\d+)\s"
)


@dataclass(frozen=True, slots=True)
class Compiled:
    """What the compiler made of a kernel.

    load_bits, store_bits: widths of the accesses to global memory that are in the PTX, each one
                           once, of one thread: 128 is the widest before sm_100.
    """

    ptx: str
    registers: int
    spill_bytes: int
    shared_bytes: int

    @property
    def load_bits(self) -> set[int]:
        """Widths of the loads from global memory."""
        return self._access_bits("ld")

    @property
    def store_bits(self) -> set[int]:
        """Widths of the stores to global memory."""
        return self._access_bits("st")

    def _access_bits(self, kind: str) -> set[int]:
        found = ACCESS.findall(self.ptx)
        return {int(count or 1) * int(bits) for what, count, bits in found if what == kind}


def compile_for(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, object],
    arch: int,
    **options: object,
) -> Compiled:
    """Compile a kernel for one of ARCHES.

    kernel:     what ``triton.jit`` made of a function of a module that can be imported.
    signature:  the type of each argument that is not a constexpr, as Triton spells it: ``*bf16``,
                ``i32``; with ``:16`` behind it when it is divisible by 16, as the pointer of
                a tensor is, and as Triton finds out by itself at a launch.
    constexprs: the value of each of the others, None for an argument that is absent.
    options:    of the launch: num_warps, num_stages. FMA fusion is off unless said otherwise.
    Raises AssertionError, with the compiler's message, when it does not compile.
    """
    request = {
        "module": kernel.fn.__module__,
        "name": kernel.fn.__name__,
        "signature": dict(signature),
        "constexprs": dict(constexprs),
        "arch": arch,
        "options": {"enable_fp_fusion": False, **options},
    }
    return _compile(json.dumps(request))


@cache
def _compile(request: str) -> Compiled:
    child = _child()
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(request + "\n")
    child.stdin.flush()
    line = child.stdout.readline()
    assert line, f"the compiling process ended with {child.wait()}"
    answer: dict[str, Any] = json.loads(line)
    assert "error" not in answer, answer["error"]
    return Compiled(**answer)


@cache
def _child() -> "subprocess.Popen[str]":
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.kernels.compiled"],
        cwd=ROOT,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(_end, child)
    return child


def _end(child: "subprocess.Popen[str]") -> None:
    with child:  # closes its input, at which it ends, and waits
        pass


def _answer(request: dict[str, Any]) -> dict[str, object]:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(request["module"]), request["name"])
    constexprs: dict[str, object] = request["constexprs"]
    types = dict.fromkeys(constexprs, "constexpr") | request["signature"]
    missing = set(kernel.arg_names) ^ set(types)
    if missing:
        return {
            "error": f"{request['name']}: arguments that are unknown or have no type: {missing}"
        }
    # Triton wants the types in the order of the arguments.
    signature = {name: types[name].removesuffix(":16") for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if types[name].endswith(":16")
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constexprs, attrs=aligned)
    target = GPUTarget("cuda", request["arch"], 32)
    made = triton.compile(source, target=target, options=request["options"])
    registers, stack, shared = _resources(made.asm["cubin"])
    return {
        "ptx": made.asm["ptx"],
        "registers": registers,
        "spill_bytes": stack,
        # The cubin says only what is static; Triton's is given at the launch.
        "shared_bytes": max(shared, made.metadata.shared),
    }


def _resources(cubin: bytes) -> tuple[int, int, int]:
    import triton

    # The path is the same from Triton 3.2 to 3.9; where a build has none, CUDA's is in PATH.
    beside = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    tool = str(beside) if beside.exists() else "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", said)
    assert found is not None, said
    registers, stack, shared, local = map(int, found.groups())
    return registers, stack + local, shared


def _serve() -> None:
    # Compilers print; what they print must not be taken for an answer.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        from triton.compiler import CompilationError

        try:
            answer = _answer(json.loads(line))
        except (
            CompilationError,
            RuntimeError,
            ValueError,
            TypeError,
            AttributeError,
            OSError,
        ) as error:
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    _serve()
