"""Features: neutral settings change nothing, others must show; extremes stay finite; parts join to the whole."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import attnkit
from attnkit.spec import Mechanism, Sizes
from attnkit.testing import runs
from attnkit.testing.budgets import allowed, assert_within
from attnkit.testing.laws.base import Refused, assert_equals_call, assert_matches, law, parameters, run, sample

NEUTRAL: dict[str, Callable[[int, int, int], Any]] = {
    "mask": lambda h, m, n: attnkit.full(),
    "bias": lambda h, m, n: torch.zeros(1, h, m, n),
    "alibi": lambda h, m, n: torch.zeros(h),
    "softcap": lambda h, m, n: 1e6,
    "sink": lambda h, m, n: torch.full((h,), -torch.inf),
    "dropout": lambda h, m, n: 0.0,
}
STRONG: dict[str, Callable[[int, int, int], Any]] = {
    "mask": lambda h, m, n: attnkit.window(max(1, n // 3)),
    "scale": lambda h, m, n: 0.7,
    "bias": lambda h, m, n: torch.randn(1, h, m, n),
    "alibi": lambda h, m, n: torch.linspace(0.1, 0.5, h),
    "softcap": lambda h, m, n: 1.0,
    "sink": lambda h, m, n: torch.linspace(-1.0, 2.0, h),
    "dropout": lambda h, m, n: 0.3,
}


@law(examples=8, full=100, takes_any=tuple(NEUTRAL))
def neutral_features(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """A feature at its neutral value (window >= n, sink -inf, cap 10^6, slope 0, p 0 ...) is the call without it."""
    m, n, h = rng.choice(((1, 70), (50, 50), (9, 65))) + (4,)
    plain = sample(spec, rng, b=2, h=h, g=2, m=m, n=n, d=16, e=8)
    names = [name for name in NEUTRAL if name in parameters(spec)]
    tried = 0
    for name in names:
        base = {**plain, "mask": None} if name == "mask" else plain
        neutral = {**base, name: NEUTRAL[name](h, m, n)}
        if not runs.reasons(spec, backend, neutral):
            assert_equals_call(run(spec, backend, neutral)[0], spec, base, f"neutral {name}")
            tried += 1
    if "mask" in names:
        window = {**plain, "mask": attnkit.window(n + rng.randint(0, 2))}
        assert_equals_call(run(spec, backend, window)[0], spec, {**plain, "mask": attnkit.causal()}, "wide window")
        dense = {**plain, "mask": attnkit.block_sparse(torch.ones(8, 8, dtype=torch.bool), 16) & attnkit.causal()}
        assert_equals_call(run(spec, backend, dense)[0], spec, {**plain, "mask": attnkit.causal()}, "all blocks")
        tried += 1
    if not tried:
        raise Refused


@law(examples=6, promised="separate_readers")
def repeated_kv_heads(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """Grouped heads are multi-head attention with each KV head written out for its readers."""
    g, r = rng.choice(((1, 4), (2, 3), (4, 1)))
    grouped = sample(spec, rng, b=2, h=g * r, g=g, m=49, n=49, d=16, e=8)
    written = {
        name: x.repeat_interleave(r, 1)
        for name, x in runs.tensors(grouped).items()
        if x.dim() > 2 and x.shape[1] == g and name != "q"
    }
    assert_equals_call(run(spec, backend, {**grouped, **written})[0], spec, grouped)


@law(examples=6, takes_any=tuple(STRONG))
def features_show(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """Each feature is refused, or changes the result by over 100 times the budget and is right."""
    m, n, h = rng.choice(((1, 70), (49, 65))) + (4,)
    plain = sample(spec, rng, b=2, h=h, g=2, m=m, n=n, d=16, e=8)
    without, floor = runs.gold(spec, plain)[0], runs.naive(spec, plain)[0]
    budget = allowed(without, floor, torch.float32)
    tried = 0
    for name in STRONG:
        if name not in parameters(spec) or (name == "scale" and not spec.laws.soft):
            continue
        strong = {**plain, name: STRONG[name](h, m, n)}
        if name == "dropout":
            strong["seed"] = rng.randrange(1 << 30)
        if runs.reasons(spec, backend, strong):
            continue
        o = run(spec, backend, strong)[0]
        effect = (o.double() - without).abs().max().item()
        assert effect > 100 * budget, f"{backend} takes {name} and ignores it: the result moves by {effect:.2g}"
        assert_equals_call(o, spec, strong, name)
        tried += 1
    if not tried:
        raise Refused


def _huge_scores(q: Tensor, k: Tensor) -> None:
    q.mul_(100), k.mul_(100)


def _one_dominant_key(q: Tensor, k: Tensor) -> None:
    q.fill_(1), k.zero_()
    k[:, :, k.shape[2] // 2] = 1000


def _identical_keys(q: Tensor, k: Tensor) -> None:
    k.copy_(k[:, :, :1].clone().expand_as(k))


def _subnormal(q: Tensor, k: Tensor) -> None:
    q.mul_(torch.finfo(q.dtype).tiny / 16)


def _sixty(q: Tensor, k: Tensor) -> None:
    q.fill_(60), k.fill_(60)


def _very_negative(q: Tensor, k: Tensor) -> None:
    q.fill_(100), k.fill_(-100)


EXTREMES = (_huge_scores, _one_dominant_key, _identical_keys, _subnormal, _sixty, _very_negative)


@law(examples=18, full=300, takes=("q", "k"))
def extremes(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """Scores of +-10^4, one dominant key, equal keys, subnormals, products beyond float16: finite where gold is.

    And within the budget, unless the definition itself misses it: what is added to a score of 10^5 (a position's bias,
    a gate) keeps two digits in float32, whoever adds it.
    """
    dtype = rng.choice((torch.float32, torch.bfloat16, torch.float16))
    m, n = rng.choice(((1, 70), (49, 49)))
    # A head size whose root is no power of 2: else multiplying by the scale rounds nothing, the plain run is the
    # definition bit for bit, and the budget is how well that one order of sums happened to do.
    arguments = sample(spec, rng, dtype, b=2, h=2, g=1, m=m, n=n, d=59, e=8)
    rng.choice(EXTREMES)(arguments["q"], arguments["k"])
    try:
        runs.assert_matches(spec, "reference", arguments)
    except AssertionError:
        for found, true in zip(run(spec, backend, arguments), runs.gold(spec, arguments), strict=True):
            # A sum that no weights divide may be finite and still more than the result's dtype can say.
            assert torch.equal(found.isfinite(), true.to(found.dtype).isfinite()), "not finite where the definition is"
    else:
        assert_matches(spec, backend, arguments)


@law(examples=4, takes=("mask",))
def nothing_there(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """No queries, no keys, no sequences: an empty result, or zeros where there is a query and nothing to see."""
    for empty in ({"m": 0}, {"n": 0}, {"m": 0, "n": 0}, {"b": 0}):
        size = {"b": 2, "h": 2, "g": 1, "m": rng.choice((3, 20)), "n": 5, "d": 8, "e": 4, **empty}
        arguments = spec.sample(rng.randrange(1 << 30), Sizes(**size), torch.float32)
        hole = torch.zeros(size["m"], size["n"], dtype=torch.bool)
        for mask in (None, hole, attnkit.causal(), attnkit.window(2), attnkit.prefix(2) & attnkit.causal()):
            call = {**arguments, "mask": mask}
            if not runs.reasons(spec, backend, call):
                runs.assert_matches(spec, backend, call)


@law(examples=20, takes=("mask", "return_lse"))
def parts_merge(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """Keys split anywhere, some parts empty or hidden, joined by log-sum-exp: result and log-sum-exp of the whole."""
    n = rng.choice((1, 5, 64, 130))
    m = rng.randint(1, min(n, 40))
    arguments = sample(spec, rng, b=2, h=4, g=2, m=m, n=n, d=16, e=8)
    keep = torch.rand(1, 1, m, n) < 0.7
    cuts = sorted(rng.randint(0, n) for _ in range(rng.randint(1, 4)))
    parts = []
    for start, end in zip([0, *cuts], [*cuts, n], strict=True):
        part = {name: arguments[name][:, :, start:end].clone() for name in ("k", "v")}
        mask = keep[..., start:end].clone()
        parts.append(run(spec, backend, {**arguments, **part, "mask": mask, "return_lse": True}))
    rng.shuffle(parts)
    o, lse = parts[0]
    for other in parts[1:]:
        o, lse = attnkit.merge(o, lse, *other)
    whole = {**arguments, "mask": keep, "return_lse": True}
    runs.assert_results_within((o, lse), runs.gold(spec, whole), runs.naive(spec, whole), torch.float32)


@law(examples=4, takes=("dropout", "seed"))
def dropout(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """A seed replays, another does not; the kept share is 1 - p, kept weights grow by 1 / (1 - p)."""
    n, p = 128, 0.17
    arguments = sample(spec, rng, b=2, h=4, g=2, m=n, n=n, d=8, e=n)
    arguments |= {"mask": None, "dropout": p, "seed": rng.randrange(1 << 30)}
    arguments["v"].copy_(torch.eye(n))
    dropped = run(spec, backend, arguments)[0]
    assert torch.equal(dropped, run(spec, backend, arguments)[0]), "the same seed drops other weights"
    other = run(spec, backend, {**arguments, "seed": arguments["seed"] + 1})[0]
    assert not torch.equal(dropped, other), "another seed drops the same weights"
    share = (dropped != 0).double().mean().item()
    # 131,072 weights: the standard deviation of the share is 0.001, so 1 % is 10 of them.
    assert abs(share - (1 - p)) < 0.01, f"{share:.3f} of the weights are kept, expected {1 - p}"
    whole = run(spec, backend, {**arguments, "dropout": 0.0})[0]
    kept = torch.where(dropped != 0, whole / (1 - p), 0.0)
    assert_within(dropped, kept.double(), kept.clone(), torch.float32, what="kept weights")
