"""A second oracle for softmax attention: four nested loops on Python floats, from the written definition alone.

It shares nothing with the vectorised reference: no tensors, no mask algebra, no stabilised softmax. An oracle can be
wrong itself; two that were written apart seldom are in the same way.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch

from attnkit.registry import get
from attnkit.spec import Sizes
from attnkit.testing import runs, samplers
from attnkit.testing.budgets import assert_within
from attnkit.testing.rules import Rule, any_rule

SPEC = get("softmax")
CASES = 400


def by_loops(call: dict[str, Any], rule: Rule | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp of one call, one number at a time."""
    q, k, v = (call[name].tolist() for name in ("q", "k", "v"))
    (b, h, m, d), (_, g, n, e) = call["q"].shape, call["v"].shape
    scale = d**-0.5 if call.get("scale") is None else call["scale"]
    bias = None if call.get("bias") is None else call["bias"].expand(b, h, m, n).tolist()
    alibi, sink = (None if call.get(name) is None else call[name].tolist() for name in ("alibi", "sink"))
    output = torch.zeros(b, h, m, e, dtype=torch.float64)
    lse = torch.full((b, h, m), -math.inf, dtype=torch.float64)
    for ib in range(b):
        for ih in range(h):
            group = ih // (h // g)
            for i in range(m):
                position, weights = n - m + i, {}
                for j in range(n):
                    if rule is not None and not rule.sees(ib, ih, position, j):
                        continue
                    logit = sum(q[ib][ih][i][c] * k[ib][group][j][c] for c in range(d)) * scale
                    if call.get("softcap") is not None:
                        logit = call["softcap"] * math.tanh(logit / call["softcap"])
                    if bias is not None:
                        logit += bias[ib][ih][i][j]
                    if alibi is not None:
                        logit -= alibi[ih] * abs(position - j)
                    weights[j] = math.exp(logit)
                total = math.fsum(weights.values()) + (math.exp(sink[ih]) if sink is not None else 0.0)
                if total == 0:
                    continue
                lse[ib, ih, i] = math.log(total)
                for c in range(e):
                    output[ib, ih, i, c] = math.fsum(w * v[ib][group][j][c] for j, w in weights.items()) / total
    return output, lse


def tiny_call(seed: int) -> tuple[dict[str, Any], Rule | None]:
    rng = random.Random(seed)
    g, n = rng.choice((1, 2)), rng.randint(1, 9)
    size = Sizes(
        b=rng.choice((1, 2)), h=g * rng.choice((1, 2, 3)), g=g, m=rng.randint(1, n), n=n, d=rng.randint(1, 5), e=3
    )
    call = samplers.arguments(SPEC, rng, of=size, dtype=torch.float64)
    rule = any_rule(rng, size.b, size.h, size.m, size.n) if rng.random() < 0.8 else None
    return {**call, "mask": rule.mask if rule else None, "return_lse": True}, rule


def test_softmax_reference_equals_nested_loops() -> None:
    for seed in range(CASES):
        call, rule = tiny_call(seed)
        found = runs.run(SPEC, "reference", call)
        for name, got, loops in zip(("output", "lse"), found, by_loops(call, rule), strict=True):
            # The float64 gate is 1e-12 of the largest magnitude, whatever the naive run says.
            assert_within(got, loops, loops.clone(), torch.float64, what=f"{name} of case {seed}")


@pytest.mark.parametrize("wrong", ["scale", "softcap", "sink", "bias", "alibi", "mask"])
def test_softmax_loops_notice_a_dropped_feature(wrong: str) -> None:
    """The inverse: if the loops agreed with a reference that ignores a feature, they would prove nothing."""
    noticed = 0
    for seed in range(60):
        call, rule = tiny_call(seed)
        if call.get(wrong) is None:
            continue
        found = runs.run(SPEC, "reference", {**call, wrong: None})
        try:
            for got, loops in zip(found, by_loops(call, rule), strict=True):
                assert_within(got, loops, loops.clone(), torch.float64)
        except AssertionError:
            noticed += 1
    assert noticed >= 5
