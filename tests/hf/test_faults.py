"""Mistakes that wrappers really make, planted in ours: the comparison with eager has to find each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

import attnkit
from attnkit.hf import masks
from attnkit.hf.attention import attention
from attnkit.masks.patterns import Interval
from attnkit.testing.budgets import assert_within

IDS = torch.randint(3, 99, (2, 24), generator=torch.Generator().manual_seed(1))
KEPT = torch.ones_like(IDS)
KEPT[0, :6] = 0


def wider(mask: Any) -> Any:
    left, right = mask.mask.interval() or (None, None)
    if left is None or mask.window is None:
        return mask
    return masks.CarriedMask(Interval(left + 1, right), tuple(mask.shape), mask.keys, mask.device, mask.window)


def fault(kind: str) -> Callable[..., Any]:
    def broken(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **kwargs: Any) -> Any:
        if kind == "sinks dropped":
            kwargs["s_aux"] = torch.full_like(kwargs["s_aux"], -torch.inf)
        elif kind == "window one wider":
            mask = wider(mask)
        elif kind == "softcap dropped":
            kwargs["softcap"] = None
        elif kind == "mask missing":
            kwargs["sliding_window"], mask = (
                None,
                masks.CarriedMask(attnkit.causal(), tuple(mask.shape), mask.keys, mask.device, None),
            )
        elif kind == "heads tiled":
            k, v = (x.repeat(1, q.shape[1] // k.shape[1], 1, 1) for x in (k, v))
        elif kind == "scale 1 % off":
            kwargs["scaling"] *= 1.01
        return attention(module, q, k, v, mask, **kwargs)

    return broken


def logits(model: Any, padded: bool) -> Tensor:
    with torch.no_grad():
        return model(IDS, attention_mask=KEPT if padded else None, use_cache=False).logits[KEPT.bool()]


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        ("none", "gpt_oss"),
        ("none", "gemma2"),
        ("none", "mistral"),
        ("sinks dropped", "gpt_oss"),
        ("window one wider", "mistral"),
        ("softcap dropped", "gemma2"),
        ("mask missing", "llama"),
        ("heads tiled", "llama"),
        ("scale 1 % off", "llama"),
    ],
)
def test_a_planted_fault_is_found(kind: str, family: str, tiny: Callable[..., Any]) -> None:
    changes = {"attn_logit_softcapping": 0.5, "initializer_range": 0.3} if family == "gemma2" else {}
    plain = tiny(family, **changes)
    padded = kind == "mask missing"
    naive = logits(plain, padded)
    gold = logits(plain.to(torch.float64), padded).double()
    AttentionInterface.register("broken", fault(kind))
    AttentionMaskInterface.register("broken", masks.attention_mask)
    try:
        got = logits(tiny(family, "broken", **changes), padded)
    finally:
        del AttentionInterface._global_mapping["broken"], AttentionMaskInterface._global_mapping["broken"]
    if kind == "none":
        assert_within(got, gold, naive, torch.float32)
    else:
        with pytest.raises(AssertionError):
            assert_within(got, gold, naive, torch.float32)


def test_gradients_are_those_of_eager(tiny: Callable[..., Any]) -> None:
    found = {}
    for implementation, dtype in (("eager", torch.float64), ("eager", torch.float32), ("attnkit", torch.float32)):
        model = tiny("gpt_oss", implementation, dtype).train()
        model(IDS, attention_mask=KEPT, labels=IDS.where(KEPT.bool(), -100), use_cache=False).loss.backward()
        found[implementation, dtype] = [layer.self_attn.sinks.grad for layer in model.model.layers]
    gold, naive, got = (torch.cat(found[key]) for key in found)
    assert_within(got, gold, naive, torch.float32, gradient=True, what="gradient of the sinks")


Q = torch.randn(1, 2, 3, 4)


@pytest.mark.parametrize(
    ("kwargs", "error"),
    [
        ({"temperature": 2.0}, "temperature"),
        ({"output_attentions": True}, "weights"),
        ({"cache": object()}, "generate_batch"),
        ({"cu_seq_lens_q": torch.tensor([0, 3])}, "position_ids"),
    ],
)
def test_what_would_change_the_result_is_refused(kwargs: dict[str, Any], error: str) -> None:
    with pytest.raises(NotImplementedError, match=error):
        attention(torch.nn.Module(), Q, Q, Q, None, **kwargs)


def test_windows_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match="sliding_window=2"):
        attention(torch.nn.Module(), Q, Q, Q, None, sliding_window=2)


def test_sinks_that_are_not_passed_are_refused() -> None:
    module = torch.nn.Module()
    module.sinks = torch.nn.Parameter(torch.zeros(2))
    with pytest.raises(NotImplementedError, match="does not pass them as s_aux"):
        attention(module, Q, Q, Q, None)


def test_dropout_is_honoured() -> None:
    q, v = torch.zeros(1, 50, 1, 4), torch.eye(4).expand(1, 50, 4, 4)
    torch.manual_seed(0)
    weights = attention(torch.nn.Module(), q, v, v, None, dropout=0.5)[0]
    assert set(weights.unique().tolist()) == {0.0, 0.5}  # four weights of 1/4, doubled where they are kept
    assert 60 < int((weights == 0).sum()) < 140


def test_masks_and_biases_of_the_caller_are_applied() -> None:
    k, bias, added = torch.randn(1, 2, 5, 4), torch.randn(1, 2, 3, 5), torch.randn(1, 1, 3, 5)
    keep = torch.tensor([[True, False, True, True, False]]).expand(1, 1, 3, 5)
    plain = torch.nn.functional.scaled_dot_product_attention
    for mask, together in ((keep, bias.masked_fill(~keep, -torch.inf)), (added, bias + added)):
        got = attention(torch.nn.Module(), Q, k, k, mask, position_bias=bias)[0].transpose(1, 2)
        torch.testing.assert_close(got, plain(Q, k, k, attn_mask=together))


def test_no_mask_is_causal_from_the_upper_left() -> None:
    k = torch.randn(1, 2, 5, 4)
    for keys, values in ((k, k), (k[:, :, :2], k[:, :, :2])):
        got = attention(torch.nn.Module(), Q, keys, values, None)[0].transpose(1, 2)
        want = torch.nn.functional.scaled_dot_product_attention(Q, keys, values, is_causal=True)
        torch.testing.assert_close(got, want)
    one = attention(torch.nn.Module(), Q[:, :, :1], k, k, None)[0].transpose(1, 2)
    torch.testing.assert_close(one, torch.nn.functional.scaled_dot_product_attention(Q[:, :, :1], k, k))


@pytest.mark.parametrize("name", ["eager", "sdpa", "my_flash", "a/b", ""])
def test_names_that_mean_something_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match="register got the name"):
        attnkit.hf.register(name)
