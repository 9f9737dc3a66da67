"""Encoding out of and decoding into a paged cache, in memory: gather, then the reference."""

import pytest
import torch
from torch import Tensor

from respkv.kernels import ladder
from respkv.kernels.layout import Codec, plane_layout
from respkv.kernels.paged import SIDES, PagedBuffer, gather_pages_paged
from respkv.kernels.paged_coding import (
    decode_paged,
    decode_planes_on_device,
    encode_paged,
    encode_planes_on_device,
)
from tests.kernels.caches import bytes_of, cache, filled, moved, some_slots
from tests.kernels.data import gaussian, poisoned

CPU = torch.device("cpu")
SHAPE = (2, 5, 8, 3, 33)  # L, num_blocks, block_tokens, H, D
FIXED = [codec for codec in Codec if codec != Codec.XS]


def planes_of(pages: Tensor, layer: int, side: int) -> Tensor:
    return pages[:, layer, side]


@pytest.mark.parametrize("codec", FIXED, ids=lambda codec: codec.name)
def test_each_plane_is_what_the_reference_makes_of_it(codec: Codec) -> None:
    buffer = filled("hnd", SHAPE, torch.bfloat16, CPU)
    slots = some_slots(buffer, 28)
    pages = gather_pages_paged(buffer, slots, page_tokens=7)
    *encoded, fits = encode_paged(codec, codec, buffer, slots, page_tokens=7)
    assert fits.shape == (4, 2, 2)
    assert fits.all()
    for index, side in enumerate(SIDES):
        for layer in range(2):
            planes = planes_of(pages, layer, index)
            if codec == Codec.RAW:
                expected = planes.contiguous().view(torch.uint8).flatten(1)
                expected = torch.nn.functional.pad(expected, (0, -expected.shape[1] % 16))
            else:
                expected, _ = ladder.encode_planes(codec, planes, side=side)
            assert torch.equal(encoded[index][:, layer], expected)


@pytest.mark.parametrize("codec", FIXED, ids=lambda codec: codec.name)
def test_decoding_writes_the_tokens_asked_for_and_nothing_else(codec: Codec) -> None:
    buffer = filled("nhd", SHAPE, torch.float16, CPU)
    slots = some_slots(buffer, 24)
    *encoded, _ = encode_paged(codec, Codec.RAW, buffer, slots, page_tokens=12)
    target = cache("page_first", SHAPE, torch.float16, CPU)
    decode_paged(codec, Codec.RAW, target, slots, *encoded, page_tokens=12)
    assert int(target.keys[0].isfinite().sum()) == 24 * 3 * 33
    before = gather_pages_paged(buffer, slots, page_tokens=12)
    after = gather_pages_paged(target, slots, page_tokens=12)
    assert torch.equal(after[:, :, 1], before[:, :, 1])
    error = (after[:, :, 0].float() - before[:, :, 0].float()).norm() / before[
        :, :, 0
    ].float().norm()
    assert float(error) < {Codec.RH2: 0.5, Codec.RHZ2: 0.5}.get(codec, 0.3)


def test_a_plane_that_does_not_fit_says_so_alone() -> None:
    buffer = filled("nhd", SHAPE, torch.bfloat16, CPU)
    buffer.values[1][2, 3, 0, 5] = torch.nan  # token 19, in the second page
    _, _, fits = encode_paged(Codec.F8, Codec.I8, buffer, torch.arange(32), page_tokens=16)
    assert (~fits).nonzero().tolist() == [[1, 1, 1]]


def test_planes_go_into_memory_that_is_given() -> None:
    buffer = filled("nhd", SHAPE, torch.bfloat16, CPU)
    slots = torch.arange(16)
    expected = encode_paged(Codec.I4, Codec.F8, buffer, slots, page_tokens=8)
    nbytes = [each.shape[2] for each in expected[:2]]
    # As a container keeps them: the layers of a page, keys beside values, after a header.
    room = poisoned((2, 2, 16 + sum(nbytes)))
    out = (room[..., 16 : 16 + nbytes[0]], room[..., 16 + nbytes[0] :])
    encoded_k, encoded_v, _ = encode_paged(
        Codec.I4, Codec.F8, buffer, slots, page_tokens=8, out=out
    )
    assert encoded_k is out[0]
    assert torch.equal(encoded_k, expected[0])
    assert torch.equal(encoded_v, expected[1])
    assert (room[..., :16] == 255).all()


@pytest.mark.parametrize("codec", [Codec.F8, Codec.I4], ids=lambda codec: codec.name)
@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (3, 1, 0, 2)], ids=str)
def test_planes_on_their_own_are_pages_of_one_layer(codec: Codec, order: tuple[int, ...]) -> None:
    planes = torch.stack([gaussian(9, 2, 40, seed) for seed in range(3)])
    inverse = sorted(range(4), key=order.__getitem__)
    planes = planes.permute(order).contiguous().permute(inverse)
    expected, fits = ladder.encode_planes(codec, planes, side="key")
    encoded, fit = encode_planes_on_device(codec, planes, side="key")
    assert torch.equal(encoded, expected)
    assert torch.equal(fit, fits)
    out = torch.empty_like(planes).fill_(torch.nan)
    decode_planes_on_device(codec, encoded, side="key", out=out)
    expected_planes = ladder.decode_planes(codec, encoded, side="key", out=torch.empty_like(planes))
    assert torch.equal(out, expected_planes)


def test_no_pages_are_encoded_and_decoded_too() -> None:
    buffer = filled("nhd", SHAPE, torch.bfloat16, CPU)
    none = torch.empty(0, dtype=torch.int64)
    encoded_k, encoded_v, fits = encode_paged(Codec.RAW, Codec.I8, buffer, none, page_tokens=8)
    assert fits.shape == (0, 2, 2)
    before = bytes_of(buffer)
    decode_paged(Codec.RAW, Codec.I8, buffer, none, encoded_k, encoded_v, page_tokens=8)
    assert all(map(torch.equal, bytes_of(buffer), before))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(
    "codec", [Codec.RAW, Codec.F8, Codec.I8, Codec.I4], ids=lambda codec: codec.name
)
def test_a_cache_on_a_gpu_gives_the_bytes_of_one_in_memory(
    codec: Codec, device: torch.device
) -> None:
    here = filled("hnd", SHAPE, torch.bfloat16, CPU)
    there = moved(here, device)
    slots = some_slots(here, 28)
    *expected, _ = encode_paged(codec, codec, here, slots, page_tokens=7)
    *encoded, fits = encode_paged(codec, codec, there, slots.to(device), page_tokens=7)
    assert fits.all()
    assert all(
        torch.equal(ours.cpu(), theirs) for ours, theirs in zip(encoded, expected, strict=True)
    )
    for buffer, planes in ((here, expected), (there, encoded)):
        decode_paged(codec, codec, buffer, slots.to(buffer.device), *planes, page_tokens=7)
    assert all(map(torch.equal, bytes_of(there), bytes_of(here)))


def bad_out(nbytes: int) -> dict[str, tuple[Tensor, str]]:
    return {
        "another shape": (poisoned((1, 2, nbytes)), "must be"),
        "another size": (poisoned((2, 2, nbytes + 16)), "must be"),
        "another type": (poisoned((2, 2, nbytes), torch.int16), "must be"),
        "every other byte": (poisoned((2, 2, 2 * nbytes))[..., ::2], "contiguous planes"),
        "an odd address": (poisoned((4 * nbytes + 1,))[1:].view(2, 2, nbytes), "multiples of 16"),
        "odd distances": (poisoned((2, 2, nbytes + 1))[..., :nbytes], "multiples of 16"),
    }


@pytest.mark.parametrize("case", bad_out(16))
def test_memory_that_cannot_hold_the_planes_is_refused(case: str) -> None:
    buffer = filled("nhd", SHAPE, torch.bfloat16, CPU)
    nbytes = plane_layout(Codec.F8, "key", 8, 3, 33, 2).nbytes
    bad, said = bad_out(nbytes)[case]
    good = poisoned((2, 2, nbytes))
    with pytest.raises(ValueError, match=said):
        encode_paged(Codec.F8, Codec.F8, buffer, torch.arange(16), page_tokens=8, out=(good, bad))


def test_a_codec_without_a_fixed_size_is_refused() -> None:
    buffer = PagedBuffer.from_planes(gaussian(4, 1, 8, 1)[None])
    with pytest.raises(ValueError, match="xs have no size"):
        encode_paged(Codec.XS, Codec.RAW, buffer, torch.arange(4), page_tokens=4)
