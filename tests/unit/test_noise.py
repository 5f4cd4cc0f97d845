"""Noise by position: any part of it is that part of the whole, and it is distributed as it says."""

from __future__ import annotations

import math

import torch

from attnkit.noise import bits, gumbel


def test_a_part_is_that_part_of_the_whole() -> None:
    whole = gumbel(5, 2, 3, torch.arange(40), torch.arange(50))
    part = gumbel(5, 2, 3, torch.arange(7, 20), torch.arange(30, 50))
    assert torch.equal(part, whole[:, :, 7:20, 30:])
    assert torch.equal(gumbel(5, 1, 2, torch.arange(40), torch.arange(50)), whole[:1, :2])


def test_seed_batch_head_query_and_key_each_change_it() -> None:
    place = torch.arange(2)
    found = torch.cat([bits(seed, 2, 2, place, place, 52).flatten() for seed in (0, 1)])
    assert len(found.unique()) == 32


def test_bits_are_fair() -> None:
    """Each of 52 bits over a million pairs: the standard deviation of a share is 0.0005."""
    found = bits(1, 1, 1, torch.arange(1000), torch.arange(1000), 52).flatten()
    assert 0 <= found.min() and found.max() < 1 << 52
    shares = torch.stack([(found >> bit & 1).double().mean() for bit in range(52)])
    assert (shares - 0.5).abs().max() < 4.5 * 0.0005


def test_noise_is_gumbel() -> None:
    """Its mean is Euler's constant, its variance pi^2 / 6, and exp(-exp(-x)) the share below x."""
    found = gumbel(2, 1, 1, torch.arange(1000), torch.arange(1000))
    assert found.isfinite().all()
    variance = math.pi**2 / 6
    assert abs(found.mean() - 0.5772156649) < 4.5 * math.sqrt(variance) / 1000
    for x in (-1.0, 0.0, 1.0, 4.0):
        share = math.exp(-math.exp(-x))
        assert abs((found < x).double().mean() - share) < 4.5 * math.sqrt(share * (1 - share)) / 1000
