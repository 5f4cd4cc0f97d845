"""Latent attention's native kernel: odd sizes, levels, bits, what is hidden, and decoding through a state."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit
from attnkit import native
from attnkit.dispatch import watch
from attnkit.mechanisms.mla import MLAConfig, MLAttention, mla_attention
from attnkit.positions import Rotary
from attnkit.testing.budgets import assert_within

pytestmark = pytest.mark.skipif(not native.STATUS.available, reason=native.STATUS.reason)

# b, h, g, m, n, nope, rotary, c, e: DeepSeek's heads first; then more rows than a task holds, odd numbers of channels,
# no rotary keys, nothing but rotary keys, one key, and several ranges of keys.
SHAPES = [
    (1, 16, 1, 1, 300, 128, 64, 512, 128),
    (1, 36, 1, 5, 200, 16, 8, 64, 16),
    (2, 4, 2, 3, 200, 5, 3, 7, 9),
    (2, 6, 2, 2, 97, 8, 0, 24, 8),
    (1, 3, 1, 5, 97, 0, 16, 33, 8),
    (2, 5, 1, 1, 1, 8, 2, 64, 8),
    (1, 20, 2, 3, 2500, 16, 32, 64, 16),
]
MASKS = [None, attnkit.causal(), attnkit.window(50)]


def drawn(shape: tuple[int, ...], dtype: torch.dtype) -> dict[str, Any]:
    b, h, g, m, n, nope, rotary, c, e = shape
    generator = torch.Generator().manual_seed(sum(shape))
    sizes = {"q": (b, h, m, nope + rotary), "latent": (b, g, n, c + rotary), "kv_b": (h, nope + e, c)}
    x = {name: torch.randn(size, generator=generator) for name, size in sizes.items()}
    return {name: (t * c**-0.5 if name == "kv_b" else t).to(dtype) for name, t in x.items()}


@pytest.mark.parametrize("level", native.STATUS.levels)
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_definition(shape: tuple[int, ...], dtype: torch.dtype, level: str) -> None:
    inputs = drawn(shape, dtype)
    exact = {name: x.double() for name, x in inputs.items()}
    for mask in MASKS:
        gold, naive = (mla_attention(**x, mask=mask, backend="reference") for x in (exact, inputs))
        with native.use_level(level):
            found = mla_attention(**inputs, mask=mask, backend="cpu")
        assert_within(found, gold, naive, dtype, what=f"{mask}")


@pytest.mark.parametrize("level", native.STATUS.levels)
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
def test_bits_depend_on_neither_threads_nor_batch_nor_layout(dtype: torch.dtype, level: str) -> None:
    inputs = drawn((3, 10, 2, 3, 2000, 16, 8, 64, 16), dtype)
    threads = torch.get_num_threads()
    spread = torch.zeros(3, 2, 2500, 97, dtype=dtype)  # rows at odd places, which are copied and not read in place
    spread[:, :, :2000, :72] = inputs["latent"]
    try:
        with native.use_level(level):
            runs = []
            for count in (1, 2, 1, 2):
                torch.set_num_threads(count)
                runs.append(mla_attention(**inputs, mask=attnkit.causal(), backend="cpu"))
            alone = {name: x if name == "kv_b" else x[1:2] for name, x in inputs.items()}
            single = mla_attention(**alone, mask=attnkit.causal(), backend="cpu")
            other = inputs | {"latent": spread[:, :, :2000, :72]}
            elsewhere = mla_attention(**other, mask=attnkit.causal(), backend="cpu")
    finally:
        torch.set_num_threads(threads)
    assert all(run.equal(runs[0]) for run in runs)
    assert runs[0][1:2].equal(single)
    assert runs[0].equal(elsewhere)


@pytest.mark.parametrize("level", native.STATUS.levels)
@pytest.mark.parametrize("dtype", native.DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_hidden_latent_reaches_no_row(bad: float, dtype: torch.dtype, level: str) -> None:
    inputs = drawn((1, 4, 1, 4, 230, 8, 8, 64, 8), dtype)
    exact = {name: x.double() for name, x in inputs.items()}
    gold, naive = (mla_attention(**x, mask=attnkit.window(40), backend="reference") for x in (exact, inputs))
    with native.use_level(level):
        inputs["latent"][:, :, -2:] = bad  # seen by the last two queries only
        inputs["latent"][:, :, 100:180] = bad  # seen by none
        found = mla_attention(**inputs, mask=attnkit.window(40), backend="cpu")
    assert_within(found[:, :, :2], gold[:, :, :2], naive[:, :, :2], dtype)
    assert found[:, :, 2:].isnan().all()


def test_rows_that_see_nothing_are_zero() -> None:
    inputs = drawn((1, 4, 1, 9, 4, 8, 8, 64, 8), torch.float32)
    found = mla_attention(**inputs, mask=attnkit.causal(), backend="cpu")
    assert found[:, :, :5].eq(0).all()
    assert found[:, :, 5:].ne(0).all()


def test_logits_that_rise_late_or_are_huge() -> None:
    """Rows whose reference moves in some tiles and not in others."""
    inputs = drawn((1, 18, 1, 2, 900, 8, 8, 64, 8), torch.float32)
    inputs["latent"] *= torch.linspace(0.1, 30, 900)[:, None]
    inputs["q"][:, ::3] *= 0.01
    exact = {name: x.double() for name, x in inputs.items()}
    gold, naive = (mla_attention(**x, backend="reference") for x in (exact, inputs))
    assert_within(mla_attention(**inputs, backend="cpu"), gold, naive, torch.float32)


def test_a_mask_that_is_no_interval_is_refused() -> None:
    inputs = drawn((1, 2, 1, 1, 9, 4, 2, 8, 4), torch.float32)
    with pytest.raises(NotImplementedError, match="the native kernel takes causal, windows and none"):
        mla_attention(**inputs, mask=attnkit.dilated_window(3, 2), backend="cpu")


@pytest.mark.parametrize("mask", [attnkit.causal(), attnkit.window(30)])
@torch.no_grad()
def test_a_layer_decodes_on_the_kernel(mask: attnkit.Mask) -> None:
    """Steps of one and of several tokens, from the buffer of the state as it lies."""
    torch.manual_seed(0)
    rotary = Rotary(8, style="interleaved")
    config = MLAConfig(
        64, 4, latent=64, nope_size=16, rope_size=8, value_size=16, rotary=rotary, mask=mask, backend="cpu"
    )
    layer = MLAttention(config)
    x = torch.randn(2, 150, 64)
    whole = layer(x)
    state = layer.state(2, 150)
    pieces, start = [], 0
    with watch() as ran:
        for size in (100, 1, 1, 7, 1, 16, 24):
            y, state = layer.step(x[:, start : start + size], state)
            pieces.append(y)
            start += size
    assert ran["mla", "cpu"] == 7
    plain = MLAttention(replace(config, backend="reference"))
    plain.load_state_dict(layer.state_dict())
    naive = plain(x)
    gold = plain.double()(x.double())
    for found in (whole, torch.cat(pieces, 1)):
        assert_within(found, gold, naive, torch.float32)


@torch.no_grad()
def test_compiles_in_one_graph() -> None:
    inputs = drawn((1, 4, 1, 2, 60, 8, 8, 64, 8), torch.float32)

    def decode(q: Tensor, latent: Tensor, kv_b: Tensor) -> Tensor:
        return mla_attention(q, latent, kv_b, mask=attnkit.causal(), backend="cpu")

    compiled = torch.compile(decode, fullgraph=True)
    assert compiled(**inputs).equal(decode(**inputs))
