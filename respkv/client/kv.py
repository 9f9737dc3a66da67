"""The KV of a prompt, cut into pages that are gathered from where they lie."""

from dataclasses import dataclass
from typing import Any, TypeAlias

from respkv.client.requests import Arg, Gathered, view_of
from respkv.client.views import as_bytes
from respkv.errors import ConfigError
from respkv.page import DTYPE_BYTES

COMMAND_BYTES = 32 << 20  # of pages in one command: they wait in the server's memory for its end
COMMAND_PAGES = 512  # the server stores them in one turn

Range: TypeAlias = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Shape:
    """The pages of a namespace: ``[layers, planes, tokens, heads, dim]``, of ``itemsize`` bytes.

    tokens: 0 for the state of a group, which is one object of ``dim`` bytes. dtype: of its numbers.
    """

    layers: int
    planes: int
    tokens: int
    heads: int
    dim: int
    itemsize: int
    dtype: str = "uint8"

    def layer(self, num_tokens: int, heads: Range | None) -> tuple[int, ...]:
        """Return the shape of one layer of so many tokens; heads: first and count, all when None."""
        if not self.tokens:
            return (self.dim,)
        if self.planes == 1:
            return num_tokens, self.dim
        return self.planes, num_tokens, heads[1] if heads else self.heads, self.dim

    def row_bytes(self, heads: int) -> int:
        """Return the bytes of one token in one plane."""
        return heads * self.dim * self.itemsize


def shape_of(schema: dict[str, Any], group: bytes | None) -> Shape:
    """Return the shape of a group's pages; of a state, one of 1 layer and as many bytes."""
    if not group:
        planes = 1 if schema["kind"] == "mla" else 2
        dtype = schema["dtype"]
        sizes = (schema["layers"], planes, schema["tokens"], schema["heads"], schema["dim"])
        return Shape(*sizes, DTYPE_BYTES[dtype], dtype)
    name = group.decode(errors="replace")
    for found, kind, *words in schema.get("groups", ()):
        if found != name:
            continue
        if kind == "SLIDING":
            words = words[1:]
        said = dict(zip(words[::2], words[1::2], strict=True))
        if "BYTES" in said:
            return Shape(1, 1, 0, 1, int(said["BYTES"]), 1)
        planes, heads = (1, 1) if kind == "MLA" else (2, int(said["HEADS"]))
        dtype = said["DTYPE"]
        layers, dim = int(said["LAYERS"]), int(said["DIM"])
        return Shape(layers, planes, schema["tokens"], heads, dim, DTYPE_BYTES[dtype], dtype)
    raise ConfigError(f"namespace {schema['namespace']!r} has no group {name!r}")


class Pages:
    """The KV of a prompt, cut into pages."""

    def __init__(
        self,
        shape: Shape,
        num_tokens: int,
        first: int,
        kv: Any,
        layers: Range | None,
        heads: Range | None,
    ) -> None:
        self.shape = shape
        self.num_tokens = num_tokens
        self.first = first
        self._rows = (layers[1] if layers else shape.layers) * shape.planes
        num_heads = heads[1] if heads else shape.heads
        self._row_bytes = shape.row_bytes(num_heads)
        if not num_tokens:
            raise ValueError("a put needs at least 1 token")
        if first % shape.tokens or not 0 <= first <= num_tokens:
            raise ValueError(
                f"first = {first}: accepted are multiples of {shape.tokens}, the tokens of a page,"
                f" up to {num_tokens}"
            )
        self._listed: list[Any] | None = None
        self._plane: list[memoryview] = []
        if kv is None:
            self.first = num_tokens
        elif isinstance(kv, list | tuple):
            self._listed = [bytes_of(page) for page in kv]
            self._check_list(self._listed)
        else:
            wanted = (self._rows // shape.planes, shape.planes, num_tokens - first, num_heads)
            latents = (self._rows, num_tokens - first)
            self._plane = self._planes(kv, (*(latents if shape.planes == 1 else wanted), shape.dim))

    def count_before(self, token: int) -> int:
        """Return how many pages of kv end before a token."""
        return -(-(token - self.first) // self.shape.tokens) if token > self.first else 0

    def commands(self, start: int) -> "list[tuple[int, int, list[Arg]]]":
        """Return first token, end and payloads of each command, from the token ``start`` on."""
        size, found = self.shape.tokens, []
        # Of whole pages, whatever part of them is sent: they wait for the other parts.
        shape = self.shape
        page_bytes = shape.layers * shape.planes * size * shape.row_bytes(shape.heads)
        step = size * min(COMMAND_PAGES, max(1, COMMAND_BYTES // page_bytes))
        while start < self.num_tokens:
            end = min(start + step, self.num_tokens)
            payloads = [
                self._payload(token, min(token + size, end)) for token in range(start, end, size)
            ]
            found.append((start, end, payloads))
            start = end
        return found

    def _payload(self, start: int, stop: int) -> Arg:
        if self._listed is not None:
            page: Arg = self._listed[(start - self.first) // self.shape.tokens]
            return page
        row, first = self._row_bytes, self.first
        begin, end = (start - first) * row, (stop - first) * row
        return Gathered([plane[begin:end] for plane in self._plane])

    def _planes(self, kv: Any, wanted: tuple[int, ...]) -> list[memoryview]:
        shape: tuple[int, ...] = tuple(getattr(kv, "shape", ()))
        # Axes of length 1 may be there or not: the bytes lie the same.
        if len(shape) > 1 and [n for n in shape if n != 1] != [n for n in wanted if n != 1]:
            raise ValueError(f"kv has shape {shape}; tokens {self.first} on take {wanted}")
        view = bytes_of(kv)
        plane_bytes = (self.num_tokens - self.first) * self._row_bytes
        if view.nbytes != self._rows * plane_bytes:
            raise ValueError(
                f"kv has {view.nbytes} bytes; {wanted} of {self.shape.itemsize} bytes each take"
                f" {self._rows * plane_bytes}"
            )
        return [view[n * plane_bytes : (n + 1) * plane_bytes] for n in range(self._rows)]

    def _check_list(self, pages: list[Any]) -> None:
        size = self.shape.tokens
        count = -(-(self.num_tokens - self.first) // size)
        if len(pages) != count:
            raise ValueError(
                f"kv has {len(pages)} pages; tokens {self.first} to {self.num_tokens - 1} are {count}"
            )
        for number, page in enumerate(pages):
            tokens = min(size, self.num_tokens - self.first - number * size)
            if page.nbytes != tokens * self._rows * self._row_bytes:
                raise ValueError(
                    f"page {number} of kv has {page.nbytes} bytes; its {tokens} tokens take"
                    f" {tokens * self._rows * self._row_bytes}"
                )


def bytes_of(buffer: Any) -> memoryview:
    """Return a buffer, an array or a CPU tensor as bytes. Raises ValueError: not contiguous."""
    if hasattr(buffer, "untyped_storage") or hasattr(buffer, "__array_interface__"):
        return as_bytes(buffer)
    view = view_of(buffer)
    if not view.c_contiguous:
        raise ValueError("a payload must be contiguous in memory")
    return view.cast("B") if view.nbytes else memoryview(b"")
