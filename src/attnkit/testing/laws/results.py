"""A backend gives what the definition gives, forward and backward, in every layout, every time."""

from __future__ import annotations

import random

import torch
from torch import Tensor

from attnkit.spec import Mechanism, Sizes
from attnkit.testing import runs, samplers
from attnkit.testing.laws.base import (
    Refused,
    assert_equals_call,
    assert_matches,
    assert_same,
    has_own_bits,
    law,
    run,
    sample,
    sequences,
)


@law(examples=60)
def definition(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """Any call that is not refused equals the float64 definition, within the budget of float32."""
    assert_matches(spec, backend, samplers.arguments(spec, rng))


@law(examples=40)
def definition_in_half_precision(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """The same for bfloat16 and float16, whose budgets can only judge rounding."""
    dtype = rng.choice((torch.bfloat16, torch.float16))
    assert_matches(spec, backend, samplers.arguments(spec, rng, dtype=dtype))


@law(examples=10)
def definition_in_double_precision(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """A float64 call is computed in float64."""
    assert_matches(spec, backend, samplers.arguments(spec, rng, dtype=torch.float64))


@law(examples=9)
def layouts(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """Strides, offsets, expanded and sliced storage are read as what they say, for every tensor and layout."""
    size = Sizes(b=2, h=4, g=2, m=49, n=49, d=rng.choice((8, 59, 64)), e=rng.choice((8, 111)))
    arguments = spec.sample(rng.randrange(1 << 30), size, torch.float32)
    for name, x in runs.tensors(arguments).items():
        if x.dim() == 4:
            arguments[name] = samplers.laid_out(rng, x)
    assert_matches(spec, backend, arguments)


@law(examples=24, gradients=True)
def gradients(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """The gradient of every floating argument equals that of the float64 definition."""
    dtype = rng.choice((torch.float64, torch.float32, torch.float32, torch.bfloat16, torch.float16))
    arguments = samplers.arguments(spec, rng, of=samplers.sizes(spec, rng, largest=49), dtype=dtype)
    wanted = {
        **arguments,
        **{name: x.detach().clone().requires_grad_() for name, x in runs.tensors(arguments).items()},
    }
    if runs.reasons(spec, backend, wanted):
        raise Refused
    runs.assert_gradients_match(spec, backend, arguments, seed=rng.randrange(1 << 30))


@law(examples=4)
def gradients_or_a_reason(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """A backend without gradients refuses inputs that want one, and runs them under ``no_grad``."""
    arguments = samplers.arguments(spec, rng, only=(), layouts=False)
    for name in runs.tensors(arguments):
        wanted = {**arguments, name: arguments[name].clone().requires_grad_()}
        refused = bool(runs.reasons(spec, backend, wanted))
        assert refused or spec.backend(backend).grad, f"{backend} has no gradients and takes a {name} that wants one"
        if not refused:
            found = runs.run(spec, backend, wanted)[0]
            assert found.requires_grad, f"{backend} lost the gradient of {name}"
        with torch.no_grad():
            run(spec, backend, wanted)


@law(examples=2)
def deterministic(spec: Mechanism, backend: str, rng: random.Random) -> None:
    """50 repeats give the same bits; another number of threads keeps to the budget.

    In native kernels a sequence has the bits that it has alone, forward and backward, in any batch and by any threads.
    """
    size = Sizes(b=2, h=4, g=2, m=rng.choice((5, 97)), n=130, d=32, e=32)
    arguments = samplers.arguments(spec, rng, of=size, only=("mask",))
    for count in (1, 2):
        with runs.threads(count):
            first = run(spec, backend, arguments)
            assert_equals_call(first[0], spec, arguments, f"{count} threads")
            for repeat in range(25):
                for got, wanted in zip(run(spec, backend, arguments), first, strict=True):
                    assert_same(got, wanted, f"repeat {repeat} with {count} threads")
    if has_own_bits(spec, backend):
        _same_bits_in_any_batch(spec, backend, rng)


def _same_bits_in_any_batch(spec: Mechanism, backend: str, rng: random.Random) -> None:
    b, n = 3, rng.choice((1, 97, 300))
    dtype = rng.choice((torch.float32, torch.bfloat16, torch.float16))
    arguments = sample(spec, rng, dtype, b=b, h=4, g=2, m=n, n=n, d=32, e=32)
    batched = sequences(arguments, b)
    if runs.reasons(spec, backend, arguments):
        return

    def results(batch: list[int]) -> list[Tensor]:
        """Of these sequences: the result, and its gradients in every tensor that is theirs."""
        call = {**arguments, **{name: x[batch].clone() for name, x in batched.items()}}
        found = [runs.run(spec, backend, call)[0]]
        leaves = {name: x.requires_grad_() for name, x in runs.tensors(call).items() if name in batched}
        if not runs.reasons(spec, backend, call):
            o = runs.run(spec, backend, call)[0]
            slopes = torch.autograd.grad(o.square().sum(), list(leaves.values()), allow_unused=True)
            found += [slope for slope in slopes if slope is not None]
        return found

    alone = results([0])
    for repeat in range(50):
        batch = rng.sample(range(b), rng.randint(1, b))
        batch = batch if 0 in batch else [*batch, 0]
        count, place = rng.choice((1, 2)), batch.index(0)
        with runs.threads(count):
            found = results(batch)
        for i, (got, wanted) in enumerate(zip(found, alone, strict=True)):
            what = f"result {i}" if i == 0 else f"gradient {i}"
            assert_same(got[place], wanted[0], f"{what} of sequence 0 of {batch}, {count} threads, repeat {repeat}")
