"""In which form the gpu tier keeps a page: what the schema of its namespace says."""

from respkv.engine.entry import Entry
from respkv.engine.namespaces import Namespaces, Schema
from respkv.kernels.layout import Codec
from respkv.kernels.page_form import PageForm
from respkv.page import Latents
from respkv.tiers.codec import parse_codec

TIER = b"gpu"
MADE_MAX = 10_000


class Forms:
    """The forms of each namespace, made once for each schema."""

    def __init__(self, namespaces: Namespaces) -> None:
        self._namespaces = namespaces
        self._made: dict[bytes, tuple[Schema, PageForm, PageForm]] = {}

    def find(self, entry: Entry) -> PageForm | None:
        """Return the form of a page; None when its namespace has no schema that it fits.

        A tail is no page, nor is the page of another group; latents have no K and V to encode.
        """
        schema = self._namespaces.of_key(entry.key) if entry.kind == "kvpage" else None
        if schema is None or entry.nbytes != schema.geometry.page_bytes:
            return None
        if entry.part is not None or isinstance(schema.geometry, Latents):
            return None
        made = self._made.get(schema.namespace)
        if made is None or made[0] is not schema:
            if len(self._made) >= MADE_MAX:  # of namespaces that have gone, most of them
                self._made.clear()
            made = (schema, make_form(schema, is_first=True), make_form(schema, is_first=False))
            self._made[schema.namespace] = made
        return made[2] if entry.parent_key else made[1]


def make_form(schema: Schema, *, is_first: bool) -> PageForm:
    """Return the form that a schema asks for.

    is_first: of a chain's first page, the only one whose first tokens are the prompt's.
    """
    key, value = codecs_of(dict(schema.codecs).get(TIER, b"raw").decode())
    exact_first = schema.exact_first if is_first else 0
    return PageForm.of(
        schema.geometry, key, value, exact_first=exact_first, exact_last=schema.exact_last
    )


def codecs_of(text: str) -> tuple[Codec, Codec]:
    """Return the codecs of keys and of values; raw for "auto", which is measured for files."""
    try:
        return parse_codec(text)
    except ValueError:
        return Codec.RAW, Codec.RAW
