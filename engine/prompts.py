"""Prompts of namespaces: tokens chained as the schema of their namespace says.

The last ones are kept, from whichever connection they came, so that a match and the get or put behind it
hash a prompt once, and a prompt that goes on where another one ended hashes what is new. They are
all forgotten when a schema comes, changes or goes.
"""

from respkv.chain import PAGE_TOKENS_MAX, Chain, Extras, Prompt
from respkv.chain.recent import RecentPrompts
from respkv.engine.namespaces import Namespaces, Schema
from respkv.errors import CommandError, SchemaMismatch
from respkv.page import KEY_BYTES_MAX, PAGE_ID_BYTES

CHAINS_MAX = 1024
RECENT_BYTES = 4 << 20  # of the last prompts of all connections: their tokens and ids
SUFFIX_BYTES = 64  # of a part: a dot, what it is, and the name of a group
NAMESPACE_BYTES_MAX = KEY_BYTES_MAX - 1 - 2 * PAGE_ID_BYTES - SUFFIX_BYTES


class Prompts:
    """Makes prompts; keeps how each namespace chains them.

    recent: the prompts of late.
    """

    def __init__(self, namespaces: Namespaces) -> None:
        self._namespaces = namespaces
        self._chains: dict[tuple[bytes, bytes, int], Chain] = {}
        self.recent = RecentPrompts(RECENT_BYTES)
        self._version = namespaces.version

    def prompt(self, namespace: bytes, tokens: bytes, extras: Extras) -> Prompt:
        """Return a prompt; tokens: int32 little-endian.

        Raises SchemaMismatch when the namespace has no schema, or one whose pages cannot be chained
        here, and CommandError for a namespace, tokens or extras that are none.
        """
        schema = self._namespaces.find(namespace)
        if schema is None:
            raise SchemaMismatch(
                f"namespace {_shown(namespace)} has no schema, and its tokens no pages; "
                "KV.SCHEMA SET it first"
            )
        if len(namespace) > NAMESPACE_BYTES_MAX:
            raise CommandError(
                f"a namespace of sequences has at most {NAMESPACE_BYTES_MAX} bytes, "
                f"not {len(namespace)}"
            )
        if self._version != self._namespaces.version:
            self._version = self._namespaces.version
            self.recent.clear()
        try:
            return self.recent.prompt(self._chain(schema), namespace, tokens, extras, schema.tag)
        except ValueError as error:
            raise CommandError(str(error)) from None

    def _chain(self, schema: Schema) -> Chain:
        page_tokens = schema.geometry.tokens
        name = schema.hash_algorithm, schema.seed, page_tokens
        chain = self._chains.get(name)
        if chain is not None:
            return chain
        if page_tokens > PAGE_TOKENS_MAX:
            raise SchemaMismatch(
                f"pages of sequences have at most {PAGE_TOKENS_MAX} tokens, those of namespace "
                f"{_shown(schema.namespace)} have {page_tokens}"
            )
        try:
            chain = Chain(schema.hash_algorithm.decode(errors="replace"), schema.seed, page_tokens)
        except ValueError as error:
            raise SchemaMismatch(
                f"namespace {_shown(schema.namespace)} takes no sequences: {error}"
            ) from None
        if len(self._chains) >= CHAINS_MAX:
            self._chains.clear()
        self._chains[name] = chain
        return chain


def _shown(namespace: bytes) -> str:
    return repr(namespace.decode(errors="replace"))
