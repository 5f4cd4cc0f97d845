"""What the prefill kernel leaves out, and how it cuts its work: neither may be seen in a row's bits."""

from __future__ import annotations

import pytest
import torch

import attnkit
from attnkit import native
from attnkit.testing.budgets import assert_within

pytestmark = pytest.mark.skipif(not native.STATUS.available, reason=native.STATUS.reason)


@pytest.mark.parametrize("level", native.STATUS.levels)
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_a_long_head_with_a_short_window_is_cut_into_pieces(dtype: torch.dtype, level: str) -> None:
    # Heads of 1,500 keys do not fit into half of a second cache in float32; 50 keys are one tile, 200 are not.
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, 1500, 128, generator=generator).to(dtype) for h in (2, 1, 1))
    # The last keys of a row have the largest logits: where its tiles end can then be seen in its bits.
    q[..., 0], k[..., 0] = 20.0, torch.arange(1500) * 0.05
    threads = torch.get_num_threads()
    try:
        for mask in (attnkit.window(50), attnkit.window(200)):
            gold, naive = (
                attnkit.softmax_attention(*(x.to(kind) for x in (q, k, v)), mask=mask, backend="reference")
                for kind in (torch.float64, dtype)
            )
            with native.use_level(level):
                runs = []
                for count in (1, 2, 3):
                    torch.set_num_threads(count)
                    runs.append(attnkit.softmax_attention(q, k, v, mask=mask, backend="cpu"))
                short = attnkit.softmax_attention(
                    q[1:, :, 900:1000], k[1:, :, :1000], v[1:, :, :1000], mask=mask, backend="cpu"
                )
            assert_within(runs[0], gold, naive, dtype, what=f"{mask.interval()}")
            assert runs[1].equal(runs[0]) and runs[2].equal(runs[0])
            assert short.equal(runs[0][1:, :, 900:1000])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("level", native.STATUS.levels)
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("block", [20, 64])
def test_rows_do_not_meet_the_blocks_of_their_neighbours(block: int, dtype: torch.dtype, level: str) -> None:
    # Blocks of the mask end inside the kernel's blocks of 48 queries: some of these hold rows of two.
    generator = torch.Generator().manual_seed(block)
    blocks = -(-500 // block)
    mask = attnkit.block_sparse(torch.rand(blocks, blocks, generator=generator) < 0.3, block)
    q, k, v = (torch.randn(1, 1, 500, 64, generator=generator).to(dtype) for _ in range(3))
    gold, naive = (
        attnkit.softmax_attention(*(x.to(kind) for x in (q, k, v)), mask=mask, backend="reference")
        for kind in (torch.float64, dtype)
    )
    with native.use_level(level):
        found = attnkit.softmax_attention(q, k, v, mask=mask, backend="cpu")
        assert_within(found, gold, naive, dtype)
        for key in (0, 130, 499):
            bad_k, bad_v = k.clone(), v.clone()
            bad_k[:, :, key], bad_v[:, :, key] = float("nan"), float("inf")
            poisoned = attnkit.softmax_attention(q, bad_k, bad_v, mask=mask, backend="cpu")
            sees = mask.dense(500, 500).expand(1, 1, 500, 500)[0, 0, :, key]
            # The kernel adds such values one key at a time, and then rounds otherwise.
            assert poisoned[0, 0, ~sees].isfinite().all()
            assert_within(poisoned[:, :, ~sees], gold[:, :, ~sees], naive[:, :, ~sees], dtype)
            assert poisoned[0, 0, sees].isnan().all()
