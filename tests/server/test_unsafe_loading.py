"""Nothing that turns bytes into code is in the tree or in a running server."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("respkv", "engine", "tiers", "kernels", "bench", "examples", "deploy")
UNSAFE_MODULES = {"pickle", "cPickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
UNSAFE_CALLS = {"eval", "exec", "compile", "__import__"}
UNSAFE_ATTRIBUTES = {
    ("torch", "load"),
    ("yaml", "load"),
    ("os", "system"),
    ("numpy", "load"),
    ("np", "load"),
}

# A finder that comes first and refuses, so that even a lazy import by a dependency is seen.
HOOK = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {unsafe} or name.startswith("torch"):
            raise ImportError(f"unsafe: {{name}} is imported")
        return None
for name in {unsafe}:
    sys.modules.pop(name, None)
sys.meta_path.insert(0, Refuse())
"""
SESSION = """
import socket, threading, time, os, signal
def talk():
    while True:
        try:
            raw = socket.create_connection(("127.0.0.1", {port}))
            break
        except OSError:
            time.sleep(0.02)
    words = ["PING", "SET k " + "v" * 5000, "GET k", "KEYS *", "INFO", "CONFIG GET *", "COMMAND DOCS",
        "KV.SCHEMA SET ns LAYERS 1 HEADS 1 DIM 8 TOKENS 8 DTYPE float16", "KV.PUT p x", "KV.GET p",
        "KV.LEASE 1 k", "KV.MGET 1 k", "KV.STATS", "KV.EXPLAIN q", "CLIENT LIST", "BOGUS", "SHUTDOWN"]
    raw.sendall("".join(word + "\\r\\n" for word in words).encode())
    while raw.recv(65536):
        pass
threading.Thread(target=talk, daemon=True).start()
from respkv.cli import main
main(["serve", "--port", "{port}", "--shm", "rw"])
"""


def sources() -> Iterator[Path]:
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*.py")):
            if not any(parent.is_symlink() for parent in path.parents):
                yield path


@pytest.mark.parametrize("path", [pytest.param(p, id=str(p.relative_to(ROOT))) for p in sources()])
def test_no_source_loads_code_from_bytes(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        where = f"{path}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Import):
            for alias in node.names:
                assert alias.name.partition(".")[0] not in UNSAFE_MODULES, where
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] not in UNSAFE_MODULES, where
        elif isinstance(node, ast.Call):
            called = node.func
            if isinstance(called, ast.Name):
                assert called.id not in UNSAFE_CALLS, where
            if isinstance(called, ast.Attribute) and isinstance(called.value, ast.Name):
                assert (called.value.id, called.attr) not in UNSAFE_ATTRIBUTES, where
            assert not any(
                keyword.arg in ("shell", "allow_pickle")
                and not (isinstance(keyword.value, ast.Constant) and not keyword.value.value)
                for keyword in node.keywords
            ), where


def test_a_serving_process_imports_nothing_unsafe() -> None:
    from tests.redis_server import free_port

    code = HOOK.format(unsafe=UNSAFE_MODULES) + SESSION.format(port=free_port())
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=ROOT
    )
    assert "unsafe" not in done.stderr, done.stderr
    assert "Traceback" not in done.stderr, done.stderr
    assert "ready on" in done.stderr
    assert done.returncode == 0, done


def test_the_hook_bites() -> None:
    """It would have seen an import of pickle."""
    code = HOOK.format(unsafe=UNSAFE_MODULES) + "import pickle"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert "unsafe: pickle is imported" in done.stderr
