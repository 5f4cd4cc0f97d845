"""What must not matter: the other sequences of a batch, the order of heads, the order of keys nobody counts."""

from __future__ import annotations

import random
from typing import Any

import torch

from attnkit.spec import Mechanism
from attnkit.testing import runs, samplers
from attnkit.testing.budgets import assert_within
from attnkit.testing.laws.base import along, assert_equals_call, assert_same, has_own_bits, law, run, sample, sequences


@law(examples=12, full=200)
def batch_peers(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """A sequence alone is its row of any batch, whatever its slot and its peers, one of them all NaN.

    Bit for bit in native kernels, which cut their work by lengths alone; torch cuts a matrix product by the batch too.
    """
    b = rng.choice((2, 3, 7, 16, 33, 64))
    n = rng.choice((1, 17, 65))
    arguments = sample(spec, rng, b=b, h=4, g=2, m=n, n=n, d=16, e=8)
    slot, other = rng.sample(range(b), 2)
    batched = sequences(arguments, b)
    alone = {**arguments, **{name: x[slot : slot + 1].clone() for name, x in batched.items()}}
    found = {f"slot {slot} of {b}": run(spec, backend, arguments)[0][slot : slot + 1]}
    order = torch.randperm(b)
    mixed = {name: x[order].clone() for name, x in batched.items()}
    for x in mixed.values():
        if x.is_floating_point():
            x[int((order == other).nonzero())] = torch.nan
    place = int((order == slot).nonzero())
    moved = run(spec, backend, {**arguments, **mixed})[0][place : place + 1]
    found[f"slot {slot} of {b} moved to {place} beside a NaN sequence"] = moved
    gold, naive = runs.gold(spec, alone)[0], runs.naive(spec, alone)[0]
    for what, o in found.items():
        assert_within(o.clone(), gold, naive, o.dtype, what=what)
        if has_own_bits(spec, backend):
            assert_same(o, run(spec, backend, alone)[0], what)


@law(examples=12, promised="separate_heads")
def head_order(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """Permuting KV heads together with their query heads permutes the result; a head reads its own KV head only."""
    g, r = rng.choice((2, 3)), rng.choice((1, 2, 3))
    n = rng.choice((5, 50, 65))
    arguments = sample(spec, rng, b=1, h=g * r, g=g, m=n, n=n, d=8, e=16)
    if along(arguments, 1, g).keys() <= {"q"}:
        g, r = g * r, 1  # the mechanism shares no KV heads
    for name in ("sink", "alibi"):
        if name in samplers.features(spec):
            extra = {**arguments, name: torch.rand(g * r)}
            arguments = extra if not spec.backend(backend).rejects(spec.call(**extra)) else arguments
    clean = run(spec, backend, arguments)[0]
    groups = torch.tensor(rng.sample(range(g), g))
    heads = (groups[:, None] * r + torch.arange(r)).flatten()
    permuted = run(spec, backend, {**arguments, **_heads_permuted(arguments, g, g * r, groups, heads)})[0]
    # Not bit for bit: how a matrix product rounds may depend on where in memory its head starts.
    gold, naive = (x[0][:, heads].clone() for x in (runs.gold(spec, arguments), runs.naive(spec, arguments)))
    assert_within(permuted, gold, naive, torch.float32, what=f"KV heads in order {groups.tolist()}")
    own = rng.randrange(g)
    changed = {name: x.clone() for name, x in along(arguments, 1, g).items() if name != "q"}
    for x in changed.values():
        x[:, own] += 1 + x[:, own].square()
    reacts = (run(spec, backend, {**arguments, **changed})[0] != clean).flatten(2).any(-1)[0]
    readers = torch.arange(g * r) // r == own
    assert torch.equal(reacts, readers), f"KV head {own} is read by {reacts.nonzero().flatten().tolist()}"


def _heads_permuted(
    arguments: dict[str, Any], g: int, h: int, groups: torch.Tensor, heads: torch.Tensor
) -> dict[str, Any]:
    mixed = {name: x[:, groups] for name, x in along(arguments, 1, g).items()}
    mixed |= {name: x[:, heads] for name, x in along(arguments, 1, h).items() if g != h or name == "q"}
    # What is left of a size h in front belongs to the heads themselves: sinks, slopes, weights, layouts.
    rest = {name: x for name, x in arguments.items() if isinstance(x, torch.Tensor) and name not in mixed}
    return mixed | {name: x[heads] for name, x in rest.items() if x.dim() and len(x) == h}


@law(examples=8, full=100, takes=("k", "v", "mask"))
def key_order(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """Without mask and positions the order of keys means nothing."""
    m, n = rng.choice(((1, 130), (5, 64), (65, 65)))
    arguments = {**sample(spec, rng, b=2, h=2, g=1, m=m, n=n, d=16, e=8), "mask": None}
    order = torch.randperm(n)
    moved = {name: arguments[name][:, :, order] for name in ("k", "v")}
    assert_equals_call(run(spec, backend, {**arguments, **moved})[0], spec, arguments)


@law(examples=8, takes=("v", "mask"), promised="weights_sum_to_one")
def weights_sum_to_one(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """Values that are all 1 give 1 wherever something is visible."""
    n = rng.choice((1, 49, 130))
    arguments = samplers.arguments(spec, rng, only=("mask", "scale"), of=samplers.sizes(spec, rng, largest=n))
    arguments["v"] = torch.ones_like(arguments["v"])
    o = run(spec, backend, arguments)[0]
    assert_equals_call(o, spec, arguments)
    assert bool(((o - 1).abs() < 0.5).logical_or(o == 0).all()), "weights of a row do not sum to 1"
