"""What is said when a package of an extra is not installed."""

import subprocess
import sys

import pytest

from respkv.errors import CacheError, MissingExtra, require, required

# As in an interpreter that lacks some packages.
_WITHOUT = """
import sys

class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names}:
            raise ModuleNotFoundError(f"{{name}} is not here", name=name)

sys.meta_path.insert(0, Blocker())
from respkv.errors import MissingExtra
try:
    {code}
except MissingExtra as error:
    print(error)
"""


def said_without(names: list[str], code: str) -> str:
    """Return the message of the MissingExtra that ``code`` ends with, in an interpreter of its own."""
    script = _WITHOUT.format(names=names, code=code)
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("names", "code", "said"),
    [
        (
            ["torch"],
            "from respkv.simple import SimpleKVCache",
            "respkv.simple needs torch, not installed: pip install 'respkv[torch]'",
        ),
        (
            ["torch"],
            "from respkv.paged.cache import PagedAttentionCache",
            "respkv.paged needs torch, not installed: pip install 'respkv[torch]'",
        ),
        (
            ["torch"],
            "from respkv.batching.model_loop import ModelLoop",
            "respkv.batching needs torch, not installed: pip install 'respkv[torch]'",
        ),
        (
            ["torch", "transformers"],
            "from respkv.integrations.huggingface import KVCacheAdapter",
            "respkv.integrations.huggingface needs torch, transformers, not installed: "
            "pip install 'respkv[hf]'",
        ),
        (
            ["transformers"],
            "from respkv.integrations.huggingface.prompt_pages import PromptPages",
            "respkv.integrations.huggingface needs transformers, not installed: "
            "pip install 'respkv[hf]'",
        ),
        (
            ["usearch"],
            "from respkv.semantic import SemanticCache; "
            "SemanticCache('respkv://nowhere', 'x', dim=2, index='hnsw')",
            "index = 'hnsw' needs usearch, not installed: pip install 'respkv[semantic]'",
        ),
        (
            ["torch"],
            "from respkv.client import as_torch; as_torch(memoryview(b'x'), 'uint8', [1])",
            "as_torch needs torch, not installed: pip install 'respkv[torch]'",
        ),
    ],
)
def test_what_lacks_a_package_says_which_extra_brings_it(
    names: list[str], code: str, said: str
) -> None:
    assert said_without(names, code) == said


def test_a_missing_extra_is_both_an_answer_of_the_cache_and_a_missing_module() -> None:
    with pytest.raises(MissingExtra) as error:
        require("this", "that", "json", "no_such_package")
    assert isinstance(error.value, CacheError)
    assert isinstance(error.value, ModuleNotFoundError)
    assert error.value.name == "no_such_package"
    assert (
        str(error.value) == "this needs no_such_package, not installed: pip install 'respkv[that]'"
    )


def test_nothing_is_said_of_what_is_there() -> None:
    require("this", "that", "json", "pytest")
    with required("this", "that", "json"):
        pass


def test_a_mistake_within_the_block_is_left_as_it_is() -> None:
    with pytest.raises(ModuleNotFoundError, match=r"^No module named 'no_such_package'$"):
        with required("this", "that", "json"):
            import no_such_package  # type: ignore[import-not-found] # noqa: F401


def test_a_module_that_was_put_there_without_a_spec_is_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "made_up", type(sys)("made_up"))
    require("this", "that", "made_up")
