"""The hash by which ranks compare their weights: it sees every bit and its place; and what a difference is called."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from esam_dist import fingerprint as module
from esam_dist.fingerprint import difference, fingerprint

CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.complex64]


def of(*tensors: Tensor) -> int:
    return int(fingerprint(tensors, CPU))


def by_hand(words: list[int], part: int) -> int:
    """The same in Python's integers, which have no end."""
    total = 0
    for start in range(0, len(words), part):
        few = words[start : start + part]
        total = total * 0x2545F4914F6CDD1D + sum(
            word * (place * 0x9E3779B97F4A7C15 | 1) for place, word in enumerate(few)
        )
    total %= 1 << 64
    return total - (1 << 64) if total >= 1 << 63 else total


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_flipped_bit_changes_it(dtype: torch.dtype) -> None:
    tensor = (torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).abs() * 50).to(dtype)
    before = of(tensor)
    seen = {before}
    raw = tensor.view(-1).view(torch.uint8)
    for place, bit in itertools.product(range(len(raw)), range(8)):
        raw[place] ^= 1 << bit
        seen.add(of(tensor))
        raw[place] ^= 1 << bit
    assert len(seen) == 1 + 8 * len(raw)
    assert of(tensor) == before


@pytest.mark.parametrize("part", [4, 1 << 20])
def test_it_is_what_it_says_over_the_limits_of_parts_and_tensors(monkeypatch: pytest.MonkeyPatch, part: int) -> None:
    monkeypatch.setattr(module, "PART", part)
    tensors = [torch.randn(3, 2), torch.tensor(1.5), torch.randn(0), torch.randn(5), torch.zeros(2)]
    words = torch.cat([tensor.flatten() for tensor in tensors]).view(torch.int32).tolist()
    assert of(*tensors) == by_hand(words, part)


def test_places_count_and_the_order_in_memory_does_not() -> None:
    a, b = torch.randn(2, 3, 4, 4), torch.randn(7)
    assert of(a, b) != of(b, a)
    swapped = b.clone()
    swapped[[0, 1]] = b[[1, 0]]
    assert of(a, b) != of(a, swapped)
    assert of(a.contiguous(memory_format=torch.channels_last), b) == of(a, b)
    assert of(torch.tensor(0.0)) != of(torch.tensor(-0.0))


@pytest.mark.parametrize(
    ("prints", "words"),
    [
        ([5], None),
        ([5, 5, 5], None),
        ([5, 6], "the weights of rank 0 and rank 1 differ, and no majority tells which are right"),
        ([5, 6, 5], "the weights of rank 1 differ from those of the other 2 ranks"),
        ([6, 5, 5, 7, 5], "the weights of ranks 0, 3 differ from those of the other 3 ranks"),
        ([5, 6, 5, 6], "the weights of ranks 0, 2 and ranks 1, 3 differ, and no majority tells which are right"),
        ([1, 2, 3], "the weights of rank 0, rank 1 and rank 2 differ, and no majority tells which are right"),
    ],
)
def test_a_majority_says_who_is_wrong(prints: list[int], words: str | None) -> None:
    assert difference(prints) == words
