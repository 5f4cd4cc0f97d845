"""The softmax layer beside what the laws prove of it: shapes, cross-attention, configuration, gradients, refusals."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import attnkit
from attnkit.mechanisms.softmax import SoftmaxAttention, SoftmaxConfig
from attnkit.positions import Rotary, T5Buckets
from attnkit.registry import get
from attnkit.spec import LayerPlace
from attnkit.state import KVState, WindowState
from attnkit.testing.budgets import assert_within

SPEC = get("softmax")


@pytest.mark.parametrize("preset", SPEC.presets, ids=lambda preset: preset.name)
@pytest.mark.parametrize(("width", "heads", "window"), [(32, 4, 8), (64, 8, 3), (16, 1, 2)])
def test_presets_train_and_decode(preset: Any, width: int, heads: int, window: int) -> None:
    """Every parameter of every preset gets a gradient, and the state is the one its mask needs."""
    layer = SPEC.layer(preset.configure(LayerPlace(width, heads, window)))
    x = torch.randn(2, 11, width)
    y = layer(x)
    assert y.shape == x.shape
    y.square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in layer.parameters())
    state = layer.state(2, 100)
    reach = layer.config.mask.reach()
    assert isinstance(state, KVState if reach is None else WindowState)


def test_presets_have_the_heads_they_name() -> None:
    place = LayerPlace(64, 8, 16)
    heads = {name: SPEC.preset(name).configure(place).groups for name in ("mha", "gqa", "mqa")}
    assert heads == {"mha": 8, "gqa": 2, "mqa": 1}
    locals_ = [SPEC.preset("global_local").configure(LayerPlace(64, 8, 16, layer)).mask for layer in range(4)]
    assert locals_ == [attnkit.window(16), attnkit.causal()] * 2


def test_equals_torch_multi_head_attention() -> None:
    """A third implementation, with the same weights."""
    torch.manual_seed(0)
    layer = SoftmaxAttention(SoftmaxConfig(32, 4, mask=None, bias=True, backend="reference")).double()
    theirs = torch.nn.MultiheadAttention(32, 4, batch_first=True, dtype=torch.float64)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([layer.q.weight, layer.k.weight, layer.v.weight]))
        theirs.in_proj_bias.copy_(torch.cat([layer.q.bias, layer.k.bias, layer.v.bias]))
        theirs.out_proj.weight.copy_(layer.o.weight)
        theirs.out_proj.bias.copy_(layer.o.bias)
        x, context = torch.randn(2, 7, 32, dtype=torch.float64), torch.randn(2, 5, 32, dtype=torch.float64)
        hidden = torch.tensor([[False] * 5, [False, False, True, True, True]])
        wanted = theirs(x, context, context, key_padding_mask=hidden, need_weights=False)[0]
        found = layer(x, context, mask=attnkit.padding(~hidden))
    assert_within(found, wanted, wanted.clone(), torch.float64)


def test_padding_joins_the_mask_of_the_layer() -> None:
    torch.manual_seed(0)
    layer = SoftmaxAttention(SoftmaxConfig(16, 2, rotary=Rotary(8), backend="reference"))
    x = torch.randn(2, 6, 16)
    keep = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    with torch.no_grad():
        found = layer(x, mask=attnkit.padding(keep))[1:, :4]
        gold, naive = copy.deepcopy(layer).double()(x[1:, :4].double()), layer(x[1:, :4])
    assert_within(found, gold, naive, torch.float32)


def test_qk_norm_and_t5_and_alibi_show() -> None:
    torch.manual_seed(0)
    x = torch.randn(1, 20, 16)
    plain = SoftmaxAttention(SoftmaxConfig(16, 2))
    for settings in ({"qk_norm": True}, {"alibi": True}, {"t5": T5Buckets()}, {"rotary": Rotary(8)}, {"scale": 1.0}):
        other = SoftmaxAttention(SoftmaxConfig(16, 2, **settings))  # type: ignore[arg-type]
        other.load_state_dict(plain.state_dict(), strict=False)
        if other.t5_table is not None:
            torch.nn.init.normal_(other.t5_table)
        assert (other(x) - plain(x)).abs().max() > 0.01, settings


def test_a_value_size_of_its_own() -> None:
    layer = SoftmaxAttention(SoftmaxConfig(24, 3, kv_heads=1, head_size=10, value_size=6))
    assert layer(torch.randn(1, 4, 24)).shape == (1, 4, 24)
    state = layer.state(1, 9)
    assert state.nbytes == 9 * (10 + 6) * 4


REFUSALS: list[tuple[Any, type[Exception], str]] = [
    (lambda: SoftmaxConfig(0, 4), ValueError, "width is 0"),
    (lambda: SoftmaxConfig(32, 4, kv_heads=3), ValueError, "4 query heads and 3 KV heads"),
    (lambda: SoftmaxConfig(30, 4), ValueError, "width 30 is no multiple of 4 heads: say head_size="),
    (lambda: SoftmaxConfig(32, 4, rotary=Rotary(16)), ValueError, "rotary is made for head size 16, heads have 8"),
    (lambda: SoftmaxConfig(32, 4, alibi=True, t5=T5Buckets()), ValueError, "alibi and t5 are both on"),
    (lambda: SoftmaxAttention(SoftmaxConfig(32, 4, mask=None)).state(1, 5), ValueError, "cannot decode"),
    (lambda: SoftmaxAttention(SoftmaxConfig(32, 4, softcap=2.0, backend="sdpa"))(torch.zeros(1, 2, 32)),
     NotImplementedError, "softcap is 2.0, torch SDPA has none"),
]  # fmt: skip


@pytest.mark.parametrize(("act", "error", "said"), REFUSALS)
def test_refusals_say_what_to_do(act: Any, error: type[Exception], said: str) -> None:
    with pytest.raises(error) as caught:
        act()
    assert said in str(caught.value)


def test_a_full_state_is_refused() -> None:
    layer = SoftmaxAttention(SoftmaxConfig(16, 2))
    state = layer.state(1, 3)
    with torch.no_grad():
        layer.step(torch.randn(1, 3, 16), state)
        with pytest.raises(
            ValueError, match="holds 3 of 3 tokens and got 1 more: make the state with a capacity of at"
        ):
            layer.step(torch.randn(1, 1, 16), state)
