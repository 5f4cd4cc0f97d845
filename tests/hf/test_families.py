"""Every family of decoders says the same with our attention as with Transformers' own, or says why it does not run.

Truth is the eager implementation in float64 (with the float32 softmax inside it made float64 too); the budget is that
of the eager implementation in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, StaticCache

import attnkit.hf
from attnkit.dispatch import watch
from attnkit.testing.budgets import assert_within

# Families that do not call an attention function, and keep their own attention whatever is asked for.
OWN_ATTENTION = {"bloom", "falcon", "mpt"}
NO_ATTENTION = {"mamba2", "rwkv"}
# Whole families that are refused.
REFUSED = {"deepseek_v4": "computes cat with its attention mask"}
KEEPS_OWN_CACHE = {"minimax"}
# Their recurrent layers mix what attention makes of padding, which sees no key: 0 with us and SDPA, a mean with eager.
PADDING_MATTERS = {"recurrent_gemma"}
# All of these but attention is float64 in a float64 model, so that nothing blurs the comparison.
EXACT = {"gpt2", "opt", "starcoder2", "stablelm"}

LENGTH, PREFILL, PADDED = 24, 15, 6
IDS = torch.randint(3, 99, (2, LENGTH), generator=torch.Generator().manual_seed(1))
KEPT = torch.ones_like(IDS)
KEPT[0, :PADDED] = 0
POSITIONS = torch.cat([torch.arange(n) for n in (10, 9, 5)])[None].expand(2, -1)


def padded(model: Any) -> Tensor:
    return model(IDS, attention_mask=KEPT, use_cache=False).logits[KEPT.bool()]


def packed(model: Any) -> Tensor:
    return model(IDS, position_ids=POSITIONS, use_cache=False).logits


def decoded(model: Any, cache: Any) -> Tensor:
    """A prefill, single tokens, then several at once; the window of 8 is passed on the way."""
    logits, start = [], 0
    for end in (PREFILL, *range(PREFILL + 1, LENGTH - 3), LENGTH):
        out = model(IDS[:, start:end], attention_mask=KEPT[:, :end], cache=cache, use_cache=True)
        logits.append(out.logits)
        start = end
    return torch.cat(logits, 1)[KEPT.bool()]


def runs(model: Any) -> dict[str, Callable[[], Tensor]]:
    return {
        "padded": lambda: padded(model),
        "packed": lambda: packed(model),
        "dynamic cache": lambda: decoded(model, DynamicCache(config=model.config)),
        "static cache": lambda: decoded(model, StaticCache(config=model.config, max_cache_len=LENGTH + 9)),
        "our cache": lambda: decoded(model, attnkit.hf.Cache(model.config)),
    }


@torch.no_grad()
def test_family(each_family: str, tiny: Callable[..., Any], softmax_in_float64: None) -> None:
    family = each_family
    ours = tiny(family)
    ours.set_attn_implementation("attnkit")
    if family in OWN_ATTENTION | NO_ATTENTION:
        with watch() as ran:
            padded(ours)
        assert not ran
        return
    if family in REFUSED:
        with pytest.raises(NotImplementedError, match=REFUSED[family]):
            padded(ours)
        return
    plain = tiny(family, "sdpa" if family in PADDING_MATTERS else "eager")
    naive, got = runs(plain), runs(ours)
    if family in KEEPS_OWN_CACHE:
        for name in ("dynamic cache", "static cache", "our cache"):
            del naive[name], got[name]
    before = {"padded": padded(plain), "packed": packed(plain)}
    if "dynamic cache" in naive:
        before["cached"] = naive["dynamic cache"]()
    plain.to(torch.float64)
    gold = {"padded": padded(plain), "packed": packed(plain)}
    if "dynamic cache" in naive:
        gold["cached"] = naive["dynamic cache"]()
    for name, run in got.items():
        kind = "cached" if "cache" in name else name
        with watch() as ran:
            logits = run()
        assert {mechanism for mechanism, _ in ran} == {"softmax"}
        assert_within(logits, gold[kind].double(), before[kind], torch.float32, what=f"{family}, {name}")
    if family in EXACT:
        ours.to(torch.float64)
        for name, run in runs(ours).items():
            kind = "cached" if "cache" in name else name
            assert_within(run(), gold[kind].clone(), before[kind], torch.float64, what=f"{family}, {name} in float64")
