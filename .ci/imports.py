"""Import every module of the installed respkv, where no extra is installed.

A module whose import needs an extra must live in one of EXTRA_HOMES; it is imported all the same
and may fail only for a package that an extra brings. Anywhere else a failed import is a mistake.
"""

import importlib
import pkgutil
import sys
from collections.abc import Iterator
from pathlib import Path

import respkv

EXTRA_HOMES = (
    *("respkv.kernels.", "respkv.tiers.gpu", "respkv.integrations.", "respkv.cli.screen"),
    *("respkv.server.zmq_events", "respkv.gateway", "respkv.batching", "respkv.paged"),
    *("respkv.semantic", "respkv.simple"),
)
EXTRA_PACKAGES = {
    *("torch", "triton", "transformers", "tokenizers", "safetensors", "rich", "zmq"),
    *("fastapi", "starlette", "uvicorn", "pydantic", "jinja2", "h11", "usearch"),
}


def modules(folder: Path, prefix: str) -> Iterator[str]:
    """Yield the name of every module under a folder, those without __init__.py included."""
    for path in sorted(folder.rglob("*.py")):
        parts = path.relative_to(folder).with_suffix("").parts
        yield ".".join((prefix, *(parts[:-1] if parts[-1] == "__init__" else parts)))


def without_extra(name: str) -> str | None:
    """Import a module; return the package of an extra that it lacks, if it may."""
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing in EXTRA_PACKAGES and name.startswith(EXTRA_HOMES):
            return missing
        raise
    return None


def main() -> int:
    """Import all of them and print what was left out."""
    folder = Path(respkv.__path__[0])
    assert "site-packages" in folder.parts, f"{folder} is not an installed respkv"
    there = EXTRA_PACKAGES & {module.name for module in pkgutil.iter_modules()}
    assert not there, f"an extra is installed here: {there}"
    names = [name for name in modules(folder, "respkv") if name != "respkv.__main__"]
    for part in ("server", "engine", "tiers", "client", "wire", "kernels"):
        assert any(name.startswith(f"respkv.{part}") for name in names), f"no respkv.{part}"
    lacking = {name: package for name in names if (package := without_extra(name))}
    for name, package in lacking.items():
        print(f"left out: {name} needs {package}")
    print(f"imported {len(names) - len(lacking)} of {len(names)} modules")
    return 0


if __name__ == "__main__":
    sys.exit(main())
