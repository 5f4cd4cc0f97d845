"""What a law is, and what every law needs: a call made or refused, tensors told apart by their axes."""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from attnkit.spec import Mechanism, Sizes
from attnkit.testing import runs
from attnkit.testing.budgets import assert_within
from attnkit.testing.runs import Arguments, Results

WHOLLY_NATIVE = ("bigbird", "delta", "gla", "longformer", "mla", "moba", "nsa", "retention", "softmax", "topk")
"""Mechanisms whose backend ``cpu`` leaves no sum to torch, which cuts a matrix product by the batch and the threads."""


class Refused(Exception):  # noqa: N818
    """The backend says why it cannot run the call that the law wanted to try."""


@dataclass(frozen=True)
class Law:
    """One promise, and the program that tries to break it.

    ``check(spec, backend, rng)`` raises ``AssertionError`` when the promise is broken. ``examples`` is how many random
    tries the contract tests make, and ``full`` how many they make when time does not matter.
    """

    name: str
    check: Callable[[Mechanism, str, random.Random], None]
    examples: int
    full: int
    takes: tuple[str, ...]
    takes_any: tuple[str, ...]
    promised: str | None
    gradients: bool
    layer: bool

    @property
    def promise(self) -> str:
        return inspect.getdoc(self.check) or ""

    def applies(self, spec: Mechanism, backend: str) -> bool:
        """Whether the mechanism makes this promise, and the backend has what it takes to be asked."""
        return (
            parameters(spec).issuperset(self.takes)
            and (not self.takes_any or bool(parameters(spec).intersection(self.takes_any)))
            and (self.promised is None or getattr(spec.laws, self.promised))
            and (not self.gradients or spec.backend(backend).grad)
            and (not self.layer or bool(spec.presets))
        )

    def __call__(self, spec: Mechanism, backend: str, seed: int = 0) -> bool:
        """Try once. False when the backend refuses the call, in which case nothing was tried."""
        try:
            self.check(spec, backend, random.Random(seed))
        except Refused:
            return False
        return True


LAWS: dict[str, Law] = {}


def law(
    examples: int = 12,
    full: int | None = None,
    takes: tuple[str, ...] = (),
    takes_any: tuple[str, ...] = (),
    promised: str | None = None,
    gradients: bool = False,
    layer: bool = False,
) -> Callable[[Callable[[Mechanism, str, random.Random], None]], Law]:
    """Make a law of a function and list it; ``full`` is ten times ``examples`` unless it is given."""

    def make(check: Callable[[Mechanism, str, random.Random], None]) -> Law:
        made = Law(check.__name__, check, examples, full or 10 * examples, takes, takes_any, promised, gradients, layer)
        LAWS[made.name] = made
        return made

    return make


def parameters(spec: Mechanism) -> set[str]:
    """Names of the arguments of the mechanism's function."""
    return set(inspect.signature(spec.call).parameters)


def run(spec: Mechanism, backend: str, arguments: Arguments) -> Results:
    """``runs.run``, or ``Refused`` when the backend has a reason, which must then be given to users as well."""
    if runs.reasons(spec, backend, arguments):
        raise Refused
    return runs.run(spec, backend, arguments)


def assert_matches(spec: Mechanism, backend: str, arguments: Arguments) -> None:
    """``runs.assert_matches`` unless the backend refuses the call."""
    if runs.reasons(spec, backend, arguments):
        raise Refused
    runs.assert_matches(spec, backend, arguments)


def sample(spec: Mechanism, rng: random.Random, dtype: torch.dtype = torch.float32, **of: Any) -> dict[str, Any]:
    """``spec.sample`` at ``Sizes(**of)``, with a random seed."""
    return spec.sample(rng.randrange(1 << 30), Sizes(**of), dtype)


def along(arguments: Arguments, axis: int, size: int) -> dict[str, Tensor]:
    """The tensors whose ``axis`` has this size: all sequences for ``(2, n)``, all batches for ``(0, b)``."""
    return {name: x for name, x in runs.tensors(arguments).items() if x.dim() > 2 and x.shape[axis] == size}


def sequences(arguments: Arguments, b: int) -> dict[str, Tensor]:
    """The tensors that hold something of each of ``b`` sequences: also integers of each, such as lengths."""
    whole = {name: x for name, x in arguments.items() if isinstance(x, Tensor) and not x.is_floating_point()}
    return along(arguments, 0, b) | {name: x for name, x in whole.items() if x.dim() and len(x) == b}


def has_own_bits(spec: Mechanism, backend: str) -> bool:
    """Whether the bits of a sequence depend on nothing else: not on its batch, its place in it, or the threads."""
    return backend == "cpu" and spec.name in WHOLLY_NATIVE


def assert_equals_call(found: Tensor, spec: Mechanism, arguments: Arguments, what: str = "result") -> None:
    """A result keeps to the budget of another call, which it should equal."""
    gold, naive = runs.gold(spec, arguments)[0], runs.naive(spec, arguments)[0]
    assert_within(found.clone(), gold, naive, found.dtype, what=what)


def assert_same(got: Tensor, wanted: Tensor, what: str) -> None:
    """Bit for bit, with NaN equal to NaN."""
    same = (got == wanted) | (got.isnan() & wanted.isnan())
    assert bool(same.all()), f"{what}: {int((~same).sum())} of {same.numel()} elements changed"
