"""Memory that is used again, and never by two at a time."""

import torch

from respkv.integrations.huggingface.buffers import BufferPool, rounded

CPU = torch.device("cpu")


def test_memory_comes_back_with_the_last_view_of_it() -> None:
    pool = BufferPool()
    tensor = pool.empty((3, 2, 50_000), torch.float32, CPU)
    address, view = tensor.data_ptr(), tensor[1, 1, 5:7]
    del tensor
    assert pool.idle_bytes == 0
    other = pool.empty((3, 2, 50_000), torch.float32, CPU)
    assert other.data_ptr() != address
    del view
    assert pool.idle_bytes == rounded(1_200_000)
    again = pool.empty((300_000,), torch.bfloat16, CPU)
    assert again.data_ptr() != address  # a block of half the size is another one
    same = pool.empty((6, 49_000), torch.float32, CPU)
    assert same.data_ptr() == address
    assert pool.idle_bytes == 0


def test_no_more_is_kept_than_was_said() -> None:
    pool = BufferPool(3 << 20)
    made = [pool.empty((1 << 20,), torch.uint8, CPU) for _ in range(5)]
    made.clear()
    assert pool.idle_bytes == 3 << 20
    del made[:]
    big = pool.empty((4 << 20,), torch.uint8, CPU)
    del big
    assert pool.idle_bytes == 0  # one that is too large pushes the others out, and goes as well


def test_small_memory_is_the_heaps_affair() -> None:
    pool = BufferPool()
    tensor = pool.empty((4, 5), torch.float16, CPU)
    assert (tensor.shape, tensor.dtype) == ((4, 5), torch.float16)
    del tensor
    assert pool.idle_bytes == 0


def test_sizes_are_few_and_not_much_larger() -> None:
    sizes = {rounded(nbytes) for nbytes in range(1 << 18, 1 << 24, 4096)}
    assert len(sizes) < 40
    assert all(nbytes <= rounded(nbytes) <= 2 * nbytes for nbytes in range(1 << 18, 1 << 20, 4096))
    assert all(rounded(nbytes) <= 1.25 * nbytes for nbytes in range(1 << 20, 1 << 24, 4096))
