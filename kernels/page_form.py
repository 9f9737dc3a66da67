"""How a page lies on a device: the codec of its keys, that of its values, and where everything is.

A device's slots are cut before it is known what comes into them, so a page there has a size that
its form alone decides: codecs of variable size are not for devices. A raw page is ``[L, 2, T, H, D]``
as everywhere. One that is encoded has three parts, each at a multiple of ``PART_ALIGN_BYTES``:

* exact:  ``[L, 2, E, H, D]`` numbers, the E tokens that are kept as they are, first ones first;
* keys:   a plane of the other tokens' keys for each layer, one after the other;
* values: the same of the values.

So all planes of a side are one piece for one launch. Server and client agree through this file.
"""

from dataclasses import dataclass
from typing import Final

from respkv.kernels.layout import CODEC_NAMES, Codec, Side, plane_layout
from respkv.page import DTYPE_BYTES, Geometry

PART_ALIGN_BYTES: Final = 256
LOSSY_DTYPES: Final = frozenset({"bfloat16", "float16", "float32"})


@dataclass(frozen=True, slots=True)
class PageForm:
    """The form of a page. Make it with ``of``.

    key, value: codecs of fixed size.
    exact_first, exact_last: tokens at the page's ends that are kept as they are.
    """

    geometry: Geometry
    key: Codec = Codec.RAW
    value: Codec = Codec.RAW
    exact_first: int = 0
    exact_last: int = 0

    @classmethod
    def of(
        cls,
        geometry: Geometry,
        key: Codec = Codec.RAW,
        value: Codec = Codec.RAW,
        *,
        exact_first: int = 0,
        exact_last: int = 0,
    ) -> "PageForm":
        """Return the form that is nearest to what is asked for.

        Raw where a codec has no fixed size or does not take the dtype, or no tokens are left to code.
        """
        key, value = (Codec.RAW if each.is_lossless else each for each in (key, value))
        tokens = geometry.tokens - exact_first - exact_last
        if key is value is Codec.RAW or tokens <= 0 or geometry.dtype not in LOSSY_DTYPES:
            return cls(geometry)
        return cls(geometry, key, value, exact_first, exact_last)

    @property
    def is_lossless(self) -> bool:
        """Whether the page that was put can be had from it, to the bit."""
        return self.key is self.value is Codec.RAW

    @property
    def raw(self) -> "PageForm":
        """The form of the same pages as they are."""
        return PageForm(self.geometry)

    @property
    def tokens(self) -> int:
        """How many tokens the codecs see."""
        return self.geometry.tokens - self.num_exact

    @property
    def num_exact(self) -> int:
        """How many tokens are kept as they are beside those that are encoded."""
        return self.exact_first + self.exact_last

    @property
    def exact_bytes(self) -> int:
        """Bytes of the first part, padding excluded."""
        shape = self.geometry
        numbers = shape.layers * 2 * self.num_exact * shape.heads * shape.dim
        return numbers * DTYPE_BYTES[shape.dtype]

    def plane_bytes(self, side: Side) -> int:
        """Return the bytes of one encoded plane."""
        shape, codec = self.geometry, self.key if side == "key" else self.value
        element_bytes = DTYPE_BYTES[shape.dtype]
        return plane_layout(codec, side, self.tokens, shape.heads, shape.dim, element_bytes).nbytes

    @property
    def keys_offset(self) -> int:
        """Where the keys of an encoded page begin."""
        return _padded(self.exact_bytes)

    @property
    def values_offset(self) -> int:
        """Where the values of an encoded page begin."""
        return _padded(self.keys_offset + self.geometry.layers * self.plane_bytes("key"))

    @property
    def nbytes(self) -> int:
        """Bytes of a page in this form."""
        if self.is_lossless:
            return self.geometry.page_bytes
        return self.values_offset + self.geometry.layers * self.plane_bytes("value")

    @property
    def name(self) -> str:
        """The form in words: the codec, both where they differ, and the exact tokens if any."""
        name = self.key.name.lower()
        if self.value is not self.key:
            name += f"/{self.value.name.lower()}"
        return name + (f"+{self.exact_first}+{self.exact_last}" if self.num_exact else "")


def form_of_name(name: str, geometry: Geometry) -> PageForm:
    """Return the form that ``PageForm.name`` tells. Raises ValueError for what is no such name."""
    codecs, _, exact = name.partition("+")
    key, slash, value = codecs.partition("/")
    first, _, last = exact.partition("+")
    try:
        form = PageForm.of(
            geometry,
            CODEC_NAMES[key],
            CODEC_NAMES[value if slash else key],
            exact_first=int(first or 0),
            exact_last=int(last or 0),
        )
    except KeyError:
        raise ValueError(f"{name!r} is no form of a page") from None
    if form.name != name:
        raise ValueError(f"{name!r} is no form of a page of {geometry}")
    return form


def _padded(nbytes: int) -> int:
    return -(-nbytes // PART_ALIGN_BYTES) * PART_ALIGN_BYTES
