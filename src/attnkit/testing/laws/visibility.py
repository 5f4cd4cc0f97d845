"""Who sees what: nothing of the future, of padding, of another document or of a hidden key reaches a result."""

from __future__ import annotations

import random

import torch
from torch import Tensor

import attnkit
from attnkit.spec import Mechanism
from attnkit.testing import rules, runs
from attnkit.testing.laws.base import (
    along,
    assert_equals_call,
    assert_matches,
    assert_same,
    law,
    parameters,
    run,
    sample,
)


@law(examples=20, full=500, promised="causal")
def causality(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """Noise, huge numbers and NaN put into the future change no bit of the past, and the past has no gradient there."""
    n = rng.choice((2, 17, 49, 97, 130))
    dtype = rng.choice((torch.float32, torch.float32, torch.bfloat16, torch.float16))
    arguments = sample(spec, rng, dtype, b=2, h=4, g=2, m=n, n=n, d=16, e=8)
    cut = rng.randint(1, n - 1)
    clean = run(spec, backend, arguments)[0][:, :, :cut]
    garbage = [1e3, torch.finfo(dtype).max ** 0.5]
    if not spec.backend(backend).finite_only:
        garbage += [torch.finfo(dtype).max, torch.inf, torch.nan]
    for value in garbage:
        later = {name: x.clone() for name, x in along(arguments, 2, n).items()}
        for x in later.values():
            x[:, :, cut:] = value if value != 1e3 else torch.randn_like(x[:, :, cut:]) * 10
        found = run(spec, backend, {**arguments, **later})[0][:, :, :cut]
        assert_same(found, clean, f"{value} after position {cut} of {n}")
    if spec.backend(backend).grad:
        _no_gradient_from_the_future(spec, backend, arguments, n, cut)


def _no_gradient_from_the_future(spec: Mechanism, backend: str, arguments: runs.Arguments, n: int, cut: int) -> None:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in along(arguments, 2, n).items()}
    wanted = {**arguments, **leaves}
    if runs.reasons(spec, backend, wanted):
        return
    past = runs.run(spec, backend, wanted)[0][:, :, :cut].sum()
    for name, slope in zip(leaves, torch.autograd.grad(past, list(leaves.values())), strict=True):
        assert not slope[:, :, cut:].any(), f"{name} after position {cut} has a gradient from the past"


@law(examples=8, promised="causal")
def prefixes(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """The first rows of a long sequence are the rows of the short one."""
    n = rng.choice((7, 49, 100))
    arguments = sample(spec, rng, b=1, h=2, g=1, m=n, n=n, d=16, e=8)
    short = rng.randint(1, n)
    part = {**arguments, **{name: x[:, :, :short].clone() for name, x in along(arguments, 2, n).items()}}
    o = run(spec, backend, arguments)[0][:, :, :short].clone()
    assert_equals_call(o, spec, part)


@law(examples=40, takes=("k", "v", "mask"))
def visible_set(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """The keys that each query really used are those its mask's rule names: values mark keys, one key is boosted.

    A mechanism that chooses among the visible keys uses no others; a hard choice among equals, the first of them.
    """
    dtype = rng.choice((torch.float32, torch.bfloat16, torch.float16))
    b, g, r, n = rng.choice((1, 2)), rng.choice((1, 2)), rng.choice((1, 2)), rng.choice((1, 9, 48, 65, 100))
    m, h = rng.choice((n, rng.randint(1, n))), g * r
    rule = rules.any_rule(rng, b, h, m, n)
    sees = rule.table(b, h, m, n)
    arguments = sample(spec, rng, dtype, b=b, h=h, g=g, m=m, n=n, d=8, e=n)
    arguments["q"].fill_(1)
    arguments["k"].zero_()
    arguments["v"].copy_(torch.eye(n))
    arguments["mask"] = rule.mask
    used = run(spec, backend, arguments)[0] > 0
    if spec.laws.every_key:
        wrong = (used != (sees if spec.laws.soft else sees & (sees.cumsum(-1) == 1))).nonzero()
    else:
        wrong = (used & ~sees).nonzero()
    assert not len(wrong), (
        f"{rule.mask!r} with {m} queries and {n} keys: batch, head, query, key {wrong[0].tolist()} is "
        f"{'used' if used[tuple(wrong[0])] else 'not used'}, expected the opposite ({len(wrong)} pairs are wrong)"
    )
    boosted = rng.randrange(n)
    arguments["k"][:, :, boosted] = 40
    o = run(spec, backend, arguments)[0]
    share = o[..., boosted] / o.sum(-1).clamp(min=torch.finfo(dtype).tiny)  # a gate may scale the whole row
    assert bool(((share > 0.5) == sees[..., boosted]).all()), f"key {boosted} was boosted and another answered"


@law(examples=16, takes=("k", "v", "mask"))
def hidden_garbage(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """NaN and infinity in keys and values that a row may not see never reach it."""
    dtype = rng.choice((torch.float32, torch.bfloat16, torch.float16))
    n = rng.choice((3, 48, 65, 100))
    m = rng.randint(1, n)
    rule = rules.any_rule(rng, 2, 4, m, n)
    arguments = sample(spec, rng, dtype, b=2, h=4, g=2, m=m, n=n, d=16, e=8)
    arguments["mask"] = rule.mask
    row = rng.randrange(m)
    clean = run(spec, backend, arguments)[0][:, :, row]
    sees = rule.table(2, 4, m, n)[:, :, row].unflatten(1, (2, 2)).any(2)  # by KV head
    finite = spec.backend(backend).finite_only
    for value in (100.0,) if finite else (100.0, torch.inf, -torch.inf, torch.nan):
        for names in (("k",), ("v",), ("k", "v")):
            spoiled = {name: arguments[name].masked_fill(~sees[..., None], value) for name in names}
            found = run(spec, backend, {**arguments, **spoiled})[0][:, :, row]
            assert_same(found, clean, f"{value} in hidden {' and '.join(names)} of {rule.mask!r}, row {row}")


@law(examples=12, takes=("mask",))
def empty_rows(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """A row that may see nothing gives exactly 0, log-sum-exp -inf (the sink's value with a sink), and no gradient."""
    takes = parameters(spec)
    m, n = rng.choice(((5, 5), (49, 65), (1, 3), (70, 70)))
    arguments = sample(spec, rng, b=2, h=2, g=1, m=m, n=n, d=8, e=4)
    if "sink" in takes and rng.random() < 0.5:
        arguments["sink"] = torch.randn(2)
    if "return_lse" in takes and not runs.reasons(spec, backend, {**arguments, "return_lse": True}):
        arguments["return_lse"] = True
    empty = torch.rand(2, 2, m) < 0.3
    empty[..., rng.randrange(m)] = True
    how = rng.choice(("mask", "mask", "-inf", "lowest", "half precision lowest")) if "bias" in takes else "mask"
    if how == "mask":
        arguments["mask"] = ~empty[..., None].expand(2, 2, m, n)
    else:
        hidden = torch.float16 if how.startswith("half") else torch.float32
        value = -torch.inf if how == "-inf" else torch.finfo(hidden).min
        arguments.pop("mask")
        arguments["bias"] = torch.zeros(2, 2, m, n, dtype=hidden).masked_fill(empty[..., None], value)
    o, *lse = run(spec, backend, arguments)
    assert not o[empty].any(), f"a row hidden by {how} gives {o[empty].abs().max()}, expected 0"
    if lse and "sink" not in arguments:
        assert bool((lse[0][empty] == -torch.inf).all()), f"a row hidden by {how} has log-sum-exp {lse[0][empty]}"
    assert_matches(spec, backend, arguments)
    if spec.backend(backend).grad:
        _empty_rows_have_no_gradient(spec, backend, arguments, empty)


def _empty_rows_have_no_gradient(spec: Mechanism, backend: str, arguments: runs.Arguments, empty: Tensor) -> None:
    leaves = {name: x.detach().clone().requires_grad_() for name, x in runs.tensors(arguments).items()}
    wanted = {name: x for name, x in {**arguments, **leaves}.items() if name != "return_lse"}
    if runs.reasons(spec, backend, wanted):
        return
    o = runs.run(spec, backend, wanted)[0]
    slopes = torch.autograd.grad(o.sum(), list(leaves.values()), allow_unused=True, retain_graph=True)
    for name, slope in zip(leaves, slopes, strict=True):
        assert slope is None or slope.isfinite().all(), f"an empty row puts NaN into the gradient of {name}"
    slopes = torch.autograd.grad(o[empty].sum(), list(leaves.values()), allow_unused=True)
    for name, slope in zip(leaves, slopes, strict=True):
        assert slope is None or not slope.any(), f"an empty row has a gradient in {name}"


@law(examples=20, full=300, takes=("mask",))
def padding(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """A sequence padded left, right or on both sides, with garbage for padding, is the sequence alone."""
    n = rng.choice((5, 49, 80))
    left, right = (rng.choice((0, 0, 1, rng.randint(0, 32))) for _ in range(2))
    alone = sample(spec, rng, b=1, h=4, g=2, m=n, n=n, d=16, e=8)
    garbage = 50.0 if spec.backend(backend).finite_only else rng.choice((50.0, torch.nan, torch.inf))
    padded = {
        name: torch.nn.functional.pad(x, (0, 0, left, right), value=garbage if name != "q" else 50.0)
        for name, x in along(alone, 2, n).items()
    }
    keep = torch.zeros(1, left + n + right, dtype=torch.bool)
    keep[:, left : left + n] = True
    mask = attnkit.padding(keep) & attnkit.causal()
    found = run(spec, backend, {**alone, **padded, "mask": mask})[0][:, :, left : left + n]
    assert_equals_call(found.clone(), spec, {**alone, "mask": attnkit.causal()})


@law(examples=16, full=200, takes=("mask",))
def documents(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """Packed documents, some of one token, are the documents apart."""
    lengths = [rng.choice((1, 2, 5, 30, 64)) for _ in range(rng.randint(1, 5))]
    n = sum(lengths)
    arguments = sample(spec, rng, b=1, h=2, g=1, m=n, n=n, d=8, e=16)
    ids = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    o = run(spec, backend, {**arguments, "mask": attnkit.documents(ids) & attnkit.causal()})[0]
    for name, x in along(arguments, 2, n).items():
        arguments[name] = x.split(lengths, 2)
    for i, part in enumerate(o.split(lengths, 2)):
        alone = {name: x[i].clone() if isinstance(x, tuple) else x for name, x in arguments.items()}
        assert_equals_call(part.clone(), spec, {**alone, "mask": attnkit.causal()})
