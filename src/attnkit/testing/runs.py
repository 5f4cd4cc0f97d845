"""The three runs of one call that a test compares: a backend's, the definition in float64, plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from attnkit.dispatch import decide
from attnkit.spec import Mechanism
from attnkit.testing.budgets import assert_distinct, assert_within

Arguments = Mapping[str, Any]
"""Keyword arguments of a mechanism's function."""
Results = tuple[Tensor, ...]
SCALED = ("k", "global_k", "compressed_k", "window_k")
"""The keys that a call's ``scale`` multiplies."""


def tensors(arguments: Arguments) -> dict[str, Tensor]:
    """The floating tensors among the arguments: what a gradient can be asked of."""
    return {name: x for name, x in arguments.items() if isinstance(x, Tensor) and x.is_floating_point()}


def copies(arguments: Arguments) -> dict[str, Any]:
    """Arguments in memory of their own, laid out with the same strides and offsets."""
    return {name: _twin(x) if isinstance(x, Tensor) else x for name, x in arguments.items()}


def reasons(spec: Mechanism, backend: str, arguments: Arguments) -> tuple[str, ...]:
    """Why the backend refuses this call; empty when it runs it."""
    return spec.backend(backend).rejects(spec.call(**arguments))


def run(spec: Mechanism, backend: str, arguments: Arguments) -> Results:
    """What the named backend makes of the call, in memory poisoned with NaN; its inputs must come out unchanged."""
    before = copies(arguments)
    call = spec.call(**arguments)
    chosen, _ = decide(spec, call, backend)
    assert chosen.name == backend, f"{backend} was named and {chosen.name} ran"
    with poisoned_memory():
        found = results(chosen.load()(**call))
    for name, x in tensors(before).items():
        same = torch.equal(arguments[name].nan_to_num(), x.nan_to_num())
        assert same, f"{backend} changed its argument {name}"
    return found


def gold(spec: Mechanism, arguments: Arguments) -> Results:
    """The definition in float64 on the inputs as stored."""
    return results(spec.reference(**_cast(spec.call(**arguments), torch.float64)))


def naive(spec: Mechanism, arguments: Arguments) -> Results:
    """The definition in plain arithmetic of the inputs' own dtype, with the scale multiplied into the keys.

    Two correct programs multiply in different orders; without the changed order this would be the reference itself, and
    a budget made from it would be empty.
    """
    call = spec.call(**arguments)
    if "scale" in call and "k" in call:
        call = {**call, **{name: call[name] * call["scale"] for name in SCALED if name in call}, "scale": 1.0}
    with Rounded(next(iter(tensors(arguments).values())).dtype):
        return results(spec.reference(**call))


def assert_matches(spec: Mechanism, backend: str, arguments: Arguments) -> float:
    """The backend's results keep to the budget; returns the share of it that they used."""
    dtype = next(iter(tensors(arguments).values())).dtype
    got = run(spec, backend, copies(arguments))
    return assert_results_within(got, gold(spec, arguments), naive(spec, arguments), dtype)


def assert_results_within(got: Results, true: Results, plain: Results, dtype: torch.dtype) -> float:
    """``assert_within`` for each of a function's results."""
    assert len(got) == len(true), f"got {len(got)} results, expected {len(true)}"
    return max(
        assert_within(one, two, three, dtype, what=f"result {i}")
        for i, (one, two, three) in enumerate(zip(got, true, plain, strict=True))
    )


def assert_gradients_match(spec: Mechanism, backend: str, arguments: Arguments, seed: int = 0) -> float:
    """Gradients of every floating argument keep to the budget, for a random direction in every result."""
    dtype = next(iter(tensors(arguments).values())).dtype

    def gradients(of: Callable[[Arguments], Results], given: Arguments) -> dict[str, Tensor]:
        leaves = {name: x.requires_grad_() for name, x in tensors(given).items()}
        generator = torch.Generator().manual_seed(seed)
        total = torch.zeros((), dtype=torch.float64)
        for found in of({**given, **leaves}):
            direction = torch.randn(found.shape, generator=generator, dtype=torch.float64)
            # Multiplying by a transposed direction hands a non-contiguous gradient to the backward.
            direction = direction.transpose(-1, -2).contiguous().transpose(-1, -2) if found.dim() > 1 else direction
            # A log-sum-exp of -inf has no gradient, and 0 x inf would be NaN.
            total = total + torch.where(found.isinf(), 0.0, found.double() * direction.to(dtype).double()).sum()
        # A call without queries gives nothing that depends on its arguments.
        every = list(leaves.values())
        slopes = torch.autograd.grad(total, every, allow_unused=True) if total.requires_grad else [None] * len(every)
        pairs = zip(leaves.items(), slopes, strict=True)
        return {name: torch.zeros_like(x) if slope is None else slope for (name, x), slope in pairs}

    inputs = [copies(arguments), copies(_cast(arguments, torch.float64)), copies(arguments)]
    named = {f"{name}{i}": x for i, given in enumerate(inputs) for name, x in tensors(given).items()}
    assert_distinct(**named)
    got = gradients(lambda given: run(spec, backend, given), inputs[0])
    true = gradients(lambda given: gold(spec, given), inputs[1])
    with Rounded(dtype):
        plain = gradients(lambda given: naive(spec, given), inputs[2])
    # A float32 bias beside float64 queries has a float32 gradient.
    return max(
        assert_within(x, true[name], plain[name], _coarser(x.dtype, dtype), gradient=True, what=f"gradient of {name}")
        for name, x in got.items()
    )


def results(found: Any) -> Results:
    """A function's result as a tuple of tensors."""
    return found if isinstance(found, tuple) else (found,)


def drawn(b: int, h: int, g: int, m: int, n: int, d: int, e: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Normal ``q`` (b, h, m, d), ``k`` (b, g, n, d) and ``v`` (b, g, n, e), always the same."""
    torch.manual_seed(0)
    shapes = {"q": (b, h, m, d), "k": (b, g, n, d), "v": (b, g, n, e)}
    return {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch, and with it our kernels, runs on so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Fresh memory holds NaN (or the largest integer): an output that was never written shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


class Rounded(TorchDispatchMode):
    """Every operation's float32 result is rounded to ``dtype``: arithmetic in half precision with float32 sums.

    The exponent keeps float32's range, so that a plain run of fp16 has errors and no overflow.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.rounds = None if dtype in (torch.float32, torch.float64) else dtype

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        alias = func._schema.returns[0].alias_info if func._schema.returns else None
        if self.rounds is None or not isinstance(out, Tensor) or out.dtype != torch.float32:
            return out
        if alias is None:
            return self._round(out)
        return out.copy_(self._round(out)) if alias.is_write else out

    def _round(self, x: Tensor) -> Tensor:
        assert self.rounds is not None
        rounded = x.to(self.rounds).to(x.dtype)
        return torch.where(rounded.isinf(), x, rounded)


def _coarser(one: torch.dtype, other: torch.dtype) -> torch.dtype:
    return max(one, other, key=lambda dtype: torch.finfo(dtype).eps)


def _cast(arguments: Arguments, dtype: torch.dtype) -> dict[str, Any]:
    return {**arguments, **{name: x.to(dtype) for name, x in tensors(arguments).items()}}


def _twin(x: Tensor) -> Tensor:
    storage = x.detach().untyped_storage().clone()
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(storage, x.storage_offset(), x.shape, x.stride())
