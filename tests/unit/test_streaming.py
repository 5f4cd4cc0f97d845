"""Positions inside the cache (StreamingLLM): a cache kept as a list is the oracle, runs are several windows long."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import attnkit
from attnkit.mechanisms.softmax import SoftmaxAttention, SoftmaxConfig
from attnkit.positions import Rotary, T5Buckets
from attnkit.registry import get
from attnkit.spec import LayerPlace
from attnkit.state import KVState, WindowState

WIDTH, HEADS, GROUPS = 16, 4, 2
SIZES = [(5, 3), (3, 4), (1, 2), (6, 1), (4, 0)]


def masked(window: int, sinks: int) -> Any:
    kept = attnkit.window(window) | attnkit.global_tokens(sinks) if sinks else attnkit.window(window)
    return kept & attnkit.causal()


def layer_of(window: int, sinks: int, **settings: Any) -> SoftmaxAttention:
    torch.manual_seed(0)
    config = SoftmaxConfig(
        WIDTH, HEADS, kv_heads=GROUPS, mask=masked(window, sinks), rotary=Rotary(4), positions="cache", **settings
    )
    return SoftmaxAttention(config).double()


def turned(x: Tensor, position: int) -> Tensor:
    """Rotary of style "half" for one vector, with complex numbers."""
    half = len(x) // 2
    angles = torch.tensor([position * 10000.0 ** (-i / half) for i in range(half)], dtype=torch.float64)
    z = torch.complex(x[:half], x[half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat([z.real, z.imag])


def by_list(layer: SoftmaxAttention, x: Tensor, window: int, sinks: int) -> Tensor:
    """One token after the other: append to a list, evict, number what is left from 0, attend."""
    q, k, v = (linear(x[0]).unflatten(-1, (-1, 4)) for linear in (layer.q, layer.k, layer.v))
    rows = []
    for group in range(GROUPS):
        kept: list[int] = []
        for i in range(x.shape[1]):
            kept.append(i)
            if len(kept) > sinks + window:
                del kept[sinks]
            for head in range(group * 2, group * 2 + 2):
                query = turned(q[i, head], len(kept) - 1)
                logits = [float(query @ turned(k[j, group], slot)) / 2 for slot, j in enumerate(kept)]
                weights = [math.exp(logit) for logit in logits]
                o = sum(weight * v[j, group] for weight, j in zip(weights, kept, strict=True))
                rows.append((i, head, o / sum(weights)))
    o = torch.zeros(x.shape[1], HEADS, 4, dtype=torch.float64)
    for i, head, row in rows:
        o[i, head] = row
    return layer.o(o.flatten(1))[None]  # type: ignore[no-any-return]


@pytest.mark.parametrize(("window", "sinks"), SIZES)
def test_one_pass_and_steps_equal_a_cache_kept_as_a_list(window: int, sinks: int) -> None:
    layer, x = layer_of(window, sinks), torch.randn(1, 33, WIDTH, dtype=torch.float64)
    with torch.no_grad():
        true = by_list(layer, x, window, sinks)
        assert (layer(x) - true).abs().max() < 1e-12
        for sizes in ([1] * 33, [7, 1, 1, 9, 1, 12, 2], [33], [window + sinks] * 2 + [1] * (33 - 2 * (window + sinks))):
            state, rows = layer.state(1, 33, dtype=torch.float64), []
            assert isinstance(state, WindowState)
            for part in x.split(sizes, 1):
                y, state = layer.step(part, state)
                rows.append(y)
            assert (torch.cat(rows, 1) - true).abs().max() < 1e-12, sizes


def test_until_the_cache_is_full_it_is_the_window_with_first_tokens_and_afterwards_not() -> None:
    layer, x = layer_of(5, 3), torch.randn(2, 30, WIDTH, dtype=torch.float64)
    text = SoftmaxAttention(SoftmaxConfig(WIDTH, HEADS, kv_heads=GROUPS, mask=masked(5, 3), rotary=Rotary(4))).double()
    text.load_state_dict(layer.state_dict())
    gap = (layer(x) - text(x)).abs().amax((0, 2))
    assert gap[:8].max() < 1e-12
    assert gap[8:].min() > 1e-4
    # A window without first tokens has nothing whose distance could change.
    alone, text.config = (
        layer_of(5, 0),
        SoftmaxConfig(WIDTH, HEADS, kv_heads=GROUPS, mask=masked(5, 0), rotary=Rotary(4)),
    )
    assert (alone(x) - text(x)).abs().max() < 1e-12


def test_the_state_holds_keys_that_are_not_turned() -> None:
    layer, x = layer_of(5, 3), torch.randn(1, 20, WIDTH, dtype=torch.float64)
    state = layer.state(1, 40, dtype=torch.float64)
    with torch.no_grad():
        layer.step(x, state)
        view = state.view()
        assert view.positions is not None and sorted(view.positions.tolist()) == [0, 1, 2, 15, 16, 17, 18, 19]
        keys = layer.k(x).unflatten(-1, (GROUPS, -1)).transpose(1, 2)
        assert torch.equal(view.k, keys[:, :, view.positions])
    assert isinstance(layer.state(1, 8), KVState), "room for all tokens: none is ever let go of"


@pytest.mark.parametrize("settings", [{"qk_norm": True, "sink": True}, {"softcap": 2.0, "scale": 0.7}])
def test_it_goes_with_the_other_settings(settings: dict[str, Any]) -> None:
    layer, x = layer_of(4, 2, **settings), torch.randn(2, 25, WIDTH, dtype=torch.float64)
    layer.requires_grad_(False)
    state, rows = layer.state(2, 25, dtype=torch.float64), []
    for part in x.split([1] * 15 + [10], 1):
        y, state = layer.step(part, state)
        rows.append(y)
    assert (torch.cat(rows, 1) - layer(x)).abs().max() < 1e-12


def test_the_preset_streams() -> None:
    config = get("softmax").preset("streaming").configure(LayerPlace(WIDTH, HEADS, 6))
    assert config.positions == "cache" and config.mask.reach() == (6, 4, True)


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"positions": "slot"}, "positions is 'slot', expected 'text' or 'cache'"),
    ({"rotary": None}, "positions are those of the cache, expected rotary= and no alibi or t5"),
    ({"alibi": True}, "positions are those of the cache, expected rotary= and no alibi or t5"),
    ({"t5": T5Buckets()}, "positions are those of the cache, expected rotary= and no alibi or t5"),
    ({"mask": attnkit.causal()}, r"the mask is causal\(\), expected one that shows the last keys and the first"),
    ({"mask": None}, "the mask is None, expected one that shows"),
    ({"mask": attnkit.dilated_window(4, 2)}, r"the mask is dilated_window\(4, 2\), expected one that shows"),
]


@pytest.mark.parametrize(("wrong", "said"), REFUSALS)
def test_what_has_no_slots_is_refused(wrong: dict[str, Any], said: str) -> None:
    settings = {"mask": masked(5, 3), "rotary": Rotary(4), "positions": "cache", **wrong}
    with pytest.raises(ValueError, match=said):
        SoftmaxConfig(WIDTH, HEADS, **settings)
